//! Vectors of 4 for any processor.

use super::{Simd, six_bits};

/// Plain Rust on arrays of four, which compilers turn into the target's default vectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

/// The vector of [`Portable`].
#[derive(Debug, Clone, Copy)]
#[repr(C, align(16))]
pub(crate) struct F32x4([f32; 4]);

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
    unsafe fn load_scales(self, p: *const u8, stride: usize, n: usize, minima: bool) -> F32x4 {
        let at = |i: usize| match i < n {
            // SAFETY: the caller promises four readable bytes there.
            true => unsafe { p.add(i * stride).cast::<[u8; 4]>().read() },
            false => [0; 4],
        };
        let ([a, b, c, d], [e, f, g, h]) = (at(0), at(1));
        let halves = [[a, b], [c, d], [e, f], [g, h]].map(u16::from_le_bytes);
        let mut out = halves.map(f16_bits_to_f32);
        if !minima {
            (out[1], out[3]) = (0.0, 0.0);
        }
        F32x4(out)
    }
    #[inline(always)]
    unsafe fn unpack_scales(self, p: *const u8, to: *mut f32) {
        // SAFETY: promised by the caller.
        let (codes, halves) = unsafe { (six_bits(p), p.cast::<[[u8; 2]; 2]>().read()) };
        let whole = halves.map(|half| f16_bits_to_f32(u16::from_le_bytes(half)));
        let mut out = [0.0; 16];
        for (i, codes) in codes.into_iter().enumerate() {
            for (j, code) in codes.to_le_bytes().into_iter().enumerate() {
                out[8 * (j / 4) + 4 * i + j % 4] = whole[j / 4] * f32::from(code);
            }
        }
        // SAFETY: promised by the caller.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(out) };
    }
    #[inline(always)]
    unsafe fn unpack_fives(self, fifth: *const u8, low: *const u8, to: *mut u8) {
        // SAFETY: promised by the caller.
        let (fifth, low, to) = unsafe {
            (
                &*fifth.cast::<[u8; 32]>(),
                &*low.cast::<[u8; 128]>(),
                &mut *to.cast::<[u8; 256]>(),
            )
        };
        for (pair, (low, to)) in low
            .chunks_exact(32)
            .zip(to.chunks_exact_mut(64))
            .enumerate()
        {
            for (i, (low, fifth)) in low.iter().zip(fifth).enumerate() {
                to[i] = low & 15 | (fifth >> (2 * pair) & 1) << 4;
                to[i + 32] = low >> 4 | (fifth >> (2 * pair + 1) & 1) << 4;
            }
        }
    }
    #[inline(always)]
    unsafe fn unpack_sixes(self, low: *const u8, high: *const u8, to: *mut u8) {
        // SAFETY: promised by the caller.
        let (low, high, to) = unsafe {
            (
                &*low.cast::<[u8; 128]>(),
                &*high.cast::<[u8; 64]>(),
                &mut *to.cast::<[u8; 256]>(),
            )
        };
        let halves = low.chunks_exact(64).zip(high.chunks_exact(32));
        for ((low, high), to) in halves.zip(to.chunks_exact_mut(128)) {
            for (i, high) in high.iter().enumerate() {
                to[i] = low[i] & 15 | (high & 3) << 4;
                to[i + 32] = low[i + 32] & 15 | (high >> 2 & 3) << 4;
                to[i + 64] = low[i] >> 4 | (high >> 4 & 3) << 4;
                to[i + 96] = low[i + 32] >> 4 | (high >> 6) << 4;
            }
        }
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
