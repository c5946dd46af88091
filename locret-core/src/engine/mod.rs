//! What carries out the contract: caches, passes over them, and sessions on top.

mod batch;
mod cache;
mod lists;
mod pass;
mod plan;
mod prefix;
mod probe;
mod rope;
mod sample;
mod session;
mod snapshot;
mod snapshots;

pub use batch::{
    Batch, Batcher, End, Ended, Event, Handle, Kept, Limits, Load, Request, SequenceId, Sink, TURN,
};
pub use cache::{CacheOptions, Peak, SequenceCache};
pub(crate) use lists::Lists;
pub use pass::{Pass, SequenceStep, forward};
pub use plan::{Plan, plan, plan_layers};
pub use prefix::{PrefixCache, PrefixStats};
pub use probe::{Births, ChunkDone, Decided, OnChunk, Probe};
pub(crate) use rope::Rope;
pub use rope::{LongRopeSwitch, RopeConfig, RopeScaling};
pub use sample::{Sampler, Sampling, argmax};
pub use session::{Generate, Prefill, Report, Session, TokenScore, Tokens};
pub use snapshots::{Folder, SnapshotStore, Stored};
