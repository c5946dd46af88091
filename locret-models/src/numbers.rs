//! The types that weights are held in: from the bytes of a file to numbers that are finite.

use crate::DType;
use locret_core::kernels::dtype::Number;

/// Converts blocks; fails with the index and the value of the first that is not finite.
pub(crate) fn decode_finite<T: Number>(
    dtype: DType,
    bytes: &[u8],
    out: &mut [T],
) -> Result<(), (usize, f32)> {
    if dtype == T::DTYPE {
        bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
        return match first_bad(out) {
            Some(at) => Err((at, out[at].to_f32())),
            None => Ok(()),
        };
    }
    /// A multiple of every block length.
    const STEP: usize = 2048;
    let mut buffer = [0.0; STEP];
    let step_bytes = STEP / dtype.block() * dtype.block_bytes();
    for (i, (out, bytes)) in out
        .chunks_mut(STEP)
        .zip(bytes.chunks(step_bytes))
        .enumerate()
    {
        let buffer = &mut buffer[..out.len()];
        dtype.decode(bytes, buffer);
        for (x, &value) in out.iter_mut().zip(&*buffer) {
            *x = T::from_f32(value);
        }
        if let Some(at) = first_bad(out) {
            return Err((i * STEP + at, buffer[at]));
        }
    }
    Ok(())
}

/// The first value that is not finite. Looks at all of them without branches first: there is
/// hardly ever one.
fn first_bad<T: Number>(values: &[T]) -> Option<usize> {
    if values
        .iter()
        .fold(true, |all, x| all & x.to_f32().is_finite())
    {
        return None;
    }
    values.iter().position(|x| !x.to_f32().is_finite())
}
