//! Key-value cache eviction policies behind one trait: Locret's retaining heads and the methods
//! that it is compared with.
//!
//! | policy | keeps | needs | paper |
//! |---|---|---|---|
//! | [`Full`] | everything | | |
//! | [`Window`] | the beginning and the newest units | | StreamingLLM, 2309.17453 |
//! | [`Random`] | units drawn by lot | | |
//! | [`KeyNorm`] | small keys | keys | 2406.11430 |
//! | [`KeyDiff`] | keys unlike the others | keys | 2504.15364 |
//! | [`SirLlm`] | tokens that the model did not expect | logits of every token | 2405.12528 |
//! | [`Locret`] | what trained heads predict to matter | q, k, v | 2410.01805 |
//! | [`H2o`] | what attention has gone to | attention of every query | 2306.14048 |
//! | [`SnapKv`] | what the last queries look at | attention of the last queries | 2404.14469 |
//! | [`Tova`] | what the last query looks at | attention of the last query | 2401.06104 |
//! | [`ExpectedAttention`] | what queries to come will look at | q, k, v; keys and values | 2510.00636 |
//! | [`LagKv`] | units unlike what follows them | keys and values, once | 2504.04704 |
//! | [`Cur`] | keys and values that are large among their neighbours | q, k, v | CurDKV, 2509.15038 |
//! | [`QFilters`] | keys that point where queries do | keys | 2503.02812 |
//! | [`Compactor`] | keys that stand out, and what a chunk looks at | q, k, v | 2507.08143 |
//! | [`KvZap`] | what heads guess a repetition would look at | the layer's input | 2601.07891 |
//! | [`FastKvZip`] | the same, by gates | the layer's input | 2601.17668 |
//! | [`D2o`] | what attention has gone to; what is dropped is folded into the like | attention of every query; keys | 2406.13035 |
//! | [`Cam`] | the beginning and the newest units; what is dropped is spread over those | attention of every query; values | ICML 2024 |
//! | [`DuoAttention`] | everything in some heads, a window in others | a table of heads | 2410.10819 |
//! | [`MInference`] | everything; prompts see a part of it | attention of a chunk's last queries | 2407.02490 |
//! | [`InfLlm`] | everything; distant blocks are retrieved | attention of every query | 2402.04617 |
//!
//! All but [`Full`], [`DuoAttention`], [`MInference`] and [`InfLlm`] are a [`Scorer`](locret_core::Scorer) inside an [`Evict`](locret_core::Evict),
//! so that budgets, protected units, positions and eviction while decoding are the same for all, and
//! any of them can share its budget out over layers ([`Evict::pyramid`](locret_core::Evict::pyramid))
//! and heads ([`Evict::ada`](locret_core::Evict::ada)); [`D2o`] and [`Cam`] go around one ([`Heavy`], [`Window`]). [`Critical`] and
//! [`ChunkKv`] go around any scorer and choose by more than its scores. Wrappers go around any policy:
//! [`Quantized`] keeps units as small integers, [`Merge`], [`D2o`] and [`Cam`] fold what is dropped into what is kept, [`PutAway`] retrieves
//! what was dropped, [`Sparse`] lets prompts see a part of what is kept, and [`Tiered`] puts units away that are not needed at the moment.
//! [`PolicyConfig`] is all of that as configuration.
#![deny(missing_docs)]

mod blocks;
mod config;
mod duo;
mod error;
mod full;
mod infllm;
pub mod locret;
pub mod minference;
mod published;
mod scorers;
mod threshold;
#[cfg(feature = "training")]
pub mod training;
mod wrappers;

pub use config::{Method, PolicyConfig, TableConfig, TierConfig};
pub use duo::DuoAttention;
pub use error::{PolicyError, Result};
pub use full::Full;
pub use infllm::InfLlm;
pub use locret::{
    Gate, HeadAdvice, HeadForm, HeadInput, HeadWeights, LayerHead, Locret, RetainingHeads,
    query_first,
};
pub use minference::MInference;
pub use scorers::{
    Compactor, Cur, ExpectedAttention, FastKvZip, H2o, Heavy, KeyDiff, KeyNorm, KvZap, LagKv,
    QFilterProbe, QFilters, Random, SirLlm, SnapKv, Tova, Window,
};
pub use threshold::Threshold;
pub use wrappers::{
    Cam, CamKeeps, ChunkKv, Critical, D2o, D2oForm, Merge, MergeBy, OutputNorms, PutAway,
    Quantized, Sparse, Tiered,
};
