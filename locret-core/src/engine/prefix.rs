//! Texts that many sequences begin with, read once.

use super::{
    cache::computed_by,
    session::{Prefill, Session},
    snapshot::{Identity, VERSION},
    snapshots::SnapshotStore,
};
use crate::{
    CacheOptions, CausalLm, DType, Error, KvCachePolicy, Result, SnapshotError, host::hex,
};
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Sessions that have read a text which others begin with, a system prompt for instance: each is forked
/// from, after eviction and with the policy's scores, instead of reading the text again.
///
/// An entry is one model's, one policy's with its settings, one [`Prefill`]'s, one [`CacheOptions`]' and
/// exactly one text's. A session that is [handed out](Self::get) goes on as if it had read the text
/// itself: `prefix` and then `rest` is `session.prefill(prefix)` followed by `session.prefill(rest)`, two
/// prompts, of which the first one's tail is evicted when the second begins.
///
/// What is kept in memory takes a number of bytes at most; what was asked for longest ago goes first. A
/// [`SnapshotStore`] behind it keeps everything, also for other processes.
///
/// ```no_run
/// # fn demo(model: std::sync::Arc<dyn locret_core::CausalLm>,
/// #         policy: std::sync::Arc<dyn locret_core::KvCachePolicy>,
/// #         system: &[u32], question: &[u32]) -> locret_core::Result<()> {
/// use locret_core::{CacheOptions, Prefill, PrefixCache, Session};
///
/// let prefixes = PrefixCache::new(256 << 20);
/// let (options, prefill) = (CacheOptions::default(), Prefill::default());
/// let mut session = match prefixes.get(&model, &policy, options, &prefill, system)? {
///     Some(session) => session,
///     None => {
///         let mut session = Session::with_options(model, policy, options)?;
///         session.prefill(system, &prefill)?;
///         prefixes.insert(&session)?;
///         session
///     }
/// };
/// session.prefill(question, &prefill)?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct PrefixCache {
    bound: usize,
    store: Option<Arc<dyn SnapshotStore>>,
    entries: Mutex<Entries>,
}

/// What a [`PrefixCache`] has done so far, and what it holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PrefixStats {
    /// How often a text was there.
    pub hits: u64,
    /// Those of the hits that came from the store behind.
    pub stored_hits: u64,
    /// How often it was not.
    pub misses: u64,
    /// Snapshots that could not be taken up, and were removed from the store behind.
    pub removed: u64,
    /// Texts in memory.
    pub entries: usize,
    /// Bytes that they take: keys and values, positions and scores, tokens and logits.
    pub bytes: usize,
}

#[derive(Debug, Default)]
struct Entries {
    by_key: HashMap<Key, Entry>,
    /// When something was asked for last.
    now: u64,
    stats: PrefixStats,
}

/// The hash of all that an entry is one of, and the model itself: where the same weights were loaded
/// twice, a session is one of the model that read it.
type Key = ([u8; 32], usize);

#[derive(Debug)]
struct Entry {
    session: Arc<Session>,
    bytes: usize,
    used: u64,
}

impl PrefixCache {
    /// An empty cache that takes `bytes` of memory at most.
    pub fn new(bytes: usize) -> Self {
        Self {
            bound: bytes,
            store: None,
            entries: Mutex::default(),
        }
    }

    /// The same with a store behind it, for models that say which one they are
    /// ([`CausalLm::fingerprint`]). Its keys are 64 hexadecimal digits. A snapshot that cannot be taken up
    /// counts as none, and is removed.
    #[must_use]
    pub fn with_store(self, store: Arc<dyn SnapshotStore>) -> Self {
        Self {
            store: Some(store),
            ..self
        }
    }

    /// The most bytes that it takes.
    pub fn bound(&self) -> usize {
        self.bound
    }

    /// A session that has read `tokens` as one prompt, if there is one.
    ///
    /// # Errors
    /// [`Error::Device`]; where a store is behind it, those of [`CausalLm::fingerprint`], and all of
    /// [`Session::read`] that are not the snapshot's. That the store fails is a miss.
    pub fn get(
        &self,
        model: &Arc<dyn CausalLm>,
        policy: &Arc<dyn KvCachePolicy>,
        options: CacheOptions,
        prefill: &Prefill,
        tokens: &[u32],
    ) -> Result<Option<Session>> {
        let places = options.places(model.compute(), model.spec().layers)?;
        let of = self.identity(model, policy)?;
        let hash = hash(&of, &computed_by(&places), options.dtype, prefill, tokens);
        let key = (hash, address(model));
        let hit = self.lock().hit(&key);
        if let Some(session) = hit {
            return Ok(Some(session.fork()?));
        }
        if let Some(session) = self.stored(&of, &hash, model, policy, options)? {
            let same = session.tokens() == tokens && session.prefill == *prefill;
            if same && session.is_prefix() {
                self.keep(key, &session)?;
                let mut entries = self.lock();
                entries.stats.hits += 1;
                entries.stats.stored_hits += 1;
                return Ok(Some(session));
            }
            self.forget(&hash);
        }
        self.lock().stats.misses += 1;
        Ok(None)
    }

    /// Keeps what `session` has read. False, with nothing done, if that is not one prompt, read to its end,
    /// with one policy, and nothing after it.
    ///
    /// # Errors
    /// [`Error::Device`]; where a store is behind it, those of [`CausalLm::fingerprint`], of
    /// [`Session::write`] and the store's own: the session is in memory then.
    pub fn insert(&self, session: &Session) -> Result<bool> {
        if !session.is_prefix() {
            return Ok(false);
        }
        let (model, cache) = (session.model(), session.cache());
        let of = self.identity(model, cache.policy())?;
        let (compute, dtype) = (computed_by(&cache.places), cache.options().dtype);
        let hash = hash(&of, &compute, dtype, &session.prefill, session.tokens());
        self.keep((hash, address(model)), session)?;
        if let (Some(store), Some(_)) = (&self.store, &of.model_fingerprint) {
            let key = hex(&hash);
            if store.get(&key)?.is_none() {
                store.put(&key, &mut |to| session.write(to))?;
            }
        }
        Ok(true)
    }

    /// What it has done, and what it holds.
    pub fn stats(&self) -> PrefixStats {
        let entries = self.lock();
        PrefixStats {
            entries: entries.by_key.len(),
            ..entries.stats
        }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an entry is one of. Weights are told apart where others may have put something: in memory it is
    /// the model itself that counts.
    fn identity(
        &self,
        model: &Arc<dyn CausalLm>,
        policy: &Arc<dyn KvCachePolicy>,
    ) -> Result<Identity> {
        match self.store {
            Some(_) => Identity::of(&**model, &**policy),
            None => Identity::of_shape(&**model, &**policy),
        }
    }

    /// Keeps a copy in memory, if it is not there, and what was asked for longest ago no longer.
    fn keep(&self, key: Key, session: &Session) -> Result<()> {
        // There is room before there is a copy.
        let bytes = session.copied_bytes();
        let mut gone = Vec::new();
        let room = {
            let mut entries = self.lock();
            if entries.touch(&key).is_some() {
                return Ok(());
            }
            entries.make_room(bytes, self.bound, &mut gone)
        };
        // Nobody waits for memory that is given back, nor for the copy.
        drop(gone);
        if !room {
            return Ok(());
        }
        let copy = session.fork().map(|mut copy| {
            // A table of angles is soon made again.
            copy.cache.rope.forget();
            Arc::new(copy)
        });
        let twin = {
            let mut entries = self.lock();
            entries.stats.bytes -= bytes;
            entries.add(key, copy?)
        };
        drop(twin);
        Ok(())
    }

    /// What the store behind has, if that can be taken up.
    fn stored(
        &self,
        of: &Identity,
        hash: &[u8; 32],
        model: &Arc<dyn CausalLm>,
        policy: &Arc<dyn KvCachePolicy>,
        options: CacheOptions,
    ) -> Result<Option<Session>> {
        let (Some(store), Some(_)) = (&self.store, &of.model_fingerprint) else {
            return Ok(None);
        };
        let Ok(Some(mut stored)) = store.get(&hex(hash)) else {
            return Ok(None);
        };
        let (model, policy) = (model.clone(), policy.clone());
        match Session::read(model, policy, options, &mut stored.from, stored.length) {
            Ok(session) => Ok(Some(session)),
            // It may be readable another time.
            Err(Error::Snapshot(SnapshotError::Io { .. })) => Ok(None),
            Err(Error::Snapshot(_)) => {
                self.forget(hash);
                Ok(None)
            }
            Err(other) => Err(other),
        }
    }

    fn forget(&self, hash: &[u8; 32]) {
        if let Some(store) = &self.store
            && store.remove(&hex(hash)).is_ok()
        {
            self.lock().stats.removed += 1;
        }
    }
}

impl Entries {
    fn touch(&mut self, key: &Key) -> Option<Arc<Session>> {
        self.now += 1;
        let entry = self.by_key.get_mut(key)?;
        entry.used = self.now;
        Some(entry.session.clone())
    }

    fn hit(&mut self, key: &Key) -> Option<Arc<Session>> {
        let session = self.touch(key)?;
        self.stats.hits += 1;
        Some(session)
    }

    /// Adds an entry for which there is room; the one that was there already, if another thread has read the
    /// same meanwhile.
    fn add(&mut self, key: Key, session: Arc<Session>) -> Option<Entry> {
        self.now += 1;
        let entry = Entry {
            bytes: session.copied_bytes(),
            session,
            used: self.now,
        };
        self.stats.bytes += entry.bytes;
        let twin = self.by_key.insert(key, entry);
        self.stats.bytes -= twin.as_ref().map_or(0, |entry| entry.bytes);
        twin
    }

    /// Counts `bytes` as taken. False if they are too many, or if others are being copied just now.
    fn make_room(&mut self, bytes: usize, bound: usize, gone: &mut Vec<Entry>) -> bool {
        let copies: usize = self.by_key.values().map(|entry| entry.bytes).sum();
        let elsewhere = self.stats.bytes - copies;
        if elsewhere.checked_add(bytes).is_none_or(|all| all > bound) {
            return false;
        }
        self.stats.bytes += bytes;
        while self.stats.bytes > bound {
            let oldest = self.by_key.iter().min_by_key(|(_, entry)| entry.used);
            let Some(entry) =
                (oldest.map(|(key, _)| *key)).and_then(|key| self.by_key.remove(&key))
            else {
                break;
            };
            self.stats.bytes -= entry.bytes;
            gone.push(entry);
        }
        true
    }
}

impl Session {
    /// Whether all that it has done is to read one prompt to its end, with one policy.
    fn is_prefix(&self) -> bool {
        self.prompts == 1
            && !self.midway
            && self.pending.is_none()
            && !self.cache.passed_on
            && self.times.prefill_tokens == self.history.len()
            && self.cache.seen() == self.history.len()
            && self.cache.usable().is_ok()
            && self.saveable().is_ok()
    }

    /// Bytes that a copy of it takes in memory, but for a few hundred and a table of angles.
    fn copied_bytes(&self) -> usize {
        let logits = self.logits.as_ref().map_or(0, Vec::len);
        let numbers = 4 * (self.history.len() + logits);
        self.cache.bytes() + self.cache.metadata_bytes() + numbers
    }
}

fn address(model: &Arc<dyn CausalLm>) -> usize {
    Arc::as_ptr(model).cast::<()>() as usize
}

/// Of all that an entry is one of.
fn hash(of: &Identity, compute: &str, dtype: DType, prefill: &Prefill, tokens: &[u32]) -> [u8; 32] {
    let Prefill { chunk, local } = *prefill;
    let mut hash = Sha256::new();
    // Quoted, so that no two lists of texts look alike.
    hash.update(format!(
        "locret-prefix {VERSION}, {of:?}, {compute:?}, {dtype:?}, {chunk}, {local}, {}: ",
        tokens.len()
    ));
    for id in tokens {
        hash.update(id.to_le_bytes());
    }
    hash.finalize().into()
}
