//! Training of Locret's retaining heads for a model (arXiv 2410.01805 §3.2), on the machine at hand.
//!
//! The backbone is frozen and a head sees one layer only, so the work falls into two halves that
//! never meet:
//!
//! 1. [`collect`] reads each [`Sample`] through the engine with a full cache, then forces its
//!    answers on forks of that cache. Each layer's `[q; k; v]` (what a head will see) and each
//!    unit's *label* (how much the answers looked at it) go to disk, one file a sample.
//! 2. [`train`] fits one layer's head after another to those files.
//!
//! Both can be stopped at any moment, by a kill too, and go on where they were when they are called
//! again with the same settings; the result is the same as without the stop.
//!
//! ```no_run
//! # fn demo(model: &dyn locret_core::CausalLm, prompt: Vec<u32>, query: Vec<u32>, answer: Vec<u32>,
//! #         autodiff: &burn::tensor::Device) -> Result<(), Box<dyn std::error::Error>> {
//! use locret_core::DType;
//! use locret_policies::training::*;
//! use std::{ops::ControlFlow, path::Path};
//!
//! let samples = vec![Sample { prompt, answers: vec![Answer { query, answer }] }];
//! let work = Path::new("training");
//! let go_on = ControlFlow::Continue(());
//! let shards = collect(model, &samples, work, &CollectConfig::default(), &mut |_| go_on)?;
//! let shards = shards.expect("nothing stops it");
//! let trained = train(&shards, work, &TrainConfig::default(), autodiff, &|_| go_on)?;
//! trained.expect("nothing stops it").heads.save("heads.safetensors", DType::F16)?;
//! # Ok(()) }
//! ```

mod collect;
mod fit;
#[cfg(test)]
mod golden;
mod head;
mod labels;
mod metrics;
mod sample;
mod shards;

pub use collect::{CollectConfig, CollectProgress, collect};
pub use fit::{LayerReport, TrainConfig, TrainProgress, Trained, epochs_within, train};
pub use head::{Distance, HeadTrainer, Loss, Target};
pub use labels::{LabelKind, LabelOptions, labels};
pub use metrics::{Metrics, RECALL_AT, pearson, recall_at};
pub use sample::{Answer, Repetition, Sample};
pub use shards::{InputDtype, Shard, ShardLayer, Shards, Split};

/// FNV-1a over `bytes`, from `state`: tells settings and data apart; not a cryptographic hash.
fn fingerprint(state: u64, bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(state, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The state that a [`fingerprint`] starts from.
const FINGERPRINT: u64 = 0xcbf2_9ce4_8422_2325;
