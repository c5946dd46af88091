//! What each query's softmax divides by.

use crate::kernels::{
    attention::{ACROSS, Form, HIDDEN, load_keys},
    online::{begin_of, end_of, load_queries, scored, sights},
};
use cubecl::prelude::*;

/// For each row the largest score and the sum of weights beside it: `stats`, `[parts, kv_heads, count * group, 2]`.
///
/// `q`, `keys`, `bounds`, `cos` and `sin` are those of [`attend`](crate::kernels::attention::attend). Cubes: blocks of rows, KV
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
    let end = end_of(
        block, total, before, len, form.rows, form.group, size, form.split,
    );

    // A unit's own: of its keys of each tile.
    let mut sums = Array::<f32>::new(own_rows);
    let mut most = Array::<f32>::new(own_rows);
    let sight = sights(block + mine, total, before, end, form);
    #[unroll]
    for r in 0..own_rows {
        sums[r] = 0.0;
        most[r] = HIDDEN;
    }
    let mut at = begin_of(len, size, form.split);
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
