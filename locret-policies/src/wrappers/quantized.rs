//! Any policy over a quantised store.

use locret_core::{
    Held, KvCachePolicy, KvStore, LayerSpec, LayerUnits, ModelSpec, Needs, Placement, Positions,
    Prefill, Quantization, QuantizedStore, Ranking, Result, Rows, Step, Verdict, Visible,
};

/// A policy whose units are kept as integers of 2, 3, 4 or 8 bits
/// ([`QuantizedStore`]). The policy inside decides what stays.
///
/// **Cost:** codes and scales are made once for each unit that survives the step it came in, and
/// become numbers again as attention reads them.
///
/// **Chunked prefill:** within its own step a unit is exact. Later chunks see what the codes say.
///
/// Locret with 4 bits: 27.11 instead of 27.96 on L-Eval (arXiv 2410.01805, table 4).
#[derive(Debug, Clone)]
pub struct Quantized<P> {
    inner: P,
    config: Quantization,
}

impl<P: KvCachePolicy> Quantized<P> {
    /// `inner` over a store of this kind.
    pub fn new(inner: P, config: Quantization) -> Self {
        Self { inner, config }
    }
}

#[deny(clippy::missing_trait_methods)]
impl<P: KvCachePolicy> KvCachePolicy for Quantized<P> {
    fn name(&self) -> String {
        format!("{}+{}", self.inner.name(), self.config.name())
    }

    fn fingerprint(&self) -> String {
        let Self { inner, config } = self;
        let inner = inner.fingerprint();
        format!("Quantized {{ inner: {inner}, config: {config:?} }}")
    }

    fn needs(&self) -> Needs {
        self.inner.needs()
    }

    fn positions(&self) -> Positions {
        self.inner.positions()
    }

    fn carries(&self) -> Option<String> {
        self.inner.carries()
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.inner.carried_width(layer)
    }

    fn noted(&self, layer: &LayerSpec) -> usize {
        self.inner.noted(layer)
    }

    fn validate(&self, model: &ModelSpec, prefill: &Prefill) -> Result<()> {
        self.config.validate()?;
        self.inner.validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        QuantizedStore::boxed(layer, place, self.config)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        self.inner.limit(layer, total)
    }

    fn held(&self, layer: &LayerSpec, total: usize) -> Option<Held> {
        self.inner.held(layer, total)
    }

    fn decode_slack(&self) -> Option<usize> {
        self.inner.decode_slack()
    }

    fn before(&self, at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        self.inner.before(at, queries, units)
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        self.inner.step(at, units)
    }

    fn ranking(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Option<Ranking>> {
        self.inner.ranking(at, units)
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        self.inner.steps(at, units)
    }
}
