//! The policy that most methods are: keep the best-scored units.

use super::{
    budget::pyramid,
    share::{max_pool, share},
};
use crate::{
    Best, Budget, BudgetTable, DecodeEviction, Error, Guard, Held, Keep, KvCachePolicy, LayerSpec,
    LayerUnits, ModelSpec, Needs, Phase, Positions, Prefill, Ranking, Result, Scorer, Scores,
    Selection, Share, Step, Verdict,
};
use std::{borrow::Cow, ops::Range, slice};

/// Keeps, in each KV head, the `budget` units that a [`Scorer`] ranks highest, in sequence order.
///
/// Equal scores keep the earlier unit. Nothing is dropped while a head holds no more than its
/// budget, nor in the tail of a prompt ([`Phase::Tail`]), nor in text that is only scored
/// ([`Phase::Forced`]).
#[derive(Debug, Clone)]
#[must_use]
pub struct Evict<S> {
    scorer: S,
    budget: Budget,
    guard: Protect,
    positions: Positions,
    decode: DecodeEviction,
    pool: usize,
    pyramid: Option<f64>,
    ada: Option<f64>,
    share: Option<Share>,
    table: Option<BudgetTable>,
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
            share: None,
            table: None,
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
    ///
    /// Scores have to be comparable between heads: shares of attention are, logits are not (attention
    /// stays what it is if all logits of a query are shifted), and ranks give all heads the same.
    pub fn ada(mut self, floor: f64) -> Self {
        self.ada = Some(floor);
        self
    }

    /// Says over what heads share a budget, if not over their layer: with [`Share::Model`] the best
    /// `layers · kv_heads · b` units of the model stay, of which each head keeps its best
    /// `floor · b` ([`ada`](Self::ada), else [`Share::FLOOR`]) and what is protected. Of equal scores that
    /// of the lower layer goes first, then that of the lower head, then that of the earlier unit.
    ///
    /// It is known after the last layer what stays, so that all layers hold their part of the budget and a
    /// chunk at once: the peak is `layers · (b + chunk)` in each KV head on average, a bound all the same.
    /// [`table`](Self::table) with shares that were measured has the lower peak. Scores have to be
    /// comparable between layers, too.
    pub fn share(mut self, share: Share) -> Self {
        self.share = Some(share);
        self
    }

    /// Shares the budget out over layers, or over layers and heads, as a table says. The model has
    /// `layers · kv_heads · b` units, as without it, and each layer is cut before the next one runs: the
    /// peak is that and one layer's chunk.
    ///
    /// Of heads with less than `b` units as many fewer are protected. With [`ada`](Self::ada) heads share
    /// what the table gives their layer.
    pub fn table(mut self, table: BudgetTable) -> Self {
        self.table = Some(table);
        self
    }

    /// Over what the budget is shared, and what each head keeps on its own account.
    fn shared(&self) -> Option<(Share, f64)> {
        match (self.share, self.ada) {
            (None, None) => None,
            (share, floor) => Some((share.unwrap_or_default(), floor.unwrap_or(Share::FLOOR))),
        }
    }

    /// Whether layers share one budget.
    fn over_layers(&self) -> bool {
        matches!(self.shared(), Some((Share::Model, _)))
    }

    /// Units for each head of `layer` (on average, where heads share).
    fn units(&self, layer: &LayerSpec, total: usize) -> Vec<usize> {
        let budget = self.budget.units(layer, total).max(1);
        match (&self.table, self.pyramid) {
            (Some(table), _) => table.units(layer, budget),
            (None, Some(beta)) => vec![pyramid(budget, beta, layer); layer.kv_heads],
            (None, None) => vec![budget; layer.kv_heads],
        }
    }

    /// Units that a head keeps on its own account, of `budget`.
    fn own(&self, budget: usize) -> usize {
        match self.shared() {
            // Less a hair, so that a fifth of 10 units are 2.
            Some((_, floor)) => ((floor * budget as f64 - 1e-9).ceil() as usize).min(budget),
            None => budget,
        }
    }

    /// Whether these layers, whose heads have these budgets, are cut.
    fn evicts_now(&self, phase: Phase, units: &[LayerUnits<'_>], budgets: &[Vec<usize>]) -> bool {
        let slack = match (phase, self.decode) {
            (Phase::Turn | Phase::Prefill { .. }, _) => 0,
            (Phase::Decode, DecodeEviction::Every(n)) => n.saturating_sub(1),
            (Phase::Tail | Phase::Forced, _) | (Phase::Decode, DecodeEviction::Off) => {
                return false;
            }
        };
        let lens = units
            .iter()
            .flat_map(|units| (0..units.kv_heads()).map(|head| units.len(head)));
        let mut heads = lens.zip(budgets.iter().flatten());
        if self.shared().is_some() {
            let (mut held, mut most) = (0usize, 0usize);
            for (len, budget) in heads {
                held += len;
                most = most.saturating_add(budget.saturating_add(slack));
            }
            return held > most;
        }
        heads.any(|(len, budget)| len > budget.saturating_add(slack))
    }

    /// The first and the newest units that are protected in a head with `budget` units.
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

    /// What stays of these layers, which share a budget if there are several.
    fn select(
        &self,
        at: &[Step],
        units: &[LayerUnits<'_>],
        scores: &[Scores],
        budgets: &[Vec<usize>],
    ) -> Result<Vec<Selection>> {
        let heads: usize = budgets.iter().map(Vec::len).sum();
        let firsts: Vec<Cow<'_, [f32]>> = scores.iter().flat_map(firsts).collect();
        let mut firsts = firsts.iter();
        let mut ranked = Vec::with_capacity(heads);
        let mut kept: Vec<Vec<u32>> = Vec::with_capacity(heads);
        for ((at, units), budgets) in at.iter().zip(units).zip(budgets) {
            for (head, (budget, scores)) in budgets.iter().zip(firsts.by_ref()).enumerate() {
                let (sinks, newest) = self.ends(at, *budget);
                let scores = max_pool(scores, self.pool);
                let own = self
                    .own(*budget)
                    .max(sinks.saturating_add(newest).min(*budget));
                let at = protected_of(&scores, units.len(head), own, sinks, newest)?;
                kept.push(units.compute().select(&scores, own, &at)?);
                ranked.push(scores);
            }
        }
        if let (Some(_), Some(first)) = (self.shared(), units.first()) {
            let all = budgets.iter().flatten();
            let total = all.fold(0usize, |sum, units| sum.saturating_add(*units));
            share(first.compute(), &ranked, &mut kept, total)?;
        }
        let mut first = 0;
        for (((at, units), scores), budgets) in at.iter().zip(units).zip(scores).zip(budgets) {
            let own = first..first + budgets.len();
            first = own.end;
            self.again(at, units, scores, budgets, &mut kept[own])?;
        }
        let mut kept = kept.into_iter();
        let layers = budgets.iter().map(|budgets| budgets.len());
        layers
            .map(|heads| Selection::new(kept.by_ref().take(heads).collect()))
            .collect()
    }

    /// What stays of a layer, if the scorer chooses by something else than scores: as many units of each head.
    fn again(
        &self,
        at: &Step,
        units: &LayerUnits<'_>,
        scores: &Scores,
        budgets: &[usize],
        kept: &mut [Vec<u32>],
    ) -> Result<()> {
        let keeps: Vec<(usize, usize)> = (kept.iter().zip(budgets))
            .map(|(kept, budget)| match self.shared() {
                Some(_) => (kept.len(), self.own(*budget)),
                None => (kept.len(), 0),
            })
            .collect();
        let Some(ranks) = self.scorer.ranks(at, units, scores, &keeps)? else {
            return Ok(());
        };
        if ranks.heads().len() != kept.len() || ranks.width() != 1 {
            let found = [ranks.heads().len(), ranks.width()];
            return Err(Error::shape("ranks of KV heads", [kept.len(), 1], found));
        }
        for (head, kept) in kept.iter_mut().enumerate() {
            let (sinks, newest) = self.ends(at, budgets[head]);
            let ranks = max_pool(ranks.head(head), self.pool);
            let keep = keeps[head].0;
            let at = protected_of(&ranks, units.len(head), keep, sinks, newest)?;
            *kept = units.compute().select(&ranks, keep, &at)?;
        }
        Ok(())
    }

    /// Verdicts on layers, which share a budget if there are several.
    fn decide(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        let Some(first) = at.first() else {
            return Ok(Vec::new());
        };
        let budgets: Vec<Vec<usize>> = at
            .iter()
            .map(|at| self.units(&at.layer, at.total))
            .collect();
        let evict = self.evicts_now(first.phase, units, &budgets);
        let mut verdicts = vec![Verdict::keep_all(); at.len()];
        for ((at, units), verdict) in at.iter().zip(units).zip(&mut verdicts) {
            if self.scorer.noted(&at.layer) > 0 {
                verdict.notes = self.scorer.notes(at, units)?;
            }
        }
        if !evict && !self.scorer.carries() {
            return Ok(verdicts);
        }
        let scores: Vec<Scores> = (at.iter().zip(units))
            .map(|(at, units)| match evict {
                true => self.scorer.score(at, units),
                false => self.scorer.carry(at, units),
            })
            .collect::<Result<_>>()?;
        for (at, scores) in at.iter().zip(&scores) {
            let (found, due) = (scores.width(), self.scorer.carried_width(&at.layer));
            if found != due {
                let found = format!("{found} scores for each unit, {due} are due");
                return Err(Error::policy(self.scorer.name(), found));
            }
        }
        if evict {
            let kept = self.select(at, units, &scores, &budgets)?;
            for (verdict, kept) in verdicts.iter_mut().zip(kept) {
                verdict.keep = Keep::Slots(kept);
            }
        }
        if self.scorer.carries() {
            for (verdict, scores) in verdicts.iter_mut().zip(scores) {
                verdict.scores = Some(scores);
            }
        }
        Ok(verdicts)
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
            share,
            table,
        } = self;
        let scorer = scorer.fingerprint();
        format!(
            "Evict {{ scorer: {scorer}, budget: {budget:?}, guard: {guard:?}, positions: {positions:?}, \
             decode: {decode:?}, pool: {pool}, pyramid: {pyramid:?}, ada: {ada:?}, share: {share:?}, \
             table: {table:?} }}"
        )
    }

    fn needs(&self) -> Needs {
        let needs = self.scorer.needs();
        match self.over_layers() {
            true => needs.all_layers(),
            false => needs,
        }
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn carries(&self) -> Option<String> {
        self.scorer.carries().then(|| self.scorer.name())
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.scorer.carried_width(layer)
    }

    fn noted(&self, layer: &LayerSpec) -> usize {
        self.scorer.noted(layer)
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
        if let Some(table) = &self.table {
            table.validate(&layer)?;
        }
        let of_layers = [
            ("pyramid", self.pyramid.is_some()),
            ("a table of budgets", self.table.is_some()),
            ("sharing over the model", self.over_layers()),
        ];
        let mut of_layers = of_layers.into_iter().filter(|(_, set)| *set);
        if let (Some((one, _)), Some((other, _))) = (of_layers.next(), of_layers.next()) {
            let found = format!("{one} and {other}");
            return Err(Error::setting("budgets of layers", "said once", found));
        }
        self.scorer.validate(model)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        let budgets = self.units(layer, total);
        let most = |units: &mut dyn Iterator<Item = usize>| units.max().unwrap_or(0);
        if self.shared().is_none() {
            return Some(most(&mut budgets.into_iter()));
        }
        let own: Vec<usize> = budgets.iter().map(|budget| self.own(*budget)).collect();
        let spare: usize = budgets.iter().sum::<usize>() - own.iter().sum::<usize>();
        // With the others at their least. All layers have the same budget where they share it.
        let layers = if self.over_layers() { layer.layers } else { 1 };
        Some(most(&mut own.into_iter()) + layers * spare)
    }

    fn held(&self, layer: &LayerSpec, total: usize) -> Option<Held> {
        let units = self.units(layer, total).into_iter().sum();
        let held = match self.scorer.keeps_newest() {
            true => Held::newest(units),
            false => Held::scattered(units),
        };
        Some(match self.over_layers() {
            true => held.of_all_layers(),
            false => held,
        })
    }

    fn decode_slack(&self) -> Option<usize> {
        match self.decode {
            DecodeEviction::Off => None,
            DecodeEviction::Every(n) => Some(n.saturating_sub(1)),
        }
    }

    /// In a policy whose layers share a budget, the layer's own part of it.
    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let verdicts = self.decide(slice::from_ref(at), slice::from_ref(units))?;
        Ok(verdicts
            .into_iter()
            .next()
            .unwrap_or_else(Verdict::keep_all))
    }

    /// Where heads share a budget, scores are pooled, or the scorer keeps more than scores, these are looked at.
    fn ranking(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Option<Ranking>> {
        let layer = &at.layer;
        let alone = self.shared().is_none() && self.pool <= 1;
        let plain = self.scorer.carried_width(layer) == 1 && self.scorer.noted(layer) == 0;
        if !alone || !plain || !self.scorer.carries() {
            return Ok(None);
        }
        let Some(born) = self.scorer.born(at, units)? else {
            return Ok(None);
        };
        let budgets = self.units(layer, at.total);
        let evict = self.evicts_now(at.phase, slice::from_ref(units), slice::from_ref(&budgets));
        let best = |(head, budget): (usize, &usize)| {
            let (len, (sinks, newest)) = (units.len(head), self.ends(at, *budget));
            let (first, newest) = clamped(len, *budget, sinks, newest);
            Best {
                keep: len.min(*budget),
                first,
                newest,
            }
        };
        Ok(Some(Ranking {
            born,
            best: evict.then(|| budgets.iter().enumerate().map(best).collect()),
        }))
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        if self.over_layers() {
            return self.decide(at, units);
        }
        let layers = at.iter().zip(units);
        layers.map(|(at, units)| self.step(at, units)).collect()
    }
}

/// By KV head, the first number of each unit: its score.
fn firsts(scores: &Scores) -> Vec<Cow<'_, [f32]>> {
    let width = scores.width();
    let of = |list| match width {
        1 => Cow::Borrowed(list),
        _ => Cow::Owned(<[f32]>::iter(list).step_by(width).copied().collect()),
    };
    scores
        .heads()
        .iter()
        .map(|list| of(list.as_slice()))
        .collect()
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
    let (sinks, newest) = clamped(len, budget, sinks, newest);
    Ok([0..sinks, len - newest..len])
}

/// The first and the newest of `len` units that are protected in a budget.
fn clamped(len: usize, budget: usize, sinks: usize, newest: usize) -> (usize, usize) {
    // A ratio budget can be smaller than what is protected: the newest units then win.
    let newest = newest.min(budget).min(len);
    (sinks.min(budget - newest).min(len - newest), newest)
}
