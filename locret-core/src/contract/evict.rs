//! The policy that most methods are: keep the best-scored units.

use super::budget::pyramid;
use crate::{
    Budget, Compute, DecodeEviction, Error, Guard, Held, Keep, KvCachePolicy, LayerSpec,
    LayerUnits, ModelSpec, Needs, Phase, Positions, Prefill, Result, Scorer, Scores, Selection,
    Step, Verdict,
};
use std::{borrow::Cow, ops::Range};

/// Keeps, in each KV head, the `budget` units that a [`Scorer`] ranks highest, in sequence order.
///
/// Equal scores keep the earlier unit. Nothing is dropped while a head holds no more than its
/// budget, nor in the tail of a prompt ([`Phase::Tail`]), nor in text that is only scored
/// ([`Phase::Forced`]).
#[derive(Debug, Clone)]
pub struct Evict<S> {
    scorer: S,
    budget: Budget,
    guard: Protect,
    positions: Positions,
    decode: DecodeEviction,
    pool: usize,
    pyramid: Option<f64>,
    ada: Option<f64>,
}

/// What is set of a guard, and whether the scorer has a say in the rest.
#[derive(Debug, Clone, Copy, Default)]
struct Protect {
    by_scorer: bool,
    sinks: Option<usize>,
    recent: Option<usize>,
    stabilizers: Option<usize>,
}

impl<S: Scorer> Evict<S> {
    /// Keeps the best `budget` units, nothing protected, original positions, no eviction while
    /// decoding.
    pub fn new(scorer: S, budget: Budget) -> Self {
        Self {
            scorer,
            budget,
            guard: Protect::default(),
            positions: Positions::Original,
            decode: DecodeEviction::Off,
            pool: 1,
            pyramid: None,
            ada: None,
        }
    }

    /// Protects units whatever their score.
    pub fn guard(self, guard: Guard) -> Self {
        self.sinks(guard.sinks)
            .recent(guard.recent)
            .stabilizers(guard.stabilizers)
    }

    /// Protects what the scorer's method does ([`Scorer::guard`]), but for those parts of the guard that
    /// are set. It shrinks with the budget, so that at least one unit is left to choose.
    pub fn protecting(mut self) -> Self {
        self.guard.by_scorer = true;
        self
    }

    /// What is protected in a budget of `units`.
    pub fn protected(&self, units: usize) -> Guard {
        let own = match self.guard.by_scorer {
            true => self.scorer.guard(units),
            false => Guard::default(),
        };
        let sinks = own.sinks.min(units.saturating_sub(1));
        let sinks = self.guard.sinks.unwrap_or(sinks);
        let room = units.saturating_sub(sinks).saturating_sub(1);
        Guard {
            sinks,
            recent: self.guard.recent.unwrap_or(own.recent.min(room)),
            stabilizers: self.guard.stabilizers.unwrap_or(own.stabilizers.min(room)),
        }
    }

    /// Protects the first units of the sequence.
    pub fn sinks(mut self, units: usize) -> Self {
        self.guard.sinks = Some(units);
        self
    }

    /// Protects the newest units, always.
    pub fn recent(mut self, units: usize) -> Self {
        self.guard.recent = Some(units);
        self
    }

    /// Protects the newest units while further chunks follow; see [`Guard::stabilizers`].
    pub fn stabilizers(mut self, units: usize) -> Self {
        self.guard.stabilizers = Some(units);
        self
    }

    /// Chooses the positions.
    pub fn with_positions(mut self, positions: Positions) -> Self {
        self.positions = positions;
        self
    }

    /// Chooses whether units are dropped while text is generated.
    pub fn while_decoding(mut self, decode: DecodeEviction) -> Self {
        self.decode = decode;
        self
    }

    /// Selects on scores max-pooled over `units` neighbouring units of the head (an odd number; 1
    /// is no pooling): what matters is often a span of text, of which one unit scores high. The
    /// scores themselves stay what they are.
    pub fn pool(mut self, units: usize) -> Self {
        self.pool = units;
        self
    }

    /// Gives lower layers more of the budget (PyramidKV, arXiv 2406.02069 §4.2): it falls linearly
    /// from `2b - b / beta` units in the first layer to `b / beta` in the last one. The paper's
    /// `beta` is 20; 1 gives all layers the same.
    ///
    /// In layers with less than `b` units as many fewer are protected.
    pub fn pyramid(mut self, beta: f64) -> Self {
        self.pyramid = Some(beta);
        self
    }

    /// Shares a layer's budget out over its heads by their scores (Ada-KV, arXiv 2407.11550 §3):
    /// each keeps its best `floor · b` units and what is protected, and the rest of the layer's
    /// `kv_heads · b` units go to the best scores over all heads. The paper's `floor` is 0.2; 1
    /// gives all heads the same.
    ///
    /// Heads then differ in length; memory is that of the units that are there.
    pub fn ada(mut self, floor: f64) -> Self {
        self.ada = Some(floor);
        self
    }

    /// Units for a head of `layer` (on average, where heads share).
    fn units(&self, layer: &LayerSpec, total: usize) -> usize {
        let budget = self.budget.units(layer, total).max(1);
        match self.pyramid {
            Some(beta) => pyramid(budget, beta, layer),
            None => budget,
        }
    }

    /// Units that a head keeps on its own account, of `budget`.
    fn own(&self, budget: usize) -> usize {
        match self.ada {
            // Less a hair, so that a fifth of 10 units are 2.
            Some(floor) => ((floor * budget as f64 - 1e-9).ceil() as usize).min(budget),
            None => budget,
        }
    }

    fn evicts_now(&self, at: &Step, units: &LayerUnits<'_>, budget: usize) -> bool {
        let slack = match (at.phase, self.decode) {
            (Phase::Turn | Phase::Prefill { .. }, _) => 0,
            (Phase::Decode, DecodeEviction::Every(n)) => n.saturating_sub(1),
            (Phase::Tail | Phase::Forced, _) | (Phase::Decode, DecodeEviction::Off) => {
                return false;
            }
        };
        let most = budget.saturating_add(slack);
        if self.ada.is_some() {
            let held: usize = (0..units.kv_heads()).map(|head| units.len(head)).sum();
            return held > units.kv_heads().saturating_mul(most);
        }
        units.longest() > most
    }

    /// The first and the newest units that are protected in a layer with `budget` units.
    fn ends(&self, at: &Step, budget: usize) -> (usize, usize) {
        let average = self.budget.units(&at.layer, at.total).max(1);
        let Guard {
            sinks,
            recent,
            stabilizers,
        } = self.protected(average);
        let newest = match at.phase {
            Phase::Prefill { last: true } => recent,
            _ => recent.max(stabilizers),
        };
        let shrunk = |units: usize| (units.saturating_mul(budget) / average).min(units);
        (shrunk(sinks), shrunk(newest))
    }

    fn select(&self, at: &Step, units: &LayerUnits<'_>, scores: &Scores) -> Result<Selection> {
        let heads = units.kv_heads();
        let budget = self.units(&at.layer, at.total);
        let (sinks, newest) = self.ends(at, budget);
        let mut ranked = Vec::with_capacity(heads);
        let mut kept = Vec::with_capacity(heads);
        for head in 0..heads {
            let scores = max_pool(scores.head(head), self.pool);
            let own = self
                .own(budget)
                .max(sinks.saturating_add(newest).min(budget));
            let at = protected_of(&scores, units.len(head), own, sinks, newest)?;
            kept.push(units.compute().select(&scores, own, &at)?);
            ranked.push(scores);
        }
        if self.ada.is_some() {
            share(units.compute(), &ranked, &mut kept, heads * budget)?;
        }
        Selection::new(kept)
    }
}

impl<S: Scorer> KvCachePolicy for Evict<S> {
    fn name(&self) -> String {
        self.scorer.name()
    }

    fn fingerprint(&self) -> String {
        let Self {
            scorer,
            budget,
            guard,
            positions,
            decode,
            pool,
            pyramid,
            ada,
        } = self;
        let scorer = scorer.fingerprint();
        format!(
            "Evict {{ scorer: {scorer}, budget: {budget:?}, guard: {guard:?}, positions: {positions:?}, \
             decode: {decode:?}, pool: {pool}, pyramid: {pyramid:?}, ada: {ada:?} }}"
        )
    }

    fn needs(&self) -> Needs {
        self.scorer.needs()
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn carries(&self) -> Option<String> {
        self.scorer.carries().then(|| self.scorer.name())
    }

    fn validate(&self, model: &ModelSpec, _prefill: &Prefill) -> Result<()> {
        let layer = model.layer(0);
        self.budget.validate(&layer)?;
        if let Budget::Units(_) | Budget::Bytes(_) = self.budget {
            let budget = self.budget.units(&layer, 0);
            let Guard {
                sinks,
                recent,
                stabilizers,
            } = self.protected(budget);
            for (what, newest) in [("recent", recent), ("stabilizers", stabilizers)] {
                // Equality would leave no unit to choose.
                if newest > 0 && sinks.saturating_add(newest) >= budget {
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
        if self.pool.is_multiple_of(2) {
            return Err(Error::setting("pool", "an odd number of units", self.pool));
        }
        if let Some(beta) = self.pyramid
            && !(beta.is_finite() && beta >= 1.0)
        {
            return Err(Error::setting("pyramid", "a number from 1 on", beta));
        }
        if let Some(floor) = self.ada
            && !(0.0..=1.0).contains(&floor)
        {
            return Err(Error::setting("ada", "a share from 0 to 1", floor));
        }
        self.scorer.validate(model)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        let budget = self.units(layer, total);
        // With the others at their least.
        Some(budget + (layer.kv_heads - 1) * (budget - self.own(budget)))
    }

    fn held(&self, layer: &LayerSpec, total: usize) -> Option<Held> {
        let units = layer.kv_heads * self.units(layer, total);
        Some(match self.scorer.keeps_newest() {
            true => Held::newest(units),
            false => Held::scattered(units),
        })
    }

    fn decode_slack(&self) -> Option<usize> {
        match self.decode {
            DecodeEviction::Off => None,
            DecodeEviction::Every(n) => Some(n.saturating_sub(1)),
        }
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let evict = self.evicts_now(at, units, self.units(&at.layer, at.total));
        if !evict && !self.scorer.carries() {
            return Ok(Verdict::keep_all());
        }
        let scores = self.scorer.score(at, units)?;
        if scores.width() != 1 {
            let found = format!("{} scores for each unit, one is due", scores.width());
            return Err(Error::policy(self.scorer.name(), found));
        }
        let mut verdict = Verdict::keep_all();
        if evict {
            verdict.keep = Keep::Slots(self.select(at, units, &scores)?);
        }
        if self.scorer.carries() {
            verdict.scores = Some(scores);
        }
        Ok(verdict)
    }
}

/// The maximum over `width` neighbours (odd), fewer at the ends.
fn max_pool(scores: &[f32], width: usize) -> Cow<'_, [f32]> {
    let reach = width / 2;
    if reach == 0 {
        return Cow::Borrowed(scores);
    }
    let largest = |unit: usize| {
        let near = unit.saturating_sub(reach)..(unit + reach + 1).min(scores.len());
        scores[near]
            .iter()
            .copied()
            .fold(f32::NEG_INFINITY, f32::max)
    };
    Cow::Owned((0..scores.len()).map(largest).collect())
}

/// Adds to what each head keeps the best of the others, over all heads, up to `total` units.
fn share(
    compute: &dyn Compute,
    scores: &[Cow<'_, [f32]>],
    kept: &mut [Vec<u32>],
    total: usize,
) -> Result<()> {
    let mut rest = Vec::new();
    let mut rest_scores = Vec::new();
    for (head, (scores, kept)) in scores.iter().zip(&*kept).enumerate() {
        let mut kept = kept.iter().peekable();
        for (unit, score) in scores.iter().enumerate() {
            if kept.next_if(|k| **k as usize == unit).is_none() {
                rest.push((head, unit as u32));
                rest_scores.push(*score);
            }
        }
    }
    let taken: usize = kept.iter().map(Vec::len).sum();
    let chosen = compute.select(&rest_scores, total.saturating_sub(taken), &[])?;
    for (head, unit) in chosen.into_iter().map(|i| rest[i as usize]) {
        kept[head].push(unit);
    }
    kept.iter_mut().for_each(|kept| kept.sort_unstable());
    Ok(())
}

/// What is protected of `len` units: the first `sinks` and the last `newest` of them.
fn protected_of(
    scores: &[f32],
    len: usize,
    budget: usize,
    sinks: usize,
    newest: usize,
) -> Result<[Range<usize>; 2]> {
    if scores.len() != len {
        return Err(Error::shape("scores of a KV head", [len], [scores.len()]));
    }
    // A ratio budget can be smaller than what is protected: the newest units then win.
    let newest = newest.min(budget).min(len);
    let sinks = sinks.min(budget - newest).min(len - newest);
    Ok([0..sinks, len - newest..len])
}
