//! Long contexts in a bounded key-value cache.
//!
//! A prompt goes through a language model chunk by chunk. After every chunk each layer keeps only
//! the units that a *policy* judges worth keeping, so that memory is `budget + chunk`, whatever the
//! length. (A *unit* is one key and one value of one KV head.)
//!
//! This crate is the contract and the engine:
//!
//! - [`KvCachePolicy`] and [`Scorer`]: what stays. Policies own nothing; `locret-policies` has
//!   Locret's retaining heads and the methods it is compared with.
//! - [`CausalLm`] and [`ModelSpec`]: what a model must offer; `locret-models` has Llama and Phi-3.
//! - [`Compute`]: where things are computed, with the CPU kernels ([`Host`]) or with Burn's operations
//!   ([`Ops`]); [`Rows`]: what goes in and comes out, wherever it lies.
//! - [`SequenceCache`]: owns keys, values, positions and scores of one sequence, and counts the bytes.
//! - [`Pass`]: one step of one or several sequences through a model; [`Probe`] watches it.
//! - [`KvStore`]: how units are kept in memory.
//! - [`Session`]: reads prompts, generates text, reports, is saved and taken up again; [`plan`] says
//!   before what that will take.
//! - [`PrefixCache`]: what many sequences begin with, read once; [`SnapshotStore`]: where snapshots are
//!   kept.
//!
//! It names no policy, no model and no backend of Burn.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod compute;
mod contract;
mod engine;
mod host;
mod stores;

#[cfg(feature = "conformance")]
pub mod conformance;

pub use compute::{
    Activations, Attention, Compute, DeviceMap, Host, KeptUnits, Kernels, Matrix, Ops, Perceptron,
    Rotation, Rows, Sight, TableRows, UnitLists, Weight, compute, layer_compute, usable,
};
#[doc(hidden)]
pub use compute::{check_factors, check_parts, check_product, check_tokens, divided, no_row};
pub use contract::{
    Best, Budget, BudgetTable, CausalLm, DecodeEviction, Error, Evict, Guard, Held, Keep,
    KvCachePolicy, LayerSpec, LayerUnits, ModelSpec, Needs, Observation, Observe, Observed, Part,
    PastContext, Phase, Positions, Qkv, Queries, Ranking, Result, Scorer, Scores, Selection, Share,
    SnapshotError, Step, Survey, Verdict, Visible,
};
pub use engine::{
    Batch, Batcher, Births, CacheOptions, ChunkDone, Decided, End, Ended, Event, Folder, Generate,
    Handle, Kept, Limits, Load, LongRopeSwitch, OnChunk, Pass, Peak, Plan, Prefill, PrefixCache,
    PrefixStats, Probe, Report, Request, RopeConfig, RopeScaling, Sampler, Sampling, SequenceCache,
    SequenceId, SequenceStep, Session, Sink, SnapshotStore, Stored, TURN, TokenScore, Tokens,
    argmax, forward, plan, plan_layers,
};
#[doc(hidden)]
pub use host::{caught, waited};
pub use host::{from_f32, ids_tensor, into_f32, is_host_device};
#[doc(hidden)]
pub use locret_kernels as kernels;
pub use locret_kernels::{
    dtype::DType,
    rope::RopeTable,
    tiles::{Floats, KvTiles},
    visible::{View, Views},
};
#[doc(hidden)]
pub use stores::{
    CodedHead, CodedPart, check_append, check_folds, check_retain, dense_name, folded,
};
pub use stores::{
    Dense, Fold, Growth, KvStore, Placement, QuantLayout, Quantization, QuantizedStore, Room,
    Scratch, Spilled, Tier, TurnKeys,
};
