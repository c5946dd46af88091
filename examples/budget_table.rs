//! What each layer and head comes to where the whole model shares one budget, as a table of fixed budgets.
//!
//! ```text
//! cargo run --release --example budget_table -- --policy locret --budget 256 --share model --out table.json
//! cargo run --release --example evaluate -- --policy locret --budget 256 --table table.json --json out.json
//! ```

use clap::Parser;
use locret_examples::cli::budget_table;
use std::process::ExitCode;

fn main() -> ExitCode {
    locret_examples::run(|| budget_table::run(&budget_table::Args::parse()))
}
