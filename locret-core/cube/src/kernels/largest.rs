//! The largest numbers of rows.

use cubecl::prelude::*;

/// Units of a cube that has a row.
pub(crate) const UNITS: usize = 256;

/// Whether a number goes before the largest so far: it is larger, as large and earlier, or the first that is none.
#[cube]
fn before(x: f32, at: u32, top: f32, place: u32) -> bool {
    let more = x > top || (x == top && at < place);
    (more || x.is_nan()) && !top.is_nan()
}

/// For each row the number of its largest, of equals the first, and the largest itself: `out`, `[rows, 2]`. A NaN is
/// larger than all numbers.
#[cube(launch)]
pub(crate) fn largest(rows: &Tensor<f32>, out: &mut [f32]) {
    let width = rows.shape(1);
    let (row, unit) = (CUBE_POS, UNIT_POS as usize);
    if row >= rows.shape(0) {
        terminate!();
    }
    let first = row * rows.stride(0);
    let mut tops = Shared::<[f32]>::new_slice(UNITS);
    let mut places = Shared::<[u32]>::new_slice(UNITS);
    let mut place = usize::min(unit, width - 1) as u32;
    let mut top = rows[first + place as usize];
    for at in range_stepped(unit, width, UNITS) {
        let x = rows[first + at];
        if before(x, at as u32, top, place) {
            top = x;
            place = at as u32;
        }
    }
    tops[unit] = top;
    places[unit] = place;
    #[unroll]
    for step in 0..comptime!(UNITS.ilog2() as usize) {
        let left = comptime!(UNITS >> (step + 1));
        sync_cube();
        if unit < left {
            let (x, at) = (tops[unit + left], places[unit + left]);
            if before(x, at, tops[unit], places[unit]) {
                tops[unit] = x;
                places[unit] = at;
            }
        }
    }
    if unit == 0 {
        out[row * 2] = f32::cast_from(places[0]);
        out[row * 2 + 1] = tops[0];
    }
}
