//! Trains Locret's retaining heads for a model, on this machine.
//!
//! ```text
//! cargo run --release --example train_heads -- --out heads.safetensors
//! cargo run --release --example train_heads -- --data my.jsonl --epochs 8 --out heads.safetensors
//! ```
//!
//! The defaults are the recipe of the heads that this repository ships (`examples/assets`). The
//! published one is `--query-tokens 0 --pool-labels 1 --sinks 0`.
//!
//! First the model reads every text once and says what its answers look at; then one small network
//! after the other learns to predict that. A run that was interrupted, at any moment, goes on where
//! it was if it is started again with the same flags.

use clap::Parser;
use locret_examples::cli::train_heads;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| train_heads::run(&train_heads::Args::parse()))
}
