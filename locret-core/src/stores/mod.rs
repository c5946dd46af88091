//! How keys and values are kept.
//!
//! A store holds the units of one layer, head by head, and does three things to them: append, keep
//! some, hand out. It knows nothing of positions, scores or policies.

mod coded;
mod growth;
mod host;
mod saved;
mod tensor;

pub use coded::{QuantLayout, Quantization, QuantizedStore};
pub use growth::Growth;
pub(crate) use growth::RESERVE;
pub(crate) use host::HostStore;
pub(crate) use tensor::TensorStore;

use crate::{Compute, DType, Error, LayerSpec, Result, Rows, SnapshotError};
use locret_kernels::tiles::KvTiles;
use std::{
    fmt::Debug,
    io::{Read, Take, Write},
    sync::Arc,
};

/// Makes other keys of one head's keys; see [`KvStore::turn_keys`].
pub type TurnKeys<'a> = dyn Fn(usize, Rows) -> Result<Rows> + 'a;

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
    fn append(&mut self, keys: &Rows, values: &Rows) -> Result<()>;

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

    /// How these bytes will grow and shrink, for plans.
    fn growth(&self) -> Box<dyn Growth>;

    /// The keys of one head as appended, `[units, head_dim]`, f32 where the store has less.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn keys(&self, head: usize) -> Result<Rows>;

    /// The values of one head, `[units, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn values(&self, head: usize) -> Result<Rows>;

    /// One head's units in host memory, so that the CPU kernels read them where they lie; `None` if
    /// they lie elsewhere.
    fn tiles(&self, _head: usize) -> Option<Box<dyn KvTiles + '_>> {
        None
    }

    /// Whether [`turn_keys`](Self::turn_keys) does anything. Where storing turned keys would lose
    /// precision (16-bit and quantised stores) it does not: attention then rotates while it loads.
    fn turns_keys(&self) -> bool {
        false
    }

    /// Replaces the keys of each head, `[units, head_dim]`, by what `turn(head, keys)` makes of
    /// them: another rotation of the same keys.
    ///
    /// # Errors
    /// [`Error::NotSupported`], with nothing changed, if the store does not do it
    /// ([`turns_keys`](Self::turns_keys)); those of `turn`, [`Error::Device`].
    fn turn_keys(&mut self, _turn: &TurnKeys<'_>) -> Result<()> {
        Err(no_turn(&self.name()))
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

    /// Writes all units, so that [`read`](Self::read) makes the same store of them.
    ///
    /// # Errors
    /// [`Error::Snapshot`] if writing fails or this store does not do it, [`Error::Device`].
    fn write(&self, _to: &mut dyn Write) -> Result<()> {
        Err(not_saved(&self.name()))
    }

    /// Replaces all units by those that a store of the same kind, heads and features wrote. Afterwards
    /// both hand out the same, bit for bit, and go on in the same way.
    ///
    /// `from` knows how many bytes there are: what a store says of itself is checked against that before
    /// any memory is taken for it.
    ///
    /// # Errors
    /// [`Error::Snapshot`] for anything else, with nothing changed.
    fn read(&mut self, _from: &mut Take<&mut dyn Read>) -> Result<()> {
        Err(not_saved(&self.name()))
    }

    /// A copy that shares nothing that either may change.
    fn fork(&self) -> Box<dyn KvStore>;
}

fn not_saved(store: &str) -> Error {
    SnapshotError::NotSaved(format!("the store {store}")).into()
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

/// Where and how a store should keep its units.
#[derive(Debug, Clone)]
pub struct Placement {
    /// What attends to the units.
    pub compute: Arc<dyn Compute>,
    /// The type of dense values.
    pub dtype: DType,
}

/// The dense store: every value as it is, in 32 or 16 bits.
#[derive(Debug, Clone, Copy)]
pub struct Dense;

impl Dense {
    /// An empty dense store, where [`Compute`] wants it.
    ///
    /// # Errors
    /// As [`Compute::store`].
    pub fn boxed(layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        place.compute.store(layer, place.dtype)
    }
}

/// Checks what is appended and returns the number of tokens.
pub(crate) fn check_append(keys: &Rows, values: &Rows, heads: usize, dim: usize) -> Result<usize> {
    let t = keys.rows();
    keys.expect("keys", [t, heads * dim])?;
    values.expect("values", [t, heads * dim])?;
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

fn no_turn(store: &str) -> Error {
    Error::NotSupported {
        operation: "turning keys",
        implementer: format!("the store {store}"),
    }
}
