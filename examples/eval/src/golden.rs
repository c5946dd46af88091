//! Logits that transformers gives for a small model, to compare an adapter with.

use crate::{Error, Result};
use base64::{Engine, prelude::BASE64_STANDARD};
use locret_core::{CacheOptions, CausalLm, Pass, Phase, SequenceCache, forward};
use locret_policies::Full;
use serde::{Deserialize, Deserializer, de};
use std::{borrow::Cow, collections::BTreeMap, path::Path, sync::Arc};

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
    /// `[positions, vocab]`
    #[serde(deserialize_with = "floats")]
    logits: Vec<f32>,
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
    #[must_use]
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
            let expected = &case.logits;
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

/// Little-endian `f32` in base64.
fn floats<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Vec<f32>, D::Error> {
    let text = <Cow<'de, str>>::deserialize(from)?;
    let bytes = BASE64_STANDARD.decode(&*text).map_err(de::Error::custom)?;
    let (quads, rest) = bytes.as_chunks();
    if !rest.is_empty() {
        let message = format!("{} bytes are no whole 32-bit numbers", bytes.len());
        return Err(de::Error::custom(message));
    }
    Ok(quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_come_out_of_base64_or_the_file_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("golden.json");
        let read = |logits: &str| {
            let case = serde_json::json!({ "ids": [1], "positions": [0], "logits": logits });
            let golden =
                serde_json::json!({ "vocab": 3, "variants": { "a": { "cases": [case] } } });
            std::fs::write(&path, golden.to_string()).unwrap();
            let golden = GoldenLogits::read(&path);
            golden.map(|golden| golden.variants["a"].cases[0].logits.clone())
        };
        // 1, -2.5 and 3.5e-3, as Python's base64 and struct write them.
        assert_eq!(read("AACAPwAAIMBCYGU7").unwrap(), [1.0, -2.5, 3.5e-3]);
        for damaged in ["AACAPwAAIM!CYGU7", "AACAPwAAIMBCYGU", "AACAPwAA"] {
            assert!(
                matches!(read(damaged), Err(Error::Read { .. })),
                "{damaged}"
            );
        }
    }
}
