//! x86-64 with AVX-512F: vectors of 16.

use super::{
    Simd,
    avx2::{Avx2, dot_signed, dot_unsigned, halves, in_memory, scale, six_bit_codes, transpose8},
};
use std::arch::x86_64::*;

/// AVX-512F: 16 lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f") && Avx2::detect().is_some()).then_some(Self(()))
    }
}

/// Where a bit of the mask is set that of `a`, elsewhere that of `b`.
const CHOOSE: i32 = 0xe4;

/// Every word of the lower half `a`, of the upper half `b`.
///
/// # Safety
/// The processor must have AVX-512F.
#[inline(always)]
unsafe fn two(a: i32, b: i32) -> __m512i {
    // SAFETY: promised by the caller.
    unsafe { _mm512_inserti64x4::<1>(_mm512_set1_epi32(a), _mm256_set1_epi32(b)) }
}

/// The lower half and the upper half, added. A function, since a closure that is given to
/// `array::map` is not inlined, and each of its instructions is then a call.
///
/// # Safety
/// The processor must have AVX-512F.
#[inline(always)]
unsafe fn halved(a: __m512) -> __m256 {
    // SAFETY: promised by the caller.
    unsafe {
        let whole = _mm512_castps_si512(a);
        let upper = _mm512_castsi512_ps(_mm512_shuffle_i64x2::<0xee>(whole, whole));
        _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_castps512_ps256(upper))
    }
}

impl Simd for Avx512 {
    type V = __m512;
    type Bytes = __m256i;
    const LANES: usize = 16;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        fn enabled<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: the receiver exists only where these features were detected.
        unsafe { enabled(f) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        intrinsic!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn splat_f16(self, bits: u16) -> __m512 {
        intrinsic!(_mm512_cvtph_ps(_mm256_set1_epi16(bits.cast_signed())))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn max_nan(self, a: __m512, b: __m512) -> __m512 {
        // max returns its second operand if either is NaN: only a NaN in `a` must be restored.
        intrinsic!(_mm512_mask_mov_ps(
            _mm512_max_ps(a, b),
            _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a),
            a
        ))
    }
    #[inline(always)]
    fn if_eq(self, a: __m512, b: __m512, then: __m512, otherwise: __m512) -> __m512 {
        intrinsic!(_mm512_mask_mov_ps(
            otherwise,
            _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b),
            then
        ))
    }
    #[inline(always)]
    fn pow2_of_magic(self, t: __m512) -> __m512 {
        intrinsic!(_mm512_castsi512_ps(_mm512_add_epi32(
            _mm512_slli_epi32::<23>(_mm512_castps_si512(t)),
            _mm512_set1_epi32(127 << 23)
        )))
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        intrinsic!(_mm512_reduce_add_ps(a))
    }
    #[inline(always)]
    unsafe fn load_codes(self, p: *const u8, shift: u32, mask: u8) -> __m512 {
        memory!({
            let words = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let words = _mm512_srl_epi32(words, _mm_cvtsi32_si128(shift as i32));
            _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(i32::from(mask))))
        })
    }
    #[inline(always)]
    fn add_where(self, a: __m512, bits: u32, b: f32) -> __m512 {
        intrinsic!(_mm512_mask_add_ps(a, bits as u16, a, _mm512_set1_ps(b)))
    }
    #[inline(always)]
    fn butterfly<const HALF: usize>(self, a: __m512) -> __m512 {
        intrinsic!({
            let (other, less) = match HALF {
                1 => (_mm512_permute_ps::<0b10_11_00_01>(a), 0xaaaa),
                2 => (_mm512_permute_ps::<0b01_00_11_10>(a), 0xcccc),
                4 => (_mm512_shuffle_f32x4::<0b10_11_00_01>(a, a), 0xf0f0),
                _ => (_mm512_shuffle_f32x4::<0b01_00_11_10>(a, a), 0xff00),
            };
            _mm512_mask_sub_ps(_mm512_add_ps(a, other), less, other, a)
        })
    }
    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        intrinsic!({
            let (ab, cd) = (
                _mm256_hadd_ps(halved(a), halved(b)),
                _mm256_hadd_ps(halved(c), halved(d)),
            );
            let all = _mm256_hadd_ps(ab, cd);
            let sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
            std::mem::transmute::<__m128, [f32; 4]>(sums)
        })
    }
    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(a))
    }
    #[inline(always)]
    unsafe fn transpose(self, rows: &[*const f32], to: *mut f32, stride: usize) {
        let right: [*const f32; 16] = std::array::from_fn(|i| rows[i].wrapping_add(8));
        memory!({
            transpose8(&rows[..8], to, stride);
            transpose8(&rows[8..], to.add(8), stride);
            transpose8(&right[..8], to.add(8 * stride), stride);
            transpose8(&right[8..], to.add(8 * stride + 8), stride);
        })
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        intrinsic!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        memory!(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m512) {
        memory!(_mm512_storeu_ps(p, a))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        memory!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        memory!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))
        )))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        memory!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
            p.cast()
        ))))
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (__m512, __m512) {
        memory!({
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            // The number of each lane's lowest four bits: no mask and no conversion.
            let numbers = _mm512_set_ps(
                15.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0,
                0.0,
            );
            (
                _mm512_permutexvar_ps(bytes, numbers),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), numbers),
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
    unsafe fn load_scales(self, p: *const u8, stride: usize, n: usize, minima: bool) -> __m512 {
        memory!({
            let at = |i| scale(p, stride, n, i);
            let scales = _mm256_set_epi32(at(7), at(6), at(5), at(4), at(3), at(2), at(1), at(0));
            let mask = if minima { -1 } else { 0xffff };
            _mm512_cvtph_ps(_mm256_and_si256(scales, _mm256_set1_epi32(mask)))
        })
    }
    #[inline(always)]
    unsafe fn unpack_scales(self, p: *const u8, to: *mut f32) {
        memory!({
            let both = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadu_si32(p)));
            let eight_each = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
            let numbers = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(six_bit_codes(p)));
            let whole = _mm512_permutexvar_ps(eight_each, both);
            _mm512_storeu_ps(to, _mm512_mul_ps(whole, numbers));
            in_memory(to);
        })
    }
    #[inline(always)]
    unsafe fn unpack_fives(self, fifth: *const u8, low: *const u8, to: *mut u8) {
        memory!({
            let fifth = _mm512_broadcast_i64x4(_mm256_loadu_si256(fifth.cast()));
            let (nibble, five) = (
                _mm512_set1_epi32(0x0f0f_0f0f),
                _mm512_set1_epi32(0x1f1f_1f1f),
            );
            // The halves of a vector are two pairs of groups; the bit of each comes to the fifth place.
            let bits = [
                [
                    _mm512_sllv_epi32(fifth, two(4, 2)),
                    _mm512_sllv_epi32(fifth, two(3, 1)),
                ],
                [
                    _mm512_srlv_epi32(fifth, two(0, 2)),
                    _mm512_srlv_epi32(fifth, two(1, 3)),
                ],
            ];
            for half in 0..2 {
                let bytes = _mm512_loadu_si512(low.add(64 * half).cast());
                let codes = [bytes, _mm512_srli_epi32::<4>(bytes)];
                for i in 0..2 {
                    let codes =
                        _mm512_ternarylogic_epi32::<CHOOSE>(codes[i], bits[half][i], nibble);
                    let codes = _mm512_and_si512(codes, five);
                    let to = to.add(128 * half + 32 * i);
                    _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(codes));
                    let upper = _mm512_extracti64x4_epi64::<1>(codes);
                    _mm256_storeu_si256(to.add(64).cast(), upper);
                }
            }
            in_memory(to);
        })
    }
    #[inline(always)]
    unsafe fn unpack_sixes(self, low: *const u8, high: *const u8, to: *mut u8) {
        memory!({
            let (nibble, six) = (
                _mm512_set1_epi32(0x0f0f_0f0f),
                _mm512_set1_epi32(0x3f3f_3f3f),
            );
            for half in 0..2 {
                let high = _mm256_loadu_si256(high.add(32 * half).cast());
                let high = _mm512_broadcast_i64x4(high);
                let bytes = _mm512_loadu_si512(low.add(64 * half).cast());
                let parts = [
                    (bytes, _mm512_sllv_epi32(high, two(4, 2))),
                    (
                        _mm512_srli_epi32::<4>(bytes),
                        _mm512_srlv_epi32(high, two(0, 2)),
                    ),
                ];
                for i in 0..2 {
                    let (low, high) = parts[i];
                    let codes = _mm512_ternarylogic_epi32::<CHOOSE>(low, high, nibble);
                    let to = to.add(128 * half + 64 * i);
                    _mm512_storeu_si512(to.cast(), _mm512_and_si512(codes, six));
                }
            }
            in_memory(to);
        })
    }
    #[inline(always)]
    fn splat_lane(self, a: __m512, lane: usize) -> __m512 {
        intrinsic!(_mm512_permutexvar_ps(_mm512_set1_epi32(lane as i32), a))
    }
    #[inline(always)]
    fn dot_halves(self, a: __m256i, b: __m256i) -> __m512 {
        intrinsic!(_mm512_zextps256_ps512(_mm256_cvtepi32_ps(dot_unsigned(
            a, b
        ))))
    }
    #[inline(always)]
    fn dot_bytes(self, a: __m256i, b: __m256i) -> __m512 {
        intrinsic!(_mm512_zextps256_ps512(_mm256_cvtepi32_ps(dot_signed(a, b))))
    }
}
