//! The decoder that Llama and Phi-3 share: RMS norm, attention, RMS norm, SwiGLU.
//!
//! Two implementations of the same arithmetic stand side by side: the CPU kernels of `locret-core`
//! on host memory, and Burn operations for every other device. They are tested against each other.

use crate::{
    Loader, Result,
    linear::{Embedding, Linear},
};
use burn::tensor::{Device, Tensor, activation::silu};
use locret_core::{
    CausalLm, Error as CoreError, Kernels, ModelSpec, Qkv, SequenceCache, from_f32, into_f32,
    is_host_device,
    kernels::{awake::awake, elementwise},
};

/// A decoder-only model of the Llama family.
#[derive(Debug)]
pub struct Decoder {
    pub(crate) spec: ModelSpec,
    pub(crate) device: Device,
    /// Whether the CPU kernels compute.
    pub(crate) host: bool,
    pub(crate) embedding: Embedding,
    pub(crate) layers: Vec<DecoderLayer>,
    pub(crate) norm: Norm,
    /// Features between the two projections of the MLP.
    pub(crate) intermediate: usize,
    /// `None`: the embedding is the head, too.
    pub(crate) head: Option<Linear>,
}

/// How a checkpoint names and groups a layer's projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `q_proj`, `k_proj`, `v_proj`, `gate_proj`, `up_proj`, as Llama has them.
    Separate,
    /// `qkv_proj` and `gate_up_proj`, as Phi-3 has them.
    Fused,
}

/// What a decoder needs to know beside the [`ModelSpec`].
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Dimensions and rotary embedding.
    pub spec: ModelSpec,
    /// Features between the two projections of the MLP.
    pub intermediate: usize,
    /// Added to the mean square before the root.
    pub norm_epsilon: f32,
    /// Whether the embedding is the head, too.
    pub tied: bool,
    /// How the checkpoint groups projections.
    pub layout: Layout,
}

impl Decoder {
    /// Loads a decoder's weights onto the loader's device.
    ///
    /// # Errors
    /// Missing tensors, wrong shapes, values that are not finite; an impossible
    /// [`ModelSpec`].
    pub fn load(config: &DecoderConfig, loader: &Loader<'_>, kernels: Kernels) -> Result<Self> {
        let spec = &config.spec;
        spec.validate()?;
        let host = kernels == Kernels::Auto && is_host_device(loader.device());
        let (hidden, inner) = (spec.hidden, config.intermediate);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let norm = |name: &str| -> Result<Norm> {
            let gain = loader.values(name, &[hidden])?;
            Ok(Norm::new(gain, config.norm_epsilon, loader.device()))
        };
        let embedding = Embedding::load(
            loader,
            "model.embed_tokens.weight",
            [spec.vocab, hidden],
            config.tied,
            host,
        )?;
        let layers = (0..spec.layers)
            .map(|index| {
                let own = |name: &str| format!("model.layers.{index}.{name}.weight");
                let attn = |name: &str| own(&format!("self_attn.{name}"));
                let mlp = |name: &str| own(&format!("mlp.{name}"));
                let (qkv, gate_up) = match config.layout {
                    Layout::Separate => (
                        vec![
                            (attn("q_proj"), q),
                            (attn("k_proj"), kv),
                            (attn("v_proj"), kv),
                        ],
                        vec![(mlp("gate_proj"), inner), (mlp("up_proj"), inner)],
                    ),
                    Layout::Fused => (
                        vec![(attn("qkv_proj"), q + 2 * kv)],
                        vec![(mlp("gate_up_proj"), 2 * inner)],
                    ),
                };
                // Some published Llama checkpoints still carry the frequencies.
                loader.skip(&format!(
                    "model.layers.{index}.self_attn.rotary_emb.inv_freq"
                ));
                Ok(DecoderLayer {
                    attention_norm: norm(&own("input_layernorm"))?,
                    qkv: Linear::load(loader, &qkv, hidden, host)?,
                    output: Linear::load(loader, &[(attn("o_proj"), hidden)], q, host)?,
                    mlp_norm: norm(&own("post_attention_layernorm"))?,
                    gate_up: Linear::load(loader, &gate_up, hidden, host)?,
                    down: Linear::load(loader, &[(mlp("down_proj"), hidden)], inner, host)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let head = "lm_head.weight";
        let head = if config.tied {
            // A tied head may be stored all the same; it is the same tensor.
            loader.skip(head);
            None
        } else {
            Some(Linear::load(
                loader,
                &[(head.to_owned(), spec.vocab)],
                hidden,
                host,
            )?)
        };
        Ok(Self {
            norm: norm("model.norm.weight")?,
            intermediate: inner,
            spec: spec.clone(),
            host,
            device: loader.device().clone(),
            embedding,
            layers,
            head,
        })
    }
}

/// One layer's weights. Projections that read the same input are one matrix.
#[derive(Debug)]
pub(crate) struct DecoderLayer {
    pub(crate) attention_norm: Norm,
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`: queries, keys, values.
    pub(crate) qkv: Linear,
    /// `[hidden, heads * head_dim]`
    pub(crate) output: Linear,
    pub(crate) mlp_norm: Norm,
    /// `[2 * intermediate, hidden]`: gate, up.
    pub(crate) gate_up: Linear,
    /// `[hidden, intermediate]`
    pub(crate) down: Linear,
}

/// Root-mean-square normalisation (arXiv 1910.07467).
#[derive(Debug)]
pub(crate) struct Norm {
    /// `[hidden]`, on the device.
    pub(crate) gain: Tensor<1>,
    /// The same in host memory, for the CPU kernels.
    pub(crate) host_gain: Vec<f32>,
    pub(crate) epsilon: f32,
}

impl Norm {
    pub(crate) fn new(gain: Vec<f32>, epsilon: f32, device: &Device) -> Self {
        let features = gain.len();
        Self {
            gain: from_f32(gain.clone(), [features], device),
            host_gain: gain,
            epsilon,
        }
    }

    fn tensor(&self, x: Tensor<2>) -> Tensor<2> {
        let mean = x.clone().powi_scalar(2).mean_dim(1);
        let scaled = x / (mean.add_scalar(self.epsilon)).sqrt();
        scaled * self.gain.clone().unsqueeze()
    }

    /// Norm of `x`, in host memory.
    fn host(&self, x: &[f32], out: &mut [f32]) {
        elementwise::rms_norm(x, &self.host_gain, self.epsilon, out);
    }

    /// `x += y`, and the norm of the sum, in host memory.
    fn host_sum(&self, x: &mut [f32], y: &[f32], out: &mut [f32]) {
        elementwise::add_rms_norm(x, y, &self.host_gain, self.epsilon, out);
    }
}

impl Decoder {
    fn hidden_host(&self, ids: &[u32], cache: &mut SequenceCache) -> Result<Tensor<2>> {
        let (t, spec) = (ids.len(), &self.spec);
        let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let mut x = self.embedding.host_rows(ids)?;
        // Memory that all layers write to, one after the other: what is asked of the system anew
        // has to be cleared page by page, on one thread.
        let (mut normed, mut projected) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        let mut gate_up = vec![0.0; 2 * t * self.intermediate];
        let mut inner = vec![0.0; t * self.intermediate];
        let mut q = vec![0.0; t * q_width];
        let norms = self.layers.iter().skip(1).map(|next| &next.attention_norm);
        let norms = norms.chain([&self.norm]);
        if let Some(first) = self.layers.first() {
            first.attention_norm.host(&x, &mut normed);
        } else {
            self.norm.host(&x, &mut normed);
        }
        for ((index, layer), next_norm) in self.layers.iter().enumerate().zip(norms) {
            let (mut k, mut v) = (vec![0.0; t * kv_width], vec![0.0; t * kv_width]);
            layer.qkv.host(&normed, t, &mut [&mut q, &mut k, &mut v])?;
            let attended = cache.attend_from(
                index,
                &normed[..],
                Qkv {
                    q: from_f32(q, [t, q_width], &self.device),
                    k: from_f32(k, [t, kv_width], &self.device),
                    v: from_f32(v, [t, kv_width], &self.device),
                },
            )?;
            q = into_f32(attended)?;
            layer.output.host(&q, t, &mut [&mut projected])?;
            layer.mlp_norm.host_sum(&mut x, &projected, &mut normed);
            layer.gate_up.host(&normed, t, &mut [&mut gate_up])?;
            elementwise::swiglu_fused(&gate_up, self.intermediate, &mut inner);
            layer.down.host(&inner, t, &mut [&mut projected])?;
            next_norm.host_sum(&mut x, &projected, &mut normed);
        }
        Ok(from_f32(normed, [t, spec.hidden], &self.device))
    }

    fn hidden_tensor(&self, ids: &[u32], cache: &mut SequenceCache) -> Result<Tensor<2>> {
        let spec = &self.spec;
        let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let mut x = self.embedding.rows(ids)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = layer.attention_norm.tensor(x.clone());
            let qkv = layer.qkv.tensor(normed.clone())?;
            let attended = cache.attend_from(
                index,
                &normed,
                Qkv {
                    q: qkv.clone().narrow(1, 0, q_width),
                    k: qkv.clone().narrow(1, q_width, kv_width),
                    v: qkv.narrow(1, q_width + kv_width, kv_width),
                },
            )?;
            x = x + layer.output.tensor(attended)?;
            let gate_up = layer.gate_up.tensor(layer.mlp_norm.tensor(x.clone()))?;
            let width = gate_up.dims()[1] / 2;
            let gate = gate_up.clone().narrow(1, 0, width);
            let inner = silu(gate) * gate_up.narrow(1, width, width);
            x = x + layer.down.tensor(inner)?;
        }
        Ok(self.norm.tensor(x))
    }
}

impl CausalLm for Decoder {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn hidden(&self, ids: &[u32], cache: &mut SequenceCache) -> locret_core::Result<Tensor<2>> {
        Ok(if self.host {
            awake(|| self.hidden_host(ids, cache))?
        } else {
            self.hidden_tensor(ids, cache)?
        })
    }

    fn logits(&self, hidden: Tensor<2>) -> locret_core::Result<Tensor<2>> {
        let head = self.head.as_ref().or(self.embedding.head());
        let head = head.ok_or_else(|| CoreError::Model("a decoder without a head".into()))?;
        Ok(head.tensor(hidden)?)
    }

    fn qkv_weight(&self, layer: usize) -> locret_core::Result<Option<Vec<f32>>> {
        let found = self.layers.get(layer).ok_or_else(|| CoreError::Shape {
            what: "a layer",
            expected: format!("below {}", self.layers.len()),
            found: layer.to_string(),
        })?;
        Ok(Some(found.qkv.values()?))
    }
}
