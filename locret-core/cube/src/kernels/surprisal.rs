//! How likely numbers of rows are under their softmax.

use super::{largest::UNITS, reduced};
use cubecl::prelude::*;

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
    let most = reduced::max(&mut parts, unit, UNITS);
    let mut sum = 0.0f32;
    for at in range_stepped(unit, width, UNITS) {
        sum += f32::exp(rows[first + at] - most);
    }
    parts[unit] = sum;
    let sum = reduced::sum(&mut parts, unit, UNITS);
    if unit == 0 {
        out[row] = f32::ln(sum) + (most - rows[first + of[row] as usize]);
    }
}
