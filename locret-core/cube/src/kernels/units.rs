//! Units of a layer, moved about: `[rows, dim]` of keys and as many of values, of which KV head `h` has the
//! `bounds[2 h + 1]` from row `bounds[2 h]` on. One launch for all heads, for keys and values.

use cubecl::prelude::*;

/// Puts new units `[tokens, heads * dim]` behind the others; `bounds` counts them already.
#[cube(launch)]
pub(crate) fn append<S: Float>(
    new_keys: &Tensor<f32>,
    new_values: &Tensor<f32>,
    bounds: &[u32],
    keys: &mut [S],
    values: &mut [S],
    #[comptime] dim: usize,
    #[define(S)] _dtype: ElemType,
) {
    let (tokens, width) = (new_keys.shape(0), new_keys.shape(1));
    let (token, at) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
    if token >= tokens {
        terminate!();
    }
    let (head, feature) = (at / dim, at % dim);
    let end = (bounds[head * 2] + bounds[head * 2 + 1]) as usize;
    let to = (end - tokens + token) * dim + feature;
    keys[to] = S::cast_from(new_keys[token * new_keys.stride(0) + at]);
    values[to] = S::cast_from(new_values[token * new_values.stride(0) + at]);
}

/// Copies units into other memory: those of each head whose numbers are in `from`, one head's behind the other's, or, where
/// nothing is `picked`, its first ones. Cubes: rows and features of a head, heads.
#[cube(launch)]
pub(crate) fn copy<S: Float>(
    keys: &[S],
    values: &[S],
    bounds: &[u32],
    from: &[u32],
    to: &[u32],
    new_keys: &mut [S],
    new_values: &mut [S],
    #[comptime] dim: usize,
    #[comptime] picked: bool,
    #[define(S)] _dtype: ElemType,
) {
    let head = CUBE_POS_Y as usize;
    let at = CUBE_POS_X as usize * CUBE_DIM as usize + UNIT_POS as usize;
    let (unit, feature) = (at / dim, at % dim);
    let mut units = to[head * 2 + 1] as usize;
    if comptime!(!picked) {
        units = usize::min(units, bounds[head * 2 + 1] as usize);
    }
    if unit < units {
        let row = to[head * 2] as usize + unit;
        let mut source = bounds[head * 2] as usize + unit;
        if comptime!(picked) {
            let mut list = unit;
            for other in 0..head {
                list += to[other * 2 + 1] as usize;
            }
            source = (bounds[head * 2] + from[list]) as usize;
        }
        new_keys[row * dim + feature] = keys[source * dim + feature];
        new_values[row * dim + feature] = values[source * dim + feature];
    }
}

/// Rows from `first` on, as 32-bit numbers.
#[cube(launch)]
pub(crate) fn read<S: Float>(
    rows: &[S],
    out: &mut [f32],
    first: u32,
    #[comptime] dim: usize,
    #[define(S)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < out.len() {
        out[ABSOLUTE_POS] = f32::cast_from(rows[first as usize * dim + ABSOLUTE_POS]);
    }
}

/// Puts `[rows, dim]` numbers where others are, from row `first` on.
#[cube(launch)]
pub(crate) fn write<S: Float>(
    new: &Tensor<f32>,
    rows: &mut [S],
    first: u32,
    #[comptime] dim: usize,
    #[define(S)] _dtype: ElemType,
) {
    let (row, feature) = (ABSOLUTE_POS / dim, ABSOLUTE_POS % dim);
    if row < new.shape(0) {
        rows[(first as usize + row) * dim + feature] =
            S::cast_from(new[row * new.stride(0) + feature]);
    }
}
