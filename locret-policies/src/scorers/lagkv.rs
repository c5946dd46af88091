//! LagKV: units that differ from what follows them.

use crate::published::Published;
use locret_core::{
    Budget, Error, Evict, Guard, LayerUnits, ModelSpec, Result, Scorer, Scores, Step,
};
use std::ops::Range;

/// LagKV (arXiv 2504.04704 §3): the text after the first units is cut into partitions, and a unit is judged by
/// the partition that follows its own. Each channel of a key is scaled by the minimum and the maximum that the
/// next partition has there; the score is the standard deviation of the scaled channels, as a softmax over the
/// unit's partition; the same of values; the mean of both; and of that the rank within the partition, as a share
/// of it.
///
/// **Keeps** the first units, what no partition follows yet, and of each partition about as large a share as of
/// any other: ranks see to that. It follows that heads that share a budget ([`Evict::ada`]) get the same.
///
/// **Cost:** keys and values of two partitions are looked at once, when the second of them is complete; no
/// attention, no queries.
///
/// **Chunked prefill:** made for it. A unit's score is known one partition after its own and never changes; a
/// unit that is not judged yet stands above all that are, the newer the higher. With a budget of at least the
/// first units and two partitions (260 units as published) no chunk drops what is not judged, and the scores
/// are those of a text that is read at once, whatever the chunks. Smaller budgets want smaller partitions
/// ([`lag`](Self::lag)); what is left of a partition is judged by what is left of the next one otherwise.
///
/// Keys are taken as attention sees them, rotated. In compact positions their angles are those of the moment at
/// which they are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct LagKv {
    lag: usize,
}

impl Default for LagKv {
    fn default() -> Self {
        Self { lag: Self::LAG }
    }
}

impl LagKv {
    /// First units that stay, as published.
    pub const SINKS: usize = 4;
    /// Units of a partition, as published.
    pub const LAG: usize = 128;

    /// Partitions of 128 units.
    pub fn new() -> Self {
        Self::default()
    }

    /// Partitions of `units` (at least 1).
    pub fn lag(self, units: usize) -> Self {
        Self { lag: units }
    }

    /// Keeps `budget` units, the first four for certain; original positions.
    pub fn policy(self, budget: Budget) -> Evict<Self> {
        self.published(budget)
    }

    /// How many partitions are judged in a text of so many tokens.
    fn judged(self, tokens: usize) -> usize {
        (tokens.saturating_sub(Self::SINKS) / self.lag).saturating_sub(1)
    }

    /// Units of a head that are of a partition.
    fn partition(self, positions: &[u32], index: usize) -> Range<usize> {
        let first = Self::SINKS + index * self.lag;
        let before = |end: usize| positions.partition_point(|p| (*p as usize) < end);
        before(first)..before(first + self.lag)
    }
}

/// Of what waits for its judgement: above all ranks, the newest highest. Exact up to 2^24 tokens.
fn waiting(position: u32) -> f32 {
    match (position as usize).checked_sub(LagKv::SINKS) {
        None => 1.0,
        Some(later) => 1.0 + later as f32,
    }
}

/// For each of `rows`, how much its channels differ once they are scaled by the extremes of `reference`: a
/// softmax over the rows.
fn spread(rows: &[f32], reference: &[f32], width: usize) -> Vec<f64> {
    let mut extremes = vec![(f32::INFINITY, f32::NEG_INFINITY); width];
    for row in reference.chunks_exact(width) {
        for ((least, most), x) in extremes.iter_mut().zip(row) {
            (*least, *most) = (least.min(*x), most.max(*x));
        }
    }
    let deviation = |row: &[f32]| {
        let scaled = row.iter().zip(&extremes).map(|(x, (least, most))| {
            // A channel in which the reference has one value scales nothing, and says nothing.
            match most > least {
                true => f64::from(x - least) / f64::from(most - least),
                false => 0.0,
            }
        });
        let scaled: Vec<f64> = scaled.collect();
        let mean = scaled.iter().sum::<f64>() / width as f64;
        let squares: f64 = scaled.iter().map(|x| (x - mean) * (x - mean)).sum();
        (squares / (width.max(2) - 1) as f64).sqrt()
    };
    let deviations: Vec<f64> = rows.chunks_exact(width).map(deviation).collect();
    super::softmax(&deviations)
}

impl Published for LagKv {}

impl Scorer for LagKv {
    fn name(&self) -> String {
        "lagkv".into()
    }

    fn carries(&self) -> bool {
        true
    }

    fn guard(&self, _units: usize) -> Guard {
        Guard {
            sinks: Self::SINKS,
            ..Guard::default()
        }
    }

    fn validate(&self, _model: &ModelSpec) -> Result<()> {
        match self.lag {
            0 => Err(Error::setting("lag", "at least 1 unit", 0)),
            _ => Ok(()),
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let due = self.judged(at.seen)..self.judged(at.seen + at.incoming);
        let width = at.layer.head_dim;
        let heads = (0..units.kv_heads()).map(|head| {
            let positions = units.positions(head);
            let mut scores = units.carried(head).to_vec();
            scores.extend(positions[scores.len()..].iter().map(|p| waiting(*p)));
            let first = self.partition(positions, due.start).start;
            if due.is_empty() || first == positions.len() {
                return Ok(scores);
            }
            let list: Vec<u32> = (first as u32..positions.len() as u32).collect();
            let keys = units.keys_at(head, &list)?;
            let (keys, values) = (keys.values()?, units.values(head)?);
            let values = &values.values()?[first * width..];
            for index in due.clone() {
                let [own, next] = [index, index + 1].map(|index| {
                    let units = self.partition(positions, index);
                    units.start - first..units.end - first
                });
                let of = |rows: &Range<usize>| rows.start * width..rows.end * width;
                let by = |all: &[f32]| spread(&all[of(&own)], &all[of(&next)], width);
                let (by_keys, by_values) = (by(&keys), by(values));
                let means: Vec<f64> = by_keys.iter().zip(by_values).map(|(k, v)| k + v).collect();
                let mut order: Vec<usize> = (0..means.len()).collect();
                order.sort_by(|a, b| means[*a].total_cmp(&means[*b]));
                for (rank, unit) in order.into_iter().enumerate() {
                    scores[first + own.start + unit] = rank as f32 / means.len() as f32;
                }
            }
            Ok(scores)
        });
        Scores::per_head(heads.collect::<Result<_>>()?)
    }
}
