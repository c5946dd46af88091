//! Few tokens whose activations are rounded to eight bits: products of whole numbers.

use super::{
    BLOCK,
    few::{AHEAD, Work, padded_blocks},
    weight::{Bytes, Nibbles, Packed},
};
use crate::simd::{MAGIC, Simd, load, store};

/// Activations of a token, rounded in blocks to `step · code` with `code` in `-127..=127`, as one
/// slice of numbers.
///
/// With `c = Σ step · code`, a dot product with `scale · (q - 8)` is
/// `scale · (step · Σ q · code - 8 c)`. One with `scale · q + minimum` is rounded the same, so that
/// what is rounded is multiplied with codes around 0, and what is added is exact:
/// `scale · (step · Σ q · code + 8 (Σ x - c)) + minimum · Σ x`.
#[derive(Clone, Copy)]
pub(super) struct Rounded {
    /// Blocks, and zeros beyond them, so that a vector can be read from any block on.
    blocks: usize,
}

impl Rounded {
    pub(super) fn new(columns: usize) -> Self {
        Self {
            blocks: padded_blocks(columns),
        }
    }

    /// Where `[step, 0]` of each block begin, after 32 codes of each in the place of eight numbers.
    const fn steps(self) -> usize {
        8 * self.blocks
    }

    /// Where the pairs for scales and minima begin, `[8 (Σ x - c), Σ x]` for each block.
    const fn with_minimum(self) -> usize {
        10 * self.blocks
    }

    /// The same for weights without minima: `[-8 c, 0]`.
    const fn without_minimum(self) -> usize {
        12 * self.blocks
    }

    /// Numbers in all.
    pub(super) const fn len(self) -> usize {
        14 * self.blocks
    }

    #[inline(always)]
    pub(super) fn round<S: Simd>(self, s: S, x: &[f32], out: &mut [f32]) {
        let (codes, rest) = out[..self.len()].split_at_mut(self.steps());
        let (steps, rest) = rest.split_at_mut(2 * self.blocks);
        let (with, without) = rest.split_at_mut(2 * self.blocks);
        let pairs = steps.chunks_exact_mut(2).zip(with.chunks_exact_mut(2));
        let pairs = pairs.zip(without.chunks_exact_mut(2));
        let mut x = x.chunks_exact(BLOCK);
        for (codes, ((steps, with), without)) in codes.chunks_exact_mut(BLOCK / 4).zip(pairs) {
            let Some(x) = x.next() else {
                for pair in [steps, with, without] {
                    pair.fill(0.0);
                }
                codes.fill(0.0);
                continue;
            };
            let (step, whole, sum) = round_block(s, x, codes);
            let stood_for = step * whole;
            steps.copy_from_slice(&[step, 0.0]);
            with.copy_from_slice(&[8.0 * (sum - stood_for), sum]);
            without.copy_from_slice(&[-8.0 * stood_for, 0.0]);
        }
    }
}

/// The step, the sum of the codes and the sum of the numbers of a block. A step of NaN stands for
/// numbers that are not finite.
#[inline(always)]
fn round_block<S: Simd>(s: S, x: &[f32], codes: &mut [f32]) -> (f32, f32, f32) {
    let zero = s.splat(0.0);
    let (mut largest, mut nothing, mut sum) = (zero, zero, zero);
    for x in x.chunks_exact(S::LANES) {
        let x = load(s, x);
        largest = s.max(s.max(x, s.sub(zero, x)), largest);
        nothing = s.fma(x, zero, nothing);
        sum = s.add(sum, x);
    }
    let step = s.largest(largest) / 127.0;
    // Steps without a reciprocal stand for zeros.
    let (step, reciprocal) = if s.sum(nothing) != 0.0 {
        (f32::NAN, 0.0)
    } else if step < f32::MIN_POSITIVE {
        (0.0, 0.0)
    } else {
        (step, 1.0 / step)
    };
    let (magic, mut rounded, mut whole) = (s.splat(MAGIC), [0.0; BLOCK], zero);
    for (x, to) in x
        .chunks_exact(S::LANES)
        .zip(rounded.chunks_exact_mut(S::LANES))
    {
        let t = s.fma(load(s, x), s.splat(reciprocal), magic);
        whole = s.add(whole, s.sub(t, magic));
        store(s, to, t);
    }
    for (code, four) in codes.iter_mut().zip(rounded.chunks_exact(4)) {
        // The last byte of a number near 1.5 · 2^23 is what was added to it.
        let byte = |i: usize| four[i].to_bits() as u8;
        *code = f32::from_bits(u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]));
    }
    (step, s.sum(whole), s.sum(sum))
}

/// A packed format as products with [`Rounded`] activations see it.
pub(super) trait Codes: Packed {
    /// Where in a token the pairs for scales and minima begin, if there are any.
    fn added(x: Rounded) -> Option<usize>;
    /// Lanes that add up to the dot product of a block's codes.
    ///
    /// # Safety
    /// `codes` must be valid for reading a block's codes, `x` for 32 bytes.
    unsafe fn dot<S: Simd>(s: S, codes: S::Bytes, x: *const u8) -> S::V;
    /// A block's codes.
    ///
    /// # Safety
    /// `at` must be valid for reading them.
    unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::Bytes;
}

impl Codes for Bytes {
    #[inline(always)]
    fn added(_: Rounded) -> Option<usize> {
        None
    }
    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, codes: S::Bytes, x: *const u8) -> S::V {
        // SAFETY: promised by the caller.
        s.dot_bytes(codes, unsafe { s.load_bytes(x) })
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::Bytes {
        // SAFETY: promised by the caller.
        unsafe { s.load_bytes(at) }
    }
}

impl<const MINIMUM: bool> Codes for Nibbles<MINIMUM> {
    #[inline(always)]
    fn added(x: Rounded) -> Option<usize> {
        Some(if MINIMUM {
            x.with_minimum()
        } else {
            x.without_minimum()
        })
    }
    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, codes: S::Bytes, x: *const u8) -> S::V {
        // SAFETY: promised by the caller.
        s.dot_halves(codes, unsafe { s.load_bytes(x) })
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::Bytes {
        // SAFETY: promised by the caller.
        unsafe { s.load_halves(at) }
    }
}

/// All rows of a job, with up to eight tokens.
#[inline(always)]
pub(super) fn rounded_rows<S: Simd, C: Codes>(s: S, work: Work<'_>) {
    // A few rows at a time, so that the tokens of the second pass find them in the cache.
    for from in work.job.rows.clone().step_by(4) {
        let mut token = 0;
        while token < work.input.tokens {
            match work.input.tokens - token {
                1 => {
                    rows_by::<S, C, 4, 1>(s, work, from, token);
                    token += 1;
                }
                2 | 3 => {
                    rows_by::<S, C, 4, 2>(s, work, from, token);
                    token += 2;
                }
                _ => {
                    rows_by::<S, C, 2, 4>(s, work, from, token);
                    rows_by::<S, C, 2, 4>(s, work, from + 2, token);
                    token += 4;
                }
            }
        }
    }
}

/// Dot products of up to `R` rows from `from` with `T` tokens from `token`.
#[inline(always)]
fn rows_by<S: Simd, C: Codes, const R: usize, const T: usize>(
    s: S,
    work: Work<'_>,
    from: usize,
    token: usize,
) {
    let Work {
        weight,
        job,
        input,
        out,
    } = work;
    let n = R.min(job.rows.end.saturating_sub(from));
    if n == 0 {
        return;
    }
    let (row_bytes, columns) = (weight.row_bytes, input.columns);
    let stride = Rounded::new(columns).len();
    assert!(from + n <= weight.rows && weight.bytes.len() == weight.rows * row_bytes);
    assert!(input.rounded.len() >= (token + T) * stride);
    let (mut rows, mut x) = ([std::ptr::null(); R], [std::ptr::null(); T]);
    for (r, row) in rows.iter_mut().enumerate() {
        // Beyond the last row it is read again, and what comes of it is left out.
        *row = weight.bytes[(from + r.min(n - 1)) * row_bytes..].as_ptr();
    }
    for (t, x) in x.iter_mut().enumerate() {
        *x = input.rounded[(token + t) * stride..].as_ptr();
    }
    // SAFETY: each row has `row_bytes` bytes, and each token its activations in this form.
    let dots = unsafe { dots::<S, C, R, T>(s, columns, rows, x) };
    for t in 0..T {
        let mut column = [0.0; R];
        for (to, dots) in column.iter_mut().zip(&dots) {
            *to = dots[t];
        }
        // SAFETY: these columns are our job's.
        unsafe { out.put(token + t, job.column + from - job.rows.start, column, n) };
    }
}

/// `N` blocks (at most `LANES / 2`) of one row from block `first` on.
///
/// # Safety
/// The row must have these blocks, and `x` be [`Rounded`] tokens of as many.
#[inline(always)]
unsafe fn group<S: Simd, C: Codes, const T: usize, const N: usize>(
    s: S,
    row: *const u8,
    first: usize,
    layout: Rounded,
    x: [*const f32; T],
    sums: &mut [[S::V; 3]; T],
) {
    // SAFETY: the row and each token have these blocks, and tokens zeros beyond their last.
    unsafe {
        let row = row.add(first * C::BYTES);
        let scales = s.load_scales(row, C::BYTES, N, C::MINIMUM);
        let mut steps = [scales; T];
        for t in 0..T {
            let step = s.load(x[t].add(layout.steps() + 2 * first));
            steps[t] = s.mul(scales, step);
            if let Some(added) = C::added(layout) {
                let added = s.load(x[t].add(added + 2 * first));
                sums[t][2] = s.fma(scales, added, sums[t][2]);
            }
        }
        for i in 0..N {
            let at = row.add(i * C::BYTES);
            s.prefetch(at.wrapping_add(AHEAD));
            let codes = C::load(s, at.add(C::CODES));
            for t in 0..T {
                let dot = C::dot(s, codes, x[t].add(8 * (first + i)).cast());
                let step = s.splat_lane(steps[t], 2 * i);
                sums[t][i % 2] = s.fma(step, dot, sums[t][i % 2]);
            }
        }
    }
}

/// Dot products of `R` rows with `T` tokens.
///
/// # Safety
/// Each of `rows` must be valid for reading the bytes of a row of `columns` numbers, each of `x` for a
/// [`Rounded`] token.
#[inline(always)]
unsafe fn dots<S: Simd, C: Codes, const R: usize, const T: usize>(
    s: S,
    columns: usize,
    rows: [*const u8; R],
    x: [*const f32; T],
) -> [[f32; T]; R] {
    let (blocks, layout) = (columns / BLOCK, Rounded::new(columns));
    let mut acc = [[s.splat(0.0); T]; R];
    for r in 0..R {
        let (row, mut sums) = (rows[r], [[s.splat(0.0); 3]; T]);
        let mut at = 0;
        // SAFETY: the row has the blocks before `blocks`, and so has each token.
        unsafe {
            while S::LANES == 16 && at + 8 <= blocks {
                group::<S, C, T, 8>(s, row, at, layout, x, &mut sums);
                at += 8;
            }
            while S::LANES >= 8 && at + 4 <= blocks {
                group::<S, C, T, 4>(s, row, at, layout, x, &mut sums);
                at += 4;
            }
            while at + 2 <= blocks {
                group::<S, C, T, 2>(s, row, at, layout, x, &mut sums);
                at += 2;
            }
            if at < blocks {
                group::<S, C, T, 1>(s, row, at, layout, x, &mut sums);
            }
        }
        for t in 0..T {
            acc[r][t] = s.add(s.add(sums[t][0], sums[t][1]), sums[t][2]);
        }
    }
    sum_all(s, acc)
}

/// Sums over the lanes of `R · T` vectors.
#[inline(always)]
fn sum_all<S: Simd, const R: usize, const T: usize>(s: S, acc: [[S::V; T]; R]) -> [[f32; T]; R] {
    let mut out = [[0.0; T]; R];
    if R == 4 {
        for t in 0..T {
            let sums = s.sum4([acc[0][t], acc[1 % R][t], acc[2 % R][t], acc[3 % R][t]]);
            for r in 0..R {
                out[r][t] = sums[r];
            }
        }
    } else if T == 4 {
        for r in 0..R {
            let a = acc[r];
            out[r].copy_from_slice(&s.sum4([a[0], a[1 % T], a[2 % T], a[3 % T]]));
        }
    } else {
        for r in 0..R {
            for t in 0..T {
                out[r][t] = s.sum(acc[r][t]);
            }
        }
    }
    out
}
