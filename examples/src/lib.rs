//! What the examples share: command-line groups, progress, reports, evaluation tasks and their
//! texts.
//!
//! The examples themselves are one screen each; read them first.
#![deny(missing_docs)]

pub mod ablation;
pub mod args;
pub mod corpus;
#[cfg(doctest)]
mod documents;
mod error;
pub mod evaluate;
pub mod golden;
pub mod memory;
pub mod pictures;
pub mod plan;
pub mod progress;
pub mod random;
pub mod report;
pub mod runtime;
pub mod tasks;
pub mod trace;
pub mod training_data;

pub use error::{Error, Result};

use locret_policies::{Method, PolicyConfig};
use std::{
    fs,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Runs an example: an error is printed with its causes, and the exit code is 1.
pub fn run(main: impl FnOnce() -> Result<()>) -> ExitCode {
    match main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error.chain());
            ExitCode::FAILURE
        }
    }
}

/// Locret's heads for a model, where this repository ships them: SmolLM2-135M-Instruct alone.
pub fn shipped_heads(runtime: &runtime::Runtime) -> Option<PathBuf> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/smollm2.safetensors");
    (runtime.name == "smollm2" && file.is_file()).then_some(file)
}

/// The same configuration; a Locret without heads gets [`shipped_heads`] where there are any.
pub fn with_shipped_heads(mut config: PolicyConfig, runtime: &runtime::Runtime) -> PolicyConfig {
    if config.policy == Method::Locret && config.heads.is_none() {
        config.heads = shipped_heads(runtime);
    }
    config
}

/// Writes a file beside its place and then renames it, so that it is never there by half.
///
/// # Errors
/// [`Error::Write`].
pub fn write_atomically(
    path: &Path,
    content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let write = || -> io::Result<()> {
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(folder)?;
        let mut builder = tempfile::Builder::new();
        // Temporary files are their owner's alone; results are as readable as any other file.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(folder)?;
        let mut out = BufWriter::new(file);
        content(&mut out)?;
        out.flush()?;
        let file = out.into_inner().map_err(|e| e.into_error())?;
        file.persist(path).map_err(|e| e.error)?;
        Ok(())
    };
    write().map_err(|e| Error::write(path, e))
}

/// Writes a text file.
///
/// # Errors
/// [`Error::Write`].
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    write_atomically(path, |out| out.write_all(text.as_bytes()))
}

/// Writes a value as indented JSON.
///
/// # Errors
/// [`Error::Write`].
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    write_atomically(path, |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        out.write_all(b"\n")
    })
}
