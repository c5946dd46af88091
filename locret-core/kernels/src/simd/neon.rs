//! AArch64 with NEON, which all of its processors with an operating system have: vectors of 4.

use super::{Simd, six_bits};
use std::arch::{aarch64::*, asm};

/// NEON: 4 lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    pub(super) fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

/// Four numbers of half precision. (Rust's types of them, which the intrinsic takes, are not stable.)
#[inline(always)]
fn from_halves(halves: uint16x4_t) -> float32x4_t {
    let out;
    // SAFETY: the instruction is part of every AArch64, and touches registers only.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) out, in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags));
    }
    out
}

/// Eight bytes as two vectors of whole numbers.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn widened(bytes: uint8x8_t) -> [float32x4_t; 2] {
    // SAFETY: promised by the caller.
    unsafe {
        let words = vmovl_u8(bytes);
        [
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(words))),
            vcvtq_f32_u32(vmovl_high_u16(words)),
        ]
    }
}

/// The four bytes at `p`, and four zeros.
///
/// # Safety
/// The processor must have NEON, and `p` be valid for reading four bytes.
#[inline(always)]
unsafe fn four_bytes(p: *const u8) -> uint8x8_t {
    // SAFETY: promised by the caller.
    unsafe { vcreate_u8(u64::from(p.cast::<u32>().read_unaligned())) }
}

impl Simd for Neon {
    type V = float32x4_t;
    type Bytes = uint8x16x2_t;
    const LANES: usize = 4;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        // Part of the target: nothing has to be enabled.
        f()
    }
    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        intrinsic!(vdupq_n_f32(x))
    }
    #[inline(always)]
    fn splat_f16(self, bits: u16) -> float32x4_t {
        from_halves(intrinsic!(vdup_n_u16(bits)))
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        intrinsic!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        intrinsic!(vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        intrinsic!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        intrinsic!(vdivq_f32(a, b))
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        intrinsic!(vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        intrinsic!(vbslq_f32(vcgtq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        intrinsic!(vbslq_f32(vcltq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn max_nan(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        intrinsic!(vmaxq_f32(a, b))
    }
    #[inline(always)]
    fn if_eq(
        self,
        a: float32x4_t,
        b: float32x4_t,
        then: float32x4_t,
        otherwise: float32x4_t,
    ) -> float32x4_t {
        intrinsic!(vbslq_f32(vceqq_f32(a, b), then, otherwise))
    }
    #[inline(always)]
    fn pow2_of_magic(self, t: float32x4_t) -> float32x4_t {
        intrinsic!(vreinterpretq_f32_s32(vaddq_s32(
            vshlq_n_s32::<23>(vreinterpretq_s32_f32(t)),
            vdupq_n_s32(127 << 23)
        )))
    }
    #[inline(always)]
    fn sum(self, a: float32x4_t) -> f32 {
        intrinsic!(vaddvq_f32(a))
    }
    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [float32x4_t; 4]) -> [f32; 4] {
        intrinsic!({
            let sums = vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
            std::mem::transmute::<float32x4_t, [f32; 4]>(sums)
        })
    }
    #[inline(always)]
    fn largest(self, a: float32x4_t) -> f32 {
        intrinsic!(vmaxnmvq_f32(a))
    }
    #[inline(always)]
    unsafe fn transpose(self, rows: &[*const f32], to: *mut f32, stride: usize) {
        memory!({
            let row = |i: usize| vld1q_f32(rows[i]);
            let (a, b, c, d) = (row(0), row(1), row(2), row(3));
            // Pairs of rows, then both pairs.
            let pair = |x, y| {
                let (even, odd) = (vtrn1q_f32(x, y), vtrn2q_f32(x, y));
                [even, odd].map(|v| vreinterpretq_f64_f32(v))
            };
            let (first, second) = (pair(a, b), pair(c, d));
            for i in 0..2 {
                let low = vzip1q_f64(first[i], second[i]);
                let high = vzip2q_f64(first[i], second[i]);
                vst1q_f32(to.add(i * stride), vreinterpretq_f32_f64(low));
                vst1q_f32(to.add((i + 2) * stride), vreinterpretq_f32_f64(high));
            }
        })
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a hint, of any address.
        unsafe {
            asm!("prfm pldl1keep, [{0}]", in(reg) p, options(readonly, nostack, preserves_flags));
        }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> float32x4_t {
        memory!(vld1q_f32(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: float32x4_t) {
        memory!(vst1q_f32(p, a))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> float32x4_t {
        from_halves(memory!(vld1_u16(p)))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> float32x4_t {
        memory!(vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(
            vld1_u16(p)
        ))))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> float32x4_t {
        memory!({
            let words = vmovl_s8(vreinterpret_s8_u8(four_bytes(p.cast())));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)))
        })
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (float32x4_t, float32x4_t) {
        memory!({
            let bytes = four_bytes(p);
            let low = widened(vand_u8(bytes, vdup_n_u8(15)));
            let high = widened(vshr_n_u8::<4>(bytes));
            (low[0], high[0])
        })
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> uint8x16x2_t {
        memory!(uint8x16x2_t(vld1q_u8(p), vld1q_u8(p.add(16))))
    }
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u8) -> uint8x16x2_t {
        memory!({
            let bytes = vld1q_u8(p);
            uint8x16x2_t(vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes))
        })
    }
    #[inline(always)]
    unsafe fn load_scales(
        self,
        p: *const u8,
        stride: usize,
        n: usize,
        minima: bool,
    ) -> float32x4_t {
        let at = |i: usize| match i < n {
            // SAFETY: the caller promises four readable bytes there.
            true => u64::from(unsafe { p.add(i * stride).cast::<u32>().read_unaligned() }),
            false => 0,
        };
        let mask = if minima { u64::MAX } else { 0xffff_0000_ffff };
        from_halves(intrinsic!(vcreate_u16((at(0) | at(1) << 32) & mask)))
    }
    #[inline(always)]
    unsafe fn unpack_scales(self, p: *const u8, to: *mut f32) {
        memory!({
            let whole = from_halves(vreinterpret_u16_u8(four_bytes(p)));
            for (i, codes) in six_bits(p).into_iter().enumerate() {
                let [scales, minima] = widened(vcreate_u8(codes));
                vst1q_f32(to.add(4 * i), vmulq_laneq_f32::<0>(scales, whole));
                vst1q_f32(to.add(8 + 4 * i), vmulq_laneq_f32::<1>(minima, whole));
            }
        })
    }
    #[inline(always)]
    unsafe fn unpack_fives(self, fifth: *const u8, low: *const u8, to: *mut u8) {
        memory!({
            let (nibble, sixteen) = (vdupq_n_u8(15), vdupq_n_u8(16));
            for half in 0..2 {
                let fifth = vld1q_u8(fifth.add(16 * half));
                for pair in 0..4 {
                    let bytes = vld1q_u8(low.add(32 * pair + 16 * half));
                    let codes = [vandq_u8(bytes, nibble), vshrq_n_u8::<4>(bytes)];
                    for i in 0..2 {
                        let bit = vdupq_n_u8(1 << (2 * pair + i));
                        let there = vandq_u8(vtstq_u8(fifth, bit), sixteen);
                        let out = to.add(64 * pair + 32 * i + 16 * half);
                        vst1q_u8(out, vorrq_u8(codes[i], there));
                    }
                }
            }
        })
    }
    #[inline(always)]
    unsafe fn unpack_sixes(self, low: *const u8, high: *const u8, to: *mut u8) {
        memory!({
            let (nibble, upper) = (vdupq_n_u8(15), vdupq_n_u8(0x30));
            for half in 0..2 {
                for part in 0..2 {
                    let high = vld1q_u8(high.add(32 * half + 16 * part));
                    let a = vld1q_u8(low.add(64 * half + 16 * part));
                    let b = vld1q_u8(low.add(64 * half + 32 + 16 * part));
                    let runs = [
                        (vandq_u8(a, nibble), vshlq_n_u8::<4>(high)),
                        (vandq_u8(b, nibble), vshlq_n_u8::<2>(high)),
                        (vshrq_n_u8::<4>(a), high),
                        (vshrq_n_u8::<4>(b), vshrq_n_u8::<2>(high)),
                    ];
                    for (run, (low, high)) in runs.into_iter().enumerate() {
                        let out = to.add(128 * half + 32 * run + 16 * part);
                        vst1q_u8(out, vorrq_u8(low, vandq_u8(high, upper)));
                    }
                }
            }
        })
    }
    #[inline(always)]
    fn splat_lane(self, a: float32x4_t, lane: usize) -> float32x4_t {
        let lanes = intrinsic!(std::mem::transmute::<float32x4_t, [f32; 4]>(a));
        self.splat(lanes[lane])
    }
    #[inline(always)]
    fn dot_halves(self, a: uint8x16x2_t, b: uint8x16x2_t) -> float32x4_t {
        self.dot_bytes(a, b)
    }
    #[inline(always)]
    fn dot_bytes(self, a: uint8x16x2_t, b: uint8x16x2_t) -> float32x4_t {
        intrinsic!({
            // A product is at most 128 * 127, so that two fit into 16 bits with their sign.
            let products = |a, b| {
                let (a, b) = (vreinterpretq_s8_u8(a), vreinterpretq_s8_u8(b));
                let low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
                vpadalq_s16(vpaddlq_s16(low), vmull_high_s8(a, b))
            };
            vcvtq_f32_s32(vaddq_s32(products(a.0, b.0), products(a.1, b.1)))
        })
    }
}
