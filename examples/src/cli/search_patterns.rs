//! MInference's offline search for the patterns of a model's heads.

use crate::{
    Error, Result,
    args::{ModelArgs, PromptArgs},
    progress::{Progress, Unit},
    report::Table,
};
use clap::Parser;
use locret_core::Error as CoreError;
use locret_eval::{
    files::write_atomically,
    patterns::{search, with_layer},
};
use locret_policies::minference::{Pattern, Patterns};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// Finds out which part of attention each query head needs
#[derive(Debug, Parser)]
pub struct Args {
    #[command(flatten)]
    prompt: PromptArgs,
    /// Where the table goes; layers that are there already are not searched again
    #[arg(long, value_name = "OUT")]
    json: PathBuf,
    /// First queries that count for nothing (the authors' 2500, for texts of some 30,000 tokens)
    #[arg(long, value_name = "N", default_value_t = 2500)]
    skip: usize,
    /// Tokens of the text to read; all of them if it is not given
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    #[command(flatten)]
    model: ModelArgs,
}

/// The example.
///
/// # Errors
/// Those of its parts; [`Error::Usage`] for a text that is too short, or a table of more layers than the model
/// has.
pub fn run(args: &Args) -> Result<()> {
    let runtime = args.model.load()?;
    let mut ids = args.prompt.ids(&runtime)?;
    ids.truncate(args.tokens.unwrap_or(usize::MAX));
    if ids.len() <= args.skip {
        let (tokens, skip) = (ids.len(), args.skip);
        return Err(Error::Usage(format!(
            "the text has {tokens} tokens, and the first {skip} are skipped (--skip)"
        )));
    }
    let model = runtime.model();
    let layers = model.spec().layers;
    let known = match args.json.exists() {
        true => Patterns::load(&args.json)?,
        false => Patterns::default(),
    };
    let done = known.layers();
    if done > layers {
        let json = args.json.display();
        return Err(Error::Usage(format!(
            "{json} has {done} layers, the model has {layers}"
        )));
    }
    let table = Arc::new(Mutex::new(known));
    let bar = Progress::new("layers", Some(layers as u64), Unit::Cases);
    let bar = Arc::new(Mutex::new(bar));
    if done < layers {
        let (table, json, bar) = (table.clone(), args.json.clone(), bar.clone());
        search(
            &model,
            &ids,
            args.skip,
            done,
            Box::new(move |layer, found| {
                let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
                *table = with_layer(std::mem::take(&mut *table), found);
                let text = table.to_json();
                write_atomically(&json, |file| writeln!(file, "{text}"))
                    .map_err(|e| CoreError::Model(Box::new(e)))?;
                let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
                bar.set(layer as u64 + 1);
                Ok(())
            }),
        )?;
    }
    if let Some(bar) = Arc::into_inner(bar).and_then(|bar| bar.into_inner().ok()) {
        bar.finish();
    }
    let table = table.lock().unwrap_or_else(PoisonError::into_inner);
    println!("{}", summary(&table, layers, model.spec().heads));
    Ok(())
}

/// How many heads have which pattern, and how much of attention it recalls.
fn summary(table: &Patterns, layers: usize, heads: usize) -> Table {
    let mut kinds: BTreeMap<String, (usize, f64, f64)> = BTreeMap::new();
    let all = (0..layers).flat_map(|layer| (0..heads).map(move |head| (layer, head)));
    for (layer, head) in all {
        let name = match table.of(layer, head) {
            Pattern::VerticalSlash { vertical, slash } => {
                format!("{vertical} columns, {slash} diagonals")
            }
            Pattern::AShape { init, local } => format!("the first {init} and the newest {local}"),
            other => format!("{other:?}"),
        };
        let score = table.score(layer, head).unwrap_or(0.0);
        let entry = kinds.entry(name).or_insert((0, 0.0, f64::INFINITY));
        *entry = (entry.0 + 1, entry.1 + score, entry.2.min(score));
    }
    let mut rows = Table::new(&["pattern", ">heads", ">recalled, mean", ">least"]);
    for (name, (count, sum, least)) in kinds {
        rows.row([
            name,
            count.to_string(),
            format!("{:.3}", sum / count as f64),
            format!("{least:.3}"),
        ]);
    }
    rows
}
