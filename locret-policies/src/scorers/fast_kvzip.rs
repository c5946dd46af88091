//! Fast KVzip: gates that guess what repeating the text would look at.

use crate::{HeadForm, Locret, RetainingHeads, published::Published};
use locret_core::{
    Budget, Error, Evict, Guard, LayerUnits, ModelSpec, Needs, Result, Scorer, Scores, Step,
};
use std::sync::Arc;

/// Fast KVzip (arXiv 2601.17668): a gate of low rank reads what a layer makes queries, keys and values from and
/// gives each unit a score between 0 and 1 ([`Gate`](crate::Gate)); as a softmax would that has a few learned
/// keys to look at instead. It is trained on KVzip's scores, made once, when the unit is born, and carried.
///
/// **Keeps** the first four units, the newest ones (an eighth of the budget, at most 4,096), and of the rest those
/// with the highest scores. As published the best share of what has left the newest units stays, over all layers
/// and heads, and is not judged again, so that the cache grows with the text. The same with a bound is a budget
/// over the model ([`Share::Model`](locret_core::Share::Model)); scores can also be held against a threshold
/// ([`Threshold`](crate::Threshold)).
///
/// **Cost:** a product of `hidden` with 16 features for each query head and each KV head, for each token of a
/// layer. No attention weight is needed, so that fused attention stays.
///
/// **Chunked prefill:** made for it: a score depends on the token alone.
#[derive(Debug, Clone)]
pub struct FastKvZip {
    heads: Locret,
}

impl FastKvZip {
    /// First units that stay, as published.
    pub const SINKS: usize = 4;
    /// The most newest units that stay, as published for texts of 32,000 tokens and more.
    pub const WINDOW: usize = 4096;

    /// With these heads, of the form [`HeadForm::Gate`].
    pub fn new(heads: impl Into<Arc<RetainingHeads>>) -> Self {
        Self {
            heads: Locret::new(heads),
        }
    }

    /// Keeps `budget` units, the first and the newest for certain; original positions.
    pub fn policy(self, budget: Budget) -> Evict<Self> {
        self.published(budget)
    }
}

impl Published for FastKvZip {}

impl Scorer for FastKvZip {
    fn name(&self) -> String {
        "fast-kvzip".into()
    }

    /// Weights do not show in `Debug`.
    fn fingerprint(&self) -> String {
        format!("FastKvZip {{ heads: {} }}", self.heads.fingerprint())
    }

    fn needs(&self) -> Needs {
        self.heads.needs()
    }

    fn carries(&self) -> bool {
        true
    }

    fn guard(&self, units: usize) -> Guard {
        Guard {
            sinks: Self::SINKS,
            recent: Self::WINDOW.min(units / 8),
            ..Guard::default()
        }
    }

    fn validate(&self, model: &ModelSpec) -> Result<()> {
        match self.heads.heads().form() {
            HeadForm::Gate => self.heads.validate(model),
            other => Err(Error::setting(
                "heads of Fast KVzip",
                "gate",
                format!("{other:?}"),
            )),
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        self.heads.score(at, units)
    }
}
