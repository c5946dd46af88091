//! Layers laid over several devices.

use super::{Attention, Compute, Matrix, Perceptron, Rotation, Rows, UnitLists, Weight};
use crate::{DType, Error, KvStore, LayerSpec, Observe, Observed, Quantization, Result, Survey};
use burn::tensor::Device;
use std::{ops::Range, sync::Arc};

/// A model's layers laid over several devices, or some on a device and the rest on the host: for models that
/// are larger than one card.
///
/// Whoever loads with it puts each layer's weights where the layer is; a cache keeps each layer's units there,
/// and policies compute there. Hidden rows move where the next layer lies elsewhere, and nowhere else. One
/// layer computes at a time: devices add up their memory, not their speed.
///
/// It is a [`Compute`] itself, so that it goes wherever one goes; what is asked of no layer is done where the
/// output is.
///
/// ```
/// # fn main() -> locret_core::Result<()> {
/// use locret_core::{Compute, DeviceMap, Host, Ops};
/// use std::sync::Arc;
///
/// # let device = burn::tensor::Device::default();
/// let host: Arc<dyn Compute> = Arc::new(Host::new(&device));
/// let other: Arc<dyn Compute> = Arc::new(Ops::new(&device));
/// // Three layers: the first on the host, the others and the output elsewhere.
/// let map = DeviceMap::of([(host, 1), (other, 2)])?;
/// assert_eq!(map.layer(1).name(), "operations");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct DeviceMap {
    /// By layer.
    layers: Vec<Arc<dyn Compute>>,
    input: Arc<dyn Compute>,
    output: Arc<dyn Compute>,
}

impl DeviceMap {
    /// So many layers with each of these, in this order. The embedding is where the first layer is, the last
    /// norm and the head where the last one is.
    ///
    /// # Errors
    /// [`Error::Setting`] for no layers, and for one that lies on a map itself.
    pub fn of(parts: impl IntoIterator<Item = (Arc<dyn Compute>, usize)>) -> Result<Self> {
        let parts = parts.into_iter();
        let layers: Vec<_> = parts
            .flat_map(|(compute, layers)| std::iter::repeat_n(compute, layers))
            .collect();
        let (Some(first), Some(last)) = (layers.first(), layers.last()) else {
            return Err(Error::setting("device map", "at least one layer", 0));
        };
        let (input, output) = (first.clone(), last.clone());
        for layer in &layers {
            plain(layer)?;
        }
        Ok(Self {
            layers,
            input,
            output,
        })
    }

    /// The same, with the embedding elsewhere.
    ///
    /// # Errors
    /// [`Error::Setting`] for a map.
    pub fn with_input(self, input: Arc<dyn Compute>) -> Result<Self> {
        plain(&input)?;
        Ok(Self { input, ..self })
    }

    /// The same, with the last norm and the head elsewhere.
    ///
    /// # Errors
    /// [`Error::Setting`] for a map.
    pub fn with_output(self, output: Arc<dyn Compute>) -> Result<Self> {
        plain(&output)?;
        Ok(Self { output, ..self })
    }

    /// How many layers there are.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// What computes a layer; behind the last one, the output.
    pub fn layer(&self, index: usize) -> &Arc<dyn Compute> {
        self.layers.get(index).unwrap_or(&self.output)
    }

    /// What has the embedding.
    pub fn input(&self) -> &Arc<dyn Compute> {
        &self.input
    }

    /// What has the last norm and the head.
    pub fn output(&self) -> &Arc<dyn Compute> {
        &self.output
    }

    /// Layers that lie together, in their order.
    pub fn runs(&self) -> Vec<(Range<usize>, &Arc<dyn Compute>)> {
        let mut first = 0;
        let runs = self.layers.chunk_by(Arc::ptr_eq);
        runs.map(|run| {
            let layers = first..first + run.len();
            first = layers.end;
            (layers, &run[0])
        })
        .collect()
    }

    /// Checks that this is a map of so many layers.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self, layers: usize) -> Result<()> {
        match self.layers.len() == layers {
            true => Ok(()),
            false => Err(Error::setting(
                "device map",
                format!("the model's {layers} layers"),
                format!("one of {}", self.layers.len()),
            )),
        }
    }

    /// All of them, each once.
    fn each_once(&self) -> Vec<&dyn Compute> {
        let ends = [&self.input, &self.output];
        let mut all: Vec<&Arc<dyn Compute>> = Vec::new();
        for compute in ends.into_iter().chain(&self.layers) {
            if !all.iter().any(|known| Arc::ptr_eq(known, compute)) {
                all.push(compute);
            }
        }
        all.into_iter().map(|compute| &**compute).collect()
    }
}

/// A map of maps has two answers to where a layer is.
fn plain(compute: &Arc<dyn Compute>) -> Result<()> {
    match compute.map() {
        None => Ok(()),
        Some(_) => Err(Error::setting(
            "device map",
            "layers on devices",
            "a layer on a map",
        )),
    }
}

/// Does `work` while all of them are at their best.
fn during(all: &[&dyn Compute], work: &mut (dyn FnMut() + Send)) {
    match all.split_first() {
        Some((first, rest)) => first.during(&mut || during(rest, work)),
        None => work(),
    }
}

impl<'a> dyn Compute + 'a {
    /// What computes a layer: this, or what the layer lies on where this is a [`DeviceMap`].
    pub fn for_layer(&self, index: usize) -> &(dyn Compute + 'a) {
        match self.map() {
            Some(map) => &**map.layer(index),
            None => self,
        }
    }
}

/// What computes a layer, as `Compute::for_layer` says, to keep.
pub fn layer_compute(compute: &Arc<dyn Compute>, index: usize) -> &Arc<dyn Compute> {
    compute.map().map_or(compute, |map| map.layer(index))
}

#[deny(clippy::missing_trait_methods)]
impl Compute for DeviceMap {
    fn name(&self) -> &'static str {
        "several devices"
    }

    fn device(&self) -> &Device {
        self.output.device()
    }

    fn map(&self) -> Option<&DeviceMap> {
        Some(self)
    }

    fn during(&self, work: &mut (dyn FnMut() + Send)) {
        during(&self.each_once(), work);
    }

    fn each(&self, pieces: Vec<Box<dyn FnOnce() + Send + '_>>) {
        self.output.each(pieces);
    }

    fn rows(&self, values: Vec<f32>, width: usize) -> Result<Rows> {
        self.output.rows(values, width)
    }

    fn matrix(&self, parts: Vec<Weight>) -> Result<Arc<dyn Matrix>> {
        self.output.matrix(parts)
    }

    fn computes_with(&self, dtype: DType) -> bool {
        self.output.computes_with(dtype)
    }

    fn perceptron(&self, first: Weight, second: Vec<f32>) -> Result<Arc<dyn Perceptron>> {
        self.output.perceptron(first, second)
    }

    fn norm(&self, x: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
        self.output.norm(x, gain, epsilon)
    }

    fn add_norm(&self, x: &mut Rows, y: &Rows, gain: &Rows, epsilon: f32) -> Result<Rows> {
        self.output.add_norm(x, y, gain, epsilon)
    }

    fn gate(&self, gate_up: &Rows) -> Result<Rows> {
        self.output.gate(gate_up)
    }

    fn rotate(&self, x: Rows, by: &Rotation<'_>) -> Result<Rows> {
        self.output.rotate(x, by)
    }

    fn attend(&self, q: Rows, over: &Attention<'_>) -> Result<Rows> {
        self.layer(over.layer.index).attend(q, over)
    }

    fn observe(
        &self,
        q: &Rows,
        over: &Attention<'_>,
        what: Observe,
        factors: Option<&[f32]>,
    ) -> Result<Observed> {
        self.layer(over.layer.index).observe(q, over, what, factors)
    }

    fn survey(&self, q: &Rows, over: &Attention<'_>, last: usize) -> Result<Survey> {
        self.layer(over.layer.index).survey(q, over, last)
    }

    fn select(&self, scores: &[f32], keep: usize, protected: &[Range<usize>]) -> Result<Vec<u32>> {
        self.output.select(scores, keep, protected)
    }

    fn largest(&self, rows: &Rows) -> Result<Option<Vec<Option<u32>>>> {
        self.output.largest(rows)
    }

    fn surprisal(&self, rows: &Rows, of: &[u32]) -> Result<Option<Vec<f32>>> {
        self.output.surprisal(rows, of)
    }

    fn unit_lists(&self, kv_heads: usize) -> Option<Box<dyn UnitLists>> {
        self.output.unit_lists(kv_heads)
    }

    fn store(&self, layer: &LayerSpec, dtype: DType) -> Result<Box<dyn KvStore>> {
        self.layer(layer.index).store(layer, dtype)
    }

    fn coded_store(&self, layer: &LayerSpec, config: Quantization) -> Result<Box<dyn KvStore>> {
        self.layer(layer.index).coded_store(layer, config)
    }
}
