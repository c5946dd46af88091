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

/// With up to this many tokens, pieces of work are so short that waking a thread would show.
const AWAKE: usize = 16;

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

    fn host(&self, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        elementwise::rms_norm(x, &self.host_gain, self.epsilon, &mut out);
        out
    }
}

impl Decoder {
    fn hidden_host(&self, ids: &[u32], cache: &mut SequenceCache) -> Result<Tensor<2>> {
        let (t, spec) = (ids.len(), &self.spec);
        let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let mut x = self.embedding.host_rows(ids)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = layer.attention_norm.host(&x);
            let qkv = layer.qkv.host(normed, t)?;
            let mut parts = [
                Vec::with_capacity(t * q_width),
                Vec::with_capacity(t * kv_width),
                Vec::with_capacity(t * kv_width),
            ];
            for row in qkv.chunks_exact(q_width + 2 * kv_width) {
                let (q, kv) = row.split_at(q_width);
                let (k, v) = kv.split_at(kv_width);
                for (part, piece) in parts.iter_mut().zip([q, k, v]) {
                    part.extend_from_slice(piece);
                }
            }
            let [q, k, v] = parts;
            let attended = cache.attend(
                index,
                Qkv {
                    q: from_f32(q, [t, q_width], &self.device),
                    k: from_f32(k, [t, kv_width], &self.device),
                    v: from_f32(v, [t, kv_width], &self.device),
                },
            )?;
            elementwise::add(&mut x, &layer.output.host(into_f32(attended)?, t)?);
            let normed = layer.mlp_norm.host(&x);
            let gate_up = layer.gate_up.host(normed, t)?;
            let mut inner = vec![0.0; gate_up.len() / 2];
            elementwise::swiglu_fused(&gate_up, inner.len() / t, &mut inner);
            elementwise::add(&mut x, &layer.down.host(inner, t)?);
        }
        Ok(from_f32(self.norm.host(&x), [t, spec.hidden], &self.device))
    }

    fn hidden_tensor(&self, ids: &[u32], cache: &mut SequenceCache) -> Result<Tensor<2>> {
        let spec = &self.spec;
        let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let mut x = self.embedding.rows(ids)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let qkv = layer.qkv.tensor(layer.attention_norm.tensor(x.clone()))?;
            let attended = cache.attend(
                index,
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
        Ok(match self.host {
            true if ids.len() <= AWAKE => awake(|| self.hidden_host(ids, cache))?,
            true => self.hidden_host(ids, cache)?,
            false => self.hidden_tensor(ids, cache)?,
        })
    }

    fn logits(&self, hidden: Tensor<2>) -> locret_core::Result<Tensor<2>> {
        let head = self.head.as_ref().or(self.embedding.head());
        let head = head.ok_or_else(|| CoreError::Model("a decoder without a head".into()))?;
        Ok(head.tensor(hidden)?)
    }
}
