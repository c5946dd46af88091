//! What comes before the tensors in a GGUF file: metadata, and the table of tensors.

use super::{Array, GgufTensor, Value};
use crate::{DType, ModelError, Result};
use std::{collections::BTreeMap, path::Path};

/// The first four bytes of a file.
const MAGIC: &[u8; 4] = b"GGUF";
/// Where tensors begin, if the file does not say: at multiples of this.
const DEFAULT_ALIGNMENT: usize = 32;
/// Larger alignments are refused: no file needs them.
const MAX_ALIGNMENT: usize = 1 << 20;
/// GGML's limit on dimensions.
const MAX_DIMS: usize = 4;
/// Arrays in arrays in arrays: nothing uses even two levels.
const MAX_NESTING: usize = 4;
/// A tensor entry takes at least this much: name length, dimension count, one dimension, type,
/// offset.
const MIN_TENSOR_ENTRY: usize = 8 + 4 + 8 + 4 + 8;
/// A metadata entry takes at least this much: key length, type, one byte.
const MIN_METADATA_ENTRY: usize = 8 + 4 + 1;

/// What comes before the tensors, checked.
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: Vec<GgufTensor>,
}

impl Header {
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let mut r = Reader { path, bytes, at: 0 };
        let magic = r.take(4, "magic number")?;
        if magic != MAGIC {
            return Err(ModelError::format(
                path,
                "magic number",
                "\"GGUF\"",
                format!("{magic:02x?}"),
            ));
        }
        let version = r.u32("version")?;
        if !(2..=3).contains(&version) {
            let big_endian = (2..=3).contains(&version.swap_bytes());
            return Err(ModelError::format(
                path,
                "version",
                "2 or 3",
                if big_endian {
                    format!("{} in big-endian byte order", version.swap_bytes())
                } else {
                    version.to_string()
                },
            ));
        }
        let tensor_count = r.u64("tensor count")?;
        let metadata_count = r.u64("metadata count")?;

        let metadata_count = r.count(metadata_count, MIN_METADATA_ENTRY, "metadata")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..metadata_count {
            let key = r.string("metadata key")?;
            let value = r.value(&key)?;
            if metadata.contains_key(&key) {
                return Err(ModelError::Duplicate {
                    path: path.to_path_buf(),
                    what: "metadata key",
                    name: key,
                });
            }
            metadata.insert(key, value);
        }

        let alignment = alignment(path, &metadata)?;
        let tensor_count = r.count(tensor_count, MIN_TENSOR_ENTRY, "tensor table")?;
        let mut entries = Vec::with_capacity(tensor_count);
        for _ in 0..tensor_count {
            entries.push(r.tensor_entry(alignment)?);
        }
        // The file may end with its header if there are no tensors.
        let data_start = r.at.next_multiple_of(alignment);
        let tensors = entries
            .into_iter()
            .map(|entry| entry.place(path, data_start, bytes.len()))
            .collect::<Result<Vec<_>>>()?;
        check_tensors(path, &tensors)?;
        Ok(Self {
            version,
            metadata,
            tensors,
        })
    }
}

fn alignment(path: &Path, metadata: &BTreeMap<String, Value>) -> Result<usize> {
    const KEY: &str = "general.alignment";
    let Some(value) = metadata.get(KEY) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    value
        .as_u64()
        .and_then(|n| usize::try_from(n).ok())
        .filter(|n| n.is_power_of_two() && *n <= MAX_ALIGNMENT)
        .ok_or_else(|| {
            ModelError::format(
                path,
                KEY,
                format!("a power of two up to {MAX_ALIGNMENT}"),
                format!("{value:?}"),
            )
        })
}

/// No name twice, no byte in two tensors.
fn check_tensors(path: &Path, tensors: &[GgufTensor]) -> Result<()> {
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(ModelError::Duplicate {
            path: path.to_path_buf(),
            what: "tensor",
            name: pair[0].to_owned(),
        });
    }
    let mut by_place: Vec<&GgufTensor> = tensors.iter().collect();
    by_place.sort_unstable_by_key(|t| t.bytes.start);
    match by_place
        .windows(2)
        .find(|pair| pair[0].bytes.end > pair[1].bytes.start)
    {
        Some(pair) => Err(ModelError::Overlap {
            path: path.to_path_buf(),
            first: pair[0].name.clone(),
            second: pair[1].name.clone(),
        }),
        None => Ok(()),
    }
}

/// A tensor's entry before it is known where the data begin.
struct Entry {
    name: String,
    shape: Vec<usize>,
    dtype: DType,
    offset: usize,
    len: usize,
}

impl Entry {
    fn place(self, path: &Path, data_start: usize, file_len: usize) -> Result<GgufTensor> {
        let start = data_start.checked_add(self.offset);
        let end = start.and_then(|s| s.checked_add(self.len));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => Ok(GgufTensor {
                name: self.name,
                shape: self.shape,
                dtype: self.dtype,
                bytes: start..end,
            }),
            _ => Err(ModelError::Truncated {
                path: path.to_path_buf(),
                what: format!("tensor {:?}", self.name),
                offset: (data_start as u64).saturating_add(self.offset as u64),
                needed: self.len as u128,
                len: file_len as u64,
            }),
        }
    }
}

struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn truncated(&self, what: &str, needed: u128) -> ModelError {
        ModelError::Truncated {
            path: self.path.to_path_buf(),
            what: what.to_owned(),
            offset: self.at as u64,
            needed,
            len: self.bytes.len() as u64,
        }
    }

    fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        if n > self.remaining() {
            return Err(self.truncated(what, n as u128));
        }
        let bytes = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(bytes)
    }

    /// A count of things that take at least `size` bytes each, if the file is long enough for them.
    fn count(&self, count: u64, size: usize, what: &str) -> Result<usize> {
        let needed = u128::from(count) * size as u128;
        if needed > self.remaining() as u128 {
            return Err(self.truncated(what, needed));
        }
        // Fits: it is at most the file's length.
        Ok(count as usize)
    }

    /// A number of `N` bytes.
    fn number<const N: usize, T>(&mut self, what: &str, of: fn([u8; N]) -> T) -> Result<T> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N, what)?);
        Ok(of(bytes))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.number(what, u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.number(what, u64::from_le_bytes)
    }

    /// Numbers of `N` bytes each.
    fn numbers<const N: usize, T>(
        &mut self,
        count: u64,
        what: &str,
        of: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let count = self.count(count, N, what)?;
        let (numbers, _) = self.take(count * N, what)?.as_chunks::<N>();
        Ok(numbers.iter().map(|bytes| of(*bytes)).collect())
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let len = self.count(len, 1, what)?;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(e) => Err(ModelError::format(
                self.path,
                what,
                "UTF-8 text",
                format!("an invalid byte at {} of {len}", e.valid_up_to()),
            )),
        }
    }

    /// A value's text. There are vocabularies with single bytes of characters; no such token comes out of a
    /// text, so that what stands for it does not matter.
    fn text(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let len = self.count(len, 1, what)?;
        Ok(String::from_utf8_lossy(self.take(len, what)?).into_owned())
    }

    fn bool(&mut self, what: &str) -> Result<bool> {
        match self.number(what, u8::from_le_bytes)? {
            0 => Ok(false),
            1 => Ok(true),
            x => Err(ModelError::format(self.path, what, "a bool, 0 or 1", x)),
        }
    }

    fn unknown_type(&self, what: &str, tag: u32) -> ModelError {
        ModelError::format(self.path, what, "a value type from 0 to 12", tag)
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let tag = self.u32(key)?;
        Ok(match tag {
            0 => Value::U8(self.number(key, u8::from_le_bytes)?),
            1 => Value::I8(self.number(key, i8::from_le_bytes)?),
            2 => Value::U16(self.number(key, u16::from_le_bytes)?),
            3 => Value::I16(self.number(key, i16::from_le_bytes)?),
            4 => Value::U32(self.u32(key)?),
            5 => Value::I32(self.number(key, i32::from_le_bytes)?),
            6 => Value::F32(self.number(key, f32::from_le_bytes)?),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::String(self.text(key)?),
            9 => Value::Array(self.array(key, 1)?),
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(self.number(key, i64::from_le_bytes)?),
            12 => Value::F64(self.number(key, f64::from_le_bytes)?),
            _ => return Err(self.unknown_type(key, tag)),
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Array> {
        if depth > MAX_NESTING {
            return Err(ModelError::format(
                self.path,
                key,
                format!("arrays nested up to {MAX_NESTING} deep"),
                "deeper ones",
            ));
        }
        let tag = self.u32(key)?;
        let n = self.u64(key)?;
        Ok(match tag {
            0 => Array::U8(self.numbers(n, key, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(n, key, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(n, key, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(n, key, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(n, key, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(n, key, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(n, key, f32::from_le_bytes)?),
            7 => {
                let n = self.count(n, 1, key)?;
                Array::Bool((0..n).map(|_| self.bool(key)).collect::<Result<_>>()?)
            }
            8 => {
                let n = self.count(n, 8, key)?;
                let mut texts = Vec::with_capacity(n);
                for _ in 0..n {
                    texts.push(self.text(key)?);
                }
                Array::String(texts)
            }
            9 => {
                let n = self.count(n, 4 + 8, key)?;
                let mut arrays = Vec::with_capacity(n);
                for _ in 0..n {
                    arrays.push(self.array(key, depth + 1)?);
                }
                Array::Array(arrays)
            }
            10 => Array::U64(self.numbers(n, key, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(n, key, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(n, key, f64::from_le_bytes)?),
            _ => return Err(self.unknown_type(key, tag)),
        })
    }

    fn tensor_entry(&mut self, alignment: usize) -> Result<Entry> {
        let name = self.string("tensor name")?;
        let what = format!("tensor {name:?}");
        let dims = self.u32(&what)?;
        if dims == 0 || dims as usize > MAX_DIMS {
            return Err(ModelError::format(
                self.path,
                what,
                format!("1 to {MAX_DIMS} dimensions"),
                dims,
            ));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            let dim = self.u64(&what)?;
            match usize::try_from(dim) {
                Ok(dim) if dim > 0 => shape.push(dim),
                _ => {
                    return Err(ModelError::format(
                        self.path,
                        what,
                        "dimensions of at least 1 that fit in memory",
                        dim,
                    ));
                }
            }
        }
        shape.reverse();
        let tag = self.u32(&what)?;
        let dtype = dtype(tag).map_err(|found| ModelError::UnsupportedEncoding {
            path: self.path.to_path_buf(),
            tensor: name.clone(),
            encoding: found,
        })?;
        let offset = self.u64(&what)?;
        if !offset.is_multiple_of(alignment as u64) {
            return Err(ModelError::format(
                self.path,
                what,
                format!("an offset that is a multiple of {alignment}"),
                offset,
            ));
        }
        let cols = shape[shape.len() - 1];
        if !cols.is_multiple_of(dtype.block()) {
            return Err(ModelError::format(
                self.path,
                what,
                format!("rows of whole {dtype} blocks of {}", dtype.block()),
                format!("rows of {cols} values"),
            ));
        }
        let len = shape[..shape.len() - 1]
            .iter()
            .try_fold(dtype.bytes(cols), |n, &dim| n.map(|n| n.checked_mul(dim)))
            .flatten();
        // A size or offset that no memory could hold is past the end of any file.
        let beyond = |needed| ModelError::Truncated {
            path: self.path.to_path_buf(),
            what: format!("tensor {name:?}"),
            offset,
            needed,
            len: self.bytes.len() as u64,
        };
        let len = len.ok_or_else(|| beyond(u128::MAX))?;
        let offset = usize::try_from(offset).map_err(|_| beyond(len as u128))?;
        Ok(Entry {
            name,
            shape,
            dtype,
            offset,
            len,
        })
    }
}

/// The type of a GGML type number, or the name of one that is not supported.
fn dtype(tag: u32) -> Result<DType, String> {
    Ok(match tag {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        6 => DType::Q5_0,
        7 => DType::Q5_1,
        8 => DType::Q8_0,
        10 => DType::Q2_K,
        11 => DType::Q3_K,
        12 => DType::Q4_K,
        13 => DType::Q5_K,
        14 => DType::Q6_K,
        20 => DType::IQ4_NL,
        23 => DType::IQ4_XS,
        30 => DType::BF16,
        9 => return Err("Q8_1".into()),
        15 => return Err("Q8_K".into()),
        16 => return Err("IQ2_XXS".into()),
        17 => return Err("IQ2_XS".into()),
        18 => return Err("IQ3_XXS".into()),
        19 => return Err("IQ1_S".into()),
        21 => return Err("IQ3_S".into()),
        22 => return Err("IQ2_S".into()),
        24 => return Err("I8".into()),
        25 => return Err("I16".into()),
        26 => return Err("I32".into()),
        27 => return Err("I64".into()),
        28 => return Err("F64".into()),
        29 => return Err("IQ1_M".into()),
        34 => return Err("TQ1_0".into()),
        35 => return Err("TQ2_0".into()),
        39 => return Err("MXFP4".into()),
        _ => return Err(format!("type number {tag}")),
    })
}
