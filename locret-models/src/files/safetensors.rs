//! Weights in the folder layout of Hugging Face transformers.

use super::{json, mapped::MappedFile};
use crate::{DType, ModelError, Result, TensorInfo, Weights};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::Deserialize;
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    ops::Range,
    path::{Component, Path, PathBuf},
};

/// All weights.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Which shard has which weights.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// A model folder with `model.safetensors`, or with `model.safetensors.index.json` and shards.
///
/// Shards are mapped, not read: memory holds what is being converted. `f32`, `f16` and `bf16` are
/// read.
pub struct SafetensorsDir {
    dir: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
}

struct Shard {
    file: MappedFile,
    /// Where tensors begin.
    data: usize,
}

struct Entry {
    info: TensorInfo,
    shard: usize,
    /// In the file.
    bytes: Range<usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl fmt::Debug for SafetensorsDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SafetensorsDir")
            .field("dir", &self.dir)
            .field("shards", &self.shards.len())
            .field("tensors", &self.tensors.len())
            .finish()
    }
}

impl SafetensorsDir {
    /// Maps all shards of a folder and reads their headers.
    ///
    /// # Errors
    /// [`ModelError::NotFound`] if the folder has no safetensors; [`ModelError::ShardOutside`] for
    /// an index that points out of the folder; [`ModelError::NotInShard`];
    /// [`ModelError::UnsupportedEncoding`]; [`ModelError::Duplicate`] where two tensors have one name in
    /// the language model; [`ModelError::Format`] for what the format does not
    /// allow, overlapping tensors and absurd header lengths among it; [`ModelError::Io`] for a
    /// shard that is missing.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let mut this = Self {
            dir: dir.to_path_buf(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            this.add_shard(&single, None)?;
        } else if index.exists() {
            for (shard, names) in shards(&index)? {
                this.add_shard(&dir.join(shard), Some(&names))?;
            }
        } else {
            return Err(ModelError::NotFound {
                name: dir.display().to_string(),
                help: format!(
                    "expected {SINGLE} or {INDEX} in this folder (checkpoints in other formats \
                     have to be converted to safetensors)"
                ),
            });
        }
        this.name_as_decoder()?;
        Ok(this)
    }

    /// Gives tensors the names that they have in a language model of its own, where they are those of a
    /// model of several media (`language_model.model.…`, `model.language_model.…`), or of one that was
    /// saved without its head.
    fn name_as_decoder(&mut self) -> Result<()> {
        const WORDS: &str = "embed_tokens.weight";
        let renames: &[(&str, &str)] = if self.tensors.contains_key(&format!("model.{WORDS}")) {
            return Ok(());
        } else if self
            .tensors
            .contains_key(&format!("model.language_model.{WORDS}"))
        {
            &[("model.language_model.", "model.")]
        } else if self
            .tensors
            .contains_key(&format!("language_model.model.{WORDS}"))
        {
            &[("language_model.", "")]
        } else if self.tensors.contains_key(WORDS) {
            &[
                ("layers.", "model.layers."),
                ("norm.", "model.norm."),
                ("embed_tokens.", "model.embed_tokens."),
            ]
        } else {
            return Ok(());
        };
        for (name, entry) in std::mem::take(&mut self.tensors) {
            let found = renames.iter().find_map(|(from, to)| {
                let rest = name.strip_prefix(from)?;
                Some(format!("{to}{rest}"))
            });
            let name = found.unwrap_or(name);
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(ModelError::Duplicate {
                    path: self.dir.clone(),
                    what: "tensor",
                    name,
                });
            }
        }
        Ok(())
    }

    /// Adds the tensors of a shard: `names` of them, or all.
    fn add_shard(&mut self, path: &Path, names: Option<&BTreeSet<String>>) -> Result<()> {
        let file = MappedFile::open(path)?;
        let (header, metadata) =
            SafeTensors::read_metadata(file.bytes()).map_err(|e| header_error(path, e))?;
        let data = size_of::<u64>() + header;
        let found: HashMap<String, _> = metadata.tensors();
        if let Some(missing) = names.and_then(|n| n.iter().find(|n| !found.contains_key(*n))) {
            return Err(ModelError::NotInShard {
                shard: path.to_path_buf(),
                tensor: missing.clone(),
            });
        }
        for (name, info) in found {
            // Old checkpoints carry the rotary frequencies: derived numbers, not weights.
            let derived = name.ends_with(".rotary_emb.inv_freq");
            if derived || names.is_some_and(|n| !n.contains(&name)) {
                continue;
            }
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                // Masks and indices that old programs saved along with the weights.
                Dtype::BOOL | Dtype::I64
                    if !name.ends_with("weight") && !name.ends_with("bias") =>
                {
                    continue;
                }
                other => {
                    return Err(ModelError::UnsupportedEncoding {
                        path: path.to_path_buf(),
                        tensor: name,
                        encoding: format!("{other} (of safetensors, f32, f16 and bf16 are read)"),
                    });
                }
            };
            let (start, end) = info.data_offsets;
            self.tensors.insert(
                name,
                Entry {
                    info: TensorInfo {
                        shape: info.shape.clone(),
                        dtype,
                    },
                    shard: self.shards.len(),
                    bytes: data + start..data + end,
                },
            );
        }
        self.shards.push(Shard { file, data });
        Ok(())
    }

    fn locate(&self, name: &str, rows: &Range<usize>) -> Result<(&Shard, Range<usize>)> {
        let entry = self
            .tensors
            .get(name)
            .ok_or_else(|| ModelError::MissingTensors {
                path: self.dir.clone(),
                names: vec![name.to_owned()],
            })?;
        let shard = &self.shards[entry.shard];
        if rows.start > rows.end || rows.end > entry.info.rows() {
            return Err(ModelError::format(
                shard.file.path(),
                format!("rows of tensor {name:?}"),
                format!("a range within 0..{}", entry.info.rows()),
                format!("{rows:?}"),
            ));
        }
        let row = entry.info.cols() * entry.info.dtype.block_bytes();
        let start = entry.bytes.start;
        Ok((shard, start + rows.start * row..start + rows.end * row))
    }
}

impl Weights for SafetensorsDir {
    fn path(&self) -> &Path {
        &self.dir
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|t| &t.info)
    }

    fn raw_rows(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let (shard, bytes) = self.locate(name, &rows)?;
        shard
            .file
            .bytes()
            .get(bytes)
            .map(Cow::Borrowed)
            .ok_or_else(|| {
                ModelError::format(
                    shard.file.path(),
                    format!("tensor {name:?}"),
                    format!("bytes within the data from {} on", shard.data),
                    "bytes beyond the file",
                )
            })
    }

    fn release_rows(&self, name: &str, rows: Range<usize>) {
        if let Ok((shard, bytes)) = self.locate(name, &rows) {
            shard.file.release(bytes);
        }
    }
}

/// The shards that an index names, each with its tensors.
pub(crate) fn shards(index: &Path) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let Index { weight_map } = json::read(index)?;
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        if !is_plain_name(&shard) {
            return Err(ModelError::ShardOutside {
                index: index.to_path_buf(),
                tensor,
                shard,
            });
        }
        shards.entry(shard).or_default().insert(tensor);
    }
    Ok(shards)
}

/// Whether a name is that of a file in the folder itself, on any operating system.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(only)), None) if only == name
    ) && !name.contains(['/', '\\', ':', '\0'])
}

fn header_error(path: &Path, error: SafeTensorError) -> ModelError {
    let (what, expected) = match &error {
        SafeTensorError::HeaderTooLarge
        | SafeTensorError::HeaderTooSmall
        | SafeTensorError::InvalidHeaderLength => (
            "header length".to_owned(),
            "a length of at most 100 MB that the file can hold",
        ),
        SafeTensorError::InvalidOffset(name) => (
            format!("tensor {name:?}"),
            "bytes that begin where the tensor before ends, without overlap or gap",
        ),
        SafeTensorError::MetadataIncompleteBuffer => (
            "length".to_owned(),
            "a file that ends with its last tensor (truncated?)",
        ),
        SafeTensorError::TensorInvalidInfo | SafeTensorError::ValidationOverflow => (
            "tensor table".to_owned(),
            "shapes whose sizes are those of the bytes",
        ),
        _ => ("header".to_owned(), "a safetensors header"),
    };
    ModelError::format(path, what, expected, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{WeightDtype, WeightsExt};
    use burn::tensor::Device;
    use half::bf16;
    use safetensors::tensor::TensorView;
    use std::fs;
    use tempfile::TempDir;

    fn shard(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                let view = TensorView::new(*dtype, shape.to_vec(), bytes).unwrap();
                (*name, view)
            })
            .collect();
        safetensors::serialize(views, None).unwrap()
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn raw(header: &str, data: usize) -> Vec<u8> {
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.as_bytes());
        out.resize(out.len() + data, 0);
        out
    }

    fn dir(files: &[(&str, &[u8])]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    fn index(map: &[(&str, &str)]) -> Vec<u8> {
        let map: BTreeMap<_, _> = map.iter().copied().collect();
        serde_json::to_vec(&serde_json::json!({ "metadata": {}, "weight_map": map })).unwrap()
    }

    #[test]
    fn one_file() {
        let bf: Vec<u8> = [1.5f32, -2.0, 3.0, 4.0]
            .iter()
            .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
            .collect();
        let bytes = shard(&[
            ("a", Dtype::F32, &[3], f32s(&[1.0, 2.0, 3.0])),
            ("b", Dtype::BF16, &[2, 2], bf),
            (
                "model.layers.0.self_attn.rotary_emb.inv_freq",
                Dtype::F32,
                &[1],
                f32s(&[1.0]),
            ),
        ]);
        let dir = dir(&[(SINGLE, &bytes)]);
        let dir = SafetensorsDir::open(dir.path()).unwrap();
        let weights = &dir;
        assert_eq!(weights.names(), ["a", "b"]);
        assert_eq!(weights.info("b").unwrap().dtype, DType::BF16);
        assert_eq!(weights.tensor_f32("a").unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(weights.tensor_f32("b").unwrap(), [1.5, -2.0, 3.0, 4.0]);
        assert_eq!(weights.tensor_rows_f32("b", 1..2).unwrap(), [3.0, 4.0]);
        assert!(weights.raw_rows("b", 1..3).is_err());
        assert!(matches!(
            weights.raw_rows("c", 0..1),
            Err(ModelError::MissingTensors { .. })
        ));
    }

    #[test]
    fn shards() {
        let one = shard(&[("a", Dtype::F32, &[1], f32s(&[1.0]))]);
        let two = shard(&[
            ("b", Dtype::F32, &[1], f32s(&[2.0])),
            ("extra", Dtype::F32, &[1], f32s(&[3.0])),
        ]);
        let index = index(&[("a", "s1.safetensors"), ("b", "s2.safetensors")]);
        let dir = dir(&[
            (INDEX, &index),
            ("s1.safetensors", &one),
            ("s2.safetensors", &two),
        ]);
        let dir = SafetensorsDir::open(dir.path()).unwrap();
        let weights = &dir;
        assert_eq!(weights.names(), ["a", "b"]);
        let device = Device::flex();
        let b = weights.load("b", [1], WeightDtype::File, &device).unwrap();
        assert_eq!(b.into_scalar::<f32>(), 2.0);
    }

    #[test]
    fn an_index_stays_in_its_folder() {
        let one = shard(&[("a", Dtype::F32, &[1], f32s(&[1.0]))]);
        for bad in [
            "../s1.safetensors",
            "/etc/passwd",
            "sub/s1.safetensors",
            "./s1.safetensors",
            "..",
            ".",
            "",
            "s1.safetensors/",
            "C:\\s1.safetensors",
            "..\\s1.safetensors",
        ] {
            let index = index(&[("a", bad)]);
            let dir = dir(&[(INDEX, &index), ("s1.safetensors", &one)]);
            assert!(
                matches!(
                    SafetensorsDir::open(dir.path()),
                    Err(ModelError::ShardOutside { shard, .. }) if shard == bad
                ),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn index_and_shards_agree() {
        let one = shard(&[("a", Dtype::F32, &[1], f32s(&[1.0]))]);
        let missing = index(&[("a", "s1.safetensors"), ("b", "s2.safetensors")]);
        let folder = dir(&[(INDEX, &missing), ("s1.safetensors", &one)]);
        assert!(matches!(
            SafetensorsDir::open(folder.path()),
            Err(ModelError::Io { path, .. }) if path.ends_with("s2.safetensors")
        ));
        let elsewhere = index(&[("a", "s1.safetensors"), ("b", "s1.safetensors")]);
        let folder = dir(&[(INDEX, &elsewhere), ("s1.safetensors", &one)]);
        assert!(matches!(
            SafetensorsDir::open(folder.path()),
            Err(ModelError::NotInShard { tensor, .. }) if tensor == "b"
        ));
        let folder = dir(&[(INDEX, b"{\"weight_map\": [1]}")]);
        assert!(matches!(
            SafetensorsDir::open(folder.path()),
            Err(ModelError::Json { .. })
        ));
        let folder = dir(&[("pytorch_model.bin", b"")]);
        assert!(matches!(
            SafetensorsDir::open(folder.path()),
            Err(ModelError::NotFound { .. })
        ));
    }

    #[test]
    fn hostile_headers() {
        let tensor =
            |start, end| format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":[{start},{end}]}}"#);
        let overlap = format!(r#"{{"a":{},"b":{}}}"#, tensor(0, 4), tensor(0, 4));
        let gap = format!(r#"{{"a":{},"b":{}}}"#, tensor(0, 4), tensor(8, 12));
        let mut four_gb = raw("{}", 16);
        four_gb[..8].copy_from_slice(&(4u64 << 30).to_le_bytes());
        let mut absurd = raw("{}", 16);
        absurd[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut beyond = raw("{}", 16);
        beyond[..8].copy_from_slice(&1_000_000u64.to_le_bytes());
        for (what, bytes) in [
            ("overlap", raw(&overlap, 8)),
            ("gap", raw(&gap, 12)),
            ("4 GB header", four_gb),
            ("2^64 header", absurd),
            ("header beyond the file", beyond),
            ("no header", vec![1, 2, 3]),
            ("empty", vec![]),
            ("truncated", raw(&format!(r#"{{"a":{}}}"#, tensor(0, 4)), 3)),
            ("no JSON", raw("not json", 0)),
            (
                "2^60 elements",
                raw(
                    r#"{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}"#,
                    4,
                ),
            ),
            (
                "product overflows",
                raw(
                    r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}"#,
                    4,
                ),
            ),
            (
                "reversed offsets",
                raw(
                    r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
                    4,
                ),
            ),
        ] {
            let folder = dir(&[(SINGLE, &bytes)]);
            let error = SafetensorsDir::open(folder.path()).expect_err(what);
            assert!(
                matches!(error, ModelError::Format { .. }),
                "{what}: {error}"
            );
        }
        let wrong = raw(
            r#"{"weight":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#,
            8,
        );
        let folder = dir(&[(SINGLE, &wrong)]);
        assert!(matches!(
            SafetensorsDir::open(folder.path()),
            Err(ModelError::UnsupportedEncoding { encoding, .. }) if encoding.starts_with("I64")
        ));
    }
}
