//! What units are paid.

use super::{Gather, gathered, weigh};
use crate::kernels::{
    attention::{Form, load_keys},
    online::load_queries,
};
use cubecl::prelude::*;

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
