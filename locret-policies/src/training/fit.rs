//! Training of all heads, layer by layer, from what was collected.

use super::{
    Distance, FINGERPRINT, HeadTrainer, LabelKind, Loss, Metrics, RECALL_AT, Shard, ShardLayer,
    Shards, Split, Target, fingerprint,
    head::{Optimisation, SavedParam, shapes},
    metrics,
    shards::{Bytes, save},
};
use crate::{HeadForm, HeadWeights, LayerHead, PolicyError, Result};
use burn::tensor::Device;
use memmap2::Mmap;
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    ops::{ControlFlow, Range},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

/// How heads are trained.
///
/// The default is the authors' procedure (arXiv 2410.01805 §3.2 and §4.1) with a smaller `d_R`,
/// short spans and a share of the steps as warm-up. In code, begin with it and set the fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct TrainConfig {
    /// Which of the labels that were collected scores are fitted to.
    pub label: LabelKind,
    /// What heads compute.
    pub form: HeadForm,
    /// Intermediate features of a head; none in a linear one.
    pub d_r: usize,
    /// How often each sample is seen.
    pub epochs: usize,
    /// Consecutive tokens of a step.
    pub span: usize,
    /// The highest learning rate of AdamW.
    pub learning_rate: f64,
    /// The share of the steps during which the learning rate rises; then it falls to 0, both
    /// linearly.
    pub warmup: f64,
    /// Decay of the first moment.
    pub beta_1: f32,
    /// Decay of the second moment.
    pub beta_2: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Each element of a gradient is cut to ± this.
    pub clip: f32,
    /// Weight of the smoothing loss when it is summed over layers, `α`.
    pub alpha: f32,
    /// Weight of the regression loss.
    pub regression: f32,
    /// What that is a distance by.
    pub distance: Distance,
    /// Weight of the ranking loss ([`Loss::ranking`]).
    pub ranking: f32,
    /// The share of units above the cut of the ranking loss.
    pub cut: f32,
    /// What scores are fitted to.
    pub target: Target,
    /// A label becomes the largest of this many around it: 1 leaves it alone. Odd.
    pub pool: usize,
    /// How many of a text's first units are fitted to its highest label. Their own label is too low:
    /// every token pays these units a little attention, as sinks (arXiv 2309.17453), and a label is
    /// the most that any one token pays.
    pub sinks: usize,
    /// Seed of the weights and of the order of the spans.
    pub seed: u64,
    /// Layers that are trained at the same time. Has no influence on the result.
    pub threads: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            label: LabelKind::MaxLogit,
            form: HeadForm::Locret,
            d_r: 256,
            epochs: 4,
            span: 512,
            learning_rate: 5e-4,
            warmup: 0.1,
            beta_1: 0.9,
            beta_2: 0.95,
            weight_decay: 0.01,
            clip: 0.5,
            alpha: 0.0025,
            regression: 1.0,
            distance: Distance::SmoothL1,
            ranking: 0.0,
            cut: 0.125,
            target: Target::Raw,
            pool: 1,
            sinks: 0,
            seed: 0,
            threads: 2,
        }
    }
}

impl TrainConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// [`PolicyError::Setting`] for impossible ones.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: &str| Err(PolicyError::setting("training", message));
        if self.d_r == 0 || self.epochs == 0 || self.threads == 0 {
            return wrong("d_r, epochs and threads must be at least 1");
        }
        if self.form == HeadForm::Gate {
            return wrong("gates are not trained here");
        }
        if self.form == HeadForm::Decay
            && (self.label == LabelKind::MaxLogit || self.target == Target::Standardised)
        {
            return wrong("scores that decay are at most 0: fit them to logarithms of weights");
        }
        if self.span < 2 {
            return wrong("a span needs at least 2 tokens");
        }
        if self.pool.is_multiple_of(2) {
            return wrong("pool must be odd");
        }
        if !(0.0..=1.0).contains(&self.warmup) {
            return wrong("warmup is a share, 0 to 1");
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return wrong("learning_rate must be positive");
        }
        if !(self.cut > 0.0 && self.cut < 1.0) {
            return wrong("cut is a share between 0 and 1");
        }
        let weights = [self.alpha, self.regression, self.ranking, self.weight_decay];
        if weights.iter().any(|w| !w.is_finite() || *w < 0.0)
            || self.clip.is_nan()
            || self.clip <= 0.0
        {
            return wrong("weights of losses, weight_decay and clip cannot be negative");
        }
        for beta in [self.beta_1, self.beta_2] {
            if !(0.0..1.0).contains(&beta) {
                return wrong("beta_1 and beta_2 are at least 0 and below 1");
            }
        }
        Ok(())
    }

    /// The loss of one of `layers` layers.
    pub fn loss(&self, layers: usize) -> Loss {
        Loss {
            regression: self.regression,
            distance: self.distance,
            smoothing: self.alpha * layers as f32,
            ranking: self.ranking,
            cut: self.cut,
        }
    }

    /// The learning rate of step `step` (from 0) of `steps`; the very first is 0 where there is a
    /// warm-up, as it is in the authors' library.
    pub fn rate(&self, step: usize, steps: usize) -> f64 {
        let warm = (self.warmup * steps as f64).round();
        let step = step as f64;
        let share = if step < warm {
            step / warm
        } else {
            (steps as f64 - step) / (steps as f64 - warm).max(1.0)
        };
        self.learning_rate * share
    }

    fn optimisation(&self) -> Optimisation {
        Optimisation {
            beta_1: self.beta_1,
            beta_2: self.beta_2,
            weight_decay: self.weight_decay,
            clip: self.clip,
        }
    }

    /// Tells runs apart whose results can differ.
    fn fingerprint(&self, data: u64, layer: usize) -> Result<u64> {
        let same = Self {
            threads: 1,
            ..self.clone()
        };
        let text = serde_json::to_string(&same)
            .map_err(|e| PolicyError::setting("training", e.to_string()))?;
        let bytes = text.bytes().chain(data.to_le_bytes());
        Ok(fingerprint(
            FINGERPRINT,
            bytes.chain((layer as u64).to_le_bytes()),
        ))
    }
}

/// How the training of one layer went.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct LayerReport {
    /// The layer.
    pub layer: usize,
    /// Mean of what was minimised, over each eighth of an epoch: (steps so far, loss).
    pub curve: Vec<(usize, f32)>,
    /// After each epoch; empty if no sample was put aside for it.
    pub validation: Vec<Metrics>,
    /// Time spent.
    pub seconds: f64,
}

/// What [`train`] is doing.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum TrainProgress {
    /// A step was taken.
    Step {
        /// The layer.
        layer: usize,
        /// Steps taken in this layer.
        step: usize,
        /// Steps of a layer.
        steps: usize,
        /// What was minimised.
        loss: f32,
    },
    /// A layer is done, now or in an earlier run.
    Layer(LayerReport),
}

/// Trained heads.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// The weights.
    pub heads: HeadWeights,
    /// How each layer went.
    pub layers: Vec<LayerReport>,
}

impl Trained {
    /// Mean validation metrics over layers after the last epoch; `None` if nothing was measured.
    pub fn validation(&self) -> Option<Metrics> {
        let last: Vec<&Metrics> = self
            .layers
            .iter()
            .filter_map(|l| l.validation.last())
            .collect();
        (!last.is_empty()).then(|| Metrics::mean(last))
    }
}

/// Trains the head of every layer. `None` if `progress` stopped it.
///
/// `device` is one with gradients (`Device::autodiff`). After every epoch of a layer its state goes
/// to `folder`, so that a stopped or killed training goes on from there when it is called again
/// with the same shards and settings, to the same result.
///
/// `progress` is called from several threads, after every step and every layer.
///
/// # Errors
/// [`PolicyError::Setting`] for impossible settings or a loss that is not finite;
/// [`PolicyError::Io`] and [`PolicyError::File`] for files that cannot be read or written.
pub fn train(
    shards: &Shards,
    folder: &Path,
    config: &TrainConfig,
    device: &Device,
    progress: &(dyn Fn(&TrainProgress) -> ControlFlow<()> + Sync),
) -> Result<Option<Trained>> {
    config.validate()?;
    std::fs::create_dir_all(folder).map_err(PolicyError::io(folder))?;
    let layers = shards.layers();
    let next = AtomicUsize::new(0);
    let stopped = AtomicBool::new(false);
    let done = Mutex::new((BTreeMap::new(), None));
    let work = || {
        while !stopped.load(Ordering::Relaxed) {
            let layer = next.fetch_add(1, Ordering::Relaxed);
            if layer >= layers {
                return;
            }
            let result = Layer::new(shards, folder, config, device, layer)
                .and_then(|mut l| l.run(progress, &stopped));
            let mut done = done.lock().unwrap_or_else(|e| e.into_inner());
            match result {
                Ok(Some(trained)) => {
                    done.0.insert(layer, trained);
                }
                Ok(None) => stopped.store(true, Ordering::Relaxed),
                Err(error) => {
                    stopped.store(true, Ordering::Relaxed);
                    done.1.get_or_insert(error);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..config.threads.min(layers) {
            scope.spawn(work);
        }
        work();
    });
    let (done, error) = done.into_inner().unwrap_or_else(|e| e.into_inner());
    if let Some(error) = error {
        return Err(error);
    }
    if done.len() < layers {
        return Ok(None);
    }
    let (heads, reports) = done.into_values().unzip();
    Ok(Some(Trained {
        heads: HeadWeights {
            form: config.form,
            layers: heads,
            metadata: BTreeMap::new(),
        },
        layers: reports,
    }))
}

/// How many epochs of [`train`] fit into `seconds`, found by timing a few steps on this machine;
/// at least 1, at most what `config` asks for.
///
/// # Errors
/// As [`train`].
pub fn epochs_within(
    shards: &Shards,
    config: &TrainConfig,
    device: &Device,
    seconds: f64,
) -> Result<usize> {
    const STEPS: usize = 8;
    config.validate()?;
    let first = Data::new(shards, config, 0)?;
    let threads = config.threads.min(shards.layers()).max(1);
    let loss = config.loss(shards.layers());
    let time = || -> Result<()> {
        let mut head = first.head(config, device)?;
        for at in 0..STEPS {
            let (inputs, labels, ages) = first.step(at % first.pieces.len());
            head.step(inputs, labels, ages, &loss, 1e-6, 0)?;
        }
        Ok(())
    };
    time()?;
    let started = Instant::now();
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(time)).collect();
        let mine = time();
        let joined = others.into_iter().map(|o| o.join().unwrap_or(Ok(())));
        joined.fold(mine, |a, b| a.and(b))
    })?;
    let step = started.elapsed().as_secs_f64() / (STEPS * threads) as f64;
    let epoch = step * (first.pieces.len() * shards.layers()) as f64;
    Ok(((seconds / epoch) as usize).clamp(1, config.epochs))
}

/// One layer's rows of one sample.
struct Rows<'a> {
    layer: ShardLayer<'a>,
    /// What scores are fitted to, `[rows, kv_heads]`.
    labels: Vec<f32>,
    /// How old units are at the end of the text, `[rows]`.
    ages: Vec<f32>,
}

/// One layer's rows, and what scores are fitted to.
struct Data<'a> {
    train: Vec<Rows<'a>>,
    validation: Vec<Rows<'a>>,
    /// (sample, rows)
    pieces: Vec<(usize, Range<usize>)>,
    features: usize,
    kv_heads: usize,
    layer: usize,
}

impl<'a> Data<'a> {
    fn new(shards: &'a Shards, config: &TrainConfig, layer: usize) -> Result<Self> {
        let load = |shard: &'a Shard| {
            let layer = shard.layer(layer, config.form.reads(), config.label)?;
            let labels = targets(layer.labels(), layer.kv_heads(), &shard.spans(), config);
            let ages = shard.ages();
            Ok(Rows {
                layer,
                labels,
                ages,
            })
        };
        let train = shards
            .of(Split::Train)
            .map(load)
            .collect::<Result<Vec<_>>>()?;
        let validation = shards
            .of(Split::Validation)
            .map(load)
            .collect::<Result<Vec<_>>>()?;
        let mut pieces = Vec::new();
        for (index, shard) in shards.of(Split::Train).enumerate() {
            for span in shard.spans() {
                for start in span.clone().step_by(config.span) {
                    let piece = start..(start + config.span).min(span.end);
                    // What is left over at the end of a text weighs as much as a whole span.
                    let whole = piece.len() == config.span.min(span.len());
                    if piece.len() >= 2 && (whole || piece.len() >= config.span / 8) {
                        pieces.push((index, piece));
                    }
                }
            }
        }
        let (Some(rows), false) = (train.first(), pieces.is_empty()) else {
            return Err(PolicyError::setting(
                "training",
                "no sample is long enough for the span",
            ));
        };
        let (features, kv_heads) = (rows.layer.features(), rows.layer.kv_heads());
        let mut others = train.iter().chain(&validation).map(|rows| &rows.layer);
        if others.any(|r| (r.features(), r.kv_heads()) != (features, kv_heads)) {
            return Err(PolicyError::setting(
                "training",
                "the collected samples are not of one model",
            ));
        }
        Ok(Self {
            train,
            validation,
            pieces,
            features,
            kv_heads,
            layer,
        })
    }

    /// Names and shapes of a head's weights.
    fn shapes(&self, config: &TrainConfig) -> Vec<(&'static str, [usize; 2])> {
        shapes(config.form, self.features, config.d_r, self.kv_heads)
    }

    fn head(&self, config: &TrainConfig, device: &Device) -> Result<HeadTrainer> {
        let seed = config.seed ^ ((self.layer as u64 + 1) << 32);
        let (widths, start) = ([self.features, config.d_r], self.start(config.form));
        let params = HeadTrainer::new(config.form, widths, &start, seed, device)?.save()?;
        HeadTrainer::of(config.form, params, config.optimisation(), device)
    }

    /// What each KV head's scores begin at: the mean of its labels.
    fn start(&self, form: HeadForm) -> Vec<f32> {
        let mut sums = vec![0.0; self.kv_heads];
        let (mut rows, mut ages) = (0u32, 0.0);
        for sample in &self.train {
            for row in sample.labels.chunks_exact(self.kv_heads) {
                rows += 1;
                sums.iter_mut()
                    .zip(row)
                    .for_each(|(s, x)| *s += f64::from(*x));
            }
            ages += sample.ages.iter().map(|a| f64::from(*a)).sum::<f64>();
        }
        let each = match form {
            HeadForm::Decay => ages,
            _ => f64::from(rows),
        };
        sums.into_iter().map(|sum| (sum / each) as f32).collect()
    }

    /// Inputs, targets and ages of one piece.
    fn step(&self, piece: usize) -> (Vec<f32>, Vec<f32>, &[f32]) {
        let (sample, rows) = &self.pieces[piece];
        let Rows {
            layer,
            labels,
            ages,
        } = &self.train[*sample];
        let labels = &labels[rows.start * self.kv_heads..rows.end * self.kv_heads];
        let inputs = layer.inputs(rows.clone());
        (inputs, labels.to_vec(), &ages[rows.clone()])
    }

    fn measure(&self, head: &HeadTrainer) -> Result<Option<Metrics>> {
        let mut all = Vec::new();
        for Rows {
            layer,
            labels,
            ages,
        } in &self.validation
        {
            let scores = head.scores(layer.inputs(0..ages.len()), ages)?;
            for h in 0..self.kv_heads {
                let of = |values: &[f32]| -> Vec<f32> {
                    values
                        .iter()
                        .skip(h)
                        .step_by(self.kv_heads)
                        .copied()
                        .collect()
                };
                let (scores, labels) = (of(&scores), of(labels));
                all.push(Metrics {
                    loss: smooth_l1(&scores, &labels),
                    recall: RECALL_AT.map(|share| metrics::recall_at(&scores, &labels, share)),
                    pearson: metrics::pearson(&scores, &labels),
                });
            }
        }
        Ok((!all.is_empty()).then(|| Metrics::mean(&all)))
    }
}

fn smooth_l1(scores: &[f32], labels: &[f32]) -> f64 {
    let each = scores.iter().zip(labels).map(|(s, l)| {
        let d = f64::from((s - l).abs());
        if d < 1.0 { 0.5 * d * d } else { d - 0.5 }
    });
    each.sum::<f64>() / scores.len().max(1) as f64
}

/// What scores are fitted to: labels, pooled over neighbours of a span, those of the first units
/// raised, and all brought to one scale.
fn targets(
    labels: Vec<f32>,
    kv_heads: usize,
    spans: &[Range<usize>],
    config: &TrainConfig,
) -> Vec<f32> {
    let mut out = labels.clone();
    let reach = config.pool / 2;
    if reach > 0 {
        for span in spans {
            for row in span.clone() {
                let around =
                    row.saturating_sub(reach).max(span.start)..(row + reach + 1).min(span.end);
                for head in 0..kv_heads {
                    let of = |r: usize| labels[r * kv_heads + head];
                    let most = around.clone().map(of).fold(f32::NEG_INFINITY, f32::max);
                    out[row * kv_heads + head] = most;
                }
            }
        }
    }
    // The first stretch of a text begins with its first token.
    let first = spans.first().map_or(0, |s| s.len().min(config.sinks));
    if first > 0 {
        for head in 0..kv_heads {
            let all = out.iter().skip(head).step_by(kv_heads);
            let most = all.copied().fold(f32::NEG_INFINITY, f32::max);
            for row in 0..first {
                out[row * kv_heads + head] = most;
            }
        }
    }
    if config.target == Target::Standardised {
        for head in 0..kv_heads {
            let of = || {
                out.iter()
                    .skip(head)
                    .step_by(kv_heads)
                    .map(|x| f64::from(*x))
            };
            let n = of().count() as f64;
            let mean = of().sum::<f64>() / n;
            let deviation = (of().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
            let factor = if deviation > 0.0 {
                1.0 / deviation
            } else {
                0.0
            };
            for x in out.iter_mut().skip(head).step_by(kv_heads) {
                *x = ((f64::from(*x) - mean) * factor) as f32;
            }
        }
    }
    out
}

/// The training of one layer.
struct Layer<'a> {
    data: Data<'a>,
    config: &'a TrainConfig,
    loss: Loss,
    path: PathBuf,
    fingerprint: u64,
    head: HeadTrainer,
    epoch: usize,
    report: LayerReport,
}

/// What the metadata of a checkpoint say.
#[derive(Serialize, Deserialize)]
struct Meta {
    fingerprint: u64,
    epoch: usize,
    steps: usize,
    report: LayerReport,
}

/// The key of [`Meta`] in the metadata.
const META: &str = "locret_head";

impl<'a> Layer<'a> {
    fn new(
        shards: &'a Shards,
        folder: &Path,
        config: &'a TrainConfig,
        device: &Device,
        layer: usize,
    ) -> Result<Self> {
        let data = Data::new(shards, config, layer)?;
        let path = folder.join(format!("head-{layer:03}.safetensors"));
        let fingerprint = config.fingerprint(shards.fingerprint(), layer)?;
        let (head, epoch, report) = match read(&path, fingerprint, &data.shapes(config)) {
            Some((params, meta)) => {
                let head = HeadTrainer::of(config.form, params, config.optimisation(), device)?;
                (head, meta.epoch, meta.report)
            }
            None => {
                let report = LayerReport {
                    layer,
                    ..LayerReport::default()
                };
                (data.head(config, device)?, 0, report)
            }
        };
        Ok(Self {
            loss: config.loss(shards.layers()),
            data,
            config,
            path,
            fingerprint,
            head,
            epoch,
            report,
        })
    }

    fn run(
        &mut self,
        progress: &(dyn Fn(&TrainProgress) -> ControlFlow<()> + Sync),
        stopped: &AtomicBool,
    ) -> Result<Option<(LayerHead, LayerReport)>> {
        let count = self.data.pieces.len();
        let steps = count * self.config.epochs;
        while self.epoch < self.config.epochs {
            let started = Instant::now();
            let mut order: Vec<usize> = (0..count).collect();
            // From the epoch's number alone, so that a later run finds the same order.
            let seed = (self.config.seed)
                ^ ((self.report.layer as u64 + 1) << 32)
                ^ ((self.epoch as u64 + 1) << 48);
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            let (mut sum, mut taken) = (0.0, 0);
            for (i, piece) in order.into_iter().enumerate() {
                let step = self.epoch * count + i;
                let (inputs, labels, ages) = self.data.step(piece);
                let rate = self.config.rate(step, steps);
                let seed = seed.wrapping_add(step as u64);
                let loss = (self.head).step(inputs, labels, ages, &self.loss, rate, seed)?;
                sum += loss;
                taken += 1;
                if (i + 1) * 8 / count > i * 8 / count {
                    self.report.curve.push((step + 1, sum / taken as f32));
                    (sum, taken) = (0.0, 0);
                }
                let at = TrainProgress::Step {
                    layer: self.report.layer,
                    step: step + 1,
                    steps,
                    loss,
                };
                if progress(&at).is_break() || stopped.load(Ordering::Relaxed) {
                    return Ok(None);
                }
            }
            self.epoch += 1;
            self.report
                .validation
                .extend(self.data.measure(&self.head)?);
            self.report.seconds += started.elapsed().as_secs_f64();
            self.save()?;
        }
        if progress(&TrainProgress::Layer(self.report.clone())).is_break() {
            return Ok(None);
        }
        Ok(Some((self.head.weights()?, self.report.clone())))
    }

    fn save(&self) -> Result<()> {
        let names = self.data.shapes(self.config).into_iter();
        let mut steps = 0;
        let mut tensors = Vec::new();
        for ((name, _), param) in names.zip(self.head.save()?) {
            let mut add = |name: String, values: &[f32]| {
                let data = Bytes {
                    dtype: Dtype::F32,
                    shape: param.shape.to_vec(),
                    data: values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                };
                tensors.push((name, data));
            };
            add(name.to_owned(), &param.value);
            // A layer that is done needs no moments.
            if let (Some((first, second, taken)), true) =
                (&param.moments, self.epoch < self.config.epochs)
            {
                add(format!("{name}.first"), first);
                add(format!("{name}.second"), second);
                steps = *taken;
            }
        }
        let meta = Meta {
            fingerprint: self.fingerprint,
            epoch: self.epoch,
            steps,
            report: self.report.clone(),
        };
        let meta = serde_json::to_string(&meta).map_err(|e| PolicyError::file(&self.path, e))?;
        save(
            &self.path,
            tensors,
            HashMap::from([(META.to_owned(), meta)]),
        )
    }
}

/// A checkpoint of the training with this fingerprint, of matrices of these shapes. `None` for anything
/// else: training then starts from the beginning.
fn read(
    path: &Path,
    fingerprint: u64,
    shapes: &[(&str, [usize; 2])],
) -> Option<(Vec<SavedParam>, Meta)> {
    let file = File::open(path).ok()?;
    // SAFETY: checkpoints are written beside their place and renamed, never changed in place.
    let map = unsafe { Mmap::map(&file) }.ok()?;
    let (_, header) = SafeTensors::read_metadata(&map).ok()?;
    let meta: Meta = serde_json::from_str(header.metadata().as_ref()?.get(META)?).ok()?;
    if meta.fingerprint != fingerprint {
        return None;
    }
    let tensors = SafeTensors::deserialize(&map).ok()?;
    // The fingerprint is of settings and data. What the file holds beside it can still be damaged.
    let values = |name: &str, shape: [usize; 2]| -> Option<Vec<f32>> {
        let view = tensors.tensor(name).ok()?;
        if view.dtype() != Dtype::F32 || view.shape() != shape {
            return None;
        }
        let (quads, _) = view.data().as_chunks();
        Some(quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect())
    };
    let param = |name: &str, shape: [usize; 2]| -> Option<SavedParam> {
        let moments = match meta.steps {
            0 => None,
            steps => Some((
                values(&format!("{name}.first"), shape)?,
                values(&format!("{name}.second"), shape)?,
                steps,
            )),
        };
        Some(SavedParam {
            shape,
            value: values(name, shape)?,
            moments,
        })
    };
    let params = shapes.iter().map(|(name, shape)| param(name, *shape));
    Some((params.collect::<Option<Vec<_>>>()?, meta))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_and_falls() {
        let config = TrainConfig {
            learning_rate: 1.0,
            warmup: 0.2,
            ..TrainConfig::default()
        };
        let rates: Vec<f64> = (0..10).map(|s| config.rate(s, 10)).collect();
        assert_eq!(rates[..3], [0.0, 0.5, 1.0]);
        assert_eq!(rates[9], 0.125);
        assert!(rates.windows(2).skip(2).all(|w| w[1] < w[0]));
        let none = TrainConfig {
            warmup: 0.0,
            ..config
        };
        assert_eq!(none.rate(0, 4), 1.0);
    }

    #[test]
    fn targets_are_pooled_within_a_span_and_standardised() {
        let config = TrainConfig {
            pool: 3,
            ..TrainConfig::default()
        };
        let labels = vec![5.0, 0.0, 1.0, 0.0, 0.0, 0.0, 7.0, 1.0];
        let pooled = targets(labels.clone(), 2, &[0..3, 3..4], &config);
        assert_eq!(pooled, [5.0, 0.0, 5.0, 0.0, 1.0, 0.0, 7.0, 1.0]);
        let config = TrainConfig {
            target: Target::Standardised,
            ..TrainConfig::default()
        };
        let all = targets(labels, 2, &[0..3, 3..4], &config);
        let first: Vec<f32> = all.iter().step_by(2).copied().collect();
        assert!(first.iter().sum::<f32>().abs() < 1e-5);
        assert!((first.iter().map(|x| x * x).sum::<f32>() / 4.0 - 1.0).abs() < 1e-5);
        assert_eq!(first.iter().copied().fold(f32::MIN, f32::max), first[3]);
    }

    #[test]
    fn a_checkpoint_of_other_lengths_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("head.safetensors");
        let shapes = super::shapes(HeadForm::Mlp, 6, 4, 2);
        let write = |other: Option<(&str, [usize; 2])>| {
            let tensors = shapes
                .iter()
                .copied()
                .flat_map(|(name, shape)| {
                    ["", ".first", ".second"].map(|part| (format!("{name}{part}"), shape))
                })
                .map(|(name, shape)| {
                    let shape = match other {
                        Some((damaged, shape)) if damaged == name => shape,
                        _ => shape,
                    };
                    let data = Bytes {
                        dtype: Dtype::F32,
                        shape: shape.to_vec(),
                        data: vec![0; 4 * shape[0] * shape[1]],
                    };
                    (name, data)
                });
            let meta = Meta {
                fingerprint: 3,
                epoch: 1,
                steps: 5,
                report: LayerReport::default(),
            };
            let meta = serde_json::to_string(&meta).unwrap();
            let meta = HashMap::from([(META.to_owned(), meta)]);
            save(&path, tensors.collect(), meta).unwrap();
        };
        write(None);
        let (params, _) = read(&path, 3, &shapes).unwrap();
        let config = TrainConfig::default();
        let device = Device::flex().autodiff();
        HeadTrainer::of(HeadForm::Mlp, params, config.optimisation(), &device).unwrap();
        assert!(read(&path, 4, &shapes).is_none());
        let wider = super::shapes(HeadForm::Mlp, 6, 4, 3);
        assert!(read(&path, 3, &wider).is_none());
        for (name, shape) in [
            ("fc1", [4, 6]),
            ("fc2", [4, 1]),
            ("fc1.first", [1, 4]),
            ("fc1.second", [6, 5]),
            ("fc2.first", [2, 4]),
            ("fc2.second", [0, 2]),
            ("fc1.bias", [4, 1]),
            ("fc2.bias.first", [1, 3]),
        ] {
            write(Some((name, shape)));
            assert!(read(&path, 3, &shapes).is_none(), "{name} {shape:?}");
        }
    }

    #[test]
    fn impossible_settings_are_refused() {
        let good = TrainConfig::default();
        good.validate().unwrap();
        let with = |change: fn(&mut TrainConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config
        };
        for bad in [
            with(|c| c.d_r = 0),
            with(|c| c.form = HeadForm::Gate),
            with(|c| c.form = HeadForm::Decay),
            with(|c| c.span = 1),
            with(|c| c.pool = 2),
            with(|c| c.warmup = 1.5),
            with(|c| c.learning_rate = f64::NAN),
            with(|c| c.cut = 1.0),
            with(|c| c.alpha = -1.0),
            with(|c| c.beta_2 = 1.0),
            with(|c| c.clip = f32::NAN),
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }
}
