//! A draw by lot.

use crate::published::Published;
use locret_core::{Budget, Evict, LayerUnits, Result, Scorer, Scores, Step};

/// Keeps units drawn by lot: the floor that every method has to clear.
///
/// A unit's lot depends on the seed, its layer, its KV head and its original position alone, so
/// that the same text gives the same selection however it is cut into chunks.
///
/// **Cost:** a hash per unit, when something has to go.
///
/// **Chunked prefill:** a unit's lot never changes, so that the units with the highest lots are a
/// uniform sample of the whole text so far, whatever the chunks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Random {
    seed: u64,
}

impl Random {
    /// Lots by `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// Keeps `budget` units by lot, original positions.
    pub fn policy(seed: u64, budget: Budget) -> Evict<Self> {
        Self::new(seed).published(budget)
    }

    /// The lot of one unit, in `[0, 1)`, a multiple of `2^-24`.
    pub fn lot(&self, layer: usize, head: usize, position: u32) -> f32 {
        let mut state = self.seed;
        for part in [layer as u64, head as u64, u64::from(position)] {
            state = mix(state ^ mix(part.wrapping_add(GOLDEN)));
        }
        (state >> 40) as f32 / (1u64 << 24) as f32
    }
}

/// `2^64` divided by the golden ratio, odd.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of splitmix64: every input bit changes every output bit with probability ½.
pub(super) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(GOLDEN);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Published for Random {}

impl Scorer for Random {
    fn name(&self) -> String {
        "random".into()
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let lots = |head: usize| {
            let positions = units.positions(head).iter();
            positions
                .map(|p| self.lot(at.layer.index, head, *p))
                .collect()
        };
        Scores::per_head((0..units.kv_heads()).map(lots).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lots_are_spread_evenly_and_differ_between_heads_layers_and_seeds() {
        let lots = |seed, layer, head| -> Vec<f32> {
            let random = Random::new(seed);
            (0..4000).map(|p| random.lot(layer, head, p)).collect()
        };
        let base = lots(1, 2, 3);
        let mean = base.iter().sum::<f32>() / 4000.0;
        // The standard error of the mean of 4000 uniform lots is 0.0046.
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        for quarter in 0..4 {
            let from = quarter as f32 / 4.0;
            let share = base
                .iter()
                .filter(|x| (from..from + 0.25).contains(x))
                .count();
            assert!((900..1100).contains(&share), "{share} in quarter {quarter}");
        }
        for other in [lots(2, 2, 3), lots(1, 3, 2), lots(1, 2, 2)] {
            let product: f32 = base
                .iter()
                .zip(&other)
                .map(|(a, b)| (a - 0.5) * (b - 0.5))
                .sum();
            // The correlation of independent lots has a standard error of 0.016.
            assert!((product / 4000.0 * 12.0).abs() < 0.08);
        }
    }
}
