//! Scores of a policy on questions about long contexts.

use crate::{
    Result,
    args::{ModelArgs, PolicyArgs, PrefillArgs, TaskArgs},
    progress::{Progress, Unit},
    report, with_shipped_heads,
};
use clap::Parser;
use locret_eval::{
    evaluate::{QueryAware, Reader, Results, run_all},
    files::{file_sha256, write_json},
};
use locret_policies::TableConfig;
use serde_json::json;
use std::{fs, path::PathBuf};

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
    /// Locret-Q: put the last N tokens of each query before its context, too
    #[arg(long, value_name = "N", default_value_t = 0)]
    query_aware: usize,
    #[command(flatten)]
    prefill: PrefillArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// The example.
///
/// # Errors
/// Those of its parts.
pub fn run(args: &Args) -> Result<()> {
    let config = args.policy.config()?;
    let runtime = args.model.load()?;
    let config = with_shipped_heads(config, &runtime);
    // Other heads by the same name are another policy.
    let heads = config.heads.as_deref().map(file_sha256).transpose()?;
    let table = config.table.as_ref().and_then(TableConfig::file);
    let table = table.map(file_sha256).transpose()?;
    let tasks = args.tasks.tasks(&runtime, &args.model.fetch())?;
    let model = runtime.model();
    let policy = config.build_for(&*model)?;
    let begin = runtime.frame(None)?.begin;
    let aware = QueryAware {
        tokens: args.query_aware,
        after: runtime.count(&begin)?,
    };
    let mut settings = json!({
        "model": runtime.name,
        "weights": args.model.weights,
        "policy": config,
        "heads_sha256": heads,
        "table_sha256": table,
        "chunk": args.prefill.chunk,
        "local": args.prefill.local,
        "kv": args.prefill.kv,
        "tasks": args.tasks.settings(&tasks),
    });
    if aware.tokens > 0 {
        settings["query_aware"] = aware.tokens.into();
    }
    let reader = Reader {
        model,
        policy,
        cache: args.prefill.cache(),
        prefill: args.prefill.prefill(),
        query_aware: (aware.tokens > 0).then_some(aware),
    };
    let partial = args.json.with_added_extension("part");
    let mut bar = Progress::new("tasks", Some(tasks.len() as u64), Unit::Cases);
    let cases = run_all(
        &reader,
        &tasks,
        &runtime,
        Some((&partial, &settings)),
        &mut |event| bar.follow(event),
    )?;
    bar.finish();
    let longest = cases.iter().map(|case| case.context_tokens).max();
    runtime.note_length(longest.unwrap_or(0));
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
