//! What a model, a context and a policy will take, before anything is loaded.

use crate::{
    Error, Result,
    args::{PolicyArgs, PrefillArgs, parse_bytes},
    plan::{Request, Shape},
    report,
};
use clap::Parser;
use locret_models::{FetchOptions, ModelFiles, resolve};

/// Bytes of weights, cache, activations and heads
#[derive(Debug, Parser)]
pub struct Args {
    /// smollm2-135m, llama-3.2-1b, llama-3.1-8b, llama-2-7b, phi-3-mini, phi-3-medium, or a model
    /// as the other examples take it
    #[arg(long, value_name = "MODEL", default_value = "smollm2-135m")]
    pub model: String,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub context: usize,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_new: usize,
    /// Bytes of one weight: 4 for f32, 2 for 16 bits
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub weight_bytes: usize,
    /// Width of Locret's retaining heads
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub d_r: usize,
    /// Whether it fits into this much memory: 24GiB, for instance
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub card: Option<usize>,
    #[command(flatten)]
    /// The policy.
    pub policy: PolicyArgs,
    #[command(flatten)]
    /// How the prompt is read.
    pub prefill: PrefillArgs,
}

/// Prints the plan, and whether it fits.
///
/// # Errors
/// Those of [`Request::plan`] and of the model's files.
pub fn run(args: &Args) -> Result<()> {
    let shape = match Shape::preset(&args.model) {
        Some(shape) => shape,
        None => from_files(&args.model)?,
    };
    let request = Request {
        context: args.context,
        max_new: args.max_new,
        policy: args.policy.config()?,
        prefill: args.prefill.prefill(),
        store: args.prefill.kv,
        weight_bytes: args.weight_bytes,
        d_r: args.d_r,
        shape,
    };
    let plan = request.plan()?;
    println!(
        "{}: {} million weights, {} tokens, policy {}\n\n{}",
        request.shape.name,
        report::grouped(request.shape.parameters() / 1_000_000),
        report::grouped(args.context),
        request.policy.policy,
        plan.table()
    );
    if let Some(card) = args.card {
        let total = plan.total();
        let (verb, rest) = match card.checked_sub(total) {
            Some(rest) => ("fits into", format!("{} to spare", report::bytes(rest))),
            None => (
                "does not fit into",
                format!("{} too much", report::bytes(total - card)),
            ),
        };
        println!("It {verb} {}: {rest}.", report::bytes(card));
    }
    Ok(())
}

/// From a model's own files. Nothing is downloaded but a model that is asked for by its name.
fn from_files(model: &str) -> Result<Shape> {
    let path = resolve(model, &FetchOptions::default(), &|_| {}).map_err(|e| {
        let presets = Shape::PRESETS.join(", ");
        Error::Usage(format!("{e}\npresets are {presets}"))
    })?;
    let config = ModelFiles::open(&path)?.config()?;
    Ok(Shape::of(model, &config))
}
