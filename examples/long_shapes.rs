//! Time and memory at the dimensions of published models, with random weights: what loading takes,
//! and what a long stream of tokens takes beside its plan.
//!
//! ```text
//! cargo run --release --example long_shapes -- --model llama-3.1-8b --layers 2 --weights bf16 \
//!     --tokens 131072 --policy locret --budget 16384 --chunk 1024 --kv bf16
//! cargo run --release --example long_shapes -- --model phi-3-mini --layers 2 --weights bf16 \
//!     --tokens 131072 --policy locret --budget 6000 --chunk 3072 --kv bf16
//! ```
//!
//! With a folder for a model and no tokens it measures loading alone.

use clap::Parser;
use locret_examples::cli::long_shapes;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| long_shapes::run(&long_shapes::Args::parse()))
}
