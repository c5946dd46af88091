//! A grid of policies, budgets, stores, positions, tasks and lengths as one run: results as JSON
//! lines, a table in Markdown, and pictures.
//!
//! ```text
//! cargo run --release --example ablation -- --grid examples/grids/small.toml --out ablation
//! ```
//!
//! It can be interrupted at any moment and started again: only the case in progress is lost.

use clap::Parser;
use locret_examples::cli::ablation;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| ablation::run(&ablation::Args::parse()))
}
