//! How methods were published: what they protect, and in which positions attention sees units.

use locret_core::{Budget, Evict, Positions, Scorer};

/// A scorer with the settings of its paper. Constructors and configuration take them from here.
pub(crate) trait Published: Scorer + Sized {
    /// Which positions attention uses.
    const POSITIONS: Positions = Positions::Original;

    /// All as published: these positions, and what [`Scorer::guard`] says.
    fn published(self, budget: Budget) -> Evict<Self> {
        Evict::new(self, budget)
            .protecting()
            .with_positions(Self::POSITIONS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{H2o, KeyDiff, KeyNorm, Random, SirLlm, SnapKv, Tova, Window};
    use locret_core::Guard;

    /// Sinks and newest units in budgets of 256, 30, 8, 3 and 1 units.
    fn guards(scorer: impl Published) -> [(usize, usize); 5] {
        let policy = scorer.published(Budget::Ratio(0.5));
        [256, 30, 8, 3, 1].map(|units| {
            let guard = policy.protected(units);
            assert_eq!(guard.stabilizers, 0);
            (guard.sinks, guard.recent)
        })
    }

    #[test]
    fn defaults_shrink_with_the_budget() {
        let nothing = [(0, 0); 5];
        assert_eq!(guards(KeyDiff), nothing);
        assert_eq!(guards(KeyNorm), nothing);
        assert_eq!(guards(Random::new(0)), nothing);
        assert_eq!(guards(Window), [(4, 0), (4, 0), (4, 0), (2, 0), (0, 0)]);
        assert_eq!(
            guards(SirLlm::new()),
            [(4, 64), (4, 7), (4, 2), (2, 0), (0, 0)]
        );
        assert_eq!(guards(H2o), [(0, 128), (0, 15), (0, 4), (0, 1), (0, 0)]);
        assert_eq!(
            guards(SnapKv::new()),
            [(0, 64), (0, 15), (0, 4), (0, 1), (0, 0)]
        );
        assert_eq!(guards(Tova), [(0, 1), (0, 1), (0, 1), (0, 1), (0, 0)]);
    }

    #[test]
    fn what_is_asked_for_does_not_shrink() {
        let some = H2o.published(Budget::Units(7)).sinks(6);
        let protected = |policy: &Evict<H2o>| {
            let Guard { sinks, recent, .. } = policy.protected(7);
            (sinks, recent)
        };
        // Seven units, six of them sinks: there is no room for a newest one.
        assert_eq!(protected(&some), (6, 0));
        assert_eq!(protected(&some.recent(40)), (6, 40));
        let all = H2o.published(Budget::Units(7)).sinks(usize::MAX);
        assert_eq!(protected(&all), (usize::MAX, 0));
    }
}
