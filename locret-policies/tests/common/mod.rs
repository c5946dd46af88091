//! A cache in plain loops, written from the papers and from `Evict`'s documentation alone, and a way
//! to drive it and the real one through the same steps.
#![allow(dead_code, unreachable_pub)]

use burn::tensor::Device;
use locret_core::{
    CacheOptions, DecodeEviction, Guard, KvCachePolicy, ModelSpec, Pass, Phase, Positions, Qkv,
    RopeConfig, Rows, SequenceCache, compute,
};
use std::sync::Arc;

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
    let mut pass = Pass::new([cache.step(step.phase, step.tokens, total)])?;
    let mut outputs = Vec::new();
    for (layer, [q, k, v]) in step.layers.iter().enumerate() {
        let qkv = Qkv::new(rows(q)?, rows(k)?, rows(v)?);
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
    pub score: f64,
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
    /// Window and kernel.
    SnapKv(usize, usize),
    Tova,
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
    /// The smallest relative distance between a score that was kept and one that was not, so far.
    pub margin: f64,
}

impl Naive {
    pub fn new(spec: &ModelSpec, settings: Settings) -> Self {
        Self {
            units: vec![vec![Vec::new(); spec.kv_heads]; spec.layers],
            spec: spec.clone(),
            settings,
            seen: 0,
            margin: f64::INFINITY,
        }
    }

    /// Rotates one vector.
    fn rotate(&self, x: &[f32], position: usize) -> Vec<f64> {
        let half = self.spec.head_dim / 2;
        let mut out = vec![0.0; x.len()];
        for i in 0..half {
            let angle = position as f64 * THETA.powf(-2.0 * i as f64 / self.spec.head_dim as f64);
            let (a, b) = (f64::from(x[i]), f64::from(x[i + half]));
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
        let before: Vec<usize> = self.units[layer].iter().map(Vec::len).collect();
        for token in 0..t {
            for head in 0..kv_heads {
                let row = (token * kv_heads + head) * d;
                self.units[layer][head].push(Unit {
                    position: self.seen + token,
                    k: k[row..row + d].to_vec(),
                    v: v[row..row + d].to_vec(),
                    score: 0.0,
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
        for head in 0..kv_heads {
            let n = self.units[layer][head].len();
            let scores: Vec<f64> = match &self.settings.rule {
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
            for (unit, score) in self.units[layer][head].iter_mut().zip(scores) {
                unit.score = score;
            }
        }
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
            let others = list.split_off(own.min(list.len()));
            if let (Some(worst), Some(lost)) = (list.last(), others.first()) {
                self.margin = self.margin.min(distance(*worst, *lost));
            }
            kept.push(list.iter().map(|r| r.2).collect());
            rest.extend(others.iter().map(|r| (r.1, at, r.2)));
        }
        if floor.is_some() {
            rest.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
            let taken: usize = kept.iter().map(Vec::len).sum();
            let all: usize = heads.iter().map(|h| h.2).sum();
            let more = all.saturating_sub(taken).min(rest.len());
            if more > 0 && more < rest.len() {
                let (worst, lost) = (rest[more - 1], rest[more]);
                let pair = ((false, worst.0, 0), (false, lost.0, 0));
                self.margin = self.margin.min(distance(pair.0, pair.1));
            }
            for (_, at, unit) in &rest[..more] {
                kept[*at].push(*unit);
            }
        }
        for ((layer, head, _), mut kept) in heads.into_iter().zip(kept) {
            kept.sort_unstable();
            self.merge(layer, head, &kept);
            let units = &mut self.units[layer][head];
            *units = kept.into_iter().map(|i| units[i].clone()).collect();
        }
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
        let mut given: Vec<Vec<usize>> = vec![Vec::new(); units.len()];
        let mut margin = f64::INFINITY;
        for unit in (0..units.len()).filter(|u| !kept.contains(u)) {
            let mut near: Vec<(f64, usize)> = kept.iter().map(|k| (cosine(unit, *k), *k)).collect();
            near.sort_by(|a, b| b.0.total_cmp(&a.0));
            margin = margin.min((near[0].0 - f64::from(threshold)).abs());
            if near.len() > 1 {
                margin = margin.min(near[0].0 - near[1].0);
            }
            if near[0].0 >= f64::from(threshold) {
                given[near[0].1].push(unit);
            }
        }
        self.margin = self.margin.min(margin);
        let values: Vec<Vec<f32>> = units.iter().map(|u| u.v.clone()).collect();
        for (unit, given) in given.iter().enumerate().filter(|(_, g)| !g.is_empty()) {
            for i in 0..self.spec.head_dim {
                let sum: f64 = given.iter().map(|g| f64::from(values[*g][i])).sum();
                let mean = (f64::from(values[unit][i]) + sum) / (given.len() + 1) as f64;
                self.units[layer][head][unit].v[i] = mean as f32;
            }
        }
    }

    pub fn positions(&self, layer: usize, head: usize) -> Vec<u32> {
        let units = self.units[layer][head].iter();
        units.map(|unit| unit.position as u32).collect()
    }
}

/// How far apart the last that stays and the first that goes are, as a share of their scores.
fn distance(worst: (bool, f64, usize), lost: (bool, f64, usize)) -> f64 {
    if worst.0 || worst.1 == lost.1 {
        return f64::INFINITY;
    }
    (worst.1 - lost.1) / worst.1.abs().max(lost.1.abs())
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - most).exp()).sum();
    logits.iter().map(|x| (x - most).exp() / sum).collect()
}
