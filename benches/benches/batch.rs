//! SmolLM2-135M decodes one, two, four, eight and sixteen sequences at a time, each with a text of its own
//! length behind it and 512 units in its cache: tokens a second of all of them together, and how often as many
//! as one sequence alone gets.
//!
//! Numbers of sequences take turns step by step, so that whatever else the machine does meets all of them, and
//! medians are printed.
//!
//! And how long the first token of a short prompt takes that comes while a long one is being read, in chunks of
//! the long one.
//!
//! The model is fetched if it is not there, and its weights are those of its file unless
//! there is something like `-- --weights f16`.

use clap::Parser;
use locret_benches::ids;
use locret_core::{
    Batch, Budget, CacheOptions, CausalLm, DType, Event, Generate, KvCachePolicy, Limits, Pass,
    Phase, Positions, Prefill, Request, SequenceCache, forward,
};
use locret_examples::{Result, args::ModelArgs};
use locret_policies::Window;
use std::{
    hint::black_box,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

/// Times decoded tokens of several sequences in one pass
#[derive(Debug, Parser)]
struct Args {
    /// Sequences in a pass
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_value = "1,2,4,8,16"
    )]
    sequences: Vec<usize>,
    /// Units that each sequence keeps of its text
    #[arg(long, value_name = "N", default_value_t = 512)]
    units: usize,
    /// Type that keys and values are kept in: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    store: DType,
    /// Where units stand: compact (16-bit keys are then rotated whenever they are read), or original
    #[arg(long, value_name = "POSITIONS", default_value = "compact", value_parser = positions)]
    positions: Positions,
    /// Steps of each number of sequences
    #[arg(long, value_name = "N", default_value_t = 40)]
    steps: usize,
    /// Tokens of the long prompt
    #[arg(long, value_name = "N", default_value_t = 8000)]
    long: usize,
    /// Tokens of the short one
    #[arg(long, value_name = "N", default_value_t = 100)]
    short: usize,
    /// Tokens of a chunk
    #[arg(long, value_name = "N", default_value_t = 256)]
    chunk: usize,
    /// Cargo says so
    #[arg(long, hide = true)]
    bench: bool,
    #[command(flatten)]
    model: ModelArgs,
}

fn positions(text: &str) -> std::result::Result<Positions, String> {
    match text {
        "compact" => Ok(Positions::Compact),
        "original" => Ok(Positions::Original),
        _ => Err("compact or original".into()),
    }
}

fn main() -> ExitCode {
    locret_examples::run(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let runtime = args.model.load()?;
    let model = runtime.model();
    let most = args.sequences.iter().copied().max().unwrap_or(0);
    let mut caches = (0..most)
        .map(|i| cache(&*model, args, i))
        .collect::<Result<Vec<_>>>()?;
    let mut times = vec![Vec::new(); args.sequences.len()];
    let next = ids(args.steps * most, model.spec().vocab, 7);
    for next in next.chunks_exact(most.max(1)) {
        for (n, times) in args.sequences.iter().zip(&mut times) {
            let begun = Instant::now();
            decode(&*model, &mut caches[..*n], &next[..*n])?;
            times.push(begun.elapsed().as_secs_f64());
        }
    }
    println!(
        "{} units in {}, weights: {:?}",
        args.units, args.store, args.model.weights
    );
    println!("sequences  ms a step  tokens/s  times the first");
    let mut first = None;
    for (n, times) in args.sequences.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let step = times[times.len() / 2];
        let rate = *n as f64 / step;
        let ratio = rate / *first.get_or_insert(rate);
        println!("{n:9}  {:9.2}  {rate:8.1}  {ratio:15.2}", 1e3 * step);
    }
    first_tokens(&runtime.model(), args)
}

/// A long prompt is read, and after every fourth chunk a short one comes.
fn first_tokens(model: &Arc<dyn CausalLm>, args: &Args) -> Result<()> {
    let policy: Arc<dyn KvCachePolicy> = Arc::new(Window::policy(Budget::Units(args.units)));
    let vocab = model.spec().vocab;
    let request = |tokens, generate, seed| {
        Request::new(ids(tokens, vocab, seed), policy.clone())
            .prefill(Prefill::new(args.chunk, 32))
            .cache(CacheOptions::new().dtype(args.store))
            .generate(Generate::greedy(generate))
    };
    let mut batch = Batch::new(model.clone(), Limits::new().rows(args.chunk))?;
    batch.submit(request(args.long, 0, 1), Box::new(|_| {}))?;
    let (mut chunks, mut firsts) = (Vec::new(), Vec::new());
    let mut passes = 0;
    loop {
        let begun = Instant::now();
        if !batch.step() {
            break;
        }
        passes += 1;
        if batch.load().running == 1 {
            chunks.push(begun.elapsed().as_secs_f64());
        }
        if passes % 4 != 0 || batch.load().running == 0 {
            continue;
        }
        let there = Arc::new(AtomicBool::new(false));
        let heard = there.clone();
        let sink = move |event| {
            if matches!(event, Event::Token(_)) {
                heard.store(true, Ordering::Relaxed);
            }
        };
        let begun = Instant::now();
        batch.submit(request(args.short, 1, 2), Box::new(sink))?;
        while !there.load(Ordering::Relaxed) && batch.step() {}
        firsts.push(begun.elapsed().as_secs_f64());
    }
    for times in [&mut chunks, &mut firsts] {
        times.sort_by(f64::total_cmp);
    }
    let (Some(most), false) = (firsts.last(), chunks.is_empty()) else {
        return Ok(());
    };
    let (chunk, first) = (chunks[chunks.len() / 2], firsts[firsts.len() / 2]);
    println!(
        "first token of {} tokens beside {}: {:.0} ms, at most {:.0}, of {} times; a chunk of {}: {:.0} ms; \
         {:.2} chunks, at most {:.2}",
        args.short,
        args.long,
        1e3 * first,
        1e3 * most,
        firsts.len(),
        args.chunk,
        1e3 * chunk,
        first / chunk,
        most / chunk
    );
    Ok(())
}

/// A sequence that has read a text and kept some units of it.
fn cache(model: &dyn CausalLm, args: &Args, i: usize) -> Result<SequenceCache> {
    let policy = Window::policy(Budget::Units(args.units)).with_positions(args.positions);
    let policy = Arc::new(policy);
    let options = CacheOptions::new().dtype(args.store);
    let mut cache = SequenceCache::new(model.spec(), policy, model.compute(), options)?;
    let text = ids(args.units + 1 + 37 * i % 256, model.spec().vocab, i as u64);
    let total = text.len();
    for chunk in text.chunks(512) {
        let last = cache.seen() + chunk.len() == total;
        let step = cache.step(Phase::Prefill { last }, chunk.len(), total);
        let mut pass = Pass::new([step])?;
        forward(model, chunk, &mut pass)?;
        pass.finish(None)?;
    }
    Ok(cache)
}

/// One more token of each sequence, and what comes after it.
fn decode(model: &dyn CausalLm, caches: &mut [SequenceCache], next: &[u32]) -> Result<()> {
    let steps = caches.iter_mut().map(|cache| {
        let total = cache.seen() + 1;
        cache.step(Phase::Decode, 1, total)
    });
    let mut pass = Pass::new(steps)?;
    let hidden = forward(model, next, &mut pass)?;
    pass.finish(None)?;
    black_box(model.logits(hidden)?);
    Ok(())
}
