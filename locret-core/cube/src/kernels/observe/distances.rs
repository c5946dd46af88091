//! What is paid to units so far away.

use super::{Gather, weigh};
use crate::kernels::{
    attention::{Form, load_keys},
    online::load_queries,
};
use cubecl::prelude::*;

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
