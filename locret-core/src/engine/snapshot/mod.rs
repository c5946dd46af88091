//! Sessions as bytes: saving them, and taking them up again.
//!
//! A snapshot is a safetensors file. Its header says whose it is (format, model, policy) and what is not a
//! number of the cache's; then come tokens, logits, positions and scores, the stores as they write
//! themselves, and last a SHA-256 of every byte before it.

mod header;

use super::{
    cache::computed_by,
    session::{Report, Session},
    snapshots,
};
use crate::{
    CacheOptions, CausalLm, Error, KvCachePolicy, Positions, Result, SnapshotError,
    contract::HeadMeta,
};
use bytemuck::Pod;
use header::{DIGEST, Held, Part, Slot, State};
pub(super) use header::{Identity, VERSION};
use sha2::{Digest, Sha256};
use std::{
    io::{self, Read, Write},
    path::Path,
    sync::Arc,
    time::Duration,
};

impl Session {
    /// Writes all that this session has, between any two passes, in the middle of a prompt, too. What
    /// [`read`](Self::read) makes of it goes on in the same way, bit for bit.
    ///
    /// Stores are written as they lie; they are gone through twice, the first time for their lengths.
    ///
    /// # Errors
    /// [`Error::Unusable`] after an error in the middle of a pass;
    /// [`SnapshotError::NotSaved`] for a store that cannot be written, and for a cache that is no longer
    /// what this session made of it: in a store that its policy would not make
    /// ([`SequenceCache::set_policy`](crate::SequenceCache::set_policy)), or with tokens that the session
    /// does not know; [`SnapshotError::Io`]; the model's ([`CausalLm::fingerprint`]); [`Error::Device`].
    pub fn write(&self, to: &mut dyn Write) -> Result<()> {
        self.cache.usable()?;
        self.saveable()?;
        let own = Identity::of(&**self.model(), &**self.cache.policy())?;
        let parts = self.parts()?;
        let header = header::write(own, &self.state(), &parts)?;
        let mut to = Hashing::new(to);
        to.put(&(header.len() as u64).to_le_bytes())?;
        to.put(&header)?;
        to.put_numbers(&self.history)?;
        if let Some(logits) = &self.logits {
            to.put_numbers(logits)?;
        }
        for layer in &self.cache.layers {
            for head in layer.lists.fetch()? {
                to.put_numbers(&head.positions)?;
                to.put_numbers(&head.scores)?;
            }
        }
        for layer in &self.cache.layers {
            to.put_numbers(&layer.notes)?;
        }
        for layer in &self.cache.layers {
            layer.store.write(&mut to)?;
        }
        // A store that does not write twice the same would make a file of wrong extents.
        let due = 8 + header.len() as u64 + parts.iter().map(|part| part.bytes).sum::<u64>();
        if to.written + DIGEST as u64 != due {
            let found = to.written + DIGEST as u64;
            let store = self.cache.store(0).name();
            let changed = format!("the store {store}, of which {due} bytes became {found},");
            return Err(SnapshotError::NotSaved(changed).into());
        }
        let digest = to.hash.clone().finalize();
        to.put(&digest)
    }

    /// Takes up a session that was [written](Self::write): `length` bytes of `from`.
    ///
    /// It must be the same model (or one of the same shape, where [`CausalLm::fingerprint`] does not say),
    /// a policy of the same [fingerprint](KvCachePolicy::fingerprint), and the same type of dense keys and
    /// values. What computes may be another than before; then the session goes on with what that rounds to.
    ///
    /// Nothing is handed out before the hash of all that was read is compared. Memory is taken for what is
    /// there only: `length` and a MiB at most, however damaged it is.
    ///
    /// # Errors
    /// [`Error::Snapshot`] with [`SnapshotError::Foreign`], [`SnapshotError::Version`],
    /// [`SnapshotError::OtherModel`], [`SnapshotError::OtherPolicy`], [`SnapshotError::OtherStore`],
    /// [`SnapshotError::Damaged`] or [`SnapshotError::Io`]; as
    /// [`with_options`](Self::with_options); the model's.
    pub fn read(
        model: Arc<dyn CausalLm>,
        policy: Arc<dyn KvCachePolicy>,
        options: CacheOptions,
        from: &mut dyn Read,
        length: u64,
    ) -> Result<Self> {
        let mut session = Self::with_options(model, policy, options)?;
        let mut from = Hashed {
            from,
            hash: Sha256::new(),
        };
        let (state, extents) = session.read_header(&mut from, length)?;
        session.read_parts(&mut from, &extents)?;
        let due = std::mem::take(&mut from.hash).finalize();
        let mut found = [0; DIGEST];
        from.fill(&mut found)?;
        if found[..] != due[..] {
            return Err(damaged("its content is not what was written"));
        }
        session.set_state(state)?;
        Ok(session)
    }

    /// [Writes](Self::write) a file, in place of the one that is there: at any moment `path` is all of the
    /// old one or all of the new one, also if the process or the machine dies. What a killed process leaves
    /// behind is a file `.snapshot-*.tmp` beside it, which hinders nobody.
    ///
    /// # Errors
    /// As [`write`](Self::write). The old file is there then; but if all that failed is to make sure that the
    /// new name has reached the disk ([`SnapshotError::Io`]), the new one is.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        snapshots::replace(path.as_ref(), &mut |to| self.write(to))
    }

    /// [Takes up](Self::read) a session from a file.
    ///
    /// ```no_run
    /// # fn demo(model: std::sync::Arc<dyn locret_core::CausalLm>,
    /// #         policy: std::sync::Arc<dyn locret_core::KvCachePolicy>,
    /// #         session: locret_core::Session) -> locret_core::Result<()> {
    /// use locret_core::{CacheOptions, Session};
    ///
    /// session.save("conversation.safetensors")?;
    /// let options = CacheOptions::default();
    /// let same = Session::restore(model, policy, options, "conversation.safetensors")?;
    /// assert_eq!(same.tokens(), session.tokens());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn restore(
        model: Arc<dyn CausalLm>,
        policy: Arc<dyn KvCachePolicy>,
        options: CacheOptions,
        path: impl AsRef<Path>,
    ) -> Result<Self> {
        let path = path.as_ref();
        let (mut from, length) =
            snapshots::open(path).map_err(SnapshotError::io(path.display()))?;
        Self::read(model, policy, options, &mut from, length)
    }

    /// Refuses what could not be taken up again.
    pub(super) fn saveable(&self) -> Result<()> {
        let cache = &self.cache;
        let read = self.history.len() - usize::from(self.pending.is_some());
        if cache.seen() != read {
            let found = format!(
                "a cache of {} tokens, of which its session knows {read},",
                cache.seen()
            );
            return Err(SnapshotError::NotSaved(found).into());
        }
        if !cache.scored_for(&**cache.policy()) {
            let found = "a cache whose units carry other numbers than its policy's".into();
            return Err(SnapshotError::NotSaved(found).into());
        }
        let own = cache
            .policy()
            .store(&cache.spec().layer(0), &cache.places[0])?
            .name();
        let found = cache.store(0).name();
        match own == found {
            true => Ok(()),
            false => Err(SnapshotError::NotSaved(format!(
                "the store {found} of a cache whose policy has the store {own}"
            ))
            .into()),
        }
    }

    /// All that is not in the tensors.
    fn state(&self) -> State {
        let (cache, times) = (&self.cache, &self.times);
        State {
            store: cache.store(0).name(),
            dtype: cache.options().dtype.name().into(),
            computed_by: computed_by(&cache.places),
            pending: self.pending,
            midway: self.midway,
            prompts: self.prompts,
            prefill: self.prefill,
            long_context: cache.rope.is_long(),
            rotated: cache.layers.iter().map(|layer| layer.rotated).collect(),
            scored_by: cache.scored_by.clone(),
            passed_on: cache.passed_on,
            peak: cache.peak.into(),
            prefill_peak: cache.prefill_peak.into(),
            prefill_tokens: times.prefill_tokens,
            prefill_nanoseconds: nanoseconds(times.prefill_time),
            decode_tokens: times.decode_tokens,
            decode_nanoseconds: nanoseconds(times.decode_time),
        }
    }

    /// All tensors, in the order in which they are written.
    fn parts(&self) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        let mut add = |slot: Slot, count: u64| {
            parts.push(Part {
                slot,
                bytes: count * slot.size(),
            });
        };
        add(Slot::Tokens, self.history.len() as u64);
        if let Some(logits) = &self.logits {
            add(Slot::Logits, logits.len() as u64);
        }
        for (layer, of) in self.cache.layers.iter().enumerate() {
            for (head, of) in of.lists.fetch()?.iter().enumerate() {
                add(Slot::Positions(layer, head), of.positions.len() as u64);
                if !of.scores.is_empty() {
                    add(Slot::Scores(layer, head), of.scores.len() as u64);
                }
            }
        }
        for (layer, of) in self.cache.layers.iter().enumerate() {
            if !of.notes.is_empty() {
                add(Slot::Notes(layer), of.notes.len() as u64);
            }
        }
        for (layer, of) in self.cache.layers.iter().enumerate() {
            let mut length = Length(0);
            of.store.write(&mut length)?;
            add(Slot::Store(layer), length.0);
        }
        add(Slot::Digest, DIGEST as u64);
        Ok(parts)
    }

    /// Reads the header and checks whose snapshot this is; what the tensors are, and the rest of the
    /// state.
    fn read_header(&self, from: &mut Hashed<'_>, length: u64) -> Result<(State, Vec<Part>)> {
        let Some(room) = length.checked_sub(8) else {
            return Err(header::foreign(format!("{length} bytes")));
        };
        let mut size = [0; 8];
        from.fill(&mut size)?;
        let size = u64::from_le_bytes(size);
        if size > room.min(header::LONGEST) {
            let found = format!("a header of {size} bytes in a file of {length}");
            return Err(header::foreign(found));
        }
        let mut header = vec![0; size as usize];
        from.fill(&mut header)?;
        let own = Identity::of(&**self.model(), &**self.cache.policy())?;
        let (state, parts) = header::read(&header, own, self.cache.spec(), room - size)?;
        Ok((self.check_state(state)?, parts))
    }

    /// Checks what can be checked before a tensor is read.
    fn check_state(&self, state: State) -> Result<State> {
        let cache = &self.cache;
        let given = [
            cache.store(0).name(),
            cache.options().dtype.name().to_owned(),
        ];
        if state.store != given[0] || state.dtype != given[1] {
            return Err(SnapshotError::OtherStore {
                expected: format!("{}, dense units in {}", given[0], given[1]),
                found: format!("{}, dense units in {}", state.store, state.dtype),
            }
            .into());
        }
        if state.rotated.len() != cache.layers.len() {
            let found = state.rotated.len();
            return Err(damaged(format!("{found} layers are rotated or not")));
        }
        let turns = cache.positions == Positions::Compact
            && cache.layers.iter().all(|layer| layer.store.turns_keys());
        if state.rotated.contains(&true) && !turns {
            return Err(damaged("keys are rotated that never are"));
        }
        let rope = &cache.spec().rope;
        let long = state.long_context;
        if !([0, usize::MAX].iter()).any(|length| rope.is_long(*length) == long) {
            return Err(damaged("a context that the model's positions don't have"));
        }
        if state.prefill.validate().is_err() {
            return Err(damaged("a prompt was read in chunks of no token"));
        }
        Ok(state)
    }

    /// Reads all tensors but the last one.
    fn read_parts(&mut self, from: &mut Hashed<'_>, parts: &[Part]) -> Result<()> {
        let spec = self.cache.spec();
        let policy = self.cache.policy();
        let layers = (0..spec.layers).map(|layer| policy.carried_width(&spec.layer(layer)));
        let (vocab, widths): (_, Vec<usize>) = (spec.vocab, layers.collect());
        let layers = (0..spec.layers).map(|layer| policy.noted(&spec.layer(layer)));
        let noted: Vec<usize> = layers.collect();
        for part in parts {
            match part.slot {
                Slot::Tokens => {
                    self.history = from.numbers(part.bytes)?;
                    if let Some(id) = self.history.iter().find(|id| **id as usize >= vocab) {
                        return Err(damaged(format!("a token {id} of {vocab}")));
                    }
                }
                Slot::Logits => {
                    let logits = from.numbers(part.bytes)?;
                    if logits.len() != vocab {
                        let found = logits.len();
                        return Err(damaged(format!("{found} logits of {vocab} tokens")));
                    }
                    self.logits = Some(logits);
                }
                Slot::Positions(layer, head) => {
                    let positions = from.numbers(part.bytes)?;
                    let seen = self.history.len();
                    check_positions(&positions, seen)
                        .map_err(|what| damaged(format!("{what} in {}", part.slot)))?;
                    let of = &mut self.cache.layers[layer];
                    of.lists.set_positions(head, positions)?;
                }
                Slot::Scores(layer, head) => {
                    let heads = self.cache.layers[layer].lists.heads_mut()?;
                    let HeadMeta { positions, scores } = &mut heads[head];
                    *scores = from.numbers(part.bytes)?;
                    let due = positions.len().checked_mul(widths[layer]);
                    if scores.is_empty() || due != Some(scores.len()) {
                        let (scores, units) = (scores.len(), positions.len());
                        return Err(damaged(format!("{scores} scores for {units} units")));
                    }
                }
                Slot::Notes(layer) => {
                    let notes: Vec<f32> = from.numbers(part.bytes)?;
                    let (found, due) = (notes.len(), noted[layer]);
                    if found == 0 || found != due {
                        return Err(damaged(format!("{found} notes of a layer that has {due}")));
                    }
                    self.cache.layers[layer].notes = notes;
                }
                Slot::Store(layer) => {
                    let of = &mut self.cache.layers[layer];
                    let own: &mut dyn Read = &mut *from;
                    let mut own = own.take(part.bytes);
                    of.store.read(&mut own)?;
                    if own.limit() != 0 {
                        let left = own.limit();
                        return Err(damaged(format!("{left} bytes behind {}", part.slot)));
                    }
                    for (head, due) in of.lists.lens().iter().copied().enumerate() {
                        let found = of.store.len(head);
                        if found != due {
                            return Err(damaged(format!(
                                "{found} units and {due} positions in KV head {head} of layer {layer}"
                            )));
                        }
                    }
                    of.count();
                }
                Slot::Digest => {}
            }
        }
        Ok(())
    }

    /// The rest of the state, which has to go with what was read.
    fn set_state(&mut self, state: State) -> Result<()> {
        let State {
            store: _,
            dtype: _,
            computed_by: _,
            pending,
            midway,
            prompts,
            prefill,
            long_context,
            rotated,
            scored_by,
            passed_on,
            peak,
            prefill_peak,
            prefill_tokens,
            prefill_nanoseconds,
            decode_tokens,
            decode_nanoseconds,
        } = state;
        let cache = &mut self.cache;
        if pending.is_some() && pending != self.history.last().copied() {
            return Err(damaged("the token that waits is not the last one"));
        }
        cache.seen = self.history.len() - usize::from(pending.is_some());
        cache.fetch()?;
        let heads = || cache.layers.iter().flat_map(|layer| layer.lists.heads());
        if heads().any(|h| {
            h.positions
                .last()
                .is_some_and(|p| *p as usize >= cache.seen)
        }) {
            return Err(damaged("a position of a token that was not read"));
        }
        // As `SequenceCache::set_policy` has it.
        if let Some(kind) = cache.policy.carries()
            && cache.units() > 0
            && (scored_by.as_ref() != Some(&kind)
                || heads().any(|h| h.scores.is_empty() && !h.positions.is_empty())
                || !cache.scored_for(&*cache.policy))
        {
            return Err(damaged("units without the scores that their policy needs"));
        }
        let counted = prefill_tokens.checked_add(decode_tokens);
        if counted.is_none_or(|tokens| tokens > cache.seen) {
            return Err(damaged("more tokens were counted than read"));
        }
        let longest = heads().map(|h| h.positions.len()).max().unwrap_or(0);
        let had = |peak: &Held| {
            (longest..=cache.seen).contains(&peak.units_per_head) && peak.units >= cache.units()
        };
        let (most, prefill_most) = (&peak, &prefill_peak);
        if !had(most)
            || prefill_most.units_per_head > most.units_per_head
            || prefill_most.units > most.units
            || prefill_most.bytes > most.bytes
        {
            return Err(damaged("a peak that no session has had"));
        }
        cache.rope.set_long(long_context);
        for (layer, rotated) in cache.layers.iter_mut().zip(rotated) {
            layer.rotated = rotated;
        }
        (cache.scored_by, cache.passed_on) = (scored_by, passed_on);
        (cache.peak, cache.prefill_peak) = (peak.into(), prefill_peak.into());
        // Where something else computes, the same units may take more than they did.
        cache.peak.bytes = cache.peak.bytes.max(cache.bytes());
        (self.pending, self.midway, self.prompts, self.prefill) =
            (pending, midway, prompts, prefill);
        self.times = Report {
            prefill_tokens,
            prefill_time: Duration::from_nanos(prefill_nanoseconds),
            decode_tokens,
            decode_time: Duration::from_nanos(decode_nanoseconds),
            ..Report::default()
        };
        Ok(())
    }
}

fn damaged(what: impl Into<String>) -> Error {
    SnapshotError::Damaged(what.into()).into()
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Positions ascend, and are those of tokens that there are.
fn check_positions(positions: &[u32], tokens: usize) -> Result<(), String> {
    if let Some(pair) = positions.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(format!("{} after {}", pair[1], pair[0]));
    }
    match positions.last() {
        Some(last) if *last as usize >= tokens => Err(format!("{last} of {tokens} tokens")),
        _ => Ok(()),
    }
}

/// Hashes what goes through.
struct Hashing<'a> {
    to: &'a mut dyn Write,
    hash: Sha256,
    written: u64,
}

impl<'a> Hashing<'a> {
    fn new(to: &'a mut dyn Write) -> Self {
        Self {
            to,
            hash: Sha256::new(),
            written: 0,
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self
            .write_all(bytes)
            .map_err(SnapshotError::io("writing"))?)
    }

    fn put_numbers<T: Pod>(&mut self, numbers: &[T]) -> Result<()> {
        self.put(bytemuck::cast_slice(numbers))
    }
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Counts what is written, and throws it away.
struct Length(u64);

impl Write for Length {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hashes what is read.
struct Hashed<'a> {
    from: &'a mut dyn Read,
    hash: Sha256,
}

impl Hashed<'_> {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        Ok(self.read_exact(bytes).map_err(SnapshotError::reading)?)
    }

    /// All numbers of a tensor, for which there is room in the file.
    fn numbers<T: Pod>(&mut self, bytes: u64) -> Result<Vec<T>> {
        let mut numbers = vec![T::zeroed(); bytes as usize / size_of::<T>()];
        self.fill(bytemuck::cast_slice_mut(&mut numbers))?;
        Ok(numbers)
    }
}

impl Read for Hashed<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(bytes)?;
        self.hash.update(&bytes[..read]);
        Ok(read)
    }
}
