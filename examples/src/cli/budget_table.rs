//! A table of budgets by layer and head, measured.

use crate::{
    Error, Result,
    args::{ModelArgs, PolicyArgs, PrefillArgs},
    progress::{Fetching, Progress, Unit},
    report::Table,
    runtime, with_shipped_heads,
};
use clap::Parser;
use locret_core::Share;
use locret_eval::{
    budget_table::measured,
    files::write_json,
    training_data::{self, Ordinary, Recipe, TrainingCorpus},
};
use std::path::PathBuf;

/// Reads texts under one budget for the model, and writes what each layer and head came to
#[derive(Debug, Parser)]
pub struct Args {
    /// Where the table goes
    #[arg(long, value_name = "FILE.json")]
    out: PathBuf,
    /// One share for all heads of a layer, which may then share it (--ada)
    #[arg(long)]
    by_layer: bool,
    /// Which texts: a recipe of training data
    #[arg(long, value_name = "RECIPE", default_value = "plain")]
    data: String,
    /// How many texts
    #[arg(long, value_name = "N", default_value_t = 16)]
    samples: usize,
    /// Seed of the texts
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
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
/// Those of its parts; [`Error::Usage`] for a policy whose layers share nothing.
pub fn run(args: &Args) -> Result<()> {
    let config = args.policy.config()?;
    if config.share != Some(Share::Model) {
        return Err(Error::Usage(
            "a table is measured where layers share one budget: --share model".into(),
        ));
    }
    let recipe: Recipe = args.data.parse()?;
    let runtime = args.model.load()?;
    let config = with_shipped_heads(config, &runtime);
    let (fetch, frame) = (args.model.fetch(), runtime.frame(None)?);
    let essays = runtime::essays(&fetch)?;
    let shown = Fetching::new();
    let mut corpus = TrainingCorpus::fetch(&fetch, &essays, &|p| shown.show(p))?;
    if recipe == Recipe::Reconstruct {
        corpus = corpus.with(Ordinary::fetch(&fetch, &|p| shown.show(p))?);
    }
    drop(shown);
    let count = |text: &str| runtime.count(text);
    let (samples, seed) = (args.samples, args.seed);
    let texts = training_data::generate(recipe, 0.0, samples, seed, &corpus, &frame, &count)?;
    let texts = texts.iter().map(|text| runtime.encode(&text.prompt));
    let texts: Vec<Vec<u32>> = texts.collect::<Result<_>>()?;
    let model = runtime.model();
    let policy = config.build_for(&*model)?;
    let mut bar = Progress::new("texts", Some(texts.len() as u64), Unit::Cases);
    let mut done = 0;
    let table = measured(
        &model,
        &policy,
        &args.prefill.prefill(),
        &texts,
        &mut || {
            done += 1;
            bar.set(done);
        },
    )?;
    bar.finish();
    let mut shown = Table::new(&[">layer", ">of the mean"]);
    for (layer, row) in table.by_layer().shares().iter().enumerate() {
        shown.row([layer.to_string(), format!("{:.2}", row[0])]);
    }
    let table = if args.by_layer {
        table.by_layer()
    } else {
        table
    };
    write_json(&args.out, &table)?;
    println!("{shown}");
    Ok(())
}
