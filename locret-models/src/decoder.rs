//! The decoder that Llama and Phi-3 share: RMS norm, attention, RMS norm, SwiGLU.

use crate::{Loader, Result};
use locret_core::{CausalLm, Compute, Error as CoreError, Matrix, ModelSpec, Pass, Qkv, Rows};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::{
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
    /// Made when it is first asked for.
    fingerprint: OnceLock<String>,
}

/// One layer's weights. Projections that read the same input are one matrix.
#[derive(Debug)]
struct DecoderLayer {
    /// `[1, hidden]`
    attention_norm: Rows,
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`: queries, keys, values.
    qkv: Arc<dyn Matrix>,
    /// `[hidden, heads * head_dim]`
    output: Arc<dyn Matrix>,
    /// `[1, hidden]`
    mlp_norm: Rows,
    /// `[2 * intermediate, hidden]`: gate, up.
    gate_up: Arc<dyn Matrix>,
    /// `[hidden, intermediate]`
    down: Arc<dyn Matrix>,
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
    /// Loads a decoder's weights to where the loader's compute with them.
    ///
    /// # Errors
    /// Missing tensors, wrong shapes, values that are not finite; an impossible
    /// [`ModelSpec`].
    pub fn load(config: &DecoderConfig, loader: &Loader<'_>) -> Result<Self> {
        let spec = config.spec.clone().with_layer_input();
        spec.validate()?;
        let (hidden, inner) = (spec.hidden, config.intermediate);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let layers = (0..spec.layers).map(|index| {
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
                attention_norm: loader.row(&own("input_layernorm"), hidden)?,
                qkv: loader.matrix(&qkv, hidden)?,
                output: loader.matrix(&[(attn("o_proj"), hidden)], q)?,
                mlp_norm: loader.row(&own("post_attention_layernorm"), hidden)?,
                gate_up: loader.matrix(&gate_up, hidden)?,
                down: loader.matrix(&[(mlp("down_proj"), hidden)], inner)?,
            })
        });
        let table = |name: &str| loader.matrix(&[(name.to_owned(), spec.vocab)], hidden);
        let embedding = table("model.embed_tokens.weight")?;
        let layers = layers.collect::<Result<_>>()?;
        let head = "lm_head.weight";
        Ok(Self {
            head: if config.tied {
                // A tied head may be stored all the same; it is the same tensor.
                loader.skip(head);
                embedding.clone()
            } else {
                table(head)?
            },
            embedding,
            layers,
            norm: loader.row("model.norm.weight", hidden)?,
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
            for matrix in [&layer.qkv, &layer.output, &layer.gate_up, &layer.down] {
                hash_matrix(&mut hash, &**matrix)?;
            }
        }
        hash_norm(&mut hash, &self.norm)?;
        hash_matrix(&mut hash, &*self.embedding)?;
        if !Arc::ptr_eq(&self.head, &self.embedding) {
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
        let (spec, compute, epsilon) = (&self.spec, &*self.compute, self.epsilon);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let mut norms = self.layers.iter().map(|layer| &layer.attention_norm);
        let first = norms.next().unwrap_or(&self.norm);
        let mut x = self.embedding.rows(ids)?;
        let mut normed = compute.norm(&x, first, epsilon)?;
        let norms = norms.chain([&self.norm]);
        for ((index, layer), next_norm) in self.layers.iter().enumerate().zip(norms) {
            let parts = layer.qkv.apply_parts(&normed, &[q, kv, kv])?;
            let [q, k, v]: [Rows; 3] = parts.try_into().map_err(|_| three())?;
            let attended = pass.attend(index, Qkv::new(q, k, v).made_from(normed))?;
            let y = through(&*layer.output, attended)?;
            let inner = compute.add_norm(&mut x, &y, &layer.mlp_norm, epsilon)?;
            drop(y);
            let gated = compute.gate(&through(&*layer.gate_up, inner)?)?;
            let y = through(&*layer.down, gated)?;
            normed = compute.add_norm(&mut x, &y, next_norm, epsilon)?;
        }
        Ok(normed)
    }

    fn logits(&self, hidden: Rows) -> locret_core::Result<Rows> {
        self.head.apply(&hidden)
    }

    fn qkv_weight(&self, layer: usize) -> locret_core::Result<Option<Vec<f32>>> {
        let found = self.layers.get(layer).ok_or_else(|| CoreError::Shape {
            what: "a layer",
            expected: format!("below {}", self.layers.len()),
            found: layer.to_string(),
        })?;
        Ok(Some(found.qkv.values()?))
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

/// A product, with which the memory of what goes in is given back.
fn through(matrix: &dyn Matrix, x: Rows) -> locret_core::Result<Rows> {
    matrix.apply(&x)
}

/// A product in other parts than were asked for.
fn three() -> CoreError {
    CoreError::Model("q, k and v are not three parts of a product".into())
}
