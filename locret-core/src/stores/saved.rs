//! What stores write and read: counts and plain numbers, little-endian, after a header that names the
//! store.

use crate::{DType, Error, Result};
use bytemuck::Pod;
use std::io::{Read, Write};

/// The first bytes of a saved store.
const MAGIC: [u8; 4] = *b"KVS1";

/// Numbers that are read at a time: a file that ends early has not taken much more memory than it has
/// bytes.
const PIECE: usize = 1 << 16;

/// The longest name of a store.
const NAME: usize = 256;

/// The name of a dense store.
pub(super) fn name(dtype: DType) -> String {
    dtype.name().to_ascii_lowercase()
}

fn failed(e: std::io::Error) -> Error {
    match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::Snapshot("the store ends too early".into()),
        _ => Error::Snapshot(format!("a store: {e}")),
    }
}

pub(super) fn write<T: Pod>(to: &mut dyn Write, numbers: &[T]) -> Result<()> {
    to.write_all(bytemuck::cast_slice(numbers)).map_err(failed)
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

pub(super) fn read<T: Pod>(from: &mut dyn Read, count: usize) -> Result<Vec<T>> {
    let mut all = Vec::new();
    while all.len() < count {
        let mut piece = vec![T::zeroed(); PIECE.min(count - all.len())];
        from.read_exact(bytemuck::cast_slice_mut(&mut piece))
            .map_err(failed)?;
        if all.is_empty() && piece.len() == count {
            return Ok(piece);
        }
        all.extend_from_slice(&piece);
    }
    all.shrink_to_fit();
    Ok(all)
}

/// A count of rows, of which each has `width` numbers.
pub(super) fn read_count(from: &mut dyn Read, width: usize) -> Result<usize> {
    let [count] = read::<u64>(from, 1)?[..] else {
        return Err(Error::Snapshot("a count is missing".into()));
    };
    // Units are numbered in 32 bits.
    match u32::try_from(count) {
        Ok(count) if (count as usize).checked_mul(width.max(1)).is_some() => Ok(count as usize),
        _ => Err(Error::Snapshot(format!(
            "{count} units are more than a store can have"
        ))),
    }
}

pub(super) fn read_header(from: &mut dyn Read, name: &str, heads: usize, dim: usize) -> Result<()> {
    if read::<u8>(from, MAGIC.len())? != MAGIC {
        return Err(Error::Snapshot("this is no store".into()));
    }
    let length = read_count(from, 1)?;
    if length > NAME {
        return Err(Error::Snapshot(format!(
            "the name of a store has {length} bytes, {NAME} at most are due"
        )));
    }
    let found = read::<u8>(from, length)?;
    let found = String::from_utf8_lossy(&found).into_owned();
    let found = (found, read_count(from, 1)?, read_count(from, 1)?);
    let due = (name.to_owned(), heads, dim);
    match found == due {
        true => Ok(()),
        false => Err(Error::Snapshot(format!(
            "the store {} of {} KV heads of {} features was saved, {} of {} of {} is due",
            found.0, found.1, found.2, due.0, due.1, due.2
        ))),
    }
}
