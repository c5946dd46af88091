//! GGUF weights under the names and in the row order of transformers.

use crate::{Gguf, GgufTensor, ModelError, Result, TensorInfo, Weights};
use std::{borrow::Cow, collections::BTreeMap, fmt, ops::Range, path::Path, sync::Arc};

/// Tensors that hold settings, not weights: factors of the rotary frequencies.
const ROPE_TENSORS: [&str; 3] = [
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
];

/// The tensors of a [`Gguf`] file as transformers names and orders them.
///
/// `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`, and so on. Files of the
/// `llama` architecture store the rows of q and k interleaved for another way of rotating; they are
/// put back into halves here, also for packed blocks, since a block never spans two rows.
#[derive(Clone)]
pub struct GgufWeights {
    gguf: Arc<Gguf>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Clone)]
struct Entry {
    /// In the file.
    tensor: GgufTensor,
    info: TensorInfo,
    /// Rows of one head, where they are interleaved.
    interleaved: Option<usize>,
}

impl fmt::Debug for GgufWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GgufWeights")
            .field("gguf", &self.gguf)
            .finish()
    }
}

impl GgufWeights {
    /// Names the tensors of a file.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the file does not say its architecture, or, of a `llama`, the
    /// number of heads; [`ModelError::Format`] if q or k cannot be of that many heads;
    /// [`ModelError::Duplicate`] if two tensors get one name.
    pub fn new(gguf: Arc<Gguf>) -> Result<Self> {
        let arch = gguf
            .get_str("general.architecture")?
            .ok_or_else(|| {
                ModelError::config(gguf.path(), "general.architecture", "a string", "nothing")
            })?
            .to_owned();
        let mut tensors = BTreeMap::new();
        for tensor in gguf.tensors() {
            if ROPE_TENSORS.contains(&tensor.name.as_str()) {
                continue;
            }
            let name = transformers_name(&tensor.name, &arch);
            let entry = Entry {
                info: TensorInfo {
                    shape: tensor.shape.clone(),
                    dtype: tensor.dtype,
                },
                interleaved: interleaved(&gguf, tensor, &name, &arch)?,
                tensor: tensor.clone(),
            };
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(ModelError::Duplicate {
                    path: gguf.path().to_path_buf(),
                    what: "tensor",
                    name,
                });
            }
        }
        Ok(Self { gguf, tensors })
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors
            .get(name)
            .ok_or_else(|| ModelError::MissingTensors {
                path: self.gguf.path().to_path_buf(),
                names: vec![name.to_owned()],
            })
    }
}

impl Weights for GgufWeights {
    fn path(&self) -> &Path {
        self.gguf.path()
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|t| &t.info)
    }

    fn raw_rows(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let entry = self.entry(name)?;
        let bytes = self.gguf.raw_rows(&entry.tensor, rows.clone())?;
        let Some(head) = entry.interleaved else {
            return Ok(Cow::Borrowed(bytes));
        };
        // Units that are permuted: the rows of a matrix, the values of a bias.
        let bias = entry.tensor.shape.len() == 1;
        let all = self.gguf.raw(&entry.tensor)?;
        let units = entry.tensor.shape[0];
        let unit = all.len() / units;
        let wanted = if bias { 0..bytes.len() / unit } else { rows };
        let mut out = Vec::with_capacity(wanted.len() * unit);
        for i in wanted {
            let (first, i) = (i / head * head, i % head);
            let (half, i) = (i / (head / 2), i % (head / 2));
            let from = (first + 2 * i + half) * unit;
            out.extend_from_slice(&all[from..from + unit]);
        }
        Ok(Cow::Owned(out))
    }

    fn release_rows(&self, name: &str, rows: Range<usize>) {
        if let Ok(entry) = self.entry(name) {
            self.gguf.release_rows(&entry.tensor, rows);
        }
    }
}

/// The rows of one head, if the tensor is one whose rows are interleaved.
fn interleaved(gguf: &Gguf, tensor: &GgufTensor, name: &str, arch: &str) -> Result<Option<usize>> {
    if arch != "llama" {
        return Ok(None);
    }
    let key = if name.contains(".self_attn.q_proj.") {
        "llama.attention.head_count"
    } else if name.contains(".self_attn.k_proj.") {
        "llama.attention.head_count_kv"
    } else {
        return Ok(None);
    };
    let heads = match gguf.get_u64(key)? {
        Some(heads) => Some(heads),
        None => gguf.get_u64("llama.attention.head_count")?,
    };
    let rows = tensor.shape[0];
    let fits = heads
        .and_then(|h| usize::try_from(h).ok())
        .filter(|&h| h > 0 && rows.is_multiple_of(h) && (rows / h).is_multiple_of(2));
    let plain = tensor.shape.len() > 1 || tensor.dtype.block() == 1;
    match fits {
        Some(heads) if plain => Ok(Some(rows / heads)),
        _ => Err(ModelError::format(
            gguf.path(),
            format!("tensor {:?}", tensor.name),
            format!("an even number of rows for each head of {key}"),
            format!("{rows} rows, {key} = {heads:?}, {}", tensor.dtype),
        )),
    }
}

/// The name that transformers gives a tensor; the file's own for one that is not known.
fn transformers_name(name: &str, arch: &str) -> String {
    let known = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    known
        .map(str::to_owned)
        .or_else(|| layer_name(name, arch))
        .unwrap_or_else(|| name.to_owned())
}

fn layer_name(name: &str, arch: &str) -> Option<String> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (part, kind) = rest.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    let part = match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_qkv" => "self_attn.qkv_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        // Phi-3 has gate and up in one matrix, for which GGUF has no name of its own.
        "ffn_up" if arch == "phi3" => "mlp.gate_up_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        DType, Value, WeightsExt,
        gguf_file::{self, File},
    };

    fn open(file: &File) -> (tempfile::NamedTempFile, Result<GgufWeights>) {
        let file = file.write();
        let weights = Gguf::open(file.path()).and_then(|g| GgufWeights::new(Arc::new(g)));
        (file, weights)
    }

    fn llama(heads: u32, kv_heads: u32) -> File {
        File::default()
            .meta("general.architecture", Value::String("llama".into()))
            .meta("llama.attention.head_count", Value::U32(heads))
            .meta("llama.attention.head_count_kv", Value::U32(kv_heads))
    }

    /// Rows interleaved as conversion to GGUF does it: `(head, half, i)` to `(head, i, half)`.
    fn interleave(rows: &[f32], cols: usize, heads: usize) -> Vec<f32> {
        let n = rows.len() / cols / heads;
        let mut out = Vec::new();
        for h in 0..heads {
            for i in 0..n / 2 {
                for half in 0..2 {
                    let row = h * n + half * (n / 2) + i;
                    out.extend_from_slice(&rows[row * cols..(row + 1) * cols]);
                }
            }
        }
        out
    }

    fn count(n: usize) -> Vec<f32> {
        (0..n).map(|i| i as f32).collect()
    }

    #[test]
    fn names() {
        for (arch, gguf, transformers) in [
            ("llama", "token_embd.weight", "model.embed_tokens.weight"),
            ("llama", "output.weight", "lm_head.weight"),
            ("llama", "output_norm.weight", "model.norm.weight"),
            (
                "llama",
                "blk.12.attn_q.weight",
                "model.layers.12.self_attn.q_proj.weight",
            ),
            (
                "qwen2",
                "blk.0.attn_k.bias",
                "model.layers.0.self_attn.k_proj.bias",
            ),
            (
                "llama",
                "blk.1.ffn_up.weight",
                "model.layers.1.mlp.up_proj.weight",
            ),
            (
                "phi3",
                "blk.1.ffn_up.weight",
                "model.layers.1.mlp.gate_up_proj.weight",
            ),
            (
                "phi3",
                "blk.1.attn_qkv.weight",
                "model.layers.1.self_attn.qkv_proj.weight",
            ),
            ("llama", "blk.x.attn_q.weight", "blk.x.attn_q.weight"),
            ("llama", "blk.1.attn_rot.weight", "blk.1.attn_rot.weight"),
            ("llama", "blk.1.attn_q.scale", "blk.1.attn_q.scale"),
        ] {
            assert_eq!(transformers_name(gguf, arch), transformers);
        }
    }

    #[test]
    fn q_and_k_rows_are_put_back() {
        let (cols, q, k) = (4, count(3 * 8 * 4), count(8 * 4));
        let bias = count(3 * 8);
        let file = llama(3, 1)
            .f32("blk.0.attn_q.weight", &[24, 4], &interleave(&q, cols, 3))
            .f32("blk.0.attn_k.weight", &[8, 4], &interleave(&k, cols, 1))
            .f32("blk.0.attn_v.weight", &[8, 4], &k)
            .f32("blk.0.attn_q.bias", &[24], &interleave(&bias, 1, 3))
            .f32("rope_freqs.weight", &[4], &[1.0; 4]);
        let (_file, weights) = open(&file);
        let weights = weights.unwrap();
        let name = |part: &str| format!("model.layers.0.self_attn.{part}");
        assert_eq!(weights.names().len(), 4);
        assert_eq!(weights.tensor_f32(&name("q_proj.weight")).unwrap(), q);
        assert_eq!(weights.tensor_f32(&name("k_proj.weight")).unwrap(), k);
        assert_eq!(weights.tensor_f32(&name("v_proj.weight")).unwrap(), k);
        assert_eq!(weights.tensor_f32(&name("q_proj.bias")).unwrap(), bias);
        let part = weights
            .tensor_rows_f32(&name("q_proj.weight"), 5..18)
            .unwrap();
        assert_eq!(part, q[5 * cols..18 * cols]);
        weights.release_rows(&name("q_proj.weight"), 0..24);
        assert_eq!(weights.tensor_f32(&name("q_proj.weight")).unwrap(), q);
        assert!(weights.raw_rows(&name("q_proj.weight"), 5..25).is_err());
    }

    #[test]
    fn packed_rows_are_put_back_too() {
        // Rows of one Q8_0 block each, told apart by their scales.
        let row = |i: usize| {
            let mut block = half::f16::from_f32(i as f32).to_le_bytes().to_vec();
            block.extend([1; 32]);
            block
        };
        let order = interleave(&count(8), 1, 2);
        let bytes = order.iter().flat_map(|&i| row(i as usize)).collect();
        let file = llama(2, 2).tensor("blk.0.attn_k.weight", &[8, 32], DType::Q8_0, bytes);
        let (_file, weights) = open(&file);
        let weights = weights.unwrap();
        let raw = weights
            .raw_rows("model.layers.0.self_attn.k_proj.weight", 0..8)
            .unwrap();
        let expected: Vec<u8> = (0..8).flat_map(row).collect();
        assert_eq!(*raw, expected);
    }

    #[test]
    fn other_architectures_keep_their_rows() {
        let file = File::default()
            .meta("general.architecture", Value::String("qwen2".into()))
            .f32("blk.0.attn_q.weight", &[4, 1], &count(4));
        let (_file, weights) = open(&file);
        let weights = weights.unwrap();
        assert_eq!(
            weights
                .tensor_f32("model.layers.0.self_attn.q_proj.weight")
                .unwrap(),
            count(4)
        );
    }

    #[test]
    fn hostile_head_counts_and_names() {
        for (heads, rows) in [(0, 8), (3, 8), (8, 8), (u32::MAX, 8)] {
            let file =
                llama(heads, 1).f32("blk.0.attn_q.weight", &[rows, 1], &count(rows as usize));
            assert!(
                matches!(open(&file).1, Err(ModelError::Format { .. })),
                "{heads} heads, {rows} rows"
            );
        }
        let file = File::default()
            .meta("general.architecture", Value::String("llama".into()))
            .f32("blk.0.attn_q.weight", &[4, 1], &count(4));
        assert!(matches!(open(&file).1, Err(ModelError::Format { .. })));
        assert!(matches!(
            open(&File::default()).1,
            Err(ModelError::Config { .. })
        ));
        let file = llama(1, 1)
            .f32("blk.0.attn_v.weight", &[4, 1], &count(4))
            .f32("blk.00.attn_v.weight", &[4, 1], &count(4));
        assert!(matches!(open(&file).1, Err(ModelError::Duplicate { .. })));
        let bytes = vec![0; 34];
        let mut file = llama(1, 1);
        file.tensors.push((
            "blk.0.attn_q.bias".into(),
            vec![32],
            gguf_file::tag(DType::Q8_0),
            bytes,
        ));
        assert!(matches!(open(&file).1, Err(ModelError::Format { .. })));
    }
}
