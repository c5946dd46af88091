//! From a request that has been understood to the parts of its answer.

use crate::{
    Error, Result,
    app::{Answering, App},
    ask::{Common, Source},
    sequence::{Heard, Outcome, Sequence},
    sessions::{self, Opening, Turn},
};
use locret_core::{Probe, Request};
use locret_models::Message;
use std::sync::Arc;
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{Instant, sleep_until},
};

/// What is to be read.
#[derive(Debug, Clone)]
pub(crate) enum Reads {
    /// A conversation.
    Messages(Vec<Message>),
    /// A text or its tokens.
    Source(Source),
}

/// A part of an answer.
#[derive(Debug)]
pub(crate) enum Part {
    /// A chunk of the prompt was read.
    Read {
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// More text.
    Text(String),
    /// Nothing comes after this.
    End(Result<End>),
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    /// `stop` or `length`.
    pub finish: &'static str,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Those of them that had been read before.
    pub cached: usize,
    /// Tokens that were generated.
    pub tokens: usize,
}

/// An answer that is being made; dropping it gives it up.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The prompt.
    pub ids: Vec<u32>,
    parts: UnboundedReceiver<Part>,
}

impl Answer {
    /// Takes a request on.
    pub(crate) async fn start(
        app: &Arc<App>,
        asked: &Common,
        reads: Reads,
        probe: Option<Box<dyn Probe>>,
    ) -> Result<Self> {
        let deadline = Instant::now() + app.settings.timeout;
        let stops = asked.stops()?;
        let generate = asked.generate(app)?;
        let (reading, turn) = match (&asked.session, reads) {
            (Some(name), Reads::Messages(messages)) => {
                sessions::check_name(name)?;
                let (name, own) = (name.clone(), (asked.policy.clone(), asked.budget));
                let opened = app.encoding(move |app| {
                    let store = app.sessions()?;
                    let opening = sessions::open(app, store, &name, &messages, own)?;
                    app.check_length(opening.ids.len())?;
                    Ok(opening)
                });
                opened.await.map(|opening| {
                    let turn = opening.turn.clone();
                    (opening.into(), Some(turn))
                })?
            }
            (_, reads) => (
                app.encoding(move |app| Reading::of(app, reads)).await?,
                None,
            ),
        };
        let (name, budget) = match &turn {
            Some(turn) => turn.policy(),
            None => (asked.policy.as_deref(), asked.budget),
        };
        let policy = app.policies.choose(name, budget, &**app.batcher.model())?;
        let Reading {
            ids,
            prefix,
            resumed,
        } = reading;
        let before = resumed.as_ref().map_or(0, |resumed| resumed.tokens());
        let prompt = before + ids.len();
        let mut request = match resumed {
            Some(resumed) => resumed.request(app, ids.clone(), policy),
            None => Request::new(ids.clone(), policy)
                .cache(app.cache)
                .prefix(prefix),
        }
        .prefill(app.prefill)
        .generate(generate);
        if turn.is_some() {
            request = request.keep();
        }
        if let Some(probe) = probe {
            request = request.watched(probe);
        }
        let sequence = Sequence::start(app, request, stops)?;
        let (to, parts) = unbounded_channel();
        let driver = Driver {
            app: app.clone(),
            to,
            deadline,
            prompt,
            before,
            turn,
            text: String::new(),
            _counted: app.answering(),
        };
        tokio::spawn(driver.drive(sequence));
        Ok(Self { ids, parts })
    }

    /// The next part; `None` after the end.
    pub(crate) async fn next(&mut self) -> Option<Part> {
        self.parts.recv().await
    }
}

/// What goes through the model.
struct Reading {
    ids: Vec<u32>,
    /// Tokens of the system message.
    prefix: usize,
    resumed: Option<sessions::Resumed>,
}

impl From<Opening> for Reading {
    fn from(opening: Opening) -> Self {
        Self {
            ids: opening.ids,
            prefix: opening.prefix,
            resumed: opening.resumed,
        }
    }
}

impl Reading {
    fn of(app: &App, reads: Reads) -> Result<Self> {
        let (ids, prefix) = match reads {
            Reads::Messages(messages) => app.conversation(&messages)?,
            Reads::Source(Source::Text(text)) => (app.text(&text)?, 0),
            Reads::Source(Source::Ids(ids)) => (ids, 0),
        };
        app.check_length(ids.len())?;
        Ok(Self {
            ids,
            prefix,
            resumed: None,
        })
    }
}

/// Hands on what is heard of a sequence: a task of its own, so that a client that reads slowly, or not at
/// all, holds up nothing.
struct Driver {
    app: Arc<App>,
    to: UnboundedSender<Part>,
    deadline: Instant,
    prompt: usize,
    /// Tokens that a session had already.
    before: usize,
    turn: Option<Turn>,
    /// The answer, where it is kept.
    text: String,
    _counted: Answering,
}

impl Driver {
    async fn drive(mut self, mut sequence: Sequence) {
        loop {
            let heard = tokio::select! {
                heard = sequence.next() => heard,
                () = self.to.closed() => return,
                () = sleep_until(self.deadline) => {
                    let seconds = self.app.settings.timeout.as_secs();
                    self.tell(Part::End(Err(Error::TimedOut(seconds))));
                    return;
                }
            };
            match heard {
                Some(Heard::Read { tokens, .. }) => self.tell(Part::Read { tokens }),
                Some(Heard::Text(text)) => {
                    if self.turn.is_some() {
                        self.text += &text;
                    }
                    self.tell(Part::Text(text));
                }
                Some(Heard::Ended(outcome)) => {
                    let end = self.end(*outcome).await;
                    self.tell(Part::End(end));
                    return;
                }
                None => {
                    let error = Error::Server("the batch is gone".into());
                    self.tell(Part::End(Err(error)));
                    return;
                }
            }
        }
    }

    async fn end(&mut self, mut outcome: Outcome) -> Result<End> {
        let Some(finish) = outcome.finish else {
            return Err(outcome.error());
        };
        self.app.note_length(self.prompt + outcome.tokens);
        let end = End {
            finish,
            prompt: self.prompt,
            cached: self.before + outcome.ended.shared,
            tokens: outcome.tokens,
        };
        if let Some(turn) = self.turn.take() {
            let session = outcome.ended.session.take();
            let session = session.ok_or_else(|| Error::NotStored("it is gone".into()))?;
            let ended = matches!(outcome.ended.end, locret_core::End::Stop);
            let (app, text) = (self.app.clone(), std::mem::take(&mut self.text));
            // Its memory is free again when it is written.
            let kept = tokio::task::spawn_blocking(move || {
                turn.keep(&app, app.sessions()?, &session, &text, ended)
            });
            kept.await
                .unwrap_or_else(|e| Err(Error::NotStored(e.to_string())))?;
            self.app.metrics.stored();
            if self.before > 0 {
                self.app.metrics.resumed();
            }
        }
        Ok(end)
    }

    fn tell(&self, part: Part) {
        // Nobody listens: the sequence is dropped in the next turn.
        let _ = self.to.send(part);
    }
}
