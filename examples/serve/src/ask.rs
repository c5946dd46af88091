//! What clients ask for, in OpenAI's words.

use crate::{Error, Result, app::App, app::random, stops::Stops};
use locret_core::{Budget, Generate, Sampling};
use locret_models::Message;
use serde::Deserialize;
use serde_json::Value;

/// What both kinds of request have.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Common {
    pub model: Option<String>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub max_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub seed: Option<i64>,
    pub stop: Option<OneOrMany>,
    pub n: Option<usize>,

    // What this server has beside it.
    pub top_k: Option<usize>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub session: Option<String>,
    pub policy: Option<String>,
    pub budget: Option<Budget>,

    // What would change an answer, and is not there.
    pub best_of: Option<usize>,
    pub echo: Option<bool>,
    pub suffix: Option<String>,
    pub frequency_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub logit_bias: Option<Value>,
    pub logprobs: Option<Value>,
    pub top_logprobs: Option<Value>,
    pub response_format: Option<Value>,
    pub tools: Option<Value>,
    pub functions: Option<Value>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    pub include_usage: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// `/v1/chat/completions`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Chat {
    pub messages: Vec<Said>,
    #[serde(flatten)]
    pub common: Common,
}

/// `/v1/completions`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Completion {
    pub prompt: Prompt,
    #[serde(flatten)]
    pub common: Common,
}

/// `/v1/read`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Read {
    pub text: String,
    #[serde(default)]
    pub question: String,
    #[serde(flatten)]
    pub common: Common,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    ManyIds(Vec<Vec<u32>>),
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Said {
    role: String,
    #[serde(default)]
    content: Option<Content>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Clone, Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

/// A prompt, as text or as tokens.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    Text(String),
    Ids(Vec<u32>),
}

impl Prompt {
    /// The one prompt.
    pub(crate) fn one(self) -> Result<Source> {
        fn only<T>(mut many: Vec<T>) -> Result<T> {
            match (many.pop(), many.len()) {
                (Some(one), 0) => Ok(one),
                (_, more) => {
                    let message = format!("expected one prompt, found {}", more + 1);
                    Err(Error::field("prompt", message))
                }
            }
        }
        Ok(match self {
            Self::Text(text) => Source::Text(text),
            Self::Ids(ids) => Source::Ids(ids),
            Self::Texts(texts) => Source::Text(only(texts)?),
            Self::ManyIds(many) => Source::Ids(only(many)?),
        })
    }
}

/// The most messages of a conversation: a template walks over all of them.
const MESSAGES: usize = 4096;

impl Chat {
    /// The conversation, as a template takes it.
    pub(crate) fn messages(&self) -> Result<Vec<Message>> {
        if self.messages.is_empty() || self.messages.len() > MESSAGES {
            let found = self.messages.len();
            let message = format!("expected 1 to {MESSAGES} messages, found {found}");
            return Err(Error::field("messages", message));
        }
        self.messages.iter().map(Said::message).collect()
    }
}

impl Said {
    fn message(&self) -> Result<Message> {
        let role = match self.role.as_str() {
            // The newer name.
            "developer" => "system",
            role @ ("system" | "user" | "assistant") => role,
            other => {
                let message = format!(
                    "expected the role system, developer, user or assistant, found {}",
                    shorten(other)
                );
                return Err(Error::field("messages", message));
            }
        };
        let content = match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                let texts = parts.iter().map(|part| match (&*part.r#type, &part.text) {
                    ("text", Some(text)) => Ok(text.as_str()),
                    (other, _) => {
                        let message = format!("expected parts of text, found {}", shorten(other));
                        Err(Error::field("messages", message))
                    }
                });
                texts.collect::<Result<Vec<_>>>()?.concat()
            }
        };
        Ok(Message::new(role, content))
    }
}

fn shorten(text: &str) -> String {
    let start: String = text.chars().take(40).collect();
    format!("{start:?}")
}

impl Common {
    /// Checks everything that needs no tokens.
    pub(crate) fn check(&self, app: &App) -> Result<()> {
        if let Some(asked) = &self.model
            && *asked != app.name
        {
            return Err(Error::UnknownModel {
                asked: asked.chars().take(100).collect(),
                served: app.name.clone(),
            });
        }
        for (name, n) in [("n", self.n), ("best_of", self.best_of)] {
            if n.is_some_and(|n| n != 1) {
                return Err(Error::field(name, "expected 1: a request has one answer"));
            }
        }
        let there = |value: &Option<Value>| match value {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Number(n)) => n.as_f64() != Some(0.0),
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(map)) => !map.is_empty(),
            Some(_) => true,
        };
        let format = self.response_format.as_ref().map(|f| &f["type"]);
        let format = format.is_some_and(|kind| *kind != "text");
        let penalty = |x: Option<f32>| x.is_some_and(|x| x != 0.0);
        let suffix = self.suffix.as_ref().is_some_and(|text| !text.is_empty());
        for (name, set) in [
            ("echo", self.echo == Some(true)),
            ("suffix", suffix),
            ("frequency_penalty", penalty(self.frequency_penalty)),
            ("presence_penalty", penalty(self.presence_penalty)),
            ("logit_bias", there(&self.logit_bias)),
            ("logprobs", there(&self.logprobs)),
            ("top_logprobs", there(&self.top_logprobs)),
            ("response_format", format),
            ("tools", there(&self.tools)),
            ("functions", there(&self.functions)),
        ] {
            if set {
                return Err(Error::field(name, format!("{name} is not supported")));
            }
        }
        self.stops()?;
        self.sampling()?;
        self.most(app)?;
        Ok(())
    }

    /// Texts that end the answer.
    pub(crate) fn stops(&self) -> Result<Vec<String>> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop.clone()],
            Some(OneOrMany::Many(stops)) if stops.len() <= Stops::MOST => stops.clone(),
            Some(OneOrMany::Many(stops)) => {
                let message = format!("expected at most {}, found {}", Stops::MOST, stops.len());
                return Err(Error::field("stop", message));
            }
        };
        match stops
            .iter()
            .find(|s| s.is_empty() || s.len() > Stops::LONGEST)
        {
            None => Ok(stops),
            Some(stop) => {
                let (most, found) = (Stops::LONGEST, stop.len());
                let message = format!("expected 1 to {most} bytes, found {found}");
                Err(Error::field("stop", message))
            }
        }
    }

    /// How tokens are drawn. Without a seed, as if by lot.
    pub(crate) fn sampling(&self) -> Result<Sampling> {
        let within = |name, x: Option<f32>, low: f32, high: f32, default: f32| match x {
            None => Ok(default),
            Some(x) if x >= low && x <= high => Ok(x),
            Some(x) => Err(Error::field(
                name,
                format!("expected {low} to {high}, found {x}"),
            )),
        };
        let smallest = f32::MIN_POSITIVE;
        Ok(Sampling {
            temperature: within("temperature", self.temperature, 0.0, 2.0, 1.0)?,
            top_k: self.top_k.unwrap_or(0),
            top_p: within("top_p", self.top_p, smallest, 1.0, 1.0)?,
            min_p: within("min_p", self.min_p, 0.0, 1.0, 0.0)?,
            repetition_penalty: within(
                "repetition_penalty",
                self.repetition_penalty,
                0.01,
                100.0,
                1.0,
            )?,
            seed: self.seed.map_or_else(random, |seed| seed as u64),
        })
    }

    /// The most tokens of the answer.
    pub(crate) fn most(&self, app: &App) -> Result<usize> {
        let limit = app.settings.max_tokens;
        let (name, asked) = match (self.max_completion_tokens, self.max_tokens) {
            (Some(n), _) => ("max_completion_tokens", n),
            (None, Some(n)) => ("max_tokens", n),
            (None, None) => return Ok(limit),
        };
        if asked == 0 || asked > limit {
            return Err(Error::field(
                name,
                format!("expected 1 to {limit}, found {asked}"),
            ));
        }
        Ok(asked)
    }

    /// What is generated.
    pub(crate) fn generate(&self, app: &App) -> Result<Generate> {
        Ok(Generate::greedy(self.most(app)?)
            .stop_at(app.stop.iter().copied())
            .sampling(self.sampling()?))
    }

    pub(crate) fn usage(&self) -> bool {
        self.stream_options
            .is_some_and(|options| options.include_usage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_of_all_kinds() {
        let one = |json: &str| {
            let asked: Completion = serde_json::from_str(json).unwrap();
            asked.prompt.one()
        };
        let text = Source::Text("a".into());
        assert_eq!(one(r#"{"prompt": "a"}"#).unwrap(), text);
        assert_eq!(one(r#"{"prompt": ["a"]}"#).unwrap(), text);
        let ids = Source::Ids(vec![1, 2]);
        assert_eq!(one(r#"{"prompt": [1, 2]}"#).unwrap(), ids);
        assert_eq!(one(r#"{"prompt": [[1, 2]]}"#).unwrap(), ids);
        assert!(one(r#"{"prompt": ["a", "b"]}"#).is_err());
        assert!(serde_json::from_str::<Completion>(r#"{"prompt": [-1]}"#).is_err());
        assert!(serde_json::from_str::<Completion>("{}").is_err());
    }

    #[test]
    fn messages_are_texts_or_parts_of_text() {
        let chat = |json: &str| {
            let asked: Chat = serde_json::from_str(json).unwrap();
            asked.messages()
        };
        let json = r#"{"messages": [{"role": "developer", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}"#;
        let found = chat(json).unwrap();
        assert_eq!(
            found,
            [Message::new("system", "x"), Message::new("user", "ab")]
        );
        for bad in [
            r#"{"messages": []}"#,
            r#"{"messages": [{"role": "tool", "content": "x"}]}"#,
            r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
        ] {
            assert!(chat(bad).is_err(), "{bad}");
        }
    }
}
