//! The inner loop of every matrix product here.

use super::simd::Simd;
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
