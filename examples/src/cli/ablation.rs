//! A grid of policies, budgets, stores, positions, tasks and lengths as one run.

use crate::{
    Error, Result,
    args::ModelArgs,
    progress::{Progress, Unit},
    report,
    runtime::{self, Runtime},
    shipped_heads,
};
use clap::{Parser, Subcommand};
use locret_core::Session;
use locret_eval::{
    ablation::{self, Ablation, Grid, Journal, Origin, Own, Point, Record, Run, Shard, TaskSet},
    evaluate::Event,
    files::write_text,
    pictures,
    tasks::Kind,
    trace::{kept_positions, survival},
};
use locret_policies::Method;
use std::path::{Path, PathBuf};

/// Compares policies, budgets, stores and positions
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// What is compared, as TOML
    #[arg(long, value_name = "FILE.toml", required = true)]
    grid: Option<PathBuf>,
    /// Folder for results, tables and pictures
    #[arg(long, value_name = "DIR", required = true)]
    out: Option<PathBuf>,
    /// One of N parts of the grid, from 1/N to N/N, in a folder of its own below DIR
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Retaining heads for each Locret that names none; by default those that are shipped
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Joins the parts of a grid that several machines have run
    Merge(MergeArgs),
}

/// What is joined.
#[derive(Debug, clap::Args)]
struct MergeArgs {
    /// What was compared
    #[arg(long, value_name = "FILE.toml")]
    grid: PathBuf,
    /// Folder for results, tables and pictures
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Whether cases may be missing
    #[arg(long)]
    partial: bool,
    /// Folders of runs
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
}

/// The example.
///
/// # Errors
/// Those of its parts.
pub fn run(args: &Args) -> Result<()> {
    run_with(args, &[])
}

/// The example with policies of a caller's own beside those of the grid: all of them stand in one table, are dealt
/// out to shards, and joined by `merge`.
///
/// # Errors
/// Those of its parts.
pub fn run_with(args: &Args, own: &[Own]) -> Result<()> {
    match (&args.command, &args.grid, &args.out) {
        (Some(Command::Merge(args)), ..) => merge(args),
        (None, Some(grid), Some(out)) => run_grid(args, own, grid, out),
        // The parser asks for both.
        (None, ..) => Err(Error::Usage("no --grid, or no --out".into())),
    }
}

fn merge(args: &MergeArgs) -> Result<()> {
    let grid = Grid::load(&args.grid)?;
    let merged = ablation::merge(&grid, &args.runs)?;
    let (missing, cases) = (merged.missing, merged.run.cases);
    if missing > 0 && !args.partial {
        return Err(Error::Usage(format!(
            "{missing} of {cases} cases are missing; --partial joins what is there"
        )));
    }
    merged.write(&args.out)?;
    let lengths = lengths(&grid.points());
    tables(&merged.records, &lengths, merged.run.unit_bytes, &args.out)
}

fn run_grid(args: &Args, own: &[Own], grid: &Path, out: &Path) -> Result<()> {
    let mut grid = Grid::load(grid)?;
    let runtime = args.model.load()?;
    for entry in &mut grid.policies {
        if entry.config.policy == Method::Locret && entry.config.heads.is_none() {
            entry.config.heads = args.heads.clone().or_else(|| shipped_heads(&runtime));
        }
    }
    let shard = args.shard.unwrap_or(Shard::whole());
    let out = &match args.shard {
        Some(shard) => out.join(shard.folder()),
        None => out.to_owned(),
    };
    std::fs::create_dir_all(out).map_err(|e| Error::write(out, e))?;
    let frame = runtime.frame(grid.chat)?;
    let texts = |kinds: &[Kind]| runtime::texts(kinds, &args.model.fetch());
    let sets = grid.task_sets(&frame, &texts, &|text| runtime.count(text))?;
    let ablation = Ablation {
        model: runtime.model(),
        prefill: grid.prefill(),
        origin: Origin::here(runtime.name.clone(), runtime.sha256()?),
    };
    let mut journal = Journal::open(&out.join(ablation::RESULTS))?;
    let unit_bytes = ablation.model.spec().full_cache_bytes(1, 2);
    let run = Run::new(&grid, own, &sets, ablation.origin.clone(), unit_bytes)?.part(shard);
    run.write(out)?;
    let all = shard.deal(run.cases).iter().filter(|own| **own).count();
    let mut bar = Progress::new("cases", Some(all as u64), Unit::Cases);
    let follow = &mut |event: Event<'_>| bar.follow(event);
    let records = ablation.run_grid(&grid, own, &sets, shard, &runtime, &mut journal, follow)?;
    bar.finish_with_line();
    let longest = records.iter().map(|r| r.case.context_tokens).max();
    runtime.note_length(longest.unwrap_or(0));
    tables(&records, &lengths(&grid.points()), unit_bytes, out)?;
    match shard.is_whole() {
        true => maps(&grid, &sets, &ablation, &runtime, out),
        false => Ok(()),
    }
}

/// Tokens of contexts, each once.
fn lengths(points: &[Point]) -> Vec<usize> {
    let mut lengths: Vec<usize> = points.iter().map(|p| p.length).collect();
    lengths.dedup();
    lengths
}

/// The tables and curves of a run.
fn tables(records: &[Record], lengths: &[usize], unit_bytes: usize, out: &Path) -> Result<()> {
    let rows = ablation::rows(records, unit_bytes);
    let table = ablation::markdown(&rows);
    write_text(&out.join("table.md"), &table)?;
    println!("{table}");
    for &length in lengths {
        let end = if length == 0 {
            String::new()
        } else {
            format!("-{length}")
        };
        for (name, chart) in [
            ("quality", ablation::quality_chart(&rows, length)),
            ("memory", ablation::memory_chart(&rows, length)),
        ] {
            if let Some(chart) = chart {
                chart.write(&out.join(format!("{name}{end}.svg")))?;
            }
        }
        for (task, chart) in ablation::pareto_charts(&rows, length) {
            chart.write(&out.join(format!("pareto-{}{end}.svg", slug(&task))))?;
        }
    }
    Ok(())
}

/// For one prompt, what each policy kept.
fn maps(
    grid: &Grid,
    sets: &[TaskSet],
    ablation: &Ablation,
    runtime: &Runtime,
    out: &Path,
) -> Result<()> {
    let Some(first) = sets.first() else {
        return Ok(());
    };
    // Facts strewn over the text show most.
    let task = first.tasks.iter().max_by_key(|t| t.queries.len());
    let Some(task) = task else {
        return Ok(());
    };
    let points = grid.points();
    let ids = runtime.encode(&task.context)?;
    let pieces = runtime.pieces(&ids)?;
    for entry in &grid.policies {
        let drawn = match &grid.maps {
            Some(labels) => labels.contains(&entry.label),
            None => entry.config.policy.evicts(),
        };
        let own: Vec<&Point> = (points.iter())
            .filter(|p| p.label == entry.label)
            .filter(|p| p.takes(first))
            .collect();
        let Some(point) = own.get(own.len() / 2).filter(|_| drawn) else {
            continue;
        };
        let reader = ablation.reader(&point.candidate(&*ablation.model)?, first);
        let mut session = Session::with_options(reader.model, reader.policy, reader.cache)?;
        let mut bar = Progress::new(
            format!("map: {}", point.label),
            Some(ids.len() as u64),
            Unit::Tokens,
        );
        session.prefill_with(&ids, &reader.prefill, &mut |chunk| {
            bar.set(chunk.done as u64);
            Ok(())
        })?;
        bar.finish();
        let kept = kept_positions(session.cache());
        let units = report::grouped(session.cache().units());
        let title = format!("{}: what is left of {} tokens", point.label, ids.len());
        let note = format!(
            "{} of {}; chunks of {}. {units} units in all heads, {} of keys and values.",
            task.id,
            runtime.name,
            grid.chunk,
            report::bytes(session.cache().bytes())
        );
        let name = slug(&point.label);
        let map = pictures::kept_map(&title, &kept, ids.len());
        write_text(&out.join(format!("kept-{name}.svg")), &map)?;
        let share = survival(&kept, ids.len());
        let page = pictures::survival_page(&title, &note, &map, &pieces, &share);
        write_text(&out.join(format!("kept-{name}.html")), &page)?;
    }
    Ok(())
}

/// A label as part of a file name.
fn slug(label: &str) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_lowercase()
        } else {
            '-'
        }
    };
    label.chars().map(plain).collect()
}
