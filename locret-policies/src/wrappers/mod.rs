//! Policies around any other policy.

mod chunk_kv;
mod critical;
mod merge;
mod projection;
mod put_away;
mod quantized;
mod tiered;

pub use chunk_kv::ChunkKv;
pub use critical::Critical;
pub use merge::{Merge, MergeBy};
pub use projection::OutputNorms;
pub use put_away::PutAway;
pub use quantized::Quantized;
pub use tiered::Tiered;
