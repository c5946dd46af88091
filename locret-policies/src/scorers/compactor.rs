//! Compactor: keys that stand out, and what a chunk looks at in both directions.

use super::observed;
use crate::published::Published;
use burn::tensor::{Tensor, TensorData, activation::softmax};
use locret_core::{
    Budget, Error, Evict, Guard, LayerSpec, LayerUnits, ModelSpec, Needs, Phase, Qkv, Result,
    Rotation, Scorer, Scores, Step, TableRows, into_f32,
};
use sha2::{Digest, Sha256};
use std::{
    borrow::Cow,
    ops::Range,
    sync::{Arc, OnceLock},
};

/// Compactor (arXiv 2507.08143 §3): the sum of two scores of a chunk's tokens, each brought to a mean of 0 and a
/// deviation of 1 over the chunk and all KV heads of the layer.
///
/// - *Leverage*, times a factor of 0.35: how far a key stands out from the chunk's keys before rotation. These
///   are centred and multiplied by a random matrix of 48 columns; the score is `xᵀ (Xᵀ X + λ)⁻¹ x`.
/// - *Attention without a mask*: in tiles of 256 tokens every query looks at every key, with `q · k` as it is;
///   what a key is paid is summed over the queries, averaged over the group, multiplied by the length of its
///   value and averaged over three neighbours.
///
/// **Keeps** the first eight and the newest four units, and of the rest those with the highest sum.
///
/// **Cost:** attention within tiles, once for each chunk, whatever the length; a product with 48 columns, and a
/// system of 48 equations for each KV head.
///
/// **Chunked prefill:** a score is made once, in its own chunk, and carried. The mean and the deviation are those
/// of the chunk: scores of a dull chunk and of an interesting one are on the same scale, where a text that is
/// read at once has one for all. Chunks want to be long, and a multiple of 256 tokens. A token that is read
/// alone (as all generated ones are) has nothing to be compared with and counts as average.
///
/// The published random matrix is drawn anew each time; here it is drawn from a seed by layer and head, so that the
/// same text keeps the same units.
#[derive(Debug, Clone)]
#[must_use]
pub struct Compactor {
    tile: usize,
    blending: f32,
    sketch: Sketch,
}

/// Where the random matrices come from.
#[derive(Debug, Clone)]
enum Sketch {
    /// Drawn when they are needed first, for layers of that shape.
    Seed(u64, Arc<OnceLock<Drawn>>),
    /// By layer, `[kv_heads, head_dim, COLUMNS]`.
    Given(Arc<Vec<Vec<f32>>>),
}

/// Layers, KV heads, features of a head, and the matrices, by layer.
type Drawn = ([usize; 3], Vec<Vec<f32>>);

impl Default for Compactor {
    fn default() -> Self {
        Self {
            tile: Self::TILE,
            blending: Self::BLENDING,
            sketch: Sketch::Seed(0, Arc::default()),
        }
    }
}

impl Compactor {
    /// First units that stay, as published; they are not scored.
    pub const SINKS: usize = 8;
    /// Newest units that stay, as published; those at the end of a prompt are not scored.
    pub const NEWEST: usize = 4;
    /// Tokens of a tile, as published.
    pub const TILE: usize = 256;
    /// The factor on leverage, as published.
    pub const BLENDING: f32 = 0.35;
    /// Columns of a random matrix, as published.
    pub const COLUMNS: usize = 48;

    /// Tiles of 256 tokens, leverage times 0.35.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tiles of `tokens` (at least 1).
    pub fn tile(self, tokens: usize) -> Self {
        Self {
            tile: tokens,
            ..self
        }
    }

    /// Another factor on leverage.
    pub fn blending(self, factor: f32) -> Self {
        Self {
            blending: factor,
            ..self
        }
    }

    /// Draws random matrices from another seed.
    pub fn seed(self, seed: u64) -> Self {
        Self {
            sketch: Sketch::Seed(seed, Arc::default()),
            ..self
        }
    }

    /// Takes these matrices, by layer `[kv_heads, head_dim, 48]`, whose numbers have a variance of 1/48.
    pub fn sketches(self, layers: Vec<Vec<f32>>) -> Self {
        Self {
            sketch: Sketch::Given(layers.into()),
            ..self
        }
    }

    /// Keeps `budget` units, the first eight and the newest four for certain; original positions.
    pub fn policy(self, budget: Budget) -> Evict<Self> {
        self.published(budget)
    }

    /// Scores of `tokens` of a step, by KV head.
    fn scores(
        &self,
        at: &Step,
        units: &LayerUnits<'_>,
        qkv: &Qkv,
        tokens: Range<usize>,
    ) -> Result<Vec<Vec<f32>>> {
        let (layer, width) = (at.layer, at.layer.head_dim);
        // What counts is how far tokens are from each other.
        let table = units.angles(0..at.incoming);
        let by = Rotation {
            table: &table,
            head_dim: width,
            rows: TableRows::From(&[0]),
            inverse: false,
        };
        let compute = units.compute();
        let queries = compute.rotate(qkv.q.clone(), &by)?;
        let keys = compute.rotate(qkv.k.clone(), &by)?;
        let (queries, keys) = (queries.values()?, keys.values()?);
        let (plain, values) = (qkv.k.values()?, qkv.v.values()?);
        let device = qkv.q.device();
        let of = |all: &[f32], heads: usize, head: usize, tokens: Range<usize>| {
            let rows = all.chunks_exact(heads * width).skip(tokens.start);
            let own = rows.map(|row| &row[head * width..(head + 1) * width]);
            own.take(tokens.len())
                .flatten()
                .copied()
                .collect::<Vec<f32>>()
        };
        let place = |numbers: Vec<f32>| {
            let shape = [numbers.len() / width, width];
            Tensor::<2>::from_data(TensorData::new(numbers, shape), &device)
        };
        let (mut leverages, mut paid) = (Vec::new(), Vec::new());
        for head in 0..layer.kv_heads {
            let own = of(&plain, layer.kv_heads, head, tokens.clone());
            leverages.push(leverage(&own, width, &self.matrix(&layer, head)));
            let mut sums = vec![0.0f32; tokens.len()];
            for first in tokens.clone().step_by(self.tile) {
                let tile = first..(first + self.tile).min(tokens.end);
                let across = place(of(&keys, layer.kv_heads, head, tile.clone())).transpose();
                for query in head * layer.group()..(head + 1) * layer.group() {
                    let rows = place(of(&queries, layer.heads, query, tile.clone()));
                    let weights = softmax(rows.matmul(across.clone()), 1);
                    let columns = into_f32(weights.sum_dim(0))?;
                    let here = &mut sums[tile.start - tokens.start..];
                    here.iter_mut()
                        .zip(columns)
                        .for_each(|(sum, x)| *sum += x / layer.group() as f32);
                }
            }
            let lengths = of(&values, layer.kv_heads, head, tokens.clone());
            let lengths = lengths
                .chunks_exact(width)
                .map(|v| v.iter().map(|x| x * x).sum::<f32>().sqrt());
            sums.iter_mut()
                .zip(lengths)
                .for_each(|(sum, length)| *sum *= length);
            // Beyond the ends there is nothing: it counts as 0.
            let pooled = (0..sums.len()).map(|i| {
                let near = i.saturating_sub(1)..(i + 2).min(sums.len());
                sums[near].iter().sum::<f32>() / 3.0
            });
            paid.push(pooled.collect::<Vec<f32>>());
        }
        standardise(&mut leverages);
        standardise(&mut paid);
        for (paid, leverages) in paid.iter_mut().zip(leverages) {
            paid.iter_mut()
                .zip(leverages)
                .for_each(|(score, x)| *score += self.blending * x);
        }
        Ok(paid)
    }

    /// A head's random matrix, `[head_dim, COLUMNS]`.
    fn matrix(&self, layer: &LayerSpec, head: usize) -> Cow<'_, [f32]> {
        let (index, size) = (layer.index, layer.head_dim * Self::COLUMNS);
        let own = head * size..(head + 1) * size;
        match &self.sketch {
            Sketch::Given(layers) => Cow::Borrowed(&layers[index][own]),
            Sketch::Seed(seed, drawn) => {
                let shape = [layer.layers, layer.kv_heads, layer.head_dim];
                let draw = |index: usize| {
                    let heads = (0..layer.kv_heads).flat_map(|head| {
                        let stream = (index * layer.kv_heads + head) as u64;
                        gaussian(super::random::mix(*seed) ^ stream, size)
                    });
                    heads.collect::<Vec<f32>>()
                };
                let (known, all) =
                    drawn.get_or_init(|| (shape, (0..layer.layers).map(draw).collect()));
                match *known == shape {
                    true => Cow::Borrowed(&all[index][own]),
                    // Another model's turn.
                    false => Cow::Owned(draw(index)[own].to_vec()),
                }
            }
        }
    }
}

/// Numbers of a normal distribution with a variance of `1 / COLUMNS` (Box and Muller 1958).
fn gaussian(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = super::random::mix(state);
        // Above 0, so that there is a logarithm.
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let pair = || {
        let (radius, angle) = (
            (-2.0 * uniform().ln()).sqrt(),
            uniform() * std::f64::consts::TAU,
        );
        [radius * angle.cos(), radius * angle.sin()]
    };
    let scale = (Compactor::COLUMNS as f64).sqrt().recip();
    let pairs = std::iter::repeat_with(pair);
    pairs
        .flatten()
        .take(count)
        .map(|x| (x * scale) as f32)
        .collect()
}

/// Of each of `keys`, how much of it others do not explain, after a product with `matrix`.
fn leverage(keys: &[f32], width: usize, matrix: &[f32]) -> Vec<f32> {
    const N: usize = Compactor::COLUMNS;
    let count = (keys.len() / width) as f64;
    let mut mean = vec![0.0f64; width];
    for key in keys.chunks_exact(width) {
        mean.iter_mut()
            .zip(key)
            .for_each(|(mean, x)| *mean += f64::from(*x) / count);
    }
    let project = |key: &[f32]| {
        let mut row = [0.0f64; N];
        for ((x, mean), weights) in key.iter().zip(&mean).zip(matrix.chunks_exact(N)) {
            let apart = f64::from(*x) - mean;
            row.iter_mut()
                .zip(weights)
                .for_each(|(sum, w)| *sum += apart * f64::from(*w));
        }
        row
    };
    let rows: Vec<[f64; N]> = keys.chunks_exact(width).map(project).collect();
    let mut products = vec![[0.0f64; N]; N];
    for row in &rows {
        for (x, sums) in row.iter().zip(&mut products) {
            sums.iter_mut().zip(row).for_each(|(sum, y)| *sum += x * y);
        }
    }
    let mut ridge = 1e-2;
    let triangle = loop {
        // With a ridge there is one at last: products have no negative direction but by rounding.
        match cholesky(&products, ridge) {
            Some(triangle) => break triangle,
            None => ridge *= 10.0,
        }
    };
    let of = |row: &[f64; N]| {
        // xᵀ (L Lᵀ)⁻¹ x is the square of L⁻¹ x.
        let mut solved = [0.0f64; N];
        for i in 0..N {
            let known: f64 = (0..i).map(|j| triangle[i][j] * solved[j]).sum();
            solved[i] = (row[i] - known) / triangle[i][i];
        }
        solved.iter().map(|x| x * x).sum::<f64>() as f32
    };
    rows.iter().map(of).collect()
}

/// The lower triangle `L` with `L Lᵀ = products + ridge`, if there is one.
fn cholesky<const N: usize>(products: &[[f64; N]], ridge: f64) -> Option<Vec<[f64; N]>> {
    let mut triangle = vec![[0.0f64; N]; N];
    for i in 0..N {
        for j in 0..=i {
            let known: f64 = (0..j).map(|k| triangle[i][k] * triangle[j][k]).sum();
            let left = products[i][j] - known + if i == j { ridge } else { 0.0 };
            triangle[i][j] = match i == j {
                true if left > 0.0 => left.sqrt(),
                true if left.is_nan() => f64::NAN,
                true => return None,
                false => left / triangle[j][j],
            };
        }
    }
    Some(triangle)
}

/// To a mean of 0 and a deviation of 1, over all of them.
fn standardise(lists: &mut [Vec<f32>]) {
    let all = || lists.iter().flatten().map(|x| f64::from(*x));
    let count = all().count() as f64;
    let mean = all().sum::<f64>() / count;
    let squares: f64 = all().map(|x| (x - mean) * (x - mean)).sum();
    let deviation = (squares / (count - 1.0).max(1.0)).sqrt().max(1e-6);
    for x in lists.iter_mut().flatten() {
        *x = ((f64::from(*x) - mean) / deviation) as f32;
    }
}

impl Published for Compactor {}

impl Scorer for Compactor {
    fn name(&self) -> String {
        "compactor".into()
    }

    /// What was drawn already does not tell one from another.
    fn fingerprint(&self) -> String {
        let Self {
            tile,
            blending,
            sketch,
        } = self;
        let sketch = match sketch {
            Sketch::Seed(seed, _) => format!("seed {seed}"),
            Sketch::Given(layers) => {
                let mut hash = Sha256::new();
                for x in layers.iter().flatten() {
                    hash.update(x.to_le_bytes());
                }
                let digest = hash.finalize();
                digest.iter().map(|byte| format!("{byte:02x}")).collect()
            }
        };
        format!("Compactor {{ tile: {tile}, blending: {blending:?}, sketch: {sketch} }}")
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.qkv()
    }

    fn carries(&self) -> bool {
        true
    }

    fn guard(&self, _units: usize) -> Guard {
        Guard {
            sinks: Self::SINKS,
            recent: Self::NEWEST,
            ..Guard::default()
        }
    }

    fn validate(&self, model: &ModelSpec) -> Result<()> {
        if self.tile == 0 {
            return Err(Error::setting("tile", "at least 1 token", 0));
        }
        if !self.blending.is_finite() {
            return Err(Error::setting("blending", "a finite number", self.blending));
        }
        let due = model.kv_heads * model.head_dim * Self::COLUMNS;
        match &self.sketch {
            Sketch::Given(layers)
                if layers.len() != model.layers || layers.iter().any(|l| l.len() != due) =>
            {
                Err(Error::Shape {
                    what: "random matrices",
                    expected: format!("{} of {due} numbers", model.layers),
                    found: format!("{:?}", layers.iter().map(Vec::len).collect::<Vec<_>>()),
                })
            }
            _ => Ok(()),
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let first = Self::SINKS.saturating_sub(at.seen).min(at.incoming);
        let end = match at.phase {
            Phase::Prefill { last: true } => at.incoming - Self::NEWEST.min(at.incoming - first),
            _ => at.incoming,
        };
        let judged = match end - first {
            0 | 1 => None,
            _ => {
                let qkv = observed::qkv(self, units)?;
                Some(self.scores(at, units, qkv, first..end)?)
            }
        };
        let lists = (0..units.kv_heads()).map(|head| {
            let mut list = units.carried(head).to_vec();
            let own = judged.as_ref().map(|all| &all[head]);
            let most = own.map(|own| own.iter().copied().fold(f32::MIN, f32::max));
            for token in 0..at.incoming {
                let score = own.and_then(|own| own.get(token.checked_sub(first)?));
                list.push(match (score, most) {
                    (Some(score), _) => *score,
                    (None, Some(most)) => most,
                    // Average; of two such the newer one.
                    (None, None) => (at.seen + token) as f32 * 1e-9,
                });
            }
            list
        });
        Scores::per_head(lists.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_matrices_are_normal() {
        let numbers = gaussian(7, 48 * 1000);
        let mean = numbers.iter().sum::<f32>() / 48e3;
        let square = numbers.iter().map(|x| x * x).sum::<f32>() / 1e3;
        // The standard errors are 0.00066 and 0.0065.
        assert!(
            mean.abs() < 0.003 && (square - 1.0).abs() < 0.03,
            "{mean} {square}"
        );
        let beyond = numbers.iter().filter(|x| x.abs() > 2.0 / 48f32.sqrt());
        // 4.55 % are more than two deviations away.
        let share = beyond.count() as f32 / 48e3;
        assert!((share - 0.0455).abs() < 0.005, "{share}");
        assert_ne!(numbers[..9], gaussian(8, 9));
    }

    #[test]
    fn triangles_are_roots() {
        let products = [[4.0, 2.0, -1.0], [2.0, 5.0, 0.5], [-1.0, 0.5, 3.0]];
        let root = cholesky(&products, 0.25).unwrap();
        for i in 0..3 {
            for j in 0..3 {
                let found: f64 = (0..3).map(|k| root[i][k] * root[j][k]).sum();
                let due = products[i][j] + if i == j { 0.25 } else { 0.0 };
                assert!((found - due).abs() < 1e-12);
            }
        }
        assert!(cholesky(&[[-1.0, 0.0], [0.0, 1.0]], 0.5).is_none());
    }
}
