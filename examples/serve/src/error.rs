//! What can go wrong, and what a client is told of it.

use axum::{
    http::{
        HeaderValue, StatusCode,
        header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use locret_core::Error as CoreError;
use serde_json::{Value, json};

/// What can go wrong with a request, or with the server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request that is not what it has to be.
    #[error("{message}")]
    Invalid {
        /// What was expected, and what was found.
        message: String,
        /// The field that it is about.
        param: Option<&'static str>,
    },
    /// A prompt that is longer than what is read.
    #[error("the prompt has {tokens} tokens, and {most} are read at most")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// The most that is read.
        most: usize,
    },
    /// No key, or another one.
    #[error("this server wants its key: send the header `authorization: Bearer …`")]
    Unauthorized,
    /// Another model than the one that is served.
    #[error("the model {asked:?} is not served here: there is {served:?}")]
    UnknownModel {
        /// What was asked for.
        asked: String,
        /// What there is.
        served: String,
    },
    /// No such address.
    #[error("there is nothing at {0}")]
    NotFound(String),
    /// An address that is asked in another way.
    #[error("{0} is not how this address is asked")]
    Method(String),
    /// A body of another type.
    #[error("expected a body of type application/json")]
    MediaType,
    /// A body larger than is read.
    #[error("the body is larger than {0} bytes")]
    BodyTooLarge(usize),
    /// A body that did not come.
    #[error("the body did not come within {0} seconds")]
    BodyTooSlow(u64),
    /// An answer that took too long.
    #[error("the answer was not ready within {0} seconds")]
    TimedOut(u64),
    /// A conversation that does not go on from where it is.
    #[error("session {session:?}: {message}")]
    Session {
        /// Its name.
        session: String,
        /// What does not fit.
        message: String,
    },
    /// The answer is there, the session is not: it could not be stored.
    #[error("the session could not be stored: {0}")]
    NotStored(String),
    /// What is stored cannot be had.
    #[error("the store failed: {0}")]
    Store(String),
    /// The engine's.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// A policy's configuration.
    #[error(transparent)]
    Policy(#[from] locret_policies::PolicyError),
    /// The tokenizer's or the chat template's.
    #[error(transparent)]
    Model(#[from] locret_models::ModelError),
    /// The model cannot be loaded, or not as the command line says.
    #[error(transparent)]
    Load(#[from] locret_examples::Error),
    /// A part of the server is gone.
    #[error("the server failed: {0}")]
    Server(String),
    /// An address cannot be listened at.
    #[error("cannot listen at {address}")]
    Listen {
        /// Which one.
        address: String,
        /// Why.
        source: std::io::Error,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// [`Error::Invalid`] about the request as a whole.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid {
            message: message.into(),
            param: None,
        }
    }

    /// [`Error::Invalid`] about a field.
    pub fn field(param: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid {
            message: message.into(),
            param: Some(param),
        }
    }

    /// The status of the answer.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Invalid { .. } | Self::PromptTooLong { .. } | Self::Policy(_) => {
                StatusCode::BAD_REQUEST
            }
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::UnknownModel { .. } | Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::BodyTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTooSlow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::TimedOut(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Session { .. } => StatusCode::CONFLICT,
            Self::NotStored(_) | Self::Store(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Core(error) => match error {
                CoreError::Setting { .. }
                | CoreError::EmptyPrompt
                | CoreError::UnknownToken { .. }
                | CoreError::Memory { .. } => StatusCode::BAD_REQUEST,
                CoreError::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
                CoreError::Closed => StatusCode::SERVICE_UNAVAILABLE,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            },
            // Its templates refuse conversations, its tokenizer refuses nothing that is text.
            Self::Model(_) => StatusCode::BAD_REQUEST,
            Self::Load(_) | Self::Server(_) | Self::Listen { .. } => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        }
    }

    fn kind(&self) -> &'static str {
        match self.status() {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        }
    }

    fn code(&self) -> Option<&'static str> {
        Some(match self {
            Self::Unauthorized => "invalid_api_key",
            Self::UnknownModel { .. } => "model_not_found",
            Self::PromptTooLong { .. } | Self::Core(CoreError::Memory { .. }) => {
                "context_length_exceeded"
            }
            Self::Core(CoreError::QueueFull { .. }) => "queue_full",
            Self::Core(CoreError::Closed) => "shutting_down",
            Self::TimedOut(_) => "timeout",
            Self::Session { .. } => "session_conflict",
            Self::NotStored(_) => "session_not_stored",
            _ => return None,
        })
    }

    /// The error as OpenAI's interface has it.
    pub fn json(&self) -> Value {
        let param = match self {
            Self::Invalid { param, .. } => *param,
            Self::UnknownModel { .. } => Some("model"),
            Self::Session { .. } => Some("session"),
            _ => None,
        };
        json!({ "error": {
            "message": self.to_string(),
            "type": self.kind(),
            "param": param,
            "code": self.code(),
        }})
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = self.status();
        let json = HeaderValue::from_static("application/json");
        let mut response =
            (status, [(CONTENT_TYPE, json)], self.json().to_string()).into_response();
        let headers = response.headers_mut();
        match status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}
