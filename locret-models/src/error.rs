//! The one error type of this crate.

use crate::DType;
use std::{
    io,
    path::{Path, PathBuf},
};

/// What can go wrong between a file, the network and a model.
///
/// Messages say what was expected, what was found, and where.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file or folder cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// A file does not have the format that it should have.
    #[error("{}: {what}: expected {expected}, found {found}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        what: String,
        /// What the format asks for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A file ends before a part that it announces.
    #[error(
        "{}: {what} needs {needed} bytes at offset {offset}, but the file has {len} bytes (truncated?)",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        what: String,
        /// Where the part begins.
        offset: u64,
        /// How many bytes it takes.
        needed: u128,
        /// How long the file is.
        len: u64,
    },
    /// Two tensors of a file claim the same bytes.
    #[error("{}: tensors {first:?} and {second:?} overlap", path.display())]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The tensor that begins first.
        first: String,
        /// The tensor that begins inside it.
        second: String,
    },
    /// A name occurs twice where it has to be unique.
    #[error("{}: {what} {name:?} occurs twice", path.display())]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// What is named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A tensor is stored in an encoding that this crate does not read.
    #[error("{}: tensor {tensor:?} is stored as {encoding}, which is not supported: take a file of this model in another type", path.display())]
    UnsupportedEncoding {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The encoding as the file names or numbers it.
        encoding: String,
    },
    /// Tensors that a model needs are not there.
    #[error("{}: missing tensors: {}", path.display(), list(names))]
    MissingTensors {
        /// The file or folder.
        path: PathBuf,
        /// The missing names.
        names: Vec<String>,
    },
    /// Tensors that a model does not know: it would be another model than the file's.
    #[error("{}: tensors that the model does not use: {}", path.display(), list(names))]
    UnusedTensors {
        /// The file or folder.
        path: PathBuf,
        /// The names that nothing asked for.
        names: Vec<String>,
    },
    /// A tensor has another shape than the model asks for.
    #[error("{}: tensor {tensor:?}: expected shape {expected:?}, found {found:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape that the model's dimensions ask for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{}: tensor {tensor:?} has the value {value} in row {row}, which is not finite as {}",
        path.display(),
        dtype.name().to_ascii_lowercase()
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The first row (of the last dimension) that has such a value.
        row: usize,
        /// The value: NaN, an infinity, or more than `dtype` can hold.
        value: f32,
        /// The type that it was to become.
        dtype: DType,
    },
    /// A shard lies outside the model's folder.
    #[error("{}: shard {shard:?} of tensor {tensor:?} is not a plain file name", index.display())]
    ShardOutside {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard's name in the index.
        shard: String,
    },
    /// The index names a shard for a tensor, and the shard does not have the tensor.
    #[error("{}: the index says that tensor {tensor:?} is here, but it is not", shard.display())]
    NotInShard {
        /// The shard.
        shard: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A model setting is missing, impossible or not supported.
    #[error("{}: invalid {what}: expected {expected}, found {found}", path.display())]
    Config {
        /// The file that has the setting.
        path: PathBuf,
        /// The setting.
        what: String,
        /// What would be valid.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A file is not valid JSON, or not JSON of the expected form.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A tokenizer cannot be built, or cannot encode or decode.
    #[error("tokenizer {}: {message}", path.display())]
    Tokenizer {
        /// The file that has the tokenizer.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A chat template is missing, does not compile, or fails on these messages.
    #[error("chat template: {message}")]
    ChatTemplate {
        /// What is wrong, with the template's line where it is known.
        message: String,
    },
    /// A model cannot be found.
    #[error("model {name:?} not found: {help}")]
    NotFound {
        /// What was asked for.
        name: String,
        /// What to do.
        help: String,
    },
    /// A program that is needed for a download failed or is not installed.
    #[error("{command}: {message}\n{help}")]
    Command {
        /// The command line.
        command: String,
        /// How it failed.
        message: String,
        /// What to do.
        help: String,
    },
    /// A download has another content than it should.
    #[error(
        "{what}: expected sha256 {expected}, found {found}: the download is corrupt or not the pinned version; try again"
    )]
    Hash {
        /// The file.
        what: String,
        /// The pinned hash, in hexadecimal.
        expected: String,
        /// The hash of what arrived.
        found: String,
    },
    /// An archive cannot be read.
    #[error("archive {}: {message}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The model hub cannot be reached or does not have a file.
    #[error("hub repository {repo}: {message}")]
    Hub {
        /// `owner/name`.
        repo: String,
        /// What is wrong.
        message: String,
    },
    /// The device cannot hold or compute a data type.
    #[error("the device does not support {dtype}; load the weights as another type")]
    UnsupportedDtype {
        /// The data type.
        dtype: String,
    },
    /// The engine refused.
    #[error(transparent)]
    Core(#[from] locret_core::Error),
}

/// So that an adapter's methods of [`CausalLm`](locret_core::CausalLm) can use `?`: as
/// [`locret_core::Error::Model`], and one of the engine's own as it was.
impl From<ModelError> for locret_core::Error {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Core(error) => error,
            other => Self::Model(Box::new(other)),
        }
    }
}

/// A result with this crate's [`ModelError`].
pub type Result<T, E = ModelError> = std::result::Result<T, E>;

impl ModelError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl Fn(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path: path.clone(),
            source,
        }
    }

    pub(crate) fn format(
        path: &Path,
        what: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Format {
            path: path.to_path_buf(),
            what: what.into(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }

    pub(crate) fn config(
        path: &Path,
        what: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Config {
            path: path.to_path_buf(),
            what: what.into(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }

    pub(crate) fn tokenizer(path: &Path, message: impl ToString) -> Self {
        Self::Tokenizer {
            path: path.to_path_buf(),
            message: message.to_string(),
        }
    }
}

/// Names for a message: all of a few, the first of many.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text = names
        .iter()
        .take(SHOWN)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_travel_through_the_engine() {
        use locret_core::Error;

        let adapter = || -> locret_core::Result<()> {
            Err(ModelError::config(Path::new("m"), "size", "1", 2))?;
            Ok(())
        };
        let error = adapter().unwrap_err();
        let Error::Model(inner) = &error else {
            panic!("{error}");
        };
        let inner = inner.downcast_ref::<ModelError>();
        assert!(matches!(inner, Some(ModelError::Config { .. })), "{error}");
        assert!(error.to_string().contains("expected 1, found 2"), "{error}");
        // There and back.
        let own = ModelError::from(Error::EmptyPrompt);
        assert!(matches!(Error::from(own), Error::EmptyPrompt));
    }

    #[test]
    fn long_lists_of_names_are_cut() {
        let names: Vec<String> = (0..20).map(|i| format!("t{i}")).collect();
        let text = ModelError::MissingTensors {
            path: "model.gguf".into(),
            names,
        }
        .to_string();
        assert_eq!(
            text,
            "model.gguf: missing tensors: t0, t1, t2, t3, t4, t5, t6, t7 and 12 more"
        );
    }
}
