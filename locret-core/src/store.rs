//! Where keys and values lie.
//!
//! A store holds the units of one layer, head by head, and does three things to them: append, keep
//! some, hand out. It knows nothing of positions, scores or policies.

use crate::{
    Error, LayerSpec, Result, host,
    kernels::{
        select::compact_rows,
        tiles::{DenseTiles, KvTiles},
    },
};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use half::{bf16, f16};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;

/// Makes other keys of one head's keys; see [`KvStore::turn_keys`].
pub type TurnKeys<'a> = dyn Fn(usize, Tensor<2>) -> Result<Tensor<2>> + 'a;

/// Units of one layer.
///
/// Heads are appended to together and can be cut back differently; unit numbers of a head run from
/// 0 in sequence order.
pub trait KvStore: Debug + Send + Sync {
    /// A short name for tables and messages.
    fn name(&self) -> String;

    /// Adds new units to every head.
    ///
    /// `keys` and `values` are `[tokens, kv_heads * head_dim]`, token-major.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Device`].
    fn append(&mut self, keys: Tensor<2>, values: Tensor<2>) -> Result<()>;

    /// Keeps the named units of each head, in the order they are in, and frees the rest.
    ///
    /// `kept` has one strictly ascending list per head. Survivors are bit-identical to what they
    /// were.
    ///
    /// # Errors
    /// [`Error::Shape`] for a wrong number of lists, [`Error::Setting`] for a list that is not
    /// strictly ascending or names a unit that is not there. Nothing has changed then.
    fn retain(&mut self, kept: &[Vec<u32>]) -> Result<()>;

    /// Units that `head` holds.
    fn len(&self, head: usize) -> usize;

    /// Whether no head holds anything.
    fn is_empty(&self) -> bool;

    /// Bytes that keys and values occupy now, allocated reserve included.
    fn bytes(&self) -> usize;

    /// The keys of one head as appended, `[units, head_dim]`, f32 where the store has less.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn keys(&self, head: usize) -> Result<Tensor<2>>;

    /// The values of one head, `[units, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn values(&self, head: usize) -> Result<Tensor<2>>;

    /// One head's units in host memory, for the CPU kernels; `None` if they lie elsewhere.
    fn tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>>;

    /// Replaces the keys of each head, `[units, head_dim]`, by what `turn(head, keys)` makes of
    /// them: another rotation of the same keys.
    ///
    /// Returns `false`, having done nothing, where storing the result would lose precision (16-bit
    /// and quantised stores): attention then rotates while it loads.
    ///
    /// # Errors
    /// Those of `turn`, [`Error::Device`].
    fn turn_keys(&mut self, _turn: &TurnKeys<'_>) -> Result<bool> {
        Ok(false)
    }

    /// Called when the step of this layer is over: attention is done, and what the policy dropped
    /// is gone. Only here may a store change the form in which it keeps units.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn settle(&mut self) -> Result<()> {
        Ok(())
    }

    /// Mixes values of units of one head into others': the value of a unit `into` becomes
    /// `(1 - Σ share) · own + Σ share · value of from` over all folds into it. Every value is read
    /// as it was before the call. Keys stay.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if this store does not do it, [`Error::Setting`] for a unit that is
    /// not there.
    fn fold_values(&mut self, _head: usize, _folds: &[Fold]) -> Result<()> {
        Err(Error::NotSupported {
            operation: "merging units",
            implementer: format!("the store {}", self.name()),
        })
    }

    /// A copy that shares nothing that either may change.
    fn fork(&self) -> Box<dyn KvStore>;
}

/// One unit's value mixed into another's; see [`KvStore::fold_values`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fold {
    /// The unit whose value is given.
    pub from: u32,
    /// The unit that takes a share of it.
    pub into: u32,
    /// How much of the sum it is, from 0 to 1.
    pub share: f32,
}

/// The type that a dense store keeps values in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// 32-bit.
    #[default]
    F32,
    /// IEEE half.
    F16,
    /// Brain float.
    Bf16,
}

impl KvDtype {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Where and how a store should keep its units.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The model's device.
    pub device: Device,
    /// The type of dense values.
    pub dtype: KvDtype,
    /// Whether the CPU kernels are to be used, on host memory.
    pub host: bool,
}

/// The dense store: every value as it is, in 32 or 16 bits.
#[derive(Debug, Clone, Copy)]
pub struct Dense;

impl Dense {
    /// An empty dense store: host memory for the CPU kernels, tensors elsewhere.
    pub fn boxed(layer: &LayerSpec, place: &Placement) -> Box<dyn KvStore> {
        if !place.host {
            return Box::new(TensorStore::new(layer, place));
        }
        match place.dtype {
            KvDtype::F32 => Box::new(HostStore::<f32>::new(layer, &place.device)),
            KvDtype::F16 => Box::new(HostStore::<f16>::new(layer, &place.device)),
            KvDtype::Bf16 => Box::new(HostStore::<bf16>::new(layer, &place.device)),
        }
    }
}

/// Checks what is appended and returns the number of tokens.
pub(crate) fn check_append(
    keys: &Tensor<2>,
    values: &Tensor<2>,
    heads: usize,
    dim: usize,
) -> Result<usize> {
    let t = keys.dims()[0];
    host::expect_dims("keys", keys, [t, heads * dim])?;
    host::expect_dims("values", values, [t, heads * dim])?;
    Ok(t)
}

/// Checks what is to be kept against what is there.
pub(crate) fn check_retain(kept: &[Vec<u32>], lens: impl Iterator<Item = usize>) -> Result<()> {
    let lens: Vec<usize> = lens.collect();
    if kept.len() != lens.len() {
        return Err(Error::shape("selection", [lens.len()], [kept.len()]));
    }
    for (head, (list, len)) in kept.iter().zip(lens).enumerate() {
        if let Some(w) = list.windows(2).find(|w| w[0] >= w[1]) {
            return Err(Error::setting(
                "selection",
                format!("strictly ascending unit numbers in KV head {head}"),
                format!("{} after {}", w[1], w[0]),
            ));
        }
        if let Some(&unit) = list.last()
            && unit as usize >= len
        {
            return Err(Error::setting(
                "selection",
                format!("unit numbers below {len} in KV head {head}"),
                unit,
            ));
        }
    }
    Ok(())
}

/// Checks what is to be folded against the number of units.
pub(crate) fn check_folds(folds: &[Fold], len: usize) -> Result<()> {
    let units = folds.iter().flat_map(|f| [f.from, f.into]);
    match units.max() {
        Some(unit) if unit as usize >= len => Err(Error::setting(
            "fold",
            format!("unit numbers below {len}"),
            unit,
        )),
        _ => Ok(()),
    }
}

/// The new values of units that others are folded into, from the old values.
pub(crate) fn folded(folds: &[Fold], value: impl Fn(u32) -> Vec<f32>) -> Vec<(u32, Vec<f32>)> {
    let mut folds = folds.to_vec();
    folds.sort_by_key(|fold| fold.into);
    folds
        .chunk_by(|a, b| a.into == b.into)
        .map(|folds| {
            let mut sum = value(folds[0].into);
            let own = 1.0 - folds.iter().map(|fold| fold.share).sum::<f32>();
            sum.iter_mut().for_each(|x| *x *= own);
            for fold in folds {
                for (to, from) in sum.iter_mut().zip(value(fold.from)) {
                    *to += fold.share * from;
                }
            }
            (folds[0].into, sum)
        })
        .collect()
}

/// A value of a host store.
trait HostValue: bytemuck::Pod + Send + Sync + Debug + 'static {
    /// Whether f32 values are kept as they are.
    const EXACT: bool = false;
    fn from_f32(x: f32) -> Self;
    fn to_f32(self) -> f32;
    fn tiles<'a>(keys: &'a [Self], values: &'a [Self], dim: usize) -> Box<dyn KvTiles + 'a>;
    fn name() -> &'static str;
    fn into_f32s(values: Vec<Self>) -> Vec<f32> {
        values.into_iter().map(Self::to_f32).collect()
    }
    fn from_f32s(values: Vec<f32>) -> Vec<Self> {
        values.into_iter().map(Self::from_f32).collect()
    }
}

impl HostValue for f32 {
    const EXACT: bool = true;
    fn from_f32(x: f32) -> Self {
        x
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn tiles<'a>(keys: &'a [Self], values: &'a [Self], dim: usize) -> Box<dyn KvTiles + 'a> {
        Box::new(DenseTiles::new(keys, values, dim))
    }
    fn name() -> &'static str {
        "f32"
    }
    fn into_f32s(values: Vec<Self>) -> Vec<f32> {
        values
    }
    fn from_f32s(values: Vec<f32>) -> Vec<Self> {
        values
    }
}

impl HostValue for f16 {
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    fn tiles<'a>(keys: &'a [Self], values: &'a [Self], dim: usize) -> Box<dyn KvTiles + 'a> {
        Box::new(DenseTiles::new(keys, values, dim))
    }
    fn name() -> &'static str {
        "f16"
    }
}

impl HostValue for bf16 {
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    fn tiles<'a>(keys: &'a [Self], values: &'a [Self], dim: usize) -> Box<dyn KvTiles + 'a> {
        Box::new(DenseTiles::new(keys, values, dim))
    }
    fn name() -> &'static str {
        "bf16"
    }
}

/// Dense units in host memory, one buffer for the keys and one for the values of each head.
#[derive(Debug, Clone)]
struct HostStore<T> {
    heads: Vec<(Vec<T>, Vec<T>)>,
    dim: usize,
    device: Device,
}

/// How many units a buffer grows by when single tokens are appended.
const DECODE_RESERVE: usize = 64;

impl<T: HostValue> HostStore<T> {
    fn new(layer: &LayerSpec, device: &Device) -> Self {
        Self {
            heads: (0..layer.kv_heads).map(|_| Default::default()).collect(),
            dim: layer.head_dim,
            device: device.clone(),
        }
    }

    fn tensor(&self, values: &[T]) -> Tensor<2> {
        let rows = values.len() / self.dim;
        let values = values.iter().map(|x| x.to_f32()).collect();
        host::from_f32(values, [rows, self.dim], &self.device)
    }
}

impl<T: HostValue> KvStore for HostStore<T> {
    fn name(&self) -> String {
        T::name().into()
    }

    fn append(&mut self, keys: Tensor<2>, values: Tensor<2>) -> Result<()> {
        let (g, d) = (self.heads.len(), self.dim);
        let t = check_append(&keys, &values, g, d)?;
        let (keys, values) = (host::into_f32(keys)?, host::into_f32(values)?);
        for (head, (k, v)) in self.heads.iter_mut().enumerate() {
            for (to, from) in [(k, &keys), (v, &values)] {
                if to.capacity() - to.len() < t * d {
                    // Exact for a chunk, so that memory is what the bound says; in steps for
                    // single tokens, so that decoding does not copy the cache for every one.
                    to.reserve_exact(if t == 1 { DECODE_RESERVE } else { t } * d);
                }
                for row in 0..t {
                    let at = (row * g + head) * d;
                    to.extend(from[at..at + d].iter().map(|x| T::from_f32(*x)));
                }
            }
        }
        Ok(())
    }

    fn retain(&mut self, kept: &[Vec<u32>]) -> Result<()> {
        let d = self.dim;
        let lens: Vec<usize> = self.heads.iter().map(|(k, _)| k.len() / d).collect();
        check_retain(kept, lens.iter().copied())?;
        let retain = |buffer: &mut Vec<T>, list: &[u32]| {
            let dropped = buffer.len() / d - list.len();
            let spare = buffer.capacity() / d - buffer.len() / d;
            compact_rows(buffer, d, list);
            // Dropping one unit per generated token must not copy the cache each time: it stays in
            // the reserve, where there is one.
            if dropped > 1 || spare == 0 || spare + dropped > DECODE_RESERVE {
                buffer.shrink_to_fit();
            }
        };
        let heads = self.heads.iter_mut().zip(kept);
        let buffers = heads.flat_map(|((k, v), list)| [(k, list), (v, list)]);
        // A head's whole share is moved at the end of a chunk, next to nothing for a single token.
        if kept
            .iter()
            .zip(&lens)
            .any(|(list, len)| len - list.len() > 1)
        {
            let buffers: Vec<_> = buffers.collect();
            buffers
                .into_par_iter()
                .for_each(|(b, list)| retain(b, list));
        } else {
            buffers.for_each(|(b, list)| retain(b, list));
        }
        Ok(())
    }

    fn len(&self, head: usize) -> usize {
        self.heads[head].0.len() / self.dim
    }

    fn is_empty(&self) -> bool {
        self.heads.iter().all(|(k, _)| k.is_empty())
    }

    fn bytes(&self) -> usize {
        let values: usize = self
            .heads
            .iter()
            .map(|(k, v)| k.capacity() + v.capacity())
            .sum();
        values * size_of::<T>()
    }

    fn keys(&self, head: usize) -> Result<Tensor<2>> {
        Ok(self.tensor(&self.heads[head].0))
    }

    fn values(&self, head: usize) -> Result<Tensor<2>> {
        Ok(self.tensor(&self.heads[head].1))
    }

    fn tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>> {
        let (k, v) = &self.heads[head];
        Some(T::tiles(k, v, self.dim))
    }

    fn turn_keys(&mut self, turn: &TurnKeys<'_>) -> Result<bool> {
        if !T::EXACT {
            return Ok(false);
        }
        for head in 0..self.heads.len() {
            let keys = std::mem::take(&mut self.heads[head].0);
            let rows = keys.len() / self.dim;
            if rows > 0 {
                let keys = host::from_f32(T::into_f32s(keys), [rows, self.dim], &self.device);
                self.heads[head].0 = T::from_f32s(host::into_f32(turn(head, keys)?)?);
            }
        }
        Ok(true)
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        let d = self.dim;
        let values = &mut self.heads[head].1;
        check_folds(folds, values.len() / d)?;
        let row = |unit: u32| unit as usize * d..(unit as usize + 1) * d;
        let new = folded(folds, |unit| {
            values[row(unit)].iter().map(|x| x.to_f32()).collect()
        });
        for (unit, value) in new {
            for (to, from) in values[row(unit)].iter_mut().zip(value) {
                *to = T::from_f32(from);
            }
        }
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvStore> {
        Box::new(self.clone())
    }
}

/// Dense units as tensors of any device, one tensor for the keys and one for the values of each
/// head.
#[derive(Debug, Clone)]
struct TensorStore {
    /// `[units, head_dim]` each.
    heads: Vec<(Tensor<2>, Tensor<2>)>,
    dim: usize,
    dtype: KvDtype,
    device: Device,
}

impl TensorStore {
    fn new(layer: &LayerSpec, place: &Placement) -> Self {
        let empty = || {
            Self::stored(
                place.dtype,
                Tensor::zeros([0, layer.head_dim], &place.device),
            )
        };
        Self {
            heads: (0..layer.kv_heads).map(|_| (empty(), empty())).collect(),
            dim: layer.head_dim,
            dtype: place.dtype,
            device: place.device.clone(),
        }
    }

    fn stored(dtype: KvDtype, tensor: Tensor<2>) -> Tensor<2> {
        match dtype {
            KvDtype::F32 => tensor,
            KvDtype::F16 => tensor.cast(FloatDType::F16),
            KvDtype::Bf16 => tensor.cast(FloatDType::BF16),
        }
    }

    fn full(tensor: &Tensor<2>) -> Tensor<2> {
        if tensor.dtype() == DType::F32 {
            tensor.clone()
        } else {
            tensor.clone().cast(FloatDType::F32)
        }
    }
}

impl KvStore for TensorStore {
    fn name(&self) -> String {
        match self.dtype {
            KvDtype::F32 => "f32",
            KvDtype::F16 => "f16",
            KvDtype::Bf16 => "bf16",
        }
        .into()
    }

    fn append(&mut self, keys: Tensor<2>, values: Tensor<2>) -> Result<()> {
        let d = self.dim;
        check_append(&keys, &values, self.heads.len(), d)?;
        for (head, (k, v)) in self.heads.iter_mut().enumerate() {
            for (to, from) in [(k, &keys), (v, &values)] {
                let new = from.clone().narrow(1, head * d, d);
                let new = Self::stored(self.dtype, new);
                *to = if to.dims()[0] == 0 {
                    // A copy, so that the chunk that it is a part of can be freed.
                    new.mul_scalar(1.0)
                } else {
                    Tensor::cat(vec![to.clone(), new], 0)
                };
            }
        }
        Ok(())
    }

    fn retain(&mut self, kept: &[Vec<u32>]) -> Result<()> {
        check_retain(kept, self.heads.iter().map(|(k, _)| k.dims()[0]))?;
        for ((k, v), list) in self.heads.iter_mut().zip(kept) {
            if list.len() == k.dims()[0] {
                continue;
            }
            if list.is_empty() {
                let empty = Tensor::zeros([0, self.dim], &self.device);
                *k = Self::stored(self.dtype, empty);
                *v = k.clone();
                continue;
            }
            let rows: Vec<i32> = list.iter().map(|u| *u as i32).collect();
            let rows =
                Tensor::<1, Int>::from_data(TensorData::new(rows, [list.len()]), &self.device);
            *k = k.clone().select(0, rows.clone());
            *v = v.clone().select(0, rows);
        }
        Ok(())
    }

    fn len(&self, head: usize) -> usize {
        self.heads[head].0.dims()[0]
    }

    fn is_empty(&self) -> bool {
        self.heads.iter().all(|(k, _)| k.dims()[0] == 0)
    }

    fn bytes(&self) -> usize {
        let units: usize = self.heads.iter().map(|(k, _)| k.dims()[0]).sum();
        2 * units * self.dim * self.dtype.bytes()
    }

    fn keys(&self, head: usize) -> Result<Tensor<2>> {
        Ok(Self::full(&self.heads[head].0))
    }

    fn values(&self, head: usize) -> Result<Tensor<2>> {
        Ok(Self::full(&self.heads[head].1))
    }

    fn tiles(&self, _head: usize) -> Option<Box<dyn KvTiles + '_>> {
        None
    }

    fn turn_keys(&mut self, turn: &TurnKeys<'_>) -> Result<bool> {
        if self.dtype != KvDtype::F32 {
            return Ok(false);
        }
        for (head, (k, _)) in self.heads.iter_mut().enumerate() {
            *k = turn(head, k.clone())?;
        }
        Ok(true)
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        let d = self.dim;
        let values = &mut self.heads[head].1;
        check_folds(folds, values.dims()[0])?;
        let old = host::into_f32(Self::full(values))?;
        let new = folded(folds, |unit| old[unit as usize * d..][..d].to_vec());
        let mut all = old.clone();
        for (unit, value) in new {
            all[unit as usize * d..][..d].copy_from_slice(&value);
        }
        let all = host::from_f32(all, values.dims(), &self.device);
        *values = Self::stored(self.dtype, all);
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvStore> {
        Box::new(self.clone())
    }
}
