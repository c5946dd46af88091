//! What values become behind a layer's output projection.

use crate::{Result, locret::packed};
use locret_core::{
    CausalLm, Compute, Error, LayerSpec, Matrix, ModelSpec, Rows, Weight, kernels::pages::Arena,
};
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// A model's output projections, as far as norms of what values become behind them go: for
/// [`Critical`](crate::Critical).
#[derive(Debug, Clone)]
pub struct OutputNorms {
    /// By layer and KV head, the slices of its group's query heads one below the other: `[group * hidden,
    /// head_dim]`.
    layers: Vec<Vec<Arc<dyn Matrix>>>,
    /// Layers, query heads, KV heads, features of a head.
    shape: [usize; 4],
    fingerprint: String,
}

impl OutputNorms {
    /// Those of `model`, where it computes.
    ///
    /// # Errors
    /// [`Error::NotSupported`] for a model whose adapter does not say ([`CausalLm::output_weight`]); the
    /// model's; as [`new`](Self::new).
    pub fn for_model(model: &dyn CausalLm) -> Result<Self> {
        let layers = (0..model.spec().layers).map(|layer| {
            let weight = model.output_weight(layer)?;
            Ok(weight.ok_or_else(|| Error::NotSupported {
                operation: "handing out its output projections (`CausalLm::output_weight`)",
                implementer: "the model's adapter".into(),
            })?)
        });
        let layers: Vec<Vec<f32>> = layers.collect::<Result<_>>()?;
        Self::new(&layers, model.spec(), &**model.compute())
    }

    /// From each layer's projection, `[hidden, heads * head_dim]`, row-major, where `compute` computes.
    ///
    /// # Errors
    /// [`Error::Shape`] for matrices of other shapes than the model's spec says, or another number of them.
    pub fn new(layers: &[Vec<f32>], model: &ModelSpec, compute: &dyn Compute) -> Result<Self> {
        let (group, width, columns) = (
            model.heads / model.kv_heads,
            model.head_dim,
            model.heads * model.head_dim,
        );
        let due = model.hidden * columns;
        if layers.len() != model.layers || layers.iter().any(|all| all.len() != due) {
            let found: Vec<usize> = layers.iter().map(Vec::len).collect();
            return Err(Error::Shape {
                what: "a model's output projections",
                expected: format!("{} of [{}, {columns}]", model.layers, model.hidden),
                found: format!("{found:?} numbers"),
            }
            .into());
        }
        let (mut arena, mut hash) = (Arena::default(), Sha256::new());
        let mut placed = Vec::with_capacity(layers.len());
        for (layer, all) in layers.iter().enumerate() {
            let compute = compute.for_layer(layer);
            for x in all {
                hash.update(x.to_le_bytes());
            }
            let mut heads = Vec::with_capacity(model.kv_heads);
            for head in 0..model.kv_heads {
                let rows = group * model.hidden;
                let mut slices = Vec::with_capacity(rows * width);
                for query in head * group..(head + 1) * group {
                    for row in all.chunks_exact(columns) {
                        slices.extend_from_slice(&row[query * width..(query + 1) * width]);
                    }
                }
                let mut matrix = packed(&slices, rows, width, &mut arena);
                if !compute.computes_with(matrix.dtype) {
                    matrix = Weight::from_f32(&slices, rows, width);
                }
                heads.push(compute.matrix(vec![matrix])?);
            }
            placed.push(heads);
        }
        let digest = hash.finalize();
        Ok(Self {
            layers: placed,
            shape: [model.layers, model.heads, model.kv_heads, width],
            fingerprint: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    /// SHA-256 of the projections, in hexadecimal digits.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Checks that they are of a model of this shape.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn validate(&self, model: &ModelSpec) -> locret_core::Result<()> {
        let due = [model.layers, model.heads, model.kv_heads, model.head_dim];
        match self.shape == due {
            true => Ok(()),
            false => Err(Error::Shape {
                what: "output projections (layers, heads, KV heads, features)",
                expected: format!("{due:?}"),
                found: format!("{:?}", self.shape),
            }),
        }
    }

    /// Of values `[tokens, kv_heads * head_dim]`, the mean over the query heads of a group of the sum of
    /// magnitudes of what each becomes: `[tokens, kv_heads]`, row-major.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that there is not, [`Error::Device`].
    pub fn of(&self, layer: &LayerSpec, values: &Rows) -> locret_core::Result<Vec<f32>> {
        let heads = self.layers.get(layer.index).ok_or_else(|| Error::Shape {
            what: "output projections",
            expected: format!("more than {} layers", layer.index),
            found: self.layers.len().to_string(),
        })?;
        let (width, tokens, kv_heads) = (layer.head_dim, values.rows(), layer.kv_heads);
        let mut norms = vec![0.0; tokens * kv_heads];
        let all = values.values()?;
        for (head, matrix) in heads.iter().enumerate() {
            let own: Vec<f32> = (all.chunks_exact(kv_heads * width))
                .flat_map(|token| &token[head * width..(head + 1) * width])
                .copied()
                .collect();
            // Few tokens at a time: what they become is as wide as the model, for each query head.
            for (first, own) in own.chunks(TOKENS * width).enumerate() {
                let rows = Rows::new(own.to_vec(), width, &values.device())?;
                let outs = matrix.apply(&rows)?;
                let outs = outs.values()?;
                let each = outs.chunks_exact(outs.len() / (own.len() / width));
                for (token, row) in each.enumerate() {
                    let sum: f32 = row.iter().map(|x| x.abs()).sum();
                    let at = (first * TOKENS + token) * kv_heads + head;
                    norms[at] = sum / layer.group() as f32;
                }
            }
        }
        Ok(norms)
    }
}

/// Tokens whose values are projected together.
const TOKENS: usize = 64;
