//! ChunkKV: blocks of neighbouring units stay or go together.

use crate::published::Published;
use locret_core::{
    Error, Guard, LayerSpec, LayerUnits, ModelSpec, Needs, Phase, Positions, Result, Rows, Scorer,
    Scores, Step,
};
use std::collections::BTreeMap;

/// ChunkKV (arXiv 2502.00299 §3) around any scorer: the text is cut into blocks of 20 tokens, and units are
/// chosen by the mean score of their block, over the block and all KV heads of the layer. So what is kept are
/// spans of text, the same ones in all heads.
///
/// **Keeps** whole blocks, as many as fit into the budget; what is left of it is filled with the beginning of the
/// next best block.
///
/// **Cost:** that of the scorer inside, and nothing to speak of.
///
/// **Chunked prefill:** blocks are those of the text, wherever chunks end. Of a block that is not complete while
/// more of the prompt follows nothing goes. A block that was kept in part is judged by what is left of it.
///
/// Where heads share a budget ([`Evict::ada`](locret_core::Evict::ada)), scores say how many units each keeps,
/// and these are of its best blocks.
#[derive(Debug, Clone)]
#[must_use]
pub struct ChunkKv<S> {
    inner: S,
    block: usize,
}

impl<S: Scorer> ChunkKv<S> {
    /// Tokens of a block, as published.
    pub const BLOCK: usize = 20;

    /// Around `inner`, with blocks of 20 tokens.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            block: Self::BLOCK,
        }
    }

    /// Blocks of `tokens` (at least 1).
    pub fn block(self, tokens: usize) -> Self {
        Self {
            block: tokens,
            ..self
        }
    }
}

impl<S: Published> Published for ChunkKv<S> {
    const POSITIONS: Positions = S::POSITIONS;
}

#[deny(clippy::missing_trait_methods)]
impl<S: Scorer> Scorer for ChunkKv<S> {
    fn name(&self) -> String {
        format!("chunkkv-{}", self.inner.name())
    }

    fn fingerprint(&self) -> String {
        let (inner, block) = (self.inner.fingerprint(), self.block);
        format!("ChunkKv {{ inner: {inner}, block: {block} }}")
    }

    fn needs(&self) -> Needs {
        self.inner.needs()
    }

    fn carries(&self) -> bool {
        self.inner.carries()
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.inner.carried_width(layer)
    }

    fn noted(&self, layer: &LayerSpec) -> usize {
        self.inner.noted(layer)
    }

    fn notes(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Option<Vec<f32>>> {
        self.inner.notes(at, units)
    }

    fn keeps_newest(&self) -> bool {
        false
    }

    fn guard(&self, units: usize) -> Guard {
        self.inner.guard(units)
    }

    fn validate(&self, model: &ModelSpec) -> Result<()> {
        match self.block {
            0 => Err(Error::setting("block of ChunkKV", "at least 1 token", 0)),
            _ => self.inner.validate(model),
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        self.inner.score(at, units)
    }

    /// Units are chosen by more than their own scores.
    fn born(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Option<Rows>> {
        Ok(None)
    }

    fn carry(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        self.inner.carry(at, units)
    }

    fn ranks(
        &self,
        at: &Step,
        units: &LayerUnits<'_>,
        scores: &Scores,
        _keeps: &[(usize, usize)],
    ) -> Result<Option<Scores>> {
        let block = |position: &u32| *position as usize / self.block;
        // By block, the sum of scores and how many there are.
        let mut blocks = BTreeMap::<usize, (f64, usize)>::new();
        for head in 0..units.kv_heads() {
            let list = scores.head(head).iter().step_by(scores.width());
            for (position, score) in units.positions(head).iter().zip(list) {
                let (sum, count) = blocks.entry(block(position)).or_default();
                *sum += f64::from(*score);
                *count += 1;
            }
        }
        let read = at.seen + at.incoming;
        let open = match at.phase {
            Phase::Prefill { last: false } if !read.is_multiple_of(self.block) => {
                Some(read / self.block)
            }
            _ => None,
        };
        let rank = |position: &u32| {
            let block = block(position);
            match blocks.get(&block) {
                // Below what is protected, which stands at infinity.
                _ if Some(block) == open => f32::MAX,
                Some((sum, count)) => (sum / *count as f64) as f32,
                None => f32::NEG_INFINITY,
            }
        };
        let lists = (0..units.kv_heads())
            .map(|head| units.positions(head).iter().map(rank).collect::<Vec<_>>());
        Scores::per_head(lists.collect()).map(Some)
    }
}
