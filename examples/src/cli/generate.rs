//! Text from a model whose cache a policy keeps small.

use crate::{
    Error, Result,
    args::{ModelArgs, PolicyArgs, PrefillArgs, PromptArgs, SamplingArgs},
    progress::{Progress, Unit},
    report, with_shipped_heads,
};
use clap::Parser;
use locret_core::{Generate, Session};
use locret_policies::query_first;
use std::{io::Write, path::Path};

/// Reads a prompt in a bounded cache and goes on with it
#[derive(Debug, Parser)]
pub struct Args {
    #[command(flatten)]
    prompt: PromptArgs,
    /// At most this many tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_new: usize,
    /// Locret-Q: put the prompt's last N tokens, its question, before it, too
    #[arg(long, value_name = "N", default_value_t = 0)]
    query_aware: usize,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    prefill: PrefillArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// The example; the text goes to `out`.
///
/// # Errors
/// Those of its parts.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let config = args.policy.config()?;
    let runtime = args.model.load()?;
    let config = with_shipped_heads(config, &runtime);
    let mut ids = args.prompt.ids(&runtime)?;
    if args.query_aware > 0 {
        let begin = runtime.frame(None)?.begin;
        let after = runtime.count(&begin)?;
        ids = query_first(&ids, &ids, args.query_aware, after);
    }
    runtime.note_length(ids.len());
    let model = runtime.model();
    let policy = config.build_for(&*model)?;
    let mut session = Session::with_options(model, policy, args.prefill.cache())?;

    let mut bar = Progress::new("reading", Some(ids.len() as u64), Unit::Tokens);
    session.prefill_with(&ids, &args.prefill.prefill(), &mut |chunk| {
        bar.set(chunk.done as u64);
        Ok(())
    })?;
    bar.finish();

    let stop = runtime.end_of_turn()?;
    let generate = Generate::greedy(args.max_new)
        .stop_at(stop.iter().copied())
        .sampling(args.sampling.sampling());
    let mut text = runtime.tokenizer()?.decode_stream(true);
    let written = |e| Error::write(Path::new("standard output"), e);
    for id in session.generate(generate)? {
        let id = id?;
        if stop.contains(&id) {
            break;
        }
        // A character of several tokens comes out when its last one does.
        let piece = text.push(id);
        out.write_all(piece.as_bytes()).map_err(written)?;
        out.flush().map_err(written)?;
    }
    writeln!(out, "{}", text.finish()).map_err(written)?;
    runtime.note_length(session.tokens().len());
    eprintln!("\n{}", report::session(&session));
    Ok(())
}
