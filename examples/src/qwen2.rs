//! Qwen2, which is Llama with biases on q, k and v: the adapter of the example `custom_adapter`,
//! written outside the crates. `docs/writing-an-adapter.md` explains it step by step.

use crate::{Error, Result};
use burn::tensor::{Device, Tensor};
use locret_core::{
    CausalLm, Compute, Error as CoreError, Matrix, ModelSpec, Pass, Qkv, Rows, compute,
};
use locret_models::{Family, Loader, ModelConfig, ModelError, SafetensorsDir, WeightDtype};
use std::{path::Path, sync::Arc};

#[derive(Debug)]
struct Layer {
    attention_norm: Rows,
    /// Queries, keys and values, and what is added to each of them.
    qkv: Arc<dyn Matrix>,
    biases: [Tensor<1>; 3],
    output: Arc<dyn Matrix>,
    mlp_norm: Rows,
    gate_up: Arc<dyn Matrix>,
    down: Arc<dyn Matrix>,
}

/// Qwen2.
#[derive(Debug)]
pub struct Qwen2 {
    spec: ModelSpec,
    compute: Arc<dyn Compute>,
    epsilon: f32,
    embedding: Arc<dyn Matrix>,
    layers: Vec<Layer>,
    norm: Rows,
    head: Arc<dyn Matrix>,
}

impl Qwen2 {
    /// From a folder with `config.json` and safetensors.
    ///
    /// # Errors
    /// [`Error::Model`]; [`Error::Usage`] for another family.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let config = ModelConfig::from_dir(folder)?;
        if config.family != Family::Qwen2 || config.binding_window().is_some() {
            return Err(Error::Usage(
                "expected a Qwen2 without a sliding window".into(),
            ));
        }
        let (weights, compute) = (SafetensorsDir::open(folder)?, compute(device));
        let loader = Loader::new(&weights, WeightDtype::F32, &compute);
        let (spec, hidden, inner) = (config.spec(), config.hidden, config.intermediate);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let layer = |index: usize| -> Result<Layer, ModelError> {
            let at = |name: &str| format!("model.layers.{index}.{name}");
            let weight = |name: &str, rows: usize| (at(&format!("{name}_proj.weight")), rows);
            let bias =
                |name: &str, n| loader.load(&at(&format!("self_attn.{name}_proj.bias")), [n]);
            let qkv = [("q", q), ("k", kv), ("v", kv)];
            let gate_up = ["mlp.gate", "mlp.up"].map(|name| weight(name, inner));
            Ok(Layer {
                attention_norm: loader.row(&at("input_layernorm.weight"), hidden)?,
                qkv: loader.matrix(
                    &qkv.map(|(name, n)| weight(&format!("self_attn.{name}"), n)),
                    hidden,
                )?,
                biases: [bias("q", q)?, bias("k", kv)?, bias("v", kv)?],
                output: loader.matrix(&[weight("self_attn.o", hidden)], q)?,
                mlp_norm: loader.row(&at("post_attention_layernorm.weight"), hidden)?,
                gate_up: loader.matrix(&gate_up, hidden)?,
                down: loader.matrix(&[weight("mlp.down", hidden)], inner)?,
            })
        };
        let table = |name: &str| loader.matrix(&[(name.to_owned(), spec.vocab)], hidden);
        let embedding = table("model.embed_tokens.weight")?;
        let model = Self {
            layers: (0..spec.layers).map(layer).collect::<Result<_, _>>()?,
            norm: loader.row("model.norm.weight", hidden)?,
            head: match config.tied_embeddings {
                true => embedding.clone(),
                false => table("lm_head.weight")?,
            },
            embedding,
            epsilon: config.rms_norm_eps as f32,
            compute: compute.clone(),
            spec,
        };
        // A tensor that nothing asked for means that this is another model.
        loader.finish()?;
        Ok(model)
    }
}

impl CausalLm for Qwen2 {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn compute(&self) -> &Arc<dyn Compute> {
        &self.compute
    }

    fn hidden(&self, ids: &[u32], pass: &mut Pass<'_>) -> Result<Rows, CoreError> {
        let (compute, epsilon) = (&self.compute, self.epsilon);
        let norms = self.layers.iter().map(|layer| &layer.attention_norm);
        let mut norms = norms.chain([&self.norm]);
        let mut norm = || norms.next().unwrap_or(&self.norm);
        let mut x = self.embedding.rows(ids)?;
        let mut inner = compute.norm(&x, norm(), epsilon)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let widths = layer.biases.each_ref().map(|bias| bias.dims()[0]);
            let parts = layer.qkv.apply_parts(&inner, &widths)?.into_iter();
            let biased = parts.zip(&layer.biases);
            let mut biased = biased.map(|(x, bias)| x.into_tensor() + bias.clone().unsqueeze());
            let [q, k, v] = [(); 3].map(|()| biased.next().expect("as many parts as biases"));
            let attended = pass.attend(index, Qkv::new(q, k, v))?;
            let y = layer.output.apply(&attended)?;
            inner = compute.add_norm(&mut x, &y, &layer.mlp_norm, epsilon)?;
            let gated = compute.gate(&layer.gate_up.apply(&inner)?)?;
            inner = compute.add_norm(&mut x, &layer.down.apply(&gated)?, norm(), epsilon)?;
        }
        Ok(inner)
    }

    fn logits(&self, hidden: Rows) -> Result<Rows, CoreError> {
        self.head.apply(&hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_family_is_refused() {
        let llama = Path::new(env!("CARGO_MANIFEST_DIR"));
        let llama = llama.join("../locret-models/tests/golden/llama31");
        let error = Qwen2::load(&llama, &Device::flex()).unwrap_err();
        assert!(error.to_string().contains("Qwen2"), "{error}");
    }

    #[test]
    fn the_adapter_is_short() {
        let lines = include_str!("qwen2.rs").lines().count();
        assert!(lines < 150, "{lines} lines");
    }
}
