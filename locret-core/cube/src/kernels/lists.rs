//! Positions and scores of a layer's units, and which of them are the best: KV head `h` has the `bounds[2 h + 1]` units
//! from number `bounds[2 h]` of the lists on. Scores are kept as their bits, so that nothing rounds or renames them.

use cubecl::prelude::*;

/// Units of a cube that chooses the units of a head.
pub(crate) const UNITS: usize = 256;

/// Bits of a rank that are found at a time, and how many numbers they stand for.
const DIGIT: u32 = 4;
pub(crate) const DIGITS: usize = 1 << DIGIT;

/// The rank of what is protected: that of `+∞`.
const PROTECTED: u32 = 0xff80_0000;

/// Puts new units behind the others, at positions from `first` on, with scores `[new, heads]`; `bounds` counts them
/// already. With `moved` the others are copied from old lists, which are not looked at otherwise. Cubes: units of a head,
/// heads.
#[cube(launch)]
pub(crate) fn append(
    new: &Tensor<f32>,
    old_positions: &[u32],
    old_scores: &[u32],
    old_bounds: &[u32],
    bounds: &[u32],
    positions: &mut [u32],
    scores: &mut [u32],
    first: u32,
    #[comptime] moved: bool,
) {
    let head = CUBE_POS_Y as usize;
    let len = bounds[head * 2 + 1] as usize;
    let old = len - new.shape(0);
    let mut unit = CUBE_POS_X as usize * CUBE_DIM as usize + UNIT_POS as usize;
    if comptime!(!moved) {
        unit += old;
    }
    if unit < len {
        let to = bounds[head * 2] as usize + unit;
        if unit >= old {
            let token = unit - old;
            positions[to] = first + token as u32;
            scores[to] = u32::reinterpret(new[token * new.stride(0) + head]);
        } else if comptime!(moved) {
            let from = old_bounds[head * 2] as usize + unit;
            positions[to] = old_positions[from];
            scores[to] = old_scores[from];
        }
    }
}

/// Larger for a larger score, from its bits: -0.0 equals 0.0, and a NaN is less than all.
#[cube]
fn rank(bits: u32) -> u32 {
    let magnitude = bits & 0x7fff_ffffu32;
    let mut own = bits | 0x8000_0000u32;
    if bits != magnitude {
        own = bits ^ 0xffff_ffffu32;
    }
    if magnitude == 0u32 {
        own = 0x8000_0000u32;
    }
    if magnitude > 0x7f80_0000u32 {
        own = 0u32;
    }
    own
}

/// The rank of a unit of a head.
#[cube]
fn ranked(scores: &[u32], start: usize, unit: usize, first: usize, newest: usize) -> u32 {
    let mut own = rank(scores[start + unit]);
    if unit < first || unit >= newest {
        own = PROTECTED.runtime();
    }
    own
}

/// Keeps the best units of each head; of `best` the triples say how many, and how many of the first and of the newest are
/// protected. Of equal ranks the earlier stays. `kept` are their numbers, one head's behind the other's; `wrong` says of
/// which heads a score was NaN. A cube has a head.
///
/// The rank of the last unit that stays is found digit by digit: how many of those that begin like it have which digit
/// next is counted by each unit of the cube for itself, and added up.
#[cube(launch)]
pub(crate) fn select(
    positions: &[u32],
    scores: &[u32],
    bounds: &[u32],
    wrong: &[u32],
    best: &[u32],
    to: &[u32],
    kept: &mut [u32],
    new_positions: &mut [u32],
    new_scores: &mut [u32],
    new_wrong: &mut [u32],
) {
    let (head, own) = (CUBE_POS_X as usize, UNIT_POS as usize);
    let (start, len) = (bounds[head * 2] as usize, bounds[head * 2 + 1] as usize);
    let first = best[head * 3 + 1] as usize;
    let newest = len - best[head * 3 + 2] as usize;
    let mut counts = Shared::<[u32]>::new_slice(comptime!(DIGITS * UNITS));
    // What is known of the rank of the last one that stays, and how many of those that are like it so far stay.
    let mut last = 0u32;
    let mut known = 0u32;
    let mut left = best[head * 3];
    for turn in 0..comptime!(32 / DIGIT) {
        let shift = (7u32 - turn) * DIGIT;
        for digit in 0..DIGITS {
            counts[digit * UNITS + own] = 0u32;
        }
        for unit in range_stepped(own, len, UNITS) {
            let rank = ranked(scores, start, unit, first, newest);
            if (rank ^ last) & known == 0u32 {
                let digit = (rank >> shift) as usize % DIGITS;
                counts[digit * UNITS + own] += 1u32;
            }
        }
        #[unroll]
        for step in 0..comptime!(UNITS.ilog2() as usize) {
            let half = comptime!(UNITS >> (step + 1));
            sync_cube();
            for i in range_stepped(own, comptime!(DIGITS * half), UNITS) {
                let at = i / half * UNITS + i % half;
                let other = counts[at + half];
                counts[at] += other;
            }
        }
        sync_cube();
        // From the largest digit down; every unit of the cube finds the same.
        let mut found = false;
        for i in 0..DIGITS {
            let digit = DIGITS - 1 - i;
            let many = counts[digit * UNITS];
            if !found {
                if many >= left {
                    found = true;
                    last |= (digit as u32) << shift;
                } else {
                    left -= many;
                }
            }
        }
        known |= ((1u32 << DIGIT) - 1u32) << shift;
        sync_cube();
    }
    // Each unit of the cube has a run of units, of which it counts those that are better, those that are equal, and those
    // that have no rank; how many there are before its run are sums of these.
    let run = len.div_ceil(UNITS);
    let from = usize::min(own * run, len);
    let end = usize::min(from + run, len);
    let mut better = 0u32;
    let mut equal = 0u32;
    let mut nan = 0u32;
    for unit in from..end {
        let rank = ranked(scores, start, unit, first, newest);
        if rank > last {
            better += 1u32;
        } else if rank == last {
            equal += 1u32;
        }
        if scores[start + unit] & 0x7fff_ffffu32 > 0x7f80_0000u32 {
            nan += 1u32;
        }
    }
    counts[own] = better;
    counts[UNITS + own] = equal;
    counts[2 * UNITS + own] = nan;
    #[unroll]
    for step in 0..comptime!(UNITS.ilog2() as usize) {
        let back = comptime!(1usize << step);
        sync_cube();
        let mut more = Array::<u32>::new(3usize);
        #[unroll]
        for of in 0..3usize {
            more[of] = 0u32;
            if own >= back {
                more[of] = counts[of * UNITS + own - back];
            }
        }
        sync_cube();
        #[unroll]
        for of in 0..3usize {
            counts[of * UNITS + own] += more[of];
        }
    }
    let mut better_before = counts[own] - better;
    let mut equal_before = counts[UNITS + own] - equal;
    if own == UNITS - 1 {
        new_wrong[head] = wrong[head] + counts[2 * UNITS + own];
    }
    let mut list = 0usize;
    for other in 0..head {
        list += best[other * 3] as usize;
    }
    let new = to[head * 2] as usize;
    for unit in from..end {
        let rank = ranked(scores, start, unit, first, newest);
        let at = (better_before + u32::min(equal_before, left)) as usize;
        if rank > last || (rank == last && equal_before < left) {
            kept[list + at] = unit as u32;
            new_positions[new + at] = positions[start + unit];
            new_scores[new + at] = scores[start + unit];
        }
        if rank > last {
            better_before += 1u32;
        } else if rank == last {
            equal_before += 1u32;
        }
    }
}
