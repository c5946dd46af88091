//! Products with weights as a file has them: `y = x · Wᵀ` in 32 bits, with sums in 32 bits. A weight is widened in
//! registers, or in a tile of shared memory, and nowhere else.
//!
//! Weights are words of 32 bits: eights of consecutive columns, of floats or of codes, and the scales of blocks of
//! codes apart from them where their blocks are not whole words. All of it is decoded by shifts and masks, so that
//! no type but `u32` and `f32` is asked of the device.

use cubecl::prelude::*;

/// Columns that are decoded at once.
pub(crate) const EIGHT: usize = 8;

/// How numbers lie in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q4K,
    Q5K,
    Q6K,
}

/// A number of 16 bits, IEEE half precision.
#[cube]
pub(crate) fn half(bits: u32) -> f32 {
    let size = bits & 0x7fff;
    // Below the smallest normal one they are multiples of 2⁻²⁴.
    let small = f32::cast_from(size) * 5.960_464_5e-8f32;
    // Exponents are 112 apart; infinite and undefined ones stay so.
    let more = select(size >= 0x7c00u32, 0x7000_0000u32, 0x3800_0000u32);
    let normal = f32::reinterpret((size << 13u32) + more);
    let size = select(size < 0x400u32, small, normal);
    select((bits & 0x8000u32) == 0x8000u32, -size, size)
}

/// Byte `at` of the words from `first` on.
#[cube]
fn byte(words: &[u32], first: usize, at: usize) -> u32 {
    words[first + at / 4] >> (8 * (at % 4) as u32) & 255u32
}

/// The scale of a block whose scales are halves, two to a word.
#[cube]
fn scale(scales: &[u32], block: usize) -> f32 {
    half(scales[block / 2] >> (16 * (block % 2) as u32) & 0xffffu32)
}

/// Scale and minimum of group `j` of 8 of a super-block, whose twelve bytes begin at word `first`.
#[cube]
fn group_scale(words: &[u32], first: usize, j: usize) -> (u32, u32) {
    // The first four have six bits in one place, the others four and two.
    let early = j < 4;
    let low = byte(words, first, j + 4);
    let own = byte(words, first, j);
    let before = byte(words, first, select(early, 0usize, j - 4));
    let scale = select(
        early,
        own & 63u32,
        (low & 15u32) | ((before >> 6u32) << 4u32),
    );
    let min = select(early, low & 63u32, (low >> 4u32) | ((own >> 6u32) << 4u32));
    (scale, min)
}

/// Code `i` of eight of four bits, in blocks of 32 of which the second half are the upper halves of the bytes.
#[cube]
fn nibble(words: &[u32], at: usize, #[comptime] i: usize) -> f32 {
    let word = words[at / 4 * 4 + at % 2 * 2 + comptime!(i / 4)];
    let shift = (at % 4 / 2 * 4) as u32 + comptime!((8 * (i % 4)) as u32);
    f32::cast_from(word >> shift & 15u32)
}

/// The numbers of columns `8 at..8 at + 8` of a matrix, counted through all of its rows.
#[cube]
pub(crate) fn decode(
    words: &[u32],
    scales: &[u32],
    at: usize,
    #[comptime] kind: Kind,
) -> Array<f32> {
    let mut out = Array::<f32>::new(EIGHT);
    match comptime!(kind) {
        Kind::F32 =>
        {
            #[unroll]
            for i in 0..8usize {
                out[i] = f32::reinterpret(words[at * 8 + i]);
            }
        }
        Kind::F16 =>
        {
            #[unroll]
            for i in 0..4usize {
                let two = words[at * 4 + i];
                out[2 * i] = half(two & 0xffffu32);
                out[2 * i + 1] = half(two >> 16u32);
            }
        }
        Kind::BF16 =>
        {
            #[unroll]
            for i in 0..4usize {
                let two = words[at * 4 + i];
                out[2 * i] = f32::reinterpret(two << 16u32);
                out[2 * i + 1] = f32::reinterpret(two & 0xffff_0000u32);
            }
        }
        Kind::Q8_0 => {
            let d = scale(scales, at / 4);
            #[unroll]
            for i in 0..8usize {
                let code = words[at * 2 + i / 4] >> comptime!((8 * (i % 4)) as u32) & 255u32;
                // As a number with a sign.
                let code = f32::cast_from(code ^ 128u32) - 128.0;
                out[i] = d * code;
            }
        }
        Kind::Q4_0 => {
            let d = scale(scales, at / 4);
            #[unroll]
            for i in 0..8usize {
                out[i] = d * (nibble(words, at, i) - 8.0);
            }
        }
        Kind::Q4_1 => {
            let both = scales[at / 4];
            let (d, min) = (half(both & 0xffffu32), half(both >> 16u32));
            #[unroll]
            for i in 0..8usize {
                out[i] = d * nibble(words, at, i) + min;
            }
        }
        Kind::Q4K | Kind::Q5K => {
            // Scales, twelve bytes of groups', with five bits the fifth ones, codes.
            let size = comptime!(if kind == Kind::Q4K { 36usize } else { 44usize });
            let codes = comptime!(if kind == Kind::Q4K { 4usize } else { 12usize });
            let (first, eight) = (at / 32 * size, at % 32);
            let group = eight / 4;
            let (scale, min) = group_scale(words, first + 1, group);
            let d = half(words[first] & 0xffffu32) * f32::cast_from(scale);
            let min = half(words[first] >> 16u32) * f32::cast_from(min);
            let from = first + codes + group / 2 * 8 + eight % 4 * 2;
            let shift = (group % 2 * 4) as u32;
            #[unroll]
            for i in 0..8usize {
                let own = comptime!((8 * (i % 4)) as u32);
                let mut code = words[from + i / 4] >> (shift + own) & 15u32;
                if comptime!(kind == Kind::Q5K) {
                    let fifth = words[first + 4 + eight % 4 * 2 + i / 4];
                    code |= (fifth >> (group as u32 + own) & 1u32) << 4u32;
                }
                out[i] = d * f32::cast_from(code) - min;
            }
        }
        Kind::Q6K => {
            // Low four bits, high two, sixteen bytes of groups' scales.
            let (first, eight) = (at / 32 * 52, at % 32);
            let group = eight / 2;
            let own = byte(words, first + 48, group);
            let d = scale(scales, at / 32) * (f32::cast_from(own ^ 128u32) - 128.0);
            let (side, run) = (eight / 16, eight % 16 / 4);
            let low = first + side * 16 + run % 2 * 8 + eight % 4 * 2;
            let high = first + 32 + side * 8 + eight % 4 * 2;
            let shift = (run / 2 * 4) as u32;
            let pair = (run * 2) as u32;
            #[unroll]
            for i in 0..8usize {
                let own = comptime!((8 * (i % 4)) as u32);
                let code = (words[low + i / 4] >> (shift + own) & 15u32)
                    | ((words[high + i / 4] >> (pair + own) & 3u32) << 4u32);
                out[i] = d * (f32::cast_from(code) - 32.0);
            }
        }
    }
    out
}

/// Units of a cube that share outputs of few rows.
pub(crate) const FEW_UNITS: usize = 128;

/// Units that share one output.
pub(crate) const LANES: usize = 32;

/// `rows` rows of `x`, which are few: each weight is read once and meets all of them. A cube has as many outputs as
/// [`LANES`] go into [`FEW_UNITS`], and writes columns from `first` on of `out`, `[rows, across]`.
///
/// `words` and `scales` are `[outputs, eights]` of [`Kind`].
#[cube(launch)]
pub(crate) fn few(
    x: &Tensor<f32>,
    words: &[u32],
    scales: &[u32],
    out: &mut [f32],
    outputs: u32,
    eights: u32,
    first: u32,
    across: u32,
    #[comptime] rows: usize,
    #[comptime] kind: Kind,
) {
    let (unit, eights) = (UNIT_POS as usize, eights as usize);
    let (lane, own) = (unit % LANES, unit / LANES);
    let output = CUBE_POS * comptime!(FEW_UNITS / LANES) + own;
    let columns = x.shape(1);
    let mut sums = Array::<f32>::new(rows);
    #[unroll]
    for r in 0..rows {
        sums[r] = 0.0;
    }
    if output < outputs as usize {
        for eight in range_stepped(lane, eights, LANES) {
            let weights = decode(words, scales, output * eights + eight, kind);
            #[unroll]
            for i in 0..8usize {
                let column = eight * 8 + i;
                // Rows of floats may end within an eight.
                if column < columns {
                    #[unroll]
                    for r in 0..rows {
                        sums[r] += weights[i] * x[r * x.stride(0) + column];
                    }
                }
            }
        }
    }
    let mut parts = Shared::<[f32]>::new_slice(comptime!(FEW_UNITS * rows));
    #[unroll]
    for r in 0..rows {
        parts[r * FEW_UNITS + unit] = sums[r];
    }
    #[unroll]
    for step in 0..comptime!(LANES.ilog2() as usize) {
        let left = comptime!(LANES >> (step + 1));
        sync_cube();
        if lane < left {
            #[unroll]
            for r in 0..rows {
                let at = r * FEW_UNITS + unit;
                let other = parts[at + left];
                parts[at] += other;
            }
        }
    }
    sync_cube();
    if lane == 0 && output < outputs as usize {
        #[unroll]
        for r in 0..rows {
            out[r * across as usize + first as usize + output] = parts[r * FEW_UNITS + unit];
        }
    }
}

/// Rows and outputs of a tile.
pub(crate) const TILE: usize = 64;

/// Columns of a step.
const STEP: usize = 16;

/// Units of a cube that makes a tile: each has four rows and four outputs.
pub(crate) const TILE_UNITS: usize = 256;

/// Numbers between rows in shared memory.
pub(crate) const PITCH: usize = STEP + 1;

/// Any number of rows: a cube makes a [`TILE`] of rows and outputs, from tiles of inputs and of weights in shared
/// memory. Cubes: outputs, rows. All else as in [`few`].
#[cube(launch)]
pub(crate) fn many(
    x: &Tensor<f32>,
    words: &[u32],
    scales: &[u32],
    out: &mut [f32],
    outputs: u32,
    eights: u32,
    first: u32,
    across: u32,
    #[comptime] kind: Kind,
) {
    let (unit, eights) = (UNIT_POS as usize, eights as usize);
    let outputs = outputs as usize;
    let (rows, columns) = (x.shape(0), x.shape(1));
    let (output, row) = (CUBE_POS_X as usize * TILE, CUBE_POS_Y as usize * TILE);
    let (right, down) = (unit % 16, unit / 16);
    let mut inputs = Shared::<[f32]>::new_slice(comptime!(TILE * PITCH));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(TILE * PITCH));
    let mut sums = Array::<f32>::new(16usize);
    #[unroll]
    for i in 0..16usize {
        sums[i] = 0.0;
    }
    for step in 0..eights.div_ceil(STEP / EIGHT) {
        sync_cube();
        #[unroll]
        for i in 0..comptime!(TILE * STEP / TILE_UNITS) {
            let at = i * TILE_UNITS + unit;
            let (line, column) = (at / STEP, step * STEP + at % STEP);
            let mut own = 0.0f32;
            if row + line < rows && column < columns {
                own = x[(row + line) * x.stride(0) + column];
            }
            inputs[line * PITCH + at % STEP] = own;
        }
        if unit < comptime!(TILE * STEP / EIGHT) {
            let (line, part) = (unit / (STEP / EIGHT), unit % (STEP / EIGHT));
            let eight = step * (STEP / EIGHT) + part;
            let to = line * PITCH + part * EIGHT;
            if output + line < outputs && eight < eights {
                let own = decode(words, scales, (output + line) * eights + eight, kind);
                #[unroll]
                for i in 0..8usize {
                    weights[to + i] = own[i];
                }
            } else {
                #[unroll]
                for i in 0..8usize {
                    weights[to + i] = 0.0;
                }
            }
        }
        sync_cube();
        for column in 0..STEP {
            let mut own = Array::<f32>::new(4usize);
            #[unroll]
            for j in 0..4usize {
                own[j] = weights[(j * 16 + right) * PITCH + column];
            }
            #[unroll]
            for i in 0..4usize {
                let input = inputs[(i * 16 + down) * PITCH + column];
                #[unroll]
                for j in 0..4usize {
                    sums[i * 4 + j] += input * own[j];
                }
            }
        }
    }
    #[unroll]
    for i in 0..4usize {
        #[unroll]
        for j in 0..4usize {
            let (line, to) = (row + i * 16 + down, output + j * 16 + right);
            if line < rows && to < outputs {
                out[line * across as usize + first as usize + to] = sums[i * 4 + j];
            }
        }
    }
}

/// Some rows of a matrix, `[ids, columns]`; ids outside of `from..from + outputs` are another part's. A unit has an
/// eight.
#[cube(launch)]
pub(crate) fn rows(
    ids: &[u32],
    words: &[u32],
    scales: &[u32],
    out: &mut Tensor<f32>,
    outputs: u32,
    eights: u32,
    from: u32,
    #[comptime] kind: Kind,
) {
    let eights = eights as usize;
    let (line, eight) = (ABSOLUTE_POS / eights, ABSOLUTE_POS % eights);
    let columns = out.shape(1);
    if line >= out.shape(0) {
        terminate!();
    }
    let id = ids[line];
    if id >= from && id - from < outputs {
        let own = decode(words, scales, (id - from) as usize * eights + eight, kind);
        #[unroll]
        for i in 0..8usize {
            if eight * 8 + i < columns {
                out[line * columns + eight * 8 + i] = own[i];
            }
        }
    }
}
