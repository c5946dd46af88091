//! The decoder that Llama, Mistral, Qwen and Phi-3 share: RMS norm, attention, RMS norm, SwiGLU.

use crate::{Loader, Result};
use burn::tensor::Tensor;
use locret_core::{
    CausalLm, Compute, Error as CoreError, Matrix, ModelSpec, Pass, Qkv, Rows, layer_compute,
};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::{
    borrow::Cow,
    ops::Range,
    sync::{Arc, OnceLock},
};

/// A decoder-only model of the Llama family.
#[derive(Debug)]
pub struct Decoder {
    spec: ModelSpec,
    compute: Arc<dyn Compute>,
    /// `[vocab, hidden]`
    embedding: Arc<dyn Matrix>,
    layers: Vec<DecoderLayer>,
    /// `[1, hidden]`
    norm: Rows,
    /// Added to the mean square before the root of each norm.
    epsilon: f32,
    /// `[vocab, hidden]`; the embedding itself where they are tied.
    head: Arc<dyn Matrix>,
    /// The embedding is the head, too; held twice where the two lie on different devices.
    tied: bool,
    /// Made when it is first asked for.
    fingerprint: OnceLock<String>,
}

/// One layer's weights. Projections that read the same input are one matrix.
#[derive(Debug)]
struct DecoderLayer {
    compute: Arc<dyn Compute>,
    /// Rows lie in host memory.
    in_host: bool,
    /// `[1, hidden]`
    attention_norm: Rows,
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`: queries, keys, values.
    qkv: Arc<dyn Matrix>,
    /// What is added to queries, keys and values.
    qkv_bias: Option<[Bias; 3]>,
    /// `[1, head_dim]` each: gains of the norms of each head of queries and keys.
    head_norms: Option<[Rows; 2]>,
    /// `[hidden, heads * head_dim]`
    output: Arc<dyn Matrix>,
    output_bias: Option<Bias>,
    /// `[1, hidden]`
    mlp_norm: Rows,
    /// `[2 * intermediate, hidden]`: gate, up.
    gate_up: Arc<dyn Matrix>,
    gate_up_bias: Option<Bias>,
    /// `[hidden, intermediate]`
    down: Arc<dyn Matrix>,
    down_bias: Option<Bias>,
}

/// A row that is added to each row of a product.
#[derive(Debug)]
enum Bias {
    /// Where rows lie in host memory.
    Host(Vec<f32>),
    /// `[1, width]`
    Device(Tensor<2>),
}

impl Bias {
    /// `rows` are `[1, width]`, where the decoder computes.
    fn new(rows: Rows) -> locret_core::Result<Self> {
        if let Cow::Borrowed(values) = rows.values()? {
            return Ok(Self::Host(values.to_vec()));
        }
        Ok(Self::Device(rows.into_tensor()))
    }

    fn add(&self, mut x: Rows) -> locret_core::Result<Rows> {
        match self {
            Self::Host(bias) => {
                for row in x.values_mut()?.chunks_mut(bias.len()) {
                    for (x, b) in row.iter_mut().zip(bias) {
                        *x += b;
                    }
                }
                Ok(x)
            }
            Self::Device(bias) => Ok((x.into_tensor() + bias.clone()).into()),
        }
    }

    fn values(&self) -> locret_core::Result<Cow<'_, [f32]>> {
        match self {
            Self::Host(bias) => Ok(Cow::Borrowed(bias)),
            Self::Device(bias) => locret_core::into_f32(bias.clone()).map(Cow::Owned),
        }
    }

    fn add_if(bias: Option<&Self>, x: Rows) -> locret_core::Result<Rows> {
        match bias {
            Some(bias) => bias.add(x),
            None => Ok(x),
        }
    }
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
    /// Whether the embedding is the head, too. A checkpoint that has a head of its own all the same, with
    /// other numbers, is taken at its word.
    pub tied: bool,
    /// How the checkpoint groups projections.
    pub layout: Layout,
}

/// What some checkpoints have in every layer beside its matrices and norms: the first layer tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extras {
    /// Biases on q, k and v.
    pub(crate) qkv_bias: bool,
    /// A bias on the output projection of attention.
    pub(crate) output_bias: bool,
    /// Biases on the projections of the MLP.
    pub(crate) mlp_bias: bool,
    /// Norms of each head of q and k.
    pub(crate) head_norms: bool,
}

impl Extras {
    pub(crate) fn of(loader: &Loader<'_>, layout: Layout) -> Self {
        let has = |name: &str| loader.has(&format!("model.layers.0.{name}"));
        Self {
            qkv_bias: has(match layout {
                Layout::Separate => "self_attn.q_proj.bias",
                Layout::Fused => "self_attn.qkv_proj.bias",
            }),
            output_bias: has("self_attn.o_proj.bias"),
            mlp_bias: has("mlp.down_proj.bias"),
            head_norms: has("self_attn.q_norm.weight"),
        }
    }
}

impl Decoder {
    /// Loads a decoder's weights to where the loader's compute with them, each layer's to its own device if
    /// that is a [`DeviceMap`](locret_core::DeviceMap). Biases, and norms of the heads
    /// of q and k, are used if the checkpoint has them.
    ///
    /// # Errors
    /// Missing tensors, wrong shapes, values that are not finite; an impossible
    /// [`ModelSpec`], or a map of another number of layers.
    pub fn load(config: &DecoderConfig, loader: &Loader<'_>) -> Result<Self> {
        let extras = Extras::of(loader, config.layout);
        let spec = config.spec.clone().with_layer_input();
        spec.validate()?;
        let (input, output) = match loader.compute().map() {
            Some(map) => {
                map.check(spec.layers)?;
                (loader.at(map.input()), loader.at(map.output()))
            }
            None => (loader.clone(), loader.clone()),
        };
        let (hidden, inner) = (spec.hidden, config.intermediate);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let layers = (0..spec.layers).map(|index| {
            let loader = &loader.at_layer(index);
            let own = |name: &str| format!("model.layers.{index}.{name}.weight");
            let attn = |name: &str| own(&format!("self_attn.{name}"));
            let mlp = |name: &str| own(&format!("mlp.{name}"));
            // Biases of matrices one below the other, one after the other.
            let bias = |weights: &[(String, usize)]| -> Result<Bias> {
                let mut all = Vec::new();
                for (weight, width) in weights {
                    let stem = weight.strip_suffix(".weight").unwrap_or(weight);
                    all.extend(loader.values(&format!("{stem}.bias"), &[*width])?);
                }
                let width = all.len();
                Ok(Bias::new(loader.compute().rows(all, width)?)?)
            };
            let bias_if = |wanted: bool, weights: &[(String, usize)]| {
                wanted.then(|| bias(weights)).transpose()
            };
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
            let qkv_bias = match (extras.qkv_bias, &qkv[..]) {
                (true, [q, k, v]) => {
                    let one = |part: &(String, usize)| bias(std::slice::from_ref(part));
                    Some([one(q)?, one(k)?, one(v)?])
                }
                (true, [fused]) => {
                    let stem = fused.0.strip_suffix(".weight").unwrap_or(&fused.0);
                    let all = loader.values(&format!("{stem}.bias"), &[fused.1])?;
                    let part = |from: usize, width: usize| -> Result<Bias> {
                        let values = all[from..from + width].to_vec();
                        Ok(Bias::new(loader.compute().rows(values, width)?)?)
                    };
                    Some([part(0, q)?, part(q, kv)?, part(q + kv, kv)?])
                }
                _ => None,
            };
            let head_norm = |name: &str| loader.row(&attn(name), spec.head_dim);
            let head_norms = match extras.head_norms {
                true => Some([head_norm("q_norm")?, head_norm("k_norm")?]),
                false => None,
            };
            let output = [(attn("o_proj"), hidden)];
            let down = [(mlp("down_proj"), hidden)];
            // Some published Llama checkpoints still carry the frequencies.
            loader.skip(&format!(
                "model.layers.{index}.self_attn.rotary_emb.inv_freq"
            ));
            let attention_norm = loader.row(&own("input_layernorm"), hidden)?;
            Ok(DecoderLayer {
                compute: loader.compute().clone(),
                in_host: matches!(attention_norm.values()?, Cow::Borrowed(_)),
                attention_norm,
                qkv: loader.matrix(&qkv, hidden)?,
                qkv_bias,
                head_norms,
                output: loader.matrix(&output, q)?,
                output_bias: bias_if(extras.output_bias, &output)?,
                mlp_norm: loader.row(&own("post_attention_layernorm"), hidden)?,
                gate_up: loader.matrix(&gate_up, hidden)?,
                gate_up_bias: bias_if(extras.mlp_bias, &gate_up)?,
                down: loader.matrix(&down, inner)?,
                down_bias: bias_if(extras.mlp_bias, &down)?,
            })
        });
        let table = |loader: &Loader<'_>, name: &str| {
            loader.matrix(&[(name.to_owned(), spec.vocab)], hidden)
        };
        let embedding = table(&input, "model.embed_tokens.weight")?;
        let layers = layers.collect::<Result<_>>()?;
        let norm = output.row("model.norm.weight", hidden)?;
        let (head, words) = ("lm_head.weight", "model.embed_tokens.weight");
        // A tied head may be stored all the same, and is the same tensor then; or the configuration is
        // wrong, as after a training that untied them.
        let tied = config.tied && (!loader.has(head) || loader.same(head, words)?);
        if tied {
            loader.skip(head);
        }
        let together = Arc::ptr_eq(input.compute(), output.compute());
        Ok(Self {
            head: match (tied, together) {
                (true, true) => embedding.clone(),
                (true, false) => table(&output, words)?,
                (false, _) => table(&output, head)?,
            },
            embedding,
            layers,
            norm,
            tied,
            epsilon: config.norm_epsilon,
            compute: loader.compute().clone(),
            spec,
            fingerprint: OnceLock::new(),
        })
    }

    /// SHA-256 of the spec and of all weights, as 32-bit numbers.
    fn hash(&self) -> locret_core::Result<String> {
        let mut hash = Sha256::new();
        hash.update(format!("{:?}, {:?}", self.spec, self.epsilon));
        for layer in &self.layers {
            for norm in [&layer.attention_norm, &layer.mlp_norm] {
                hash_norm(&mut hash, norm)?;
            }
            if let Some(norms) = &layer.head_norms {
                hash.update("norms of heads");
                norms
                    .iter()
                    .try_for_each(|norm| hash_norm(&mut hash, norm))?;
            }
            let of_qkv = layer.qkv_bias.iter().flatten();
            let others = [&layer.output_bias, &layer.gate_up_bias, &layer.down_bias];
            let named = of_qkv.map(|bias| ("qkv", bias)).chain(
                (["output", "gate and up", "down"].into_iter().zip(others))
                    .filter_map(|(name, bias)| Some((name, bias.as_ref()?))),
            );
            for (name, bias) in named {
                hash.update(format!("a bias of {name}"));
                hash.update(bytemuck::cast_slice(&bias.values()?));
            }
            for matrix in [&layer.qkv, &layer.output, &layer.gate_up, &layer.down] {
                hash_matrix(&mut hash, &**matrix)?;
            }
        }
        hash_norm(&mut hash, &self.norm)?;
        hash_matrix(&mut hash, &*self.embedding)?;
        if !self.tied {
            hash_matrix(&mut hash, &*self.head)?;
        }
        let digest = hash.finalize();
        Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Weights that become numbers, and are hashed, at a time: a MiB.
const HASHED: usize = 1 << 18;
/// How many pieces of this size there are at once.
const TOGETHER: usize = 4;

fn hash_norm(hash: &mut Sha256, norm: &Rows) -> locret_core::Result<()> {
    hash.update(bytemuck::cast_slice(&norm.values()?));
    Ok(())
}

/// Hashes the shape, and the hashes of pieces of the matrix, which are made side by side.
fn hash_matrix(hash: &mut Sha256, matrix: &dyn Matrix) -> locret_core::Result<()> {
    let [rows, columns] = matrix.shape();
    hash.update(format!("[{rows}, {columns}]"));
    let step = (HASHED / columns.max(1)).max(1);
    let piece = |first: usize| -> Range<usize> { first..rows.min(first + step) };
    let pieces: Vec<Range<usize>> = (0..rows).step_by(step).map(piece).collect();
    for pieces in pieces.chunks(TOGETHER) {
        let hashes = pieces.par_iter().map(|rows| {
            let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
            let numbers = matrix.rows(&ids)?;
            Ok(Sha256::digest(bytemuck::cast_slice(&numbers.values()?)))
        });
        for piece in hashes.collect::<locret_core::Result<Vec<_>>>()? {
            hash.update(piece);
        }
    }
    Ok(())
}

impl CausalLm for Decoder {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn compute(&self) -> &Arc<dyn Compute> {
        &self.compute
    }

    fn hidden(&self, ids: &[u32], pass: &mut Pass<'_>) -> locret_core::Result<Rows> {
        let (spec, epsilon) = (&self.spec, self.epsilon);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let mut norms = self.layers.iter().map(|layer| &layer.attention_norm);
        let first = norms.next().unwrap_or(&self.norm);
        let compute = layer_compute(&self.compute, 0);
        let mut x = self.embedding.rows(ids)?.moved_to(&**compute)?;
        let mut normed = compute.norm(&x, first, epsilon)?;
        let norms = norms.chain([&self.norm]);
        for ((index, layer), next_norm) in self.layers.iter().enumerate().zip(norms) {
            let compute = &layer.compute;
            let parts = layer.qkv.apply_parts(&normed, &[q, kv, kv])?;
            let [mut q, mut k, mut v]: [Rows; 3] = parts.try_into().map_err(|_| three())?;
            if let Some([of_q, of_k, of_v]) = &layer.qkv_bias {
                (q, k, v) = (of_q.add(q)?, of_k.add(k)?, of_v.add(v)?);
            }
            if let Some([of_q, of_k]) = &layer.head_norms {
                q = self.norm_heads(layer, q, of_q)?;
                k = self.norm_heads(layer, k, of_k)?;
            }
            let qkv = Qkv::new(q, k, v);
            let attended = pass.attend(index, qkv.made_from(normed))?;
            let y = through(&*layer.output, attended)?;
            let y = Bias::add_if(layer.output_bias.as_ref(), y)?;
            let inner = compute.add_norm(&mut x, &y, &layer.mlp_norm, epsilon)?;
            drop(y);
            let gate_up = through(&*layer.gate_up, inner)?;
            let gate_up = Bias::add_if(layer.gate_up_bias.as_ref(), gate_up)?;
            let gated = compute.gate(&gate_up)?;
            drop(gate_up);
            let y = through(&*layer.down, gated)?;
            let y = Bias::add_if(layer.down_bias.as_ref(), y)?;
            let next = layer_compute(&self.compute, index + 1);
            normed = match Arc::ptr_eq(compute, next) {
                true => compute.add_norm(&mut x, &y, next_norm, epsilon)?,
                false => {
                    // The sum alone crosses the border; any norm will do for it.
                    compute.add_norm(&mut x, &y, &layer.mlp_norm, epsilon)?;
                    x = x.moved_to(&**next)?;
                    next.norm(&x, next_norm, epsilon)?
                }
            };
        }
        Ok(normed)
    }

    fn logits(&self, hidden: Rows) -> locret_core::Result<Rows> {
        self.head.apply(&hidden)
    }

    fn qkv_weight(&self, layer: usize) -> locret_core::Result<Option<Vec<f32>>> {
        let found = self.layer(layer)?;
        // Otherwise queries and keys are not a product of the input alone.
        match found.qkv_bias.is_none() && found.head_norms.is_none() {
            true => Ok(Some(found.qkv.values()?)),
            false => Ok(None),
        }
    }

    fn output_weight(&self, layer: usize) -> locret_core::Result<Option<Vec<f32>>> {
        Ok(Some(self.layer(layer)?.output.values()?))
    }

    /// Takes a while when it is first asked for: all weights are read once.
    fn fingerprint(&self) -> locret_core::Result<Option<String>> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(Some(known.clone()));
        }
        let made = self.hash()?;
        Ok(Some(self.fingerprint.get_or_init(|| made).clone()))
    }
}

impl Decoder {
    fn layer(&self, layer: usize) -> locret_core::Result<&DecoderLayer> {
        self.layers.get(layer).ok_or_else(|| CoreError::Shape {
            what: "a layer",
            expected: format!("below {}", self.layers.len()),
            found: layer.to_string(),
        })
    }

    /// Each head of `x`, `[tokens, heads * head_dim]`, normalised for itself.
    fn norm_heads(&self, layer: &DecoderLayer, x: Rows, gain: &Rows) -> locret_core::Result<Rows> {
        let ([tokens, width], head) = (x.shape(), self.spec.head_dim);
        let compute = &layer.compute;
        if layer.in_host {
            let device = x.device();
            let heads = Rows::new(x.into_values()?, head, &device)?;
            let normed = compute.norm(&heads, gain, self.epsilon)?;
            return Rows::new(normed.into_values()?, width, &device);
        }
        let heads = x.into_tensor().reshape([tokens * width / head, head]);
        let normed = compute.norm(&heads.into(), gain, self.epsilon)?;
        Ok(normed.into_tensor().reshape([tokens, width]).into())
    }
}

/// A product, with which the memory of what goes in is given back.
fn through(matrix: &dyn Matrix, x: Rows) -> locret_core::Result<Rows> {
    matrix.apply(&x)
}

/// A product in other parts than were asked for.
fn three() -> CoreError {
    CoreError::Model("q, k and v are not three parts of a product".into())
}
