//! What chosen queries, the newest ones, pay to each unit: sums or largest ones of softmax weights, or the largest
//! scores, over all KV heads in one launch. Neither scores nor weights are kept: a first pass ([`tops`]) finds what
//! each query's softmax divides by, a second one ([`by_unit`]) computes a tile of scores again and gathers it.
//!
//! Rows, tiles and the units of a cube are those of [`attention`](super::attention). There are `count` queries, the
//! last of `tokens`; row `i` is query `i / group`, and query head `i % group` of its KV head.

use super::attention::{ACROSS, Form, HIDDEN, load_keys};
use cubecl::prelude::*;

/// What becomes of what a unit is paid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Gather {
    /// By query head, the sum of weights.
    Sum,
    /// By query head, the largest of weights that were multiplied by a factor of their query; 0 of none.
    Largest,
    /// The largest score of all query heads; [`HIDDEN`] of none.
    Logits,
}

impl Gather {
    /// Numbers of a unit.
    pub(crate) fn heads(self, group: usize) -> usize {
        match self {
            Self::Logits => 1,
            _ => group,
        }
    }

    fn nothing(self) -> f32 {
        match self {
            Self::Logits => HIDDEN,
            _ => 0.0,
        }
    }
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

/// For each row the largest score and the sum of weights beside it: `stats`, `[parts, kv_heads, count * group, 2]`.
///
/// `q`, `keys`, `bounds`, `cos` and `sin` are those of [`attend`](super::attention::attend). Cubes: blocks of rows, KV
/// heads, parts.
#[cube(launch)]
pub(crate) fn tops<S: Float>(
    q: &Tensor<f32>,
    keys: &[S],
    bounds: &[u32],
    cos: &[f32],
    sin: &[f32],
    stats: &mut [f32],
    scale: f32,
    tokens: u32,
    count: u32,
    #[comptime] form: Form,
    #[define(S)] _dtype: ElemType,
) {
    let group = comptime!(form.group);
    let rows = comptime!(form.rows);
    let size = comptime!(form.tile());
    let own_rows = comptime!(form.own_rows());
    let own_keys = comptime!(form.tile() / ACROSS);

    let mut queries = Shared::<[f32]>::new_slice(comptime!(form.rows * form.stride()));
    let mut tile = Shared::<[f32]>::new_slice(comptime!(form.tile() * form.stride()));
    let mut lanes = Shared::<[f32]>::new_slice(comptime!(form.rows * ACROSS));

    let (tokens, count) = (tokens as usize, count as usize);
    let unit = UNIT_POS as usize;
    let lane = unit % ACROSS;
    let mine = unit / ACROSS * own_rows;
    let head = CUBE_POS_Y as usize;
    let block = CUBE_POS_X as usize * rows;
    let total = count * group;
    let first = bounds[head * 2] as usize;
    let len = bounds[head * 2 + 1] as usize;
    let before = len - count;

    load_queries(q, &mut queries, block, tokens, count, scale, unit, form);
    let last = usize::min(block + rows, total) - 1;
    let seen = before + last / group + 1;
    let mut begin = 0usize;
    let mut end = seen;
    if comptime!(form.split) {
        let share = len.div_ceil(CUBE_COUNT_Z as usize).div_ceil(size) * size;
        begin = CUBE_POS_Z as usize * share;
        end = usize::min(seen, begin + share);
    }

    // A unit's own: of its keys of each tile.
    let mut sums = Array::<f32>::new(own_rows);
    let mut most = Array::<f32>::new(own_rows);
    let mut sight = Array::<usize>::new(own_rows);
    #[unroll]
    for r in 0..own_rows {
        sums[r] = 0.0;
        most[r] = HIDDEN;
        sight[r] = 0;
        if block + mine + r < total {
            sight[r] = usize::min(end, before + (block + mine + r) / group + 1);
        }
    }
    let mut at = begin;
    while at < end {
        // What was here before has been read.
        sync_cube();
        load_keys::<S>(keys, cos, sin, &mut tile, first, at, end, unit, form);
        sync_cube();
        let scores = scored(&queries, &tile, mine, lane, form);
        #[unroll]
        for r in 0..own_rows {
            let mut top = most[r];
            #[unroll]
            for k in 0..own_keys {
                let hidden = at + k * ACROSS + lane >= sight[r];
                top = f32::max(top, select(hidden, HIDDEN, scores[r * own_keys + k]));
            }
            sums[r] *= f32::exp(most[r] - top);
            most[r] = top;
            #[unroll]
            for k in 0..own_keys {
                let hidden = at + k * ACROSS + lane >= sight[r];
                let weight = f32::exp(scores[r * own_keys + k] - top);
                sums[r] += select(hidden, 0.0f32, weight);
            }
        }
        at += size;
    }

    #[unroll]
    for r in 0..own_rows {
        lanes[(mine + r) * ACROSS + lane] = most[r];
    }
    sync_cube();
    #[unroll]
    for r in 0..own_rows {
        let mut top = HIDDEN.runtime();
        for other in 0..ACROSS {
            top = f32::max(top, lanes[(mine + r) * ACROSS + other]);
        }
        sums[r] *= f32::exp(most[r] - top);
        most[r] = top;
    }
    sync_cube();
    #[unroll]
    for r in 0..own_rows {
        lanes[(mine + r) * ACROSS + lane] = sums[r];
    }
    sync_cube();
    #[unroll]
    for r in 0..own_rows {
        let row = block + mine + r;
        if row < total && lane == 0 {
            let mut sum = 0.0f32;
            for other in 0..ACROSS {
                sum += lanes[(mine + r) * ACROSS + other];
            }
            let heads = CUBE_COUNT_Y as usize;
            let stat = ((CUBE_POS_Z as usize * heads + head) * total + row) * 2;
            stats[stat] = most[r];
            stats[stat + 1] = sum;
        }
    }
}

/// What a block's rows pay to a tile of keys from unit `at` on, or their scores: `weights`, `[rows, keys + 1]`, in
/// shared memory.
#[cube]
fn weigh(
    queries: &[f32],
    tile: &[f32],
    weights: &mut [f32],
    stats: &[f32],
    factors: &[f32],
    block: usize,
    at: usize,
    before: usize,
    total: usize,
    parts: usize,
    unit: usize,
    #[comptime] form: Form,
    #[comptime] gather: Gather,
) {
    let group = comptime!(form.group);
    let own_rows = comptime!(form.own_rows());
    let own_keys = comptime!(form.tile() / ACROSS);
    let lane = unit % ACROSS;
    let mine = unit / ACROSS * own_rows;
    let heads = CUBE_COUNT_Y as usize;
    let scores = scored(queries, tile, mine, lane, form);
    #[unroll]
    for r in 0..own_rows {
        let row = block + mine + r;
        let mut most = 0.0f32;
        let mut share = 0.0f32;
        let mut sight = 0usize;
        if row < total {
            sight = before + row / group + 1;
            if comptime!(gather != Gather::Logits) {
                most = HIDDEN.runtime();
                for part in 0..parts {
                    let stat = ((part * heads + CUBE_POS_Y as usize) * total + row) * 2;
                    most = f32::max(most, stats[stat]);
                }
                let mut sum = 0.0f32;
                for part in 0..parts {
                    let stat = ((part * heads + CUBE_POS_Y as usize) * total + row) * 2;
                    sum += stats[stat + 1] * f32::exp(stats[stat] - most);
                }
                share = 1.0 / sum;
                if comptime!(gather == Gather::Largest) {
                    share *= factors[row / group];
                }
            }
        }
        #[unroll]
        for k in 0..own_keys {
            let key = k * ACROSS + lane;
            let mut weight = scores[r * own_keys + k];
            if comptime!(gather != Gather::Logits) {
                weight = f32::exp(weight - most) * share;
            }
            let nothing = comptime!(gather.nothing());
            weights[(mine + r) * comptime!(form.tile() + 1) + key] =
                select(at + key >= sight, nothing, weight);
        }
    }
}

/// One more number, to what was gathered before.
#[cube]
fn gathered(all: f32, one: f32, #[comptime] gather: Gather) -> f32 {
    let mut sum = all + one;
    if comptime!(gather != Gather::Sum) {
        // NaN if either is.
        sum = select(all >= one || all.is_nan(), all, one);
    }
    sum
}

/// Gathers by unit: `out`, for one KV head behind the other `[heads, units]`, where `heads` are those that
/// [`Gather::heads`] says.
///
/// - `stats`: of [`tops`], in so many `parts`; not read for scores.
/// - `factors`: `[count]`, for the largest weights.
///
/// Cubes: tiles of units (on two axes, X and Z), KV heads.
#[cube(launch)]
pub(crate) fn by_unit<S: Float>(
    q: &Tensor<f32>,
    keys: &[S],
    bounds: &[u32],
    cos: &[f32],
    sin: &[f32],
    stats: &[f32],
    factors: &[f32],
    out: &mut [f32],
    scale: f32,
    tokens: u32,
    count: u32,
    parts: u32,
    #[comptime] form: Form,
    #[comptime] gather: Gather,
    #[define(S)] _dtype: ElemType,
) {
    let group = comptime!(form.group);
    let rows = comptime!(form.rows);
    let size = comptime!(form.tile());
    let units = comptime!(form.units());
    let per = comptime!(gather.heads(form.group));
    let pairs = comptime!(form.tile() * gather.heads(form.group));
    let own = comptime!((form.tile() * gather.heads(form.group)).div_ceil(form.units()));

    let mut queries = Shared::<[f32]>::new_slice(comptime!(form.rows * form.stride()));
    let mut tile = Shared::<[f32]>::new_slice(comptime!(form.tile() * form.stride()));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(form.rows * (form.tile() + 1)));

    let (tokens, count) = (tokens as usize, count as usize);
    let unit = UNIT_POS as usize;
    let head = CUBE_POS_Y as usize;
    let at = (CUBE_POS_Z * CUBE_COUNT_X + CUBE_POS_X) as usize * size;
    let total = count * group;
    let first = bounds[head * 2] as usize;
    let len = bounds[head * 2 + 1] as usize;
    if at >= len {
        terminate!();
    }
    let before = len - count;
    let mut to = 0usize;
    for other in 0..head {
        to += bounds[other * 2 + 1] as usize * per;
    }

    // A pair is a key and a head.
    let mut paid = Array::<f32>::new(own);
    #[unroll]
    for p in 0..own {
        paid[p] = comptime!(gather.nothing());
    }
    load_keys::<S>(keys, cos, sin, &mut tile, first, at, len, unit, form);
    // The first block of which a row sees the tile.
    let mut block = 0usize;
    if at > before {
        block = (at - before) * group / rows * rows;
    }
    while block < total {
        // What was here before has been read.
        sync_cube();
        load_queries(q, &mut queries, block, tokens, count, scale, unit, form);
        sync_cube();
        weigh(
            &queries,
            &tile,
            &mut weights,
            stats,
            factors,
            block,
            at,
            before,
            total,
            parts as usize,
            unit,
            form,
            gather,
        );
        sync_cube();
        #[unroll]
        for p in 0..own {
            let pair = unit + p * units;
            if pair < pairs {
                let (key, of) = (pair % size, pair / size);
                let mut sum = paid[p];
                // The block's first row of this head.
                let start = (of + per - block % per) % per;
                for row in range_stepped(start, rows, per) {
                    sum = gathered(sum, weights[row * (size + 1) + key], gather);
                }
                paid[p] = sum;
            }
        }
        block += rows;
    }
    #[unroll]
    for p in 0..own {
        let pair = unit + p * units;
        let (key, of) = (pair % size, pair / size);
        if pair < pairs && at + key < len {
            out[to + of * len + at + key] = paid[p];
        }
    }
}

/// Sums of weights by distance from a query to what it looks at: `out` from number `start` on, for one KV head behind
/// the other `[group, distances]`, as many distances as units.
///
/// A cube has a tile of distances. With every block of rows it meets the tiles of keys that are so far away.
#[cube(launch)]
pub(crate) fn by_distance<S: Float>(
    q: &Tensor<f32>,
    keys: &[S],
    bounds: &[u32],
    cos: &[f32],
    sin: &[f32],
    stats: &[f32],
    out: &mut [f32],
    scale: f32,
    tokens: u32,
    count: u32,
    parts: u32,
    start: u32,
    #[comptime] form: Form,
    #[define(S)] _dtype: ElemType,
) {
    let group = comptime!(form.group);
    let rows = comptime!(form.rows);
    let size = comptime!(form.tile());
    let units = comptime!(form.units());
    let pairs = comptime!(form.tile() * form.group);
    let own = comptime!((form.tile() * form.group).div_ceil(form.units()));

    let mut queries = Shared::<[f32]>::new_slice(comptime!(form.rows * form.stride()));
    let mut tile = Shared::<[f32]>::new_slice(comptime!(form.tile() * form.stride()));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(form.rows * (form.tile() + 1)));

    let (tokens, count) = (tokens as usize, count as usize);
    let unit = UNIT_POS as usize;
    let head = CUBE_POS_Y as usize;
    let away = (CUBE_POS_Z * CUBE_COUNT_X + CUBE_POS_X) as usize * size;
    let total = count * group;
    let first = bounds[head * 2] as usize;
    let len = bounds[head * 2 + 1] as usize;
    if away >= len {
        terminate!();
    }
    let before = len - count;
    let mut to = start as usize;
    for other in 0..head {
        to += bounds[other * 2 + 1] as usize * group;
    }

    let mut paid = Array::<f32>::new(own);
    #[unroll]
    for p in 0..own {
        paid[p] = 0.0;
    }
    let mut block = 0usize;
    while block < total {
        // Where the block's first and last query stand; the last one's key at the smallest distance ends it.
        let nearest = before + block / group;
        let last = before + (usize::min(block + rows, total) - 1) / group;
        let mut at = 0usize;
        if nearest + 1 > away + size {
            at = (nearest + 1 - away - size) / size * size;
        }
        while at + away <= last {
            sync_cube();
            load_queries(q, &mut queries, block, tokens, count, scale, unit, form);
            load_keys::<S>(keys, cos, sin, &mut tile, first, at, len, unit, form);
            sync_cube();
            weigh(
                &queries,
                &tile,
                &mut weights,
                stats,
                stats,
                block,
                at,
                before,
                total,
                parts as usize,
                unit,
                form,
                Gather::Sum,
            );
            sync_cube();
            #[unroll]
            for p in 0..own {
                let pair = unit + p * units;
                if pair < pairs {
                    let (distance, of) = (away + pair % size, pair / size);
                    let mut sum = paid[p];
                    let start = (of + group - block % group) % group;
                    for row in range_stepped(start, rows, group) {
                        let stands = before + (block + row) / group;
                        if stands >= distance + at && stands < distance + at + size {
                            sum += weights[row * (size + 1) + (stands - distance - at)];
                        }
                    }
                    paid[p] = sum;
                }
            }
            at += size;
        }
        block += rows;
    }
    #[unroll]
    for p in 0..own {
        let pair = unit + p * units;
        let (distance, of) = (away + pair % size, pair / size);
        if pair < pairs && distance < len {
            out[to + of * len + distance] = paid[p];
        }
    }
}
