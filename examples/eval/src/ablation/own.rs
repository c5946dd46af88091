//! Policies of a caller's own in a grid.

use super::{Candidate, Grid};
use crate::{Error, Result};
use locret_core::{Budget, KvCachePolicy};
use serde_json::json;
use std::{fmt, sync::Arc};

/// A policy that no configuration names, written anywhere: it stands in a [`Grid`]'s table with each of the grid's
/// budgets and stores of numbers (`f32`, `f16`, `bf16`).
///
/// Protection and positions are its own affair; what a grid says of them is for policies that it names.
#[derive(Clone)]
pub struct Own {
    label: String,
    build: Arc<dyn Fn(Budget) -> Arc<dyn KvCachePolicy> + Send + Sync>,
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Own")
            .field("label", &self.label)
            .finish_non_exhaustive()
    }
}

impl Own {
    /// What tables call it, and how it is made for a budget.
    ///
    /// Results that are there are found by this label: another policy, or one that was changed, needs another.
    pub fn new<P: KvCachePolicy + 'static>(
        label: impl Into<String>,
        build: impl Fn(Budget) -> P + Send + Sync + 'static,
    ) -> Self {
        Self {
            label: label.into(),
            build: Arc::new(move |budget| Arc::new(build(budget))),
        }
    }

    /// What tables call it.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// It, with each of the grid's budgets and stores.
    ///
    /// # Errors
    /// [`Error::Usage`] if the grid has only stores of integers, or a policy of this name.
    pub fn candidates(&self, grid: &Grid) -> Result<Vec<Candidate>> {
        let label = &self.label;
        if grid.policies.iter().any(|entry| entry.label == *label) {
            return Err(Error::Usage(format!(
                "the grid has a policy that is called {label:?}: give your own another name"
            )));
        }
        let stores = || (grid.stores.iter()).filter(|store| store.quantization().is_none());
        if stores().next().is_none() {
            return Err(Error::Usage(format!(
                "{label:?} is kept as numbers, and the grid's stores are integers alone"
            )));
        }
        let mut all = Vec::new();
        for budget in &grid.budgets {
            for store in stores() {
                let settings = json!({ "budget": budget });
                all.push(Candidate {
                    store: *store,
                    ..Candidate::new(label, (self.build)(*budget), settings)
                });
            }
        }
        Ok(all)
    }
}
