//! What the engine has to know of a model.

use crate::{Error, Result, rope::RopeConfig};

/// The dimensions of a decoder-only model, and how it encodes positions.
///
/// This and one call of [`SequenceCache::attend`](crate::SequenceCache::attend) per layer are all
/// that an adapter shares with the engine.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Decoder layers.
    pub layers: usize,
    /// Query heads, `H`.
    pub heads: usize,
    /// Key-value heads, `G`; divides `heads`.
    pub kv_heads: usize,
    /// Features of one head, `d`.
    pub head_dim: usize,
    /// Features of the hidden state.
    pub hidden: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// The factor on `q · k` before the softmax; usually `1 / √d`.
    pub softmax_scale: f32,
    /// The length that the model was trained for, in tokens, where it is known.
    pub max_positions: Option<usize>,
    /// Rotary position embedding.
    pub rope: RopeConfig,
}

impl ModelSpec {
    /// Checks that the dimensions are possible.
    ///
    /// # Errors
    /// [`Error::Setting`] for a zero, a `kv_heads` that does not divide `heads`, a scale that is
    /// not finite and positive, or an impossible [`RopeConfig`].
    pub fn validate(&self) -> Result<()> {
        for (what, n) in [
            ("layers", self.layers),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("hidden", self.hidden),
            ("vocab", self.vocab),
        ] {
            if n == 0 {
                return Err(Error::setting(what, "at least 1", n));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::setting(
                "kv_heads",
                format!("a divisor of the {} query heads", self.heads),
                self.kv_heads,
            ));
        }
        if !(self.softmax_scale.is_finite() && self.softmax_scale > 0.0) {
            return Err(Error::setting(
                "softmax_scale",
                "a positive number",
                self.softmax_scale,
            ));
        }
        self.rope.validate(self.head_dim)
    }

    /// The layer at `index`.
    pub fn layer(&self, index: usize) -> LayerSpec {
        LayerSpec {
            index,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        }
    }

    /// Bytes of one unit (the key and the value of one KV head) at `bytes_per_value`.
    pub fn unit_bytes(&self, bytes_per_value: usize) -> usize {
        2 * self.head_dim * bytes_per_value
    }

    /// Bytes of a full cache of `tokens` tokens over all layers and heads.
    pub fn full_cache_bytes(&self, tokens: usize, bytes_per_value: usize) -> usize {
        self.layers * self.kv_heads * tokens * self.unit_bytes(bytes_per_value)
    }
}

/// One layer's dimensions, as a policy or a store sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerSpec {
    /// Which layer, from 0.
    pub index: usize,
    /// Layers in the model.
    pub layers: usize,
    /// Query heads, `H`.
    pub heads: usize,
    /// Key-value heads, `G`.
    pub kv_heads: usize,
    /// Features of one head, `d`.
    pub head_dim: usize,
}

impl LayerSpec {
    /// Query heads that share one KV head, `g = H / G`.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Features of a retaining head's input, `(H + 2G) · d`.
    pub fn qkv_features(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}
