//! Language models over `locret-core`'s bounded cache.
#![deny(missing_docs)]

mod config;
mod decoder;
mod encoding;
mod error;
mod gguf;
mod gguf_weights;
mod json;
mod linear;
mod load;
mod mapped;
mod safetensors_dir;
mod weights;

pub use config::{Family, ModelConfig};
pub use decoder::{Decoder, DecoderConfig, Layout};
pub use encoding::Encoding;
pub use error::{ModelError, Result};
pub use gguf::{Array, Gguf, GgufTensor, Value};
pub use gguf_weights::GgufWeights;
pub use load::{LoadOptions, LoadedModel, ModelFiles, load_model};
pub use safetensors_dir::SafetensorsDir;
pub use weights::{Loader, TensorInfo, WeightDtype, Weights};
