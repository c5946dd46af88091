//! What follows the first product of a retaining head.

use super::reduced;
use cubecl::prelude::*;

/// Units of a cube that has a token.
pub(crate) const UNITS: usize = 128;

/// `silu(inner) · weightsᵀ`, `[tokens, inner]` to `[tokens, outputs]`; `weights` are `[outputs, inner]`. A cube has a token.
#[cube(launch)]
pub(crate) fn second(inner: &Tensor<f32>, weights: &[f32], out: &mut [f32], outputs: u32) {
    let (token, unit) = (CUBE_POS, UNIT_POS as usize);
    if token >= inner.shape(0) {
        terminate!();
    }
    let (width, first) = (inner.shape(1), token * inner.stride(0));
    let mut parts = Shared::<[f32]>::new_slice(UNITS);
    for output in 0..outputs as usize {
        let mut sum = 0.0f32;
        for i in range_stepped(unit, width, UNITS) {
            let x = inner[first + i];
            sum += x / (1.0 + f32::exp(-x)) * weights[output * width + i];
        }
        parts[unit] = sum;
        let all = reduced::sum(&mut parts, unit, UNITS);
        if unit == 0 {
            out[token * outputs as usize + output] = all;
        }
    }
}
