//! A batch on a thread of its own.

use super::{Batch, Event, Front, Limits, Load, Request, SequenceId, Sink, Ticket};
use crate::{CausalLm, Error, Result};
use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

/// Sequences that go through a model together on a thread of their own; may be called from any thread.
///
/// ```no_run
/// # fn demo(model: std::sync::Arc<dyn locret_core::CausalLm>,
/// #         policy: std::sync::Arc<dyn locret_core::KvCachePolicy>,
/// #         prompts: Vec<Vec<u32>>) -> locret_core::Result<()> {
/// use locret_core::{Batcher, Event, Generate, Limits, Request};
///
/// let batcher = Batcher::new(model, Limits::new().memory(256 << 20))?;
/// let request = |ids| Request::new(ids, policy.clone()).generate(Generate::greedy(100));
/// let handles: Vec<_> = prompts
///     .into_iter()
///     .map(|ids| batcher.submit(request(ids)))
///     .collect::<Result<_, _>>()?;
/// for handle in handles {
///     for event in handle {
///         if let Event::Token(id) = event {
///             println!("{id}");
///         }
///     }
/// }
/// # Ok(()) }
/// ```
///
/// Dropping it ends all sequences that are left, as cancelled; see [`finish`](Self::finish).
pub struct Batcher {
    front: Arc<Front>,
    commands: Sender<Command>,
    load: Arc<Mutex<Load>>,
    closed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Batcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batcher")
            .field("limits", &self.front.limits)
            .field("load", &self.load())
            .finish_non_exhaustive()
    }
}

enum Command {
    Submit(Box<Ticket>),
    Cancel(SequenceId),
    /// Ends when everything that was taken on has been done.
    Finish,
    /// Ends now.
    Stop,
}

/// How often a batch looks whether memory has come back from sessions that were kept.
const LOOK: Duration = Duration::from_millis(5);

impl Batcher {
    /// A thread that waits for requests.
    ///
    /// # Errors
    /// As [`Batch::new`]; [`Error::Device`] if the system gives no thread.
    pub fn new(model: Arc<dyn CausalLm>, limits: Limits) -> Result<Self> {
        Self::over(Batch::new(model, limits)?)
    }

    /// A thread for a batch, with whatever it has already.
    ///
    /// # Errors
    /// [`Error::Device`] if the system gives no thread.
    pub fn over(batch: Batch) -> Result<Self> {
        let (commands, received) = channel();
        let front = batch.front.clone();
        let load = Arc::new(Mutex::new(batch.load()));
        let shown = load.clone();
        let thread = std::thread::Builder::new()
            .name("locret-batch".into())
            .spawn(move || work(batch, &received, &shown))
            .map_err(|e| Error::Device(format!("no thread for a batch: {e}")))?;
        Ok(Self {
            front,
            commands,
            load,
            closed: Arc::default(),
            thread: Some(thread),
        })
    }

    /// Takes a request on. Its events wait in the handle.
    ///
    /// # Errors
    /// As [`Batch::submit`]; [`Error::Closed`] after [`close`](Self::close).
    pub fn submit(&self, request: Request) -> Result<Handle> {
        let (events, received) = channel();
        let id = self.submit_to(
            request,
            Box::new(move |event| {
                // Nobody listens any more: the sequence will be cancelled by the handle.
                let _ = events.send(event);
            }),
        )?;
        Ok(Handle {
            id,
            events: received,
            commands: self.commands.clone(),
            ended: false,
        })
    }

    /// Takes a request on; `sink` is called on the batch's thread with everything that happens to it, and
    /// should be quick.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn submit_to(&self, request: Request, sink: Sink) -> Result<SequenceId> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        let ticket = self.front.ticket(request, sink)?;
        let id = ticket.id;
        let sent = self.commands.send(Command::Submit(Box::new(ticket)));
        sent.map_err(|_| Error::Closed)?;
        Ok(id)
    }

    /// Ends a sequence before its time, as soon as the pass is over that is under way.
    pub fn cancel(&self, id: SequenceId) {
        let _ = self.commands.send(Command::Cancel(id));
    }

    /// How busy the batch was after its last pass.
    pub fn load(&self) -> Load {
        let load = *self.load.lock().unwrap_or_else(PoisonError::into_inner);
        Load {
            waiting: self.front.waiting.load(Ordering::Acquire),
            promised: self.front.ledger.promised(),
            ..load
        }
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.front.limits
    }

    /// The model.
    pub fn model(&self) -> &Arc<dyn CausalLm> {
        &self.front.model
    }

    /// Takes nothing more on. What was taken on goes on.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Takes nothing more on, and returns when everything that was taken on has been done.
    pub fn finish(mut self) {
        self.close();
        let _ = self.commands.send(Command::Finish);
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Its panics are caught where they happen.
            let _ = thread.join();
        }
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        self.close();
        let _ = self.commands.send(Command::Stop);
        self.join();
    }
}

fn work(mut batch: Batch, commands: &Receiver<Command>, shown: &Mutex<Load>) {
    let mut finishing = false;
    let mut busy = false;
    loop {
        // Commands first, all that there are; without work, the thread sleeps until there is one.
        loop {
            let command = if busy {
                match commands.try_recv() {
                    Ok(command) => command,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => Command::Stop,
                }
            } else if batch.waiting.is_empty() {
                if finishing {
                    return;
                }
                commands.recv().unwrap_or(Command::Stop)
            } else {
                match commands.recv_timeout(LOOK) {
                    Ok(command) => command,
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => Command::Stop,
                }
            };
            busy = true;
            match command {
                Command::Submit(ticket) => batch.waiting.push_back(*ticket),
                Command::Cancel(id) => {
                    batch.cancel(id);
                }
                Command::Finish => finishing = true,
                Command::Stop => {
                    batch.cancel_all();
                    return;
                }
            }
        }
        busy = batch.step();
        *shown.lock().unwrap_or_else(PoisonError::into_inner) = batch.load();
    }
}

/// One sequence of a [`Batcher`], as somebody sees it who waits for it: an iterator of events, which ends
/// after [`Event::Ended`].
///
/// Dropping it cancels the sequence.
#[derive(Debug)]
pub struct Handle {
    id: SequenceId,
    events: Receiver<Event>,
    commands: Sender<Command>,
    ended: bool,
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Command")
    }
}

impl Handle {
    /// The sequence.
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// Ends the sequence before its time; its last event still comes.
    pub fn cancel(&self) {
        let _ = self.commands.send(Command::Cancel(self.id));
    }

    /// Waits for the end: all tokens that are left, and how it ended. `None` if it has ended before.
    pub fn wait(mut self) -> Option<(Vec<u32>, super::Ended)> {
        let mut tokens = Vec::new();
        for event in self.by_ref() {
            match event {
                Event::Token(id) => tokens.push(id),
                Event::Ended(ended) => return Some((tokens, *ended)),
                Event::Read { .. } => {}
            }
        }
        None
    }
}

impl Iterator for Handle {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().ok()?;
        self.ended |= matches!(event, Event::Ended(_));
        Some(event)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.ended {
            self.cancel();
        }
    }
}
