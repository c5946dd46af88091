//! How much may stay.

use crate::{Error, LayerSpec, Result};
use serde::{Deserialize, Serialize};

/// How many units each KV head of each layer may keep.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// This many units.
    Units(usize),
    /// A share of the sequence: `ceil(ratio · tokens)` units, where `tokens` is what the sequence
    /// has at the end of the prompt that is being read. Memory then grows with the text.
    Ratio(f64),
    /// This many bytes for the keys and values of all layers together, as 32-bit values:
    /// `floor(bytes / (layers · kv_heads · 2 · head_dim · 4))` units. A store with a smaller value
    /// takes proportionally less than what is named here.
    Bytes(usize),
}

impl Budget {
    /// Units for each KV head of `layer`, in a sequence of `total` tokens.
    pub fn units(&self, layer: &LayerSpec, total: usize) -> usize {
        match *self {
            Self::Units(n) => n,
            Self::Ratio(r) => (r * total as f64).ceil() as usize,
            Self::Bytes(bytes) => bytes / (layer.layers * layer.kv_heads * 2 * layer.head_dim * 4),
        }
    }

    /// Checks that at least one unit can stay in a sequence of one token.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn validate(&self, layer: &LayerSpec) -> Result<()> {
        match *self {
            Self::Units(n) if n == 0 => Err(Error::setting("budget", "at least 1 unit", n)),
            Self::Ratio(r) if !(r.is_finite() && r > 0.0 && r <= 1.0) => {
                Err(Error::setting("budget ratio", "more than 0, at most 1", r))
            }
            Self::Bytes(b) if self.units(layer, 0) == 0 => Err(Error::setting(
                "budget in bytes",
                format!(
                    "at least {} (one unit in each head of each layer)",
                    layer.layers * layer.kv_heads * 2 * layer.head_dim * 4
                ),
                b,
            )),
            _ => Ok(()),
        }
    }
}

/// Units that stay whatever their score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Guard {
    /// The first units of the sequence (attention sinks, arXiv 2309.17453).
    pub sinks: usize,
    /// The newest units, always.
    pub recent: usize,
    /// The newest units while further chunks of the prompt follow (Locret's stabilizers, arXiv
    /// 2410.01805 §3.3). Their scores stay what they are.
    pub stabilizers: usize,
}

/// Whether and when units are dropped while text is generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodeEviction {
    /// Never, as the authors of Locret do: the cache grows by the generated tokens.
    #[default]
    Off,
    /// Back to the budget whenever it is exceeded by this many units (at least 1).
    Every(usize),
}
