//! Vectors of `f32` for the kernels, one implementation per instruction set.
//!
//! A kernel body is written once, generic over [`Simd`], fully inlined, and instantiated inside a
//! function that enables the instruction set (`vectorize`). The choice is made at run time, once
//! per process ([`Isa::best`]). A value of an implementing type is the proof that the processor
//! has the instructions, so the arithmetic methods are safe; only those that take pointers are not.

use std::sync::OnceLock;

/// Intrinsics on registers only.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: the receiver exists only where the instructions were detected, and they touch no
        // memory.
        unsafe { $e }
    };
}

/// Intrinsics that read or write through the pointer which the caller vouches for.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! memory {
    ($e:expr) => {
        // SAFETY: the receiver exists only where the instructions were detected, and the caller
        // promises that the pointer is valid for one vector.
        unsafe { $e }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
use portable::Portable;

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
    /// What `n` blocks (at most [`Self::LANES`]` / 2`), `stride` bytes apart, begin with: scale and
    /// minimum in IEEE half precision, the latter read as 0 unless there are `minima`. Other lanes
    /// are 0.
    ///
    /// # Safety
    /// `p` must be valid for reading four bytes at each of the first `n` multiples of `stride`.
    unsafe fn load_scales(self, p: *const u8, stride: usize, n: usize, minima: bool) -> Self::V;
    /// The scales and then the minima of a super-block's eight groups, as `Q4_K` and `Q5_K` have them: 16
    /// numbers. Each is a code of six bits times a number in half precision.
    ///
    /// # Safety
    /// `p` must be valid for reading 16 bytes, and `to` for writing 16 numbers.
    unsafe fn unpack_scales(self, p: *const u8, to: *mut f32);
    /// The 256 codes of a super-block of `Q5_K`, a byte each.
    ///
    /// # Safety
    /// `fifth` must be valid for reading 32 bytes, `low` for 128, and `to` for writing 256.
    unsafe fn unpack_fives(self, fifth: *const u8, low: *const u8, to: *mut u8);
    /// The 256 codes of a super-block of `Q6_K`, a byte each, as they stand: what they mean is 32 less.
    ///
    /// # Safety
    /// `low` must be valid for reading 128 bytes, `high` for 64, and `to` for writing 256.
    unsafe fn unpack_sixes(self, low: *const u8, high: *const u8, to: *mut u8);
    /// Sums and differences of lanes that stand `HALF` apart, a power of two below [`Self::LANES`]: of each pair the
    /// sum is in the first place, and in the other the first less the second.
    #[inline(always)]
    fn butterfly<const HALF: usize>(self, a: Self::V) -> Self::V {
        let mut lanes = [0.0f32; 16];
        assert!(Self::LANES <= lanes.len());
        // SAFETY: there is room for a vector.
        unsafe { self.store(lanes.as_mut_ptr(), a) };
        for i in 0..Self::LANES {
            if i & HALF == 0 {
                let (x, y) = (lanes[i], lanes[i + HALF]);
                (lanes[i], lanes[i + HALF]) = (x + y, x - y);
            }
        }
        // SAFETY: as above.
        unsafe { self.load(lanes.as_ptr()) }
    }
    /// Reads [`Self::LANES`] bytes: of each the bits from `shift` on that `mask` has, as a number.
    ///
    /// # Safety
    /// `p` must be valid for reading that many.
    #[inline(always)]
    unsafe fn load_codes(self, p: *const u8, shift: u32, mask: u8) -> Self::V {
        let mut lanes = [0.0f32; 16];
        assert!(Self::LANES <= lanes.len());
        for (i, lane) in lanes.iter_mut().enumerate().take(Self::LANES) {
            // SAFETY: promised by the caller.
            *lane = f32::from(unsafe { *p.add(i) } >> shift & mask);
        }
        // SAFETY: there is a vector of them.
        unsafe { self.load(lanes.as_ptr()) }
    }
    /// `a`, and `b` added in the lanes whose bit is set.
    #[inline(always)]
    fn add_where(self, a: Self::V, bits: u32, b: f32) -> Self::V {
        let mut lanes = [0.0f32; 16];
        assert!(Self::LANES <= lanes.len());
        for (i, lane) in lanes.iter_mut().enumerate().take(Self::LANES) {
            *lane = if bits >> i & 1 == 1 { b } else { 0.0 };
        }
        // SAFETY: there is a vector of them.
        self.add(a, unsafe { self.load(lanes.as_ptr()) })
    }
    /// All lanes lane `lane` of `a`.
    fn splat_lane(self, a: Self::V, lane: usize) -> Self::V;
    /// A vector whose lanes add up to `a · b` in whole numbers, `a` below 16 and `b` signed.
    fn dot_halves(self, a: Self::Bytes, b: Self::Bytes) -> Self::V;
    /// A vector whose lanes add up to `a · b` in whole numbers, both signed, `b` above -128.
    fn dot_bytes(self, a: Self::Bytes, b: Self::Bytes) -> Self::V;
}

/// The codes of six bits of a super-block that begins with two halves, a byte each: four scales and four minima,
/// and then those of the other four groups.
///
/// # Safety
/// `p` must be valid for reading 16 bytes.
#[inline(always)]
unsafe fn six_bits(p: *const u8) -> [u64; 2] {
    // SAFETY: promised by the caller.
    let (first, last) = unsafe {
        (
            p.add(4).cast::<[u8; 8]>().read(),
            p.add(12).cast::<[u8; 4]>().read(),
        )
    };
    // The first ones stand alone in their bytes, whose upper two bits are those of the others.
    let (first, last) = (
        u64::from_le_bytes(first),
        u64::from(u32::from_le_bytes(last)),
    );
    let low = (last | last << 28) & 0x0f0f_0f0f_0f0f_0f0f;
    [
        first & 0x3f3f_3f3f_3f3f_3f3f,
        low | first >> 2 & 0x3030_3030_3030_3030,
    ]
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

/// In the environment: `portable`, `avx2`, `avx512f`, `amx` or `neon` instead of the best. What the processor does not have
/// changes nothing.
const CHOICE: &str = "LOCRET_INSTRUCTIONS";

/// The instruction sets that kernels are compiled for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Isa {
    /// Whatever the target has by default.
    Portable(Portable),
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    /// AVX-512F, and perhaps AMX for products of many tokens.
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512, Option<amx::Amx>),
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
}

impl Isa {
    /// The best one that this processor has, or the one whose name the environment begins.
    pub(super) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let all = Self::all();
            let asked = std::env::var(CHOICE).ok();
            let asked = asked.and_then(|name| all.iter().find(|isa| isa.name().starts_with(&name)));
            *asked.or(all.last()).unwrap_or(&Isa::Portable(Portable))
        })
    }

    /// All that this processor has, the best last.
    pub(super) fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Isa::Portable(Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(avx2::Avx2::detect().map(Isa::Avx2));
            if let Some(vectors) = avx512::Avx512::detect() {
                all.push(Isa::Avx512(vectors, None));
                let tiles = amx::Amx::detect();
                all.extend(tiles.map(|tiles| Isa::Avx512(vectors, Some(tiles))));
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.extend(neon::Neon::detect().map(Isa::Neon));
        all
    }

    /// Numbers in a vector.
    pub(super) fn lanes(self) -> usize {
        match self {
            Isa::Portable(_) => Portable::LANES,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => avx2::Avx2::LANES,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(..) => avx512::Avx512::LANES,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) => neon::Neon::LANES,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Isa::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2+fma+f16c",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_, None) => "avx512f",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_, Some(_)) => "amx+avx512f",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) => "neon",
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
            $crate::simd::Isa::Avx512($s, _) => $crate::simd::Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
            #[cfg(target_arch = "aarch64")]
            $crate::simd::Isa::Neon($s) => $crate::simd::Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
        }
    };
}
pub(super) use dispatch;

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

    /// That a run with another one asked for is one.
    #[test]
    fn the_environment_chooses() {
        let best = Isa::best().name();
        match std::env::var(CHOICE) {
            Ok(asked) => assert!(best.starts_with(&asked), "{asked} is not here: {best}"),
            Err(_) => assert_eq!(best, Isa::all().last().unwrap().name()),
        }
    }

    #[test]
    fn exponentials_are_within_two_ulp() {
        let n = if cfg!(miri) { 1 << 8 } else { 1 << 16 };
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
            let step = if cfg!(miri) { 16 * 251 } else { 16 };
            for start in (0..=u16::MAX - 15).step_by(step) {
                let bits: [u16; 16] = std::array::from_fn(|i| start + i as u16);
                let (mut f, mut b) = ([0f32; 16], [0f32; 16]);
                dispatch!(isa, s => {
                    #[inline(always)]
                    fn both<S: Simd>(s: S, bits: &[u16; 16], f: &mut [f32; 16], b: &mut [f32; 16]) {
                        for i in (0..16).step_by(S::LANES) {
                            // SAFETY: LANES divides 16.
                            let (x, y) = unsafe {
                                (s.load_f16(bits.as_ptr().add(i)), s.load_bf16(bits.as_ptr().add(i)))
                            };
                            store(s, &mut f[i..], x);
                            store(s, &mut b[i..], y);
                        }
                    }
                    both(s, &bits, &mut f, &mut b)
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
            let blocks: Vec<u8> = (0..8 * 20).map(|i| (i * 7 % 120) as u8).collect();
            // SAFETY: eight blocks of 20 bytes.
            let (pairs, firsts) = unsafe {
                (
                    s.load_scales(blocks.as_ptr(), 20, S::LANES / 2, true),
                    s.load_scales(blocks.as_ptr(), 20, S::LANES / 4, false),
                )
            };
            let (mut both, mut first) = ([0f32; 16], [0f32; 16]);
            store(s, &mut both, pairs);
            store(s, &mut first, firsts);
            for i in 0..S::LANES {
                let at = i / 2 * 20 + i % 2 * 2;
                let expected = half::f16::from_le_bytes([blocks[at], blocks[at + 1]]).to_f32();
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
