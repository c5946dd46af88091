//! A small random decoder of any dimensions.

use super::Dice;
use crate::{
    CausalLm, Compute, Error, ModelSpec, Pass, Qkv, Result, Rows, compute, from_f32, host::hex,
    ids_tensor,
};
use burn::tensor::{Device, Tensor};
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// A small decoder with random weights: embedding, and in each layer RMS normalisation without a
/// gain, attention, and an MLP with `tanh`; then normalisation and a head of its own.
///
/// Projections are scaled so that attention is neither flat nor a single peak.
#[derive(Debug)]
pub struct RandomModel {
    pub(super) spec: ModelSpec,
    compute: Arc<dyn Compute>,
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) head: Matrix,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) q: Matrix,
    pub(super) k: Matrix,
    pub(super) v: Matrix,
    pub(super) out: Matrix,
    pub(super) up: Matrix,
    pub(super) down: Matrix,
}

/// `[rows, columns]`, in host memory for the oracle and on the device for the model.
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) columns: usize,
    pub(super) values: Vec<f32>,
    tensor: Tensor<2>,
}

impl Matrix {
    fn random(dice: &mut Dice, rows: usize, columns: usize, scale: f32, device: &Device) -> Self {
        let mut values = dice.values(rows * columns);
        for x in &mut values {
            *x *= scale;
        }
        Self {
            columns,
            tensor: from_f32(values.clone(), [rows, columns], device),
            values,
        }
    }
}

/// The normalisation's constant.
pub(super) const EPSILON: f32 = 1e-6;

/// Dimensions of a small model: 2 layers, a hidden state of 24 features, 61 tokens, plain rotary
/// embedding of all features.
pub fn small_spec(heads: usize, kv_heads: usize, head_dim: usize) -> ModelSpec {
    ModelSpec::new(2, heads, kv_heads, 24, 61)
        .with_head_dim(head_dim)
        .with_layer_input()
}

impl RandomModel {
    /// A model of these dimensions; the same seed gives the same weights. It hands the input of layers
    /// along, whatever `spec` says.
    ///
    /// # Errors
    /// As [`ModelSpec::validate`].
    pub fn new(spec: ModelSpec, seed: u64, device: &Device) -> Result<Self> {
        spec.validate()?;
        let mut dice = Dice::new(seed);
        let (h, d) = (spec.hidden, spec.head_dim);
        let (q, kv) = (spec.heads * d, spec.kv_heads * d);
        let root = |n: usize| 1.0 / (n as f32).sqrt();
        let embedding = Matrix::random(&mut dice, spec.vocab, h, 1.0, device);
        let layers = (0..spec.layers)
            .map(|_| Layer {
                q: Matrix::random(&mut dice, h, q, 1.2 * root(h), device),
                k: Matrix::random(&mut dice, h, kv, 1.2 * root(h), device),
                v: Matrix::random(&mut dice, h, kv, root(h), device),
                out: Matrix::random(&mut dice, q, h, root(q), device),
                up: Matrix::random(&mut dice, h, 2 * h, root(h), device),
                down: Matrix::random(&mut dice, 2 * h, h, root(2 * h), device),
            })
            .collect();
        let head = Matrix::random(&mut dice, h, spec.vocab, 2.0 * root(h), device);
        Ok(Self {
            spec: spec.with_layer_input(),
            compute: compute(device),
            embedding,
            layers,
            head,
        })
    }

    /// The same model, whose caches and policies are computed by another implementation on the same device.
    #[must_use]
    pub fn computed_by(self, compute: Arc<dyn Compute>) -> Self {
        Self { compute, ..self }
    }
}

fn normalised(x: Tensor<2>) -> Tensor<2> {
    let mean = x.clone().powi_scalar(2).mean_dim(1);
    x / mean.add_scalar(EPSILON).sqrt()
}

impl CausalLm for RandomModel {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn compute(&self) -> &Arc<dyn Compute> {
        &self.compute
    }

    fn hidden(&self, ids: &[u32], pass: &mut Pass<'_>) -> Result<Rows> {
        let vocab = self.spec.vocab;
        if let Some(index) = ids.iter().position(|id| *id as usize >= vocab) {
            return Err(Error::UnknownToken {
                id: ids[index],
                index,
                vocab,
            });
        }
        let ids = ids_tensor(ids, self.compute.device());
        let mut x = self.embedding.tensor.clone().select(0, ids);
        for (index, layer) in self.layers.iter().enumerate() {
            let inner = normalised(x.clone());
            let project = |matrix: &Matrix| inner.clone().matmul(matrix.tensor.clone());
            let qkv = Qkv::new(project(&layer.q), project(&layer.k), project(&layer.v));
            let attended = pass.attend(index, qkv.made_from(inner))?.into_tensor();
            x = x + attended.matmul(layer.out.tensor.clone());
            let up = normalised(x.clone()).matmul(layer.up.tensor.clone());
            x = x + up.tanh().matmul(layer.down.tensor.clone());
        }
        Ok(normalised(x).into())
    }

    fn logits(&self, hidden: Rows) -> Result<Rows> {
        Ok(hidden.into_tensor().matmul(self.head.tensor.clone()).into())
    }

    fn qkv_weight(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        let layers = self.layers.len();
        let Layer { q, k, v, .. } = (self.layers.get(layer))
            .ok_or_else(|| Error::shape("a layer", format!("below {layers}"), layer))?;
        let rows = [q, k, v].into_iter().flat_map(|matrix| {
            let column = |c: usize| matrix.values.iter().skip(c).step_by(matrix.columns);
            (0..matrix.columns).flat_map(column)
        });
        Ok(Some(rows.copied().collect()))
    }

    fn output_weight(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        let layers = self.layers.len();
        let Layer { out, .. } = (self.layers.get(layer))
            .ok_or_else(|| Error::shape("a layer", format!("below {layers}"), layer))?;
        let column = |c: usize| out.values.iter().skip(c).step_by(out.columns);
        Ok(Some((0..out.columns).flat_map(column).copied().collect()))
    }

    fn fingerprint(&self) -> Result<Option<String>> {
        let mut hash = Sha256::new();
        hash.update(format!("{:?}", self.spec));
        let layers = self.layers.iter();
        let layers = layers.flat_map(|l| [&l.q, &l.k, &l.v, &l.out, &l.up, &l.down]);
        for matrix in layers.chain([&self.embedding, &self.head]) {
            hash.update(bytemuck::cast_slice(&matrix.values));
        }
        Ok(Some(hex(&hash.finalize())))
    }
}
