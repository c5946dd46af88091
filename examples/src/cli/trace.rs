//! What a policy kept after every chunk of a prompt, as JSON.

use crate::{
    Error, Result,
    args::{ModelArgs, PolicyArgs, PrefillArgs, PromptArgs},
    progress::{Progress, Unit},
    report, with_shipped_heads,
};
use clap::Parser;
use locret_core::Session;
use locret_eval::{files::write_json, trace};
use std::path::{Path, PathBuf};

/// Reads a prompt, generates greedily, and writes down what was kept
#[derive(Debug, Parser)]
pub struct Args {
    #[command(flatten)]
    prompt: PromptArgs,
    /// A JSON array of token ids instead of a prompt; no tokenizer is needed then
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_file", "chat"])]
    ids_file: Option<PathBuf>,
    /// Where the trace goes
    #[arg(long, value_name = "OUT")]
    json: PathBuf,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 32)]
    max_new: usize,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    prefill: PrefillArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// The example.
///
/// # Errors
/// Those of its parts; [`Error::Format`] for a file that is no list of ids.
pub fn run(args: &Args) -> Result<()> {
    let config = args.policy.config()?;
    let runtime = args.model.load()?;
    let config = with_shipped_heads(config, &runtime);
    let ids = match &args.ids_file {
        Some(file) => read_ids(file)?,
        None => args.prompt.ids(&runtime)?,
    };
    runtime.note_length(ids.len());
    let model = runtime.model();
    let policy = config.build_for(&*model)?;
    let mut session = Session::with_options(model, policy, args.prefill.cache())?;
    let mut bar = Progress::new("reading", Some(ids.len() as u64), Unit::Tokens);
    let trace = trace::trace(
        &mut session,
        &ids,
        &args.prefill.prefill(),
        args.max_new,
        &mut |done| bar.set(done as u64),
    )?;
    bar.finish();
    runtime.note_length(session.tokens().len());
    write_json(&args.json, &trace)?;
    println!(
        "{}: {} tokens, {} chunks, at most {} units a head and {} of keys and values",
        args.json.display(),
        ids.len(),
        trace.kept.len(),
        trace.peak_units_per_head,
        report::bytes(trace.peak_kv_bytes)
    );
    Ok(())
}

fn read_ids(file: &Path) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(file).map_err(|e| Error::read(file, e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::format(file, format!("expected a JSON array of token ids: {e}")))
}
