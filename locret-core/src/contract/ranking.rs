//! A verdict that needs no look at scores: so many of the best.

use crate::Rows;

/// What stays of a layer where that is the best-scored units of each head, and every unit keeps the score that it is
/// born with; see [`KvCachePolicy::ranking`](crate::KvCachePolicy::ranking).
#[derive(Debug, Clone)]
pub struct Ranking {
    /// What new units carry, `[new, kv_heads]`; the others keep what they have.
    pub born: Rows,
    /// By KV head, how many stay; `None` if all do.
    pub best: Option<Vec<Best>>,
}

/// How many units of a head stay: the best-scored ones, of equal scores the earlier one, as
/// [`Compute::select`](crate::Compute::select) has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Best {
    /// How many; at most as many as there are.
    pub keep: usize,
    /// How many of the first units stay whatever their score.
    pub first: usize,
    /// How many of the newest do; with the first ones at most as many as stay.
    pub newest: usize,
}
