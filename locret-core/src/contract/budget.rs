//! How much may stay.

use crate::{Error, LayerSpec, Result};
use serde::{Deserialize, Deserializer, Serialize, de};
use std::{fmt, str::FromStr};

/// How many units each KV head of each layer may keep.
///
/// As text: `256` is a number of units, `0.25` or `25%` a share, `64MiB`, `64MB` or `512B` a number
/// of bytes. A file may also say `{ units = 256 }`, `{ ratio = 0.25 }` or `{ bytes = 4_000_000 }`.
///
/// ```
/// use locret_core::Budget;
///
/// assert_eq!("256".parse::<Budget>()?, Budget::Units(256));
/// assert_eq!("12.5%".parse::<Budget>()?, Budget::Ratio(0.125));
/// assert_eq!("64MiB".parse::<Budget>()?, Budget::Bytes(64 << 20));
/// # Ok::<(), locret_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
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
            // Of nothing, none.
            Self::Bytes(bytes) => bytes.checked_div(layer.bytes_of_units()).unwrap_or(0),
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
                    layer.bytes_of_units()
                ),
                b,
            )),
            _ => Ok(()),
        }
    }
}

/// What a unit of bytes stands for. Longer names come first: all of them end in `B`.
const BYTES: [(&str, f64); 8] = [
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("kB", 1e3),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("B", 1.0),
];

impl FromStr for Budget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            let forms = "units (256), a share (0.25 or 25%) or bytes (64MiB)";
            Error::setting("budget", forms, format!("{text:?}"))
        };
        let number = |text: &str| text.trim().parse::<f64>().map_err(|_| wrong());
        let text = text.trim();
        if let Ok(units) = text.parse() {
            return Ok(Self::Units(units));
        }
        if let Some(percent) = text.strip_suffix('%') {
            return Ok(Self::Ratio(number(percent)? / 100.0));
        }
        for (unit, size) in BYTES {
            if let Some(count) = text.strip_suffix(unit) {
                let bytes = number(count)? * size;
                // Up to here every whole number of bytes is exact.
                let fits = (0.0..9e15).contains(&bytes);
                return fits
                    .then_some(Self::Bytes(bytes as usize))
                    .ok_or_else(wrong);
            }
        }
        match number(text)? {
            share if share > 0.0 && share <= 1.0 => Ok(Self::Ratio(share)),
            _ => Err(wrong()),
        }
    }
}

/// The form that [`FromStr`] reads.
impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Units(units) => write!(f, "{units}"),
            // With a point or an exponent, which tells a share of 1.0 from one unit.
            Self::Ratio(share) => write!(f, "{share:?}"),
            Self::Bytes(bytes) => write!(f, "{bytes}B"),
        }
    }
}

impl<'de> Deserialize<'de> for Budget {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Reader)
    }
}

/// A budget that names its kind.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", remote = "Budget")]
enum Named {
    Units(usize),
    Ratio(f64),
    Bytes(usize),
}

struct Reader;

impl<'de> de::Visitor<'de> for Reader {
    type Value = Budget;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a number of units, a text such as \"25%\" or \"64MiB\", or one of `units`, `ratio` and \
             `bytes` with its value",
        )
    }

    fn visit_u64<E: de::Error>(self, units: u64) -> Result<Budget, E> {
        usize::try_from(units).map(Budget::Units).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, units: i64) -> Result<Budget, E> {
        usize::try_from(units)
            .map(Budget::Units)
            .map_err(|_| E::invalid_value(de::Unexpected::Signed(units), &self))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Budget, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Budget, A::Error> {
        Named::deserialize(de::value::MapAccessDeserializer::new(map))
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
    /// The newest units while more of the sequence follows (stabilizers, arXiv 2410.01805
    /// §3.3): in every chunk of a prompt but the last one, when a further prompt begins, and
    /// whenever units are dropped while text is generated ([`DecodeEviction::Every`], which the
    /// paper does not have). Their scores stay what they are.
    pub stabilizers: usize,
}

/// Whether and when units are dropped while text is generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodeEviction {
    /// Never, as in arXiv 2410.01805: the cache grows by the generated tokens.
    #[default]
    Off,
    /// Back to the budget whenever it is exceeded by this many units (at least 1).
    Every(usize),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_as_they_are_written() {
        for (text, budget) in [
            ("256", Budget::Units(256)),
            ("0.25", Budget::Ratio(0.25)),
            ("1.0", Budget::Ratio(1.0)),
            ("12.5%", Budget::Ratio(0.125)),
            (" 25 % ", Budget::Ratio(0.25)),
            ("4MiB", Budget::Bytes(4 << 20)),
            ("64MB", Budget::Bytes(64_000_000)),
            ("1.5 KiB", Budget::Bytes(1536)),
            ("3kB", Budget::Bytes(3000)),
            ("3 KB", Budget::Bytes(3000)),
            ("2GiB", Budget::Bytes(2 << 30)),
            ("0.5GB", Budget::Bytes(500_000_000)),
            ("512B", Budget::Bytes(512)),
        ] {
            assert_eq!(text.parse::<Budget>().unwrap(), budget, "{text}");
            assert_eq!(budget.to_string().parse::<Budget>().unwrap(), budget);
        }
        for share in [0.07, 1e-7, 1.0 / 3.0] {
            let budget = Budget::Ratio(share);
            assert_eq!(budget.to_string().parse::<Budget>().unwrap(), budget);
        }
        for bad in [
            "", "-1", "x", "1.5", "0.0", "GiB", "-1MiB", "NaN B", "%", "nan", "9e15B",
        ] {
            let error = bad.parse::<Budget>().unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }

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
