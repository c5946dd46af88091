//! How likely numbers of rows are under their softmax.

use super::largest::UNITS;
use cubecl::prelude::*;

/// What the units of a cube have, put together: the largest number, or the sum.
#[cube]
fn together(parts: &mut [f32], unit: usize, #[comptime] largest: bool) -> f32 {
    #[unroll]
    for step in 0..comptime!(UNITS.ilog2() as usize) {
        let left = comptime!(UNITS >> (step + 1));
        sync_cube();
        if unit < left {
            if comptime!(largest) {
                parts[unit] = f32::max(parts[unit], parts[unit + left]);
            } else {
                parts[unit] += parts[unit + left];
            }
        }
    }
    sync_cube();
    let all = parts[0];
    // Others may still read it.
    sync_cube();
    all
}

/// For each row `-ln` of the softmax weight of its number `of[row]`: `out`, `[rows]`. NaN of a row with a NaN.
#[cube(launch)]
pub(crate) fn surprisal(rows: &Tensor<f32>, of: &[u32], out: &mut [f32]) {
    let width = rows.shape(1);
    let (row, unit) = (CUBE_POS, UNIT_POS as usize);
    if row >= rows.shape(0) {
        terminate!();
    }
    let first = row * rows.stride(0);
    let mut parts = Shared::<[f32]>::new_slice(UNITS);
    let mut top = rows[first + usize::min(unit, width - 1)];
    for at in range_stepped(unit, width, UNITS) {
        top = f32::max(top, rows[first + at]);
    }
    parts[unit] = top;
    let most = together(&mut parts, unit, true);
    let mut sum = 0.0f32;
    for at in range_stepped(unit, width, UNITS) {
        sum += f32::exp(rows[first + at] - most);
    }
    parts[unit] = sum;
    let sum = together(&mut parts, unit, false);
    if unit == 0 {
        out[row] = f32::ln(sum) + (most - rows[first + of[row] as usize]);
    }
}
