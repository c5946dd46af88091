//! What a cache will take, before anything is computed.

use super::cache::needs;
use crate::{
    CacheOptions, Compute, Error, Growth, KvCachePolicy, ModelSpec, Needs, Peak, Prefill, Result,
};
use std::sync::Arc;

/// What one sequence's cache takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Plan {
    /// The most that is held while the prompt is read.
    pub prefill: Peak,
    /// The most that is held at any moment.
    pub peak: Peak,
    /// Bytes of keys and values when everything has been generated.
    pub bytes: usize,
}

/// Goes through a prompt of `prompt` tokens and `generated` tokens after it, step by step as the engine
/// does, with the stores' own rules of growth and without any number in them.
///
/// Exact for dense stores under policies that keep as much as they may
/// ([`KvCachePolicy::held`]); where heads share a budget each is counted with its layer's mean. Stores
/// of codes are an estimate, since it depends on the text which of their units are dropped: within 5 %,
/// and up to 20 % too much for KIVI's layout. A policy that evicts while text is generated takes less
/// than is planned for it.
///
/// # Errors
/// [`Error::EmptyPrompt`]; what [`SequenceCache::new`](crate::SequenceCache::new) and the policy's
/// `validate` say.
pub fn plan(
    spec: &ModelSpec,
    policy: &dyn KvCachePolicy,
    compute: &Arc<dyn Compute>,
    options: CacheOptions,
    prefill: &Prefill,
    [prompt, generated]: [usize; 2],
) -> Result<Plan> {
    spec.validate()?;
    prefill.validate()?;
    policy.validate(spec, prefill)?;
    if prompt == 0 {
        return Err(Error::EmptyPrompt);
    }
    let later = needs(spec, policy, Needs::NOTHING)?.later();
    let place = options.placement(compute);
    let mut layers = Vec::with_capacity(spec.layers);
    for index in 0..spec.layers {
        let layer = spec.layer(index);
        let held = policy.held(&layer, prompt);
        layers.push(Layer {
            growth: policy.store(&layer, &place)?.growth(),
            budget: held.map(|held| (held.units.div_ceil(spec.kv_heads), held.newest)),
        });
    }
    let local = prefill.local.min(prompt);
    let chunks = pieces(prompt - local, prefill.chunk).map(|tokens| (tokens, true));
    let tail = pieces(local, prefill.chunk).map(|tokens| (tokens, false));
    let mut plan = Plan::default();
    let mut now = Peak::default();
    let mut step = |tokens, evict, peak: &mut Peak| {
        // Layers are cut back one after the other, or all of them once the last one is done.
        for layer in &mut layers {
            layer.grow(tokens, spec.kv_heads, &mut now);
            peak.note(&now);
            if !later {
                layer.settle(evict, spec.kv_heads, &mut now);
            }
        }
        if later {
            for layer in &mut layers {
                layer.settle(evict, spec.kv_heads, &mut now);
            }
        }
    };
    for (tokens, evict) in chunks.chain(tail) {
        step(tokens, evict, &mut plan.prefill);
    }
    plan.peak = plan.prefill;
    // The last token is never fed back.
    for _ in 1..generated {
        step(1, false, &mut plan.peak);
    }
    plan.bytes = now.bytes;
    Ok(plan)
}

struct Layer {
    growth: Box<dyn Growth>,
    /// Units of a head, and whether they are the newest.
    budget: Option<(usize, bool)>,
}

impl Layer {
    fn grow(&mut self, tokens: usize, heads: usize, now: &mut Peak) {
        self.change(heads, now, |growth| growth.append(tokens));
        now.units_per_head = self.growth.units();
    }

    fn settle(&mut self, evict: bool, heads: usize, now: &mut Peak) {
        let budget = self.budget.filter(|_| evict);
        self.change(heads, now, |growth| {
            if let Some((units, newest)) = budget {
                growth.retain(units, newest);
            }
            growth.settle();
        });
    }

    fn change(&mut self, heads: usize, now: &mut Peak, f: impl FnOnce(&mut dyn Growth)) {
        let (bytes, units) = (self.growth.bytes(), self.growth.units());
        f(&mut *self.growth);
        now.bytes = now.bytes - bytes + self.growth.bytes();
        now.units = now.units - heads * units + heads * self.growth.units();
    }
}

/// `n` in pieces of `size`, the last one smaller.
fn pieces(n: usize, size: usize) -> impl Iterator<Item = usize> {
    (0..n).step_by(size).map(move |at| size.min(n - at))
}
