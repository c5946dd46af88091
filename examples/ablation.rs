//! A grid of policies, budgets, stores, positions, tasks and lengths as one run: results as JSON
//! lines, a table in Markdown, and pictures.
//!
//! ```text
//! cargo run --release --example ablation -- --grid examples/grids/small.toml --out ablation
//! ```
//!
//! It can be interrupted at any moment and started again: only the case in progress is lost.

use clap::Parser;
use locret_core::{CacheOptions, Prefill, Session};
use locret_examples::{
    Error, Result,
    ablation::{self, Grid, Journal, Origin, Point, Record},
    args::ModelArgs,
    corpus::Essays,
    evaluate::Reader,
    pictures,
    progress::{Progress, Unit},
    report,
    runtime::{Runtime, file_sha256},
    shipped_heads,
    tasks::{self, Recipe, Task},
    trace::{kept_positions, survival},
    write_text,
};
use locret_policies::Method;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Compares policies, budgets, stores and positions
#[derive(Debug, Parser)]
pub struct Args {
    /// What is compared, as TOML
    #[arg(long, value_name = "FILE.toml")]
    grid: PathBuf,
    /// Folder for results, tables and pictures
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Retaining heads for each Locret that names none; by default those that are shipped
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

#[allow(dead_code, reason = "tests include this file and call run")]
fn main() -> ExitCode {
    locret_examples::run(|| run(&Args::parse()))
}

/// The example.
pub fn run(args: &Args) -> Result<()> {
    let mut grid = Grid::load(&args.grid)?;
    let runtime = args.model.load()?;
    for entry in &mut grid.policies {
        if entry.config.policy == Method::Locret && entry.config.heads.is_none() {
            entry.config.heads = args.heads.clone().or_else(|| shipped_heads(&runtime));
        }
    }
    std::fs::create_dir_all(&args.out).map_err(|e| Error::write(&args.out, e))?;
    let run = Run::new(&grid, &runtime, args)?;
    let records = run.records(&args.out.join("results.jsonl"))?;
    run.report(&records, &args.out)
}

/// A grid with its tasks.
struct Run<'a> {
    grid: &'a Grid,
    runtime: &'a Runtime,
    chat: bool,
    points: Vec<Point>,
    /// By length and seed.
    tasks: HashMap<(usize, u64), Vec<Task>>,
    /// By file of retaining heads, what is in it.
    heads: HashMap<PathBuf, String>,
    origin: Origin,
}

impl<'a> Run<'a> {
    fn new(grid: &'a Grid, runtime: &'a Runtime, args: &Args) -> Result<Self> {
        let frame = runtime.frame(grid.chat)?;
        let points = grid.points();
        let essays = match grid.tasks_file {
            Some(_) => None,
            None => Some(Essays::for_evaluation(&args.model.fetch())?),
        };
        let mut all = HashMap::new();
        for point in &points {
            let key = (point.length, point.seed);
            if all.contains_key(&key) {
                continue;
            }
            let made = match (&grid.tasks_file, &essays) {
                (Some(file), _) => tasks::read(file)?,
                (None, Some(essays)) => Recipe {
                    kinds: grid.tasks.clone(),
                    tokens: point.length,
                    samples: grid.samples,
                    seed: point.seed,
                }
                .generate(&frame, essays, &|text| runtime.count(text))?,
                (None, None) => Vec::new(),
            };
            all.insert(key, made);
        }
        let files = grid.policies.iter().filter_map(|e| e.config.heads.clone());
        let heads = files.map(|file| Ok((file.clone(), file_sha256(&file)?)));
        Ok(Self {
            heads: heads.collect::<Result<_>>()?,
            chat: frame.is_chat,
            grid,
            runtime,
            points,
            tasks: all,
            origin: Origin::here(runtime.name.clone(), runtime.sha256()?),
        })
    }

    fn prefill(&self) -> Prefill {
        Prefill {
            chunk: self.grid.chunk,
            local: self.grid.local,
        }
    }

    fn reader(&self, point: &Point) -> Result<Reader> {
        let model = self.runtime.model();
        Ok(Reader {
            policy: point.config.build_for(&*model)?,
            model,
            cache: cache(point),
            prefill: self.prefill(),
            evicts_while_decoding: point.config.decode.is_some(),
        })
    }

    /// The results of all cases: those of the journal, and of the others as they are run.
    fn records(&self, journal: &Path) -> Result<Vec<Record>> {
        let mut journal = Journal::open(journal)?;
        let all: usize = self
            .points
            .iter()
            .map(|p| self.tasks[&(p.length, p.seed)].len())
            .sum();
        let mut bar = Progress::new("cases", Some(all as u64), Unit::Cases);
        let mut records = Vec::with_capacity(all);
        for point in &self.points {
            // A policy that cannot be made should say so before hours are spent on others.
            self.reader(point)?;
        }
        for point in &self.points {
            let reader = self.reader(point)?;
            for task in &self.tasks[&(point.length, point.seed)] {
                bar.label(format!("{} {}", point.label, task.id));
                let mut record = self.record(point, task);
                match journal.get(&record.key()) {
                    Some(known) => {
                        record.case = known.case.clone();
                        record.origin = known.origin.clone();
                        bar.skip();
                    }
                    None => {
                        let encode = |text: &str| self.runtime.encode(text);
                        record.case = reader.run(task, &encode, &mut |_| {})?;
                        journal.add(&record)?;
                        bar.step();
                    }
                }
                records.push(record);
            }
        }
        bar.finish_with_line();
        Ok(records)
    }

    /// A case that has not been run.
    fn record(&self, point: &Point, task: &Task) -> Record {
        Record {
            label: point.label.clone(),
            policy: point.config.clone(),
            store: point.store,
            length: point.length,
            seed: point.seed,
            chunk: self.grid.chunk,
            local: self.grid.local,
            chat: self.chat,
            tasks_file: self.grid.tasks_file.clone(),
            heads_sha256: (point.config.heads.as_ref()).map(|file| self.heads[file].clone()),
            case: task.into(),
            origin: self.origin.clone(),
        }
    }

    fn report(&self, records: &[Record], out: &Path) -> Result<()> {
        let spec = self.runtime.loaded.model.spec();
        let rows = ablation::rows(records, spec.full_cache_bytes(1, 2));
        let table = ablation::markdown(&rows);
        write_text(&out.join("table.md"), &table)?;
        println!("{table}");
        let mut lengths: Vec<usize> = self.points.iter().map(|p| p.length).collect();
        lengths.dedup();
        for length in lengths {
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
        }
        self.maps(out)
    }

    /// For one prompt, what each policy kept.
    fn maps(&self, out: &Path) -> Result<()> {
        let Some(first) = self.points.first() else {
            return Ok(());
        };
        let tasks = &self.tasks[&(first.length, first.seed)];
        // Facts strewn over the text show most.
        let task = tasks.iter().max_by_key(|t| t.queries.len());
        let Some(task) = task else {
            return Ok(());
        };
        let ids = self.runtime.encode(&task.context)?;
        let pieces = self.runtime.pieces(&ids)?;
        for entry in &self.grid.policies {
            let drawn = match &self.grid.maps {
                Some(labels) => labels.contains(&entry.label),
                None => entry.config.policy != Method::Full,
            };
            let own: Vec<&Point> = (self.points.iter())
                .filter(|p| p.label == entry.label)
                .filter(|p| (p.length, p.seed) == (first.length, first.seed))
                .collect();
            let Some(point) = own.get(own.len() / 2).filter(|_| drawn) else {
                continue;
            };
            let reader = self.reader(point)?;
            let mut session = Session::with_options(reader.model, reader.policy, reader.cache)?;
            let mut bar = Progress::new(
                format!("map: {}", point.label),
                Some(ids.len() as u64),
                Unit::Tokens,
            );
            session.prefill_with(&ids, &self.prefill(), &mut |chunk| {
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
                self.runtime.name,
                self.grid.chunk,
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
}

fn cache(point: &Point) -> CacheOptions {
    CacheOptions {
        dtype: point.store.dtype(),
        ..CacheOptions::default()
    }
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
