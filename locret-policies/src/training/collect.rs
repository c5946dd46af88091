//! Labels, and the inputs that go with them, collected through the engine.

use super::{
    FINGERPRINT, InputDtype, LabelKind, LabelOptions, Sample, Shard, Shards, Split, fingerprint,
    labels::{self, Factors, UnitFactors, feed},
    shards::{Coded, LayerRows, NewShard, path_of},
};
use crate::{HeadInput, PolicyError, Result};
use locret_core::{CausalLm, Decided, ModelSpec, Needs, Probe};
use rand::{RngExt, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::{
    ops::{ControlFlow, Range},
    path::Path,
};

/// How labels are collected. In code, begin with the default and set the fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct CollectConfig {
    /// Tokens that go through the model together.
    pub chunk: usize,
    /// What labels are. All kinds that are named are collected from one reading of the texts; their answers
    /// are forced once for each.
    pub labels: Vec<LabelKind>,
    /// What heads will read.
    pub reads: Vec<HeadInput>,
    /// Adds the logarithm of the norm of a unit's value to its label: attention to a value of
    /// small norm changes little.
    pub value_norm: bool,
    /// How many of a query's last tokens count beside the answer's. The authors count none, so that
    /// the token that predicts the first one of an answer, the last of the query, has no say.
    pub query_tokens: usize,
    /// How inputs are kept on disk.
    pub inputs: InputDtype,
    /// At most about this many tokens of a training sample go to disk: its beginning, and random
    /// stretches of [`span`](Self::span); 0 for all. Validation samples are kept whole.
    pub max_rows: usize,
    /// Tokens of a stretch.
    pub span: usize,
    /// The share of the samples that only measure.
    pub validation: f64,
    /// Chooses validation samples and stretches.
    pub seed: u64,
}

impl Default for CollectConfig {
    fn default() -> Self {
        Self {
            chunk: 512,
            labels: vec![LabelKind::MaxLogit],
            reads: vec![HeadInput::Qkv],
            value_norm: false,
            query_tokens: 0,
            inputs: InputDtype::Q8,
            max_rows: 0,
            span: 512,
            validation: 0.1,
            seed: 0,
        }
    }
}

/// How far [`collect`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollectProgress {
    /// Samples that are on disk.
    pub samples: usize,
    /// Of so many.
    pub of: usize,
    /// Tokens that have been through the model, or were found on disk.
    pub tokens: usize,
    /// Of so many.
    pub of_tokens: usize,
}

/// Tokens of the stretch at the beginning of a long text.
const BEGINNING: usize = 64;

/// Reads samples through the model and writes inputs and labels to `folder`, one file for each.
/// `None` if `progress` stopped it.
///
/// The prompt is read in chunks with a full cache and original positions; each answer is forced on
/// a fork of that cache. No attention matrix of the prompt exists at any time: an answer's logits
/// are reduced to their maximum in the engine. A sample whose file is there, from the same model
/// dimensions, ids and settings, is not read again, so that a stopped or killed collection goes on.
///
/// `progress` is called after each sample.
///
/// # Errors
/// [`PolicyError::Setting`] for impossible settings or samples; the model's and the engine's;
/// [`PolicyError::Io`], [`PolicyError::File`].
pub fn collect(
    model: &dyn CausalLm,
    samples: &[Sample],
    folder: &Path,
    config: &CollectConfig,
    progress: &mut dyn FnMut(&CollectProgress) -> ControlFlow<()>,
) -> Result<Option<Shards>> {
    let spec = model.spec();
    config.validate()?;
    for (index, sample) in samples.iter().enumerate() {
        sample.validate(index, spec.vocab)?;
    }
    std::fs::create_dir_all(folder).map_err(PolicyError::io(folder))?;
    let factors = Factors::new(model, &config.labels, config.value_norm)?;
    let splits = config.splits(samples.len());
    let mut at = CollectProgress {
        samples: 0,
        of: samples.len(),
        tokens: 0,
        of_tokens: samples.iter().map(Sample::tokens).sum(),
    };
    let mut shards = Vec::with_capacity(samples.len());
    for (index, sample) in samples.iter().enumerate() {
        let path = path_of(folder, index);
        let split = splits[index];
        let fingerprint = config.fingerprint(spec, sample, split, index)?;
        let there = Shard::open(&path)
            .ok()
            .filter(|s| s.fingerprint() == fingerprint);
        shards.push(match there {
            Some(shard) => shard,
            None => {
                let spans = config.spans(sample.prompt.len(), split, index);
                let layers = label(model, sample, config, &factors, &spans)?;
                NewShard {
                    fingerprint,
                    split,
                    dtype: config.inputs,
                    spans,
                    tokens: sample.prompt.len(),
                    head_dim: spec.head_dim,
                    kv_heads: spec.kv_heads,
                    reads: (config.reads.iter())
                        .map(|read| (*read, read.features(spec)))
                        .collect(),
                    labels: config.labels.clone(),
                    layers,
                }
                .write(&path)?;
                Shard::open(&path)?
            }
        });
        at.samples += 1;
        at.tokens += sample.tokens();
        if progress(&at).is_break() {
            return Ok(None);
        }
    }
    Shards::new(shards).map(Some)
}

impl CollectConfig {
    fn validate(&self) -> Result<()> {
        let wrong = |message: &str| Err(PolicyError::setting("training", message));
        self.options().validate(&self.labels)?;
        if self.span == 0 {
            return wrong("span must be at least 1");
        }
        let twice = |names: &[String]| (1..names.len()).any(|i| names[..i].contains(&names[i]));
        let kinds: Vec<String> = self.labels.iter().map(|l| format!("{l:?}")).collect();
        let reads: Vec<String> = self.reads.iter().map(|r| format!("{r:?}")).collect();
        for names in [kinds, reads] {
            if names.is_empty() || twice(&names) {
                return wrong("kinds of labels and inputs: at least one of each, and none twice");
            }
        }
        if !(0.0..1.0).contains(&self.validation) {
            return wrong("validation is a share, at least 0 and below 1");
        }
        Ok(())
    }

    fn options(&self) -> LabelOptions {
        LabelOptions {
            chunk: self.chunk,
            query_tokens: self.query_tokens,
            value_norm: self.value_norm,
        }
    }

    /// Which samples only measure: one of every `1 / validation` consecutive ones. What a sample is
    /// used for depends on its number alone, so that further samples can follow later.
    fn splits(&self, samples: usize) -> Vec<Split> {
        let mut splits = vec![Split::Train; samples];
        // A single sample is for training.
        if self.validation > 0.0 && samples > 1 {
            let block = (1.0 / self.validation).round().max(2.0) as usize;
            for (number, samples) in splits.chunks_mut(block).enumerate() {
                let seed = self.seed ^ ((number as u64 + 1) << 40);
                let chosen = ChaCha8Rng::seed_from_u64(seed).random_range(0..block);
                // The last block may not be whole yet.
                if let Some(split) = samples.get_mut(chosen) {
                    *split = Split::Validation;
                }
            }
        }
        splits
    }

    /// The stretches of a prompt of `tokens` tokens that go to disk, in order.
    fn spans(&self, tokens: usize, split: Split, index: usize) -> Vec<Range<usize>> {
        if self.max_rows == 0 || tokens <= self.max_rows || split == Split::Validation {
            return std::iter::once(0..tokens).collect();
        }
        // The beginning is always there: what stands first is like nothing else in a text.
        let first = BEGINNING.min(self.max_rows).min(tokens);
        let all = (first..tokens).step_by(self.span);
        let mut all: Vec<_> = all.map(|s| s..(s + self.span).min(tokens)).collect();
        let seed = self.seed ^ ((index as u64 + 1) << 20);
        all.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let mut left = self.max_rows - first;
        let mut kept = vec![0..first];
        for span in all {
            let rows = span.len().min(left);
            if rows == 0 {
                break;
            }
            left -= rows;
            kept.push(span.start..span.start + rows);
        }
        kept.sort_by_key(|s| s.start);
        kept
    }

    fn fingerprint(
        &self,
        spec: &ModelSpec,
        sample: &Sample,
        split: Split,
        index: usize,
    ) -> Result<u64> {
        let settings = serde_json::to_string(self)
            .map_err(|e| PolicyError::setting("training", e.to_string()))?;
        let bytes = format!("{spec:?} {settings} {split:?} {index}").into_bytes();
        Ok(fingerprint(fingerprint(FINGERPRINT, bytes), sample.bytes()))
    }
}

/// Inputs and labels of one sample's spans, for every layer.
fn label(
    model: &dyn CausalLm,
    sample: &Sample,
    config: &CollectConfig,
    factors: &Factors,
    spans: &[Range<usize>],
) -> Result<Vec<LayerRows>> {
    let mut sinks = vec![LayerSink::default(); model.spec().layers];
    let mut cache = labels::full(model)?;
    let mut reading = Reading {
        layers: &mut sinks,
        spans,
        config,
        factors,
    };
    let (prompt, chunk) = (&sample.prompt, config.chunk);
    feed(model, &mut cache, prompt, chunk, &mut reading)?;
    let (mut rows, factors): (Vec<_>, Vec<_>) =
        sinks.into_iter().map(|s| (s.rows, s.factors)).unzip();
    let options = config.options();
    for kind in &config.labels {
        let all = labels::forced(model, &cache, sample, *kind, &options, &factors)?;
        for (rows, of_layer) in rows.iter_mut().zip(all) {
            let tokens = spans.iter().cloned().flatten();
            let each = tokens.flat_map(|token| of_layer.iter().map(move |head| head[token]));
            rows.labels.push(each.flat_map(f32::to_le_bytes).collect());
        }
    }
    Ok(rows)
}

/// What was read of one layer.
#[derive(Debug, Clone, Default)]
struct LayerSink {
    rows: LayerRows,
    factors: UnitFactors,
}

/// Writes down what heads read of each layer.
struct Reading<'a> {
    layers: &'a mut [LayerSink],
    spans: &'a [Range<usize>],
    config: &'a CollectConfig,
    factors: &'a Factors,
}

impl Probe for Reading<'_> {
    fn needs(&self) -> Needs {
        let mut needs = Needs::NOTHING;
        if self.config.reads.contains(&HeadInput::Qkv) || self.factors.needed() {
            needs = needs.qkv();
        }
        if self.config.reads.contains(&HeadInput::Layer) {
            needs = needs.input();
        }
        needs
    }

    fn decided(&mut self, at: &Decided<'_>) -> locret_core::Result<()> {
        let step = at.step;
        let layer = &mut self.layers[step.layer.index];
        if let Some(qkv) = at.units.qkv() {
            self.factors.add(step, &qkv.v, &mut layer.factors)?;
        }
        let all = step.seen..step.seen + step.incoming;
        let due = |token: &usize| self.spans.iter().any(|s| s.contains(token));
        let due: Vec<usize> = (all.filter(due)).map(|token| token - step.seen).collect();
        let rows = &mut layer.rows.inputs;
        rows.resize(self.config.reads.len(), Coded::default());
        for (rows, read) in rows.iter_mut().zip(&self.config.reads) {
            let parts = match read {
                HeadInput::Qkv => at.units.qkv().map(|qkv| vec![&qkv.q, &qkv.k, &qkv.v]),
                HeadInput::Layer => at.units.input().map(|input| vec![input]),
            };
            let parts = parts.unwrap_or_default();
            let values: Vec<_> = parts
                .iter()
                .map(|p| p.values())
                .collect::<locret_core::Result<_>>()?;
            for token in &due {
                let of = values.iter().zip(&parts);
                let row: Vec<f32> = of
                    .flat_map(|(values, part)| &values[token * part.width()..][..part.width()])
                    .copied()
                    .collect();
                rows.push(&row, step.layer.head_dim, self.config.inputs);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validation_samples_are_drawn_by_seed() {
        let config = CollectConfig::default();
        let splits = config.splits(30);
        let count = splits.iter().filter(|s| **s == Split::Validation).count();
        assert_eq!(count, 3);
        assert_eq!(splits, config.splits(47)[..30]);
        let other = CollectConfig {
            seed: 1,
            ..config.clone()
        };
        assert_ne!(splits, other.splits(30));
        assert_eq!(config.splits(1), [Split::Train]);
        let none = CollectConfig {
            validation: 0.0,
            ..config
        };
        assert!(!none.splits(30).contains(&Split::Validation));
    }

    #[test]
    fn long_samples_are_cut_to_stretches() {
        let config = CollectConfig {
            max_rows: 89,
            span: 10,
            ..CollectConfig::default()
        };
        let spans = config.spans(159, Split::Train, 4);
        assert_eq!(spans.iter().map(|s| s.len()).sum::<usize>(), 89);
        assert_eq!(spans[0], 0..BEGINNING);
        assert!(spans.windows(2).all(|w| w[0].end <= w[1].start));
        assert_eq!(spans, config.spans(159, Split::Train, 4));
        assert_ne!(spans, config.spans(159, Split::Train, 5));
        assert_eq!(config.spans(159, Split::Validation, 4), [0..159]);
        assert_eq!(config.spans(89, Split::Train, 4), [0..89]);
    }
}
