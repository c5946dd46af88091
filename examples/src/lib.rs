//! What the examples share: command-line groups, devices and models, progress, and [`cli`], the
//! examples that are longer than a screen.
//!
//! The examples themselves are one screen each; read them first. What they measure with is the
//! crate `locret-eval`.
#![deny(missing_docs)]

pub mod args;
pub mod cli;
pub mod devices;
pub mod plan;
pub mod progress;
pub mod qwen2;
pub mod runtime;
pub mod split;

pub use locret_eval::{Error, Result, report};

use locret_policies::{Method, PolicyConfig};
use std::{
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
