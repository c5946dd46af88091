//! Reading GGUF files (versions 2 and 3, little-endian).
//!
//! A [`Gguf`] is a memory map, the parsed metadata, and a checked table of tensors. Whatever the
//! file claims is checked against its length before anything is allocated.

use crate::{Encoding, ModelError, Result, mapped::MappedFile};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    ops::Range,
    path::Path,
};

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
/// A tensor entry takes at least this much: name length, dimension count, one dimension, encoding,
/// offset.
const MIN_TENSOR_ENTRY: usize = 8 + 4 + 8 + 4 + 8;
/// A metadata entry takes at least this much: key length, type, one byte.
const MIN_METADATA_ENTRY: usize = 8 + 4 + 1;

/// A value of a file's metadata.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// 8 bits, unsigned.
    U8(u8),
    /// 8 bits, signed.
    I8(i8),
    /// 16 bits, unsigned.
    U16(u16),
    /// 16 bits, signed.
    I16(i16),
    /// 32 bits, unsigned.
    U32(u32),
    /// 32 bits, signed.
    I32(i32),
    /// 64 bits, unsigned.
    U64(u64),
    /// 64 bits, signed.
    I64(i64),
    /// Single precision.
    F32(f32),
    /// Double precision.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    String(String),
    /// Values of one type.
    Array(Array),
}

/// An array of a file's metadata.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Array {
    /// 8 bits, unsigned.
    U8(Vec<u8>),
    /// 8 bits, signed.
    I8(Vec<i8>),
    /// 16 bits, unsigned.
    U16(Vec<u16>),
    /// 16 bits, signed.
    I16(Vec<i16>),
    /// 32 bits, unsigned.
    U32(Vec<u32>),
    /// 32 bits, signed.
    I32(Vec<i32>),
    /// 64 bits, unsigned.
    U64(Vec<u64>),
    /// 64 bits, signed.
    I64(Vec<i64>),
    /// Single precision.
    F32(Vec<f32>),
    /// Double precision.
    F64(Vec<f64>),
    /// Truth values.
    Bool(Vec<bool>),
    /// Texts.
    String(Vec<String>),
    /// Arrays.
    Array(Vec<Array>),
}

impl Array {
    /// How many values there are.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::F64(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::String(v) => v.len(),
            Self::Array(v) => v.len(),
        }
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F32(_) => "f32",
            Self::F64(_) => "f64",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(_) => "array",
        }
    }
}

impl Value {
    /// A non-negative integer of any width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(x) => Some(x.into()),
            Self::U16(x) => Some(x.into()),
            Self::U32(x) => Some(x.into()),
            Self::U64(x) => Some(x),
            Self::I8(x) => x.try_into().ok(),
            Self::I16(x) => x.try_into().ok(),
            Self::I32(x) => x.try_into().ok(),
            Self::I64(x) => x.try_into().ok(),
            _ => None,
        }
    }

    /// A float of either width, or an integer.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(x) => Some(x.into()),
            Self::F64(x) => Some(x),
            Self::I8(x) => Some(x.into()),
            Self::I16(x) => Some(x.into()),
            Self::I32(x) => Some(x.into()),
            Self::I64(x) => Some(x as f64),
            _ => self.as_u64().map(|x| x as f64),
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(x) => Some(x),
            _ => None,
        }
    }

    /// Text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(x) => Some(x),
            _ => None,
        }
    }

    /// An array of texts.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Self::Array(Array::String(x)) => Some(x),
            _ => None,
        }
    }

    /// What it is, for messages.
    fn kind(&self) -> String {
        match self {
            Self::U8(_) => "u8".into(),
            Self::I8(_) => "i8".into(),
            Self::U16(_) => "u16".into(),
            Self::I16(_) => "i16".into(),
            Self::U32(_) => "u32".into(),
            Self::I32(_) => "i32".into(),
            Self::U64(_) => "u64".into(),
            Self::I64(_) => "i64".into(),
            Self::F32(_) => "f32".into(),
            Self::F64(_) => "f64".into(),
            Self::Bool(_) => "bool".into(),
            Self::String(_) => "a string".into(),
            Self::Array(a) => format!("an array of {} {}", a.len(), a.kind()),
        }
    }
}

/// A tensor's entry in the table of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// The name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Dimensions, slowest first: `[rows, columns]` of a matrix. (GGUF itself lists the fastest
    /// first.)
    pub shape: Vec<usize>,
    /// How values are stored.
    pub encoding: Encoding,
    /// Where the bytes are in the file.
    pub bytes: Range<usize>,
}

impl GgufTensor {
    /// Values in a row: the last dimension.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// How many rows: the product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }
}

/// A GGUF file: memory-mapped, with parsed metadata and a checked table of tensors.
pub struct Gguf {
    file: MappedFile,
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<GgufTensor>,
    by_name: HashMap<String, usize>,
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gguf")
            .field("path", &self.file.path())
            .field("version", &self.version)
            .field("metadata", &self.metadata.len())
            .field("tensors", &self.tensors.len())
            .finish()
    }
}

impl Gguf {
    /// Maps a file and parses its header.
    ///
    /// # Errors
    /// [`ModelError::Io`]; [`ModelError::Format`] for anything that the format does not allow;
    /// [`ModelError::Truncated`] for counts, lengths and offsets that point past the end;
    /// [`ModelError::Duplicate`], [`ModelError::Overlap`]; [`ModelError::UnsupportedEncoding`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = MappedFile::open(path.as_ref())?;
        let header = Header::parse(file.path(), file.bytes())?;
        let by_name = header
            .tensors
            .iter()
            .enumerate()
            .map(|(i, t)| (t.name.clone(), i))
            .collect();
        Ok(Self {
            file,
            version: header.version,
            metadata: header.metadata,
            tensors: header.tensors,
            by_name,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The tensors, in the file's order.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// The packed blocks of a tensor, as they are in the file.
    pub fn raw(&self, tensor: &GgufTensor) -> Result<&[u8]> {
        self.file.bytes().get(tensor.bytes.clone()).ok_or_else(|| {
            ModelError::format(
                self.path(),
                format!("tensor {:?}", tensor.name),
                "an entry of this file",
                "an entry of another file",
            )
        })
    }

    /// The packed blocks of some rows of a tensor.
    ///
    /// # Errors
    /// [`ModelError::Format`] if the tensor does not have these rows.
    pub fn raw_rows(&self, tensor: &GgufTensor, rows: Range<usize>) -> Result<&[u8]> {
        let range = row_range(self.path(), tensor, rows)?;
        Ok(&self.raw(tensor)?[range])
    }

    /// A tensor's values, `f32`, in row-major order.
    ///
    /// # Errors
    /// [`ModelError::Format`] if the entry is not this file's.
    pub fn dequantize(&self, tensor: &GgufTensor) -> Result<Vec<f32>> {
        self.dequantize_rows(tensor, 0..tensor.rows())
    }

    /// The values of some rows, `f32`.
    ///
    /// # Errors
    /// [`ModelError::Format`] if the tensor does not have these rows.
    pub fn dequantize_rows(&self, tensor: &GgufTensor, rows: Range<usize>) -> Result<Vec<f32>> {
        let bytes = self.raw_rows(tensor, rows)?;
        let values = bytes.len() / tensor.encoding.block_bytes() * tensor.encoding.block();
        let mut out = vec![0.0; values];
        tensor.encoding.decode(bytes, &mut out);
        Ok(out)
    }

    /// Lets go of resident pages of some rows, which have been read.
    pub(crate) fn release_rows(&self, tensor: &GgufTensor, rows: Range<usize>) {
        if let Ok(range) = row_range(self.path(), tensor, rows) {
            let start = tensor.bytes.start;
            self.file.release(start + range.start..start + range.end);
        }
    }

    /// The text under a key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if there is another type of value.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a string", Value::as_str)
    }

    /// The non-negative integer under a key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if there is another type of value.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        self.get(key, "a non-negative integer", Value::as_u64)
    }

    /// The number under a key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if there is another type of value.
    pub fn get_f64(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", Value::as_f64)
    }

    /// The truth value under a key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if there is another type of value.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", Value::as_bool)
    }

    /// The texts under a key.
    ///
    /// # Errors
    /// [`ModelError::Config`] if there is another type of value.
    pub fn get_strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.get(key, "an array of strings", Value::as_strings)
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(x) => Ok(Some(x)),
            None => Err(ModelError::config(self.path(), key, expected, value.kind())),
        }
    }
}

/// The bytes of rows, from the tensor's first byte on.
fn row_range(path: &Path, tensor: &GgufTensor, rows: Range<usize>) -> Result<Range<usize>> {
    let all = tensor.rows();
    let bytes = tensor.encoding.bytes(tensor.cols());
    match bytes {
        Some(bytes) if rows.start <= rows.end && rows.end <= all => {
            Ok(rows.start * bytes..rows.end * bytes)
        }
        _ => Err(ModelError::format(
            path,
            format!("rows of tensor {:?}", tensor.name),
            format!("a range within 0..{all}"),
            format!("{rows:?}"),
        )),
    }
}

struct Header {
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<GgufTensor>,
}

impl Header {
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
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
    encoding: Encoding,
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
                encoding: self.encoding,
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

macro_rules! numbers {
    ($($name:ident: $type:ty),*) => {$(
        fn $name(&mut self, what: &str) -> Result<$type> {
            let bytes = self.take(size_of::<$type>(), what)?;
            let mut buffer = [0; size_of::<$type>()];
            buffer.copy_from_slice(bytes);
            Ok(<$type>::from_le_bytes(buffer))
        }
    )*};
}

/// An array of numbers of one type.
macro_rules! number_array {
    ($self:ident, $count:expr, $key:expr, $type:ty) => {{
        let count = $self.count($count, size_of::<$type>(), $key)?;
        $self
            .take(count * size_of::<$type>(), $key)?
            .chunks_exact(size_of::<$type>())
            .map(|bytes| {
                let mut buffer = [0; size_of::<$type>()];
                buffer.copy_from_slice(bytes);
                <$type>::from_le_bytes(buffer)
            })
            .collect()
    }};
}

impl<'a> Reader<'a> {
    numbers!(u8: u8, i8: i8, u16: u16, i16: i16, u32: u32, i32: i32, u64: u64, i64: i64, f32: f32, f64: f64);

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

    fn bool(&mut self, what: &str) -> Result<bool> {
        match self.u8(what)? {
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
            0 => Value::U8(self.u8(key)?),
            1 => Value::I8(self.i8(key)?),
            2 => Value::U16(self.u16(key)?),
            3 => Value::I16(self.i16(key)?),
            4 => Value::U32(self.u32(key)?),
            5 => Value::I32(self.i32(key)?),
            6 => Value::F32(self.f32(key)?),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::String(self.string(key)?),
            9 => Value::Array(self.array(key, 1)?),
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(self.i64(key)?),
            12 => Value::F64(self.f64(key)?),
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
            0 => Array::U8(number_array!(self, n, key, u8)),
            1 => Array::I8(number_array!(self, n, key, i8)),
            2 => Array::U16(number_array!(self, n, key, u16)),
            3 => Array::I16(number_array!(self, n, key, i16)),
            4 => Array::U32(number_array!(self, n, key, u32)),
            5 => Array::I32(number_array!(self, n, key, i32)),
            6 => Array::F32(number_array!(self, n, key, f32)),
            7 => {
                let n = self.count(n, 1, key)?;
                Array::Bool((0..n).map(|_| self.bool(key)).collect::<Result<_>>()?)
            }
            8 => {
                let n = self.count(n, 8, key)?;
                let mut texts = Vec::with_capacity(n);
                for _ in 0..n {
                    texts.push(self.string(key)?);
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
            10 => Array::U64(number_array!(self, n, key, u64)),
            11 => Array::I64(number_array!(self, n, key, i64)),
            12 => Array::F64(number_array!(self, n, key, f64)),
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
        let encoding = encoding(tag).map_err(|found| ModelError::UnsupportedEncoding {
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
        if !cols.is_multiple_of(encoding.block()) {
            return Err(ModelError::format(
                self.path,
                what,
                format!("rows of whole {encoding} blocks of {}", encoding.block()),
                format!("rows of {cols} values"),
            ));
        }
        let len = shape[..shape.len() - 1]
            .iter()
            .try_fold(encoding.bytes(cols), |n, &dim| {
                n.map(|n| n.checked_mul(dim))
            })
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
            encoding,
            offset,
            len,
        })
    }
}

/// The encoding of a GGML type number, or the name of one that is not supported.
fn encoding(tag: u32) -> Result<Encoding, String> {
    Ok(match tag {
        0 => Encoding::F32,
        1 => Encoding::F16,
        2 => Encoding::Q4_0,
        3 => Encoding::Q4_1,
        6 => Encoding::Q5_0,
        7 => Encoding::Q5_1,
        8 => Encoding::Q8_0,
        10 => Encoding::Q2_K,
        11 => Encoding::Q3_K,
        12 => Encoding::Q4_K,
        13 => Encoding::Q5_K,
        14 => Encoding::Q6_K,
        30 => Encoding::BF16,
        9 => return Err("Q8_1".into()),
        15 => return Err("Q8_K".into()),
        16 => return Err("IQ2_XXS".into()),
        17 => return Err("IQ2_XS".into()),
        18 => return Err("IQ3_XXS".into()),
        19 => return Err("IQ1_S".into()),
        20 => return Err("IQ4_NL".into()),
        21 => return Err("IQ3_S".into()),
        22 => return Err("IQ2_S".into()),
        23 => return Err("IQ4_XS".into()),
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

#[cfg(test)]
pub(crate) mod writer {
    //! A small writer, for tests of what reads.

    use super::{Array, Value};
    use crate::Encoding;

    /// A file in the making.
    #[derive(Debug, Clone, Default)]
    pub(crate) struct File {
        pub(crate) metadata: Vec<(String, Value)>,
        /// Name, shape (slowest first), type number, bytes.
        pub(crate) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
        /// Offsets, where they are not to follow from the sizes.
        pub(crate) offsets: Option<Vec<u64>>,
    }

    pub(crate) fn tag(encoding: Encoding) -> u32 {
        (0..64)
            .find(|&t| super::encoding(t) == Ok(encoding))
            .expect("every encoding has a number")
    }

    impl File {
        pub(crate) fn meta(mut self, key: &str, value: Value) -> Self {
            self.metadata.push((key.to_owned(), value));
            self
        }

        pub(crate) fn tensor(
            mut self,
            name: &str,
            shape: &[u64],
            encoding: Encoding,
            bytes: Vec<u8>,
        ) -> Self {
            self.tensors
                .push((name.to_owned(), shape.to_vec(), tag(encoding), bytes));
            self
        }

        pub(crate) fn f32(self, name: &str, shape: &[u64], values: &[f32]) -> Self {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.tensor(name, shape, Encoding::F32, bytes)
        }

        pub(crate) fn bytes(&self) -> Vec<u8> {
            let alignment = self
                .metadata
                .iter()
                .find(|(k, _)| k == "general.alignment")
                .and_then(|(_, v)| v.as_u64())
                .unwrap_or(32)
                .max(1) as usize;
            let mut out = b"GGUF".to_vec();
            out.extend(3u32.to_le_bytes());
            out.extend((self.tensors.len() as u64).to_le_bytes());
            out.extend((self.metadata.len() as u64).to_le_bytes());
            for (key, value) in &self.metadata {
                string(&mut out, key);
                self::value(&mut out, value);
            }
            let mut offset = 0;
            for (i, (name, shape, tag, bytes)) in self.tensors.iter().enumerate() {
                string(&mut out, name);
                out.extend((shape.len() as u32).to_le_bytes());
                for dim in shape.iter().rev() {
                    out.extend(dim.to_le_bytes());
                }
                out.extend(tag.to_le_bytes());
                let at = self.offsets.as_ref().map_or(offset as u64, |o| o[i]);
                out.extend(at.to_le_bytes());
                offset = (offset + bytes.len()).next_multiple_of(alignment);
            }
            for (_, _, _, bytes) in &self.tensors {
                out.resize(out.len().next_multiple_of(alignment), 0);
                out.extend(bytes);
            }
            out
        }

        pub(crate) fn write(&self) -> tempfile::NamedTempFile {
            write(&self.bytes())
        }
    }

    pub(crate) fn write(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    pub(crate) fn string(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    fn value(out: &mut Vec<u8>, value: &Value) {
        macro_rules! put {
            ($tag:expr, $bytes:expr) => {{
                out.extend(($tag as u32).to_le_bytes());
                out.extend($bytes);
            }};
        }
        match value {
            Value::U8(x) => put!(0, x.to_le_bytes()),
            Value::I8(x) => put!(1, x.to_le_bytes()),
            Value::U16(x) => put!(2, x.to_le_bytes()),
            Value::I16(x) => put!(3, x.to_le_bytes()),
            Value::U32(x) => put!(4, x.to_le_bytes()),
            Value::I32(x) => put!(5, x.to_le_bytes()),
            Value::F32(x) => put!(6, x.to_le_bytes()),
            Value::Bool(x) => put!(7, [u8::from(*x)]),
            Value::String(x) => {
                put!(8, [0u8; 0]);
                string(out, x);
            }
            Value::Array(a) => {
                put!(9, [0u8; 0]);
                array(out, a);
            }
            Value::U64(x) => put!(10, x.to_le_bytes()),
            Value::I64(x) => put!(11, x.to_le_bytes()),
            Value::F64(x) => put!(12, x.to_le_bytes()),
        }
    }

    fn array(out: &mut Vec<u8>, array: &Array) {
        macro_rules! put {
            ($tag:expr, $values:expr) => {{
                out.extend(($tag as u32).to_le_bytes());
                out.extend(($values.len() as u64).to_le_bytes());
                for x in $values {
                    out.extend(x.to_le_bytes());
                }
            }};
        }
        match array {
            Array::U8(v) => put!(0, v),
            Array::I8(v) => put!(1, v),
            Array::U16(v) => put!(2, v),
            Array::I16(v) => put!(3, v),
            Array::U32(v) => put!(4, v),
            Array::I32(v) => put!(5, v),
            Array::F32(v) => put!(6, v),
            Array::Bool(v) => {
                let bytes: Vec<u8> = v.iter().map(|&x| x.into()).collect();
                put!(7, &bytes);
            }
            Array::String(v) => {
                out.extend(8u32.to_le_bytes());
                out.extend((v.len() as u64).to_le_bytes());
                for text in v {
                    string(out, text);
                }
            }
            Array::Array(v) => {
                out.extend(9u32.to_le_bytes());
                out.extend((v.len() as u64).to_le_bytes());
                for inner in v {
                    self::array(out, inner);
                }
            }
            Array::U64(v) => put!(10, v),
            Array::I64(v) => put!(11, v),
            Array::F64(v) => put!(12, v),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{writer::File, *};
    use proptest::prelude::*;

    fn parse(bytes: &[u8]) -> Result<Header> {
        Header::parse(Path::new("test.gguf"), bytes)
    }

    fn parse_error(bytes: &[u8]) -> ModelError {
        match parse(bytes) {
            Ok(_) => panic!("a hostile file was accepted"),
            Err(e) => e,
        }
    }

    fn every_value() -> Vec<(&'static str, Value)> {
        vec![
            ("u8", Value::U8(200)),
            ("i8", Value::I8(-100)),
            ("u16", Value::U16(60_000)),
            ("i16", Value::I16(-30_000)),
            ("u32", Value::U32(4_000_000_000)),
            ("i32", Value::I32(-2_000_000_000)),
            ("u64", Value::U64(1 << 60)),
            ("i64", Value::I64(-(1 << 60))),
            ("f32", Value::F32(1.5)),
            ("f64", Value::F64(-2.25)),
            ("bool", Value::Bool(true)),
            ("string", Value::String("grüße".into())),
            ("a.u8", Value::Array(Array::U8(vec![1, 2]))),
            ("a.i8", Value::Array(Array::I8(vec![-1, 2]))),
            ("a.u16", Value::Array(Array::U16(vec![1, 2]))),
            ("a.i16", Value::Array(Array::I16(vec![-1, 2]))),
            ("a.u32", Value::Array(Array::U32(vec![1, 2]))),
            ("a.i32", Value::Array(Array::I32(vec![-1, 2]))),
            ("a.u64", Value::Array(Array::U64(vec![1, 2]))),
            ("a.i64", Value::Array(Array::I64(vec![-1, 2]))),
            ("a.f32", Value::Array(Array::F32(vec![1.5]))),
            ("a.f64", Value::Array(Array::F64(vec![1.5, 2.5]))),
            ("a.bool", Value::Array(Array::Bool(vec![true, false]))),
            (
                "a.string",
                Value::Array(Array::String(vec!["a".into(), String::new()])),
            ),
            (
                "a.array",
                Value::Array(Array::Array(vec![
                    Array::U8(vec![7]),
                    Array::String(vec!["x".into()]),
                ])),
            ),
        ]
    }

    fn small() -> File {
        let mut file = File::default();
        for (key, value) in every_value() {
            file = file.meta(key, value);
        }
        file.f32("norm", &[3], &[1.0, 2.0, 3.0])
            .tensor("w", &[2, 32], Encoding::Q8_0, vec![1; 68])
            .f32("m", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    }

    #[test]
    fn every_value_type_is_read() {
        let file = small().write();
        let gguf = Gguf::open(file.path()).unwrap();
        assert_eq!(gguf.version(), 3);
        for (key, value) in every_value() {
            assert_eq!(gguf.metadata()[key], value, "{key}");
        }
        assert_eq!(gguf.get_u64("u16").unwrap(), Some(60_000));
        assert_eq!(gguf.get_f64("f64").unwrap(), Some(-2.25));
        assert_eq!(gguf.get_bool("bool").unwrap(), Some(true));
        assert_eq!(gguf.get_str("string").unwrap(), Some("grüße"));
        assert_eq!(gguf.get_strings("a.string").unwrap().unwrap().len(), 2);
        assert_eq!(gguf.get_str("absent").unwrap(), None);
        assert!(matches!(
            gguf.get_u64("string"),
            Err(ModelError::Config { what, .. }) if what == "string"
        ));
    }

    #[test]
    fn tensors_and_rows() {
        let file = small().write();
        let gguf = Gguf::open(file.path()).unwrap();
        let m = gguf.tensor("m").unwrap();
        assert_eq!(
            (m.shape.as_slice(), m.rows(), m.cols()),
            ([2, 3].as_slice(), 2, 3)
        );
        assert_eq!(gguf.dequantize(m).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(gguf.dequantize_rows(m, 1..2).unwrap(), [4.0, 5.0, 6.0]);
        assert_eq!(gguf.raw_rows(m, 1..2).unwrap()[..4], 4f32.to_le_bytes());
        assert!(gguf.dequantize_rows(m, 1..3).is_err());
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = 2..1;
        assert!(gguf.dequantize_rows(m, reversed).is_err());
        let norm = gguf.tensor("norm").unwrap();
        assert_eq!((norm.rows(), norm.cols()), (1, 3));
        assert!(gguf.tensor("absent").is_none());
        gguf.release_rows(m, 0..2);
        assert_eq!(gguf.dequantize_rows(m, 0..1).unwrap(), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = small().bytes();
        parse(&bytes).unwrap();
        for len in 0..bytes.len() {
            assert!(parse(&bytes[..len]).is_err(), "cut at {len}");
        }
        assert!(matches!(
            parse_error(&bytes[..bytes.len() - 1]),
            ModelError::Truncated { what, .. } if what.contains("\"m\"")
        ));
    }

    #[test]
    fn counts_and_lengths_beyond_the_file() {
        let head = |tensors: u64, metadata: u64| {
            let mut out = b"GGUF\x03\0\0\0".to_vec();
            out.extend(tensors.to_le_bytes());
            out.extend(metadata.to_le_bytes());
            out
        };
        for count in [1 << 60, u64::MAX, 1000] {
            assert!(matches!(
                parse_error(&head(count, 0)),
                ModelError::Truncated { needed, .. } if needed >= u128::from(count)
            ));
            assert!(matches!(
                parse_error(&head(0, count)),
                ModelError::Truncated { .. }
            ));
            // A key, a string and an array of every type that claim as many.
            let mut key = head(0, 1);
            key.extend(count.to_le_bytes());
            key.extend([0; 64]);
            assert!(matches!(parse_error(&key), ModelError::Truncated { .. }));
            for tag in 0..=12u32 {
                let mut array = head(0, 1);
                writer::string(&mut array, "key");
                array.extend(9u32.to_le_bytes());
                array.extend(tag.to_le_bytes());
                array.extend(count.to_le_bytes());
                array.extend([0; 64]);
                assert!(
                    matches!(parse_error(&array), ModelError::Truncated { .. }),
                    "type {tag}, {count}"
                );
            }
        }
        let huge = |shape: &[u64]| {
            let mut file = File::default();
            file.tensors
                .push(("t".into(), shape.to_vec(), 0, vec![0; 64]));
            file.bytes()
        };
        for shape in [
            &[1 << 60][..],
            &[1 << 32, 1 << 32],
            &[u64::MAX, u64::MAX, u64::MAX, u64::MAX],
            &[17],
        ] {
            assert!(
                matches!(parse_error(&huge(shape)), ModelError::Truncated { .. }),
                "{shape:?}"
            );
        }
        assert!(matches!(
            parse_error(&huge(&[0])),
            ModelError::Format { .. }
        ));
        assert!(matches!(
            parse_error(&huge(&[1, 1, 1, 1, 1])),
            ModelError::Format { .. }
        ));
        assert!(matches!(parse_error(&huge(&[])), ModelError::Format { .. }));
    }

    #[test]
    fn nested_arrays_end() {
        let mut inner = Array::U8(vec![1]);
        for _ in 0..MAX_NESTING - 1 {
            inner = Array::Array(vec![inner]);
        }
        let fits = File::default().meta("k", Value::Array(inner.clone()));
        parse(&fits.bytes()).unwrap();
        // Deeper ones are written by hand, without recursion.
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        writer::string(&mut bytes, "k");
        bytes.extend(9u32.to_le_bytes());
        for _ in 0..100_000 {
            bytes.extend(9u32.to_le_bytes());
            bytes.extend(1u64.to_le_bytes());
        }
        assert!(matches!(
            parse_error(&bytes),
            ModelError::Format { expected, .. } if expected.contains("nested")
        ));
    }

    #[test]
    fn offsets_and_overlaps() {
        let mut file = small();
        file.offsets = Some(vec![0, 32, 32]);
        assert!(matches!(
            parse_error(&file.bytes()),
            ModelError::Overlap { .. }
        ));
        file.offsets = Some(vec![0, 33, 128]);
        assert!(matches!(
            parse_error(&file.bytes()),
            ModelError::Format { expected, .. } if expected.contains("multiple of 32")
        ));
        for offset in [1 << 20, 1 << 60, u64::MAX - 31] {
            file.offsets = Some(vec![0, 32, offset]);
            assert!(matches!(
                parse_error(&file.bytes()),
                ModelError::Truncated { .. }
            ));
        }
    }

    #[test]
    fn alignment_is_read_and_checked() {
        let file = small().meta("general.alignment", Value::U32(64)).write();
        let gguf = Gguf::open(file.path()).unwrap();
        let m = gguf.tensor("m").unwrap();
        assert_eq!(m.bytes.start % 64, 0);
        assert_eq!(gguf.dequantize(m).unwrap()[5], 6.0);
        for bad in [
            Value::U32(0),
            Value::U32(3),
            Value::U32(1 << 31),
            Value::I32(-32),
            Value::F32(32.0),
        ] {
            let bytes = File::default().meta("general.alignment", bad).bytes();
            assert!(matches!(
                parse_error(&bytes),
                ModelError::Format { what, .. } if what == "general.alignment"
            ));
        }
    }

    #[test]
    fn names_are_unique() {
        let file = small().f32("m", &[1], &[0.0]);
        assert!(matches!(
            parse_error(&file.bytes()),
            ModelError::Duplicate { name, .. } if name == "m"
        ));
        let file = small().meta("u8", Value::U8(1));
        assert!(matches!(
            parse_error(&file.bytes()),
            ModelError::Duplicate { name, .. } if name == "u8"
        ));
    }

    #[test]
    fn other_formats_are_named() {
        assert!(matches!(parse_error(b""), ModelError::Truncated { .. }));
        assert!(matches!(
            parse_error(b"PK\x03\x04aaaa"),
            ModelError::Format { .. }
        ));
        let mut bytes = small().bytes();
        bytes[4] = 1;
        assert!(matches!(
            parse_error(&bytes),
            ModelError::Format { what, .. } if what == "version"
        ));
        bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
        assert!(parse_error(&bytes).to_string().contains("big-endian"));
        let mut file = small();
        file.tensors[0].2 = 23;
        assert!(matches!(
            parse_error(&file.bytes()),
            ModelError::UnsupportedEncoding { encoding, .. } if encoding == "IQ4_XS"
        ));
        file.tensors[0].2 = 77;
        assert!(matches!(
            parse_error(&file.bytes()),
            ModelError::UnsupportedEncoding { .. }
        ));
        file = small();
        file.tensors[1].1 = vec![2, 31];
        assert!(matches!(
            parse_error(&file.bytes()),
            ModelError::Format { expected, .. } if expected.contains("whole Q8_0 blocks")
        ));
        assert!(matches!(
            Gguf::open("/no/such/file.gguf"),
            Err(ModelError::Io { .. })
        ));
        assert!(Gguf::open(std::env::temp_dir()).is_err());
    }

    #[test]
    fn text_is_utf8_and_bools_are_bools() {
        let mut bytes = File::default()
            .meta("k", Value::String("abc".into()))
            .bytes();
        let at = bytes.len() - 1;
        bytes[at] = 0xff;
        assert!(matches!(
            parse_error(&bytes),
            ModelError::Format { expected, .. } if expected == "UTF-8 text"
        ));
        let mut bytes = File::default().meta("k", Value::Bool(true)).bytes();
        let at = bytes.len() - 1;
        bytes[at] = 2;
        assert!(matches!(parse_error(&bytes), ModelError::Format { .. }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn mutated_files_never_panic(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
            cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        ) {
            let mut bytes = small().bytes();
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(header) = parse(&bytes) {
                for tensor in &header.tensors {
                    let mut out = vec![0f32; tensor.rows() * tensor.cols()];
                    tensor.encoding.decode(&bytes[tensor.bytes.clone()], &mut out);
                }
            }
        }
    }
}
