//! Keys that differ from the others.

use crate::published::Published;
use locret_core::{Budget, Evict, LayerUnits, Result, Scorer, Scores, Step};

/// KeyDiff (arXiv 2504.15364 §3): score `-cos(k, k̄)`, where `k̄` is the mean of the normalised
/// keys of the head; distinct keys tend to be the ones that attention looks for.
///
/// **Keeps** in every KV head the units whose keys point away from the mean.
///
/// **Cost:** two passes over the keys of a layer, when something has to go; fused attention stays.
///
/// **Chunked prefill:** made for it (§3.3: prompts read in blocks under a memory bound). The mean
/// is that of the units in the cache, so that a unit's score changes as others go.
#[derive(Debug, Clone, Copy, Default)]
pub struct KeyDiff;

impl KeyDiff {
    /// Keeps the `budget` most distinct units, original positions.
    pub fn policy(budget: Budget) -> Evict<Self> {
        Self.published(budget)
    }
}

/// Below this a key or mean counts as having no direction.
const NO_DIRECTION: f32 = 1e-12;

impl Published for KeyDiff {}

impl Scorer for KeyDiff {
    fn name(&self) -> String {
        "key-diff".into()
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        units.score_heads(|head| {
            let keys = units.keys(head)?.into_tensor();
            let norm = (keys.clone() * keys.clone()).sum_dim(1).sqrt();
            let unit = keys / norm.clamp_min(NO_DIRECTION);
            let mean = unit.clone().mean_dim(0);
            let length = (mean.clone() * mean.clone()).sum_dim(1).sqrt();
            let mean = mean / length.clamp_min(NO_DIRECTION);
            Ok((unit * mean).sum_dim(1).neg())
        })
    }
}
