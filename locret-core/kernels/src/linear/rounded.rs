//! Few tokens whose activations are rounded to eight bits: products of whole numbers.

use super::{
    BLOCK,
    few::{AHEAD, Dot, padded_blocks, sum_all},
    weight::{Bytes, Nibbles, Packed},
};
use crate::simd::{MAGIC, Simd, load, store};
use std::marker::PhantomData;

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

/// Dot products with [`Rounded`] activations.
pub(super) struct RoundedDot<C>(PhantomData<C>);

impl<C: Codes> RoundedDot<C> {
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
}

impl<C: Codes> Dot for RoundedDot<C> {
    const ROUNDED: bool = true;

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
