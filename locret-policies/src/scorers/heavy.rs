//! Heavy hitters: what attention has gone to so far, as a plain sum.

use super::observed;
use crate::published::Published;
use locret_core::{
    Budget, Evict, Guard, LayerUnits, Needs, Observation, Queries, Result, Scorer, Scores, Step,
};

/// The attention that a unit has received from all queries since it was born, averaged over the query heads of its
/// group: what merging methods choose by ([`D2o`](crate::D2o), [`Cam`](crate::Cam)). [`H2o`](crate::H2o) divides it
/// by the number of queries that could see the unit.
///
/// **Keeps** the first four units, the newest quarter of the budget ([`Heavy::policy`], the share of D2O's paper),
/// and of the rest those with the largest sums.
///
/// **Cost, chunked prefill:** as for [`H2o`](crate::H2o). Sums favour old units, and all the more the longer the text.
#[derive(Debug, Clone, Copy, Default)]
pub struct Heavy;

impl Heavy {
    /// First units that stay.
    pub const SINKS: usize = 4;

    /// As published for D2O: four sinks, a quarter of the budget for the newest units, original positions.
    pub fn policy(budget: Budget) -> Evict<Self> {
        Self.published(budget)
    }
}

impl Published for Heavy {}

impl Scorer for Heavy {
    fn name(&self) -> String {
        "heavy".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.observe(Queries::All, Observation::Weights)
    }

    fn carries(&self) -> bool {
        true
    }

    fn guard(&self, units: usize) -> Guard {
        Guard {
            sinks: Self::SINKS,
            recent: units / 4,
            ..Guard::default()
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        if units.incoming() == 0 {
            return observed::carried(units);
        }
        let attention = observed::attention(|| self.name(), units)?;
        let heads = (0..units.kv_heads()).map(|head| {
            let paid = observed::paid(attention, head, at.layer.group(), units.len(head))?;
            Ok(observed::added(units.carried(head), paid))
        });
        Scores::per_head(heads.collect::<Result<_>>()?)
    }
}
