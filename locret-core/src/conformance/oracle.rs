//! The naive version: plain loops in double precision over the whole history.

use super::{
    model::{EPSILON, Matrix, RandomModel},
    record::own_shares,
};
use crate::{
    Fold, LongRopeSwitch, ModelSpec, Observation, Observe, Positions, RopeConfig, RopeScaling,
    View, Visible,
};

/// A [`RandomModel`] in plain loops, in `f64`.
///
/// It remembers the un-rotated keys and the values of **every** token, and attends over an explicit
/// list of kept original positions for each layer and head: append with [`Oracle::forward`], then
/// say with [`Oracle::keep`] what a policy decided. It shares no line with the engine.
#[derive(Debug, Clone)]
pub struct Oracle<'a> {
    model: &'a RandomModel,
    positions: Positions,
    observe: Option<Observe>,
    layers: Vec<History>,
    seen: usize,
    /// Radians per position of each pair of features, and the factor on the rotated pair.
    frequencies: Vec<(f64, f64)>,
    last_logits: Option<Vec<f64>>,
}

/// By KV head.
#[derive(Debug, Clone)]
struct History {
    /// Un-rotated, by original position.
    keys: Vec<Vec<Vec<f64>>>,
    values: Vec<Vec<Vec<f64>>>,
    kept: Vec<Vec<u32>>,
}

/// What one pass of the oracle gives.
#[derive(Debug, Clone, Default)]
pub struct OraclePass {
    /// Hidden states, `[tokens][hidden]`.
    pub hidden: Vec<Vec<f64>>,
    /// Logits, `[tokens][vocab]`.
    pub logits: Vec<Vec<f64>>,
    /// `-ln p` of each token; NaN where nothing came before.
    pub surprisal: Vec<f64>,
    /// What queries, keys and values are made from: by layer, `[tokens][hidden]`.
    pub input: Vec<Vec<Vec<f64>>>,
    /// By layer, `[tokens][heads * head_dim]`.
    pub q: Vec<Vec<Vec<f64>>>,
    /// By layer, `[tokens][kv_heads * head_dim]`.
    pub k: Vec<Vec<Vec<f64>>>,
    /// By layer, `[tokens][kv_heads * head_dim]`.
    pub v: Vec<Vec<Vec<f64>>>,
    /// Keys as attention saw them: by layer, by KV head, `[units][head_dim]`.
    pub keys: Vec<Vec<Vec<Vec<f64>>>>,
    /// Values: by layer, by KV head, `[units][head_dim]`.
    pub values: Vec<Vec<Vec<Vec<f64>>>>,
    /// Observed attention by layer, as [`Observed::per_head`](crate::Observed); empty where none
    /// was asked for.
    pub observed: Vec<Vec<Vec<f64>>>,
}

impl<'a> Oracle<'a> {
    /// Nothing read yet.
    pub fn new(model: &'a RandomModel, positions: Positions) -> Self {
        let spec = &model.spec;
        let empty = || vec![Vec::new(); spec.kv_heads];
        let history = || History {
            keys: empty(),
            values: empty(),
            kept: vec![Vec::new(); spec.kv_heads],
        };
        Self {
            positions,
            observe: None,
            layers: (0..spec.layers).map(|_| history()).collect(),
            seen: 0,
            frequencies: Vec::new(),
            last_logits: None,
            model,
        }
    }

    /// Gathers attention in every pass.
    #[must_use]
    pub fn observing(mut self, observe: Option<Observe>) -> Self {
        self.observe = observe;
        self
    }

    /// Tokens read.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Original positions that a head of a layer holds.
    pub fn kept(&self, layer: usize, head: usize) -> &[u32] {
        &self.layers[layer].kept[head]
    }

    /// From now on attends over these original positions in `layer`, one list per KV head.
    pub fn keep(&mut self, layer: usize, kept: Vec<Vec<u32>>) {
        self.layers[layer].kept = kept;
    }

    /// Mixes values of units of a head of `layer` into others', as
    /// [`KvStore::fold_values`](crate::KvStore::fold_values) does.
    pub fn fold(&mut self, layer: usize, head: usize, folds: &[Fold]) {
        let History { values, kept, .. } = &mut self.layers[layer];
        let at = |unit: u32| kept[head][unit as usize] as usize;
        let old = values[head].clone();
        for (into, own) in own_shares(folds) {
            let mut mixed: Vec<f64> = old[at(into)].iter().map(|x| own * x).collect();
            for fold in folds.iter().filter(|f| f.into == into && f.from != into) {
                let pairs = mixed.iter_mut().zip(&old[at(fold.from)]);
                pairs.for_each(|(x, y)| *x += f64::from(fold.share) * y);
            }
            values[head][at(into)] = mixed;
        }
    }

    /// Mixes keys, as they lie in a store: rotated at the positions that they were born at, or, in compact
    /// positions, not at all.
    pub fn fold_keys(&mut self, layer: usize, head: usize, folds: &[Fold]) {
        let kept = self.layers[layer].kept[head].clone();
        let at = |unit: u32| kept[unit as usize] as usize;
        let original = self.positions == Positions::Original;
        let old = self.layers[layer].keys[head].clone();
        // As if seen from the unit that takes it: what turns a key back by that position.
        let key = |unit: u32, into: u32| match original {
            true => self.turned(&old[at(unit)], at(unit) as f64 - at(into) as f64),
            false => old[at(unit)].clone(),
        };
        let mut new = Vec::new();
        for (into, own) in own_shares(folds) {
            let mut mixed: Vec<f64> = old[at(into)].iter().map(|x| own * x).collect();
            for fold in folds.iter().filter(|f| f.into == into && f.from != into) {
                let pairs = mixed.iter_mut().zip(key(fold.from, into));
                pairs.for_each(|(x, y)| *x += f64::from(fold.share) * y);
            }
            new.push((at(into), mixed));
        }
        for (at, key) in new {
            self.layers[layer].keys[head][at] = key;
        }
    }

    /// Reads tokens of a sequence that will have `total` tokens. Every layer keeps all of them
    /// until [`Oracle::keep`] says otherwise.
    pub fn forward(&mut self, ids: &[u32], total: usize) -> OraclePass {
        self.forward_seeing(ids, total, &[])
    }

    /// The same with tokens that see, by layer, what is named in units that are held; everything before them
    /// in layers that are left out.
    pub fn forward_seeing(&mut self, ids: &[u32], total: usize, visible: &[Visible]) -> OraclePass {
        let model = self.model;
        let rope = &model.spec.rope;
        let long = is_long(rope, total.max(self.seen + ids.len()));
        self.frequencies = (0..rope.rotary_dim / 2)
            .map(|i| frequency(rope, i, long))
            .collect();
        let mut pass = OraclePass::default();
        let row = |id: &u32| doubles(model.embedding.row(*id as usize));
        let mut x: Vec<Vec<f64>> = ids.iter().map(row).collect();
        for (index, layer) in model.layers.iter().enumerate() {
            let inner = normalised(&x);
            let (q, k, v) = (layer.q.of(&inner), layer.k.of(&inner), layer.v.of(&inner));
            let visible = visible.get(index).unwrap_or(&Visible::All);
            pass.input.push(inner);
            let attended = self.attend(index, [&q[..], &k[..], &v[..]], visible, &mut pass);
            pass.q.push(q);
            pass.k.push(k);
            pass.v.push(v);
            add(&mut x, &layer.out.of(&attended));
            let mut up = layer.up.of(&normalised(&x));
            up.iter_mut().flatten().for_each(|x| *x = x.tanh());
            add(&mut x, &layer.down.of(&up));
        }
        self.seen += ids.len();
        pass.hidden = normalised(&x);
        pass.logits = model.head.of(&pass.hidden);
        let before = std::iter::once(self.last_logits.as_ref()).chain(pass.logits.iter().map(Some));
        pass.surprisal = before
            .zip(ids)
            .map(|(logits, id)| logits.map_or(f64::NAN, |l| nll(l, *id)))
            .collect();
        self.last_logits = pass.logits.last().cloned();
        pass
    }

    fn attend(
        &mut self,
        index: usize,
        [q, k, v]: [&[Vec<f64>]; 3],
        visible: &Visible,
        pass: &mut OraclePass,
    ) -> Vec<Vec<f64>> {
        let ModelSpec {
            heads,
            kv_heads,
            head_dim: d,
            ..
        } = self.model.spec;
        let scale = f64::from(self.model.spec.softmax_scale);
        let (t, group) = (q.len(), heads / kv_heads);
        let watched = self.observe.map_or(0, |o| o.queries.count(t));
        let places = match visible {
            Visible::Chosen(views) => views.places(),
            Visible::All => None,
        };
        let near_only = matches!(self.observe, Some(o) if o.what == Observation::NearWeights);
        let mut out = vec![vec![0.0; heads * d]; t];
        let (mut seen_keys, mut seen_values, mut observed) = (Vec::new(), Vec::new(), Vec::new());
        for g in 0..kv_heads {
            let at = g * d..(g + 1) * d;
            let layer = &mut self.layers[index];
            layer.keys[g].extend(k.iter().map(|row| row[at.clone()].to_vec()));
            layer.values[g].extend(v.iter().map(|row| row[at.clone()].to_vec()));
            let first = self.seen as u32;
            layer.kept[g].extend(first..first + t as u32);
            let layer = &self.layers[index];
            let units = &layer.kept[g];
            let n = units.len();
            let keys: Vec<Vec<f64>> = (0..n)
                .map(|i| {
                    let position = match (places, self.positions) {
                        (Some(places), _) => places[g][i] as usize,
                        (_, Positions::Original) => units[i] as usize,
                        (_, Positions::Compact) => i,
                    };
                    self.rotated(&layer.keys[g][units[i] as usize], position)
                })
                .collect();
            let values: Vec<Vec<f64>> = units
                .iter()
                .map(|u| layer.values[g][*u as usize].clone())
                .collect();
            let mut most = vec![f64::NEG_INFINITY; n];
            for h in g * group..(g + 1) * group {
                let (mut paid, mut top) = (vec![0.0; n], vec![0.0f64; n]);
                for i in 0..t {
                    let position = match self.positions {
                        Positions::Original => self.seen + i,
                        Positions::Compact => n - t + i,
                    };
                    let query = self.rotated(&q[i][h * d..(h + 1) * d], position);
                    let own = n - t + i;
                    let seen = |unit: usize| match visible {
                        Visible::All => Some(false),
                        Visible::Chosen(views) => sees(views.of(h, heads, i), own, unit),
                    };
                    let distant = match visible {
                        Visible::Chosen(views) => views.distance(),
                        Visible::All => None,
                    };
                    let distant = distant.map(|at| self.rotated(&q[i][h * d..(h + 1) * d], at));
                    let logit = |unit: usize| match (seen(unit), &distant) {
                        (None, _) => f64::NEG_INFINITY,
                        (Some(true), Some(query)) => {
                            let key = &layer.keys[g][units[unit] as usize];
                            scale * dot(query, &self.rotated(key, 0))
                        }
                        (Some(_), _) => scale * dot(&query, &keys[unit]),
                    };
                    let logits: Vec<f64> = (0..=own).map(logit).collect();
                    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    if max == f64::NEG_INFINITY {
                        // It sees nothing.
                        continue;
                    }
                    let weights: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for (unit, weight) in weights.iter().enumerate() {
                        for (c, value) in values[unit].iter().enumerate() {
                            out[i][h * d + c] += weight / sum * value;
                        }
                    }
                    if i >= t - watched {
                        let input = &pass.input[index][i];
                        let share = match self.observe.map(|o| o.what) {
                            Some(Observation::MaxWeightsByInput) => 1.0 / dot(input, input).sqrt(),
                            _ => 1.0,
                        };
                        for unit in 0..=own {
                            if !near_only || seen(unit) == Some(false) {
                                paid[unit] += weights[unit] / sum;
                            }
                            top[unit] = top[unit].max(share * weights[unit] / sum);
                            most[unit] = most[unit].max(logits[unit]);
                        }
                    }
                }
                match self.observe.map(|o| o.what) {
                    Some(Observation::Weights | Observation::NearWeights) => observed.push(paid),
                    Some(Observation::MaxWeights | Observation::MaxWeightsByInput) => {
                        observed.push(top);
                    }
                    Some(Observation::MaxLogits) | None => {}
                }
            }
            if matches!(self.observe, Some(o) if o.what == Observation::MaxLogits) {
                observed.push(most);
            }
            seen_keys.push(keys);
            seen_values.push(values);
        }
        pass.keys.push(seen_keys);
        pass.values.push(seen_values);
        if self.observe.is_some() {
            pass.observed.push(observed);
        }
        out
    }

    /// Rotated by so many positions, forwards or back, and no longer than before.
    fn turned(&self, x: &[f64], positions: f64) -> Vec<f64> {
        let half = self.frequencies.len();
        let mut out = x.to_vec();
        for (i, (frequency, _)) in self.frequencies.iter().enumerate() {
            let (sin, cos) = (positions * frequency).sin_cos();
            out[i] = x[i] * cos - x[i + half] * sin;
            out[i + half] = x[i + half] * cos + x[i] * sin;
        }
        out
    }

    fn rotated(&self, x: &[f64], position: usize) -> Vec<f64> {
        let half = self.frequencies.len();
        let mut out = x.to_vec();
        for (i, (frequency, factor)) in self.frequencies.iter().enumerate() {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            out[i] = factor * (x[i] * cos - x[i + half] * sin);
            out[i + half] = factor * (x[i + half] * cos + x[i] * sin);
        }
        out
    }
}

/// Whether a query whose own unit is `own` sees `unit`, and then whether at the one distance.
fn sees(view: &View, own: usize, unit: usize) -> Option<bool> {
    let of = |ranges: &[std::ops::Range<u32>]| ranges.iter().any(|r| r.contains(&(unit as u32)));
    let column = || view.columns.contains(&(unit as u32));
    match unit > own {
        true => None,
        false if of(&view.ranges) || column() || own - unit < view.window => Some(false),
        false => of(&view.far).then_some(true),
    }
}

fn is_long(rope: &RopeConfig, length: usize) -> bool {
    match &rope.scaling {
        RopeScaling::LongRope {
            original_max,
            switch,
            ..
        } => *switch == LongRopeSwitch::AlwaysLong || length > *original_max,
        _ => false,
    }
}

/// Radians per position of a pair of features, and the factor on the rotated pair.
fn frequency(rope: &RopeConfig, i: usize, long_context: bool) -> (f64, f64) {
    let plain = rope.theta.powf(-2.0 * i as f64 / rope.rotary_dim as f64);
    match &rope.scaling {
        RopeScaling::None => (plain, 1.0),
        RopeScaling::Linear { factor } => (plain / factor, 1.0),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max,
        } => {
            // Turns over the original context decide: below `low` scaled, above `high` kept.
            let turns = *original_max as f64 * plain / (2.0 * std::f64::consts::PI);
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (plain * (kept + (1.0 - kept) / factor), 1.0)
        }
        RopeScaling::LongRope {
            short,
            long,
            attention_factor,
            ..
        } => {
            let factors = if long_context { long } else { short };
            (plain / factors[i], *attention_factor)
        }
    }
}

/// `-ln p(id)` under logits.
fn nll(logits: &[f64], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
    sum.ln() + max - logits[id as usize]
}

fn doubles(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [Vec<f64>], from: &[Vec<f64>]) {
    for (a, b) in to.iter_mut().flatten().zip(from.iter().flatten()) {
        *a += b;
    }
}

fn normalised(x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let one = |row: &Vec<f64>| {
        let mean = dot(row, row) / row.len() as f64;
        let root = (mean + f64::from(EPSILON)).sqrt();
        row.iter().map(|x| x / root).collect()
    };
    x.iter().map(one).collect()
}

impl Matrix {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..(row + 1) * self.columns]
    }

    /// `x · self`.
    fn of(&self, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let one = |x: &Vec<f64>| {
            let mut out = vec![0.0; self.columns];
            for (row, x) in x.iter().enumerate() {
                for (out, w) in out.iter_mut().zip(self.row(row)) {
                    *out += x * f64::from(*w);
                }
            }
            out
        };
        x.iter().map(one).collect()
    }
}
