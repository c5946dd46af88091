//! Long runs of a small model: flat memory, and at the end what an oracle keeps.
//!
//! ```text
//! cargo run --release --example soak -- --tokens 1000000 --sequences 10000
//! ```

use clap::Parser;
use locret_examples::cli::soak;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| soak::run(&soak::Args::parse()))
}
