//! What a model, a context and a policy will take, before anything is loaded.
//!
//! ```text
//! cargo run --release --example plan -- --model phi-3-mini --context 131072 \
//!     --policy locret --budget 6000 --chunk 3072 --local 100 --kv bf16 --device-memory 24GiB
//! ```

use clap::Parser;
use locret_examples::cli::plan;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| plan::run(&plan::Args::parse()))
}
