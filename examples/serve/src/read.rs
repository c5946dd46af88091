//! Watching a text being read: what survives of it, chunk by chunk.

use crate::{
    Error, Result,
    answer::{Events, events},
    app::App,
    ask::Read,
    body,
    job::{Answer, Part, Reads},
};
use axum::{
    extract::{Request, State},
    response::Response,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use locret_core::{ChunkDone, Probe};
use locret_models::Message;
use serde_json::json;
use std::sync::{Arc, Mutex, PoisonError};

/// `POST /v1/read`: a text and a question about it, as one user's turn. The events are
/// `{"pieces": [text of each token]}`, then after every chunk `{"done", "tokens", "kv_bytes",
/// "full_bytes", "kept"}`, `{"text"}` for the answer, and `{"end"}` or `{"error"}`. `kept` is a byte for
/// each token that has been read, in base64: 255 times the share of all layers and KV heads in which it is
/// still kept.
pub(crate) async fn read(State(app): State<Arc<App>>, request: Request) -> Result<Response> {
    let asked: Read = body::json(request, &app.settings).await?;
    asked.common.check(&app)?;
    if asked.common.session.is_some() {
        return Err(Error::field("session", "a text is read from its beginning"));
    }
    let reads = match &app.template {
        Some(_) => {
            let turn = format!("{}\n\n{}", asked.text, asked.question);
            Reads::Messages(vec![Message::new("user", turn.trim_end())])
        }
        None => Reads::Source(crate::ask::Source::Text(asked.text + &asked.question)),
    };
    let frame = Latest::default();
    let probe = Survivors {
        latest: frame.clone(),
        number: app.cache.dtype.block_bytes(),
    };
    let answer = Answer::start(&app, &asked.common, reads, Some(Box::new(probe))).await?;
    Ok(events(Watched {
        app,
        answer,
        frame,
        begun: false,
        over: false,
    }))
}

/// How a cache stood when a chunk of the prompt had been read.
#[derive(Debug, Clone, PartialEq)]
struct Frame {
    done: usize,
    bytes: usize,
    full: usize,
    kept: Vec<u8>,
}

/// The last frame that nobody has fetched yet: whoever fetches slowly sees fewer of them.
type Latest = Arc<Mutex<Option<Frame>>>;

/// Counts what survives after every chunk.
#[derive(Debug)]
struct Survivors {
    latest: Latest,
    /// Bytes of a number in a cache that keeps everything.
    number: usize,
}

impl Probe for Survivors {
    fn chunk(&mut self, at: &ChunkDone<'_>) -> locret_core::Result<()> {
        let spec = at.cache.spec();
        let mut counts = vec![0usize; at.cache.seen()];
        for layer in 0..spec.layers {
            for head in 0..spec.kv_heads {
                for position in at.cache.positions(layer, head) {
                    if let Some(count) = counts.get_mut(*position as usize) {
                        *count += 1;
                    }
                }
            }
        }
        let all = spec.layers * spec.kv_heads;
        // What is kept anywhere is not nothing.
        let share = |n: &usize| (n * 255).div_ceil(all) as u8;
        let frame = Frame {
            done: at.cache.seen(),
            bytes: at.cache.bytes(),
            full: spec.full_cache_bytes(at.cache.seen(), self.number),
            kept: counts.iter().map(share).collect(),
        };
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(frame);
        Ok(())
    }
}

struct Watched {
    app: Arc<App>,
    answer: Answer,
    frame: Latest,
    begun: bool,
    over: bool,
}

impl Watched {
    fn pieces(&self) -> Vec<String> {
        let mut stream = self.app.tokenizer.decode_stream(false);
        let ids = self.answer.ids.iter();
        let mut pieces: Vec<String> = ids.map(|id| stream.push(*id)).collect();
        if let Some(last) = pieces.last_mut() {
            *last += &stream.finish();
        }
        pieces
    }
}

impl Events for Watched {
    async fn next(&mut self) -> Option<Vec<String>> {
        if !std::mem::replace(&mut self.begun, true) {
            return Some(vec![json!({ "pieces": self.pieces() }).to_string()]);
        }
        if self.over {
            return None;
        }
        let mut event = self.answer.next().await;
        loop {
            let data = match event {
                Some(Part::Read { tokens }) => {
                    let frame = self
                        .frame
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .take();
                    let Some(frame) = frame else {
                        event = self.answer.next().await;
                        continue;
                    };
                    json!({
                        "done": frame.done,
                        "tokens": tokens,
                        "kv_bytes": frame.bytes,
                        "full_bytes": frame.full,
                        "kept": BASE64_STANDARD.encode(&frame.kept),
                    })
                }
                Some(Part::Text(text)) => json!({ "text": text }),
                Some(Part::End(Ok(end))) => {
                    self.over = true;
                    json!({ "end": {
                        "finish_reason": end.finish,
                        "prompt_tokens": end.prompt,
                        "completion_tokens": end.tokens,
                    }})
                }
                Some(Part::End(Err(error))) => {
                    self.over = true;
                    error.json()
                }
                None => {
                    self.over = true;
                    Error::Server("the answer broke off".into()).json()
                }
            };
            return Some(vec![data.to_string()]);
        }
    }
}
