//! The inner loop of every matrix product here.

use super::simd::{Simd, load, store};
use std::ops::Range;

/// `acc[b][v] += Σ_k a[b, k] · x[k, v·LANES..]`, an outer product per step `k`: each `a` is
/// broadcast, each `x` is a row of `N` vectors.
///
/// Rows of `a` are `a_row` numbers apart, its columns `a_col`; rows of `x` are `N · LANES` apart.
/// Neither `a` nor its transpose has to be packed: broadcasts read one number at a time.
///
/// # Safety
/// `a` must be valid for reading at `b * a_row + k * a_col` for all `b < B`, `k < steps`, and `x`
/// for `steps * N * LANES` numbers.
#[inline(always)]
pub(super) unsafe fn outer<S: Simd, const B: usize, const N: usize>(
    s: S,
    steps: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    x: *const f32,
    acc: &mut [[S::V; N]; B],
) {
    let mut sums = *acc;
    for k in 0..steps {
        // SAFETY: within the ranges that the caller vouches for.
        unsafe {
            let from = x.add(k * N * S::LANES);
            let mut row = [s.splat(0.0); N];
            for (v, row) in row.iter_mut().enumerate() {
                *row = s.load(from.add(v * S::LANES));
            }
            for (b, sums) in sums.iter_mut().enumerate() {
                let a = s.splat(*a.add(b * a_row + k * a_col));
                for v in 0..N {
                    sums[v] = s.fma(a, row[v], sums[v]);
                }
            }
        }
    }
    *acc = sums;
}

/// How many vectors of rows the next panel takes, of those that are left.
///
/// Two, with which twelve sums (six broadcasts), the row and a broadcast fit sixteen registers; of
/// 32 registers, three (eight broadcasts), but two twice rather than three and one.
#[inline(always)]
pub(super) const fn panel_vectors(lanes: usize, left: usize) -> usize {
    match left {
        1 => 1,
        2 | 4 => 2,
        _ if lanes == 16 => 3,
        _ => 2,
    }
}

/// The lanes of each panel that `rows` rows take, in order.
pub(super) fn panels(lanes: usize, rows: usize) -> impl Iterator<Item = Range<usize>> {
    let vectors = rows.div_ceil(lanes);
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = at;
        at += panel_vectors(lanes, vectors - at);
        (first < vectors).then_some(first * lanes..at * lanes)
    })
}

/// Copies rows of `d` numbers into a panel `[d, lanes]` (row `i` in lane `i`), scaled; lanes beyond
/// the rows are 0, and rows beyond the lanes are left out.
#[inline(always)]
pub(super) fn pack_rows<'a, S: Simd>(
    s: S,
    mut rows: impl Iterator<Item = &'a [f32]>,
    scale: f32,
    d: usize,
    panel: &mut [f32],
) {
    let width = panel.len() / d;
    assert!(panel.len() == width * d && width.is_multiple_of(S::LANES));
    for first in (0..width).step_by(S::LANES) {
        let (mut group, mut n): ([&[f32]; 16], usize) = ([&[]; 16], 0);
        for to in &mut group[..S::LANES] {
            let Some(row) = rows.next() else { break };
            *to = row;
            n += 1;
        }
        pack_lanes(s, &group[..n], d, first, width, panel);
    }
    if scale != 1.0 {
        for x in panel.chunks_exact_mut(S::LANES) {
            store(s, x, s.mul(load(s, x), s.splat(scale)));
        }
    }
}

/// Copies up to [`Simd::LANES`] rows of `d` numbers into a panel `[d, width]`, from lane `first` on; of
/// as many lanes as a vector has, those beyond the rows are 0.
#[inline(always)]
pub(super) fn pack_lanes<S: Simd>(
    s: S,
    rows: &[&[f32]],
    d: usize,
    first: usize,
    width: usize,
    panel: &mut [f32],
) {
    assert!(rows.len() <= S::LANES && first + S::LANES <= width);
    assert!(rows.iter().all(|row| row.len() == d), "length of a row");
    let whole = d - d % S::LANES;
    let squares = if rows.len() == S::LANES { whole } else { 0 };
    let mut pointers = [std::ptr::null(); 16];
    for k in (0..squares).step_by(S::LANES) {
        for (pointer, row) in pointers.iter_mut().zip(rows) {
            *pointer = row[k..].as_ptr();
        }
        let to = &mut panel[k * width + first..];
        assert!(to.len() >= (S::LANES - 1) * width + S::LANES);
        // SAFETY: as many rows as lanes, each with as many numbers from k on, and room as checked.
        unsafe { s.transpose(&pointers, to.as_mut_ptr(), width) };
    }
    for (k, to) in panel.chunks_exact_mut(width).enumerate().skip(squares) {
        let to = &mut to[first..first + S::LANES];
        to.fill(0.0);
        for (to, row) in to.iter_mut().zip(rows) {
            *to = row[k];
        }
    }
}

/// Writes lanes of `x` `[n, width]` as rows of `n` numbers: those of lane `j` start at
/// `to + j * stride`. Lanes from `lanes` on are left out.
///
/// # Safety
/// `to` must be valid for writing `lanes` rows of `n` numbers, `stride` apart.
#[inline(always)]
pub(super) unsafe fn unpack_lanes<S: Simd>(
    s: S,
    x: &[f32],
    width: usize,
    lanes: usize,
    to: *mut f32,
    stride: usize,
) {
    let n = x.len() / width;
    assert!(lanes <= width && width.is_multiple_of(S::LANES));
    let (rows, whole) = (n - n % S::LANES, lanes - lanes % S::LANES);
    let mut pointers = [std::ptr::null(); 16];
    for first in (0..rows).step_by(S::LANES) {
        for lane in (0..whole).step_by(S::LANES) {
            for (i, pointer) in pointers[..S::LANES].iter_mut().enumerate() {
                *pointer = x[(first + i) * width + lane..][..S::LANES].as_ptr();
            }
            // SAFETY: as many rows as lanes; the square lies in the rows that the caller vouches
            // for.
            unsafe { s.transpose(&pointers, to.add(lane * stride + first), stride) };
        }
    }
    for lane in 0..lanes {
        let from = if lane < whole { rows } else { 0 };
        for row in from..n {
            // SAFETY: as above.
            unsafe { *to.add(lane * stride + row) = x[row * width + lane] };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        simd::{Isa, dispatch},
        testing::Numbers,
    };
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn panels_are_packed_and_unpacked(
            rows in 1usize..50,
            d in 1usize..40,
            scale in prop_oneof![Just(1.0f32), Just(0.5)],
            seed in any::<u64>(),
        ) {
            let x = Numbers::new(seed).take(rows * d);
            for isa in Isa::all() {
                let mut next = 0;
                for lanes in panels(isa.lanes(), rows) {
                    prop_assert_eq!(lanes.start, next);
                    next = lanes.end;
                    let last = lanes.end.min(rows);
                    let mut panel = vec![f32::NAN; lanes.len() * d];
                    let from = (lanes.start..last).map(|r| &x[r * d..(r + 1) * d]);
                    dispatch!(isa, s => pack_rows(s, from, scale, d, &mut panel));
                    for lane in lanes.clone() {
                        for k in 0..d {
                            let expected = if lane < rows { x[lane * d + k] * scale } else { 0.0 };
                            prop_assert_eq!(panel[k * lanes.len() + lane - lanes.start], expected);
                        }
                    }
                    let n = last - lanes.start;
                    let mut back = vec![-9.0; n * (d + 3)];
                    // SAFETY: room for n rows d + 3 apart.
                    dispatch!(isa, s => unsafe {
                        unpack_lanes(s, &panel, lanes.len(), n, back.as_mut_ptr(), d + 3)
                    });
                    for (row, back) in back.chunks(d + 3).enumerate() {
                        for k in 0..d {
                            prop_assert_eq!(back[k], x[(lanes.start + row) * d + k] * scale);
                        }
                        prop_assert_eq!(&back[d..], &[-9.0; 3]);
                    }
                }
                prop_assert!(next >= rows && next < rows + isa.lanes());
            }
        }
    }
}
