//! What the policies that look at attention or at new tokens have in common.

use locret_core::{Error, LayerUnits, Observed, Qkv, Result, Scorer, Scores};

/// The attention that the policy of this name asked for.
pub(crate) fn attention<'a>(
    name: impl Fn() -> String,
    units: &LayerUnits<'a>,
) -> Result<&'a Observed> {
    let missing = || Error::policy(name(), "the attention that it needs was not observed");
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

/// What each of `len` units of KV head `head` was paid in this step, mean over the query heads of its group.
pub(crate) fn paid(
    attention: &Observed,
    head: usize,
    group_size: usize,
    len: usize,
) -> Result<Vec<f32>> {
    let heads = group(attention, head, group_size)?;
    let mean = |unit: usize| heads.iter().map(|h| h[unit]).sum::<f32>() / group_size as f32;
    Ok((0..len).map(mean).collect())
}

/// What units had before, of those that are not new, and what they were paid now.
pub(crate) fn added(before: &[f32], paid: Vec<f32>) -> Vec<f32> {
    let mut sums = paid;
    let pairs = sums.iter_mut().zip(before);
    pairs.for_each(|(sum, before)| *sum += before);
    sums
}

/// The scores of the step before, where a step has no query that could change them.
pub(crate) fn carried(units: &LayerUnits<'_>) -> Result<Scores> {
    let scores = (0..units.kv_heads()).map(|head| units.carried(head).to_vec());
    Scores::per_head(scores.collect())
}
