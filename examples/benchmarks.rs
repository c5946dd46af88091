//! A published benchmark's own files as tasks, for `evaluate` and `ablation`.
//!
//! ```text
//! cargo run --release --example benchmarks -- longbench hotpotqa.jsonl trec.jsonl --prompts dataset2prompt.json \
//!     --lengths dataset2maxlen.json --tokens 3500 --out longbench.jsonl
//! cargo run --release --example evaluate -- --tasks longbench.jsonl --json scores.json --policy full
//! ```

use clap::Parser;
use locret_examples::cli::benchmarks;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| benchmarks::run(&benchmarks::Args::parse()))
}
