//! What was collected, on disk: one file for each sample.
//!
//! A file is safetensors: for each layer what heads read, `layers.{i}.qkv` `[rows, (H + 2G)·d]` or
//! `layers.{i}.input` `[rows, hidden]` or both, each for 8-bit inputs with `.scales`, one for `d` features, and
//! for each kind of label `layers.{i}.labels.{kind}` `[rows, G]`. Rows are the tokens of one or more spans of the
//! prompt.

use super::{FINGERPRINT, LabelKind, fingerprint};
use crate::{HeadInput, PolicyError, Result};
use half::f16;
use memmap2::Mmap;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{View, serialize_to_file},
};
use serde::{Deserialize, Serialize};
use std::{
    borrow::Cow,
    collections::HashMap,
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
};

/// How the inputs of heads are kept on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InputDtype {
    /// IEEE half; what exceeds its range is cut to it. 2 bytes a value.
    F16,
    /// 8 bits with a scale for as many features of a token as a head has: 1.03 bytes a value.
    #[default]
    Q8,
}

/// What a sample is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Heads are fitted to it.
    Train,
    /// It only measures.
    Validation,
}

/// Rows of one layer while they are gathered.
#[derive(Debug, Clone, Default)]
pub(super) struct LayerRows {
    /// For each of what heads read.
    pub(super) inputs: Vec<Coded>,
    /// For each kind of label, 32-bit numbers.
    pub(super) labels: Vec<Vec<u8>>,
}

/// Rows of inputs as they go to disk.
#[derive(Debug, Clone, Default)]
pub(super) struct Coded {
    pub(super) values: Vec<u8>,
    pub(super) scales: Vec<u8>,
}

impl Coded {
    /// Adds the inputs of one token, in parts of `head_dim`.
    pub(super) fn push(&mut self, row: &[f32], head_dim: usize, dtype: InputDtype) {
        match dtype {
            InputDtype::F16 => {
                let cut = |x: f32| f16::from_f32(x.clamp(-65504.0, 65504.0));
                self.values
                    .extend(row.iter().flat_map(|x| cut(*x).to_le_bytes()));
            }
            InputDtype::Q8 => {
                for head in row.chunks(head_dim) {
                    let most = head.iter().fold(0f32, |m, x| m.max(x.abs()));
                    // Rounded first, so that codes and scale agree when they are read back.
                    let scale = f16::from_f32((most / 127.0).min(65504.0));
                    self.scales.extend(scale.to_le_bytes());
                    let scale = scale.to_f32();
                    let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    let code = |x: &f32| (x * factor).round().clamp(-127.0, 127.0) as i8 as u8;
                    self.values.extend(head.iter().map(code));
                }
            }
        }
    }
}

/// What is written of a sample.
#[derive(Debug)]
pub(super) struct NewShard {
    pub(super) fingerprint: u64,
    pub(super) split: Split,
    pub(super) dtype: InputDtype,
    /// The spans of the prompt that the rows come from.
    pub(super) spans: Vec<Range<usize>>,
    /// Tokens of the prompt.
    pub(super) tokens: usize,
    pub(super) head_dim: usize,
    pub(super) kv_heads: usize,
    /// What heads read, and how many features that has.
    pub(super) reads: Vec<(HeadInput, usize)>,
    pub(super) labels: Vec<LabelKind>,
    pub(super) layers: Vec<LayerRows>,
}

#[derive(Serialize, Deserialize)]
struct Meta {
    fingerprint: u64,
    split: Split,
    dtype: InputDtype,
    spans: Vec<Range<usize>>,
    tokens: usize,
    head_dim: usize,
    layers: usize,
}

/// The key of [`Meta`] in the metadata.
const META: &str = "locret_shard";

pub(super) fn path_of(folder: &Path, index: usize) -> PathBuf {
    folder.join(format!("sample-{index:05}.safetensors"))
}

impl NewShard {
    /// Writes the file beside its place and renames it.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let rows: usize = self.spans.iter().map(|s| s.len()).sum();
        let mut tensors = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let mut add = |what: &str, dtype, columns: usize, data: &[u8]| {
                let data = Bytes {
                    dtype,
                    shape: vec![rows, columns],
                    data: data.to_vec(),
                };
                tensors.push((format!("layers.{i}.{what}"), data));
            };
            for ((read, features), coded) in self.reads.iter().zip(&layer.inputs) {
                let name = read.name();
                match self.dtype {
                    InputDtype::F16 => add(name, Dtype::F16, *features, &coded.values),
                    InputDtype::Q8 => {
                        let parts = features.div_ceil(self.head_dim);
                        add(name, Dtype::I8, *features, &coded.values);
                        add(&format!("{name}.scales"), Dtype::F16, parts, &coded.scales);
                    }
                }
            }
            for (kind, labels) in self.labels.iter().zip(&layer.labels) {
                let name = labels_of(*kind);
                add(&name, Dtype::F32, self.kv_heads, labels);
            }
        }
        let meta = Meta {
            fingerprint: self.fingerprint,
            split: self.split,
            dtype: self.dtype,
            spans: self.spans.clone(),
            tokens: self.tokens,
            head_dim: self.head_dim,
            layers: self.layers.len(),
        };
        let meta = serde_json::to_string(&meta).map_err(|e| PolicyError::file(path, e))?;
        save(path, tensors, HashMap::from([(META.to_owned(), meta)]))
    }
}

/// What labels are called in a layer.
fn labels_of(kind: LabelKind) -> String {
    format!("labels.{}", kind.name())
}

/// Writes a safetensors file that is never there by half.
pub(super) fn save(
    path: &Path,
    tensors: Vec<(String, Bytes)>,
    metadata: HashMap<String, String>,
) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(folder).map_err(PolicyError::io(path))?;
    serialize_to_file(tensors, Some(metadata), file.path())
        .map_err(|e| PolicyError::file(path, e))?;
    let written = File::open(file.path()).map_err(PolicyError::io(path))?;
    written.sync_all().map_err(PolicyError::io(path))?;
    file.persist(path)
        .map_err(|e| PolicyError::io(path)(e.error))?;
    Ok(())
}

/// A tensor as bytes.
#[derive(Debug)]
pub(super) struct Bytes {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) data: Vec<u8>,
}

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// The collected file of one sample.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    fingerprint: u64,
    split: Split,
    dtype: InputDtype,
    spans: Vec<Range<usize>>,
    tokens: usize,
    rows: usize,
    head_dim: usize,
    layers: usize,
}

impl Shard {
    /// Opens a file.
    ///
    /// # Errors
    /// [`PolicyError::Io`]; [`PolicyError::File`] for something else or a damaged file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(PolicyError::io(path))?;
        // SAFETY: shards are written beside their place and renamed, never changed in place; as
        // with any map, a program that cuts the file short meanwhile would end this one.
        let map = unsafe { Mmap::map(&file) }.map_err(PolicyError::io(path))?;
        let (_, header) =
            SafeTensors::read_metadata(&map).map_err(|e| PolicyError::file(path, e))?;
        let meta = header.metadata().as_ref().and_then(|m| m.get(META));
        let meta = meta.ok_or_else(|| PolicyError::file(path, "not a collected sample"))?;
        let meta: Meta = serde_json::from_str(meta).map_err(|e| PolicyError::file(path, e))?;
        SafeTensors::deserialize(&map).map_err(|e| PolicyError::file(path, e))?;
        // What everything else reckons with; rows are compared with those of the tensors there.
        if meta.head_dim == 0 {
            return Err(PolicyError::file(path, "heads of no features"));
        }
        let mut rows = 0;
        for span in &meta.spans {
            if span.start > span.end || span.end > meta.tokens || span.len() > meta.tokens - rows {
                return Err(PolicyError::file(
                    path,
                    "spans that are none, or of more rows than the text has",
                ));
            }
            rows += span.len();
        }
        Ok(Self {
            path: path.to_owned(),
            map,
            fingerprint: meta.fingerprint,
            split: meta.split,
            dtype: meta.dtype,
            spans: meta.spans,
            tokens: meta.tokens,
            rows,
            head_dim: meta.head_dim,
            layers: meta.layers,
        })
    }

    /// What the sample is used for.
    pub fn split(&self) -> Split {
        self.split
    }

    /// Tokens in the file.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// For each row, how many tokens there are from its own on to the end of the text: at least 1.
    pub fn ages(&self) -> Vec<f32> {
        let tokens = self.spans.iter().cloned().flatten();
        tokens.map(|token| (self.tokens - token) as f32).collect()
    }

    /// Rows that come from one stretch of the prompt each.
    pub fn spans(&self) -> Vec<Range<usize>> {
        let mut at = 0;
        let range = |span: &Range<usize>| {
            at += span.len();
            at - span.len()..at
        };
        self.spans.iter().map(range).collect()
    }

    /// Layers in the file.
    pub fn layers(&self) -> usize {
        self.layers
    }

    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// One layer's rows: what heads read, and their labels.
    ///
    /// # Errors
    /// [`PolicyError::File`] for a layer, an input or a kind of label that is not there, or tensors that don't
    /// fit.
    pub fn layer(&self, layer: usize, read: HeadInput, kind: LabelKind) -> Result<ShardLayer<'_>> {
        let bad = |e: &dyn std::fmt::Display| PolicyError::file(&self.path, e);
        let tensors = SafeTensors::deserialize(&self.map).map_err(|e| bad(&e))?;
        let get = |what: &str, dtype: Dtype| {
            let name = format!("layers.{layer}.{what}");
            let view = tensors
                .tensor(&name)
                .map_err(|e| bad(&format!("{name}: {e}")))?;
            match *view.shape() {
                [rows, columns] if (rows, view.dtype()) == (self.rows(), dtype) && columns > 0 => {
                    Ok((view.data(), columns))
                }
                _ => Err(bad(&format!(
                    "{name}: {:?} {:?}",
                    view.dtype(),
                    view.shape()
                ))),
            }
        };
        let (inputs, features) = match self.dtype {
            InputDtype::F16 => get(read.name(), Dtype::F16)?,
            InputDtype::Q8 => get(read.name(), Dtype::I8)?,
        };
        let scales = match self.dtype {
            InputDtype::F16 => &[][..],
            InputDtype::Q8 => {
                let (scales, parts) = get(&format!("{}.scales", read.name()), Dtype::F16)?;
                if parts != features.div_ceil(self.head_dim) {
                    return Err(bad(&format!("layer {layer}: {parts} scales a row")));
                }
                scales
            }
        };
        let (labels, kv_heads) = get(&labels_of(kind), Dtype::F32)?;
        Ok(ShardLayer {
            inputs,
            scales,
            labels,
            features,
            kv_heads,
            head_dim: self.head_dim,
        })
    }
}

/// One layer of one sample.
#[derive(Debug, Clone, Copy)]
pub struct ShardLayer<'a> {
    inputs: &'a [u8],
    scales: &'a [u8],
    labels: &'a [u8],
    features: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl ShardLayer<'_> {
    /// Features of a row.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Labels of a row, `G`.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// The inputs of some rows, `[rows, features]` row-major.
    pub fn inputs(&self, rows: Range<usize>) -> Vec<f32> {
        let mut out = Vec::with_capacity(rows.len() * self.features);
        if self.scales.is_empty() {
            let bytes = &self.inputs[2 * rows.start * self.features..2 * rows.end * self.features];
            out.extend(halves(bytes));
            return out;
        }
        let parts = self.features.div_ceil(self.head_dim);
        let mut scales = halves(&self.scales[2 * rows.start * parts..2 * rows.end * parts]);
        let codes = &self.inputs[rows.start * self.features..rows.end * self.features];
        for row in codes.chunks_exact(self.features) {
            for (part, scale) in row.chunks(self.head_dim).zip(scales.by_ref()) {
                out.extend(part.iter().map(|c| f32::from(*c as i8) * scale));
            }
        }
        out
    }

    /// All labels, `[rows, kv_heads]` row-major.
    pub fn labels(&self) -> Vec<f32> {
        let bytes = self.labels.chunks_exact(4);
        bytes
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    }
}

fn halves(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes
        .chunks_exact(2)
        .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
}

/// Everything that was collected, in the order of the samples.
#[derive(Debug)]
pub struct Shards {
    shards: Vec<Shard>,
}

impl Shards {
    /// Of files that belong together.
    ///
    /// # Errors
    /// [`PolicyError::Setting`] if there are none, none to fit to, or they have different
    /// numbers of layers.
    pub fn new(shards: Vec<Shard>) -> Result<Self> {
        let wrong = |message: &str| Err(PolicyError::setting("training", message));
        if !shards.iter().any(|s| s.split == Split::Train) {
            return wrong("there is no sample to train on");
        }
        if shards.windows(2).any(|w| w[0].layers != w[1].layers) {
            return wrong("the collected samples are not of one model");
        }
        Ok(Self { shards })
    }

    /// All files.
    pub fn all(&self) -> &[Shard] {
        &self.shards
    }

    /// The files of one split.
    pub fn of(&self, split: Split) -> impl Iterator<Item = &Shard> {
        self.shards.iter().filter(move |s| s.split == split)
    }

    /// Layers of the model.
    pub fn layers(&self) -> usize {
        self.shards.first().map_or(0, |s| s.layers)
    }

    /// Tokens in one split.
    pub fn rows(&self, split: Split) -> usize {
        self.of(split).map(Shard::rows).sum()
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        let size = |s: &Shard| fs::metadata(&s.path).map_or(0, |m| m.len());
        self.shards.iter().map(size).sum()
    }

    pub(super) fn fingerprint(&self) -> u64 {
        let all = self.shards.iter().flat_map(|s| s.fingerprint.to_le_bytes());
        fingerprint(FINGERPRINT, all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of eight and of six features, in parts of four.
    fn rows(dtype: InputDtype) -> ([Vec<f32>; 2], LayerRows) {
        let values = [8, 6].map(|width| {
            let value = |i: usize| (i as f32 * 0.7).sin() * (i % 5) as f32;
            (0..3 * width).map(value).collect::<Vec<f32>>()
        });
        let coded = values.iter().zip([8, 6]).map(|(values, width)| {
            let mut coded = Coded::default();
            for row in values.chunks(width) {
                coded.push(row, 4, dtype);
            }
            coded
        });
        let labels = |list: [f32; 3]| list.into_iter().flat_map(f32::to_le_bytes).collect();
        let rows = LayerRows {
            inputs: coded.collect(),
            labels: vec![labels([1.0, -2.5, 3.0]), labels([4.0, 5.0, 6.0])],
        };
        (values, rows)
    }

    fn shard(dtype: InputDtype) -> NewShard {
        NewShard {
            fingerprint: 7,
            split: Split::Train,
            dtype,
            spans: vec![0..2, 5..6],
            tokens: 7,
            head_dim: 4,
            kv_heads: 1,
            reads: vec![(HeadInput::Qkv, 8), (HeadInput::Layer, 6)],
            labels: vec![LabelKind::MaxLogit, LabelKind::Kvzip],
            layers: vec![rows(dtype).1],
        }
    }

    #[test]
    fn rows_come_back_as_they_were_put_in() {
        let folder = tempfile::tempdir().unwrap();
        for (dtype, tolerance) in [(InputDtype::F16, 0.002), (InputDtype::Q8, 0.02)] {
            let path = path_of(folder.path(), 3);
            shard(dtype).write(&path).unwrap();
            let shard = Shard::open(&path).unwrap();
            assert_eq!(shard.spans(), [0..2, 2..3]);
            assert_eq!(shard.ages(), [7.0, 6.0, 2.0]);
            assert_eq!(shard.fingerprint(), 7);
            for (read, values) in [HeadInput::Qkv, HeadInput::Layer]
                .into_iter()
                .zip(rows(dtype).0)
            {
                let layer = shard.layer(0, read, LabelKind::MaxLogit).unwrap();
                let width = values.len() / 3;
                let found = layer.inputs(1..3);
                assert_eq!(found.len(), 2 * width);
                for (found, expected) in found.iter().zip(&values[width..]) {
                    assert!((found - expected).abs() <= tolerance, "{found} {expected}");
                }
                assert_eq!(layer.labels(), [1.0, -2.5, 3.0]);
                let other = shard.layer(0, read, LabelKind::Kvzip).unwrap();
                assert_eq!(other.labels(), [4.0, 5.0, 6.0]);
                assert!(shard.layer(0, read, LabelKind::Mass).is_err());
                assert!(shard.layer(1, read, LabelKind::MaxLogit).is_err());
            }
        }
    }

    #[test]
    fn other_and_damaged_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = path_of(folder.path(), 0);
        shard(InputDtype::Q8).write(&path).unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in [0, 3, 40, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert!(Shard::open(&path).is_err(), "{cut}");
        }
        let other = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        save(&path, Vec::new(), other).unwrap();
        let error = Shard::open(&path).unwrap_err().to_string();
        assert!(error.contains("not a collected sample"), "{error}");
        assert!(Shards::new(Vec::new()).is_err());
    }

    #[test]
    fn impossible_lengths_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = path_of(folder.path(), 0);
        shard(InputDtype::Q8).write(&path).unwrap();
        let whole = fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&whole).unwrap();
        let meta: Meta = serde_json::from_str(&header.metadata().as_ref().unwrap()[META]).unwrap();
        let with = |spans: &[Range<usize>], tokens: usize, head_dim: usize| {
            let meta = Meta {
                spans: spans.to_vec(),
                tokens,
                head_dim,
                ..serde_json::from_value(serde_json::to_value(&meta).unwrap()).unwrap()
            };
            let tensors = SafeTensors::deserialize(&whole).unwrap();
            let tensors = tensors.iter().map(|(name, view)| {
                let data = Bytes {
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    data: view.data().to_vec(),
                };
                (name.to_owned(), data)
            });
            let meta = serde_json::to_string(&meta).unwrap();
            let meta = HashMap::from([(META.to_owned(), meta)]);
            save(&path, tensors.collect(), meta).unwrap();
            Shard::open(&path)
        };
        let first = |shard: &Shard| {
            let rows = shard.layer(0, HeadInput::Qkv, LabelKind::Kvzip);
            rows.map(|rows| rows.inputs(0..3).len())
        };
        assert_eq!(first(&with(&[0..1, 1..3], 3, 4).unwrap()).unwrap(), 24);
        let backwards = Range { start: 2, end: 1 };
        let most = usize::MAX;
        // More rows than tokens; sums that would wrap; a span that goes back; heads of nothing.
        for (spans, tokens, head_dim) in [
            (vec![0..3], 2, 4),
            (vec![0..most, 0..4], most, 4),
            (vec![backwards], 9, 4),
            (vec![0..3], 3, 0),
        ] {
            let found = with(&spans, tokens, head_dim);
            assert!(matches!(found, Err(PolicyError::File { .. })), "{found:?}");
        }
        // Fewer rows than the tensors have, more, and other parts.
        for (spans, head_dim) in [(vec![0..2], 4), (vec![0..4], 4), (vec![0..3], 1 << 63)] {
            let shard = with(&spans, 9, head_dim).unwrap();
            assert!(
                matches!(first(&shard), Err(PolicyError::File { .. })),
                "{spans:?}"
            );
        }
    }
}
