//! Many sequences at once, over one model and in bounded memory.

mod memory;
mod parked;
mod request;
mod thread;

pub use request::{End, Ended, Event, Kept, Request, SequenceId};
pub use thread::{Batcher, Handle};

use super::session::{Due, Part, Reading, check_prompt, together};
use crate::{CausalLm, Error, Prefill, PrefixCache, Result, Sampler, Session, SnapshotStore};
use memory::{Ledger, Room};
pub use parked::TURN;
use parked::{Parked, Parking};
use request::Fetch;
use std::{
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Called with everything that happens to a sequence, on the thread that makes the passes.
pub type Sink = Box<dyn FnMut(Event) + Send>;

/// How many sequences there may be, and what they may take.
///
/// ```
/// use locret_core::Limits;
///
/// // 256 MiB of caches, whoever comes.
/// let limits = Limits::new().memory(256 << 20).waiting(1000);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[must_use]
pub struct Limits {
    /// Bytes that all sequences together may take: keys and values, what is known of them, tokens and
    /// logits. What a pass needs for itself is not among them (a few MiB, whatever the sequences).
    pub memory: usize,
    /// Sequences that may wait for memory or for others to end.
    pub waiting: usize,
    /// Sequences that run at once.
    pub running: usize,
    /// Tokens of prompts that go through the model in one pass, unless a single chunk is larger.
    pub rows: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: usize::MAX,
            waiting: 256,
            running: 16,
            rows: Prefill::default().chunk,
        }
    }
}

impl Limits {
    /// Any memory, 16 sequences at once, 256 that wait.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes that all sequences together may take.
    pub fn memory(self, bytes: usize) -> Self {
        Self {
            memory: bytes,
            ..self
        }
    }

    /// Sequences that may wait.
    pub fn waiting(self, sequences: usize) -> Self {
        Self {
            waiting: sequences,
            ..self
        }
    }

    /// Sequences that run at once.
    pub fn running(self, sequences: usize) -> Self {
        Self {
            running: sequences,
            ..self
        }
    }

    /// Tokens of prompts in one pass.
    pub fn rows(self, tokens: usize) -> Self {
        Self {
            rows: tokens,
            ..self
        }
    }
}

/// How busy a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Load {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// Bytes that are promised to sequences, and to sessions that were kept.
    pub promised: usize,
    /// Bytes of keys and values of sequences that run.
    pub kv_bytes: usize,
    /// Tokens of prompts that have been read so far.
    pub read: u64,
    /// Tokens that have been generated so far.
    pub generated: u64,
    /// Passes so far.
    pub passes: u64,
    /// Sequences that have ended so far, in whatever way.
    pub ended: u64,
    /// How often a sequence has made way for others so far.
    pub parked: u64,
    /// How often a sequence was to make way and could not, since nothing could be stored.
    pub stayed: u64,
}

/// Sequences that go through a model together, pass by pass.
///
/// Each pass has one token of every sequence that generates and a chunk of a prompt (or several short
/// ones), so that a long prompt never holds up the others' tokens for longer than one chunk. Of several
/// prompts the one that will soonest be read comes first, and none is passed over for long. Sequences may
/// have different policies, budgets, stores and settings; what each generates is what it generates alone,
/// but for the rounding of sums.
///
/// Memory is *promised*: what a sequence will take at most is planned before it begins ([`plan`]), and it
/// waits until there is so much left. The first in the queue is the first to be let in.
///
/// Whoever calls [`step`](Self::step) does the work; [`Batcher`] has a thread for it.
///
/// [`plan`]: crate::plan
pub struct Batch {
    front: Arc<Front>,
    waiting: VecDeque<Ticket>,
    running: Vec<Running>,
    load: Load,
    prefixes: Option<Prefixes>,
    parking: Option<Parking>,
    /// Passes that the first of those that wait has waited for.
    blocked: u64,
}

/// Texts that are read once, and the memory that is set aside for them.
struct Prefixes {
    cache: Arc<PrefixCache>,
    _room: Room,
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch")
            .field("limits", &self.front.limits)
            .field("load", &self.load())
            .finish_non_exhaustive()
    }
}

/// What requests are judged by before they get in line.
#[derive(Debug)]
struct Front {
    model: Arc<dyn CausalLm>,
    limits: Limits,
    ledger: Arc<Ledger>,
    waiting: AtomicUsize,
    next: AtomicU64,
}

/// A request that has been found possible.
struct Ticket {
    id: SequenceId,
    request: Request,
    sink: Sink,
    /// The most bytes that it will take.
    bytes: usize,
    /// It has run before, and made way for others.
    parked: Option<Parked>,
}

/// A sequence that has its memory.
struct Running {
    id: SequenceId,
    sink: Sink,
    request: Request,
    session: Session,
    room: Room,
    /// The most bytes that it will take.
    bytes: usize,
    progress: Progress,
    /// The most bytes of keys and values that it had before.
    peak: usize,
    /// The pass before which it was let in, or last could not be put away.
    since: u64,
    /// Another sequence reads its prefix.
    awaits: bool,
    /// How often in a row others' prompts came first.
    passed_over: usize,
    ended: Option<End>,
}

/// How far a sequence has come, beside what its session knows.
struct Progress {
    sampler: Sampler,
    /// Tokens that may still be generated.
    left: usize,
    /// Prompts that are still to be begun, as ranges of the request's.
    prompts: VecDeque<Prompt>,
    reading: Option<Reading>,
    /// Tokens of the prompt that have been read, and that another sequence had read.
    read: usize,
    shared: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prompt {
    Prefix,
    Rest,
}

/// A prompt that was passed over so often comes first.
const PATIENCE: usize = 4;

impl Front {
    /// Judges a request and gives it a place in the line.
    fn ticket(&self, mut request: Request, sink: Sink) -> Result<Ticket> {
        let (spec, limits) = (self.model.spec(), &self.limits);
        if let Some(kept) = &request.from {
            // It goes on as it is.
            request.cache = kept.cache().options();
            request.policy = kept.cache().policy().clone();
        }
        check_prompt(spec, &*request.policy, &request.prompt, &request.prefill)?;
        request.generate.sampling.init()?;
        if request.prefix > 0 {
            let expected = format!("less than the {} tokens of a prompt", request.prompt.len());
            if request.prefix >= request.prompt.len() {
                return Err(Error::setting("prefix", expected, request.prefix));
            }
            if request.from.is_some() || request.fetch.is_some() {
                let expected = "none in a sequence that goes on";
                return Err(Error::setting("prefix", expected, request.prefix));
            }
            let prefill = memory::prefix_prefill(&request.prefill);
            request.policy.validate(spec, &prefill)?;
        }
        if let Some(kept) = &request.from
            && (!kept.room.of(&self.ledger) || !Arc::ptr_eq(kept.model(), &self.model))
        {
            let expected = "a session that this batch has kept";
            return Err(Error::setting("a session", expected, "another one's"));
        }
        let bytes = memory::footprint(&request, spec, self.model.compute())?;
        self.fits(bytes)?;
        let one_more = |waiting| (waiting < limits.waiting).then_some(waiting + 1);
        let line = &self.waiting;
        if line
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more)
            .is_err()
        {
            return Err(Error::QueueFull {
                limit: limits.waiting,
            });
        }
        Ok(Ticket {
            id: SequenceId(self.next.fetch_add(1, Ordering::Relaxed)),
            request,
            sink,
            bytes,
            parked: None,
        })
    }

    /// Fetches a session for a request, which then goes on from it as from one that was kept.
    fn fetch(&self, ticket: &mut Ticket, fetch: Fetch, room: Room) -> Result<()> {
        let session = guarded(fetch.fetch)?;
        let spec = self.model.spec();
        if !Arc::ptr_eq(session.model(), &self.model) {
            let expected = "one of this batch's model";
            return Err(Error::setting("a session", expected, "another model's"));
        }
        session.cache().usable()?;
        let request = &mut ticket.request;
        session.check_prompt(&request.prompt, &request.prefill)?;
        request.policy = session.cache().policy().clone();
        request.cache = session.cache().options();
        request.from = Some(Kept { session, room });
        ticket.bytes = memory::footprint(request, spec, self.model.compute())?;
        self.fits(ticket.bytes)
    }

    /// Whether a sequence can ever have so much.
    fn fits(&self, bytes: usize) -> Result<()> {
        let most = self.ledger.most();
        match bytes <= most {
            true => Ok(()),
            false => Err(Error::Memory {
                what: "a sequence",
                needed: bytes,
                left: most,
            }),
        }
    }
}

impl Batch {
    /// No sequences yet, over a model.
    ///
    /// # Errors
    /// [`Error::Setting`] for limits of nothing.
    pub fn new(model: Arc<dyn CausalLm>, limits: Limits) -> Result<Self> {
        for (what, n) in [
            ("sequences that run", limits.running),
            ("sequences that wait", limits.waiting),
            ("rows of a pass", limits.rows),
        ] {
            if n == 0 {
                return Err(Error::setting(what, "at least 1", n));
            }
        }
        Ok(Self {
            front: Arc::new(Front {
                model,
                limits,
                ledger: Ledger::new(limits.memory),
                waiting: AtomicUsize::new(0),
                next: AtomicU64::new(0),
            }),
            waiting: VecDeque::new(),
            running: Vec::new(),
            load: Load::default(),
            prefixes: None,
            parking: None,
            blocked: 0,
        })
    }

    /// Sequences share what they [begin with](Request::prefix): it is read once, and others fork from it.
    /// The cache's bytes are set aside from the batch's.
    ///
    /// # Errors
    /// [`Error::Memory`] if there are not so many.
    pub fn with_prefixes(self, cache: Arc<PrefixCache>) -> Result<Self> {
        let ledger = &self.front.ledger;
        let room = ledger.set_aside(cache.bound());
        let room = room.ok_or_else(|| Error::Memory {
            what: "a cache of prefixes",
            needed: cache.bound(),
            left: ledger.most(),
        })?;
        Ok(Self {
            prefixes: Some(Prefixes { cache, _room: room }),
            ..self
        })
    }

    /// Sequences take turns where there is not memory for all of them: when the first of those that wait
    /// has done so for [`TURN`] passes, whoever has run for longest makes way for it. What it has is put
    /// into `store`, and it goes to the end of the line, to go on later as if nothing had been.
    #[must_use]
    pub fn with_store(self, store: Arc<dyn SnapshotStore>) -> Self {
        Self {
            parking: Some(Parking::new(store)),
            ..self
        }
    }

    /// Takes a request on; `sink` hears of everything that happens to it, beginning with the next
    /// [`step`](Self::step).
    ///
    /// # Errors
    /// What [`Session::prefill`] and [`Session::generate`] say of settings; [`Error::Memory`] for a sequence
    /// that will never fit, [`Error::QueueFull`].
    pub fn submit(&mut self, request: Request, sink: Sink) -> Result<SequenceId> {
        let ticket = self.front.ticket(request, sink)?;
        let id = ticket.id;
        self.waiting.push_back(ticket);
        Ok(id)
    }

    /// Ends a sequence before its time; false if there is none of this name any more.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        if let Some(at) = self.waiting.iter().position(|ticket| ticket.id == id) {
            if let Some(ticket) = self.waiting.remove(at) {
                self.front.waiting.fetch_sub(1, Ordering::AcqRel);
                self.turn_away(ticket, End::Cancelled);
            }
            return true;
        }
        match self.running.iter().position(|running| running.id == id) {
            Some(at) => {
                self.running[at].ended = Some(End::Cancelled);
                self.sweep();
                true
            }
            None => false,
        }
    }

    /// Ends all sequences before their time.
    pub fn cancel_all(&mut self) {
        while let Some(ticket) = self.waiting.pop_front() {
            self.front.waiting.fetch_sub(1, Ordering::AcqRel);
            self.turn_away(ticket, End::Cancelled);
        }
        for running in &mut self.running {
            running.ended = Some(End::Cancelled);
        }
        self.sweep();
    }

    /// How busy the batch is.
    pub fn load(&self) -> Load {
        let caches = self.running.iter().map(|running| running.session.cache());
        Load {
            running: self.running.len(),
            waiting: self.front.waiting.load(Ordering::Acquire),
            promised: self.front.ledger.promised(),
            kv_bytes: caches.map(|cache| cache.bytes()).sum(),
            ..self.load
        }
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.front.limits
    }

    /// Lets in whoever fits, and makes one pass. False if there was nothing to do: no sequence runs, and
    /// those that wait, if any, wait for memory that sessions have which were kept.
    pub fn step(&mut self) -> bool {
        self.admit();
        self.take_turns();
        self.begin_prompts();
        self.sweep();
        if self.running.is_empty() {
            return false;
        }
        let due = self.choose();
        self.pass(&due);
        self.sweep();
        true
    }

    /// Lets sequences in, in the order in which they came.
    fn admit(&mut self) {
        while self.running.len() < self.front.limits.running {
            let Some(ticket) = self.waiting.front_mut() else {
                return;
            };
            let room = match &mut ticket.request.from {
                // It has some already, and needs the rest.
                Some(kept) => {
                    let bytes = ticket.bytes.max(kept.room.bytes());
                    kept.room.resize(bytes).then_some(None)
                }
                None => self.front.ledger.room(ticket.bytes).map(Some),
            };
            let Some(room) = room else {
                return;
            };
            let Some(mut ticket) = self.waiting.pop_front() else {
                return;
            };
            match (ticket.request.fetch.take(), room) {
                // Now that there is room for it. It may want more than was thought, and stays the first
                // in the line until it has that.
                (Some(fetch), Some(room)) => match self.front.fetch(&mut ticket, fetch, room) {
                    Ok(()) => self.waiting.push_front(ticket),
                    Err(error) => {
                        self.front.waiting.fetch_sub(1, Ordering::AcqRel);
                        self.turn_away(ticket, End::Failed(error));
                    }
                },
                (_, room) => {
                    self.front.waiting.fetch_sub(1, Ordering::AcqRel);
                    self.let_in(ticket, room);
                }
            }
        }
    }

    fn let_in(&mut self, mut ticket: Ticket, room: Option<Room>) {
        self.blocked = 0;
        if let Some(parked) = ticket.parked.take() {
            if let Some(room) = room {
                self.take_up(ticket, parked, room);
            }
            return;
        }
        let request = &mut ticket.request;
        let model = self.front.model.clone();
        let (session, room) = match (request.from.take(), room) {
            (Some(Kept { session, room }), _) => (Ok(session), room),
            (None, Some(room)) => {
                let new = || Session::with_options(model, request.policy.clone(), request.cache);
                (guarded(new), room)
            }
            (None, None) => return,
        };
        let started = session.and_then(|session| {
            let sampler = request.generate.sampling.init()?;
            Ok((session, sampler))
        });
        let (session, sampler) = match started {
            Ok(started) => started,
            Err(error) => {
                drop(room);
                self.turn_away(ticket, End::Failed(error));
                return;
            }
        };
        let prefix = (request.prefix > 0).then_some(Prompt::Prefix);
        let progress = Progress {
            sampler,
            left: ticket.request.generate.max_new,
            prompts: prefix.into_iter().chain([Prompt::Rest]).collect(),
            reading: None,
            read: 0,
            shared: 0,
        };
        self.run(ticket, session, room, progress);
    }

    fn run(&mut self, ticket: Ticket, session: Session, room: Room, progress: Progress) {
        let peak = session.cache().peak().bytes;
        self.running.push(Running {
            id: ticket.id,
            sink: ticket.sink,
            session,
            room,
            bytes: ticket.bytes,
            progress,
            peak,
            since: self.load.passes,
            awaits: false,
            passed_over: 0,
            ended: None,
            request: ticket.request,
        });
    }

    /// Ends a request that has no session.
    fn turn_away(&mut self, ticket: Ticket, end: End) {
        let Ticket {
            mut sink,
            request,
            parked,
            ..
        } = ticket;
        if let (Some(parked), Some(parking)) = (parked, &self.parking) {
            parking.forget(&parked);
        }
        self.load.ended += 1;
        let report = crate::Report::default();
        let session = request.from.filter(|_| request.keep);
        tell(
            &mut sink,
            Event::Ended(Box::new(Ended {
                end,
                report,
                shared: 0,
                session,
            })),
        );
    }

    /// Begins the next prompt of every sequence that has come to the end of one.
    fn begin_prompts(&mut self) {
        for at in 0..self.running.len() {
            if let Err(error) = self.begin_prompt(at) {
                self.running[at].ended = Some(End::Failed(error));
            }
        }
    }

    fn begin_prompt(&mut self, at: usize) -> Result<()> {
        let running = &self.running[at];
        if running.progress.reading.is_some() || running.ended.is_some() {
            return Ok(());
        }
        if running.progress.prompts.front() == Some(&Prompt::Prefix)
            && let Some(prefixes) = &self.prefixes
        {
            let read_now = self.running.iter().any(|other| other.reads_for(running));
            let running = &mut self.running[at];
            // Looked up once before somebody else has read it, and once afterwards.
            if running.awaits && read_now {
                return Ok(());
            }
            let there = running.fork_prefix(&prefixes.cache)?;
            running.awaits = !there && read_now;
            if running.awaits {
                return Ok(());
            }
        }
        let running = &mut self.running[at];
        match running.progress.prompts.pop_front() {
            Some(prompt) => running.begin(prompt),
            None => Ok(()),
        }
    }

    /// The sequences whose prompts are read in the next pass.
    fn choose(&mut self) -> Vec<usize> {
        let mut reading: Vec<usize> = (0..self.running.len())
            .filter(|at| self.running[*at].progress.reading.is_some())
            .collect();
        let left = |at: &usize| {
            let running = &self.running[*at];
            let left = running.progress.reading.as_ref().map_or(0, Reading::left);
            // Whoever was passed over often comes first, and of those whoever came first.
            match running.passed_over < PATIENCE {
                true => (1, left, running.id),
                false => (0, 0, running.id),
            }
        };
        reading.sort_by_key(left);
        let mut rows = 0;
        let mut chosen = Vec::new();
        for at in reading {
            let running = &mut self.running[at];
            let due = running.progress.reading.as_ref().and_then(Reading::due);
            let tokens = due.map_or(0, |due| due.tokens.len());
            if rows == 0 || rows + tokens <= self.front.limits.rows {
                rows += tokens;
                running.passed_over = 0;
                chosen.push(at);
            } else {
                running.passed_over += 1;
            }
        }
        chosen
    }

    /// One pass: these chunks of prompts, and a token of every sequence that generates.
    fn pass(&mut self, chosen: &[usize]) {
        let started = Instant::now();
        let mut parts = Vec::new();
        let mut fed = Vec::new();
        for (at, running) in self.running.iter_mut().enumerate() {
            if running.ended.is_some() {
                continue;
            }
            let probe = running.request.probe.as_deref_mut();
            let part = match &running.progress.reading {
                Some(reading) if chosen.contains(&at) => {
                    let Some(due) = reading.due() else { continue };
                    let part = Part::chunk(&mut running.session, reading, &due);
                    fed.push((at, Some(due)));
                    part
                }
                Some(_) => continue,
                None if !running.progress.prompts.is_empty() => continue,
                None => {
                    let sampler = &running.progress.sampler;
                    let Some(part) = Part::token(&mut running.session, sampler) else {
                        continue;
                    };
                    fed.push((at, None));
                    part
                }
            };
            parts.push(part.watched(probe.map(|probe| probe as _)));
        }
        if parts.is_empty() {
            return;
        }
        let model = self.front.model.clone();
        let done = guarded(|| together(&*model, parts));
        let took = started.elapsed();
        self.load.passes += 1;
        let each = match done {
            Ok(each) => each,
            Err(error) => {
                // Everybody's: the first is told in full.
                let text = error.to_string();
                let others = (1..fed.len()).map(|_| Err(Error::Model(text.clone().into())));
                std::iter::once(Err(error)).chain(others).collect()
            }
        };
        let prefixes = self
            .prefixes
            .as_ref()
            .map(|prefixes| prefixes.cache.clone());
        for ((at, due), done) in fed.into_iter().zip(each) {
            let running = &mut self.running[at];
            let next = done.and_then(|()| {
                guarded(|| running.has_done(due, took, &mut self.load, prefixes.as_deref()))
            });
            match next {
                Ok(None) => {}
                Ok(Some(end)) => running.ended = Some(end),
                Err(error) => running.ended = Some(End::Failed(error)),
            }
        }
    }

    /// Lets go of the sequences that have ended.
    fn sweep(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            match self.running[at].ended.take() {
                None => at += 1,
                Some(end) => {
                    let running = self.running.remove(at);
                    self.load.ended += 1;
                    running.end(end);
                }
            }
        }
    }
}

impl Running {
    fn begin(&mut self, prompt: Prompt) -> Result<()> {
        let Request {
            prompt: ids,
            prefill,
            prefix,
            probe,
            ..
        } = &mut self.request;
        let (ids, prefill) = match prompt {
            Prompt::Prefix => (&ids[..*prefix], memory::prefix_prefill(prefill)),
            Prompt::Rest => (&ids[*prefix..], *prefill),
        };
        let session = &mut self.session;
        let begin = || match probe {
            Some(probe) => session.begin(ids, &prefill, Some(&mut **probe)),
            None => session.begin(ids, &prefill, None),
        };
        self.progress.reading = Some(guarded(begin)?);
        Ok(())
    }

    /// What was due of this sequence has been done: what comes of it, and whether it is the end.
    fn has_done(
        &mut self,
        due: Option<Due>,
        took: Duration,
        load: &mut Load,
        prefixes: Option<&PrefixCache>,
    ) -> Result<Option<End>> {
        let tokens = self.session.tokens().len();
        memory::check(self.session.cache(), self.peak, tokens, &mut self.room)?;
        match due {
            Some(due) => {
                load.read += due.tokens.len() as u64;
                if !self.has_read(&due, took, prefixes)? {
                    return Ok(None);
                }
            }
            None => self.session.have_fed(took),
        }
        let Progress { sampler, left, .. } = &mut self.progress;
        if *left == 0 {
            return Ok(Some(End::Length));
        }
        let id = self.session.choose(sampler)?;
        *left -= 1;
        let last = *left == 0;
        load.generated += 1;
        tell(&mut self.sink, Event::Token(id));
        Ok(if self.request.generate.stop.contains(&id) {
            Some(End::Stop)
        } else if last {
            Some(End::Length)
        } else {
            None
        })
    }

    /// A chunk has been read: whether it was the last one of the last prompt.
    fn has_read(
        &mut self,
        due: &Due,
        took: Duration,
        prefixes: Option<&PrefixCache>,
    ) -> Result<bool> {
        let progress = &mut self.progress;
        let Some(reading) = &mut progress.reading else {
            return Ok(false);
        };
        let before = self.session.tokens().len();
        self.session.have_read(reading, due, took);
        progress.read += self.session.tokens().len() - before;
        if let Some(probe) = &mut self.request.probe {
            probe.chunk(&reading.done(due, self.session.cache()))?;
        }
        let event = Event::Read {
            done: progress.read,
            tokens: self.request.prompt.len(),
        };
        tell(&mut self.sink, event);
        if due.last {
            self.session.have_read_all();
            progress.reading = None;
            if let Some(prefixes) = prefixes
                && progress.read == self.request.prefix
            {
                // Others may fork from it. A store that fails keeps nobody from going on.
                let _ = prefixes.insert(&self.session);
            }
        }
        Ok(due.last && progress.prompts.is_empty())
    }

    /// Whether this sequence reads the prefix that `other` begins with, too.
    fn reads_for(&self, other: &Self) -> bool {
        let (own, its) = (&self.request, &other.request);
        self.id != other.id
            && self.ended.is_none()
            && self.progress.reading.is_some()
            && self.progress.read < own.prefix
            && own.prefix == its.prefix
            && own.prefill.chunk == its.prefill.chunk
            && own.cache == its.cache
            && own.prompt[..own.prefix] == its.prompt[..its.prefix]
            && own.policy.fingerprint() == its.policy.fingerprint()
    }

    /// Takes up what another sequence has read of the same prefix, if it is there.
    fn fork_prefix(&mut self, cache: &PrefixCache) -> Result<bool> {
        let Request {
            prompt,
            policy,
            prefill,
            cache: options,
            prefix,
            ..
        } = &self.request;
        let prefill = memory::prefix_prefill(prefill);
        let (model, ids) = (self.session.model().clone(), &prompt[..*prefix]);
        let found = guarded(|| cache.get(&model, policy, *options, &prefill, ids))?;
        let Some(session) = found else {
            return Ok(false);
        };
        self.session = session;
        self.progress.prompts.pop_front();
        (self.progress.read, self.progress.shared) = (*prefix, *prefix);
        let event = Event::Read {
            done: *prefix,
            tokens: prompt.len(),
        };
        tell(&mut self.sink, event);
        Ok(true)
    }

    fn end(mut self, end: End) {
        let report = self.session.report();
        let (session, mut room) = (self.session, self.room);
        let usable = session.cache().usable().is_ok();
        let session = (self.request.keep && usable).then(|| {
            // What it has at rest, and no longer what it might have taken.
            room.resize(memory::resting(session.cache(), session.tokens().len()));
            Kept { session, room }
        });
        // What it had is free before anybody hears of it.
        tell(
            &mut self.sink,
            Event::Ended(Box::new(Ended {
                end,
                report,
                shared: self.progress.shared,
                session,
            })),
        );
    }
}

/// Tells of an event. A listener's panic is its own.
fn tell(sink: &mut Sink, event: Event) {
    let _ = catch_unwind(AssertUnwindSafe(|| sink(event)));
}

/// Work for one sequence, or for one pass: a panic is its error.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(work));
    done.unwrap_or_else(|panic| Err(Error::panicked(&*panic)))
}
