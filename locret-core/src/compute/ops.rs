//! Burn's operations, on any device.

use super::{Attention, Compute, Matrix, Perceptron, Rotation, Rows, Weight};
use crate::{
    DType, Error, KvStore, LayerSpec, Observation, Observe, Observed, Result, Survey, host,
    ids_tensor, stores::TensorStore,
};
use burn::tensor::{
    Bool, DType as TensorType, Device, FloatDType, Tensor, TensorData,
    activation::{silu, softmax},
    module,
    ops::AttentionModuleOptions,
};
use locret_kernels::rope::RopeTable;
use std::sync::Arc;

/// Computes with Burn's operations.
#[derive(Debug, Clone)]
pub struct Ops {
    device: Device,
}

impl Ops {
    /// On `device`.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
        }
    }

    /// A rotation, or what it undoes but for rounding.
    fn turn(&self, x: Tensor<2>, by: &Rotation<'_>, inverse: bool) -> Tensor<2> {
        let groups = by.groups();
        let group = x.dims()[1] / groups;
        let parts = (0..groups).map(|index| {
            let part = match groups {
                1 => x.clone(),
                _ => x.clone().narrow(1, index * group, group),
            };
            let row = |token| by.row(token, index);
            turn_rows(part, by.head_dim, by.table, row, inverse)
        });
        let mut parts: Vec<_> = parts.collect();
        match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::cat(parts, 1),
        }
    }
}

/// Rotates token `i` by row `row_of(i)` of the table.
fn turn_rows(
    x: Tensor<2>,
    dim: usize,
    table: &RopeTable,
    row_of: impl Fn(usize) -> usize,
    inverse: bool,
) -> Tensor<2> {
    let [t, width] = x.dims();
    let (heads, device) = (width / dim, x.device());
    let half = table.rotary_dim() / 2;
    // The table's cosines and sines have the factor in them: undoing divides by it twice.
    let factor = if inverse {
        1.0 / (table.factor() * table.factor())
    } else {
        1.0
    };
    let rows = |values: &[f32]| {
        let part = (0..t).flat_map(|i| {
            let at = row_of(i) * half;
            values[at..at + half].iter().map(|v| v * factor)
        });
        host::from_f32::<2>(part.collect(), [t, half], &device).reshape([t, 1, half])
    };
    let (cos, sin) = (rows(table.cos()), rows(table.sin()));
    let sin = if inverse { sin.neg() } else { sin };
    let x = x.reshape([t, heads, dim]);
    let (a, b) = (
        x.clone().narrow(2, 0, half),
        x.clone().narrow(2, half, half),
    );
    let mut parts = vec![
        a.clone() * cos.clone() - b.clone() * sin.clone(),
        b * cos + a * sin,
    ];
    if 2 * half < dim {
        parts.push(x.narrow(2, 2 * half, dim - 2 * half));
    }
    Tensor::cat(parts, 2).reshape([t, width])
}

fn normalised(x: Tensor<2>, gain: &Rows, epsilon: f32) -> Rows {
    let mean = x.clone().powi_scalar(2).mean_dim(1);
    let scaled = x / mean.add_scalar(epsilon).sqrt();
    (scaled * gain.tensor()).into()
}

impl Compute for Ops {
    fn name(&self) -> &'static str {
        "operations"
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn rows(&self, values: Vec<f32>, width: usize) -> Result<Rows> {
        let rows = Rows::new(values, width, &self.device)?;
        Ok(rows.into_tensor().into())
    }

    fn matrix(&self, parts: Vec<Weight>) -> Result<Arc<dyn Matrix>> {
        super::columns(&parts)?;
        let parts = parts.into_iter().map(|part| {
            let [rows, columns] = [part.rows, part.columns];
            let tensor = tensor(part, &self.device)?;
            if tensor.dims() != [rows, columns] {
                return Err(Error::shape("a matrix", [rows, columns], tensor.dims()));
            }
            Ok(tensor)
        });
        let mut parts = parts.collect::<Result<Vec<Tensor<2>>>>()?;
        if parts.windows(2).any(|two| two[0].dtype() != two[1].dtype()) {
            parts = parts.into_iter().map(full).collect();
        }
        // Transposed in memory once, so that no product has to walk it crosswise.
        let across = |part: Tensor<2>| part.transpose().mul_scalar(1.0);
        let mut parts: Vec<_> = parts.into_iter().map(across).collect();
        Ok(Arc::new(OpsMatrix(match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::cat(parts, 1),
        })))
    }

    fn computes_with(&self, dtype: DType) -> bool {
        of_tensors(dtype).is_some_and(|dtype| self.device.supports_dtype(dtype))
    }

    fn perceptron(&self, first: Weight, second: Vec<f32>) -> Result<Arc<dyn Perceptron>> {
        let inner = first.rows;
        let second = Rows::new(second, inner, &self.device)?.into_tensor();
        // Few numbers beside the model's: whole ones, so that none has to be made in every call.
        let first = full(tensor(first, &self.device)?);
        Ok(Arc::new(OpsPerceptron {
            first: first.transpose().mul_scalar(1.0),
            second: second.transpose().mul_scalar(1.0),
        }))
    }

    fn norm(&self, x: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
        gain.expect("gain of a norm", [1, x.width()])?;
        Ok(normalised(x.tensor(), gain, epsilon))
    }

    fn add_norm(&self, x: &mut Rows, y: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
        gain.expect("gain of a norm", [1, x.width()])?;
        y.expect("rows to be added", x.shape())?;
        let sum = x.tensor() + y.tensor();
        *x = sum.clone().into();
        Ok(normalised(sum, gain, epsilon))
    }

    fn gate(&self, gate_up: &Rows) -> Result<Rows> {
        let [_, width] = super::gated(gate_up)?;
        let gate_up = gate_up.tensor();
        let gate = gate_up.clone().narrow(1, 0, width);
        Ok((silu(gate) * gate_up.narrow(1, width, width)).into())
    }

    fn rotate(&self, x: Rows, by: &Rotation<'_>) -> Result<Rows> {
        by.check(x.shape())?;
        if x.rows() == 0 {
            return Ok(x);
        }
        let x = x.into_tensor();
        if !by.inverse {
            return Ok(self.turn(x, by, false).into());
        }
        let first = self.turn(x.clone(), by, true);
        let missing = x - self.turn(first.clone(), by, false);
        Ok((first + self.turn(missing, by, true)).into())
    }

    fn attend(&self, q: Rows, over: &Attention<'_>) -> Result<Rows> {
        over.check(&q)?;
        if let Some(sight) = over.sight {
            return self.attend_masked(q, over, sight);
        }
        let t = q.rows();
        let (g, d) = (over.layer.group(), over.layer.head_dim);
        // The backends' fused kernels want the default scale.
        let scaled = over.scale * (d as f32).sqrt();
        let q = q.into_tensor();
        let q = if (scaled - 1.0).abs() < 1e-6 {
            q
        } else {
            q.mul_scalar(scaled)
        };
        let mut out = Vec::with_capacity(over.layer.kv_heads);
        for head in 0..over.layer.kv_heads {
            let keys = self.rotated_keys(over, head, None)?;
            let values = over.store.values(head)?.into_tensor();
            let n = keys.dims()[0];
            let q = grouped(&q, head, g, d).unsqueeze::<4>();
            let expand = |x: Tensor<2>| x.reshape([1, 1, n, d]).expand([1, g, n, d]);
            let options = AttentionModuleOptions {
                is_causal: true,
                ..Default::default()
            };
            let attended = module::attention(q, expand(keys), expand(values), None, None, options);
            let rows = attended.reshape([g, t, d]).swap_dims(0, 1);
            out.push(rows.reshape([t, g * d]));
        }
        Ok(Tensor::cat(out, 1).into())
    }

    fn observe(
        &self,
        q: &Rows,
        over: &Attention<'_>,
        what: Observe,
        factors: Option<&[f32]>,
    ) -> Result<Observed> {
        over.check(q)?;
        let queries = what.queries.count(q.rows());
        super::check_factors(what.what, queries, factors)?;
        let gather = Gather::new(what.what, factors, over.layer.group());
        if let Some(sight) = over.sight {
            return self.observe_masked(q, over, sight, what, &gather);
        }
        let (q, mut per_head) = (q.tensor(), Vec::new());
        for head in 0..over.layer.kv_heads {
            per_head.extend(self.observe_head(&q, over, &gather, queries, head)?);
        }
        Ok(Observed {
            per_head,
            queries,
            what: what.what,
        })
    }

    fn survey(&self, q: &Rows, over: &Attention<'_>, last: usize) -> Result<Survey> {
        over.check(q)?;
        self.survey_all(q, over, last)
    }

    fn store(&self, layer: &LayerSpec, dtype: DType) -> Result<Box<dyn KvStore>> {
        let float = match dtype {
            DType::F32 => FloatDType::F32,
            DType::F16 => FloatDType::F16,
            DType::BF16 => FloatDType::BF16,
            other => return Err(super::no_store(other)),
        };
        Ok(Box::new(TensorStore::new(
            layer,
            &self.device,
            dtype,
            float,
        )))
    }
}

impl Ops {
    /// The keys of a KV head, rotated; `places` say where its units stand, if not where they lie.
    pub(super) fn rotated_keys(
        &self,
        over: &Attention<'_>,
        head: usize,
        places: Option<&[u32]>,
    ) -> Result<Tensor<2>> {
        let keys = over.store.keys(head)?;
        let Some(table) = over.rotation else {
            return Ok(keys.into_tensor());
        };
        let by = Rotation::placed(table, over.layer.head_dim, places);
        Ok(self.rotate(keys, &by)?.into_tensor())
    }

    /// What the last `count` queries pay to the units of one KV head.
    fn observe_head(
        &self,
        q: &Tensor<2>,
        over: &Attention<'_>,
        gather: &Gather<'_>,
        count: usize,
        head: usize,
    ) -> Result<Vec<Vec<f32>>> {
        /// Rows of a block: bounds the score matrix to `group · BLOCK · units`.
        const BLOCK: usize = 256;
        let (g, d, t) = (over.layer.group(), over.layer.head_dim, q.dims()[0]);
        let keys = self.rotated_keys(over, head, None)?;
        let n = keys.dims()[0];
        let q = grouped(q, head, g, d);
        let keys = keys.transpose().unsqueeze::<3>();
        let mut all: Option<Tensor<2>> = None;
        for start in (t - count..t).step_by(BLOCK) {
            let block = BLOCK.min(t - start);
            let scores = q
                .clone()
                .narrow(1, start, block)
                .matmul(keys.clone())
                .mul_scalar(over.scale);
            // Query `i` sees units up to `n - t + i`.
            let hidden: Vec<bool> = (start..start + block)
                .flat_map(|i| (0..n).map(move |unit| unit > n - t + i))
                .collect();
            let hidden = TensorData::new(hidden, [1, block, n]);
            let hidden = Tensor::<3, Bool>::from_data(hidden, &scores.device());
            let scores = scores.mask_fill(hidden.expand([g, block, n]), f32::NEG_INFINITY);
            let first = start - (t - count);
            // All of it is seen where it stands.
            let part = match gather.logits() {
                true => gather.largest(scores),
                false => gather.weights(softmax(scores, 2), first),
            };
            all = Some(gather.and(all, part));
        }
        gather.lists(all, n)
    }
}

/// What is gathered of observed scores of a KV head, `[group, queries, units]`.
pub(super) struct Gather<'a> {
    what: Observation,
    factors: Option<&'a [f32]>,
    group: usize,
}

impl<'a> Gather<'a> {
    fn new(what: Observation, factors: Option<&'a [f32]>, group: usize) -> Self {
        Self {
            what,
            factors,
            group,
        }
    }

    /// Whether it is scores before the softmax, and weights otherwise.
    pub(super) fn logits(&self) -> bool {
        self.what == Observation::MaxLogits
    }

    /// Of scores before the softmax, `[1, units]`.
    pub(super) fn largest(&self, scores: Tensor<3>) -> Tensor<2> {
        let [g, queries, n] = scores.dims();
        scores
            .reshape([1, g * queries, n])
            .max_dim(1)
            .reshape([1, n])
    }

    /// Of weights, `[group, units]`; the first query is number `first` of those that are observed.
    pub(super) fn weights(&self, weights: Tensor<3>, first: usize) -> Tensor<2> {
        let [g, queries, n] = weights.dims();
        let part = match (self.what, self.factors) {
            (Observation::Weights | Observation::NearWeights, _) => weights.sum_dim(1),
            (_, None) => weights.max_dim(1),
            (_, Some(factors)) => {
                let factors = factors[first..first + queries].to_vec();
                let factors = host::from_f32::<2>(factors, [queries, 1], &weights.device());
                (weights * factors.reshape([1, queries, 1])).max_dim(1)
            }
        };
        part.reshape([g, n])
    }

    /// Two parts together.
    pub(super) fn and(&self, all: Option<Tensor<2>>, part: Tensor<2>) -> Tensor<2> {
        match (all, self.what) {
            (None, _) => part,
            (Some(all), Observation::Weights | Observation::NearWeights) => all + part,
            (Some(all), _) => all.max_pair(part),
        }
    }

    /// By head, of `n` units.
    pub(super) fn lists(&self, all: Option<Tensor<2>>, n: usize) -> Result<Vec<Vec<f32>>> {
        let Some(all) = all else {
            return Ok(match self.logits() {
                true => vec![vec![f32::NEG_INFINITY; n]],
                false => vec![vec![0.0; n]; self.group],
            });
        };
        let flat = host::into_f32(all)?;
        Ok(flat.chunks(n.max(1)).map(<[f32]>::to_vec).collect())
    }
}

/// The queries of one KV head's group, `[g, tokens, d]`.
pub(super) fn grouped(q: &Tensor<2>, head: usize, g: usize, d: usize) -> Tensor<3> {
    let t = q.dims()[0];
    q.clone()
        .narrow(1, head * g * d, g * d)
        .reshape([t, g, d])
        .swap_dims(0, 1)
}

/// Burn's name for a type, if it has it.
fn of_tensors(dtype: DType) -> Option<TensorType> {
    match dtype {
        DType::F32 => Some(TensorType::F32),
        DType::F16 => Some(TensorType::F16),
        DType::BF16 => Some(TensorType::BF16),
        _ => None,
    }
}

/// A matrix in the type that it has.
fn tensor(part: Weight, device: &Device) -> Result<Tensor<2>> {
    let Weight {
        dtype,
        rows,
        columns,
        bytes,
    } = part;
    let kind = of_tensors(dtype).filter(|kind| device.supports_dtype(*kind));
    let kind = kind.ok_or_else(|| super::no_matrix("Burn's operations", dtype))?;
    let due = dtype.bytes(columns).and_then(|row| row.checked_mul(rows));
    if due != Some(bytes.len()) {
        let expected = format!("[{rows}, {columns}] of {dtype}");
        let found = format!("{} bytes", bytes.len());
        return Err(Error::shape("a matrix of weights", expected, found));
    }
    let data = TensorData::from_bytes_vec(bytes.to_vec(), [rows, columns], kind);
    Ok(Tensor::from_data(data, (device, kind)))
}

/// A tensor as 32-bit values; itself if it is.
pub(crate) fn full(x: Tensor<2>) -> Tensor<2> {
    match x.dtype() == TensorType::F32 {
        true => x,
        false => x.cast(FloatDType::F32),
    }
}

/// `[inputs, outputs]`
#[derive(Debug)]
struct OpsMatrix(Tensor<2>);

impl Matrix for OpsMatrix {
    fn shape(&self) -> [usize; 2] {
        let [inputs, outputs] = self.0.dims();
        [outputs, inputs]
    }

    fn apply_parts(&self, x: &Rows, widths: &[usize]) -> Result<Vec<Rows>> {
        super::check_product(self.shape(), x, widths)?;
        let y = x.tensor().matmul(full(self.0.clone()));
        Ok(super::divided(y, widths))
    }

    fn rows(&self, ids: &[u32]) -> Result<Rows> {
        let [rows, _] = self.shape();
        if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
            return Err(super::no_row(*id, self.shape()));
        }
        let ids = ids_tensor(ids, &self.0.device());
        let columns = self.0.clone().select(1, ids);
        Ok(full(columns).transpose().into())
    }

    fn values(&self) -> Result<Vec<f32>> {
        host::into_f32(full(self.0.clone()).transpose())
    }
}

/// `[inputs, inner]` and `[inner, outputs]`.
#[derive(Debug)]
struct OpsPerceptron {
    first: Tensor<2>,
    second: Tensor<2>,
}

impl Perceptron for OpsPerceptron {
    fn shape(&self) -> [usize; 3] {
        let [inputs, inner] = self.first.dims();
        [inputs, inner, self.second.dims()[1]]
    }

    fn apply(&self, parts: &[&Rows]) -> Result<Rows> {
        super::check_parts(self.shape(), parts)?;
        let parts = parts.iter().map(|part| part.tensor()).collect();
        let input = Tensor::cat(parts, 1);
        Ok(silu(input.matmul(self.first.clone()))
            .matmul(self.second.clone())
            .into())
    }
}
