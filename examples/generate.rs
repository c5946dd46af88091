//! Text from a model whose cache a policy keeps small: tokens as they come, then the report.
//!
//! ```text
//! cargo run --release --example generate -- --chat --prompt "Why is the sky blue?"
//! cargo run --release --example generate -- --chat --prompt-file book.txt \
//!     --policy sirllm --budget 512 --chunk 256 --max-new 200 --temperature 0.7 --seed 1
//! ```

use clap::Parser;
use locret_examples::cli::generate;
use std::{io, process::ExitCode};

fn main() -> ExitCode {
    locret_examples::run(|| generate::run(&generate::Args::parse(), &mut io::stdout()))
}
