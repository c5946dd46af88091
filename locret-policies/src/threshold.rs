//! What scores less than a threshold goes.

use locret_core::{
    Error, KvCachePolicy, LayerSpec, LayerUnits, ModelSpec, Needs, Phase, Positions, Prefill,
    Result, Scorer, Step, Verdict,
};

/// Any scorer with a threshold in the place of a budget (KVzap, arXiv 2601.07891 §3.3, DMS, 2506.05345): a unit
/// whose score is below it goes as soon as it is no longer among the newest of its head.
///
/// **Keeps** the first `sinks` and the newest `window` units of each KV head, and all others that score enough:
/// as many as the text has, so that **nothing bounds the cache**. Where memory is bounded, a budget with the same
/// scores is the other way ([`Evict`](locret_core::Evict)); heads that share it over the model
/// ([`Share::Model`](locret_core::Share::Model)) come nearest to what a threshold keeps.
///
/// **Cost:** that of the scorer.
///
/// **Chunked prefill:** scores that a unit is born with give the same units whatever the chunks; the peak of a
/// layer is what it keeps and a chunk. For scores that change with the cache a threshold means little.
///
/// In a prompt's tail and in forced text nothing goes; in what is generated only if that is asked for
/// ([`while_decoding`](Self::while_decoding)).
#[derive(Debug, Clone)]
#[must_use]
pub struct Threshold<S> {
    scorer: S,
    threshold: f32,
    sinks: usize,
    window: usize,
    positions: Positions,
    decoding: bool,
}

impl<S: Scorer> Threshold<S> {
    /// Newest units that stay, as KVzap was published.
    pub const WINDOW: usize = 128;

    /// Keeps what scores at least `threshold` and the newest 128 units; original positions.
    pub fn new(scorer: S, threshold: f32) -> Self {
        Self {
            scorer,
            threshold,
            sinks: 0,
            window: Self::WINDOW,
            positions: Positions::Original,
            decoding: false,
        }
    }

    /// Keeps the first units of the sequence, too.
    pub fn sinks(self, units: usize) -> Self {
        Self {
            sinks: units,
            ..self
        }
    }

    /// Keeps so many of the newest units.
    pub fn window(self, units: usize) -> Self {
        Self {
            window: units,
            ..self
        }
    }

    /// Chooses the positions.
    pub fn with_positions(self, positions: Positions) -> Self {
        Self { positions, ..self }
    }

    /// Whether units go while text is generated.
    pub fn while_decoding(self, decoding: bool) -> Self {
        Self { decoding, ..self }
    }
}

impl<S: Scorer> KvCachePolicy for Threshold<S> {
    fn name(&self) -> String {
        self.scorer.name()
    }

    fn fingerprint(&self) -> String {
        let Self {
            scorer,
            threshold,
            sinks,
            window,
            positions,
            decoding,
        } = self;
        let scorer = scorer.fingerprint();
        format!(
            "Threshold {{ scorer: {scorer}, threshold: {threshold:?}, sinks: {sinks}, window: {window}, \
             positions: {positions:?}, decoding: {decoding} }}"
        )
    }

    fn needs(&self) -> Needs {
        self.scorer.needs()
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn carries(&self) -> Option<String> {
        self.scorer.carries().then(|| self.scorer.name())
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.scorer.carried_width(layer)
    }

    fn noted(&self, layer: &LayerSpec) -> usize {
        self.scorer.noted(layer)
    }

    fn validate(&self, model: &ModelSpec, _prefill: &Prefill) -> Result<()> {
        match self.threshold.is_nan() {
            true => Err(Error::setting("threshold", "a number", self.threshold)),
            false => self.scorer.validate(model),
        }
    }

    fn decode_slack(&self) -> Option<usize> {
        self.decoding.then_some(0)
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let cut = match at.phase {
            Phase::Decode => self.decoding,
            phase => phase.evicts(),
        };
        let notes = match self.scorer.noted(&at.layer) {
            0 => None,
            _ => self.scorer.notes(at, units)?,
        };
        let scores = match (cut, self.scorer.carries()) {
            (true, _) => self.scorer.score(at, units)?,
            (false, true) => self.scorer.carry(at, units)?,
            (false, false) => return Ok(Verdict::keep_all().noting(notes)),
        };
        let mut verdict = Verdict::keep_all().noting(notes);
        if cut {
            let kept = (0..units.kv_heads()).map(|head| {
                let (n, positions) = (units.len(head), units.positions(head));
                let scores: Vec<f32> = (scores.head(head).iter())
                    .step_by(scores.width())
                    .copied()
                    .collect();
                let stays = |unit: &u32| {
                    let unit = *unit as usize;
                    (positions[unit] as usize) < self.sinks
                        || unit + self.window >= n
                        || scores[unit] >= self.threshold
                };
                (0..n as u32).filter(stays).collect()
            });
            verdict = Verdict::keep(kept.collect())?.noting(verdict.notes);
        }
        Ok(match self.scorer.carries() {
            true => verdict.carrying(scores),
            false => verdict,
        })
    }
}
