//! Dense units in host memory.

use super::{
    Fold, Growth, KvStore, TurnKeys, check_append, check_folds, check_retain, check_units, folded,
    growth::{self, DenseGrowth},
    left, saved,
};
use crate::{DType, LayerSpec, Result, Rows};
use burn::tensor::Device;
use locret_kernels::{
    dtype::Number,
    select::compact_rows,
    tiles::{DenseTiles, KvTiles},
};
use rayon::prelude::*;
use std::io::{Read, Take, Write};

/// Dense units in host memory, one buffer for the keys and one for the values of each head.
#[derive(Debug, Clone)]
pub(crate) struct HostStore<T> {
    heads: Vec<(Vec<T>, Vec<T>)>,
    dim: usize,
    device: Device,
}

impl<T: Number> HostStore<T> {
    pub(crate) fn new(layer: &LayerSpec, device: &Device) -> Self {
        Self {
            heads: (0..layer.kv_heads).map(|_| Default::default()).collect(),
            dim: layer.head_dim,
            device: device.clone(),
        }
    }

    fn rows(&self, values: &[T]) -> Result<Rows> {
        let values = values.iter().map(|x| x.to_f32()).collect();
        Rows::new(values, self.dim, &self.device)
    }
}

impl<T: Number> KvStore for HostStore<T> {
    fn name(&self) -> String {
        saved::name(T::DTYPE)
    }

    fn append(&mut self, keys: &Rows, values: &Rows) -> Result<()> {
        let (g, d) = (self.heads.len(), self.dim);
        let t = check_append(keys, values, g, d)?;
        let (keys, values) = (keys.values()?, values.values()?);
        for (head, (k, v)) in self.heads.iter_mut().enumerate() {
            for (to, from) in [(k, &keys), (v, &values)] {
                if to.capacity() - to.len() < t * d {
                    let rows = to.len() / d;
                    to.reserve_exact((growth::grown(rows, t) - rows) * d);
                }
                for row in 0..t {
                    let at = (row * g + head) * d;
                    let old = to.len();
                    to.resize(old + d, T::from_f32(0.0));
                    T::convert(&from[at..at + d], &mut to[old..]);
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
            compact_rows(buffer, d, list);
            buffer.shrink_to(growth::cut(list.len(), dropped, buffer.capacity() / d) * d);
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

    fn growth(&self) -> Box<dyn Growth> {
        let value = size_of::<T>();
        Box::new(DenseGrowth::new(self.heads.len(), self.dim, value))
    }

    fn keys(&self, head: usize) -> Result<Rows> {
        self.rows(&self.heads[head].0)
    }

    fn values(&self, head: usize) -> Result<Rows> {
        self.rows(&self.heads[head].1)
    }

    fn keys_at(&self, head: usize, units: &[u32]) -> Result<Rows> {
        let (keys, d) = (&self.heads[head].0, self.dim);
        check_units(units, keys.len() / d)?;
        let rows = units.iter().map(|unit| &keys[*unit as usize * d..][..d]);
        let rows: Vec<f32> = rows.flatten().map(|x| x.to_f32()).collect();
        Rows::new(rows, d, &self.device)
    }

    fn tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>> {
        let (k, v) = &self.heads[head];
        let (k, v) = (T::floats(k), T::floats(v));
        Some(Box::new(DenseTiles::new(k, v, self.dim)))
    }

    fn turns_keys(&self) -> bool {
        T::DTYPE == DType::F32
    }

    fn turn_keys(&mut self, turn: &TurnKeys<'_>) -> Result<()> {
        if !self.turns_keys() {
            return Err(super::no_turn(&self.name()));
        }
        for head in 0..self.heads.len() {
            let keys = std::mem::take(&mut self.heads[head].0);
            if !keys.is_empty() {
                let keys = Rows::new(T::into_f32s(keys), self.dim, &self.device)?;
                self.heads[head].0 = T::from_f32s(turn(head, keys)?.into_values()?);
            }
        }
        Ok(())
    }

    fn take(&mut self, taken: &[Vec<u32>]) -> Result<Box<dyn KvStore>> {
        let d = self.dim;
        let lens: Vec<usize> = self.heads.iter().map(|(k, _)| k.len() / d).collect();
        check_retain(taken, lens.iter().copied())?;
        let rows = |buffer: &[T], list: &[u32]| {
            let rows = list.iter().map(|unit| &buffer[*unit as usize * d..][..d]);
            let mut out = Vec::with_capacity(list.len() * d);
            rows.for_each(|row| out.extend_from_slice(row));
            out
        };
        let heads = self.heads.iter().zip(taken);
        let other = Self {
            heads: heads
                .map(|((k, v), list)| (rows(k, list), rows(v, list)))
                .collect(),
            dim: d,
            device: self.device.clone(),
        };
        self.retain(&left(taken, lens.into_iter()))?;
        Ok(Box::new(other))
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        fold_rows(&mut self.heads[head].1, self.dim, folds)
    }

    fn folds_keys(&self) -> bool {
        true
    }

    fn fold_keys(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        fold_rows(&mut self.heads[head].0, self.dim, folds)
    }

    fn write(&self, to: &mut dyn Write) -> Result<()> {
        saved::write_header(to, &self.name(), self.heads.len(), self.dim)?;
        for (keys, values) in &self.heads {
            saved::write_count(to, keys.len() / self.dim)?;
            saved::write(to, keys)?;
            saved::write(to, values)?;
        }
        Ok(())
    }

    fn read(&mut self, from: &mut Take<&mut dyn Read>) -> Result<()> {
        saved::read_header(from, &self.name(), self.heads.len(), self.dim)?;
        let mut heads = Vec::with_capacity(self.heads.len());
        for _ in 0..self.heads.len() {
            let units = saved::read_count(from, self.dim)?;
            let keys = saved::read(from, units * self.dim)?;
            heads.push((keys, saved::read(from, units * self.dim)?));
        }
        self.heads = heads;
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvStore> {
        Box::new(self.clone())
    }
}

/// Rows of `d` numbers with some mixed into others, in 32 bits.
fn fold_rows<T: Number>(rows: &mut [T], d: usize, folds: &[Fold]) -> Result<()> {
    check_folds(folds, rows.len() / d)?;
    let row = |unit: u32| unit as usize * d..(unit as usize + 1) * d;
    let new = folded(folds, |unit| {
        rows[row(unit)].iter().map(|x| x.to_f32()).collect()
    });
    for (unit, mixed) in new {
        for (to, from) in rows[row(unit)].iter_mut().zip(mixed) {
            *to = T::from_f32(from);
        }
    }
    Ok(())
}
