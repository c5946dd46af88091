//! Patterns of attention: the offline search for MInference's tables, and how much of attention a policy's
//! queries see.

use crate::{Error, Result};
use locret_core::{
    CacheOptions, CausalLm, Held, KvCachePolicy, KvStore, LayerSpec, LayerUnits, ModelSpec, Needs,
    Phase, Placement, Positions, Prefill, Ranking, Rows, Session, Step, Verdict, Visible,
};
use locret_policies::minference::{Found, Patterns, recalled, search_layer};
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

/// Told of each layer: its index, and what was found for its query heads.
pub type OnLayer = dyn Fn(usize, &[Found]) -> locret_core::Result<()> + Send + Sync;

/// Searches for the patterns of `model`'s heads on one text, in the layers that `known` does not have yet, and
/// hands on each layer when it is done. Queries before the `skip`th count for nothing.
///
/// **Cost:** one pass over the text, with all attention of the layers that are searched in plain arithmetic.
///
/// # Errors
/// [`Error::Core`] for a text of no more than `skip` tokens, and what `on_layer` says.
pub fn search(
    model: &Arc<dyn CausalLm>,
    ids: &[u32],
    skip: usize,
    known: usize,
    on_layer: Box<OnLayer>,
) -> Result<()> {
    let policy = Searching {
        skip,
        known,
        on_layer,
    };
    let options = CacheOptions::default();
    let mut session = Session::with_options(model.clone(), Arc::new(policy), options)?;
    // In one step: every query's keys have to be there.
    session
        .prefill(ids, &Prefill::new(ids.len().max(1), 0))
        .map(drop)
        .map_err(Error::from)
}

/// A table with a layer more.
pub fn with_layer(mut table: Patterns, found: &[Found]) -> Patterns {
    table.push(found.iter().map(|head| (head.pattern, head.recalled)));
    table
}

/// Keeps everything, and searches in each layer.
struct Searching {
    skip: usize,
    known: usize,
    on_layer: Box<OnLayer>,
}

impl fmt::Debug for Searching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Searching")
            .field("skip", &self.skip)
            .field("known", &self.known)
            .finish_non_exhaustive()
    }
}

impl KvCachePolicy for Searching {
    fn name(&self) -> String {
        "searching".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.before()
    }

    fn before(
        &self,
        at: &Step,
        queries: &Rows,
        units: &LayerUnits<'_>,
    ) -> locret_core::Result<Visible> {
        if at.layer.index >= self.known && matches!(at.phase, Phase::Prefill { .. }) {
            let found = search_layer(units, queries, self.skip)?;
            (self.on_layer)(at.layer.index, &found)?;
        }
        Ok(Visible::All)
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> locret_core::Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

/// How much of attention lies in what queries saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recall {
    /// The mean over query heads and chunks.
    pub mean: f64,
    /// The least of a query head in a chunk.
    pub least: f64,
}

/// Another policy, watched: what share of the attention that its queries would pay to everything before them lies
/// in what they see. Everything else is that policy's.
#[derive(Debug)]
pub struct Recalling<P> {
    inner: P,
    every: usize,
    shares: Mutex<Vec<f64>>,
}

impl<P: KvCachePolicy> Recalling<P> {
    /// Watches every `every`th query of a chunk, which takes a pass over the keys for each.
    pub fn new(inner: P, every: usize) -> Self {
        Self {
            inner,
            every,
            shares: Mutex::default(),
        }
    }

    /// What was seen so far; `None` where everything was.
    pub fn recall(&self) -> Option<Recall> {
        let shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        let least = shares.iter().copied().reduce(f64::min)?;
        Some(Recall {
            mean: shares.iter().sum::<f64>() / shares.len() as f64,
            least,
        })
    }
}

#[deny(clippy::missing_trait_methods)]
impl<P: KvCachePolicy> KvCachePolicy for Recalling<P> {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn fingerprint(&self) -> String {
        self.inner.fingerprint()
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

    fn validate(&self, model: &ModelSpec, prefill: &Prefill) -> locret_core::Result<()> {
        self.inner.validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> locret_core::Result<Box<dyn KvStore>> {
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

    fn before(
        &self,
        at: &Step,
        queries: &Rows,
        units: &LayerUnits<'_>,
    ) -> locret_core::Result<Visible> {
        let visible = self.inner.before(at, queries, units)?;
        if let Visible::Chosen(views) = &visible {
            let shares = recalled(units, queries, views, self.every)?;
            let mut all = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(shares);
        }
        Ok(visible)
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> locret_core::Result<Verdict> {
        self.inner.step(at, units)
    }

    /// What is recalled is looked at.
    fn ranking(&self, _at: &Step, _units: &LayerUnits<'_>) -> locret_core::Result<Option<Ranking>> {
        Ok(None)
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> locret_core::Result<Vec<Verdict>> {
        self.inner.steps(at, units)
    }
}
