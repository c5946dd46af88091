//! x86-64 with AVX2, FMA and F16C: vectors of 8.

use super::{Simd, six_bits};
use std::arch::{asm, x86_64::*};

/// AVX2, FMA and F16C: 8 lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self(()))
    }
}

#[inline(always)]
fn sum128(a: __m128) -> f32 {
    // SAFETY: SSE is part of every x86-64.
    unsafe {
        let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps::<1>(a, a)))
    }
}

/// A square of 8 by 8.
///
/// # Safety
/// The processor must have AVX2, and memory be as [`Simd::transpose`] demands for 8 lanes.
#[inline(always)]
pub(super) unsafe fn transpose8(rows: &[*const f32], to: *mut f32, stride: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut a = [_mm256_setzero_ps(); 8];
        for (a, row) in a.iter_mut().zip(&rows[..8]) {
            *a = _mm256_loadu_ps(*row);
        }
        // Pairs of rows, then fours, then halves.
        let mut b = a;
        for i in 0..4 {
            b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
        }
        for half in 0..2 {
            let i = 4 * half;
            a[i] = _mm256_shuffle_ps::<0x44>(b[i], b[i + 2]);
            a[i + 1] = _mm256_shuffle_ps::<0xee>(b[i], b[i + 2]);
            a[i + 2] = _mm256_shuffle_ps::<0x44>(b[i + 1], b[i + 3]);
            a[i + 3] = _mm256_shuffle_ps::<0xee>(b[i + 1], b[i + 3]);
        }
        for j in 0..4 {
            let low = _mm256_permute2f128_ps::<0x20>(a[j], a[j + 4]);
            let high = _mm256_permute2f128_ps::<0x31>(a[j], a[j + 4]);
            _mm256_storeu_ps(to.add(j * stride), low);
            _mm256_storeu_ps(to.add((j + 4) * stride), high);
        }
    }
}

/// Sixteen bytes: their low four bits and then their high four bits.
///
/// # Safety
/// The processor must have AVX2, and `p` be valid for reading 16 bytes.
#[inline(always)]
pub(super) unsafe fn halves(p: *const u8) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe {
        let low = _mm_loadu_si128(p.cast());
        let both = _mm256_set_m128i(_mm_srli_epi16::<4>(low), low);
        _mm256_and_si256(both, _mm256_set1_epi8(15))
    }
}

/// The first four bytes of block `i` of `n`, 0 for a later one.
///
/// # Safety
/// As [`Simd::load_scales`].
#[inline(always)]
pub(super) unsafe fn scale(p: *const u8, stride: usize, n: usize, i: usize) -> i32 {
    match i < n {
        // SAFETY: promised by the caller.
        true => unsafe { p.add(i * stride).cast::<i32>().read_unaligned() },
        false => 0,
    }
}

/// The codes of eight scales and then of eight minima, a byte each.
///
/// # Safety
/// As [`Simd::unpack_scales`], for the bytes that are read.
#[inline(always)]
pub(super) unsafe fn six_bit_codes(p: *const u8) -> __m128i {
    // SAFETY: promised by the caller.
    unsafe {
        let [first, last] = six_bits(p);
        _mm_unpacklo_epi32(
            _mm_cvtsi64_si128(first.cast_signed()),
            _mm_cvtsi64_si128(last.cast_signed()),
        )
    }
}

/// Has what was written to `p` read from there. Compilers else keep it in registers, and taking vectors apart takes
/// more time than reading their parts.
#[inline(always)]
pub(super) fn in_memory<T>(p: *mut T) {
    // SAFETY: nothing is done.
    unsafe { asm!("/* {} */", in(reg) p, options(nostack, preserves_flags)) };
}

/// Sums of four products of `a` without and `b` with a sign, no two of which exceed 16 bits.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
pub(super) unsafe fn dot_unsigned(a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)) }
}

/// Sums of four products of signed bytes, those of `b` above -128.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
pub(super) unsafe fn dot_signed(a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: promised by the caller. |a| is at most 128, which fits without a sign.
    unsafe { dot_unsigned(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a)) }
}

impl Simd for Avx2 {
    type V = __m256;
    type Bytes = __m256i;
    const LANES: usize = 8;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn enabled<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: the receiver exists only where these features were detected.
        unsafe { enabled(f) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        intrinsic!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn splat_f16(self, bits: u16) -> __m256 {
        intrinsic!(_mm256_cvtph_ps(_mm_set1_epi16(bits.cast_signed())))
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        intrinsic!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn max_nan(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_or_ps(
            _mm256_max_ps(a, b),
            _mm256_cmp_ps::<_CMP_UNORD_Q>(a, b)
        ))
    }
    #[inline(always)]
    fn if_eq(self, a: __m256, b: __m256, then: __m256, otherwise: __m256) -> __m256 {
        intrinsic!(_mm256_blendv_ps(
            otherwise,
            then,
            _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b)
        ))
    }
    #[inline(always)]
    fn pow2_of_magic(self, t: __m256) -> __m256 {
        intrinsic!(_mm256_castsi256_ps(_mm256_add_epi32(
            _mm256_slli_epi32::<23>(_mm256_castps_si256(t)),
            _mm256_set1_epi32(127 << 23)
        )))
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        sum128(intrinsic!(_mm_add_ps(
            _mm256_castps256_ps128(a),
            _mm256_extractf128_ps::<1>(a)
        )))
    }
    #[inline(always)]
    unsafe fn load_codes(self, p: *const u8, shift: u32, mask: u8) -> __m256 {
        memory!({
            let words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let words = _mm256_srl_epi32(words, _mm_cvtsi32_si128(shift as i32));
            _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(i32::from(mask))))
        })
    }
    #[inline(always)]
    fn add_where(self, a: __m256, bits: u32, b: f32) -> __m256 {
        intrinsic!({
            let own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_and_si256(_mm256_set1_epi32(bits as i32), own);
            let set = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, own));
            _mm256_add_ps(a, _mm256_and_ps(set, _mm256_set1_ps(b)))
        })
    }
    #[inline(always)]
    fn butterfly<const HALF: usize>(self, a: __m256) -> __m256 {
        intrinsic!({
            let (other, signs) = match HALF {
                1 => (
                    _mm256_permute_ps::<0b10_11_00_01>(a),
                    _mm256_setr_ps(1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0),
                ),
                2 => (
                    _mm256_permute_ps::<0b01_00_11_10>(a),
                    _mm256_setr_ps(1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0),
                ),
                _ => (
                    _mm256_permute2f128_ps::<1>(a, a),
                    _mm256_setr_ps(1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0),
                ),
            };
            // A number times one is exact.
            _mm256_fmadd_ps(a, signs, other)
        })
    }
    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        intrinsic!({
            let all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
            std::mem::transmute::<__m128, [f32; 4]>(sums)
        })
    }
    #[inline(always)]
    fn largest(self, a: __m256) -> f32 {
        intrinsic!({
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps::<1>(a, a)))
        })
    }
    #[inline(always)]
    unsafe fn transpose(self, rows: &[*const f32], to: *mut f32, stride: usize) {
        memory!(transpose8(rows, to, stride))
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        intrinsic!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        memory!(_mm256_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m256) {
        memory!(_mm256_storeu_ps(p, a))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m256 {
        memory!(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m256 {
        memory!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))
        )))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        memory!(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(
            p.cast()
        ))))
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (__m256, __m256) {
        memory!({
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            (
                _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15))),
                _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(bytes)),
            )
        })
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> __m256i {
        memory!(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u8) -> __m256i {
        memory!(halves(p))
    }
    #[inline(always)]
    unsafe fn load_scales(self, p: *const u8, stride: usize, n: usize, minima: bool) -> __m256 {
        memory!({
            let at = |i| scale(p, stride, n, i);
            let scales = _mm_set_epi32(at(3), at(2), at(1), at(0));
            let mask = if minima { -1 } else { 0xffff };
            _mm256_cvtph_ps(_mm_and_si128(scales, _mm_set1_epi32(mask)))
        })
    }
    #[inline(always)]
    unsafe fn unpack_scales(self, p: *const u8, to: *mut f32) {
        memory!({
            let codes = six_bit_codes(p);
            let codes = [codes, _mm_unpackhi_epi64(codes, codes)];
            let both = _mm_cvtph_ps(_mm_loadu_si32(p));
            let whole = [both, _mm_movehdup_ps(both)];
            for i in 0..2 {
                let eight = _mm256_cvtepu8_epi32(codes[i]);
                let whole = _mm256_broadcastss_ps(whole[i]);
                let numbers = _mm256_mul_ps(whole, _mm256_cvtepi32_ps(eight));
                _mm256_storeu_ps(to.add(8 * i), numbers);
            }
            in_memory(to);
        })
    }
    #[inline(always)]
    unsafe fn unpack_fives(self, fifth: *const u8, low: *const u8, to: *mut u8) {
        memory!({
            let fifth = _mm256_loadu_si256(fifth.cast());
            let (nibble, sixteen) = (_mm256_set1_epi8(15), _mm256_set1_epi8(16));
            for pair in 0..4 {
                let bytes = _mm256_loadu_si256(low.add(32 * pair).cast());
                let codes = [bytes, _mm256_srli_epi16::<4>(bytes)];
                for i in 0..2 {
                    let bit = _mm256_set1_epi8((1u8 << (2 * pair + i)).cast_signed());
                    let there = _mm256_cmpeq_epi8(_mm256_and_si256(fifth, bit), bit);
                    let codes = _mm256_or_si256(
                        _mm256_and_si256(codes[i], nibble),
                        _mm256_and_si256(there, sixteen),
                    );
                    _mm256_storeu_si256(to.add(64 * pair + 32 * i).cast(), codes);
                }
            }
            in_memory(to);
        })
    }
    #[inline(always)]
    unsafe fn unpack_sixes(self, low: *const u8, high: *const u8, to: *mut u8) {
        memory!({
            let (nibble, upper) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
            for half in 0..2 {
                let high = _mm256_loadu_si256(high.add(32 * half).cast());
                let a = _mm256_loadu_si256(low.add(64 * half).cast());
                let b = _mm256_loadu_si256(low.add(64 * half + 32).cast());
                let runs = [
                    (a, _mm256_slli_epi16::<4>(high)),
                    (b, _mm256_slli_epi16::<2>(high)),
                    (_mm256_srli_epi16::<4>(a), high),
                    (_mm256_srli_epi16::<4>(b), _mm256_srli_epi16::<2>(high)),
                ];
                for run in 0..4 {
                    let (low, high) = runs[run];
                    let codes = _mm256_or_si256(
                        _mm256_and_si256(low, nibble),
                        _mm256_and_si256(high, upper),
                    );
                    _mm256_storeu_si256(to.add(128 * half + 32 * run).cast(), codes);
                }
            }
            in_memory(to);
        })
    }
    #[inline(always)]
    fn splat_lane(self, a: __m256, lane: usize) -> __m256 {
        intrinsic!(_mm256_permutevar8x32_ps(a, _mm256_set1_epi32(lane as i32)))
    }
    #[inline(always)]
    fn dot_halves(self, a: __m256i, b: __m256i) -> __m256 {
        intrinsic!(_mm256_cvtepi32_ps(dot_unsigned(a, b)))
    }
    #[inline(always)]
    fn dot_bytes(self, a: __m256i, b: __m256i) -> __m256 {
        intrinsic!(_mm256_cvtepi32_ps(dot_signed(a, b)))
    }
}
