//! Retaining heads, ready to score.

use super::{HeadForm, HeadInput, HeadWeights, LayerHead, forms::Formed};
use half::{bf16, f16};
use locret_core::{
    CausalLm, Compute, DType, Error, ModelSpec, Perceptron, Result, Rows, Weight,
    kernels::pages::Arena,
};
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// Retaining heads, ready to score: their weights lie where the model is computed, in 16 bits where these
/// hold them exactly.
///
/// A head's first matrix is applied to queries, keys and values, which are a product themselves: of the
/// layer's input `x` with the model's own matrix. Since `fc1 · (W x) = (fc1 · W) x`, the two can be made
/// one of fewer columns ([`for_model`](Self::for_model)): 3,072 instead of 9,216 for Phi-3-mini, 4,096
/// instead of 6,144 for Llama-3.1-8B, 576 instead of 960 for SmolLM2-135M. Such heads are *folded*: they
/// read the layer's input, and scores are the same but for rounding. Heads of other [forms](HeadForm) than
/// Locret's read it anyway.
#[derive(Debug, Clone)]
pub struct RetainingHeads {
    layers: Vec<Arc<dyn Perceptron>>,
    form: HeadForm,
    reads: HeadInput,
    inputs: usize,
    outputs: usize,
    fingerprint: String,
}

impl RetainingHeads {
    /// Puts heads where `compute` computes their layers, to read what heads of their form do: queries, keys and values for
    /// Locret's.
    ///
    /// # Errors
    /// [`PolicyError::Shape`](crate::PolicyError::Shape) for heads that don't fit `model`.
    pub fn new(
        weights: &HeadWeights,
        model: &ModelSpec,
        compute: &dyn Compute,
    ) -> crate::Result<Self> {
        weights.validate(model)?;
        let mut placing = Placing::new(weights.form, weights.form.reads(), model, compute);
        for head in &weights.layers {
            placing.add(head, &head.fc1)?;
        }
        Ok(placing.heads())
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
        let (spec, compute) = (model.spec(), &**model.compute());
        weights.validate(spec)?;
        let (hidden, features) = (spec.hidden, spec.layer(0).qkv_features());
        let narrower = hidden < features && weights.form.reads() == HeadInput::Qkv;
        let mut placing = Placing::new(weights.form, HeadInput::Layer, spec, compute);
        for (layer, head) in weights.layers.iter().enumerate() {
            let own = match narrower && spec.layer_input {
                true => model.qkv_weight(layer)?,
                false => None,
            };
            let Some(own) = own else {
                return Self::new(weights, spec, compute);
            };
            let features = [features, hidden];
            placing.add(
                head,
                &product(compute.for_layer(layer), head, &own, features)?,
            )?;
        }
        Ok(placing.heads())
    }

    /// What the heads compute.
    pub fn form(&self) -> HeadForm {
        self.form
    }

    /// What the heads read: [`scores`](Self::scores) takes that.
    pub fn reads(&self) -> HeadInput {
        self.reads
    }

    /// Whether heads that were trained on queries, keys and values read what a layer makes these from.
    pub fn folded(&self) -> bool {
        self.reads != self.form.reads()
    }

    /// SHA-256 of the weights that these heads were made of, as they were before any folding, in
    /// hexadecimal digits.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Causal importance scores of new tokens, `[tokens, kv_heads]` row-major; of [`HeadForm::Decay`] `ln β`.
    ///
    /// # Shapes
    /// - `parts`: queries, keys and values before rotation, `[tokens, heads * head_dim]`, and `[tokens,
    ///   kv_heads * head_dim]` twice; for heads that [read](Self::reads) the layer's input that, `[tokens,
    ///   hidden]`
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer or width that the heads don't have, [`Error::Device`].
    pub fn scores(&self, layer: usize, parts: &[&Rows]) -> Result<Vec<f32>> {
        self.rows(layer, parts)?.into_values()
    }

    /// The same scores where the layer is computed, so that nobody waits for a device.
    ///
    /// # Errors
    /// As [`scores`](Self::scores).
    pub fn rows(&self, layer: usize, parts: &[&Rows]) -> Result<Rows> {
        let head = self.layers.get(layer).ok_or_else(|| Error::Shape {
            what: "retaining heads",
            expected: format!("more than {layer} layers"),
            found: self.layers.len().to_string(),
        })?;
        head.apply(parts)
    }

    /// Checks that the heads fit a model.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn validate(&self, model: &ModelSpec) -> Result<()> {
        let inputs = self.reads.features(model);
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
}

/// Weights that are hashed at a time.
const HASHED: usize = 4096;

/// Heads on their way to where they are computed.
struct Placing<'a> {
    heads: RetainingHeads,
    compute: &'a dyn Compute,
    arena: Arena,
    hash: Sha256,
}

impl<'a> Placing<'a> {
    fn new(form: HeadForm, reads: HeadInput, model: &ModelSpec, compute: &'a dyn Compute) -> Self {
        Self {
            heads: RetainingHeads {
                layers: Vec::with_capacity(model.layers),
                form,
                reads,
                inputs: reads.features(model),
                outputs: model.kv_heads,
                fingerprint: String::new(),
            },
            compute,
            arena: Arena::default(),
            hash: Sha256::new(),
        }
    }

    /// The next layer's head, whose first matrix is `fc1`, `[d_R, inputs]`.
    fn add(&mut self, head: &LayerHead, fc1: &[f32]) -> Result<()> {
        self.hash.update((head.d_r as u64).to_le_bytes());
        for weights in head.lists().filter(|list| !list.is_empty()) {
            self.hash.update((weights.len() as u64).to_le_bytes());
            let mut bytes = Vec::with_capacity(4 * HASHED);
            for piece in weights.chunks(HASHED) {
                bytes.clear();
                bytes.extend(piece.iter().flat_map(|x| x.to_le_bytes()));
                self.hash.update(&bytes);
            }
        }
        let (form, outputs) = (self.heads.form, self.heads.outputs);
        let compute = self.compute.for_layer(self.heads.layers.len());
        let mut first = packed(fc1, head.d_r, self.heads.inputs, &mut self.arena);
        let placed: Arc<dyn Perceptron> = match form {
            HeadForm::Locret => compute.perceptron(first, head.fc2.clone())?,
            _ => {
                if !compute.computes_with(first.dtype) {
                    first = Weight::from_f32(fc1, head.d_r, self.heads.inputs);
                }
                let first = compute.matrix(vec![first])?;
                Arc::new(Formed::new(form, head, first, outputs))
            }
        };
        self.heads.layers.push(placed);
        Ok(())
    }

    fn heads(self) -> RetainingHeads {
        let digest = self.hash.finalize();
        RetainingHeads {
            fingerprint: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            ..self.heads
        }
    }
}

/// `fc1 · W`, `[d_R, hidden]`, of a head and the model's own matrix `[features, hidden]`.
fn product(
    compute: &dyn Compute,
    head: &LayerHead,
    own: &[f32],
    [features, hidden]: [usize; 2],
) -> Result<Vec<f32>> {
    if own.len() != features * hidden {
        return Err(Error::Shape {
            what: "a model's matrix for queries, keys and values",
            expected: format!("[{features}, {hidden}]"),
            found: format!("{} numbers", own.len()),
        });
    }
    let mut across = vec![0.0; own.len()];
    transpose(own, hidden, &mut across);
    let across = compute.matrix(vec![Weight::from_f32(&across, hidden, features)])?;
    let fc1 = compute.rows(head.fc1.clone(), features)?;
    across.apply(&fc1)?.into_values()
}

/// `[rows, columns]` in the smallest float type that holds every number.
pub(crate) fn packed(values: &[f32], rows: usize, columns: usize, arena: &mut Arena) -> Weight {
    let bf16s = values.iter().map(|x| bf16::from_f32(*x));
    let f16s = values.iter().map(|x| f16::from_f32(*x));
    let same = |(a, b): (f32, &f32)| a == *b;
    fn write<const N: usize>(to: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
        for (to, value) in to.chunks_exact_mut(N).zip(values) {
            to.copy_from_slice(&value);
        }
    }
    let dtype = if bf16s.clone().map(f32::from).zip(values).all(same) {
        DType::BF16
    } else if f16s.clone().map(f32::from).zip(values).all(same) {
        DType::F16
    } else {
        DType::F32
    };
    let mut bytes = arena.zeros(values.len() * dtype.block_bytes());
    match dtype {
        DType::BF16 => write(&mut bytes, bf16s.map(bf16::to_le_bytes)),
        DType::F16 => write(&mut bytes, f16s.map(f16::to_le_bytes)),
        _ => write(&mut bytes, values.iter().map(|x| x.to_le_bytes())),
    }
    Weight {
        dtype,
        rows,
        columns,
        bytes: bytes.freeze(),
    }
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
    use burn::tensor::Device;
    use locret_core::Kernels;

    const BOTH: [Kernels; 2] = [Kernels::Auto, Kernels::Operations];

    fn number(i: usize) -> f32 {
        ((i * 7919 % 1009) as f32 / 504.5 - 1.0) / 3.0
    }

    /// `fc1 (W x)` and `(fc1 W) x`, by kernels and by operations, of any shape.
    #[test]
    fn folded_heads_score_like_plain_ones() {
        for (d_r, features, hidden, tokens) in [(5, 12, 7, 3), (33, 80, 64, 40), (64, 100, 33, 9)] {
            let head = LayerHead {
                d_r,
                fc1: (0..d_r * features).map(number).collect(),
                fc2: (0..d_r * 2).map(|i| number(i + 5)).collect(),
                ..LayerHead::default()
            };
            let own: Vec<f32> = (0..features * hidden).map(|i| number(i + 9)).collect();
            let x: Vec<f32> = (0..tokens * hidden).map(|i| number(3 * i + 1)).collect();
            let mut all = Vec::new();
            for compute in BOTH.map(|kernels| kernels.on(&Device::flex())) {
                let folded = product(&*compute, &head, &own, [features, hidden]).unwrap();
                assert!(product(&*compute, &head, &own[1..], [features, hidden]).is_err());
                let matrix = Weight::from_f32(&own, features, hidden);
                let x = compute.rows(x.clone(), hidden).unwrap();
                let qkv = compute.matrix(vec![matrix]).unwrap().apply(&x).unwrap();
                for (fc1, inputs, x) in [(&head.fc1, features, &qkv), (&folded, hidden, &x)] {
                    let fc1 = packed(fc1, d_r, inputs, &mut Arena::default());
                    let head = compute.perceptron(fc1, head.fc2.clone()).unwrap();
                    all.push(head.apply(&[x]).unwrap().into_values().unwrap());
                }
            }
            for found in &all[1..] {
                assert_eq!(found.len(), all[0].len());
                for (a, b) in found.iter().zip(&all[0]) {
                    assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{a} and {b}");
                }
            }
        }
    }

    /// Both implementations, and what a 16-bit file becomes.
    #[test]
    fn kernels_and_operations_score_alike() {
        let spec = ModelSpec::new(1, 6, 2, 8, 8).with_head_dim(8);
        let inputs = spec.layer(0).qkv_features();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let round = |x: f32| match dtype {
                DType::F16 => f16::from_f32(x).to_f32(),
                DType::BF16 => bf16::from_f32(x).to_f32(),
                _ => x,
            };
            let numbers = |n: usize, from: usize| (from..from + n).map(|i| round(number(i)));
            let head = LayerHead {
                d_r: 33,
                fc1: numbers(33 * inputs, 0).collect(),
                fc2: numbers(33 * 2, 5).collect(),
                ..LayerHead::default()
            };
            let kept = packed(&head.fc1, 33, inputs, &mut Arena::default());
            assert_eq!(kept.dtype, dtype);
            let weights = HeadWeights {
                layers: vec![head],
                metadata: Default::default(),
                ..HeadWeights::default()
            };
            let heads = BOTH.map(|kernels| {
                RetainingHeads::new(&weights, &spec, &*kernels.on(&Device::flex())).unwrap()
            });
            for tokens in [1, 2, 40] {
                let part = |heads: usize, from: usize| {
                    let values = (0..tokens * heads * 8).map(|i| 4.0 * number(i + from));
                    Rows::new(values.collect(), heads * 8, &Device::flex()).unwrap()
                };
                let (q, k, v) = (part(6, 1), part(2, 2), part(2, 3));
                let [a, b] = heads
                    .each_ref()
                    .map(|heads| heads.scores(0, &[&q, &k, &v]).unwrap());
                assert_eq!(a.len(), tokens * 2);
                for (a, b) in a.iter().zip(&b) {
                    assert!((a - b).abs() < 1e-5, "{a} and {b}");
                }
                let uneven = q.slice(0..tokens.div_ceil(2)).unwrap();
                for heads in &heads {
                    assert!(heads.scores(1, &[&q, &k, &v]).is_err());
                    let bad = [
                        Some([&k, &k, &v]),
                        (tokens > 1).then_some([&uneven, &k, &v]),
                    ];
                    for parts in bad.into_iter().flatten() {
                        let found = heads.scores(0, &parts);
                        assert!(matches!(found, Err(Error::Shape { .. })));
                    }
                }
            }
        }
    }
}
