//! What a sequence is asked to do, and what is heard of it.

use super::memory::Room;
use crate::{
    CacheOptions, Error, Generate, KvCachePolicy, Prefill, Probe, Report, Result, Sampling, Session,
};
use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::Arc,
};

/// A sequence among others: a prompt, how it is read, and what is generated after it.
///
/// ```
/// # fn demo(policy: std::sync::Arc<dyn locret_core::KvCachePolicy>, ids: Vec<u32>) {
/// use locret_core::{CacheOptions, DType, Generate, Prefill, Request};
///
/// let request = Request::new(ids, policy)
///     .prefill(Prefill::new(256, 32))
///     .cache(CacheOptions::new().dtype(DType::F16))
///     .generate(Generate::greedy(100));
/// # }
/// ```
#[must_use]
pub struct Request {
    pub(super) prompt: Vec<u32>,
    pub(super) policy: Arc<dyn KvCachePolicy>,
    pub(super) prefill: Prefill,
    pub(super) cache: CacheOptions,
    pub(super) generate: Generate,
    pub(super) prefix: usize,
    pub(super) from: Option<Kept>,
    pub(super) fetch: Option<Fetch>,
    pub(super) keep: bool,
    pub(super) probe: Option<Box<dyn Probe>>,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("prompt", &self.prompt.len())
            .field("policy", &self.policy)
            .field("prefill", &self.prefill)
            .field("cache", &self.cache)
            .field("generate", &self.generate)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl Request {
    /// Reads `prompt` under `policy`, and generates nothing.
    pub fn new(prompt: Vec<u32>, policy: Arc<dyn KvCachePolicy>) -> Self {
        Self {
            prompt,
            policy,
            prefill: Prefill::default(),
            cache: CacheOptions::new(),
            generate: Generate::greedy(0),
            prefix: 0,
            from: None,
            fetch: None,
            keep: false,
            probe: None,
        }
    }

    /// The next turn of a conversation, under the policy that it has.
    pub fn resume(kept: Kept, prompt: Vec<u32>) -> Self {
        let (policy, cache) = (kept.cache().policy().clone(), kept.cache().options());
        Self {
            from: Some(kept),
            cache,
            ..Self::new(prompt, policy)
        }
    }

    /// The next turn of a conversation that is not in memory: `fetch` brings it when there is room for it,
    /// on the thread that makes the passes, which wait meanwhile. It has `tokens` tokens under `policy`,
    /// and takes about `bytes` bytes; what the turn takes is found when it is there.
    pub fn fetch(
        [tokens, bytes]: [usize; 2],
        fetch: impl FnOnce() -> Result<Session> + Send + 'static,
        prompt: Vec<u32>,
        policy: Arc<dyn KvCachePolicy>,
    ) -> Self {
        Self {
            fetch: Some(Fetch {
                tokens,
                bytes,
                fetch: Box::new(fetch),
            }),
            ..Self::new(prompt, policy)
        }
    }

    /// How the prompt is read.
    pub fn prefill(self, prefill: Prefill) -> Self {
        Self { prefill, ..self }
    }

    /// How units are kept, in a sequence that begins with this request.
    pub fn cache(self, cache: CacheOptions) -> Self {
        Self { cache, ..self }
    }

    /// What is generated after the prompt.
    pub fn generate(self, generate: Generate) -> Self {
        Self { generate, ..self }
    }

    /// How tokens are drawn.
    pub fn sampling(self, sampling: Sampling) -> Self {
        Self {
            generate: self.generate.sampling(sampling),
            ..self
        }
    }

    /// The prompt's first `tokens` tokens are read as a prompt of their own, without a tail, and what comes
    /// of them is shared with other sequences that begin in the same way, if there is a
    /// [`PrefixCache`](crate::PrefixCache). Only in a sequence that begins with this request.
    pub fn prefix(self, tokens: usize) -> Self {
        Self {
            prefix: tokens,
            ..self
        }
    }

    /// Hands the session back when the request has ended.
    pub fn keep(self) -> Self {
        Self { keep: true, ..self }
    }

    /// Watched by a probe.
    pub fn watched(self, probe: Box<dyn Probe>) -> Self {
        Self {
            probe: Some(probe),
            ..self
        }
    }

    /// Tokens of the whole sequence if everything is generated that may be.
    pub(super) fn tokens(&self) -> usize {
        let kept = self.from.as_ref().map_or(0, |kept| kept.tokens().len());
        let fetched = self.fetch.as_ref().map_or(0, |fetch| fetch.tokens);
        (kept + self.prompt.len())
            .saturating_add(fetched)
            .saturating_add(self.generate.max_new)
    }
}

/// A session that is still elsewhere.
pub(super) struct Fetch {
    pub(super) tokens: usize,
    pub(super) bytes: usize,
    pub(super) fetch: Box<dyn FnOnce() -> Result<Session> + Send>,
}

/// Tells a sequence from others of the same batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub(super) u64);

/// What happens to a sequence, in this order: chunks of the prompt, tokens, the end.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A chunk of the prompt was read.
    Read {
        /// Tokens of the prompt that have been read, shared ones included.
        done: usize,
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// A token was generated.
    Token(u32),
    /// Nothing comes after this.
    Ended(Box<Ended>),
}

/// How a sequence ended.
#[derive(Debug)]
#[non_exhaustive]
pub struct Ended {
    /// Why.
    pub end: End,
    /// Times and memory.
    pub report: Report,
    /// Tokens of the prompt that another sequence had read before.
    pub shared: usize,
    /// The session, if it was to be [kept](Request::keep) and can go on: also of a sequence that was
    /// cancelled. It takes its share of the batch's memory until it is dropped.
    pub session: Option<Kept>,
}

/// Why a sequence ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum End {
    /// As many tokens as were asked for.
    Length,
    /// One of the tokens that end a text.
    Stop,
    /// Somebody [cancelled](super::Batch::cancel) it.
    Cancelled,
    /// An error: of its own, or of the model.
    Failed(Error),
}

/// A session that takes its share of a batch's memory until it is dropped.
#[derive(Debug)]
pub struct Kept {
    pub(super) session: Session,
    pub(super) room: Room,
}

impl Kept {
    /// The session alone; its memory is no longer counted.
    pub fn into_session(self) -> Session {
        self.session
    }
}

impl Deref for Kept {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.session
    }
}

impl DerefMut for Kept {
    fn deref_mut(&mut self) -> &mut Session {
        &mut self.session
    }
}
