//! The error type.

use std::{
    io,
    path::{Path, PathBuf},
};

/// What can go wrong in an evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line of a file is not what it has to be.
    #[error("{path}, line {line}: {message}")]
    Line {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A file is not what it has to be.
    #[error("{path}: {message}")]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// What was asked for is impossible.
    #[error("{0}")]
    Usage(String),
    /// The engine's.
    #[error(transparent)]
    Core(#[from] locret_core::Error),
    /// A policy cannot be made.
    #[error(transparent)]
    Policy(#[from] locret_policies::PolicyError),
    /// A model, tokenizer or download failed.
    #[error(transparent)]
    Model(#[from] locret_models::ModelError),
    /// A picture cannot be drawn.
    #[error("drawing failed: {0}")]
    Picture(String),
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// [`Error::Read`].
    pub fn read(path: &Path, source: io::Error) -> Self {
        Self::Read {
            path: path.to_owned(),
            source,
        }
    }

    /// [`Error::Write`].
    pub fn write(path: &Path, source: io::Error) -> Self {
        Self::Write {
            path: path.to_owned(),
            source,
        }
    }

    /// [`Error::Format`].
    pub fn format(path: &Path, message: impl ToString) -> Self {
        Self::Format {
            path: path.to_owned(),
            message: message.to_string(),
        }
    }

    /// The message and those of everything that caused it, one a line.
    pub fn chain(&self) -> String {
        let mut text = format!("error: {self}");
        let mut last = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let message = error.to_string();
            // An error that shows its source's message as its own would say everything twice.
            if !last.ends_with(&message) {
                text += &format!("\n  because: {message}");
            }
            last = message;
            cause = error.source();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_every_cause_once() {
        let missing = io::Error::new(io::ErrorKind::NotFound, "no such file");
        let error = Error::read(Path::new("a.json"), missing);
        assert_eq!(
            error.chain(),
            "error: cannot read a.json\n  because: no such file"
        );
        let plain = Error::from(locret_core::Error::EmptyPrompt);
        assert_eq!(plain.chain(), format!("error: {plain}"));
    }
}
