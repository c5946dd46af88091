//! Kinds of labels and of heads, trained on the same texts and asked the same questions.

use crate::{
    Error, Result,
    args::parse_budget,
    cli::train_heads::{self, Head, Label},
    progress::{Progress, Unit},
    report::{self, Table},
    runtime::{self, Runtime},
};
use clap::Parser;
use locret_core::{Budget, CacheOptions, Positions, Prefill, Share};
use locret_eval::{
    evaluate::{Reader, run_all},
    tasks::{Kind, Recipe, Task},
};
use locret_policies::{
    HeadWeights, Method, PolicyConfig, RetainingHeads,
    training::{Metrics, RECALL_AT},
};
use std::{sync::Arc, time::Instant};

/// Trains heads for each kind of label and of head on the same texts, and asks all of them the same questions
#[derive(Debug, Clone, Parser)]
pub struct Args {
    /// Kinds of labels
    #[arg(
        long,
        value_name = "KINDS",
        value_delimiter = ',',
        default_value = "logit,mass,kvzip,kvzip-plus"
    )]
    pub labels: Vec<Label>,
    /// Kinds of heads
    #[arg(
        long,
        value_name = "KINDS",
        value_delimiter = ',',
        default_value = "locret,linear,mlp,decay"
    )]
    pub heads: Vec<Head>,
    /// Units a head, on average
    #[arg(long, value_name = "BUDGETS", value_delimiter = ',', default_value = "256", value_parser = parse_budget)]
    pub budgets: Vec<Budget>,
    /// Contexts of each kind of question; 0 asks nothing
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub contexts: usize,
    /// Seed of the questions
    #[arg(long, value_name = "N", default_value_t = 11)]
    pub question_seed: u64,
    /// Tokens of a context
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub tokens: usize,
    /// How training goes: of labels and heads it names none
    #[command(flatten)]
    pub train: train_heads::Args,
}

/// How a budget is shared out, and its name in the table.
const SHAPES: [(&str, Option<Share>); 3] = [
    ("uniform", None),
    ("layer", Some(Share::Layer)),
    ("model", Some(Share::Model)),
];

/// The example. Heads go where `--out` says, with the kinds of label and of head in the names of their files.
///
/// # Errors
/// Those of its parts.
pub fn run(args: &Args) -> Result<()> {
    let train = &args.train;
    if train.label.is_some() || train.head.is_some() {
        return Err(Error::Usage("name --labels and --heads instead".into()));
    }
    let runtime = train.model.load()?;
    let samples = train_heads::samples(train, &runtime)?;
    let work = train.work();
    let mut collecting = train.collecting();
    collecting.labels = args.labels.iter().map(|label| label.kind()).collect();
    collecting.reads = args.heads.iter().map(|head| head.form().reads()).collect();
    collecting.reads.sort();
    collecting.reads.dedup();
    let none = || None;
    let shards = train_heads::gather(
        &collecting,
        &runtime,
        &samples,
        &work.join("samples"),
        &none,
    )?;
    let tasks = match args.contexts {
        0 => Vec::new(),
        samples => {
            let recipe = Recipe {
                kinds: vec![Kind::Passkey, Kind::Needle, Kind::Facts, Kind::MultiTurn],
                tokens: args.tokens,
                samples,
                seed: args.question_seed,
            };
            let essays = runtime::essays(&train.model.fetch())?;
            recipe.generate(&runtime.frame(None)?, &essays, &|text| runtime.count(text))?
        }
    };
    let questions: usize = tasks.iter().map(|task| task.queries.len()).sum();
    let mut columns = vec!["labels".into(), "heads".into(), ">weights".into()];
    columns.push(format!(">recall of the top {:.0} %", RECALL_AT[1] * 100.0));
    columns.push(">R²".into());
    columns.push(">training".into());
    for budget in &args.budgets {
        for (shape, _) in SHAPES {
            columns.push(format!(">{budget}, {shape}: right of {questions}"));
        }
    }
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    let mut table = Table::new(&columns);
    let device = runtime.device.clone().autodiff();
    for label in &args.labels {
        for head in &args.heads {
            let mut config = train.training();
            (config.label, config.form) = (label.kind(), head.form());
            let name = format!("{}-{}", label.name(), head.name());
            if config.validate().is_err() {
                // Scores that decay are logarithms of weights.
                continue;
            }
            let started = Instant::now();
            let trained = train_heads::fit(&shards, &work.join(&name), &config, &device)?;
            let took = started.elapsed().as_secs_f64();
            let file = train
                .out
                .with_added_extension(format!("{name}.safetensors"));
            trained.heads.save(&file, train.dtype)?;
            // As they are used: in the type of their file.
            let weights = HeadWeights::load(&file, runtime.model().spec())?;
            let measured = trained.validation().unwrap_or_default();
            let mut row = row(label, head, &weights, &measured, took);
            for budget in &args.budgets {
                for (shape, share) in SHAPES {
                    let config = policy(*budget, share);
                    let name = format!("{name} {budget} {shape}");
                    let right = ask(&runtime, &weights, &config, &tasks, name)?;
                    row.push(right.to_string());
                }
            }
            table.row(row);
        }
    }
    println!("{table}");
    if !train.keep_work {
        // All that is in it is in the heads now; if it stays, it does no harm.
        let _ = std::fs::remove_dir_all(&work);
    }
    Ok(())
}

fn row(
    label: &Label,
    head: &Head,
    weights: &HeadWeights,
    measured: &Metrics,
    seconds: f64,
) -> Vec<String> {
    vec![
        label.name().into(),
        head.name().into(),
        report::grouped(weights.parameters()),
        format!("{:.3}", measured.recall[1]),
        format!("{:.3}", measured.pearson.powi(2)),
        report::duration(seconds),
    ]
}

/// 4 sinks and the newest 32 units protected, compact positions.
fn policy(budget: Budget, share: Option<Share>) -> PolicyConfig {
    let mut config = PolicyConfig::new(Method::Locret)
        .budget(budget)
        .positions(Positions::Compact);
    config.sinks = Some(4);
    config.recent = Some(32);
    config.stabilizers = Some(32);
    config.share = share;
    config
}

/// How many questions are answered, token for token.
fn ask(
    runtime: &Runtime,
    weights: &HeadWeights,
    config: &PolicyConfig,
    tasks: &[Task],
    name: String,
) -> Result<usize> {
    let model = runtime.model();
    let heads = Arc::new(RetainingHeads::for_model(weights, &*model)?);
    let reader = Reader {
        policy: config.build_with_heads(model.spec(), heads)?,
        model,
        cache: CacheOptions::new(),
        prefill: Prefill::new(256, 32),
        query_aware: None,
    };
    let mut bar = Progress::new(name, Some(tasks.len() as u64), Unit::Cases);
    let cases = run_all(&reader, tasks, runtime, None, &mut |event| {
        bar.follow(event);
    })?;
    bar.finish();
    let answers = cases.iter().flat_map(|case| &case.queries);
    Ok(answers.filter(|answer| answer.exact).count())
}
