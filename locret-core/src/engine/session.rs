//! Reading prompts and generating text on one cache.

use super::probe::EachChunk;
use crate::{
    CacheOptions, CausalLm, ChunkDone, Error, KvCachePolicy, ModelSpec, OnChunk, Pass, PastContext,
    Peak, Phase, Probe, Result, Rows, Sampler, Sampling, SequenceCache, check_tokens, forward,
};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

/// How a prompt is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Prefill {
    /// Tokens that go through the model together, `B`. The cache peaks at `budget + chunk`.
    pub chunk: usize,
    /// The prompt's last tokens, `n_loc`, which are read after the chunks and never evicted while
    /// this prompt is answered.
    pub local: usize,
}

impl Default for Prefill {
    fn default() -> Self {
        Self {
            chunk: 512,
            local: 32,
        }
    }
}

impl Prefill {
    /// In chunks of `chunk` tokens, the last `local` ones apart.
    pub const fn new(chunk: usize, local: usize) -> Self {
        Self { chunk, local }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::Setting`] for a chunk of 0.
    pub fn validate(&self) -> Result<()> {
        if self.chunk == 0 {
            return Err(Error::setting("chunk", "at least 1 token", 0));
        }
        Ok(())
    }
}

/// Times and memory of a session.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Report {
    /// Tokens read as prompts.
    pub prefill_tokens: usize,
    /// Time spent reading them.
    pub prefill_time: Duration,
    /// Tokens generated and fed back.
    pub decode_tokens: usize,
    /// Time spent generating.
    pub decode_time: Duration,
    /// The most that the cache held while prompts were read.
    pub prefill_peak: Peak,
    /// The most that the cache held at any moment.
    pub peak: Peak,
    /// Bytes of keys and values now; those that are resident.
    pub kv_bytes: usize,
    /// Bytes of all keys and values, those that are put away among them.
    pub total_bytes: usize,
    /// Bytes of positions and scores now.
    pub metadata_bytes: usize,
    /// Bytes that a full cache of 32-bit values would take for all tokens seen.
    pub full_bytes: usize,
}

impl Report {
    /// Prompt tokens per second.
    pub fn prefill_rate(&self) -> f64 {
        rate(self.prefill_tokens, self.prefill_time)
    }

    /// Generated tokens per second.
    pub fn decode_rate(&self) -> f64 {
        rate(self.decode_tokens, self.decode_time)
    }

    /// How many times smaller the peak is than a full cache.
    pub fn compression(&self) -> f64 {
        self.full_bytes as f64 / self.peak.bytes.max(1) as f64
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        tokens as f64 / time.as_secs_f64()
    }
}

/// A conversation with a model on one bounded cache: prompts are read, text is generated, and
/// further prompts follow.
///
/// ```no_run
/// # fn demo(model: std::sync::Arc<dyn locret_core::CausalLm>,
/// #         policy: std::sync::Arc<dyn locret_core::KvCachePolicy>,
/// #         ids: &[u32], end: u32) -> locret_core::Result<()> {
/// use locret_core::{Generate, Prefill, Session};
///
/// let mut session = Session::new(model, policy)?;
/// session.prefill(ids, &Prefill::new(512, 32))?;
/// for token in session.generate(Generate::greedy(100).stop_at([end]))? {
///     println!("{}", token?);
/// }
/// println!("{} bytes at most", session.report().peak.bytes);
/// # Ok(()) }
/// ```
pub struct Session {
    model: Arc<dyn CausalLm>,
    pub(super) cache: SequenceCache,
    /// All tokens of the conversation, those that are not fed yet included.
    pub(super) history: Vec<u32>,
    /// A generated token that the model has not seen.
    pub(super) pending: Option<u32>,
    /// Logits `[vocab]` after the last token that the model has seen.
    pub(super) logits: Option<Vec<f32>>,
    /// The most likely token after it, where that alone was wanted: nothing if its logits were not finite.
    most_likely: Option<Option<u32>>,
    /// A prompt was begun and not read to its end.
    pub(super) midway: bool,
    /// Prompts that were begun.
    pub(super) prompts: usize,
    /// How the last prompt was read.
    pub(super) prefill: Prefill,
    pub(super) times: Report,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("policy", &self.cache.policy().name())
            .field("seen", &self.cache.seen())
            .field("units", &self.cache.units())
            .finish_non_exhaustive()
    }
}

impl Session {
    /// An empty session with a dense 32-bit cache.
    ///
    /// # Errors
    /// As [`SequenceCache::new`].
    pub fn new(model: Arc<dyn CausalLm>, policy: Arc<dyn KvCachePolicy>) -> Result<Self> {
        Self::with_options(model, policy, CacheOptions::default())
    }

    /// An empty session.
    ///
    /// # Errors
    /// As [`SequenceCache::new`].
    pub fn with_options(
        model: Arc<dyn CausalLm>,
        policy: Arc<dyn KvCachePolicy>,
        options: CacheOptions,
    ) -> Result<Self> {
        let cache = SequenceCache::new(model.spec(), policy, model.compute(), options)?;
        Ok(Self {
            model,
            cache,
            history: Vec::new(),
            pending: None,
            logits: None,
            most_likely: None,
            midway: false,
            prompts: 0,
            prefill: Prefill::default(),
            times: Report::default(),
        })
    }

    /// A second session that starts from this one's state.
    ///
    /// # Errors
    /// As [`SequenceCache::fork`].
    pub fn fork(&self) -> Result<Self> {
        Ok(Self {
            model: self.model.clone(),
            cache: self.cache.fork()?,
            history: self.history.clone(),
            pending: self.pending,
            logits: self.logits.clone(),
            most_likely: self.most_likely,
            midway: self.midway,
            prompts: self.prompts,
            prefill: self.prefill,
            times: self.times,
        })
    }

    /// The cache.
    pub fn cache(&self) -> &SequenceCache {
        &self.cache
    }

    /// The cache, to give it another policy.
    pub fn cache_mut(&mut self) -> &mut SequenceCache {
        &mut self.cache
    }

    /// The model.
    pub fn model(&self) -> &Arc<dyn CausalLm> {
        &self.model
    }

    /// All tokens so far, read or generated.
    pub fn tokens(&self) -> &[u32] {
        &self.history
    }

    /// What to tell whoever reads and generates here, if the tokens so far are more than the model was
    /// made for.
    pub fn past_context(&self) -> Option<PastContext> {
        self.cache.spec().past_context(self.history.len())
    }

    /// Logits `[vocab]` for the next token; `None` before the first prompt, in the middle of one,
    /// and after a generated token that was not fed back yet.
    pub fn logits(&self) -> Option<&[f32]> {
        let there = self.pending.is_none() && !self.midway && self.cache.usable().is_ok();
        self.logits.as_deref().filter(|_| there)
    }

    /// Times and memory so far.
    pub fn report(&self) -> Report {
        Report {
            prefill_peak: self.cache.prefill_peak(),
            peak: self.cache.peak(),
            kv_bytes: self.cache.bytes(),
            total_bytes: self.cache.total_bytes(),
            metadata_bytes: self.cache.metadata_bytes(),
            full_bytes: self.cache.spec().full_cache_bytes(self.cache.seen(), 4),
            ..self.times
        }
    }

    /// Reads a prompt, or the next turn of a conversation.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::UnknownToken`], settings that do not fit the policy or
    /// the model, and whatever the model, the policy or the device reports.
    pub fn prefill(&mut self, ids: &[u32], prefill: &Prefill) -> Result<()> {
        self.prefill_with(ids, prefill, &mut |_| Ok(()))
    }

    /// As [`prefill`](Self::prefill), calling `on_chunk` after every chunk.
    ///
    /// An error of `on_chunk` stops between two chunks: [`tokens`](Self::tokens) says how far it
    /// came, and a further prompt goes on from there. Nothing can be generated before that.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill), and those of `on_chunk`.
    pub fn prefill_with(
        &mut self,
        ids: &[u32],
        prefill: &Prefill,
        on_chunk: OnChunk<'_>,
    ) -> Result<()> {
        self.prefill_watched(ids, prefill, &mut EachChunk(on_chunk))
    }

    /// As [`prefill_with`](Self::prefill_with), watched by a probe.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill), and those of the probe.
    pub fn prefill_watched(
        &mut self,
        ids: &[u32],
        prefill: &Prefill,
        probe: &mut dyn Probe,
    ) -> Result<()> {
        let mut started = Instant::now();
        let mut reading = self.begin(ids, prefill, Some(&mut *probe))?;
        while let Some(due) = reading.due() {
            let ids = &reading.ids[due.tokens.clone()];
            let wanted = due.wanted();
            self.feed(due.phase, ids, reading.total, wanted, Some(&mut *probe))?;
            self.have_read(&mut reading, &due, started.elapsed());
            probe.chunk(&reading.done(&due, &self.cache))?;
            started = Instant::now();
        }
        self.have_read_all();
        Ok(())
    }

    /// Begins a prompt, on which the cache is brought back to its budget.
    pub(super) fn begin(
        &mut self,
        ids: &[u32],
        prefill: &Prefill,
        probe: Option<&mut dyn Probe>,
    ) -> Result<Reading> {
        self.check_prompt(ids, prefill)?;
        let ids: Vec<u32> = self
            .pending
            .into_iter()
            .chain(ids.iter().copied())
            .collect();
        let total = self.cache.seen() + ids.len();
        if !self.cache.is_empty() {
            let turn = self.cache.step(Phase::Turn, 0, total);
            let turn = match probe {
                Some(probe) => turn.watched(probe),
                None => turn,
            };
            Pass::new([turn])?.finish(None)?;
        }
        self.midway = true;
        self.prompts = self.prompts.saturating_add(1);
        self.prefill = *prefill;
        Ok(Reading {
            body: ids.len() - prefill.local.min(ids.len()),
            chunk: prefill.chunk,
            total,
            ids,
            read: 0,
            index: 0,
        })
    }

    /// Whether this can be the next prompt.
    pub(super) fn check_prompt(&self, ids: &[u32], prefill: &Prefill) -> Result<()> {
        check_prompt(self.cache.spec(), &**self.cache.policy(), ids, prefill)
    }

    /// The chunk that was due has been read.
    pub(super) fn have_read(&mut self, reading: &mut Reading, due: &Due, took: Duration) {
        let chunk = &reading.ids[due.tokens.clone()];
        // `history` has the pending token already.
        let fresh = usize::from(self.pending.take().is_some());
        self.history.extend_from_slice(&chunk[fresh..]);
        reading.read = due.tokens.end;
        reading.index += 1;
        self.times.prefill_tokens += chunk.len();
        self.times.prefill_time += took;
    }

    /// The prompt has been read to its end.
    pub(super) fn have_read_all(&mut self) {
        self.midway = false;
    }

    /// Generates text, token by token: an iterator that can be stopped at any time.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] if no prompt was read to its end before, [`Error::Setting`] for
    /// impossible sampling settings and those of the policy, [`Error::Unusable`] after an error in the
    /// middle of a pass.
    pub fn generate(&mut self, generate: Generate) -> Result<Tokens<'_>> {
        self.ready()?;
        Ok(Tokens {
            sampler: generate.sampling.init()?,
            left: generate.max_new,
            stop: generate.stop,
            session: self,
            probe: None,
        })
    }

    /// Feeds `ids` as if they had been generated, and returns `-ln p` of each of them given what
    /// came before. The cache goes on from there, and has evicted nothing ([`Phase::Forced`]).
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] if no prompt was read to its end before, and as
    /// [`prefill`](Self::prefill).
    pub fn score(&mut self, ids: &[u32]) -> Result<Vec<TokenScore>> {
        check_ids(self.cache.spec(), ids)?;
        self.ready()?;
        self.feed_pending(None, Wanted::Logits)?;
        let first = self.logits.clone().ok_or(Error::EmptyPrompt)?;
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let vocab = self.cache.spec().vocab;
        let mut scores = vec![TokenScore::of(&first, ids[0])?];
        let total = self.cache.seen() + ids.len();
        let mut at = 0;
        for chunk in ids.chunks(SCORE_BLOCK) {
            let last = self.step(Phase::Forced, chunk, total, None, |model, hidden| {
                let logits = model.logits(hidden)?.into_values()?;
                for (i, row) in logits.chunks(vocab).enumerate() {
                    if let Some(next) = ids.get(at + i + 1) {
                        scores.push(TokenScore::of(row, *next)?);
                    }
                }
                Ok(logits[logits.len() - vocab..].to_vec())
            })?;
            self.logits = Some(last);
            self.history.extend_from_slice(chunk);
            at += chunk.len();
        }
        Ok(scores)
    }

    /// Whether there is something to go on from.
    fn ready(&self) -> Result<()> {
        self.cache.usable()?;
        if self.midway || (self.logits.is_none() && self.pending.is_none()) {
            return Err(Error::EmptyPrompt);
        }
        // The policy may be another one than read the prompt.
        let cache = &self.cache;
        cache.policy().validate(cache.spec(), &self.prefill)
    }

    fn feed_pending(&mut self, probe: Option<&mut dyn Probe>, wanted: Wanted) -> Result<()> {
        if let Some(id) = self.pending {
            let total = self.cache.seen() + 1;
            self.feed(Phase::Decode, &[id], total, wanted, probe)?;
            self.have_fed(Duration::ZERO);
        }
        Ok(())
    }

    /// The pending token has been fed.
    pub(super) fn have_fed(&mut self, took: Duration) {
        self.pending = None;
        self.times.decode_time += took;
        self.times.decode_tokens += 1;
    }

    /// Chooses the next token from what was kept of the logits.
    pub(super) fn choose(&mut self, sampler: &Sampler) -> Result<u32> {
        let id = match (self.most_likely.take(), self.logits.as_deref()) {
            (Some(id), _) => id.ok_or_else(Sampler::not_finite)?,
            (None, Some(logits)) => sampler.sample(logits, &self.history)?,
            (None, None) => return Err(Error::EmptyPrompt),
        };
        self.pending = Some(id);
        self.history.push(id);
        Ok(id)
    }

    /// Puts `ids` through the model and the cache; keeps what is wanted of the last logits.
    fn feed(
        &mut self,
        phase: Phase,
        ids: &[u32],
        total: usize,
        wanted: Wanted,
        probe: Option<&mut dyn Probe>,
    ) -> Result<()> {
        // Where surprisal is needed, the last logits are there already.
        if self.cache.policy().needs().surprisal {
            return self.step(phase, ids, total, probe, |_, _| Ok(()));
        }
        // Those of an earlier token must not be taken for this one's.
        (self.logits, self.most_likely) =
            self.step(phase, ids, total, probe, |model, hidden| {
                if wanted == Wanted::Nothing {
                    return Ok((None, None));
                }
                let last = hidden.slice(ids.len() - 1..ids.len())?;
                let mut kept = kept(model, vec![last], &[wanted])?;
                Ok(kept.pop().unwrap_or_default())
            })?;
        Ok(())
    }

    /// Puts `ids` through the model and the cache. `read` makes what is wanted of the hidden states
    /// `[ids, hidden]` before the pass is finished: if it fails the cache is unusable, and not ahead of
    /// what this session knows.
    fn step<T>(
        &mut self,
        phase: Phase,
        ids: &[u32],
        total: usize,
        probe: Option<&mut dyn Probe>,
        read: impl FnOnce(&dyn CausalLm, Rows) -> Result<T>,
    ) -> Result<T> {
        let needed = self.cache.policy().needs().surprisal;
        let step = self.cache.step(phase, ids.len(), total);
        let mut pass = Pass::new([match probe {
            Some(probe) => step.watched(probe),
            None => step,
        }])?;
        let hidden = forward(&*self.model, ids, &mut pass)?;
        let surprisal = match needed {
            true => Some(surprisal(&*self.model, &mut self.logits, ids, &hidden)?),
            false => None,
        };
        let made = read(&*self.model, hidden)?;
        pass.finish(surprisal.as_deref())?;
        Ok(made)
    }
}

/// A prompt on its way into a cache.
#[derive(Debug)]
pub(super) struct Reading {
    /// With the generated token before them that is still to be fed, if there is one.
    ids: Vec<u32>,
    /// Those that are read in chunks that are followed by evictions.
    body: usize,
    chunk: usize,
    total: usize,
    read: usize,
    index: usize,
}

/// A chunk that is read next.
#[derive(Debug, Clone)]
pub(super) struct Due {
    pub(super) phase: Phase,
    /// Of the prompt's.
    pub(super) tokens: Range<usize>,
    /// Whether the prompt ends with it.
    pub(super) last: bool,
}

impl Due {
    /// Of the logits after it.
    fn wanted(&self) -> Wanted {
        match self.last {
            true => Wanted::Logits,
            false => Wanted::Nothing,
        }
    }
}

impl Reading {
    pub(super) fn due(&self) -> Option<Due> {
        let (start, all) = (self.read, self.ids.len());
        let evicting = start < self.body;
        let end = start.saturating_add(self.chunk);
        let end = end.min(if evicting { self.body } else { all });
        (start < all).then_some(Due {
            phase: match evicting {
                true => Phase::Prefill {
                    last: end == self.body,
                },
                false => Phase::Tail,
            },
            tokens: start..end,
            last: end == all,
        })
    }

    /// What is reported of a chunk that has been read.
    pub(super) fn done<'a>(&self, due: &Due, cache: &'a SequenceCache) -> ChunkDone<'a> {
        ChunkDone {
            index: self.index - 1,
            done: due.tokens.end,
            tokens: self.ids.len(),
            phase: due.phase,
            cache,
        }
    }

    /// Tokens that are still to be read.
    pub(super) fn left(&self) -> usize {
        self.ids.len() - self.read
    }
}

/// Whether a prompt can be read in this way, under this policy.
pub(super) fn check_prompt(
    spec: &ModelSpec,
    policy: &dyn KvCachePolicy,
    ids: &[u32],
    prefill: &Prefill,
) -> Result<()> {
    prefill.validate()?;
    policy.validate(spec, prefill)?;
    if ids.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    check_ids(spec, ids)
}

fn check_ids(spec: &ModelSpec, ids: &[u32]) -> Result<()> {
    check_tokens([ids.len(), spec.vocab], ids)
}

/// What is wanted of the logits after the last of some tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Nothing,
    /// All of them.
    Logits,
    /// Which token is the most likely one, and no more, where that is to be had without them.
    MostLikely,
}

impl Wanted {
    /// For the next token.
    pub(super) fn by(sampler: &Sampler) -> Self {
        match sampler.takes_the_most_likely() {
            true => Self::MostLikely,
            false => Self::Logits,
        }
    }
}

/// What is kept of the logits `[vocab]` after a token: all of them, or the most likely token, if there is one.
type Kept = (Option<Vec<f32>>, Option<Option<u32>>);

/// What is kept of the logits of each of some hidden states, of which something is wanted.
fn kept(model: &dyn CausalLm, hidden: Vec<Rows>, wanted: &[Wanted]) -> Result<Vec<Kept>> {
    if hidden.is_empty() {
        return Ok(Vec::new());
    }
    // One product for all of them.
    let logits = model.logits(Rows::below(hidden)?)?;
    let compute = model.compute();
    // An adapter that knows of no map has its logits elsewhere.
    if wanted.iter().all(|wanted| *wanted == Wanted::MostLikely)
        && logits.device() == *compute.device()
        && let Some(all) = compute.largest(&logits)?
    {
        return Ok(all.into_iter().map(|id| (None, Some(id))).collect());
    }
    let all = logits.into_values()?;
    if wanted.len() == 1 {
        return Ok(vec![(Some(all), None)]);
    }
    let rows = all.chunks(model.spec().vocab);
    Ok(rows.map(|row| (Some(row.to_vec()), None)).collect())
}

/// What one session is fed in a pass that others are in, too.
#[derive(Debug)]
pub(super) struct Part<'a> {
    pub(super) session: &'a mut Session,
    pub(super) phase: Phase,
    pub(super) ids: Vec<u32>,
    /// Tokens of the sequence at the end of what is being read.
    pub(super) total: usize,
    /// What is wanted of the logits after the last of the tokens.
    pub(super) wanted: Wanted,
    pub(super) probe: Option<Watch<'a>>,
}

/// A probe on loan, which has nothing to show.
pub(super) struct Watch<'a>(pub(super) &'a mut (dyn Probe + 'a));

impl fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

impl<'a> Part<'a> {
    /// The next chunk of a prompt.
    pub(super) fn chunk(session: &'a mut Session, reading: &Reading, due: &Due) -> Self {
        Self {
            phase: due.phase,
            ids: reading.ids[due.tokens.clone()].to_vec(),
            total: reading.total,
            wanted: due.wanted(),
            session,
            probe: None,
        }
    }

    /// The token that was generated last; `None` if there is none to be fed.
    pub(super) fn token(session: &'a mut Session, sampler: &Sampler) -> Option<Self> {
        Some(Self {
            phase: Phase::Decode,
            ids: vec![session.pending?],
            total: session.cache.seen() + 1,
            wanted: Wanted::by(sampler),
            session,
            probe: None,
        })
    }

    pub(super) fn watched(self, probe: Option<&'a mut (dyn Probe + 'a)>) -> Self {
        Self {
            probe: probe.map(Watch),
            ..self
        }
    }
}

/// Feeds several sessions of one model in one pass. What happens to one of them is its own affair; an
/// error of the model or the device is everybody's.
pub(super) fn together(model: &dyn CausalLm, parts: Vec<Part<'_>>) -> Result<Vec<Result<()>>> {
    let ids: Vec<u32> = parts.iter().flat_map(|part| part.ids.clone()).collect();
    let mut steps = Vec::with_capacity(parts.len());
    let mut sessions = Vec::with_capacity(parts.len());
    let mut first = 0;
    for part in parts {
        let rows = first..first + part.ids.len();
        first = rows.end;
        let Session {
            cache,
            logits,
            most_likely,
            ..
        } = part.session;
        let surprisal = cache.policy().needs().surprisal;
        let step = cache.step(part.phase, part.ids.len(), part.total);
        steps.push(match part.probe {
            Some(Watch(probe)) => step.watched(probe),
            None => step,
        });
        sessions.push((
            (logits, most_likely),
            part.ids,
            rows,
            part.wanted,
            surprisal,
        ));
    }
    let mut pass = Pass::apart(steps)?;
    let hidden = forward(model, &ids, &mut pass)?;
    let needed = sessions.iter().any(|(.., surprisal)| *surprisal);
    let mut nll = vec![f32::NAN; if needed { ids.len() } else { 0 }];
    let (mut rows, mut due) = (Vec::new(), Vec::new());
    for ((logits, _), ids, own, wanted, needs) in &mut sessions {
        if *needs {
            let own_hidden = hidden.slice(own.clone())?;
            nll[own.clone()].copy_from_slice(&surprisal(model, logits, ids, &own_hidden)?);
        } else if *wanted != Wanted::Nothing {
            rows.push(hidden.slice(own.end - 1..own.end)?);
            due.push(*wanted);
        }
    }
    drop(hidden);
    let mut next = kept(model, rows, &due)?.into_iter();
    for ((logits, most_likely), _, _, wanted, needs) in &mut sessions {
        if !*needs {
            let own = match *wanted {
                Wanted::Nothing => None,
                _ => next.next(),
            };
            (**logits, **most_likely) = own.unwrap_or_default();
        }
    }
    drop(sessions);
    pass.finish_each(needed.then_some(&nll))
}

/// `-ln p` of each of `ids`; the first one's comes from the `last` logits that the step before left, and
/// those of this step take their place.
fn surprisal(
    model: &dyn CausalLm,
    last: &mut Option<Vec<f32>>,
    ids: &[u32],
    hidden: &Rows,
) -> Result<Vec<f32>> {
    let vocab = model.spec().vocab;
    let mut all = Vec::with_capacity(ids.len());
    all.push(match last {
        Some(logits) => TokenScore::of(logits, ids[0])?.nll,
        None => f32::NAN,
    });
    for at in (0..ids.len()).step_by(SCORE_BLOCK) {
        let end = ids.len().min(at + SCORE_BLOCK);
        let logits = model.logits(hidden.slice(at..end)?)?;
        let next = &ids[at + 1..ids.len().min(end + 1)];
        if let Some(found) = scored(model, &logits.slice(0..next.len())?, next)? {
            all.extend(found);
            if end == ids.len() {
                *last = Some(logits.slice(next.len()..end - at)?.into_values()?);
            }
            continue;
        }
        let logits = logits.into_values()?;
        for (i, row) in logits.chunks(vocab).enumerate() {
            if let Some(next) = ids.get(at + i + 1) {
                all.push(TokenScore::of(row, *next)?.nll);
            }
        }
        if end == ids.len() {
            *last = Some(logits[logits.len() - vocab..].to_vec());
        }
    }
    Ok(all)
}

/// What each of `next` was worth under its row of logits, if that is to be had where they lie.
fn scored(model: &dyn CausalLm, logits: &Rows, next: &[u32]) -> Result<Option<Vec<f32>>> {
    let compute = model.compute();
    // An adapter that knows of no map has its logits elsewhere.
    if logits.device() != *compute.device() {
        return Ok(None);
    }
    let found = compute.surprisal(logits, next)?;
    if let Some(at) = found.iter().flatten().position(|nll| nll.is_nan()) {
        return Err(Error::NotFinite {
            what: "a logit",
            at: format!("the prediction of token {}", next[at]),
        });
    }
    Ok(found)
}

/// Rows of logits that are held at once, where those of many tokens are needed.
const SCORE_BLOCK: usize = 64;

/// How well a model predicted a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// `-ln p(token)`, natural logarithm.
    pub nll: f32,
    /// Whether it was the most likely token.
    pub top: bool,
}

impl TokenScore {
    /// Of `token` under `logits` `[vocab]`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a NaN; [`Error::UnknownToken`].
    pub fn of(logits: &[f32], token: u32) -> Result<Self> {
        let best = crate::argmax(logits).ok_or_else(|| Error::NotFinite {
            what: "a logit",
            at: "a prediction".into(),
        })?;
        let own = *logits.get(token as usize).ok_or(Error::UnknownToken {
            id: token,
            index: 0,
            vocab: logits.len(),
        })?;
        let max = logits[best];
        let sum: f64 = logits.iter().map(|x| f64::from((x - max).exp())).sum();
        Ok(Self {
            nll: (sum.ln() + f64::from(max - own)) as f32,
            top: best == token as usize,
        })
    }
}

/// What to generate.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
#[must_use]
pub struct Generate {
    /// At most this many tokens.
    pub max_new: usize,
    /// Tokens that end the text; the one that does is handed out as the last.
    pub stop: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

impl Generate {
    /// At most `max_new` of the most likely tokens.
    pub fn greedy(max_new: usize) -> Self {
        Self {
            max_new,
            ..Self::default()
        }
    }

    /// Ends at any of these tokens.
    pub fn stop_at(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.stop = ids.into_iter().collect();
        self
    }

    /// Chooses how tokens are drawn.
    pub fn sampling(mut self, sampling: Sampling) -> Self {
        self.sampling = sampling;
        self
    }
}

/// Generated tokens as they come. Dropping this stops; the session can go on.
pub struct Tokens<'a> {
    session: &'a mut Session,
    sampler: Sampler,
    left: usize,
    stop: Vec<u32>,
    probe: Option<&'a mut (dyn Probe + 'a)>,
}

impl fmt::Debug for Tokens<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens")
            .field("session", &self.session)
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

impl<'a> Tokens<'a> {
    /// The same, watched.
    #[must_use]
    pub fn watched(self, probe: &'a mut (dyn Probe + 'a)) -> Self {
        Self {
            probe: Some(probe),
            ..self
        }
    }

    fn draw(&mut self) -> Result<u32> {
        let started = Instant::now();
        let wanted = Wanted::by(&self.sampler);
        match &mut self.probe {
            Some(probe) => (self.session).feed_pending(Some(&mut **probe), wanted)?,
            None => self.session.feed_pending(None, wanted)?,
        }
        let id = self.session.choose(&self.sampler)?;
        self.session.times.decode_time += started.elapsed();
        Ok(id)
    }
}

impl Iterator for Tokens<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let token = self.draw();
        match &token {
            Ok(id) if !self.stop.contains(id) => {}
            _ => self.left = 0,
        }
        Some(token)
    }
}
