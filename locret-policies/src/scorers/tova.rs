//! TOVA: what the last query looks at.

use super::observed;
use crate::published::Published;
use locret_core::{
    Budget, Evict, Guard, LayerUnits, Needs, Observation, Queries, Result, Scorer, Scores, Step,
};
use std::collections::HashMap;

/// TOVA, token omission via attention (arXiv 2401.06104 §3.2): the attention that the newest query
/// pays, averaged over all heads of the layer.
///
/// **Keeps** the same units in all KV heads of a layer: those that the newest query looks at most,
/// and the newest unit. (Where a budget has different lengths for the heads, a head that no longer
/// holds a unit pays it nothing.)
///
/// **Cost:** the attention weights of one query a step.
///
/// **Chunked prefill:** the paper drops one unit after each token. After a chunk, one query decides
/// about all of its units at once, and it is not the question: .10 of exact answers where the full
/// cache has .79 (SmolLM2-135M, 2,000 tokens, budget 256). When a further turn begins, what the
/// last query before it looked at decides. Figures task by task and at equal bytes are in this
/// library's `docs/ablation.md`, where the two that the Locret paper measures in chunks stand beside
/// it: [`H2o`](crate::H2o) (21.18 against 47.57 on ∞Bench) and [`SnapKv`](crate::SnapKv) (20.33).
#[derive(Debug, Clone, Copy, Default)]
pub struct Tova;

impl Tova {
    /// Keeps `budget` units, the newest for certain, original positions.
    pub fn policy(budget: Budget) -> Evict<Self> {
        Self.published(budget)
    }
}

impl Published for Tova {}

impl Scorer for Tova {
    fn name(&self) -> String {
        "tova".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.observe(Queries::Last(1), Observation::Weights)
    }

    fn carries(&self) -> bool {
        true
    }

    fn guard(&self, _units: usize) -> Guard {
        Guard {
            recent: 1,
            ..Guard::default()
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        if units.incoming() == 0 {
            return observed::carried(units);
        }
        let attention = observed::attention(|| self.name(), units)?;
        let (group, factor) = (at.layer.group(), 1.0 / at.layer.heads as f32);
        let heads = observed::group(attention, 0, at.layer.heads)?;
        let first = units.positions(0);
        if (1..units.kv_heads()).all(|head| units.positions(head) == first) {
            let mean = |unit: usize| heads.iter().map(|h| h[unit]).sum::<f32>() * factor;
            return Scores::shared((0..first.len()).map(mean).collect(), units.kv_heads());
        }
        let mut means = HashMap::<u32, f32>::new();
        for (head, weights) in heads.into_iter().enumerate() {
            for (position, weight) in units.positions(head / group).iter().zip(weights) {
                *means.entry(*position).or_default() += weight * factor;
            }
        }
        let scores = |head: usize| units.positions(head).iter().map(|p| means[p]).collect();
        Scores::per_head((0..units.kv_heads()).map(scores).collect())
    }
}
