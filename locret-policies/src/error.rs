//! The one error type of this crate.

use std::path::PathBuf;

/// What can go wrong with a policy's settings, or with a file of retaining heads.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A file is not what it should be, or is damaged.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A file of heads lacks tensors.
    #[error("{}: missing {}", path.display(), list(keys))]
    MissingKeys {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        keys: Vec<String>,
    },
    /// A file of heads has tensors that no retaining head of this model has.
    #[error("{}: unknown {}", path.display(), list(keys))]
    UnknownKeys {
        /// The file.
        path: PathBuf,
        /// The tensors that no head has.
        keys: Vec<String>,
    },
    /// A tensor has a shape that does not fit the model.
    #[error("{key}: expected shape {expected}, found {found:?}")]
    Shape {
        /// Which tensor.
        key: String,
        /// The shape that the model asks for.
        expected: String,
        /// The shape that was found.
        found: Vec<usize>,
    },
    /// A tensor has a type that is not read.
    #[error("{key}: expected f32, f16 or bf16, found {found}")]
    Dtype {
        /// Which tensor.
        key: String,
        /// The type that was found.
        found: String,
    },
    /// A weight is infinite or not a number.
    #[error("{key}: element {index} is not finite")]
    NotFinite {
        /// Which tensor.
        key: String,
        /// Which element, in row-major order.
        index: usize,
    },
    /// A configuration cannot be read.
    #[error("policy configuration: {0}")]
    Config(String),
    /// A setting that this policy does not have, needs, or cannot take.
    #[error("policy {policy}: {message}")]
    Setting {
        /// The policy.
        policy: String,
        /// What is wrong.
        message: String,
    },
    /// An error of the engine.
    #[error(transparent)]
    Core(#[from] locret_core::Error),
}

/// A result with this crate's [`PolicyError`].
pub type Result<T, E = PolicyError> = std::result::Result<T, E>;

/// The first few of many names.
fn list(keys: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = keys[..keys.len().min(SHOWN)].join(", ");
    match keys.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

impl PolicyError {
    pub(crate) fn file(path: &std::path::Path, message: impl std::fmt::Display) -> Self {
        Self::File {
            path: path.to_owned(),
            message: message.to_string(),
        }
    }

    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn setting(policy: impl ToString, message: impl Into<String>) -> Self {
        Self::Setting {
            policy: policy.to_string(),
            message: message.into(),
        }
    }
}

impl From<PolicyError> for locret_core::Error {
    fn from(error: PolicyError) -> Self {
        match error {
            PolicyError::Core(error) => error,
            PolicyError::Setting { policy, message } => Self::Policy { policy, message },
            PolicyError::Shape {
                expected, found, ..
            } => Self::Shape {
                what: "a retaining head",
                expected,
                found: format!("{found:?}"),
            },
            other => Self::Policy {
                policy: "configuration".into(),
                message: other.to_string(),
            },
        }
    }
}
