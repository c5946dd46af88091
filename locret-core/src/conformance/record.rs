//! Protocols of what a policy decides, what a store is given, and what a model computes.

use super::Promise;
use crate::{
    CausalLm, Compute, Error, Fold, Growth, Held, Keep, KeptUnits, KvCachePolicy, KvStore, KvTiles,
    LayerSpec, LayerUnits, ModelSpec, Needs, Observed, Pass, Placement, Positions, Prefill,
    Ranking, Result, Rows, Scores, Step, TurnKeys, Verdict, Visible,
};
use std::{
    any::Any,
    collections::BTreeMap,
    io::{Read, Take, Write},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Promises that were found broken while something else was going on.
#[derive(Debug, Clone, Default)]
pub(super) struct Faults(Arc<Mutex<Vec<(Promise, String)>>>);

impl Faults {
    /// Notes it, and stops whatever is going on.
    fn broken<T>(&self, promise: Promise, found: String) -> Result<T> {
        let error = Error::Device(format!("a store broke a promise: {found}"));
        lock(&self.0).push((promise, found));
        Err(error)
    }

    pub(super) fn first(&self) -> Option<(Promise, String)> {
        lock(&self.0).first().cloned()
    }
}

/// One verdict, and what it was based on.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// Where it was asked for.
    pub step: Step,
    /// Original positions that each head held, the new ones included.
    pub before: Vec<Vec<u32>>,
    /// Original positions that each head keeps.
    pub kept: Vec<Vec<u32>>,
    /// What is mixed into what before that, by KV head, in units of `before`; empty for nothing.
    pub folds: Vec<Vec<Fold>>,
    /// Whether keys are mixed, too.
    pub folds_keys: bool,
    /// Scores to carry, for the units before the verdict.
    pub scores: Option<Scores>,
    /// What it noted of the layer, if anything.
    pub notes: Option<Vec<f32>>,
    /// What the policy was shown.
    pub seen: Seen,
    /// What it let queries see, in units of `before`.
    pub visible: Visible,
}

/// What a policy was shown of one layer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Seen {
    /// Scores carried from earlier verdicts, by KV head.
    pub carried: Vec<Vec<f32>>,
    /// What was noted of the layer.
    pub notes: Vec<f32>,
    /// Surprisal of the new tokens.
    pub surprisal: Option<Vec<f32>>,
    /// Observed attention, and of how many queries.
    pub observed: Option<(Vec<Vec<f32>>, usize)>,
    /// Queries, keys and values before rotation, flat.
    pub qkv: Option<[Vec<f32>; 3]>,
    /// What these were made from, flat.
    pub input: Option<Vec<f32>>,
    /// Keys as attention saw them, by KV head, flat; only with [`Recording::with_units`].
    pub keys: Vec<Vec<f32>>,
    /// Values, by KV head, flat; only with [`Recording::with_units`].
    pub values: Vec<Vec<f32>>,
}

/// A policy that keeps a protocol of another one's verdicts, for one sequence at a time.
///
/// It also watches the store: what stays has to be bit for bit what was appended.
#[derive(Debug)]
pub struct Recording {
    inner: Arc<dyn KvCachePolicy>,
    log: Mutex<Vec<Decision>>,
    /// What queries were let see of layers whose verdict is still to come.
    visible: Mutex<Vec<(usize, Visible)>>,
    faults: Faults,
    tolerance: f32,
    turns: bool,
    units: bool,
}

impl Recording {
    /// Records `policy`.
    pub fn new(policy: Arc<dyn KvCachePolicy>) -> Self {
        Self {
            inner: policy,
            log: Mutex::default(),
            visible: Mutex::default(),
            faults: Faults::default(),
            tolerance: 0.0,
            turns: true,
            units: false,
        }
    }

    /// How far what the store hands out may be from what was appended, as a share of the largest
    /// number appended; 0 at first.
    #[must_use]
    pub fn store_tolerance(mut self, tolerance: f32) -> Self {
        self.tolerance = tolerance;
        self
    }

    /// Refuses to turn keys in the store, as a store of few bits does: keys then stay as they were
    /// appended, and attention rotates while it loads.
    #[must_use]
    pub fn without_turning(mut self) -> Self {
        self.turns = false;
        self
    }

    /// Records keys and values as the policy could see them, too.
    #[must_use]
    pub fn with_units(mut self) -> Self {
        self.units = true;
        self
    }

    /// All verdicts so far, in order.
    pub fn decisions(&self) -> Vec<Decision> {
        lock(&self.log).clone()
    }

    /// The first promise that the store broke, and how.
    pub fn fault(&self) -> Option<(Promise, String)> {
        self.faults.first()
    }

    /// Original positions that each head of `layer` kept after the last verdict on it.
    pub fn last_kept(&self, layer: usize) -> Option<Vec<Vec<u32>>> {
        let log = lock(&self.log);
        let last = log.iter().rev().find(|d| d.step.layer.index == layer);
        last.map(|d| d.kept.clone())
    }
}

#[deny(clippy::missing_trait_methods)]
impl KvCachePolicy for Recording {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn fingerprint(&self) -> String {
        self.inner.fingerprint()
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

    fn noted(&self, layer: &LayerSpec) -> usize {
        self.inner.noted(layer)
    }

    fn validate(&self, model: &ModelSpec, prefill: &Prefill) -> Result<()> {
        self.inner.validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        Ok(Box::new(Watched {
            inner: self.inner.store(layer, place)?,
            heads: vec![Shadow::default(); layer.kv_heads],
            dim: layer.head_dim,
            largest: 0.0,
            tolerance: self.tolerance,
            turns: self.turns,
            faults: self.faults.clone(),
        }))
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
        let visible = self.inner.before(at, queries, units)?;
        lock(&self.visible).push((at.layer.index, visible.clone()));
        Ok(visible)
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let verdict = self.inner.step(at, units)?;
        self.note(at, units, &verdict)?;
        Ok(verdict)
    }

    /// A protocol needs verdicts.
    fn ranking(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Option<Ranking>> {
        Ok(None)
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        let verdicts = self.inner.steps(at, units)?;
        for ((at, units), verdict) in at.iter().zip(units).zip(&verdicts) {
            self.note(at, units, verdict)?;
        }
        Ok(verdicts)
    }
}

impl Recording {
    fn note(&self, at: &Step, units: &LayerUnits<'_>, verdict: &Verdict) -> Result<()> {
        let heads = 0..units.kv_heads();
        let before: Vec<Vec<u32>> = heads
            .clone()
            .map(|head| units.positions(head).to_vec())
            .collect();
        let pick = |(slots, held): (&Vec<u32>, &Vec<u32>)| {
            let positions = slots.iter().map(|slot| held.get(*slot as usize).copied());
            // A slot that is not there is for the engine to refuse.
            positions.map(|p| p.unwrap_or(u32::MAX)).collect()
        };
        let (kept, folds, folds_keys) = match &verdict.keep {
            Keep::All => (before.clone(), Vec::new(), false),
            Keep::Slots(kept) => (
                kept.heads().iter().zip(&before).map(pick).collect(),
                Vec::new(),
                false,
            ),
            Keep::Merged { kept, folds, keys } => {
                let kept = kept.heads().iter().zip(&before).map(pick);
                (kept.collect(), folds.clone(), *keys)
            }
        };
        let mut seen = Seen {
            carried: heads.clone().map(|h| units.carried(h).to_vec()).collect(),
            notes: units.notes().to_vec(),
            surprisal: units.surprisal().map(<[f32]>::to_vec),
            observed: units.observed().map(
                |Observed {
                     per_head, queries, ..
                 }| (per_head.clone(), *queries),
            ),
            ..Seen::default()
        };
        if let Some(qkv) = units.qkv() {
            let flat = |x: &Rows| x.clone().into_values();
            seen.qkv = Some([flat(&qkv.q)?, flat(&qkv.k)?, flat(&qkv.v)?]);
        }
        if let Some(input) = units.input() {
            seen.input = Some(input.clone().into_values()?);
        }
        if self.units {
            for head in heads {
                seen.keys.push(units.keys(head)?.into_values()?);
                seen.values.push(units.values(head)?.into_values()?);
            }
        }
        let mut asked = lock(&self.visible);
        let layer = asked.iter().position(|(layer, _)| *layer == at.layer.index);
        let visible = layer.map(|at| asked.swap_remove(at).1).unwrap_or_default();
        drop(asked);
        lock(&self.log).push(Decision {
            step: *at,
            before,
            kept,
            folds,
            folds_keys,
            scores: verdict.scores.clone(),
            notes: verdict.notes.clone(),
            seen,
            visible,
        });
        Ok(())
    }
}

/// A store that compares what another one hands out with what it was given.
#[derive(Debug)]
struct Watched {
    inner: Box<dyn KvStore>,
    heads: Vec<Shadow>,
    dim: usize,
    largest: f32,
    tolerance: f32,
    turns: bool,
    faults: Faults,
}

/// One head's units, flat.
#[derive(Debug, Clone, Default)]
struct Shadow {
    /// As they were appended.
    given: [Vec<f32>; 2],
    /// As they were handed out last.
    held: [Vec<f32>; 2],
}

const PARTS: [&str; 2] = ["keys", "values"];

impl Watched {
    fn content(&self, head: usize) -> Result<[Vec<f32>; 2]> {
        Ok([
            self.inner.keys(head)?.into_values()?,
            self.inner.values(head)?.into_values()?,
        ])
    }

    /// Whether numbers are as near as this store promises to those that are due.
    fn near(&self, promise: Promise, what: &str, found: &[f32], due: &[f32]) -> Result<()> {
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let (at, off) = super::largest_difference(wide(found), wide(due));
        if found.len() == due.len() && off <= f64::from(self.tolerance * self.largest) {
            return Ok(());
        }
        self.faults.broken(
            promise,
            format!(
                "{what}: {} numbers for {}, off by {off:.2e} in unit {}",
                found.len(),
                due.len(),
                at / self.dim
            ),
        )
    }

    /// Whether keys (part 0) or values (part 1) are what mixing makes of them, and nothing else is another.
    fn check_mixture(&mut self, part: usize, head: usize, folds: &[Fold]) -> Result<()> {
        let found = self.content(head)?;
        let d = self.dim;
        let due = mixed(&self.heads[head].held[part], d, folds);
        // Sums may be larger than anything that was appended.
        let all = due.iter();
        self.largest = all.fold(self.largest, |most, x| most.max(x.abs()));
        for unit in 0..due.len() / d {
            let at = unit * d..(unit + 1) * d;
            let what = format!(
                "the {} of unit {unit} of KV head {head}",
                ["key", "value"][part]
            );
            let terms = folds.iter().filter(|f| f.into as usize == unit).count();
            let into = terms > 0;
            let held = &self.heads[head].held[part][at.clone()];
            if !into
                && !found[part]
                    .get(at.clone())
                    .is_some_and(|x| same_bits(x, held))
            {
                let found = format!("{what} changed, and nothing was mixed into it");
                return self.faults.broken(Promise::Mixture, found);
            }
            // The order of a sum is the store's business.
            let sum = self.tolerance.max(1e-6).max(3e-7 * terms as f32);
            let near = |x: &[f32]| {
                let pairs = x.iter().zip(&due[at.clone()]);
                pairs
                    .into_iter()
                    .all(|(a, b)| (a - b).abs() <= sum * self.largest)
            };
            if into && !found[part].get(at.clone()).is_some_and(near) {
                return self
                    .faults
                    .broken(Promise::Mixture, format!("{what} is another"));
            }
            if into {
                // From here on this is what the unit is.
                self.heads[head].given[part][at.clone()].copy_from_slice(&found[part][at]);
            }
        }
        let other = 1 - part;
        if !same_bits(&found[other], &self.heads[head].held[other]) {
            let found = format!(
                "{} of KV head {head} changed when {} were mixed",
                PARTS[other], PARTS[part]
            );
            return self.faults.broken(Promise::Mixture, found);
        }
        self.heads[head].held = found;
        Ok(())
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Rows of `dim` numbers after others were mixed into them.
pub(super) fn mixed(values: &[f32], dim: usize, folds: &[Fold]) -> Vec<f32> {
    let mut out: Vec<f64> = values.iter().map(|x| f64::from(*x)).collect();
    for (unit, own) in own_shares(folds) {
        let unit = unit as usize * dim;
        out[unit..unit + dim].iter_mut().for_each(|x| *x *= own);
    }
    for fold in folds.iter().filter(|fold| fold.from != fold.into) {
        let (from, into) = (fold.from as usize * dim, fold.into as usize * dim);
        for i in 0..dim {
            out[into + i] += f64::from(fold.share) * f64::from(values[from + i]);
        }
    }
    out.iter().map(|x| *x as f32).collect()
}

/// Units that others are mixed into, and what their own values count.
pub(super) fn own_shares(folds: &[Fold]) -> BTreeMap<u32, f64> {
    let of = |unit: u32| {
        let into = folds.iter().filter(move |fold| fold.into == unit);
        let sum = |itself: bool| {
            let folds = into.clone().filter(|f| (f.from == unit) == itself);
            folds.map(|fold| f64::from(fold.share)).sum::<f64>()
        };
        match folds.iter().any(|f| f.from == unit && f.into == unit) {
            true => sum(true),
            false => 1.0 - sum(false),
        }
    };
    folds
        .iter()
        .map(|fold| (fold.into, of(fold.into)))
        .collect()
}

#[deny(clippy::missing_trait_methods)]
impl KvStore for Watched {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn append(&mut self, keys: &Rows, values: &Rows) -> Result<()> {
        let (t, heads, d) = (keys.rows(), self.heads.len(), self.dim);
        let given = [keys.clone().into_values()?, values.clone().into_values()?];
        let all = given.iter().flatten();
        self.largest = all.fold(self.largest, |most, x| most.max(x.abs()));
        self.inner.append(keys, values)?;
        for head in 0..heads {
            let found = self.content(head)?;
            for part in 0..2 {
                let shadow = &mut self.heads[head];
                let old = shadow.held[part].len();
                for row in 0..t {
                    let at = (row * heads + head) * d;
                    shadow.given[part].extend_from_slice(&given[part][at..at + d]);
                }
                let what = format!("{} of KV head {head} after {t} more tokens", PARTS[part]);
                self.near(
                    Promise::Survivors,
                    &what,
                    &found[part],
                    &self.heads[head].given[part],
                )?;
                if !same_bits(&found[part][..old], &self.heads[head].held[part]) {
                    return self.faults.broken(
                        Promise::Survivors,
                        format!(
                            "older {} of KV head {head} changed by an append",
                            PARTS[part]
                        ),
                    );
                }
            }
            self.heads[head].held = found;
        }
        Ok(())
    }

    fn retain(&mut self, kept: &[Vec<u32>]) -> Result<()> {
        self.inner.retain(kept)?;
        let d = self.dim;
        for (head, list) in kept.iter().enumerate() {
            let found = self.content(head)?;
            let shadow = &mut self.heads[head];
            let pick = |all: &[f32]| -> Vec<f32> {
                let rows = list.iter().map(|u| *u as usize * d);
                rows.flat_map(|at| &all[at..at + d]).copied().collect()
            };
            for part in 0..2 {
                shadow.given[part] = pick(&shadow.given[part]);
                if !same_bits(&found[part], &pick(&shadow.held[part])) {
                    return self.faults.broken(
                        Promise::Survivors,
                        format!("{} of KV head {head} changed when others went", PARTS[part]),
                    );
                }
            }
            shadow.held = found;
        }
        Ok(())
    }

    fn retain_listed(&mut self, kept: &KeptUnits) -> Result<()> {
        self.retain(&kept.read()?)
    }

    fn settle(&mut self) -> Result<()> {
        self.inner.settle()?;
        for head in 0..self.heads.len() {
            let found = self.content(head)?;
            for part in 0..2 {
                let what = format!("{} of KV head {head} after a step", PARTS[part]);
                self.near(
                    Promise::Survivors,
                    &what,
                    &found[part],
                    &self.heads[head].given[part],
                )?;
                if self.tolerance == 0.0 && !same_bits(&found[part], &self.heads[head].held[part]) {
                    return self
                        .faults
                        .broken(Promise::Survivors, format!("{what} are others"));
                }
            }
            self.heads[head].held = found;
        }
        Ok(())
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        self.inner.fold_values(head, folds)?;
        self.check_mixture(1, head, folds)
    }

    fn folds_keys(&self) -> bool {
        self.inner.folds_keys()
    }

    fn fold_keys(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        self.inner.fold_keys(head, folds)?;
        self.check_mixture(0, head, folds)
    }

    fn len(&self, head: usize) -> usize {
        self.inner.len(head)
    }

    fn is_empty(&self) -> bool {
        self.inner.is_empty()
    }

    fn bytes(&self) -> usize {
        self.inner.bytes()
    }

    fn total_bytes(&self) -> usize {
        self.inner.total_bytes()
    }

    fn growth(&self) -> Box<dyn Growth> {
        self.inner.growth()
    }

    fn keys(&self, head: usize) -> Result<Rows> {
        self.inner.keys(head)
    }

    fn values(&self, head: usize) -> Result<Rows> {
        self.inner.values(head)
    }

    fn keys_at(&self, head: usize, units: &[u32]) -> Result<Rows> {
        self.inner.keys_at(head, units)
    }

    fn as_any(&self) -> Option<&dyn Any> {
        self.inner.as_any()
    }

    fn tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>> {
        self.inner.tiles(head)
    }

    fn tiered(&self) -> bool {
        self.inner.tiered()
    }

    fn bring(&mut self, seen: &[Vec<Range<usize>>]) -> Result<()> {
        self.inner.bring(seen)
    }

    fn brought(&self, seen: &[Vec<Range<usize>>]) -> bool {
        self.inner.brought(seen)
    }

    fn brought_tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>> {
        self.inner.brought_tiles(head)
    }

    fn put_away(&mut self, blocks: &[Vec<Vec<u32>>]) -> Result<()> {
        self.inner.put_away(blocks)?;
        for head in 0..self.heads.len() {
            let found = self.content(head)?;
            let held = &self.heads[head].held;
            if (0..2).any(|part| !same_bits(&found[part], &held[part])) {
                return self.faults.broken(
                    Promise::Survivors,
                    format!("units of KV head {head} changed when some were put away"),
                );
            }
        }
        Ok(())
    }

    fn take(&mut self, taken: &[Vec<u32>]) -> Result<Box<dyn KvStore>> {
        let other = self.inner.take(taken)?;
        for head in 0..self.heads.len() {
            let held = self.content(head)?;
            self.heads[head] = Shadow {
                given: held.clone(),
                held,
            };
        }
        Ok(other)
    }

    fn turned_block(&self) -> usize {
        self.inner.turned_block()
    }

    fn turned_tiles(&self, head: usize, keys: bool) -> Option<Box<dyn KvTiles + '_>> {
        self.inner.turned_tiles(head, keys)
    }

    fn turns_keys(&self) -> bool {
        self.turns && self.inner.turns_keys()
    }

    fn turn_keys(&mut self, turn: &TurnKeys<'_>) -> Result<()> {
        self.inner.turn_keys(turn)?;
        for head in 0..self.heads.len() {
            let [keys, _] = self.content(head)?;
            let shadow = &mut self.heads[head];
            shadow.given[0].clone_from(&keys);
            shadow.held[0] = keys;
        }
        Ok(())
    }

    fn write(&self, to: &mut dyn Write) -> Result<()> {
        self.inner.write(to)
    }

    fn read(&mut self, from: &mut Take<&mut dyn Read>) -> Result<()> {
        self.inner.read(from)?;
        for head in 0..self.heads.len() {
            let held = self.content(head)?;
            self.heads[head] = Shadow {
                given: held.clone(),
                held,
            };
        }
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvStore> {
        Box::new(Self {
            inner: self.inner.fork(),
            heads: self.heads.clone(),
            faults: self.faults.clone(),
            ..*self
        })
    }
}

/// A model that keeps the hidden states of another one.
#[derive(Debug)]
pub struct Tap {
    inner: Arc<dyn CausalLm>,
    passes: Mutex<Vec<Tapped>>,
}

/// One pass through a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Tapped {
    /// What went in.
    pub ids: Vec<u32>,
    /// What came out, `[tokens, hidden]`, flat.
    pub hidden: Vec<f32>,
}

impl Tap {
    /// Taps `model`.
    pub fn new(model: Arc<dyn CausalLm>) -> Self {
        Self {
            inner: model,
            passes: Mutex::default(),
        }
    }

    /// All passes so far, in order.
    pub fn passes(&self) -> Vec<Tapped> {
        lock(&self.passes).clone()
    }
}

#[deny(clippy::missing_trait_methods)]
impl CausalLm for Tap {
    fn spec(&self) -> &ModelSpec {
        self.inner.spec()
    }

    fn compute(&self) -> &Arc<dyn Compute> {
        self.inner.compute()
    }

    fn hidden(&self, ids: &[u32], pass: &mut Pass<'_>) -> Result<Rows> {
        let hidden = self.inner.hidden(ids, pass)?;
        lock(&self.passes).push(Tapped {
            ids: ids.to_vec(),
            hidden: hidden.clone().into_values()?,
        });
        Ok(hidden)
    }

    fn logits(&self, hidden: Rows) -> Result<Rows> {
        self.inner.logits(hidden)
    }

    fn qkv_weight(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        self.inner.qkv_weight(layer)
    }

    fn output_weight(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        self.inner.output_weight(layer)
    }

    fn fingerprint(&self) -> Result<Option<String>> {
        self.inner.fingerprint()
    }
}
