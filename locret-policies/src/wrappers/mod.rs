//! Policies around any other policy.

mod cam;
mod chunk_kv;
mod critical;
mod d2o;
mod merge;
mod nearest;
mod projection;
mod put_away;
mod quantized;
mod sparse;
mod tiered;

pub use cam::{Cam, CamKeeps};
pub use chunk_kv::ChunkKv;
pub use critical::Critical;
pub use d2o::{D2o, D2oForm};
pub use merge::{Merge, MergeBy};
pub use projection::OutputNorms;
pub use put_away::PutAway;
pub use quantized::Quantized;
pub use sparse::Sparse;
pub use tiered::Tiered;
