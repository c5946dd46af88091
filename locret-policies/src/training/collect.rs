//! Labels, and the inputs that go with them, collected through the engine.

use super::{
    FINGERPRINT, InputDtype, Sample, Shard, Shards, Split, fingerprint,
    shards::{LayerRows, NewShard, path_of},
};
use crate::{PolicyError, Result};
use locret_core::{
    CacheOptions, CausalLm, Decided, ModelSpec, Needs, Observation, Pass, Phase, Probe, Queries,
    SequenceCache, forward,
};
use rand::{RngExt, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::{
    ops::{ControlFlow, Range},
    path::Path,
    sync::Arc,
};

/// What a unit's label is. Both are the largest over the answers of a sample and over the query
/// heads that share the KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LabelKind {
    /// The largest attention logit that an answer's token has for it, before the softmax, as the
    /// authors do (arXiv 2410.01805 §3.2).
    #[default]
    MaxLogit,
    /// The logarithm of the attention weight that it gets from an answer, averaged over the
    /// answer's tokens.
    Mass,
}

/// How labels are collected. In code, begin with the default and set the fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct CollectConfig {
    /// Tokens that go through the model together.
    pub chunk: usize,
    /// What a label is.
    pub label: LabelKind,
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
            label: LabelKind::MaxLogit,
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
                let (layers, features) = label(model, sample, config, &spans)?;
                NewShard {
                    fingerprint,
                    split,
                    dtype: config.inputs,
                    spans: spans.iter().map(|s| s.len()).collect(),
                    head_dim: spec.head_dim,
                    kv_heads: spec.kv_heads,
                    features,
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
        if self.chunk == 0 || self.span == 0 {
            return wrong("chunk and span must be at least 1");
        }
        if !(0.0..1.0).contains(&self.validation) {
            return wrong("validation is a share, at least 0 and below 1");
        }
        Ok(())
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

/// Inputs and labels of one sample's spans, for every layer, and the number of features.
fn label(
    model: &dyn CausalLm,
    sample: &Sample,
    config: &CollectConfig,
    spans: &[Range<usize>],
) -> Result<(Vec<LayerRows>, usize)> {
    let spec = model.spec();
    let mut sink = vec![LayerSink::new(spec, sample.prompt.len()); spec.layers];
    let full = Arc::new(crate::Full::default());
    let options = CacheOptions::default();
    let mut cache = SequenceCache::new(spec, full, model.compute(), options)?;
    let mut reading = Reading {
        layers: &mut sink,
        spans,
        dtype: config.inputs,
    };
    feed(
        model,
        &mut cache,
        &sample.prompt,
        config.chunk,
        &mut reading,
    )?;
    for answer in &sample.answers {
        let mut fork = cache.fork()?;
        let tokens = config.query_tokens.min(answer.query.len());
        let (unseen, watched) = answer.query.split_at(answer.query.len() - tokens);
        feed(model, &mut fork, unseen, config.chunk, &mut Unwatched)?;
        let mut watching = Watching {
            layers: &mut sink,
            prompt: sample.prompt.len(),
            label: config.label,
        };
        let watched = [watched, &answer.answer].concat();
        feed(model, &mut fork, &watched, config.chunk, &mut watching)?;
        for layer in &mut sink {
            layer.close(config.label, watched.len());
        }
    }
    let features = spec.layer(0).qkv_features();
    let mut layers = Vec::with_capacity(spec.layers);
    for (index, layer) in sink.iter_mut().enumerate() {
        layers.push(layer.finish(spans, config, index)?);
    }
    Ok((layers, features))
}

/// Puts tokens through the model.
fn feed(
    model: &dyn CausalLm,
    cache: &mut SequenceCache,
    ids: &[u32],
    chunk: usize,
    probe: &mut dyn Probe,
) -> Result<()> {
    let total = cache.seen() + ids.len();
    for ids in ids.chunks(chunk) {
        let step = cache.step(Phase::Forced, ids.len(), total);
        let mut pass = Pass::new([step.watched(&mut *probe)])?;
        forward(model, ids, &mut pass)?;
        pass.finish(None)?;
    }
    Ok(())
}

#[derive(Debug, Clone)]
struct LayerSink {
    rows: LayerRows,
    /// `[kv_heads][token]`
    norms: Vec<Vec<f32>>,
    /// The best over the answers so far, `[kv_heads][token]`.
    best: Vec<Vec<f32>>,
    /// Of the answer that is being forced: the largest logits, `[kv_heads][token]`, or the sums of
    /// weights, `[heads][token]`.
    current: Vec<Vec<f32>>,
}

impl LayerSink {
    fn new(spec: &ModelSpec, tokens: usize) -> Self {
        Self {
            rows: LayerRows::default(),
            norms: vec![Vec::new(); spec.kv_heads],
            best: vec![vec![f32::NEG_INFINITY; tokens]; spec.kv_heads],
            current: Vec::new(),
        }
    }

    /// Brings in an answer of `tokens` tokens.
    fn close(&mut self, label: LabelKind, tokens: usize) {
        let current = std::mem::take(&mut self.current);
        let group = current.len() / self.best.len();
        for (index, list) in current.into_iter().enumerate() {
            let head = index / group;
            for (best, value) in self.best[head].iter_mut().zip(list) {
                let value = match label {
                    LabelKind::MaxLogit => value,
                    // Below this, differences between weights mean nothing.
                    LabelKind::Mass => (value / tokens as f32).max(1e-8).ln(),
                };
                *best = best.max(value);
            }
        }
    }

    fn finish(
        &mut self,
        spans: &[Range<usize>],
        config: &CollectConfig,
        layer: usize,
    ) -> Result<LayerRows> {
        let mut rows = std::mem::take(&mut self.rows);
        for token in spans.iter().cloned().flatten() {
            for (best, norms) in self.best.iter().zip(&self.norms) {
                let mut label = best[token];
                if config.value_norm {
                    label += norms[token].max(1e-8).ln();
                }
                if !label.is_finite() {
                    return Err(locret_core::Error::NotFinite {
                        what: "a label",
                        at: format!("layer {layer}, token {token}"),
                    }
                    .into());
                }
                rows.labels.extend(label.to_le_bytes());
            }
        }
        Ok(rows)
    }
}

/// Sees nothing.
struct Unwatched;

impl Probe for Unwatched {}

/// Writes down each layer's `[q; k; v]`.
struct Reading<'a> {
    layers: &'a mut [LayerSink],
    spans: &'a [Range<usize>],
    dtype: InputDtype,
}

impl Probe for Reading<'_> {
    fn needs(&self) -> Needs {
        Needs::NOTHING.qkv()
    }

    fn decided(&mut self, at: &Decided<'_>) -> locret_core::Result<()> {
        let Some(qkv) = at.units.qkv() else {
            return Ok(());
        };
        let step = at.step;
        let dim = step.layer.head_dim;
        let parts = [qkv.q.values()?, qkv.k.values()?, qkv.v.values()?];
        let widths = [step.layer.heads, step.layer.kv_heads, step.layer.kv_heads].map(|n| n * dim);
        let layer = &mut self.layers[step.layer.index];
        let mut row = Vec::with_capacity(widths.iter().sum());
        for i in 0..step.incoming {
            row.clear();
            for (part, width) in parts.iter().zip(widths) {
                row.extend_from_slice(&part[i * width..(i + 1) * width]);
            }
            let values = &row[row.len() - widths[2]..];
            for (norms, v) in layer.norms.iter_mut().zip(values.chunks_exact(dim)) {
                norms.push(v.iter().map(|x| x * x).sum::<f32>().sqrt());
            }
            let token = step.seen + i;
            if self.spans.iter().any(|s| s.contains(&token)) {
                layer.rows.push_row(&row, dim, self.dtype);
            }
        }
        Ok(())
    }
}

/// Writes down what new tokens attend to among the prompt's units.
struct Watching<'a> {
    layers: &'a mut [LayerSink],
    prompt: usize,
    label: LabelKind,
}

impl Probe for Watching<'_> {
    fn needs(&self) -> Needs {
        let what = match self.label {
            LabelKind::MaxLogit => Observation::MaxLogits,
            LabelKind::Mass => Observation::Weights,
        };
        Needs::NOTHING.observe(Queries::All, what)
    }

    fn decided(&mut self, at: &Decided<'_>) -> locret_core::Result<()> {
        let Some(observed) = at.units.observed() else {
            return Ok(());
        };
        let current = &mut self.layers[at.step.layer.index].current;
        if current.is_empty() {
            *current = (observed.per_head.iter())
                .map(|list| list[..self.prompt].to_vec())
                .collect();
            return Ok(());
        }
        for (all, list) in current.iter_mut().zip(&observed.per_head) {
            for (a, x) in all.iter_mut().zip(list) {
                *a = match self.label {
                    LabelKind::MaxLogit => a.max(*x),
                    LabelKind::Mass => *a + x,
                };
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
