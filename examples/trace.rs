//! What a policy kept after every chunk of a prompt, with which scores, and what the model said
//! then, as JSON: for people who ask what was evicted, and why.
//!
//! ```text
//! cargo run --release --example trace -- --ids-file prompt.json --policy key-norm --budget 128 \
//!     --max-new 16 --json trace.json
//! ```

use clap::Parser;
use locret_examples::cli::trace;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| trace::run(&trace::Args::parse()))
}
