//! Vectors of `f32` for the kernels, one implementation per instruction set.
//!
//! A kernel body is written once, generic over [`Simd`], fully inlined, and instantiated inside a
//! function that enables the instruction set (`vectorize`). The choice is made at run time, once
//! per process ([`Isa::best`]). A value of an implementing type is the proof that the processor
//! has the instructions, so the arithmetic methods are safe; only those that take pointers are not.

use std::sync::OnceLock;

/// One instruction set's vector of `f32` and the operations that the kernels need.
pub(super) trait Simd: Copy + Send + Sync + 'static {
    /// A vector of [`Self::LANES`] numbers.
    type V: Copy;
    /// 32 bytes.
    type Bytes: Copy;
    /// Numbers in a vector: 4, 8 or 16.
    const LANES: usize;

    /// Runs `f` where the instruction set is enabled. What `f` calls must be inlined into it.
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// All lanes the IEEE half-precision number with these bits.
    fn splat_f16(self, bits: u16) -> Self::V;
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`; rounded once where the hardware does so.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a` where `a > b`, else `b`: a NaN in `b` stays, a NaN in `a` is dropped.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a` where `a < b`, else `b`: a NaN in `b` stays, a NaN in `a` is dropped.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The larger; NaN if either is.
    fn max_nan(self, a: Self::V, b: Self::V) -> Self::V;
    /// `then` where `a == b`, else `otherwise` (NaN equals nothing).
    fn if_eq(self, a: Self::V, b: Self::V, then: Self::V, otherwise: Self::V) -> Self::V;
    /// `2^n` for lanes of `1.5 * 2^23 + n` with whole `n` in `-127..=128`; `n = -127` gives 0
    /// and `n = 128` +∞.
    fn pow2_of_magic(self, t: Self::V) -> Self::V;
    /// Sum over the lanes.
    fn sum(self, a: Self::V) -> f32;
    /// Sums over the lanes of four vectors.
    fn sum4(self, a: [Self::V; 4]) -> [f32; 4];
    /// Largest lane; NaN lanes may be dropped.
    fn largest(self, a: Self::V) -> f32;

    /// Transposes a square of [`Self::LANES`] by as many numbers: number `j` of the row at
    /// `rows[i]` goes to `to + j * stride + i`.
    ///
    /// # Safety
    /// `rows` must hold that many pointers, each valid for reading that many numbers, and `to`
    /// must be valid for writing as many rows of as many numbers, `stride` apart.
    unsafe fn transpose(self, rows: &[*const f32], to: *mut f32, stride: usize);
    /// Asks for the cache line at `p`, which may be any address.
    fn prefetch(self, p: *const u8);
    /// Reads [`Self::LANES`] numbers.
    ///
    /// # Safety
    /// `p` must be valid for reading that many.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// Writes [`Self::LANES`] numbers.
    ///
    /// # Safety
    /// `p` must be valid for writing that many.
    unsafe fn store(self, p: *mut f32, a: Self::V);
    /// Reads [`Self::LANES`] IEEE half-precision numbers.
    ///
    /// # Safety
    /// `p` must be valid for reading that many.
    unsafe fn load_f16(self, p: *const u16) -> Self::V;
    /// Reads [`Self::LANES`] bfloat16 numbers.
    ///
    /// # Safety
    /// `p` must be valid for reading that many.
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    /// Reads [`Self::LANES`] signed bytes.
    ///
    /// # Safety
    /// `p` must be valid for reading that many.
    unsafe fn load_i8(self, p: *const i8) -> Self::V;
    /// Reads [`Self::LANES`] bytes: their low four bits and their high four bits, as numbers.
    ///
    /// # Safety
    /// `p` must be valid for reading that many.
    unsafe fn load_nibbles(self, p: *const u8) -> (Self::V, Self::V);
    /// Reads 32 bytes.
    ///
    /// # Safety
    /// `p` must be valid for reading that many.
    unsafe fn load_bytes(self, p: *const u8) -> Self::Bytes;
    /// Reads 16 bytes: their low four bits and then their high four bits, a byte each.
    ///
    /// # Safety
    /// `p` must be valid for reading 16 bytes.
    unsafe fn load_halves(self, p: *const u8) -> Self::Bytes;
    /// `n` heads of blocks, `stride` bytes apart, at most [`Self::LANES`]` / 2`: two IEEE
    /// half-precision numbers each, the second one read as 0 unless `pairs`. Other lanes are 0.
    ///
    /// # Safety
    /// `p` must be valid for reading four bytes at each of the first `n` multiples of `stride`.
    unsafe fn load_heads(self, p: *const u8, stride: usize, n: usize, pairs: bool) -> Self::V;
    /// All lanes lane `lane` of `a`.
    fn splat_lane(self, a: Self::V, lane: usize) -> Self::V;
    /// A vector whose lanes add up to `a · b` in whole numbers, `a` below 16 and `b` signed.
    fn dot_halves(self, a: Self::Bytes, b: Self::Bytes) -> Self::V;
    /// A vector whose lanes add up to `a · b` in whole numbers, both signed, `b` above -128.
    fn dot_bytes(self, a: Self::Bytes, b: Self::Bytes) -> Self::V;
}

/// The first [`Simd::LANES`] numbers of `x`.
#[inline(always)]
pub(super) fn load<S: Simd>(s: S, x: &[f32]) -> S::V {
    assert!(x.len() >= S::LANES);
    // SAFETY: the length was checked.
    unsafe { s.load(x.as_ptr()) }
}

/// Writes to the first [`Simd::LANES`] numbers of `x`.
#[inline(always)]
pub(super) fn store<S: Simd>(s: S, x: &mut [f32], a: S::V) {
    assert!(x.len() >= S::LANES);
    // SAFETY: the length was checked.
    unsafe { s.store(x.as_mut_ptr(), a) }
}

/// 1.5 * 2^23: adding it rounds to a whole number.
pub(super) const MAGIC: f32 = 12_582_912.0;

/// `2^x` for `x` in `[-0.5, 0.5]`: minimax polynomial of degree 6, exact at 0, relative error
/// 2e-9 before rounding.
#[inline(always)]
fn exp2_fraction<S: Simd>(s: S, f: S::V) -> S::V {
    let mut p = s.splat(1.535_336e-4);
    for c in [
        1.339_887_5e-3,
        9.618_437e-3,
        5.550_332_5e-2,
        2.402_264_8e-1,
        6.931_472e-1,
        1.0,
    ] {
        p = s.fma(p, f, s.splat(c));
    }
    p
}

/// `2^x` for `x <= 0`, at most 1 ulp off; 0 below -126.5 and for -inf; NaN stays NaN.
#[inline(always)]
pub(super) fn exp2_nonpositive<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(s.splat(-127.0), x);
    let t = s.add(x, s.splat(MAGIC));
    let f = s.sub(x, s.sub(t, s.splat(MAGIC)));
    s.mul(exp2_fraction(s, f), s.pow2_of_magic(t))
}

/// `e^x` for any `x`, within 2 ulp in the normal range: 0 below about -87.7, +∞ above about 88.37
/// (a little early), NaN stays NaN.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Cody–Waite: ln 2 in two parts, so that the reduced argument keeps its last bits.
    let x = s.min(s.splat(89.0), s.max(s.splat(-88.02), x));
    let t = s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(MAGIC));
    let n = s.sub(t, s.splat(MAGIC));
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let p = exp2_fraction(s, s.mul(r, s.splat(std::f32::consts::LOG2_E)));
    s.mul(p, s.pow2_of_magic(t))
}

/// The instruction sets that kernels are compiled for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Isa {
    /// Whatever the target has by default.
    Portable(Portable),
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    /// AVX-512F.
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
}

impl Isa {
    /// The best one that this processor has.
    pub(super) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| *Self::all().last().unwrap_or(&Isa::Portable(Portable)))
    }

    /// All that this processor has, the best last.
    pub(super) fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Isa::Portable(Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(x86::Avx2::detect().map(Isa::Avx2));
            all.extend(x86::Avx512::detect().map(Isa::Avx512));
        }
        all
    }

    /// Numbers in a vector.
    #[cfg(test)]
    pub(super) fn lanes(self) -> usize {
        match self {
            Isa::Portable(_) => Portable::LANES,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => x86::Avx2::LANES,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => x86::Avx512::LANES,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Isa::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2+fma+f16c",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512f",
        }
    }
}

/// Evaluates an expression with `$s` bound to the vectors of the instruction set `$isa`, compiled
/// for it. All functions in the expression must be `#[inline(always)]`.
macro_rules! dispatch {
    ($isa:expr, $s:ident => $body:expr) => {
        match $isa {
            $crate::simd::Isa::Portable($s) => $body,
            #[cfg(target_arch = "x86_64")]
            $crate::simd::Isa::Avx2($s) => $crate::simd::Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
            #[cfg(target_arch = "x86_64")]
            $crate::simd::Isa::Avx512($s) => $crate::simd::Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
        }
    };
}
pub(super) use dispatch;

/// Plain Rust on arrays of four, which compilers turn into the target's default vectors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portable;

/// The vector of [`Portable`].
#[derive(Debug, Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct F32x4([f32; 4]);

#[inline(always)]
fn map2(a: F32x4, b: F32x4, f: impl Fn(f32, f32) -> f32) -> F32x4 {
    F32x4([
        f(a.0[0], b.0[0]),
        f(a.0[1], b.0[1]),
        f(a.0[2], b.0[2]),
        f(a.0[3], b.0[3]),
    ])
}

impl Simd for Portable {
    type V = F32x4;
    type Bytes = [u8; 32];
    const LANES: usize = 4;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F32x4 {
        F32x4([x; 4])
    }
    #[inline(always)]
    fn splat_f16(self, bits: u16) -> F32x4 {
        F32x4([f16_bits_to_f32(bits); 4])
    }
    #[inline(always)]
    fn add(self, a: F32x4, b: F32x4) -> F32x4 {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: F32x4, b: F32x4) -> F32x4 {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: F32x4, b: F32x4) -> F32x4 {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: F32x4, b: F32x4) -> F32x4 {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: F32x4, b: F32x4, c: F32x4) -> F32x4 {
        // A fused multiply-add that the target lacks would be a slow library call.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            F32x4(std::array::from_fn(|i| a.0[i].mul_add(b.0[i], c.0[i])))
        } else {
            F32x4(std::array::from_fn(|i| a.0[i] * b.0[i] + c.0[i]))
        }
    }
    #[inline(always)]
    fn max(self, a: F32x4, b: F32x4) -> F32x4 {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: F32x4, b: F32x4) -> F32x4 {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max_nan(self, a: F32x4, b: F32x4) -> F32x4 {
        map2(a, b, |a, b| if a > b || a.is_nan() { a } else { b })
    }
    #[inline(always)]
    fn if_eq(self, a: F32x4, b: F32x4, then: F32x4, otherwise: F32x4) -> F32x4 {
        F32x4(std::array::from_fn(|i| {
            if a.0[i] == b.0[i] {
                then.0[i]
            } else {
                otherwise.0[i]
            }
        }))
    }
    #[inline(always)]
    fn pow2_of_magic(self, t: F32x4) -> F32x4 {
        F32x4(t.0.map(|t| f32::from_bits((t.to_bits() << 23).wrapping_add(127 << 23))))
    }
    #[inline(always)]
    fn sum(self, a: F32x4) -> f32 {
        (a.0[0] + a.0[2]) + (a.0[1] + a.0[3])
    }
    #[inline(always)]
    fn sum4(self, a: [F32x4; 4]) -> [f32; 4] {
        a.map(|a| self.sum(a))
    }
    #[inline(always)]
    fn largest(self, a: F32x4) -> f32 {
        a.0[0].max(a.0[2]).max(a.0[1].max(a.0[3]))
    }
    #[inline(always)]
    unsafe fn transpose(self, rows: &[*const f32], to: *mut f32, stride: usize) {
        for (i, row) in rows[..4].iter().enumerate() {
            for j in 0..4 {
                // SAFETY: promised by the caller.
                unsafe { *to.add(j * stride + i) = *row.add(j) };
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F32x4 {
        // SAFETY: the caller promises four readable numbers.
        F32x4(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: F32x4) {
        // SAFETY: the caller promises four writable numbers.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(a.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> F32x4 {
        // SAFETY: the caller promises four readable numbers.
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        F32x4(bits.map(f16_bits_to_f32))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> F32x4 {
        // SAFETY: the caller promises four readable numbers.
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        F32x4(bits.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> F32x4 {
        // SAFETY: the caller promises four readable numbers.
        F32x4(unsafe { p.cast::<[i8; 4]>().read_unaligned() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (F32x4, F32x4) {
        // SAFETY: the caller promises four readable numbers.
        let bytes = unsafe { p.cast::<[u8; 4]>().read_unaligned() };
        (
            F32x4(bytes.map(|b| f32::from(b & 15))),
            F32x4(bytes.map(|b| f32::from(b >> 4))),
        )
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> [u8; 32] {
        // SAFETY: the caller promises as many readable bytes.
        unsafe { p.cast::<[u8; 32]>().read() }
    }
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u8) -> [u8; 32] {
        // SAFETY: the caller promises as many readable bytes.
        let bytes = unsafe { p.cast::<[u8; 16]>().read() };
        let (mut out, (low, high)) = ([0; 32], (bytes.map(|b| b & 15), bytes.map(|b| b >> 4)));
        out[..16].copy_from_slice(&low);
        out[16..].copy_from_slice(&high);
        out
    }
    #[inline(always)]
    unsafe fn load_heads(self, p: *const u8, stride: usize, n: usize, pairs: bool) -> F32x4 {
        let at = |i: usize| match i < n {
            // SAFETY: the caller promises four readable bytes there.
            true => unsafe { p.add(i * stride).cast::<[u8; 4]>().read() },
            false => [0; 4],
        };
        let ([a, b, c, d], [e, f, g, h]) = (at(0), at(1));
        let halves = [[a, b], [c, d], [e, f], [g, h]].map(u16::from_le_bytes);
        let mut out = halves.map(f16_bits_to_f32);
        if !pairs {
            (out[1], out[3]) = (0.0, 0.0);
        }
        F32x4(out)
    }
    #[inline(always)]
    fn splat_lane(self, a: F32x4, lane: usize) -> F32x4 {
        F32x4([a.0[lane]; 4])
    }
    #[inline(always)]
    fn dot_halves(self, a: [u8; 32], b: [u8; 32]) -> F32x4 {
        self.dot_bytes(a, b)
    }
    #[inline(always)]
    fn dot_bytes(self, a: [u8; 32], b: [u8; 32]) -> F32x4 {
        F32x4(std::array::from_fn(|lane| {
            let (a, b) = (&a[8 * lane..8 * lane + 8], &b[8 * lane..8 * lane + 8]);
            let products = a.iter().zip(b);
            let products =
                products.map(|(a, b)| i32::from(a.cast_signed()) * i32::from(b.cast_signed()));
            products.sum::<i32>() as f32
        }))
    }
}

/// IEEE half to single precision without branches: the exponent is rebased by one multiplication,
/// which also normalises subnormals.
#[inline(always)]
fn f16_bits_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = (bits & 0x7fff) << 13;
    let rebased = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000); // 2^112
    // Exponent 31 of a half (infinity, NaN) maps to exponent 255.
    let special = if magnitude >= 0x0f80_0000 {
        0x7f80_0000
    } else {
        0
    };
    f32::from_bits(rebased.to_bits() | special | ((bits & 0x8000) << 16))
}

/// x86-64 with vectors of 8 (AVX2) and 16 (AVX-512).
#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    /// AVX2, FMA and F16C: 8 lanes.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Avx2(());

    /// AVX-512F: 16 lanes.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Avx512(());

    impl Avx2 {
        pub(super) fn detect() -> Option<Self> {
            (is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"))
            .then_some(Self(()))
        }
    }

    impl Avx512 {
        pub(super) fn detect() -> Option<Self> {
            (is_x86_feature_detected!("avx512f") && Avx2::detect().is_some()).then_some(Self(()))
        }
    }

    /// Intrinsics on registers only.
    macro_rules! intrinsic {
        ($e:expr) => {
            // SAFETY: the receiver exists only where the instructions were detected, and they
            // touch no memory.
            unsafe { $e }
        };
    }

    /// Intrinsics that read or write through the pointer which the caller vouches for.
    macro_rules! memory {
        ($e:expr) => {
            // SAFETY: the receiver exists only where the instructions were detected, and the
            // caller promises that the pointer is valid for one vector.
            unsafe { $e }
        };
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
    unsafe fn transpose8(rows: &[*const f32], to: *mut f32, stride: usize) {
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
    unsafe fn halves(p: *const u8) -> __m256i {
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
    /// As [`Simd::load_heads`].
    #[inline(always)]
    unsafe fn head(p: *const u8, stride: usize, n: usize, i: usize) -> i32 {
        match i < n {
            // SAFETY: promised by the caller.
            true => unsafe { p.add(i * stride).cast::<i32>().read_unaligned() },
            false => 0,
        }
    }

    /// Sums of four products of `a` without and `b` with a sign, no two of which exceed 16 bits.
    ///
    /// # Safety
    /// The processor must have AVX2.
    #[inline(always)]
    unsafe fn dot_unsigned(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: promised by the caller.
        unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)) }
    }

    /// Sums of four products of signed bytes, those of `b` above -128.
    ///
    /// # Safety
    /// The processor must have AVX2.
    #[inline(always)]
    unsafe fn dot_signed(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: promised by the caller. |a| is at most 128, which fits without a sign.
        unsafe { dot_unsigned(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a)) }
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
        unsafe fn load_heads(self, p: *const u8, stride: usize, n: usize, pairs: bool) -> __m256 {
            memory!({
                let at = |i| head(p, stride, n, i);
                let heads = _mm_set_epi32(at(3), at(2), at(1), at(0));
                let mask = if pairs { -1 } else { 0xffff };
                _mm256_cvtph_ps(_mm_and_si128(heads, _mm_set1_epi32(mask)))
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
                (
                    _mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15))),
                    _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(bytes)),
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
        unsafe fn load_heads(self, p: *const u8, stride: usize, n: usize, pairs: bool) -> __m512 {
            memory!({
                let at = |i| head(p, stride, n, i);
                let heads =
                    _mm256_set_epi32(at(7), at(6), at(5), at(4), at(3), at(2), at(1), at(0));
                let mask = if pairs { -1 } else { 0xffff };
                _mm512_cvtph_ps(_mm256_and_si256(heads, _mm256_set1_epi32(mask)))
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(isa: Isa, x: &[f32], f: u8) -> Vec<f32> {
        #[inline(always)]
        fn body<S: Simd>(s: S, x: &[f32], f: u8) -> Vec<f32> {
            let mut out = vec![0.0; x.len()];
            for (x, y) in x.chunks_exact(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
                let v = load(s, x);
                let v = if f == 0 {
                    exp2_nonpositive(s, v)
                } else {
                    exp(s, v)
                };
                store(s, y, v);
            }
            out
        }
        dispatch!(isa, s => body(s, x, f))
    }

    #[test]
    fn exponentials_are_within_two_ulp() {
        let n = 1 << 16;
        for isa in Isa::all() {
            let x: Vec<f32> = (0..n).map(|i| -126.0 * i as f32 / n as f32).collect();
            for (x, y) in x.iter().zip(map(isa, &x, 0)) {
                let exact = f64::from(*x).exp2();
                let ulp = f64::from((exact as f32).next_up() - exact as f32);
                assert!(
                    (f64::from(y) - exact).abs() <= 2.0 * ulp,
                    "{isa:?} 2^{x}: {y} for {exact}"
                );
            }
            let x: Vec<f32> = (0..n)
                .map(|i| -87.0 + 175.3 * i as f32 / n as f32)
                .collect();
            for (x, y) in x.iter().zip(map(isa, &x, 1)) {
                let exact = f64::from(*x).exp();
                let ulp = f64::from((exact as f32).next_up() - exact as f32);
                assert!(
                    (f64::from(y) - exact).abs() <= 2.5 * ulp,
                    "{isa:?} e^{x}: {y} for {exact}"
                );
            }
        }
    }

    #[test]
    fn exponentials_at_the_edges() {
        for isa in Isa::all() {
            let mut x = vec![f32::NEG_INFINITY, -1e30, -200.0, -0.0, 0.0, f32::NAN];
            x.resize(16, 0.0);
            let y = map(isa, &x, 0);
            assert_eq!(&y[..5], &[0.0, 0.0, 0.0, 1.0, 1.0], "{isa:?}");
            assert!(y[5].is_nan(), "{isa:?}");
            x[1] = f32::INFINITY;
            let y = map(isa, &x, 1);
            assert_eq!(&y[..2], &[0.0, f32::INFINITY], "{isa:?}");
            assert!(y[5].is_nan(), "{isa:?}");
        }
    }

    #[test]
    fn every_half_converts_exactly() {
        for isa in Isa::all() {
            for start in (0..=u16::MAX).step_by(16) {
                let bits: [u16; 16] = std::array::from_fn(|i| start + i as u16);
                let (mut f, mut b) = ([0f32; 16], [0f32; 16]);
                dispatch!(isa, s => {
                    #[inline(always)]
                    fn go<S: Simd>(s: S, bits: &[u16; 16], f: &mut [f32; 16], b: &mut [f32; 16]) {
                        for i in (0..16).step_by(S::LANES) {
                            // SAFETY: LANES divides 16.
                            let (x, y) = unsafe {
                                (s.load_f16(bits.as_ptr().add(i)), s.load_bf16(bits.as_ptr().add(i)))
                            };
                            store(s, &mut f[i..], x);
                            store(s, &mut b[i..], y);
                        }
                    }
                    go(s, &bits, &mut f, &mut b)
                });
                for i in 0..16 {
                    let (ef, eb) = (
                        half::f16::from_bits(bits[i]).to_f32(),
                        half::bf16::from_bits(bits[i]).to_f32(),
                    );
                    assert!(f[i] == ef || (f[i].is_nan() && ef.is_nan()), "{isa:?}");
                    assert!(b[i] == eb || (b[i].is_nan() && eb.is_nan()), "{isa:?}");
                }
            }
        }
    }

    #[test]
    fn lanes_add_up_and_bytes_unpack() {
        #[inline(always)]
        fn body<S: Simd>(s: S) {
            let x: Vec<f32> = (0..64).map(|i| (i * i % 37) as f32 - 11.0).collect();
            let vs: [S::V; 4] = std::array::from_fn(|i| load(s, &x[i * S::LANES..]));
            let sums = s.sum4(vs);
            for i in 0..4 {
                let part = &x[i * S::LANES..(i + 1) * S::LANES];
                assert_eq!(sums[i], part.iter().sum::<f32>());
                assert_eq!(s.sum(vs[i]), part.iter().sum::<f32>());
                assert_eq!(
                    s.largest(vs[i]),
                    part.iter().copied().fold(f32::MIN, f32::max)
                );
            }
            let bytes: [u8; 16] = std::array::from_fn(|i| (i * 73 + 5) as u8);
            let (mut lo, mut hi, mut signed) = ([0f32; 16], [0f32; 16], [0f32; 16]);
            // SAFETY: a vector has at most 16 lanes.
            let ((l, h), i) = unsafe {
                (
                    s.load_nibbles(bytes.as_ptr()),
                    s.load_i8(bytes.as_ptr().cast()),
                )
            };
            store(s, &mut lo, l);
            store(s, &mut hi, h);
            store(s, &mut signed, i);
            for i in 0..S::LANES {
                assert_eq!(lo[i], f32::from(bytes[i] & 15));
                assert_eq!(hi[i], f32::from(bytes[i] >> 4));
                assert_eq!(signed[i], f32::from(bytes[i] as i8));
            }
            let heads: Vec<u8> = (0..8 * 20).map(|i| (i * 7 % 120) as u8).collect();
            // SAFETY: eight heads of 20 bytes.
            let (pairs, firsts) = unsafe {
                (
                    s.load_heads(heads.as_ptr(), 20, S::LANES / 2, true),
                    s.load_heads(heads.as_ptr(), 20, S::LANES / 4, false),
                )
            };
            let (mut both, mut first) = ([0f32; 16], [0f32; 16]);
            store(s, &mut both, pairs);
            store(s, &mut first, firsts);
            for i in 0..S::LANES {
                let at = i / 2 * 20 + i % 2 * 2;
                let expected = half::f16::from_le_bytes([heads[at], heads[at + 1]]).to_f32();
                assert_eq!(both[i], expected);
                let there = i % 2 == 0 && i < S::LANES / 2;
                assert_eq!(first[i], if there { expected } else { 0.0 });
                let mut all = [0f32; 16];
                store(s, &mut all, s.splat_lane(pairs, i));
                assert_eq!(all[..S::LANES], [expected; 16][..S::LANES]);
            }
            let a: [u8; 32] = std::array::from_fn(|i| if i < 2 { 128 } else { (i * 53) as u8 });
            let b: [u8; 32] = std::array::from_fn(|i| ((127 - 8 * i as i32) as i8).cast_unsigned());
            // SAFETY: both have 32 bytes.
            let (whole, halves, other) = unsafe {
                (
                    s.load_bytes(a.as_ptr()),
                    s.load_halves(a.as_ptr()),
                    s.load_bytes(b.as_ptr()),
                )
            };
            let dot = |a: [u8; 32]| -> f32 {
                let products = a.iter().zip(&b);
                let products =
                    products.map(|(a, b)| i32::from(a.cast_signed()) * i32::from(b.cast_signed()));
                products.sum::<i32>() as f32
            };
            assert_eq!(s.sum(s.dot_bytes(whole, other)), dot(a));
            let codes = std::array::from_fn(|i| if i < 16 { a[i] & 15 } else { a[i - 16] >> 4 });
            assert_eq!(s.sum(s.dot_halves(halves, other)), dot(codes));
            let square: Vec<f32> = (0..256).map(|i| i as f32).collect();
            let rows: Vec<*const f32> = (0..16).map(|i| square[i * 16..].as_ptr()).collect();
            let mut turned = vec![-1.0; 18 * 16];
            // SAFETY: rows of 16 numbers, and room for 16 rows 18 apart.
            unsafe { s.transpose(&rows, turned.as_mut_ptr(), 18) };
            for i in 0..16 {
                for j in 0..16 {
                    let inside = i < S::LANES && j < S::LANES;
                    let expected = if inside { square[i * 16 + j] } else { -1.0 };
                    assert_eq!(turned[j * 18 + i], expected);
                }
            }
            let mut nan = [1.0; 16];
            nan[1] = f32::NAN;
            let (a, one) = (load(s, &nan), s.splat(2.0));
            for v in [s.max_nan(a, one), s.max_nan(one, a)] {
                let mut out = [0f32; 16];
                store(s, &mut out, v);
                assert!(out[1].is_nan() && out[0] == 2.0);
            }
        }
        for isa in Isa::all() {
            dispatch!(isa, s => body(s));
        }
    }
}
