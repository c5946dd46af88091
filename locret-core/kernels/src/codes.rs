//! Numbers that are kept as small integers: how these are packed, and what they stand for.
//!
//! A number is `low + step · code`, where a group of numbers shares a step and a low. Before they are coded, rows
//! may be turned by Hadamard's matrix ([`hadamard`]), which spreads what is large over a block of them.

use crate::simd::{Isa, Simd, dispatch, load, store};
use half::f16;
use rayon::prelude::*;

/// Fewer numbers than this are turned by the calling thread alone.
const PARALLEL: usize = 1 << 15;

/// How the codes of a row lie in its bytes.
///
/// Of codes of 2, 4 and 8 bits the first features are the lowest bits of each byte, as many as there are bytes, and so
/// on, so that unpacking runs along bytes. Of codes of 3 bits the lower two lie like that, and after them the third
/// ones, one feature after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    bits: u8,
    dim: usize,
}

impl Packing {
    /// Rows of `dim` codes.
    ///
    /// # Panics
    /// For other `bits` than 2, 3, 4 and 8.
    pub fn new(bits: u8, dim: usize) -> Self {
        assert!([2, 3, 4, 8].contains(&bits), "codes of {bits} bits");
        Self { bits, dim }
    }

    /// Codes of a row.
    pub fn dim(self) -> usize {
        self.dim
    }

    /// Bytes of a row.
    pub fn row_bytes(self) -> usize {
        self.low_bytes()
            + if self.third() {
                self.dim.div_ceil(8)
            } else {
                0
            }
    }

    /// Puts a code into the bytes of its row, which were 0 there.
    ///
    /// # Panics
    /// If there are fewer bytes than a row's, or `at` is beyond it.
    pub fn put(self, row: &mut [u8], at: usize, code: u8) {
        let (low, stride) = (self.low_bits(), self.low_bytes());
        row[at % stride] |= (code & self.mask()) << (at / stride * low as usize);
        if self.third() {
            row[stride + at / 8] |= (code >> 2 & 1) << (at % 8);
        }
    }

    #[inline(always)]
    fn third(self) -> bool {
        self.bits == 3
    }

    /// The bits of a code that lie together.
    #[inline(always)]
    fn low_bits(self) -> u32 {
        if self.third() {
            2
        } else {
            u32::from(self.bits)
        }
    }

    #[inline(always)]
    fn mask(self) -> u8 {
        u8::MAX >> (8 - self.low_bits())
    }

    /// Bytes of a row's lower bits, or all.
    #[inline(always)]
    fn low_bytes(self) -> usize {
        self.dim.div_ceil(8 / self.low_bits() as usize)
    }

    /// Whether all codes of a row lie in whole vectors.
    #[inline(always)]
    fn whole<S: Simd>(self) -> bool {
        self.low_bytes().is_multiple_of(S::LANES) && self.dim.is_multiple_of(S::LANES)
    }

    /// Where the next vector of codes lies.
    #[inline(always)]
    fn next<S: Simd>(self, first: usize, shift: u32) -> (usize, u32) {
        match first + S::LANES {
            end if end == self.low_bytes() => (0, shift + self.low_bits()),
            next => (next, shift),
        }
    }

    /// The code of one feature.
    #[inline(always)]
    fn code(self, row: &[u8], at: usize) -> f32 {
        let (low, stride) = (self.low_bits(), self.low_bytes());
        let code = row[at % stride] >> (at / stride * low as usize) & self.mask();
        let third = self.third() && row[stride + at / 8] >> (at % 8) & 1 == 1;
        f32::from(code) + if third { 4.0 } else { 0.0 }
    }

    /// The codes of a vector of features from `at` on, which lie in the bytes from `first` on and begin at bit `shift`, of
    /// rows that are [whole](Self::whole) vectors.
    #[inline(always)]
    fn codes<S: Simd>(self, s: S, row: &[u8], at: usize, first: usize, shift: u32) -> S::V {
        assert!(first + S::LANES <= row.len());
        // SAFETY: that many bytes follow, as was checked.
        let codes = unsafe { s.load_codes(row.as_ptr().add(first), shift, self.mask()) };
        if !self.third() {
            return codes;
        }
        let thirds = &row[self.low_bytes() + at / 8..];
        let mut bits = u32::from(thirds[0]) >> (at % 8);
        if S::LANES > 8 {
            bits |= u32::from(thirds[1]) << 8;
        }
        s.add_where(codes, bits, 4.0)
    }
}

/// What rows of codes stand for, `[rows, dim]`, if each has steps and lows of its own: `scales` are `[rows, groups,
/// 2]`, of groups of `width` features. Blocks of `block` features are turned back by [`hadamard`] (1: none are).
///
/// # Panics
/// If the lengths of `codes`, `scales` and `out` are not those of the same number of rows, or as [`hadamard`].
pub fn decode_rows(
    packing: Packing,
    codes: &[u8],
    scales: &[f16],
    width: usize,
    block: usize,
    out: &mut [f32],
) {
    decode_rows_with(Isa::best(), packing, codes, scales, width, block, out);
}

fn decode_rows_with(
    isa: Isa,
    packing: Packing,
    codes: &[u8],
    scales: &[f16],
    width: usize,
    block: usize,
    out: &mut [f32],
) {
    #[inline(always)]
    fn body<S: Simd>(
        s: S,
        packing: Packing,
        codes: &[u8],
        scales: &[f16],
        width: usize,
        block: usize,
        out: &mut [f32],
    ) {
        let pairs = 2 * packing.dim.div_ceil(width);
        let rows = codes.chunks_exact(packing.row_bytes());
        let rows = rows.zip(scales.chunks_exact(pairs));
        for ((codes, scales), out) in rows.zip(out.chunks_exact_mut(packing.dim)) {
            if packing.whole::<S>() && (width.is_multiple_of(S::LANES) || width >= packing.dim) {
                let (mut first, mut shift) = (0, 0);
                for (group, pair) in scales.chunks_exact(2).enumerate() {
                    let step = s.splat_f16(pair[0].to_bits());
                    let low = s.splat_f16(pair[1].to_bits());
                    let end = packing.dim.min((group + 1) * width);
                    for at in (group * width..end).step_by(S::LANES) {
                        let codes = packing.codes(s, codes, at, first, shift);
                        (first, shift) = packing.next::<S>(first, shift);
                        // Each of both rounded, whatever the instruction set.
                        store(s, &mut out[at..], s.add(s.mul(codes, step), low));
                    }
                }
            } else {
                for (at, x) in out.iter_mut().enumerate() {
                    let pair = at / width * 2;
                    let (step, low) = (scales[pair].to_f32(), scales[pair + 1].to_f32());
                    *x = packing.code(codes, at) * step + low;
                }
            }
            turned(s, out, block);
        }
    }
    let rows = out.len() / packing.dim;
    let pairs = 2 * packing.dim.div_ceil(width);
    assert_eq!(
        [out.len(), codes.len(), scales.len()],
        [rows * packing.dim, rows * packing.row_bytes(), rows * pairs],
        "numbers, codes and scales of {rows} rows"
    );
    check_block(packing.dim, block);
    dispatch!(isa, s => body(s, packing, codes, scales, width, block, out));
}

/// What rows of codes stand for, `[rows, dim]`, if all share a step and a low for each feature: `scales` are `[2,
/// dim]`. Blocks of `block` features are turned back by [`hadamard`] (1: none are).
///
/// # Panics
/// As [`decode_rows`].
pub fn decode_run(packing: Packing, codes: &[u8], scales: &[f16], block: usize, out: &mut [f32]) {
    decode_run_with(Isa::best(), packing, codes, scales, block, out);
}

fn decode_run_with(
    isa: Isa,
    packing: Packing,
    codes: &[u8],
    scales: &[f16],
    block: usize,
    out: &mut [f32],
) {
    #[inline(always)]
    fn body<S: Simd>(
        s: S,
        packing: Packing,
        codes: &[u8],
        scales: &[f16],
        block: usize,
        out: &mut [f32],
    ) {
        let (steps, lows) = scales.split_at(packing.dim);
        let rows = codes.chunks_exact(packing.row_bytes());
        for (codes, out) in rows.zip(out.chunks_exact_mut(packing.dim)) {
            if packing.whole::<S>() {
                let (mut first, mut shift) = (0, 0);
                for at in (0..packing.dim).step_by(S::LANES) {
                    let codes = packing.codes(s, codes, at, first, shift);
                    (first, shift) = packing.next::<S>(first, shift);
                    let (step, low) = (&steps[at..at + S::LANES], &lows[at..at + S::LANES]);
                    // SAFETY: each has a vector of them.
                    let (step, low) = unsafe {
                        (
                            s.load_f16(step.as_ptr().cast()),
                            s.load_f16(low.as_ptr().cast()),
                        )
                    };
                    store(s, &mut out[at..], s.add(s.mul(codes, step), low));
                }
            } else {
                let scales = steps.iter().zip(lows);
                for (at, (x, (step, low))) in out.iter_mut().zip(scales).enumerate() {
                    *x = packing.code(codes, at) * step.to_f32() + low.to_f32();
                }
            }
            turned(s, out, block);
        }
    }
    let rows = out.len() / packing.dim;
    assert_eq!(
        [out.len(), codes.len(), scales.len()],
        [
            rows * packing.dim,
            rows * packing.row_bytes(),
            2 * packing.dim
        ],
        "numbers, codes and scales of {rows} rows"
    );
    check_block(packing.dim, block);
    dispatch!(isa, s => body(s, packing, codes, scales, block, out));
}

/// The largest block of features for [`hadamard`] in a row: the largest power of two that divides it.
pub fn block_of(dim: usize) -> usize {
    1 << dim.trailing_zeros().min(usize::BITS - 1)
}

/// Multiplies each block of numbers with Hadamard's matrix (Sylvester's, divided by `√block`), which is its own
/// inverse: lengths and inner products stay, and what is large in one place is spread over the block.
///
/// # Panics
/// If `block` is not a power of two, or `x` not whole blocks.
pub fn hadamard(x: &mut [f32], block: usize) {
    hadamard_with(Isa::best(), x, block);
}

fn hadamard_with(isa: Isa, x: &mut [f32], block: usize) {
    check_block(x.len(), block);
    if block == 1 {
        return;
    }
    if x.len() < PARALLEL {
        dispatch!(isa, s => turned(s, x, block));
    } else {
        let job = block * (PARALLEL / 4).div_ceil(block);
        x.par_chunks_mut(job)
            .for_each(|x| dispatch!(isa, s => turned(s, x, block)));
    }
}

fn check_block(len: usize, block: usize) {
    assert!(
        block.is_power_of_two() && len.is_multiple_of(block),
        "blocks of {block} in {len} numbers"
    );
}

/// Blocks times Hadamard's matrix.
#[inline(always)]
fn turned<S: Simd>(s: S, x: &mut [f32], block: usize) {
    if block == 1 {
        return;
    }
    let scale = 1.0 / (block as f32).sqrt();
    match block / S::LANES {
        0 => small(x, block, scale),
        1 => blocks::<S, 1>(s, x, scale),
        2 => blocks::<S, 2>(s, x, scale),
        4 => blocks::<S, 4>(s, x, scale),
        8 => blocks::<S, 8>(s, x, scale),
        16 => blocks::<S, 16>(s, x, scale),
        n => {
            for x in x.chunks_exact_mut(block) {
                blocks::<S, 16>(s, x, scale);
                sums(s, x, 16 * S::LANES, n * S::LANES);
            }
        }
    }
}

/// Blocks of fewer numbers than a vector has.
#[inline(always)]
fn small(x: &mut [f32], block: usize, scale: f32) {
    for x in x.chunks_exact_mut(block) {
        let mut half = 1;
        while half < block {
            for x in x.chunks_exact_mut(2 * half) {
                let (a, b) = x.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        x.iter_mut().for_each(|x| *x *= scale);
    }
}

/// Blocks of `N` vectors, in registers.
#[inline(always)]
fn blocks<S: Simd, const N: usize>(s: S, x: &mut [f32], scale: f32) {
    let factor = s.splat(scale);
    for x in x.chunks_exact_mut(N * S::LANES) {
        let mut all = [factor; N];
        for (i, v) in all.iter_mut().enumerate() {
            *v = s.mul(load(s, &x[i * S::LANES..]), factor);
            *v = s.butterfly::<2>(s.butterfly::<1>(*v));
            if S::LANES > 4 {
                *v = s.butterfly::<4>(*v);
            }
            if S::LANES > 8 {
                *v = s.butterfly::<8>(*v);
            }
        }
        let mut half = 1;
        while half < N {
            for i in 0..N {
                if i & half == 0 {
                    let (a, b) = (all[i], all[i + half]);
                    (all[i], all[i + half]) = (s.add(a, b), s.sub(a, b));
                }
            }
            half *= 2;
        }
        for (i, v) in all.iter().enumerate() {
            store(s, &mut x[i * S::LANES..], *v);
        }
    }
}

/// The sums and differences of a block from pieces of `half` numbers on, which are done.
#[inline(always)]
fn sums<S: Simd>(s: S, x: &mut [f32], mut half: usize, block: usize) {
    while half < block {
        for x in x.chunks_exact_mut(2 * half) {
            let (a, b) = x.split_at_mut(half);
            for i in (0..half).step_by(S::LANES) {
                let (p, q) = (load(s, &a[i..]), load(s, &b[i..]));
                store(s, &mut a[i..], s.add(p, q));
                store(s, &mut b[i..], s.sub(p, q));
            }
        }
        half *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_bits() -> impl Strategy<Value = u8> {
        prop::sample::select(vec![2u8, 3, 4, 8])
    }

    /// Sylvester's matrix: the sign is the parity of the bits that row and column share.
    fn textbook(x: &[f32], block: usize) -> Vec<f64> {
        let entry = |i: usize, j: usize| {
            if (i & j).count_ones().is_multiple_of(2) {
                1.0
            } else {
                -1.0
            }
        };
        let turn = |x: &[f32]| -> Vec<f64> {
            (0..block)
                .map(|i| {
                    let terms = x
                        .iter()
                        .enumerate()
                        .map(|(j, x)| entry(i, j) * f64::from(*x));
                    terms.sum::<f64>() / (block as f64).sqrt()
                })
                .collect()
        };
        x.chunks(block).flat_map(turn).collect()
    }

    proptest! {
        #[test]
        fn hadamard_is_the_textbooks_and_its_own_inverse(
            power in 0u32..9,
            blocks in 1usize..5,
            seed in prop::collection::vec(-4.0f32..4.0, 7),
        ) {
            let block = 1usize << power;
            let x: Vec<f32> = (0..block * blocks).map(|i| seed[i % 7] * (1 + i % 5) as f32).collect();
            let due = textbook(&x, block);
            for isa in Isa::all() {
                let mut found = x.clone();
                hadamard_with(isa, &mut found, block);
                for (found, due) in found.iter().zip(&due) {
                    prop_assert!((f64::from(*found) - due).abs() < 2e-5 * (block as f64).sqrt().max(1.0) * 4.0, "{found} for {due}");
                }
                hadamard_with(isa, &mut found, block);
                for (found, x) in found.iter().zip(&x) {
                    prop_assert!((found - x).abs() < 1e-4, "{found} for {x}");
                }
            }
        }

        #[test]
        fn rows_are_what_their_codes_say(
            bits in any_bits(),
            dim in prop::sample::select(vec![1usize, 5, 20, 32, 64, 96, 130]),
            width in 1usize..140,
            turn in any::<bool>(),
            bytes in prop::collection::vec(any::<u8>(), 3 * 130),
            scales in prop::collection::vec(-2.0f32..2.0, 2 * 3 * 130),
        ) {
            let packing = Packing::new(bits, dim);
            let width = width.min(dim);
            let groups = dim.div_ceil(width);
            let codes: Vec<u8> = bytes.iter().map(|byte| byte & u8::MAX >> (8 - bits)).take(3 * dim).collect();
            let mut packed = vec![0; 3 * packing.row_bytes()];
            for (row, codes) in packed.chunks_mut(packing.row_bytes()).zip(codes.chunks(dim)) {
                codes.iter().enumerate().for_each(|(at, code)| packing.put(row, at, *code));
            }
            let scales: Vec<f16> = scales.iter().map(|x| f16::from_f32(*x)).collect();
            let block = if turn { block_of(dim) } else { 1 };
            let by_row = &scales[..3 * 2 * groups];
            let shared = &scales[..2 * dim];
            let plain = |row: usize, at: usize, step: f16, low: f16| f32::from(codes[row * dim + at]) * step.to_f32() + low.to_f32();
            let [mut rows, mut run] = [(); 2].map(|()| vec![0.0; 3 * dim]);
            for row in 0..3 {
                for at in 0..dim {
                    let pair = 2 * (row * groups + at / width);
                    rows[row * dim + at] = plain(row, at, by_row[pair], by_row[pair + 1]);
                    run[row * dim + at] = plain(row, at, shared[at], shared[dim + at]);
                }
            }
            for isa in Isa::all() {
                let [mut found, mut due] = [vec![f32::NAN; 3 * dim], rows.clone()];
                decode_rows_with(isa, packing, &packed, by_row, width, block, &mut found);
                hadamard_with(isa, &mut due, block);
                prop_assert_eq!(&found, &due);
                let [mut found, mut due] = [vec![f32::NAN; 3 * dim], run.clone()];
                decode_run_with(isa, packing, &packed, shared, block, &mut found);
                hadamard_with(isa, &mut due, block);
                prop_assert_eq!(&found, &due);
            }
        }
    }

    #[test]
    fn rows_take_their_bits() {
        for (bits, dim, bytes) in [
            (2, 64, 16),
            (3, 64, 24),
            (4, 64, 32),
            (8, 64, 64),
            (3, 20, 8),
            (3, 1, 2),
        ] {
            assert_eq!(
                Packing::new(bits, dim).row_bytes(),
                bytes,
                "{bits} bits of {dim}"
            );
        }
        assert_eq!([1, 20, 64, 96].map(block_of), [1, 4, 64, 32]);
    }

    #[test]
    #[should_panic(expected = "blocks of 3 in 6 numbers")]
    fn a_block_is_a_power_of_two() {
        hadamard(&mut [0.0; 6], 3);
    }
}
