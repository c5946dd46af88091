//! What chosen queries, the newest ones, pay to each unit: sums or largest ones of softmax weights, or the largest
//! scores, over all KV heads in one launch. Neither scores nor weights are kept: a first pass ([`tops`]) finds what
//! each query's softmax divides by, a second one ([`by_unit`]) computes a tile of scores again and gathers it.
//!
//! Rows, tiles and the units of a cube are those of [`attention`](super::attention). There are `count` queries, the
//! last of `tokens`; row `i` is query `i / group`, and query head `i % group` of its KV head.

mod distances;
mod softmax;
mod units;

pub(crate) use distances::by_distance;
pub(crate) use softmax::tops;
pub(crate) use units::by_unit;

use super::{
    attention::{ACROSS, Form, HIDDEN},
    online::scored,
};
use cubecl::prelude::*;

/// What becomes of what a unit is paid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Gather {
    /// By query head, the sum of weights.
    Sum,
    /// By query head, the largest of weights that were multiplied by a factor of their query; 0 of none.
    Largest,
    /// The largest score of all query heads; [`HIDDEN`] of none.
    Logits,
}

impl Gather {
    /// Numbers of a unit.
    pub(crate) fn heads(self, group: usize) -> usize {
        match self {
            Self::Logits => 1,
            _ => group,
        }
    }

    fn nothing(self) -> f32 {
        match self {
            Self::Logits => HIDDEN,
            _ => 0.0,
        }
    }
}

/// What a block's rows pay to a tile of keys from unit `at` on, or their scores: `weights`, `[rows, keys + 1]`, in
/// shared memory.
#[cube]
fn weigh(
    queries: &[f32],
    tile: &[f32],
    weights: &mut [f32],
    stats: &[f32],
    factors: &[f32],
    block: usize,
    at: usize,
    before: usize,
    total: usize,
    parts: usize,
    unit: usize,
    #[comptime] form: Form,
    #[comptime] gather: Gather,
) {
    let group = comptime!(form.group);
    let own_rows = comptime!(form.own_rows());
    let own_keys = comptime!(form.tile() / ACROSS);
    let lane = unit % ACROSS;
    let mine = unit / ACROSS * own_rows;
    let heads = CUBE_COUNT_Y as usize;
    let scores = scored(queries, tile, mine, lane, form);
    #[unroll]
    for r in 0..own_rows {
        let row = block + mine + r;
        let mut most = 0.0f32;
        let mut share = 0.0f32;
        let mut sight = 0usize;
        if row < total {
            sight = before + row / group + 1;
            if comptime!(gather != Gather::Logits) {
                most = HIDDEN.runtime();
                for part in 0..parts {
                    let stat = ((part * heads + CUBE_POS_Y as usize) * total + row) * 2;
                    most = f32::max(most, stats[stat]);
                }
                let mut sum = 0.0f32;
                for part in 0..parts {
                    let stat = ((part * heads + CUBE_POS_Y as usize) * total + row) * 2;
                    sum += stats[stat + 1] * f32::exp(stats[stat] - most);
                }
                share = 1.0 / sum;
                if comptime!(gather == Gather::Largest) {
                    share *= factors[row / group];
                }
            }
        }
        #[unroll]
        for k in 0..own_keys {
            let key = k * ACROSS + lane;
            let mut weight = scores[r * own_keys + k];
            if comptime!(gather != Gather::Logits) {
                weight = f32::exp(weight - most) * share;
            }
            let nothing = comptime!(gather.nothing());
            weights[(mine + r) * comptime!(form.tile() + 1) + key] =
                select(at + key >= sight, nothing, weight);
        }
    }
}

/// One more number, to what was gathered before.
#[cube]
fn gathered(all: f32, one: f32, #[comptime] gather: Gather) -> f32 {
    let mut sum = all + one;
    if comptime!(gather != Gather::Sum) {
        // NaN if either is.
        sum = select(all >= one || all.is_nan(), all, one);
    }
    sum
}
