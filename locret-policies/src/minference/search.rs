//! Which pattern fits a head: the authors' offline search (arXiv 2407.02490, algorithm 1).

use super::{FIRST, LAST, Pattern};
use locret_core::{Error, LayerUnits, Result, Rows, Views};

/// Diagonals that a search always chooses.
const NEWEST: usize = 30;

/// Keys and queries of a block in the search.
const BLOCK: usize = 32;

/// A head's best pattern.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// As the authors write it into their tables: a head for which the A-shape is best has columns and diagonals
    /// with its sizes, one for which blocks are best has (1000, 6096).
    pub pattern: Pattern,
    /// The pattern that won.
    pub winner: Pattern,
    /// The mean share of attention that it recalls.
    pub recalled: f64,
}

/// The sizes that are tried.
const CANDIDATES: [Pattern; 6] = [
    Pattern::AShape {
        init: 100,
        local: 800,
    },
    Pattern::VerticalSlash {
        vertical: 30,
        slash: 800,
    },
    Pattern::VerticalSlash {
        vertical: 100,
        slash: 750,
    },
    Pattern::VerticalSlash {
        vertical: 500,
        slash: 700,
    },
    Pattern::VerticalSlash {
        vertical: 3500,
        slash: 100,
    },
    // An eighth of all blocks.
    Pattern::BlockSparse { blocks: 8 },
];

/// The patterns that recall most of the attention of a layer's queries from the `skip`th on, by query head; for a
/// step that reads a whole sample at once, in [`KvCachePolicy::before`](locret_core::KvCachePolicy::before).
///
/// As the authors' first search (their `search_pattern`), which skips 2,500 queries: a pattern's score is the
/// mean over queries of the softmax weight that lies in it, columns and diagonals taken one by one. Candidates
/// are tried in their order, and the first of equals wins.
///
/// **Cost:** all attention of the layer, in plain arithmetic.
///
/// # Errors
/// [`Error::Setting`] if there are no more than `skip` queries, or units are held that are not the queries' own;
/// those of the store.
pub fn search_layer(units: &LayerUnits<'_>, queries: &Rows, skip: usize) -> Result<Vec<Found>> {
    let (layer, t) = (*units.layer(), queries.rows());
    if t <= skip {
        let expected = format!("more than the {skip} queries that are skipped");
        return Err(Error::setting("a sample to search with", expected, t));
    }
    if let Some(n) = (0..layer.kv_heads)
        .map(|head| units.len(head))
        .find(|n| *n != t)
    {
        let found = format!("{n} units and {t} queries");
        return Err(Error::setting("a sample to search with", "one step", found));
    }
    by_head(units, queries, &|_, q, keys| {
        let head = Head {
            q,
            keys,
            d: layer.head_dim,
            scale: units.scale(),
        };
        head.search(skip)
    })
}

/// The share of attention that lies in what queries see, by query head: the mean over every `every`th query of the
/// softmax weight of all that came before it. Units at one distance count as seen.
///
/// # Errors
/// [`Error::Setting`] for views that do not fit; those of the store.
pub fn recalled(
    units: &LayerUnits<'_>,
    queries: &Rows,
    views: &Views,
    every: usize,
) -> Result<Vec<f64>> {
    let (layer, t) = (*units.layer(), queries.rows());
    let lens: Vec<usize> = (0..layer.kv_heads).map(|head| units.len(head)).collect();
    views
        .check(t, layer.heads, &lens)
        .map_err(|wrong| Error::setting("views", "what these queries can see", wrong))?;
    by_head(units, queries, &|index, q, keys| {
        let head = Head {
            q,
            keys,
            d: layer.head_dim,
            scale: units.scale(),
        };
        let (n, mut sum, mut row) = (keys.len() / layer.head_dim, 0.0, Vec::new());
        let chosen = (every.saturating_sub(1) / 2..t).step_by(every.max(1));
        for token in chosen.clone() {
            let own = n - t + token;
            head.softmax(token, own, &mut row);
            let view = views.of(index, layer.heads, token);
            let mut seen = vec![false; own + 1];
            let single = view.columns.iter().map(|unit| *unit..unit + 1);
            for range in view.ranges.iter().chain(&view.far).cloned().chain(single) {
                let end = (range.end as usize).min(own + 1);
                if let Some(seen) = seen.get_mut(range.start as usize..end) {
                    seen.fill(true);
                }
            }
            seen[(own + 1).saturating_sub(view.window)..].fill(true);
            let weights = row.iter().zip(seen).filter(|(_, seen)| *seen);
            sum += weights.map(|(weight, _)| f64::from(*weight)).sum::<f64>();
        }
        sum / chosen.count().max(1) as f64
    })
}

/// Does a piece of work for each query head, with its queries `[tokens, head_dim]` and its keys.
fn by_head<T: Send>(
    units: &LayerUnits<'_>,
    queries: &Rows,
    work: &(dyn Fn(usize, &[f32], &[f32]) -> T + Sync),
) -> Result<Vec<T>> {
    let (layer, d) = (*units.layer(), units.layer().head_dim);
    let queries = queries.values()?;
    let mut found = Vec::with_capacity(layer.heads);
    for kv_head in 0..layer.kv_heads {
        let keys = units.keys(kv_head)?;
        let keys = keys.values()?;
        let mut group: Vec<Option<T>> = (0..layer.group()).map(|_| None).collect();
        let pieces = group.iter_mut().enumerate().map(|(at, out)| {
            let (head, queries, keys) = (kv_head * layer.group() + at, &queries, &keys);
            let piece = move || {
                let rows = queries.chunks_exact(layer.heads * d);
                let q: Vec<f32> = rows
                    .flat_map(|row| &row[head * d..(head + 1) * d])
                    .copied()
                    .collect();
                *out = Some(work(head, &q, keys));
            };
            Box::new(piece) as Box<dyn FnOnce() + Send + '_>
        });
        units.compute().each(pieces.collect());
        found.extend(group.into_iter().flatten());
    }
    Ok(found)
}

/// One query head's queries and keys, `[tokens, d]`.
struct Head<'a> {
    q: &'a [f32],
    keys: &'a [f32],
    d: usize,
    scale: f32,
}

impl Head<'_> {
    /// The softmax of a query over the units up to its own.
    fn softmax(&self, token: usize, own: usize, row: &mut Vec<f32>) {
        let q = &self.q[token * self.d..(token + 1) * self.d];
        row.clear();
        let keys = self.keys.chunks_exact(self.d).take(own + 1);
        row.extend(keys.map(|key| self.scale * dot(q, key)));
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for x in row.iter_mut() {
            *x = (*x - top).exp();
            sum += f64::from(*x);
        }
        let share = (1.0 / sum) as f32;
        row.iter_mut().for_each(|x| *x *= share);
    }

    fn search(&self, skip: usize) -> Found {
        let n = self.keys.len() / self.d;
        let shapes = self.shapes();
        let (mut recalled, mut row) = ([0.0f64; CANDIDATES.len()], Vec::new());
        for own in skip..n {
            self.softmax(own, own, &mut row);
            for (recalled, shape) in recalled.iter_mut().zip(&shapes) {
                *recalled += shape.recalled(&row);
            }
        }
        let mut best = (0, f64::NEG_INFINITY);
        for (at, sum) in recalled.iter().enumerate() {
            if *sum > best.1 {
                best = (at, *sum);
            }
        }
        let winner = CANDIDATES[best.0];
        Found {
            pattern: match winner {
                Pattern::AShape { init, local } => Pattern::VerticalSlash {
                    vertical: init,
                    slash: local,
                },
                Pattern::BlockSparse { .. } => Pattern::UNKNOWN,
                other => other,
            },
            winner,
            recalled: best.1 / (n - skip) as f64,
        }
    }

    fn shapes(&self) -> Vec<Shape> {
        let n = self.keys.len() / self.d;
        let (mut columns, mut diagonals) = (vec![0.0f32; n], vec![0.0f32; n]);
        let mut row = Vec::new();
        for own in n.saturating_sub(LAST)..n {
            self.softmax(own, own, &mut row);
            for (unit, weight) in row.iter().enumerate() {
                columns[unit] += weight;
                diagonals[own - unit] += weight;
            }
        }
        columns[..FIRST.min(n)].fill(f32::INFINITY);
        diagonals[..NEWEST.min(n)].fill(f32::INFINITY);
        let shape = |candidate: &Pattern| match *candidate {
            Pattern::AShape { init, local } => Shape::A { init, local },
            Pattern::VerticalSlash { vertical, slash } => {
                let (columns, diagonals) = (best(&columns, vertical), best(&diagonals, slash));
                let mut is_column = vec![false; n];
                for unit in &columns {
                    is_column[*unit] = true;
                }
                Shape::Lines {
                    columns,
                    is_column,
                    diagonals,
                }
            }
            Pattern::BlockSparse { blocks } => self.blocks(blocks),
        };
        CANDIDATES.iter().map(shape).collect()
    }

    /// Of the blocks before it, for each block of queries the best ones: one of so many of all there are.
    fn blocks(&self, one_of: usize) -> Shape {
        let sums = |rows: &[f32]| -> Vec<Vec<f32>> {
            let sum = |block: &[f32]| {
                let mut sum = vec![0.0; self.d];
                for row in block.chunks_exact(self.d) {
                    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
                sum
            };
            rows.chunks(BLOCK * self.d).map(sum).collect()
        };
        let (queries, keys) = (sums(self.q), sums(self.keys));
        let of_query = |(at, query): (usize, &Vec<f32>)| {
            let scores: Vec<f32> = keys[..=at].iter().map(|key| dot(query, key)).collect();
            best(&scores, keys.len() / one_of)
        };
        Shape::Blocks(queries.iter().enumerate().map(of_query).collect())
    }
}

/// The largest `keep` numbers, ascending by place; of equals the first.
fn best(x: &[f32], keep: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|a, b| x[*b].total_cmp(&x[*a]).then(a.cmp(b)));
    order.truncate(keep);
    order.sort_unstable();
    order
}

/// Eight sums at a time, which a compiler puts into vectors.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = (a8.remainder().iter().zip(b8.remainder()))
        .map(|(a, b)| a * b)
        .sum();
    let mut sums = [0.0f32; 8];
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    rest + sums.iter().sum::<f32>()
}

/// What a candidate lets queries see.
enum Shape {
    /// The first units, and all that are no farther than `local`.
    A { init: usize, local: usize },
    /// Columns and diagonals, ascending.
    Lines {
        columns: Vec<usize>,
        is_column: Vec<bool>,
        diagonals: Vec<usize>,
    },
    /// By block of queries, blocks of units.
    Blocks(Vec<Vec<usize>>),
}

impl Shape {
    /// How much of a query's weights, which go up to its own unit, lies in it.
    fn recalled(&self, row: &[f32]) -> f64 {
        let own = row.len() - 1;
        let sum = |row: &[f32]| row.iter().map(|x| f64::from(*x)).sum::<f64>();
        match self {
            Self::A { init, local } => {
                let from = own.saturating_sub(*local);
                sum(&row[..(*init).min(from)]) + sum(&row[from..])
            }
            Self::Lines {
                columns,
                is_column,
                diagonals,
            } => {
                let columns = columns.iter().take_while(|unit| **unit <= own);
                let diagonals = diagonals.iter().take_while(|distance| **distance <= own);
                let others = diagonals.map(|distance| own - distance);
                let others = others.filter(|unit| !is_column[*unit]);
                let weights = columns.copied().chain(others).map(|unit| row[unit]);
                weights.map(f64::from).sum()
            }
            Self::Blocks(blocks) => {
                let blocks = blocks[own / BLOCK].iter().map(|block| block * BLOCK);
                let range = |first: usize| first.min(row.len())..(first + BLOCK).min(row.len());
                blocks.map(|first| sum(&row[range(first)])).sum()
            }
        }
    }
}
