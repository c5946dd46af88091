//! Scores of a policy on questions about long contexts: built-in tasks, or anyone's own.
//!
//! ```text
//! cargo run --release --example evaluate -- --policy window --budget 256 --json window.json
//! cargo run --release --example evaluate -- --tasks my.jsonl --policy full --json full.json
//! ```
//!
//! A run that was interrupted goes on where it was if it is started again with the same flags.

use clap::Parser;
use locret_examples::{
    Result,
    args::{ModelArgs, PolicyArgs, PrefillArgs, TaskArgs},
    evaluate::{Reader, Results, run_all},
    progress::{Progress, Unit},
    report,
    runtime::file_sha256,
    with_shipped_heads, write_json,
};
use serde_json::json;
use std::{fs, path::PathBuf, process::ExitCode};

/// Reads contexts in a bounded cache and answers questions about them
#[derive(Debug, Parser)]
pub struct Args {
    #[command(flatten)]
    tasks: TaskArgs,
    /// Where the scores go
    #[arg(long, value_name = "OUT")]
    json: PathBuf,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    prefill: PrefillArgs,
    #[command(flatten)]
    model: ModelArgs,
}

#[allow(dead_code, reason = "tests include this file and call run")]
fn main() -> ExitCode {
    locret_examples::run(|| run(&Args::parse()))
}

/// The example.
pub fn run(args: &Args) -> Result<()> {
    let config = args.policy.config()?;
    let runtime = args.model.load()?;
    let config = with_shipped_heads(config, &runtime);
    // Other heads by the same name are another policy.
    let heads = config.heads.as_deref().map(file_sha256).transpose()?;
    let tasks = args.tasks.tasks(&runtime, &args.model.fetch())?;
    let model = runtime.model();
    let policy = config.build_for(&*model)?;
    let settings = json!({
        "model": runtime.name,
        "weights": args.model.weights,
        "policy": config,
        "heads_sha256": heads,
        "chunk": args.prefill.chunk,
        "local": args.prefill.local,
        "kv": args.prefill.kv,
        "tasks": args.tasks.settings(&tasks),
    });
    let reader = Reader {
        model,
        policy,
        cache: args.prefill.cache(),
        prefill: args.prefill.prefill(),
        evicts_while_decoding: config.decode.is_some(),
    };
    let partial = args.json.with_added_extension("part");
    let mut bar = Progress::new("tasks", Some(tasks.len() as u64), Unit::Cases);
    let cases = run_all(
        &reader,
        &tasks,
        &|text| runtime.encode(text),
        Some((&partial, &settings)),
        &mut bar,
    )?;
    bar.finish();
    let results = Results::of(&reader.policy.name(), settings, &cases);
    write_json(&args.json, &results)?;
    // What is in it is in the results now; if it stays, it does no harm.
    let _ = fs::remove_file(partial);
    println!(
        "{}: at most {} of keys and values, {}\n\n{}",
        results.policy,
        report::bytes(results.peak_kv_bytes),
        report::duration(results.seconds),
        results.table()
    );
    Ok(())
}
