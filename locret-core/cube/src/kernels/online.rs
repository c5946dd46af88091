//! What every attention here does with tiles, wherever their numbers come from: which units a block of rows sees, scores
//! of a tile, and sums that follow the largest score so far (online softmax, arXiv 1805.02867).
//!
//! Rows, tiles and the units of a cube are those of [`attention`](super::attention).

use super::attention::{ACROSS, Form, HIDDEN};
use cubecl::prelude::*;

/// The first of a head's `len` units that a cube has, where these are cut into parts of whole tiles.
#[cube]
pub(super) fn begin_of(len: usize, #[comptime] tile: usize, #[comptime] split: bool) -> usize {
    let mut begin = 0usize;
    if comptime!(split) {
        begin = CUBE_POS_Z as usize * (len.div_ceil(CUBE_COUNT_Z as usize).div_ceil(tile) * tile);
    }
    begin
}

/// The unit behind the last one that a cube has, of those that the last of `rows` rows from `block` on sees; `old` units
/// stand before those of the queries.
#[cube]
pub(super) fn end_of(
    block: usize,
    total: usize,
    old: usize,
    len: usize,
    #[comptime] rows: usize,
    #[comptime] group: usize,
    #[comptime] tile: usize,
    #[comptime] split: bool,
) -> usize {
    let last = usize::min(block + rows, total) - 1;
    let mut end = old + last / group + 1;
    if comptime!(split) {
        let share = len.div_ceil(CUBE_COUNT_Z as usize).div_ceil(tile) * tile;
        end = usize::min(end, (CUBE_POS_Z as usize + 1) * share);
    }
    end
}

/// The units from which on they are hidden from each of a unit's rows; from the first on, where there is no such row.
#[cube]
pub(super) fn sights(
    first: usize,
    total: usize,
    old: usize,
    end: usize,
    #[comptime] form: Form,
) -> Array<usize> {
    let own_rows = comptime!(form.own_rows());
    let mut sight = Array::<usize>::new(own_rows);
    #[unroll]
    for r in 0..own_rows {
        sight[r] = 0;
        if first + r < total {
            sight[r] = usize::min(end, old + (first + r) / comptime!(form.group) + 1);
        }
    }
    sight
}

/// The rows of a block, scaled, in shared memory; zeros where there are none.
#[cube]
pub(super) fn load_queries(
    q: &Tensor<f32>,
    queries: &mut [f32],
    block: usize,
    tokens: usize,
    count: usize,
    scale: f32,
    unit: usize,
    #[comptime] form: Form,
) {
    let dim = comptime!(form.dim);
    let group = comptime!(form.group);
    let head = CUBE_POS_Y as usize;
    for i in range_stepped(
        unit,
        comptime!(form.rows * form.dim),
        comptime!(form.units()),
    ) {
        let (row, feature) = (i / dim, i % dim);
        let mut x = 0.0f32;
        if block + row < count * group {
            let token = tokens - count + (block + row) / group;
            let at = (head * group + (block + row) % group) * dim + feature;
            x = q[token * q.stride(0) + at] * scale;
        }
        queries[row * comptime!(form.stride()) + feature] = x;
    }
}

/// Scores of a unit's rows with its keys of a tile.
#[cube]
pub(super) fn scored(
    queries: &[f32],
    tile: &[f32],
    mine: usize,
    lane: usize,
    #[comptime] form: Form,
) -> Array<f32> {
    let stride = comptime!(form.stride());
    let own_rows = comptime!(form.own_rows());
    let own_keys = comptime!(form.tile() / ACROSS);
    let mut scores = Array::<f32>::new(comptime!(form.own_rows() * form.tile() / ACROSS));
    #[unroll]
    for i in 0..comptime!(form.own_rows() * form.tile() / ACROSS) {
        scores[i] = 0.0;
    }
    for feature in 0..comptime!(form.dim) {
        #[unroll]
        for r in 0..own_rows {
            let x = queries[(mine + r) * stride + feature];
            #[unroll]
            for k in 0..own_keys {
                scores[r * own_keys + k] += x * tile[(k * ACROSS + lane) * stride + feature];
            }
        }
    }
    scores
}

/// Puts scores of a tile of keys from unit `at` on where all units of the cube see them.
#[cube]
pub(super) fn show(
    scores: &Array<f32>,
    sight: &Array<usize>,
    weights: &mut [f32],
    at: usize,
    mine: usize,
    lane: usize,
    #[comptime] form: Form,
) {
    let own_keys = comptime!(form.tile() / ACROSS);
    #[unroll]
    for r in 0..comptime!(form.own_rows()) {
        #[unroll]
        for k in 0..own_keys {
            let key = k * ACROSS + lane;
            let hidden = at + key >= sight[r];
            weights[(mine + r) * comptime!(form.tile() + 1) + key] =
                select(hidden, HIDDEN, scores[r * own_keys + k]);
        }
    }
}

/// Adds to each row what the values of a tile from unit `at` on make by their weights. `weights` are the scores that were
/// [shown](show); `tile` is being filled with the values.
#[cube]
pub(super) fn mix(
    scores: &Array<f32>,
    sight: &Array<usize>,
    tile: &[f32],
    weights: &mut [f32],
    sums: &mut Array<f32>,
    most: &mut Array<f32>,
    made: &mut Array<f32>,
    at: usize,
    mine: usize,
    lane: usize,
    #[comptime] form: Form,
) {
    let size = comptime!(form.tile());
    let columns = comptime!(form.padded() / ACROSS);
    let own_rows = comptime!(form.own_rows());
    let own_keys = comptime!(form.tile() / ACROSS);
    // Units that share a row find the same largest score, each for itself.
    let mut shrink = Array::<f32>::new(own_rows);
    #[unroll]
    for r in 0..own_rows {
        let mut top = most[r];
        for key in 0..size {
            top = f32::max(top, weights[(mine + r) * comptime!(form.tile() + 1) + key]);
        }
        shrink[r] = f32::exp(most[r] - top);
        most[r] = top;
    }
    sync_cube();
    #[unroll]
    for r in 0..own_rows {
        #[unroll]
        for k in 0..own_keys {
            let key = k * ACROSS + lane;
            let weight = f32::exp(scores[r * own_keys + k] - most[r]);
            let hidden = at + key >= sight[r];
            weights[(mine + r) * comptime!(form.tile() + 1) + key] = select(hidden, 0.0f32, weight);
        }
        sums[r] *= shrink[r];
        #[unroll]
        for c in 0..columns {
            made[r * columns + c] *= shrink[r];
        }
    }
    sync_cube();
    for key in 0..size {
        let mut across = Array::<f32>::new(columns);
        #[unroll]
        for c in 0..columns {
            across[c] = tile[key * comptime!(form.stride()) + c * ACROSS + lane];
        }
        #[unroll]
        for r in 0..own_rows {
            let weight = weights[(mine + r) * comptime!(form.tile() + 1) + key];
            sums[r] += weight;
            #[unroll]
            for c in 0..columns {
                made[r * columns + c] += weight * across[c];
            }
        }
    }
}

/// Writes what was made of rows: `out` and `stats` as [`attend`](super::attention::attend) has them.
#[cube]
pub(super) fn write(
    out: &mut [f32],
    stats: &mut [f32],
    sums: &Array<f32>,
    most: &Array<f32>,
    made: &Array<f32>,
    tokens: usize,
    first: usize,
    lane: usize,
    #[comptime] form: Form,
) {
    let dim = comptime!(form.dim);
    let group = comptime!(form.group);
    let columns = comptime!(form.padded() / ACROSS);
    let head = CUBE_POS_Y as usize;
    let heads = CUBE_COUNT_Y as usize * group;
    #[unroll]
    for r in 0..comptime!(form.own_rows()) {
        let row = first + r;
        if row < tokens * group {
            let mut query = row / group * heads + head * group + row % group;
            let mut by = 1.0f32;
            if comptime!(form.split) {
                query += CUBE_POS_Z as usize * tokens * heads;
                if lane == 0 {
                    stats[query * 2] = most[r];
                    stats[query * 2 + 1] = sums[r];
                }
            } else {
                by = 1.0 / sums[r];
            }
            #[unroll]
            for c in 0..columns {
                let feature = c * ACROSS + lane;
                if feature < dim {
                    out[query * dim + feature] = made[r * columns + c] * by;
                }
            }
        }
    }
}
