//! What scores could be worth: the labels of each context used as its own scores, at several budgets, with a
//! budget for each head, for each layer or for the model, dropped once or after every chunk.
//!
//! ```text
//! cargo run --release --example oracle -- --out oracle --samples 8 \
//!     --kinds passkey,needle,facts,multi-turn,perplexity
//! ```
//!
//! It can be interrupted at any moment and started again: only the case in progress is lost.

use clap::Parser;
use locret_examples::cli::oracle;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| oracle::run(&oracle::Args::parse()))
}
