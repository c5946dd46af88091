//! Models of published dimensions whose weights are drawn by lot: for time and memory at sizes
//! whose weights are not at hand.

use crate::Result;
use burn::tensor::Device;
use locret_core::{CausalLm, Compute};
use locret_models::{
    DType, Decoder, DecoderConfig, Layout, LoadOptions, Loader, TensorInfo, WeightDtype, Weights,
};
use locret_policies::{HeadWeights, LayerHead, RetainingHeads};
use std::{borrow::Cow, collections::BTreeMap, ops::Range, path::Path, sync::Arc};

/// The standard deviation that the published models were initialised with.
const DEVIATION: f32 = 0.02;

/// Weights that are made when they are read: `bf16`, uniform around 0, the gains of norms 1.
#[derive(Debug)]
pub struct RandomWeights {
    tensors: BTreeMap<String, TensorInfo>,
    seed: u64,
    /// Of queries and keys, in the first half of a head's features.
    mean: f32,
    head_dim: usize,
}

impl RandomWeights {
    /// Weights for a model of these dimensions.
    pub fn new(config: &DecoderConfig, seed: u64) -> Self {
        let spec = &config.spec;
        let (hidden, inner) = (spec.hidden, config.intermediate);
        let output = spec.heads * spec.head_dim;
        let kv = spec.kv_heads * spec.head_dim;
        let mut tensors = BTreeMap::new();
        let mut add = |name: String, shape: &[usize]| {
            let info = TensorInfo {
                shape: shape.to_vec(),
                dtype: DType::BF16,
            };
            tensors.insert(name, info);
        };
        add("model.embed_tokens.weight".into(), &[spec.vocab, hidden]);
        add("model.norm.weight".into(), &[hidden]);
        if !config.tied {
            add("lm_head.weight".into(), &[spec.vocab, hidden]);
        }
        for layer in 0..spec.layers {
            let mut own = |name: &str, shape: &[usize]| {
                add(format!("model.layers.{layer}.{name}.weight"), shape);
            };
            own("input_layernorm", &[hidden]);
            own("post_attention_layernorm", &[hidden]);
            own("self_attn.o_proj", &[hidden, output]);
            own("mlp.down_proj", &[hidden, inner]);
            match config.layout {
                Layout::Separate => {
                    own("self_attn.q_proj", &[output, hidden]);
                    own("self_attn.k_proj", &[kv, hidden]);
                    own("self_attn.v_proj", &[kv, hidden]);
                    own("mlp.gate_proj", &[inner, hidden]);
                    own("mlp.up_proj", &[inner, hidden]);
                }
                Layout::Fused => {
                    own("self_attn.qkv_proj", &[output + 2 * kv, hidden]);
                    own("mlp.gate_up_proj", &[2 * inner, hidden]);
                }
            }
        }
        Self {
            tensors,
            seed,
            mean: 0.0,
            head_dim: spec.head_dim,
        }
    }

    /// The same with queries and keys of this mean in the first half of a head's features, which makes attention
    /// fall with distance, as it does in trained models (0: as without); and a quarter of the deviation in what
    /// makes them. Separate projections only.
    #[must_use]
    pub fn near(mut self, config: &DecoderConfig, mean: f32) -> Self {
        if mean != 0.0 && config.layout == Layout::Separate {
            for name in self.tensors.keys().cloned().collect::<Vec<_>>() {
                let projects = |name: &&str| looks(name) || name.contains("v_proj");
                let Some(own) = name.strip_suffix(".weight").filter(projects) else {
                    continue;
                };
                let info = TensorInfo {
                    shape: vec![self.tensors[&name].shape[0]],
                    dtype: DType::BF16,
                };
                self.tensors.insert(format!("{own}.bias"), info);
            }
            self.mean = mean;
        }
        self
    }
}

/// Whether these are the weights of queries or keys.
fn looks(name: &str) -> bool {
    name.contains("q_proj") || name.contains("k_proj")
}

/// `bf16`, rounded towards zero: the upper half of single precision.
fn bf16(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values
        .flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes())
        .collect()
}

impl Weights for RandomWeights {
    fn path(&self) -> &Path {
        Path::new("random weights")
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    fn raw_rows(&self, name: &str, rows: Range<usize>) -> locret_models::Result<Cow<'_, [u8]>> {
        let info = self.tensors.get(name).filter(|i| rows.end <= i.rows());
        let info = info.ok_or_else(|| locret_models::ModelError::MissingTensors {
            path: self.path().to_path_buf(),
            names: vec![name.to_owned()],
        })?;
        if name.ends_with(".bias") {
            let half = |feature: usize| feature % self.head_dim < self.head_dim / 2;
            let mean = if looks(name) { self.mean } else { 0.0 };
            let value = |feature| if half(feature) { mean } else { 0.0 };
            return Ok(bf16((0..info.cols()).map(value)).into());
        }
        if info.shape.len() == 1 {
            return Ok([0x80, 0x3f].repeat(info.cols()).into());
        }
        let seed = name.bytes().fold(self.seed, |s, b| mix(s ^ u64::from(b)));
        let range = rows.start * info.cols()..rows.end * info.cols();
        let deviation = match self.mean != 0.0 && looks(name) {
            true => DEVIATION / 4.0,
            false => DEVIATION,
        };
        Ok(bf16(range.map(|i| deviation * centred(seed, i))).into())
    }
}

/// Bytes of weights in the type that they are held in on the CPU.
pub fn resident_bytes(weights: &dyn Weights, dtype: WeightDtype) -> usize {
    let infos = weights.names().into_iter().filter_map(|n| weights.info(n));
    infos
        .map(|info| {
            let (values, stored) = (info.rows() * info.cols(), info.dtype);
            let held = match (dtype, stored) {
                // These stay as they are in the file.
                (
                    WeightDtype::File,
                    DType::Q8_0
                    | DType::Q4_0
                    | DType::Q4_1
                    | DType::Q4_K
                    | DType::Q5_K
                    | DType::Q6_K,
                ) => stored,
                _ => dtype.resident(stored),
            };
            values / held.block() * held.block_bytes()
        })
        .sum()
}

/// A model with [`RandomWeights`] (or others of its dimensions).
///
/// # Errors
/// [`Error::Model`](crate::Error::Model) for impossible dimensions.
pub fn decoder(
    config: &DecoderConfig,
    weights: &dyn Weights,
    options: &LoadOptions,
    device: &Device,
) -> Result<Decoder> {
    let compute = options.kernels.with(device, options.activations);
    decoder_with(config, weights, options, &compute)
}

/// As [`decoder`], computed by `compute`.
///
/// # Errors
/// As [`decoder`]; those of a map of another number of layers.
pub fn decoder_with(
    config: &DecoderConfig,
    weights: &dyn Weights,
    options: &LoadOptions,
    compute: &Arc<dyn Compute>,
) -> Result<Decoder> {
    let loader = Loader::new(weights, options.weights, compute);
    let decoder = Decoder::load(config, &loader)?;
    loader.finish()?;
    Ok(decoder)
}

/// Locret's heads of width `d_r` with random weights for `model`.
///
/// # Errors
/// [`Error::Policy`](crate::Error::Policy) for a width of 0.
pub fn heads(model: &dyn CausalLm, d_r: usize, seed: u64) -> Result<RetainingHeads> {
    let spec = model.spec();
    let inputs = spec.layer(0).qkv_features();
    let list = |layer: usize, part: u64, n: usize, width: usize| -> Vec<f32> {
        let seed = mix(seed ^ mix(2 * layer as u64 + part));
        let scale = (width as f32).sqrt().recip();
        (0..n).map(|i| scale * centred(seed, i)).collect()
    };
    let layer = |l| LayerHead {
        d_r,
        fc1: list(l, 0, d_r * inputs, inputs),
        fc2: list(l, 1, spec.kv_heads * d_r, d_r),
        ..LayerHead::default()
    };
    let weights = HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: BTreeMap::new(),
        ..HeadWeights::default()
    };
    Ok(RetainingHeads::for_model(&weights, model)?)
}

/// Tokens of a text that never repeats itself.
pub fn tokens(n: usize, vocab: usize, seed: u64) -> Vec<u32> {
    (0..n)
        .map(|i| (mix(seed ^ mix(i as u64)) % vocab.max(1) as u64) as u32)
        .collect()
}

/// A number by lot, uniform, of mean 0 and deviation 1.
fn centred(seed: u64, i: usize) -> f32 {
    let uniform = (mix(seed.wrapping_add(i as u64)) >> 40) as f32 / (1u64 << 24) as f32;
    (uniform - 0.5) * 12f32.sqrt()
}

/// A bijection of 64 bits in which every input bit changes about half of the output's.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use locret_core::{ModelSpec, RopeConfig, RopeScaling};
    use locret_models::WeightsExt;

    /// A model of two layers.
    pub fn config(hidden: usize, vocab: usize) -> DecoderConfig {
        let spec = ModelSpec::new(2, 4, 2, hidden, vocab)
            .with_head_dim(8)
            .with_rope(RopeConfig {
                theta: 10_000.0,
                rotary_dim: 8,
                scaling: RopeScaling::None,
            })
            .with_softmax_scale(8f32.sqrt().recip());
        DecoderConfig {
            spec,
            intermediate: 64,
            norm_epsilon: 1e-5,
            tied: false,
            layout: Layout::Separate,
        }
    }

    #[test]
    fn numbers_are_drawn_alike_however_they_are_read() {
        let config = config(512, 2000);
        let weights = RandomWeights::new(&config, 7);
        let name = "model.embed_tokens.weight";
        let view: &dyn Weights = &weights;
        let all = view.tensor_f32(name).unwrap();
        let part = view.tensor_rows_f32(name, 100..102).unwrap();
        assert_eq!(part, all[100 * 512..102 * 512]);
        let n = all.len() as f32;
        let mean = all.iter().sum::<f32>() / n;
        let deviation = (all.iter().map(|x| x * x).sum::<f32>() / n).sqrt();
        assert!(mean.abs() < 2e-4, "{mean}");
        assert!((deviation / DEVIATION - 1.0).abs() < 0.02, "{deviation}");
        assert_eq!(view.tensor_f32("model.norm.weight").unwrap(), [1.0; 512]);
        assert!(weights.raw_rows("lm_head", 0..1).is_err());
        assert!(weights.raw_rows(name, 0..2001).is_err());
        let ids = tokens(5000, 2000, 3);
        assert!(ids.iter().all(|id| *id < 2000));
        assert_ne!(ids[..100], tokens(5000, 2000, 4)[..100]);
    }
}
