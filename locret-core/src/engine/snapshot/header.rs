//! What stands before a snapshot's numbers: whose it is, its state as JSON, and which tensors follow.

use super::damaged;
use crate::{
    CausalLm, Error, KvCachePolicy, ModelSpec, Peak, Prefill, Result, SnapshotError, host::hex,
};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeSeed, IgnoredAny, MapAccess, Visitor},
    ser::SerializeMap,
};
use sha2::{Digest, Sha256};
use std::fmt;

/// What the header calls the format.
const FORMAT: &str = "locret-session";
/// Of the format, and of how fingerprints are made.
pub(in crate::engine) const VERSION: u32 = 1;
/// The longest header that is read.
pub(super) const LONGEST: u64 = 64 << 20;
/// The longest text in a header. While it is parsed a text can take a few times its length.
const TEXT: usize = 64 << 10;
/// The longest text that tells a model or a policy from others as it is; of longer ones it is a hash.
const IDENTITY: usize = 8 << 10;
/// Bytes of the hash at the end of the file.
pub(super) const DIGEST: usize = 32;

/// A header's bytes, of a multiple of eight: what follows is then aligned for numbers of 32 bits.
pub(super) fn write(identity: Identity, state: &State, parts: &[Part]) -> Result<Vec<u8>> {
    let state = serde_json::to_string(state)
        .map_err(|e| SnapshotError::NotSaved(format!("the state of a session: {e}")))?;
    let metadata = Metadata {
        format: FORMAT.into(),
        version: VERSION.to_string(),
        identity,
        state,
    };
    let mut header = serde_json::to_vec(&Header {
        metadata: &metadata,
        parts,
    })
    .map_err(|e| SnapshotError::NotSaved(format!("a header: {e}")))?;
    if longest_text(&header) > TEXT {
        let found = format!("a session with a name of more than {TEXT} bytes");
        return Err(SnapshotError::NotSaved(found).into());
    }
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

/// Reads a header of a snapshot that has to be `own`, with `due` bytes of tensors behind it: the state, and
/// the tensors in order.
pub(super) fn read(
    header: &[u8],
    own: Identity,
    spec: &ModelSpec,
    due: u64,
) -> Result<(State, Vec<Part>)> {
    if longest_text(header) > TEXT {
        let found = format!("a header with a text of more than {TEXT} bytes");
        return Err(foreign(found));
    }
    let mut reading = ReadHeader {
        own,
        slots: Slots::of(spec),
        state: None,
        parts: Vec::new(),
        end: 0,
        error: None,
    };
    let mut json = serde_json::Deserializer::from_slice(header);
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
        (Ok(()), None) => return Err(foreign("nothing says what it is")),
        (Err(e), None) => return Err(foreign(format!("its header: {e}"))),
    };
    match end == due {
        true => Ok((state, parts)),
        false => Err(damaged(format!(
            "tensors of {end} bytes in a file that has {due} for them"
        ))),
    }
}

/// What is no snapshot.
pub(super) fn foreign(what: impl Into<String>) -> Error {
    SnapshotError::Foreign(what.into()).into()
}

/// Whose snapshot it is: the model's shape and weights, the policy and its settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::engine) struct Identity {
    pub(in crate::engine) model: String,
    pub(in crate::engine) model_fingerprint: Option<String>,
    pub(in crate::engine) policy: String,
    pub(in crate::engine) policy_fingerprint: String,
}

impl Identity {
    pub(in crate::engine) fn of(model: &dyn CausalLm, policy: &dyn KvCachePolicy) -> Result<Self> {
        Ok(Self {
            model_fingerprint: model.fingerprint()?.map(short),
            ..Self::of_shape(model, policy)?
        })
    }

    /// The same without the weights.
    pub(in crate::engine) fn of_shape(
        model: &dyn CausalLm,
        policy: &dyn KvCachePolicy,
    ) -> Result<Self> {
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
pub(super) struct State {
    pub(super) store: String,
    pub(super) dtype: String,
    /// For whoever looks into the file.
    pub(super) computed_by: String,
    pub(super) pending: Option<u32>,
    pub(super) midway: bool,
    pub(super) prompts: usize,
    pub(super) prefill: Prefill,
    pub(super) long_context: bool,
    pub(super) rotated: Vec<bool>,
    pub(super) scored_by: Option<String>,
    pub(super) passed_on: bool,
    pub(super) peak: Held,
    pub(super) prefill_peak: Held,
    pub(super) prefill_tokens: usize,
    pub(super) prefill_nanoseconds: u64,
    pub(super) decode_tokens: usize,
    pub(super) decode_nanoseconds: u64,
}

/// [`Peak`] in a file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Held {
    pub(super) units_per_head: usize,
    pub(super) units: usize,
    pub(super) bytes: usize,
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
pub(super) enum Slot {
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
    pub(super) fn size(self) -> u64 {
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
pub(super) struct Part {
    pub(super) slot: Slot,
    pub(super) bytes: u64,
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
