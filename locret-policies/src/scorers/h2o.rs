//! H2O: units that attention has gone to so far.

use super::observed;
use crate::published::Published;
use locret_core::{
    Budget, Evict, Guard, LayerUnits, Needs, Observation, Queries, Result, Scorer, Scores, Step,
};

/// H2O, heavy hitters (arXiv 2306.14048 §4): the attention that a unit has received from all
/// queries since it was born, averaged over the query heads of its group and divided by the number
/// of queries that could see it.
///
/// **Keeps** the newest units (half the budget in [`H2o::policy`], as published) and of the rest
/// the ones with the highest mean.
///
/// **Cost:** the attention weights of *every* query, gathered in a second pass over the keys: about
/// as much again as attention itself, in the tail of a prompt and while decoding too.
///
/// **Chunked prefill:** it breaks. A unit can only be judged by queries that have been read, and
/// what the question at the end will look for was dropped by then: 21.18 against Locret's 47.57 on
/// ∞Bench at the same budget (arXiv 2410.01805, table 2). Sums without the division would favour
/// old units even more. What it loses on SmolLM2, task by task and at equal bytes, is in this
/// library's `docs/ablation.md`.
#[derive(Debug, Clone, Copy, Default)]
pub struct H2o;

impl H2o {
    /// As published: half of the budget for the newest units (128 where it is not a number of
    /// units), original positions.
    pub fn policy(budget: Budget) -> Evict<Self> {
        Self.published(budget)
    }
}

impl Published for H2o {}

impl Scorer for H2o {
    fn name(&self) -> String {
        "h2o".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.observe(Queries::All, Observation::Weights)
    }

    fn carries(&self) -> bool {
        true
    }

    fn guard(&self, units: usize) -> Guard {
        Guard {
            recent: units / 2,
            ..Guard::default()
        }
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        if units.incoming() == 0 {
            return observed::carried(units);
        }
        let attention = observed::attention(|| self.name(), units)?;
        let scores = (0..units.kv_heads()).map(|head| {
            let (old, positions) = (units.carried(head), units.positions(head));
            let paid = observed::paid(attention, head, at.layer.group(), units.len(head))?;
            let mean = |(unit, new): (usize, f32)| {
                let born = positions[unit] as usize;
                // The queries of a unit are its own token's and all that follow.
                let queries = (at.seen + at.incoming - born) as f32;
                let before = at.seen.saturating_sub(born) as f32;
                let so_far = old.get(unit).copied().unwrap_or(0.0) * before;
                (so_far + new) / queries
            };
            Ok(paid.into_iter().enumerate().map(mean).collect())
        });
        Scores::per_head(scores.collect::<Result<_>>()?)
    }
}
