//! Few tokens: rows of weights are read once for up to four tokens, as dot products in registers.

use super::{
    BLOCK, Job, jobs,
    rounded::{Rounded, RoundedDot},
    weight::{Bytes, Float, Nibbles, Packed, Weight, half_at},
};
use crate::{
    dtype::{DType, Number},
    scratch::Scratch,
    simd::{Isa, Simd, dispatch, load},
};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Weights in a job of few tokens, about.
const FEW_JOB: usize = 1 << 15;

/// The activations of few tokens, in the forms that the formats of the weights need; a form that
/// none needs is empty.
#[derive(Clone, Copy)]
struct Input<'a> {
    tokens: usize,
    columns: usize,
    /// `[tokens, columns]`
    plain: &'a [f32],
    /// [`Sums`] of each token.
    sums: &'a [f32],
    /// [`Rounded`] tokens.
    rounded: &'a [f32],
}

pub(super) fn few_tokens(
    isa: Isa,
    xs: &[&[f32]],
    tokens: usize,
    weights: &[&Weight<'_>],
    rounded: bool,
    outs: &mut [&mut [f32]],
    serial: bool,
) {
    let columns = xs.iter().map(|x| x.len()).sum::<usize>() / tokens;
    let widths: Vec<usize> = outs.iter().map(|out| out.len() / tokens).collect();
    let (sum_layout, code_layout) = (Sums::new(columns), Rounded::new(columns));
    let packed = weights.iter().any(|w| !w.dtype.is_float());
    let offsets = weights
        .iter()
        .any(|w| matches!(w.dtype, DType::Q4_0 | DType::Q4_1));
    let if_needed = |needed: bool, numbers: usize| if needed { tokens * numbers } else { 0 };
    let lengths = [
        tokens * columns,
        if_needed(offsets && !rounded, sum_layout.len()),
        if_needed(packed && rounded, code_layout.len()),
        if_needed(tokens > 1, widths.iter().sum()),
    ];
    let mut memory = Scratch::for_lengths(&lengths);
    let [plain, sums, codes, turned] = memory.slices(lengths);
    side_by_side(xs, tokens, plain);
    let each = plain.chunks_exact(columns);
    for (x, sums) in each.clone().zip(sums.chunks_exact_mut(sum_layout.len())) {
        dispatch!(isa, s => sum_layout.of(s, x, sums));
    }
    for (x, codes) in each.zip(codes.chunks_exact_mut(code_layout.len())) {
        dispatch!(isa, s => code_layout.round(s, x, codes));
    }
    let input = Input {
        tokens,
        columns,
        plain,
        sums,
        rounded: codes,
    };
    // Outputs by row of the weights, then by token. For one token that is their order; those of
    // several are turned in the end.
    let mut rest = &mut *turned;
    let mut rows: Vec<&mut [f32]> = match tokens {
        1 => outs.iter_mut().map(|out| &mut **out).collect(),
        _ => (widths.iter().map(|width| take(&mut rest, width * tokens))).collect(),
    };
    let job_rows = (FEW_JOB / columns).next_multiple_of(4).max(4);
    let jobs: Vec<(Job, &mut [f32])> = jobs(weights, &widths, |_| job_rows)
        .into_iter()
        .map(|job| {
            let out = take(&mut rows[job.out], job.rows.len() * tokens);
            (job, out)
        })
        .collect();
    let run = |(job, out): (Job, &mut [f32])| {
        dispatch!(isa, s => few_rows(s, weights[job.weight], job.rows, input, rounded, out));
    };
    if serial {
        jobs.into_iter().for_each(run);
    } else {
        jobs.into_par_iter().for_each(run);
    }
    if tokens > 1 {
        by_token(turned, tokens, &widths, outs);
    }
}

/// The parts of each token's activations, `[tokens, …]` each, in one row. A copy even of a single part,
/// since each vector of activations is loaded once for each row of weights: half as fast where it lies in
/// two lines of the cache.
fn side_by_side(xs: &[&[f32]], tokens: usize, rows: &mut [f32]) {
    let columns = rows.len() / tokens;
    for (token, mut row) in rows.chunks_exact_mut(columns).enumerate() {
        for x in xs {
            let width = x.len() / tokens;
            take(&mut row, width).copy_from_slice(&x[token * width..][..width]);
        }
    }
}

/// Outputs by row of the weights, `[widths together, tokens]`, to `[tokens, width]` each.
fn by_token(turned: &[f32], tokens: usize, widths: &[usize], outs: &mut [&mut [f32]]) {
    let mut rows = turned.chunks_exact(tokens);
    for (out, width) in outs.iter_mut().zip(widths) {
        for (column, row) in rows.by_ref().take(*width).enumerate() {
            for (token, x) in row.iter().enumerate() {
                out[token * width + column] = *x;
            }
        }
    }
}

/// Takes the first `n` numbers of a slice.
fn take<'a>(rest: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (part, tail) = std::mem::take(rest).split_at_mut(n);
    *rest = tail;
    part
}

/// What scales and minima of packed blocks are multiplied with, for each token and block of its
/// activations `x`: all `[0, Σ x]`, for weights with minima, and then all `[-8 Σ x, 0]`, for those
/// without.
#[derive(Clone, Copy)]
struct Sums {
    /// Blocks, and zeros beyond them, so that a vector can be read from any block on.
    blocks: usize,
}

impl Sums {
    fn new(columns: usize) -> Self {
        Self {
            blocks: padded_blocks(columns),
        }
    }

    /// Numbers of a token.
    const fn len(self) -> usize {
        4 * self.blocks
    }

    /// Where the pairs for weights without minima begin.
    const fn without_minimum(self) -> usize {
        2 * self.blocks
    }

    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: &[f32], out: &mut [f32]) {
        let (with, without) = out[..self.len()].split_at_mut(self.without_minimum());
        let mut x = x.chunks_exact(BLOCK);
        for (with, without) in with.chunks_exact_mut(2).zip(without.chunks_exact_mut(2)) {
            let sum = x.next().map_or(0.0, |x| {
                let mut sum = s.splat(0.0);
                for x in x.chunks_exact(S::LANES) {
                    sum = s.add(sum, load(s, x));
                }
                s.sum(sum)
            });
            with.copy_from_slice(&[0.0, sum]);
            without.copy_from_slice(&[-8.0 * sum, 0.0]);
        }
    }
}

/// Blocks of a row, and so many more that a vector can be read from any of them on.
pub(super) const fn padded_blocks(columns: usize) -> usize {
    (columns / BLOCK + 7).next_multiple_of(8)
}

/// `out` `[rows, tokens]`.
#[inline(always)]
fn few_rows<S: Simd>(
    s: S,
    weight: &Weight<'_>,
    rows: Range<usize>,
    input: Input<'_>,
    rounded: bool,
    out: &mut [f32],
) {
    match (weight.dtype, rounded) {
        (DType::F32, _) => few_of::<S, Float<f32>>(s, weight, rows, input, out),
        (DType::F16, _) => few_of::<S, Float<f16>>(s, weight, rows, input, out),
        (DType::BF16, _) => few_of::<S, Float<bf16>>(s, weight, rows, input, out),
        (DType::Q8_0, false) => few_of::<S, Bytes>(s, weight, rows, input, out),
        (DType::Q4_0, false) => few_of::<S, Nibbles<false>>(s, weight, rows, input, out),
        (DType::Q4_1, false) => few_of::<S, Nibbles<true>>(s, weight, rows, input, out),
        (DType::Q8_0, true) => few_of::<S, RoundedDot<Bytes>>(s, weight, rows, input, out),
        (DType::Q4_0, true) => few_of::<S, RoundedDot<Nibbles<false>>>(s, weight, rows, input, out),
        (DType::Q4_1, true) => few_of::<S, RoundedDot<Nibbles<true>>>(s, weight, rows, input, out),
        (dtype, _) => unreachable!("no weight is of type {dtype}"),
    }
}

#[inline(always)]
fn few_of<S: Simd, D: Dot>(
    s: S,
    weight: &Weight<'_>,
    rows: Range<usize>,
    input: Input<'_>,
    out: &mut [f32],
) {
    let mut from = rows.start;
    while from < rows.end {
        // A few rows at a time, so that the tokens of the second pass find them in the cache.
        let n = (rows.end - from).min(4);
        let out = &mut out[(from - rows.start) * input.tokens..][..n * input.tokens];
        let mut token = 0;
        while token < input.tokens {
            match input.tokens - token {
                1 => {
                    dots::<S, D, 4, 1>(s, weight, from, n, input, token, out);
                    token += 1;
                }
                2 | 3 => {
                    dots::<S, D, 4, 2>(s, weight, from, n, input, token, out);
                    token += 2;
                }
                _ => {
                    dots::<S, D, 2, 4>(s, weight, from, n, input, token, out);
                    token += 4;
                }
            }
        }
        from += n;
    }
}

/// Dot products of `n` rows from `from` with `T` tokens from `token`, `R` rows at a time.
#[inline(always)]
fn dots<S: Simd, D: Dot, const R: usize, const T: usize>(
    s: S,
    weight: &Weight<'_>,
    from: usize,
    n: usize,
    input: Input<'_>,
    token: usize,
    out: &mut [f32],
) {
    let (columns, row_bytes) = (input.columns, weight.row_bytes);
    assert!(from + n <= weight.rows && weight.bytes.len() == weight.rows * row_bytes);
    let (x, stride) = match D::ROUNDED {
        true => (input.rounded, Rounded::new(columns).len()),
        false => (input.plain, columns),
    };
    assert!(x.len() >= (token + T) * stride && weight.columns == columns);
    let sum_layout = Sums::new(columns);
    assert!(!D::SUMS || input.sums.len() >= (token + T) * sum_layout.len());
    for first in (0..n).step_by(R) {
        let (mut rows, mut xs, mut sums) = (
            [std::ptr::null(); R],
            [std::ptr::null(); T],
            [std::ptr::null(); T],
        );
        for (r, row) in rows.iter_mut().enumerate() {
            // Beyond the last row it is read again, and what comes of it is left out.
            *row = weight.bytes[(from + (first + r).min(n - 1)) * row_bytes..].as_ptr();
        }
        for t in 0..T {
            xs[t] = x[(token + t) * stride..].as_ptr();
            if D::SUMS {
                sums[t] = input.sums[(token + t) * sum_layout.len()..].as_ptr();
            }
        }
        // SAFETY: each row has `row_bytes` bytes, and each token its activations in the form that the
        // format needs, with sums where it needs them (all checked above).
        let dots = unsafe { D::dots::<S, R, T>(s, columns, rows, xs, sums) };
        for r in 0..R.min(n - first) {
            for t in 0..T {
                out[(first + r) * input.tokens + token + t] = dots[r][t];
            }
        }
    }
}

/// How many bytes ahead of their use weights are asked for. Rows are read one after the other, in
/// the order of memory.
pub(super) const AHEAD: usize = 4096;

/// A format's dot products.
pub(super) trait Dot {
    /// Whether it needs [`Sums`].
    const SUMS: bool = false;
    /// Whether it needs [`Rounded`] tokens rather than plain ones.
    const ROUNDED: bool = false;

    /// Dot products of `R` rows with `T` tokens.
    ///
    /// # Safety
    /// Each of `rows` must be valid for reading the bytes of a row of `columns` numbers, each of
    /// `x` for a token (of `columns` numbers, or [`Rounded`]), and if [`Self::SUMS`] each of `sums`
    /// for its [`Sums`].
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        x: [*const f32; T],
        sums: [*const f32; T],
    ) -> [[f32; T]; R];
}

/// Sums over the lanes of `R · T` vectors.
#[inline(always)]
pub(super) fn sum_all<S: Simd, const R: usize, const T: usize>(
    s: S,
    acc: [[S::V; T]; R],
) -> [[f32; T]; R] {
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

impl<E: Number> Dot for Float<E> {
    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        x: [*const f32; T],
        _: [*const f32; T],
    ) -> [[f32; T]; R] {
        let mut acc = [[s.splat(0.0); T]; R];
        let whole = columns - columns % S::LANES;
        let quads = columns - columns % (4 * S::LANES);
        for r in 0..R {
            let row = rows[r].cast::<E>();
            // Four sums for each token, so that no addition waits for the one before it.
            let mut sums = [[s.splat(0.0); T]; 4];
            for c in (0..quads).step_by(4 * S::LANES) {
                // Single precision comes fast enough with what the processor fetches by itself.
                let lines = if E::CONVERTED {
                    4 * S::LANES * size_of::<E>()
                } else {
                    1
                };
                for line in (0..lines).step_by(64) {
                    s.prefetch(row.wrapping_add(c).cast::<u8>().wrapping_add(AHEAD + line));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let c = c + i * S::LANES;
                    // SAFETY: c + LANES <= columns; loads of vectors need no alignment.
                    let weight = unsafe { E::load(s, row.wrapping_add(c)) };
                    for t in 0..T {
                        // SAFETY: as above.
                        let x = unsafe { s.load(x[t].add(c)) };
                        sums[t] = s.fma(weight, x, sums[t]);
                    }
                }
            }
            for c in (quads..whole).step_by(S::LANES) {
                // SAFETY: as above.
                let weight = unsafe { E::load(s, row.wrapping_add(c)) };
                for t in 0..T {
                    // SAFETY: as above.
                    let x = unsafe { s.load(x[t].add(c)) };
                    sums[0][t] = s.fma(weight, x, sums[0][t]);
                }
            }
            for t in 0..T {
                acc[r][t] = s.add(s.add(sums[0][t], sums[1][t]), s.add(sums[2][t], sums[3][t]));
            }
        }
        let mut out = sum_all(s, acc);
        for c in whole..columns {
            for r in 0..R {
                // SAFETY: c < columns.
                let weight = unsafe {
                    rows[r]
                        .cast::<E>()
                        .wrapping_add(c)
                        .read_unaligned()
                        .to_f32()
                };
                for t in 0..T {
                    // SAFETY: c < columns.
                    out[r][t] += weight * unsafe { *x[t].add(c) };
                }
            }
        }
        out
    }
}

impl Dot for Bytes {
    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        x: [*const f32; T],
        _: [*const f32; T],
    ) -> [[f32; T]; R] {
        let mut acc = [[s.splat(0.0); T]; R];
        for r in 0..R {
            // Sums of every other block, so that no addition waits for the one before it.
            let mut halves = [[s.splat(0.0); T]; 2];
            for block in 0..columns / BLOCK {
                // SAFETY: the row has a block here, each token 32 numbers.
                unsafe {
                    let at = rows[r].add(block * Self::BYTES);
                    s.prefetch(at.wrapping_add(AHEAD));
                    let scale = s.splat_f16(half_at(at));
                    let mut sums = [s.splat(0.0); T];
                    for i in (0..BLOCK).step_by(S::LANES) {
                        let weight = s.load_i8(at.add(Self::CODES + i).cast());
                        for t in 0..T {
                            let x = s.load(x[t].add(block * BLOCK + i));
                            sums[t] = s.fma(weight, x, sums[t]);
                        }
                    }
                    let [this, other] = halves;
                    halves = [other, this];
                    for t in 0..T {
                        halves[1][t] = s.fma(scale, sums[t], halves[1][t]);
                    }
                }
            }
            for t in 0..T {
                acc[r][t] = s.add(halves[0][t], halves[1][t]);
            }
        }
        sum_all(s, acc)
    }
}

impl<const MINIMUM: bool> Nibbles<MINIMUM> {
    /// `N` blocks (at most `LANES / 2`) of a row from block `first` on, added to the sums of even
    /// blocks, of odd ones and of what [`Sums`] give: no addition waits for the one before it.
    ///
    /// # Safety
    /// The row must have these blocks, `x` be tokens of as many, and `sums` what belongs to them.
    #[inline(always)]
    unsafe fn group<S: Simd, const T: usize, const N: usize>(
        s: S,
        row: *const u8,
        first: usize,
        x: [*const f32; T],
        sums: [*const f32; T],
        acc: &mut [[S::V; 3]; T],
    ) {
        // SAFETY: promised by the caller; behind the last block's sums are zeros.
        unsafe {
            let row = row.add(first * Self::BYTES);
            let scales = s.load_scales(row, Self::BYTES, N, MINIMUM);
            for t in 0..T {
                acc[t][2] = s.fma(scales, s.load(sums[t].add(2 * first)), acc[t][2]);
            }
            for i in 0..N {
                let at = row.add(i * Self::BYTES);
                s.prefetch(at.wrapping_add(AHEAD));
                let mut dot = [s.splat(0.0); T];
                for j in (0..BLOCK / 2).step_by(S::LANES) {
                    let (low, high) = s.load_nibbles(at.add(Self::CODES + j));
                    for t in 0..T {
                        let x = x[t].add((first + i) * BLOCK + j);
                        dot[t] = s.fma(low, s.load(x), dot[t]);
                        dot[t] = s.fma(high, s.load(x.add(BLOCK / 2)), dot[t]);
                    }
                }
                let scale = s.splat_lane(scales, 2 * i);
                for t in 0..T {
                    acc[t][i % 2] = s.fma(scale, dot[t], acc[t][i % 2]);
                }
            }
        }
    }
}

impl<const MINIMUM: bool> Dot for Nibbles<MINIMUM> {
    const SUMS: bool = true;

    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        x: [*const f32; T],
        sums: [*const f32; T],
    ) -> [[f32; T]; R] {
        let blocks = columns / BLOCK;
        let sums = sums.map(|sums| match MINIMUM {
            true => sums,
            false => sums.wrapping_add(Sums::new(columns).without_minimum()),
        });
        let mut acc = [[s.splat(0.0); T]; R];
        for r in 0..R {
            let (row, mut parts) = (rows[r], [[s.splat(0.0); 3]; T]);
            let mut at = 0;
            // SAFETY: the row has the blocks before `blocks`, and so has each token.
            unsafe {
                while S::LANES == 16 && at + 8 <= blocks {
                    Self::group::<S, T, 8>(s, row, at, x, sums, &mut parts);
                    at += 8;
                }
                while S::LANES >= 8 && at + 4 <= blocks {
                    Self::group::<S, T, 4>(s, row, at, x, sums, &mut parts);
                    at += 4;
                }
                while at + 2 <= blocks {
                    Self::group::<S, T, 2>(s, row, at, x, sums, &mut parts);
                    at += 2;
                }
                if at < blocks {
                    Self::group::<S, T, 1>(s, row, at, x, sums, &mut parts);
                }
            }
            for t in 0..T {
                let [even, odd, scales] = parts[t];
                acc[r][t] = s.add(s.add(even, odd), scales);
            }
        }
        sum_all(s, acc)
    }
}
