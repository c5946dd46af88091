//! SnapKV: what the last queries look at.

use super::observed;
use crate::published::Published;
use locret_core::{
    Budget, Error, Evict, Guard, LayerUnits, ModelSpec, Needs, Observation, Queries, Result,
    Scorer, Scores, Step,
};

/// SnapKV (arXiv 2404.14469 §4): the attention that the last `window` queries pay to a unit, mean
/// over the queries, average-pooled over neighbouring units, mean over the query heads of the
/// group.
///
/// **Keeps** the window itself and of the rest the units with the highest mean.
///
/// **Cost:** the attention weights of the last `window` queries of every step, one more pass over
/// the keys for them.
///
/// **Chunked prefill:** it breaks. The method assumes that the last queries are the question; the
/// last queries of a chunk in the middle of a text know nothing of it: 20.33 against Locret's
/// 47.57 on ∞Bench at the same budget (arXiv 2410.01805, table 2). While decoding there is one
/// query a step, so an eviction then judges by that one alone. When a further turn begins, what the
/// last queries before it looked at decides. What it loses on SmolLM2, task by task and at equal
/// bytes, is in this library's `docs/ablation.md`.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct SnapKv {
    window: usize,
    kernel: usize,
}

impl Default for SnapKv {
    fn default() -> Self {
        Self {
            window: 64,
            kernel: 5,
        }
    }
}

impl SnapKv {
    /// The last 64 queries, pooled over 5 units.
    pub fn new() -> Self {
        Self::default()
    }

    /// Observes the last `queries` queries (at least 1).
    pub fn window(mut self, queries: usize) -> Self {
        self.window = queries;
        self
    }

    /// Pools over `units` neighbouring units (odd).
    pub fn kernel(mut self, units: usize) -> Self {
        self.kernel = units;
        self
    }

    /// The window is always kept, up to half of the budget (up to 128 where it is not a number of
    /// units); original positions.
    pub fn policy(self, budget: Budget) -> Evict<Self> {
        self.published(budget)
    }
}

impl Published for SnapKv {}

impl Scorer for SnapKv {
    fn name(&self) -> String {
        "snapkv".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.observe(Queries::Last(self.window), Observation::Weights)
    }

    fn carries(&self) -> bool {
        true
    }

    fn guard(&self, units: usize) -> Guard {
        Guard {
            recent: self.window.min(units / 2),
            ..Guard::default()
        }
    }

    fn validate(&self, _model: &ModelSpec) -> Result<()> {
        if self.window == 0 {
            return Err(Error::setting("window", "at least 1 query", 0));
        }
        if self.kernel.is_multiple_of(2) {
            return Err(Error::setting("kernel", "an odd number", self.kernel));
        }
        Ok(())
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        if units.incoming() == 0 {
            return observed::carried(units);
        }
        let attention = observed::attention(|| self.name(), units)?;
        let (group, reach) = (at.layer.group(), self.kernel / 2);
        let summed = attention
            .queries
            .saturating_mul(group)
            .saturating_mul(self.kernel);
        let factor = 1.0 / summed as f32;
        let scores = (0..units.kv_heads()).map(|head| {
            let heads = observed::group(attention, head, group)?;
            let older = units.len(head) - attention.queries;
            let sums: Vec<f32> = (0..older)
                .map(|unit| heads.iter().map(|h| h[unit]).sum())
                .collect();
            // Beyond the ends, and in the window, there is nothing: it counts as 0.
            let pooled = |unit: usize| {
                let near = unit.saturating_sub(reach)..(unit + reach + 1).min(older);
                sums[near].iter().sum::<f32>() * factor
            };
            let mut scores: Vec<f32> = (0..older).map(pooled).collect();
            let most = scores.iter().copied().fold(0.0, f32::max);
            scores.resize(units.len(head), most);
            Ok(scores)
        });
        Scores::per_head(scores.collect::<Result<_>>()?)
    }
}
