//! Blocks of 256 numbers whose groups have scales of their own: `Q4_K`, `Q5_K` and `Q6_K`.

use super::{
    BLOCK,
    few::{Ahead, Dot, Sums},
    weight::{Convert, half_at},
};
use crate::{dtype::DType, simd::Simd};

/// Numbers in a super-block.
const SUPER: usize = DType::Q4_K.block();

/// Numbers that are asked for, and mostly unpacked, at a time: two groups that share their bytes.
const PAIR: usize = 2 * BLOCK;

/// Numbers of a group of `Q6_K`.
const GROUP: usize = 16;

/// The codes of a super-block, a byte each.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Codes([u8; SUPER]);

impl Codes {
    const NONE: Self = Self([0; SUPER]);
}

/// Scales of a super-block's groups, and what is added or subtracted for each.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Scales<const N: usize>([f32; N]);

/// `Q4_K` and `Q5_K`, which has a fifth bit: super-blocks of eight groups of 32, `x = scale · q - minimum`, where
/// scales and minima have six bits and are multiplied with a number each in half precision. Products of three
/// are exact in single precision.
///
/// Of 64 numbers the first half are the low bits of 32 bytes, the others the high bits. Fifth bits are in
/// 32 bytes before all of these: bit `g` of each is one of group `g`.
pub(super) struct Eights<const FIFTH: bool>;

impl<const FIFTH: bool> Eights<FIFTH> {
    /// Bytes of a super-block.
    const BYTES: usize = if FIFTH { DType::Q5_K } else { DType::Q4_K }.block_bytes();
    /// Where in a super-block the fifth bits are, or else the codes.
    const CODES: usize = 16;

    /// Codes that are not read where they lie.
    ///
    /// # Safety
    /// `block` must be valid for reading a super-block.
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, block: *const u8, to: &mut Codes) {
        if FIFTH {
            // SAFETY: a super-block has 32 and then 128 bytes there.
            unsafe {
                let fifth = block.add(Self::CODES);
                s.unpack_fives(fifth, fifth.add(BLOCK), to.0.as_mut_ptr());
            }
        }
    }

    /// A vector of a pair's first group, from its number `i` on, and that of its second.
    ///
    /// # Safety
    /// `block` must be valid for reading a super-block, and `codes` be what was unpacked of it. The groups must
    /// have as many numbers.
    #[inline(always)]
    unsafe fn pair<S: Simd>(
        s: S,
        block: *const u8,
        codes: &Codes,
        pair: usize,
        i: usize,
    ) -> [S::V; 2] {
        // SAFETY: promised by the caller; a super-block has four pairs.
        unsafe {
            if FIFTH {
                let codes = codes.0.as_ptr().add(pair * PAIR + i).cast();
                return [s.load_i8(codes), s.load_i8(codes.add(BLOCK))];
            }
            let (low, high) = s.load_nibbles(block.add(Self::CODES + pair * BLOCK + i));
            [low, high]
        }
    }
}

impl<const FIFTH: bool> Convert for Eights<FIFTH> {
    #[inline(always)]
    unsafe fn convert<S: Simd>(s: S, row: *const u8, from: usize, out: &mut [f32]) {
        let (mut codes, mut scales) = (Codes::NONE, Scales([0.0; 16]));
        for (at, out) in out.chunks_exact_mut(SUPER).enumerate() {
            // SAFETY: the row has a super-block for each 256 numbers of `out`.
            unsafe {
                let block = row.add((from / SUPER + at) * Self::BYTES);
                s.unpack_scales(block, scales.0.as_mut_ptr());
                Self::unpack(s, block, &mut codes);
                for pair in 0..SUPER / PAIR {
                    let (mut own, mut minus) = ([s.splat(0.0); 2], [s.splat(0.0); 2]);
                    for i in 0..2 {
                        own[i] = s.splat(scales.0[2 * pair + i]);
                        minus[i] = s.splat(-scales.0[8 + 2 * pair + i]);
                    }
                    for i in (0..BLOCK).step_by(S::LANES) {
                        let [a, b] = Self::pair(s, block, &codes, pair, i);
                        let to = out.as_mut_ptr().add(pair * PAIR + i);
                        s.store(to, s.fma(own[0], a, minus[0]));
                        s.store(to.add(BLOCK), s.fma(own[1], b, minus[1]));
                    }
                }
            }
        }
    }
}

impl<const FIFTH: bool> Dot for Eights<FIFTH> {
    const PACKED: bool = true;
    const SUMS: bool = true;

    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        mut ahead: Ahead,
        x: *const f32,
        sums: [*const f32; T],
    ) -> [[S::V; T]; R] {
        let mut acc = [[s.splat(0.0); T]; R];
        let (mut codes, mut scales) = ([Codes::NONE; R], [Scales([0.0; 16]); R]);
        let first = Sums::new(columns).super_blocks();
        for at in 0..columns / SUPER {
            let mut blocks = [std::ptr::null(); R];
            // SAFETY: the rows have a super-block here, each token 256 numbers, and 16 among its sums.
            unsafe {
                for r in 0..R {
                    blocks[r] = rows[r].add(at * Self::BYTES);
                    s.unpack_scales(blocks[r], scales[r].0.as_mut_ptr());
                    Self::unpack(s, blocks[r], &mut codes[r]);
                    // Scales are multiplied with zeros where a vector holds them beside the minima.
                    for i in (16 - S::LANES.max(8)..16).step_by(S::LANES) {
                        let minima = s.load(scales[r].0.as_ptr().add(i));
                        for t in 0..T {
                            let sums = s.load(sums[t].wrapping_add(first + 16 * at + i));
                            acc[r][t] = s.fma(minima, sums, acc[r][t]);
                        }
                    }
                }
                for pair in 0..SUPER / PAIR {
                    for _ in 0..R {
                        ahead.ask(s, Self::BYTES / (SUPER / PAIR));
                    }
                    let x = x.add((at * SUPER + pair * PAIR) * T);
                    products::<S, FIFTH, R, T>(s, blocks, &codes, pair, &scales, x, &mut acc);
                }
            }
        }
        acc
    }
}

/// Adds the products of a pair of groups: scales times the sums of codes times activations.
///
/// # Safety
/// Each of `blocks` must be valid for reading a super-block, `codes` be what was unpacked of them, and `x` be
/// valid for reading a pair of `T` interleaved tokens.
#[inline(always)]
unsafe fn products<S: Simd, const FIFTH: bool, const R: usize, const T: usize>(
    s: S,
    blocks: [*const u8; R],
    codes: &[Codes; R],
    pair: usize,
    scales: &[Scales<16>; R],
    x: *const f32,
    acc: &mut [[S::V; T]; R],
) {
    let vectors = BLOCK / S::LANES;
    let place = |group: usize, i: usize, t: usize| ((group * vectors + i) * T + t) * S::LANES;
    if T == 1 {
        let mut dots = [[s.splat(0.0); 2]; R];
        for i in 0..vectors {
            // SAFETY: promised by the caller.
            let x = unsafe { [s.load(x.add(place(0, i, 0))), s.load(x.add(place(1, i, 0)))] };
            for r in 0..R {
                // SAFETY: promised by the caller.
                let numbers =
                    unsafe { Eights::<FIFTH>::pair(s, blocks[r], &codes[r], pair, i * S::LANES) };
                for group in 0..2 {
                    dots[r][group] = s.fma(numbers[group], x[group], dots[r][group]);
                }
            }
        }
        for r in 0..R {
            for group in 0..2 {
                let scale = s.splat(scales[r].0[2 * pair + group]);
                acc[r][0] = s.fma(scale, dots[r][group], acc[r][0]);
            }
        }
        return;
    }
    let mut numbers = [[[s.splat(0.0); 2]; 8]; R];
    for r in 0..R {
        for i in 0..vectors {
            // SAFETY: promised by the caller.
            numbers[r][i] =
                unsafe { Eights::<FIFTH>::pair(s, blocks[r], &codes[r], pair, i * S::LANES) };
        }
    }
    for t in 0..T {
        for group in 0..2 {
            let mut dots = [s.splat(0.0); R];
            for i in 0..vectors {
                // SAFETY: promised by the caller.
                let x = unsafe { s.load(x.add(place(group, i, t))) };
                for r in 0..R {
                    dots[r] = s.fma(numbers[r][i][group], x, dots[r]);
                }
            }
            for r in 0..R {
                let scale = s.splat(scales[r].0[2 * pair + group]);
                acc[r][t] = s.fma(scale, dots[r], acc[r][t]);
            }
        }
    }
}

/// `Q6_K`: `x = scale · (q - 32)` in groups of 16, whose scales are signed bytes times a number in half
/// precision. Products of three are exact in single precision.
pub(super) struct SixK;

impl SixK {
    const BYTES: usize = DType::Q6_K.block_bytes();
    /// Where in a super-block the upper bits of the codes begin, the scales, and what these are multiplied with.
    const HIGH: usize = 128;
    const SCALES: usize = 192;
    const WHOLE: usize = 208;

    /// The codes and the scales.
    ///
    /// # Safety
    /// `block` must be valid for reading a super-block.
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, block: *const u8, codes: &mut Codes, scales: &mut Scales<16>) {
        // SAFETY: a super-block has this layout.
        unsafe {
            s.unpack_sixes(block, block.add(Self::HIGH), codes.0.as_mut_ptr());
            let whole = s.splat_f16(half_at(block.add(Self::WHOLE)));
            for i in (0..16).step_by(S::LANES) {
                let own = s.mul(whole, s.load_i8(block.add(Self::SCALES + i).cast()));
                s.store(scales.0.as_mut_ptr().add(i), own);
            }
        }
    }
}

impl Convert for SixK {
    #[inline(always)]
    unsafe fn convert<S: Simd>(s: S, row: *const u8, from: usize, out: &mut [f32]) {
        let (mut codes, mut scales) = (Codes::NONE, Scales([0.0; 16]));
        for (at, out) in out.chunks_exact_mut(SUPER).enumerate() {
            // SAFETY: the row has a super-block for each 256 numbers of `out`.
            unsafe {
                let block = row.add((from / SUPER + at) * Self::BYTES);
                Self::unpack(s, block, &mut codes, &mut scales);
                for i in (0..SUPER).step_by(S::LANES) {
                    let code = s.load_i8(codes.0.as_ptr().add(i).cast());
                    // Not one sum: a negative scale times 0 is -0.
                    let number = s.mul(s.splat(scales.0[i / GROUP]), s.sub(code, s.splat(32.0)));
                    s.store(out.as_mut_ptr().add(i), number);
                }
            }
        }
    }
}

impl Dot for SixK {
    const PACKED: bool = true;
    const SUMS: bool = true;

    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const T: usize>(
        s: S,
        columns: usize,
        rows: [*const u8; R],
        mut ahead: Ahead,
        x: *const f32,
        sums: [*const f32; T],
    ) -> [[S::V; T]; R] {
        let mut acc = [[s.splat(0.0); T]; R];
        let (mut codes, mut scales) = ([Codes::NONE; R], [Scales([0.0; 16]); R]);
        let first = Sums::new(columns).halves();
        for at in 0..columns / SUPER {
            // SAFETY: the rows have a super-block here, each token 256 numbers, and 16 among its sums.
            unsafe {
                for r in 0..R {
                    let block = rows[r].add(at * Self::BYTES);
                    Self::unpack(s, block, &mut codes[r], &mut scales[r]);
                    for i in (0..16).step_by(S::LANES) {
                        let scales = s.load(scales[r].0.as_ptr().add(i));
                        for t in 0..T {
                            let sums = s.load(sums[t].wrapping_add(first + 16 * at + i));
                            acc[r][t] = s.fma(scales, sums, acc[r][t]);
                        }
                    }
                }
                for group in 0..SUPER / GROUP {
                    if group % (PAIR / GROUP) == 0 {
                        for _ in 0..R {
                            ahead.ask(s, Self::BYTES / (SUPER / PAIR));
                        }
                    }
                    let from = group * GROUP;
                    let x = x.add((at * SUPER + from) * T);
                    let mut own = [std::ptr::null(); R];
                    let mut scale = [s.splat(0.0); R];
                    for r in 0..R {
                        own[r] = codes[r].0.as_ptr().add(from);
                        scale[r] = s.splat(scales[r].0[group]);
                    }
                    sixteen::<S, R, T>(s, scale, own, x, &mut acc);
                }
            }
        }
        acc
    }
}

/// Adds the products of a group of 16: scales times the sums of codes times activations.
///
/// # Safety
/// `codes` must be valid for reading 16 of each row, and `x` for 16 numbers of `T` interleaved tokens.
#[inline(always)]
unsafe fn sixteen<S: Simd, const R: usize, const T: usize>(
    s: S,
    scales: [S::V; R],
    codes: [*const u8; R],
    x: *const f32,
    acc: &mut [[S::V; T]; R],
) {
    let vectors = GROUP / S::LANES;
    let mut numbers = [[s.splat(0.0); 4]; R];
    for r in 0..R {
        for i in 0..vectors {
            // SAFETY: promised by the caller.
            numbers[r][i] = unsafe { s.load_i8(codes[r].add(i * S::LANES).cast()) };
        }
    }
    for t in 0..T {
        let mut dots = [s.splat(0.0); R];
        for i in 0..vectors {
            // SAFETY: promised by the caller.
            let x = unsafe { s.load(x.add((i * T + t) * S::LANES)) };
            for r in 0..R {
                dots[r] = s.fma(numbers[r][i], x, dots[r]);
            }
        }
        for r in 0..R {
            acc[r][t] = s.fma(scales[r], dots[r], acc[r][t]);
        }
    }
}
