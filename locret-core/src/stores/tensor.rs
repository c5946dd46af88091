//! Dense units as tensors.

use super::{
    Fold, Growth, KvStore, TurnKeys, check_append, check_folds, check_retain, folded,
    growth::TensorGrowth, saved,
};
use crate::{DType, LayerSpec, Result, Rows, compute::full, host};
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use half::{bf16, f16};
use locret_kernels::dtype::Number;
use std::io::{Read, Take, Write};

/// Dense units as tensors of any device, one tensor for the keys and one for the values of each
/// head.
#[derive(Debug, Clone)]
pub(crate) struct TensorStore {
    /// `[units, head_dim]` each.
    heads: Vec<(Tensor<2>, Tensor<2>)>,
    dim: usize,
    dtype: DType,
    float: FloatDType,
    device: Device,
}

impl TensorStore {
    pub(crate) fn new(layer: &LayerSpec, device: &Device, dtype: DType, float: FloatDType) -> Self {
        let mut store = Self {
            heads: Vec::new(),
            dim: layer.head_dim,
            dtype,
            float,
            device: device.clone(),
        };
        store.heads = vec![(store.empty(), store.empty()); layer.kv_heads];
        store
    }

    fn empty(&self) -> Tensor<2> {
        self.stored(Tensor::zeros([0, self.dim], &self.device))
    }

    /// As it is kept.
    fn stored(&self, tensor: Tensor<2>) -> Tensor<2> {
        match self.dtype {
            DType::F32 => tensor,
            _ => tensor.cast(self.float),
        }
    }

    /// Rows with some mixed into others, in 32 bits.
    fn folded_rows(&self, rows: &Tensor<2>, folds: &[Fold]) -> Result<Tensor<2>> {
        let d = self.dim;
        check_folds(folds, rows.dims()[0])?;
        let mut all = host::into_f32(full(rows.clone()))?;
        for (unit, mixed) in folded(folds, |unit| all[unit as usize * d..][..d].to_vec()) {
            all[unit as usize * d..][..d].copy_from_slice(&mixed);
        }
        Ok(self.stored(Rows::new(all, d, &self.device)?.into_tensor()))
    }
}

impl KvStore for TensorStore {
    fn name(&self) -> String {
        saved::name(self.dtype)
    }

    fn append(&mut self, keys: &Rows, values: &Rows) -> Result<()> {
        let d = self.dim;
        check_append(keys, values, self.heads.len(), d)?;
        let parts = [keys.tensor(), values.tensor()].map(|part| self.stored(part));
        for (head, (k, v)) in self.heads.iter_mut().enumerate() {
            for (to, from) in [(k, &parts[0]), (v, &parts[1])] {
                let new = from.clone().narrow(1, head * d, d);
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
        let empty = self.empty();
        for ((k, v), list) in self.heads.iter_mut().zip(kept) {
            if list.len() == k.dims()[0] {
                continue;
            }
            if list.is_empty() {
                (*k, *v) = (empty.clone(), empty.clone());
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
        2 * units * self.dim * self.dtype.block_bytes()
    }

    fn growth(&self) -> Box<dyn Growth> {
        let value = self.dtype.block_bytes();
        Box::new(TensorGrowth::new(self.heads.len(), self.dim, value))
    }

    fn keys(&self, head: usize) -> Result<Rows> {
        Ok(full(self.heads[head].0.clone()).into())
    }

    fn values(&self, head: usize) -> Result<Rows> {
        Ok(full(self.heads[head].1.clone()).into())
    }

    fn turns_keys(&self) -> bool {
        self.dtype == DType::F32
    }

    fn turn_keys(&mut self, turn: &TurnKeys<'_>) -> Result<()> {
        if !self.turns_keys() {
            return Err(super::no_turn(&self.name()));
        }
        for (head, (k, _)) in self.heads.iter_mut().enumerate() {
            *k = turn(head, k.clone().into())?.into_tensor();
        }
        Ok(())
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        self.heads[head].1 = self.folded_rows(&self.heads[head].1, folds)?;
        Ok(())
    }

    fn folds_keys(&self) -> bool {
        true
    }

    fn fold_keys(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        self.heads[head].0 = self.folded_rows(&self.heads[head].0, folds)?;
        Ok(())
    }

    fn write(&self, to: &mut dyn Write) -> Result<()> {
        saved::write_header(to, &self.name(), self.heads.len(), self.dim)?;
        for (keys, values) in &self.heads {
            saved::write_count(to, keys.dims()[0])?;
            for part in [keys, values] {
                let part = host::into_f32(full(part.clone()))?;
                match self.dtype {
                    DType::F16 => saved::write(to, &f16::from_f32s(part))?,
                    DType::BF16 => saved::write(to, &bf16::from_f32s(part))?,
                    _ => saved::write(to, &part)?,
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, from: &mut Take<&mut dyn Read>) -> Result<()> {
        saved::read_header(from, &self.name(), self.heads.len(), self.dim)?;
        let mut heads = Vec::with_capacity(self.heads.len());
        for _ in 0..self.heads.len() {
            let units = saved::read_count(from, self.dim)?;
            let mut part = || -> Result<Tensor<2>> {
                let (numbers, shape) = (units * self.dim, [units, self.dim]);
                if units == 0 {
                    return Ok(self.empty());
                }
                // As they lie there: numbers of 16 bits become no others on the way.
                let part = match self.dtype {
                    DType::F16 => TensorData::new(saved::read::<f16>(from, numbers)?, shape),
                    DType::BF16 => TensorData::new(saved::read::<bf16>(from, numbers)?, shape),
                    _ => TensorData::new(saved::read::<f32>(from, numbers)?, shape),
                };
                let held = match self.dtype {
                    DType::F32 => FloatDType::F32,
                    _ => self.float,
                };
                Ok(Tensor::from_data(part, (&self.device, held.into())))
            };
            heads.push((part()?, part()?));
        }
        self.heads = heads;
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvStore> {
        Box::new(self.clone())
    }
}
