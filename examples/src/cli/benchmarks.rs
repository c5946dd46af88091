//! A published benchmark's own files as tasks.

use crate::{Result, args::ModelArgs, report};
use clap::Parser;
use locret_eval::tasks::{self, Benchmark, Prompts, Reading};
use std::path::PathBuf;

/// Makes tasks of a published benchmark's own files
#[derive(Debug, Parser)]
pub struct Args {
    /// ruler, infinitebench, longbench, longbench2 or leval
    #[arg(value_name = "BENCHMARK")]
    benchmark: Benchmark,
    /// Its files; their names say which tasks they hold
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Where the tasks go
    #[arg(long, value_name = "FILE.jsonl")]
    out: PathBuf,
    /// Its prompts: LongBench's dataset2prompt.json, ∞Bench's prompt.py, LongBench v2's 0shot.txt, or JSON of task and
    /// template
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Which object of a Python file has the prompts
    #[arg(long, value_name = "NAME")]
    prompt_set: Option<String>,
    /// How many tokens each task generates: LongBench's dataset2maxlen.json
    #[arg(long, value_name = "FILE")]
    lengths: Option<PathBuf>,
    /// What the benchmark calls the task, where the file's name does not say it
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    /// Tokens of a prompt, at most
    #[arg(long, value_name = "N")]
    tokens: usize,
    /// Records of each file, at most
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Plain text although the model has a chat template
    #[arg(long)]
    plain: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// The example.
///
/// # Errors
/// Those of its parts.
pub fn run(args: &Args) -> Result<()> {
    let mut prompts = match &args.prompts {
        Some(file) => Prompts::read(file, args.prompt_set.as_deref())?,
        None => Prompts::default(),
    };
    if let Some(file) = &args.lengths {
        prompts = prompts.lengths(file)?;
    }
    let runtime = args.model.load()?;
    let frame = runtime.frame(args.plain.then_some(false))?;
    let reading = Reading {
        benchmark: args.benchmark,
        prompts: &prompts,
        tokens: args.tokens,
        frame: &frame,
        tokeniser: &runtime,
    };
    let mut all = Vec::new();
    for file in &args.files {
        let mut tasks = reading.tasks(file, args.task.as_deref())?;
        tasks.truncate(args.samples.unwrap_or(usize::MAX));
        all.extend(tasks);
    }
    tasks::write(&args.out, &all)?;
    let questions = all.iter().map(|task| task.queries.len()).sum();
    println!(
        "{} contexts, {} questions",
        report::grouped(all.len()),
        report::grouped(questions)
    );
    Ok(())
}
