//! Which part of attention each head of a model needs: MInference's offline search, as a table that
//! `--policy minference --patterns FILE` reads.
//!
//! ```text
//! cargo run --release --example search_patterns -- --model smollm2 --prompt-file text.txt --json patterns.json
//! ```
//!
//! A search that was cut off goes on where it was: finished layers are in the file.

use clap::Parser;
use locret_examples::cli::search_patterns;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| search_patterns::run(&search_patterns::Args::parse()))
}
