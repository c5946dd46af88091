//! Locret: trained retaining heads predict how much a unit will matter.

mod heads;
mod weights;

pub use heads::RetainingHeads;
pub use weights::{HeadAdvice, HeadInput, HeadWeights, LayerHead};

use crate::published::Published;
use locret_core::{
    Budget, Error, Evict, Guard, LayerUnits, ModelSpec, Needs, Positions, Result, Scorer, Scores,
    Step,
};
use std::sync::Arc;

/// Locret (arXiv 2410.01805): a small *retaining head* in each layer predicts, from a token's own
/// query, key and value, how much attention later tokens will pay to it. The *causal importance
/// score* is made once, when the unit is born, and carried with it.
///
/// **Keeps** in every KV head the units with the highest predicted importance.
///
/// **Cost:** two small matrix products a layer, `(H + 2G)·d → d_R → G` for each token, or `hidden → d_R
/// → G` where heads are folded ([`RetainingHeads::for_model`]). No attention weight is needed, so that
/// fused attention stays.
///
/// **Chunked prefill:** made for it: a score never depends on which chunk a token was in, nor on
/// what was dropped after it. The newest units of a chunk that is not the last one
/// (*stabilizers*, [`Evict::stabilizers`]) are kept for one more chunk, so that the next one has a
/// gapless context.
///
/// As the authors do it: [`Locret::authors`]. Going past that, selection can look at the maximum
/// over neighbouring units ([`Evict::pool`]) and keep the beginning of the text
/// ([`Evict::sinks`]). *Locret-Q* (§5) is the same policy on a prompt with the question at its
/// start, and heads that were trained so.
#[derive(Debug, Clone)]
pub struct Locret {
    heads: Arc<RetainingHeads>,
}

impl Locret {
    /// With these heads.
    pub fn new(heads: impl Into<Arc<RetainingHeads>>) -> Self {
        Self {
            heads: heads.into(),
        }
    }

    /// The authors' procedure: the `budget` best units of each KV head, `stabilizers` protected
    /// while further chunks follow, nothing evicted in the tail and while decoding, compact
    /// positions.
    ///
    /// The paper's settings (§4.1): Phi-3-mini-128K budget 6000, chunks of 3072, 2500 stabilizers,
    /// a tail of 100 tokens; Llama-3.1-8B 16384, 1024, 2500, 100.
    pub fn authors(
        heads: impl Into<Arc<RetainingHeads>>,
        budget: Budget,
        stabilizers: usize,
    ) -> Evict<Self> {
        Evict::new(Self::new(heads), budget)
            .stabilizers(stabilizers)
            .with_positions(Positions::Compact)
    }

    /// The heads.
    pub fn heads(&self) -> &RetainingHeads {
        &self.heads
    }
}

impl Published for Locret {
    const POSITIONS: Positions = Positions::Compact;
}

impl Scorer for Locret {
    fn name(&self) -> String {
        "locret".into()
    }

    /// Weights do not show in `Debug`.
    fn fingerprint(&self) -> String {
        let (weights, folded) = (self.heads.fingerprint(), self.heads.folded());
        format!("Locret {{ weights: {weights}, folded: {folded} }}")
    }

    fn needs(&self) -> Needs {
        match self.heads.folded() {
            true => Needs::NOTHING.input(),
            false => Needs::NOTHING.qkv(),
        }
    }

    fn carries(&self) -> bool {
        true
    }

    /// Stabilizers: an eighth of the budget.
    fn guard(&self, units: usize) -> Guard {
        Guard {
            stabilizers: units / 8,
            ..Guard::default()
        }
    }

    fn validate(&self, model: &ModelSpec) -> Result<()> {
        self.heads.validate(model)
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let kv_heads = units.kv_heads();
        let mut scores: Vec<Vec<f32>> = (0..kv_heads)
            .map(|head| {
                let mut list = Vec::with_capacity(units.len(head));
                list.extend_from_slice(units.carried(head));
                list
            })
            .collect();
        if units.incoming() > 0 {
            let missing = || Error::policy(self.name(), "what its heads read is missing");
            let new = match self.heads.folded() {
                true => {
                    let input = units.input().ok_or_else(missing)?;
                    self.heads.scores(at.layer.index, &[input])?
                }
                false => {
                    let qkv = units.qkv().ok_or_else(missing)?;
                    self.heads
                        .scores(at.layer.index, &[&qkv.q, &qkv.k, &qkv.v])?
                }
            };
            for token in new.chunks_exact(kv_heads) {
                for (list, score) in scores.iter_mut().zip(token) {
                    list.push(*score);
                }
            }
        }
        Scores::per_head(scores)
    }
}
