//! A cache in plain loops, written from the papers and from `Evict`'s documentation alone, and a way
//! to drive it and the real one through the same steps.
#![allow(dead_code, unreachable_pub)]

use burn::tensor::Device;
use locret_core::{
    CacheOptions, DType, DecodeEviction, Guard, KvCachePolicy, ModelSpec, Pass, Phase, Positions,
    Qkv, RopeConfig, Rows, SequenceCache, compute,
};
use locret_policies::{Gate, HeadForm, HeadWeights, LayerHead, Method, PolicyConfig, Random};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// splitmix64: numbers that need no crate to be made again.
#[derive(Debug, Clone)]
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    pub fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0
    }

    pub fn list(&mut self, n: usize, bound: f32) -> Vec<f32> {
        (0..n).map(|_| self.number() * bound).collect()
    }
}

/// A model's shape with `kv_heads * group` heads.
pub fn spec(layers: usize, kv_heads: usize, group: usize, head_dim: usize) -> ModelSpec {
    ModelSpec::new(layers, kv_heads * group, kv_heads, 4, 16)
        .with_head_dim(head_dim)
        .with_rope(RopeConfig::plain(THETA, head_dim))
        .with_layer_input()
}

const THETA: f64 = 1000.0;

/// What a step brings: its kind, and for each layer q, k, v, token-major.
#[derive(Debug, Clone)]
pub struct StepInput {
    pub phase: Phase,
    pub tokens: usize,
    pub layers: Vec<[Vec<f32>; 3]>,
    pub surprisal: Vec<f32>,
}

/// Steps of a prompt of `prompt` tokens in chunks of `chunk` with a tail of `local`, then `decode`
/// single tokens.
pub fn steps(
    spec: &ModelSpec,
    numbers: &mut Numbers,
    prompt: usize,
    chunk: usize,
    local: usize,
    decode: usize,
    first: bool,
) -> Vec<StepInput> {
    let body = prompt - local.min(prompt);
    let mut lengths = Vec::new();
    let mut at = 0;
    while at < body {
        let t = chunk.min(body - at);
        at += t;
        lengths.push((Phase::Prefill { last: at == body }, t));
    }
    if prompt > body {
        lengths.push((Phase::Tail, prompt - body));
    }
    lengths.extend((0..decode).map(|_| (Phase::Decode, 1)));
    let (h, g, d) = (spec.heads, spec.kv_heads, spec.head_dim);
    let mut steps: Vec<StepInput> = lengths
        .into_iter()
        .map(|(phase, t)| StepInput {
            phase,
            tokens: t,
            layers: (0..spec.layers)
                .map(|_| [h, g, g].map(|heads| numbers.list(t * heads * d, 2.0)))
                .collect(),
            surprisal: (0..t).map(|_| numbers.number().abs() * 9.0).collect(),
        })
        .collect();
    if first && let Some(step) = steps.first_mut() {
        step.surprisal[0] = f32::NAN;
    }
    steps
}

/// Puts a step through the real cache; returns each layer's attention output.
pub fn drive(
    cache: &mut SequenceCache,
    step: &StepInput,
    total: usize,
) -> locret_core::Result<Vec<Vec<f32>>> {
    let device = Device::default();
    let rows = |x: &Vec<f32>| Rows::new(x.clone(), x.len() / step.tokens, &device);
    let needs_surprisal = cache.policy().needs().surprisal;
    let cache_hidden = cache.spec().hidden;
    let mut pass = Pass::new([cache.step(step.phase, step.tokens, total)])?;
    let mut outputs = Vec::new();
    for (layer, [q, k, v]) in step.layers.iter().enumerate() {
        // The layer's input is of no matter to q, k and v here; some of its numbers are there.
        let width = q.len() / step.tokens;
        let hidden = cache_hidden;
        let input: Vec<f32> = (q.chunks(width).flat_map(|row| &row[..hidden]).copied()).collect();
        let qkv = Qkv::new(rows(q)?, rows(k)?, rows(v)?).made_from(rows(&input)?);
        outputs.push(pass.attend(layer, qkv)?.into_values()?);
    }
    pass.finish(needs_surprisal.then_some(&step.surprisal[..]))?;
    Ok(outputs)
}

pub fn cache(spec: &ModelSpec, policy: Arc<dyn KvCachePolicy>) -> SequenceCache {
    let compute = compute(&Device::default());
    SequenceCache::new(spec, policy, &compute, CacheOptions::default()).unwrap()
}

/// One unit of one KV head.
#[derive(Debug, Clone)]
pub struct Unit {
    pub position: usize,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// The value that it was born with, before anything was folded into it.
    pub born: Vec<f32>,
    /// And its key.
    pub born_key: Vec<f32>,
    pub score: f64,
    /// What all queries have paid it so far, mean over the group.
    pub attention: f64,
}

/// How the naive cache scores; see the type of the same name in the crate.
#[derive(Debug, Clone)]
pub enum Rule {
    Full,
    Window,
    KeyNorm,
    KeyDiff,
    /// Decay at a turn.
    SirLlm(f64),
    /// Each layer's fc1 `[d_r, inputs]`, fc2 `[G, d_r]`.
    Locret(Vec<(Vec<f32>, Vec<f32>)>),
    H2o,
    /// Attention as a sum.
    Heavy,
    /// Window and kernel.
    SnapKv(usize, usize),
    Tova,
    /// Positions ahead, and whether heads compete (0.01 is added to shares then).
    ExpectedAttention(usize, bool),
    /// Units of a partition.
    LagKv(usize),
    /// Tokens of a window.
    Cur(usize),
    /// Each layer's directions, `[G, d]`.
    QFilters(Vec<Vec<f32>>),
    /// Tokens of a tile, and each layer's random matrices, `[G, d, 48]`.
    Compactor(usize, Vec<Vec<f32>>),
}

/// D2O and CaM.
#[derive(Debug, Clone, Copy)]
pub enum Folding {
    D2o {
        /// As the authors' program has it.
        code: bool,
        keys: bool,
        smoothing: f64,
        exempt: (usize, usize),
    },
    Cam {
        next: usize,
        seed: u64,
        sums: bool,
    },
}

/// Everything that `Evict` is told, and how to score.
#[derive(Debug, Clone)]
pub struct Settings {
    pub rule: Rule,
    pub budget: usize,
    pub guard: Guard,
    pub positions: Positions,
    pub decode: DecodeEviction,
    pub pool: usize,
    pub pyramid: Option<f64>,
    pub ada: Option<f64>,
    /// Whether heads of all layers share.
    pub model: bool,
    /// By layer, one share or one for each head.
    pub table: Option<Vec<Vec<f64>>>,
    /// The cosine from which dropped values are folded into kept ones.
    pub merge: Option<f32>,
    /// Whether they count by likeness and length.
    pub weighted: bool,
    /// Another way of folding what is dropped.
    pub fold: Option<Folding>,
    /// Tokens of blocks that stay or go together.
    pub blocks: Option<usize>,
    /// Each layer's output projection, `[hidden, heads * head_dim]`, if values are weighed behind it.
    pub critical: Option<Vec<Vec<f32>>>,
}

impl Settings {
    /// A rule and a budget, original positions, nothing else.
    pub fn plain(rule: Rule, budget: usize) -> Self {
        Self {
            rule,
            budget,
            guard: Guard::default(),
            positions: Positions::Original,
            decode: DecodeEviction::Off,
            pool: 1,
            pyramid: None,
            ada: None,
            model: false,
            table: None,
            merge: None,
            weighted: false,
            fold: None,
            blocks: None,
            critical: None,
        }
    }
}

/// The cache in plain loops.
pub struct Naive {
    pub spec: ModelSpec,
    pub settings: Settings,
    /// `[layer][head][unit]`
    pub units: Vec<Vec<Vec<Unit>>>,
    pub seen: usize,
    /// The same with the tokens of the step that is under way.
    pub read: usize,
    /// `[layer][query head]`: queries of prompts before rotation, without the first four tokens'.
    pub queries: Vec<Vec<Vec<Vec<f64>>>>,
    /// D2O's thresholds, by layer.
    pub thresholds: Vec<Option<f64>>,
    /// The smallest relative distance between a score that was kept and one that was not, so far.
    pub margin: f64,
}

impl Naive {
    pub fn new(spec: &ModelSpec, settings: Settings) -> Self {
        Self {
            units: vec![vec![Vec::new(); spec.kv_heads]; spec.layers],
            queries: vec![vec![Vec::new(); spec.heads]; spec.layers],
            thresholds: vec![None; spec.layers],
            spec: spec.clone(),
            settings,
            seen: 0,
            read: 0,
            margin: f64::INFINITY,
        }
    }

    /// Rotates one vector.
    fn rotate<T: Copy + Into<f64>>(&self, x: &[T], position: usize) -> Vec<f64> {
        self.turn_by(x, position as f64)
    }

    fn turn_by<T: Copy + Into<f64>>(&self, x: &[T], position: f64) -> Vec<f64> {
        let half = self.spec.head_dim / 2;
        let mut out = vec![0.0; x.len()];
        for i in 0..half {
            let angle = position * THETA.powf(-2.0 * i as f64 / self.spec.head_dim as f64);
            let (a, b): (f64, f64) = (x[i].into(), x[i + half].into());
            out[i] = a * angle.cos() - b * angle.sin();
            out[i + half] = b * angle.cos() + a * angle.sin();
        }
        out
    }

    pub fn turn(&mut self) {
        for layer in 0..self.spec.layers {
            if let Rule::SirLlm(decay) = self.settings.rule {
                for unit in self.units[layer].iter_mut().flatten() {
                    unit.score *= decay;
                }
            }
        }
        self.evict_all(Phase::Turn);
    }

    pub fn step(&mut self, step: &StepInput) -> Vec<Vec<f64>> {
        let outputs = (0..self.spec.layers)
            .map(|layer| self.layer(layer, step))
            .collect();
        self.read = self.seen + step.tokens;
        // When does not matter here: no layer looks at another one.
        self.evict_all(step.phase);
        self.seen += step.tokens;
        outputs
    }

    fn layer(&mut self, layer: usize, step: &StepInput) -> Vec<f64> {
        let ModelSpec {
            heads,
            kv_heads,
            head_dim: d,
            ..
        } = self.spec;
        let (group, t) = (heads / kv_heads, step.tokens);
        let [q, k, v] = &step.layers[layer];
        if matches!(step.phase, Phase::Prefill { .. } | Phase::Tail) {
            for (row, query) in q.chunks(d).enumerate() {
                if self.seen + row / heads >= 4 {
                    let query = query.iter().map(|x| f64::from(*x)).collect();
                    self.queries[layer][row % heads].push(query);
                }
            }
        }
        let before: Vec<usize> = self.units[layer].iter().map(Vec::len).collect();
        for token in 0..t {
            for head in 0..kv_heads {
                let row = (token * kv_heads + head) * d;
                self.units[layer][head].push(Unit {
                    position: self.seen + token,
                    k: k[row..row + d].to_vec(),
                    v: v[row..row + d].to_vec(),
                    born: v[row..row + d].to_vec(),
                    born_key: k[row..row + d].to_vec(),
                    score: 0.0,
                    attention: 0.0,
                });
            }
        }
        let compact = self.settings.positions == Positions::Compact;
        let mut output = vec![0.0; t * heads * d];
        // [query head][query][unit], 0 where a unit is in the future.
        let mut weights = vec![Vec::new(); heads];
        let mut rotated_keys = Vec::new();
        for head in 0..kv_heads {
            let units = &self.units[layer][head];
            let keys: Vec<Vec<f64>> = units
                .iter()
                .enumerate()
                .map(|(i, unit)| self.rotate(&unit.k, if compact { i } else { unit.position }))
                .collect();
            for h in head * group..(head + 1) * group {
                for token in 0..t {
                    let row = (token * heads + h) * d;
                    let place = if compact {
                        before[head] + token
                    } else {
                        self.seen + token
                    };
                    let query = self.rotate(&q[row..row + d], place);
                    let seen = before[head] + token + 1;
                    let logits: Vec<f64> = keys[..seen]
                        .iter()
                        .map(|key| dot(&query, key) / (d as f64).sqrt())
                        .collect();
                    let mut row_weights = softmax(&logits);
                    for (weight, unit) in row_weights.iter().zip(units) {
                        for (i, x) in unit.v.iter().enumerate() {
                            output[row + i] += weight * f64::from(*x);
                        }
                    }
                    row_weights.resize(units.len(), 0.0);
                    weights[h].push(row_weights);
                }
            }
            rotated_keys.push(keys);
        }
        for head in 0..kv_heads {
            for (i, unit) in self.units[layer][head].iter_mut().enumerate() {
                for rows in &weights[head * group..(head + 1) * group] {
                    let paid: f64 = rows.iter().map(|row| row[i]).sum();
                    unit.attention += paid / group as f64;
                }
            }
        }
        self.score(layer, step, &before, &weights, &rotated_keys);
        output
    }

    fn score(
        &mut self,
        layer: usize,
        step: &StepInput,
        before: &[usize],
        weights: &[Vec<Vec<f64>>],
        keys: &[Vec<Vec<f64>>],
    ) {
        let ModelSpec {
            heads,
            kv_heads,
            head_dim: d,
            ..
        } = self.spec;
        let (group, t) = (heads / kv_heads, step.tokens);
        let compact = self.settings.positions == Positions::Compact;
        for head in 0..kv_heads {
            let n = self.units[layer][head].len();
            let position = |i: usize| self.units[layer][head][i].position;
            let mut closest = f64::INFINITY;
            let scores: Vec<f64> = match &self.settings.rule {
                Rule::ExpectedAttention(future, shared) => {
                    let next = if compact { n } else { self.seen + t };
                    // The mean of the rotations, as a matrix.
                    let mut turn = vec![vec![0.0; d]; d];
                    for column in 0..d {
                        let mut unit = vec![0.0; d];
                        unit[column] = 1.0;
                        for position in next..next + future {
                            let turned = self.rotate(&unit, position);
                            for row in 0..d {
                                turn[row][column] += turned[row] / *future as f64;
                            }
                        }
                    }
                    let turned = |x: &[f64]| turn.iter().map(|row| dot(row, x)).collect::<Vec<_>>();
                    let scale = 1.0 / (d as f64).sqrt();
                    let mut scores = vec![0.0; n];
                    for h in head * group..(head + 1) * group {
                        let queries: Vec<Vec<f64>> =
                            self.queries[layer][h].iter().map(|q| turned(q)).collect();
                        let count = queries.len().max(1) as f64;
                        let mean: Vec<f64> = (0..d)
                            .map(|i| queries.iter().map(|q| q[i]).sum::<f64>() / count)
                            .collect();
                        // Of what queries pay a key, the mean and the variance.
                        let logit = |i: usize| {
                            let key = &keys[head][i];
                            let variance: f64 = queries
                                .iter()
                                .map(|q| (dot(q, key) - dot(&mean, key)).powi(2))
                                .sum::<f64>()
                                / count;
                            scale * dot(&mean, key) + scale * scale * variance / 2.0
                        };
                        let late: Vec<usize> = (0..n).filter(|i| position(*i) >= 4).collect();
                        let logits: Vec<f64> = late.iter().map(|i| logit(*i)).collect();
                        for (i, share) in late.into_iter().zip(softmax(&logits)) {
                            scores[i] += share / group as f64;
                        }
                    }
                    let epsilon = if *shared { f64::from(0.01f32) } else { 0.0 };
                    for (i, score) in scores.iter_mut().enumerate() {
                        let v = &self.units[layer][head][i].v;
                        let square: f64 = v.iter().map(|x| f64::from(*x).powi(2)).sum();
                        // The first ones stand above all others.
                        *score = match position(i) < 4 {
                            true => 1e9,
                            false => (*score + epsilon) * square.sqrt(),
                        };
                    }
                    scores
                }
                Rule::LagKv(lag) => {
                    let part = |i: usize| position(i).checked_sub(4).map(|p| p / lag);
                    let whole = |tokens: usize| tokens.saturating_sub(4) / lag;
                    let mut scores: Vec<f64> = (0..n)
                        .map(|i| match i < before[head] {
                            true => self.units[layer][head][i].score,
                            false => 1.0 + position(i).saturating_sub(4) as f64,
                        })
                        .collect();
                    for p in 0..whole(self.seen + t) {
                        // Judged in the step that completes the partition after it.
                        if p + 1 >= whole(self.seen + t) || p + 1 < whole(self.seen) {
                            continue;
                        }
                        let of = |p: usize| (0..n).filter(move |i| part(*i) == Some(p));
                        let values = |i: usize| -> Vec<f64> {
                            let v = &self.units[layer][head][i].v;
                            v.iter().map(|x| f64::from(*x)).collect()
                        };
                        let mut means = vec![0.0; of(p).count()];
                        for by_keys in [true, false] {
                            let row = |i: usize| match by_keys {
                                true => keys[head][i].clone(),
                                false => values(i),
                            };
                            let deviations: Vec<f64> = of(p)
                                .map(|i| {
                                    let x: Vec<f64> = (0..d)
                                        .map(|c| {
                                            let there = of(p + 1).map(|j| row(j)[c]);
                                            let (least, most) = there.fold(
                                                (f64::INFINITY, f64::NEG_INFINITY),
                                                |(a, b), x| (a.min(x), b.max(x)),
                                            );
                                            match most > least {
                                                true => (row(i)[c] - least) / (most - least),
                                                false => 0.0,
                                            }
                                        })
                                        .collect();
                                    let mean = x.iter().sum::<f64>() / d as f64;
                                    let squares: f64 = x.iter().map(|x| (x - mean).powi(2)).sum();
                                    (squares / (d as f64 - 1.0)).sqrt()
                                })
                                .collect();
                            for (mean, share) in means.iter_mut().zip(softmax(&deviations)) {
                                *mean += share;
                            }
                        }
                        for (at, i) in of(p).enumerate() {
                            let below = means.iter().filter(|m| **m < means[at]).count();
                            scores[i] = below as f64 / means.len() as f64;
                            for (other, mean) in means.iter().enumerate() {
                                if other != at {
                                    closest = closest.min((mean - means[at]).abs() / mean);
                                }
                            }
                        }
                    }
                    scores
                }
                Rule::Cur(window) => {
                    let squares = |i: usize| {
                        let unit = &self.units[layer][head][i];
                        [&unit.born_key, &unit.born]
                            .map(|x| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>())
                    };
                    (0..n)
                        .map(|i| {
                            if position(i) < 4 {
                                return 1.0;
                            }
                            if position(i) / window < self.seen / window {
                                return self.units[layer][head][i].score;
                            }
                            let mates =
                                (0..n).filter(|j| position(*j) / window == position(i) / window);
                            let (own, mut sums) = (squares(i), [0.0; 2]);
                            for mate in mates {
                                let mate = squares(mate);
                                sums = [sums[0] + mate[0], sums[1] + mate[1]];
                            }
                            own[0] / sums[0] * own[1] / sums[1]
                        })
                        .collect()
                }
                Rule::Compactor(tile, sketches) => {
                    let judged = self.compactor(step, layer, *tile, &sketches[layer]);
                    let first = 8usize.saturating_sub(self.seen).min(t);
                    // Fewer keys than features stand out equally from their mean, and what little they differ by is
                    // brought to one scale: rounding decides.
                    if judged.as_ref().is_some_and(|all| all[head].len() < d) {
                        closest = 0.0;
                    }
                    let most = judged.as_ref().map(|all| {
                        let own = all[head].iter().copied();
                        own.fold(f64::NEG_INFINITY, f64::max)
                    });
                    (0..n)
                        .map(|i| {
                            if i < before[head] {
                                return self.units[layer][head][i].score;
                            }
                            let token = i - before[head];
                            let Some(all) = &judged else {
                                return (self.seen + token) as f64 * 1e-9;
                            };
                            let own = token.checked_sub(first);
                            let own = own.and_then(|token| all[head].get(token));
                            own.copied().unwrap_or(most.unwrap())
                        })
                        .collect()
                }
                Rule::QFilters(filters) => {
                    let direction = filters[layer][head * d..(head + 1) * d].iter();
                    let direction: Vec<f64> = direction.map(|x| f64::from(*x)).collect();
                    keys[head].iter().map(|k| dot(k, &direction)).collect()
                }
                Rule::Full => vec![0.0; n],
                Rule::Window => (0..n).map(|i| i as f64).collect(),
                Rule::KeyNorm => keys[head].iter().map(|k| -dot(k, k).sqrt()).collect(),
                Rule::KeyDiff => {
                    let unit: Vec<Vec<f64>> = keys[head]
                        .iter()
                        .map(|k| k.iter().map(|x| x / dot(k, k).sqrt()).collect())
                        .collect();
                    let mean: Vec<f64> = (0..d)
                        .map(|i| unit.iter().map(|k| k[i]).sum::<f64>() / n as f64)
                        .collect();
                    let length = dot(&mean, &mean).sqrt();
                    unit.iter().map(|k| -dot(k, &mean) / length).collect()
                }
                Rule::SirLlm(_) => (0..n)
                    .map(|i| {
                        if i < before[head] {
                            return self.units[layer][head][i].score;
                        }
                        let own = step.surprisal[i - before[head]];
                        if own.is_nan() {
                            let known = step.surprisal.iter().filter(|s| !s.is_nan());
                            known.fold(0.0, |a, b| f64::from(*b).max(a))
                        } else {
                            f64::from(own)
                        }
                    })
                    .collect(),
                Rule::Locret(weights) => (0..n)
                    .map(|i| {
                        if i < before[head] {
                            return self.units[layer][head][i].score;
                        }
                        let token = i - before[head];
                        let (fc1, fc2) = &weights[layer];
                        let input: Vec<f64> = step.layers[layer]
                            .iter()
                            .flat_map(|part| {
                                let width = part.len() / t;
                                part[token * width..(token + 1) * width].iter()
                            })
                            .map(|x| f64::from(*x))
                            .collect();
                        let d_r = fc2.len() / kv_heads;
                        (0..d_r)
                            .map(|r| {
                                let row = &fc1[r * input.len()..(r + 1) * input.len()];
                                let x: f64 =
                                    row.iter().zip(&input).map(|(w, x)| f64::from(*w) * x).sum();
                                x / (1.0 + (-x).exp()) * f64::from(fc2[head * d_r + r])
                            })
                            .sum()
                    })
                    .collect(),
                Rule::H2o => (0..n)
                    .map(|i| {
                        let unit = &self.units[layer][head][i];
                        let mut paid =
                            unit.score * (self.seen.max(unit.position) - unit.position) as f64;
                        for h in head * group..(head + 1) * group {
                            paid += weights[h].iter().map(|row| row[i]).sum::<f64>() / group as f64;
                        }
                        paid / (self.seen + t - unit.position) as f64
                    })
                    .collect(),
                Rule::Heavy => (self.units[layer][head].iter())
                    .map(|unit| unit.attention)
                    .collect(),
                Rule::SnapKv(window, kernel) => {
                    let last = (*window).min(t);
                    let older = n - last;
                    let mut scores = vec![0.0; n];
                    for h in head * group..(head + 1) * group {
                        let mean: Vec<f64> = (0..older)
                            .map(|i| {
                                let rows = &weights[h][t - last..];
                                rows.iter().map(|row| row[i]).sum::<f64>() / last as f64
                            })
                            .collect();
                        for (i, score) in scores[..older].iter_mut().enumerate() {
                            for j in 0..older {
                                if i.abs_diff(j) <= kernel / 2 {
                                    *score += mean[j] / (*kernel * group) as f64;
                                }
                            }
                        }
                    }
                    let most = scores.iter().copied().fold(0.0, f64::max);
                    scores[older..].fill(most);
                    scores
                }
                Rule::Tova => (0..n)
                    .map(|i| {
                        let position = self.units[layer][head][i].position;
                        let mut paid = 0.0;
                        for (h, weights) in weights.iter().enumerate() {
                            let mut held = self.units[layer][h / group].iter();
                            if let Some(at) = held.position(|unit| unit.position == position) {
                                paid += weights[t - 1][at];
                            }
                        }
                        paid / heads as f64
                    })
                    .collect(),
            };
            self.margin = self.margin.min(closest);
            for (unit, score) in self.units[layer][head].iter_mut().zip(scores) {
                unit.score = score;
            }
        }
    }

    /// Compactor's scores of a step's tokens but those at a text's ends, by KV head; `None` for too few.
    fn compactor(
        &self,
        step: &StepInput,
        layer: usize,
        tile: usize,
        sketch: &[f32],
    ) -> Option<Vec<Vec<f64>>> {
        let ModelSpec {
            heads,
            kv_heads,
            head_dim: d,
            ..
        } = self.spec;
        let (group, t) = (heads / kv_heads, step.tokens);
        let first = 8usize.saturating_sub(self.seen).min(t);
        let end = match step.phase {
            Phase::Prefill { last: true } => t - 4.min(t - first),
            _ => t,
        };
        if end - first < 2 {
            return None;
        }
        let [q, k, v] = &step.layers[layer];
        let row = |all: &[f32], of: usize, token: usize, head: usize| -> Vec<f64> {
            let at = (token * of + head) * d;
            all[at..at + d].iter().map(|x| f64::from(*x)).collect()
        };
        let (mut leverages, mut paid) = (Vec::new(), Vec::new());
        for head in 0..kv_heads {
            // Centred keys times the random matrix.
            let plain: Vec<Vec<f64>> = (first..end).map(|i| row(k, kv_heads, i, head)).collect();
            let mean: Vec<f64> = (0..d)
                .map(|c| plain.iter().map(|k| k[c]).sum::<f64>() / plain.len() as f64)
                .collect();
            let rows: Vec<Vec<f64>> = plain
                .iter()
                .map(|key| {
                    (0..48)
                        .map(|c| {
                            let weight = |i: usize| f64::from(sketch[(head * d + i) * 48 + c]);
                            (0..d).map(|i| (key[i] - mean[i]) * weight(i)).sum()
                        })
                        .collect()
                })
                .collect();
            let mut matrix = vec![vec![0.0; 48]; 48];
            for (i, sums) in matrix.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = rows.iter().map(|x| x[i] * x[j]).sum();
                }
                sums[i] += 0.01;
            }
            leverages.push(rows.iter().map(|x| dot(x, &solved(&matrix, x))).collect());
            let mut sums = vec![0.0; end - first];
            for a in head * group..(head + 1) * group {
                for from in (first..end).step_by(tile) {
                    let to = (from + tile).min(end);
                    for i in from..to {
                        let query = self.rotate(&row(q, heads, i, a), i);
                        let logits: Vec<f64> = (from..to)
                            .map(|j| dot(&query, &self.rotate(&row(k, kv_heads, j, head), j)))
                            .collect();
                        for (j, weight) in softmax(&logits).into_iter().enumerate() {
                            sums[from - first + j] += weight / group as f64;
                        }
                    }
                }
            }
            for (i, sum) in sums.iter_mut().enumerate() {
                let value = row(v, kv_heads, first + i, head);
                *sum *= dot(&value, &value).sqrt();
            }
            let near = |i: usize| (0..sums.len()).filter(move |j| i.abs_diff(*j) <= 1);
            let pooled = (0..sums.len()).map(|i| near(i).map(|j| sums[j]).sum::<f64>() / 3.0);
            paid.push(pooled.collect());
        }
        let scaled = |lists: &[Vec<f64>]| -> Vec<Vec<f64>> {
            let all: Vec<f64> = lists.concat();
            let mean = all.iter().sum::<f64>() / all.len() as f64;
            let squares: f64 = all.iter().map(|x| (x - mean).powi(2)).sum();
            let deviation = (squares / (all.len() as f64 - 1.0)).sqrt().max(1e-6);
            let of = |list: &Vec<f64>| list.iter().map(|x| (x - mean) / deviation).collect();
            lists.iter().map(of).collect()
        };
        let (leverages, mut paid) = (scaled(&leverages), scaled(&paid));
        for (paid, leverages) in paid.iter_mut().zip(&leverages) {
            for (score, x) in paid.iter_mut().zip(leverages) {
                *score += f64::from(0.35f32) * x;
            }
        }
        Some(paid)
    }

    /// Units for each head of each layer, on average where they share.
    fn budgets(&self) -> Vec<Vec<usize>> {
        let Settings {
            budget,
            pyramid,
            table,
            ..
        } = &self.settings;
        let (layers, heads) = (self.spec.layers, self.spec.kv_heads);
        let mut all = vec![vec![*budget; heads]; layers];
        if let Some(table) = table {
            // Cells in order; what each has beyond 1 is what rounding leaves of all that came so far.
            let width = table[0].len();
            let cells: Vec<f64> = table.iter().flatten().copied().collect();
            let whole: f64 = cells.iter().sum();
            let rest = ((budget - 1) * layers * width) as f64;
            let upto = |n: usize| {
                let part: f64 = cells[..n].iter().sum();
                (rest * part / whole).round() as usize
            };
            for (layer, heads) in all.iter_mut().enumerate() {
                for (head, units) in heads.iter_mut().enumerate() {
                    let cell = layer * width + head.min(width - 1);
                    *units = 1 + upto(cell + 1) - upto(cell);
                }
            }
        } else if let Some(beta) = pyramid
            && layers > 1
        {
            let budget = *budget as f64;
            // Sums of the first layers, rounded, so that all layers have `layers * budget`.
            let exact = |l: usize| {
                let (first, last) = (2.0 * budget - budget / beta, budget / beta);
                first + (last - first) * l as f64 / (layers as f64 - 1.0)
            };
            let sum = |n: usize| (0..n).map(exact).sum::<f64>().round() as usize;
            for (layer, heads) in all.iter_mut().enumerate() {
                heads.fill((sum(layer + 1) - sum(layer)).max(1));
            }
        }
        all
    }

    /// Layers that share a budget together, the others one by one.
    fn evict_all(&mut self, phase: Phase) {
        let layers: Vec<usize> = (0..self.spec.layers).collect();
        match self.settings.model {
            true => self.evict(&layers, phase),
            false => layers.iter().for_each(|l| self.evict(&[*l], phase)),
        }
    }

    fn evict(&mut self, layers: &[usize], phase: Phase) {
        if matches!(self.settings.rule, Rule::Full) {
            return;
        }
        let Settings {
            guard,
            decode,
            pool,
            ada,
            model,
            ..
        } = self.settings;
        let floor = match (ada, model) {
            (Some(floor), _) => Some(floor),
            (None, true) => Some(0.2),
            (None, false) => None,
        };
        let slack = match (phase, decode) {
            (Phase::Turn | Phase::Prefill { .. }, _) => 0,
            (Phase::Decode, DecodeEviction::Every(n)) => n - 1,
            _ => return,
        };
        // Layer, head, budget.
        let budgets = self.budgets();
        let heads: Vec<(usize, usize, usize)> = layers
            .iter()
            .flat_map(|l| {
                budgets[*l]
                    .iter()
                    .enumerate()
                    .map(move |(h, b)| (*l, h, *b))
            })
            .collect();
        let len = |(layer, head, _): &(usize, usize, usize)| self.units[*layer][*head].len();
        let over = match floor {
            Some(_) => {
                let most: usize = heads.iter().map(|h| h.2 + slack).sum();
                heads.iter().map(len).sum::<usize>() > most
            }
            None => heads.iter().any(|h| len(h) > h.2 + slack),
        };
        if !over {
            return;
        }
        let newest = match phase {
            Phase::Prefill { last: true } => guard.recent,
            _ => guard.recent.max(guard.stabilizers),
        };
        let mut kept: Vec<Vec<usize>> = Vec::new();
        // What no head keeps on its own account: score, head, unit.
        let mut rest: Vec<(f64, usize, usize)> = Vec::new();
        for (at, (layer, head, budget)) in heads.iter().enumerate() {
            let shrink = |units: usize| units.min(units * budget / self.settings.budget);
            let (sinks, newest) = (shrink(guard.sinks), shrink(newest));
            let units = &self.units[*layer][*head];
            let n = units.len();
            // The best first: protected, by score, the earlier.
            let mut list: Vec<(bool, f64, usize)> = (0..n)
                .map(|i| {
                    let near = (0..n).filter(|j| i.abs_diff(*j) <= pool / 2);
                    let score = near
                        .map(|j| units[j].score)
                        .fold(f64::NEG_INFINITY, f64::max);
                    (i < sinks || i + newest >= n, score, i)
                })
                .collect();
            // A stable sort: of equals the earlier comes first.
            list.sort_by(|a, b| b.0.cmp(&a.0).then(b.1.total_cmp(&a.1)));
            let own = match floor {
                Some(floor) => {
                    let floor = (floor * *budget as f64 - 1e-9).ceil() as usize;
                    floor.max((sinks + newest).min(*budget)).min(*budget)
                }
                None => *budget,
            };
            self.margin = self.margin.min(distance(&list, own));
            let others = list.split_off(own.min(list.len()));
            kept.push(list.iter().map(|r| r.2).collect());
            rest.extend(others.iter().map(|r| (r.1, at, r.2)));
        }
        if floor.is_some() {
            rest.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
            let taken: usize = kept.iter().map(Vec::len).sum();
            let all: usize = heads.iter().map(|h| h.2).sum();
            let more = all.saturating_sub(taken).min(rest.len());
            let list: Vec<_> = rest.iter().map(|r| (false, r.0, r.2)).collect();
            self.margin = self.margin.min(distance(&list, more));
            for (_, at, unit) in &rest[..more] {
                kept[*at].push(*unit);
            }
        }
        for (kept, (layer, head, budget)) in kept.iter_mut().zip(&heads) {
            let shrink = |units: usize| units.min(units * budget / self.settings.budget);
            let (sinks, newest) = (shrink(guard.sinks), shrink(newest));
            let own = floor.map_or(0, |floor| {
                ((floor * *budget as f64 - 1e-9).ceil() as usize).min(*budget)
            });
            let Some(ranks) = self.ranks(*layer, *head, phase, kept.len(), own) else {
                continue;
            };
            let n = ranks.len();
            let mut list: Vec<(bool, f64, usize)> = (0..n)
                .map(|i| {
                    let near = (0..n).filter(|j| i.abs_diff(*j) <= pool / 2);
                    let rank = near.map(|j| ranks[j]).fold(f64::NEG_INFINITY, f64::max);
                    (i < sinks || i + newest >= n, rank, i)
                })
                .collect();
            list.sort_by(|a, b| b.0.cmp(&a.0).then(b.1.total_cmp(&a.1)));
            self.margin = self.margin.min(distance(&list, kept.len()));
            *kept = list[..kept.len()].iter().map(|r| r.2).collect();
        }
        kept.iter_mut().for_each(|kept| kept.sort_unstable());
        for (layer, kept) in layers.iter().zip(kept.chunks(self.spec.kv_heads)) {
            match self.settings.fold {
                Some(Folding::D2o { .. }) => self.fold_d2o(*layer, kept),
                Some(Folding::Cam { .. }) => self.fold_cam(*layer, kept),
                None => {}
            }
        }
        for ((layer, head, _), kept) in heads.into_iter().zip(kept) {
            self.merge(layer, head, &kept);
            let units = &mut self.units[layer][head];
            *units = kept.into_iter().map(|i| units[i].clone()).collect();
        }
    }

    /// What the units of a head are chosen by, if not by their scores: blocks, or what values become.
    fn ranks(
        &mut self,
        layer: usize,
        head: usize,
        phase: Phase,
        keep: usize,
        own: usize,
    ) -> Option<Vec<f64>> {
        if let Some(size) = self.settings.blocks {
            // The step's tokens are counted as seen only once it is over, and positions say what came.
            let all: Vec<(usize, f64)> = self.units[layer]
                .iter()
                .flatten()
                .map(|unit| (unit.position / size, unit.score))
                .collect();
            let read = self.read;
            let open = phase == Phase::Prefill { last: false } && !read.is_multiple_of(size);
            let rank = |unit: &Unit| {
                let block = unit.position / size;
                if open && block == read / size {
                    return f64::INFINITY;
                }
                let own: Vec<f64> = all.iter().filter(|u| u.0 == block).map(|u| u.1).collect();
                own.iter().sum::<f64>() / own.len() as f64
            };
            return Some(self.units[layer][head].iter().map(rank).collect());
        }
        let projections = self.settings.critical.as_ref()?;
        let ModelSpec {
            heads,
            kv_heads,
            head_dim: d,
            hidden,
            ..
        } = self.spec;
        let group = heads / kv_heads;
        let norm = |v: &[f32]| {
            let mut sum = 0.0;
            for a in head * group..(head + 1) * group {
                for row in 0..hidden {
                    let weights = &projections[layer][row * heads * d + a * d..][..d];
                    let terms = weights.iter().zip(v);
                    let x: f64 = terms.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                    sum += x.abs() / group as f64;
                }
            }
            sum
        };
        let units = &self.units[layer][head];
        let mut order: Vec<usize> = (0..units.len()).collect();
        order.sort_by(|a, b| units[*b].score.total_cmp(&units[*a].score));
        let first = own.max(keep / 2).max(1).min(keep);
        let list: Vec<_> = order.iter().map(|i| (false, units[*i].score, *i)).collect();
        self.margin = self.margin.min(distance(&list, first));
        let mut ranks: Vec<f64> = (units.iter())
            .map(|unit| (unit.score + f64::from(1e-4f32)) * norm(&unit.born))
            .collect();
        for unit in &order[..first.min(order.len())] {
            ranks[*unit] = f64::INFINITY;
        }
        Some(ranks)
    }

    /// The mean of a kept unit's value and those of the dropped ones that are most like it.
    fn merge(&mut self, layer: usize, head: usize, kept: &[usize]) {
        let Some(threshold) = self.settings.merge else {
            return;
        };
        let compact = self.settings.positions == Positions::Compact;
        let units = &self.units[layer][head];
        if kept.is_empty() || kept.len() == units.len() {
            return;
        }
        let keys: Vec<Vec<f64>> = units
            .iter()
            .enumerate()
            .map(|(i, unit)| self.rotate(&unit.k, if compact { i } else { unit.position }))
            .collect();
        let cosine = |a: usize, b: usize| {
            dot(&keys[a], &keys[b]) / (dot(&keys[a], &keys[a]) * dot(&keys[b], &keys[b])).sqrt()
        };
        let length = |unit: usize| {
            let square = units[unit].v.iter().map(|x| f64::from(*x).powi(2));
            square.sum::<f64>().sqrt()
        };
        let mut given: Vec<Vec<(f64, usize)>> = vec![Vec::new(); units.len()];
        let mut margin = f64::INFINITY;
        for unit in (0..units.len()).filter(|u| !kept.contains(u)) {
            let mut near: Vec<(f64, usize)> = kept.iter().map(|k| (cosine(unit, *k), *k)).collect();
            near.sort_by(|a, b| b.0.total_cmp(&a.0));
            margin = margin.min((near[0].0 - f64::from(threshold)).abs());
            if near.len() > 1 {
                margin = margin.min(near[0].0 - near[1].0);
            }
            if near[0].0 >= f64::from(threshold) {
                let (own, other) = (length(unit), length(near[0].1));
                let weight = match self.settings.weighted {
                    true => near[0].0.max(0.0) * own / (own + other),
                    false => 1.0,
                };
                given[near[0].1].push((weight, unit));
            }
        }
        self.margin = self.margin.min(margin);
        let values: Vec<Vec<f32>> = units.iter().map(|u| u.v.clone()).collect();
        for (unit, given) in given.iter().enumerate().filter(|(_, g)| !g.is_empty()) {
            for i in 0..self.spec.head_dim {
                let sum: f64 = given.iter().map(|g| g.0 * f64::from(values[g.1][i])).sum();
                let count: f64 = given.iter().map(|g| g.0).sum();
                let mean = (f64::from(values[unit][i]) + sum) / (1.0 + count);
                self.units[layer][head][unit].v[i] = mean as f32;
            }
        }
    }

    /// D2O (arXiv 2406.13035 §3.3): `kept` by head.
    fn fold_d2o(&mut self, layer: usize, kept: &[Vec<usize>]) {
        let Some(Folding::D2o {
            code,
            keys: with_keys,
            smoothing,
            exempt: (first, last),
        }) = self.settings.fold
        else {
            return;
        };
        if layer < first || layer + last >= self.spec.layers {
            return;
        }
        let compact = self.settings.positions == Positions::Compact;
        let mut margin = f64::INFINITY;
        // By head, by dropped unit: it, the unit that it is most like, the cosine.
        let mut near: Vec<Vec<(usize, usize, f64)>> = Vec::new();
        for (head, kept) in kept.iter().enumerate() {
            let units = &self.units[layer][head];
            let keys: Vec<Vec<f64>> = (units.iter().enumerate())
                .map(|(i, unit)| self.rotate(&unit.k, if compact { i } else { unit.position }))
                .collect();
            let mut list = Vec::new();
            for unit in (0..units.len()).filter(|u| !kept.contains(u)) {
                let mut others: Vec<(f64, usize)> = kept
                    .iter()
                    .map(|other| {
                        let length = |i: usize| dot(&keys[i], &keys[i]).sqrt();
                        let cosine = dot(&keys[unit], &keys[*other]);
                        (cosine / length(unit) / length(*other), *other)
                    })
                    .collect();
                others.sort_by(|a, b| b.0.total_cmp(&a.0));
                if others.len() > 1 {
                    margin = margin.min(others[0].0 - others[1].0);
                }
                if let Some((cosine, target)) = others.first() {
                    list.push((unit, *target, *cosine));
                }
            }
            near.push(list);
        }
        let all: Vec<f64> = near.iter().flatten().map(|n| n.2).collect();
        if all.is_empty() {
            self.margin = self.margin.min(margin);
            return;
        }
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let threshold = match self.thresholds[layer] {
            None => mean,
            Some(before) => (1.0 - smoothing) * before + smoothing * mean,
        };
        self.thresholds[layer] = Some(threshold);
        for (head, list) in near.iter().enumerate() {
            let mut given: Vec<Vec<(usize, f64)>> = vec![Vec::new(); self.units[layer][head].len()];
            for (at, (unit, target, cosine)) in list.iter().enumerate() {
                let judged = match code {
                    false => *cosine,
                    true => {
                        let row: Vec<f64> =
                            near.iter().filter_map(|l| l.get(at)).map(|n| n.2).collect();
                        row.iter().sum::<f64>() / row.len() as f64
                    }
                };
                // One dropped unit alone is its own mean, on both sides of rounding.
                let alone = all.len() == 1 && self.thresholds[layer] == Some(mean);
                if !alone {
                    margin = margin.min((judged - threshold).abs());
                }
                if judged >= threshold {
                    given[*target].push((*unit, *cosine));
                }
            }
            let old = self.units[layer][head].clone();
            for (target, given) in given.iter().enumerate().filter(|(_, g)| !g.is_empty()) {
                let (own, weights): (f64, Vec<f64>) = match code {
                    true => {
                        let count = 1.0 + given.len() as f64;
                        (1.0 / count, given.iter().map(|g| g.1 / count).collect())
                    }
                    false => {
                        let powers: Vec<f64> = given.iter().map(|g| g.1.exp()).collect();
                        let sum = 1f64.exp() + powers.iter().sum::<f64>();
                        (1f64.exp() / sum, powers.iter().map(|p| p / sum).collect())
                    }
                };
                let mixed = |of: &dyn Fn(usize) -> Vec<f64>| -> Vec<f64> {
                    let mut sum: Vec<f64> = of(target).iter().map(|x| own * x).collect();
                    for ((unit, _), weight) in given.iter().zip(&weights) {
                        let pairs = sum.iter_mut().zip(of(*unit));
                        pairs.for_each(|(x, y)| *x += weight * y);
                    }
                    sum
                };
                let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
                let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect::<Vec<_>>();
                let value = mixed(&|unit| wide(&old[unit].v));
                self.units[layer][head][target].v = narrow(value);
                if with_keys {
                    let at = old[target].position as f64;
                    let key = match compact {
                        true => mixed(&|unit| wide(&old[unit].k)),
                        false => {
                            let there = |unit: usize| self.rotate(&old[unit].k, old[unit].position);
                            self.turn_by(&mixed(&there), -at)
                        }
                    };
                    self.units[layer][head][target].k = narrow(key);
                }
            }
        }
        self.margin = self.margin.min(margin);
    }

    /// CaM (PMLR 235:58840 §3.3): `kept` by head.
    fn fold_cam(&mut self, layer: usize, kept: &[Vec<usize>]) {
        let Some(Folding::Cam { next, seed, sums }) = self.settings.fold else {
            return;
        };
        for (head, kept) in kept.iter().enumerate() {
            let units = &self.units[layer][head];
            let mut drawn: Vec<(usize, Vec<usize>)> = Vec::new();
            for unit in (0..units.len()).filter(|u| !kept.contains(u)) {
                let after = kept.iter().copied().filter(|other| *other > unit);
                let after: Vec<usize> = after.take(next).collect();
                if after.is_empty() {
                    continue;
                }
                let mean = after.iter().map(|i| units[*i].attention).sum::<f64>();
                let likely = units[unit].attention / (mean / after.len() as f64);
                let lot = Random::new(seed).lot(layer, head, units[unit].position as u32);
                self.margin = self.margin.min((f64::from(lot) - likely).abs());
                if f64::from(lot) < likely {
                    drawn.push((unit, after));
                }
            }
            let old = units.clone();
            for target in kept {
                let into: Vec<&(usize, Vec<usize>)> =
                    drawn.iter().filter(|d| d.1.contains(target)).collect();
                for (unit, after) in &into {
                    let parts = match sums {
                        true => after.len(),
                        false => after.len().max(into.len()),
                    };
                    for i in 0..self.spec.head_dim {
                        let more = f64::from(old[*unit].v[i]) / parts as f64;
                        let value = &mut self.units[layer][head][*target].v[i];
                        *value = (f64::from(*value) + more) as f32;
                    }
                }
            }
        }
    }

    pub fn positions(&self, layer: usize, head: usize) -> Vec<u32> {
        let units = self.units[layer][head].iter();
        units.map(|unit| unit.position as u32).collect()
    }
}

/// How far apart those that stay and those that go are, as a share of their scores: of a list from the best on, whose
/// first `kept` stay. Equals are told apart by where they stand, and what equals them but for rounding is not.
fn distance(list: &[(bool, f64, usize)], kept: usize) -> f64 {
    let (stay, go) = list.split_at(kept.min(list.len()));
    let (Some(worst), Some(lost)) = (stay.last(), go.first()) else {
        return f64::INFINITY;
    };
    let above = stay.iter().filter(|r| !r.0 && r.1 != lost.1);
    let below = go.iter().filter(|r| !worst.0 && r.1 != worst.1);
    let gap = |a: f64, b: f64| (a - b) / a.abs().max(b.abs());
    above
        .map(|r| gap(r.1, lost.1))
        .chain(below.map(|r| gap(worst.1, r.1)))
        .fold(f64::INFINITY, f64::min)
}

/// The same with the files that a method cannot do without, but for Locret's heads.
pub fn complete(config: &PolicyConfig, spec: &ModelSpec) -> PolicyConfig {
    let mut config = config.clone();
    match config.policy {
        Method::QFilters => config.filters = Some(filters(spec)),
        Method::KvZap => config.heads = Some(heads(spec, HeadForm::Linear)),
        Method::FastKvZip => config.heads = Some(heads(spec, HeadForm::Gate)),
        Method::DuoAttention => config.patterns = Some(head_scores(spec)),
        _ => {}
    }
    config
}

/// Where a file of a test may lie that no other thread writes.
fn file(name: String) -> PathBuf {
    let thread = std::thread::current().id();
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{thread:?}-{name}"))
}

/// A file of scores of heads, of which every other one is high.
fn head_scores(spec: &ModelSpec) -> PathBuf {
    let row = |l: usize| {
        let score = |h: usize| ((l + h) % 2).to_string();
        (0..spec.kv_heads).map(score).collect::<Vec<_>>().join("\t")
    };
    let rows: Vec<String> = (0..spec.layers).map(row).collect();
    let file = file(format!("scores-{}-{}.tsv", spec.layers, spec.kv_heads));
    std::fs::write(&file, rows.join("\n")).unwrap();
    file
}

/// A file of heads for this model that read a layer's input.
fn heads(spec: &ModelSpec, form: HeadForm) -> PathBuf {
    let mut numbers = Numbers(29);
    let (kv_heads, group, inputs) = (spec.kv_heads, spec.heads / spec.kv_heads, spec.hidden);
    let (features, sinks) = (4, 2);
    let layer = |_| match form {
        HeadForm::Gate => {
            let d_r = kv_heads * (group + 1) * features;
            let mut bias = numbers.list(d_r, 0.5);
            // Keys have none.
            bias[kv_heads * group * features..].fill(0.0);
            LayerHead {
                d_r,
                fc1: numbers.list(d_r * inputs, 0.5),
                fc1_bias: bias,
                gate: Some(Gate {
                    query_norm: numbers.list(features, 1.0),
                    key_norm: numbers.list(features, 1.0),
                    base: numbers.list(kv_heads * sinks * features, 1.0),
                    offset: numbers.list(kv_heads * group, 1.0),
                }),
                ..LayerHead::default()
            }
        }
        _ => LayerHead {
            d_r: kv_heads,
            fc1: numbers.list(kv_heads * inputs, 0.5),
            fc1_bias: numbers.list(kv_heads, 1.0),
            ..LayerHead::default()
        },
    };
    let weights = HeadWeights {
        form,
        layers: (0..spec.layers).map(layer).collect(),
        ..HeadWeights::default()
    };
    let shape = [spec.layers, spec.heads, kv_heads, inputs];
    let file = file(format!("{form:?}-{shape:?}.safetensors"));
    weights.save(&file, DType::F32).unwrap();
    file
}

/// A file of directions for this model, from a formula.
pub fn filters(spec: &ModelSpec) -> PathBuf {
    let shape = [spec.layers, spec.kv_heads, spec.head_dim];
    let file = file(format!("filters-{shape:?}.safetensors"));
    let numbers = Numbers(17).list(shape.iter().product(), 1.0);
    let filters = locret_policies::QFilters::new(numbers, shape).unwrap();
    filters.save(&file).unwrap();
    file
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// `x` with `matrix · x = right`, by elimination.
fn solved(matrix: &[Vec<f64>], right: &[f64]) -> Vec<f64> {
    let n = right.len();
    let mut rows: Vec<Vec<f64>> = (matrix.iter().zip(right))
        .map(|(row, x)| [&row[..], &[*x]].concat())
        .collect();
    for i in 0..n {
        for j in i + 1..n {
            let factor = rows[j][i] / rows[i][i];
            for c in i..=n {
                rows[j][c] -= factor * rows[i][c];
            }
        }
    }
    let mut x = vec![0.0; n];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|c| rows[i][c] * x[c]).sum();
        x[i] = (rows[i][n] - known) / rows[i][i];
    }
    x
}

pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - most).exp()).sum();
    logits.iter().map(|x| (x - most).exp() / sum).collect()
}
