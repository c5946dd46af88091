//! Causal attention of chunks in tiles of 16-bit numbers, over units where they lie. Rows, bounds, rotation and parts
//! are those of [`attention`](super::attention); what differs is that queries, keys, values and weights are bf16 in
//! one part or two ([`tiles`](super::tiles)) as they are multiplied. Scores, sums and outputs have 32 bits.
//!
//! A plane has one tile of 16 rows or two, and a unit two rows of each, which it shares with three others: its part of
//! their scores and outputs lies in registers. Weights go through shared memory, from where they are multiplied as
//! queries are.

mod form;

pub(crate) use form::Form;

use super::{
    attention::HIDDEN,
    online::{begin_of, end_of},
    tiles::{self, EIGHT, Eight, PLANE, ROWS},
};
use cubecl::prelude::*;

/// The largest score of nothing: what is hidden weighs nothing beside it.
const NOTHING: f32 = HIDDEN / 10.0;

/// Attends: arguments and cubes are those of [`attention::attend`](super::attention::attend). Features, rotated pairs
/// and the strides of `q` are multiples of the length of the vectors they are read in.
#[cube(launch)]
pub(crate) fn attend<S: Float, N: Size, M: Size>(
    q: &Tensor<Vector<f32, M>>,
    keys: &[Vector<S, N>],
    values: &[Vector<S, N>],
    bounds: &[u32],
    cos: &[Vector<f32, N>],
    sin: &[Vector<f32, N>],
    out: &mut [f32],
    stats: &mut [f32],
    scale: f32,
    tokens: u32,
    #[comptime] form: Form,
    #[define(S)] _dtype: ElemType,
) {
    let dim = comptime!(form.dim);
    let group = comptime!(form.group);
    let rows = comptime!(form.rows());
    let size = comptime!(form.keys);
    let units = comptime!(form.units());
    let own_rows = comptime!(form.own_rows());
    // Eights of a row, and of a row of weights.
    let wide = comptime!(form.padded() / EIGHT);
    let across = comptime!(form.keys / EIGHT);

    let mut queries = Shared::<[Eight]>::new_aligned_slice(form.queries().eights(), 16usize);
    let mut tile_keys = Shared::<[Eight]>::new_aligned_slice(form.tile().eights(), 16usize);
    let mut tile_values = Shared::<[Eight]>::new_aligned_slice(form.tile().eights(), 16usize);
    let mut weights = Shared::<[Vector<u32, Const<1>>]>::new_aligned_slice(
        comptime!(4 * form.weights().eights()),
        16usize,
    );
    let mut exchange = Shared::<[f32]>::new_slice(form.exchanged());

    let tokens = tokens as usize;
    let unit = UNIT_POS as usize;
    let lane = unit % PLANE;
    // The first row of the plane, and that of the unit.
    let down = unit / PLANE * comptime!(form.down * ROWS);
    let mine = down + lane / 4;
    // Which of the four units that share it.
    let quarter = lane % 4;
    let head = CUBE_POS_Y as usize;
    let heads = CUBE_COUNT_Y as usize * group;
    let block = CUBE_POS_X as usize * rows;
    let total = tokens * group;
    let first = bounds[head * 2] as usize;
    let len = bounds[head * 2 + 1] as usize;
    let old = len - tokens;

    for i in range_stepped(unit, rows * wide, units) {
        let (row, at) = (block + i / wide, i % wide);
        let mut width = dim.runtime();
        if row >= total {
            width = 0usize;
        }
        let from = row / group * q.stride(0) + (head * group + row % group) * dim;
        let mut x = tiles::eight(q.as_slice(), from, at, width);
        #[unroll]
        for k in 0..8usize {
            x[k] *= scale;
        }
        let to = i / wide * comptime!(form.queries().pitch) + at;
        tiles::put(&x, &mut queries, to, comptime!(form.queries()));
    }

    let end = end_of(
        block,
        total,
        old,
        len,
        form.rows(),
        form.group,
        size,
        form.split,
    );
    let mut sums = Array::<f32>::new(own_rows);
    let mut most = Array::<f32>::new(own_rows);
    let mut sight = Array::<usize>::new(own_rows);
    let mut made = tiles::nothing(comptime!(form.down * form.padded() / EIGHT));
    #[unroll]
    for r in 0..own_rows {
        sums[r] = 0.0;
        most[r] = NOTHING;
        // Units from this one on are hidden from the row; all of them, where there is no such row.
        sight[r] = 0;
        if block + mine + r * 8 < total {
            sight[r] = usize::min(end, old + (block + mine + r * 8) / group + 1);
        }
    }

    let mut at = begin_of(len, size, form.split);
    while at < end {
        // What was here before has been read.
        sync_cube();
        #[unroll]
        for i in 0..comptime!((form.keys * form.padded() / EIGHT).div_ceil(form.units())) {
            let piece = i * units + unit;
            let (key, eight) = (piece / wide, piece % wide);
            if key < size {
                let mut width = dim.runtime();
                if at + key >= end {
                    width = 0usize;
                }
                let from = (first + at + key) * dim;
                let mut own = tiles::eight(keys, from, eight, width);
                if comptime!(form.half > 0) {
                    rotate::<S, N>(&mut own, keys, cos, sin, from, at + key, eight, width, form);
                }
                let to = key * comptime!(form.tile().pitch) + eight;
                tiles::put(&own, &mut tile_keys, to, comptime!(form.tile()));
                let own = tiles::eight(values, from, eight, width);
                tiles::put(&own, &mut tile_values, to, comptime!(form.tile()));
            }
        }
        sync_cube();

        let mut scores = tiles::nothing(comptime!(form.down * form.keys / EIGHT));
        tiles::multiply::<Const<4>>(
            &queries,
            &tile_keys,
            &mut scores,
            down,
            0usize,
            lane,
            comptime!(form.scoring()),
        );
        let mut top = Array::<f32>::new(own_rows);
        #[unroll]
        for r in 0..own_rows {
            top[r] = most[r];
            #[unroll]
            for j in 0..across {
                let tile = &mut scores[comptime!(r / 2 * across + j)];
                let mut both = tile[comptime!(r % 2)];
                #[unroll]
                for e in 0..2usize {
                    let key = at + j * EIGHT + quarter * 2 + e;
                    let score = select(key >= sight[r], HIDDEN, both.extract(e));
                    both.insert(e, score);
                    top[r] = f32::max(top[r], score);
                }
                tile[comptime!(r % 2)] = both;
            }
        }
        of_row(&mut top, &mut exchange, unit, true, form);
        #[unroll]
        for r in 0..own_rows {
            let shrink = f32::exp(most[r] - top[r]);
            most[r] = top[r];
            sums[r] *= shrink;
            #[unroll]
            for j in 0..across {
                let tile = &scores[comptime!(r / 2 * across + j)];
                let both = tile[comptime!(r % 2)];
                let mut even = f32::exp(both.extract(0usize) - top[r]);
                let mut odd = f32::exp(both.extract(1usize) - top[r]);
                sums[r] += even + odd;
                #[unroll]
                for part in 0..form.parts {
                    let word = tiles::pair(even, odd, comptime!(form.weights()));
                    let to = comptime!(part * form.weights().apart())
                        + (mine + r * 8) * comptime!(form.weights().pitch)
                        + j;
                    weights[to * 4 + quarter] = Vector::new(word);
                    if comptime!(part + 1 < form.parts) {
                        even -= tiles::number(word, 0usize);
                        odd -= tiles::number(word, 1usize);
                    }
                }
            }
            // Most turns have no larger score.
            if shrink < 1.0 {
                #[unroll]
                for t in 0..wide {
                    let tile = &mut made[comptime!(r / 2 * wide + t)];
                    let both = tile[comptime!(r % 2)] * Vector::new(shrink);
                    tile[comptime!(r % 2)] = both;
                }
            }
        }
        // Weights of a plane's rows are read by the plane alone.
        if comptime!(form.matrix_units) {
            sync_plane();
        } else {
            sync_cube();
        }
        tiles::multiply::<Const<1>>(
            &weights,
            &tile_values,
            &mut made,
            down,
            0usize,
            lane,
            comptime!(form.mixing()),
        );
        at += size;
    }

    of_row(&mut sums, &mut exchange, unit, false, form);
    #[unroll]
    for r in 0..own_rows {
        let row = block + mine + r * 8;
        if row < total {
            let mut query = row / group * heads + head * group + row % group;
            let mut by = 1.0f32;
            if comptime!(form.split) {
                query += CUBE_POS_Z as usize * tokens * heads;
                if quarter == 0 {
                    stats[query * 2] = most[r];
                    stats[query * 2 + 1] = sums[r];
                }
            } else {
                by = 1.0 / sums[r];
            }
            #[unroll]
            for t in 0..wide {
                let tile = &made[comptime!(r / 2 * wide + t)];
                let both = tile[comptime!(r % 2)];
                #[unroll]
                for e in 0..2usize {
                    let feature = t * EIGHT + quarter * 2 + e;
                    if feature < dim {
                        out[query * dim + feature] = both.extract(e) * by;
                    }
                }
            }
        }
    }
}

/// Of the four units that share rows, the largest number or the sum, for each row.
#[cube]
fn of_row(
    own: &mut Array<f32>,
    exchange: &mut [f32],
    unit: usize,
    #[comptime] largest: bool,
    #[comptime] form: Form,
) {
    let own_rows = comptime!(form.own_rows());
    if comptime!(form.matrix_units) {
        #[unroll]
        for r in 0..own_rows {
            #[unroll]
            for step in 0..2u32 {
                let other = plane_shuffle_xor(own[r], step + 1);
                own[r] = either(own[r], other, largest);
            }
        }
    } else {
        let units = comptime!(form.units());
        // What was here before has been read.
        sync_cube();
        #[unroll]
        for r in 0..own_rows {
            exchange[r * units + unit] = own[r];
        }
        sync_cube();
        #[unroll]
        for r in 0..own_rows {
            let mut found = exchange[r * units + unit / 4 * 4];
            #[unroll]
            for k in 1..4usize {
                found = either(found, exchange[r * units + unit / 4 * 4 + k], largest);
            }
            own[r] = found;
        }
    }
}

#[cube]
fn either(a: f32, b: f32, #[comptime] largest: bool) -> f32 {
    if comptime!(largest) {
        f32::max(a, b)
    } else {
        a + b
    }
}

/// Rotates eight features of the key that begins at number `from`, by row `unit` of the table.
#[cube]
fn rotate<S: Float, N: Size>(
    own: &mut Array<f32>,
    keys: &[Vector<S, N>],
    cos: &[Vector<f32, N>],
    sin: &[Vector<f32, N>],
    from: usize,
    unit: usize,
    eight: usize,
    width: usize,
    #[comptime] form: Form,
) {
    let long = N::value().comptime();
    let half = comptime!(form.half);
    #[unroll]
    for i in 0..comptime!(EIGHT / long) {
        let feature = eight * EIGHT + i * long;
        if feature < width && feature < 2 * half {
            // The other one of a pair lies half of what is rotated further on, or back.
            let early = feature < half;
            let other = select(early, feature + half, feature - half);
            let angle = select(early, feature, feature - half);
            let other = Vector::<f32, N>::cast_from(keys[(from + other) / long]);
            let cos = cos[(unit * half + angle) / long];
            let sin = sin[(unit * half + angle) / long];
            #[unroll]
            for k in 0..long {
                let turned = other.extract(k) * sin.extract(k);
                let along = own[i * long + k] * cos.extract(k);
                own[i * long + k] = select(early, along - turned, along + turned);
            }
        }
    }
}
