//! What scores could be worth: labels as their own scores.

use crate::{
    Error, Result,
    args::{ModelArgs, TaskArgs, parse_positions},
    progress::{Progress, Unit},
};
use clap::Parser;
use locret_core::{Positions, Prefill, Share};
use locret_eval::{
    ablation::{Ablation, Journal, Origin, TaskSet},
    evaluate::Event,
    files::write_text,
    oracle::{Oracle, Point, Reading, Sharing, markdown},
    tasks::Task,
    training_data::repetition,
};
use locret_policies::training::{LabelKind, LabelOptions, labels};
use serde_json::json;
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// Keeps what the labels of a text say, and asks about it
#[derive(Debug, Parser)]
pub struct Args {
    /// Folder for results and tables
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    tasks: TaskArgs,
    /// Of so many units one stays
    #[arg(
        long,
        value_name = "N,N",
        value_delimiter = ',',
        default_value = "2,4,8,16"
    )]
    factors: Vec<usize>,
    /// Who has a budget of its own: head, layer, model
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "head,layer,model"
    )]
    sharing: Vec<Sharing>,
    /// When units are dropped: one-shot, chunks
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "one-shot,chunks"
    )]
    readings: Vec<Reading>,
    /// Newest units that stay
    #[arg(
        long,
        value_name = "N,N",
        value_delimiter = ',',
        default_value = "32,0,128"
    )]
    recent: Vec<usize>,
    /// First units that stay
    #[arg(long, value_name = "N", default_value_t = 4)]
    sinks: usize,
    /// What each head keeps of its share on its own account, where budgets are shared
    #[arg(long, value_name = "FLOOR", default_value_t = Share::FLOOR)]
    floor: f64,
    /// original or compact
    #[arg(long, value_name = "NAME", default_value = "compact", value_parser = parse_positions)]
    positions: Positions,
    /// What labels are: max-logit, mass, kvzip, kvzip-plus
    #[arg(long, value_name = "NAME", default_value = "kvzip-plus", value_parser = parse_label)]
    label: LabelKind,
    /// Tokens of a piece in which a text is repeated
    #[arg(long, value_name = "N", default_value_t = 2048)]
    piece: usize,
    /// Tokens that go through the model together
    #[arg(long, value_name = "N", default_value_t = 256)]
    chunk: usize,
    /// Begin no context after so many minutes, and show what there is; started again, it goes on
    #[arg(long, value_name = "M")]
    minutes: Option<f64>,
    #[command(flatten)]
    model: ModelArgs,
}

fn parse_label(text: &str) -> Result<LabelKind, String> {
    let known = LabelKind::ALL.into_iter().find(|kind| kind.name() == text);
    known.ok_or_else(|| {
        let names = LabelKind::ALL.map(LabelKind::name).join(", ");
        format!("expected one of {names}")
    })
}

impl Args {
    /// Every way to keep a part, the windows one after the other.
    fn points(&self) -> Result<Vec<Point>> {
        if self.factors.contains(&0) {
            return Err(Error::Usage("--factors are numbers from 1 on".into()));
        }
        let mut all = Vec::new();
        for recent in &self.recent {
            for reading in &self.readings {
                for sharing in &self.sharing {
                    for factor in &self.factors {
                        all.push(Point {
                            reading: *reading,
                            sharing: *sharing,
                            recent: *recent,
                            factor: *factor,
                        });
                    }
                }
            }
        }
        Ok(all)
    }
}

/// The example.
///
/// # Errors
/// Those of its parts.
pub fn run(args: &Args) -> Result<()> {
    let points = args.points()?;
    let runtime = args.model.load()?;
    std::fs::create_dir_all(&args.out).map_err(|e| Error::write(&args.out, e))?;
    let mut tasks = args.tasks.tasks(&runtime, &args.model.fetch())?;
    if args.tasks.file.is_none() {
        // One context of each kind after the other, so that what there is so far is of all kinds.
        let samples = args.tasks.samples.max(1);
        let mut order: Vec<usize> = (0..tasks.len()).collect();
        order.sort_by_key(|i| (i % samples, i / samples));
        tasks = order.into_iter().map(|i| tasks[i].clone()).collect();
    }
    let frame = runtime.frame(args.tasks.plain.then_some(false))?;
    let model = runtime.model();
    // A time that is never reached is none.
    let until = args.minutes.and_then(|minutes| {
        let time = Duration::try_from_secs_f64(60.0 * minutes.max(0.0)).ok()?;
        Instant::now().checked_add(time)
    });
    let oracle = Oracle {
        until,
        ablation: Ablation {
            model: model.clone(),
            prefill: Prefill::new(args.chunk, 0),
            origin: Origin::here(runtime.name.clone(), runtime.sha256()?),
        },
        sinks: args.sinks,
        floor: args.floor,
        positions: args.positions,
        labels: json!({ "kind": args.label, "piece": args.piece }),
    };
    let mut journal = Journal::open(&args.out.join("results.jsonl"))?;
    let cases = (points.len() + 1) * tasks.len();
    let mut bar = Progress::new("cases", Some(cases as u64), Unit::Cases);
    let set = TaskSet {
        length: args.tasks.tokens,
        seed: args.tasks.seed,
        chat: frame.is_chat,
        file: args.tasks.file.clone(),
        begin: runtime.count(&frame.begin)?,
        tasks,
    };
    let repetition = repetition(&frame, args.piece, &|text| runtime.encode(text))?;
    let begin = runtime.count(&frame.open)?;
    let make = |task: &Task| {
        let context = runtime.encode(&task.context)?;
        // What every text begins with is not repeated.
        let sample = repetition.sample(&context, begin..context.len())?;
        Ok(labels(
            &*model,
            &sample,
            args.label,
            &LabelOptions::default(),
        )?)
    };
    let follow = &mut |event: Event<'_>| bar.follow(event);
    let records = oracle.run(&points, &set, &runtime, &make, &mut journal, follow)?;
    bar.finish();
    let longest = records.iter().map(|record| record.case.context_tokens);
    runtime.note_length(longest.max().unwrap_or(0));
    let text = markdown(&records, &points);
    write_text(&args.out.join("table.md"), &text)?;
    println!("{text}");
    Ok(())
}
