//! Long runs of a small model.

use crate::{
    Result,
    report::{Table, bytes, grouped},
};
use clap::Parser;
use locret_eval::soak;

/// Reads a long text into a bounded session, and sends many requests through a batch
#[derive(Debug, Parser)]
pub struct Args {
    /// Tokens of the session
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    tokens: usize,
    /// Requests of the batch; a request every three seconds is 9,600 in eight hours
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    sequences: usize,
}

/// The example.
///
/// # Errors
/// What a soak finds wrong: memory that grew, units or scores that an oracle does not have, a sequence that says
/// something else than alone.
pub fn run(args: &Args) -> Result<()> {
    let mut table = Table::new(&[
        "run",
        ">done",
        ">memory after a tenth",
        ">at the end",
        ">second tenth",
        ">last tenth",
        ">compared",
        ">keys off by",
    ]);
    let runs = [
        ("session, scores", soak::scores(args.tokens)),
        ("session, positions", soak::positions(args.tokens)),
        ("batch", soak::batch(args.sequences)),
    ];
    for (name, soaked) in runs {
        let soaked = soaked?;
        let memory = |i: usize| soaked.memory.map_or("?".into(), |memory| bytes(memory[i]));
        table.row([
            name.into(),
            grouped(soaked.count),
            memory(0),
            memory(1),
            format!("{:.1} s", soaked.tenths[0].as_secs_f64()),
            format!("{:.1} s", soaked.tenths[1].as_secs_f64()),
            grouped(soaked.compared),
            soaked.difference.map_or("".into(), |d| format!("{d:.1e}")),
        ]);
    }
    println!("{table}");
    Ok(())
}
