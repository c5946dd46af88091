//! What the policies share that look at attention.

use locret_core::{Error, LayerUnits, Observed, Result, Scorer, Scores};

/// The attention that `scorer` asked for, one list per query head.
pub(crate) fn weights<'a>(scorer: &impl Scorer, units: &LayerUnits<'a>) -> Result<&'a Observed> {
    units.observed().ok_or_else(|| Error::Policy {
        policy: scorer.name(),
        message: "the attention that it needs was not observed".into(),
    })
}

/// The scores as they were left: no query is there to change them.
pub(crate) fn carried(units: &LayerUnits<'_>) -> Result<Scores> {
    let scores = (0..units.kv_heads()).map(|head| units.carried(head).to_vec());
    Scores::per_head(scores.collect())
}
