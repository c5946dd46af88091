//! Causal attention of all KV heads over units where they lie, in one launch.
//!
//! A cube has a block of rows of one KV head. A row is a query: token `row / group`, and of the query heads that
//! share the KV head the one numbered `row % group`, so that one tile of keys in shared memory meets all of them.
//! Scores are never kept: a tile of them lives in shared memory, and sums, largest scores and outputs in
//! registers (online softmax, arXiv 1805.02867). Nothing but shared memory is asked of the device, and at most
//! [`SHARED`] bytes of it: no planes, no matrix units.
//!
//! Units of a cube are a grid: [`ACROSS`] of them share the rows, each with its part of a tile's keys and of
//! the features.

use super::online::{begin_of, end_of, load_queries, mix, scored, show, sights, write};
use cubecl::prelude::*;

/// Units that share some rows.
pub(crate) const ACROSS: usize = 16;

/// Shared memory of a cube, which every device has.
pub(super) const SHARED: usize = 32 * 1024;

/// The score of what is not seen, which is a number so that it can be subtracted from itself.
pub(crate) const HIDDEN: f32 = -1e30;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Form {
    /// Features of a head.
    pub(crate) dim: usize,
    /// Pairs of features of the keys that are rotated as they are loaded.
    pub(crate) half: usize,
    /// Query heads of a KV head.
    pub(crate) group: usize,
    /// Rows of a cube: 4, 8, 16 or 32.
    pub(crate) rows: usize,
    /// Whether what is made are parts, which [`join`] puts together.
    pub(crate) split: bool,
}

impl Form {
    /// For `rows` rows of each KV head; `None` where heads are so wide that a tile does not fit.
    pub(crate) fn new(dim: usize, half: usize, group: usize, rows: usize) -> Option<Self> {
        let form = |rows| Self {
            dim,
            half,
            group,
            rows,
            split: false,
        };
        let fitting = [32, 16, 8, 4].map(form).into_iter();
        let mut fitting = fitting.filter(|form| form.shared() <= SHARED);
        let largest = fitting.next()?;
        Some(match fitting.rfind(|form| form.rows >= rows) {
            Some(smaller) => smaller,
            None => largest,
        })
    }

    /// Keys of a tile.
    pub(crate) fn tile(self) -> usize {
        match self.padded() > 64 {
            true => ACROSS,
            false => 2 * ACROSS,
        }
    }

    /// Features, and zeros up to a whole number for each unit.
    pub(super) fn padded(self) -> usize {
        self.dim.next_multiple_of(ACROSS)
    }

    /// Numbers between rows in shared memory: odd, so that neighbours lie in different banks.
    pub(super) fn stride(self) -> usize {
        self.padded() + 1
    }

    /// Rows of a unit.
    pub(super) fn own_rows(self) -> usize {
        (self.rows / 8).max(1)
    }

    /// Units of a cube.
    pub(crate) fn units(self) -> usize {
        self.rows / self.own_rows() * ACROSS
    }

    /// Bytes of shared memory of a cube.
    pub(crate) fn shared(self) -> usize {
        size_of::<f32>()
            * ((self.rows + self.tile()) * self.stride() + self.rows * (self.tile() + 1))
    }
}

/// Attends.
///
/// - `q`: `[tokens, heads * dim]`, rotated.
/// - `keys`, `values`: `[rows, dim]`, of which KV head `h` has the `bounds[2 h + 1]` from row `bounds[2 h]` on;
///   the last `tokens` of them are the queries' own.
/// - `cos`, `sin`: `[units, half]`, the rows that keys are rotated by; not read where nothing is.
/// - `out`: `[tokens, heads * dim]`; of parts, `[parts, tokens, heads * dim]`, not yet divided by their sums.
/// - `stats`: of parts, `[parts, tokens, heads, 2]`, the largest score and the sum of weights.
///
/// Cubes: blocks of rows, KV heads, parts.
#[cube(launch)]
pub(crate) fn attend<S: Float>(
    q: &Tensor<f32>,
    keys: &[S],
    values: &[S],
    bounds: &[u32],
    cos: &[f32],
    sin: &[f32],
    out: &mut [f32],
    stats: &mut [f32],
    scale: f32,
    tokens: u32,
    #[comptime] form: Form,
    #[define(S)] _dtype: ElemType,
) {
    let group = comptime!(form.group);
    let size = comptime!(form.tile());
    let own_rows = comptime!(form.own_rows());

    let mut queries = Shared::<[f32]>::new_slice(comptime!(form.rows * form.stride()));
    let mut tile = Shared::<[f32]>::new_slice(comptime!(form.tile() * form.stride()));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(form.rows * (form.tile() + 1)));

    let tokens = tokens as usize;
    let unit = UNIT_POS as usize;
    let lane = unit % ACROSS;
    let mine = unit / ACROSS * own_rows;
    let head = CUBE_POS_Y as usize;
    let block = CUBE_POS_X as usize * comptime!(form.rows);
    let total = tokens * group;
    let first = bounds[head * 2] as usize;
    let len = bounds[head * 2 + 1] as usize;
    let old = len - tokens;

    load_queries(q, &mut queries, block, tokens, tokens, scale, unit, form);
    let end = end_of(
        block, total, old, len, form.rows, form.group, size, form.split,
    );
    let sight = sights(block + mine, total, old, end, form);
    let mut sums = Array::<f32>::new(own_rows);
    let mut most = Array::<f32>::new(own_rows);
    let mut made = Array::<f32>::new(comptime!(form.own_rows() * form.padded() / ACROSS));
    #[unroll]
    for r in 0..own_rows {
        sums[r] = 0.0;
        most[r] = HIDDEN;
    }
    #[unroll]
    for i in 0..comptime!(form.own_rows() * form.padded() / ACROSS) {
        made[i] = 0.0;
    }

    let mut at = begin_of(len, size, form.split);
    while at < end {
        // What was here before has been read.
        sync_cube();
        load_keys::<S>(keys, cos, sin, &mut tile, first, at, end, unit, form);
        sync_cube();
        let scores = scored(&queries, &tile, mine, lane, form);
        show(&scores, &sight, &mut weights, at, mine, lane, form);
        sync_cube();
        // All keys have been read: their values come into the same place.
        load_values::<S>(values, &mut tile, first, at, end, unit, form);
        mix(
            &scores,
            &sight,
            &tile,
            &mut weights,
            &mut sums,
            &mut most,
            &mut made,
            at,
            mine,
            lane,
            form,
        );
        at += size;
    }
    write(
        out,
        stats,
        &sums,
        &most,
        &made,
        tokens,
        block + mine,
        lane,
        form,
    );
}

/// A tile of keys from unit `at` on, rotated by their own rows of the table.
#[cube]
pub(super) fn load_keys<S: Float>(
    keys: &[S],
    cos: &[f32],
    sin: &[f32],
    tile: &mut [f32],
    first: usize,
    at: usize,
    end: usize,
    unit: usize,
    #[comptime] form: Form,
) {
    let dim = comptime!(form.dim);
    let half = comptime!(form.half);
    let stride = comptime!(form.stride());
    // Two features that are rotated together are one piece of work.
    let pieces = comptime!(form.dim - form.half);
    for i in range_stepped(unit, form.tile() * pieces, form.units()) {
        let (key, piece) = (i / pieces, i % pieces);
        let there = at + key < end;
        let from = (first + at + key) * dim;
        let to = key * stride;
        if piece < half {
            let mut left = 0.0f32;
            let mut right = 0.0f32;
            if there {
                let a = f32::cast_from(keys[from + piece]);
                let b = f32::cast_from(keys[from + half + piece]);
                let c = cos[(at + key) * half + piece];
                let s = sin[(at + key) * half + piece];
                left = a * c - b * s;
                right = b * c + a * s;
            }
            tile[to + piece] = left;
            tile[to + half + piece] = right;
        } else {
            let mut x = 0.0f32;
            if there {
                x = f32::cast_from(keys[from + half + piece]);
            }
            tile[to + half + piece] = x;
        }
    }
}

/// A tile of values from unit `at` on; zeros from `end` on.
#[cube]
fn load_values<S: Float>(
    values: &[S],
    tile: &mut [f32],
    first: usize,
    at: usize,
    end: usize,
    unit: usize,
    #[comptime] form: Form,
) {
    let dim = comptime!(form.dim);
    let padded = comptime!(form.padded());
    for i in range_stepped(
        unit,
        comptime!(form.tile() * form.padded()),
        comptime!(form.units()),
    ) {
        let (key, feature) = (i / padded, i % padded);
        let mut x = 0.0f32;
        if at + key < end && feature < dim {
            x = f32::cast_from(values[(first + at + key) * dim + feature]);
        }
        tile[key * comptime!(form.stride()) + feature] = x;
    }
}

/// Puts parts together: `made` is `[parts, queries, dim]`, `stats` `[parts, queries, 2]`, `out` `[queries, dim]`.
#[cube(launch)]
pub(crate) fn join(
    made: &[f32],
    stats: &[f32],
    out: &mut [f32],
    parts: u32,
    #[comptime] dim: usize,
) {
    let at = ABSOLUTE_POS;
    if at >= out.len() {
        terminate!();
    }
    let query = at / dim;
    let queries = out.len() / dim;
    let mut most = HIDDEN.runtime();
    for part in 0..parts as usize {
        most = f32::max(most, stats[(part * queries + query) * 2]);
    }
    let mut sum = 0.0f32;
    let mut x = 0.0f32;
    for part in 0..parts as usize {
        let stat = (part * queries + query) * 2;
        let by = f32::exp(stats[stat] - most);
        sum += stats[stat + 1] * by;
        x += made[part * out.len() + at] * by;
    }
    out[at] = x / sum;
}
