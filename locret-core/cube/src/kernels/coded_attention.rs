//! Attention over units that are codes: [`attend`](super::attention::attend), but that a tile of keys or values is
//! decoded as it is loaded, turned back where it was turned, and then, if it is of keys, rotated.

use super::{
    attention::{ACROSS, Form, HIDDEN, SHARED},
    codes::{Codes, SPAN, number, run_of},
    online::{begin_of, end_of, load_queries, mix, scored, show, sights, write},
};
use cubecl::prelude::*;

/// Whether a tile's runs have room in shared memory, beside the rest.
pub(crate) fn fits(form: Form) -> bool {
    form.shared() + size_of::<u32>() * form.tile() <= SHARED
}

/// Attends to units in the form that [`codes`](super::codes) describes; `ends` has, for each run, the coded units of
/// its head that end with it. The rest is as `attend` has it, cubes too.
#[cube(launch)]
pub(crate) fn attend_coded(
    q: &Tensor<f32>,
    plain: &[u32],
    coded: &[u32],
    shared: &[u32],
    ends: &[u32],
    spans: &[u32],
    cos: &[f32],
    sin: &[f32],
    out: &mut [f32],
    stats: &mut [f32],
    scale: f32,
    tokens: u32,
    #[comptime] form: Form,
    #[comptime] codes: Codes,
) {
    let group = comptime!(form.group);
    let size = comptime!(form.tile());
    let own_rows = comptime!(form.own_rows());

    let mut queries = Shared::<[f32]>::new_slice(comptime!(form.rows * form.stride()));
    let mut tile = Shared::<[f32]>::new_slice(comptime!(form.tile() * form.stride()));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(form.rows * (form.tile() + 1)));
    let mut runs = Shared::<[u32]>::new_slice(comptime!(form.tile()));

    let tokens = tokens as usize;
    let unit = UNIT_POS as usize;
    let lane = unit % ACROSS;
    let mine = unit / ACROSS * own_rows;
    let head = CUBE_POS_Y as usize;
    let block = CUBE_POS_X as usize * comptime!(form.rows);
    let total = tokens * group;
    let len = spans[head * SPAN + 6] as usize;
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
        load(
            plain, coded, shared, ends, spans, &mut tile, &mut runs, at, end, unit, false, form,
            codes,
        );
        if comptime!(form.half > 0) {
            sync_cube();
            rotate(cos, sin, &mut tile, at, end, unit, form);
        }
        sync_cube();
        let scores = scored(&queries, &tile, mine, lane, form);
        show(&scores, &sight, &mut weights, at, mine, lane, form);
        sync_cube();
        // All keys have been read: their values come into the same place.
        load(
            plain, coded, shared, ends, spans, &mut tile, &mut runs, at, end, unit, true, form,
            codes,
        );
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

/// A tile of keys or values from unit `at` on, as they were appended; zeros from `end` on.
#[cube]
fn load(
    plain: &[u32],
    coded: &[u32],
    shared: &[u32],
    ends: &[u32],
    spans: &[u32],
    tile: &mut [f32],
    runs: &mut [u32],
    at: usize,
    end: usize,
    unit: usize,
    #[comptime] values: bool,
    #[comptime] form: Form,
    #[comptime] codes: Codes,
) {
    let size = comptime!(form.tile());
    let padded = comptime!(form.padded());
    let stride = comptime!(form.stride());
    let units = comptime!(form.units());
    let span = CUBE_POS_Y as usize * SPAN;
    let before = spans[span + 1] as usize;
    let behind = before + spans[span + 3] as usize;
    if comptime!(codes.runs(values)) {
        let (first, many) = (spans[span + 4] as usize, spans[span + 5] as usize);
        for key in range_stepped(unit, size, units) {
            if at + key >= before && at + key < behind {
                runs[key] = run_of(ends, first, many, at + key - before) as u32;
            }
        }
        sync_cube();
    }
    for i in range_stepped(unit, comptime!(form.tile() * form.padded()), units) {
        let (key, feature) = (i / padded, i % padded);
        let mut x = 0.0f32;
        if at + key < end && feature < comptime!(form.dim) {
            let mut run = 0usize;
            if comptime!(codes.runs(values)) {
                run = runs[key] as usize;
            }
            x = number(
                plain,
                coded,
                shared,
                spans,
                span,
                at + key,
                run,
                feature,
                values,
                codes,
            );
        }
        tile[key * stride + feature] = x;
    }
    if comptime!(codes.block > 1) {
        // The whole cube, or nobody.
        if at < behind && at + size > before {
            turn_back(tile, at, before, behind, unit, form, codes);
        }
    }
}

/// Turns the coded rows of a tile, which are those of units from `before` on and below `behind`.
#[cube]
fn turn_back(
    tile: &mut [f32],
    at: usize,
    before: usize,
    behind: usize,
    unit: usize,
    #[comptime] form: Form,
    #[comptime] codes: Codes,
) {
    let stride = comptime!(form.stride());
    let pairs = comptime!(form.dim / 2);
    #[unroll]
    for stage in 0..comptime!(codes.block.ilog2() as usize) {
        let apart = comptime!(1usize << stage);
        let by = comptime!(if 2 << stage == codes.block {
            1.0 / (codes.block as f32).sqrt()
        } else {
            1.0
        });
        sync_cube();
        for i in range_stepped(
            unit,
            comptime!(form.tile() * form.dim / 2),
            comptime!(form.units()),
        ) {
            let (key, pair) = (i / pairs, i % pairs);
            if at + key >= before && at + key < behind {
                let first = key * stride + pair / apart * (2 * apart) + pair % apart;
                let (a, b) = (tile[first], tile[first + apart]);
                tile[first] = (a + b) * by;
                tile[first + apart] = (a - b) * by;
            }
        }
    }
}

/// Rotates a tile of keys by their own rows of the table.
#[cube]
fn rotate(
    cos: &[f32],
    sin: &[f32],
    tile: &mut [f32],
    at: usize,
    end: usize,
    unit: usize,
    #[comptime] form: Form,
) {
    let half = comptime!(form.half);
    for i in range_stepped(
        unit,
        comptime!(form.tile() * form.half),
        comptime!(form.units()),
    ) {
        let (key, pair) = (i / half, i % half);
        if at + key < end {
            let first = key * comptime!(form.stride()) + pair;
            let (a, b) = (tile[first], tile[first + half]);
            let c = cos[(at + key) * half + pair];
            let s = sin[(at + key) * half + pair];
            tile[first] = a * c - b * s;
            tile[first + half] = b * c + a * s;
        }
    }
}
