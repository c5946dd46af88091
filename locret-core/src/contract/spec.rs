//! What the engine has to know of a model.

use crate::{Error, Result, RopeConfig};
use serde::Serialize;
use std::fmt;

/// The dimensions of a decoder-only model, and how it encodes positions.
///
/// This and one call of [`Pass::attend`](crate::Pass::attend) per layer are all that an adapter shares
/// with the engine.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
#[must_use]
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
    /// The length that the model was trained for, in tokens, where it is known. Nothing stops there
    /// ([`past_context`](Self::past_context)).
    pub max_positions: Option<usize>,
    /// How many of the newest tokens the model attends to, where that is not all. A cache of kept units
    /// does not imitate such a window, so that sequences end with it.
    pub attention_window: Option<usize>,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Whether the adapter hands along what each layer makes q, k and v from
    /// ([`Qkv::made_from`](crate::Qkv::made_from)).
    pub layer_input: bool,
}

impl ModelSpec {
    /// A model of `layers` layers of `heads` query heads in groups that share one of `kv_heads` KV heads,
    /// with features `hidden` of the hidden state and `vocab` tokens.
    ///
    /// Heads have `hidden / heads` features, all of them rotated with a base of 10,000, and logits of
    /// attention are scaled by `1 / √head_dim`; see [`with_head_dim`](Self::with_head_dim),
    /// [`with_rope`](Self::with_rope), [`with_softmax_scale`](Self::with_softmax_scale).
    pub fn new(layers: usize, heads: usize, kv_heads: usize, hidden: usize, vocab: usize) -> Self {
        let spec = Self {
            layers,
            heads,
            kv_heads,
            head_dim: 0,
            hidden,
            vocab,
            softmax_scale: 1.0,
            max_positions: None,
            attention_window: None,
            rope: RopeConfig::plain(10_000.0, 0),
            layer_input: false,
        };
        spec.with_head_dim(hidden / heads.max(1))
    }

    /// Heads of another number of features than `hidden / heads`. All of them are rotated; logits are
    /// scaled by `1 / √head_dim`.
    pub fn with_head_dim(self, head_dim: usize) -> Self {
        Self {
            head_dim,
            softmax_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            rope: RopeConfig {
                rotary_dim: head_dim,
                ..self.rope
            },
            ..self
        }
    }

    /// Another rotary embedding.
    pub fn with_rope(self, rope: RopeConfig) -> Self {
        Self { rope, ..self }
    }

    /// Another factor on `q · k`.
    pub fn with_softmax_scale(self, softmax_scale: f32) -> Self {
        Self {
            softmax_scale,
            ..self
        }
    }

    /// The length that the model was trained for.
    pub fn with_max_positions(self, tokens: Option<usize>) -> Self {
        Self {
            max_positions: tokens,
            ..self
        }
    }

    /// A model that attends to so many of the newest tokens only.
    pub fn with_attention_window(self, tokens: Option<usize>) -> Self {
        Self {
            attention_window: tokens,
            ..self
        }
    }

    /// The adapter hands each layer's input along; see [`layer_input`](Self::layer_input).
    pub fn with_layer_input(self) -> Self {
        Self {
            layer_input: true,
            ..self
        }
    }

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

    /// What to tell whoever reads `tokens` tokens, if these are more than the model was made for.
    pub fn past_context(&self, tokens: usize) -> Option<PastContext> {
        let made_for = self.max_positions.filter(|most| tokens > *most)?;
        Some(PastContext { tokens, made_for })
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

    /// Bytes of one unit (the key and the value of one KV head) at `bytes_per_value`; at most [`usize::MAX`].
    pub fn unit_bytes(&self, bytes_per_value: usize) -> usize {
        let values = self.head_dim.saturating_mul(2);
        values.saturating_mul(bytes_per_value)
    }

    /// Bytes of a full cache of `tokens` tokens over all layers and heads; at most [`usize::MAX`].
    pub fn full_cache_bytes(&self, tokens: usize, bytes_per_value: usize) -> usize {
        let heads = self.layers.saturating_mul(self.kv_heads);
        let units = heads.saturating_mul(tokens);
        units.saturating_mul(self.unit_bytes(bytes_per_value))
    }
}

/// A text that is longer than its model was made for.
///
/// That is no error: bounded caches are there to read on. But what a model makes of such a text is not
/// known, so that whoever asked should be told, once.
///
/// ```
/// let spec = locret_core::ModelSpec::new(2, 4, 2, 64, 300).with_max_positions(Some(4096));
/// assert_eq!(spec.past_context(4096), None);
/// let past = spec.past_context(5000).unwrap();
/// assert_eq!((past.tokens, past.made_for), (5000, 4096));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PastContext {
    /// Tokens of the text.
    pub tokens: usize,
    /// Tokens that the model was made for.
    pub made_for: usize,
}

impl fmt::Display for PastContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the text has {} tokens, and the model was made for {}: how well it reads on is not known",
            self.tokens, self.made_for
        )
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
    /// Query heads that share one KV head, `g = H / G`; 0 where there is none.
    pub fn group(&self) -> usize {
        self.heads.checked_div(self.kv_heads).unwrap_or(0)
    }

    /// Features of a token's queries, keys and values together, `(H + 2G) · d`; at most [`usize::MAX`].
    pub fn qkv_features(&self) -> usize {
        let heads = self.kv_heads.saturating_mul(2).saturating_add(self.heads);
        heads.saturating_mul(self.head_dim)
    }

    /// Bytes of one unit in each head of each layer, as 32-bit values; at most [`usize::MAX`].
    pub(super) fn bytes_of_units(&self) -> usize {
        let heads = self.layers.saturating_mul(self.kv_heads);
        heads.saturating_mul(self.head_dim).saturating_mul(2 * 4)
    }
}
