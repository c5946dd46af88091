//! Logits that transformers gives for a small model, to compare an adapter with.

use crate::{Error, Result};
use locret_core::{CacheOptions, CausalLm, Pass, Phase, SequenceCache, forward};
use locret_policies::Full;
use serde::Deserialize;
use std::{collections::BTreeMap, path::Path, sync::Arc};

/// A file of golden logits as `locret-models/tests/golden/make_tiny.py` writes it.
#[derive(Debug, Clone, Deserialize)]
pub struct GoldenLogits {
    vocab: usize,
    variants: BTreeMap<String, Variant>,
}

#[derive(Debug, Clone, Deserialize)]
struct Variant {
    cases: Vec<Case>,
}

#[derive(Debug, Clone, Deserialize)]
struct Case {
    ids: Vec<u32>,
    positions: Vec<usize>,
    /// `[positions, vocab]`, little-endian `f32` in base64.
    logits: String,
}

/// How far an adapter is from its golden logits.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Distance {
    /// The largest absolute difference; infinite for a number that is missing or NaN.
    pub largest: f32,
    /// How many logits were compared.
    pub logits: usize,
}

impl GoldenLogits {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Read`] for a file that cannot be read, or is something else.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::read(path, e))?;
        serde_json::from_slice(&bytes).map_err(|e| Error::read(path, e.into()))
    }

    /// The cases of one variant of the model's configuration: a model is of one of them.
    pub fn only(mut self, variant: &str) -> Self {
        self.variants.retain(|name, _| name == variant);
        self
    }

    /// Reads the prompts of all variants in one pass each, with a full cache, and compares.
    ///
    /// # Errors
    /// The model's and the cache's.
    pub fn compare(&self, model: &dyn CausalLm) -> locret_core::Result<Distance> {
        let mut distance = Distance::default();
        for case in self.variants.values().flat_map(|v| &v.cases) {
            let (policy, tokens) = (Arc::new(Full::new()), case.ids.len());
            let options = CacheOptions::default();
            let mut cache = SequenceCache::new(model.spec(), policy, model.compute(), options)?;
            let step = cache.step(Phase::Prefill { last: true }, tokens, tokens);
            let mut pass = Pass::new([step])?;
            let hidden = forward(model, &case.ids, &mut pass)?;
            pass.finish(None)?;
            let found = model.logits(hidden)?.into_values()?;
            let expected = floats(&case.logits);
            for (row, position) in case.positions.iter().enumerate() {
                for token in 0..self.vocab {
                    let a = found.get(position * self.vocab + token);
                    let b = expected.get(row * self.vocab + token);
                    let off = a.zip(b).map_or(f32::NAN, |(a, b)| (a - b).abs());
                    let off = if off.is_nan() { f32::INFINITY } else { off };
                    distance.largest = distance.largest.max(off);
                    distance.logits += 1;
                }
            }
        }
        Ok(distance)
    }
}

/// Little-endian `f32` in base64; what is no digit is passed over.
fn floats(text: &str) -> Vec<f32> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut have) = (Vec::new(), 0u32, 0);
    for c in text.bytes() {
        let Some(digit) = DIGITS.iter().position(|d| *d == c) else {
            continue;
        };
        bits = bits << 6 | digit as u32;
        have += 6;
        if have >= 8 {
            have -= 8;
            bytes.push((bits >> have) as u8);
        }
    }
    let quads = bytes.chunks_exact(4);
    quads
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::floats;

    #[test]
    fn floats_come_out_of_base64() {
        // 1, -2.5 and 3.5e-3, as Python's base64 and struct write them.
        assert_eq!(floats("AACAPwAAIMBCYGU7"), [1.0, -2.5, 3.5e-3]);
    }
}
