//! From a command line to what is served.

use crate::{App, Args, Places, Result, Served, store};
use locret_core::Limits;
use locret_examples::{runtime::Runtime, with_shipped_heads};

/// Bytes for what sequences begin with, unless that is much of what there is.
const PREFIXES: usize = 64 << 20;

impl App {
    /// Fetches the model if need be, loads it, and makes a batch over it.
    ///
    /// # Errors
    /// Those of its parts.
    pub fn load(args: &Args) -> Result<Self> {
        let config = args.policy.config()?;
        let runtime = Runtime::load(&args.model)?;
        let config = with_shipped_heads(config, &runtime);
        let served = Served::new(args.model.model.clone(), &runtime)?;
        let limits = Limits::new()
            .running(args.running)
            .waiting(args.queue)
            .rows(args.prefill.chunk)
            .memory(args.memory_cap.unwrap_or(usize::MAX));
        let reading = (args.prefill.prefill(), args.prefill.cache());
        let places = Places {
            sessions: args.sessions.as_deref().map(store::open).transpose()?,
            spill: args.spill.as_deref().map(store::open).transpose()?,
            prefixes: args.prefixes.unwrap_or(match args.memory_cap {
                Some(cap) => PREFIXES.min(cap / 8),
                None => PREFIXES,
            }),
        };
        Self::new(served, limits, config, reading, args.settings(), places)
    }
}

impl Served {
    /// A loaded model under a name.
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) if its files have no tokenizer, or a damaged one.
    pub fn new(name: String, runtime: &Runtime) -> Result<Self> {
        let files = &runtime.loaded.files;
        Ok(Self {
            name,
            model: runtime.model(),
            tokenizer: files.tokenizer()?,
            template: files.chat_template()?,
            stop: runtime.end_of_turn()?,
        })
    }
}
