//! Few tokens: weights are converted once for up to eight of them, as dot products in registers.

use super::{
    BLOCK, Job,
    columns::Columns,
    jobs,
    rounded::{Rounded, rounded_rows},
    super_blocks::{Eights, SixK},
    weight::{Bytes, Float, Nibbles, Packed, Weight, half_at},
};
use crate::{
    dtype::{DType, Number},
    scratch::Scratch,
    simd::{Isa, Simd, dispatch, load, store},
};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Weights in a job of few tokens, about.
const FEW_JOB: usize = 1 << 15;

/// Rows that are multiplied with all groups of tokens before the next ones are read; whole groups of any number
/// of rows that are multiplied at once.
const ROWS: usize = 24;

/// The activations of few tokens, in the forms that the formats of the weights need; a form that
/// none needs is empty.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) tokens: usize,
    pub(super) columns: usize,
    /// All tokens, [interleaved](interleave).
    plain: &'a [f32],
    /// [`Sums`] of each token.
    sums: &'a [f32],
    /// [`Rounded`] tokens.
    pub(super) rounded: &'a [f32],
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
    let (sum_layout, code_layout) = (Sums::new(columns), Rounded::new(columns));
    // Super-blocks are multiplied with activations as they are.
    let coded = rounded && weights.iter().any(|w| w.dtype.block() == BLOCK);
    let summed = weights.iter().any(|w| match w.dtype {
        DType::Q4_0 | DType::Q4_1 => !rounded,
        DType::Q4_K | DType::Q5_K | DType::Q6_K => true,
        _ => false,
    });
    let if_needed = |needed: bool, numbers: usize| if needed { numbers } else { 0 };
    // Several tokens are read from a second copy.
    let lengths = [
        if_needed(tokens == 1 || xs.len() > 1, tokens * columns),
        if_needed(tokens > 1, padded(isa.lanes(), tokens) * columns),
        if_needed(summed, tokens * sum_layout.len()),
        if_needed(coded, tokens * code_layout.len()),
    ];
    let mut memory = Scratch::for_lengths(&lengths);
    let [plain, interleaved, sums, codes] = memory.slices(lengths);
    let plain: &[f32] = match xs {
        [x] if tokens > 1 => x,
        _ => {
            side_by_side(xs, tokens, plain);
            plain
        }
    };
    let each = plain.chunks_exact(columns);
    for (x, sums) in each.clone().zip(sums.chunks_exact_mut(sum_layout.len())) {
        dispatch!(isa, s => sum_layout.of(s, x, sums));
    }
    for (x, codes) in each.zip(codes.chunks_exact_mut(code_layout.len())) {
        dispatch!(isa, s => code_layout.round(s, x, codes));
    }
    if tokens > 1 {
        dispatch!(isa, s => interleave(s, plain, tokens, interleaved));
    }
    let input = Input {
        tokens,
        columns,
        plain: if tokens > 1 { interleaved } else { plain },
        sums,
        rounded: codes,
    };
    let outs: Vec<Columns> = outs.iter_mut().map(|o| Columns::of(o, tokens)).collect();
    let widths: Vec<usize> = outs.iter().map(|out| out.stride).collect();
    let job_rows = match tokens {
        1 => (FEW_JOB / columns).next_multiple_of(4).max(4),
        _ => (FEW_JOB / columns / ROWS * ROWS).max(ROWS),
    };
    let jobs = jobs(weights, &widths, |_| job_rows);
    let run = |job: &Job| {
        let (weight, out) = (weights[job.weight], outs[job.out]);
        few_rows(
            isa,
            Work {
                weight,
                job,
                input,
                out,
            },
            rounded,
        );
    };
    if serial {
        jobs.iter().for_each(run);
    } else {
        jobs.par_iter().for_each(run);
    }
}

/// The parts of each token's activations, `[tokens, …]` each, in one row. A copy even of a single part,
/// since each vector of activations is loaded for a few rows of weights at a time: half as fast where it
/// lies in two lines of the cache.
fn side_by_side(xs: &[&[f32]], tokens: usize, rows: &mut [f32]) {
    let columns = rows.len() / tokens;
    for (token, mut row) in rows.chunks_exact_mut(columns).enumerate() {
        for x in xs {
            let width = x.len() / tokens;
            let (part, rest) = std::mem::take(&mut row).split_at_mut(width);
            part.copy_from_slice(&x[token * width..][..width]);
            row = rest;
        }
    }
}

/// How many tokens the next group has room for, of `left` that are left: with 32 registers up to eight.
#[inline(always)]
const fn group(lanes: usize, left: usize) -> usize {
    match left {
        0..=2 => left,
        3 | 4 => 4,
        _ if lanes < 16 => 4,
        // Nine to twelve are two groups of about the same size.
        5 | 6 | 9..=12 => 6,
        _ => 8,
    }
}

/// Tokens that all groups have room for.
const fn padded(lanes: usize, tokens: usize) -> usize {
    let (mut at, mut room) = (0, 0);
    while at < tokens {
        let width = group(lanes, tokens - at);
        (at, room) = (at + width, room + width);
    }
    room
}

/// Activations `[tokens, columns]`, group by group of tokens, in the order in which they are read: vector by vector
/// all tokens side by side, and after the vectors the columns that are left, one by one. The last token also
/// fills the room of those that a group lacks.
#[inline(always)]
fn interleave<S: Simd>(s: S, x: &[f32], tokens: usize, out: &mut [f32]) {
    let columns = x.len() / tokens;
    let whole = columns - columns % S::LANES;
    let (mut token, mut rest) = (0, out);
    while token < tokens {
        let width = group(S::LANES, tokens - token);
        let (own, others) = std::mem::take(&mut rest).split_at_mut(width * columns);
        let (vectors, numbers) = own.split_at_mut(width * whole);
        for t in 0..width {
            let x = &x[(token + t).min(tokens - 1) * columns..][..columns];
            let from = x.chunks_exact(S::LANES);
            let to = vectors.chunks_exact_mut(width * S::LANES);
            for (from, to) in from.zip(to) {
                store(s, &mut to[t * S::LANES..], load(s, from));
            }
            for (x, to) in x[whole..].iter().zip(numbers.chunks_exact_mut(width)) {
                to[t] = *x;
            }
        }
        (token, rest) = (token + width, others);
    }
}

/// What scales and minima of packed blocks are multiplied with, for each token and block of its
/// activations `x`: all `[0, Σ x]`, for weights with minima, then all `[-8 Σ x, 0]`, for those without,
/// then, for super-blocks whose minima are subtracted, eight zeros and eight `-Σ x` in turn, and at last, for those with
/// groups of 16, `-32 Σ x` of each half of a block.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    /// Blocks, and zeros beyond them, so that a vector can be read from any block on.
    blocks: usize,
}

impl Sums {
    pub(super) fn new(columns: usize) -> Self {
        Self {
            blocks: padded_blocks(columns),
        }
    }

    /// Numbers of a token.
    const fn len(self) -> usize {
        8 * self.blocks
    }

    /// Where the pairs for weights without minima begin.
    const fn without_minimum(self) -> usize {
        2 * self.blocks
    }

    /// Where those for super-blocks begin, 16 for each.
    pub(super) const fn super_blocks(self) -> usize {
        4 * self.blocks
    }

    /// Where those of half a block begin.
    pub(super) const fn halves(self) -> usize {
        6 * self.blocks
    }

    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: &[f32], out: &mut [f32]) {
        let (with, rest) = out[..self.len()].split_at_mut(self.without_minimum());
        let (without, rest) = rest.split_at_mut(self.without_minimum());
        let (eights, halves) = rest.split_at_mut(self.halves() - self.super_blocks());
        let sum = |x: &[f32]| {
            let mut sum = s.splat(0.0);
            for x in x.chunks_exact(S::LANES) {
                sum = s.add(sum, load(s, x));
            }
            s.sum(sum)
        };
        let mut half = x.chunks_exact(BLOCK / 2);
        for halves in halves {
            *halves = half.next().map_or(0.0, |x| -32.0 * sum(x));
        }
        let mut x = x.chunks_exact(BLOCK);
        let pairs = with.chunks_exact_mut(2).zip(without.chunks_exact_mut(2));
        for (i, (with, without)) in pairs.enumerate() {
            let sum = x.next().map_or(0.0, sum);
            with.copy_from_slice(&[0.0, sum]);
            without.copy_from_slice(&[-8.0 * sum, 0.0]);
            let at = i / 8 * 16 + i % 8;
            (eights[at], eights[at + 8]) = (0.0, -sum);
        }
    }
}

/// Blocks of a row, and so many more that a vector can be read from any of them on.
pub(super) const fn padded_blocks(columns: usize) -> usize {
    (columns / BLOCK + 7).next_multiple_of(8)
}

/// A job's weights, what they are multiplied with, and where the outputs go.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    pub(super) weight: &'a Weight<'a>,
    pub(super) job: &'a Job,
    pub(super) input: Input<'a>,
    pub(super) out: Columns,
}

/// A function for each type of weights: all of them in one would take more stack than a thread has where nothing is
/// optimised.
fn few_rows(isa: Isa, work: Work<'_>, rounded: bool) {
    match (work.weight.dtype, rounded) {
        (DType::F32, _) => dispatch!(isa, s => work.rows::<_, Float<f32>>(s)),
        (DType::F16, _) => dispatch!(isa, s => work.rows::<_, Float<f16>>(s)),
        (DType::BF16, _) => dispatch!(isa, s => work.rows::<_, Float<bf16>>(s)),
        (DType::Q8_0, false) => dispatch!(isa, s => work.rows::<_, Bytes>(s)),
        (DType::Q4_0, false) => dispatch!(isa, s => work.rows::<_, Nibbles<false>>(s)),
        (DType::Q4_1, false) => dispatch!(isa, s => work.rows::<_, Nibbles<true>>(s)),
        (DType::Q4_K, _) => dispatch!(isa, s => work.rows::<_, Eights<false>>(s)),
        (DType::Q5_K, _) => dispatch!(isa, s => work.rows::<_, Eights<true>>(s)),
        (DType::Q6_K, _) => dispatch!(isa, s => work.rows::<_, SixK>(s)),
        (DType::Q8_0, true) => dispatch!(isa, s => rounded_rows::<_, Bytes>(s, work)),
        (DType::Q4_0, true) => dispatch!(isa, s => rounded_rows::<_, Nibbles<false>>(s, work)),
        (DType::Q4_1, true) => dispatch!(isa, s => rounded_rows::<_, Nibbles<true>>(s, work)),
        (dtype, _) => unreachable!("no weight is of type {dtype}"),
    }
}

impl Work<'_> {
    /// All rows of the job.
    #[inline(always)]
    fn rows<S: Simd, D: Dot>(self, s: S) {
        let (rows, tokens) = (&self.job.rows, self.input.tokens);
        if tokens == 1 {
            return self.of_one::<S, D>(s);
        }
        let lengths = [ROWS * padded(S::LANES, tokens).min(8) * S::LANES];
        let mut memory = Scratch::for_lengths(&lengths);
        let [kept] = memory.slices(lengths);
        for from in rows.clone().step_by(ROWS) {
            let part = from..rows.end.min(from + ROWS);
            let mut token = 0;
            while token < tokens {
                // With up to four tokens reading is what takes time, and few rows beside each other are best;
                // with more, as many sums as fit the registers beside the weights and activations that they
                // are of.
                let width = group(S::LANES, tokens - token);
                match (S::LANES == 16, D::PACKED, width) {
                    (_, _, 1) => self.part::<S, D, 2, 1>(s, part.clone(), token, kept),
                    (_, _, 2) => self.part::<S, D, 2, 2>(s, part.clone(), token, kept),
                    (_, false, 4) => self.part::<S, D, 3, 4>(s, part.clone(), token, kept),
                    (false, _, _) => self.part::<S, D, 1, 4>(s, part.clone(), token, kept),
                    (true, true, 4) => self.part::<S, D, 2, 4>(s, part.clone(), token, kept),
                    (true, false, 6) => self.part::<S, D, 4, 6>(s, part.clone(), token, kept),
                    (true, true, 6) => self.part::<S, D, 2, 6>(s, part.clone(), token, kept),
                    (true, false, _) => self.part::<S, D, 3, 8>(s, part.clone(), token, kept),
                    (true, true, _) => self.part::<S, D, 2, 8>(s, part.clone(), token, kept),
                }
                token += width;
            }
        }
    }

    /// All rows of the job with a single token, two at a time: the more rows are read beside each other, the
    /// less a processor sees what comes next.
    #[inline(always)]
    fn of_one<S: Simd, D: Dot>(self, s: S) {
        let (columns, x) = (self.input.columns, self.input.plain);
        let layout = Sums::new(columns);
        assert!(x.len() == columns && (!D::SUMS || self.input.sums.len() == layout.len()));
        let (sums, rows) = ([self.input.sums.as_ptr()], &self.job.rows);
        for first in rows.clone().step_by(4) {
            let mut four = [s.splat(0.0); 4];
            for (two, first) in four.chunks_exact_mut(2).zip((first..rows.end).step_by(2)) {
                let pointers = self.pointers::<2>(first, rows.end);
                let ahead = Ahead {
                    next: pointers[0].wrapping_add(AHEAD),
                    alone: true,
                };
                // SAFETY: each row has `row_bytes` bytes, and the token its sums where the format needs them.
                let done =
                    unsafe { D::dots::<S, 2, 1>(s, columns, pointers, ahead, x.as_ptr(), sums) };
                two.copy_from_slice(&[done[0][0], done[1][0]]);
            }
            self.finish::<S, D, 1>(s, four, first, rows.end, 0, 0, x);
        }
    }

    /// Where `R` rows begin. Beyond the last one it is read again, and what comes of it is left out.
    #[inline(always)]
    fn pointers<const R: usize>(self, first: usize, end: usize) -> [*const u8; R] {
        let (bytes, row_bytes) = (&self.weight.bytes[..], self.weight.row_bytes);
        assert!(end <= self.weight.rows && bytes.len() == self.weight.rows * row_bytes);
        let mut rows = [std::ptr::null(); R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = bytes[(first + r).min(end - 1) * row_bytes..].as_ptr();
        }
        rows
    }

    /// Outputs of up to four rows from `first` on and of token `t` of the group `x` that begins with `token`.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "a part of a function")]
    fn finish<S: Simd, D: Dot, const T: usize>(
        self,
        s: S,
        four: [S::V; 4],
        first: usize,
        end: usize,
        token: usize,
        t: usize,
        x: &[f32],
    ) {
        let columns = self.input.columns;
        let whole = columns - columns % S::LANES;
        let (mut dots, n) = (s.sum4(four), 4.min(end - first));
        if whole < columns {
            for (row, dot) in self.pointers::<4>(first, end).into_iter().zip(&mut dots) {
                for c in whole..columns {
                    // SAFETY: the row has as many numbers.
                    *dot += unsafe { D::number(row, c) } * x[c * T + t];
                }
            }
        }
        let column = self.job.column + first - self.job.rows.start;
        // SAFETY: these columns are our job's.
        unsafe { self.out.put(token + t, column, dots, n) };
    }

    /// Some rows, `R` at a time, and the group of `T` tokens from `token` on.
    #[inline(always)]
    fn part<S: Simd, D: Dot, const R: usize, const T: usize>(
        self,
        s: S,
        part: Range<usize>,
        token: usize,
        kept: &mut [f32],
    ) {
        let Self { weight, input, .. } = self;
        let (columns, row_bytes, tokens) = (input.columns, weight.row_bytes, input.tokens);
        // Groups before this one have no room for more than their tokens.
        let x = &input.plain[token * columns..][..T * columns];
        let layout = Sums::new(columns);
        let mut sums = [std::ptr::null(); T];
        for (t, sums) in sums.iter_mut().enumerate() {
            if D::SUMS {
                let own = (token + t).min(tokens - 1) * layout.len();
                *sums = input.sums[own..own + layout.len()].as_ptr();
            }
        }
        // Where several groups read the same rows, the first one asks for one half of the rows that come next,
        // and those after it for the other.
        let alone = token == 0 && T >= tokens;
        for first in part.clone().step_by(R) {
            let rows = self.pointers::<R>(first, part.end);
            let next = match alone {
                true => rows[0].wrapping_add(AHEAD),
                false => {
                    let (all, done) = (part.len() * row_bytes, (first - part.start) * row_bytes);
                    let half = if token == 0 { 0 } else { all / 2 };
                    rows[0].wrapping_add(all + half - done + done / 2)
                }
            };
            let ahead = Ahead { next, alone };
            // SAFETY: each row has `row_bytes` bytes, and there are T tokens, with sums where the format
            // needs them (all checked above).
            let sums = unsafe { D::dots::<S, R, T>(s, columns, rows, ahead, x.as_ptr(), sums) };
            let to = &mut kept[(first - part.start) * S::LANES..];
            assert!(to.len() >= ((T - 1) * ROWS + R) * S::LANES);
            for t in 0..T {
                for (r, sums) in sums.iter().enumerate() {
                    // SAFETY: as many vectors are there.
                    unsafe {
                        let to = to.as_mut_ptr().add((t * ROWS + r) * S::LANES);
                        s.store(to, sums[t]);
                    }
                }
            }
        }
        for t in 0..T.min(tokens - token) {
            for first in part.clone().step_by(4) {
                let from = &kept[(t * ROWS + first - part.start) * S::LANES..];
                let mut four = [s.splat(0.0); 4];
                for (i, four) in four.iter_mut().enumerate() {
                    *four = load(s, &from[i * S::LANES..]);
                }
                self.finish::<S, D, T>(s, four, first, part.end, token, t, x);
            }
        }
    }
}

/// How many bytes ahead of their use weights are asked for. Rows are read one after the other, in
/// the order of memory.
pub(super) const AHEAD: usize = 4096;

/// What is to be asked for, in the order of memory, while something else is multiplied.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    next: *const u8,
    /// Whether as much is asked for as is read; half of it otherwise.
    alone: bool,
}

impl Ahead {
    /// While as many bytes are read.
    #[inline(always)]
    pub(super) fn ask<S: Simd>(&mut self, s: S, bytes: usize) {
        s.prefetch(self.next);
        let bytes = if self.alone { bytes } else { bytes / 2 };
        self.next = self.next.wrapping_add(bytes);
    }
}

/// A format's dot products.
pub(super) trait Dot {
    /// Whether numbers are in blocks.
    const PACKED: bool;
    /// Whether it needs [`Sums`].
    const SUMS: bool = false;

    /// Vectors whose lanes add up to dot products of `R` rows with a group of `T` tokens. What is added up for an output, in which order,
    /// depends neither on `R` nor on `T`.
    ///
    /// # Safety
    /// Each of `rows` must be valid for reading the bytes of a row of `columns` numbers, `x` for `T`
    /// [interleaved](interleave) tokens, and if [`Self::SUMS`] each of `sums` for a token's [`Sums`].
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        ahead: Ahead,
        x: *const f32,
        sums: [*const f32; T],
    ) -> [[S::V; T]; R];

    /// A number of a row that is of no whole vector.
    ///
    /// # Safety
    /// `row` must be valid for reading the bytes of a row that has this column.
    #[inline(always)]
    unsafe fn number(_row: *const u8, _column: usize) -> f32 {
        0.0
    }
}

impl<E: Number> Dot for Float<E> {
    const PACKED: bool = false;

    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        mut ahead: Ahead,
        x: *const f32,
        _: [*const f32; T],
    ) -> [[S::V; T]; R] {
        let whole = columns - columns % S::LANES;
        let mut acc = [[s.splat(0.0); T]; R];
        for c in (0..whole).step_by(S::LANES) {
            let mut weights = [s.splat(0.0); R];
            for (weight, row) in weights.iter_mut().zip(rows) {
                ahead.ask(s, S::LANES * size_of::<E>());
                // SAFETY: c + LANES <= columns; loads of vectors need no alignment.
                *weight = unsafe { E::load(s, row.cast::<E>().wrapping_add(c)) };
            }
            for t in 0..T {
                // SAFETY: before `c` there are as many columns of each token, and then a vector of each.
                let x = unsafe { s.load(x.add(c * T + t * S::LANES)) };
                for r in 0..R {
                    acc[r][t] = s.fma(weights[r], x, acc[r][t]);
                }
            }
        }
        acc
    }

    #[inline(always)]
    unsafe fn number(row: *const u8, column: usize) -> f32 {
        // SAFETY: promised by the caller.
        let number = unsafe { row.cast::<E>().wrapping_add(column).read_unaligned() };
        number.to_f32()
    }
}

/// A packed format's codes as numbers.
pub(super) trait Codes: Packed {
    /// Vectors that are unpacked together.
    const TOGETHER: usize;
    /// Those of a block's codes from number `i` on, and, if there are two, from number `i + 16` on.
    ///
    /// # Safety
    /// `at` must be valid for reading a block's codes, which have as many numbers.
    unsafe fn codes<S: Simd>(s: S, at: *const u8, i: usize) -> [S::V; 2];
}

impl Codes for Bytes {
    const TOGETHER: usize = 1;

    #[inline(always)]
    unsafe fn codes<S: Simd>(s: S, at: *const u8, i: usize) -> [S::V; 2] {
        // SAFETY: promised by the caller.
        [unsafe { s.load_i8(at.add(i).cast()) }, s.splat(0.0)]
    }
}

impl<const MINIMUM: bool> Codes for Nibbles<MINIMUM> {
    const TOGETHER: usize = 2;

    #[inline(always)]
    unsafe fn codes<S: Simd>(s: S, at: *const u8, i: usize) -> [S::V; 2] {
        // SAFETY: promised by the caller.
        let (low, high) = unsafe { s.load_nibbles(at.add(i)) };
        [low, high]
    }
}

/// Adds the products of a block, `scales` times the sums of codes times activations.
///
/// # Safety
/// `codes` must be valid for reading a block's, and `x` for a block of `T` interleaved tokens.
#[inline(always)]
unsafe fn block<S: Simd, C: Codes, const R: usize, const T: usize>(
    s: S,
    scales: [S::V; R],
    codes: [*const u8; R],
    x: *const f32,
    acc: &mut [[S::V; T]; R],
) {
    let vectors = BLOCK / C::TOGETHER / S::LANES;
    // Vector `i` of the first, or of the second of two numbers that are unpacked together.
    let place = |i: usize, t: usize, second: usize| ((second * vectors + i) * T + t) * S::LANES;
    if T == 1 {
        let mut dots = [s.splat(0.0); R];
        for i in 0..vectors {
            for r in 0..R {
                // SAFETY: promised by the caller.
                unsafe {
                    let codes = C::codes(s, codes[r], i * S::LANES);
                    for second in 0..C::TOGETHER {
                        let x = s.load(x.add(place(i, 0, second)));
                        dots[r] = s.fma(codes[second], x, dots[r]);
                    }
                }
            }
        }
        for r in 0..R {
            acc[r][0] = s.fma(scales[r], dots[r], acc[r][0]);
        }
        return;
    }
    let mut numbers = [[[s.splat(0.0); 2]; 8]; R];
    for r in 0..R {
        for i in 0..vectors {
            // SAFETY: promised by the caller.
            numbers[r][i] = unsafe { C::codes(s, codes[r], i * S::LANES) };
        }
    }
    for t in 0..T {
        let mut dots = [s.splat(0.0); R];
        for i in 0..vectors {
            for second in 0..C::TOGETHER {
                // SAFETY: promised by the caller.
                let x = unsafe { s.load(x.add(place(i, t, second))) };
                for r in 0..R {
                    dots[r] = s.fma(numbers[r][i][second], x, dots[r]);
                }
            }
        }
        for r in 0..R {
            acc[r][t] = s.fma(scales[r], dots[r], acc[r][t]);
        }
    }
}

impl Dot for Bytes {
    const PACKED: bool = true;

    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        mut ahead: Ahead,
        x: *const f32,
        _: [*const f32; T],
    ) -> [[S::V; T]; R] {
        let mut acc = [[s.splat(0.0); T]; R];
        for at in 0..columns / BLOCK {
            let (mut scales, mut codes) = ([s.splat(0.0); R], [std::ptr::null(); R]);
            // SAFETY: the rows have a block here, each token 32 numbers.
            unsafe {
                for r in 0..R {
                    ahead.ask(s, Self::BYTES);
                    let row = rows[r].add(at * Self::BYTES);
                    scales[r] = s.splat_f16(half_at(row));
                    codes[r] = row.add(Self::CODES);
                }
                block::<S, Self, R, T>(s, scales, codes, x.add(at * BLOCK * T), &mut acc);
            }
        }
        acc
    }
}

impl<const MINIMUM: bool> Nibbles<MINIMUM> {
    /// `N` blocks (at most `LANES / 2`) of the rows from block `first` on: what [`Sums`] give, and then block by
    /// block.
    ///
    /// # Safety
    /// The rows must have these blocks, `x` be tokens of as many, and `sums` what belongs to them.
    #[inline(always)]
    unsafe fn group<S: Simd, const R: usize, const T: usize, const N: usize>(
        s: S,
        first: usize,
        rows: [*const u8; R],
        ahead: &mut Ahead,
        x: *const f32,
        sums: [*const f32; T],
        acc: &mut [[S::V; T]; R],
    ) {
        // SAFETY: promised by the caller; behind the last block's sums are zeros.
        unsafe {
            let mut scales = [s.splat(0.0); R];
            for r in 0..R {
                let row = rows[r].add(first * Self::BYTES);
                scales[r] = s.load_scales(row, Self::BYTES, N, MINIMUM);
                for t in 0..T {
                    acc[r][t] = s.fma(scales[r], s.load(sums[t].add(2 * first)), acc[r][t]);
                }
            }
            for i in 0..N {
                let (mut own, mut codes) = ([s.splat(0.0); R], [std::ptr::null(); R]);
                for r in 0..R {
                    ahead.ask(s, Self::BYTES);
                    own[r] = s.splat_lane(scales[r], 2 * i);
                    codes[r] = rows[r].add((first + i) * Self::BYTES + Self::CODES);
                }
                let x = x.add((first + i) * BLOCK * T);
                block::<S, Self, R, T>(s, own, codes, x, acc);
            }
        }
    }
}

impl<const MINIMUM: bool> Dot for Nibbles<MINIMUM> {
    const PACKED: bool = true;
    const SUMS: bool = true;

    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        mut ahead: Ahead,
        x: *const f32,
        mut sums: [*const f32; T],
    ) -> [[S::V; T]; R] {
        let (blocks, ahead) = (columns / BLOCK, &mut ahead);
        for sums in &mut sums {
            if !MINIMUM {
                *sums = sums.wrapping_add(Sums::new(columns).without_minimum());
            }
        }
        let (mut acc, mut at) = ([[s.splat(0.0); T]; R], 0);
        // SAFETY: the rows have the blocks before `blocks`, and so has each token.
        unsafe {
            while S::LANES == 16 && at + 8 <= blocks {
                Self::group::<S, R, T, 8>(s, at, rows, ahead, x, sums, &mut acc);
                at += 8;
            }
            while S::LANES >= 8 && at + 4 <= blocks {
                Self::group::<S, R, T, 4>(s, at, rows, ahead, x, sums, &mut acc);
                at += 4;
            }
            while at + 2 <= blocks {
                Self::group::<S, R, T, 2>(s, at, rows, ahead, x, sums, &mut acc);
                at += 2;
            }
            if at < blocks {
                Self::group::<S, R, T, 1>(s, at, rows, ahead, x, sums, &mut acc);
            }
        }
        acc
    }
}
