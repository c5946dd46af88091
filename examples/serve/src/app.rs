//! What all requests share.

use crate::{Error, Result, Settings, metrics::Metrics, policies::Policies, store::Told};
use locret_core::{
    Batch, Batcher, CacheOptions, CausalLm, Limits, Prefill, PrefixCache, SnapshotStore,
};
use locret_models::{ChatTemplate, Message, SpecialTokens, Tokenizer};
use locret_policies::PolicyConfig;
use sha2::{Digest, Sha256};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use subtle::ConstantTimeEq;
use tokio::sync::Semaphore;

/// A model as it is served.
pub struct Served {
    /// What clients call it.
    pub name: String,
    /// The model.
    pub model: Arc<dyn CausalLm>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// How it wants conversations to be written.
    pub template: Option<ChatTemplate>,
    /// Tokens that end an answer.
    pub stop: Vec<u32>,
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Served")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Where things are kept that are not in use.
#[derive(Debug, Default)]
pub struct Places {
    /// Conversations between their turns, and what sequences begin with.
    pub sessions: Option<Arc<dyn SnapshotStore>>,
    /// Sequences that make way for others.
    pub spill: Option<Arc<dyn SnapshotStore>>,
    /// Bytes of memory for what sequences begin with, of those that all sequences may take.
    pub prefixes: usize,
}

/// What all requests share: the model, its batch, and what is counted.
pub struct App {
    /// The batch.
    pub batcher: Batcher,
    /// What clients call the model.
    pub name: String,
    /// Read by decoders that live on the batch's thread, as long as the process.
    pub tokenizer: &'static Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) stop: Vec<u32>,
    pub(crate) policies: Policies,
    pub(crate) prefill: Prefill,
    pub(crate) cache: CacheOptions,
    pub(crate) settings: Settings,
    pub(crate) metrics: Metrics,
    sessions: Option<Arc<dyn SnapshotStore>>,
    token: Option<[u8; 32]>,
    /// Texts that become tokens at once: each takes a core, and several times its own size.
    encoding: Semaphore,
    closing: AtomicBool,
    /// It was said that a text is longer than the model was made for.
    told: AtomicBool,
    /// Answers that are not at their end, what is stored of them included.
    answering: AtomicUsize,
    started: u64,
    answers: AtomicU64,
    /// Tells this process's answers from others'.
    salt: u64,
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App")
            .field("name", &self.name)
            .field("batcher", &self.batcher)
            .finish_non_exhaustive()
    }
}

/// Texts that become tokens at once.
const ENCODING: usize = 2;

impl App {
    /// A batch over a model, for requests that `settings` bound.
    ///
    /// # Errors
    /// What [`Batch::new`], [`Batch::with_prefixes`] and the policy say; the model's, which has to say which
    /// one it is ([`CausalLm::fingerprint`]) where anything is kept.
    pub fn new(
        served: Served,
        limits: Limits,
        policy: PolicyConfig,
        (prefill, cache): (Prefill, CacheOptions),
        settings: Settings,
        places: Places,
    ) -> Result<Self> {
        let policies = Policies::new(policy, &*served.model)?;
        if places.sessions.is_some() || places.spill.is_some() {
            // Goes through all weights once: now, rather than in the first answer.
            served.model.fingerprint()?;
        }
        let mut batch = Batch::new(served.model, limits)?;
        if places.prefixes > 0 {
            let prefixes = PrefixCache::new(places.prefixes);
            let prefixes = match &places.sessions {
                Some(store) => prefixes.with_store(store.clone()),
                None => prefixes,
            };
            batch = batch.with_prefixes(Arc::new(prefixes))?;
        }
        if let Some(store) = places.spill {
            batch = batch.with_store(Arc::new(Told::new(store)));
        }
        let digest = |token: &String| Sha256::digest(token.as_bytes()).into();
        Ok(Self {
            batcher: Batcher::over(batch)?,
            name: served.name,
            tokenizer: Box::leak(Box::new(served.tokenizer)),
            template: served.template,
            stop: served.stop,
            policies,
            prefill,
            cache,
            token: settings.token.as_ref().map(digest),
            settings,
            metrics: Metrics::default(),
            sessions: places.sessions,
            encoding: Semaphore::new(ENCODING),
            told: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            answering: AtomicUsize::new(0),
            started: seconds(),
            answers: AtomicU64::new(0),
            salt: random(),
        })
    }

    /// Where conversations are kept.
    pub(crate) fn sessions(&self) -> Result<&dyn SnapshotStore> {
        let none = "this server keeps no sessions: it was started without --sessions";
        let store = self.sessions.as_deref();
        store.ok_or_else(|| Error::field("session", none))
    }

    /// Refuses prompts that are too long.
    pub(crate) fn check_length(&self, tokens: usize) -> Result<()> {
        let most = self.settings.max_prompt;
        match tokens <= most {
            true => Ok(()),
            false => Err(Error::PromptTooLong { tokens, most }),
        }
    }

    /// Says, once, that a text is longer than the model was made for, if it is.
    pub(crate) fn note_length(&self, tokens: usize) {
        if let Some(past) = self.batcher.model().spec().past_context(tokens)
            && !self.told.swap(true, Ordering::Relaxed)
        {
            eprintln!("note: {past}");
        }
    }

    /// Whether a bearer token is the server's; in a time that does not depend on where they differ.
    pub(crate) fn admits(&self, token: Option<&str>) -> bool {
        let Some(own) = &self.token else {
            return true;
        };
        let given: [u8; 32] = Sha256::digest(token.unwrap_or_default().as_bytes()).into();
        bool::from(own.ct_eq(&given)) && token.is_some()
    }

    /// When the server began, in seconds since 1970.
    pub(crate) fn started(&self) -> u64 {
        self.started
    }

    /// A name for an answer, and the time.
    pub(crate) fn answer(&self, kind: &str) -> (String, u64) {
        let n = self.answers.fetch_add(1, Ordering::Relaxed);
        (format!("{kind}-{:016x}{n:08x}", self.salt), seconds())
    }

    /// Takes no further sequences on.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.batcher.close();
    }

    /// Whether no further sequences are taken on.
    pub fn closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Counts an answer until what is returned is dropped.
    pub(crate) fn answering(self: &Arc<Self>) -> Answering {
        self.answering.fetch_add(1, Ordering::AcqRel);
        Answering(self.clone())
    }

    /// Waits until no sequence and no answer is left; false if that took longer than `within`.
    pub async fn idle(&self, within: Duration) -> bool {
        let idle = async {
            loop {
                let load = self.batcher.load();
                let answers = self.answering.load(Ordering::Acquire);
                if load.running + load.waiting + answers == 0 {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(within, idle).await.is_ok()
    }

    /// Does what takes a core for a while, a few at a time and not on a thread that answers.
    pub(crate) async fn encoding<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = self.encoding.acquire().await;
        let _permit = permit.map_err(|e| Error::Server(e.to_string()))?;
        let app = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&app)).await;
        done.unwrap_or_else(|e| Err(Error::Server(e.to_string())))
    }

    /// Tokens of a text, with what the tokenizer puts around it.
    pub(crate) fn text(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, SpecialTokens::Plain)?)
    }

    /// Tokens of a conversation up to the next answer, and how many of them are its system message.
    pub(crate) fn conversation(&self, messages: &[Message]) -> Result<(Vec<u32>, usize)> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::invalid("the model has no chat template: ask /v1/completions instead")
        })?;
        let all = template.encode(self.tokenizer, messages, true)?;
        let system = messages.iter().take_while(|m| m.role == "system").count();
        // A template may refuse a system message alone: then it is read with the rest.
        let first = match system {
            0 => Vec::new(),
            _ => template
                .encode(self.tokenizer, &messages[..system], false)
                .unwrap_or_default(),
        };
        let shared = all.starts_with(&first) && first.len() < all.len();
        let prefix = if shared { first.len() } else { 0 };
        Ok((all, prefix))
    }
}

/// An answer that is not at its end.
#[derive(Debug)]
pub(crate) struct Answering(Arc<App>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.answering.fetch_sub(1, Ordering::AcqRel);
    }
}

fn seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// A number that nobody knows before; not for secrets.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}
