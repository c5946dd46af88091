//! Prompts that see a part of what a policy keeps.

use crate::{MInference, minference::Patterns};
use locret_core::{
    Error, Held, KvCachePolicy, KvStore, LayerSpec, LayerUnits, ModelSpec, Needs, Placement,
    Positions, Prefill, Ranking, Result, Rows, Step, Verdict, Visible,
};

/// Any policy that keeps a part of the units, of which a prompt's queries see a part again, as [`MInference`] has it
/// (arXiv 2407.02490 §3): a bounded cache that is read with less attention. The policy inside decides what stays.
///
/// **Cost:** attention of a chunk is to the columns and diagonals of its heads instead of the whole budget and the chunk,
/// and there is one more pass over the keys for 64 queries of the chunk. It pays where budgets and chunks are many
/// thousands of units.
///
/// **Chunked prefill:** columns and diagonals are chosen anew for each chunk, among the units that are held then. Policies
/// that look at attention (H2O, SnapKV) see the attention that was computed.
///
/// Policies that choose themselves what queries see cannot be inside.
#[derive(Debug, Clone)]
#[must_use]
pub struct Sparse<P> {
    inner: P,
    sight: MInference,
}

impl<P: KvCachePolicy> Sparse<P> {
    /// `inner`, whose prompts are read in these patterns.
    pub fn new(inner: P, patterns: Patterns) -> Self {
        let sight = MInference::new(patterns).with_positions(inner.positions());
        Self { inner, sight }
    }
}

#[deny(clippy::missing_trait_methods)]
impl<P: KvCachePolicy> KvCachePolicy for Sparse<P> {
    fn name(&self) -> String {
        format!("{}+{}", self.inner.name(), self.sight.name())
    }

    fn fingerprint(&self) -> String {
        let (inner, sight) = (self.inner.fingerprint(), self.sight.fingerprint());
        format!("Sparse {{ inner: {inner}, sight: {sight} }}")
    }

    fn needs(&self) -> Needs {
        self.inner.needs().before()
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
        if self.inner.needs().before {
            return Err(Error::setting(
                "policy whose prompts see a part",
                "one that lets queries see everything",
                self.inner.name(),
            ));
        }
        self.sight.validate(model, prefill)?;
        self.inner.validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        self.inner.store(layer, place)
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
        self.sight.before(at, queries, units)
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
