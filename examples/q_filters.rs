//! Where the queries of a model point, as a file that `--policy q-filters --filters FILE` reads.
//!
//! ```text
//! cargo run --release --example q_filters -- --model smollm2 --prompt-file text.txt --out filters.safetensors
//! cargo run --release --example generate -- --prompt-file book.txt --policy q-filters \
//!     --filters filters.safetensors --budget 512
//! ```

use clap::Parser;
use locret_examples::cli::q_filters;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| q_filters::run(&q_filters::Args::parse()))
}
