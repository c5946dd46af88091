//! How kernels read the units of one KV head.

use super::{
    dtype::Number,
    simd::{Isa, Simd, dispatch},
};
use half::{bf16, f16};
use std::ops::Range;

/// The keys and values of one KV head, `[units, head_dim]` each, in sequence order.
///
/// Kernels ask for a tile of consecutive units at a time. A store of `f32` hands out its own
/// memory; one of another type fills the scratch memory that it is given and hands that out.
pub trait KvTiles: Sync {
    /// Units.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The keys of a range of units as rows `[range.len(), head_dim]`.
    ///
    /// `range` lies within `0..len()`, and `scratch` has room for exactly these rows or more; its
    /// contents before the call are unspecified.
    fn keys<'a>(&'a self, range: Range<usize>, scratch: &'a mut [f32]) -> &'a [f32];

    /// The values of a range of units, as [`keys`](Self::keys).
    fn values<'a>(&'a self, range: Range<usize>, scratch: &'a mut [f32]) -> &'a [f32];

    /// The keys of a range of units in the type and place they are stored in, `[range.len(),
    /// head_dim]`, if they lie there as plain floats: they are then converted as they are used.
    fn stored_keys(&self, range: Range<usize>) -> Option<Floats<'_>> {
        let _ = range;
        None
    }

    /// The values of a range of units, as [`stored_keys`](Self::stored_keys).
    fn stored_values(&self, range: Range<usize>) -> Option<Floats<'_>> {
        let _ = range;
        None
    }
}

/// Numbers in one of the float types that stores use.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

/// Evaluates an expression with `$x` bound to the numbers in their own type.
macro_rules! each_type {
    ($floats:expr, $x:ident => $body:expr) => {
        match $floats {
            $crate::tiles::Floats::F32($x) => $body,
            $crate::tiles::Floats::F16($x) => $body,
            $crate::tiles::Floats::Bf16($x) => $body,
        }
    };
}
pub(super) use each_type;

impl<'a> Floats<'a> {
    /// How many numbers.
    pub fn len(&self) -> usize {
        each_type!(self, x => x.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A range of the numbers.
    ///
    /// # Panics
    /// If `range` is outside the numbers.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        each_type!(*self, x => Number::floats(&x[range]))
    }

    /// A range of the numbers in single precision: themselves, or converted into `scratch`.
    ///
    /// # Panics
    /// If `range` is outside the numbers, or `scratch` is shorter than it and needed.
    pub fn to_f32<'s>(&self, range: Range<usize>, scratch: &'s mut [f32]) -> &'s [f32]
    where
        'a: 's,
    {
        match *self {
            Floats::F32(x) => &x[range],
            Floats::F16(x) => converted(&x[range], scratch),
            Floats::Bf16(x) => converted(&x[range], scratch),
        }
    }
}

impl<'a, T: Number> From<&'a [T]> for Floats<'a> {
    fn from(x: &'a [T]) -> Self {
        T::floats(x)
    }
}

/// Units of one head in contiguous memory: keys and values `[units, head_dim]`.
#[derive(Debug, Clone, Copy)]
pub struct DenseTiles<'a> {
    keys: Floats<'a>,
    values: Floats<'a>,
    head_dim: usize,
}

impl<'a> DenseTiles<'a> {
    /// From keys and values, `[units, head_dim]` each. Their types may differ.
    ///
    /// # Panics
    /// If the two have different lengths, or these are not whole rows.
    pub fn new(
        keys: impl Into<Floats<'a>>,
        values: impl Into<Floats<'a>>,
        head_dim: usize,
    ) -> Self {
        let (keys, values) = (keys.into(), values.into());
        assert_eq!(keys.len(), values.len(), "keys and values of one head");
        assert!(
            head_dim > 0 && keys.len().is_multiple_of(head_dim),
            "rows of {head_dim} in {} numbers",
            keys.len()
        );
        Self {
            keys,
            values,
            head_dim,
        }
    }
}

impl KvTiles for DenseTiles<'_> {
    fn len(&self) -> usize {
        self.keys.len() / self.head_dim
    }

    fn keys<'a>(&'a self, range: Range<usize>, scratch: &'a mut [f32]) -> &'a [f32] {
        let d = self.head_dim;
        self.keys.to_f32(range.start * d..range.end * d, scratch)
    }

    fn values<'a>(&'a self, range: Range<usize>, scratch: &'a mut [f32]) -> &'a [f32] {
        let d = self.head_dim;
        self.values.to_f32(range.start * d..range.end * d, scratch)
    }

    fn stored_keys(&self, range: Range<usize>) -> Option<Floats<'_>> {
        let d = self.head_dim;
        Some(self.keys.slice(range.start * d..range.end * d))
    }

    fn stored_values(&self, range: Range<usize>) -> Option<Floats<'_>> {
        let d = self.head_dim;
        Some(self.values.slice(range.start * d..range.end * d))
    }
}

fn converted<'s, E: Number>(x: &[E], scratch: &'s mut [f32]) -> &'s [f32] {
    let out = &mut scratch[..x.len()];
    convert(Isa::best(), x, out);
    out
}

/// Numbers of any type in single precision.
fn convert<E: Number>(isa: Isa, x: &[E], out: &mut [f32]) {
    #[inline(always)]
    fn body<S: Simd, E: Number>(s: S, x: &[E], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "numbers to convert and room for them");
        let whole = x.len() - x.len() % S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            // SAFETY: i + LANES <= whole <= both lengths.
            unsafe { s.store(out.as_mut_ptr().add(i), E::load(s, x.as_ptr().add(i))) };
        }
        for (x, out) in x[whole..].iter().zip(&mut out[whole..]) {
            *out = x.to_f32();
        }
    }
    dispatch!(isa, s => body(s, x, out));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn conversion_agrees_with_the_scalar_one(bits in prop::collection::vec(any::<u16>(), 0..70)) {
            let halves: Vec<f16> = bits.iter().map(|b| f16::from_bits(*b)).collect();
            let brains: Vec<bf16> = bits.iter().map(|b| bf16::from_bits(*b)).collect();
            for isa in Isa::all() {
                let (mut a, mut b) = (vec![0.0; bits.len()], vec![0.0; bits.len()]);
                convert(isa, &halves, &mut a);
                convert(isa, &brains, &mut b);
                for i in 0..bits.len() {
                    let (x, y) = (halves[i].to_f32(), brains[i].to_f32());
                    prop_assert!(a[i] == x || (a[i].is_nan() && x.is_nan()));
                    prop_assert!(b[i] == y || (b[i].is_nan() && y.is_nan()));
                }
            }
        }
    }

    #[test]
    fn dense_f32_is_not_copied_and_16_bit_fills_the_scratch() {
        let k: Vec<f32> = (0..30).map(|i| i as f32).collect();
        let v: Vec<bf16> = k.iter().map(|x| bf16::from_f32(-x)).collect();
        let tiles = DenseTiles::new(&k[..], &v[..], 5);
        assert_eq!(tiles.len(), 6);
        let mut scratch = vec![0.0; 10];
        assert!(std::ptr::eq(tiles.keys(2..4, &mut []), &k[10..20]));
        assert_eq!(tiles.values(2..4, &mut scratch)[3], -13.0);
    }

    #[test]
    #[should_panic(expected = "keys and values of one head")]
    fn lengths_must_agree() {
        DenseTiles::new(&[0f32; 8][..], &[0f32; 4][..], 4);
    }
}
