//! What the policies that look at attention or at new tokens have in common.

use locret_core::{Error, LayerUnits, Observed, Qkv, Result, Scorer, Scores};

/// The attention that `scorer` asked for.
pub(crate) fn attention<'a>(scorer: &impl Scorer, units: &LayerUnits<'a>) -> Result<&'a Observed> {
    let missing = || {
        Error::policy(
            scorer.name(),
            "the attention that it needs was not observed",
        )
    };
    units.observed().ok_or_else(missing)
}

/// Queries, keys and values of new tokens, which `scorer` asked for.
pub(crate) fn qkv<'a>(scorer: &impl Scorer, units: &LayerUnits<'a>) -> Result<&'a Qkv> {
    let missing = || {
        Error::policy(
            scorer.name(),
            "the queries, keys and values that it needs are not there",
        )
    };
    units.qkv().ok_or_else(missing)
}

/// The weights that each query head of KV head `head` paid.
pub(crate) fn group(attention: &Observed, head: usize, group: usize) -> Result<Vec<&[f32]>> {
    (head * group..(head + 1) * group)
        .map(|query| attention.weights(query))
        .collect()
}

/// The scores of the step before, where a step has no query that could change them.
pub(crate) fn carried(units: &LayerUnits<'_>) -> Result<Scores> {
    let scores = (0..units.kv_heads()).map(|head| units.carried(head).to_vec());
    Scores::per_head(scores.collect())
}
