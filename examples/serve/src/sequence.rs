//! One sequence of the batch: from tokens to text, until it ends or nobody listens any more.

use crate::{Error, Result, app::App, stops::Stops};
use locret_core::{End, Ended, Event, Request, SequenceId};
use locret_models::DecodeStream;
use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Instant,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// What is heard of a sequence.
#[derive(Debug)]
pub enum Heard {
    /// A part of the prompt was read.
    Read {
        /// Tokens that have been read.
        done: usize,
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// More of the answer.
    Text(String),
    /// Nothing comes after this.
    Ended(Box<Outcome>),
}

/// How an answer ended.
#[derive(Debug)]
pub struct Outcome {
    /// `stop` or `length`; `None` where it was given up.
    pub finish: Option<&'static str>,
    /// Tokens that were generated.
    pub tokens: usize,
    /// What the batch says.
    pub ended: Ended,
}

/// A sequence as it is heard of. Dropping it cancels the sequence.
#[derive(Debug)]
pub struct Sequence {
    app: Arc<App>,
    id: SequenceId,
    heard: UnboundedReceiver<Heard>,
    over: bool,
}

impl Sequence {
    /// Takes a request on. The answer ends before the first of the stop texts; no token is generated
    /// after the one in which that is complete.
    ///
    /// # Errors
    /// As [`Batcher::submit`](locret_core::Batcher::submit).
    pub fn start(app: &Arc<App>, request: Request, stops: Vec<String>) -> Result<Self> {
        let (to, heard) = unbounded_channel();
        let own = Arc::new(Mutex::new(None));
        let mut listener = Listener {
            app: Arc::downgrade(app),
            id: own.clone(),
            to,
            text: app.tokenizer.decode_stream(true),
            stops: Stops::new(stops),
            started: Instant::now(),
            tokens: 0,
        };
        // Held until the name is known: the batch's thread may already be there.
        let mut own = own.lock().unwrap_or_else(PoisonError::into_inner);
        let id = app
            .batcher
            .submit_to(request, Box::new(move |event| listener.hear(event)))?;
        *own = Some(id);
        Ok(Self {
            app: app.clone(),
            id,
            heard,
            over: false,
        })
    }

    /// What is heard next; `None` after the end.
    pub async fn next(&mut self) -> Option<Heard> {
        if self.over {
            return None;
        }
        let heard = self.heard.recv().await;
        self.over = matches!(heard, Some(Heard::Ended(_)) | None);
        heard
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        if !self.over {
            self.app.batcher.cancel(self.id);
        }
    }
}

/// Hears of a sequence, on the batch's thread.
struct Listener {
    // The batch belongs to the application, and must not keep it alive.
    app: Weak<App>,
    id: Arc<Mutex<Option<SequenceId>>>,
    to: UnboundedSender<Heard>,
    text: DecodeStream<'static>,
    stops: Stops,
    started: Instant,
    tokens: usize,
}

impl Listener {
    fn hear(&mut self, event: Event) {
        match event {
            Event::Read { done, tokens } => self.tell(Heard::Read { done, tokens }),
            Event::Token(id) => self.token(id),
            Event::Ended(ended) => self.end(*ended),
            _ => {}
        }
    }

    fn token(&mut self, id: u32) {
        let app = self.app.upgrade();
        if self.tokens == 0
            && let Some(app) = &app
        {
            app.metrics.first_token(self.started.elapsed());
        }
        self.tokens += 1;
        if app.as_ref().is_some_and(|app| app.stop.contains(&id)) {
            return;
        }
        let piece = self.text.push(id);
        let text = self.stops.push(&piece);
        if !text.is_empty() {
            self.tell(Heard::Text(text));
        }
        if self.stops.found() {
            // Before the next pass: commands are looked at first.
            let id = *self.id.lock().unwrap_or_else(PoisonError::into_inner);
            if let (Some(app), Some(id)) = (app, id) {
                app.batcher.cancel(id);
            }
        }
    }

    fn end(&mut self, ended: Ended) {
        if let Some(app) = self.app.upgrade() {
            app.metrics.ended(self.started.elapsed());
        }
        let finish = match &ended.end {
            _ if self.stops.found() => Some("stop"),
            End::Stop => Some("stop"),
            End::Length => Some("length"),
            _ => None,
        };
        if finish.is_some() && !self.stops.found() {
            // What was held back; a character that is not whole comes as U+FFFD.
            let text = self.text.clone().finish();
            let text = self.stops.push(&text) + &self.stops.finish();
            if !text.is_empty() {
                self.tell(Heard::Text(text));
            }
        }
        self.tell(Heard::Ended(Box::new(Outcome {
            finish,
            tokens: self.tokens,
            ended,
        })));
    }

    fn tell(&self, heard: Heard) {
        // Nobody listens: the sequence is being cancelled.
        let _ = self.to.send(heard);
    }
}

impl Outcome {
    /// Why it was given up.
    pub(crate) fn error(self) -> Error {
        match self.ended.end {
            End::Failed(error) => error.into(),
            // Nobody cancels sequences that are listened to, but the server when it ends.
            _ => locret_core::Error::Closed.into(),
        }
    }
}
