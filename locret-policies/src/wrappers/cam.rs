//! CaM: what is dropped is drawn for, and spread over the units that follow it.

use crate::published::Published;
use crate::scorers::{Heavy, Random, Window, observed};
use locret_core::{
    Budget, Error, Evict, Fold, Held, Keep, KvCachePolicy, KvStore, LayerSpec, LayerUnits,
    ModelSpec, Needs, Observation, Part, Placement, Positions, Prefill, Queries, Ranking, Result,
    Rows, Scores, Selection, Step, Verdict, Visible,
};
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// CaM, cache merging (ICML 2024, PMLR 235:58840, §3.3), around any policy: with a probability that is the larger the
/// more attention it has got, a dropped unit's value is spread over the next units of its head that stay.
///
/// Ā is the attention that a unit has got from all queries since it was born, mean over the query heads of its group.
/// A dropped unit is compared with the next `m` that stay (32; fewer where fewer follow): it is drawn with
/// probability `min(Ā / mean Ā of these, 1)`, in each head for itself, and if the lot falls on it each of these `m`
/// gets an `m`-th of its value on top of its own. Keys stay. Lots depend on the seed, the layer, the head and the
/// unit's position alone, so that what goes on from a file or a fork draws the same ones.
///
/// **Keeps** what the policy inside keeps: [`Cam::policy`] has [`Window`], as the authors' program;
/// [`CamKeeps::Heavy`] drops what Ā is small of. kvpress lets any score choose, one set of units for all heads.
///
/// **Cost:** the attention weights of *every* query, gathered in a second pass over the keys, and a number for each
/// unit; for each unit that is drawn, `m` sums of values.
///
/// **Chunked prefill:** published for decoding, one unit at a time: a unit that stays is then among the next `m` of at
/// most some `m` units before it goes itself. A chunk drops hundreds of neighbours at once, all of which may have the
/// same next units, whose values would become sums of hundreds. So a unit of which more than `m` are drawn gets their
/// mean instead: what is added to a value in one step is never larger than what was dropped.
/// [`sums(true)`](Self::sums) leaves sums as they are. For single tokens both are the same. kvpress leaves prompts
/// alone and merges at most as many units as there were tokens since the last time, which is all where the cache was
/// within its budget then. A unit that goes passes on what it has taken, so that over a long text what is added
/// grows as far as values do not cancel.
#[derive(Debug, Clone)]
#[must_use]
pub struct Cam<P> {
    inner: P,
    next: usize,
    lots: Random,
    sums: bool,
}

/// What units [`Method::Cam`](crate::Method::Cam) keeps, whose values take what is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum CamKeeps {
    /// The beginning and the newest ones ([`Window`]).
    #[default]
    Window,
    /// Those with the largest Ā ([`Heavy`]).
    Heavy,
}

impl FromStr for CamKeeps {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "window" => Ok(Self::Window),
            "heavy" => Ok(Self::Heavy),
            _ => Err(Error::setting("keeps", "window or heavy", text)),
        }
    }
}

impl Cam<Evict<Window>> {
    /// Keeps `budget` units as the authors' program does: four sinks and the newest ones.
    pub fn policy(budget: Budget) -> Self {
        Self::new(Window.published(budget))
    }
}

impl Cam<Evict<Heavy>> {
    /// Keeps the `budget` units that attention has gone to most.
    pub fn heavy(budget: Budget) -> Self {
        Self::new(Heavy.published(budget))
    }
}

impl<P: KvCachePolicy> Cam<P> {
    /// Units that a dropped value is spread over.
    pub const NEXT: usize = 32;

    /// Spreads what `inner` drops.
    pub fn new(inner: P) -> Self {
        Self {
            inner,
            next: Self::NEXT,
            lots: Random::new(0),
            sums: false,
        }
    }

    /// Spreads over so many of the next units.
    pub fn window(self, units: usize) -> Self {
        Self {
            next: units,
            ..self
        }
    }

    /// Draws other lots.
    pub fn seed(self, seed: u64) -> Self {
        Self {
            lots: Random::new(seed),
            ..self
        }
    }

    /// Whether values of any number of units are added to one of them, as published for single tokens.
    pub fn sums(self, sums: bool) -> Self {
        Self { sums, ..self }
    }

    /// Numbers that the policy inside leaves with a unit; Ā stands behind them.
    fn own(&self, layer: &LayerSpec) -> usize {
        match self.inner.carries() {
            Some(_) => self.inner.carried_width(layer),
            None => 0,
        }
    }

    /// The layer as the policy inside sees it: without Ā.
    fn part<'a>(&self, at: &Step, units: &'a LayerUnits<'a>) -> Part<'a> {
        let own = self.own(&at.layer);
        let carried = (0..units.kv_heads()).map(|head| {
            let all = units.carried(head).chunks_exact(own + 1);
            all.flat_map(|unit| &unit[..own]).copied().collect()
        });
        units.carrying(carried.collect())
    }

    /// Ā of each unit of each KV head.
    fn attention(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Vec<Vec<f32>>> {
        let own = self.own(&at.layer);
        let before = |head| -> Vec<f32> {
            let all = units.carried(head).iter().skip(own);
            all.step_by(own + 1).copied().collect()
        };
        let heads = 0..units.kv_heads();
        if units.incoming() == 0 {
            return Ok(heads.map(before).collect());
        }
        let seen = observed::attention(|| self.name(), units)?;
        heads
            .map(|head| {
                let paid = observed::paid(seen, head, at.layer.group(), units.len(head))?;
                Ok(observed::added(&before(head), paid))
            })
            .collect()
    }

    /// The verdict of the policy inside, with Ā beside its scores and what is dropped spread over what stays.
    fn merged(&self, at: &Step, mut verdict: Verdict, units: &LayerUnits<'_>) -> Result<Verdict> {
        let own = self.own(&at.layer);
        let attention = self.attention(at, units)?;
        let mut lists = Vec::with_capacity(attention.len());
        for (head, sums) in attention.iter().enumerate() {
            let mut list = Vec::with_capacity(sums.len() * (own + 1));
            for (unit, sum) in sums.iter().enumerate() {
                if own > 0 {
                    let scores = verdict.scores.as_ref();
                    let numbers =
                        scores.and_then(|scores| match unit.checked_sub(scores.first()) {
                            Some(at) => scores.head(head).get(at * own..(at + 1) * own),
                            None => units
                                .carried(head)
                                .get(unit * (own + 1)..unit * (own + 1) + own),
                        });
                    let missing = || Error::policy(self.name(), "a unit without a score");
                    list.extend_from_slice(numbers.ok_or_else(missing)?);
                }
                list.push(*sum);
            }
            lists.push(list);
        }
        verdict.scores = Some(Scores::wide(own + 1, lists)?);
        if let Keep::Slots(kept) = verdict.keep {
            let folds = self.folds(at, units, &kept, &attention);
            verdict.keep = Keep::Merged {
                kept,
                folds,
                keys: false,
            };
        }
        Ok(verdict)
    }

    /// What is added to what, by KV head.
    fn folds(
        &self,
        at: &Step,
        units: &LayerUnits<'_>,
        kept: &Selection,
        attention: &[Vec<f32>],
    ) -> Vec<Vec<Fold>> {
        let heads = kept.heads().iter().zip(attention).enumerate();
        heads
            .map(|(head, (kept, sums))| {
                let positions = units.positions(head);
                // Which units are drawn, and the kept ones that take them.
                let mut drawn = Vec::new();
                let mut taken = vec![0usize; kept.len()];
                for unit in super::nearest::dropped(units.len(head), kept) {
                    let first = kept.partition_point(|other| *other < unit);
                    let next = first..first.saturating_add(self.next).min(kept.len());
                    let there = next.clone().map(|at| sums[kept[at] as usize]);
                    let mean = there.sum::<f32>() / next.len().max(1) as f32;
                    // At most 1, as lots are below that. Nothing against nothing is NaN, which no lot is below.
                    let likely = sums[unit as usize] / mean;
                    let lot = self
                        .lots
                        .lot(at.layer.index, head, positions[unit as usize]);
                    if !next.is_empty() && lot < likely {
                        taken[next.clone()].iter_mut().for_each(|n| *n += 1);
                        drawn.push((unit, next));
                    }
                }
                let mut folds = Vec::new();
                for (from, next) in drawn {
                    let parts = next.len();
                    folds.extend(next.map(|at| Fold {
                        from,
                        into: kept[at],
                        share: match self.sums {
                            true => 1.0 / parts as f32,
                            false => 1.0 / parts.max(taken[at]) as f32,
                        },
                    }));
                }
                let taking = kept.iter().zip(&taken).filter(|(_, n)| **n > 0);
                folds.extend(taking.map(|(unit, _)| Fold {
                    from: *unit,
                    into: *unit,
                    share: 1.0,
                }));
                folds
            })
            .collect()
    }
}

#[deny(clippy::missing_trait_methods)]
impl<P: KvCachePolicy> KvCachePolicy for Cam<P> {
    fn name(&self) -> String {
        match self.inner.name().as_str() {
            "window" => "cam".into(),
            inner => format!("{inner}+cam"),
        }
    }

    fn fingerprint(&self) -> String {
        let Self {
            inner,
            next,
            lots,
            sums,
        } = self;
        let inner = inner.fingerprint();
        format!("Cam {{ inner: {inner}, next: {next}, lots: {lots:?}, sums: {sums} }}")
    }

    fn needs(&self) -> Needs {
        let needs = self.inner.needs();
        match needs.observe {
            None => needs.observe(Queries::All, Observation::Weights),
            Some(_) => needs,
        }
    }

    fn positions(&self) -> Positions {
        self.inner.positions()
    }

    fn carries(&self) -> Option<String> {
        let inner = self.inner.carries();
        let inner = inner.map_or_else(String::new, |name| format!("{name} and "));
        Some(format!("{inner}summed attention"))
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.own(layer) + 1
    }

    fn noted(&self, layer: &LayerSpec) -> usize {
        self.inner.noted(layer)
    }

    fn validate(&self, model: &ModelSpec, prefill: &Prefill) -> Result<()> {
        if self.next == 0 {
            return Err(Error::setting("window", "at least 1 unit", 0));
        }
        let due = Needs::NOTHING.observe(Queries::All, Observation::Weights);
        let needs = self.inner.needs();
        if needs.observe.is_some() && needs.observe != due.observe {
            let expected = format!("none or {:?}, which CaM adds up", due.observe);
            let found = format!("{:?}", needs.observe);
            return Err(Error::setting("observed attention", expected, found));
        }
        self.inner.validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        self.inner.store(layer, place)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        self.inner.limit(layer, total)
    }

    fn held(&self, layer: &LayerSpec, total: usize) -> Option<Held> {
        self.inner.held(layer, total)
    }

    fn decode_slack(&self) -> Option<usize> {
        self.inner.decode_slack()
    }

    fn before(&self, at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        self.inner
            .before(at, queries, &self.part(at, units).units())
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let verdict = self.inner.step(at, &self.part(at, units).units())?;
        self.merged(at, verdict, units)
    }

    /// What is folded depends on what is dropped.
    fn ranking(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Option<Ranking>> {
        Ok(None)
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        let parts: Vec<Part<'_>> = (at.iter().zip(units))
            .map(|(at, units)| self.part(at, units))
            .collect();
        let parts: Vec<LayerUnits<'_>> = parts.iter().map(Part::units).collect();
        let verdicts = self.inner.steps(at, &parts)?;
        let layers = at.iter().zip(units).zip(verdicts);
        layers
            .map(|((at, units), verdict)| self.merged(at, verdict, units))
            .collect()
    }
}
