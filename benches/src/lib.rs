//! What the benches share: random numbers, and a model of SmolLM2-135M's shape with random weights.
#![deny(missing_docs)]

use burn::tensor::Device;
use locret_core::{ModelSpec, RopeConfig, compute};
use locret_models::{
    DType, Decoder, DecoderConfig, Layout, Loader, ModelError, Result, TensorInfo, WeightDtype,
    Weights,
};
use std::{borrow::Cow, collections::BTreeMap, ops::Range, path::Path};

/// `n` numbers, uniform in `[-scale, scale)`; the same seed gives the same numbers.
pub fn numbers(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    // The multiplier and increment are those of Knuth's MMIX generator.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
    };
    (0..n).map(|_| next()).collect()
}

/// Token ids below `vocab`.
pub fn ids(n: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let to_id = |x: f32| (((x + 1.0) / 2.0 * vocab as f32) as u32).min(vocab as u32 - 1);
    numbers(n, seed, 1.0).into_iter().map(to_id).collect()
}

/// SmolLM2-135M: 30 layers, 9 query and 3 KV heads of 64 features, a tied head.
pub fn smollm2() -> DecoderConfig {
    DecoderConfig {
        spec: ModelSpec::new(30, 9, 3, 576, 49_152)
            .with_head_dim(64)
            .with_rope(RopeConfig::plain(100_000.0, 64))
            .with_softmax_scale(0.125)
            .with_max_positions(Some(8192)),
        intermediate: 1536,
        norm_epsilon: 1e-5,
        tied: true,
        layout: Layout::Separate,
    }
}

/// A decoder with random 32-bit weights.
///
/// # Errors
/// As [`Decoder::load`].
pub fn random_model(config: &DecoderConfig, device: &Device) -> Result<Decoder> {
    let weights = RandomWeights::new(config);
    let loader = Loader::new(&weights, WeightDtype::F32, &compute(device));
    let model = Decoder::load(config, &loader)?;
    loader.finish()?;
    Ok(model)
}

/// Weights that are made when they are read: gains of 1, matrices of `1 / √columns`.
#[derive(Debug)]
struct RandomWeights(BTreeMap<String, TensorInfo>);

impl RandomWeights {
    fn new(config: &DecoderConfig) -> Self {
        let spec = &config.spec;
        let (hidden, inner) = (spec.hidden, config.intermediate);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let mut all = BTreeMap::new();
        let mut add = |name: String, shape: &[usize]| {
            let info = TensorInfo {
                shape: shape.to_vec(),
                dtype: DType::F32,
            };
            all.insert(format!("{name}.weight"), info);
        };
        add("model.embed_tokens".into(), &[spec.vocab, hidden]);
        add("model.norm".into(), &[hidden]);
        if !config.tied {
            add("lm_head".into(), &[spec.vocab, hidden]);
        }
        for layer in 0..spec.layers {
            let at = |name: &str| format!("model.layers.{layer}.{name}");
            add(at("input_layernorm"), &[hidden]);
            add(at("post_attention_layernorm"), &[hidden]);
            add(at("self_attn.o_proj"), &[hidden, q]);
            add(at("mlp.down_proj"), &[hidden, inner]);
            match config.layout {
                Layout::Separate => {
                    add(at("self_attn.q_proj"), &[q, hidden]);
                    add(at("self_attn.k_proj"), &[kv, hidden]);
                    add(at("self_attn.v_proj"), &[kv, hidden]);
                    add(at("mlp.gate_proj"), &[inner, hidden]);
                    add(at("mlp.up_proj"), &[inner, hidden]);
                }
                Layout::Fused => {
                    add(at("self_attn.qkv_proj"), &[q + 2 * kv, hidden]);
                    add(at("mlp.gate_up_proj"), &[2 * inner, hidden]);
                }
            }
        }
        Self(all)
    }
}

impl Weights for RandomWeights {
    fn path(&self) -> &Path {
        Path::new("random weights")
    }

    fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.get(name)
    }

    fn raw_rows(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let info = self.info(name).ok_or_else(|| ModelError::MissingTensors {
            path: self.path().to_path_buf(),
            names: vec![name.to_owned()],
        })?;
        let n = rows.len() * info.cols();
        let values = match info.shape.len() {
            1 => vec![1.0; n],
            _ => {
                let seed = name.bytes().fold(rows.start as u64, |seed, byte| {
                    seed.wrapping_mul(31).wrapping_add(u64::from(byte))
                });
                numbers(n, seed, (3.0 / info.cols() as f32).sqrt())
            }
        };
        Ok(Cow::Owned(
            values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        ))
    }
}
