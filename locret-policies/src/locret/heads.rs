//! Retaining heads on a device.

use super::HeadWeights;
use burn::tensor::{Device, Tensor, activation::silu};
use locret_core::{Error, ModelSpec, Qkv, Result, from_f32, into_f32};

/// Retaining heads, ready to score: their weights lie on the device where the model runs.
#[derive(Debug, Clone)]
pub struct RetainingHeads {
    layers: Vec<Head>,
}

/// One layer's matrices, the way that products with rows of tokens want them.
#[derive(Debug, Clone)]
struct Head {
    /// `[(H + 2G)·d, d_R]`
    fc1: Tensor<2>,
    /// `[d_R, G]`
    fc2: Tensor<2>,
}

impl RetainingHeads {
    /// Puts heads on `device`.
    ///
    /// # Errors
    /// [`PolicyError::Shape`](crate::PolicyError::Shape) for heads that don't fit `model`.
    pub fn new(weights: &HeadWeights, model: &ModelSpec, device: &Device) -> crate::Result<Self> {
        weights.validate(model)?;
        let layers = weights.layers.iter().map(|head| Head {
            fc1: transposed(&head.fc1, head.d_r, device),
            fc2: transposed(&head.fc2, model.kv_heads, device),
        });
        Ok(Self {
            layers: layers.collect(),
        })
    }

    /// Causal importance scores of new tokens, `[tokens, kv_heads]` row-major, from their queries,
    /// keys and values before rotation.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer or width that the heads don't have, [`Error::Device`].
    pub fn scores(&self, layer: usize, qkv: &Qkv) -> Result<Vec<f32>> {
        let head = self.layers.get(layer).ok_or_else(|| Error::Shape {
            what: "retaining heads",
            expected: format!("more than {layer} layers"),
            found: self.layers.len().to_string(),
        })?;
        let input = Tensor::cat(vec![qkv.q.clone(), qkv.k.clone(), qkv.v.clone()], 1);
        let (found, expected) = (input.dims()[1], head.fc1.dims()[0]);
        if found != expected {
            return Err(Error::Shape {
                what: "the input of a retaining head",
                expected: format!("[tokens, {expected}]"),
                found: format!("[tokens, {found}]"),
            });
        }
        into_f32(silu(input.matmul(head.fc1.clone())).matmul(head.fc2.clone()))
    }

    /// Checks that the heads fit a model.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn validate(&self, model: &ModelSpec) -> Result<()> {
        if self.layers.len() != model.layers {
            return Err(Error::Shape {
                what: "retaining heads",
                expected: format!("{} layers", model.layers),
                found: format!("{} layers", self.layers.len()),
            });
        }
        let expected = (model.layer(0).qkv_features(), model.kv_heads);
        for head in &self.layers {
            let found = (head.fc1.dims()[0], head.fc2.dims()[1]);
            if found != expected {
                return Err(Error::Shape {
                    what: "a retaining head's inputs and outputs",
                    expected: format!("{expected:?}"),
                    found: format!("{found:?}"),
                });
            }
        }
        Ok(())
    }

    /// Intermediate features of each layer's head, `d_R`.
    pub fn widths(&self) -> Vec<usize> {
        self.layers.iter().map(|head| head.fc1.dims()[1]).collect()
    }
}

/// `[rows, columns]` row-major as a tensor `[columns, rows]`.
fn transposed(values: &[f32], rows: usize, device: &Device) -> Tensor<2> {
    let columns = values.len() / rows;
    let mut out = vec![0.0; values.len()];
    for (r, row) in values.chunks_exact(columns).enumerate() {
        for (c, x) in row.iter().enumerate() {
            out[c * rows + r] = *x;
        }
    }
    from_f32(out, [columns, rows], device)
}
