//! One step through a model, of one or several sequences: a value, from its beginning to its end.

use super::{
    cache::SequenceCache,
    probe::{Decided, Probe},
};
use crate::{
    Attention, CausalLm, Error, LayerUnits, ModelSpec, Needs, Observation, Observed, Phase,
    Positions, Qkv, Ranking, Result, RopeTable, Rotation, Rows, Sight, Step, TableRows, Views,
    Visible,
};
use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

/// What a model computes on: the new tokens of one or several sequences, and their caches.
///
/// The engine makes it, hands it to [`CausalLm::hidden`], and [finishes](Self::finish) it. Rows of
/// several sequences stand one below the other, in the order of the steps. In between an adapter can do
/// one thing: [`attend`](Self::attend). Where tokens stand and what stays of them is none of its
/// business:
///
/// ```
/// # use locret_core::{Pass, Qkv, Result, Rows};
/// fn adapter(pass: &mut Pass<'_>, qkv: Qkv) -> Result<Rows> {
///     pass.attend(0, qkv)
/// }
/// ```
///
/// ```compile_fail,E0599
/// # use locret_core::{Pass, Qkv, Result, Rows};
/// fn adapter(pass: &mut Pass<'_>, _: Qkv) -> usize {
///     pass.seen() // A position.
/// }
/// ```
///
/// ```compile_fail,E0616
/// # use locret_core::{Pass, Qkv, Result, Rows};
/// fn adapter(pass: &mut Pass<'_>, _: Qkv) -> String {
///     pass.steps[0].cache.policy().name() // A policy.
/// }
/// ```
///
/// A pass that is dropped before it is finished leaves layers that do not agree: from then on its
/// caches say [`Error::Unusable`].
///
/// ```no_run
/// # fn demo(model: &dyn locret_core::CausalLm, caches: &mut [locret_core::SequenceCache], ids: &[u32])
/// # -> locret_core::Result<()> {
/// use locret_core::{Pass, Phase, forward};
///
/// // One more token of each sequence, in one pass.
/// let steps = caches.iter_mut().map(|cache| {
///     let total = cache.seen() + 1;
///     cache.step(Phase::Decode, 1, total)
/// });
/// let mut pass = Pass::new(steps)?;
/// let hidden = forward(model, ids, &mut pass)?;
/// pass.finish(None)?;
/// let logits = model.logits(hidden)?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Pass<'a> {
    steps: Vec<SequenceStep<'a>>,
    /// The layer that is due.
    next: usize,
    /// A layer was begun and not ended: whatever comes now, the caches do not agree.
    broken: bool,
    /// What goes wrong with one sequence is its own affair.
    apart: bool,
}

/// One sequence's part in a [`Pass`].
pub struct SequenceStep<'a> {
    cache: &'a mut SequenceCache,
    phase: Phase,
    incoming: usize,
    total: usize,
    probe: Option<&'a mut (dyn Probe + 'a)>,
    needs: Needs,
    /// Original positions only: row `i` is new token `i`.
    table: Option<RopeTable>,
    /// By layer, what verdicts that come after the last one are based on.
    pending: Vec<Pending>,
    /// Of a pass whose sequences stand apart: what ended this one's part in it.
    failed: Option<Error>,
}

/// What a policy asked for of one layer.
#[derive(Debug, Default)]
struct Pending {
    qkv: Option<Qkv>,
    input: Option<Rows>,
    observed: Option<Observed>,
    /// What queries saw, where it was not everything before them.
    seen: Option<Views>,
}

impl fmt::Debug for SequenceStep<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SequenceStep")
            .field("incoming", &self.incoming)
            .finish_non_exhaustive()
    }
}

impl<'a> Pass<'a> {
    /// A pass over these steps of different sequences.
    ///
    /// # Errors
    /// [`Error::Unusable`] for a cache that an earlier pass left half-way; [`Error::NotSupported`] if a
    /// sequence outgrows LongRoPE's original context and the store cannot turn its keys;
    /// [`Error::Setting`] for no steps, caches of different models, or a probe that needs what is not to
    /// be had. The caches are then as they were. [`Error::Device`] if it fails while keys are turned for a
    /// longer sequence (LongRoPE); the caches are then unusable.
    pub fn new(steps: impl IntoIterator<Item = SequenceStep<'a>>) -> Result<Self> {
        let mut steps = Self::checked(steps)?;
        for step in &mut steps {
            step.check()?;
        }
        for step in &mut steps {
            step.begin()?;
        }
        Ok(Self {
            steps,
            next: 0,
            broken: false,
            apart: false,
        })
    }

    /// A pass over these steps of different sequences, of which each stands for itself: an error or a
    /// panic of one's policy, store or probe ends its part alone, and nobody else's numbers change. See
    /// [`finish_each`](Self::finish_each).
    ///
    /// # Errors
    /// [`Error::Setting`] as [`new`](Self::new); all else is the sequences' own.
    pub fn apart(steps: impl IntoIterator<Item = SequenceStep<'a>>) -> Result<Self> {
        let mut steps = Self::checked(steps)?;
        for step in &mut steps {
            step.guarded(|step| {
                step.check()?;
                step.begin()
            });
        }
        Ok(Self {
            steps,
            next: 0,
            broken: false,
            apart: true,
        })
    }

    /// The steps, if they can stand in one pass.
    fn checked(steps: impl IntoIterator<Item = SequenceStep<'a>>) -> Result<Vec<SequenceStep<'a>>> {
        let steps: Vec<_> = steps.into_iter().collect();
        let Some(first) = steps.first() else {
            return Err(Error::setting("steps of a pass", "at least one", 0));
        };
        let spec = &first.cache.spec;
        if steps.iter().any(|step| step.cache.spec != *spec) {
            let expected = "caches of the same model";
            return Err(Error::setting(
                "steps of a pass",
                expected,
                "different ones",
            ));
        }
        let turning = |step: &SequenceStep<'_>| step.phase == Phase::Turn;
        if steps
            .iter()
            .any(|step| turning(step) == (step.incoming > 0))
        {
            let expected = "new tokens, unless a further prompt begins, and then none";
            return Err(Error::setting(
                "steps of a pass",
                expected,
                "the other way round",
            ));
        }
        if steps.iter().any(turning) && !steps.iter().all(turning) {
            let expected = "further prompts that begin in all steps or in none";
            return Err(Error::setting("steps of a pass", expected, "some"));
        }
        Ok(steps)
    }

    /// Attention of one layer: appends the new units, attends over what is kept, and evicts.
    ///
    /// Returns `[tokens, heads * head_dim]`, before the output projection.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::LayerOrder`] for a call that is not due, which changes nothing. The
    /// policy's, the store's and the device's errors end the pass: from then on there is
    /// [`Error::Unusable`].
    pub fn attend(&mut self, layer: usize, qkv: Qkv) -> Result<Rows> {
        if self.broken {
            return Err(Error::Unusable);
        }
        let spec = self.spec();
        if layer != self.next || layer >= spec.layers {
            return Err(Error::LayerOrder {
                expected: self.next,
                found: layer,
                layers: spec.layers,
            });
        }
        let hidden = spec.layer_input.then_some(spec.hidden);
        qkv.check(&spec.layer(layer), self.tokens(), hidden)?;
        self.next += 1;
        self.broken = true;
        let out = self.attend_there(layer, qkv)?;
        self.broken = false;
        Ok(out)
    }

    /// Brings what an adapter that knows of no map has computed elsewhere to where the layer is, and what comes
    /// of it back.
    fn attend_there(&mut self, layer: usize, qkv: Qkv) -> Result<Rows> {
        let (from, there) = (
            qkv.q.device(),
            self.steps[0].cache.places[layer].compute.clone(),
        );
        if from == *there.device() {
            return self.attend_each(layer, qkv);
        }
        let out = self.attend_each(layer, qkv.moved_to(&*there)?)?;
        let width = out.width();
        Rows::new(out.into_values()?, width, &from)
    }

    fn attend_each(&mut self, layer: usize, qkv: Qkv) -> Result<Rows> {
        if let ([only], false) = (&mut self.steps[..], self.apart) {
            return only.attend(layer, qkv);
        }
        let (apart, compute) = (
            self.apart,
            self.steps[0].cache.places[layer].compute.clone(),
        );
        let mut first = 0;
        let mut work = Vec::with_capacity(self.steps.len());
        for step in &mut self.steps {
            let own = first..first + step.incoming;
            first = own.end;
            work.push((step, Some(qkv.slice(own)?), None));
        }
        drop(qkv);
        let pieces = work.iter_mut().map(|(step, qkv, out)| {
            let piece = move || {
                *out = qkv.take().map(|qkv| match apart {
                    true => step.attend_apart(layer, qkv),
                    false => step.attend(layer, qkv),
                });
            };
            Box::new(piece) as Box<dyn FnOnce() + Send + '_>
        });
        compute.each(pieces.collect());
        let outs = work.into_iter().map(|(.., out)| {
            out.unwrap_or_else(|| Err(Error::Model("a sequence was left out".into())))
        });
        Rows::below(outs.collect::<Result<_>>()?)
    }

    /// Ends the pass. `surprisal` has one value for each new token if a policy needs it: see
    /// [`LayerUnits::surprisal`].
    ///
    /// # Errors
    /// [`Error::LayersMissing`] if layers were left out, [`Error::Shape`] for a missing or wrong
    /// `surprisal`, [`Error::Unusable`] after an error of [`attend`](Self::attend), the policies' errors.
    /// The caches, all of them, are unusable then.
    pub fn finish(mut self, surprisal: Option<&[f32]>) -> Result<()> {
        self.check_end(surprisal)?;
        let mut first = 0;
        for step in &mut self.steps {
            let own = first..first + step.incoming;
            first = own.end;
            if let Some(failed) = step.failed.take() {
                return Err(failed);
            }
            step.finish(surprisal.map(|all| &all[own]))?;
        }
        // Only now: an error of one sequence must not leave another one ahead of its neighbours.
        for step in &mut self.steps {
            step.cache.end(step.incoming);
        }
        Ok(())
    }

    /// Ends a pass whose sequences stand [`apart`](Self::apart): what became of each, in the order of the
    /// steps. A sequence that ended with an error has an unusable cache; the others have read their tokens.
    ///
    /// # Errors
    /// [`Error::LayersMissing`], [`Error::Shape`], [`Error::Unusable`] as [`finish`](Self::finish): for all
    /// of them.
    pub fn finish_each(mut self, surprisal: Option<&[f32]>) -> Result<Vec<Result<()>>> {
        self.check_end(surprisal)?;
        let mut first = 0;
        let each = self.steps.iter_mut().map(|step| {
            let own = first..first + step.incoming;
            first = own.end;
            step.guarded(|step| step.finish(surprisal.map(|all| &all[own])));
            match step.failed.take() {
                Some(failed) => Err(failed),
                None => {
                    step.cache.end(step.incoming);
                    Ok(())
                }
            }
        });
        Ok(each.collect())
    }

    /// Whether everything is there that the end of a pass takes.
    fn check_end(&self, surprisal: Option<&[f32]>) -> Result<()> {
        if self.broken {
            return Err(Error::Unusable);
        }
        let (layers, tokens) = (self.spec().layers, self.tokens());
        let turning = self.steps.iter().all(|step| step.phase == Phase::Turn);
        if !turning && self.next != layers {
            return Err(Error::LayersMissing {
                attended: self.next,
                layers,
            });
        }
        let needed = self.steps.iter().any(|step| step.needs.surprisal);
        if needed && !turning || surprisal.is_some() {
            let found = surprisal.map_or(0, <[f32]>::len);
            if found != tokens {
                return Err(Error::shape("surprisal", [tokens], [found]));
            }
        }
        Ok(())
    }

    pub(crate) fn spec(&self) -> &ModelSpec {
        // There is a first one: `new` has seen to it.
        &self.steps[0].cache.spec
    }

    /// New tokens of all sequences.
    pub(crate) fn tokens(&self) -> usize {
        self.steps.iter().map(|step| step.incoming).sum()
    }
}

impl<'a> SequenceStep<'a> {
    pub(super) fn new(
        cache: &'a mut SequenceCache,
        phase: Phase,
        incoming: usize,
        total: usize,
    ) -> Self {
        Self {
            needs: cache.needs,
            cache,
            phase,
            incoming,
            total,
            probe: None,
            table: None,
            pending: Vec::new(),
            failed: None,
        }
    }

    /// The same step, watched.
    #[must_use]
    pub fn watched(self, probe: &'a mut (dyn Probe + 'a)) -> Self {
        Self {
            probe: Some(probe),
            ..self
        }
    }

    /// Whether this sequence can go on, and what for.
    fn check(&mut self) -> Result<()> {
        self.cache.usable()?;
        self.total = self.total.max(self.cache.seen + self.incoming);
        self.cache.check_length(self.total)?;
        self.needs = match &self.probe {
            Some(probe) => self.cache.needs_with(&**probe)?,
            None => self.cache.needs,
        };
        Ok(())
    }

    /// Does a part of this sequence's work, unless it has failed before; keeps what goes wrong.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Option<T> {
        if self.failed.is_some() {
            return None;
        }
        // Whatever it has left behind is never looked at: the cache is in the middle of a pass.
        let done = catch_unwind(AssertUnwindSafe(|| work(self)));
        let done = done.unwrap_or_else(|panic| Err(Error::panicked(&*panic)));
        done.map_err(|failed| self.failed = Some(failed)).ok()
    }

    /// [`attend`](Self::attend); zeros from a sequence that has failed.
    fn attend_apart(&mut self, layer: usize, qkv: Qkv) -> Result<Rows> {
        let (tokens, width) = (qkv.q.rows(), qkv.q.width());
        match self.guarded(|step| step.attend(layer, qkv)) {
            Some(out) => Ok(out),
            None => {
                let compute = &self.cache.places[layer].compute;
                compute.rows(vec![0.0; tokens * width], width)
            }
        }
    }

    fn begin(&mut self) -> Result<()> {
        let (cache, incoming) = (&mut *self.cache, self.incoming);
        // Before the keys are turned: a failure there leaves layers that no longer agree.
        cache.midway = true;
        cache.set_length(self.total)?;
        if cache.positions == Positions::Original && incoming > 0 {
            self.table = Some(cache.rope.range(cache.seen..cache.seen + incoming));
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize, mut qkv: Qkv) -> Result<Rows> {
        let (needs, cache) = (self.needs, &mut *self.cache);
        let (spec, compute) = (cache.spec.layer(layer), cache.places[layer].compute.clone());
        let input = qkv.take_input().filter(|_| needs.input);
        let kept = needs.qkv.then(|| qkv.clone());
        let (Qkv { q, k, v, .. }, t) = (qkv, self.incoming);
        // Copied only if both are changed.
        let plain = needs.far.then(|| q.clone());
        // Keys that some queries see at one distance or elsewhere are never rotated where they lie.
        let turning = self.phase == Phase::Decode && !needs.far;
        let (q, k, rotation) = rotated(cache, layer, self.table.as_ref(), turning, q, k)?;
        let this = &mut cache.layers[layer];
        this.store.append(&k, &v)?;
        drop((k, v));
        this.lists.note_units(cache.seen, t);
        let visible = match needs.before {
            true => {
                this.lists.fetch()?;
                let at = Step::new(spec, self.phase, cache.seen, t, self.total);
                let units = LayerUnits {
                    layer: spec,
                    incoming: t,
                    lists: &this.lists,
                    notes: &this.notes,
                    store: &*this.store,
                    rope: &cache.rope,
                    next: (cache.positions == Positions::Original).then_some(cache.seen + t),
                    rotation: rotation.as_deref(),
                    scale: cache.spec.softmax_scale,
                    compute: &*compute,
                    qkv: kept.as_ref(),
                    input: input.as_ref(),
                    surprisal: None,
                    observed: None,
                    plain: plain.as_ref(),
                    places: None,
                    picked: None,
                };
                cache.policy.before(&at, &q, &units)?
            }
            false => Visible::All,
        };
        let far = match &visible {
            Visible::Chosen(views) => {
                let lens = this.lists.lens();
                let wrong = |found| Error::policy(cache.policy.name(), found);
                views.check(t, spec.heads, lens).map_err(wrong)?;
                if views.places().is_some() && !needs.far {
                    let found = "units seen elsewhere, and `Needs::far` did not ask for them";
                    return Err(wrong(found.into()));
                }
                let rows = rotation.as_ref().map(|table| table.len());
                views.check_places(rows).map_err(wrong)?;
                match (views.distance(), plain) {
                    (Some(distance), Some(plain)) => {
                        let (rope, head_dim) = (&cache.rope, spec.head_dim);
                        Some(rope.at_distance(plain, distance, head_dim, &*compute)?)
                    }
                    (Some(_), None) => {
                        return Err(wrong(
                            "far units, and `Needs::far` did not ask for them".into(),
                        ));
                    }
                    (None, _) => None,
                }
            }
            Visible::All => None,
        };
        let this = &mut cache.layers[layer];
        if this.store.tiered() {
            let lens = this.lists.lens();
            let seen = match &visible {
                Visible::All => lens
                    .iter()
                    .map(|len| std::iter::once(0..*len).collect())
                    .collect(),
                Visible::Chosen(views) => views.seen(t, lens),
            };
            this.store.bring(&seen)?;
        }
        let over = Attention {
            layer: spec,
            store: &*this.store,
            scale: cache.spec.softmax_scale,
            rotation: rotation.as_deref(),
            sight: match &visible {
                Visible::All => None,
                Visible::Chosen(views) => Some(Sight {
                    views,
                    far: far.as_ref(),
                }),
            },
        };
        let observed = match needs.observe {
            Some(what) => {
                let factors = match (what.what, &input) {
                    (Observation::MaxWeightsByInput, Some(input)) => {
                        Some(inverse_norms(input, what.queries.count(t))?)
                    }
                    _ => None,
                };
                Some(compute.observe(&q, &over, what, factors.as_deref())?)
            }
            None => None,
        };
        let out = compute.attend(q, &over)?;
        this.count();
        cache.note_peak(layer, self.phase);
        self.pending.push(Pending {
            qkv: kept,
            input,
            observed,
            seen: match visible {
                Visible::Chosen(views) => Some(views),
                Visible::All => None,
            },
        });
        if !needs.later() {
            self.decide(layer, None)?;
        }
        Ok(out)
    }

    /// Asks for the verdicts on the layers that are pending, from `first` on, and carries them out.
    fn decide(&mut self, first: usize, surprisal: Option<&[f32]>) -> Result<()> {
        let (pending, cache) = (std::mem::take(&mut self.pending), &mut *self.cache);
        let layers = first..first + pending.len();
        let tables: Vec<_> = layers
            .clone()
            .map(|layer| {
                let this = &cache.layers[layer];
                let (wanted, longest) = (!this.rotated, this.longest());
                let compact = cache.positions == Positions::Compact;
                (compact && wanted).then(|| cache.rope.contiguous(longest))
            })
            .collect();
        let (seen, incoming) = (cache.seen, self.incoming);
        let at = |layer| {
            Step::new(
                cache.spec.layer(layer),
                self.phase,
                seen,
                incoming,
                self.total,
            )
        };
        let steps: Vec<Step> = layers.clone().map(at).collect();
        let shown = steps.iter().zip(&pending).zip(&tables);
        let units: Vec<LayerUnits<'_>> = shown
            .map(|((step, pending), table)| {
                let this = &cache.layers[step.layer.index];
                LayerUnits {
                    layer: step.layer,
                    incoming,
                    lists: &this.lists,
                    notes: &this.notes,
                    store: &*this.store,
                    rope: &cache.rope,
                    next: (cache.positions == Positions::Original).then_some(seen + incoming),
                    rotation: table.as_deref(),
                    scale: cache.spec.softmax_scale,
                    compute: &*cache.places[step.layer.index].compute,
                    qkv: pending.qkv.as_ref(),
                    input: pending.input.as_ref(),
                    surprisal,
                    observed: pending.observed.as_ref(),
                    plain: None,
                    places: pending.seen.as_ref().and_then(Views::places),
                    picked: None,
                }
            })
            .collect();
        let begun = Instant::now();
        let watched = self.probe.as_ref().is_some_and(|probe| probe.decides());
        if let (false, false, [step], [units]) =
            (self.needs.later(), watched, &steps[..], &units[..])
        {
            let listed = units.lists.ranked(incoming)
                && units.compute.unit_lists(units.kv_heads()).is_some();
            let ranking = match listed {
                true => cache.policy.ranking(step, units)?,
                false => None,
            };
            if let Some(ranking) = ranking {
                check_ranking(&ranking, units)
                    .map_err(|found| Error::policy(cache.policy.name(), found))?;
                cache.apply_ranking(first, &ranking)?;
                cache.note_peak(first, self.phase);
                return Ok(());
            }
        }
        for layer in layers.clone() {
            cache.layers[layer].lists.fetch()?;
        }
        let verdicts = match (self.needs.later(), &steps[..], &units[..]) {
            (false, [step], [units]) => vec![cache.policy.step(step, units)?],
            _ => cache.policy.steps(&steps, &units)?,
        };
        let took = begun.elapsed() / verdicts.len().max(1) as u32;
        if verdicts.len() != steps.len() {
            let found = format!("{} verdicts on {} layers", verdicts.len(), steps.len());
            return Err(Error::policy(cache.policy.name(), found));
        }
        if let Some(probe) = &mut self.probe {
            for ((step, units), verdict) in steps.iter().zip(&units).zip(&verdicts) {
                probe.decided(&Decided {
                    step,
                    units,
                    verdict,
                    took,
                })?;
            }
        }
        drop(units);
        drop(pending);
        for (layer, verdict) in layers.zip(verdicts) {
            cache.apply(layer, verdict)?;
            // Codes have a reserve, too: what a store settles into may be more than it was.
            cache.note_peak(layer, self.phase);
        }
        Ok(())
    }

    fn finish(&mut self, surprisal: Option<&[f32]>) -> Result<()> {
        let layers = self.cache.layers.len();
        let turning = self.phase == Phase::Turn;
        if self.needs.later() {
            if turning {
                self.pending.resize_with(layers, Pending::default);
            }
            self.decide(0, surprisal.filter(|_| self.needs.surprisal && !turning))?;
        } else if turning {
            for layer in 0..layers {
                self.pending.push(Pending::default());
                self.decide(layer, None)?;
            }
        }
        Ok(())
    }
}

/// What is wrong with a ranking of these units.
fn check_ranking(ranking: &Ranking, units: &LayerUnits<'_>) -> std::result::Result<(), String> {
    let (found, due) = (ranking.born.shape(), [units.incoming(), units.kv_heads()]);
    if found != due {
        return Err(format!("scores of new units {found:?}, {due:?} are due"));
    }
    let Some(best) = &ranking.best else {
        return Ok(());
    };
    if best.len() != units.kv_heads() {
        let found = best.len();
        return Err(format!(
            "budgets for {found} KV heads of {}",
            units.kv_heads()
        ));
    }
    for (head, best) in best.iter().enumerate() {
        let len = units.len(head);
        if best.keep > len || best.first.saturating_add(best.newest) > best.keep {
            return Err(format!("{best:?} of {len} units of KV head {head}"));
        }
    }
    Ok(())
}

/// One over the length of each of the last `count` rows; of a row of zeros, 0.
fn inverse_norms(rows: &Rows, count: usize) -> Result<Vec<f32>> {
    let values = rows.values()?;
    let first = (rows.rows() - count) * rows.width();
    let inverse = |row: &[f32]| {
        let square: f32 = row.iter().map(|x| x * x).sum();
        if square == 0.0 {
            0.0
        } else {
            1.0 / square.sqrt()
        }
    };
    Ok(values[first..]
        .chunks_exact(rows.width())
        .map(inverse)
        .collect())
}

/// Queries and new keys of a layer, rotated where they stand; and, in compact positions, the table that
/// the stored keys are still to be rotated by when they are read. `turning` says whether they are rotated where
/// they lie, once.
fn rotated(
    cache: &mut SequenceCache,
    layer: usize,
    original: Option<&RopeTable>,
    turning: bool,
    q: Rows,
    k: Rows,
) -> Result<(Rows, Rows, Option<Arc<RopeTable>>)> {
    let (head_dim, compute) = (cache.spec.head_dim, cache.places[layer].compute.clone());
    let by = |table, first| Rotation {
        table,
        head_dim,
        rows: TableRows::From(first),
        inverse: false,
    };
    if let Some(table) = original {
        let by = by(table, &[0]);
        return Ok((compute.rotate(q, &by)?, compute.rotate(k, &by)?, None));
    }
    let this = &mut cache.layers[layer];
    let lens = this.lists.lens().to_vec();
    let table = cache.rope.contiguous(this.longest() + k.rows());
    // While single tokens come nothing moves, so that keys are rotated once and for all; chunks are
    // followed by evictions, after which every key stands elsewhere.
    if this.rotated != turning {
        let turn = Rotation::contiguous(&table, head_dim);
        let turn = if turning { turn } else { turn.undone() };
        this.turn(&*compute, &turn)?;
    }
    let by = by(&table, &lens);
    let q = compute.rotate(q, &by)?;
    match this.rotated {
        true => Ok((q, compute.rotate(k, &by)?, None)),
        false => Ok((q, k, Some(table))),
    }
}

/// Puts `ids`, the new tokens of all steps of a pass, through a model, with what computes for it at its
/// best. Returns hidden states `[tokens, hidden]`; the pass is not finished yet.
///
/// # Errors
/// [`Error::Setting`] for a pass over another model's caches, [`Error::Shape`] for another number of ids
/// or hidden states than the pass has tokens; the model's.
pub fn forward(model: &dyn CausalLm, ids: &[u32], pass: &mut Pass<'_>) -> Result<Rows> {
    let (spec, tokens) = (model.spec(), pass.tokens());
    if pass.spec() != spec {
        return Err(Error::setting(
            "a pass",
            "caches of this model",
            "another one's",
        ));
    }
    if ids.len() != tokens {
        return Err(Error::shape("ids", [tokens], [ids.len()]));
    }
    let mut hidden = None;
    model
        .compute()
        .during(&mut || hidden = Some(model.hidden(ids, pass)));
    let hidden = hidden.ok_or_else(|| Error::Model("nothing was computed".into()))??;
    hidden.expect("hidden states", [tokens, spec.hidden])?;
    Ok(hidden)
}
