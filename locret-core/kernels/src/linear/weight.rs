//! Weight matrices in the type of their file, and their conversion to single precision.

use super::{
    BLOCK,
    super_blocks::{Eights, SixK},
};
use crate::{
    dtype::{DType, Number},
    simd::{Isa, Simd, dispatch, store},
};
use bytes::Bytes as SharedBytes;
use half::{bf16, f16};
use std::{borrow::Cow, fmt, marker::PhantomData, ops::Range};

/// Whether a [`Weight`] can have its numbers in this type.
pub fn computes_with(dtype: DType) -> bool {
    use DType::*;
    matches!(
        dtype,
        F32 | F16 | BF16 | Q8_0 | Q4_0 | Q4_1 | Q4_K | Q5_K | Q6_K
    )
}

/// Bytes that are not the matrix they are said to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightError {
    /// The kernels cannot read numbers of this type ([`computes_with`]).
    #[error("the kernels do not compute with {0}")]
    Type(DType),
    /// The rows of the matrix don't consist of whole blocks.
    #[error("{columns} columns are not whole blocks of {block}")]
    Columns {
        /// The columns that were asked for.
        columns: usize,
        /// Numbers in a block.
        block: usize,
    },
    /// There are more or fewer bytes than the matrix has.
    #[error("{found} bytes where the matrix has {}", expected.map_or("more than fit memory".into(), |n| n.to_string()))]
    Bytes {
        /// Bytes of the matrix; `None` where the number does not fit.
        expected: Option<usize>,
        /// Bytes that were given.
        found: usize,
    },
}

/// A weight matrix `[rows, columns]`, row-major, each row whole blocks; `rows` are outputs and
/// `columns` inputs. Bytes may be borrowed (of a mapped file), owned or a part of memory that many
/// matrices share, and need no alignment.
#[derive(Clone)]
pub struct Weight<'a> {
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_bytes: usize,
    pub(super) bytes: Memory<'a>,
}

/// Where the bytes of a matrix are.
#[derive(Clone)]
pub(super) enum Memory<'a> {
    Own(Cow<'a, [u8]>),
    Shared(SharedBytes),
}

impl std::ops::Deref for Memory<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Weight<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Weight({} [{}, {}])",
            self.dtype, self.rows, self.columns
        )
    }
}

impl<'a> Weight<'a> {
    /// From the bytes of a file.
    ///
    /// # Errors
    /// [`WeightError`] if the bytes cannot be such a matrix.
    pub fn new(
        dtype: DType,
        rows: usize,
        columns: usize,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self, WeightError> {
        Self::of(dtype, rows, columns, Memory::Own(bytes.into()))
    }

    /// From bytes that may be a part of a larger piece of memory, such as an
    /// [`Arena`](crate::pages::Arena)'s.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn shared(
        dtype: DType,
        rows: usize,
        columns: usize,
        bytes: SharedBytes,
    ) -> Result<Self, WeightError> {
        Self::of(dtype, rows, columns, Memory::Shared(bytes))
    }

    fn of(
        dtype: DType,
        rows: usize,
        columns: usize,
        bytes: Memory<'a>,
    ) -> Result<Self, WeightError> {
        if !computes_with(dtype) {
            return Err(WeightError::Type(dtype));
        }
        let block = dtype.block();
        if !columns.is_multiple_of(block) {
            return Err(WeightError::Columns { columns, block });
        }
        let row = dtype.bytes(columns);
        let expected = row.and_then(|row| row.checked_mul(rows));
        match row {
            Some(row_bytes) if expected == Some(bytes.len()) => Ok(Self {
                dtype,
                rows,
                columns,
                row_bytes,
                bytes,
            }),
            _ => Err(WeightError::Bytes {
                expected,
                found: bytes.len(),
            }),
        }
    }

    /// From numbers in single precision, `[rows, columns]`.
    ///
    /// # Errors
    /// [`WeightError`] if there are not as many.
    pub fn from_f32(x: &'a [f32], rows: usize, columns: usize) -> Result<Self, WeightError> {
        Self::new(DType::F32, rows, columns, bytemuck::cast_slice(x))
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The bytes, row by row.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A row in single precision (an embedding, say).
    ///
    /// # Panics
    /// If there is no such row, or `out` has another length than a row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        self.row_with(Isa::best(), row, out);
    }

    pub(super) fn row_with(&self, isa: Isa, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.columns, "length of a row");
        assert!(row < self.rows, "row {row} of {}", self.rows);
        dispatch!(isa, s => convert(s, self, row, 0..self.columns, out));
    }
}

/// A format's conversion.
pub(super) trait Convert {
    /// Some numbers of a row, from a multiple of the block on, in whole blocks.
    ///
    /// # Safety
    /// `row` must be valid for reading the bytes of a row that has the numbers from `from` on that
    /// fill `out`.
    unsafe fn convert<S: Simd>(s: S, row: *const u8, from: usize, out: &mut [f32]);
}

/// Blocks of [`BLOCK`] codes behind a scale and perhaps a minimum, in half precision each.
pub(super) trait Packed {
    const DTYPE: DType;
    /// Whether there is a minimum.
    const MINIMUM: bool;
    /// Bytes of a block.
    const BYTES: usize = Self::DTYPE.block_bytes();
    /// Where in a block the codes begin.
    const CODES: usize = if Self::MINIMUM { 4 } else { 2 };
}

/// Plain numbers.
pub(super) struct Float<E>(PhantomData<E>);

/// `Q8_0`: `x = scale · q`.
pub(super) struct Bytes;

/// `Q4_1`: `x = scale · q + minimum`; or `Q4_0`, without a minimum: `x = scale · (q - 8)`. A byte
/// has the codes of numbers `i` and `i + 16`.
pub(super) struct Nibbles<const MINIMUM: bool>;

impl Packed for Bytes {
    const DTYPE: DType = DType::Q8_0;
    const MINIMUM: bool = false;
}

impl<const MINIMUM: bool> Packed for Nibbles<MINIMUM> {
    const DTYPE: DType = if MINIMUM { DType::Q4_1 } else { DType::Q4_0 };
    const MINIMUM: bool = MINIMUM;
}

impl<E: Number> Convert for Float<E> {
    #[inline(always)]
    unsafe fn convert<S: Simd>(s: S, row: *const u8, from: usize, out: &mut [f32]) {
        let row = row.cast::<E>().wrapping_add(from);
        let whole = out.len() - out.len() % S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            // SAFETY: the row has as many numbers as `out`; loads need no alignment.
            store(s, &mut out[i..], unsafe { E::load(s, row.wrapping_add(i)) });
        }
        for (i, out) in out.iter_mut().enumerate().skip(whole) {
            // SAFETY: as above.
            *out = unsafe { row.wrapping_add(i).read_unaligned().to_f32() };
        }
    }
}

/// Two bytes as they stand.
///
/// # Safety
/// `p` must be valid for reading two bytes.
#[inline(always)]
pub(super) unsafe fn half_at(p: *const u8) -> u16 {
    // SAFETY: promised by the caller.
    u16::from_le_bytes(unsafe { p.cast::<[u8; 2]>().read() })
}

impl Convert for Bytes {
    #[inline(always)]
    unsafe fn convert<S: Simd>(s: S, row: *const u8, from: usize, out: &mut [f32]) {
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            // SAFETY: the row has a block for each 32 numbers of `out`.
            unsafe {
                let at = row.add((from / BLOCK + block) * Self::BYTES);
                let scale = s.splat_f16(half_at(at));
                for i in (0..BLOCK).step_by(S::LANES) {
                    store(
                        s,
                        &mut out[i..],
                        s.mul(scale, s.load_i8(at.add(Self::CODES + i).cast())),
                    );
                }
            }
        }
    }
}

impl<const MINIMUM: bool> Nibbles<MINIMUM> {
    /// Scale and minimum of a block.
    ///
    /// # Safety
    /// `at` must be valid for reading a block.
    #[inline(always)]
    unsafe fn scale_and_minimum<S: Simd>(s: S, at: *const u8) -> (S::V, S::V) {
        // SAFETY: a block starts with one or two halves.
        unsafe {
            let scale = s.splat_f16(half_at(at));
            let minimum = if MINIMUM {
                s.splat_f16(half_at(at.add(2)))
            } else {
                s.mul(scale, s.splat(-8.0))
            };
            (scale, minimum)
        }
    }
}

impl<const MINIMUM: bool> Convert for Nibbles<MINIMUM> {
    #[inline(always)]
    unsafe fn convert<S: Simd>(s: S, row: *const u8, from: usize, out: &mut [f32]) {
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let (lows, highs) = out.split_at_mut(BLOCK / 2);
            // SAFETY: the row has a block for each 32 numbers of `out`.
            unsafe {
                let at = row.add((from / BLOCK + block) * Self::BYTES);
                let (scale, minimum) = Self::scale_and_minimum(s, at);
                for i in (0..BLOCK / 2).step_by(S::LANES) {
                    let (low, high) = s.load_nibbles(at.add(Self::CODES + i));
                    store(s, &mut lows[i..], s.fma(scale, low, minimum));
                    store(s, &mut highs[i..], s.fma(scale, high, minimum));
                }
            }
        }
    }
}

/// Numbers of a row in single precision; `columns` are whole blocks.
#[inline(always)]
pub(super) fn convert<S: Simd>(
    s: S,
    weight: &Weight<'_>,
    row: usize,
    columns: Range<usize>,
    out: &mut [f32],
) {
    let (block, row_bytes) = (weight.dtype.block(), weight.row_bytes);
    assert!(row < weight.rows && columns.end <= weight.columns && out.len() == columns.len());
    assert!(columns.start.is_multiple_of(block) && columns.len().is_multiple_of(block));
    let at = weight.bytes[row * row_bytes..(row + 1) * row_bytes].as_ptr();
    // SAFETY: `at` is a row of whole blocks that has these columns.
    unsafe {
        match weight.dtype {
            DType::F32 => Float::<f32>::convert(s, at, columns.start, out),
            DType::F16 => Float::<f16>::convert(s, at, columns.start, out),
            DType::BF16 => Float::<bf16>::convert(s, at, columns.start, out),
            DType::Q8_0 => Bytes::convert(s, at, columns.start, out),
            DType::Q4_0 => Nibbles::<false>::convert(s, at, columns.start, out),
            DType::Q4_1 => Nibbles::<true>::convert(s, at, columns.start, out),
            DType::Q4_K => Eights::<false>::convert(s, at, columns.start, out),
            DType::Q5_K => Eights::<true>::convert(s, at, columns.start, out),
            DType::Q6_K => SixK::convert(s, at, columns.start, out),
            dtype => unreachable!("no weight is of type {dtype}"),
        }
    }
}
