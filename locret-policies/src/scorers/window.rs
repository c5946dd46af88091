//! StreamingLLM: the beginning and the most recent window.

use crate::published::Published;
use locret_core::{Budget, Evict, Guard, LayerUnits, Positions, Result, Scorer, Scores, Step};

/// StreamingLLM (arXiv 2309.17453 §3.2): the first units of the sequence, which soak up attention
/// (*sinks*), and the most recent ones.
///
/// **Keeps** `sinks` (4 in [`Window::policy`]) first units and the newest `budget - sinks`, the
/// same in all layers and heads.
///
/// **Cost:** nothing; no score is computed.
///
/// **Positions** are contiguous within the cache in the paper ([`Positions::Compact`]), so that a
/// stream can be longer than anything the model was trained for.
///
/// **Chunked prefill:** what is outside the window when a chunk ends is never seen again,
/// whatever it was; a question about it cannot be answered.
#[derive(Debug, Clone, Copy, Default)]
pub struct Window;

impl Window {
    /// Sinks that the paper recommends (§3.2, table 2).
    pub const SINKS: usize = 4;

    /// As published: four sinks (fewer for a budget of fewer units), the newest units, compact
    /// positions.
    pub fn policy(budget: Budget) -> Evict<Self> {
        Self.published(budget)
    }
}

impl Published for Window {
    const POSITIONS: Positions = Positions::Compact;
}

impl Scorer for Window {
    fn name(&self) -> String {
        "window".into()
    }

    fn keeps_newest(&self) -> bool {
        true
    }

    fn guard(&self, _units: usize) -> Guard {
        Guard {
            sinks: Self::SINKS,
            ..Guard::default()
        }
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        // The number within the cache rather than the position: exact in f32 for any stream.
        let heads =
            (0..units.kv_heads()).map(|head| (0..units.len(head)).map(|i| i as f32).collect());
        Scores::per_head(heads.collect())
    }
}
