//! Files that weights and settings come in.

pub(crate) mod gguf;
pub(crate) mod gguf_weights;
pub(crate) mod json;
mod mapped;
pub(crate) mod safetensors;
