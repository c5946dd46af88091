//! Retaining heads on a device.

use super::{HeadWeights, LayerHead};
use burn::tensor::{Device, Tensor, activation::silu};
use half::{bf16, f16};
use locret_core::{
    CausalLm, Error, ModelSpec, Result, from_f32, into_f32, is_host_device,
    kernels::{
        linear::{Format, Weight, matmul},
        pages::Arena,
        perceptron::perceptron,
    },
};

/// Retaining heads, ready to score: their weights lie on the device where the model runs, in 16
/// bits where these hold them exactly.
///
/// A head's first matrix is applied to queries, keys and values, which are a product themselves: of the
/// layer's input `x` with the model's own matrix. Since `fc1 · (W x) = (fc1 · W) x`, the two can be made
/// one of fewer columns ([`for_model`](Self::for_model)): 3,072 instead of 9,216 for Phi-3-mini, 4,096
/// instead of 6,144 for Llama-3.1-8B, 576 instead of 960 for SmolLM2-135M. Such heads are *folded*: they
/// read the layer's input, and scores are the same but for rounding.
#[derive(Debug, Clone)]
pub struct RetainingHeads {
    layers: Vec<Head>,
    folded: bool,
    inputs: usize,
    outputs: usize,
    widths: Vec<usize>,
}

/// One layer's matrices.
#[derive(Debug, Clone)]
enum Head {
    /// For the CPU kernels: `[d_R, inputs]`, `[G, d_R]`.
    Host { fc1: Weight<'static>, fc2: Vec<f32> },
    /// For Burn's operations: `[inputs, d_R]`, `[d_R, G]`.
    Device { fc1: Tensor<2>, fc2: Tensor<2> },
}

impl RetainingHeads {
    /// Puts heads on `device`, to read queries, keys and values.
    ///
    /// # Errors
    /// [`PolicyError::Shape`](crate::PolicyError::Shape) for heads that don't fit `model`.
    pub fn new(weights: &HeadWeights, model: &ModelSpec, device: &Device) -> crate::Result<Self> {
        weights.validate(model)?;
        let inputs = model.layer(0).qkv_features();
        let mut placing = Placing::new(inputs, model, device);
        for head in &weights.layers {
            placing.add(head, &head.fc1)?;
        }
        Ok(placing.heads(false))
    }

    /// Puts heads where `model` runs, folded where the model has a matrix for its queries, keys and values
    /// ([`CausalLm::qkv_weight`]) and that makes them cheaper; otherwise as [`new`](Self::new). Folded heads
    /// fit this model only, not another one of the same shape. Folding a layer's takes as many operations as
    /// scoring `hidden` tokens without it.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Shape`] for a matrix of another shape than the model's spec says; the
    /// model's.
    pub fn for_model(weights: &HeadWeights, model: &dyn CausalLm) -> crate::Result<Self> {
        let (spec, device) = (model.spec(), model.device());
        weights.validate(spec)?;
        let (hidden, features) = (spec.hidden, spec.layer(0).qkv_features());
        let mut placing = Placing::new(hidden, spec, device);
        for (layer, head) in weights.layers.iter().enumerate() {
            let own = match hidden < features {
                true => model.qkv_weight(layer)?,
                false => None,
            };
            let Some(own) = own else {
                return Self::new(weights, spec, device);
            };
            placing.add(head, &product(head, &own, [features, hidden])?)?;
        }
        Ok(placing.heads(true))
    }

    /// Whether the heads read what a layer makes queries, keys and values from, rather than these.
    pub fn folded(&self) -> bool {
        self.folded
    }

    /// Causal importance scores of new tokens, `[tokens, kv_heads]` row-major.
    ///
    /// # Shapes
    /// - `parts`: queries, keys and values before rotation, `[tokens, heads * head_dim]`, and `[tokens,
    ///   kv_heads * head_dim]` twice; for [`folded`](Self::folded) heads the layer's input, `[tokens,
    ///   hidden]`
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer or width that the heads don't have, [`Error::Device`].
    pub fn scores(&self, layer: usize, parts: &[&Tensor<2>]) -> Result<Vec<f32>> {
        let tokens = parts.first().map_or(0, |part| part.dims()[0]);
        if parts.iter().any(|part| part.dims()[0] != tokens) {
            let found: Vec<_> = parts.iter().map(|part| part.dims()).collect();
            return Err(self.unfit(tokens, format!("parts of {found:?}")));
        }
        let copies = parts.iter().map(|part| (*part).clone());
        match self.head(layer)? {
            Head::Host { .. } => {
                let parts: Vec<_> = copies.map(into_f32).collect::<Result<_>>()?;
                let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
                self.host_scores(layer, tokens, &parts)
            }
            Head::Device { fc1, fc2 } => {
                let width: usize = parts.iter().map(|part| part.dims()[1]).sum();
                if width != self.inputs {
                    return Err(self.unfit(tokens, format!("[{tokens}, {width}]")));
                }
                let input = Tensor::cat(copies.collect(), 1);
                into_f32(silu(input.matmul(fc1.clone())).matmul(fc2.clone()))
            }
        }
    }

    /// [`scores`](Self::scores) of parts that lie in host memory.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer that the heads don't have, or parts that are not rows of `tokens`
    /// tokens as wide as their input; [`Error::Device`].
    pub fn host_scores(&self, layer: usize, tokens: usize, parts: &[&[f32]]) -> Result<Vec<f32>> {
        let whole = |part: &[f32]| tokens > 0 && part.len().is_multiple_of(tokens);
        let numbers: usize = parts.iter().map(|part| part.len()).sum();
        if numbers != tokens * self.inputs || !parts.iter().all(|part| whole(part)) {
            let found: Vec<_> = parts.iter().map(|part| part.len()).collect();
            return Err(self.unfit(tokens, format!("parts of {found:?} numbers")));
        }
        match self.head(layer)? {
            Head::Host { fc1, fc2 } => {
                let mut scores = vec![0.0; tokens * self.outputs];
                perceptron(parts, fc1, fc2, &mut scores);
                Ok(scores)
            }
            Head::Device { fc1, .. } => {
                let device = fc1.device();
                let tensor = |part: &&[f32]| {
                    let shape = [tokens, part.len() / tokens];
                    from_f32(part.to_vec(), shape, &device)
                };
                let parts: Vec<Tensor<2>> = parts.iter().map(tensor).collect();
                self.scores(layer, &parts.iter().collect::<Vec<_>>())
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
        let inputs = match self.folded {
            true => model.hidden,
            false => model.layer(0).qkv_features(),
        };
        let expected = [model.layers, inputs, model.kv_heads];
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

/// Heads on their way to a device.
struct Placing<'a> {
    heads: RetainingHeads,
    device: &'a Device,
    host: bool,
    arena: Arena,
}

impl<'a> Placing<'a> {
    fn new(inputs: usize, model: &ModelSpec, device: &'a Device) -> Self {
        Self {
            heads: RetainingHeads {
                layers: Vec::with_capacity(model.layers),
                folded: false,
                inputs,
                outputs: model.kv_heads,
                widths: Vec::with_capacity(model.layers),
            },
            device,
            host: is_host_device(device),
            arena: Arena::default(),
        }
    }

    /// The next layer's head, whose first matrix is `fc1`, `[d_R, inputs]`.
    fn add(&mut self, head: &LayerHead, fc1: &[f32]) -> Result<()> {
        let (inputs, outputs) = (self.heads.inputs, self.heads.outputs);
        self.heads.widths.push(head.d_r);
        self.heads.layers.push(if self.host {
            Head::Host {
                fc1: packed(fc1, head.d_r, inputs, &mut self.arena)?,
                fc2: head.fc2.clone(),
            }
        } else {
            Head::Device {
                fc1: transposed(fc1, head.d_r, inputs, self.device),
                fc2: transposed(&head.fc2, outputs, head.d_r, self.device),
            }
        });
        Ok(())
    }

    fn heads(self, folded: bool) -> RetainingHeads {
        RetainingHeads {
            folded,
            ..self.heads
        }
    }
}

/// `fc1 · W`, `[d_R, hidden]`, of a head and the model's own matrix `[features, hidden]`.
fn product(head: &LayerHead, own: &[f32], [features, hidden]: [usize; 2]) -> Result<Vec<f32>> {
    let unfit = |found: String| Error::Shape {
        what: "a model's matrix for queries, keys and values",
        expected: format!("[{features}, {hidden}]"),
        found,
    };
    if own.len() != features * hidden {
        return Err(unfit(format!("{} numbers", own.len())));
    }
    let mut across = vec![0.0; own.len()];
    transpose(own, hidden, &mut across);
    let across = Weight::from_f32(&across, hidden, features).map_err(|e| unfit(e.to_string()))?;
    let mut out = vec![0.0; head.d_r * hidden];
    matmul(&head.fc1, &across, &mut out);
    Ok(out)
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
    transpose(values, columns, &mut out);
    from_f32(out, [columns, rows], device)
}

/// `[rows, columns]` row-major to `[columns, rows]`, in squares that stay in the first cache.
fn transpose(values: &[f32], columns: usize, out: &mut [f32]) {
    const SIDE: usize = 32;
    let rows = values.len() / columns.max(1);
    for first in (0..rows).step_by(SIDE) {
        for left in (0..columns).step_by(SIDE) {
            for r in first..(first + SIDE).min(rows) {
                for c in left..(left + SIDE).min(columns) {
                    out[c * rows + r] = values[r * columns + c];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use locret_core::RopeConfig;

    /// `fc1 (W x)` and `(fc1 W) x`, by kernels and by operations, of any shape.
    #[test]
    fn folded_heads_score_like_plain_ones() {
        for (d_r, features, hidden, tokens) in [(5, 12, 7, 3), (33, 80, 64, 40), (64, 100, 33, 9)] {
            let number = |i: usize| ((i * 7919 % 1009) as f32 / 504.5 - 1.0) / 3.0;
            let head = LayerHead {
                d_r,
                fc1: (0..d_r * features).map(number).collect(),
                fc2: (0..d_r * 2).map(|i| number(i + 5)).collect(),
            };
            let own: Vec<f32> = (0..features * hidden).map(|i| number(i + 9)).collect();
            let x: Vec<f32> = (0..tokens * hidden).map(|i| number(3 * i + 1)).collect();
            let folded = product(&head, &own, [features, hidden]).unwrap();
            assert!(product(&head, &own[1..], [features, hidden]).is_err());
            let mut qkv = vec![0.0; tokens * features];
            matmul(
                &x,
                &Weight::from_f32(&own, features, hidden).unwrap(),
                &mut qkv,
            );
            let score = |fc1: &[f32], inputs: usize, x: &[f32], host: bool| {
                let device = Device::flex();
                let head = match host {
                    true => Head::Host {
                        fc1: packed(fc1, d_r, inputs, &mut Arena::default()).unwrap(),
                        fc2: head.fc2.clone(),
                    },
                    false => Head::Device {
                        fc1: transposed(fc1, d_r, inputs, &device),
                        fc2: transposed(&head.fc2, 2, d_r, &device),
                    },
                };
                let heads = RetainingHeads {
                    layers: vec![head],
                    folded: inputs == hidden,
                    inputs,
                    outputs: 2,
                    widths: vec![d_r],
                };
                let x = from_f32(x.to_vec(), [tokens, inputs], &device);
                heads.scores(0, &[&x]).unwrap()
            };
            let expected = score(&head.fc1, features, &qkv, true);
            for host in [true, false] {
                let found = score(&folded, hidden, &x, host);
                assert_eq!(found.len(), expected.len());
                for (a, b) in found.iter().zip(&expected) {
                    assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{a} and {b}");
                }
            }
        }
    }

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
                let (q, k, v) = (part(6, 1), part(2, 2), part(2, 3));
                let a = host.scores(0, &[&q, &k, &v]).unwrap();
                let b = operations.scores(0, &[&q, &k, &v]).unwrap();
                assert_eq!(a.len(), tokens * 2);
                for (a, b) in a.iter().zip(&b) {
                    assert!((a - b).abs() < 1e-5, "{a} and {b}");
                }
                assert!(host.scores(1, &[&q, &k, &v]).is_err());
                let short = host.host_scores(0, tokens, &[&[0.0], &[], &[]]);
                assert!(matches!(short, Err(Error::Shape { .. })));
                let narrow = [&k, &k, &v];
                let uneven = q.clone().narrow(0, 0, tokens.div_ceil(2));
                let uneven = [&uneven, &k, &v];
                for heads in [&host, &operations] {
                    let bad = [Some(narrow), (tokens > 1).then_some(uneven)];
                    for parts in bad.into_iter().flatten() {
                        let found = heads.scores(0, &parts);
                        assert!(matches!(found, Err(Error::Shape { .. })));
                    }
                }
            }
        }
    }
}
