//! Time and memory at the dimensions of published models.

use crate::{
    Error, Result,
    args::{ModelArgs, PolicyArgs, PrefillArgs},
    devices,
    plan::{Plan, Request, Shape},
    progress::{Progress, Unit},
    report::{self, Table, bytes},
};
use clap::Parser;
use locret_core::{
    CausalLm, DType, Error as CoreError, Generate, KvCachePolicy, LongRopeSwitch, ModelSpec,
    RopeConfig, RopeScaling, Session,
};
use locret_eval::{
    memory::{Memory, Watch},
    patterns::Recalling,
    random::{self, RandomWeights, resident_bytes},
};
use locret_models::{DecoderConfig, Layout, WeightDtype, Weights};
use locret_policies::Method;
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

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
    /// Tokens to generate after them
    #[arg(long, value_name = "N", default_value_t = 1)]
    max_new: usize,
    /// Tokens that are read, and followed by four more, before the clock starts: what a device compiles when it is first
    /// asked is done then
    #[arg(long, value_name = "N", default_value_t = 0)]
    warm_up: usize,
    /// Stop reading after so many seconds, and go on with what was read by then
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Write what was measured as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Layers of a preset
    #[arg(long, value_name = "N", default_value_t = 2)]
    layers: usize,
    /// Tokens in the vocabulary of a preset
    #[arg(long, value_name = "N", default_value_t = 4096)]
    vocab: usize,
    /// Width of Locret's heads, which are random unless there is a file of --heads
    #[arg(long, value_name = "N", default_value_t = 1024)]
    d_r: usize,
    /// Mean of a preset's queries and keys, which makes them look at what is near, as trained ones do: attention
    /// falls with about the square of distance at 2
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    near: f32,
    /// Say how much of attention lies in what queries see, of every N-th query of a chunk (in time of its own)
    #[arg(long, value_name = "N")]
    recall: Option<usize>,
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

/// The example.
///
/// # Errors
/// Those of its parts; [`Error::Usage`] if keys and values took other bytes than planned, which they may
/// only as integers or where heads share a budget.
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
    let recalling = (args.recall).map(|every| Arc::new(Recalling::new(policy.clone(), every)));
    let policy: Arc<dyn KvCachePolicy> = match &recalling {
        Some(recalling) => recalling.clone(),
        None => policy,
    };
    // What codes and heads of unequal lengths take depends on the text.
    let shared = config.ada.is_some() || config.share.is_some() || config.table.is_some();
    let exact = config.quantize.is_none() && !shared;
    let plan = Request {
        shape,
        context: args.tokens,
        max_new: args.max_new,
        policy: config,
        prefill: args.prefill.prefill(),
        store: args.prefill.kv,
        weights: held(args.model.weights),
        d_r: args.d_r,
    }
    .plan()?;
    let ids = random::tokens(args.tokens, model.spec().vocab, args.seed);
    let mut session = Session::with_options(model, policy, args.prefill.cache())?;
    if args.warm_up > 0 {
        let mut first = session.fork()?;
        first.prefill(&ids[..args.warm_up.min(ids.len())], &args.prefill.prefill())?;
        generate(&mut first, 4)?;
    }

    let mut bar = Progress::new("reading", Some(args.tokens as u64), Unit::Tokens);
    let mut table = Table::new(&[">tokens", ">process memory", ">keys and values"]);
    let mut tenths = 0;
    let (mut tenth_chunk, mut later) = (None, 0);
    let (begun, mut cut) = (Instant::now(), false);
    let limit = args.seconds.map(Duration::from_secs);
    let read = session.prefill_with(&ids, &args.prefill.prefill(), &mut |chunk| {
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
        cut = chunk.done < chunk.tokens && limit.is_some_and(|limit| begun.elapsed() > limit);
        match cut {
            true => Err(CoreError::Model("its time is up".into())),
            false => Ok(()),
        }
    });
    bar.finish();
    match cut {
        // Answers follow prompts that were read to their ends.
        true => session.prefill(&ids[..args.prefill.local.max(1)], &args.prefill.prefill())?,
        false => read?,
    }

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
    // Before tokens are generated, too: a run that is ended from outside leaves what it had.
    let note = |session: &Session| match &args.json {
        Some(file) => write_json(file, session, &plan),
        None => Ok(()),
    };
    note(&session)?;
    generate(&mut session, args.max_new)?;
    note(&session)?;
    println!("\n{}", report::session(&session));
    if let Some(recalling) = recalling {
        match recalling.recall() {
            Some(recall) => println!(
                "Of attention, {:.4} lies in what queries see (the least of a head in a chunk: {:.4}).",
                recall.mean, recall.least
            ),
            None => println!("Queries see all of attention."),
        }
    }
    let peak = session.report().prefill_peak;
    println!(
        "Keys and values took {} bytes at most; the plan says {} ({:+.1} %).",
        report::grouped(peak.bytes),
        report::grouped(plan.kv_prefill),
        100.0 * (peak.bytes as f64 / plan.kv_prefill as f64 - 1.0)
    );
    if cut {
        println!("Its time was up before all was read.");
    } else if exact && peak.bytes != plan.kv_prefill {
        return Err(Error::Usage("the plan is not what the run took".into()));
    }
    Ok(())
}

/// The type of matrices that are drawn by lot in `bf16`.
fn held(weights: WeightDtype) -> DType {
    weights.resident(DType::BF16)
}

/// So many greedy tokens.
fn generate(session: &mut Session, tokens: usize) -> Result<()> {
    for token in session.generate(Generate::greedy(tokens))? {
        token?;
    }
    Ok(())
}

/// Rates, and bytes beside the plan's.
fn write_json(file: &Path, session: &Session, plan: &Plan) -> Result<()> {
    let report = session.report();
    let found = json!({
        "prompt": report.prefill_tokens,
        "prefill": report.prefill_rate(),
        "decode": report.decode_rate(),
        "kv_bytes": report.prefill_peak.bytes,
        "plan": {
            "weights": plan.weights,
            "heads": plan.heads,
            "kv_bytes": plan.kv_prefill,
            "activations": plan.activations,
            "total": plan.total(),
        },
    });
    fs::write(file, format!("{found}\n")).map_err(|e| Error::write(file, e))
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
            let compute = devices::computes(&args.model, shape.layers)?;
            eprint!("{}", devices::described(&*compute));
            let config = decoder(&shape, args.model.always_long);
            let weights = RandomWeights::new(&config, args.seed).near(&config, args.near);
            let options = args.model.options();
            let model = random::decoder_with(&config, &weights, &options, &compute)?;
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

/// Rotary settings as the models of that name have them; LongRoPE's factors, which are lists of
/// numbers in a model's files, are a smooth curve instead.
fn decoder(shape: &Shape, always_long: bool) -> DecoderConfig {
    let half = shape.head_dim / 2;
    let (theta, scaling) = match shape.name.as_str() {
        name if name.starts_with("llama-3") => (
            500_000.0,
            RopeScaling::Llama3 {
                factor: if name.starts_with("llama-3.2") {
                    32.0
                } else {
                    8.0
                },
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max: 8192,
            },
        ),
        name if name.starts_with("phi-3") => (
            10_000.0,
            RopeScaling::LongRope {
                short: vec![1.0; half],
                long: (0..half)
                    .map(|i| 64f64.powf(i as f64 / half as f64))
                    .collect(),
                original_max: 4096,
                attention_factor: (1.0 + 32f64.ln() / 4096f64.ln()).sqrt(),
                switch: if always_long {
                    LongRopeSwitch::AlwaysLong
                } else {
                    LongRopeSwitch::default()
                },
            },
        ),
        _ => (10_000.0, RopeScaling::None),
    };
    let spec = ModelSpec::new(
        shape.layers,
        shape.heads,
        shape.kv_heads,
        shape.hidden,
        shape.vocab,
    )
    .with_head_dim(shape.head_dim)
    .with_rope(RopeConfig {
        theta,
        rotary_dim: shape.head_dim,
        scaling,
    })
    .with_softmax_scale((shape.head_dim as f32).sqrt().recip())
    .with_max_positions(Some(131_072));
    DecoderConfig {
        spec,
        intermediate: shape.intermediate,
        norm_epsilon: 1e-5,
        tied: shape.tied,
        layout: if shape.name.starts_with("phi-3") {
            Layout::Fused
        } else {
            Layout::Separate
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use locret_models::LoadOptions;

    #[test]
    fn every_preset_has_the_weights_that_its_decoder_asks_for() {
        for name in Shape::PRESETS {
            let mut shape = Shape::preset(name).unwrap();
            // Small, with the proportions of heads and the layout kept.
            (shape.layers, shape.hidden, shape.intermediate) = (2, 48, 64);
            (shape.head_dim, shape.vocab) = (8, 96);
            let config = decoder(&shape, true);
            let weights = RandomWeights::new(&config, 1);
            let device = Device::default();
            let options = LoadOptions::new().weights(WeightDtype::BF16);
            let model = random::decoder(&config, &weights, &options, &device).unwrap();
            assert_eq!(model.spec().heads, shape.heads, "{name}");
            let phi = name.starts_with("phi-3");
            assert_eq!(model.spec().rope.is_long(1), phi, "{name}");
            let bytes = resident_bytes(&weights, WeightDtype::BF16);
            assert_eq!(bytes, 2 * shape.parameters(), "{name}");
            assert_eq!(resident_bytes(&weights, WeightDtype::F32), 2 * bytes);
            random::heads(&model, 8, 1).unwrap();
        }
    }
}
