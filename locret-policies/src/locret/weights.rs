//! Weights of retaining heads, and their files.

use crate::error::{PolicyError, Result};
use half::{bf16, f16};
use locret_core::{DType, ModelSpec, Positions};
use memmap2::Mmap;
use pytorch_reader::PytorchReader;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufWriter, Read, Write},
    path::{Component, Path, PathBuf},
};

/// The weights of a model's retaining heads, one head for each layer, without biases.
///
/// Files use the published names: `model.layers.{i}.self_attn.fc1.weight` `[d_R, (H + 2G)·d]` and
/// `model.layers.{i}.self_attn.fc2.weight` `[G, d_R]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeadWeights {
    /// One head per layer.
    pub layers: Vec<LayerHead>,
    /// Free text that a safetensors file carries: where the heads come from.
    pub metadata: BTreeMap<String, String>,
}

/// What a head reads of a token.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum HeadInput {
    /// Its query, key and value before rotation, side by side.
    #[default]
    Qkv,
    /// What the layer makes these from: the hidden state behind the layer's first normalisation.
    Layer,
}

impl HeadInput {
    /// Its name in files.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::Layer => "input",
        }
    }

    /// How many features that are.
    pub fn features(self, model: &ModelSpec) -> usize {
        match self {
            Self::Qkv => model.layer(0).qkv_features(),
            Self::Layer => model.hidden,
        }
    }
}

/// How heads are best used, as their file says: settings that won on texts put aside when they were
/// trained. A file of the authors' says nothing, and so leaves their procedure as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadAdvice {
    /// Over how many neighbouring units scores are max-pooled for selection (odd).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<usize>,
    /// First units of the text that stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sinks: Option<usize>,
    /// Which positions attention uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positions: Option<Positions>,
}

/// The key of [`HeadAdvice`] in the metadata.
const ADVICE: &str = "advice";

/// One layer's retaining head, `score = fc2 · silu(fc1 · [q; k; v])`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerHead {
    /// Intermediate features, `d_R`.
    pub d_r: usize,
    /// `[d_r, (H + 2G)·d]`, row-major.
    pub fc1: Vec<f32>,
    /// `[G, d_r]`, row-major.
    pub fc2: Vec<f32>,
}

/// A tensor of a file as it lies there.
struct Raw<'a> {
    shape: Vec<usize>,
    /// What the file's own kind calls it.
    dtype: String,
    bytes: Box<dyn FnOnce() -> std::io::Result<Cow<'a, [u8]>> + 'a>,
}

fn key(layer: usize, which: usize) -> String {
    format!("model.layers.{layer}.self_attn.fc{which}.weight")
}

impl HeadWeights {
    /// Reads heads for `model`.
    ///
    /// `path` is a safetensors file, a PyTorch `.bin` (any container that `torch.save` writes; no
    /// code in it is run), the index of either kind's shards, or a folder that has one of these
    /// under its usual name. What it is, is found from its content. A file of heads alone may
    /// have nothing else in it; in a whole checkpoint the other tensors are passed over. `d_R` is
    /// read from the file and can differ between layers.
    ///
    /// # Errors
    /// [`PolicyError::Io`]; [`PolicyError::File`] for a damaged file or one of another kind;
    /// [`PolicyError::MissingKeys`], [`PolicyError::UnknownKeys`], [`PolicyError::Shape`],
    /// [`PolicyError::Dtype`], [`PolicyError::NotFinite`] for heads that don't fit.
    pub fn load(path: impl AsRef<Path>, model: &ModelSpec) -> Result<Self> {
        let path = path.as_ref();
        let mut layers = vec![LayerHead::default(); model.layers];
        let mut found = BTreeSet::new();
        let mut others = BTreeSet::new();
        let mut metadata = BTreeMap::new();
        for file in files(path)? {
            let mut take = |name: &str, raw: Raw<'_>| {
                let Some((layer, which)) = place(name, model.layers) else {
                    others.insert(name.to_owned());
                    return Ok(());
                };
                found.insert(name.to_owned());
                layers[layer].fill(&file, name, which, raw, model)
            };
            match kind(&file)? {
                Kind::Safetensors => metadata.extend(read_safetensors(&file, &mut take)?),
                Kind::Torch => read_torch(&file, &mut take)?,
                Kind::Index => return Err(PolicyError::file(&file, "an index within an index")),
            }
        }
        let whole = others.iter().any(|name| is_of_a_model(name));
        let unknown: Vec<String> = others
            .into_iter()
            .filter(|name| !whole || is_of_a_head(name))
            .collect();
        let missing: Vec<String> = (0..model.layers)
            .flat_map(|layer| [key(layer, 1), key(layer, 2)])
            .filter(|name| !found.contains(name))
            .collect();
        let path = path.to_owned();
        if !unknown.is_empty() {
            return Err(PolicyError::UnknownKeys {
                path,
                keys: unknown,
            });
        }
        if !missing.is_empty() {
            return Err(PolicyError::MissingKeys {
                path,
                keys: missing,
            });
        }
        let heads = Self { layers, metadata };
        heads.validate(model)?;
        Ok(heads)
    }

    /// Checks the shapes against a model.
    ///
    /// # Errors
    /// [`PolicyError::Shape`].
    pub fn validate(&self, model: &ModelSpec) -> Result<()> {
        if self.layers.len() != model.layers {
            return Err(PolicyError::Shape {
                key: "retaining heads".into(),
                expected: format!("[{}] layers", model.layers),
                found: vec![self.layers.len()],
            });
        }
        let inputs = model.layer(0).qkv_features();
        for (layer, head) in self.layers.iter().enumerate() {
            let expected = [
                (1, head.d_r * inputs, head.fc1.len(), [head.d_r, inputs]),
                (
                    2,
                    model.kv_heads * head.d_r,
                    head.fc2.len(),
                    [model.kv_heads, head.d_r],
                ),
            ];
            for (which, expected, found, shape) in expected {
                if head.d_r == 0 || expected != found {
                    return Err(PolicyError::Shape {
                        key: key(layer, which),
                        expected: format!("{shape:?}"),
                        found: vec![found],
                    });
                }
            }
        }
        Ok(())
    }

    /// What [`metadata`](Self::metadata) says about the use of these heads, under `advice`.
    ///
    /// # Errors
    /// [`PolicyError::Config`] for an entry that is not the JSON of [`HeadAdvice`].
    pub fn advice(&self) -> Result<HeadAdvice> {
        match self.metadata.get(ADVICE) {
            Some(text) => serde_json::from_str(text)
                .map_err(|e| PolicyError::Config(format!("the advice of these heads: {e}"))),
            None => Ok(HeadAdvice::default()),
        }
    }

    /// Puts advice into [`metadata`](Self::metadata).
    pub fn advise(&mut self, advice: &HeadAdvice) {
        // A struct of numbers and names always has a JSON form.
        if let Ok(text) = serde_json::to_string(advice) {
            self.metadata.insert(ADVICE.into(), text);
        }
    }

    /// Writes a safetensors file, with [`metadata`](Self::metadata). The file appears whole or not
    /// at all: it is written beside its place and renamed.
    ///
    /// # Errors
    /// [`PolicyError::Io`], [`PolicyError::File`]; [`PolicyError::Dtype`] for a type other than
    /// [`DType::F32`], [`DType::F16`] and [`DType::BF16`]; [`PolicyError::NotFinite`] for a weight
    /// that `dtype` cannot hold; [`PolicyError::Shape`] for lengths that are no multiple of `d_r`.
    pub fn save(&self, path: impl AsRef<Path>, dtype: DType) -> Result<()> {
        let path = path.as_ref();
        let mut tensors = Vec::with_capacity(2 * self.layers.len());
        for (layer, head) in self.layers.iter().enumerate() {
            for (which, values) in [(1, &head.fc1), (2, &head.fc2)] {
                let name = key(layer, which);
                if head.d_r == 0 || !values.len().is_multiple_of(head.d_r) {
                    return Err(PolicyError::Shape {
                        key: name,
                        expected: format!("a multiple of d_R = {}", head.d_r),
                        found: vec![values.len()],
                    });
                }
                let other = values.len() / head.d_r;
                let shape = match which {
                    1 => vec![head.d_r, other],
                    _ => vec![other, head.d_r],
                };
                let data = encode(&name, values, dtype)?;
                tensors.push((name, Encoded { dtype, shape, data }));
            }
        }
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        // A temporary file is for its owner's eyes only unless told otherwise.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(folder).map_err(PolicyError::io(path))?;
        let header = self.header(&tensors);
        let mut out = BufWriter::new(file.as_file());
        let mut write = || {
            out.write_all(&(header.len() as u64).to_le_bytes())?;
            out.write_all(header.as_bytes())?;
            for (_, tensor) in &tensors {
                out.write_all(&tensor.data)?;
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

    /// The header of a safetensors file. The library that reads them keeps metadata in no order;
    /// here equal heads make equal files.
    fn header(&self, tensors: &[(String, Encoded)]) -> String {
        let mut entries = serde_json::Map::new();
        if !self.metadata.is_empty() {
            entries.insert("__metadata__".into(), serde_json::json!(self.metadata));
        }
        let mut end = 0;
        for (name, tensor) in tensors {
            let start = end;
            end += tensor.data.len();
            let entry = serde_json::json!({
                "dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [start, end],
            });
            entries.insert(name.clone(), entry);
        }
        let mut header = serde_json::Value::Object(entries).to_string();
        // Data begin at a multiple of eight bytes.
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        header
    }

    /// Weights over all layers.
    pub fn parameters(&self) -> usize {
        let layers = self.layers.iter();
        layers.map(|head| head.fc1.len() + head.fc2.len()).sum()
    }
}

impl LayerHead {
    fn fill(
        &mut self,
        path: &Path,
        name: &str,
        which: usize,
        raw: Raw<'_>,
        model: &ModelSpec,
    ) -> Result<()> {
        let inputs = model.layer(0).qkv_features();
        let shape = |expected: String| PolicyError::Shape {
            key: name.to_owned(),
            expected,
            found: raw.shape.clone(),
        };
        let expected = match which {
            1 => format!("[d_R, {inputs}]"),
            _ => format!("[{}, d_R]", model.kv_heads),
        };
        let d_r = match (which, raw.shape.as_slice()) {
            (1, [d_r, width]) if *width == inputs && *d_r > 0 => *d_r,
            (2, [kv_heads, d_r]) if *kv_heads == model.kv_heads && *d_r > 0 => *d_r,
            _ => return Err(shape(expected)),
        };
        // The other tensor of the layer may have been read before.
        if self.d_r != 0 && self.d_r != d_r {
            return Err(shape(format!(
                "{expected} with d_R = {} as in the layer's other tensor",
                self.d_r
            )));
        }
        self.d_r = d_r;
        let count: usize = raw.shape.iter().product();
        let bytes = (raw.bytes)().map_err(|e| PolicyError::file(path, e))?;
        let dtype: Option<DType> = raw.dtype.parse().ok();
        let dtype = dtype.filter(|dtype| dtype.is_float()).ok_or_else(|| {
            let found = raw.dtype.clone();
            PolicyError::Dtype {
                key: name.to_owned(),
                found,
            }
        })?;
        if dtype.bytes(count) != Some(bytes.len()) {
            let found = format!(
                "{name} has {} bytes for {count} values of {dtype}",
                bytes.len()
            );
            return Err(PolicyError::file(path, found));
        }
        let values = decode(name, dtype, &bytes)?;
        match which {
            1 => self.fc1 = values,
            _ => self.fc2 = values,
        }
        Ok(())
    }
}

/// The layer and the number (1 or 2) of a head's tensor of a model with `layers` layers.
fn place(name: &str, layers: usize) -> Option<(usize, usize)> {
    let rest = name.strip_prefix("model.layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let which = match rest {
        "self_attn.fc1.weight" => 1,
        "self_attn.fc2.weight" => 2,
        _ => return None,
    };
    // Only the plain form of the number: `model.layers.07` is another name.
    let index: usize = layer.parse().ok()?;
    (index < layers && layer == index.to_string()).then_some((index, which))
}

/// Whether a tensor can only be a language model's own.
fn is_of_a_model(name: &str) -> bool {
    name.ends_with("embed_tokens.weight")
        || [".q_proj.", ".qkv_proj.", ".o_proj.", ".mlp."]
            .iter()
            .any(|part| name.contains(part))
}

/// Whether a tensor is meant to belong to a retaining head.
fn is_of_a_head(name: &str) -> bool {
    name.contains(".self_attn.fc")
}

enum Kind {
    Safetensors,
    Torch,
    Index,
}

/// What a file is, by its first bytes.
fn kind(path: &Path) -> Result<Kind> {
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
fn files(path: &Path) -> Result<Vec<PathBuf>> {
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

type Take<'t> = dyn FnMut(&str, Raw<'_>) -> Result<()> + 't;

fn read_safetensors(path: &Path, take: &mut Take<'_>) -> Result<BTreeMap<String, String>> {
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

fn read_torch(path: &Path, take: &mut Take<'_>) -> Result<()> {
    let reader = PytorchReader::new(path).map_err(|e| PolicyError::file(path, e))?;
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

struct Encoded {
    dtype: DType,
    shape: Vec<usize>,
    data: Vec<u8>,
}
