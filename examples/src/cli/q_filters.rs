//! Directions of a model's queries, measured.

use crate::{
    Result,
    args::{ModelArgs, PromptArgs},
    progress::{Progress, Unit},
};
use clap::Parser;
use locret_core::{Prefill, Session};
use locret_policies::{Full, QFilterProbe};
use std::{path::PathBuf, sync::Arc};

/// Reads a text, piece by piece, with a full cache, and writes where the queries of each head point
#[derive(Debug, Parser)]
pub struct Args {
    /// Where the directions go
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
    /// Tokens of a piece of the text, each of which is read from the beginning of a sequence
    #[arg(long, value_name = "N", default_value_t = 2048)]
    piece: usize,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// The example.
///
/// # Errors
/// Those of its parts.
pub fn run(args: &Args) -> Result<()> {
    let runtime = args.model.load()?;
    let ids = args.prompt.ids(&runtime)?;
    let pieces: Vec<&[u32]> = ids.chunks(args.piece.max(1)).collect();
    let mut bar = Progress::new("pieces", Some(pieces.len() as u64), Unit::Cases);
    let mut probe = QFilterProbe::new();
    for (done, piece) in pieces.iter().enumerate() {
        let mut session = Session::new(runtime.model(), Arc::new(Full::new()))?;
        session.prefill_watched(piece, &Prefill::new(512, 0), &mut probe)?;
        bar.set(done as u64 + 1);
    }
    bar.finish();
    probe.filters()?.save(&args.out)?;
    println!("{} tokens read: {}", ids.len(), args.out.display());
    Ok(())
}
