//! Nothing is dropped.

use locret_core::{KvCachePolicy, LayerUnits, Positions, Result, Step, Verdict};

/// The full cache: keeps every unit of every token.
///
/// **Cost:** memory grows with the text, `2 · layers · kv_heads · head_dim` values a token, and
/// attention with it. It is what the other policies are compared with.
///
/// **Chunked prefill:** none of its results depend on the chunks, but for rounding.
#[derive(Debug, Clone, Copy, Default)]
#[must_use]
pub struct Full {
    positions: Positions,
}

impl Full {
    /// The full cache in original positions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses the positions; they are the same ones as long as nothing is dropped.
    pub fn with_positions(mut self, positions: Positions) -> Self {
        self.positions = positions;
        self
    }
}

impl KvCachePolicy for Full {
    fn name(&self) -> String {
        "full".into()
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}
