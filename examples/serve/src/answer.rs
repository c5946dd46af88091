//! Answers in OpenAI's words: whole, or as server-sent events.

use crate::{
    Error, Result,
    app::App,
    ask::{Chat, Common, Completion},
    body,
    job::{Answer, End, Part, Reads},
};
use axum::{
    body::Body,
    extract::{Request, State},
    http::{
        HeaderValue,
        header::{CACHE_CONTROL, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::stream;
use serde_json::{Value, json};
use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

/// Which of the two interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Chat,
    Text,
}

/// `POST /v1/chat/completions`
pub(crate) async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response> {
    let session = header_session(&request)?;
    let asked: Chat = body::json(request, &app.settings).await?;
    let messages = asked.messages()?;
    let common = with_session(asked.common, session);
    answer(app, Kind::Chat, common, Reads::Messages(messages)).await
}

/// `POST /v1/completions`
pub(crate) async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response> {
    let asked: Completion = body::json(request, &app.settings).await?;
    if asked.common.session.is_some() {
        let message = "sessions are conversations: ask /v1/chat/completions";
        return Err(Error::field("session", message));
    }
    let source = asked.prompt.one()?;
    answer(app, Kind::Text, asked.common, Reads::Source(source)).await
}

fn header_session(request: &Request) -> Result<Option<String>> {
    let Some(value) = request.headers().get("x-session") else {
        return Ok(None);
    };
    let name = value.to_str();
    let name = name.map_err(|_| Error::field("session", "x-session is not ASCII text"))?;
    Ok(Some(name.to_owned()))
}

fn with_session(common: Common, header: Option<String>) -> Common {
    Common {
        session: common.session.or(header),
        ..common
    }
}

async fn answer(app: Arc<App>, kind: Kind, asked: Common, reads: Reads) -> Result<Response> {
    asked.check(&app)?;
    let answer = Answer::start(&app, &asked, reads, None).await?;
    let (id, created) = app.answer(match kind {
        Kind::Chat => "chatcmpl",
        Kind::Text => "cmpl",
    });
    let form = Form {
        kind,
        id,
        created,
        model: app.name.clone(),
    };
    match asked.stream {
        Some(true) => Ok(events(Streamed::new(answer, form, asked.usage()))),
        _ => whole(answer, &form).await,
    }
}

/// What all parts of an answer have.
#[derive(Debug)]
struct Form {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
}

impl Form {
    fn whole(&self, text: &str, end: &End) -> Value {
        let choice = match self.kind {
            Kind::Chat => json!({
                "index": 0,
                "message": { "role": "assistant", "content": text, "refusal": null },
                "logprobs": null,
                "finish_reason": end.finish,
            }),
            Kind::Text => json!({
                "index": 0,
                "text": text,
                "logprobs": null,
                "finish_reason": end.finish,
            }),
        };
        self.object("chat.completion", json!([choice]), Some(usage(end)))
    }

    /// A part of a streamed answer.
    fn chunk(&self, delta: Delta<'_>, finish: Option<&str>) -> Value {
        let choice = match self.kind {
            Kind::Chat => {
                let delta = match delta {
                    Delta::Start => json!({ "role": "assistant", "content": "" }),
                    Delta::Text(text) => json!({ "content": text }),
                    Delta::Nothing => json!({}),
                };
                json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish })
            }
            Kind::Text => {
                let text = match delta {
                    Delta::Text(text) => text,
                    _ => "",
                };
                json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": finish })
            }
        };
        self.object("chat.completion.chunk", json!([choice]), None)
    }

    fn object(&self, chat: &str, choices: Value, usage: Option<Value>) -> Value {
        let mut object = json!({
            "id": self.id,
            "object": match self.kind {
                Kind::Chat => chat,
                Kind::Text => "text_completion",
            },
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if let Some(usage) = usage {
            object["usage"] = usage;
        }
        object
    }
}

#[derive(Debug, Clone, Copy)]
enum Delta<'a> {
    Start,
    Text(&'a str),
    Nothing,
}

fn usage(end: &End) -> Value {
    json!({
        "prompt_tokens": end.prompt,
        "completion_tokens": end.tokens,
        "total_tokens": end.prompt + end.tokens,
        "prompt_tokens_details": { "cached_tokens": end.cached },
    })
}

async fn whole(mut answer: Answer, form: &Form) -> Result<Response> {
    let mut text = String::new();
    while let Some(part) = answer.next().await {
        match part {
            Part::Read { .. } => {}
            Part::Text(piece) => text += &piece,
            Part::End(end) => return Ok(json_response(&form.whole(&text, &end?))),
        }
    }
    Err(Error::Server("the answer broke off".into()))
}

/// A body of JSON.
pub(crate) fn json_response(value: &Value) -> Response {
    let json = HeaderValue::from_static("application/json");
    ([(CONTENT_TYPE, json)], value.to_string()).into_response()
}

/// Something that becomes server-sent events, several of them for each part of an answer.
pub(crate) trait Events: Send + 'static {
    /// The next events, as the data of each; `None` after the last one.
    fn next(&mut self) -> impl Future<Output = Option<Vec<String>>> + Send;
}

/// How often something is sent while there is nothing to say: proxies close what is silent.
const ALIVE: Duration = Duration::from_secs(10);

/// The stream of events.
pub(crate) fn events<E: Events>(source: E) -> Response {
    let state = (source, VecDeque::<String>::new());
    let parts = stream::unfold(state, async |(mut source, mut due)| {
        loop {
            if let Some(data) = due.pop_front() {
                return Some((Ok::<_, Infallible>(Bytes::from(data)), (source, due)));
            }
            match tokio::time::timeout(ALIVE, source.next()).await {
                Ok(more) => due.extend(more?.iter().map(|data| format!("data: {data}\n\n"))),
                Err(_) => due.push_back(": still at work\n\n".into()),
            }
        }
    });
    let kind = HeaderValue::from_static("text/event-stream");
    let cached = HeaderValue::from_static("no-cache");
    let buffered = HeaderValue::from_static("no");
    let headers = [(CONTENT_TYPE, kind), (CACHE_CONTROL, cached)];
    // Nginx collects answers otherwise.
    let unbuffered = [("x-accel-buffering", buffered)];
    (headers, unbuffered, Body::from_stream(parts)).into_response()
}

/// An answer as OpenAI streams it.
struct Streamed {
    answer: Answer,
    form: Form,
    usage: bool,
    begun: bool,
    over: bool,
}

impl Streamed {
    fn new(answer: Answer, form: Form, usage: bool) -> Self {
        Self {
            answer,
            form,
            usage,
            begun: false,
            over: false,
        }
    }
}

impl Events for Streamed {
    async fn next(&mut self) -> Option<Vec<String>> {
        if !std::mem::replace(&mut self.begun, true) && self.form.kind == Kind::Chat {
            return Some(vec![self.form.chunk(Delta::Start, None).to_string()]);
        }
        if self.over {
            return None;
        }
        loop {
            return Some(match self.answer.next().await {
                Some(Part::Read { .. }) => continue,
                Some(Part::Text(text)) => {
                    vec![self.form.chunk(Delta::Text(&text), None).to_string()]
                }
                Some(Part::End(end)) => {
                    self.over = true;
                    match end {
                        Ok(end) => {
                            let last = self.form.chunk(Delta::Nothing, Some(end.finish));
                            let mut all = vec![last.to_string()];
                            if self.usage {
                                let own = Some(usage(&end));
                                let kind = "chat.completion.chunk";
                                all.push(self.form.object(kind, json!([]), own).to_string());
                            }
                            all.push("[DONE]".into());
                            all
                        }
                        Err(error) => vec![error.json().to_string()],
                    }
                }
                None => {
                    self.over = true;
                    let error = Error::Server("the answer broke off".into());
                    vec![error.json().to_string()]
                }
            });
        }
    }
}
