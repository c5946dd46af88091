//! The policy that most methods are: keep the best-scored units.

use crate::{
    Error, LayerSpec, ModelSpec, Prefill, Result,
    budget::{Budget, DecodeEviction, Guard},
    kernels::select,
    policy::{KvCachePolicy, Needs, Phase, Positions, Scorer, Step, Verdict},
    units::{LayerUnits, Selection},
};

/// Keeps, in each KV head, the `budget` units that a [`Scorer`] ranks highest, in sequence order.
///
/// Equal scores keep the earlier unit. Nothing is dropped while a head holds no more than its
/// budget, nor in the tail of a prompt ([`Phase::Tail`]).
#[derive(Debug, Clone)]
pub struct Evict<S> {
    scorer: S,
    budget: Budget,
    guard: Guard,
    positions: Positions,
    decode: DecodeEviction,
}

impl<S: Scorer> Evict<S> {
    /// Keeps the best `budget` units, nothing protected, original positions, no eviction while
    /// decoding.
    pub fn new(scorer: S, budget: Budget) -> Self {
        Self {
            scorer,
            budget,
            guard: Guard::default(),
            positions: Positions::Original,
            decode: DecodeEviction::Off,
        }
    }

    /// Protects units whatever their score.
    pub fn guard(mut self, guard: Guard) -> Self {
        self.guard = guard;
        self
    }

    /// Protects the first units of the sequence.
    pub fn sinks(mut self, units: usize) -> Self {
        self.guard.sinks = units;
        self
    }

    /// Protects the newest units, always.
    pub fn recent(mut self, units: usize) -> Self {
        self.guard.recent = units;
        self
    }

    /// Protects the newest units while further chunks follow.
    pub fn stabilizers(mut self, units: usize) -> Self {
        self.guard.stabilizers = units;
        self
    }

    /// Chooses the positions.
    pub fn positions(mut self, positions: Positions) -> Self {
        self.positions = positions;
        self
    }

    /// Chooses whether units are dropped while text is generated.
    pub fn while_decoding(mut self, decode: DecodeEviction) -> Self {
        self.decode = decode;
        self
    }

    /// The scorer.
    pub fn scorer(&self) -> &S {
        &self.scorer
    }

    fn evicts_now(&self, at: &Step, units: &LayerUnits<'_>, budget: usize) -> bool {
        let slack = match (at.phase, self.decode) {
            (Phase::Turn | Phase::Prefill { .. }, _) => 0,
            (Phase::Decode, DecodeEviction::Every(n)) => n - 1,
            (Phase::Tail, _) | (Phase::Decode, DecodeEviction::Off) => return false,
        };
        units.longest() > budget + slack
    }
}

impl<S: Scorer> KvCachePolicy for Evict<S> {
    fn name(&self) -> String {
        self.scorer.name()
    }

    fn needs(&self) -> Needs {
        self.scorer.needs()
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn validate(&self, model: &ModelSpec, _prefill: &Prefill) -> Result<()> {
        let layer = model.layer(0);
        self.budget.validate(&layer)?;
        let Guard {
            sinks,
            recent,
            stabilizers,
        } = self.guard;
        if let Budget::Units(_) | Budget::Bytes(_) = self.budget {
            let budget = self.budget.units(&layer, 0);
            for (what, newest) in [("recent", recent), ("stabilizers", stabilizers)] {
                // Equality would leave no unit to choose.
                if newest > 0 && sinks + newest >= budget {
                    return Err(Error::setting(
                        what,
                        format!("sinks ({sinks}) + {what} below the budget of {budget} units"),
                        newest,
                    ));
                }
            }
            if sinks > budget {
                return Err(Error::setting(
                    "sinks",
                    format!("at most the budget of {budget} units"),
                    sinks,
                ));
            }
        }
        if self.decode == DecodeEviction::Every(0) {
            return Err(Error::setting("decode eviction interval", "at least 1", 0));
        }
        self.scorer.validate(model)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        Some(self.budget.units(layer, total))
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let budget = self.budget.units(&at.layer, at.total).max(1);
        let evict = self.evicts_now(at, units, budget);
        if !evict && !self.scorer.carries() {
            return Ok(Verdict::keep_all());
        }
        let scores = self.scorer.score(at, units)?;
        let mut verdict = Verdict::keep_all();
        if evict {
            let newest = match at.phase {
                Phase::Prefill { last: true } => self.guard.recent,
                _ => self.guard.recent.max(self.guard.stabilizers),
            };
            let mut kept = Vec::with_capacity(units.kv_heads());
            for head in 0..units.kv_heads() {
                kept.push(best(
                    scores.head(head),
                    units.len(head),
                    budget,
                    self.guard.sinks,
                    newest,
                )?);
            }
            verdict = Verdict {
                keep: crate::Keep::Slots(Selection::new(kept)?),
                scores: None,
            };
        }
        if self.scorer.carries() {
            verdict.scores = Some(scores);
        }
        Ok(verdict)
    }
}

/// The `budget` best of `len` units, the first `sinks` and the last `newest` of them for certain.
fn best(
    scores: &[f32],
    len: usize,
    budget: usize,
    sinks: usize,
    newest: usize,
) -> Result<Vec<u32>> {
    if scores.len() != len {
        return Err(Error::shape("scores of a KV head", [len], [scores.len()]));
    }
    // A ratio budget can be smaller than what is protected: the newest units then win.
    let newest = newest.min(budget).min(len);
    let sinks = sinks.min(budget - newest).min(len - newest);
    select::top_k(scores, budget, sinks, newest).map_err(|unit| Error::NotFinite {
        what: "a score",
        at: format!("unit {unit}"),
    })
}
