//! How methods were published: what they protect, and in which positions attention sees units.

use locret_core::{Budget, Evict, Guard, Positions, Scorer};

/// A budget of this many units stands in where the number is not known before the text or the model.
const UNKNOWN: usize = 256;

/// A scorer with the settings of its paper. Constructors and configuration take them from here.
pub(crate) trait Published: Scorer + Sized {
    /// Which positions attention uses.
    const POSITIONS: Positions = Positions::Original;

    /// What stays whatever its score, of `units`.
    fn guard(&self, _units: usize) -> Guard {
        Guard::default()
    }

    /// The guard of which some is `set`. What was asked for is kept as it is. The rest shrinks with the
    /// budget, so that at least one unit is left to choose.
    fn guard_with(&self, budget: Budget, set: Settings) -> Guard {
        let units = match budget {
            Budget::Units(units) => units,
            Budget::Ratio(_) | Budget::Bytes(_) => UNKNOWN,
        };
        let guard = self.guard(units);
        let sinks = guard.sinks.min(units.saturating_sub(1));
        let sinks = set.sinks.unwrap_or(sinks);
        let room = units.saturating_sub(sinks + 1);
        Guard {
            sinks,
            recent: set.recent.unwrap_or(guard.recent.min(room)),
            stabilizers: set.stabilizers.unwrap_or(guard.stabilizers.min(room)),
        }
    }

    /// All as published.
    fn published(self, budget: Budget) -> Evict<Self> {
        let guard = self.guard_with(budget, Settings::default());
        Evict::new(self, budget)
            .guard(guard)
            .with_positions(Self::POSITIONS)
    }
}

/// The parts of a [`Guard`] that were asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Settings {
    pub(crate) sinks: Option<usize>,
    pub(crate) recent: Option<usize>,
    pub(crate) stabilizers: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{H2o, KeyDiff, KeyNorm, Random, SirLlm, SnapKv, Tova, Window};

    /// Sinks and newest units in budgets of 256, 30, 8, 3 and 1 units.
    fn guards(scorer: impl Published) -> [(usize, usize); 5] {
        [256, 30, 8, 3, 1].map(|units| {
            let guard = scorer.guard_with(Budget::Units(units), Settings::default());
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
        let set = Settings {
            sinks: Some(6),
            ..Settings::default()
        };
        let guard = |units, set| H2o.guard_with(Budget::Units(units), set);
        // Seven units, six of them sinks: there is no room for a newest one.
        assert_eq!((guard(7, set).sinks, guard(7, set).recent), (6, 0));
        let set = Settings {
            recent: Some(40),
            ..set
        };
        assert_eq!((guard(7, set).sinks, guard(7, set).recent), (6, 40));
        let unknown = H2o.guard_with(Budget::Ratio(0.1), Settings::default());
        assert_eq!(unknown, guard(UNKNOWN, Settings::default()));
    }
}
