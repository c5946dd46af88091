//! DuoAttention: some heads keep everything, the others the beginning and the newest units.

use crate::{PolicyError, Result as PolicyResult};
use locret_core::{
    DecodeEviction, Error, KvCachePolicy, LayerSpec, LayerUnits, ModelSpec, Phase, Positions,
    Prefill, Result, Step, Verdict,
};
use std::{fs, path::Path, sync::Arc};

/// DuoAttention (arXiv 2410.10819 §3): KV heads whose score in a table is high retrieve from far away and keep
/// everything; the others are *streaming* heads, which keep the first and the newest units. Scores are trained
/// gates between 0 and 1, which the authors publish for their models (`full_attention_heads.tsv`, a row for each
/// layer, a column for each KV head).
///
/// **Keeps** all units of the heads with the highest scores, and of a given share of all heads of the model, those
/// with the lowest, the first `sinks` and the newest `recent` units. **Only streaming heads are bounded.**
///
/// **Cost:** none.
///
/// **Chunked prefill:** what a streaming head has dropped it never sees again, as with
/// [`Window`](crate::Window); which heads are streaming does not depend on the text. A chunk's own queries see
/// all of the chunk, where the authors' mask has them see the newest units alone.
#[derive(Debug, Clone)]
#[must_use]
pub struct DuoAttention {
    /// By layer and KV head.
    streaming: Arc<Vec<Vec<bool>>>,
    sinks: usize,
    recent: usize,
    positions: Positions,
    decode: DecodeEviction,
}

impl DuoAttention {
    /// First units of a streaming head, as published.
    pub const SINKS: usize = 128;
    /// Newest units of a streaming head, as published.
    pub const RECENT: usize = 256;
    /// The share of heads that stream, as published for models with grouped heads.
    pub const STREAMING: f64 = 0.5;

    /// The share `streaming` of all heads, those with the lowest of `scores` (a row for each layer), streams;
    /// of equal scores the earlier head. Scores are brought between 0 and 1 first.
    ///
    /// # Errors
    /// [`Error::Setting`] for rows of different lengths, a score that is no number, or a share that is not
    /// between 0 and 1.
    pub fn new(scores: &[Vec<f64>], streaming: f64) -> Result<Self> {
        let heads = scores.first().map_or(0, Vec::len);
        if heads == 0 || scores.iter().any(|row| row.len() != heads) {
            let found: Vec<usize> = scores.iter().map(Vec::len).collect();
            let expected = "a row for each layer, with a score for each KV head";
            return Err(Error::setting(
                "scores of heads",
                expected,
                format!("rows of {found:?}"),
            ));
        }
        if let Some(bad) = scores.iter().flatten().find(|score| score.is_nan()) {
            return Err(Error::setting("scores of heads", "numbers", bad));
        }
        if !(0.0..=1.0).contains(&streaming) {
            return Err(Error::setting(
                "streaming",
                "a share from 0 to 1",
                streaming,
            ));
        }
        let all: Vec<f64> = scores.iter().flatten().map(|s| s.clamp(0.0, 1.0)).collect();
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by(|a, b| all[*a].total_cmp(&all[*b]));
        let mut lists = vec![vec![false; heads]; scores.len()];
        // Halves to even, as the authors' language rounds.
        let count = (streaming * all.len() as f64).round_ties_even() as usize;
        for head in &order[..count] {
            lists[head / heads][head % heads] = true;
        }
        Ok(Self {
            streaming: lists.into(),
            sinks: Self::SINKS,
            recent: Self::RECENT,
            positions: Positions::Original,
            decode: DecodeEviction::Off,
        })
    }

    /// With the scores of a file, numbers that are apart by tabs or spaces, a row for each layer.
    ///
    /// # Errors
    /// [`PolicyError::Io`], [`PolicyError::File`] for what is no number; as [`new`](Self::new).
    pub fn load(path: impl AsRef<Path>, streaming: f64) -> PolicyResult<Self> {
        let path = path.as_ref();
        let text = fs::read_to_string(path).map_err(PolicyError::io(path))?;
        let number = |word: &str| {
            let found = || PolicyError::file(path, format!("{word:?} is no number"));
            word.parse::<f64>().map_err(|_| found())
        };
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        let rows = lines.map(|line| line.split_whitespace().map(number).collect());
        let rows: Vec<Vec<f64>> = rows.collect::<PolicyResult<_>>()?;
        Self::new(&rows, streaming).map_err(|e| PolicyError::file(path, e))
    }

    /// First units that streaming heads keep.
    pub fn sinks(self, units: usize) -> Self {
        Self {
            sinks: units,
            ..self
        }
    }

    /// Newest units that streaming heads keep (at least 1).
    pub fn recent(self, units: usize) -> Self {
        Self {
            recent: units,
            ..self
        }
    }

    /// Chooses the positions.
    pub fn with_positions(self, positions: Positions) -> Self {
        Self { positions, ..self }
    }

    /// Chooses whether units are dropped while text is generated.
    pub fn while_decoding(self, decode: DecodeEviction) -> Self {
        Self { decode, ..self }
    }

    /// Whether a KV head of a layer streams.
    ///
    /// # Panics
    /// For a layer or a head that the table does not have.
    pub fn streams(&self, layer: usize, head: usize) -> bool {
        self.streaming[layer][head]
    }

    fn kept(&self) -> usize {
        self.sinks.saturating_add(self.recent)
    }
}

impl KvCachePolicy for DuoAttention {
    fn name(&self) -> String {
        "duo-attention".into()
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn validate(&self, model: &ModelSpec, _prefill: &Prefill) -> Result<()> {
        let (due, found) = (
            [model.layers, model.kv_heads],
            [self.streaming.len(), self.streaming[0].len()],
        );
        if due != found {
            return Err(Error::Shape {
                what: "scores of heads (layers, KV heads)",
                expected: format!("{due:?}"),
                found: format!("{found:?}"),
            });
        }
        if self.recent == 0 {
            return Err(Error::setting("recent", "at least 1 unit", 0));
        }
        if self.decode == DecodeEviction::Every(0) {
            return Err(Error::setting("decode eviction interval", "at least 1", 0));
        }
        Ok(())
    }

    fn limit(&self, _layer: &LayerSpec, _total: usize) -> Option<usize> {
        // A head that retrieves anywhere is one that nothing bounds.
        let all = self.streaming.iter().flatten().all(|streams| *streams);
        all.then(|| self.kept())
    }

    fn decode_slack(&self) -> Option<usize> {
        match self.decode {
            DecodeEviction::Off => None,
            DecodeEviction::Every(n) => Some(n.saturating_sub(1)),
        }
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let slack = match (at.phase, self.decode) {
            (Phase::Decode, DecodeEviction::Every(n)) => n.saturating_sub(1),
            (Phase::Turn | Phase::Prefill { .. }, _) => 0,
            _ => return Ok(Verdict::keep_all()),
        };
        let most = self.kept().saturating_add(slack);
        let streams = |head: usize| self.streams(at.layer.index, head);
        let over = |head: usize| streams(head) && units.len(head) > most;
        if !(0..units.kv_heads()).any(over) {
            return Ok(Verdict::keep_all());
        }
        let kept = (0..units.kv_heads()).map(|head| {
            let n = units.len(head);
            let stays = |unit: &u32| {
                let unit = *unit as usize;
                !streams(head) || unit < self.sinks || unit + self.recent >= n
            };
            (0..n as u32).filter(stays).collect()
        });
        Verdict::keep(kept.collect())
    }
}
