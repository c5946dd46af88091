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
    /// has at the end of the prompt that is being read. Memory then grows with the text. A product
    /// within 1e-9 of a whole number is that number: 0.07 of 100 tokens are 7 units.
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
            Self::Ratio(r) => (r * total as f64 - 1e-9).ceil() as usize,
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

/// Shares `budget` units a layer out over the layers (PyramidKV, arXiv 2406.02069 §4.2): linearly
/// from `2 · budget - budget / beta` in the first one to `budget / beta` in the last one.
///
/// Rounded so that the layers together have `layers · budget` units; at least 1.
pub(crate) fn pyramid(budget: usize, beta: f64, layer: &LayerSpec) -> usize {
    if layer.layers < 2 {
        return budget;
    }
    let (budget, last) = (budget as f64, budget as f64 / beta);
    let step = 2.0 * (budget - last) / (layer.layers - 1) as f64;
    // Units of the layers below, so that roundings cancel.
    let below = |layers: usize| {
        let n = layers as f64;
        (n * (2.0 * budget - last) - step * n * (n - 1.0) / 2.0).round()
    };
    ((below(layer.index + 1) - below(layer.index)) as usize).max(1)
}

/// Units that stay whatever their score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Guard {
    /// The first units of the sequence (attention sinks, arXiv 2309.17453).
    pub sinks: usize,
    /// The newest units, always.
    pub recent: usize,
    /// The newest units while more of the sequence follows (Locret's stabilizers, arXiv 2410.01805
    /// §3.3): in every chunk of a prompt but the last one, when a further prompt begins, and
    /// whenever units are dropped while text is generated ([`DecodeEviction::Every`], which the
    /// paper does not have). Their scores stay what they are.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pyramid_has_the_same_sum_as_a_block() {
        for (layers, budget, beta) in [
            (30, 256, 20.0),
            (32, 6000, 20.0),
            (2, 10, 5.0),
            (7, 33, 1.0),
        ] {
            let layer = |index| LayerSpec {
                index,
                layers,
                heads: 1,
                kv_heads: 1,
                head_dim: 8,
            };
            let units: Vec<usize> = (0..layers)
                .map(|i| pyramid(budget, beta, &layer(i)))
                .collect();
            assert_eq!(units.iter().sum::<usize>(), layers * budget);
            let last = budget as f64 / beta;
            assert!((units[layers - 1] as f64 - last).abs() <= 1.0, "{units:?}");
            assert!(
                (units[0] as f64 - (2.0 * budget as f64 - last)).abs() <= 1.0,
                "{units:?}"
            );
            assert!(units.windows(2).all(|w| w[0] + 1 >= w[1]), "{units:?}");
        }
        let only = LayerSpec {
            index: 0,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
        };
        assert_eq!(pyramid(10, 20.0, &only), 10);
    }
}
