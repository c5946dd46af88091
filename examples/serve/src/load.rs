//! From a command line to what is served.

use crate::{App, Args, Result, Served};
use locret_core::Limits;
use locret_examples::{runtime::Runtime, with_shipped_heads};

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
        Self::new(served, limits, config, reading, args.settings())
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
