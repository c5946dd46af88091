//! One layer's retaining head while it is trained.

use crate::{LayerHead, PolicyError, Result};
use burn::{
    optim::{AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, Optimizer},
    tensor::{Device, Int, Tensor, TensorData, activation},
};
use locret_core::{from_f32, into_f32};
use rand::{RngExt, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// What a head's scores are fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// The labels as they are, as the authors do.
    #[default]
    Raw,
    /// Labels of mean 0 and variance 1 in each sample and KV head, so that scores of different
    /// heads, layers and texts have one scale.
    Standardised,
}

/// What is minimised for one span of tokens in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Loss {
    /// Weight of smooth L1 between score and label, averaged over tokens and KV heads. The
    /// authors: 1.
    pub regression: f32,
    /// Weight of the squared difference between the scores of neighbouring tokens, averaged over
    /// both. The authors' `α`, which they sum over layers while they average the regression: for
    /// one layer by itself it is `α` times the number of layers
    /// ([`TrainConfig::loss`](super::TrainConfig::loss)).
    pub smoothing: f32,
    /// Weight of a ranking loss at the cut, `softplus(-(s_i - s_j))` averaged over random pairs of
    /// a unit `i` whose label is among the best [`cut`](Self::cut) of the span and a unit `j`
    /// whose label is not. 0 in the paper.
    pub ranking: f32,
    /// The share of units above the cut.
    pub cut: f32,
}

impl Default for Loss {
    fn default() -> Self {
        Self {
            regression: 1.0,
            smoothing: 0.0,
            ranking: 0.0,
            cut: 0.125,
        }
    }
}

/// A head, its gradients' moments, and the device that it is trained on.
pub struct HeadTrainer {
    /// `[features, d_R]`
    fc1: Param,
    /// `[d_R, kv_heads]`
    fc2: Param,
    optimizer: AdamW,
    clip: f32,
    device: Device,
}

/// A weight and its moments, without any graph.
struct Param {
    value: Tensor<2>,
    state: Option<AdamWState<2>>,
}

impl std::fmt::Debug for HeadTrainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeadTrainer")
            .field("fc1", &self.fc1)
            .field("fc2", &self.fc2)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Param {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Param")
            .field("shape", &self.value.dims())
            .field("steps", &self.state.as_ref().map(|s| s.momentum.time))
            .finish()
    }
}

/// A weight and its moments on the host.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SavedParam {
    pub(super) shape: [usize; 2],
    pub(super) value: Vec<f32>,
    /// First and second moment and the number of steps.
    pub(super) moments: Option<(Vec<f32>, Vec<f32>, usize)>,
}

/// Settings of AdamW.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Optimisation {
    pub(super) beta_1: f32,
    pub(super) beta_2: f32,
    pub(super) weight_decay: f32,
    pub(super) clip: f32,
}

impl Default for Optimisation {
    fn default() -> Self {
        Self {
            beta_1: 0.9,
            beta_2: 0.95,
            weight_decay: 0.01,
            clip: 0.5,
        }
    }
}

impl HeadTrainer {
    /// A head with weights drawn from `±1/√inputs` by `seed`, for AdamW with β 0.9 and 0.95, ε 1e-8 and
    /// weight decay 0.01, gradients clipped to ±0.5.
    ///
    /// `device` is one with gradients (`Device::autodiff`).
    ///
    /// # Errors
    /// [`PolicyError::Setting`] for a width of 0 or a device without gradients.
    pub fn new(
        features: usize,
        d_r: usize,
        kv_heads: usize,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut draw = |inputs: usize, outputs: usize| -> Vec<f32> {
            let bound = 1.0 / (inputs as f32).sqrt();
            let unit = |_| rng.random::<f32>();
            (0..inputs * outputs)
                .map(unit)
                .map(|u| (2.0 * u - 1.0) * bound)
                .collect()
        };
        let fc1 = draw(features, d_r);
        let fc2 = draw(d_r, kv_heads);
        Self::of(
            SavedParam {
                shape: [features, d_r],
                value: fc1,
                moments: None,
            },
            SavedParam {
                shape: [d_r, kv_heads],
                value: fc2,
                moments: None,
            },
            Optimisation::default(),
            device,
        )
    }

    pub(super) fn of(
        fc1: SavedParam,
        fc2: SavedParam,
        settings: Optimisation,
        device: &Device,
    ) -> Result<Self> {
        let wrong = |message: &str| Err(PolicyError::setting("training", message));
        if !device.is_autodiff() {
            return wrong("the device has no gradients: use Device::autodiff");
        }
        for p in [&fc1, &fc2] {
            let len = p.shape[0] * p.shape[1];
            let fits = |values: &[f32]| values.len() == len;
            let moments = p.moments.as_ref();
            if len == 0
                || !fits(&p.value)
                || !moments.is_none_or(|(first, second, _)| fits(first) && fits(second))
            {
                return wrong(
                    "a weight or moment has no elements, or not as many as its shape says",
                );
            }
        }
        if fc1.shape[1] != fc2.shape[0] {
            return wrong("a head's two matrices are not of one width");
        }
        let plain = device.clone().inner();
        Ok(Self {
            fc1: Param::restore(fc1, &plain),
            fc2: Param::restore(fc2, &plain),
            optimizer: AdamWConfig::new()
                .with_beta_1(settings.beta_1)
                .with_beta_2(settings.beta_2)
                .with_epsilon(1e-8)
                .with_weight_decay(settings.weight_decay)
                .build(),
            clip: settings.clip,
            device: device.clone(),
        })
    }

    /// One step: forward, loss, gradients, clip, AdamW. Returns what was minimised.
    ///
    /// `inputs` `[tokens, features]` and `labels` `[tokens, kv_heads]`, both row-major, are
    /// consecutive tokens of one text. `seed` draws the pairs of the ranking loss.
    ///
    /// # Errors
    /// [`PolicyError::Setting`] for lengths that don't fit; the device's.
    pub fn step(
        &mut self,
        inputs: Vec<f32>,
        labels: Vec<f32>,
        loss: &Loss,
        learning_rate: f64,
        seed: u64,
    ) -> Result<f32> {
        let [features, _] = self.fc1.value.dims();
        let [_, kv_heads] = self.fc2.value.dims();
        let tokens = labels.len() / kv_heads;
        if tokens == 0 || labels.len() != tokens * kv_heads || inputs.len() != tokens * features {
            return Err(PolicyError::setting(
                "training",
                format!("{} inputs for {} labels", inputs.len(), labels.len()),
            ));
        }
        let pairs = (loss.ranking > 0.0)
            .then(|| Pairs::draw(&labels, kv_heads, loss.cut, seed))
            .flatten();
        let x = from_f32(inputs, [tokens, features], &self.device);
        let y = from_f32(labels, [tokens, kv_heads], &self.device);
        let fc1 = self.fc1.value.clone().autodiff().require_grad();
        let fc2 = self.fc2.value.clone().autodiff().require_grad();
        let scores = activation::silu(x.matmul(fc1.clone())).matmul(fc2.clone());
        let regression = smooth_l1(scores.clone(), y);
        let mut total = regression.mul_scalar(loss.regression);
        if loss.smoothing > 0.0 && tokens > 1 {
            total = total + smoothness(scores.clone()).mul_scalar(loss.smoothing);
        }
        if let Some(pairs) = pairs {
            total = total + pairs.loss(scores).mul_scalar(loss.ranking);
        }
        let mut gradients = total.backward();
        let missing = || PolicyError::setting("training", "a weight has no gradient");
        let (g1, g2) = (
            fc1.grad_remove(&mut gradients).ok_or_else(missing)?,
            fc2.grad_remove(&mut gradients).ok_or_else(missing)?,
        );
        // The graph holds the weights; the optimiser works in place when it is gone.
        drop((fc1, fc2, gradients));
        self.fc1
            .update(&self.optimizer, g1, self.clip, learning_rate);
        self.fc2
            .update(&self.optimizer, g2, self.clip, learning_rate);
        let total = into_f32(total.inner())?[0];
        if total.is_finite() {
            Ok(total)
        } else {
            Err(PolicyError::setting(
                "training",
                "the loss is not finite: lower the learning rate, or look at the labels",
            ))
        }
    }

    /// Scores `[tokens, kv_heads]` of inputs `[tokens, features]`, both row-major.
    ///
    /// # Errors
    /// [`PolicyError::Setting`] for a length that doesn't fit; the device's.
    pub fn scores(&self, inputs: Vec<f32>) -> Result<Vec<f32>> {
        let [features, _] = self.fc1.value.dims();
        let tokens = inputs.len() / features;
        if tokens * features != inputs.len() {
            return Err(PolicyError::setting(
                "training",
                "inputs are not whole rows",
            ));
        }
        let x = from_f32(inputs, [tokens, features], &self.fc1.value.device());
        let hidden = activation::silu(x.matmul(self.fc1.value.clone()));
        Ok(into_f32(hidden.matmul(self.fc2.value.clone()))?)
    }

    /// The weights as they are now.
    ///
    /// # Errors
    /// The device's; [`PolicyError::NotFinite`] if training went astray.
    pub fn weights(&self) -> Result<LayerHead> {
        let (fc1, fc2) = self.save()?;
        let [features, d_r] = fc1.shape;
        let head = LayerHead {
            d_r,
            fc1: transpose(&fc1.value, features, d_r),
            fc2: transpose(&fc2.value, d_r, fc2.shape[1]),
        };
        for (key, values) in [("fc1", &head.fc1), ("fc2", &head.fc2)] {
            if let Some(index) = values.iter().position(|x| !x.is_finite()) {
                return Err(PolicyError::NotFinite {
                    key: key.into(),
                    index,
                });
            }
        }
        Ok(head)
    }

    pub(super) fn save(&self) -> Result<(SavedParam, SavedParam)> {
        Ok((self.fc1.save()?, self.fc2.save()?))
    }
}

impl Param {
    fn restore(saved: SavedParam, device: &Device) -> Self {
        let SavedParam {
            shape,
            value,
            moments,
        } = saved;
        let state = moments.map(|(first, second, steps)| {
            let mut momentum = AdaptiveMomentumState::new(
                steps,
                from_f32(first, shape, device),
                from_f32(second, shape, device),
            );
            momentum.time = steps;
            AdamWState::new(momentum)
        });
        Self {
            value: from_f32(value, shape, device),
            state,
        }
    }

    fn save(&self) -> Result<SavedParam> {
        let moments = match &self.state {
            None => None,
            Some(AdamWState { momentum }) => Some((
                into_f32(momentum.moment_1.clone())?,
                into_f32(momentum.moment_2.clone())?,
                momentum.time,
            )),
        };
        Ok(SavedParam {
            shape: self.value.dims(),
            value: into_f32(self.value.clone())?,
            moments,
        })
    }

    fn update(&mut self, optimizer: &AdamW, gradient: Tensor<2>, clip: f32, rate: f64) {
        let gradient = gradient.clamp(-clip, clip);
        let nothing = Tensor::empty([0, 0], &self.value.device());
        let value = std::mem::replace(&mut self.value, nothing);
        (self.value, self.state) = optimizer.step(rate, value, gradient, self.state.take());
    }
}

/// `mean(0.5·d²)` where `|d| < 1`, `mean(|d| - 0.5)` beyond.
fn smooth_l1(scores: Tensor<2>, labels: Tensor<2>) -> Tensor<1> {
    let distance = (scores - labels).abs();
    let near = distance.clone().clamp_max(1.0);
    (near.clone().powi_scalar(2).mul_scalar(0.5) + (distance - near)).mean()
}

/// The mean squared difference of neighbouring rows.
fn smoothness(scores: Tensor<2>) -> Tensor<1> {
    let pairs = scores.dims()[0] - 1;
    let (later, earlier) = (
        scores.clone().narrow(0, 1, pairs),
        scores.narrow(0, 0, pairs),
    );
    (later - earlier).powi_scalar(2).mean()
}

/// Pairs of rows on both sides of the cut.
struct Pairs {
    /// For each row, the row that it is compared with.
    other: Vec<i32>,
    /// `[rows, kv_heads]`: 1 where the row is above the cut and the other below, -1 the other way
    /// round, 0 where both are on one side.
    sign: Vec<f32>,
}

impl Pairs {
    /// `None` if no pair is on both sides of the cut.
    fn draw(labels: &[f32], kv_heads: usize, cut: f32, seed: u64) -> Option<Self> {
        let rows = labels.len() / kv_heads;
        let mut other: Vec<i32> = (0..rows as i32).collect();
        other.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let mut sign = vec![0.0; labels.len()];
        for head in 0..kv_heads {
            let of = |row: usize| labels[row * kv_heads + head];
            let mut sorted: Vec<f32> = (0..rows).map(of).collect();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let above = ((cut * rows as f32).ceil() as usize).clamp(1, rows);
            let bound = sorted[above - 1];
            for (row, partner) in other.iter().enumerate() {
                let (this, that) = (of(row) >= bound, of(*partner as usize) >= bound);
                sign[row * kv_heads + head] = f32::from(this) - f32::from(that);
            }
        }
        sign.iter()
            .any(|s| *s != 0.0)
            .then_some(Self { other, sign })
    }

    fn loss(self, scores: Tensor<2>) -> Tensor<1> {
        let [rows, kv_heads] = scores.dims();
        let device = scores.device();
        let pairs = self.sign.iter().filter(|s| **s != 0.0).count();
        let other = Tensor::<1, Int>::from_data(TensorData::new(self.other, [rows]), &device);
        let weight = self.sign.iter().map(|s| s.abs() / pairs as f32).collect();
        let weight = from_f32::<2>(weight, [rows, kv_heads], &device);
        let sign = from_f32::<2>(self.sign, [rows, kv_heads], &device);
        let ahead = (scores.clone() - scores.select(0, other)) * sign;
        (activation::softplus(ahead.neg(), 1.0) * weight).sum()
    }
}

/// `[rows, columns]` row-major as `[columns, rows]`.
pub(super) fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for (r, row) in values.chunks_exact(columns).enumerate() {
        for (c, x) in row.iter().enumerate() {
            out[c * rows + r] = *x;
        }
    }
    out
}
