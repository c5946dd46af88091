//! One run of one configuration, timed: the contender that `peers.py` sets beside other engines.
//!
//! Reads token ids, generates greedily, and prints a line of JSON. Nothing but the time that verdicts take
//! is noted on the way, so that time and memory are those of the engine.

use clap::Parser;
use locret_core::{
    Batch, CausalLm, Decided, End, Event, Generate, KvCachePolicy, Limits, Prefill, Probe, Request,
    Session,
};
use locret_examples::{
    Error, Result,
    args::{ModelArgs, PolicyArgs, PrefillArgs},
};
use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
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
    /// Sequences that are read and generated at once, each with a prompt of its own: the ids from another
    /// one on, and then those before it
    #[arg(long, value_name = "N", default_value_t = 1)]
    sequences: usize,
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

/// How long verdicts on chunks of prompts take. Where units can be chosen on a device nothing is watched, since watching
/// brings their scores to the host.
struct Timed(Option<Duration>);

impl Probe for Timed {
    fn decides(&self) -> bool {
        self.0.is_some()
    }

    fn decided(&mut self, at: &Decided<'_>) -> locret_core::Result<()> {
        self.0 = self.0.map(|took| took + at.took);
        Ok(())
    }
}

fn run(args: &Args) -> Result<()> {
    let config = args.policy.config()?;
    let text = fs::read_to_string(&args.ids_file).map_err(|e| Error::read(&args.ids_file, e))?;
    let ids: Vec<u32> = serde_json::from_str(&text)
        .map_err(|e| Error::format(&args.ids_file, format!("no array of token ids: {e}")))?;
    let runtime = args.model.load()?;
    let model = runtime.model();
    let policy = config.build_for(&*model)?;
    let read = |ids: &[u32], prefill: &Prefill, max_new: usize| -> Result<_> {
        let mut session =
            Session::with_options(model.clone(), policy.clone(), args.prefill.cache())?;
        let there = model.compute().unit_lists(model.spec().kv_heads).is_some();
        let mut timed = Timed((!there).then_some(Duration::ZERO));
        session.prefill_watched(ids, prefill, &mut timed)?;
        let made = session.generate(Generate::greedy(max_new))?;
        let made: Vec<u32> = made.collect::<std::result::Result<_, _>>()?;
        Ok((session.report(), timed.0, made))
    };
    let prefill = args.prefill.prefill();
    if args.warm_up > 0 {
        read(&ids[..args.warm_up.min(ids.len())], &prefill, 4)?;
    }
    if args.sequences > 1 {
        return many(args, &ids, &model, &policy);
    }
    let (report, verdicts, made) = read(&ids, &prefill, args.max_new)?;
    let line = serde_json::json!({
        "prefill": report.prefill_rate(),
        "decode": report.decode_rate(),
        "verdicts": verdicts.map(|took| took.as_secs_f64() / report.prefill_time.as_secs_f64()),
        "kv_bytes": report.peak.bytes,
        "tokens": made.iter().take(8).collect::<Vec<_>>(),
    });
    println!("{line}");
    Ok(())
}

/// Several sequences at once: rates are those of all of them together, that of decoding from the moment
/// on at which all prompts are read.
fn many(
    args: &Args,
    ids: &[u32],
    model: &Arc<dyn CausalLm>,
    policy: &Arc<dyn KvCachePolicy>,
) -> Result<()> {
    let n = args.sequences;
    let mut batch = Batch::new(model.clone(), Limits::new().running(n).waiting(n))?;
    let first = Arc::new(Mutex::new(Vec::new()));
    for i in 0..n {
        let mut prompt = ids.to_vec();
        prompt.rotate_left(i * ids.len() / n);
        let request = Request::new(prompt, policy.clone())
            .prefill(args.prefill.prefill())
            .cache(args.prefill.cache())
            // Those that have read before the others must not end before them.
            .generate(Generate::greedy(args.max_new + 4 * n));
        let first = first.clone();
        batch.submit(
            request,
            Box::new(move |event| match event {
                Event::Token(id) if i == 0 => {
                    first.lock().unwrap_or_else(|e| e.into_inner()).push(id);
                }
                Event::Ended(ended) if matches!(ended.end, End::Failed(_)) => {
                    eprintln!("sequence {i}: {:?}", ended.end);
                }
                _ => {}
            }),
        )?;
    }
    let start = Instant::now();
    let tokens = n * ids.len();
    while (batch.load().read as usize) < tokens && batch.step() {}
    let prefill = tokens as f64 / start.elapsed().as_secs_f64();
    let (start, before) = (Instant::now(), batch.load().generated);
    for _ in 1..args.max_new {
        batch.step();
    }
    let made = batch.load().generated - before;
    let decode = made as f64 / start.elapsed().as_secs_f64();
    let kv_bytes = batch.load().kv_bytes;
    let tokens = first.lock().unwrap_or_else(|e| e.into_inner());
    let line = serde_json::json!({
        "prefill": prefill,
        "decode": decode,
        "kv_bytes": kv_bytes,
        "tokens": tokens.iter().take(8).collect::<Vec<_>>(),
    });
    println!("{line}");
    Ok(())
}
