//! What every policy, store and model adapter must satisfy, as functions for tests to call.
//!
//! The engine keeps its promises only as long as what is plugged into it keeps them too. This
//! module states these promises ([`Promise`]) and checks them:
//!
//! | you wrote | call |
//! |---|---|
//! | a [`KvCachePolicy`](crate::KvCachePolicy) or a [`Scorer`](crate::Scorer) | [`check_policy`] |
//! | a [`KvStore`](crate::KvStore) | [`check_store`] |
//! | a [`CausalLm`](crate::CausalLm) | [`check_adapter`] |
//! | a [`Compute`](crate::Compute) | [`check_compute`]; with lists of units of its own [`check_lists`], too |
//!
//! Each returns a [`ConformanceError`] that names the broken promise, the case in which it broke
//! (with the seed that makes it again) and what was found, so that a test is one `unwrap`:
//!
//! ```no_run
//! use locret_core::{conformance::*, *};
//! use std::sync::Arc;
//!
//! # #[derive(Debug)] struct KeyNorm;
//! # impl Scorer for KeyNorm {
//! #     fn name(&self) -> String { "key-norm".into() }
//! #     fn score(&self, _: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
//! #         units.score_heads(|h| Ok(units.keys(h)?.into_tensor().square().sum_dim(1)))
//! #     }
//! # }
//! let device = burn::tensor::Device::default();
//! check_policy(&device, &PolicyCheck::default(), |case| {
//!     let evict = Evict::new(KeyNorm, Budget::Units(case.budget));
//!     Arc::new(evict.with_positions(case.positions).while_decoding(case.decode))
//! })
//! .unwrap();
//! ```
//!
//! The parts are public, for tests that ask more: [`RandomModel`], a small random decoder of any
//! dimensions; [`Oracle`], the same model in plain loops with full attention over an explicit list
//! of kept positions; [`Recording`], a policy that keeps a protocol of another one's verdicts; and
//! [`Tap`], a model that keeps the hidden states of another one.
//!
//! Turn on the feature `conformance` for tests only.

mod adapter;
mod compute;
mod listing;
mod lists;
mod model;
mod oracle;
mod policy;
mod record;
mod store;

pub use adapter::{AdapterCheck, check_adapter};
pub use compute::check_compute;
pub use listing::Listing;
pub use lists::{PlainLists, check_lists};
pub use model::{RandomModel, small_spec};
pub use oracle::{Oracle, OraclePass};
pub use policy::{Case, PolicyCheck, check_policy};
pub use record::{Decision, Recording, Seen, Tap, Tapped};
pub use store::{StoreCheck, check_store};

use crate::Error;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fmt;

/// Tensors whose numbers this process has copied to slices so far: on a GPU each of them waits for the device.
pub fn tensors_read() -> usize {
    crate::host::READ.load(std::sync::atomic::Ordering::Relaxed)
}

/// A check that did not succeed.
///
/// `Debug` prints the same sentences as `Display`, so that `unwrap` in a test is readable.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum ConformanceError {
    /// A promise is broken.
    #[error(
        "{subject} breaks a promise\n  promised: {promise}\n  case:     {case}\n  found:    {found}"
    )]
    Broken {
        /// The policy, store or adapter.
        subject: String,
        /// The promise.
        promise: Promise,
        /// The case, with the seed that makes it again.
        case: String,
        /// What was found instead.
        found: String,
    },
    /// Something returned an error where none is due.
    #[error("{subject} fails\n  case:     {case}\n  error:    {source}")]
    Failed {
        /// The policy, store or adapter.
        subject: String,
        /// The case, with the seed that makes it again.
        case: String,
        /// The error.
        source: Box<Error>,
    },
    /// The check itself was asked for something impossible.
    #[error("this check cannot run: {0}")]
    Unusable(String),
}

impl fmt::Debug for ConformanceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is promised. The text of each is the promise itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Promise {
    /// Policies.
    #[error("after a chunk of a prompt no head holds more units than the policy's limit")]
    Bound,
    /// Policies.
    #[error(
        "while a prompt is read a head keeps as many units as its limit allows, and in the tail, in \
         forced text and (without eviction while decoding) in generated text nothing is dropped"
    )]
    FillsBudget,
    /// Policies.
    #[error("the positions kept are strictly ascending, and were held before or are new")]
    Subset,
    /// Policies and stores.
    #[error(
        "a unit is what was appended, and stays so bit for bit; only when a step is over may a \
         store of few bits change its form"
    )]
    Survivors,
    /// Policies and stores.
    #[error("a value that others were mixed into is that mixture, and nothing else has changed")]
    Mixture,
    /// Policies, and the engine below them.
    #[error("hidden states are those of full attention over exactly the units that were kept")]
    Oracle,
    /// The engine.
    #[error("a policy is shown what attention computed")]
    View,
    /// Policies.
    #[error("a budget that is never reached gives what a full cache gives")]
    LikeFull,
    /// Policies and adapters.
    #[error("the same input gives the same result, whatever other sequences do")]
    Deterministic,
    /// Policies and stores.
    #[error("a fork and its origin go on independently")]
    Fork,
    /// Policies.
    #[error("units that are chosen where they lie are those of the policy's verdicts")]
    Ranking,
    /// Policies, and the engine below them.
    #[error("the cache, its store and the verdicts agree on what is held")]
    Agreement,
    /// Policies, and the engine below them.
    #[error("the peak in units is the limit plus one chunk")]
    PeakUnits,
    /// Policies, and the engine below them.
    #[error("the peak in bytes is that of the units held")]
    PeakBytes,
    /// Stores.
    #[error("keys, values and lengths are those of what was appended and kept")]
    Content,
    /// Stores.
    #[error("tiles hold the same numbers as keys and values")]
    Tiles,
    /// Stores.
    #[error("turned keys are the turned ones, or nothing has changed")]
    TurnedKeys,
    /// Stores.
    #[error("units that are dropped are freed")]
    Freed,
    /// Stores.
    #[error("what does not fit is refused with an error, and changes nothing")]
    Refused,
    /// Stores.
    #[error(
        "what was written and read again is the same store, and anything else is refused and changes \
         nothing"
    )]
    Saved,
    /// Stores.
    #[error("the bytes of a plan are those of the store")]
    Growth,
    /// Whatever computes.
    #[error("results are those of plain loops")]
    Arithmetic,
    /// Adapters.
    #[error("hidden states are [tokens, hidden] and logits [tokens, vocab]")]
    Shapes,
    /// Adapters.
    #[error("hidden states and logits are finite")]
    Finite,
    /// Adapters.
    #[error("a prompt read in chunks gives what it gives in one pass")]
    ChunkInvariant,
    /// Adapters.
    #[error("each row of logits depends on its own hidden state alone")]
    RowWise,
    /// Adapters.
    #[error("queries, keys and values reach the cache before any position has entered them")]
    PositionFree,
    /// Adapters.
    #[error(
        "queries, keys and values are the matrix of `qkv_weight` times the input that goes with them"
    )]
    Projection,
    /// Adapters.
    #[error("every layer attends once, in order, and errors of the cache are passed on")]
    Layers,
}

/// Seeded choices.
#[derive(Debug)]
pub(crate) struct Dice(ChaCha8Rng);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// From `low` to `high`, both included.
    pub(crate) fn between(&mut self, low: usize, high: usize) -> usize {
        self.0.random_range(low..=high)
    }

    pub(crate) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.between(0, from.len() - 1)].clone()
    }

    pub(crate) fn chance(&mut self, p: f64) -> bool {
        self.0.random_bool(p)
    }

    /// Uniform, mean 0, variance 1.
    pub(crate) fn value(&mut self) -> f32 {
        let x: f32 = self.0.random();
        (2.0 * x - 1.0) * 3f32.sqrt()
    }

    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    pub(crate) fn ids(&mut self, n: usize, vocab: usize) -> Vec<u32> {
        (0..n).map(|_| self.between(0, vocab - 1) as u32).collect()
    }
}

/// The largest difference and where it is; a NaN on either side counts as infinite.
pub(crate) fn largest_difference(
    found: impl IntoIterator<Item = f64>,
    expected: impl IntoIterator<Item = f64>,
) -> (usize, f64) {
    let pairs = found.into_iter().zip(expected).enumerate();
    pairs.fold((0, 0.0), |(at, most), (i, (a, b))| {
        let off = if a == b { 0.0 } else { (a - b).abs() };
        let off = if off.is_nan() { f64::INFINITY } else { off };
        if off > most { (i, off) } else { (at, most) }
    })
}
