//! Products with weight matrices that stay in the type of their file.
//!
//! `y = x · Wᵀ` with `x` `[tokens, columns]` in `f32` and `W` `[rows, columns]` in `f32`, a 16-bit
//! float type or blocks of packed integers as in GGUF files. Weights are converted as they are
//! read, and sums are in `f32` of exact products of what the weights stand for.
//!
//! Activations are rounded in one place only, where the caller asks for it ([`matmul_rounded`]):
//! few tokens that meet packed integers, whose products are then whole numbers.
//!
//! - **Few tokens** (decode): bound by the reading of `W`, which is read once for up to four
//!   tokens; rows of `W` are dot products in registers.
//! - **Many tokens** (prefill): blocks of `W` are converted once for hundreds of tokens, into panels
//!   whose lanes are rows of `W`; the inner loop is the outer product of broadcast activations with
//!   them. Activations are read and outputs written where they lie.
//!
//! Work is cut by rows of `W` in a way that depends on shapes alone, so that results don't depend
//! on the number of threads.

use super::{
    micro::{outer, pack_lanes, panels},
    scratch::Scratch,
    simd::{Isa, MAGIC, Simd, dispatch, load, store},
    tiles::Element,
};
use bytes::Bytes as SharedBytes;
use half::{bf16, f16};
use rayon::prelude::*;
use std::{borrow::Cow, fmt, ops::Range};

/// The type that the numbers of a weight matrix are stored in; all little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// Single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32: a half-precision scale and 32 signed bytes; `x = scale · q`.
    Q8_0,
    /// Blocks of 32: a half-precision scale and 16 bytes, which hold numbers `i` in their low and
    /// `i + 16` in their high four bits; `x = scale · (q - 8)`.
    Q4_0,
    /// As `Q4_0` with a half-precision minimum after the scale; `x = scale · q + minimum`.
    Q4_1,
}

impl Format {
    /// Numbers in a block.
    pub fn block(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::Bf16 => 1,
            Format::Q8_0 | Format::Q4_0 | Format::Q4_1 => BLOCK,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::Bf16 => 2,
            Format::Q8_0 => 34,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
        }
    }
}

/// Numbers in a block of packed integers.
const BLOCK: usize = 32;

/// Bytes that are not the matrix they are said to be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightError {
    /// The rows of the matrix don't consist of whole blocks.
    Columns {
        /// The columns that were asked for.
        columns: usize,
        /// Numbers in a block.
        block: usize,
    },
    /// There are more or fewer bytes than the matrix has.
    Bytes {
        /// Bytes of the matrix; `None` where the number does not fit.
        expected: Option<usize>,
        /// Bytes that were given.
        found: usize,
    },
}

impl fmt::Display for WeightError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Columns { columns, block } => {
                write!(f, "{columns} columns are not whole blocks of {block}")
            }
            Self::Bytes {
                expected: Some(expected),
                found,
            } => write!(f, "{found} bytes where the matrix has {expected}"),
            Self::Bytes {
                expected: None,
                found,
            } => write!(f, "{found} bytes where the matrix has more than fit memory"),
        }
    }
}

impl std::error::Error for WeightError {}

/// A weight matrix `[rows, columns]`, row-major, each row whole blocks; `rows` are outputs and
/// `columns` inputs. Bytes may be borrowed (of a mapped file), owned or a part of memory that many
/// matrices share, and need no alignment.
#[derive(Clone)]
pub struct Weight<'a> {
    format: Format,
    rows: usize,
    columns: usize,
    bytes: Held<'a>,
}

/// Where the bytes of a matrix are.
#[derive(Clone)]
enum Held<'a> {
    Alone(Cow<'a, [u8]>),
    Shared(SharedBytes),
}

impl std::ops::Deref for Held<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Alone(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Weight<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Weight({:?} [{}, {}])",
            self.format, self.rows, self.columns
        )
    }
}

impl<'a> Weight<'a> {
    /// From the bytes of a file.
    ///
    /// # Errors
    /// [`WeightError`] if the bytes cannot be such a matrix.
    pub fn new(
        format: Format,
        rows: usize,
        columns: usize,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self, WeightError> {
        Self::of(format, rows, columns, Held::Alone(bytes.into()))
    }

    /// From bytes that may be a part of a larger piece of memory, such as an
    /// [`Arena`](super::pages::Arena)'s.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn shared(
        format: Format,
        rows: usize,
        columns: usize,
        bytes: SharedBytes,
    ) -> Result<Self, WeightError> {
        Self::of(format, rows, columns, Held::Shared(bytes))
    }

    fn of(
        format: Format,
        rows: usize,
        columns: usize,
        bytes: Held<'a>,
    ) -> Result<Self, WeightError> {
        let block = format.block();
        if !columns.is_multiple_of(block) {
            return Err(WeightError::Columns { columns, block });
        }
        let expected = (columns / block)
            .checked_mul(format.block_bytes())
            .and_then(|row| row.checked_mul(rows));
        if expected != Some(bytes.len()) {
            return Err(WeightError::Bytes {
                expected,
                found: bytes.len(),
            });
        }
        Ok(Self {
            format,
            rows,
            columns,
            bytes,
        })
    }

    /// From numbers in single precision, `[rows, columns]`.
    ///
    /// # Errors
    /// [`WeightError`] if there are not as many.
    pub fn from_f32(x: &'a [f32], rows: usize, columns: usize) -> Result<Self, WeightError> {
        // SAFETY: any bytes of f32 may be read as bytes.
        let bytes = unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), size_of_val(x)) };
        Self::new(Format::F32, rows, columns, bytes)
    }

    /// The type of the numbers.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The bytes, row by row.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A row in single precision (an embedding, say).
    ///
    /// # Panics
    /// If there is no such row, or `out` has another length than a row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        self.row_with(Isa::best(), row, out);
    }

    fn row_with(&self, isa: Isa, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.columns, "length of a row");
        assert!(row < self.rows, "row {row} of {}", self.rows);
        dispatch!(isa, s => convert(s, self, row, 0..self.columns, out));
    }

    fn row_bytes(&self) -> usize {
        self.columns / self.format.block() * self.format.block_bytes()
    }
}

/// `out = x · Wᵀ`.
///
/// # Shapes
/// - `x`: `[tokens, columns]`
/// - `out`: `[tokens, rows]`
///
/// Numbers that are not finite reach the outputs that they take part in.
///
/// # Panics
/// If the lengths don't fit each other.
pub fn matmul(x: &[f32], weight: &Weight<'_>, out: &mut [f32]) {
    matmul_with(Isa::best(), &[x], &[weight], false, &mut [out]);
}

/// Several products of the same input side by side (queries, keys and values; gate and up), with
/// one start of the threads and one packing. Inputs may come from several places and outputs go to
/// several, so that nothing has to be put together before or taken apart afterwards: `[outs₁ outs₂ …] =
/// [xs₁ xs₂ …] · [W₁; W₂; …]ᵀ`. Formats may differ, and where the outputs are divided is independent of
/// where the weights are.
///
/// # Shapes
/// - `xs`: `[tokens, columns]` each, whose columns add up to those of each weight
/// - `outs`: `[tokens, rows]` each, whose rows add up to those of all weights
///
/// # Panics
/// If the lengths don't fit each other.
pub fn matmul_between(xs: &[&[f32]], weights: &[&Weight<'_>], outs: &mut [&mut [f32]]) {
    matmul_with(Isa::best(), xs, weights, false, outs);
}

/// [`matmul_between`] where few tokens (decode) meet packed weights with activations of eight bits.
///
/// Each block of 32 activations is rounded to multiples of its largest magnitude over 127, as
/// engines that read GGUF files commonly do, so that products are whole numbers. A block's part of an
/// output is off by at most that step, halved, times the sum of the magnitudes of its weights (for 4
/// bits: of `scale · (q - 8)`; minima meet exact sums). Weights of float types, and more than eight
/// tokens at once, are computed as by [`matmul_between`].
///
/// A block with an activation that is not finite makes the outputs of its token NaN.
///
/// # Shapes
/// As [`matmul_between`].
///
/// # Panics
/// If the lengths don't fit each other.
pub fn matmul_rounded(xs: &[&[f32]], weights: &[&Weight<'_>], outs: &mut [&mut [f32]]) {
    matmul_with(Isa::best(), xs, weights, true, outs);
}

/// Up to this many tokens, weights are read row by row.
const FEW: usize = 8;

/// Weights in a job of few tokens, about.
const FEW_JOB: usize = 1 << 15;

/// Below this many multiply-adds the calling thread does all.
const SERIAL: usize = 1 << 16;

/// Rows in a job of many tokens, at most; whole groups of any inner loop.
const ROWS: usize = 96;

/// Rows in a job of many tokens, of a matrix that has `rows`: an even number of jobs, so that two
/// threads end together, and whole vectors.
fn job_rows(rows: usize) -> usize {
    let jobs = rows.div_ceil(ROWS);
    if jobs == 1 {
        return ROWS;
    }
    rows.div_ceil(jobs.next_multiple_of(2)).next_multiple_of(16)
}

/// Columns that are converted at a time, at most: a panel of as many fits the second cache beside the
/// activations that it meets.
const DEEPEST: usize = 1536;

/// Columns that are converted at a time: pieces of a row of about the same length, in whole blocks.
fn depth(columns: usize) -> usize {
    let pieces = columns.div_ceil(DEEPEST);
    columns.div_ceil(pieces).next_multiple_of(BLOCK)
}

/// Columns between two requests for what is converted next: no more at a time than a processor can wait
/// for beside its work.
const STEP: usize = 192;

/// Tokens in a job of many tokens.
const TOKENS: usize = 512;

fn matmul_with(
    isa: Isa,
    xs: &[&[f32]],
    weights: &[&Weight<'_>],
    rounded: bool,
    outs: &mut [&mut [f32]],
) {
    let Some(columns) = weights.first().map(|w| w.columns) else {
        assert!(
            outs.iter().all(|out| out.is_empty()),
            "an output without weights"
        );
        return;
    };
    assert!(
        weights.iter().all(|w| w.columns == columns),
        "fused weights have the same columns"
    );
    let rows: usize = weights.iter().map(|w| w.rows).sum();
    if rows == 0 || columns == 0 {
        outs.iter_mut().for_each(|out| out.fill(0.0));
        return;
    }
    let inputs: usize = xs.iter().map(|x| x.len()).sum();
    let outputs: usize = outs.iter().map(|out| out.len()).sum();
    let tokens = inputs / columns;
    let whole = |part: usize| tokens == 0 || part.is_multiple_of(tokens);
    assert!(
        inputs == tokens * columns
            && outputs == tokens * rows
            && xs.iter().all(|x| whole(x.len()))
            && outs.iter().all(|out| whole(out.len())),
        "{inputs} inputs and {outputs} outputs for {weights:?}"
    );
    if tokens == 0 {
        return;
    }
    let serial = tokens * rows * columns < SERIAL || rayon::current_num_threads() == 1;
    if tokens <= FEW {
        match xs {
            [x] => few_tokens(isa, x, tokens, weights, rounded, outs, serial),
            _ => {
                let joined = joined(xs, tokens, columns);
                few_tokens(isa, &joined, tokens, weights, rounded, outs, serial);
            }
        }
    } else {
        many_tokens(isa, xs, tokens, weights, outs, serial);
    }
}

/// `[tokens, columns]` of parts that lie elsewhere.
fn joined(xs: &[&[f32]], tokens: usize, columns: usize) -> Vec<f32> {
    let mut joined = Vec::with_capacity(tokens * columns);
    for token in 0..tokens {
        for x in xs {
            let width = x.len() / tokens;
            joined.extend_from_slice(&x[token * width..(token + 1) * width]);
        }
    }
    joined
}

/// Rows of one weight and where their outputs stand.
#[derive(Debug, Clone)]
struct Job {
    weight: usize,
    rows: Range<usize>,
    /// The output and its column that the first row goes to.
    out: usize,
    column: usize,
}

/// Cuts weights into jobs of at most `size(rows of the weight)` rows, whose outputs are of one part:
/// `widths` are the columns of the parts.
fn jobs(weights: &[&Weight<'_>], widths: &[usize], size: impl Fn(usize) -> usize) -> Vec<Job> {
    let mut jobs = Vec::new();
    let (mut out, mut column) = (0, 0);
    for (weight, w) in weights.iter().enumerate() {
        let mut start = 0;
        while start < w.rows {
            while column == widths[out] {
                (out, column) = (out + 1, 0);
            }
            let rows = size(w.rows).min(w.rows - start).min(widths[out] - column);
            jobs.push(Job {
                weight,
                rows: start..start + rows,
                out,
                column,
            });
            start += rows;
            column += rows;
        }
    }
    jobs
}

fn few_tokens(
    isa: Isa,
    x: &[f32],
    tokens: usize,
    weights: &[&Weight<'_>],
    rounded: bool,
    outs: &mut [&mut [f32]],
    serial: bool,
) {
    let widths: Vec<usize> = outs.iter().map(|out| out.len() / tokens).collect();
    let (columns, rows) = (x.len() / tokens, widths.iter().sum::<usize>());
    let packed = weights.iter().any(|w| w.format.block() > 1);
    // Sums over blocks of the activations, which packed weights with an offset need.
    let offsets = weights
        .iter()
        .any(|w| matches!(w.format, Format::Q4_0 | Format::Q4_1));
    let (layout, sum_layout) = (Rounded::new(columns), Sums::new(columns));
    let lengths = [
        if offsets && !rounded {
            tokens * sum_layout.len()
        } else {
            0
        },
        if packed && rounded {
            tokens * layout.len()
        } else {
            0
        },
        if tokens == 1 { 0 } else { tokens * rows },
        x.len(),
    ];
    let mut memory = Scratch::for_lengths(&lengths);
    let [sums, records, turned, aligned] = memory.slices(lengths);
    // Each vector of activations is loaded once for each row: half as fast where it lies in two lines
    // of the cache.
    aligned.copy_from_slice(x);
    let x = &*aligned;
    if packed && rounded {
        for (x, record) in x
            .chunks_exact(columns)
            .zip(records.chunks_exact_mut(layout.len()))
        {
            dispatch!(isa, s => layout.round(s, x, record));
        }
    } else if offsets {
        let each = x.chunks_exact(columns);
        for (x, sums) in each.zip(sums.chunks_exact_mut(sum_layout.len())) {
            dispatch!(isa, s => sum_layout.of(s, x, sums));
        }
    }
    let input = FewInput {
        x,
        stride: columns,
        sums,
        tokens,
        columns,
    };
    let rounded_input = FewInput {
        x: records,
        stride: layout.len(),
        ..input
    };
    let job = (FEW_JOB / columns).next_multiple_of(4).max(4);
    let jobs = jobs(weights, &widths, |_| job);
    let run = |(job, out): (Job, &mut [f32])| {
        let weight = weights[job.weight];
        let rounded = rounded && weight.format.block() > 1;
        let input = if rounded { rounded_input } else { input };
        dispatch!(isa, s => few_rows(s, weight, job.rows, input, rounded, out));
    };
    let run_all = |parts: Vec<(Job, &mut [f32])>| {
        if serial {
            parts.into_iter().for_each(run);
        } else {
            parts.into_par_iter().for_each(run);
        }
    };
    // Outputs by row of the weights, then by token: for one token that is the order of the outputs.
    if tokens == 1 {
        let mut rests: Vec<&mut [f32]> = outs.iter_mut().map(|out| &mut **out).collect();
        let parts = jobs.into_iter().map(|job| {
            let part = front(&mut rests[job.out], job.rows.len());
            (job, part)
        });
        run_all(parts.collect());
        return;
    }
    let mut rest = &mut *turned;
    let parts = jobs.into_iter().map(|job| {
        let part = front(&mut rest, job.rows.len() * tokens);
        (job, part)
    });
    run_all(parts.collect());
    let mut by_row = turned.chunks_exact(tokens);
    for (out, width) in outs.iter_mut().zip(widths) {
        for column in 0..width {
            let row = by_row.next().unwrap_or_default();
            for (token, x) in row.iter().enumerate() {
                out[token * width + column] = *x;
            }
        }
    }
}

/// Takes the first `n` numbers of a slice.
fn front<'a>(rest: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (part, tail) = std::mem::take(rest).split_at_mut(n);
    *rest = tail;
    part
}

/// The activations of few tokens.
#[derive(Clone, Copy)]
struct FewInput<'a> {
    /// `[tokens, stride]`: activations, or what [`Rounded`] makes of them.
    x: &'a [f32],
    /// Numbers of a token in `x`.
    stride: usize,
    /// [`Sums`] of each token.
    sums: &'a [f32],
    tokens: usize,
    columns: usize,
}

/// What the heads of packed blocks meet, for each token: `[0, Σ x]` for each block of activations, for
/// blocks that have a minimum, and then `[-8 Σ x, 0]`, for those that have none.
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

    /// Where what blocks without a minimum meet begins.
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
const fn padded_blocks(columns: usize) -> usize {
    (columns / BLOCK + 7).next_multiple_of(8)
}

/// `out` `[rows, tokens]`.
#[inline(always)]
fn few_rows<S: Simd>(
    s: S,
    weight: &Weight<'_>,
    rows: Range<usize>,
    input: FewInput<'_>,
    rounded: bool,
    out: &mut [f32],
) {
    match (weight.format, rounded) {
        (Format::F32, _) => few_of::<S, Float<f32>>(s, weight, rows, input, out),
        (Format::F16, _) => few_of::<S, Float<f16>>(s, weight, rows, input, out),
        (Format::Bf16, _) => few_of::<S, Float<bf16>>(s, weight, rows, input, out),
        (Format::Q8_0, false) => few_of::<S, Bytes>(s, weight, rows, input, out),
        (Format::Q4_0, false) => few_of::<S, Nibbles<false>>(s, weight, rows, input, out),
        (Format::Q4_1, false) => few_of::<S, Nibbles<true>>(s, weight, rows, input, out),
        (Format::Q8_0, true) => few_of::<S, Whole<Bytes>>(s, weight, rows, input, out),
        (Format::Q4_0, true) => few_of::<S, Whole<Nibbles<false>>>(s, weight, rows, input, out),
        (Format::Q4_1, true) => few_of::<S, Whole<Nibbles<true>>>(s, weight, rows, input, out),
    }
}

#[inline(always)]
fn few_of<S: Simd, D: Dot>(
    s: S,
    weight: &Weight<'_>,
    rows: Range<usize>,
    input: FewInput<'_>,
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
    input: FewInput<'_>,
    token: usize,
    out: &mut [f32],
) {
    let (columns, row_bytes) = (input.columns, weight.row_bytes());
    assert!(from + n <= weight.rows && weight.bytes.len() == weight.rows * row_bytes);
    assert!(input.x.len() >= (token + T) * input.stride && weight.columns == columns);
    assert!(input.stride >= D::numbers::<S>(columns));
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
            xs[t] = input.x[(token + t) * input.stride..].as_ptr();
            if D::SUMS {
                sums[t] = input.sums[(token + t) * sum_layout.len()..].as_ptr();
            }
        }
        // SAFETY: each row has `row_bytes` bytes, each token as many numbers as the format needs
        // and a vector for each block where it needs them (all checked above).
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
const AHEAD: usize = 4096;

/// A format's dot products and conversion.
trait Dot {
    /// Whether it needs [`Sums`].
    const SUMS: bool;

    /// Numbers of a token of `columns` activations.
    fn numbers<S: Simd>(columns: usize) -> usize {
        columns
    }

    /// Dot products of `R` rows with `T` tokens.
    ///
    /// # Safety
    /// Each of `rows` must be valid for reading the bytes of a row of `columns` numbers, each of
    /// `x` for [`Self::numbers`], and if [`Self::SUMS`] each of `sums` for [`Sums`] of a token.
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        x: [*const f32; T],
        sums: [*const f32; T],
    ) -> [[f32; T]; R];
}

/// A format's conversion.
trait Convert {
    /// Some numbers of a row, from a multiple of the block on, in whole blocks.
    ///
    /// # Safety
    /// `row` must be valid for reading the bytes of a row that has the numbers from `from` on that
    /// fill `out`.
    unsafe fn convert<S: Simd>(s: S, row: *const u8, from: usize, out: &mut [f32]);
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

/// Plain floats.
struct Float<E>(std::marker::PhantomData<E>);

impl<E: Element> Dot for Float<E> {
    const SUMS: bool = false;

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
                let weight = unsafe { rows[r].cast::<E>().wrapping_add(c).read_unaligned().get() };
                for t in 0..T {
                    // SAFETY: c < columns.
                    out[r][t] += weight * unsafe { *x[t].add(c) };
                }
            }
        }
        out
    }
}

impl<E: Element> Convert for Float<E> {
    #[inline(always)]
    unsafe fn convert<S: Simd>(s: S, row: *const u8, from: usize, out: &mut [f32]) {
        let row = row.cast::<E>().wrapping_add(from);
        let whole = out.len() - out.len() % S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            // SAFETY: the row has as many numbers as `out`; loads need no alignment.
            store(s, &mut out[i..], unsafe { E::load(s, row.wrapping_add(i)) });
        }
        for (i, out) in out.iter_mut().enumerate().skip(whole) {
            // SAFETY: as above.
            *out = unsafe { row.wrapping_add(i).read_unaligned().get() };
        }
    }
}

/// Two bytes as they stand.
///
/// # Safety
/// `p` must be valid for reading two bytes.
#[inline(always)]
unsafe fn half_at(p: *const u8) -> u16 {
    // SAFETY: promised by the caller.
    u16::from_le_bytes(unsafe { p.cast::<[u8; 2]>().read() })
}

/// `Q8_0`
struct Bytes;

impl Dot for Bytes {
    const SUMS: bool = false;

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
                // SAFETY: the row has a block of 34 bytes here, each token 32 numbers.
                unsafe {
                    let at = rows[r].add(block * 34);
                    s.prefetch(at.wrapping_add(AHEAD));
                    let scale = s.splat_f16(half_at(at));
                    let mut sums = [s.splat(0.0); T];
                    for i in (0..BLOCK).step_by(S::LANES) {
                        let weight = s.load_i8(at.add(2 + i).cast());
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

impl Convert for Bytes {
    #[inline(always)]
    unsafe fn convert<S: Simd>(s: S, row: *const u8, from: usize, out: &mut [f32]) {
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            // SAFETY: the row has a block of 34 bytes for each 32 numbers of `out`.
            unsafe {
                let at = row.add((from / BLOCK + block) * 34);
                let scale = s.splat_f16(half_at(at));
                for i in (0..BLOCK).step_by(S::LANES) {
                    store(
                        s,
                        &mut out[i..],
                        s.mul(scale, s.load_i8(at.add(2 + i).cast())),
                    );
                }
            }
        }
    }
}

/// `Q4_1`, or `Q4_0` without a minimum.
struct Nibbles<const MINIMUM: bool>;

impl<const MINIMUM: bool> Nibbles<MINIMUM> {
    /// Scale and minimum of a block.
    ///
    /// # Safety
    /// `at` must be valid for reading a block.
    #[inline(always)]
    unsafe fn head<S: Simd>(s: S, at: *const u8) -> (S::V, S::V) {
        // SAFETY: a block starts with one or two halves.
        unsafe {
            let scale = s.splat_f16(half_at(at));
            let minimum = if MINIMUM {
                s.splat_f16(half_at(at.add(2)))
            } else {
                s.mul(scale, s.splat(-8.0))
            };
            (scale, minimum)
        }
    }
}

impl<const MINIMUM: bool> Nibbles<MINIMUM> {
    /// `N` blocks (at most `LANES / 2`) of a row from block `first` on, added to sums of every other
    /// block and of what the heads meet: no addition waits for the one before it.
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
            let heads = s.load_heads(row, Self::BYTES, N, MINIMUM);
            for t in 0..T {
                acc[t][2] = s.fma(heads, s.load(sums[t].add(2 * first)), acc[t][2]);
            }
            for i in 0..N {
                let at = row.add(i * Self::BYTES);
                s.prefetch(at.wrapping_add(AHEAD));
                let mut dot = [s.splat(0.0); T];
                for j in (0..BLOCK / 2).step_by(S::LANES) {
                    let (low, high) = s.load_nibbles(at.add(Self::HEAD + j));
                    for t in 0..T {
                        let x = x[t].add((first + i) * BLOCK + j);
                        dot[t] = s.fma(low, s.load(x), dot[t]);
                        dot[t] = s.fma(high, s.load(x.add(BLOCK / 2)), dot[t]);
                    }
                }
                let scale = s.splat_lane(heads, 2 * i);
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
                let [even, odd, heads] = parts[t];
                acc[r][t] = s.add(s.add(even, odd), heads);
            }
        }
        sum_all(s, acc)
    }
}

impl<const MINIMUM: bool> Convert for Nibbles<MINIMUM> {
    #[inline(always)]
    unsafe fn convert<S: Simd>(s: S, row: *const u8, from: usize, out: &mut [f32]) {
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let (lows, highs) = out.split_at_mut(BLOCK / 2);
            // SAFETY: the row has a block for each 32 numbers of `out`.
            unsafe {
                let at = row.add((from / BLOCK + block) * Self::BYTES);
                let (scale, minimum) = Self::head(s, at);
                for i in (0..BLOCK / 2).step_by(S::LANES) {
                    let (low, high) = s.load_nibbles(at.add(Self::HEAD + i));
                    store(s, &mut lows[i..], s.fma(scale, low, minimum));
                    store(s, &mut highs[i..], s.fma(scale, high, minimum));
                }
            }
        }
    }
}

/// Activations of a token, rounded in blocks to `step · code` with `code` in `-127..=127`, as one
/// slice of numbers.
///
/// With `c = Σ step · code`, a dot product with `scale · (q - 8)` is `scale · (step · Σ q · code -
/// 8 c)`. One with `scale · q + minimum` is rounded the same: `scale · (step · Σ q · code + 8 (Σ x
/// - c)) + minimum · Σ x`, so that what is rounded meets codes around 0 and what is added is exact.
#[derive(Clone, Copy)]
struct Rounded {
    /// Blocks, and zeros beyond them, so that a vector can be read from any block on.
    blocks: usize,
}

impl Rounded {
    fn new(columns: usize) -> Self {
        Self {
            blocks: padded_blocks(columns),
        }
    }

    /// Where `[step, 0]` of each block begin, after 32 codes of each in the place of eight numbers.
    const fn steps(self) -> usize {
        8 * self.blocks
    }

    /// Where what a block's scale and second half meet begin: `[8 (Σ x - c), Σ x]`.
    const fn with_minimum(self) -> usize {
        10 * self.blocks
    }

    /// The same for blocks without a second half: `[-8 c, 0]`.
    const fn without_minimum(self) -> usize {
        12 * self.blocks
    }

    /// Numbers in all.
    const fn len(self) -> usize {
        14 * self.blocks
    }

    #[inline(always)]
    fn round<S: Simd>(self, s: S, x: &[f32], out: &mut [f32]) {
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
trait Codes {
    /// Bytes of a block.
    const BYTES: usize;
    /// Bytes before the codes.
    const HEAD: usize;
    /// Whether the head has a second half.
    const MINIMUM: bool;
    /// Where in a token what the heads meet begins, if something is added at all.
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
    const BYTES: usize = 34;
    const HEAD: usize = 2;
    const MINIMUM: bool = false;

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
    const BYTES: usize = if MINIMUM { 20 } else { 18 };
    const HEAD: usize = if MINIMUM { 4 } else { 2 };
    const MINIMUM: bool = MINIMUM;

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

/// Dot products with [`Rounded`] activations.
struct Whole<C>(std::marker::PhantomData<C>);

impl<C: Codes> Whole<C> {
    /// `N` blocks (at most `LANES / 2`) of one row from block `first` on.
    ///
    /// # Safety
    /// The row must have these blocks, and `x` be [`Rounded`] tokens of as many.
    #[inline(always)]
    unsafe fn group<S: Simd, const T: usize, const N: usize>(
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
            let heads = s.load_heads(row, C::BYTES, N, C::MINIMUM);
            let mut scales = [heads; T];
            for t in 0..T {
                let steps = s.load(x[t].add(layout.steps() + 2 * first));
                scales[t] = s.mul(heads, steps);
                if let Some(added) = C::added(layout) {
                    let added = s.load(x[t].add(added + 2 * first));
                    sums[t][2] = s.fma(heads, added, sums[t][2]);
                }
            }
            for i in 0..N {
                let at = row.add(i * C::BYTES);
                s.prefetch(at.wrapping_add(AHEAD));
                let codes = C::load(s, at.add(C::HEAD));
                for t in 0..T {
                    let dot = C::dot(s, codes, x[t].add(8 * (first + i)).cast());
                    let scale = s.splat_lane(scales[t], 2 * i);
                    sums[t][i % 2] = s.fma(scale, dot, sums[t][i % 2]);
                }
            }
        }
    }
}

impl<C: Codes> Dot for Whole<C> {
    const SUMS: bool = false;

    fn numbers<S: Simd>(columns: usize) -> usize {
        Rounded::new(columns).len()
    }

    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        x: [*const f32; T],
        _: [*const f32; T],
    ) -> [[f32; T]; R] {
        let (blocks, layout) = (columns / BLOCK, Rounded::new(columns));
        let mut acc = [[s.splat(0.0); T]; R];
        for r in 0..R {
            let (row, mut sums) = (rows[r], [[s.splat(0.0); 3]; T]);
            let mut at = 0;
            // SAFETY: the row has the blocks before `blocks`, and so has each token.
            unsafe {
                while S::LANES == 16 && at + 8 <= blocks {
                    Self::group::<S, T, 8>(s, row, at, layout, x, &mut sums);
                    at += 8;
                }
                while S::LANES >= 8 && at + 4 <= blocks {
                    Self::group::<S, T, 4>(s, row, at, layout, x, &mut sums);
                    at += 4;
                }
                while at + 2 <= blocks {
                    Self::group::<S, T, 2>(s, row, at, layout, x, &mut sums);
                    at += 2;
                }
                if at < blocks {
                    Self::group::<S, T, 1>(s, row, at, layout, x, &mut sums);
                }
            }
            for t in 0..T {
                acc[r][t] = s.add(s.add(sums[t][0], sums[t][1]), sums[t][2]);
            }
        }
        sum_all(s, acc)
    }
}

/// Numbers of a row in single precision; `columns` are whole blocks.
#[inline(always)]
fn convert<S: Simd>(s: S, weight: &Weight<'_>, row: usize, columns: Range<usize>, out: &mut [f32]) {
    let (block, row_bytes) = (weight.format.block(), weight.row_bytes());
    assert!(row < weight.rows && columns.end <= weight.columns && out.len() == columns.len());
    assert!(columns.start.is_multiple_of(block) && columns.len().is_multiple_of(block));
    let at = weight.bytes[row * row_bytes..(row + 1) * row_bytes].as_ptr();
    // SAFETY: `at` is a row of whole blocks that has these columns.
    unsafe {
        match weight.format {
            Format::F32 => Float::<f32>::convert(s, at, columns.start, out),
            Format::F16 => Float::<f16>::convert(s, at, columns.start, out),
            Format::Bf16 => Float::<bf16>::convert(s, at, columns.start, out),
            Format::Q8_0 => Bytes::convert(s, at, columns.start, out),
            Format::Q4_0 => Nibbles::<false>::convert(s, at, columns.start, out),
            Format::Q4_1 => Nibbles::<true>::convert(s, at, columns.start, out),
        }
    }
}

/// Asks for the memory of up to `n` columns of a row, if there is such a row.
#[inline(always)]
fn fetch<S: Simd>(s: S, weight: &Weight<'_>, row: usize, column: usize, n: usize) {
    if row < weight.rows && column < weight.columns {
        let format = weight.format;
        let bytes = |columns: usize| columns / format.block() * format.block_bytes();
        let at = row * weight.row_bytes() + bytes(column);
        let end = at + bytes(n.min(weight.columns - column));
        for line in (at..end).step_by(64) {
            s.prefetch(weight.bytes.as_ptr().wrapping_add(line));
        }
    }
}

/// Columns of the output, which jobs write side by side.
#[derive(Clone, Copy)]
struct Columns {
    out: *mut f32,
    /// Numbers in a row of the output.
    stride: usize,
    tokens: usize,
}

// SAFETY: jobs on different threads write different columns (see `write`).
unsafe impl Send for Columns {}
// SAFETY: as above.
unsafe impl Sync for Columns {}

impl Columns {
    /// Where `n` numbers of a token start, from `column` on.
    #[inline(always)]
    fn at(self, token: usize, column: usize, n: usize) -> *mut f32 {
        assert!(token < self.tokens && column + n <= self.stride);
        self.out.wrapping_add(token * self.stride + column)
    }

    /// Reads `n` numbers of a token, from `column` on; lanes beyond them are 0.
    ///
    /// # Safety
    /// No other thread may write these columns, and the output must still be borrowed.
    #[inline(always)]
    unsafe fn read<S: Simd, const N: usize>(
        self,
        s: S,
        token: usize,
        column: usize,
        n: usize,
        to: &mut [S::V; N],
    ) {
        let mut from = self.at(token, column, n).cast_const();
        let mut part = [0.0; WIDEST];
        if n < N * S::LANES {
            // SAFETY: `at` has checked that there are as many; these are other numbers than the copy.
            unsafe { part[..n].as_mut_ptr().copy_from_nonoverlapping(from, n) };
            from = part[..N * S::LANES].as_ptr();
        }
        for (v, to) in to.iter_mut().enumerate() {
            // SAFETY: N vectors, of the output or of the copy.
            *to = unsafe { s.load(from.add(v * S::LANES)) };
        }
    }

    /// Writes `n` numbers of a token, from `column` on; lanes beyond them are left out.
    ///
    /// # Safety
    /// No other thread may access these columns, and the output must still be borrowed.
    #[inline(always)]
    unsafe fn write<S: Simd, const N: usize>(
        self,
        s: S,
        token: usize,
        column: usize,
        n: usize,
        sums: &[S::V; N],
    ) {
        let to = self.at(token, column, n);
        if n >= N * S::LANES {
            for (v, sums) in sums.iter().enumerate() {
                // SAFETY: `at` has checked that there is room for N vectors.
                unsafe { s.store(to.add(v * S::LANES), *sums) };
            }
            return;
        }
        let mut part = [0.0; WIDEST];
        for (to, sums) in part.chunks_exact_mut(S::LANES).zip(sums) {
            store(s, to, *sums);
        }
        // SAFETY: as above, for `n` numbers; the copy is elsewhere.
        unsafe { to.copy_from_nonoverlapping(part[..n].as_ptr(), n) };
    }
}

fn many_tokens(
    isa: Isa,
    xs: &[&[f32]],
    tokens: usize,
    weights: &[&Weight<'_>],
    outs: &mut [&mut [f32]],
    serial: bool,
) {
    let widths: Vec<usize> = xs.iter().map(|x| x.len() / tokens).collect();
    let columns: usize = widths.iter().sum();
    let outs: Vec<Columns> = (outs.iter_mut())
        .map(|out| Columns {
            out: out.as_mut_ptr(),
            stride: out.len() / tokens,
            tokens,
        })
        .collect();
    let strides: Vec<usize> = outs.iter().map(|out| out.stride).collect();
    let jobs = jobs(weights, &strides, job_rows);
    for first in (0..tokens).step_by(TOKENS) {
        let input = Input {
            xs,
            widths: &widths,
            columns,
            tokens: first..tokens.min(first + TOKENS),
        };
        let run = |job: &Job| {
            let out = outs[job.out];
            dispatch!(isa, s => many_rows(s, weights[job.weight], job, &input, out));
        };
        if serial {
            jobs.iter().for_each(run);
        } else {
            jobs.par_iter().with_max_len(1).for_each(run);
        }
    }
}

/// The activations of many tokens, which are read where they lie.
struct Input<'a> {
    xs: &'a [&'a [f32]],
    widths: &'a [usize],
    /// The sum of the widths.
    columns: usize,
    /// Those that are read now.
    tokens: Range<usize>,
}

/// Rows of weights become panels, whose lanes are the rows: outputs are then written as they lie, and
/// an activation is read wherever it lies, for it meets a vector of weights at a time.
#[inline(always)]
fn many_rows<S: Simd>(s: S, weight: &Weight<'_>, job: &Job, input: &Input<'_>, out: Columns) {
    let (n, columns) = (job.rows.len(), input.columns);
    let deep = depth(columns);
    let widest = panels(S::LANES, n).map(|p| p.len()).max().unwrap_or(0);
    let lengths = [S::LANES * deep, widest * deep];
    let mut memory = Scratch::for_lengths(&lengths);
    let [converted, panel] = memory.slices(lengths);
    for from in (0..columns).step_by(deep) {
        let to = columns.min(from + deep);
        let depth = to - from;
        for lanes in panels(S::LANES, n) {
            let width = lanes.len();
            let panel = &mut panel[..depth * width];
            for first in lanes.clone().step_by(S::LANES) {
                let rows =
                    job.rows.start + first..job.rows.end.min(job.rows.start + first + S::LANES);
                let (mut group, m): ([&[f32]; 16], usize) = ([&[]; 16], rows.len());
                for ((row, near), group) in
                    rows.zip(converted.chunks_exact_mut(depth)).zip(&mut group)
                {
                    convert(s, weight, row, from..to, near);
                    *group = near;
                }
                pack_lanes(s, &group[..m], depth, first - lanes.start, width, panel);
            }
            let mut block = Block {
                weight,
                // More rows, columns further on, or another job's rows.
                next: match () {
                    () if lanes.end < n => (job.rows.start + lanes.end, from),
                    () if to < columns => (job.rows.start, to),
                    () => (job.rows.end, 0),
                },
                tokens: input.tokens.clone(),
                stride: 0,
                depth: 0,
                from_zero: false,
                out,
                column: job.column + lanes.start,
                rows: width.min(n - lanes.start),
            };
            let mut start = 0;
            for (x, stride) in input.xs.iter().zip(input.widths) {
                let (low, high) = (start.max(from), to.min(start + stride));
                if low < high {
                    (block.stride, block.depth) = (*stride, high - low);
                    block.from_zero = low == 0;
                    let (x, panel) = (&x[low - start..], &panel[(low - from) * width..]);
                    match width / S::LANES {
                        1 => block.run::<S, 1>(s, x, panel),
                        2 => block.run::<S, 2>(s, x, panel),
                        _ if S::LANES == 16 => block.run::<S, 3>(s, x, panel),
                        _ => unreachable!("panels have at most two vectors here"),
                    }
                    block.next.1 += high - low;
                }
                start += stride;
            }
        }
    }
}

/// Many tokens meet a panel of weights.
struct Block<'a> {
    weight: &'a Weight<'a>,
    /// The row and the column of what is converted next.
    next: (usize, usize),
    tokens: Range<usize>,
    /// Numbers from a token to the next one.
    stride: usize,
    /// Columns that take part.
    depth: usize,
    /// Whether these are the first columns.
    from_zero: bool,
    out: Columns,
    /// The column of the output that the first row goes to.
    column: usize,
    /// Rows in the panel, whose other lanes are 0.
    rows: usize,
}

/// Numbers in the widest panel's rows.
const WIDEST: usize = 48;

impl Block<'_> {
    /// `out[t, r] += Σ_k x[t, k] · panel[k, r]` for panels of `N` vectors.
    #[inline(always)]
    fn run<S: Simd, const N: usize>(&self, s: S, x: &[f32], panel: &[f32]) {
        let width = N * S::LANES;
        assert!(panel.len() >= self.depth * width && self.rows <= width && width <= WIDEST);
        let mut t = self.tokens.start;
        if S::LANES == 16 || N == 1 {
            t = self.go::<S, 8, N>(s, t, x, panel);
        } else {
            t = self.go::<S, 6, N>(s, t, x, panel);
        }
        t = self.go::<S, 4, N>(s, t, x, panel);
        t = self.go::<S, 2, N>(s, t, x, panel);
        self.go::<S, 1, N>(s, t, x, panel);
    }

    #[inline(always)]
    fn go<S: Simd, const B: usize, const N: usize>(
        &self,
        s: S,
        from: usize,
        x: &[f32],
        panel: &[f32],
    ) -> usize {
        let (depth, width) = (self.depth, N * S::LANES);
        let each = (B * width).div_ceil(self.tokens.len());
        let mut t = from;
        while t + B <= self.tokens.end {
            let x = &x[t * self.stride..(t + B - 1) * self.stride + depth];
            let mut acc = [[s.splat(0.0); N]; B];
            if !self.from_zero {
                for (b, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: these columns are our job's.
                    unsafe { self.out.read(s, t + b, self.column, self.rows, acc) };
                }
            }
            let next = self.next.0 + (t - self.tokens.start) / B * each;
            for k in (0..depth).step_by(STEP) {
                for row in next..(next + each).min(self.next.0 + width) {
                    fetch(s, self.weight, row, self.next.1 + k, STEP);
                }
                let steps = STEP.min(depth - k);
                // SAFETY: B rows of `depth` numbers, `stride` apart (sliced just before); `panel` has as
                // many rows of N vectors (checked by `run`).
                unsafe {
                    let (x, panel) = (x.as_ptr().add(k), panel.as_ptr().add(k * width));
                    outer(s, steps, x, self.stride, 1, panel, &mut acc);
                }
            }
            for (b, acc) in acc.iter().enumerate() {
                // SAFETY: as above.
                unsafe { self.out.write(s, t + b, self.column, self.rows, acc) };
            }
            t += B;
        }
        t
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Numbers;
    use proptest::prelude::*;

    const FORMATS: [Format; 6] = [
        Format::F32,
        Format::F16,
        Format::Bf16,
        Format::Q8_0,
        Format::Q4_0,
        Format::Q4_1,
    ];

    /// Bytes of a matrix and what they stand for, by the definition of the format.
    fn matrix(format: Format, rows: usize, columns: usize, seed: u64) -> (Vec<u8>, Vec<f32>) {
        let mut rng = Numbers::new(seed);
        let mut bytes = Vec::new();
        let mut numbers = Vec::new();
        for _ in 0..rows * columns / format.block() {
            let random = rng.take(34);
            let half = |x: f32, bytes: &mut Vec<u8>| {
                let x = f16::from_f32(x);
                bytes.extend(x.to_le_bytes());
                x.to_f32()
            };
            let byte = |i: usize| (random[i] * 128.0).floor() as i8;
            match format {
                Format::F32 => {
                    bytes.extend(random[0].to_le_bytes());
                    numbers.push(random[0]);
                }
                Format::F16 => numbers.push(half(random[0], &mut bytes)),
                Format::Bf16 => {
                    let x = bf16::from_f32(random[0]);
                    bytes.extend(x.to_le_bytes());
                    numbers.push(x.to_f32());
                }
                Format::Q8_0 => {
                    let scale = half(random[33] / 128.0, &mut bytes);
                    for i in 0..32 {
                        bytes.push(byte(i) as u8);
                        numbers.push(scale * f32::from(byte(i)));
                    }
                }
                Format::Q4_0 | Format::Q4_1 => {
                    let scale = half(random[33] / 8.0, &mut bytes);
                    let minimum = match format {
                        Format::Q4_1 => half(random[32], &mut bytes),
                        _ => -8.0 * scale,
                    };
                    bytes.extend((0..16).map(|i| byte(i) as u8));
                    let value = |q: u8| scale * f32::from(q) + minimum;
                    numbers.extend((0..16).map(|i| value(byte(i) as u8 & 15)));
                    numbers.extend((0..16).map(|i| value(byte(i) as u8 >> 4)));
                }
            }
        }
        (bytes, numbers)
    }

    /// `x · Wᵀ` in double precision, and the same of magnitudes as a measure of rounding.
    fn oracle(x: &[f32], w: &[f32], columns: usize) -> Vec<(f64, f64)> {
        let mut out = Vec::new();
        for x in x.chunks(columns) {
            for w in w.chunks(columns) {
                let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                out.push((products.clone().sum(), products.map(f64::abs).sum()));
            }
        }
        out
    }

    /// The part of each row between two columns.
    fn cut(x: &[f32], columns: usize, part: Range<usize>) -> Vec<f32> {
        let rows = x.chunks(columns.max(1));
        rows.flat_map(|row| &row[part.clone()]).copied().collect()
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        // NaN differ in bits that mean nothing.
        let bits = |x: &f32| if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() };
        x.iter().map(bits).collect()
    }

    /// The product with inputs in two parts and outputs in three (some of them may be empty), put
    /// together again.
    fn in_parts(
        isa: Isa,
        x: &[f32],
        tokens: usize,
        weights: &[&Weight<'_>],
        rounded: bool,
        cuts: [prop::sample::Index; 3],
    ) -> Vec<f32> {
        let (columns, rows) = (
            weights[0].columns,
            weights.iter().map(|w| w.rows).sum::<usize>(),
        );
        let at = cuts[0].index(columns + 1);
        let xs = [cut(x, columns, 0..at), cut(x, columns, at..columns)];
        let mut ends = [cuts[1].index(rows + 1), cuts[2].index(rows + 1)];
        ends.sort_unstable();
        let widths = [ends[0], ends[1] - ends[0], rows - ends[1]];
        let [mut a, mut b, mut c] = widths.map(|width| vec![f32::INFINITY; tokens * width]);
        matmul_with(
            isa,
            &[&xs[0], &xs[1]],
            weights,
            rounded,
            &mut [&mut a, &mut b, &mut c],
        );
        let mut joined = Vec::new();
        for token in 0..tokens {
            for (part, width) in [&a, &b, &c].into_iter().zip(widths) {
                joined.extend(&part[token * width..(token + 1) * width]);
            }
        }
        joined
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn every_format_and_path_agrees_with_the_definition(
            tokens in prop_oneof![1usize..12, 12usize..70],
            shapes in prop::collection::vec((0usize..6, prop_oneof![1usize..12, 90usize..110]), 1..3),
            // One piece of the columns, two and three.
            blocks in prop_oneof![6 => 1usize..12, 1 => 48usize..51, 1 => 96usize..99],
            tail in 0usize..32,
            bad in prop::option::of(any::<prop::sample::Index>()),
            cuts in any::<[prop::sample::Index; 3]>(),
            seed in any::<u64>(),
        ) {
            let packed = shapes.iter().any(|(f, _)| FORMATS[*f].block() > 1);
            let columns = if packed { blocks * 32 } else { blocks * 32 - tail };
            let made: Vec<_> = shapes
                .iter()
                .enumerate()
                .map(|(i, (f, rows))| matrix(FORMATS[*f], *rows, columns, seed ^ i as u64))
                .collect();
            let weights: Vec<Weight<'_>> = made
                .iter()
                .zip(&shapes)
                .map(|((bytes, _), (f, rows))| Weight::new(FORMATS[*f], *rows, columns, bytes.as_slice()).unwrap())
                .collect();
            let weights: Vec<&Weight<'_>> = weights.iter().collect();
            let all: Vec<f32> = made.iter().flat_map(|(_, n)| n.iter().copied()).collect();
            let mut x = Numbers::new(!seed).take(tokens * columns);
            if let Some(bad) = bad {
                let at = bad.index(x.len());
                x[at] = f32::NAN;
            }
            let expected = oracle(&x, &all, columns);
            for isa in Isa::all() {
                let mut out = vec![f32::INFINITY; expected.len()];
                matmul_with(isa, &[&x], &weights, false, &mut [&mut out]);
                let parts = in_parts(isa, &x, tokens, &weights, false, cuts);
                prop_assert_eq!(bits(&parts), bits(&out), "{:?} {:?} in parts", isa, weights);
                for (i, (y, (sum, size))) in out.iter().zip(&expected).enumerate() {
                    // A weight near 0 is the difference of its scaled code and its offset.
                    prop_assert!(
                        (f64::from(*y) - sum).abs() <= 2e-6 * (size + columns as f64 / 8.0) || (y.is_nan() && sum.is_nan()),
                        "{isa:?} {weights:?} output {i}: {y} for {sum}"
                    );
                }
                let mut row = vec![0.0; columns];
                for (weight, (_, numbers)) in weights.iter().zip(&made) {
                    weight.row_with(isa, weight.rows() - 1, &mut row);
                    for (a, b) in row.iter().zip(&numbers[(weight.rows() - 1) * columns..]) {
                        prop_assert!((a - b).abs() <= 1e-6, "{isa:?} {weight:?}: {a} for {b}");
                    }
                }
            }
        }
    }

    /// What [`matmul_rounded`] is defined to compute with few tokens, in double precision; the same
    /// of magnitudes; and the largest error that rounding may cause.
    fn rounded_oracle(
        x: &[f32],
        weights: &[(Format, Vec<u8>, Vec<f32>)],
        columns: usize,
    ) -> Vec<(f64, f64, f64)> {
        let mut out = Vec::new();
        for x in x.chunks(columns) {
            let row = |format: Format, w: &[f32], bytes: &[u8]| {
                let (mut sum, mut size, mut error) = (0.0, 0.0, 0.0);
                for (i, (x, w)) in x.chunks(BLOCK).zip(w.chunks(BLOCK)).enumerate() {
                    let step = x.iter().fold(0.0, |top: f32, x| top.max(x.abs())) / 127.0;
                    let head = &bytes[i * format.block_bytes()..];
                    let scale = f16::from_le_bytes([head[0], head[1]]).to_f64();
                    let offset = match format {
                        Format::Q4_1 => {
                            8.0 * scale + f16::from_le_bytes([head[2], head[3]]).to_f64()
                        }
                        _ => 0.0,
                    };
                    for (x, w) in x.iter().zip(w) {
                        let code = if step < f32::MIN_POSITIVE {
                            0.0
                        } else {
                            (x / step).round()
                        };
                        let (x, w, step) = (f64::from(*x), f64::from(*w), f64::from(step));
                        sum += (w - offset) * step * f64::from(code) + offset * x;
                        size += (w.abs() + 16.0 * scale.abs() + offset.abs()) * x.abs();
                        error += (w - offset).abs() * step / 2.0;
                    }
                }
                (sum, size, error)
            };
            for (format, bytes, numbers) in weights {
                let bytes = bytes.chunks(columns / BLOCK * format.block_bytes());
                out.extend(
                    numbers
                        .chunks(columns)
                        .zip(bytes)
                        .map(|(w, b)| row(*format, w, b)),
                );
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn rounded_activations_give_what_they_are_defined_to_give(
            tokens in 1usize..12,
            shapes in prop::collection::vec((3usize..6, 1usize..12), 1..3),
            blocks in 1usize..28,
            bad in prop::option::of((any::<prop::sample::Index>(), 0usize..4)),
            cuts in any::<[prop::sample::Index; 3]>(),
            seed in any::<u64>(),
        ) {
            let columns = blocks * BLOCK;
            let made: Vec<_> = shapes
                .iter()
                .enumerate()
                .map(|(i, (f, rows))| {
                    let (bytes, numbers) = matrix(FORMATS[*f], *rows, columns, seed ^ i as u64);
                    (FORMATS[*f], bytes, numbers)
                })
                .collect();
            let weights: Vec<Weight<'_>> = made
                .iter()
                .map(|(f, bytes, n)| Weight::new(*f, n.len() / columns, columns, bytes.as_slice()).unwrap())
                .collect();
            let weights: Vec<&Weight<'_>> = weights.iter().collect();
            let mut x = Numbers::new(!seed).take(tokens * columns);
            let mut broken = None;
            if let Some((at, kind)) = bad {
                let at = at.index(x.len());
                let block = at / BLOCK * BLOCK..at / BLOCK * BLOCK + BLOCK;
                match kind {
                    0 => x[block].fill(0.0),
                    1 => x[block].iter_mut().for_each(|x| *x *= 1e-42),
                    2 => (x[at], broken) = (f32::NAN, Some(at / columns)),
                    _ => (x[at], broken) = (f32::NEG_INFINITY, Some(at / columns)),
                }
            }
            let expected = rounded_oracle(&x, &made, columns);
            let rows = expected.len() / tokens;
            for isa in Isa::all() {
                let mut exact = vec![0.0; expected.len()];
                matmul_with(isa, &[&x], &weights, false, &mut [&mut exact]);
                let mut out = vec![f32::INFINITY; expected.len()];
                matmul_with(isa, &[&x], &weights, true, &mut [&mut out]);
                let parts = in_parts(isa, &x, tokens, &weights, true, cuts);
                prop_assert_eq!(bits(&parts), bits(&out), "{:?} {:?} in parts", isa, weights);
                for (i, (y, (sum, size, error))) in out.iter().zip(&expected).enumerate() {
                    let y = f64::from(*y);
                    if broken == Some(i / rows) {
                        prop_assert!(!y.is_finite(), "{isa:?} output {i}: {y}");
                        continue;
                    }
                    let rounding = 2e-6 * size + 1e-30;
                    let off = (y - f64::from(exact[i])).abs();
                    prop_assert!(off <= error + 2.0 * rounding, "{isa:?} output {i}: {off} > {error}");
                    if tokens <= FEW {
                        // A number halfway between two codes may go either way.
                        prop_assert!(
                            (y - sum).abs() <= rounding + error / 4.0,
                            "{isa:?} {weights:?} output {i}: {y} for {sum}"
                        );
                    } else {
                        prop_assert_eq!(y, f64::from(exact[i]));
                    }
                }
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_threads() {
        for format in FORMATS {
            let (rows, columns) = (500, 640);
            let (bytes, _) = matrix(format, rows, columns, 3);
            let weight = Weight::new(format, rows, columns, bytes).unwrap();
            for tokens in [1, 7, 30, 700] {
                let x = Numbers::new(4).take(tokens * columns);
                let run = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    pool.unwrap().install(|| {
                        let mut out = vec![0.0; tokens * rows];
                        matmul(&x, &weight, &mut out);
                        out
                    })
                };
                let rounded = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    pool.unwrap().install(|| {
                        let mut out = vec![0.0; tokens * rows];
                        matmul_rounded(&[&x], &[&weight], &mut [&mut out]);
                        out
                    })
                };
                assert_eq!(rounded(1), rounded(3), "{format:?}");
                let one = run(1);
                assert_eq!(one, run(2), "{format:?}");
                assert_eq!(one, run(5), "{format:?}");
                // The last tokens alone.
                let mut last = vec![0.0; rows];
                matmul(&x[(tokens - 1) * columns..], &weight, &mut last);
                for (a, b) in last.iter().zip(&one[(tokens - 1) * rows..]) {
                    assert!((a - b).abs() < 1e-3, "{format:?} {a} {b}");
                }
            }
        }
    }

    #[test]
    fn bytes_that_are_no_matrix_are_refused() {
        let error = Weight::new(Format::Q4_1, 2, 40, &[0u8; 40][..]).unwrap_err();
        assert_eq!(error.to_string(), "40 columns are not whole blocks of 32");
        let error = Weight::new(Format::Q4_1, 2, 64, &[0u8; 79][..]).unwrap_err();
        assert_eq!(error.to_string(), "79 bytes where the matrix has 80");
        let error = Weight::new(Format::F32, usize::MAX, 64, &[0u8; 4][..]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "4 bytes where the matrix has more than fit memory"
        );
        let error = Weight::from_f32(&[0.0; 5], 2, 3).unwrap_err();
        assert_eq!(
            error,
            WeightError::Bytes {
                expected: Some(24),
                found: 20
            }
        );
    }

    #[test]
    fn empty_shapes_are_fine() {
        let weight = Weight::from_f32(&[], 0, 3).unwrap();
        matmul(&[1.0; 6], &weight, &mut []);
        let weight = Weight::from_f32(&[], 3, 0).unwrap();
        let mut out = [1.0; 6];
        matmul(&[], &weight, &mut out);
        assert_eq!(out, [0.0; 6]);
        matmul_between(&[&[1.0; 6]], &[], &mut []);
        let weight = Weight::from_f32(&[1.0; 6], 2, 3).unwrap();
        matmul(&[], &weight, &mut []);
    }

    #[test]
    #[should_panic(expected = "5 inputs and 2 outputs")]
    fn lengths_must_fit() {
        let weight = Weight::from_f32(&[1.0; 6], 2, 3).unwrap();
        matmul(&[0.0; 5], &weight, &mut [0.0; 2]);
    }
}
