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
//! - [`SequenceCache`]: owns keys, values, positions and scores, rotates, attends, evicts, and
//!   counts the bytes.
//! - [`KvStore`]: how units are kept in memory.
//! - [`Session`]: reads prompts, generates text, reports.
//!
//! It names no policy, no model and no backend of Burn. Where a device's tensors lie in host memory
//! the [`kernels`] compute; elsewhere Burn's operations do.
#![deny(missing_docs)]

mod attention;
mod budget;
mod cache;
mod error;
mod evict;
mod host;
#[doc(hidden)]
pub use locret_kernels as kernels;
mod model;
mod policy;
mod quantized;
mod rope;
mod sample;
mod session;
mod spec;
mod store;
mod units;

#[cfg(feature = "conformance")]
pub mod conformance;

pub use budget::{Budget, DecodeEviction, Guard};
pub use cache::{CacheOptions, Kernels, Peak, SequenceCache, ids_tensor};
pub use error::{Error, Result};
pub use evict::Evict;
pub use host::{from_f32, into_f32, is_host_device};
pub use model::CausalLm;
pub use policy::{
    Keep, KvCachePolicy, Needs, Observation, Observe, Phase, Positions, Queries, Scorer, Step,
    Verdict,
};
pub use quantized::{QuantLayout, Quantization, QuantizedStore};
pub use rope::{LongRopeSwitch, RopeConfig, RopeScaling};
pub use sample::{Sampler, Sampling, argmax};
pub use session::{ChunkDone, Generate, OnChunk, Prefill, Report, Session, TokenScore, Tokens};
pub use spec::{LayerSpec, ModelSpec};
pub use store::{Dense, Fold, KvDtype, KvStore, Placement, TurnKeys};
pub use units::{LayerInput, LayerUnits, Observed, Qkv, Scores, Selection};
