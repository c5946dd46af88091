//! Files of named tensors: safetensors, what `torch.save` writes, and shards of either.

use crate::error::{PolicyError, Result};
use half::{bf16, f16};
use locret_core::DType;
use memmap2::Mmap;
use safetensors::SafeTensors;
use serde::Deserialize;
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufWriter, Read, Write},
    path::{Component, Path, PathBuf},
};

/// A tensor of a file as it lies there.
pub(super) struct Raw<'a> {
    pub(super) shape: Vec<usize>,
    /// What the file's own kind calls it.
    pub(super) dtype: String,
    pub(super) bytes: Box<dyn FnOnce() -> std::io::Result<Cow<'a, [u8]>> + 'a>,
}

impl Raw<'_> {
    /// Its numbers; all have to be finite.
    pub(super) fn values(self, path: &Path, name: &str) -> Result<Vec<f32>> {
        let count = (self.shape.iter()).try_fold(1usize, |all, n| all.checked_mul(*n));
        let bytes = (self.bytes)().map_err(|e| PolicyError::file(path, e))?;
        let dtype: Option<DType> = self.dtype.parse().ok();
        let dtype = dtype.filter(|dtype| dtype.is_float()).ok_or_else(|| {
            let found = self.dtype.clone();
            PolicyError::Dtype {
                key: name.to_owned(),
                found,
            }
        })?;
        if count.and_then(|count| dtype.bytes(count)) != Some(bytes.len()) {
            let found = format!(
                "{name} has {} bytes for {:?} values of {dtype}",
                bytes.len(),
                self.shape
            );
            return Err(PolicyError::file(path, found));
        }
        decode(name, dtype, &bytes)
    }
}

pub(super) enum Kind {
    Safetensors,
    Torch,
    Index,
}

/// What a file is, by its first bytes.
pub(super) fn kind(path: &Path) -> Result<Kind> {
    let mut start = Vec::new();
    let file = File::open(path).map_err(PolicyError::io(path))?;
    file.take(512)
        .read_to_end(&mut start)
        .map_err(PolicyError::io(path))?;
    // A safetensors file is the length of its header, then the header.
    if start.get(8) == Some(&b'{') {
        return Ok(Kind::Safetensors);
    }
    let tar = start.get(257..262) == Some(b"ustar");
    if start.starts_with(b"PK") || start.first() == Some(&0x80) || tar {
        return Ok(Kind::Torch);
    }
    if start.trim_ascii_start().first() == Some(&b'{') {
        return Ok(Kind::Index);
    }
    Err(PolicyError::file(
        path,
        "neither a safetensors nor a PyTorch file",
    ))
}

/// The files that hold the tensors of `path`.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_dir() {
        const USUAL: [&str; 4] = [
            "model.safetensors.index.json",
            "pytorch_model.bin.index.json",
            "model.safetensors",
            "pytorch_model.bin",
        ];
        let inside = USUAL.map(|name| path.join(name));
        return match inside.iter().find(|file| file.is_file()) {
            Some(file) => files(file),
            None => Err(PolicyError::file(
                path,
                format!("a folder without any of {}", USUAL.join(", ")),
            )),
        };
    }
    if !matches!(kind(path)?, Kind::Index) {
        return Ok(vec![path.to_owned()]);
    }
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(path).map_err(PolicyError::io(path))?;
    let index: Index = serde_json::from_str(&text).map_err(|e| PolicyError::file(path, e))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    shards
        .into_iter()
        .map(|shard| {
            if is_plain_name(&shard) {
                Ok(path.with_file_name(shard))
            } else {
                Err(PolicyError::file(
                    path,
                    format!("shard {shard:?} is not the name of a file beside the index"),
                ))
            }
        })
        .collect()
}

/// Whether a name is that of a file in the folder itself, on any operating system.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(only)), None) if only == name
    ) && !name.contains(['/', '\\', ':', '\0'])
}

pub(super) type Take<'t> = dyn FnMut(&str, Raw<'_>) -> Result<()> + 't;

pub(super) fn read_safetensors(
    path: &Path,
    take: &mut Take<'_>,
) -> Result<BTreeMap<String, String>> {
    let file = File::open(path).map_err(PolicyError::io(path))?;
    // SAFETY: the map is read only here; as with any map, a program that cuts the file short
    // meanwhile would end this one.
    let map = unsafe { Mmap::map(&file) }.map_err(PolicyError::io(path))?;
    let (_, header) = SafeTensors::read_metadata(&map).map_err(|e| PolicyError::file(path, e))?;
    let tensors = SafeTensors::deserialize(&map).map_err(|e| PolicyError::file(path, e))?;
    for (name, view) in tensors.iter() {
        let raw = Raw {
            shape: view.shape().to_vec(),
            dtype: format!("{:?}", view.dtype()),
            bytes: Box::new(move || Ok(Cow::Borrowed(view.data()))),
        };
        take(name, raw)?;
    }
    Ok(header
        .metadata()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect())
}

#[cfg(feature = "pytorch")]
pub(super) fn read_torch(path: &Path, take: &mut Take<'_>) -> Result<()> {
    let reader =
        pytorch_reader::PytorchReader::new(path).map_err(|e| PolicyError::file(path, e))?;
    for (name, tensor) in reader.tensors() {
        let raw = Raw {
            shape: tensor.shape().to_vec(),
            dtype: format!("{:?}", tensor.dtype()),
            bytes: Box::new(move || tensor.read().map(Cow::Owned)),
        };
        take(name, raw)?;
    }
    Ok(())
}

#[cfg(not(feature = "pytorch"))]
pub(super) fn read_torch(path: &Path, _take: &mut Take<'_>) -> Result<()> {
    let found = "a PyTorch file, which is read with the feature `pytorch` of locret-policies alone";
    Err(PolicyError::file(path, found))
}

/// Whole values of a plain float type as `f32`; all have to be finite.
fn decode(name: &str, dtype: DType, bytes: &[u8]) -> Result<Vec<f32>> {
    let mut values = vec![0.0; bytes.len() / dtype.block_bytes()];
    dtype.decode(bytes, &mut values);
    match values.iter().position(|x| !x.is_finite()) {
        Some(index) => Err(PolicyError::NotFinite {
            key: name.to_owned(),
            index,
        }),
        None => Ok(values),
    }
}

fn encode(name: &str, values: &[f32], dtype: DType) -> Result<Vec<u8>> {
    let values = values.iter();
    let bytes: Vec<u8> = match dtype {
        DType::F32 => values.flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => values
            .flat_map(|x| f16::from_f32(*x).to_le_bytes())
            .collect(),
        DType::BF16 => values
            .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
            .collect(),
        other => {
            return Err(PolicyError::Dtype {
                key: name.to_owned(),
                found: other.to_string(),
            });
        }
    };
    // A large weight may have become infinite.
    decode(name, dtype, &bytes)?;
    Ok(bytes)
}

/// A tensor to be written.
pub(super) struct Named {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) values: Vec<f32>,
}

/// Writes a safetensors file of tensors of one type. It appears whole or not at all: it is written beside its
/// place and renamed.
pub(super) fn write(
    path: &Path,
    tensors: &[Named],
    metadata: &BTreeMap<String, String>,
    dtype: DType,
) -> Result<()> {
    let encoded = tensors.iter().map(|t| encode(&t.name, &t.values, dtype));
    let encoded = encoded.collect::<Result<Vec<_>>>()?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    // A temporary file is for its owner's eyes only unless told otherwise.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(folder).map_err(PolicyError::io(path))?;
    let header = header(tensors, &encoded, metadata, dtype);
    let mut out = BufWriter::new(file.as_file());
    let mut write = || {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        for data in &encoded {
            out.write_all(data)?;
        }
        out.flush()
    };
    write().map_err(PolicyError::io(path))?;
    drop(out);
    file.as_file().sync_all().map_err(PolicyError::io(path))?;
    file.persist(path)
        .map_err(|e| PolicyError::io(path)(e.error))?;
    Ok(())
}

/// The header of a safetensors file. The library that reads them keeps metadata in no order; here equal heads
/// make equal files.
fn header(
    tensors: &[Named],
    encoded: &[Vec<u8>],
    metadata: &BTreeMap<String, String>,
    dtype: DType,
) -> String {
    let mut entries = serde_json::Map::new();
    if !metadata.is_empty() {
        entries.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut end = 0;
    for (tensor, data) in tensors.iter().zip(encoded) {
        let start = end;
        end += data.len();
        let entry = serde_json::json!({
            "dtype": dtype.name(), "shape": tensor.shape, "data_offsets": [start, end],
        });
        entries.insert(tensor.name.clone(), entry);
    }
    let mut header = serde_json::Value::Object(entries).to_string();
    // Data begin at a multiple of eight bytes.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    header
}
