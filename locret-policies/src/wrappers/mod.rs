//! Policies around any other policy.

mod merge;
mod quantized;

pub use merge::Merge;
pub use quantized::Quantized;
