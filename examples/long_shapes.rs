//! Time and memory at the dimensions of published models, with random weights: what loading takes,
//! and what a long stream of tokens takes beside its plan.
//!
//! ```text
//! cargo run --release --example long_shapes -- --model llama-3.1-8b --layers 2 --weights bf16 \
//!     --tokens 131072 --policy locret --budget 16384 --chunk 1024 --kv bf16
//! cargo run --release --example long_shapes -- --model phi-3-mini --layers 2 --weights bf16 \
//!     --tokens 131072 --policy locret --budget 6000 --chunk 3072 --kv bf16
//! ```
//!
//! With a folder for a model and no tokens it measures loading alone.

use clap::Parser;
use locret_core::{CausalLm, KvCachePolicy, Session};
use locret_examples::{
    Error, Result,
    args::{ModelArgs, PolicyArgs, PrefillArgs},
    memory::{Memory, Watch},
    plan::{Request, Shape},
    progress::{Progress, Unit},
    random::{self, RandomWeights, resident_bytes},
    report::{self, Table, bytes},
    runtime,
};
use locret_models::Weights;
use locret_policies::Method;
use std::{process::ExitCode, sync::Arc};

/// Loads a model of published dimensions and streams random tokens through it
#[derive(Debug, Parser)]
#[command(
    after_help = "--model takes the presets of the plan example, too: llama-3.1-8b, \
                        phi-3-mini, ...; their weights are random"
)]
pub struct Args {
    /// Tokens to read; none: load the model and stop
    #[arg(long, value_name = "N", default_value_t = 0)]
    tokens: usize,
    /// Layers of a preset
    #[arg(long, value_name = "N", default_value_t = 2)]
    layers: usize,
    /// Tokens in the vocabulary of a preset
    #[arg(long, value_name = "N", default_value_t = 4096)]
    vocab: usize,
    /// Width of Locret's heads, which are random unless there is a file of --heads
    #[arg(long, value_name = "N", default_value_t = 1024)]
    d_r: usize,
    /// Seed of weights, heads and tokens
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    prefill: PrefillArgs,
    #[command(flatten)]
    model: ModelArgs,
}

#[allow(dead_code, reason = "tests include this file and call run")]
fn main() -> ExitCode {
    locret_examples::run(|| run(&Args::parse()))
}

/// The example. An error, too, if keys and values took other bytes than planned.
pub fn run(args: &Args) -> Result<()> {
    let (model, shape) = load(args)?;
    if args.tokens == 0 {
        return Ok(());
    }
    let config = args.policy.config()?;
    let policy: Arc<dyn KvCachePolicy> = match (config.policy, &config.heads) {
        (Method::Locret, None) => {
            let heads = random::heads(&*model, args.d_r, args.seed)?;
            config.build_with_heads(model.spec(), heads)?
        }
        _ => config.build_for(&*model)?,
    };
    let plan = Request {
        shape,
        context: args.tokens,
        max_new: 1,
        policy: config,
        prefill: args.prefill.prefill(),
        store: args.prefill.kv,
        weight_bytes: 0,
        d_r: 0,
    }
    .plan()?;
    let ids = random::tokens(args.tokens, model.spec().vocab, args.seed);
    let mut session = Session::with_options(model, policy, args.prefill.cache())?;

    let mut bar = Progress::new("reading", Some(args.tokens as u64), Unit::Tokens);
    let mut table = Table::new(&[">tokens", ">process memory", ">keys and values"]);
    let mut tenths = 0;
    let (mut tenth_chunk, mut later) = (None, 0);
    session.prefill_with(&ids, &args.prefill.prefill(), &mut |chunk| {
        bar.set(chunk.done as u64);
        let resident = Memory::now().map(|m| m.resident);
        match tenth_chunk {
            None if chunk.index == 9 => tenth_chunk = resident,
            None => {}
            Some(_) => later = later.max(resident.unwrap_or(0)),
        }
        if chunk.done * 10 / chunk.tokens > tenths {
            tenths = chunk.done * 10 / chunk.tokens;
            table.row([
                report::grouped(chunk.done),
                resident.map_or("unknown".into(), bytes),
                bytes(chunk.cache.bytes()),
            ]);
        }
        Ok(())
    })?;
    bar.finish();

    println!("\n{table}");
    if let (Some(first), true) = (tenth_chunk, later > 0) {
        let growth = later as f64 / first as f64 - 1.0;
        println!(
            "Process memory after the tenth chunk {}, at most {} after any later one ({:+.1} %).",
            bytes(first),
            bytes(later),
            100.0 * growth
        );
    }
    println!("\n{}", report::session(&session));
    let peak = session.report().prefill_peak;
    println!(
        "Keys and values took {} bytes at most; the plan says {}.",
        report::grouped(peak.bytes),
        report::grouped(plan.kv_prefill)
    );
    if peak.bytes != plan.kv_prefill {
        return Err(Error::Usage("the plan is not what the run took".into()));
    }
    Ok(())
}

/// Loads a model and prints what that took.
fn load(args: &Args) -> Result<(Arc<dyn CausalLm>, Shape)> {
    let watch = Watch::start();
    let (model, shape, resident) = match Shape::preset(&args.model.model) {
        Some(shape) => {
            let shape = Shape {
                layers: args.layers,
                vocab: args.vocab,
                ..shape
            };
            let device = runtime::device(&args.model.device)?;
            let weights = RandomWeights::new(&shape, args.seed);
            let options = args.model.options();
            let model = random::decoder(&shape, &weights, &options, &device)?;
            let resident = resident_bytes(&weights, args.model.weights);
            let model: Arc<dyn CausalLm> = Arc::new(model);
            (model, shape, resident)
        }
        None => {
            let runtime = args.model.load()?;
            let weights: Box<dyn Weights> = runtime.loaded.files.weights()?;
            let resident = resident_bytes(&*weights, args.model.weights);
            let shape = Shape::of(&args.model.model, &runtime.loaded.config);
            (runtime.model(), shape, resident)
        }
    };
    let anonymous = watch.stop();
    let mut table = Table::new(&["loading", ">bytes", ">of the weights"]);
    let mut row = |what: &str, n: usize| {
        let share = n as f64 / resident as f64;
        table.row([what.to_owned(), bytes(n), format!("{share:.3}")]);
    };
    row("weights in the type that they are held in", resident);
    if let Some(memory) = Memory::now() {
        row("process memory at its peak, mapped pages too", memory.peak);
        row("memory without mapped pages at its peak", anonymous);
    }
    println!("{table}");
    Ok((model, shape))
}
