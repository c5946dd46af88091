//! Methods that give every unit a score, one file each, and what they share.

mod h2o;
mod key_diff;
mod key_norm;
mod observed;
mod random;
mod sirllm;
mod snapkv;
mod tova;
mod window;

pub use h2o::H2o;
pub use key_diff::KeyDiff;
pub use key_norm::KeyNorm;
pub use random::Random;
pub use sirllm::SirLlm;
pub use snapkv::SnapKv;
pub use tova::Tova;
pub use window::Window;
