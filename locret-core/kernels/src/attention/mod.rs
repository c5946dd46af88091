//! Causal attention with grouped queries, where the cache lies.
//!
//! Keys are read in tiles and softmax is kept as a running maximum and sum (arXiv 2205.14135,
//! 2307.08691), so that no matrix of scores exists. Two ways of putting numbers into vectors:
//!
//! - **Many queries** (prefill): lanes are (query, head of the group) rows. Scores of a tile are
//!   the outer products of broadcast keys with packed queries, softmax runs down the lanes without
//!   any reduction across them, and the output is kept transposed, so that neither keys nor values
//!   are ever packed. Rows of one KV head share its tiles; tiles that no row of a panel may see are
//!   skipped.
//! - **Few queries** (decode): lanes are features; a tile of keys is read once for the heads of a
//!   group.
//!
//! Where queries see less than everything before them, `chosen` computes only that ([`attend_chosen`]), with
//! the panels of many queries.
//!
//! Work is cut by (KV head, block of queries, range of units) in a way that depends on the shape
//! alone; ranges are merged by their maxima and sums. Results therefore don't depend on threads.

mod chosen;
mod few;
mod loader;
mod many;

use crate::{
    rope::RopeTable,
    scratch::Scratch,
    simd::{Isa, dispatch},
    tiles::KvTiles,
};
use rayon::prelude::*;
use std::ops::Range;

pub use chosen::{Seeing, attend_chosen};
pub(crate) use few::{dot_scores, heads_at_once};
pub(crate) use loader::Loader;
pub(crate) use many::{hide, hide_before, scores};

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttnShape {
    /// New tokens, one query each per head.
    pub tokens: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// What `q·k` is multiplied with before softmax, usually `1/√head_dim`.
    pub scale: f32,
}

impl AttnShape {
    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// How many units of a head with `len` units query `token` sees.
    pub(crate) fn sees(&self, len: usize, token: usize) -> usize {
        (len + token + 1).saturating_sub(self.tokens)
    }

    pub(crate) fn check(&self, q: &[f32], heads: &[&dyn KvTiles], rotation: Option<&RopeTable>) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads) && self.head_dim > 0,
            "{self:?}"
        );
        assert_eq!(
            q.len(),
            self.tokens * self.heads * self.head_dim,
            "length of q for {self:?}"
        );
        assert_eq!(heads.len(), self.kv_heads, "KV heads");
        if let Some(table) = rotation {
            let longest = heads.iter().map(|h| h.len()).max().unwrap_or(0);
            assert!(
                table.len() >= longest && table.rotary_dim() <= self.head_dim,
                "a rotary table of {} rows and {} features for {longest} units of {}",
                table.len(),
                table.rotary_dim(),
                self.head_dim
            );
        }
    }
}

/// Causal softmax attention of new tokens over the units of each KV head.
///
/// # Shapes
/// - `q`: `[tokens, heads, head_dim]`, rotated, not scaled.
/// - `heads`: `kv_heads` stores; query head `h` reads store `h / group`. Lengths may differ.
/// - `out`: `[tokens, heads, head_dim]`.
///
/// The queries are aligned to the end of each store: with `len` units, query `i` sees units
/// `0..=len - tokens + i`. With `key_rotation`, keys are stored before rotation and unit `i` of
/// each head is rotated by row `i` of the table as it is read; `q` must be rotated already.
///
/// # Numbers that are not finite
/// They reach exactly the rows that see them, as in the textbook formula: a row with a NaN score,
/// or a `+∞` one, or none but `-∞` ones, becomes NaN; a score of `-∞` among finite ones has
/// weight 0; a value that isn't finite makes its feature NaN or infinite. A row that sees no unit
/// at all (`len < tokens`) becomes 0.
///
/// # Panics
/// If the length of `q`, `heads` or `out` does not fit `shape`, if `heads` is not a multiple of
/// `kv_heads`, or if the table has fewer rows than the longest head has units.
pub fn attend(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    out: &mut [f32],
) {
    attend_with(Isa::best(), q, heads, shape, key_rotation, out);
}

/// Units in a tile: its keys or values (24 KiB at 64 features) fit the first cache beside a panel
/// of queries.
pub(crate) const TILE: usize = 96;

/// The same with features in lanes; whole vectors of scores.
pub(crate) const FEW_TILE: usize = 64;

/// Rows (queries × heads of the group) that share a tile before it is read again.
const BLOCK_ROWS: usize = 192;

/// Up to this many rows are handled with features in lanes.
const FEW_ROWS: usize = 6;

/// A range of units is not cut into pieces shorter than this.
const PIECE: usize = 256;

/// Below this many multiply-adds the calling thread does all.
pub(crate) const SERIAL: usize = 1 << 18;

/// One piece of work: some queries of a KV head over some of its units.
#[derive(Debug, Clone)]
struct Task {
    head: usize,
    tokens: Range<usize>,
    units: Range<usize>,
}

/// How a call is cut up; a function of the shape and the lengths only.
#[derive(Debug)]
struct Plan {
    /// Tokens in a block of queries.
    block: usize,
    tasks: Vec<Task>,
    /// `[kv_heads * blocks + 1]`: where the tasks of a block begin.
    first: Vec<usize>,
    /// Numbers that a task leaves: maxima and sums `[rows]`, sums of values `[rows, head_dim]`.
    stride: usize,
    /// Units of each KV head.
    lens: Vec<usize>,
}

impl Plan {
    fn new(shape: AttnShape, heads: &[&dyn KvTiles]) -> Self {
        let g = shape.group();
        let block = (BLOCK_ROWS / g).clamp(1, shape.tokens);
        let blocks = shape.tokens.div_ceil(block);
        // Enough pieces that a few processors have something to do each.
        let wanted = if shape.kv_heads * blocks >= 12 {
            1
        } else {
            32usize.div_ceil(shape.kv_heads * blocks)
        };
        let mut tasks = Vec::new();
        let mut first = vec![0];
        for (head, store) in heads.iter().enumerate() {
            for b in 0..blocks {
                let tokens = b * block..((b + 1) * block).min(shape.tokens);
                let seen = shape.sees(store.len(), tokens.end - 1);
                let pieces = (seen / PIECE).clamp(1, wanted);
                // Whole tiles, so that each is converted or rotated once.
                let step = seen.div_ceil(pieces).next_multiple_of(TILE).max(TILE);
                for start in (0..seen.max(1)).step_by(step) {
                    tasks.push(Task {
                        head,
                        tokens: tokens.clone(),
                        units: start..(start + step).min(seen),
                    });
                }
                first.push(tasks.len());
            }
        }
        Self {
            block,
            tasks,
            first,
            stride: block * g * (shape.head_dim + 2),
            lens: heads.iter().map(|h| h.len()).collect(),
        }
    }

    /// The output of one query of one head, from what the tasks of its block left.
    fn merge(
        &self,
        shape: AttnShape,
        partials: &[f32],
        token: usize,
        head: usize,
        out: &mut [f32],
    ) {
        let (g, d) = (shape.group(), shape.head_dim);
        let rows = self.block * g;
        let row = token % self.block * g + head % g;
        let block = head / g * shape.tokens.div_ceil(self.block) + token / self.block;
        let tasks = self.first[block]..self.first[block + 1];
        let pieces = partials[tasks.start * self.stride..tasks.end * self.stride]
            .chunks(self.stride)
            .map(|piece| {
                let acc = &piece[2 * rows + row * d..][..d];
                (piece[row], piece[rows + row], acc)
            });
        if tasks.len() == 1 {
            for (_, sum, acc) in pieces {
                for (out, acc) in out.iter_mut().zip(acc) {
                    *out = acc / sum;
                }
            }
        } else {
            let top = pieces
                .clone()
                .map(|p| p.0)
                .fold(f32::NEG_INFINITY, f32::max);
            let top = if top == f32::NEG_INFINITY { 0.0 } else { top };
            out.fill(0.0);
            let mut total = 0.0;
            for (piece_top, sum, acc) in pieces {
                let weight = (piece_top - top).exp2();
                total += weight * sum;
                for (out, acc) in out.iter_mut().zip(acc) {
                    *out += weight * acc;
                }
            }
            for out in out.iter_mut() {
                *out /= total;
            }
        }
        if shape.sees(self.lens[head / g], token) == 0 {
            out.fill(0.0);
        }
    }
}

/// What all tasks of a call share.
#[derive(Clone, Copy)]
struct Call<'a> {
    q: &'a [f32],
    heads: &'a [&'a dyn KvTiles],
    shape: AttnShape,
    rotation: Option<&'a RopeTable>,
}

impl<'a> Call<'a> {
    #[inline(always)]
    fn loader(&self, task: &Task) -> Loader<'a> {
        let rows = task.tokens.len() * self.shape.group();
        Loader::new(
            self.heads[task.head],
            self.rotation,
            self.shape.head_dim,
            rows,
        )
    }

    /// A query of a task; those of a token's heads follow each other.
    #[inline(always)]
    fn row(&self, task: &Task, row: usize) -> &'a [f32] {
        let (g, d) = (self.shape.group(), self.shape.head_dim);
        let token = task.tokens.start + row / g;
        &self.q[(token * self.shape.heads + task.head * g + row % g) * d..][..d]
    }

    /// The factor on queries: softmax is computed with powers of two.
    #[inline(always)]
    fn log2_scale(&self) -> f32 {
        self.shape.scale * std::f32::consts::LOG2_E
    }
}

fn attend_with(
    isa: Isa,
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    rotation: Option<&RopeTable>,
    out: &mut [f32],
) {
    shape.check(q, heads, rotation);
    assert_eq!(out.len(), q.len(), "length of the output for {shape:?}");
    if shape.tokens == 0 || shape.heads == 0 {
        return;
    }
    let plan = Plan::new(shape, heads);
    let call = Call {
        q,
        heads,
        shape,
        rotation,
    };
    let longest = heads.iter().map(|h| h.len()).max().unwrap_or(0);
    let work = 2 * shape.tokens * shape.heads * longest * shape.head_dim;
    let serial = work < SERIAL || rayon::current_num_threads() == 1;
    let total = plan.tasks.len() * plan.stride;
    let mut memory = Scratch::for_lengths(&[total]);
    let [partials] = memory.slices([total]);
    let run = |(task, partial): (&Task, &mut [f32])| {
        let rows = plan.block * shape.group();
        let (top, rest) = partial.split_at_mut(rows);
        let (sum, acc) = rest.split_at_mut(rows);
        if task.tokens.len() * shape.group() <= FEW_ROWS {
            dispatch!(isa, s => few::few(s, call, task, top, sum, acc));
        } else {
            dispatch!(isa, s => many::many(s, call, task, top, sum, acc));
        }
    };
    if serial {
        let pairs = plan.tasks.iter().zip(partials.chunks_mut(plan.stride));
        pairs.for_each(run);
    } else {
        let partials = partials.par_chunks_mut(plan.stride);
        let pairs = plan.tasks.par_iter().zip(partials);
        pairs.with_max_len(1).for_each(run);
    }
    let partials = &*partials;
    let finish = |(token, out): (usize, &mut [f32])| {
        for (head, out) in out.chunks_mut(shape.head_dim).enumerate() {
            plan.merge(shape, partials, token, head, out);
        }
    };
    let row = shape.heads * shape.head_dim;
    if serial || out.len() < 1 << 15 {
        out.chunks_mut(row).enumerate().for_each(finish);
    } else {
        let rows = out.par_chunks_mut(row).enumerate();
        rows.with_min_len(16).for_each(finish);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        rope,
        testing::{self, *},
        tiles::DenseTiles,
        visible::Views,
    };
    use half::{bf16, f16};
    use proptest::prelude::*;

    /// The textbook formula in double precision.
    fn oracle(
        q: &[f32],
        keys: &[Vec<f32>],
        values: &[Vec<f32>],
        shape: AttnShape,
        table: Option<&RopeTable>,
    ) -> Vec<f32> {
        let d = shape.head_dim;
        let mut out = Vec::new();
        for token in 0..shape.tokens {
            for head in 0..shape.heads {
                let store = head / shape.group();
                let mut keys = keys[store].clone();
                if let Some(table) = table {
                    rope::rotate(&mut keys, d, d, table, |i| i, false);
                }
                let len = keys.len() / d;
                let seen = (len + token + 1).saturating_sub(shape.tokens);
                let q = &q[(token * shape.heads + head) * d..][..d];
                let logits: Vec<f64> = (0..seen)
                    .map(|k| {
                        let dot: f64 = q
                            .iter()
                            .zip(&keys[k * d..])
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum();
                        dot * f64::from(shape.scale)
                    })
                    .collect();
                let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = logits.iter().map(|l| (l - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                for f in 0..d {
                    let sum: f64 = (0..seen)
                        .map(|k| weights[k] * f64::from(values[store][k * d + f]))
                        .sum();
                    out.push(if seen == 0 { 0.0 } else { (sum / total) as f32 });
                }
            }
        }
        out
    }

    pub(crate) fn same(a: &[f32], b: &[f32], tolerance: f32) -> Result<(), String> {
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let close = (a - b).abs() <= tolerance || a == b || (a.is_nan() && b.is_nan());
            if !close {
                return Err(format!("at {i}: {a} for {b}"));
            }
        }
        Ok(())
    }

    pub(crate) fn tiles_of<'a>(
        keys: &'a [Vec<f32>],
        values: &'a [Vec<f32>],
        d: usize,
    ) -> Vec<DenseTiles<'a>> {
        keys.iter()
            .zip(values)
            .map(|(k, v)| DenseTiles::new(&k[..], &v[..], d))
            .collect()
    }

    pub(crate) fn refs<'a>(tiles: &'a [DenseTiles<'a>]) -> Vec<&'a dyn KvTiles> {
        tiles.iter().map(|t| t as &dyn KvTiles).collect()
    }

    #[derive(Debug, Clone)]
    pub(crate) struct Case {
        pub(crate) shape: AttnShape,
        pub(crate) lens: Vec<usize>,
        rotary: Option<usize>,
        pub(crate) seed: u64,
    }

    pub(crate) fn case() -> impl Strategy<Value = Case> {
        let sizes = (
            prop_oneof![1usize..4, 4usize..40, 60usize..150],
            1usize..4,
            1usize..6,
            prop_oneof![1usize..40, Just(64), Just(80), Just(96), Just(128)],
        );
        (sizes, 0usize..4, any::<u64>())
            .prop_flat_map(|((tokens, kv_heads, group, d), rotary, seed)| {
                let len = prop_oneof![Just(0usize), 0usize..20, 0usize..300, Just(600)];
                (
                    Just((tokens, kv_heads, group, d, rotary, seed)),
                    prop::collection::vec(len, kv_heads),
                )
            })
            .prop_map(|((tokens, kv_heads, group, d, rotary, seed), more)| Case {
                shape: AttnShape {
                    tokens,
                    heads: kv_heads * group,
                    kv_heads,
                    head_dim: d,
                    scale: 1.0 / (d as f32).sqrt(),
                },
                lens: more.into_iter().map(|m| tokens + m).collect(),
                rotary: match rotary {
                    0 => Some(d / 2 * 2),
                    1 => Some(d / 4 * 2),
                    _ => None,
                },
                seed,
            })
    }

    impl Case {
        pub(crate) fn data(&self) -> (Vec<f32>, Vec<Vec<f32>>, Vec<Vec<f32>>, Option<RopeTable>) {
            let (s, d) = (self.shape, self.shape.head_dim);
            let mut rng = Numbers::new(self.seed);
            let mut q = rng.take(s.tokens * s.heads * d);
            // Large enough that softmax is far from uniform.
            q.iter_mut().for_each(|x| *x *= 6.0);
            let keys = self.lens.iter().map(|n| rng.take(n * d)).collect();
            let values = self.lens.iter().map(|n| rng.take(n * d)).collect();
            let table = self.rotary.map(|r| {
                let f: Vec<f32> = (0..r / 2).map(|i| 1.0 / (1.0 + i as f32)).collect();
                RopeTable::new(&f, 1.25, 0..self.lens.iter().copied().max().unwrap_or(0))
            });
            (q, keys, values, table)
        }

        /// Views by chance; where keys are rotated as they are read, half of them of units that stand elsewhere.
        pub(crate) fn views(&self, block: usize) -> Views {
            let group = self.shape.group();
            let views = testing::views(self.seed, self.shape.tokens, block, &self.lens, group);
            if self.rotary.is_none() || self.seed.is_multiple_of(2) {
                return views;
            }
            let mut rng = Numbers::new(self.seed ^ 3);
            let place = |x: f32, n: usize| ((x.abs() * n as f32) as u32).min(n as u32 - 1);
            let places = self.lens.iter().map(|n| {
                let numbers = rng.take(*n).into_iter();
                numbers.map(|x| place(x, *n)).collect()
            });
            views.placed(places.collect())
        }
    }

    proptest! {
        #![proptest_config(crate::testing::cases(96))]
        #[test]
        fn every_path_agrees_with_the_textbook(case in case()) {
            let (q, keys, values, table) = case.data();
            let expected = oracle(&q, &keys, &values, case.shape, table.as_ref());
            let tiles = tiles_of(&keys, &values, case.shape.head_dim);
            for isa in Isa::all() {
                let mut out = vec![f32::NAN; q.len()];
                attend_with(isa, &q, &refs(&tiles), case.shape, table.as_ref(), &mut out);
                if let Err(e) = same(&out, &expected, 1e-5) {
                    prop_assert!(false, "{isa:?} {e}");
                }
            }
        }

        #[test]
        fn numbers_that_are_not_finite_reach_the_rows_that_see_them_only(
            case in case(),
            places in prop::collection::vec((0usize..3, any::<prop::sample::Index>(), 0usize..3), 1..4),
        ) {
            let (mut q, mut keys, mut values, table) = case.data();
            for (what, place, which) in places {
                let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][which];
                let place = place.index(1 << 20);
                let head = place % keys.len();
                let list = match what {
                    0 => &mut q,
                    1 => &mut keys[head],
                    _ => &mut values[head],
                };
                let n = list.len();
                list[place % n] = bad;
            }
            let expected = oracle(&q, &keys, &values, case.shape, table.as_ref());
            let tiles = tiles_of(&keys, &values, case.shape.head_dim);
            for isa in Isa::all() {
                let mut out = vec![0.0; q.len()];
                attend_with(isa, &q, &refs(&tiles), case.shape, table.as_ref(), &mut out);
                if let Err(e) = same(&out, &expected, 1e-5) {
                    prop_assert!(false, "{isa:?} {e}");
                }
            }
        }

        #[test]
        fn sixteen_bit_stores_are_what_their_numbers_are(case in case()) {
            let (q, keys, values, table) = case.data();
            let d = case.shape.head_dim;
            let k16: Vec<Vec<f16>> = keys.iter().map(|k| k.iter().map(|x| f16::from_f32(*x)).collect()).collect();
            let v16: Vec<Vec<bf16>> = values.iter().map(|v| v.iter().map(|x| bf16::from_f32(*x)).collect()).collect();
            let keys: Vec<Vec<f32>> = k16.iter().map(|k| k.iter().map(|x| x.to_f32()).collect()).collect();
            let values: Vec<Vec<f32>> = v16.iter().map(|v| v.iter().map(|x| x.to_f32()).collect()).collect();
            let dense = tiles_of(&keys, &values, d);
            let half: Vec<DenseTiles<'_>> = k16.iter().zip(&v16).map(|(k, v)| DenseTiles::new(&k[..], &v[..], d)).collect();
            for isa in Isa::all() {
                let (mut a, mut b) = (vec![0.0; q.len()], vec![1.0; q.len()]);
                attend_with(isa, &q, &refs(&dense), case.shape, table.as_ref(), &mut a);
                attend_with(isa, &q, &refs(&half), case.shape, table.as_ref(), &mut b);
                prop_assert_eq!(&a, &b);
            }
        }
    }

    fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
            .install(f)
    }

    #[test]
    fn results_do_not_depend_on_threads() {
        for tokens in [1, 2, 70, 300] {
            let case = Case {
                shape: AttnShape {
                    tokens,
                    heads: 9,
                    kv_heads: 3,
                    head_dim: 64,
                    scale: 0.125,
                },
                lens: vec![3000, 1500, 300 + tokens],
                rotary: None,
                seed: 5,
            };
            let (q, keys, values, _) = case.data();
            let tiles = tiles_of(&keys, &values, 64);
            let run = |threads| {
                with_threads(threads, || {
                    let mut out = vec![0.0; q.len()];
                    attend(&q, &refs(&tiles), case.shape, None, &mut out);
                    out
                })
            };
            let (one, two, five) = (run(1), run(2), run(5));
            assert_eq!(one, two);
            assert_eq!(one, five);
            same(&one, &oracle(&q, &keys, &values, case.shape, None), 1e-5).unwrap();
        }
    }

    #[test]
    fn queries_before_the_first_unit_see_nothing() {
        let shape = AttnShape {
            tokens: 4,
            heads: 2,
            kv_heads: 2,
            head_dim: 3,
            scale: 1.0,
        };
        let (keys, values) = (
            vec![vec![0.5; 6], vec![]],
            vec![vec![1.0, 2.0, 3.0, 1.0, 2.0, 3.0], vec![]],
        );
        let tiles = tiles_of(&keys, &values, 3);
        let mut out = vec![9.0; 24];
        attend(&[1.0; 24], &refs(&tiles), shape, None, &mut out);
        let row = [1.0, 2.0, 3.0, 0.0, 0.0, 0.0];
        assert_eq!(out, [[0.0; 12].as_slice(), &row, &row].concat());
    }

    #[test]
    #[should_panic(expected = "a rotary table of 3 rows")]
    fn a_short_table_is_refused() {
        let shape = AttnShape {
            tokens: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            scale: 1.0,
        };
        let table = RopeTable::new(&[1.0], 1.0, 0..3);
        let (keys, values) = (vec![vec![0.0; 8]], vec![vec![0.0; 8]]);
        let tiles = tiles_of(&keys, &values, 2);
        attend(&[0.0; 2], &refs(&tiles), shape, Some(&table), &mut [0.0; 2]);
    }
}
