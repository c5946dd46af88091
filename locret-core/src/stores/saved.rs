//! What stores write and read: counts and plain numbers, little-endian, after a header that names the
//! store.

use crate::{DType, Result, SnapshotError};
use bytemuck::Pod;
use std::io::{Read, Take, Write};

/// The first bytes of a saved store.
const MAGIC: [u8; 4] = *b"KVS1";

/// The longest name of a store.
const NAME: usize = 256;

/// The name of a dense store.
pub fn name(dtype: DType) -> String {
    dtype.name().to_ascii_lowercase()
}

pub(super) fn write<T: Pod>(to: &mut dyn Write, numbers: &[T]) -> Result<()> {
    let bytes = bytemuck::cast_slice(numbers);
    Ok(to.write_all(bytes).map_err(SnapshotError::io("writing"))?)
}

pub(super) fn write_count(to: &mut dyn Write, count: usize) -> Result<()> {
    write(to, &[count as u64])
}

pub(super) fn write_header(to: &mut dyn Write, name: &str, heads: usize, dim: usize) -> Result<()> {
    write(to, &MAGIC)?;
    write_count(to, name.len())?;
    write(to, name.as_bytes())?;
    write_count(to, heads)?;
    write_count(to, dim)
}

pub(super) fn read<T: Pod>(from: &mut Take<&mut dyn Read>, count: usize) -> Result<Vec<T>> {
    let bytes = (count as u64).checked_mul(size_of::<T>() as u64);
    if bytes.is_none_or(|bytes| bytes > from.limit()) {
        return Err(SnapshotError::Damaged("a store ends too early".into()).into());
    }
    let mut all = vec![T::zeroed(); count];
    from.read_exact(bytemuck::cast_slice_mut(&mut all))
        .map_err(SnapshotError::reading)?;
    Ok(all)
}

/// A count of rows, of which each has `width` numbers.
pub(super) fn read_count(from: &mut Take<&mut dyn Read>, width: usize) -> Result<usize> {
    let count = read::<u64>(from, 1)?.first().copied().unwrap_or_default();
    // Units are numbered in 32 bits.
    match u32::try_from(count) {
        Ok(count) if (count as usize).checked_mul(width.max(1)).is_some() => Ok(count as usize),
        _ => Err(damaged(format!(
            "{count} units are more than a store can have"
        ))),
    }
}

fn damaged(what: impl Into<String>) -> crate::Error {
    SnapshotError::Damaged(what.into()).into()
}

pub(super) fn read_header(
    from: &mut Take<&mut dyn Read>,
    name: &str,
    heads: usize,
    dim: usize,
) -> Result<()> {
    if read::<u8>(from, MAGIC.len())? != MAGIC {
        return Err(damaged("this is no store"));
    }
    let length = read_count(from, 1)?;
    if length > NAME {
        return Err(damaged(format!(
            "the name of a store has {length} bytes, {NAME} at most are due"
        )));
    }
    let found = read::<u8>(from, length)?;
    let found = String::from_utf8_lossy(&found).into_owned();
    let found = (found, read_count(from, 1)?, read_count(from, 1)?);
    let due = (name.to_owned(), heads, dim);
    match found == due {
        true => Ok(()),
        false => {
            let text = |(name, heads, dim)| format!("{name}, {heads} KV heads of {dim} features");
            Err(SnapshotError::OtherStore {
                expected: text(due),
                found: text(found),
            }
            .into())
        }
    }
}
