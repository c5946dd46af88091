//! Methods that give every unit a score, one file each, and what they share.

mod compactor;
mod cur;
mod expected_attention;
mod fast_kvzip;
mod h2o;
mod heavy;
mod key_diff;
mod key_norm;
mod kvzap;
mod lagkv;
pub(crate) mod observed;
mod q_filters;
mod random;
mod sirllm;
mod snapkv;
mod tova;
mod window;

pub use compactor::Compactor;
pub use cur::Cur;
pub use expected_attention::ExpectedAttention;
pub use fast_kvzip::FastKvZip;
pub use h2o::H2o;
pub use heavy::Heavy;
pub use key_diff::KeyDiff;
pub use key_norm::KeyNorm;
pub use kvzap::KvZap;
pub use lagkv::LagKv;
pub use q_filters::{QFilterProbe, QFilters};
pub use random::Random;
pub use sirllm::SirLlm;
pub use snapkv::SnapKv;
pub use tova::Tova;
pub use window::Window;

/// Shares of `exp(logit)`, by logit.
fn softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|x| (x - most).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|x| x / sum).collect()
}
