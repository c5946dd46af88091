//! Policies around any other policy.

mod merge;
mod put_away;
mod quantized;
mod tiered;

pub use merge::Merge;
pub use put_away::PutAway;
pub use quantized::Quantized;
pub use tiered::Tiered;
