//! Locret: trained retaining heads predict how much a unit will matter.

mod container;
mod forms;
mod heads;
mod layouts;
mod weights;

pub use heads::RetainingHeads;
pub(crate) use heads::packed;
pub use weights::{Gate, HeadAdvice, HeadForm, HeadInput, HeadWeights, LayerHead};

use crate::published::Published;
use locret_core::{
    Budget, Error, Evict, Guard, LayerUnits, ModelSpec, Needs, Positions, Result, Rows, Scorer,
    Scores, Step,
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
/// start ([`query_first`]), and heads that were trained so.
///
/// Heads that came after Locret's work in the same way ([`HeadForm`]): a score that a unit is born with. One kind
/// decays instead (TRIM-KV): its units carry `(t - i) · ln β`, brought to the present `t` in every step by what is
/// known of `t` and `i`, and rounded to 32 bits each time (a thousand steps leave it right in five digits).
#[derive(Debug, Clone)]
pub struct Locret {
    heads: Arc<RetainingHeads>,
}

/// A prompt of *Locret-Q* (arXiv 2410.01805 §5): the last `tokens` tokens of a query stand before it, too, after
/// its first `after` tokens (a beginning-of-text token, where there is one). So whatever is evicted, it is evicted
/// knowing the question. Heads have to be trained on such prompts.
pub fn query_first(prompt: &[u32], query: &[u32], tokens: usize, after: usize) -> Vec<u32> {
    let (begin, rest) = prompt.split_at(after.min(prompt.len()));
    let query = &query[query.len() - tokens.min(query.len())..];
    [begin, query, rest].concat()
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

    /// What new units are born with, `[new, kv_heads]`.
    fn new_scores(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Rows> {
        let missing = || Error::policy(self.name(), "what its heads read is missing");
        let layer = at.layer.index;
        match self.heads.reads() {
            HeadInput::Layer => {
                let input = units.input().ok_or_else(missing)?;
                self.heads.rows(layer, &[input])
            }
            HeadInput::Qkv => {
                let qkv = units.qkv().ok_or_else(missing)?;
                self.heads.rows(layer, &[&qkv.q, &qkv.k, &qkv.v])
            }
        }
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
        match self.heads.form() {
            HeadForm::Locret => format!("Locret {{ weights: {weights}, folded: {folded} }}"),
            form => format!("Locret {{ weights: {weights}, form: {form:?} }}"),
        }
    }

    fn needs(&self) -> Needs {
        match self.heads.reads() {
            HeadInput::Layer => Needs::NOTHING.input(),
            HeadInput::Qkv => Needs::NOTHING.qkv(),
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

    /// Of Locret's own heads; those of other forms end on the host.
    fn born(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Option<Rows>> {
        if self.heads.form() != HeadForm::Locret {
            return Ok(None);
        }
        Ok(Some(match units.incoming() {
            0 => Rows::new(Vec::new(), units.kv_heads(), units.compute().device())?,
            _ => self.new_scores(at, units)?,
        }))
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let kv_heads = units.kv_heads();
        let decays = self.heads.form() == HeadForm::Decay;
        // One position beyond the newest token's, as the authors count: what comes next looks back from there.
        let age = |total: usize, position: u32| (total as f64 + 1.0 - f64::from(position)).max(1.0);
        let mut scores: Vec<Vec<f32>> = (0..kv_heads)
            .map(|head| {
                let mut list = Vec::with_capacity(units.len(head));
                list.extend_from_slice(units.carried(head));
                if decays {
                    for (score, i) in list.iter_mut().zip(units.positions(head)) {
                        let (now, then) = (age(at.seen + at.incoming, *i), age(at.seen, *i));
                        *score = (f64::from(*score) * now / then) as f32;
                    }
                }
                list
            })
            .collect();
        if units.incoming() > 0 {
            let new = self.new_scores(at, units)?.into_values()?;
            for (i, token) in new.chunks_exact(kv_heads).enumerate() {
                let factor = match decays {
                    true => age(at.incoming, i as u32),
                    false => 1.0,
                };
                for (list, score) in scores.iter_mut().zip(token) {
                    list.push((f64::from(*score) * factor) as f32);
                }
            }
        }
        Scores::per_head(scores)
    }
}
