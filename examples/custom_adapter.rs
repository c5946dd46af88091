//! A model that no crate here knows: Qwen2, which is Llama with biases on q, k and v.
//!
//! ```text
//! cargo run --release --example custom_adapter [FOLDER]
//! ```
//! FOLDER has `config.json` and safetensors; by default a small random model. The adapter goes
//! through the public conformance suite, and where FOLDER has a `golden.json`, its logits are
//! compared with those of transformers. `docs/writing-an-adapter.md` explains it step by step.

use burn::tensor::{Device, Tensor, activation::silu};
use locret_core::{
    CausalLm, Error, ModelSpec, Qkv, SequenceCache,
    conformance::{AdapterCheck, check_adapter},
    ids_tensor,
};
use locret_examples::golden::{Distance, GoldenLogits};
use locret_models::{Family, Loader, ModelConfig, ModelError, SafetensorsDir, WeightDtype};
use std::{path::Path, sync::Arc};

type Failure = Box<dyn std::error::Error>;

/// `x · wᵀ + b`; the weight is `[in, out]`.
#[derive(Debug)]
struct Linear(Tensor<2>, Option<Tensor<1>>);

impl Linear {
    fn load(
        loader: &Loader<'_>,
        name: &str,
        [inputs, outputs]: [usize; 2],
        bias: bool,
    ) -> Result<Self, ModelError> {
        let weight = loader.load(&format!("{name}.weight"), [outputs, inputs])?;
        let bias = bias.then(|| loader.load(&format!("{name}.bias"), [outputs]));
        Ok(Self(weight.transpose(), bias.transpose()?))
    }

    fn of(&self, x: Tensor<2>) -> Tensor<2> {
        let y = x.matmul(self.0.clone());
        match &self.1 {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor<1>,
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
    mlp_norm: Tensor<1>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Qwen2.
#[derive(Debug)]
pub struct Qwen2 {
    spec: ModelSpec,
    device: Device,
    epsilon: f64,
    embedding: Tensor<2>,
    layers: Vec<Layer>,
    norm: Tensor<1>,
    head: Linear,
}

impl Qwen2 {
    pub fn load(folder: &Path, device: &Device) -> Result<Self, Failure> {
        let config = ModelConfig::from_dir(folder)?;
        if config.family != Family::Other("qwen2".into()) || config.binding_window().is_some() {
            return Err("expected a Qwen2 without a sliding window".into());
        }
        let weights = SafetensorsDir::open(folder)?;
        let loader = Loader::new(&weights, WeightDtype::F32, device);
        let (hidden, inner) = (config.hidden, config.intermediate);
        let (q, kv) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let layer = |index: usize| -> Result<Layer, ModelError> {
            let at = |name: &str| format!("model.layers.{index}.{name}");
            let norm = |name: &str| loader.load(&at(name), [hidden]);
            let attention = |name: &str, shape, bias| {
                Linear::load(&loader, &at(&format!("self_attn.{name}_proj")), shape, bias)
            };
            let mlp = |name: &str, shape| {
                Linear::load(&loader, &at(&format!("mlp.{name}_proj")), shape, false)
            };
            Ok(Layer {
                attention_norm: norm("input_layernorm.weight")?,
                q: attention("q", [hidden, q], true)?,
                k: attention("k", [hidden, kv], true)?,
                v: attention("v", [hidden, kv], true)?,
                output: attention("o", [q, hidden], false)?,
                mlp_norm: norm("post_attention_layernorm.weight")?,
                gate: mlp("gate", [hidden, inner])?,
                up: mlp("up", [hidden, inner])?,
                down: mlp("down", [inner, hidden])?,
            })
        };
        let embedding: Tensor<2> =
            loader.load("model.embed_tokens.weight", [config.vocab, hidden])?;
        let model = Self {
            layers: (0..config.layers).map(layer).collect::<Result<_, _>>()?,
            norm: loader.load("model.norm.weight", [hidden])?,
            head: match config.tied_embeddings {
                true => Linear(embedding.clone().transpose(), None),
                false => Linear::load(&loader, "lm_head", [hidden, config.vocab], false)?,
            },
            embedding,
            spec: config.spec(),
            device: device.clone(),
            epsilon: config.rms_norm_eps,
        };
        // A tensor that nothing asked for means that this is another model.
        loader.finish()?;
        Ok(model)
    }

    fn normalised(&self, x: Tensor<2>, gain: &Tensor<1>) -> Tensor<2> {
        let mean = x.clone().powi_scalar(2).mean_dim(1);
        x / mean.add_scalar(self.epsilon).sqrt() * gain.clone().unsqueeze()
    }
}

impl CausalLm for Qwen2 {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn hidden(&self, ids: &[u32], cache: &mut SequenceCache) -> Result<Tensor<2>, Error> {
        let mut x = self
            .embedding
            .clone()
            .select(0, ids_tensor(ids, &self.device));
        for (index, layer) in self.layers.iter().enumerate() {
            let inner = self.normalised(x.clone(), &layer.attention_norm);
            let (q, k) = (layer.q.of(inner.clone()), layer.k.of(inner.clone()));
            let v = layer.v.of(inner);
            x = x + layer.output.of(cache.attend(index, Qkv { q, k, v })?);
            let inner = self.normalised(x.clone(), &layer.mlp_norm);
            let gated = silu(layer.gate.of(inner.clone())) * layer.up.of(inner);
            x = x + layer.down.of(gated);
        }
        Ok(self.normalised(x, &self.norm))
    }

    fn logits(&self, hidden: Tensor<2>) -> Result<Tensor<2>, Error> {
        Ok(self.head.of(hidden))
    }
}

/// Runs the conformance suite, and compares with `golden.json` if there is one.
pub fn check(folder: &Path, device: &Device) -> Result<Option<Distance>, Failure> {
    let model = Arc::new(Qwen2::load(folder, device)?);
    let vocab = model.spec().vocab as u32;
    let ids: Vec<u32> = (0..24).map(|i| (i * 37 + 11) % vocab).collect();
    check_adapter(model.clone(), &ids, &AdapterCheck::default())?;
    println!("conformance suite: passed with {} tokens", ids.len());
    let golden = folder.join("golden.json");
    if !golden.exists() {
        return Ok(None);
    }
    let distance = GoldenLogits::read(&golden)?.compare(&*model)?;
    println!(
        "transformers' logits: {} compared, the largest difference is {:.1e}",
        distance.logits, distance.largest
    );
    match distance.largest <= 1e-4 {
        true => Ok(Some(distance)),
        false => Err("a logit is off by more than 1e-4".into()),
    }
}

fn main() -> Result<(), Failure> {
    let tiny = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../locret-models/tests/golden/qwen2"
    );
    let folder = std::env::args().nth(1).unwrap_or(tiny.into());
    check(Path::new(&folder), &Device::default()).map(drop)
}
