//! The cache of one sequence: it owns keys, values, positions and scores, and carries out what the
//! policy says.

use super::{
    lists::{Lists, give_back},
    pass::{Pass, SequenceStep},
    probe::Probe,
    rope::Rope,
};
use crate::{
    Compute, DType, Error, Keep, Kernels, KvCachePolicy, KvStore, ModelSpec, Needs, Phase,
    Placement, Positions, Ranking, Result, Rotation, Scores, TableRows, Verdict,
    contract::HeadMeta, layer_compute, stores,
};
use std::sync::Arc;

/// How a cache keeps its units and computes.
///
/// ```
/// use locret_core::{CacheOptions, DType};
///
/// let half = CacheOptions::new().dtype(DType::F16);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
#[must_use]
pub struct CacheOptions {
    /// The type of dense keys and values: 32 or 16 bits.
    pub dtype: DType,
    /// Which implementation computes attention: the model's, or Burn's operations.
    pub kernels: Kernels,
}

impl CacheOptions {
    /// Dense units of 32 bits, and what the model computes with.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses the type of dense keys and values.
    pub fn dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// Chooses the implementation.
    pub fn kernels(self, kernels: Kernels) -> Self {
        Self { kernels, ..self }
    }

    /// Where a model that `compute` computes keeps the units of its layers.
    ///
    /// # Errors
    /// [`Error::Setting`] for a map of another number of layers.
    pub(super) fn places(
        self,
        compute: &Arc<dyn Compute>,
        layers: usize,
    ) -> Result<Vec<Placement>> {
        if let Some(map) = compute.map() {
            map.check(layers)?;
        }
        let of_layer = |index| {
            let compute = layer_compute(compute, index);
            Placement {
                compute: match self.kernels {
                    Kernels::Auto => compute.clone(),
                    kernels => kernels.on(compute.device()),
                },
                dtype: self.dtype,
            }
        };
        Ok((0..layers).map(of_layer).collect())
    }
}

/// The bounded key-value cache of one sequence.
///
/// A model computes on it through a [`Pass`]. Everything is done by [`Session`](crate::Session), or by
/// whoever drives a model by hand with [`step`](Self::step) and [`forward`](crate::forward).
#[derive(Debug)]
pub struct SequenceCache {
    pub(super) spec: ModelSpec,
    pub(super) policy: Arc<dyn KvCachePolicy>,
    /// By layer.
    pub(super) places: Vec<Placement>,
    options: CacheOptions,
    pub(super) needs: Needs,
    pub(super) positions: Positions,
    pub(super) rope: Rope,
    pub(super) layers: Vec<LayerCache>,
    pub(super) seen: usize,
    /// A pass was begun and not finished: the layers may not agree.
    pub(super) midway: bool,
    pub(super) peak: Peak,
    pub(super) prefill_peak: Peak,
    /// What the scores are called that the units have, if they have any of a known kind.
    pub(super) scored_by: Option<String>,
    /// Another policy than this one has decided before.
    pub(super) passed_on: bool,
}

/// One layer's part.
#[derive(Debug)]
pub(super) struct LayerCache {
    pub(super) store: Box<dyn KvStore>,
    pub(super) lists: Lists,
    /// What the policy noted of the layer as a whole.
    pub(super) notes: Vec<f32>,
    /// Compact positions only: the stored keys are rotated at `0..n`.
    pub(super) rotated: bool,
    /// Units of all heads and bytes of the store when they were last counted.
    pub(super) units: usize,
    pub(super) bytes: usize,
}

/// The most that a cache held at any moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Peak {
    /// Units in one head of one layer.
    pub units_per_head: usize,
    /// Units over all heads and layers.
    pub units: usize,
    /// Bytes of keys and values over all layers.
    pub bytes: usize,
}

impl Peak {
    pub(super) fn note(&mut self, now: &Self) {
        self.units_per_head = self.units_per_head.max(now.units_per_head);
        self.units = self.units.max(now.units);
        self.bytes = self.bytes.max(now.bytes);
    }
}

impl SequenceCache {
    /// An empty cache for a model of shape `spec` that `compute` computes.
    ///
    /// # Errors
    /// [`Error::Setting`] for an impossible spec, [`Error::NotSupported`] for a policy that needs what
    /// the model's adapter does not hand along, and whatever the policy's store says.
    pub fn new(
        spec: &ModelSpec,
        policy: Arc<dyn KvCachePolicy>,
        compute: &Arc<dyn Compute>,
        options: CacheOptions,
    ) -> Result<Self> {
        spec.validate()?;
        let needs = needs(spec, &*policy, Needs::NOTHING)?;
        let places = options.places(compute, spec.layers)?;
        let layers = (0..spec.layers)
            .map(|index| {
                let store = policy.store(&spec.layer(index), &places[index])?;
                Ok(LayerCache {
                    bytes: store.bytes(),
                    store,
                    lists: Lists::new(spec.kv_heads),
                    notes: Vec::new(),
                    rotated: false,
                    units: 0,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            rope: Rope::new(&spec.rope),
            spec: spec.clone(),
            needs,
            positions: policy.positions(),
            policy,
            places,
            options,
            layers,
            seen: 0,
            midway: false,
            peak: Peak::default(),
            prefill_peak: Peak::default(),
            scored_by: None,
            passed_on: false,
        })
    }

    /// A second cache with the same content, from which both go on independently.
    ///
    /// # Errors
    /// [`Error::Unusable`] after a pass that was not finished.
    pub fn fork(&self) -> Result<Self> {
        self.usable()?;
        Ok(Self {
            spec: self.spec.clone(),
            policy: self.policy.clone(),
            places: self.places.clone(),
            options: self.options,
            needs: self.needs,
            positions: self.positions,
            rope: self.rope.clone(),
            layers: self
                .layers
                .iter()
                .map(|layer| LayerCache {
                    store: layer.store.fork(),
                    lists: layer.lists.fork(),
                    notes: layer.notes.clone(),
                    rotated: layer.rotated,
                    units: layer.units,
                    bytes: layer.bytes,
                })
                .collect(),
            seen: self.seen,
            midway: false,
            peak: self.peak,
            prefill_peak: self.prefill_peak,
            scored_by: self.scored_by.clone(),
            passed_on: self.passed_on,
        })
    }

    /// Whether all layers agree.
    pub(crate) fn usable(&self) -> Result<()> {
        match self.midway {
            true => Err(Error::Unusable),
            false => Ok(()),
        }
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// How units are kept.
    pub fn options(&self) -> CacheOptions {
        self.options
    }

    /// The policy.
    pub fn policy(&self) -> &Arc<dyn KvCachePolicy> {
        &self.policy
    }

    /// From here on another policy decides; units and their scores stay as they are, in the store
    /// that the first policy chose.
    ///
    /// This is how a text is read once and then continued under several policies: fork, and give
    /// each fork its own.
    ///
    /// # Errors
    /// [`Error::Unusable`] after a pass that was not finished; [`Error::NotSupported`] as
    /// [`new`](Self::new); [`Error::Setting`] if the policy wants other
    /// positions than those that the cache was read with, or needs scores
    /// ([`KvCachePolicy::carries`]) that the units don't have: what is made as a unit is born cannot
    /// be made up for once a text is read. The cache is then as it was.
    pub fn set_policy(&mut self, policy: Arc<dyn KvCachePolicy>) -> Result<()> {
        self.usable()?;
        if policy.positions() != self.positions {
            return Err(Error::setting(
                "positions of a policy",
                format!("{:?}, as the cache was read", self.positions),
                format!("{:?}", policy.positions()),
            ));
        }
        if let Some(kind) = policy.carries()
            && self.units() > 0
            && (self.scored_by.as_ref() != Some(&kind) || !self.scored_for(&*policy))
        {
            return Err(Error::setting(
                "policy of a cache that holds units",
                match &self.scored_by {
                    Some(own) => format!("one that carries no scores, or those of {own}"),
                    None => "one that carries no scores, as the units have none".into(),
                },
                format!("{} with scores of {kind}", policy.name()),
            ));
        }
        self.needs = needs(&self.spec, &*policy, Needs::NOTHING)?;
        // Another method's notes would be read as its own; it begins anew.
        let same = policy.name() == self.policy.name();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            if !same || layer.notes.len() != policy.noted(&self.spec.layer(index)) {
                layer.notes = Vec::new();
            }
        }
        self.policy = policy;
        self.passed_on |= !self.is_empty();
        Ok(())
    }

    /// Whether all units that carry anything carry as much as this policy says.
    pub(super) fn scored_for(&self, policy: &dyn KvCachePolicy) -> bool {
        self.layers.iter().enumerate().all(|(index, layer)| {
            let width = policy.carried_width(&self.spec.layer(index));
            layer.lists.lens().iter().enumerate().all(|(head, len)| {
                let carried = layer.lists.carried(head);
                carried == 0 || len.checked_mul(width) == Some(carried)
            })
        })
    }

    /// Tokens that the sequence has, evicted ones included.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Units that a KV head of a layer holds.
    ///
    /// # Panics
    /// Here and below, for a layer or a head that the model does not have.
    pub fn len(&self, layer: usize, head: usize) -> usize {
        self.layers[layer].lists.len(head)
    }

    /// Whether no token has been read.
    pub fn is_empty(&self) -> bool {
        self.seen == 0
    }

    /// Original positions of the units that a KV head of a layer holds, ascending.
    ///
    /// # Panics
    /// Here and in [`scores`](Self::scores), if they lie on a device that fails: [`fetch`](Self::fetch) says so.
    pub fn positions(&self, layer: usize, head: usize) -> &[u32] {
        &self.layers[layer].lists.heads()[head].positions
    }

    /// Scores that are carried with the units of a KV head of a layer, as many for each as the policy says
    /// ([`KvCachePolicy::carried_width`]), unit by unit; empty if there are none.
    pub fn scores(&self, layer: usize, head: usize) -> &[f32] {
        &self.layers[layer].lists.heads()[head].scores
    }

    /// Brings all positions and scores to host memory that lie on a device: a policy whose units are chosen there
    /// ([`KvCachePolicy::ranking`]) leaves them where they are. They are brought when they are asked for anyway; this
    /// says what goes wrong.
    ///
    /// # Errors
    /// [`Error::Device`]; [`Error::NotFinite`] for a score that is NaN.
    pub fn fetch(&self) -> Result<()> {
        for layer in &self.layers {
            layer.lists.fetch()?;
        }
        Ok(())
    }

    /// What computes the units of a layer.
    pub fn compute(&self, layer: usize) -> &Arc<dyn Compute> {
        &self.places[layer].compute
    }

    /// The store of a layer.
    pub fn store(&self, layer: usize) -> &dyn KvStore {
        &*self.layers[layer].store
    }

    /// Bytes of keys and values now, of those that are resident where a store has a second tier
    /// ([`Spilled`](crate::Spilled)).
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| l.bytes).sum()
    }

    /// Bytes of all keys and values now, those that are put away among them.
    pub fn total_bytes(&self) -> usize {
        self.layers.iter().map(|l| l.store.total_bytes()).sum()
    }

    /// What the policy has noted of a layer as a whole ([`KvCachePolicy::noted`]).
    pub fn notes(&self, layer: usize) -> &[f32] {
        &self.layers[layer].notes
    }

    /// Bytes of positions, scores and notes now, wherever they lie.
    pub fn metadata_bytes(&self) -> usize {
        let of_layer = |layer: &LayerCache| layer.lists.bytes() + 4 * layer.notes.capacity();
        self.layers.iter().map(of_layer).sum()
    }

    /// Units over all heads and layers now.
    pub fn units(&self) -> usize {
        self.layers.iter().flat_map(|l| l.lists.lens()).sum()
    }

    /// The most that was held at any moment so far.
    pub fn peak(&self) -> Peak {
        self.peak
    }

    /// The most that was held at any moment while prompts were read.
    pub fn prefill_peak(&self) -> Peak {
        self.prefill_peak
    }

    /// One step of this sequence, for a [`Pass`]: `tokens` new ones, in a sequence that will have
    /// `total` tokens at the end of what is being read.
    pub fn step(&mut self, phase: Phase, tokens: usize, total: usize) -> SequenceStep<'_> {
        SequenceStep::new(self, phase, tokens, total)
    }

    /// Asks the policy, without any new token, to bring the cache back to what it keeps at the
    /// beginning of a further prompt, after which the sequence will have `total` tokens.
    ///
    /// # Errors
    /// The policy's, and [`Error::Unusable`].
    pub fn turn(&mut self, total: usize) -> Result<()> {
        Pass::new([self.step(Phase::Turn, 0, total)])?.finish(None)
    }

    /// What the policy and a probe need of a step.
    pub(super) fn needs_with(&self, probe: &dyn Probe) -> Result<Needs> {
        let (all, own) = (needs(&self.spec, &*self.policy, probe.needs())?, self.needs);
        match (all.surprisal, all.all_layers) == (own.surprisal, own.all_layers) {
            true => Ok(all),
            false => Err(Error::setting(
                "needs of a probe",
                "surprisal, or verdicts on all layers at once, only if the policy needs them",
                format!("{all:?}"),
            )),
        }
    }

    /// The pass is over, and all layers agree.
    pub(super) fn end(&mut self, incoming: usize) {
        self.seen += incoming;
        let scored = self.layers.iter().any(LayerCache::scored);
        self.scored_by = self.policy.carries().filter(|_| scored);
        self.midway = false;
    }

    /// Carries out a verdict on one layer.
    pub(super) fn apply(&mut self, layer: usize, verdict: Verdict) -> Result<()> {
        let Verdict {
            keep,
            scores,
            notes,
            away,
        } = verdict;
        let everything = matches!(keep, Keep::All);
        let (kept, folds, keys) = match keep {
            Keep::All => (None, Vec::new(), false),
            Keep::Slots(kept) => (Some(kept), Vec::new(), false),
            Keep::Merged { kept, folds, keys } => (Some(kept), folds, keys),
        };
        let this = &mut self.layers[layer];
        let policy = &self.policy;
        let broken = |message| Error::policy(policy.name(), message);
        let width = policy.carried_width(&self.spec.layer(layer));
        this.set_scores(scores, width)?.map_err(broken)?;
        if let Some(mut notes) = notes {
            let (found, due) = (notes.len(), policy.noted(&self.spec.layer(layer)));
            if found != due {
                let found = format!("{found} numbers noted of a layer, {due} are due");
                return Err(broken(found));
            }
            give_back(&mut notes);
            this.notes = notes;
        }
        let heads = this.lists.kv_heads();
        if !folds.is_empty() && folds.len() != heads {
            let found = format!("folds for {} KV heads of {heads}", folds.len());
            return Err(broken(found));
        }
        if keys && folds.iter().any(|folds| !folds.is_empty()) {
            let head_dim = self.spec.head_dim;
            let compute = &*self.places[layer].compute;
            this.unturn(&mut self.rope, head_dim, compute)?;
        }
        for (head, folds) in folds.iter().enumerate().filter(|(_, f)| !f.is_empty()) {
            if keys {
                this.store.fold_keys(head, folds)?;
            }
            this.store.fold_values(head, folds)?;
        }
        if let Some(kept) = kept {
            let kept = kept.heads();
            stores::check_retain(kept, this.lists.lens().iter().copied())
                .map_err(|e| broken(e.to_string()))?;
            let head_dim = self.spec.head_dim;
            let compute = &*self.places[layer].compute;
            this.retain(kept, &mut self.rope, head_dim, compute)?;
        }
        this.store.settle()?;
        if !away.is_empty() {
            if !everything {
                return Err(broken("units are put away while others are dropped".into()));
            }
            stores::check_away(&away, this.lists.lens()).map_err(broken)?;
            this.store.put_away(&away)?;
        }
        this.count();
        Ok(())
    }

    /// Carries out on one layer what is said without a look at its scores.
    pub(super) fn apply_ranking(&mut self, layer: usize, ranking: &Ranking) -> Result<()> {
        let this = &mut self.layers[layer];
        let compute = &*self.places[layer].compute;
        this.lists.born(&ranking.born, compute)?;
        let best = ranking.best.as_deref().filter(|best| {
            let mut heads = best.iter().zip(this.lists.lens());
            heads.any(|(best, len)| best.keep < *len)
        });
        if let Some(best) = best {
            this.unturn(&mut self.rope, self.spec.head_dim, compute)?;
            match this.lists.keep(best)? {
                Some(kept) => this.store.retain_listed(&kept)?,
                None => {
                    let found = "scores for some of the units, by which all are chosen";
                    return Err(Error::policy(self.policy.name(), found));
                }
            }
        }
        this.store.settle()?;
        this.count();
        Ok(())
    }

    pub(super) fn note_peak(&mut self, layer: usize, phase: Phase) {
        let now = Peak {
            units_per_head: self.layers[layer].longest(),
            units: self.layers.iter().map(|layer| layer.units).sum(),
            bytes: self.bytes(),
        };
        self.peak.note(&now);
        if let Phase::Prefill { .. } | Phase::Tail = phase {
            self.prefill_peak.note(&now);
        }
    }

    /// Whether a sequence of `total` tokens needs the kept keys rotated with other factors than now, and
    /// the stores can do that.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if they cannot.
    pub(super) fn check_length(&self, total: usize) -> Result<()> {
        if let Some(window) = self.spec.attention_window.filter(|window| total > *window) {
            return Err(Error::setting(
                "length of a sequence",
                format!(
                    "at most {window} tokens, the sliding_window of this model's attention (a cache \
                     that evicts by a policy does not imitate it)"
                ),
                total,
            ));
        }
        if self.seen == 0 || self.positions != Positions::Original || !self.rope.changes(total) {
            return Ok(());
        }
        match self.layers.iter().find(|layer| !layer.store.turns_keys()) {
            None => Ok(()),
            Some(layer) => Err(Error::NotSupported {
                operation: "a sequence that outgrows the original context of LongRoPE in a later \
                            prompt (announce its length, or always use the long factors)",
                implementer: layer.store.name(),
            }),
        }
    }

    /// LongRoPE: chooses the factors for a sequence of `total` tokens, and turns the keys that
    /// are already rotated with the other ones.
    pub(super) fn set_length(&mut self, total: usize) -> Result<()> {
        let before = self.rope.clone();
        if !self.rope.set_length(total) || self.seen == 0 {
            return Ok(());
        }
        let head_dim = self.spec.head_dim;
        let (old, new) = match self.positions {
            Positions::Original => (before.range(0..self.seen), self.rope.range(0..self.seen)),
            Positions::Compact => {
                // Rotated at compact positions: back to un-rotated, with the old factors.
                let layers = self.layers.iter_mut().zip(&self.places);
                for (layer, place) in layers.filter(|(layer, _)| layer.rotated) {
                    let table = before.range(0..layer.longest());
                    let turn = Rotation::contiguous(&table, head_dim).undone();
                    layer.turn(&*place.compute, &turn)?;
                }
                return Ok(());
            }
        };
        for (layer, place) in self.layers.iter_mut().zip(&self.places) {
            let (heads, compute) = (layer.lists.fetch()?, &place.compute);
            layer.store.turn_keys(&|head, keys| {
                let by = |table| Rotation {
                    table,
                    head_dim,
                    rows: TableRows::Each(&heads[head].positions),
                    inverse: false,
                };
                let keys = compute.rotate(keys, &by(&old).undone())?;
                compute.rotate(keys, &by(&new))
            })?;
        }
        Ok(())
    }
}

/// What computes layers, by name: once if it is the same for all of them.
pub(super) fn computed_by(places: &[Placement]) -> String {
    let name = |place: &Placement| place.compute.name();
    let runs = places.chunk_by(|a, b| name(a) == name(b));
    let runs: Vec<(usize, &str)> = runs.map(|run| (run.len(), name(&run[0]))).collect();
    match &runs[..] {
        [(_, only)] => (*only).into(),
        runs => {
            let run = |(layers, name): &(usize, &str)| format!("{layers} by {name}");
            runs.iter().map(run).collect::<Vec<_>>().join(", ")
        }
    }
}

/// What the engine has to compute for a policy and a probe, if the model's adapter can give it.
pub(super) fn needs(spec: &ModelSpec, policy: &dyn KvCachePolicy, probe: Needs) -> Result<Needs> {
    let needs = policy.needs().and(probe)?;
    if needs.input && !spec.layer_input {
        return Err(Error::NotSupported {
            operation: "handing along the input of layers (`ModelSpec::layer_input`)",
            implementer: format!("the model's adapter, and {} needs it,", policy.name()),
        });
    }
    if needs.far && policy.positions() != Positions::Compact {
        return Err(Error::setting(
            "positions of a policy that has units seen elsewhere than where they stood",
            format!("{:?}", Positions::Compact),
            format!("{:?}", policy.positions()),
        ));
    }
    Ok(needs)
}

impl LayerCache {
    /// The most units that a head holds.
    pub(super) fn longest(&self) -> usize {
        self.lists.longest()
    }

    /// Whether any unit carries anything.
    fn scored(&self) -> bool {
        (0..self.lists.kv_heads()).any(|head| self.lists.carried(head) > 0)
    }

    /// Scores of all heads' units, or of none.
    fn set_scores(
        &mut self,
        scores: Option<Scores>,
        width: usize,
    ) -> Result<std::result::Result<(), String>> {
        Ok(set_scores(self.lists.heads_mut()?, scores, width))
    }

    /// Drops all units but those that are listed for each head.
    fn retain(
        &mut self,
        kept: &[Vec<u32>],
        rope: &mut Rope,
        head_dim: usize,
        compute: &dyn Compute,
    ) -> Result<()> {
        let mut heads = kept.iter().zip(self.lists.lens());
        if heads.all(|(kept, len)| kept.len() == *len) {
            return Ok(());
        }
        self.unturn(rope, head_dim, compute)?;
        self.store.retain(kept)?;
        self.lists.retain(kept)
    }

    /// To be called before units go, since what is kept will stand elsewhere.
    fn unturn(&mut self, rope: &mut Rope, head_dim: usize, compute: &dyn Compute) -> Result<()> {
        if !self.rotated {
            return Ok(());
        }
        let table = rope.contiguous(self.longest());
        let turn = Rotation::contiguous(&table, head_dim);
        self.turn(compute, &turn.undone())
    }

    /// Rotates the stored keys at compact positions, or back. Leaves them alone where the store
    /// would lose precision.
    pub(super) fn turn(&mut self, compute: &dyn Compute, by: &Rotation<'_>) -> Result<()> {
        if self.store.turns_keys() {
            self.store.turn_keys(&|_, keys| compute.rotate(keys, by))?;
            self.rotated = !by.inverse;
        }
        Ok(())
    }
}

/// Scores of all heads' units, or of none; what is wrong with them.
fn set_scores(heads: &mut [HeadMeta], scores: Option<Scores>, width: usize) -> Result<(), String> {
    if let Some(found) = scores.as_ref().map(Scores::width).filter(|w| *w != width) {
        return Err(format!("{found} numbers for a unit, {width} are due"));
    }
    let first = scores.as_ref().map_or(0, Scores::first);
    let scores = scores.map_or_else(|| vec![Vec::new(); heads.len()], Scores::into_inner);
    if scores.len() != heads.len() {
        return Err(format!(
            "scores for {} KV heads of {}",
            scores.len(),
            heads.len()
        ));
    }
    for (head, mut scores) in heads.iter_mut().zip(scores) {
        if first > 0 {
            let old = first.saturating_mul(width);
            if head.scores.len() < old {
                let found = head.scores.len() / width.max(1);
                return Err(format!(
                    "scores after {first} units, of which {found} have any"
                ));
            }
            head.scores.truncate(old);
            if head.scores.capacity() - old < scores.len() {
                // As for positions: exactly these, or a few more of single tokens.
                let reserve = scores.len().max(stores::RESERVE * width);
                head.scores.reserve_exact(reserve);
            }
            head.scores.extend_from_slice(&scores);
        } else {
            give_back(&mut scores);
            head.scores = scores;
        }
        let (found, units) = (head.scores.len(), head.positions.len());
        if found != 0 && found != units * width {
            return Err(format!("{} scores for {units} units", found / width.max(1)));
        }
    }
    Ok(())
}

impl LayerCache {
    /// To be called when units came or went.
    pub(super) fn count(&mut self) {
        self.units = self.lists.lens().iter().sum();
        self.bytes = self.store.bytes();
    }
}
