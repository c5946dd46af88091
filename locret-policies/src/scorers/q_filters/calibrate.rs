//! Directions of a model's queries, from texts.

use super::QFilters;
use locret_core::{Decided, Error, Needs, Probe, Result, Rotation, TableRows};

/// Finds the directions of a model's queries in the texts that it watches, as a [`Probe`] of sessions that
/// read them ([`Session::prefill_watched`](locret_core::Session::prefill_watched)) with a full cache.
///
/// For each query head the direction is that of the largest singular value of all of its queries, rotated as
/// attention rotates them, one below the other; it is turned to their mean. The query heads that share a KV
/// head have the mean of their directions (arXiv 2503.02812 §3.2). Sums are of 64 bits, `head_dim · (head_dim +
/// 1)` for each query head of each layer.
#[derive(Debug, Clone, Default)]
pub struct QFilterProbe {
    /// By layer and query head.
    sums: Vec<Vec<Sums>>,
    kv_heads: usize,
    head_dim: usize,
}

/// Of one query head's queries.
#[derive(Debug, Clone)]
struct Sums {
    queries: Vec<f64>,
    /// `Σ q qᵀ`, row-major.
    products: Vec<f64>,
}

impl QFilterProbe {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The directions.
    ///
    /// # Errors
    /// [`Error::Setting`] if nothing was read.
    pub fn filters(&self) -> Result<QFilters> {
        let layers = self.sums.len();
        if layers == 0 || self.sums.iter().any(Vec::is_empty) {
            return Err(Error::setting("texts for filters of queries", "some", 0));
        }
        let mut all = Vec::with_capacity(layers * self.kv_heads * self.head_dim);
        for heads in &self.sums {
            for group in heads.chunks(heads.len() / self.kv_heads) {
                let mut mean = vec![0.0; self.head_dim];
                for sums in group {
                    for (mean, x) in mean.iter_mut().zip(sums.direction()) {
                        *mean += x / group.len() as f64;
                    }
                }
                all.extend(mean.into_iter().map(|x| x as f32));
            }
        }
        QFilters::new(all, [layers, self.kv_heads, self.head_dim])
    }
}

impl Probe for QFilterProbe {
    fn needs(&self) -> Needs {
        Needs::NOTHING.qkv()
    }

    fn decided(&mut self, at: &Decided<'_>) -> Result<()> {
        let (step, units) = (at.step, at.units);
        let Some(qkv) = units.qkv() else {
            return Ok(());
        };
        let (layer, width) = (step.layer, step.layer.head_dim);
        let table = units.angles(step.seen..step.seen + step.incoming);
        let by = Rotation {
            table: &table,
            head_dim: width,
            rows: TableRows::From(&[0]),
            inverse: false,
        };
        let queries = units.compute().rotate(qkv.q.clone(), &by)?;
        (self.kv_heads, self.head_dim) = (layer.kv_heads, width);
        self.sums.resize(layer.layers, Vec::new());
        let sums = &mut self.sums[layer.index];
        sums.resize_with(layer.heads, || Sums::new(width));
        for (i, query) in queries.values()?.chunks_exact(width).enumerate() {
            sums[i % layer.heads].add(query);
        }
        Ok(())
    }
}

/// After so many rounds a direction that still turns has no clear rival: what is left is between equals.
const ROUNDS: usize = 10_000;

impl Sums {
    fn new(width: usize) -> Self {
        Self {
            queries: vec![0.0; width],
            products: vec![0.0; width * width],
        }
    }

    fn add(&mut self, query: &[f32]) {
        let rows = self.products.chunks_exact_mut(query.len());
        for ((sum, row), x) in self.queries.iter_mut().zip(rows).zip(query) {
            let x = f64::from(*x);
            *sum += x;
            row.iter_mut()
                .zip(query)
                .for_each(|(sum, y)| *sum += x * f64::from(*y));
        }
    }

    /// The first eigenvector of the products, by power iteration, of length 1 and turned to the queries.
    fn direction(&self) -> Vec<f64> {
        let width = self.queries.len();
        // Not at a right angle to anything in particular.
        let mut own: Vec<f64> = (0..width).map(|i| 1.0 + (i as f64 * 0.7).sin()).collect();
        scale(&mut own);
        for _ in 0..ROUNDS {
            let rows = self.products.chunks_exact(width);
            let mut next: Vec<f64> = rows.map(|row| dot(row, &own)).collect();
            if !scale(&mut next) {
                // No query was anything but 0.
                return vec![0.0; width];
            }
            let turned = 1.0 - dot(&own, &next);
            own = next;
            if turned < 1e-15 {
                break;
            }
        }
        if dot(&own, &self.queries) < 0.0 {
            own.iter_mut().for_each(|x| *x = -*x);
        }
        own
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// To length 1; false for zeros.
fn scale(x: &mut [f64]) -> bool {
    let length = dot(x, x).sqrt();
    if length > 0.0 {
        x.iter_mut().for_each(|x| *x /= length);
    }
    length > 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_direction_is_that_of_most_squares_and_points_to_the_queries() {
        let mut sums = Sums::new(3);
        // Along (1, 2, 2), mostly away from it; a little across.
        for (along, across) in [(-3.0, 0.1), (-2.0, -0.2), (1.0, 0.1), (-4.0, 0.0)] {
            let query = [along, 2.0 * along + across, 2.0 * along - across];
            sums.add(&query);
        }
        let found = sums.direction();
        for (found, due) in found.iter().zip([-1.0, -2.0, -2.0]) {
            assert!((found - due / 3.0).abs() < 0.02, "{found}");
        }
        assert!((dot(&found, &found) - 1.0).abs() < 1e-12);
        // An eigenvector: the product has its direction.
        let rows = sums.products.chunks_exact(3);
        let mut product: Vec<f64> = rows.map(|row| dot(row, &found)).collect();
        scale(&mut product);
        assert!((dot(&product, &found) - 1.0).abs() < 1e-12);
        assert_eq!(Sums::new(2).direction(), [0.0, 0.0]);
    }
}
