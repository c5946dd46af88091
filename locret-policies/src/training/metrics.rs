//! How well predicted scores rank units.

use serde::{Deserialize, Serialize};

/// Shares of the units for which recall is measured.
pub const RECALL_AT: [f64; 3] = [0.05, 0.10, 0.25];

/// Means over validation samples and KV heads.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Metrics {
    /// The regression loss.
    pub loss: f64,
    /// Of the units with the best labels, the share that is also among the best-scored ones: for
    /// each of [`RECALL_AT`].
    pub recall: [f64; 3],
    /// Pearson's correlation of scores and labels.
    pub pearson: f64,
}

impl Metrics {
    /// The mean over several; zeros of none.
    pub fn mean<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut sum = Self::default();
        let mut n = 0.0;
        for m in all {
            n += 1.0;
            sum.loss += m.loss;
            sum.pearson += m.pearson;
            for (s, r) in sum.recall.iter_mut().zip(m.recall) {
                *s += r;
            }
        }
        if n > 0.0 {
            sum.loss /= n;
            sum.pearson /= n;
            sum.recall = sum.recall.map(|r| r / n);
        }
        sum
    }
}

/// The share of the `ceil(share · n)` best-labelled units that is among as many best-scored ones.
/// 1 where there are no units; units without a score are never among the best.
pub fn recall_at(scores: &[f32], labels: &[f32], share: f64) -> f64 {
    let k = ((share * labels.len() as f64).ceil() as usize).min(labels.len());
    if k == 0 {
        return 1.0;
    }
    let best = |values: &[f32]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
        let mut chosen = vec![false; values.len()];
        for i in order.iter().take(k) {
            chosen[*i] = true;
        }
        chosen
    };
    let (found, wanted) = (best(scores), best(labels));
    let both = found
        .iter()
        .zip(&wanted)
        .filter(|(f, w)| **f && **w)
        .count();
    both as f64 / k as f64
}

/// Pearson's correlation; 0 where one side does not vary.
pub fn pearson(a: &[f32], b: &[f32]) -> f64 {
    let mean = |x: &[f32]| x.iter().map(|v| f64::from(*v)).sum::<f64>() / x.len().max(1) as f64;
    let (ma, mb) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (x, y) = (f64::from(*x) - ma, f64::from(*y) - mb);
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    let norm = (aa * bb).sqrt();
    if norm > 0.0 { ab / norm } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recall_counts_the_best_of_both() {
        let labels = [9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 0.0, 0.5];
        assert_eq!(recall_at(&labels, &labels, 0.25), 1.0);
        // Best labels: 0, 2. Best scores: 0, 1.
        let scores = [9.0, 8.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        assert_eq!(recall_at(&scores, &labels, 0.25), 0.5);
        // `ceil(0.05 · 8)` is one unit.
        assert_eq!(recall_at(&scores, &labels, 0.05), 1.0);
        assert_eq!(recall_at(&[], &[], 0.1), 1.0);
        // Lists that do not belong together, and shares that are none.
        assert_eq!(recall_at(&[1.0], &labels, 0.25), 0.5);
        assert_eq!(recall_at(&labels, &[1.0], f64::INFINITY), 1.0);
        assert_eq!(recall_at(&labels, &labels, f64::NAN), 1.0);
        assert_eq!(recall_at(&[f32::NAN; 2], &[f32::NAN; 2], 0.5), 1.0);
    }

    #[test]
    fn correlation_has_its_known_values() {
        let a = [1.0, 2.0, 3.0, 4.0];
        assert!((pearson(&a, &[2.0, 4.0, 6.0, 8.0]) - 1.0).abs() < 1e-12);
        assert!((pearson(&a, &[4.0, 3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        assert_eq!(pearson(&a, &[5.0; 4]), 0.0);
        // Worked by hand: sums of products 6, 5 and 9.
        let r = pearson(&a, &[1.0, 2.0, 2.0, 5.0]);
        assert!((r - 6.0 / (5.0f64 * 9.0).sqrt()).abs() < 1e-12, "{r}");
    }

    #[test]
    fn means_are_over_all() {
        let one = |x| Metrics {
            loss: x,
            recall: [x; 3],
            pearson: x,
        };
        let mean = Metrics::mean(&[one(1.0), one(3.0)]);
        assert_eq!(mean, one(2.0));
        assert_eq!(Metrics::mean([]), Metrics::default());
    }
}
