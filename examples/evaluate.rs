//! Scores of a policy on questions about long contexts: built-in tasks, or anyone's own.
//!
//! ```text
//! cargo run --release --example evaluate -- --policy window --budget 256 --json window.json
//! cargo run --release --example evaluate -- --tasks my.jsonl --policy full --json full.json
//! ```
//!
//! A run that was interrupted goes on where it was if it is started again with the same flags.

use clap::Parser;
use locret_examples::cli::evaluate;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| evaluate::run(&evaluate::Args::parse()))
}
