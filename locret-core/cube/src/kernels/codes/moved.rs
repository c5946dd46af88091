//! Units that are put behind others, moved, and read.

use super::{Codes, NONE, SPAN, TURNING, number, number_of_head, run_of, turn};
use cubecl::prelude::*;

/// Keys or values of heads from `first` on as numbers, but turned as they were coded: `out`, `[units, dim]`, one head's
/// behind the other's. Cubes: features of a head (on two axes, X and Z), heads.
#[cube(launch)]
pub(crate) fn read(
    plain: &[u32],
    coded: &[u32],
    shared: &[u32],
    ends: &[u32],
    spans: &[u32],
    out: &mut [f32],
    first: u32,
    #[comptime] values: bool,
    #[comptime] codes: Codes,
) {
    let dim = comptime!(codes.dim);
    let at = number_of_head();
    let (unit, feature) = (at / dim, at % dim);
    let head = first as usize + CUBE_POS_Y as usize;
    let span = head * SPAN;
    let mut to = 0usize;
    for other in first as usize..head {
        to += spans[other * SPAN + 6] as usize;
    }
    if unit < spans[span + 6] as usize {
        let mut run = 0usize;
        if comptime!(codes.runs(values)) {
            let before = spans[span + 1] as usize;
            if unit >= before {
                let runs = spans[span + 5] as usize;
                run = run_of(ends, spans[span + 4] as usize, runs, unit - before);
            }
        }
        out[(to + unit) * dim + feature] = number(
            plain, coded, shared, spans, span, unit, run, feature, values, codes,
        );
    }
}

/// Turns rows of numbers where they lie: the coded units of heads from `first` on in what [`read`] made. Cubes: units
/// (on two axes, X and Z), heads.
#[cube(launch)]
pub(crate) fn turn_read(spans: &[u32], out: &mut [f32], first: u32, #[comptime] codes: Codes) {
    let dim = comptime!(codes.dim);
    let unit = (CUBE_POS_Z * CUBE_COUNT_X + CUBE_POS_X) as usize;
    let head = first as usize + CUBE_POS_Y as usize;
    let span = head * SPAN;
    let mut to = unit;
    for other in first as usize..head {
        to += spans[other * SPAN + 6] as usize;
    }
    let before = spans[span + 1] as usize;
    if unit < before || unit >= before + spans[span + 3] as usize {
        terminate!();
    }
    let mut row = Shared::<[f32]>::new_slice(comptime!(codes.dim));
    for feature in range_stepped(UNIT_POS as usize, dim, TURNING) {
        row[feature] = out[to * dim + feature];
    }
    turn(
        &mut row,
        comptime!(codes.dim),
        comptime!(codes.block),
        TURNING,
    );
    let by = comptime!(1.0 / (codes.block as f32).sqrt());
    for feature in range_stepped(UNIT_POS as usize, dim, TURNING) {
        out[to * dim + feature] = row[feature] * by;
    }
}

/// Puts new units `[tokens, heads * dim]` behind a head's others. Of a head, `rows` has the row for the first of them.
#[cube(launch)]
pub(crate) fn append(
    new_keys: &Tensor<f32>,
    new_values: &Tensor<f32>,
    rows: &[u32],
    plain: &mut [u32],
    #[comptime] dim: usize,
) {
    let (tokens, width) = (new_keys.shape(0), new_keys.shape(1));
    let (token, at) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
    if token >= tokens {
        terminate!();
    }
    let (head, feature) = (at / dim, at % dim);
    let to = (rows[head] as usize + token) * 2 * dim + feature;
    plain[to] = u32::reinterpret(new_keys[token * new_keys.stride(0) + at]);
    plain[to + dim] = u32::reinterpret(new_values[token * new_values.stride(0) + at]);
}

/// Row `i` of `out` becomes row `picks[i]` of `rows`, if it is not [`NONE`]; of `[rows, width]` words.
#[cube(launch)]
pub(crate) fn pick(rows: &[u32], picks: &[u32], out: &mut [u32], #[comptime] width: usize) {
    let (row, at) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
    if row < picks.len() && picks[row] != NONE {
        out[ABSOLUTE_POS] = rows[picks[row] as usize * width + at];
    }
}
