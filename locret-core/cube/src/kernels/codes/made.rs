//! Numbers that become codes.

use super::{Codes, TURNING, number_of_head, turn};
use crate::kernels::product::half;
use cubecl::prelude::*;

/// The largest number of 16 bits.
const LARGEST: f32 = 65504.0;

/// And the smallest.
const SMALLEST: f32 = -65504.0;

/// The bits of a number of 16 bits that is nearest to a finite one, of two as near the even one.
#[cube]
fn to_half(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    let size = bits & 0x7fff_ffffu32;
    // Below the smallest normal one they are multiples of 2⁻²⁴.
    let exponent = size >> 23u32;
    let shift = u32::min(126u32 - u32::min(exponent, 126u32), 25u32);
    let mantissa = (size & 0x7f_ffffu32) | 0x80_0000u32;
    let kept = mantissa >> shift;
    let rest = mantissa & ((1u32 << shift) - 1u32);
    let middle = (1u32 << shift) / 2u32;
    let up = rest > middle || (rest == middle && kept % 2u32 == 1u32);
    let small = kept + select(up, 1u32, 0u32);
    let rounded = size + 0xfffu32 + (size >> 13u32 & 1u32);
    let normal = (u32::max(rounded, 0x3800_0000u32) - 0x3800_0000u32) >> 13u32;
    let size = select(size < 0x3880_0000u32, small, normal);
    size | (bits >> 16u32 & 0x8000u32)
}

/// The nearest number that 16 bits have room for.
#[cube]
fn within(x: f32) -> f32 {
    let x = f32::min(x, LARGEST);
    f32::max(x, SMALLEST)
}

/// Whether a number is neither infinite nor undefined.
#[cube]
fn finite(x: f32) -> bool {
    u32::reinterpret(x) & 0x7f80_0000u32 != 0x7f80_0000u32
}

/// Step and low, as a word, of numbers from `low` to `high`, of which so many are `broken`: not finite.
#[cube]
fn pair_of(low: f32, high: f32, broken: u32, #[comptime] codes: Codes) -> u32 {
    let low = within(low);
    let high = within(high);
    let mut low16 = to_half(low);
    if half(low16) > low {
        // The next smaller one.
        if low16 == 0u32 {
            low16 = 0x8001u32;
        } else if low16 & 0x8000u32 == 0u32 {
            low16 -= 1u32;
        } else {
            low16 += 1u32;
        }
    }
    let step = (high - half(low16)) / comptime!(codes.top());
    let mut step16 = to_half(step);
    // Rounded up, so that the largest number is within reach.
    if half(step16) < step {
        step16 += 1u32;
    }
    select(broken > 0u32, 0x7e00_7e00u32, low16 << 16u32 | step16)
}

/// Rounds a head's rows of numbers to 16 bits: as many from row `at[3 h]` on as `at[3 h + 1]` says. What is no number
/// stays none. Cubes: numbers of a head, heads.
#[cube(launch)]
pub(crate) fn round(plain: &mut [u32], at: &[u32], #[comptime] dim: usize) {
    let head = CUBE_POS_Y as usize;
    let i = number_of_head();
    if i < at[head * 3 + 1] as usize * 2 * dim {
        let number = at[head * 3] as usize * 2 * dim + i;
        let x = f32::reinterpret(plain[number]);
        let near = half(to_half(within(x)));
        plain[number] = select(finite(x), u32::reinterpret(near), 0x7fc0_0000u32);
    }
}

/// Turns a head's plain rows, keys and values, before they become codes: as many from row `at[3 h]` on as `at[3 h +
/// 1]` says. Cubes: rows (on two axes, X and Z), heads.
#[cube(launch)]
pub(crate) fn turn_plain(plain: &mut [u32], at: &[u32], #[comptime] codes: Codes) {
    let numbers = comptime!(2 * codes.dim);
    let head = CUBE_POS_Y as usize;
    let row = (CUBE_POS_Z * CUBE_COUNT_X + CUBE_POS_X) as usize;
    if row >= at[head * 3 + 1] as usize {
        terminate!();
    }
    let first = (at[head * 3] as usize + row) * numbers;
    let mut both = Shared::<[f32]>::new_slice(comptime!(2 * codes.dim));
    for i in range_stepped(UNIT_POS as usize, numbers, TURNING) {
        both[i] = f32::reinterpret(plain[first + i]);
    }
    turn(&mut both, comptime!(2 * codes.dim), codes.block, TURNING);
    let by = comptime!(1.0 / (codes.block as f32).sqrt());
    for i in range_stepped(UNIT_POS as usize, numbers, TURNING) {
        plain[first + i] = u32::reinterpret(both[i] * by);
    }
}

/// Steps and lows of plain rows that become coded ones, in their records: as many rows as `at[3 h + 1]` says from row
/// `at[3 h]` on, to those from row `at[3 h + 2]` on. Cubes: pairs of a head, heads.
#[cube(launch)]
pub(crate) fn pairs(plain: &[u32], coded: &mut [u32], at: &[u32], #[comptime] codes: Codes) {
    let dim = comptime!(codes.dim);
    let of_key = comptime!(codes.pairs(false));
    let each = comptime!(codes.pairs(false) + codes.pairs(true));
    let head = CUBE_POS_Y as usize;
    let i = number_of_head();
    let (row, of) = (i / each, i % each);
    if row < at[head * 3 + 1] as usize {
        let value = of >= of_key;
        let group = of - select(value, of_key, 0usize);
        let mut from = (at[head * 3] as usize + row) * 2 * dim;
        let mut to = (at[head * 3 + 2] as usize + row) * comptime!(codes.record())
            + comptime!(codes.words());
        if value {
            from += dim;
            to += comptime!(codes.of(true));
        }
        let start = group * comptime!(codes.width);
        let mut low = f32::reinterpret(plain[from + start]);
        let mut high = low;
        let mut broken = 0u32;
        for feature in start..usize::min(start + comptime!(codes.width), dim) {
            let x = f32::reinterpret(plain[from + feature]);
            low = f32::min(low, x);
            high = f32::max(high, x);
            broken += select(finite(x), 0u32, 1u32);
        }
        coded[to + group] = pair_of(low, high, broken, codes);
    }
}

/// Steps and lows that runs of keys share: of the head's `at[3 h + 1]` plain rows from row `at[3 h]` on, to those of the
/// runs from `runs[h]` on. Cubes: features of a head's runs, heads.
#[cube(launch)]
pub(crate) fn shared_pairs(
    plain: &[u32],
    shared: &mut [u32],
    at: &[u32],
    runs: &[u32],
    #[comptime] codes: Codes,
) {
    let dim = comptime!(codes.dim);
    let many = comptime!(codes.run);
    let head = CUBE_POS_Y as usize;
    let i = number_of_head();
    let (run, feature) = (i / dim, i % dim);
    if (run + 1) * many <= at[head * 3 + 1] as usize {
        let from = (at[head * 3] as usize + run * many) * 2 * dim + feature;
        let mut low = f32::reinterpret(plain[from]);
        let mut high = low;
        let mut broken = 0u32;
        for row in 0..many {
            let x = f32::reinterpret(plain[from + row * 2 * dim]);
            low = f32::min(low, x);
            high = f32::max(high, x);
            broken += select(finite(x), 0u32, 1u32);
        }
        shared[(runs[head] as usize + run) * dim + feature] = pair_of(low, high, broken, codes);
    }
}

/// The code of a number.
#[cube]
fn code_of(x: f32, pair: u32, #[comptime] codes: Codes) -> u32 {
    let step = half(pair & 0xffffu32);
    let mut code = 0u32;
    if step > 0.0 {
        // Half a step is added and the rest cut off.
        let at = (x - half(pair >> 16u32)) / step + 0.5;
        code = u32::cast_from(f32::max(f32::min(at, comptime!(codes.top())), 0.0f32));
    }
    code
}

/// Codes of plain rows that become coded ones, of which steps and lows are there: rows as those of [`pairs`], runs as
/// those of [`shared_pairs`]. Cubes: words of a head, heads.
#[cube(launch)]
pub(crate) fn encode(
    plain: &[u32],
    shared: &[u32],
    coded: &mut [u32],
    at: &[u32],
    runs: &[u32],
    #[comptime] codes: Codes,
) {
    let dim = comptime!(codes.dim);
    let words = comptime!(codes.words());
    let stride = comptime!(codes.low_bytes());
    let bits = comptime!(codes.low_bits());
    let head = CUBE_POS_Y as usize;
    let i = number_of_head();
    let (row, of) = (i / (2 * words), i % (2 * words));
    if row < at[head * 3 + 1] as usize {
        let value = of >= words;
        let word = of % words;
        let mut from = (at[head * 3] as usize + row) * 2 * dim;
        let mut to = (at[head * 3 + 2] as usize + row) * comptime!(codes.record());
        if value {
            from += dim;
            to += comptime!(codes.of(true));
        }
        let shared_by = runs[head] as usize + row / comptime!(usize::max(codes.run, 1));
        let own = to + comptime!(codes.words());
        let mut made = 0u32;
        for index in 0..4usize {
            let place = word * 4 + index;
            for slot in 0..comptime!(8 / codes.low_bits()) {
                let feature = slot * stride + place;
                if place < stride && feature < dim {
                    let mut pair = coded[own + feature / comptime!(codes.width)];
                    if comptime!(codes.run > 0) {
                        // A key's are its run's.
                        if !value {
                            pair = shared[shared_by * dim + feature];
                        }
                    }
                    let code = code_of(f32::reinterpret(plain[from + feature]), pair, codes);
                    let low = code & comptime!((1u32 << codes.low_bits()) - 1);
                    made += low << (index * 8 + slot * bits) as u32;
                }
            }
            if comptime!(codes.bits == 3) {
                for slot in 0..8usize {
                    if place >= stride && (place - stride) * 8 + slot < dim {
                        let feature = (place - stride) * 8 + slot;
                        let mut pair = coded[own + feature / comptime!(codes.width)];
                        if comptime!(codes.run > 0) {
                            // A key's are its run's.
                            if !value {
                                pair = shared[shared_by * dim + feature];
                            }
                        }
                        let code = code_of(f32::reinterpret(plain[from + feature]), pair, codes);
                        made += (code >> 2u32) << (index * 8 + slot) as u32;
                    }
                }
            }
        }
        coded[to + word] = made;
    }
}
