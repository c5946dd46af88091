//! SirLLM: tokens that the model did not expect.

use crate::published::Published;
use locret_core::{
    Budget, Error, Evict, Guard, LayerUnits, ModelSpec, Needs, Phase, Positions, Result, Scorer,
    Scores, Step,
};

/// SirLLM (arXiv 2405.12528 §3): the score of a unit is its token's *entropy*, in fact its
/// surprisal `-ln p(x_t | x_<t)`, the same in all layers and heads and carried with the unit.
///
/// **Keeps** the sinks, the most recent units, and of the rest the ones whose tokens were
/// surprising.
///
/// **Cost:** logits of *every* token, in blocks of rows: one more product with the vocabulary per
/// token. The surprisal is known only after the last layer, so all layers hold `budget + chunk`
/// units at the same time.
///
/// **The first token.** The paper's code gives a chunk's first token the chunk's maximum, as it
/// has no prediction. Here the logits of the token before are carried over, so that only the
/// first token of the sequence has none; it takes the maximum of its chunk (0 if it is alone).
///
/// **Budget.** The published procedure makes room *before* a chunk of `t` tokens: it keeps
/// `cache_size - t` units. Here it is done after each chunk, down to the budget, which is the same
/// with `budget = cache_size - t`.
///
/// **Decay.** With several turns, the carried scores can be multiplied by a factor at the
/// beginning of each further turn (§4.2: 1, 0.9, 0.7), so that old surprises fade.
///
/// **Chunked prefill:** a score depends on what the model still saw: after evictions more tokens
/// are surprising. Repeated text (a passkey in filler) suits it very well, prose does not.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct SirLlm {
    decay: f32,
}

impl Default for SirLlm {
    fn default() -> Self {
        Self { decay: 1.0 }
    }
}

impl SirLlm {
    /// Sinks in the published settings (`start_size`).
    pub const SINKS: usize = 4;

    /// Surprisal that does not fade.
    pub fn new() -> Self {
        Self::default()
    }

    /// Multiplies carried scores by `factor`, above 0 and at most 1, when a further turn begins.
    pub fn decay(mut self, factor: f32) -> Self {
        self.decay = factor;
        self
    }

    /// As published: four sinks (fewer for a budget of fewer units), the newest `recent` units,
    /// compact positions.
    pub fn policy(self, budget: Budget, recent: usize) -> Evict<Self> {
        self.published(budget).recent(recent)
    }
}

impl Published for SirLlm {
    const POSITIONS: Positions = Positions::Compact;
}

impl Scorer for SirLlm {
    fn name(&self) -> String {
        "sirllm".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.surprisal()
    }

    fn carries(&self) -> bool {
        true
    }

    fn guard(&self, units: usize) -> Guard {
        Guard {
            sinks: Self::SINKS,
            recent: units / 4,
            ..Guard::default()
        }
    }

    fn validate(&self, _model: &ModelSpec) -> Result<()> {
        if self.decay > 0.0 && self.decay <= 1.0 {
            return Ok(());
        }
        Err(Error::setting("decay", "above 0, at most 1", self.decay))
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let mut new = units.surprisal().unwrap_or(&[]).to_vec();
        let known = new.iter().copied().filter(|s| !s.is_nan());
        let most = known.fold(0.0, f32::max);
        if let Some(first) = new.first_mut()
            && at.seen == 0
            && first.is_nan()
        {
            *first = most;
        }
        let factor = match at.phase {
            Phase::Turn => self.decay,
            _ => 1.0,
        };
        let scores = (0..units.kv_heads()).map(|head| {
            let old = units.carried(head).iter().map(|s| s * factor);
            old.chain(new.iter().copied()).collect()
        });
        Scores::per_head(scores.collect())
    }
}
