//! Sessions as bytes: saving them, and taking them up again.
//!
//! A snapshot is a safetensors file. Its header says whose it is (format, model, policy) and what is not a
//! number of the cache's; then come tokens, logits, positions and scores, the stores as they write
//! themselves, and last a SHA-256 of every byte before it.

use super::{
    cache::computed_by,
    session::{Prefill, Report, Session},
    snapshots,
};
use crate::{
    CacheOptions, CausalLm, Error, KvCachePolicy, ModelSpec, Peak, Positions, Result,
    SnapshotError, contract::HeadMeta, host::hex,
};
use bytemuck::Pod;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeSeed, IgnoredAny, MapAccess, Visitor},
    ser::SerializeMap,
};
use sha2::{Digest, Sha256};
use std::{
    fmt,
    io::{self, Read, Write},
    path::Path,
    sync::Arc,
    time::Duration,
};

/// What the header calls the format.
const FORMAT: &str = "locret-session";
/// Of the format, and of how fingerprints are made.
pub(super) const VERSION: u32 = 1;
/// The longest header that is read.
const HEADER: u64 = 64 << 20;
/// The longest text in a header. While it is parsed a text can take a few times its length.
const TEXT: usize = 64 << 10;
/// The longest text that tells a model or a policy from others as it is; of longer ones it is a hash.
const IDENTITY: usize = 8 << 10;
/// Bytes of the hash at the end.
const DIGEST: usize = 32;

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
        let metadata = self.metadata()?;
        let parts = self.parts()?;
        let mut header = serde_json::to_vec(&Header {
            metadata: &metadata,
            parts: &parts,
        })
        .map_err(|e| SnapshotError::NotSaved(format!("a header: {e}")))?;
        if longest_text(&header) > TEXT {
            let found = format!("a session with a name of more than {TEXT} bytes");
            return Err(SnapshotError::NotSaved(found).into());
        }
        // What follows is then aligned for numbers of 32 bits.
        header.resize(header.len().next_multiple_of(8), b' ');
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

    /// Who this is, and all that is not in the tensors.
    fn metadata(&self) -> Result<Metadata> {
        let text = |state: &State| serde_json::to_string(state);
        let state = text(&self.state())
            .map_err(|e| SnapshotError::NotSaved(format!("the state of a session: {e}")))?;
        Ok(Metadata {
            format: FORMAT.into(),
            version: VERSION.to_string(),
            identity: Identity::of(&**self.model(), &**self.cache.policy())?,
            state,
        })
    }

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
        let foreign = |what: String| Error::from(SnapshotError::Foreign(what));
        let Some(room) = length.checked_sub(8) else {
            return Err(foreign(format!("{length} bytes")));
        };
        let mut size = [0; 8];
        from.fill(&mut size)?;
        let size = u64::from_le_bytes(size);
        if size > room.min(HEADER) {
            let found = format!("a header of {size} bytes in a file of {length}");
            return Err(foreign(found));
        }
        let mut header = vec![0; size as usize];
        from.fill(&mut header)?;
        if longest_text(&header) > TEXT {
            let found = format!("a header with a text of more than {TEXT} bytes");
            return Err(foreign(found));
        }
        let mut reading = ReadHeader {
            own: Identity::of(&**self.model(), &**self.cache.policy())?,
            slots: Slots::of(self.cache.spec()),
            state: None,
            parts: Vec::new(),
            end: 0,
            error: None,
        };
        let mut json = serde_json::Deserializer::from_slice(&header);
        let parsed = reading.deserialize(&mut json).and_then(|()| json.end());
        let ReadHeader {
            state,
            parts,
            end,
            error,
            ..
        } = reading;
        if let Some(error) = error {
            return Err(error.into());
        }
        let state = match (parsed, state) {
            (Ok(()), Some(state)) => state,
            (Err(e), Some(_)) => return Err(damaged(format!("its header: {e}"))),
            (Ok(()), None) => return Err(foreign("nothing says what it is".into())),
            (Err(e), None) => return Err(foreign(format!("its header: {e}"))),
        };
        let due = room - size;
        match end == due {
            true => Ok((self.check_state(state)?, parts)),
            false => Err(damaged(format!(
                "tensors of {end} bytes in a file that has {due} for them"
            ))),
        }
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

/// Whose snapshot it is: the model's shape and weights, the policy and its settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) model: String,
    pub(super) model_fingerprint: Option<String>,
    pub(super) policy: String,
    pub(super) policy_fingerprint: String,
}

impl Identity {
    pub(super) fn of(model: &dyn CausalLm, policy: &dyn KvCachePolicy) -> Result<Self> {
        Ok(Self {
            model_fingerprint: model.fingerprint()?.map(short),
            ..Self::of_shape(model, policy)?
        })
    }

    /// The same without the weights.
    pub(super) fn of_shape(model: &dyn CausalLm, policy: &dyn KvCachePolicy) -> Result<Self> {
        let shape = serde_json::to_string(model.spec())
            .map_err(|e| SnapshotError::NotSaved(format!("a model's shape: {e}")))?;
        Ok(Self {
            model: short(shape),
            model_fingerprint: None,
            policy: short(policy.name()),
            policy_fingerprint: short(policy.fingerprint()),
        })
    }

    /// What is said of the model.
    fn of_model(&self) -> String {
        match &self.model_fingerprint {
            Some(fingerprint) => format!("{fingerprint} {}", self.model),
            None => format!("one of no fingerprint {}", self.model),
        }
    }
}

/// A text that is not too long for a header, or its hash.
fn short(text: String) -> String {
    match text.len() > IDENTITY {
        true => format!("sha256 {}", hex(&Sha256::digest(text))),
        false => text,
    }
}

/// What a session and its cache have beside numbers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    store: String,
    dtype: String,
    /// For whoever looks into the file.
    computed_by: String,
    pending: Option<u32>,
    midway: bool,
    prompts: usize,
    prefill: Prefill,
    long_context: bool,
    rotated: Vec<bool>,
    scored_by: Option<String>,
    passed_on: bool,
    peak: Held,
    prefill_peak: Held,
    prefill_tokens: usize,
    prefill_nanoseconds: u64,
    decode_tokens: usize,
    decode_nanoseconds: u64,
}

/// [`Peak`] in a file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Held {
    units_per_head: usize,
    units: usize,
    bytes: usize,
}

impl From<Peak> for Held {
    fn from(peak: Peak) -> Self {
        let Peak {
            units_per_head,
            units,
            bytes,
        } = peak;
        Self {
            units_per_head,
            units,
            bytes,
        }
    }
}

impl From<Held> for Peak {
    fn from(held: Held) -> Self {
        Self {
            units_per_head: held.units_per_head,
            units: held.units,
            bytes: held.bytes,
        }
    }
}

/// A tensor's place: what it is, by layer and KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Tokens,
    Logits,
    Positions(usize, usize),
    Scores(usize, usize),
    Notes(usize),
    Store(usize),
    Digest,
}

impl Slot {
    fn dtype(self) -> &'static str {
        match self {
            Self::Tokens | Self::Positions(..) => "U32",
            Self::Logits | Self::Scores(..) | Self::Notes(_) => "F32",
            Self::Store(_) | Self::Digest => "U8",
        }
    }

    /// Bytes of one of its numbers.
    fn size(self) -> u64 {
        match self {
            Self::Store(_) | Self::Digest => 1,
            _ => 4,
        }
    }

    fn optional(self) -> bool {
        matches!(self, Self::Logits | Self::Scores(..) | Self::Notes(_))
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tokens => f.write_str("tokens"),
            Self::Logits => f.write_str("logits"),
            Self::Positions(layer, head) => write!(f, "layers.{layer}.heads.{head}.positions"),
            Self::Scores(layer, head) => write!(f, "layers.{layer}.heads.{head}.scores"),
            Self::Notes(layer) => write!(f, "layers.{layer}.notes"),
            Self::Store(layer) => write!(f, "layers.{layer}.store"),
            Self::Digest => f.write_str("sha256"),
        }
    }
}

/// All slots of a model's sessions, in order.
struct Slots {
    layers: usize,
    heads: usize,
    next: Option<Slot>,
}

impl Slots {
    fn of(spec: &ModelSpec) -> Self {
        Self {
            layers: spec.layers,
            heads: spec.kv_heads,
            next: Some(Slot::Tokens),
        }
    }
}

impl Iterator for Slots {
    type Item = Slot;

    fn next(&mut self) -> Option<Slot> {
        let now = self.next?;
        self.next = match now {
            Slot::Tokens => Some(Slot::Logits),
            Slot::Logits => Some(Slot::Positions(0, 0)),
            Slot::Positions(layer, head) => Some(Slot::Scores(layer, head)),
            Slot::Scores(layer, head) if head + 1 < self.heads => {
                Some(Slot::Positions(layer, head + 1))
            }
            Slot::Scores(layer, _) if layer + 1 < self.layers => {
                Some(Slot::Positions(layer + 1, 0))
            }
            Slot::Scores(..) => Some(Slot::Notes(0)),
            Slot::Notes(layer) if layer + 1 < self.layers => Some(Slot::Notes(layer + 1)),
            Slot::Notes(_) => Some(Slot::Store(0)),
            Slot::Store(layer) if layer + 1 < self.layers => Some(Slot::Store(layer + 1)),
            Slot::Store(_) => Some(Slot::Digest),
            Slot::Digest => None,
        };
        Some(now)
    }
}

/// A tensor of the file.
#[derive(Debug, Clone, Copy)]
struct Part {
    slot: Slot,
    bytes: u64,
}

struct Metadata {
    format: String,
    version: String,
    identity: Identity,
    state: String,
}

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        map.serialize_entry("format", &self.format)?;
        map.serialize_entry("version", &self.version)?;
        map.serialize_entry("model", &self.identity.model)?;
        // A text or nothing: metadata are texts.
        if let Some(fingerprint) = &self.identity.model_fingerprint {
            map.serialize_entry("model_fingerprint", fingerprint)?;
        }
        map.serialize_entry("policy", &self.identity.policy)?;
        map.serialize_entry("policy_fingerprint", &self.identity.policy_fingerprint)?;
        map.serialize_entry("state", &self.state)?;
        map.end()
    }
}

struct Header<'a> {
    metadata: &'a Metadata,
    parts: &'a [Part],
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        map.serialize_entry("__metadata__", self.metadata)?;
        let mut start = 0;
        for part in self.parts {
            let entry = Entry {
                dtype: part.slot.dtype().to_owned(),
                shape: [part.bytes / part.slot.size()],
                data_offsets: [start, start + part.bytes],
            };
            map.serialize_entry(&part.slot.to_string(), &entry)?;
            start += part.bytes;
        }
        map.end()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: [u64; 1],
    data_offsets: [u64; 2],
}

/// The longest text between quotation marks.
fn longest_text(json: &[u8]) -> usize {
    let (mut longest, mut start, mut escaped) = (0, None, false);
    for (at, byte) in json.iter().enumerate() {
        match (start, byte) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), b'\\') => escaped = true,
            (Some(from), b'"') => {
                longest = longest.max(at - from);
                start = None;
            }
            (None, b'"') => start = Some(at),
            _ => {}
        }
    }
    longest.max(start.map_or(0, |from| json.len() - from))
}

/// Reads a header entry by entry, each of which is checked as it comes, so that it takes no more memory
/// than one that is right.
struct ReadHeader {
    own: Identity,
    slots: Slots,
    state: Option<State>,
    parts: Vec<Part>,
    /// Where the tensors so far end.
    end: u64,
    /// What is wrong beside the form.
    error: Option<SnapshotError>,
}

impl ReadHeader {
    fn wrong<E: de::Error>(&mut self, error: SnapshotError) -> E {
        let text = error.to_string();
        self.error = Some(error);
        E::custom(text)
    }

    fn entry<E: de::Error>(&mut self, name: &str, entry: Entry) -> Result<(), E> {
        let slot = loop {
            match self.slots.next() {
                Some(slot) if slot.to_string() == name => break slot,
                Some(slot) if slot.optional() => {}
                Some(slot) => {
                    let found = format!("{name:?} where {slot} is due");
                    return Err(self.wrong(SnapshotError::Damaged(found)));
                }
                None => {
                    let found = format!("{name:?} after all that there is");
                    return Err(self.wrong(SnapshotError::Damaged(found)));
                }
            }
        };
        let ([count], [start, end]) = (entry.shape, entry.data_offsets);
        let bytes = count.checked_mul(slot.size());
        let right = entry.dtype == slot.dtype()
            && start == self.end
            && bytes.is_some_and(|bytes| start.checked_add(bytes) == Some(end))
            && (slot != Slot::Digest || count == DIGEST as u64);
        if !right {
            let found = format!(
                "{slot} of {count} {} from {start} to {end}, after {} bytes",
                entry.dtype, self.end
            );
            return Err(self.wrong(SnapshotError::Damaged(found)));
        }
        self.parts.push(Part {
            slot,
            bytes: end - start,
        });
        self.end = end;
        Ok(())
    }

    /// Whose it is has to be right before anything else of the file is looked at.
    fn metadata(&mut self, found: Texts) -> Result<(), SnapshotError> {
        let Texts { texts, twice } = found;
        let [
            format,
            version,
            model,
            model_fingerprint,
            policy,
            policy_fingerprint,
            state,
        ] = texts;
        if format.as_deref() != Some(FORMAT) {
            let found = format.unwrap_or_else(|| "a file without a format".into());
            return Err(SnapshotError::Foreign(found));
        }
        let version = version.unwrap_or_default();
        if version != VERSION.to_string() {
            return Err(SnapshotError::Version {
                found: version,
                known: VERSION,
            });
        }
        let (Some(model), Some(policy), Some(policy_fingerprint), Some(state), false) =
            (model, policy, policy_fingerprint, state, twice)
        else {
            let found = "what its header says of it is not complete, or more than that";
            return Err(SnapshotError::Damaged(found.into()));
        };
        let found = Identity {
            model,
            model_fingerprint,
            policy,
            policy_fingerprint,
        };
        let own = &self.own;
        if (&found.model, &found.model_fingerprint) != (&own.model, &own.model_fingerprint) {
            return Err(SnapshotError::OtherModel {
                expected: own.of_model(),
                found: found.of_model(),
            });
        }
        if (&found.policy, &found.policy_fingerprint) != (&own.policy, &own.policy_fingerprint) {
            return Err(SnapshotError::OtherPolicy {
                expected: own.policy_fingerprint.clone(),
                found: found.policy_fingerprint,
            });
        }
        let state = serde_json::from_str(&state)
            .map_err(|e| SnapshotError::Damaged(format!("the state in its header: {e}")))?;
        self.state = Some(state);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for &mut ReadHeader {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut ReadHeader {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the header of a safetensors file")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let first: Option<String> = map.next_key()?;
        if first.as_deref() != Some("__metadata__") {
            let found = "its header does not begin with what it is";
            return Err(self.wrong(SnapshotError::Foreign(found.into())));
        }
        let texts = map.next_value()?;
        self.metadata(texts).map_err(|e| self.wrong(e))?;
        while let Some(name) = map.next_key::<String>()? {
            let entry = map.next_value()?;
            self.entry(&name, entry)?;
        }
        match self.parts.last() {
            Some(part) if part.slot == Slot::Digest => Ok(()),
            _ => Err(self.wrong(SnapshotError::Damaged("tensors are missing".into()))),
        }
    }
}

/// The metadata that a snapshot has.
const TEXTS: [&str; 7] = [
    "format",
    "version",
    "model",
    "model_fingerprint",
    "policy",
    "policy_fingerprint",
    "state",
];

/// Their texts, and whether there was anything else, or one of them twice.
#[derive(Default)]
struct Texts {
    texts: [Option<String>; TEXTS.len()],
    twice: bool,
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(ReadTexts)
    }
}

struct ReadTexts;

impl<'de> Visitor<'de> for ReadTexts {
    type Value = Texts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("metadata")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Texts, A::Error> {
        let mut all = Texts::default();
        while let Some(name) = map.next_key::<String>()? {
            match TEXTS.iter().position(|known| *known == name) {
                Some(index) => {
                    let text = map.next_value()?;
                    all.twice |= all.texts[index].replace(text).is_some();
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                    all.twice = true;
                }
            }
        }
        Ok(all)
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
