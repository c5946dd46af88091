//! Retaining heads on a device.

use super::{HeadWeights, LayerHead};
use burn::tensor::{Device, Tensor, activation::silu};
use half::{bf16, f16};
use locret_core::{
    Error, ModelSpec, Qkv, Result, from_f32, into_f32, is_host_device,
    kernels::{
        elementwise,
        linear::{Format, Weight, matmul, matmul_between},
        pages::Arena,
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
    Host { fc1: Weight<'static>, fc2: Vec<f32> },
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
        let mut arena = Arena::default();
        let mut place = |head: &LayerHead| -> Result<Head> {
            Ok(if host {
                Head::Host {
                    fc1: packed(&head.fc1, head.d_r, inputs, &mut arena)?,
                    fc2: head.fc2.clone(),
                }
            } else {
                Head::Device {
                    fc1: transposed(&head.fc1, head.d_r, inputs, device),
                    fc2: transposed(&head.fc2, outputs, head.d_r, device),
                }
            })
        };
        Ok(Self {
            layers: weights
                .layers
                .iter()
                .map(&mut place)
                .collect::<Result<_>>()?,
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
        let parts = [&qkv.q, &qkv.k, &qkv.v];
        let tokens = qkv.tokens();
        match self.head(layer)? {
            Head::Host { .. } => {
                let [q, k, v] = parts.map(|part| into_f32(part.clone()));
                self.host_scores(layer, tokens, [&q?, &k?, &v?])
            }
            Head::Device { fc1, fc2 } => {
                let input = Tensor::cat(parts.map(Tensor::clone).to_vec(), 1);
                if input.dims() != [tokens, self.inputs] {
                    return Err(self.unfit(tokens, format!("{:?}", input.dims())));
                }
                into_f32(silu(input.matmul(fc1.clone())).matmul(fc2.clone()))
            }
        }
    }

    /// [`scores`](Self::scores) of queries, keys and values that lie in host memory.
    ///
    /// # Shapes
    /// - `parts`: `[tokens, heads * head_dim]`, and `[tokens, kv_heads * head_dim]` twice
    /// - returns `[tokens, kv_heads]`
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that the heads don't have, or parts that are not rows of `tokens`
    /// tokens as wide as their input; [`Error::Device`].
    pub fn host_scores(&self, layer: usize, tokens: usize, parts: [&[f32]; 3]) -> Result<Vec<f32>> {
        let whole = |part: &[f32]| tokens > 0 && part.len().is_multiple_of(tokens);
        let numbers: usize = parts.iter().map(|part| part.len()).sum();
        if numbers != tokens * self.inputs || !parts.iter().all(|part| whole(part)) {
            let found = parts.map(<[f32]>::len);
            return Err(self.unfit(tokens, format!("parts of {found:?} numbers")));
        }
        match self.head(layer)? {
            Head::Host { fc1, fc2 } => {
                let mut inner = vec![0.0; tokens * fc1.rows()];
                matmul_between(&parts, &[fc1], &mut [&mut inner]);
                elementwise::silu(&mut inner);
                // Seen from the other side: what was made of the tokens is the matrix, of which each
                // row is read once, and nothing has to be packed for a handful of outputs.
                let inner = Weight::from_f32(&inner, tokens, fc1.rows())
                    .map_err(|e| self.unfit(tokens, format!("what is no matrix: {e}")))?;
                let mut by_head = vec![0.0; self.outputs * tokens];
                matmul(fc2, &inner, &mut by_head);
                let score = |i: usize| by_head[i % self.outputs * tokens + i / self.outputs];
                Ok((0..by_head.len()).map(score).collect())
            }
            Head::Device { fc1, .. } => {
                let device = fc1.device();
                let [q, k, v] = parts.map(|part| {
                    let shape = [tokens, part.len() / tokens];
                    from_f32(part.to_vec(), shape, &device)
                });
                self.scores(layer, &Qkv { q, k, v })
            }
        }
    }

    fn head(&self, layer: usize) -> Result<&Head> {
        self.layers.get(layer).ok_or_else(|| Error::Shape {
            what: "retaining heads",
            expected: format!("more than {layer} layers"),
            found: self.layers.len().to_string(),
        })
    }

    fn unfit(&self, tokens: usize, found: String) -> Error {
        Error::Shape {
            what: "the input of a retaining head",
            expected: format!("[{tokens}, {}]", self.inputs),
            found,
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
fn packed(
    values: &[f32],
    rows: usize,
    columns: usize,
    arena: &mut Arena,
) -> Result<Weight<'static>> {
    let bf16s = values.iter().map(|x| bf16::from_f32(*x));
    let f16s = values.iter().map(|x| f16::from_f32(*x));
    let same = |(a, b): (f32, &f32)| a == *b;
    fn write<const N: usize>(to: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
        for (to, value) in to.chunks_exact_mut(N).zip(values) {
            to.copy_from_slice(&value);
        }
    }
    let format = if bf16s.clone().map(f32::from).zip(values).all(same) {
        Format::Bf16
    } else if f16s.clone().map(f32::from).zip(values).all(same) {
        Format::F16
    } else {
        Format::F32
    };
    let mut bytes = arena.zeros(values.len() * format.block_bytes());
    match format {
        Format::Bf16 => write(&mut bytes, bf16s.map(bf16::to_le_bytes)),
        Format::F16 => write(&mut bytes, f16s.map(f16::to_le_bytes)),
        _ => write(&mut bytes, values.iter().map(|x| x.to_le_bytes())),
    }
    Weight::shared(format, rows, columns, bytes.freeze()).map_err(|e| Error::Shape {
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
                let short = host.host_scores(0, tokens, [&[0.0], &[], &[]]);
                assert!(matches!(short, Err(Error::Shape { .. })));
                let narrow = Qkv {
                    q: qkv.k.clone(),
                    ..qkv
                };
                assert!(matches!(host.scores(0, &narrow), Err(Error::Shape { .. })));
            }
        }
    }
}
