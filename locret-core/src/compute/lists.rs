//! Positions and scores of units, where a layer is computed.

use crate::{Best, Result, Rows, host};
use burn::tensor::{Int, Tensor};
use std::fmt::Debug;

/// Positions and scores of a layer's units on a device, where units are chosen by their scores without anybody waiting
/// for these ([`Compute::unit_lists`](crate::Compute::unit_lists)).
///
/// How many units a head has is known to both sides at all times. What the device says of a failure, and of scores that
/// are NaN, is said when the lists are read.
pub trait UnitLists: Debug + Send + Sync {
    /// Replaces all that there is: by KV head the positions of its units, ascending, and as many scores.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for lists of other lengths, [`Error::Device`](crate::Error::Device).
    fn put(&mut self, positions: &[&[u32]], scores: &[&[f32]]) -> Result<()>;

    /// New units of every head behind its others: at positions from `first` on, with `scores`, `[new, kv_heads]`.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    fn append(&mut self, first: usize, scores: &Rows) -> Result<()>;

    /// Keeps the best units of each head, and says which they are.
    ///
    /// Of equal scores that of the earlier unit stays, `-0.0` equals `0.0`, and what is protected counts as `+∞`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for another number of heads or more units than there are,
    /// [`Error::Device`](crate::Error::Device).
    fn keep(&mut self, best: &[Best]) -> Result<KeptUnits>;

    /// By KV head, positions and scores. Waits for the device.
    ///
    /// # Errors
    /// [`Error::NotFinite`](crate::Error::NotFinite) if a score was NaN, which has no rank;
    /// [`Error::Device`](crate::Error::Device).
    fn read(&self) -> Result<Vec<(Vec<u32>, Vec<f32>)>>;

    /// Bytes that positions and scores take.
    fn bytes(&self) -> usize;

    /// A copy that shares nothing that either may change.
    fn fork(&self) -> Box<dyn UnitLists>;
}

/// Which units of each KV head stay, in a list on a device: how many is known here, which ones there.
#[derive(Debug, Clone)]
pub struct KeptUnits {
    lens: Vec<usize>,
    units: Tensor<1, Int>,
}

impl KeptUnits {
    /// So many units of each KV head: their numbers, ascending, one head's behind the other's.
    pub fn new(lens: Vec<usize>, units: Tensor<1, Int>) -> Self {
        Self { lens, units }
    }

    /// How many units of each KV head stay.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Their numbers, one head's behind the other's; more of them may follow, which mean nothing.
    pub fn units(&self) -> &Tensor<1, Int> {
        &self.units
    }

    /// The same as lists. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    pub fn read(&self) -> Result<Vec<Vec<u32>>> {
        let all = host::into_u32(self.units.clone())?;
        let mut rest = &all[..];
        let of_head = |len: &usize| {
            let (own, others) = rest.split_at((*len).min(rest.len()));
            rest = others;
            own.to_vec()
        };
        Ok(self.lens.iter().map(of_head).collect())
    }
}
