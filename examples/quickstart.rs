//! A pass key hidden in an essay of 4,200 tokens: which caches still know it, and what they took.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```
//!
//! Fetches the model and the essays once, and takes a minute or two on two cores.

use locret_examples::{args::ModelArgs, cli::quickstart};
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| quickstart::run(&ModelArgs::default(), quickstart::TOKENS))
}
