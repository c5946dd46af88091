//! Memory that is promised before it is used.

use super::request::Request;
use crate::{
    Compute, Error, KvCachePolicy, ModelSpec, Positions, Prefill, Result,
    engine::{cache::SequenceCache, plan::Planner},
    stores::RESERVE,
};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Bytes that are promised to sequences, and how many there are.
#[derive(Debug)]
pub(super) struct Ledger {
    cap: usize,
    promised: AtomicUsize,
    /// Of the promised, what never comes back.
    aside: AtomicUsize,
}

impl Ledger {
    pub(super) fn new(cap: usize) -> Arc<Self> {
        Arc::new(Self {
            cap,
            promised: AtomicUsize::new(0),
            aside: AtomicUsize::new(0),
        })
    }

    /// The most that a sequence can get when it is alone.
    pub(super) fn most(&self) -> usize {
        self.cap - self.aside.load(Ordering::Acquire)
    }

    /// Sets bytes aside for as long as there is a batch; `None` if there are not so many left.
    pub(super) fn set_aside(self: &Arc<Self>, bytes: usize) -> Option<Room> {
        let room = self.room(bytes)?;
        self.aside.fetch_add(bytes, Ordering::AcqRel);
        Some(room)
    }

    pub(super) fn promised(&self) -> usize {
        self.promised.load(Ordering::Acquire)
    }

    /// So many bytes, if there are so many left.
    pub(super) fn room(self: &Arc<Self>, bytes: usize) -> Option<Room> {
        let mut room = Room {
            ledger: self.clone(),
            bytes: 0,
        };
        room.resize(bytes).then_some(room)
    }
}

/// A share of the memory, given back when dropped.
#[derive(Debug)]
pub(super) struct Room {
    ledger: Arc<Ledger>,
    bytes: usize,
}

impl Room {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn of(&self, ledger: &Arc<Ledger>) -> bool {
        Arc::ptr_eq(&self.ledger, ledger)
    }

    /// Another size; false, and nothing changed, if there is not so much left.
    pub(super) fn resize(&mut self, bytes: usize) -> bool {
        let (own, cap) = (self.bytes, self.ledger.cap);
        let others = |promised: usize| {
            let all = (promised - own).checked_add(bytes);
            all.filter(|all| bytes <= own || *all <= cap)
        };
        let promised = &self.ledger.promised;
        let done = promised.fetch_update(Ordering::AcqRel, Ordering::Acquire, others);
        if done.is_ok() {
            self.bytes = bytes;
        }
        done.is_ok()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.ledger.promised.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// The most bytes that a sequence will take: keys and values, their positions and scores, angles, tokens
/// and one row of logits.
pub(super) fn footprint(
    request: &Request,
    spec: &ModelSpec,
    compute: &Arc<dyn Compute>,
) -> Result<usize> {
    let (policy, prefill) = (&*request.policy, &request.prefill);
    let mut planner = Planner::new(spec, policy, compute, request.cache)?;
    if let Some(kept) = &request.from {
        planner = planner.from(kept.cache());
    }
    planner = planner.bound();
    let before = request
        .from
        .as_ref()
        .map_or(0, |kept| kept.cache().peak().units_per_head);
    let rest = request.prompt.len() - request.prefix;
    let mut least = 0;
    if let Some(fetch) = &request.fetch {
        // As if all of it had been read; what it generated may be more than that at first.
        planner.read(fetch.tokens, prefill)?;
        least = fetch.bytes;
    }
    if request.prefix > 0 {
        planner.read(request.prefix, &prefix_prefill(prefill))?;
    }
    // A generated token that is still to be fed is one more at most.
    let goes_on = request.from.is_some() || request.fetch.is_some();
    planner.read(rest + usize::from(goes_on), prefill)?;
    planner.generate(request.generate.max_new);
    let plan = planner.plan();
    let heads = spec.layers * spec.kv_heads;
    let shared = (0..spec.layers).any(|index| shares(policy, spec, index, request.tokens()));
    // Where heads share a budget, each has a reserve at a moment of its own.
    let reserves = match shared {
        true => heads * RESERVE * spec.unit_bytes(4),
        false => 0,
    };
    let units = plan.peak.units.saturating_add(heads * RESERVE);
    // A position, and what is carried.
    let widths = (0..spec.layers).map(|index| policy.carried_width(&spec.layer(index)));
    let metadata = 4 + 4 * widths.max().unwrap_or(1);
    let noted = (0..spec.layers).map(|index| policy.noted(&spec.layer(index)));
    // What is noted anew is there beside what it replaces, in one layer at a time or in all.
    let notes = 2 * 4 * noted.sum::<usize>();
    let mut longest = plan.peak.units_per_head.max(before);
    if shared {
        // Plans know the mean of heads alone.
        let limits = (0..spec.layers).map(|i| policy.limit(&spec.layer(i), request.tokens()));
        let kept = limits.map(|limit| limit.unwrap_or(usize::MAX)).max();
        let step = prefill.chunk.max(prefill.local);
        let most = kept
            .unwrap_or(usize::MAX)
            .saturating_add(step)
            .saturating_add(request.generate.max_new)
            .min(request.tokens());
        longest = longest.max(most);
    }
    let parts = [
        reserves,
        units.saturating_mul(metadata),
        notes,
        fixed(spec, policy, longest, request.tokens()),
    ];
    let all = parts
        .into_iter()
        .fold(plan.peak.bytes.max(least), usize::saturating_add);
    Ok(all)
}

/// What a session takes that is kept and does nothing.
pub(super) fn resting(cache: &SequenceCache, tokens: usize) -> usize {
    let longest = cache.peak().units_per_head;
    let (spec, policy) = (cache.spec(), &**cache.policy());
    let lie = cache.bytes() + cache.metadata_bytes();
    lie.saturating_add(fixed(spec, policy, longest, tokens))
}

/// Tokens (the prompt, and the history with its reserve), a row of logits, and the table of angles of
/// compact positions.
fn fixed(spec: &ModelSpec, policy: &dyn KvCachePolicy, longest: usize, tokens: usize) -> usize {
    let angles = match policy.positions() {
        Positions::Original => 0,
        Positions::Compact => {
            let rows = longest.checked_next_power_of_two().unwrap_or(longest);
            rows.saturating_mul(spec.rope.rotary_dim)
        }
    };
    let numbers = tokens.saturating_mul(3).saturating_add(angles);
    numbers.saturating_add(spec.vocab).saturating_mul(4)
}

fn shares(policy: &dyn KvCachePolicy, spec: &ModelSpec, index: usize, total: usize) -> bool {
    let layer = spec.layer(index);
    let (held, limit) = (policy.held(&layer, total), policy.limit(&layer, total));
    match (held, limit) {
        (Some(held), Some(limit)) => held.units < layer.kv_heads.saturating_mul(limit),
        _ => false,
    }
}

/// How a prefix is read: as a prompt without a tail.
pub(super) fn prefix_prefill(prefill: &Prefill) -> Prefill {
    Prefill::new(prefill.chunk, 0)
}

/// Holds what a sequence has taken against what it may: what it has now, and the most that it had in the
/// pass, if that is more than ever `before`.
pub(super) fn check(
    cache: &SequenceCache,
    before: usize,
    tokens: usize,
    room: &mut Room,
) -> Result<()> {
    let peak = cache.peak().bytes;
    let more = if peak > before {
        peak.saturating_sub(cache.bytes())
    } else {
        0
    };
    let taken = resting(cache, tokens).saturating_add(more);
    match taken <= room.bytes() || room.resize(taken) {
        true => Ok(()),
        false => Err(Error::Memory {
            what: "a sequence",
            needed: taken,
            left: room.bytes(),
        }),
    }
}
