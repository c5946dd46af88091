//! Plain numbers, which convert one by one.

use super::DType;
use crate::{simd::Simd, tiles::Floats};
use bytemuck::Pod;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use std::fmt::Debug;

/// A type of plain numbers that weights and caches are kept in: `f32`, `f16` or `bf16`.
#[expect(
    private_bounds,
    reason = "kernels know every type: there can be no others"
)]
pub trait Number: Vectors + Pod + Send + Sync + Debug {
    /// What the type is called in files.
    const DTYPE: DType;

    /// The nearest number; infinite beyond the largest.
    fn from_f32(x: f32) -> Self;

    /// The same number.
    fn to_f32(self) -> f32;

    /// The nearest numbers, written over as many others.
    ///
    /// # Panics
    /// If there are more or fewer of the others.
    fn convert(from: &[f32], to: &mut [Self]) {
        assert_eq!(from.len(), to.len(), "numbers to convert");
        for (to, from) in to.iter_mut().zip(from) {
            *to = Self::from_f32(*from);
        }
    }

    /// The nearest numbers; without a copy where they are the same.
    fn from_f32s(x: Vec<f32>) -> Vec<Self> {
        x.into_iter().map(Self::from_f32).collect()
    }

    /// The same numbers; without a copy where they are in single precision.
    fn into_f32s(x: Vec<Self>) -> Vec<f32> {
        x.into_iter().map(Self::to_f32).collect()
    }

    /// A slice whose type is known when the program runs.
    fn floats(x: &[Self]) -> Floats<'_>;
}

/// How vectors are loaded from numbers.
pub(crate) trait Vectors: Sized {
    /// Whether loading takes more than a load.
    const CONVERTED: bool;

    /// Reads [`Simd::LANES`] numbers.
    ///
    /// # Safety
    /// `p` must be valid for reading that many; it need not be aligned.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
}

impl Number for f32 {
    const DTYPE: DType = DType::F32;

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    fn convert(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
    fn from_f32s(x: Vec<f32>) -> Vec<Self> {
        x
    }
    fn into_f32s(x: Vec<Self>) -> Vec<f32> {
        x
    }
    fn floats(x: &[Self]) -> Floats<'_> {
        Floats::F32(x)
    }
}

impl Vectors for f32 {
    const CONVERTED: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise is passed on.
        unsafe { s.load(p) }
    }
}

impl Number for f16 {
    const DTYPE: DType = DType::F16;

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn convert(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
    fn floats(x: &[Self]) -> Floats<'_> {
        Floats::F16(x)
    }
}

impl Vectors for f16 {
    const CONVERTED: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise is passed on; f16 is a transparent u16.
        unsafe { s.load_f16(p.cast()) }
    }
}

impl Number for bf16 {
    const DTYPE: DType = DType::BF16;

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn convert(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
    fn floats(x: &[Self]) -> Floats<'_> {
        Floats::Bf16(x)
    }
}

impl Vectors for bf16 {
    const CONVERTED: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise is passed on; bf16 is a transparent u16.
        unsafe { s.load_bf16(p.cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back<T: Number + PartialEq>() {
        let x = vec![0.0, -1.5, 2.0, f32::INFINITY];
        let numbers = T::from_f32s(x.clone());
        assert_eq!(T::floats(&numbers).len(), 4);
        assert_eq!(Some(size_of::<T>()), T::DTYPE.bytes(1));
        let each: Vec<T> = x.iter().map(|x| T::from_f32(*x)).collect();
        assert_eq!(each, numbers);
        assert_eq!(T::into_f32s(numbers), x);
        // Whole vectors and what is left of them: ties, what is too large, and what is hardly there.
        let more: Vec<f32> = (0..45)
            .map(|i| [1.0 + 2f32.powi(-i / 3), -1e5 * i as f32, 1e-8 * i as f32][i as usize % 3])
            .collect();
        for n in 0..more.len() {
            let mut found = vec![T::from_f32(7.0); n];
            T::convert(&more[..n], &mut found);
            let each: Vec<T> = more[..n].iter().map(|x| T::from_f32(*x)).collect();
            assert_eq!(found, each);
        }
    }

    #[test]
    fn numbers_are_themselves_after_a_conversion_and_back() {
        there_and_back::<f32>();
        there_and_back::<f16>();
        there_and_back::<bf16>();
    }
}
