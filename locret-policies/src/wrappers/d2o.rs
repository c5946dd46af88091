//! D2O: what is dropped and like enough is folded into what stays, key and value.

use super::nearest::{Nearest, nearest};
use crate::{published::Published, scorers::Heavy};
use locret_core::{
    Budget, Error, Evict, Fold, Held, Keep, KvCachePolicy, KvStore, LayerSpec, LayerUnits,
    ModelSpec, Needs, Part, Placement, Positions, Prefill, Ranking, Result, Rows, Selection, Step,
    Verdict, Visible,
};
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// D2O, dynamic discriminative operations (arXiv 2406.13035 §3.3), around any policy: a dropped unit whose key is
/// like enough to one that stays is folded into that unit, key and value; what is like none is lost.
///
/// How alike is enough is found on the way: in each layer the threshold begins as the mean of the dropped units'
/// largest cosines and then follows it, `τ ← (1 - β) τ + β · mean`. It is noted with the layer, and so forked and
/// saved with the sequence.
///
/// Where the paper and the authors' code differ, [`D2oForm`] says which of them it is.
///
/// **Keeps** what the policy inside keeps: [`D2o::policy`] has [`Heavy`], four sinks and the newest quarter.
///
/// **Not touched** are the first two layers and the last one, where attention is spread over everything. The authors
/// keep all units of these layers. Here they are within the budget like all others, or memory would not be bounded;
/// nothing is folded in them. [`exempt`](Self::exempt) says otherwise, and [`whole`](Self::whole) keeps all of their
/// units, as published: memory then grows with the text by what these layers hold.
///
/// **Left out** are the paper's budgets by layer, from the variance of summed attention (§3.2): they are known only once
/// every layer has read the whole prompt and held all of it, which is what a bound on memory rules out, and a layer
/// whose budget grows later has nothing to fill it with. [`Evict::table`] takes shares that were measured
/// beforehand.
///
/// **Keys** are mixed as they lie in the store: rotated in [`Positions::Original`] (as the authors do; the sum of keys
/// from two positions stands at neither), not rotated in [`Positions::Compact`]. Codes that are made for a group of
/// keys at once ([`QuantLayout::Kivi`](locret_core::QuantLayout::Kivi)) leave keys as they are, and so does
/// [`keys(false)`](Self::keys). All mixing is done in 32 bits and before anything is quantised; what was in codes
/// already is coded once more.
///
/// **Cost:** a product of the dropped keys with the kept ones of each head, when something goes; with [`Heavy`]
/// attention is observed for every query, as for [`H2o`](crate::H2o).
///
/// **Chunked prefill:** a chunk's dropped units are judged together, by attention that ends with the chunk; the question
/// has no say. Units are folded again with their own unit when that goes, so that over a long text what is mixed
/// into one is a blur. τ moves once a chunk instead of once a token.
#[derive(Debug, Clone)]
#[must_use]
pub struct D2o<P> {
    inner: P,
    form: D2oForm,
    keys: bool,
    smoothing: f32,
    exempt: (usize, usize),
    whole: bool,
}

/// Whose D2O: which dropped units are folded, and what they count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum D2oForm {
    /// The paper's (§3.3): each head's units by their own cosine; of a mean in which the unit that stays counts `e` and
    /// a folded one `exp(cosine)`. There is no program of it: it is held against plain loops alone.
    #[default]
    Paper,
    /// The authors' program's: the first dropped unit of each head together, the second of each, and so on, by the mean
    /// of their cosines; the unit that stays and each folded one times its cosine, divided by how many they are.
    /// What is folded into so grows smaller with every unit that is not quite alike.
    Code,
}

impl FromStr for D2oForm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "paper" => Ok(Self::Paper),
            "code" => Ok(Self::Code),
            _ => Err(Error::setting("d2o_form", "paper or code", text)),
        }
    }
}

/// What stands for a threshold where nothing has been dropped yet: no mean of cosines.
const UNKNOWN: f32 = f32::INFINITY;

impl D2o<Evict<Heavy>> {
    /// Keeps `budget` units as published: a quarter of them the newest, four sinks, the rest by summed attention.
    pub fn policy(budget: Budget) -> Self {
        Self::new(Heavy.published(budget))
    }
}

impl<P: KvCachePolicy> D2o<P> {
    /// β, how much of the threshold a step's mean is.
    pub const SMOOTHING: f32 = 0.5;
    /// First and last layers in which nothing is folded.
    pub const EXEMPT: (usize, usize) = (2, 1);

    /// Folds what `inner` drops.
    pub fn new(inner: P) -> Self {
        Self {
            inner,
            form: D2oForm::Paper,
            keys: true,
            smoothing: Self::SMOOTHING,
            exempt: Self::EXEMPT,
            whole: false,
        }
    }

    /// As the paper or as the authors' program has it.
    pub fn form(self, form: D2oForm) -> Self {
        Self { form, ..self }
    }

    /// Whether keys are mixed, too, where the store can.
    pub fn keys(self, keys: bool) -> Self {
        Self { keys, ..self }
    }

    /// β, from 0 (the first mean stays the threshold) to 1 (each step has its own).
    pub fn smoothing(self, smoothing: f32) -> Self {
        Self { smoothing, ..self }
    }

    /// In how many of the first and of the last layers nothing is folded.
    pub fn exempt(self, first: usize, last: usize) -> Self {
        Self {
            exempt: (first, last),
            ..self
        }
    }

    /// Whether layers in which nothing is folded keep everything, as published. Memory is then not bounded.
    pub fn whole(self, whole: bool) -> Self {
        Self { whole, ..self }
    }

    /// Whether nothing is folded in this layer.
    fn exempts(&self, layer: &LayerSpec) -> bool {
        let (first, last) = self.exempt;
        layer.index < first || layer.layers - layer.index.min(layer.layers) <= last
    }

    /// Whether this layer keeps everything.
    fn keeps_all(&self, layer: &LayerSpec) -> bool {
        self.whole && self.exempts(layer)
    }

    /// The layer as the policy inside sees it: without the threshold among what is noted. `None` if that is the same.
    fn part<'a>(&self, at: &Step, units: &'a LayerUnits<'a>) -> Option<Part<'a>> {
        let own = self.inner.noted(&at.layer);
        if own == 0 {
            return None;
        }
        let carried = (0..units.kv_heads()).map(|head| units.carried(head).to_vec());
        let notes = &units.notes()[..own.min(units.notes().len())];
        Some(units.carrying(carried.collect()).noting(notes))
    }

    /// The verdict of the policy inside, with what is dropped folded into what stays.
    fn merged(&self, at: &Step, mut verdict: Verdict, units: &LayerUnits<'_>) -> Result<Verdict> {
        if self.exempts(&at.layer) {
            if self.whole {
                verdict.keep = Keep::All;
            }
            return Ok(verdict);
        }
        let own = self.inner.noted(&at.layer);
        let before = units.notes().get(own).copied().unwrap_or(UNKNOWN);
        let mut threshold = before;
        if let Keep::Slots(kept) = verdict.keep {
            let (folds, mean) = self.folds(units, &kept, before)?;
            threshold = mean.unwrap_or(before);
            verdict.keep = Keep::Merged {
                kept,
                folds,
                keys: self.keys && units.folds_keys(),
            };
        }
        if verdict.notes.is_some() || threshold != before {
            let mut notes = match verdict.notes {
                Some(notes) => notes,
                None => units.notes().iter().copied().take(own).collect(),
            };
            // The policy inside has nothing to note yet.
            notes.resize(own, 0.0);
            notes.push(threshold);
            verdict.notes = Some(notes);
        }
        Ok(verdict)
    }

    /// What is folded into what, by KV head, and the new threshold if anything was dropped.
    fn folds(
        &self,
        units: &LayerUnits<'_>,
        kept: &Selection,
        before: f32,
    ) -> Result<(Vec<Vec<Fold>>, Option<f32>)> {
        let kept = kept.heads();
        let near: Vec<Vec<Nearest>> = (kept.iter().enumerate())
            .map(|(head, kept)| nearest(units, head, kept))
            .collect::<Result<_>>()?;
        let all = || near.iter().flatten().map(|near| near.cosine);
        let count = all().count();
        if count == 0 {
            return Ok((vec![Vec::new(); near.len()], None));
        }
        let mean = all().sum::<f32>() / count as f32;
        let threshold = match before == UNKNOWN {
            true => mean,
            false => (1.0 - self.smoothing) * before + self.smoothing * mean,
        };
        let longest = near.iter().map(Vec::len).max().unwrap_or(0);
        let together: Vec<f32> = match self.form {
            D2oForm::Paper => Vec::new(),
            D2oForm::Code => (0..longest)
                .map(|at| {
                    let there = near.iter().filter_map(|list| list.get(at));
                    let (n, sum) =
                        there.fold((0, 0.0), |(n, sum), near| (n + 1, sum + near.cosine));
                    sum / n as f32
                })
                .collect(),
        };
        let folds = near.iter().zip(kept).map(|(near, kept)| {
            let alike = |at: usize| match self.form {
                D2oForm::Paper => near[at].cosine >= threshold,
                D2oForm::Code => together[at] >= threshold,
            };
            let given = (0..near.len()).filter(|at| alike(*at)).map(|at| near[at]);
            self.shares(kept, given.collect())
        });
        Ok((folds.collect(), Some(threshold)))
    }

    /// What these dropped units of a head count in the units that they are folded into.
    fn shares(&self, kept: &[u32], given: Vec<Nearest>) -> Vec<Fold> {
        let weight = |near: &Nearest| match self.form {
            D2oForm::Paper => near.cosine.exp(),
            D2oForm::Code => near.cosine,
        };
        // What the unit that stays counts, and by what all is divided.
        let (own, each) = match self.form {
            D2oForm::Paper => (1f32.exp(), None),
            D2oForm::Code => (1.0, Some(1.0)),
        };
        let mut whole = vec![own; kept.len()];
        for near in &given {
            whole[near.target] += each.unwrap_or_else(|| weight(near));
        }
        let mut folds: Vec<Fold> = (given.iter())
            .map(|near| Fold {
                from: near.dropped,
                into: kept[near.target],
                share: weight(near) / whole[near.target],
            })
            .collect();
        let taking = kept.iter().zip(&whole).filter(|(_, whole)| **whole != own);
        folds.extend(taking.map(|(unit, whole)| Fold {
            from: *unit,
            into: *unit,
            share: own / whole,
        }));
        folds
    }
}

#[deny(clippy::missing_trait_methods)]
impl<P: KvCachePolicy> KvCachePolicy for D2o<P> {
    fn name(&self) -> String {
        match self.inner.name().as_str() {
            "heavy" => "d2o".into(),
            inner => format!("{inner}+d2o"),
        }
    }

    fn fingerprint(&self) -> String {
        let Self {
            inner,
            form,
            keys,
            smoothing,
            exempt,
            whole,
        } = self;
        let inner = inner.fingerprint();
        format!(
            "D2o {{ inner: {inner}, form: {form:?}, keys: {keys}, smoothing: {smoothing:?}, \
             exempt: {exempt:?}, whole: {whole} }}"
        )
    }

    fn needs(&self) -> Needs {
        self.inner.needs()
    }

    fn positions(&self) -> Positions {
        self.inner.positions()
    }

    fn carries(&self) -> Option<String> {
        self.inner.carries()
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.inner.carried_width(layer)
    }

    /// What the policy inside notes, and the threshold.
    fn noted(&self, layer: &LayerSpec) -> usize {
        self.inner.noted(layer) + usize::from(!self.exempts(layer))
    }

    fn validate(&self, model: &ModelSpec, prefill: &Prefill) -> Result<()> {
        if !(0.0..=1.0).contains(&self.smoothing) {
            return Err(Error::setting(
                "smoothing",
                "a share from 0 to 1",
                self.smoothing,
            ));
        }
        if self.whole && self.inner.needs().all_layers {
            let expected = "layers that do not share one budget, where some keep everything";
            return Err(Error::setting(
                "exempt_whole",
                expected,
                "budgets over the model",
            ));
        }
        self.inner.validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        self.inner.store(layer, place)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        match self.keeps_all(layer) {
            true => None,
            false => self.inner.limit(layer, total),
        }
    }

    fn held(&self, layer: &LayerSpec, total: usize) -> Option<Held> {
        match self.keeps_all(layer) {
            true => None,
            false => self.inner.held(layer, total),
        }
    }

    fn decode_slack(&self) -> Option<usize> {
        self.inner.decode_slack()
    }

    fn before(&self, at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        match self.part(at, units) {
            Some(part) => self.inner.before(at, queries, &part.units()),
            None => self.inner.before(at, queries, units),
        }
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let verdict = match self.part(at, units) {
            Some(part) => self.inner.step(at, &part.units())?,
            None => self.inner.step(at, units)?,
        };
        self.merged(at, verdict, units)
    }

    /// What is folded depends on what is dropped.
    fn ranking(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Option<Ranking>> {
        Ok(None)
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        let parts: Vec<Option<Part<'_>>> = (at.iter().zip(units))
            .map(|(at, units)| self.part(at, units))
            .collect();
        let verdicts = match parts.iter().flatten().count() == units.len() {
            true => {
                let parts: Vec<LayerUnits<'_>> = parts.iter().flatten().map(Part::units).collect();
                self.inner.steps(at, &parts)?
            }
            false => self.inner.steps(at, units)?,
        };
        let layers = at.iter().zip(units).zip(verdicts);
        layers
            .map(|((at, units), verdict)| self.merged(at, verdict, units))
            .collect()
    }
}
