//! KVzap: heads that guess what repeating the text would look at.

use crate::{HeadForm, Locret, RetainingHeads, published::Published};
use locret_core::{
    Budget, Error, Evict, Guard, LayerUnits, ModelSpec, Needs, Result, Scorer, Scores, Step,
};
use std::sync::Arc;

/// KVzap (arXiv 2601.07891): a linear head, or one with a layer between, reads what a layer makes queries, keys
/// and values from and guesses the logarithm of the most attention that a unit would get if the text were
/// repeated (KVzip's score, 2505.23416). The score is made once, when the unit is born, and carried.
///
/// **Keeps** the newest 128 units (at most half of the budget), as scores do not know where a unit stands, and of
/// the rest those with the highest scores. As published it has a threshold instead of a budget:
/// [`Threshold`](crate::Threshold), with 128 newest units as well.
///
/// **Cost:** a product of `hidden` with `kv_heads`, or with `hidden / 8` and then `kv_heads`, for each token of a
/// layer. No attention weight is needed, so that fused attention stays.
///
/// **Chunked prefill:** made for it: a score depends on the token alone. Scores are of one scale in all heads
/// and layers, so that these can share a budget ([`Evict::ada`], [`Evict::share`]).
#[derive(Debug, Clone)]
pub struct KvZap {
    heads: Locret,
}

impl KvZap {
    /// Newest units that stay, as published.
    pub const WINDOW: usize = 128;

    /// With these heads, of the form [`HeadForm::Linear`] or [`HeadForm::Mlp`].
    pub fn new(heads: impl Into<Arc<RetainingHeads>>) -> Self {
        Self {
            heads: Locret::new(heads),
        }
    }

    /// Keeps `budget` units, the newest for certain; original positions.
    pub fn policy(self, budget: Budget) -> Evict<Self> {
        self.published(budget)
    }
}

impl Published for KvZap {}

impl Scorer for KvZap {
    fn name(&self) -> String {
        "kvzap".into()
    }

    /// Weights do not show in `Debug`.
    fn fingerprint(&self) -> String {
        format!("KvZap {{ heads: {} }}", self.heads.fingerprint())
    }

    fn needs(&self) -> Needs {
        self.heads.needs()
    }

    fn carries(&self) -> bool {
        true
    }

    fn guard(&self, units: usize) -> Guard {
        Guard {
            recent: Self::WINDOW.min(units / 2),
            ..Guard::default()
        }
    }

    fn validate(&self, model: &ModelSpec) -> Result<()> {
        match self.heads.heads().form() {
            HeadForm::Linear | HeadForm::Mlp => self.heads.validate(model),
            other => Err(Error::setting(
                "heads of KVzap",
                "linear or mlp",
                format!("{other:?}"),
            )),
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        self.heads.score(at, units)
    }
}
