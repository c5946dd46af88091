//! One run of one configuration, timed: the contender that `peers.py` sets beside other engines.
//!
//! Reads token ids, generates greedily, and prints a line of JSON. Nothing but the time that verdicts take
//! is noted on the way, so that time and memory are those of the engine.

use clap::Parser;
use locret_core::{
    Generate, KvCachePolicy, KvStore, LayerSpec, LayerUnits, ModelSpec, Needs, Phase, Placement,
    Positions, Prefill, Session, Step, Verdict,
};
use locret_examples::{
    Error, Result,
    args::{ModelArgs, PolicyArgs, PrefillArgs},
};
use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

/// Times a prompt and the tokens after it
#[derive(Debug, Parser)]
struct Args {
    /// A JSON array of token ids
    #[arg(long, value_name = "FILE")]
    ids_file: PathBuf,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_new: usize,
    /// Tokens of the prompt that are read, and followed by four more, before the clock starts
    #[arg(long, value_name = "N", default_value_t = 64)]
    warm_up: usize,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    prefill: PrefillArgs,
    #[command(flatten)]
    model: ModelArgs,
}

fn main() -> ExitCode {
    locret_examples::run(|| run(&Args::parse()))
}

/// A policy, and how long its verdicts on chunks of prompts took.
#[derive(Debug)]
struct Timed {
    policy: Arc<dyn KvCachePolicy>,
    nanoseconds: AtomicU64,
}

#[deny(clippy::missing_trait_methods)]
impl KvCachePolicy for Timed {
    fn name(&self) -> String {
        self.policy.name()
    }

    fn needs(&self) -> Needs {
        self.policy.needs()
    }

    fn positions(&self) -> Positions {
        self.policy.positions()
    }

    fn carries(&self) -> Option<String> {
        self.policy.carries()
    }

    fn validate(&self, model: &ModelSpec, prefill: &Prefill) -> locret_core::Result<()> {
        self.policy.validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> locret_core::Result<Box<dyn KvStore>> {
        self.policy.store(layer, place)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        self.policy.limit(layer, total)
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> locret_core::Result<Verdict> {
        let start = Instant::now();
        let verdict = self.policy.step(at, units);
        if at.phase != Phase::Decode {
            let took = start.elapsed().as_nanos() as u64;
            self.nanoseconds.fetch_add(took, Relaxed);
        }
        verdict
    }
}

fn run(args: &Args) -> Result<()> {
    let config = args.policy.config()?;
    let text = fs::read_to_string(&args.ids_file).map_err(|e| Error::read(&args.ids_file, e))?;
    let ids: Vec<u32> = serde_json::from_str(&text)
        .map_err(|e| Error::format(&args.ids_file, format!("no array of token ids: {e}")))?;
    let runtime = args.model.load()?;
    let model = runtime.model();
    let policy = Arc::new(Timed {
        policy: config.build_for(&*model)?,
        nanoseconds: AtomicU64::new(0),
    });
    let read = |ids: &[u32], prefill: &Prefill, max_new: usize| -> Result<(Session, Vec<u32>)> {
        let mut session =
            Session::with_options(model.clone(), policy.clone(), args.prefill.cache())?;
        session.prefill(ids, prefill)?;
        let made = session.generate(Generate::greedy(max_new))?;
        let made = made.collect::<std::result::Result<_, _>>()?;
        Ok((session, made))
    };
    let prefill = args.prefill.prefill();
    if args.warm_up > 0 {
        read(&ids[..args.warm_up.min(ids.len())], &prefill, 4)?;
    }
    policy.nanoseconds.store(0, Relaxed);
    let (session, made) = read(&ids, &prefill, args.max_new)?;
    let report = session.report();
    let line = serde_json::json!({
        "prefill": report.prefill_rate(),
        "decode": report.decode_rate(),
        "verdicts": policy.nanoseconds.load(Relaxed) as f64 * 1e-9 / report.prefill_time.as_secs_f64(),
        "kv_bytes": report.peak.bytes,
        "tokens": made.iter().take(8).collect::<Vec<_>>(),
    });
    println!("{line}");
    Ok(())
}
