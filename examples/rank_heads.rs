//! Trains heads for kinds of labels and of heads on the same texts, and says in one table what they answer.
//!
//! ```text
//! cargo run --release --example rank_heads -- --data reconstruct --out heads --budgets 512,256
//! ```
//!
//! The texts are read once; their repetition is forced once for each kind of label. Everything else is a flag of
//! `train_heads`. A run that was interrupted goes on where it was if it is started again with the same flags.

use clap::Parser;
use locret_examples::cli::rank_heads;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| rank_heads::run(&rank_heads::Args::parse()))
}
