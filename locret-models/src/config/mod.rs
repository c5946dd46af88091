//! A model's hyper-parameters, from `config.json` or from a GGUF file.

mod gguf;
mod json;

use crate::{ModelError, Result};
use locret_core::{LongRopeSwitch, ModelSpec, RopeConfig, RopeScaling};
use std::path::Path;

/// Which kind of model a checkpoint is of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Llama 2 and 3, and models of the same layout such as SmolLM2.
    Llama,
    /// Phi-3, 3.5 and 4-mini with their fused projections.
    Phi3,
    /// Mistral: Llama's layout, with a sliding window in its first version.
    Mistral,
    /// Qwen2 and 2.5: Llama's layout with biases on q, k and v.
    Qwen2,
    /// Qwen3: Llama's layout with normalised heads of q and k.
    Qwen3,
    /// Another one, as the file names it. For adapters outside this crate.
    Other(String),
}

impl Family {
    fn new(name: &str) -> Self {
        match name {
            "llama" => Self::Llama,
            "phi3" => Self::Phi3,
            "mistral" => Self::Mistral,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// Hyper-parameters of a decoder-only transformer, checked.
///
/// The same for both file formats.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The kind of model.
    pub family: Family,
    /// Features of the hidden state.
    pub hidden: usize,
    /// Features inside the feed-forward part.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of one head; even.
    pub head_dim: usize,
    /// Tokens in the vocabulary, padding rows of the embedding included.
    pub vocab: usize,
    /// Added to the mean square in normalisations.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// The length that the model was made for, in tokens.
    pub max_positions: usize,
    /// The embedding is the output matrix too.
    pub tied_embeddings: bool,
    /// Attention sees this many of the newest tokens only.
    pub sliding_window: Option<usize>,
    /// q, k and v have biases.
    pub attention_bias: bool,
    /// The output projection of attention has a bias.
    pub output_bias: bool,
    /// Each head of q and k is normalised before it is rotated.
    pub head_norms: bool,
    /// The feed-forward matrices have biases.
    pub mlp_bias: bool,
    /// The activation, `silu` for example.
    pub activation: String,
    /// The token before every text, if any.
    pub bos: Option<u32>,
    /// The tokens that end a text or a turn, as the configuration lists them, those that the vocabulary
    /// has.
    pub eos: Vec<u32>,
}

/// Upper bounds of what is taken for a model and not for a damaged file.
mod limits {
    pub(super) const FEATURES: usize = 1 << 22;
    pub(super) const LAYERS: usize = 1 << 12;
    pub(super) const HEADS: usize = 1 << 14;
    pub(super) const HEAD_DIM: usize = 1 << 14;
    pub(super) const VOCAB: usize = 1 << 24;
    pub(super) const POSITIONS: usize = 1 << 32;
}

impl ModelConfig {
    /// What the engine has to know: dimensions, scale `1 / √d`, rotation.
    pub fn spec(&self) -> ModelSpec {
        ModelSpec::new(
            self.layers,
            self.heads,
            self.kv_heads,
            self.hidden,
            self.vocab,
        )
        .with_head_dim(self.head_dim)
        .with_rope(self.rope.clone())
        .with_max_positions(Some(self.max_positions))
        .with_attention_window(self.binding_window())
    }

    /// A sliding window that is narrower than the context, so that it changes results.
    pub fn binding_window(&self) -> Option<usize> {
        self.sliding_window.filter(|&w| w < self.max_positions)
    }

    /// LongRoPE with its long factors at every length, as the authors of Locret run it.
    #[must_use]
    pub fn always_long(mut self) -> Self {
        if let RopeScaling::LongRope { switch, .. } = &mut self.rope.scaling {
            *switch = LongRopeSwitch::AlwaysLong;
        }
        self
    }

    fn validate(&self, path: &Path) -> Result<()> {
        use limits::*;
        for (what, n, max) in [
            ("hidden size", self.hidden, FEATURES),
            ("intermediate size", self.intermediate, FEATURES),
            ("number of layers", self.layers, LAYERS),
            ("number of heads", self.heads, HEADS),
            ("number of KV heads", self.kv_heads, HEADS),
            ("head dimension", self.head_dim, HEAD_DIM),
            ("vocabulary size", self.vocab, VOCAB),
            ("context length", self.max_positions, POSITIONS),
            (
                "sliding window",
                self.sliding_window.unwrap_or(POSITIONS),
                POSITIONS,
            ),
        ] {
            if n == 0 || n > max {
                return Err(ModelError::config(path, what, format!("1 to {max}"), n));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ModelError::config(
                path,
                "number of KV heads",
                format!("a divisor of the {} query heads", self.heads),
                self.kv_heads,
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::config(
                path,
                "head dimension",
                "an even number (its halves are rotated)",
                self.head_dim,
            ));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(ModelError::config(
                path,
                "rms_norm_eps",
                "a finite number from 0 on",
                self.rms_norm_eps,
            ));
        }
        self.spec()
            .validate()
            .map_err(|e| ModelError::config(path, "rotary settings", "a valid rotation", e))
    }
}

/// The head dimension where no key gives it.
fn head_dim(path: &Path, hidden: usize, heads: usize) -> Result<usize> {
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(ModelError::config(
            path,
            "number of heads",
            format!("a divisor of the hidden size {hidden}, where no head dimension is given"),
            heads,
        ));
    }
    Ok(hidden / heads)
}

/// How many features are rotated.
fn rotary_dim(path: &Path, head_dim: usize, fraction: f64) -> Result<usize> {
    if !(fraction > 0.0 && fraction <= 1.0) {
        return Err(ModelError::config(
            path,
            "partial_rotary_factor",
            "more than 0 and at most 1",
            fraction,
        ));
    }
    Ok((head_dim as f64 * fraction) as usize)
}

/// The factor on cosines and sines of LongRoPE (arXiv 2402.13753, as transformers has it):
/// `√(1 + ln(factor) / ln(original))`.
fn long_rope_attention(factor: f64, original: usize) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        (1.0 + factor.ln() / (original as f64).ln()).sqrt()
    }
}
