//! The CPU kernels on host memory.

use super::{
    Attention, Compute, Matrix, Perceptron, Rotation, Rows, Sight, Weight,
    pool::{Buffer, Pool},
};
use crate::{
    DType, Error, KvStore, LayerSpec, Observation, Observe, Observed, Result, Survey,
    stores::HostStore,
};
use burn::tensor::Device;
use half::{bf16, f16};
use locret_kernels::{
    attention::{self, AttnShape, Seeing},
    awake::awake,
    codes::hadamard,
    elementwise, linear, observe,
    perceptron::perceptron,
    rope::{self, RopeTable},
    tiles::{DenseTiles, KvTiles},
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, sync::Arc};

/// How products of matrices in blocks of 32 packed integers with few tokens at once (a decoded one) are
/// computed; those of other matrices (K-quants, too), and of more than eight tokens, are exact in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// In single precision: the numbers that the blocks stand for, and no others.
    #[default]
    Exact,
    /// Rounded to eight bits in blocks of 32, as engines that read GGUF files commonly do. Where
    /// activations have outliers it shows: logits of SmolLM2-135M are off by some 5 % of their
    /// spread (`locret-models/tests/smollm2.rs` bounds it).
    Bytes,
}

/// Computes with the CPU kernels, on the threads of the rayon pool that it is called in.
#[derive(Debug, Clone)]
pub struct Host {
    device: Device,
    activations: Activations,
    pool: Arc<Pool>,
}

impl Host {
    /// Tensors that are asked for are made on `device`.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            activations: Activations::default(),
            pool: Arc::default(),
        }
    }

    /// Chooses how products of packed weights with few tokens are computed.
    #[must_use]
    pub fn with_activations(self, activations: Activations) -> Self {
        Self {
            activations,
            ..self
        }
    }

    fn out(&self, rows: usize, width: usize) -> Buffer {
        self.pool.take(rows * width)
    }

    fn done(&self, buffer: Buffer, shape: [usize; 2]) -> Rows {
        Rows::host(shape, buffer, &self.device)
    }

    fn norm_shape(x: &Rows, gain: &Rows) -> Result<[usize; 2]> {
        gain.expect("gain of a norm", [1, x.width()])?;
        Ok(x.shape())
    }
}

impl Compute for Host {
    fn name(&self) -> &'static str {
        "host"
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn during(&self, work: &mut (dyn FnMut() + Send)) {
        let _open = self.pool.open();
        awake(work);
    }

    fn each(&self, pieces: Vec<Box<dyn FnOnce() + Send + '_>>) {
        let pieces = pieces.into_par_iter().with_max_len(1);
        pieces.for_each(|piece| piece());
    }

    fn rows(&self, values: Vec<f32>, width: usize) -> Result<Rows> {
        Rows::new(values, width, &self.device)
    }

    fn matrix(&self, parts: Vec<Weight>) -> Result<Arc<dyn Matrix>> {
        let columns = super::columns(&parts)?;
        Ok(Arc::new(HostMatrix {
            parts: parts.into_iter().map(weight).collect::<Result<_>>()?,
            columns,
            host: self.clone(),
        }))
    }

    fn computes_with(&self, dtype: DType) -> bool {
        linear::computes_with(dtype)
    }

    fn perceptron(&self, first: Weight, second: Vec<f32>) -> Result<Arc<dyn Perceptron>> {
        let (inner, found) = (first.rows, second.len());
        if inner == 0 || first.columns == 0 || !found.is_multiple_of(inner) {
            let expected = format!("rows of {inner}");
            return Err(Error::shape(
                "a perceptron's second matrix",
                expected,
                found,
            ));
        }
        Ok(Arc::new(HostPerceptron {
            outputs: second.len() / inner,
            first: weight(first)?,
            second,
        }))
    }

    fn norm(&self, x: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
        let shape = Self::norm_shape(x, gain)?;
        let mut out = self.out(shape[0], shape[1]);
        elementwise::rms_norm(&x.values()?, &gain.values()?, epsilon, &mut out.values);
        Ok(self.done(out, shape))
    }

    fn add_norm(&self, x: &mut Rows, y: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
        let shape = Self::norm_shape(x, gain)?;
        y.expect("rows to be added", shape)?;
        let mut out = self.out(shape[0], shape[1]);
        let (y, gain) = (y.values()?, gain.values()?);
        elementwise::add_rms_norm(x.values_mut()?, &y, &gain, epsilon, &mut out.values);
        Ok(self.done(out, shape))
    }

    fn gate(&self, gate_up: &Rows) -> Result<Rows> {
        let [rows, width] = super::gated(gate_up)?;
        let mut out = self.out(rows, width);
        elementwise::swiglu_fused(&gate_up.values()?, width, &mut out.values);
        Ok(self.done(out, [rows, width]))
    }

    fn rotate(&self, mut x: Rows, by: &Rotation<'_>) -> Result<Rows> {
        by.check(x.shape())?;
        let [tokens, width] = x.shape();
        if tokens == 0 {
            return Ok(x);
        }
        let heads = width / by.head_dim;
        let groups = by.groups();
        let turn = |values: &mut [f32], inverse: bool| {
            // The row of a head's numbers: that of its token, in its group.
            let row = |at: usize| by.row(at / heads, at % heads * groups / heads);
            rope::rotate(values, by.head_dim, by.head_dim, by.table, row, inverse);
        };
        if !by.inverse {
            turn(x.values_mut()?, false);
            return Ok(x);
        }
        let given = x.values_mut()?;
        let mut first = elementwise::copied(given);
        turn(&mut first, true);
        let mut again = elementwise::copied(&first);
        turn(&mut again, false);
        for (missing, again) in given.iter_mut().zip(again) {
            *missing -= again;
        }
        turn(given, true);
        elementwise::add(given, &first);
        Ok(x)
    }

    fn attend(&self, q: Rows, over: &Attention<'_>) -> Result<Rows> {
        let shape = over.check(&q)?;
        let content = Content::of(over)?;
        let heads = content.heads(over)?;
        let heads: Vec<&dyn KvTiles> = heads.iter().map(|head| &**head).collect();
        let mut out = self.out(q.rows(), q.width());
        let (rotation, values) = (over.rotation, content.queries(&q)?);
        match over.sight {
            None => attention::attend(&values, &heads, shape, rotation, &mut out.values),
            Some(sight) => {
                let far = sight.far.map(Rows::values).transpose()?;
                let seeing = Seeing {
                    views: sight.views,
                    far: far.as_deref(),
                };
                let out = &mut out.values;
                attention::attend_chosen(&values, &heads, shape, rotation, seeing, out);
            }
        }
        drop(values);
        if let Some(turned) = content.turned {
            hadamard(&mut out.values, turned.block);
        }
        Ok(self.done(out, q.shape()))
    }

    fn observe(
        &self,
        q: &Rows,
        over: &Attention<'_>,
        what: Observe,
        factors: Option<&[f32]>,
    ) -> Result<Observed> {
        let shape = over.check(q)?;
        let content = Content::of(over)?;
        let heads = content.heads(over)?;
        let heads: Vec<&dyn KvTiles> = heads.iter().map(|head| &**head).collect();
        let queries = what.queries.count(q.rows());
        super::check_factors(what.what, queries, factors)?;
        let chosen: Vec<usize> = (q.rows() - queries..q.rows()).collect();
        let (q, rotation) = (content.queries(q)?, over.rotation);
        let far = over.sight.and_then(|sight| sight.far).map(Rows::values);
        let far = far.transpose()?;
        let seeing = over.sight.map(|sight| Seeing {
            views: sight.views,
            far: far.as_deref(),
        });
        let per_head = match (what.what, seeing) {
            (Observation::Weights | Observation::NearWeights, None) => {
                observe::observe_weights(&q, &heads, shape, rotation, &chosen)
            }
            (Observation::NearWeights, Some(seeing)) => {
                observe::observe_near_weights_chosen(&q, &heads, shape, rotation, seeing, &chosen)
            }
            (Observation::Weights, Some(seeing)) => {
                observe::observe_weights_chosen(&q, &heads, shape, rotation, seeing, &chosen)
            }
            (Observation::MaxWeights | Observation::MaxWeightsByInput, None) => {
                observe::observe_max_weights(&q, &heads, shape, rotation, &chosen, factors)
            }
            (Observation::MaxWeights | Observation::MaxWeightsByInput, Some(seeing)) => {
                observe::observe_max_weights_chosen(
                    &q, &heads, shape, rotation, seeing, &chosen, factors,
                )
            }
            (Observation::MaxLogits, None) => {
                observe::observe_max_logits(&q, &heads, shape, rotation, &chosen)
            }
            (Observation::MaxLogits, Some(seeing)) => {
                observe::observe_max_logits_chosen(&q, &heads, shape, rotation, seeing, &chosen)
            }
        };
        Ok(Observed {
            per_head,
            queries,
            what: what.what,
        })
    }

    fn survey(&self, q: &Rows, over: &Attention<'_>, last: usize) -> Result<Survey> {
        let shape = over.check(q)?;
        let content = Content::of(over)?;
        let heads = content.heads(over)?;
        let heads: Vec<&dyn KvTiles> = heads.iter().map(|head| &**head).collect();
        let [units, distances] =
            observe::survey(&content.queries(q)?, &heads, shape, over.rotation, last);
        Ok(Survey { units, distances })
    }

    fn store(&self, layer: &LayerSpec, dtype: DType) -> Result<Box<dyn KvStore>> {
        Ok(match dtype {
            DType::F32 => Box::new(HostStore::<f32>::new(layer, &self.device)),
            DType::F16 => Box::new(HostStore::<f16>::new(layer, &self.device)),
            DType::BF16 => Box::new(HostStore::<bf16>::new(layer, &self.device)),
            other => return Err(super::no_store(other)),
        })
    }
}

impl Attention<'_> {
    /// Checks rotated queries `[tokens, heads * head_dim]`, and what they see, against the layer, its units and the
    /// table.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::Setting`] for units that were not made resident.
    pub fn validate(&self, q: &Rows) -> Result<()> {
        self.check(q).map(|_| ())
    }

    /// Checks the queries against the layer.
    pub(super) fn check(&self, q: &Rows) -> Result<AttnShape> {
        let (layer, tokens) = (&self.layer, q.rows());
        q.expect("q", [tokens, layer.heads * layer.head_dim])?;
        for head in 0..layer.kv_heads {
            let units = self.store.len(head);
            if units < tokens {
                let expected = format!("at least {tokens}");
                return Err(Error::shape("units to attend to", expected, units));
            }
            if let Some(table) = self.rotation
                && table.len() < units
            {
                return Err(Error::shape("rotation table", [units], [table.len()]));
            }
        }
        if let Some(turned) = self.rotation.map(RopeTable::rotary_dim)
            && turned > layer.head_dim
        {
            let expected = format!("at most {}, a head's", layer.head_dim);
            return Err(Error::shape("features to rotate", expected, turned));
        }
        self.check_sight(q)?;
        Ok(AttnShape {
            tokens,
            heads: layer.heads,
            kv_heads: layer.kv_heads,
            head_dim: layer.head_dim,
            scale: self.scale,
        })
    }
}

impl<'a> Attention<'a> {
    /// The units of a head in host memory: all that queries see.
    fn tiles(&self, head: usize) -> Option<Box<dyn KvTiles + 'a>> {
        match self.sight {
            Some(_) => self.store.brought_tiles(head),
            None => self.store.tiles(head),
        }
    }
}

impl Attention<'_> {
    /// Checks what the queries see, and that what is seen at one distance can be.
    fn check_sight(&self, q: &Rows) -> Result<()> {
        let Some(Sight { views, far }) = self.sight else {
            return Ok(());
        };
        let heads = 0..self.layer.kv_heads;
        let lens: Vec<usize> = heads.map(|head| self.store.len(head)).collect();
        let wrong = |found| Error::shape("what queries see", "views of these units", found);
        views
            .check(q.rows(), self.layer.heads, &lens)
            .and_then(|()| views.check_places(self.rotation.map(RopeTable::len)))
            .map_err(wrong)?;
        if self.store.tiered() && !self.store.brought(&views.seen(q.rows(), &lens)) {
            let expected = "units that were made resident (`KvStore::bring`)";
            return Err(Error::setting("what queries see", expected, "others"));
        }
        let mut all = views.lists().iter().flatten();
        if all.all(|view| view.far.is_empty()) {
            return Ok(());
        }
        let Some(far) = far else {
            return Err(wrong("far units, and no queries for them".into()));
        };
        far.expect("queries for far units", q.shape())
    }
}

/// How the CPU kernels get at a store's keys and values.
struct Content {
    /// Those of a store that has no tiles, by head.
    read: Vec<[Rows; 2]>,
    /// Set where tiles are handed out as Hadamard's matrix left them.
    turned: Option<Turned>,
}

/// Which numbers are multiplied with Hadamard's matrix; values are.
#[derive(Clone, Copy)]
struct Turned {
    /// Features of a block.
    block: usize,
    /// Whether keys are, too, and queries have to be. Not where they are rotated by position first.
    keys: bool,
}

impl Content {
    fn of(over: &Attention<'_>) -> Result<Self> {
        let heads = 0..over.layer.kv_heads;
        if heads.clone().all(|head| over.tiles(head).is_some()) {
            let block = over.store.turned_block();
            let far = over.sight.is_some_and(|sight| sight.far.is_some());
            let keys = over.rotation.is_none() && !far;
            return Ok(Self {
                read: Vec::new(),
                turned: (block > 1).then_some(Turned { block, keys }),
            });
        }
        let read = |head| Ok([over.store.keys(head)?, over.store.values(head)?]);
        Ok(Self {
            read: heads.map(read).collect::<Result<_>>()?,
            turned: None,
        })
    }

    /// Queries as they meet the keys.
    fn queries<'q>(&self, q: &'q Rows) -> Result<Cow<'q, [f32]>> {
        let q = q.values()?;
        Ok(match self.turned {
            Some(Turned { block, keys: true }) => {
                let mut q = q.into_owned();
                hadamard(&mut q, block);
                Cow::Owned(q)
            }
            _ => q,
        })
    }

    fn heads<'a>(&'a self, over: &Attention<'a>) -> Result<Vec<Box<dyn KvTiles + 'a>>> {
        if self.read.is_empty() {
            let heads = 0..over.layer.kv_heads;
            let tiles = |head| match self.turned {
                Some(turned) => over.store.turned_tiles(head, turned.keys),
                None => over.tiles(head),
            };
            return Ok(heads.filter_map(tiles).collect());
        }
        let tiles = |[keys, values]: &'a [Rows; 2]| -> Result<Box<dyn KvTiles + 'a>> {
            Ok(match (keys.values()?, values.values()?) {
                (Cow::Borrowed(keys), Cow::Borrowed(values)) => {
                    Box::new(DenseTiles::new(keys, values, over.layer.head_dim))
                }
                (keys, values) => Box::new(Brought {
                    keys: keys.into_owned(),
                    values: values.into_owned(),
                    dim: over.layer.head_dim,
                }),
            })
        };
        self.read.iter().map(tiles).collect()
    }
}

/// One head's units, brought from a device.
struct Brought {
    keys: Vec<f32>,
    values: Vec<f32>,
    dim: usize,
}

impl KvTiles for Brought {
    fn len(&self) -> usize {
        self.keys.len() / self.dim
    }

    fn keys<'a>(&'a self, range: std::ops::Range<usize>, _scratch: &'a mut [f32]) -> &'a [f32] {
        &self.keys[range.start * self.dim..range.end * self.dim]
    }

    fn values<'a>(&'a self, range: std::ops::Range<usize>, _scratch: &'a mut [f32]) -> &'a [f32] {
        &self.values[range.start * self.dim..range.end * self.dim]
    }
}

fn weight(part: Weight) -> Result<linear::Weight<'static>> {
    let Weight {
        dtype,
        rows,
        columns,
        bytes,
    } = part;
    if !linear::computes_with(dtype) {
        return Err(super::no_matrix("the CPU kernels", dtype));
    }
    linear::Weight::shared(dtype, rows, columns, bytes).map_err(|e| Error::Shape {
        what: "a matrix of weights",
        expected: format!("[{rows}, {columns}] of {dtype}"),
        found: e.to_string(),
    })
}

/// Matrices of the same columns, one below the other.
#[derive(Debug)]
struct HostMatrix {
    parts: Vec<linear::Weight<'static>>,
    columns: usize,
    host: Host,
}

impl Matrix for HostMatrix {
    fn shape(&self) -> [usize; 2] {
        [
            self.parts.iter().map(|part| part.rows()).sum(),
            self.columns,
        ]
    }

    fn apply_parts(&self, x: &Rows, widths: &[usize]) -> Result<Vec<Rows>> {
        super::check_product(self.shape(), x, widths)?;
        let tokens = x.rows();
        let weights: Vec<&linear::Weight<'_>> = self.parts.iter().collect();
        let buffers = widths.iter().map(|width| self.host.out(tokens, *width));
        let mut buffers: Vec<Buffer> = buffers.collect();
        let mut outs: Vec<&mut [f32]> = buffers.iter_mut().map(|b| &mut b.values[..]).collect();
        let x = x.values()?;
        match self.host.activations {
            Activations::Exact => linear::matmul_between(&[&x], &weights, &mut outs),
            Activations::Bytes => linear::matmul_rounded(&[&x], &weights, &mut outs),
        }
        let outs = buffers.into_iter().zip(widths);
        Ok(outs
            .map(|(buffer, width)| self.host.done(buffer, [tokens, *width]))
            .collect())
    }

    fn rows(&self, ids: &[u32]) -> Result<Rows> {
        let mut out = self.host.out(ids.len(), self.columns);
        for (id, out) in ids.iter().zip(out.values.chunks_exact_mut(self.columns)) {
            let mut row = *id as usize;
            let part = self.parts.iter().find(|part| {
                let here = row < part.rows();
                row -= if here { 0 } else { part.rows() };
                here
            });
            let Some(part) = part else {
                return Err(super::no_row(*id, self.shape()));
            };
            part.row(row, out);
        }
        Ok(self.host.done(out, [ids.len(), self.columns]))
    }

    fn values(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.shape()[0] * self.columns];
        let rows = self
            .parts
            .iter()
            .flat_map(|part| (0..part.rows()).map(move |row| (part, row)));
        for ((part, row), out) in rows.zip(out.chunks_exact_mut(self.columns.max(1))) {
            part.row(row, out);
        }
        Ok(out)
    }
}

#[derive(Debug)]
struct HostPerceptron {
    first: linear::Weight<'static>,
    second: Vec<f32>,
    outputs: usize,
}

impl Perceptron for HostPerceptron {
    fn shape(&self) -> [usize; 3] {
        [self.first.columns(), self.first.rows(), self.outputs]
    }

    fn apply(&self, parts: &[&Rows]) -> Result<Rows> {
        let tokens = super::check_parts(self.shape(), parts)?;
        let device = parts
            .first()
            .map_or_else(Device::default, |part| part.device());
        let parts: Vec<Cow<'_, [f32]>> = parts
            .iter()
            .map(|part| part.values())
            .collect::<Result<_>>()?;
        let parts: Vec<&[f32]> = parts.iter().map(|part| &**part).collect();
        let mut out = vec![0.0; tokens * self.outputs];
        perceptron(&parts, &self.first, &self.second, &mut out);
        Rows::new(out, self.outputs, &device)
    }
}
