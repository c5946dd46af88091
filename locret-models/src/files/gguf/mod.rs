//! Reading GGUF files (versions 2 and 3, little-endian).
//!
//! A [`Gguf`] is a memory map, the parsed metadata, and a checked table of tensors. Whatever the
//! file claims is checked against its length before anything is allocated. A file that was split into
//! several is opened as the one that it was.

mod header;
mod split;
mod value;

#[cfg(any(feature = "hub", test))]
pub(crate) use split::part_names;
pub use value::{Array, Value};

use super::mapped::MappedFile;
use crate::{DType, ModelError, Result};
use header::Header;
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    ops::Range,
    path::Path,
};

/// A tensor's entry in the table of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// The name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Dimensions, slowest first: `[rows, columns]` of a matrix. (GGUF itself lists the fastest
    /// first.)
    pub shape: Vec<usize>,
    /// How values are stored.
    pub dtype: DType,
    /// Where the bytes are in the file.
    pub bytes: Range<usize>,
}

impl GgufTensor {
    /// Values in a row: the last dimension.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// How many rows: the product of all dimensions but the last; at most [`usize::MAX`].
    pub fn rows(&self) -> usize {
        let all_but_last = self.shape.iter().rev().skip(1);
        all_but_last.fold(1, |rows: usize, n| rows.saturating_mul(*n))
    }
}

/// A GGUF file: memory-mapped, with parsed metadata and a checked table of tensors.
pub struct Gguf {
    /// The first has the metadata.
    files: Vec<MappedFile>,
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<GgufTensor>,
    /// Which tensor, and the file that has it.
    by_name: HashMap<String, (usize, usize)>,
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gguf")
            .field("path", &self.path())
            .field("files", &self.files.len())
            .field("version", &self.version)
            .field("metadata", &self.metadata.len())
            .field("tensors", &self.tensors.len())
            .finish()
    }
}

impl Gguf {
    /// Maps a file and parses its header. Any part of a file that was split (`-00001-of-00003.gguf` in
    /// its name) stands for all, which have to be in the same folder.
    ///
    /// # Errors
    /// [`ModelError::Io`]; [`ModelError::Format`] for anything that the format does not allow, and for
    /// parts that do not belong together; [`ModelError::Truncated`] for counts, lengths and offsets that
    /// point past the end; [`ModelError::Duplicate`], [`ModelError::Overlap`];
    /// [`ModelError::UnsupportedEncoding`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = MappedFile::open(path.as_ref())?;
        let header = Header::parse(file.path(), file.bytes())?;
        let parts = split::parts(&file, &header)?;
        if parts.is_empty() {
            return Self::of(vec![(file, header)]);
        }
        let mut all = Vec::with_capacity(parts.len());
        for (number, path) in parts.iter().enumerate() {
            let file = MappedFile::open(path)?;
            let header = Header::parse(file.path(), file.bytes())?;
            split::check(path, &header, number, parts.len())?;
            all.push((file, header));
        }
        let found: usize = all.iter().map(|(_, header)| header.tensors.len()).sum();
        split::check_count(&parts[0], &all[0].1, found)?;
        Self::of(all)
    }

    /// Several files as one.
    fn of(parts: Vec<(MappedFile, Header)>) -> Result<Self> {
        let mut this = Self {
            files: Vec::with_capacity(parts.len()),
            version: 0,
            metadata: BTreeMap::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
        };
        for (part, (file, header)) in parts.into_iter().enumerate() {
            if part == 0 {
                (this.version, this.metadata) = (header.version, header.metadata);
            }
            for tensor in header.tensors {
                let place = (this.tensors.len(), part);
                if this.by_name.insert(tensor.name.clone(), place).is_some() {
                    return Err(ModelError::Duplicate {
                        path: file.path().to_path_buf(),
                        what: "tensor",
                        name: tensor.name,
                    });
                }
                this.tensors.push(tensor);
            }
            this.files.push(file);
        }
        Ok(this)
    }

    /// The file; of several the first.
    pub fn path(&self) -> &Path {
        self.files[0].path()
    }

    /// The file that has a tensor.
    fn file(&self, tensor: &GgufTensor) -> &MappedFile {
        let part = self.by_name.get(&tensor.name).map_or(0, |place| place.1);
        &self.files[part]
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
        self.by_name.get(name).map(|&(i, _)| &self.tensors[i])
    }

    /// The packed blocks of a tensor, as they are in the file.
    ///
    /// # Errors
    /// [`ModelError::Format`] if the entry is not this file's.
    pub fn raw(&self, tensor: &GgufTensor) -> Result<&[u8]> {
        let bytes = self.file(tensor).bytes().get(tensor.bytes.clone());
        bytes.ok_or_else(|| self.strange(tensor))
    }

    fn strange(&self, tensor: &GgufTensor) -> ModelError {
        ModelError::format(
            self.file(tensor).path(),
            format!("tensor {:?}", tensor.name),
            "an entry of this file",
            "an entry of another file",
        )
    }

    /// The packed blocks of some rows of a tensor.
    ///
    /// # Errors
    /// [`ModelError::Format`] if the tensor does not have these rows, or the entry is not this file's.
    pub fn raw_rows(&self, tensor: &GgufTensor, rows: Range<usize>) -> Result<&[u8]> {
        let range = row_range(self.path(), tensor, rows)?;
        let bytes = self.raw(tensor)?.get(range);
        bytes.ok_or_else(|| self.strange(tensor))
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
        let values = bytes.len() / tensor.dtype.block_bytes() * tensor.dtype.block();
        let mut out = vec![0.0; values];
        tensor.dtype.decode(bytes, &mut out);
        Ok(out)
    }

    /// Lets go of resident pages of some rows, which have been read.
    pub(crate) fn release_rows(&self, tensor: &GgufTensor, rows: Range<usize>) {
        if let Ok(range) = row_range(self.path(), tensor, rows) {
            let start = tensor.bytes.start;
            let file = self.file(tensor);
            file.release(start + range.start..start + range.end);
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

    /// The token id under a key; none for a negative or larger integer, which some files have for "none".
    ///
    /// # Errors
    /// [`ModelError::Config`] if there is another type of value.
    pub fn get_id(&self, key: &str) -> Result<Option<u32>> {
        let id = self.get(key, "a token id", Value::as_i128)?;
        Ok(id.and_then(|id| u32::try_from(id).ok()))
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
    let bytes = tensor.dtype.bytes(tensor.cols());
    let range = bytes.and_then(|bytes| {
        let ends = [rows.start.checked_mul(bytes)?, rows.end.checked_mul(bytes)?];
        Some(ends[0]..ends[1])
    });
    match range {
        Some(range) if rows.start <= rows.end && rows.end <= all => Ok(range),
        _ => Err(ModelError::format(
            path,
            format!("rows of tensor {:?}", tensor.name),
            format!("a range within 0..{all}"),
            format!("{rows:?}"),
        )),
    }
}
