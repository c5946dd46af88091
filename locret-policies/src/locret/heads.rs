//! Retaining heads on a device.

use super::{HeadWeights, LayerHead};
use burn::tensor::{Device, Tensor, activation::silu};
use half::{bf16, f16};
use locret_core::{
    Error, ModelSpec, Qkv, Result, from_f32, into_f32, is_host_device,
    kernels::{
        elementwise,
        linear::{Format, Weight, matmul},
    },
};

/// Retaining heads, ready to score: their weights lie on the device where the model runs, in 16
/// bits where these hold them exactly.
#[derive(Debug, Clone)]
pub struct RetainingHeads {
    layers: Vec<Head>,
    inputs: usize,
    outputs: usize,
    widths: Vec<usize>,
}

/// One layer's matrices.
#[derive(Debug, Clone)]
enum Head {
    /// For the CPU kernels: `[d_R, (H + 2G)·d]`, `[G, d_R]`.
    Host {
        fc1: Weight<'static>,
        fc2: Weight<'static>,
    },
    /// For Burn's operations: `[(H + 2G)·d, d_R]`, `[d_R, G]`.
    Device { fc1: Tensor<2>, fc2: Tensor<2> },
}

impl RetainingHeads {
    /// Puts heads on `device`.
    ///
    /// # Errors
    /// [`PolicyError::Shape`](crate::PolicyError::Shape) for heads that don't fit `model`.
    pub fn new(weights: &HeadWeights, model: &ModelSpec, device: &Device) -> crate::Result<Self> {
        weights.validate(model)?;
        let (inputs, outputs) = (model.layer(0).qkv_features(), model.kv_heads);
        let host = is_host_device(device);
        let place = |head: &LayerHead| -> Result<Head> {
            Ok(if host {
                Head::Host {
                    fc1: packed(&head.fc1, head.d_r, inputs)?,
                    fc2: packed(&head.fc2, outputs, head.d_r)?,
                }
            } else {
                Head::Device {
                    fc1: transposed(&head.fc1, head.d_r, inputs, device),
                    fc2: transposed(&head.fc2, outputs, head.d_r, device),
                }
            })
        };
        Ok(Self {
            layers: weights.layers.iter().map(place).collect::<Result<_>>()?,
            inputs,
            outputs,
            widths: weights.layers.iter().map(|head| head.d_r).collect(),
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
        let [tokens, found] = input.dims();
        if found != self.inputs {
            return Err(Error::Shape {
                what: "the input of a retaining head",
                expected: format!("[tokens, {}]", self.inputs),
                found: format!("[tokens, {found}]"),
            });
        }
        match head {
            Head::Host { fc1, fc2 } => {
                let mut inner = vec![0.0; tokens * fc1.rows()];
                matmul(&into_f32(input)?, fc1, &mut inner);
                elementwise::silu(&mut inner);
                let mut scores = vec![0.0; tokens * fc2.rows()];
                matmul(&inner, fc2, &mut scores);
                Ok(scores)
            }
            Head::Device { fc1, fc2 } => {
                into_f32(silu(input.matmul(fc1.clone())).matmul(fc2.clone()))
            }
        }
    }

    /// Checks that the heads fit a model.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn validate(&self, model: &ModelSpec) -> Result<()> {
        let expected = [model.layers, model.layer(0).qkv_features(), model.kv_heads];
        let found = [self.layers.len(), self.inputs, self.outputs];
        if found != expected {
            return Err(Error::Shape {
                what: "retaining heads (layers, inputs, outputs)",
                expected: format!("{expected:?}"),
                found: format!("{found:?}"),
            });
        }
        Ok(())
    }

    /// Intermediate features of each layer's head, `d_R`.
    pub fn widths(&self) -> &[usize] {
        &self.widths
    }
}

/// `[rows, columns]` in the smallest float type that holds every number.
fn packed(values: &[f32], rows: usize, columns: usize) -> Result<Weight<'static>> {
    let bf16s = values.iter().map(|x| bf16::from_f32(*x));
    let f16s = values.iter().map(|x| f16::from_f32(*x));
    let same = |(a, b): (f32, &f32)| a == *b;
    let (format, bytes): (_, Vec<u8>) = if bf16s.clone().map(f32::from).zip(values).all(same) {
        (Format::Bf16, bf16s.flat_map(bf16::to_le_bytes).collect())
    } else if f16s.clone().map(f32::from).zip(values).all(same) {
        (Format::F16, f16s.flat_map(f16::to_le_bytes).collect())
    } else {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes());
        (Format::F32, bytes.collect())
    };
    Weight::new(format, rows, columns, bytes).map_err(|e| Error::Shape {
        what: "a retaining head",
        expected: format!("[{rows}, {columns}]"),
        found: e.to_string(),
    })
}

/// `[rows, columns]` row-major as a tensor `[columns, rows]`.
fn transposed(values: &[f32], rows: usize, columns: usize, device: &Device) -> Tensor<2> {
    let mut out = vec![0.0; values.len()];
    for (r, row) in values.chunks_exact(columns).enumerate() {
        for (c, x) in row.iter().enumerate() {
            out[c * rows + r] = *x;
        }
    }
    from_f32(out, [columns, rows], device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use locret_core::RopeConfig;

    /// Both implementations, and what a 16-bit file becomes.
    #[test]
    fn kernels_and_operations_score_alike() {
        let spec = ModelSpec {
            layers: 1,
            heads: 6,
            kv_heads: 2,
            head_dim: 8,
            hidden: 8,
            vocab: 8,
            softmax_scale: 0.5,
            max_positions: None,
            rope: RopeConfig::plain(1e4, 8),
        };
        let device = Device::flex();
        let inputs = spec.layer(0).qkv_features();
        let number = |i: usize| ((i * 7919 % 1009) as f32 / 504.5 - 1.0) / 3.0;
        for format in [Format::F32, Format::F16, Format::Bf16] {
            let round = |x: f32| match format {
                Format::F16 => f16::from_f32(x).to_f32(),
                Format::Bf16 => bf16::from_f32(x).to_f32(),
                _ => x,
            };
            let numbers = |n: usize, from: usize| (from..from + n).map(|i| round(number(i)));
            let head = LayerHead {
                d_r: 33,
                fc1: numbers(33 * inputs, 0).collect(),
                fc2: numbers(33 * 2, 5).collect(),
            };
            let weights = HeadWeights {
                layers: vec![head.clone()],
                metadata: Default::default(),
            };
            let host = RetainingHeads::new(&weights, &spec, &device).unwrap();
            match &host.layers[0] {
                Head::Host { fc1, .. } => assert_eq!(fc1.format(), format),
                Head::Device { .. } => panic!("not on the host"),
            }
            let operations = RetainingHeads {
                layers: vec![Head::Device {
                    fc1: transposed(&head.fc1, 33, inputs, &device),
                    fc2: transposed(&head.fc2, 2, 33, &device),
                }],
                ..host.clone()
            };
            for tokens in [1, 2, 40] {
                let part = |heads: usize, from: usize| {
                    let values = (0..tokens * heads * 8).map(|i| 4.0 * number(i + from));
                    from_f32(values.collect(), [tokens, heads * 8], &device)
                };
                let qkv = Qkv {
                    q: part(6, 1),
                    k: part(2, 2),
                    v: part(2, 3),
                };
                let a = host.scores(0, &qkv).unwrap();
                let b = operations.scores(0, &qkv).unwrap();
                assert_eq!(a.len(), tokens * 2);
                for (a, b) in a.iter().zip(&b) {
                    assert!((a - b).abs() < 1e-5, "{a} and {b}");
                }
                assert!(host.scores(1, &qkv).is_err());
                let narrow = Qkv {
                    q: qkv.k.clone(),
                    ..qkv
                };
                assert!(matches!(host.scores(0, &narrow), Err(Error::Shape { .. })));
            }
        }
    }
}
