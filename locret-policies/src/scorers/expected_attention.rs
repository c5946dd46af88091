//! Expected Attention: what queries to come will pay, if they are like those that came.

use super::observed;
use crate::published::Published;
use burn::tensor::{Tensor, TensorData};
use locret_core::{
    Budget, Error, Evict, Guard, LayerSpec, LayerUnits, ModelSpec, Needs, Phase, Result, Scorer,
    Scores, Step, into_f32,
};
use std::ops::Range;

/// Expected Attention (arXiv 2510.00636 §3): queries of a head are taken to be drawn from a normal distribution
/// with the mean `μ` and the covariance `Σ` of those that were read, before rotation. Rotated by the mean
/// rotation of the next 512 positions, they pay a key `k` on average `exp(μ·k s + kᵀΣk s²/2)`, with the factor
/// `s` of the logits. The score is that as a share of all units, mean over the query heads of the group, times
/// the length of the unit's value.
///
/// **Keeps** the first units, and of the rest those that queries to come are expected to pay most.
///
/// **Cost:** a product of the keys of a layer with a `head_dim x head_dim` matrix for each query head, when
/// something has to go, and a product of as many new queries with themselves. Noted of each layer are the number
/// of queries, their mean and their covariance: `1 + heads · (head_dim + head_dim²)` numbers, whatever the
/// length (4.5 MB for SmolLM2-135M, 68 MB for Llama-3.1-8B).
///
/// **Chunked prefill:** the mean and the covariance are merged chunk by chunk and are those of all that was read
/// so far, whatever the chunks; a unit is judged by what queries were like until then, and as the text grows, by
/// positions further on. Queries of prompts count, the first four tokens' apart; those of text that is generated
/// or forced do not.
///
/// In compact positions the next positions are those behind the units that a head has.
#[derive(Debug, Clone, Copy, PartialEq)]
#[must_use]
pub struct ExpectedAttention {
    future: usize,
    covariance: bool,
    value_norm: bool,
    epsilon: f32,
}

impl Default for ExpectedAttention {
    fn default() -> Self {
        Self {
            future: 512,
            covariance: true,
            value_norm: true,
            epsilon: 0.0,
        }
    }
}

impl ExpectedAttention {
    /// First units that stay, and whose queries do not count, as published.
    pub const SINKS: usize = 4;

    /// What is added to shares where heads compete for a budget, as published.
    pub const SHARED_EPSILON: f32 = 0.01;

    /// 512 positions ahead, with the covariance and the lengths of values.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks `positions` ahead (at least 1).
    pub fn future(self, positions: usize) -> Self {
        Self {
            future: positions,
            ..self
        }
    }

    /// Whether queries vary about their mean.
    pub fn covariance(self, covariance: bool) -> Self {
        Self { covariance, ..self }
    }

    /// Whether shares are multiplied by the lengths of values. Where something around it weighs values anyway
    /// ([`Critical`](crate::Critical)), they should not be.
    pub fn value_norm(self, value_norm: bool) -> Self {
        Self { value_norm, ..self }
    }

    /// Added to shares before they are multiplied by lengths: 0, or [`SHARED_EPSILON`](Self::SHARED_EPSILON).
    pub fn epsilon(self, epsilon: f32) -> Self {
        Self { epsilon, ..self }
    }

    /// Keeps `budget` units, the first four for certain; original positions.
    pub fn policy(self, budget: Budget) -> Evict<Self> {
        self.published(budget)
    }

    /// What is known of the layer's queries, those of this step among them.
    fn statistics(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Statistics> {
        let mut all = Statistics::noted(&at.layer, units.notes());
        let counts = matches!(at.phase, Phase::Prefill { .. } | Phase::Tail);
        let first = Self::SINKS.saturating_sub(at.seen);
        if counts && units.incoming() > first {
            let queries = observed::qkv(self, units)?.q.values()?;
            let width = at.layer.heads * at.layer.head_dim;
            all.merge(&Statistics::of(&at.layer, &queries[first * width..]));
        }
        Ok(all)
    }
}

/// The score of first units, which is above that of all others, of other layers, too.
const FIRST: f32 = 1e9;

/// The number of queries, and for each query head their mean and the sum of products of what they are apart
/// from it.
#[derive(Debug, Clone)]
struct Statistics {
    count: f64,
    width: usize,
    means: Vec<f64>,
    spreads: Vec<f64>,
}

impl Statistics {
    fn zeros(layer: &LayerSpec) -> Self {
        let (heads, width) = (layer.heads, layer.head_dim);
        Self {
            count: 0.0,
            width,
            means: vec![0.0; heads * width],
            spreads: vec![0.0; heads * width * width],
        }
    }

    /// Of queries `[tokens, heads * head_dim]`.
    fn of(layer: &LayerSpec, queries: &[f32]) -> Self {
        let mut all = Self::zeros(layer);
        let (row, width) = (all.means.len(), all.width);
        all.count = (queries.len() / row) as f64;
        for query in queries.chunks_exact(row) {
            for (mean, x) in all.means.iter_mut().zip(query) {
                *mean += f64::from(*x) / all.count;
            }
        }
        let mut apart = vec![0.0f32; width];
        for query in queries.chunks_exact(row) {
            let heads = query.chunks_exact(width).zip(all.means.chunks_exact(width));
            for ((query, mean), spread) in heads.zip(all.spreads.chunks_exact_mut(width * width)) {
                for ((apart, x), mean) in apart.iter_mut().zip(query).zip(mean) {
                    *apart = (f64::from(*x) - mean) as f32;
                }
                for (x, row) in apart.iter().zip(spread.chunks_exact_mut(width)) {
                    for (sum, y) in row.iter_mut().zip(&apart) {
                        *sum += f64::from(x * y);
                    }
                }
            }
        }
        all
    }

    /// As [`numbers`](Self::numbers) wrote them; none, if that were other ones.
    fn noted(layer: &LayerSpec, notes: &[f32]) -> Self {
        let mut all = Self::zeros(layer);
        if let [count, rest @ ..] = notes
            && rest.len() == all.means.len() + all.spreads.len()
        {
            all.count = f64::from(*count);
            let numbers = all.means.iter_mut().chain(&mut all.spreads);
            // Covariances rather than sums: these would lose digits in long texts.
            for (index, (to, from)) in numbers.zip(rest).enumerate() {
                let spread = index >= layer.heads * layer.head_dim;
                *to = f64::from(*from) * if spread { all.count } else { 1.0 };
            }
        }
        all
    }

    fn numbers(&self) -> Vec<f32> {
        let covariances = self.spreads.iter().map(|x| x / self.count.max(1.0));
        let numbers = self.means.iter().copied().chain(covariances);
        std::iter::once(self.count)
            .chain(numbers)
            .map(|x| x as f32)
            .collect()
    }

    /// Those of both; about the mean of both, without a difference of large sums (Chan et al. 1983).
    fn merge(&mut self, other: &Self) {
        let count = self.count + other.count;
        if count == 0.0 {
            return;
        }
        let (share, factor) = (other.count / count, self.count * other.count / count);
        let width = self.width;
        let heads = self
            .means
            .chunks_exact_mut(width)
            .zip(other.means.chunks_exact(width));
        let spreads = self.spreads.chunks_exact_mut(width * width);
        let spreads = spreads.zip(other.spreads.chunks_exact(width * width));
        for ((mean, new), (spread, more)) in heads.zip(spreads) {
            let apart: Vec<f64> = new.iter().zip(&*mean).map(|(b, a)| b - a).collect();
            let rows = spread.chunks_exact_mut(width).zip(more.chunks_exact(width));
            for ((row, more), x) in rows.zip(&apart) {
                for ((sum, more), y) in row.iter_mut().zip(more).zip(&apart) {
                    *sum += more + factor * x * y;
                }
            }
            for (mean, apart) in mean.iter_mut().zip(&apart) {
                *mean += share * apart;
            }
        }
        self.count = count;
    }

    /// Mean and covariance of a query head, rotated.
    fn rotated(&self, head: usize, turn: &MeanTurn) -> (Vec<f32>, Vec<f32>) {
        let width = self.width;
        let mut mean = self.means[head * width..][..width].to_vec();
        turn.apply(&mut mean);
        let first = head * width * width;
        let mut matrix = self.spreads[first..first + width * width].to_vec();
        // R S Rᵀ: rows, then columns, of a symmetric matrix.
        for _ in 0..2 {
            matrix
                .chunks_exact_mut(width)
                .for_each(|row| turn.apply(row));
            for i in 0..width {
                for j in 0..i {
                    matrix.swap(i * width + j, j * width + i);
                }
            }
        }
        let share = 1.0 / self.count.max(1.0);
        let matrix = matrix.iter().map(|x| (x * share) as f32);
        (mean.iter().map(|x| *x as f32).collect(), matrix.collect())
    }
}

/// The mean of rotations.
struct MeanTurn {
    cos: Vec<f64>,
    sin: Vec<f64>,
}

impl MeanTurn {
    fn of(units: &LayerUnits<'_>, positions: Range<usize>) -> Self {
        let count = positions.len() as f64;
        let table = units.angles(positions);
        let half = table.rotary_dim() / 2;
        let mean = |all: &[f32]| {
            let mut sums = vec![0.0; half];
            for row in all.chunks_exact(half) {
                sums.iter_mut()
                    .zip(row)
                    .for_each(|(sum, x)| *sum += f64::from(*x) / count);
            }
            sums
        };
        Self {
            cos: mean(table.cos()),
            sin: mean(table.sin()),
        }
    }

    fn apply(&self, x: &mut [f64]) {
        let half = self.cos.len();
        for (i, (cos, sin)) in self.cos.iter().zip(&self.sin).enumerate() {
            let (a, b) = (x[i], x[i + half]);
            (x[i], x[i + half]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }
}

impl Published for ExpectedAttention {}

impl Scorer for ExpectedAttention {
    fn name(&self) -> String {
        "expected-attention".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.qkv()
    }

    fn noted(&self, layer: &LayerSpec) -> usize {
        1 + layer.heads * (layer.head_dim + layer.head_dim * layer.head_dim)
    }

    fn notes(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Option<Vec<f32>>> {
        match at.phase {
            Phase::Prefill { .. } | Phase::Tail => Ok(Some(self.statistics(at, units)?.numbers())),
            _ => Ok(None),
        }
    }

    fn guard(&self, _units: usize) -> Guard {
        Guard {
            sinks: Self::SINKS,
            ..Guard::default()
        }
    }

    fn validate(&self, _model: &ModelSpec) -> Result<()> {
        if self.future == 0 {
            return Err(Error::setting("future", "at least 1 position", 0));
        }
        if !(self.epsilon.is_finite() && self.epsilon >= 0.0) {
            return Err(Error::setting(
                "epsilon",
                "a number from 0 on",
                self.epsilon,
            ));
        }
        Ok(())
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let statistics = self.statistics(at, units)?;
        let (group, width) = (at.layer.group(), at.layer.head_dim);
        let scale = units.scale();
        let mut scores = Vec::with_capacity(units.kv_heads());
        for head in 0..units.kv_heads() {
            let next = units.next_position(head);
            let turn = MeanTurn::of(units, next..next + self.future);
            let positions = units.positions(head);
            let sinks = positions.partition_point(|p| (*p as usize) < Self::SINKS);
            let keys = units.keys(head)?.into_tensor();
            let mut shares = vec![0.0f64; positions.len()];
            for query in head * group..(head + 1) * group {
                let (mean, covariance) = statistics.rotated(query, &turn);
                let place = |numbers, shape: [usize; 2]| {
                    Tensor::<2>::from_data(TensorData::new(numbers, shape), &keys.device())
                };
                let mut logits = keys.clone().matmul(place(mean, [width, 1])) * scale;
                if self.covariance {
                    let half = keys.clone().matmul(place(covariance, [width, width]));
                    logits = logits + (half * keys.clone()).sum_dim(1) * (0.5 * scale * scale);
                }
                let logits = into_f32(logits)?;
                let logits: Vec<f64> = logits[sinks..].iter().map(|x| f64::from(*x)).collect();
                let paid = shares[sinks..].iter_mut().zip(super::softmax(&logits));
                paid.for_each(|(sum, share)| *sum += share / group as f64);
            }
            let mut list: Vec<f32> = shares.iter().map(|x| *x as f32).collect();
            if self.value_norm {
                let values = units.values(head)?;
                let lengths = values.values()?;
                let lengths = lengths
                    .chunks_exact(width)
                    .map(|v| v.iter().map(|x| x * x).sum::<f32>().sqrt());
                list.iter_mut()
                    .zip(lengths)
                    .for_each(|(share, length)| *share = (*share + self.epsilon) * length);
            }
            list[..sinks].fill(FIRST);
            scores.push(list);
        }
        Scores::per_head(scores)
    }
}
