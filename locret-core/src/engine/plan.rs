//! What a cache will take, before anything is computed.

use super::cache::needs;
use crate::{
    CacheOptions, Compute, Error, Growth, KvCachePolicy, ModelSpec, Needs, Peak, Prefill, Result,
    SequenceCache,
};
use std::{ops::Range, sync::Arc};

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
/// ([`KvCachePolicy::held`]); where heads or layers share a budget each head is counted with the mean, so
/// that [`Peak::units_per_head`] is the mean's, and fixed budgets that differ between the heads of a layer
/// are counted as if all had their mean, rounded up. Stores
/// of codes are an estimate, since it depends on the text which of their units are dropped: within 5 %,
/// and up to 20 % too much for KIVI's layout. After 16,384 generated tokens, what further ones take is
/// reckoned from what the last of those took.
///
/// # Errors
/// [`Error::EmptyPrompt`]; [`Error::Setting`] for a prompt of more than [`u32::MAX`] tokens; what [`SequenceCache::new`](crate::SequenceCache::new) and the policy's
/// `validate` say.
pub fn plan(
    spec: &ModelSpec,
    policy: &dyn KvCachePolicy,
    compute: &Arc<dyn Compute>,
    options: CacheOptions,
    prefill: &Prefill,
    [prompt, generated]: [usize; 2],
) -> Result<Plan> {
    let (all, tokens) = (0..spec.layers, [prompt, generated]);
    plan_layers(spec, policy, compute, options, prefill, tokens, all)
}

/// As [`plan`], of some of the layers: what the device takes that they lie on ([`DeviceMap`](crate::DeviceMap)).
///
/// Peaks of several devices are at different moments: together they are more than the peak of all layers, by
/// a chunk's units in one layer of each.
///
/// # Errors
/// As [`plan`]; [`Error::Setting`] for layers that the model does not have.
pub fn plan_layers(
    spec: &ModelSpec,
    policy: &dyn KvCachePolicy,
    compute: &Arc<dyn Compute>,
    options: CacheOptions,
    prefill: &Prefill,
    [prompt, generated]: [usize; 2],
    layers: Range<usize>,
) -> Result<Plan> {
    if layers.start > layers.end || layers.end > spec.layers {
        let expected = format!("some of 0..{}", spec.layers);
        return Err(Error::setting(
            "layers of a plan",
            expected,
            format!("{layers:?}"),
        ));
    }
    let mut planner = Planner::new(spec, policy, compute, options)?;
    planner.layers.truncate(layers.end);
    planner.layers.drain(..layers.start);
    planner.read(prompt, prefill)?;
    planner.generate(generated);
    Ok(planner.plan())
}

/// A sequence that is planned prompt by prompt.
pub(super) struct Planner<'a> {
    spec: &'a ModelSpec,
    policy: &'a dyn KvCachePolicy,
    layers: Vec<Layer>,
    /// Verdicts come after the last layer.
    later: bool,
    seen: usize,
    now: Peak,
    plan: Plan,
}

impl<'a> Planner<'a> {
    pub(super) fn new(
        spec: &'a ModelSpec,
        policy: &'a dyn KvCachePolicy,
        compute: &Arc<dyn Compute>,
        options: CacheOptions,
    ) -> Result<Self> {
        spec.validate()?;
        let later = needs(spec, policy, Needs::NOTHING)?.later();
        let places = options.places(compute, spec.layers)?;
        let mut layers = Vec::with_capacity(spec.layers);
        for (index, place) in places.iter().enumerate() {
            layers.push(Layer {
                index,
                growth: policy.store(&spec.layer(index), place)?.growth(),
                budget: None,
            });
        }
        Ok(Self {
            spec,
            policy,
            layers,
            later,
            seen: 0,
            now: Peak::default(),
            plan: Plan::default(),
        })
    }

    /// Bytes that are never too low, where they would be an estimate.
    pub(super) fn bound(mut self) -> Self {
        for layer in &mut self.layers {
            layer.change(self.spec.kv_heads, &mut self.now, |growth| growth.bound());
        }
        self.plan.peak = self.now;
        self
    }

    /// Goes on from what a cache holds.
    pub(super) fn from(mut self, cache: &SequenceCache) -> Self {
        let held = self.policy.held(&self.spec.layer(0), cache.seen());
        // Layers that share are cut when all of them together have too much.
        let mean = held.filter(|held| held.over_layers).map(|_| {
            let heads = self.spec.layers * self.spec.kv_heads;
            cache.units().div_ceil(heads)
        });
        for layer in &mut self.layers {
            let heads = 0..self.spec.kv_heads;
            let units: usize = heads.map(|head| cache.len(layer.index, head)).sum();
            let units = mean.unwrap_or(units.div_ceil(self.spec.kv_heads));
            layer.change(self.spec.kv_heads, &mut self.now, |growth| {
                // As single tokens leave them: with a reserve.
                growth.append(units.saturating_sub(1));
                growth.append(units.min(1));
                growth.settle();
            });
            self.now.units_per_head = self.now.units_per_head.max(layer.growth.units());
        }
        self.seen = cache.seen();
        self.plan.peak = self.now;
        self
    }

    /// A prompt of so many tokens.
    pub(super) fn read(&mut self, prompt: usize, prefill: &Prefill) -> Result<()> {
        prefill.validate()?;
        self.policy.validate(self.spec, prefill)?;
        if prompt == 0 {
            return Err(Error::EmptyPrompt);
        }
        let total = match self.seen.checked_add(prompt) {
            Some(total) if u32::try_from(total).is_ok() => total,
            _ => {
                // Positions are numbers of 32 bits.
                let expected = format!("at most {} tokens in all", u32::MAX);
                let found = format!("{prompt} after {}", self.seen);
                return Err(Error::setting("prompt", expected, found));
            }
        };
        self.budgets(total);
        if self.seen > 0 {
            for layer in &mut self.layers {
                layer.settle(Some(0), self.spec.kv_heads, &mut self.now);
                self.plan.peak.note(&self.now);
            }
        }
        let local = prefill.local.min(prompt);
        let chunks = pieces(prompt - local, prefill.chunk).map(|tokens| (tokens, Some(0)));
        let tail = pieces(local, prefill.chunk).map(|tokens| (tokens, None));
        for (tokens, slack) in chunks.chain(tail) {
            let mut peak = self.plan.prefill;
            self.step(tokens, slack, &mut peak);
            self.plan.prefill = peak;
        }
        self.plan.peak.note(&self.plan.prefill);
        self.seen = total;
        Ok(())
    }

    /// So many tokens after the prompt.
    pub(super) fn generate(&mut self, tokens: usize) {
        // The last token is never fed back.
        let fed = tokens.saturating_sub(1);
        let slack = self.policy.decode_slack();
        let mut half = self.plan.peak;
        for i in 0..fed.min(STEPS) {
            if i == STEPS / 2 {
                half = self.plan.peak;
            }
            let mut peak = self.plan.peak;
            if slack.is_some() {
                self.budgets(self.seen + 1);
            }
            self.step(1, slack, &mut peak);
            self.plan.peak = peak;
            self.seen += 1;
        }
        let rest = fed.saturating_sub(STEPS);
        if rest > 0 {
            // From here on as in the second half of what was gone through.
            let ahead = |half: usize, now: usize| {
                let grown = (now - half).saturating_mul(rest).div_ceil(STEPS / 2);
                now.saturating_add(grown)
            };
            let now = self.plan.peak;
            self.plan.peak = Peak {
                units_per_head: ahead(half.units_per_head, now.units_per_head),
                units: ahead(half.units, now.units),
                bytes: ahead(half.bytes, now.bytes),
            };
            self.now.bytes = self.plan.peak.bytes;
        }
    }

    /// What layers keep in a sequence that has `total` tokens.
    fn budgets(&mut self, total: usize) {
        for layer in &mut self.layers {
            let held = self.policy.held(&self.spec.layer(layer.index), total);
            layer.budget = held.map(|held| (held.units.div_ceil(self.spec.kv_heads), held.newest));
        }
    }

    /// New tokens, after which layers are cut back if they have `slack` units too many.
    fn step(&mut self, tokens: usize, slack: Option<usize>, peak: &mut Peak) {
        let heads = self.spec.kv_heads;
        // Layers are cut back one after the other, or all of them once the last one is done.
        for layer in &mut self.layers {
            layer.grow(tokens, heads, &mut self.now);
            peak.note(&self.now);
            if !self.later {
                layer.settle(slack, heads, &mut self.now);
                peak.note(&self.now);
            }
        }
        if self.later {
            for layer in &mut self.layers {
                layer.settle(slack, heads, &mut self.now);
                peak.note(&self.now);
            }
        }
    }

    pub(super) fn plan(&self) -> Plan {
        Plan {
            bytes: self.now.bytes,
            ..self.plan
        }
    }
}

/// Generated tokens that are gone through one by one; what comes after them is reckoned.
const STEPS: usize = 1 << 14;

struct Layer {
    index: usize,
    growth: Box<dyn Growth>,
    /// Units of a head, and whether they are the newest.
    budget: Option<(usize, bool)>,
}

impl Layer {
    fn grow(&mut self, tokens: usize, heads: usize, now: &mut Peak) {
        self.change(heads, now, |growth| growth.append(tokens));
        now.units_per_head = self.growth.units();
    }

    fn settle(&mut self, slack: Option<usize>, heads: usize, now: &mut Peak) {
        let units = self.growth.units();
        let budget = self
            .budget
            .zip(slack)
            .filter(|((budget, _), slack)| units > budget + slack);
        self.change(heads, now, |growth| {
            if let Some(((units, newest), _)) = budget {
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
