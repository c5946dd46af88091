//! Keys with a small norm.

use crate::published::Published;
use locret_core::{Budget, Evict, LayerUnits, Result, Scorer, Scores, Step};

/// The norm of keys (arXiv 2406.11430 §3): score `-‖k‖₂`, as keys with a small norm attract
/// attention in many decoder models.
///
/// **Keeps** in every KV head the units with the smallest keys.
///
/// **Cost:** one pass over the keys of a layer, when something has to go; no attention weight is
/// needed, so that fused attention stays.
///
/// **Chunked prefill:** the score depends on the unit alone and does not change with the chunks.
/// The paper leaves the first layers uncompressed and compresses after the prompt; here every
/// layer is held to the budget from the first chunk on.
#[derive(Debug, Clone, Copy, Default)]
pub struct KeyNorm;

impl KeyNorm {
    /// Keeps the `budget` units with the smallest keys, original positions.
    pub fn policy(budget: Budget) -> Evict<Self> {
        Self.published(budget)
    }
}

impl Published for KeyNorm {}

impl Scorer for KeyNorm {
    fn name(&self) -> String {
        "key-norm".into()
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        units.score_heads(|head| {
            let keys = units.keys(head)?.into_tensor();
            Ok((keys.clone() * keys).sum_dim(1).sqrt().neg())
        })
    }
}
