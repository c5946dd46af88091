//! One layer's retaining head while it is trained.

use crate::{HeadForm, LayerHead, PolicyError, Result};
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

/// How far a score is from its label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distance {
    /// Smooth L1, as Locret's authors have it: half the square of a distance below 1, and linear beyond.
    #[default]
    SmoothL1,
    /// The square, as KVzap's authors have it on logarithms (arXiv 2601.07891 §3).
    Square,
}

/// What is minimised for one span of tokens in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Loss {
    /// Weight of the distance between score and label, averaged over tokens and KV heads. The
    /// authors: 1.
    pub regression: f32,
    /// What that distance is.
    pub distance: Distance,
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
            distance: Distance::SmoothL1,
            smoothing: 0.0,
            ranking: 0.0,
            cut: 0.125,
        }
    }
}

/// A head, its gradients' moments, and the device that it is trained on.
pub struct HeadTrainer {
    form: HeadForm,
    /// As [`shapes`] has them.
    params: Vec<Param>,
    matrices: AdamW,
    /// Biases do not decay.
    biases: AdamW,
    clip: f32,
    device: Device,
}

/// The weights of a head that is trained: what they are called and their shapes. Matrices are `[inputs, outputs]`,
/// biases `[1, outputs]`.
pub(super) fn shapes(
    form: HeadForm,
    features: usize,
    d_r: usize,
    kv_heads: usize,
) -> Vec<(&'static str, [usize; 2])> {
    match form {
        HeadForm::Locret => vec![("fc1", [features, d_r]), ("fc2", [d_r, kv_heads])],
        HeadForm::Linear => vec![("fc1", [features, kv_heads]), ("fc1.bias", [1, kv_heads])],
        _ => vec![
            ("fc1", [features, d_r]),
            ("fc1.bias", [1, d_r]),
            ("fc2", [d_r, kv_heads]),
            ("fc2.bias", [1, kv_heads]),
        ],
    }
}

/// A weight and its moments, without any graph.
struct Param {
    value: Tensor<2>,
    state: Option<AdamWState<2>>,
}

impl std::fmt::Debug for HeadTrainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeadTrainer")
            .field("form", &self.form)
            .field("params", &self.params)
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
    /// A head with matrices drawn from `±1/√inputs` by `seed`, for AdamW with β 0.9 and 0.95, ε 1e-8 and
    /// weight decay 0.01, gradients clipped to ±0.5. `start` says, for each KV head, what scores are before the first
    /// step but for the drawn matrices (`ln β` where they decay), in forms that have biases.
    ///
    /// `device` is one with gradients (`Device::autodiff`).
    ///
    /// # Errors
    /// [`PolicyError::Setting`] for a width of 0, a device without gradients, or a form that is not trained
    /// ([`HeadForm::Gate`]).
    pub fn new(
        form: HeadForm,
        [features, d_r]: [usize; 2],
        start: &[f32],
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
        let all = shapes(form, features, d_r, start.len());
        let last = all.len() - 1;
        let params = all.into_iter().enumerate().map(|(i, (name, shape))| {
            let value = match name.ends_with("bias") {
                true if i == last => start.iter().map(|x| before(form, *x)).collect(),
                true => vec![0.0; shape[1]],
                false => draw(shape[0], shape[1]),
            };
            SavedParam {
                shape,
                value,
                moments: None,
            }
        });
        Self::of(form, params.collect(), Optimisation::default(), device)
    }

    /// Of the weights that [`shapes`] names.
    pub(super) fn of(
        form: HeadForm,
        params: Vec<SavedParam>,
        settings: Optimisation,
        device: &Device,
    ) -> Result<Self> {
        let wrong = |message: &str| Err(PolicyError::setting("training", message));
        if !device.is_autodiff() {
            return wrong("the device has no gradients: use Device::autodiff");
        }
        if form == HeadForm::Gate {
            return wrong("gates are not trained here");
        }
        for p in &params {
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
        let found: Vec<[usize; 2]> = params.iter().map(|p| p.shape).collect();
        let of = |shape: Option<&[usize; 2]>| shape.copied().unwrap_or_default();
        let ([features, d_r], [_, kv_heads]) = (of(found.first()), of(found.last()));
        let due = shapes(form, features, d_r, kv_heads);
        if !due.iter().map(|(_, shape)| *shape).eq(found) {
            return wrong("a head's weights do not fit each other");
        }
        let plain = device.clone().inner();
        let adam = |weight_decay| {
            AdamWConfig::new()
                .with_beta_1(settings.beta_1)
                .with_beta_2(settings.beta_2)
                .with_epsilon(1e-8)
                .with_weight_decay(weight_decay)
                .build()
        };
        Ok(Self {
            form,
            params: (params.into_iter())
                .map(|param| Param::restore(param, &plain))
                .collect(),
            matrices: adam(settings.weight_decay),
            biases: adam(0.0),
            clip: settings.clip,
            device: device.clone(),
        })
    }

    fn kv_heads(&self) -> usize {
        self.params.last().map_or(0, |p| p.value.dims()[1])
    }

    fn features(&self) -> usize {
        self.params.first().map_or(0, |p| p.value.dims()[0])
    }

    /// One step: forward, loss, gradients, clip, AdamW. Returns what was minimised.
    ///
    /// `inputs` `[tokens, features]` and `labels` `[tokens, kv_heads]`, both row-major, are
    /// consecutive tokens of one text. `ages` `[tokens]` are how old units are when their label is what their score
    /// should be; heads that do not decay need none. `seed` draws the pairs of the ranking loss.
    ///
    /// # Errors
    /// [`PolicyError::Setting`] for lengths that don't fit; the device's.
    pub fn step(
        &mut self,
        inputs: Vec<f32>,
        labels: Vec<f32>,
        ages: &[f32],
        loss: &Loss,
        learning_rate: f64,
        seed: u64,
    ) -> Result<f32> {
        let (features, kv_heads) = (self.features(), self.kv_heads());
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
        let params = self.params.iter();
        let params: Vec<Tensor<2>> = params
            .map(|p| p.value.clone().autodiff().require_grad())
            .collect();
        let scores = scores(self.form, &params, x, ages)?;
        let regression = match loss.distance {
            Distance::SmoothL1 => smooth_l1(scores.clone(), y),
            Distance::Square => (scores.clone() - y).powi_scalar(2).mean(),
        };
        let mut total = regression.mul_scalar(loss.regression);
        if loss.smoothing > 0.0 && tokens > 1 {
            total = total + smoothness(scores.clone()).mul_scalar(loss.smoothing);
        }
        if let Some(pairs) = pairs {
            total = total + pairs.loss(scores).mul_scalar(loss.ranking);
        }
        let mut gradients = total.backward();
        let missing = || PolicyError::setting("training", "a weight has no gradient");
        let grads = params.iter().map(|p| p.grad_remove(&mut gradients));
        let grads = grads
            .map(|grad| grad.ok_or_else(missing))
            .collect::<Result<Vec<_>>>()?;
        // The graph holds the weights; the optimiser works in place when it is gone.
        drop((params, gradients));
        for (param, gradient) in self.params.iter_mut().zip(grads) {
            let optimizer = match param.value.dims()[0] {
                1 => &self.biases,
                _ => &self.matrices,
            };
            param.update(optimizer, gradient, self.clip, learning_rate);
        }
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

    /// Scores `[tokens, kv_heads]` of inputs `[tokens, features]`, both row-major, at these `ages` if they decay.
    ///
    /// # Errors
    /// [`PolicyError::Setting`] for a length that doesn't fit; the device's.
    pub fn scores(&self, inputs: Vec<f32>, ages: &[f32]) -> Result<Vec<f32>> {
        let features = self.features();
        let tokens = inputs.len() / features;
        if tokens * features != inputs.len() {
            return Err(PolicyError::setting(
                "training",
                "inputs are not whole rows",
            ));
        }
        let params: Vec<Tensor<2>> = self.params.iter().map(|p| p.value.clone()).collect();
        let x = from_f32(inputs, [tokens, features], &params[0].device());
        Ok(into_f32(scores(self.form, &params, x, ages)?)?)
    }

    /// The weights as they are now.
    ///
    /// # Errors
    /// The device's; [`PolicyError::NotFinite`] if training went astray.
    pub fn weights(&self) -> Result<LayerHead> {
        let mut all = Vec::with_capacity(self.params.len());
        let names = shapes(self.form, 1, 1, 1).into_iter();
        for ((name, _), param) in names.zip(self.save()?) {
            let [inputs, outputs] = param.shape;
            let values = transpose(&param.value, inputs, outputs);
            if let Some(index) = values.iter().position(|x| !x.is_finite()) {
                return Err(PolicyError::NotFinite {
                    key: name.into(),
                    index,
                });
            }
            all.push((name, values));
        }
        let mut take = |wanted: &str| {
            let found = all.iter_mut().find(|(name, _)| *name == wanted);
            found.map(|(_, values)| std::mem::take(values))
        };
        Ok(LayerHead {
            d_r: self.params[0].value.dims()[1],
            fc1: take("fc1").unwrap_or_default(),
            fc1_bias: take("fc1.bias").unwrap_or_default(),
            fc2: take("fc2").unwrap_or_default(),
            fc2_bias: take("fc2.bias").unwrap_or_default(),
            gate: None,
        })
    }

    pub(super) fn save(&self) -> Result<Vec<SavedParam>> {
        self.params.iter().map(Param::save).collect()
    }
}

/// The last bias that makes a score of `start`.
fn before(form: HeadForm, start: f32) -> f32 {
    match form {
        // The inverse of `logsigmoid`: `ln β` is below 0.
        HeadForm::Decay => -(-start.min(-1e-6)).exp_m1().ln(),
        _ => start,
    }
}

/// Scores `[tokens, kv_heads]` of inputs `[tokens, features]`.
fn scores(form: HeadForm, params: &[Tensor<2>], x: Tensor<2>, ages: &[f32]) -> Result<Tensor<2>> {
    let p = |index: usize| params[index].clone();
    let (tokens, device) = (x.dims()[0], x.device());
    Ok(match form {
        HeadForm::Locret => activation::silu(x.matmul(p(0))).matmul(p(1)),
        HeadForm::Linear => x.matmul(p(0)) + p(1),
        HeadForm::Mlp => activation::gelu(x.matmul(p(0)) + p(1)).matmul(p(2)) + p(3),
        _ => {
            if ages.len() != tokens {
                let message = format!("{} ages for {tokens} tokens", ages.len());
                return Err(PolicyError::setting("training", message));
            }
            let inner = activation::silu(x.matmul(p(0)) + p(1)).matmul(p(2)) + p(3);
            let ages = from_f32::<2>(ages.to_vec(), [tokens, 1], &device);
            activation::log_sigmoid(inner) * ages
        }
    })
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
