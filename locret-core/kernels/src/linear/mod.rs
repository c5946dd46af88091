//! Products with weight matrices that stay in the type of their file.
//!
//! `y = x · Wᵀ` with `x` `[tokens, columns]` in `f32` and `W` `[rows, columns]` in `f32`, a 16-bit
//! float type or blocks of packed integers as in GGUF files. Weights are converted as they are
//! read, and sums are in `f32` of exact products of what the weights stand for.
//!
//! Activations are rounded in one place only, where the caller asks for it ([`matmul_rounded`]):
//! products of up to eight tokens with packed integers, which are then of whole numbers.
//!
//! - **Few tokens** (decode, of one sequence or of several): `W` is read from memory once for up to sixteen
//!   tokens, and converted once for up to eight of them (four where a vector has fewer than 16 lanes); rows of
//!   `W` are dot products in registers. What is added up for an output, in which order, does not depend on how
//!   many tokens there are: each of several has the bits that it has alone.
//! - **Many tokens** (prefill): blocks of `W` are converted once for hundreds of tokens, into panels
//!   whose lanes are rows of `W`; the inner loop is the outer product of broadcast activations with
//!   them. Activations are read and outputs written where they lie.
//! - **Many tokens where a processor multiplies tiles of bfloat16 numbers** (AMX), and weights of that type or of 8 and 4
//!   bits: activations become three such numbers each, exactly, and products are as exact as others.
//!
//! Work is cut by rows of `W` in a way that depends on shapes alone, so that results don't depend
//! on the number of threads.

mod columns;
mod few;
mod many;
mod rounded;
mod super_blocks;
#[cfg(target_arch = "x86_64")]
mod tiled;
mod weight;

use crate::{dtype::DType, simd::Isa};
use columns::Columns;
use few::few_tokens;
use many::many_tokens;
use rayon::prelude::*;
use std::ops::Range;

pub use weight::{Weight, WeightError, computes_with};

/// Numbers in a block of packed integers.
const BLOCK: usize = DType::Q8_0.block();

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
/// [xs₁ xs₂ …] · [W₁; W₂; …]ᵀ`. Types may differ, and where the outputs are divided is independent of
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

/// [`matmul_between`] with activations of eight bits, where few tokens (decode) are multiplied with packed weights.
///
/// Each block of 32 activations is rounded to multiples of its largest magnitude over 127, as
/// engines that read GGUF files commonly do, so that products are whole numbers. A block's part of an
/// output is off by at most that step, halved, times the sum of the magnitudes of its weights (for 4
/// bits: of `scale · (q - 8)`; minima are multiplied with exact sums). Weights of float types and of super-blocks
/// (`Q4_K`, `Q5_K`, `Q6_K`), and more than eight tokens at once, are computed as by [`matmul_between`].
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

/// Up to this many tokens, rows of weights are dot products, and outputs those of a token alone.
const FEW: usize = 16;

/// Up to this many tokens, activations are rounded where that is asked for.
const ROUNDED: usize = 8;

/// Below this many multiply-adds the calling thread does all.
const SERIAL: usize = 1 << 16;

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
        let rounded = rounded && tokens <= ROUNDED;
        few_tokens(isa, xs, tokens, weights, rounded, outs, serial);
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if let Isa::Avx512(s, Some(amx)) = isa
        && tiled::pays(weights, tokens)
    {
        return tiled::many_tokens(s, amx, xs, tokens, weights, outs, serial);
    }
    many_tokens(isa, xs, tokens, weights, outs, serial);
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

/// A product of many tokens, cut into jobs.
struct Layout {
    /// Columns of each input.
    widths: Vec<usize>,
    /// The sum of them.
    columns: usize,
    outs: Vec<Columns>,
    jobs: Vec<Job>,
}

impl Layout {
    /// Jobs have at most `size(rows of the weight)` rows.
    fn of(
        xs: &[&[f32]],
        tokens: usize,
        weights: &[&Weight<'_>],
        outs: &mut [&mut [f32]],
        size: impl Fn(usize) -> usize,
    ) -> Self {
        let widths: Vec<usize> = xs.iter().map(|x| x.len() / tokens).collect();
        let outs: Vec<Columns> = outs.iter_mut().map(|o| Columns::of(o, tokens)).collect();
        let strides: Vec<usize> = outs.iter().map(|out| out.stride).collect();
        Self {
            columns: widths.iter().sum(),
            widths,
            jobs: jobs(weights, &strides, size),
            outs,
        }
    }

    /// Does all jobs: one after the other, or shared among threads.
    fn run(&self, serial: bool, run: impl Fn(&Job, Columns) + Sync) {
        let run = |job: &Job| run(job, self.outs[job.out]);
        if serial {
            self.jobs.iter().for_each(run);
        } else {
            self.jobs.par_iter().with_max_len(1).for_each(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Numbers;
    use half::{bf16, f16};
    use proptest::prelude::*;

    const DTYPES: [DType; 9] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q8_0,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
    ];

    /// Bytes of a matrix and what they stand for, by the definition of the format.
    fn matrix(dtype: DType, rows: usize, columns: usize, seed: u64) -> (Vec<u8>, Vec<f32>) {
        let mut rng = Numbers::new(seed);
        let mut bytes = Vec::new();
        let mut numbers = Vec::new();
        for _ in 0..rows * columns / dtype.block() {
            let random = rng.take(34);
            let half = |x: f32, bytes: &mut Vec<u8>| {
                let x = f16::from_f32(x);
                bytes.extend(x.to_le_bytes());
                x.to_f32()
            };
            let byte = |i: usize| (random[i] * 128.0).floor() as i8;
            match dtype {
                DType::F32 => {
                    bytes.extend(random[0].to_le_bytes());
                    numbers.push(random[0]);
                }
                DType::F16 => numbers.push(half(random[0], &mut bytes)),
                DType::BF16 => {
                    let x = bf16::from_f32(random[0]);
                    bytes.extend(x.to_le_bytes());
                    numbers.push(x.to_f32());
                }
                DType::Q8_0 => {
                    let scale = half(random[33] / 128.0, &mut bytes);
                    for i in 0..32 {
                        bytes.push(byte(i) as u8);
                        numbers.push(scale * f32::from(byte(i)));
                    }
                }
                DType::Q4_0 | DType::Q4_1 => {
                    let scale = half(random[33] / 8.0, &mut bytes);
                    let minimum = match dtype {
                        DType::Q4_1 => half(random[32], &mut bytes),
                        _ => -8.0 * scale,
                    };
                    bytes.extend((0..16).map(|i| byte(i) as u8));
                    let value = |q: u8| scale * f32::from(q) + minimum;
                    numbers.extend((0..16).map(|i| value(byte(i) as u8 & 15)));
                    numbers.extend((0..16).map(|i| value(byte(i) as u8 >> 4)));
                }
                DType::Q4_K | DType::Q5_K | DType::Q6_K => {
                    let start = bytes.len();
                    let random = rng.take(dtype.block_bytes());
                    bytes.extend(random.iter().map(|x| (x * 128.0).floor() as i8 as u8));
                    let mut put = |at: usize, x: f32| {
                        let x = f16::from_f32(x).to_le_bytes();
                        bytes[start + at..start + at + 2].copy_from_slice(&x);
                    };
                    // So that numbers are about as large as those of other types.
                    match dtype {
                        DType::Q6_K => put(208, random[0] / 4096.0),
                        _ => {
                            put(0, random[0] / 512.0);
                            put(2, random[1] / 64.0);
                        }
                    }
                    let at = numbers.len();
                    numbers.resize(at + 256, 0.0);
                    dtype.decode(&bytes[start..], &mut numbers[at..]);
                }
                dtype => unreachable!("{dtype} has no definition here"),
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
        #![proptest_config(crate::testing::cases(128))]
        #[test]
        fn every_format_and_path_agrees_with_the_definition(
            tokens in prop_oneof![4 => 1usize..20, 1 => 20usize..70],
            shapes in prop::collection::vec((0usize..9, prop_oneof![1usize..12, 90usize..110]), 1..3),
            // One piece of the columns, two and three.
            blocks in prop_oneof![6 => 1usize..12, 1 => 48usize..51, 1 => 96usize..99],
            tail in 0usize..32,
            bad in prop::option::of(any::<prop::sample::Index>()),
            cuts in any::<[prop::sample::Index; 3]>(),
            seed in any::<u64>(),
        ) {
            let block = shapes.iter().map(|(f, _)| DTYPES[*f].block()).max().unwrap_or(1);
            let columns = match block {
                1 => blocks * 32 - tail,
                _ => (blocks * 32).next_multiple_of(block),
            };
            let made: Vec<_> = shapes
                .iter()
                .enumerate()
                .map(|(i, (f, rows))| matrix(DTYPES[*f], *rows, columns, seed ^ i as u64))
                .collect();
            let weights: Vec<Weight<'_>> = made
                .iter()
                .zip(&shapes)
                .map(|((bytes, _), (f, rows))| Weight::new(DTYPES[*f], *rows, columns, bytes.as_slice()).unwrap())
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
                if tokens <= FEW {
                    let lone: Vec<f32> = x.chunks(columns).flat_map(|x| {
                        let mut lone = vec![f32::INFINITY; out.len() / tokens];
                        matmul_with(isa, &[x], &weights, false, &mut [&mut lone]);
                        lone
                    }).collect();
                    prop_assert_eq!(bits(&lone), bits(&out), "{:?} {:?} one by one", isa, weights);
                }
                for (i, (y, (sum, size))) in out.iter().zip(&expected).enumerate() {
                    // A weight near 0 is the difference of its scaled code and its offset.
                    prop_assert!(
                        (f64::from(*y) - sum).abs() <= 2e-6 * (size + columns as f64 / 8.0) || (y.is_nan() && sum.is_nan()),
                        "{isa:?} {weights:?} output {i}: {y} for {sum}"
                    );
                }
                #[cfg(target_arch = "x86_64")]
                if let Isa::Avx512(s, Some(amx)) = isa
                    && weights.iter().all(|w| tiled::fits(w.dtype))
                {
                    // Also where vectors are faster.
                    let (at, rows) = (cuts[0].index(columns + 1), out.len() / tokens);
                    let xs = [cut(&x, columns, 0..at), cut(&x, columns, at..columns)];
                    let width = cuts[1].index(rows + 1);
                    let mut halves = [width, rows - width].map(|n| vec![f32::INFINITY; tokens * n]);
                    let [a, b] = &mut halves;
                    tiled::many_tokens(s, amx, &[&xs[0], &xs[1]], tokens, &weights, &mut [a, b], seed % 2 == 0);
                    for (i, (sum, size)) in expected.iter().enumerate() {
                        let (token, row) = (i / rows, i % rows);
                        let y = match row < width {
                            true => halves[0][token * width + row],
                            false => halves[1][token * (rows - width) + row - width],
                        };
                        prop_assert!(
                            (f64::from(y) - sum).abs() <= 2e-6 * (size + columns as f64 / 8.0) || (y.is_nan() && sum.is_nan()),
                            "{isa:?} {weights:?} output {i} of tiles: {y} for {sum}"
                        );
                    }
                }
                let mut row = vec![0.0; columns];
                for (weight, (_, numbers)) in weights.iter().zip(&made) {
                    weight.row_with(isa, weight.rows() - 1, &mut row);
                    for (a, b) in row.iter().zip(&numbers[(weight.rows() - 1) * columns..]) {
                        prop_assert!((a - b).abs() <= 1e-6, "{isa:?} {weight:?}: {a} for {b}");
                        if weight.dtype.block() == 256 {
                            prop_assert_eq!(a.to_bits(), b.to_bits(), "{:?} {:?}", isa, weight);
                        }
                    }
                }
            }
        }
    }

    /// What [`matmul_rounded`] is defined to compute with few tokens, in double precision; the same
    /// of magnitudes; and the largest error that rounding may cause: none where blocks are larger.
    fn rounded_oracle(
        x: &[f32],
        weights: &[(DType, Vec<u8>, Vec<f32>)],
        columns: usize,
    ) -> Vec<(f64, f64, f64)> {
        let mut out = Vec::new();
        for x in x.chunks(columns) {
            let row = |dtype: DType, w: &[f32], bytes: &[u8]| {
                let (mut sum, mut size, mut error) = (0.0, 0.0, 0.0);
                for (i, (x, w)) in x.chunks(BLOCK).zip(w.chunks(BLOCK)).enumerate() {
                    let step = x.iter().fold(0.0, |top: f32, x| top.max(x.abs())) / 127.0;
                    let block = &bytes[i * dtype.block_bytes()..];
                    let scale = f16::from_le_bytes([block[0], block[1]]).to_f64();
                    let offset = match dtype {
                        DType::Q4_1 => {
                            8.0 * scale + f16::from_le_bytes([block[2], block[3]]).to_f64()
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
            for (dtype, bytes, numbers) in weights {
                if dtype.block() > BLOCK {
                    let exact = oracle(x, numbers, columns).into_iter();
                    out.extend(exact.map(|(sum, size)| (sum, size + columns as f64 / 8.0, 0.0)));
                    continue;
                }
                let bytes = bytes.chunks(columns / BLOCK * dtype.block_bytes());
                out.extend(
                    numbers
                        .chunks(columns)
                        .zip(bytes)
                        .map(|(w, b)| row(*dtype, w, b)),
                );
            }
        }
        out
    }

    proptest! {
        #![proptest_config(crate::testing::cases(128))]
        #[test]
        fn rounded_activations_give_what_they_are_defined_to_give(
            tokens in 1usize..12,
            shapes in prop::collection::vec((3usize..9, 1usize..12), 1..3),
            blocks in 1usize..28,
            bad in prop::option::of((any::<prop::sample::Index>(), 0usize..4)),
            cuts in any::<[prop::sample::Index; 3]>(),
            seed in any::<u64>(),
        ) {
            let block = shapes.iter().map(|(f, _)| DTYPES[*f].block()).max().unwrap_or(BLOCK);
            let columns = (blocks * BLOCK).next_multiple_of(block);
            let made: Vec<_> = shapes
                .iter()
                .enumerate()
                .map(|(i, (f, rows))| {
                    let (bytes, numbers) = matrix(DTYPES[*f], *rows, columns, seed ^ i as u64);
                    (DTYPES[*f], bytes, numbers)
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
                    if tokens <= ROUNDED {
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
        for dtype in DTYPES {
            let (rows, columns) = (500, 768);
            let (bytes, _) = matrix(dtype, rows, columns, 3);
            let weight = Weight::new(dtype, rows, columns, bytes).unwrap();
            for tokens in [1, 7, 16, 30, 700] {
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
                assert_eq!(rounded(1), rounded(3), "{dtype}");
                let one = run(1);
                assert_eq!(one, run(2), "{dtype}");
                assert_eq!(one, run(5), "{dtype}");
                // The last tokens alone.
                let mut last = vec![0.0; rows];
                matmul(&x[(tokens - 1) * columns..], &weight, &mut last);
                for (a, b) in last.iter().zip(&one[(tokens - 1) * rows..]) {
                    assert!((a - b).abs() < 1e-3, "{dtype} {a} {b}");
                }
            }
        }
    }

    #[test]
    fn types_that_are_not_refused_are_computed_with() {
        for dtype in DType::ALL {
            let bytes = vec![0; 2 * dtype.bytes(256).unwrap()];
            let weight = Weight::new(dtype, 2, 256, bytes);
            assert_eq!(weight.is_ok(), computes_with(dtype), "{dtype}");
            assert_eq!(computes_with(dtype), DTYPES.contains(&dtype));
            if let Err(error) = weight {
                assert_eq!(error, WeightError::Type(dtype));
            }
        }
    }

    #[test]
    fn bytes_that_are_no_matrix_are_refused() {
        let error = Weight::new(DType::Q4_1, 2, 40, &[0u8; 40][..]).unwrap_err();
        assert_eq!(error.to_string(), "40 columns are not whole blocks of 32");
        let error = Weight::new(DType::Q6_K, 1, 576, &[0u8; 420][..]).unwrap_err();
        assert_eq!(error.to_string(), "576 columns are not whole blocks of 256");
        let error = Weight::new(DType::Q4_1, 2, 64, &[0u8; 79][..]).unwrap_err();
        assert_eq!(error.to_string(), "79 bytes where the matrix has 80");
        let error = Weight::new(DType::F32, usize::MAX, 64, &[0u8; 4][..]).unwrap_err();
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
