//! What a model, a context and a policy will take, before anything is loaded.

use crate::{
    Error, Result,
    args::{PolicyArgs, PrefillArgs, parse_bytes},
    plan::{Plan, Request, Shape},
    report,
};
use clap::Parser;
use locret_core::DType;
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
    /// Type of the matrices: f32, f16, bf16, q8_0, q4_k and so on
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    pub weights: DType,
    /// Width of Locret's retaining heads
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub d_r: usize,
    /// Whether it fits into this much memory, 24GiB for instance, and if not, which layers do; several times for
    /// several devices
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub device_memory: Vec<usize>,
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
        weights: args.weights,
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
    if !args.device_memory.is_empty() {
        println!("{}", fitted(&request, &plan, &args.device_memory)?);
    }
    Ok(())
}

/// Whether it fits into one device, and how it is laid over all there are.
fn fitted(request: &Request, plan: &Plan, memory: &[usize]) -> Result<String> {
    let mut text = String::new();
    let all = memory.iter().sum();
    if let [card] = memory {
        let total = plan.total();
        let (verb, rest) = match card.checked_sub(total) {
            Some(rest) => ("fits into", format!("{} to spare", report::bytes(rest))),
            None => (
                "does not fit into",
                format!("{} too much", report::bytes(total - card)),
            ),
        };
        text += &format!("It {verb} {}: {rest}.", report::bytes(*card));
        if plan.total() <= *card {
            return Ok(text);
        }
        text += "\n";
    }
    let split = request.split(memory)?;
    if !split.is_whole() && memory.len() > 1 {
        text += &format!("It does not fit into {} in all.\n", report::bytes(all));
    }
    text += &format!("\n{}\nWith `{}`.", split.table(), split.flags());
    Ok(text)
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
