//! How keys and values are kept.
//!
//! A store holds the units of one layer, head by head, and does three things to them: append, keep
//! some, hand out. It knows nothing of positions, scores or policies.

mod coded;
mod growth;
mod host;
mod pieces;
mod saved;
mod scratch;
mod spilled;
mod tensor;

pub use coded::{Head as CodedHead, Part as CodedPart};
pub use coded::{QuantLayout, Quantization, QuantizedStore};
pub(crate) use growth::RESERVE;
pub use growth::{Growth, Room};
pub(crate) use host::HostStore;
pub use saved::name as dense_name;
pub use scratch::{Scratch, Tier};
pub use spilled::Spilled;
pub(crate) use tensor::TensorStore;

use crate::{Compute, DType, Error, KeptUnits, LayerSpec, Result, Rows, SnapshotError};
use growth::DenseGrowth;
use locret_kernels::tiles::KvTiles;
use std::{
    any::Any,
    fmt::Debug,
    io::{Read, Take, Write},
    ops::Range,
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

    /// As [`retain`](Self::retain), of units that are known where they lie alone. The default brings their numbers to the
    /// host.
    ///
    /// # Errors
    /// As `retain`.
    fn retain_listed(&mut self, kept: &KeptUnits) -> Result<()> {
        self.retain(&kept.read()?)
    }

    /// Units that `head` holds.
    fn len(&self, head: usize) -> usize;

    /// Whether no head holds anything.
    fn is_empty(&self) -> bool;

    /// Bytes that keys and values occupy now, allocated reserve included; those that are resident, of a store with a
    /// second tier.
    fn bytes(&self) -> usize;

    /// Bytes that all keys and values take, those that are put away among them.
    fn total_bytes(&self) -> usize {
        self.bytes()
    }

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

    /// The keys of some units of one head, `[units, head_dim]`, as [`keys`](Self::keys).
    ///
    /// # Errors
    /// As `keys`; [`Error::Shape`] for units that are not there.
    fn keys_at(&self, head: usize, units: &[u32]) -> Result<Rows> {
        picked(&self.keys(head)?, units)
    }

    /// One head's units in host memory, so that the CPU kernels read them where they lie; `None` if
    /// they lie elsewhere.
    fn tiles(&self, _head: usize) -> Option<Box<dyn KvTiles + '_>> {
        None
    }

    /// Features of a block that this store keeps multiplied with Hadamard's matrix
    /// ([`hadamard`](locret_kernels::codes::hadamard)), or 1 if it keeps numbers as they are. A head consists of whole
    /// blocks.
    fn turned_block(&self) -> usize {
        1
    }

    /// As [`tiles`](Self::tiles), but for values, and for keys if `keys` says so, of which each
    /// [block](Self::turned_block) is multiplied with Hadamard's matrix. Turning queries and outputs instead of every
    /// unit costs next to nothing.
    fn turned_tiles(&self, head: usize, _keys: bool) -> Option<Box<dyn KvTiles + '_>> {
        self.brought_tiles(head)
    }

    /// The store itself, for a [`Compute`] that reads its own stores where they lie; `None` if nobody does.
    fn as_any(&self) -> Option<&dyn Any> {
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

    /// Whether there is a second tier, so that attention reads what was [brought](Self::bring) before.
    fn tiered(&self) -> bool {
        false
    }

    /// Makes resident what attention is about to read: by KV head, ranges of units in any order, which may overlap.
    /// What was brought before may be put away again.
    ///
    /// # Errors
    /// [`Error::Memory`] if all of it together is more than may be resident, [`Error::Tier`].
    fn bring(&mut self, _seen: &[Vec<Range<usize>>]) -> Result<()> {
        Ok(())
    }

    /// Whether these units are resident.
    fn brought(&self, _seen: &[Vec<Range<usize>>]) -> bool {
        true
    }

    /// As [`tiles`](Self::tiles), of what is resident; other units read as zeros.
    fn brought_tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>> {
        self.tiles(head)
    }

    /// Told of units that attention will seldom read: blocks, for each its units by KV head
    /// ([`Verdict::away`](crate::Verdict::away)). A store with a second tier may put them away; their numbers stay.
    ///
    /// # Errors
    /// [`Error::Setting`] for units that are in a block already, [`Error::Tier`].
    fn put_away(&mut self, _blocks: &[Vec<Vec<u32>>]) -> Result<()> {
        Ok(())
    }

    /// Takes units out of each head, as [`retain`](Self::retain) would keep them, into a store of their own.
    ///
    /// # Errors
    /// As `retain`.
    fn take(&mut self, taken: &[Vec<u32>]) -> Result<Box<dyn KvStore>> {
        let mut other = self.fork();
        other.retain(taken)?;
        let lens: Vec<usize> = (0..taken.len()).map(|head| self.len(head)).collect();
        self.retain(&left(taken, lens.into_iter()))?;
        Ok(other)
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
    /// `(1 - Σ share) · own + Σ share · value of from` over all folds into it, or
    /// `share · own + Σ share · value of from` where one of them is a fold into itself ([`Fold`]). Every value is
    /// read as it was before the call. Keys stay.
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

    /// Whether [`fold_keys`](Self::fold_keys) does anything. Where one key cannot be replaced without changing others'
    /// (codes of groups of keys) it does not.
    fn folds_keys(&self) -> bool {
        false
    }

    /// Mixes keys as they lie in the store, as [`fold_values`](Self::fold_values) mixes values. Values stay.
    ///
    /// # Errors
    /// [`Error::NotSupported`], with nothing changed, if the store does not do it
    /// ([`folds_keys`](Self::folds_keys)), [`Error::Setting`] for a unit that is not there.
    fn fold_keys(&mut self, _head: usize, _folds: &[Fold]) -> Result<()> {
        Err(no_keys(&self.name()))
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

/// One unit mixed into another; see [`KvStore::fold_values`].
///
/// A fold of a unit into itself says what its own value counts. Without one it counts what the others leave of 1,
/// so that values are means; with one shares need not add up to 1.
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

    /// How a dense store grows whose buffers are [`Room`]s, one for each KV head, of values of `value` bytes.
    pub fn growth(layer: &LayerSpec, value: usize) -> Box<dyn Growth> {
        Box::new(DenseGrowth::new(layer.kv_heads, layer.head_dim, value))
    }
}

/// Checks what is appended and returns the number of tokens.
///
/// # Errors
/// [`Error::Shape`].
pub fn check_append(keys: &Rows, values: &Rows, heads: usize, dim: usize) -> Result<usize> {
    let t = keys.rows();
    keys.expect("keys", [t, heads * dim])?;
    values.expect("values", [t, heads * dim])?;
    Ok(t)
}

/// What is left of units when some, ascending ones, are taken.
pub(crate) fn left(taken: &[Vec<u32>], lens: impl Iterator<Item = usize>) -> Vec<Vec<u32>> {
    let of_head = |(taken, len): (&Vec<u32>, usize)| {
        let mut taken = taken.iter().peekable();
        let all = 0..len as u32;
        all.filter(|unit| taken.next_if(|next| *next == unit).is_none())
            .collect()
    };
    taken.iter().zip(lens).map(of_head).collect()
}

/// Some rows of all of a head's.
pub(crate) fn picked(rows: &Rows, units: &[u32]) -> Result<Rows> {
    check_units(units, rows.rows())?;
    if units.is_empty() {
        return rows.slice(0..0);
    }
    // Neighbours together.
    let runs = units.chunk_by(|a, b| a + 1 == *b);
    let run = |run: &[u32]| {
        let first = run[0] as usize;
        rows.slice(first..first + run.len())
    };
    Rows::below(runs.map(run).collect::<Result<_>>()?)
}

/// Checks that units are there.
pub(crate) fn check_units(units: &[u32], len: usize) -> Result<()> {
    match units.iter().find(|unit| **unit as usize >= len) {
        None => Ok(()),
        Some(unit) => {
            let expected = format!("below {len}");
            Err(Error::shape("a unit of a KV head", expected, unit))
        }
    }
}

/// Checks what is to be kept against what is there.
///
/// # Errors
/// [`Error::Shape`] for lists of another number of heads; [`Error::Setting`] for units that do not ascend or are not
/// there.
pub fn check_retain(kept: &[Vec<u32>], lens: impl Iterator<Item = usize>) -> Result<()> {
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

/// What is wrong with blocks of units of heads that have so many.
pub(crate) fn check_away(blocks: &[Vec<Vec<u32>>], lens: &[usize]) -> Result<(), String> {
    for block in blocks {
        if block.len() != lens.len() {
            let found = block.len();
            return Err(format!(
                "a block of units of {found} KV heads of {}",
                lens.len()
            ));
        }
        for (head, (units, len)) in block.iter().zip(lens).enumerate() {
            let ascend = units.windows(2).all(|pair| pair[0] < pair[1]);
            if !ascend || units.last().is_some_and(|unit| *unit as usize >= *len) {
                return Err(format!(
                    "units of KV head {head} are put away that do not ascend below {len}"
                ));
            }
        }
    }
    Ok(())
}

/// Checks what is to be folded against the number of units.
///
/// # Errors
/// [`Error::Setting`] for units that are not there.
pub fn check_folds(folds: &[Fold], len: usize) -> Result<()> {
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
pub fn folded(folds: &[Fold], value: impl Fn(u32) -> Vec<f32>) -> Vec<(u32, Vec<f32>)> {
    let mut folds = folds.to_vec();
    folds.sort_by_key(|fold| fold.into);
    folds
        .chunk_by(|a, b| a.into == b.into)
        .map(|folds| {
            let mut sum = value(folds[0].into);
            let own = own_share(folds);
            sum.iter_mut().for_each(|x| *x *= own);
            for fold in folds.iter().filter(|fold| fold.from != fold.into) {
                for (to, from) in sum.iter_mut().zip(value(fold.from)) {
                    *to += fold.share * from;
                }
            }
            (folds[0].into, sum)
        })
        .collect()
}

/// What the unit that all of `folds` go into counts itself.
pub fn own_share(folds: &[Fold]) -> f32 {
    let (own, others): (Vec<&Fold>, Vec<&Fold>) = folds.iter().partition(|f| f.from == f.into);
    let sum = |folds: &[&Fold]| folds.iter().map(|fold| fold.share).sum::<f32>();
    match own.is_empty() {
        true => 1.0 - sum(&others),
        false => sum(&own),
    }
}

/// What a store says that cannot mix keys.
pub(crate) fn no_keys(store: &str) -> Error {
    Error::NotSupported {
        operation: "merging keys",
        implementer: format!("the store {store}"),
    }
}

fn no_turn(store: &str) -> Error {
    Error::NotSupported {
        operation: "turning keys",
        implementer: format!("the store {store}"),
    }
}
