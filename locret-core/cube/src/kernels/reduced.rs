//! Numbers that the units of a cube have, put together.

use cubecl::prelude::*;

/// The sum of `parts`, one for each of a cube's `units`, a power of two; every unit gets it. `parts` may be written
/// again at once.
#[cube]
pub(crate) fn sum(parts: &mut [f32], unit: usize, #[comptime] units: usize) -> f32 {
    reduced(parts, unit, units, false)
}

/// The largest of them; a NaN is left out where there are other numbers.
#[cube]
pub(crate) fn max(parts: &mut [f32], unit: usize, #[comptime] units: usize) -> f32 {
    reduced(parts, unit, units, true)
}

#[cube]
fn reduced(parts: &mut [f32], unit: usize, #[comptime] units: usize, #[comptime] max: bool) -> f32 {
    #[unroll]
    for step in 0..comptime!(units.ilog2() as usize) {
        let left = comptime!(units >> (step + 1));
        sync_cube();
        if unit < left {
            let other = parts[unit + left];
            if comptime!(max) {
                parts[unit] = f32::max(parts[unit], other);
            } else {
                parts[unit] += other;
            }
        }
    }
    sync_cube();
    let all = parts[0];
    // Others may still read it.
    sync_cube();
    all
}
