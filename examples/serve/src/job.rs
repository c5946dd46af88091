//! From a request that has been understood to the parts of its answer.

use crate::{
    Error, Result,
    app::App,
    ask::{Common, Source},
    sequence::{Heard, Sequence},
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
        let policy = (app.policies).choose(
            asked.policy.as_deref(),
            asked.budget,
            &**app.batcher.model(),
        )?;
        let (ids, prefix) = app.encoding(move |app| tokens(app, reads)).await?;
        let prompt = ids.len();
        let mut request = Request::new(ids.clone(), policy)
            .prefill(app.prefill)
            .cache(app.cache)
            .generate(generate)
            .prefix(prefix);
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
        };
        tokio::spawn(driver.drive(sequence));
        Ok(Self { ids, parts })
    }

    /// The next part; `None` after the end.
    pub(crate) async fn next(&mut self) -> Option<Part> {
        self.parts.recv().await
    }
}

/// Tokens of a prompt, and how many of them are its system message.
fn tokens(app: &App, reads: Reads) -> Result<(Vec<u32>, usize)> {
    let (ids, prefix) = match reads {
        Reads::Messages(messages) => app.conversation(&messages)?,
        Reads::Source(Source::Text(text)) => (app.text(&text)?, 0),
        Reads::Source(Source::Ids(ids)) => (ids, 0),
    };
    let most = app.settings.max_prompt;
    if ids.len() > most {
        return Err(Error::PromptTooLong {
            tokens: ids.len(),
            most,
        });
    }
    Ok((ids, prefix))
}

/// Hands on what is heard of a sequence: a task of its own, so that a client that reads slowly, or not at
/// all, holds up nothing.
struct Driver {
    app: Arc<App>,
    to: UnboundedSender<Part>,
    deadline: Instant,
    prompt: usize,
}

impl Driver {
    async fn drive(self, mut sequence: Sequence) {
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
                Some(Heard::Text(text)) => self.tell(Part::Text(text)),
                Some(Heard::Ended(outcome)) => {
                    let end = match outcome.finish {
                        None => Err(outcome.error()),
                        Some(finish) => Ok(End {
                            finish,
                            prompt: self.prompt,
                            cached: outcome.ended.shared,
                            tokens: outcome.tokens,
                        }),
                    };
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

    fn tell(&self, part: Part) {
        // Nobody listens: the sequence is dropped in the next turn.
        let _ = self.to.send(part);
    }
}
