//! Where things are computed.
//!
//! [`Compute`] is what a decoder, its cache and its policies are made of: products, norms, rotation,
//! attention. [`Host`] computes with the CPU kernels, [`Ops`] with Burn's operations on any device.
//! Whoever computes has an `Arc<dyn Compute>` and never asks which one it is; [`Rows`] go in and come out.

mod devices;
mod host;
mod lists;
mod masked;
mod ops;
mod pool;
mod rows;
mod trial;

pub use devices::{DeviceMap, layer_compute};
pub use host::{Activations, Host};
pub use lists::{KeptUnits, UnitLists};
pub use ops::Ops;
pub(crate) use ops::full;
pub use rows::Rows;
pub use trial::usable;

use crate::{
    DType, Error, KvStore, LayerSpec, Observation, Observe, Observed, Quantization, QuantizedStore,
    Result, Survey, Views, host::is_host_device,
};
use burn::tensor::{Device, Tensor};
use bytes::Bytes;
use locret_kernels::rope::RopeTable;
use std::{fmt::Debug, ops::Range, sync::Arc};

/// Computes on one device.
///
/// All implementations do the same arithmetic, up to the rounding of 32-bit sums: `check_compute` of the
/// conformance suite holds each against plain loops.
pub trait Compute: Debug + Send + Sync {
    /// A short name for reports.
    fn name(&self) -> &'static str;

    /// The device that tensors lie on.
    fn device(&self) -> &Device;

    /// Which device has which layer, where this is not one device but several.
    fn map(&self) -> Option<&DeviceMap> {
        None
    }

    /// Does `work`, a pass through a model, at its best: threads may be kept awake meanwhile, and memory
    /// that is written again and again.
    fn during(&self, work: &mut (dyn FnMut() + Send)) {
        work();
    }

    /// Does pieces of work that have nothing to do with each other, in any order or at once: sequences that
    /// attend beside each other.
    fn each(&self, pieces: Vec<Box<dyn FnOnce() + Send + '_>>) {
        pieces.into_iter().for_each(|piece| piece());
    }

    /// Rows of `width` numbers, where this computes.
    ///
    /// # Errors
    /// [`Error::Shape`] if `values` are not whole rows.
    fn rows(&self, values: Vec<f32>, width: usize) -> Result<Rows>;

    /// A matrix of weights: `parts`, one below the other, which have equally many columns.
    ///
    /// # Errors
    /// [`Error::Shape`] for bytes that are not the matrix they are said to be, for different columns or
    /// none, and for no parts; [`Error::NotSupported`] for a type that this does not compute with.
    fn matrix(&self, parts: Vec<Weight>) -> Result<Arc<dyn Matrix>>;

    /// Whether [`matrix`](Self::matrix) computes with weights of this type as they are. Others have to be
    /// converted to `f32` first.
    fn computes_with(&self, dtype: DType) -> bool;

    /// A perceptron with a SiLU between two products, `silu(x · firstᵀ) · secondᵀ`: `first` is `[inner,
    /// inputs]`, `second` `[outputs, inner]`, row-major.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    fn perceptron(&self, first: Weight, second: Vec<f32>) -> Result<Arc<dyn Perceptron>>;

    /// RMS norm (arXiv 1910.07467) of each row: `x / √(mean(x²) + epsilon) · gain`; `gain` is `[1, width]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Device`].
    fn norm(&self, x: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows>;

    /// `x += y`, and the [`norm`](Self::norm) of the sum.
    ///
    /// # Errors
    /// As [`norm`](Self::norm).
    fn add_norm(&self, x: &mut Rows, y: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows>;

    /// SwiGLU (arXiv 2002.05202) of rows that are a gate and then as many numbers to be gated:
    /// `[rows, 2 n]` to `[rows, n]`, `silu(gate) · up`.
    ///
    /// # Errors
    /// [`Error::Shape`] for an odd width, [`Error::Device`].
    fn gate(&self, gate_up: &Rows) -> Result<Rows>;

    /// Rotates each head of `x`, `[tokens, heads * head_dim]`, by rows of a table, or undoes that.
    ///
    /// # Errors
    /// [`Error::Shape`] for rows that the table does not have,
    /// [`Error::Device`].
    fn rotate(&self, x: Rows, by: &Rotation<'_>) -> Result<Rows>;

    /// Causal attention of rotated queries `[tokens, heads * head_dim]` over a store whose last units are
    /// the new tokens' own; of what they see, where that is not all ([`Attention::sight`]). Returns `[tokens,
    /// heads * head_dim]`.
    ///
    /// # Errors
    /// [`Error::Device`], the store's; [`Error::Shape`] for views that do not fit; [`Error::NotSupported`] where
    /// queries cannot be made to see less than all.
    fn attend(&self, q: Rows, over: &Attention<'_>) -> Result<Rows>;

    /// What the last of the rotated queries `[tokens, heads * head_dim]` pay attention to, of what they see.
    ///
    /// `factors` are there for [`Observation::MaxWeightsByInput`] alone: for each of these queries a number,
    /// not negative, that its weights are multiplied with.
    ///
    /// # Errors
    /// As [`attend`](Self::attend); [`Error::Shape`] for another number of factors.
    fn observe(
        &self,
        q: &Rows,
        over: &Attention<'_>,
        what: Observe,
        factors: Option<&[f32]>,
    ) -> Result<Observed>;

    /// Where the attention of the last `last` (all, if there are fewer) of the rotated queries `[tokens, heads *
    /// head_dim]` goes, by unit and by distance, if they see everything before them.
    ///
    /// # Errors
    /// As [`attend`](Self::attend); [`Error::NotSupported`] where it is not to be had.
    fn survey(&self, _q: &Rows, _over: &Attention<'_>, _last: usize) -> Result<Survey> {
        Err(Error::NotSupported {
            operation: "sums of attention by distance",
            implementer: self.name().into(),
        })
    }

    /// The `keep` best of `scores`, those in `protected` for certain; ascending. Of equal scores the earlier
    /// one stays.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a NaN.
    fn select(&self, scores: &[f32], keep: usize, protected: &[Range<usize>]) -> Result<Vec<u32>> {
        locret_kernels::select::top_k(scores, keep, protected).map_err(|unit| Error::NotFinite {
            what: "a score",
            at: format!("unit {unit}"),
        })
    }

    /// For each row the number of its largest, of equals the first, if they were found where the rows lie: a vocabulary of
    /// logits need not come to the host for one token of it. Nothing of a row with a NaN, or without a largest that is
    /// finite. `None`, the default, where rows are to be read and looked at.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn largest(&self, _rows: &Rows) -> Result<Option<Vec<Option<u32>>>> {
        Ok(None)
    }

    /// For each row `-ln` of the softmax weight of its number `of[row]`, if that was found where the rows lie: to know how
    /// likely every token of a text was, no vocabulary of logits need come to the host for each. NaN of a row with a NaN.
    /// `None`, the default, where rows are to be read and looked at.
    ///
    /// # Errors
    /// As [`check_tokens`]; [`Error::Device`].
    fn surprisal(&self, _rows: &Rows, _of: &[u32]) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    /// Empty lists of the positions and scores of a layer's units, if they can lie where this computes and units be
    /// chosen there; `None`, the default, where they are lists in host memory.
    fn unit_lists(&self, _kv_heads: usize) -> Option<Box<dyn UnitLists>> {
        None
    }

    /// An empty store of units as they are, in 32 or 16 bits, where this computes.
    ///
    /// # Errors
    /// [`Error::NotSupported`] for another type.
    fn store(&self, layer: &LayerSpec, dtype: DType) -> Result<Box<dyn KvStore>>;

    /// An empty store of units as codes: in host memory, where nothing here reads codes.
    ///
    /// # Errors
    /// As [`Quantization::validate`].
    fn coded_store(&self, layer: &LayerSpec, config: Quantization) -> Result<Box<dyn KvStore>> {
        Ok(Box::new(QuantizedStore::on(self.device(), layer, config)?))
    }
}

/// The best there is for a device: the CPU kernels where its tensors lie in host memory, and otherwise
/// Burn's operations.
pub fn compute(device: &Device) -> Arc<dyn Compute> {
    Kernels::Auto.on(device)
}

/// Which implementation computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Kernels {
    /// For a model, the CPU kernels where the device's tensors lie in host memory and Burn's operations
    /// elsewhere; for a cache, what its model computes with.
    #[default]
    Auto,
    /// Burn's operations everywhere.
    Operations,
}

impl Kernels {
    /// This implementation on a device.
    pub fn on(self, device: &Device) -> Arc<dyn Compute> {
        self.with(device, Activations::default())
    }

    /// This implementation on a device; `activations` are a matter of the CPU kernels alone.
    pub fn with(self, device: &Device, activations: Activations) -> Arc<dyn Compute> {
        match self {
            Self::Auto if is_host_device(device) => {
                Arc::new(Host::new(device).with_activations(activations))
            }
            _ => Arc::new(Ops::new(device)),
        }
    }
}

/// A matrix as it lies in a file: `[rows, columns]`, row-major, in little-endian bytes.
#[derive(Debug, Clone)]
pub struct Weight {
    /// The type of its numbers.
    pub dtype: DType,
    /// Rows: outputs of a product.
    pub rows: usize,
    /// Columns: inputs of a product.
    pub columns: usize,
    /// Whole blocks, row by row.
    pub bytes: Bytes,
}

impl Weight {
    /// From 32-bit numbers, row-major.
    pub fn from_f32(values: &[f32], rows: usize, columns: usize) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self {
            dtype: DType::F32,
            rows,
            columns,
            bytes,
        }
    }
}

/// Weights, where a [`Compute`] has them.
pub trait Matrix: Debug + Send + Sync {
    /// `[outputs, inputs]`.
    fn shape(&self) -> [usize; 2];

    /// `x · Wᵀ`, `[tokens, inputs]` to `[tokens, outputs]`, cut into as many parts as there are widths,
    /// none of them 0, which add up to the outputs.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Device`].
    fn apply_parts(&self, x: &Rows, widths: &[usize]) -> Result<Vec<Rows>>;

    /// `x · Wᵀ`, `[tokens, inputs]` to `[tokens, outputs]`.
    ///
    /// # Errors
    /// As [`apply_parts`](Self::apply_parts).
    fn apply(&self, x: &Rows) -> Result<Rows> {
        Rows::below(self.apply_parts(x, &[self.shape()[0]])?)
    }

    /// Some rows of the matrix, `[ids, inputs]`: embeddings of tokens.
    ///
    /// # Errors
    /// [`Error::Shape`] for a row that is not there,
    /// [`Error::Device`].
    fn rows(&self, ids: &[u32]) -> Result<Rows>;

    /// The numbers that the matrix stands for, `[outputs, inputs]`, row-major.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn values(&self) -> Result<Vec<f32>>;
}

/// Two products with a SiLU between; see [`Compute::perceptron`].
pub trait Perceptron: Debug + Send + Sync {
    /// `[inputs, inner, outputs]`.
    fn shape(&self) -> [usize; 3];

    /// Outputs `[tokens, outputs]` of inputs that lie side by side in several parts, `[tokens, …]` each.
    ///
    /// # Errors
    /// [`Error::Shape`] for parts that are not as wide as the inputs together, or have
    /// different tokens; [`Error::Device`].
    fn apply(&self, parts: &[&Rows]) -> Result<Rows>;
}

/// Which rows of a table rotate which rows of numbers.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// Cosines and sines.
    pub table: &'a RopeTable,
    /// Features of a head.
    pub head_dim: usize,
    /// Rows of the table.
    pub rows: TableRows<'a>,
    /// Whether to undo the rotation.
    ///
    /// In 32 bits `cos² + sin²` is not quite 1, by the same amount whenever the same row is used: keys that
    /// are turned back and forth with every eviction would grow or shrink steadily. So what is still
    /// missing after a first attempt is added, and what is left is rounding.
    pub inverse: bool,
}

/// Rows of a table, for the tokens of a matrix.
#[derive(Debug, Clone, Copy)]
pub enum TableRows<'a> {
    /// In as many groups of heads as there are entries: token `i` of group `j` by row `first[j] + i`.
    From(&'a [usize]),
    /// Token `i` by row `rows[i]`.
    Each(&'a [u32]),
}

impl<'a> Rotation<'a> {
    /// Row `i` of the numbers by row `i` of the table.
    pub fn contiguous(table: &'a RopeTable, head_dim: usize) -> Self {
        Self {
            table,
            head_dim,
            rows: TableRows::From(&[0]),
            inverse: false,
        }
    }

    /// Row `i` of the numbers by row `places[i]` of the table, or where there are none by row `i`.
    pub(crate) fn placed(table: &'a RopeTable, head_dim: usize, places: Option<&'a [u32]>) -> Self {
        let by = Self::contiguous(table, head_dim);
        match places {
            Some(places) => Self {
                rows: TableRows::Each(places),
                ..by
            },
            None => by,
        }
    }

    /// The other way round.
    #[must_use]
    pub fn undone(self) -> Self {
        Self {
            inverse: !self.inverse,
            ..self
        }
    }

    /// Checks that the table has every row that `[tokens, width]` numbers need.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn check(&self, [tokens, width]: [usize; 2]) -> Result<()> {
        let groups = match self.rows {
            TableRows::From([]) => return Err(Error::shape("groups of heads", "at least one", 0)),
            TableRows::From(first) => first.len(),
            TableRows::Each(_) => 1,
        };
        let turned = self.table.rotary_dim();
        if turned > self.head_dim {
            let expected = format!("at most {}, a head's", self.head_dim);
            return Err(Error::shape("features to rotate", expected, turned));
        }
        if self.head_dim == 0 || !width.is_multiple_of(self.head_dim * groups) {
            let expected = format!("[{tokens}, {groups} groups of heads of {}]", self.head_dim);
            return Err(Error::shape("rows to rotate", expected, [tokens, width]));
        }
        let need = match self.rows {
            TableRows::From(first) => first.iter().max().map_or(0, |first| first + tokens),
            TableRows::Each(rows) if rows.len() != tokens => {
                return Err(Error::shape("table rows", [tokens], [rows.len()]));
            }
            TableRows::Each(rows) => rows.iter().max().map_or(0, |row| *row as usize + 1),
        };
        match tokens > 0 && need > self.table.len() {
            true => Err(Error::shape("rotation table", [need], [self.table.len()])),
            false => Ok(()),
        }
    }

    /// The row of the table for a token of group `group`.
    fn row(&self, token: usize, group: usize) -> usize {
        match self.rows {
            TableRows::From(first) => first[group] + token,
            TableRows::Each(rows) => rows[token] as usize,
        }
    }

    /// How many groups of heads have rows of their own.
    fn groups(&self) -> usize {
        match self.rows {
            TableRows::From(first) if first.windows(2).any(|w| w[0] != w[1]) => first.len(),
            _ => 1,
        }
    }
}

/// What is attended to.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// The layer's dimensions.
    pub layer: LayerSpec,
    /// Keys and values, the new tokens' among them.
    pub store: &'a dyn KvStore,
    /// The factor on `q · k` before the softmax.
    pub scale: f32,
    /// Set where the store's keys are not rotated yet: unit `i` belongs at row `i`.
    pub rotation: Option<&'a RopeTable>,
    /// What queries see, where it is not everything before them.
    pub sight: Option<Sight<'a>>,
}

/// What queries see, and the queries that see some of it at one distance.
#[derive(Debug, Clone, Copy)]
pub struct Sight<'a> {
    /// Which units.
    pub views: &'a Views,
    /// Queries as they meet units in [`View::far`](crate::View::far), `[tokens, heads * head_dim]`: rotated at
    /// [`Views::distance`]. Needed where there are such units; the store's keys are then not rotated.
    pub far: Option<&'a Rows>,
}

/// Checks the factors on what `queries` queries pay; they are there for one observation alone.
///
/// # Errors
/// [`Error::Shape`] for as many factors as there are not queries, or for factors that nothing needs.
pub fn check_factors(what: Observation, queries: usize, factors: Option<&[f32]>) -> Result<()> {
    let due = (what == Observation::MaxWeightsByInput).then_some(queries);
    match factors.map(<[f32]>::len) == due {
        true => Ok(()),
        false => Err(Error::shape(
            "factors on observed weights",
            format!("{due:?}"),
            format!("{:?}", factors.map(<[f32]>::len)),
        )),
    }
}

/// `[rows, n]` of rows that are a gate and as much to be gated.
fn gated(gate_up: &Rows) -> Result<[usize; 2]> {
    let [rows, width] = gate_up.shape();
    match width.is_multiple_of(2) {
        true => Ok([rows, width / 2]),
        false => Err(Error::shape("gates and ups", "an even width", width)),
    }
}

/// The columns that all parts of a matrix have.
fn columns(parts: &[Weight]) -> Result<usize> {
    let columns = parts.first().map_or(0, |part| part.columns);
    if columns == 0 {
        return Err(Error::shape("columns of a matrix", "at least one", 0));
    }
    match parts.iter().find(|part| part.columns != columns) {
        Some(other) => Err(Error::shape("columns of a matrix", columns, other.columns)),
        None => Ok(columns),
    }
}

/// Checks tokens, one for each of some rows of logits, `[rows, vocab]`.
///
/// # Errors
/// [`Error::Shape`] for another number of tokens; [`Error::UnknownToken`].
pub fn check_tokens([rows, vocab]: [usize; 2], of: &[u32]) -> Result<()> {
    if of.len() != rows {
        return Err(Error::shape("tokens of logits", rows, of.len()));
    }
    match of.iter().position(|id| *id as usize >= vocab) {
        Some(index) => Err(Error::UnknownToken {
            id: of[index],
            index,
            vocab,
        }),
        None => Ok(()),
    }
}

/// Checks what a matrix `[outputs, inputs]` is applied to, and what is made of it.
///
/// # Errors
/// [`Error::Shape`] for another width of the input, or of all outputs.
pub fn check_product([outputs, inputs]: [usize; 2], x: &Rows, widths: &[usize]) -> Result<()> {
    x.expect("the input of a product", [x.rows(), inputs])?;
    match widths.iter().sum::<usize>() == outputs && !widths.contains(&0) {
        true => Ok(()),
        false => Err(Error::shape("outputs of a product", [outputs], widths)),
    }
}

/// Checks what a perceptron is applied to; how many tokens these are.
///
/// # Errors
/// [`Error::Shape`] for another width of all parts, or for parts of different tokens.
pub fn check_parts([inputs, ..]: [usize; 3], parts: &[&Rows]) -> Result<usize> {
    let tokens = parts.first().map_or(0, |part| part.rows());
    let width: usize = parts.iter().map(|part| part.width()).sum();
    if width == inputs && parts.iter().all(|part| part.rows() == tokens) {
        return Ok(tokens);
    }
    let found: Vec<_> = parts.iter().map(|part| part.shape()).collect();
    Err(Error::shape(
        "the input of a perceptron",
        [tokens, inputs],
        found,
    ))
}

/// The outputs of a product, `[tokens, outputs]`, in parts of these widths, which are all of it.
pub fn divided(y: Tensor<2>, widths: &[usize]) -> Vec<Rows> {
    if widths.len() == 1 {
        return vec![y.into()];
    }
    let mut first = 0;
    let part = |width: &usize| {
        let part = y.clone().narrow(1, first, *width);
        first += width;
        part.into()
    };
    widths.iter().map(part).collect()
}

/// A row that a matrix `[rows, columns]` does not have.
pub fn no_row(id: u32, shape: [usize; 2]) -> Error {
    Error::shape("rows of a matrix", format!("below {}", shape[0]), id)
}

fn no_store(dtype: DType) -> Error {
    Error::NotSupported {
        operation: "keeping units as they are in blocks of numbers",
        implementer: format!("a dense store of {dtype}"),
    }
}

fn no_matrix(implementer: &str, dtype: DType) -> Error {
    Error::NotSupported {
        operation: "products with weights of this type",
        implementer: format!("{implementer} ({dtype})"),
    }
}
