//! A compute whose layers have lists of units of their own, and which looks at logits where they lie.

use super::PlainLists;
use crate::{
    Attention, Best, Compute, DType, DeviceMap, KeptUnits, KvStore, LayerSpec, Matrix, Observe,
    Observed, Perceptron, Quantization, Result, Rotation, Rows, Survey, TokenScore, UnitLists,
    Weight, check_tokens,
};
use burn::tensor::Device;
use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// What was done with lists.
#[derive(Debug, Default)]
struct Counts {
    chosen: AtomicUsize,
    read: AtomicUsize,
}

/// Another [`Compute`] with lists of units of its own, [`PlainLists`], that finds how likely tokens were by plain
/// loops: what a device is that chooses units, and looks at logits, where they lie, on any other.
#[derive(Debug, Clone)]
pub struct Listing {
    inner: Arc<dyn Compute>,
    counts: Arc<Counts>,
}

impl Listing {
    /// Computes as `inner` does.
    pub fn new(inner: Arc<dyn Compute>) -> Self {
        Self {
            inner,
            counts: Arc::default(),
        }
    }

    /// How often units of a layer were chosen where they lie.
    pub fn chosen(&self) -> usize {
        self.counts.chosen.load(Ordering::Relaxed)
    }

    /// How often lists of a layer were read.
    pub fn read(&self) -> usize {
        self.counts.read.load(Ordering::Relaxed)
    }
}

#[deny(clippy::missing_trait_methods)]
impl Compute for Listing {
    fn name(&self) -> &'static str {
        "lists"
    }

    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn map(&self) -> Option<&DeviceMap> {
        None
    }

    fn during(&self, work: &mut (dyn FnMut() + Send)) {
        self.inner.during(work);
    }

    fn each(&self, pieces: Vec<Box<dyn FnOnce() + Send + '_>>) {
        self.inner.each(pieces);
    }

    fn rows(&self, values: Vec<f32>, width: usize) -> Result<Rows> {
        self.inner.rows(values, width)
    }

    fn matrix(&self, parts: Vec<Weight>) -> Result<Arc<dyn Matrix>> {
        self.inner.matrix(parts)
    }

    fn computes_with(&self, dtype: DType) -> bool {
        self.inner.computes_with(dtype)
    }

    fn perceptron(&self, first: Weight, second: Vec<f32>) -> Result<Arc<dyn Perceptron>> {
        self.inner.perceptron(first, second)
    }

    fn norm(&self, x: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
        self.inner.norm(x, gain, epsilon)
    }

    fn add_norm(&self, x: &mut Rows, y: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
        self.inner.add_norm(x, y, gain, epsilon)
    }

    fn gate(&self, gate_up: &Rows) -> Result<Rows> {
        self.inner.gate(gate_up)
    }

    fn rotate(&self, x: Rows, by: &Rotation<'_>) -> Result<Rows> {
        self.inner.rotate(x, by)
    }

    fn attend(&self, q: Rows, over: &Attention<'_>) -> Result<Rows> {
        self.inner.attend(q, over)
    }

    fn observe(
        &self,
        q: &Rows,
        over: &Attention<'_>,
        what: Observe,
        factors: Option<&[f32]>,
    ) -> Result<Observed> {
        self.inner.observe(q, over, what, factors)
    }

    fn survey(&self, q: &Rows, over: &Attention<'_>, last: usize) -> Result<Survey> {
        self.inner.survey(q, over, last)
    }

    fn select(&self, scores: &[f32], keep: usize, protected: &[Range<usize>]) -> Result<Vec<u32>> {
        self.inner.select(scores, keep, protected)
    }

    fn largest(&self, rows: &Rows) -> Result<Option<Vec<Option<u32>>>> {
        self.inner.largest(rows)
    }

    fn surprisal(&self, rows: &Rows, of: &[u32]) -> Result<Option<Vec<f32>>> {
        let [many, width] = rows.shape();
        check_tokens([many, width], of)?;
        let all = rows.values()?;
        let of_row = |(row, of): (usize, &u32)| {
            let row = &all[row * width..][..width];
            TokenScore::of(row, *of).map_or(f32::NAN, |score| score.nll)
        };
        Ok(Some(of.iter().enumerate().map(of_row).collect()))
    }

    fn unit_lists(&self, kv_heads: usize) -> Option<Box<dyn UnitLists>> {
        Some(Box::new(Counted {
            lists: Box::new(PlainLists::new(kv_heads, self.device())),
            counts: self.counts.clone(),
        }))
    }

    fn store(&self, layer: &LayerSpec, dtype: DType) -> Result<Box<dyn KvStore>> {
        self.inner.store(layer, dtype)
    }

    fn coded_store(&self, layer: &LayerSpec, config: Quantization) -> Result<Box<dyn KvStore>> {
        self.inner.coded_store(layer, config)
    }
}

/// Plain lists that are counted.
#[derive(Debug)]
struct Counted {
    lists: Box<dyn UnitLists>,
    counts: Arc<Counts>,
}

impl UnitLists for Counted {
    fn put(&mut self, positions: &[&[u32]], scores: &[&[f32]]) -> Result<()> {
        self.lists.put(positions, scores)
    }

    fn append(&mut self, first: usize, scores: &Rows) -> Result<()> {
        self.lists.append(first, scores)
    }

    fn keep(&mut self, best: &[Best]) -> Result<KeptUnits> {
        self.counts.chosen.fetch_add(1, Ordering::Relaxed);
        self.lists.keep(best)
    }

    fn read(&self) -> Result<Vec<(Vec<u32>, Vec<f32>)>> {
        self.counts.read.fetch_add(1, Ordering::Relaxed);
        self.lists.read()
    }

    fn bytes(&self) -> usize {
        self.lists.bytes()
    }

    fn fork(&self) -> Box<dyn UnitLists> {
        Box::new(Self {
            lists: self.lists.fork(),
            counts: self.counts.clone(),
        })
    }
}
