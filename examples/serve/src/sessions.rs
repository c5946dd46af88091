//! Conversations that are kept between their turns, where other processes find them, too.
//!
//! A client names a conversation and sends all of its messages each time, as every client does. What an
//! answer left behind is kept under the name and the number of messages that there are then, so that a
//! turn which is asked for once more (its answer was lost) finds the state before it. The one before that
//! is forgotten.

use crate::{Error, Result, app::App};
use locret_core::{
    Budget, Error as CoreError, KvCachePolicy, Request, Session, SnapshotError, SnapshotStore,
    Stored,
};
use locret_models::Message;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    io::{Read, Write},
    sync::Arc,
};

/// Characters of a session's name at most.
const NAME: usize = 64;
/// Bytes of a [`Record`] at most: more than that of the longest conversation.
const RECORD: u64 = 1 << 20;

/// What is kept before a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    model: String,
    /// As the first turn asked for them.
    policy: Option<String>,
    budget: Option<Budget>,
    /// A hash of each message that was read, and of the answer as the client has it.
    messages: Vec<String>,
    /// Whether the answer's last token ends a turn.
    ended: bool,
    /// Tokens of the session, and bytes that it takes.
    tokens: usize,
    bytes: usize,
    /// The key of the state that this turn went on from.
    before: Option<String>,
}

const VERSION: u32 = 1;

/// A turn of a conversation, while it is being answered.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    name: String,
    messages: Vec<String>,
    policy: Option<String>,
    budget: Option<Budget>,
    /// The key that it goes on from, and the key before that one.
    from: Option<(String, Option<String>)>,
}

/// Where a turn goes on.
pub(crate) struct Resumed {
    record: Record,
    stored: Stored,
}

/// What the prompt of a turn is.
pub(crate) struct Opening {
    /// Tokens to be read.
    pub ids: Vec<u32>,
    /// Those of the system message at the beginning.
    pub prefix: usize,
    /// Where it goes on.
    pub resumed: Option<Resumed>,
    pub turn: Turn,
}

impl Resumed {
    /// Tokens that have been read before.
    pub(crate) fn tokens(&self) -> usize {
        self.record.tokens
    }

    /// The request, whose session is read when there is memory for it.
    pub(crate) fn request(
        self,
        app: &App,
        ids: Vec<u32>,
        policy: Arc<dyn KvCachePolicy>,
    ) -> Request {
        let Self { record, stored } = self;
        let Stored { mut from, length } = stored;
        let (model, options) = (app.batcher.model().clone(), app.cache);
        let (own, tokens) = (policy.clone(), record.tokens);
        let fetch = move || {
            let session = Session::read(model, own, options, &mut *from, length)?;
            match session.tokens().len() == tokens {
                true => Ok(session),
                false => Err(damaged("it has other tokens than it says")),
            }
        };
        Request::fetch([record.tokens, record.bytes], fetch, ids, policy)
    }
}

fn damaged(message: &str) -> CoreError {
    SnapshotError::Damaged(message.into()).into()
}

fn hash(message: &Message) -> String {
    let mut hash = Sha256::new();
    hash.update((message.role.len() as u64).to_le_bytes());
    hash.update(message.role.as_bytes());
    hash.update(message.content.as_bytes());
    hash.finalize()[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Checks a session's name.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"_-".contains(&c);
    match (1..=NAME).contains(&name.len()) && name.bytes().all(allowed) {
        true => Ok(()),
        false => Err(Error::field(
            "session",
            format!("expected 1 to {NAME} of the characters A-Z a-z 0-9 _ -"),
        )),
    }
}

fn key(name: &str, messages: usize) -> String {
    format!("{name}.{messages}")
}

/// What a turn reads, and from where it goes on. Takes time: for blocking threads.
pub(crate) fn open(
    app: &App,
    store: &dyn SnapshotStore,
    name: &str,
    messages: &[Message],
    (policy, budget): (Option<String>, Option<Budget>),
) -> Result<Opening> {
    let conflict = |message: String| Error::Session {
        session: name.to_owned(),
        message,
    };
    let mut turn = Turn {
        name: name.to_owned(),
        messages: messages.iter().map(hash).collect(),
        policy,
        budget,
        from: None,
    };
    let Some(answer) = messages.iter().rposition(|m| m.role == "assistant") else {
        let (all, prefix) = app.conversation(messages)?;
        return Ok(Opening {
            ids: all,
            prefix,
            resumed: None,
            turn,
        });
    };
    let before = answer + 1;
    let key = key(name, before);
    let stored = store.get(&key).map_err(|e| Error::Store(e.to_string()))?;
    let Some(mut stored) = stored else {
        return Err(conflict(format!(
            "there is no state after {before} messages to go on from; a conversation that is new here \
             begins without an answer, and goes on with the answers that it got"
        )));
    };
    let record = read_record(&mut stored).map_err(|e| Error::Store(e.to_string()))?;
    if record.version != VERSION || record.model != app.name {
        return Err(conflict(format!(
            "it was kept by version {} with the model {:?}, and this is version {VERSION} with {:?}",
            record.version, record.model, app.name
        )));
    }
    let same = turn.messages.iter().zip(&record.messages);
    if let Some(other) = same
        .enumerate()
        .find_map(|(i, (a, b))| (a != b).then_some(i))
    {
        return Err(conflict(format!(
            "message {other} (from 0) is another one than was read or answered; begin another session"
        )));
    }
    if record.messages.len() != before {
        return Err(conflict("its state is of another turn".into()));
    }
    if (turn.policy.is_some() && turn.policy != record.policy)
        || (turn.budget.is_some() && turn.budget != record.budget)
    {
        return Err(conflict(
            "its policy and budget are those of its first turn".into(),
        ));
    }
    turn.policy.clone_from(&record.policy);
    turn.budget = record.budget;
    turn.from = Some((key, record.before.clone()));
    // The session has the prompt that was answered, and the answer, perhaps cut into other tokens than the
    // tokenizer would cut it. What comes after an answer is the same after any: after one whose first
    // character cannot grow together with what is before it.
    let (prompt, _) = app.conversation(&messages[..answer])?;
    let mut any = messages.to_vec();
    any[answer].content = "x".into();
    let (all, _) = app.conversation(&any)?;
    let after = all.strip_prefix(&prompt[..]);
    let end = after.and_then(|after| {
        let end = after.iter().position(|id| app.stop.contains(id))?;
        Some(&after[end + usize::from(record.ended)..])
    });
    let ids = end.filter(|ids| !ids.is_empty()).ok_or_else(|| {
        Error::invalid("the model's chat template writes conversations that cannot be gone on with")
    })?;
    Ok(Opening {
        ids: ids.to_vec(),
        prefix: 0,
        resumed: Some(Resumed { record, stored }),
        turn,
    })
}

impl Turn {
    /// The policy that the conversation has.
    pub(crate) fn policy(&self) -> (Option<&str>, Option<Budget>) {
        (self.policy.as_deref(), self.budget)
    }

    /// Keeps the state after an answer. Takes time: for blocking threads.
    pub(crate) fn keep(
        self,
        app: &App,
        store: &dyn SnapshotStore,
        session: &Session,
        answer: &str,
        ended: bool,
    ) -> Result<()> {
        let mut messages = self.messages;
        messages.push(hash(&Message::new("assistant", answer)));
        let (before, old) = self.from.unzip();
        let key = key(&self.name, messages.len());
        let record = Record {
            version: VERSION,
            model: app.name.clone(),
            policy: self.policy,
            budget: self.budget,
            messages,
            ended,
            tokens: session.tokens().len(),
            bytes: session.cache().bytes(),
            before,
        };
        let put = store.put(&key, &mut |to| {
            write_record(to, &record)?;
            session.write(to)
        });
        put.map_err(|e| Error::NotStored(e.to_string()))?;
        if let Some(old) = old.flatten() {
            // What is left there is only in the way.
            let _ = store.remove(&old);
        }
        Ok(())
    }
}

fn failed(source: std::io::Error) -> CoreError {
    let what = "a session's record".to_owned();
    SnapshotError::Io { what, source }.into()
}

/// The length, the record as JSON, and its hash.
fn write_record(to: &mut dyn Write, record: &Record) -> locret_core::Result<()> {
    let json = serde_json::to_vec(record).map_err(|e| failed(e.into()))?;
    to.write_all(&(json.len() as u64).to_le_bytes())
        .and_then(|()| to.write_all(&json))
        .and_then(|()| to.write_all(&Sha256::digest(&json)))
        .map_err(failed)
}

/// Reads the record; what is left is the snapshot.
fn read_record(stored: &mut Stored) -> locret_core::Result<Record> {
    let mut length = [0; 8];
    stored.from.read_exact(&mut length).map_err(failed)?;
    let length = u64::from_le_bytes(length);
    let left = stored.length.saturating_sub(8 + 32);
    if length > left.min(RECORD) {
        return Err(damaged("its record is longer than it can be"));
    }
    let mut json = Vec::new();
    let mut from = (&mut stored.from).take(length);
    from.read_to_end(&mut json).map_err(failed)?;
    let mut hash = [0; 32];
    stored.from.read_exact(&mut hash).map_err(failed)?;
    if Sha256::digest(&json)[..] != hash {
        return Err(damaged("its record is not what was written"));
    }
    stored.length = left - length;
    serde_json::from_slice(&json).map_err(|e| damaged(&e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            version: VERSION,
            model: "m".into(),
            policy: Some("window".into()),
            budget: Some(Budget::Units(7)),
            messages: vec![hash(&Message::new("user", "a"))],
            ended: true,
            tokens: 9,
            bytes: 100,
            before: None,
        }
    }

    #[test]
    fn records_come_back_and_damaged_ones_do_not() {
        let record = record();
        let mut bytes = Vec::new();
        write_record(&mut bytes, &record).unwrap();
        let end = bytes.len();
        bytes.extend_from_slice(b"snapshot");
        let stored = |bytes: &[u8]| Stored {
            from: Box::new(std::io::Cursor::new(bytes.to_vec())),
            length: bytes.len() as u64,
        };
        let mut from = stored(&bytes);
        assert_eq!(read_record(&mut from).unwrap(), record);
        assert_eq!(from.length, 8);
        let mut rest = Vec::new();
        from.from.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"snapshot");
        for cut in 0..end {
            assert!(read_record(&mut stored(&bytes[..cut])).is_err(), "{cut}");
        }
        for at in 0..end {
            let mut altered = bytes.clone();
            altered[at] ^= 4;
            assert!(read_record(&mut stored(&altered)).is_err(), "{at}");
        }
    }

    #[test]
    fn names_and_hashes() {
        for good in ["a", "a-b_C9", &"x".repeat(64)] {
            assert!(check_name(good).is_ok());
        }
        for bad in ["", "a.b", "../x", "a b", "é", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        // Where one part ends and the other begins counts.
        let (a, b) = (Message::new("ab", "c"), Message::new("a", "bc"));
        assert_ne!(hash(&a), hash(&b));
    }
}
