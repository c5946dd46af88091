//! The cache of one sequence: it owns keys, values, positions and scores, and carries out what the
//! policy says.

use crate::{
    Error, ModelSpec, Result,
    attention::{Attention, rotate_grouped, rotate_rows, unrotate_rows},
    host,
    kernels::rope::RopeTable,
    policy::{Keep, KvCachePolicy, Needs, Phase, Positions, Step, Verdict},
    rope::Rope,
    store::{KvDtype, KvStore, Placement},
    units::{HeadMeta, KeptInput, KeptQkv, LayerInput, LayerUnits, Observed, Qkv},
};
use burn::tensor::{Device, Int, Tensor, TensorData};
use std::sync::Arc;

/// How a cache keeps its units and computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheOptions {
    /// The type of dense keys and values.
    pub dtype: KvDtype,
    /// Which implementation computes attention.
    pub kernels: Kernels,
}

/// Which implementation computes attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// The CPU kernels where the device's tensors lie in host memory, Burn operations elsewhere.
    #[default]
    Auto,
    /// Burn operations everywhere.
    Operations,
}

/// The bounded key-value cache of one sequence.
///
/// A model adapter calls [`attend`](Self::attend) once for each layer, in order. Everything else is
/// done by [`Session`](crate::Session), or by whoever drives a model by hand with
/// [`begin`](Self::begin) and [`finish`](Self::finish).
#[derive(Debug)]
pub struct SequenceCache {
    spec: ModelSpec,
    policy: Arc<dyn KvCachePolicy>,
    place: Placement,
    needs: Needs,
    positions: Positions,
    rope: Rope,
    layers: Vec<LayerCache>,
    seen: usize,
    current: Option<Current>,
    peak: Peak,
    /// What the scores are called that the units have, if they have any of a known kind.
    scored_by: Option<String>,
    /// Scores of units as they were born, `[layer][head][token]`, where they are recorded.
    births: Option<Vec<Vec<Vec<f32>>>>,
}

/// One layer's part.
#[derive(Debug)]
struct LayerCache {
    store: Box<dyn KvStore>,
    heads: Vec<HeadMeta>,
    /// Compact positions only: the stored keys are rotated at `0..n`.
    rotated: bool,
    pending: Option<Pending>,
    bytes: usize,
}

/// What a policy asked for, kept until its verdict is due.
#[derive(Debug)]
struct Pending {
    qkv: Option<KeptQkv>,
    /// Where the verdict comes after the step: until then the adapter goes on with its own.
    input: Option<KeptInput>,
    observed: Option<Observed>,
}

/// The step that is under way.
#[derive(Debug)]
struct Current {
    phase: Phase,
    incoming: usize,
    total: usize,
    next: usize,
    /// Original positions only: row `i` is new token `i`.
    table: Option<RopeTable>,
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

impl SequenceCache {
    /// An empty cache for a model of shape `spec` on `device`.
    ///
    /// # Errors
    /// [`Error::Setting`] for an impossible spec, and whatever the policy's store says.
    pub fn new(
        spec: &ModelSpec,
        policy: Arc<dyn KvCachePolicy>,
        device: &Device,
        options: CacheOptions,
    ) -> Result<Self> {
        spec.validate()?;
        let place = Placement {
            device: device.clone(),
            dtype: options.dtype,
            host: options.kernels == Kernels::Auto && host::is_host_device(device),
        };
        let layers = (0..spec.layers)
            .map(|index| {
                let store = policy.store(&spec.layer(index), &place)?;
                Ok(LayerCache {
                    bytes: store.bytes(),
                    store,
                    heads: vec![HeadMeta::default(); spec.kv_heads],
                    rotated: false,
                    pending: None,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            rope: Rope::new(&spec.rope),
            spec: spec.clone(),
            needs: policy.needs(),
            positions: policy.positions(),
            policy,
            place,
            layers,
            seen: 0,
            current: None,
            peak: Peak::default(),
            scored_by: None,
            births: None,
        })
    }

    /// A second cache with the same content, from which both go on independently.
    ///
    /// # Errors
    /// [`Error::Unusable`] in the middle of a step.
    pub fn fork(&self) -> Result<Self> {
        self.ready()?;
        Ok(Self {
            spec: self.spec.clone(),
            policy: self.policy.clone(),
            place: self.place.clone(),
            needs: self.needs,
            positions: self.positions,
            rope: self.rope.clone(),
            layers: self
                .layers
                .iter()
                .map(|layer| LayerCache {
                    store: layer.store.fork(),
                    heads: layer.heads.clone(),
                    rotated: layer.rotated,
                    pending: None,
                    bytes: layer.bytes,
                })
                .collect(),
            seen: self.seen,
            current: None,
            peak: self.peak,
            scored_by: self.scored_by.clone(),
            births: self.births.clone(),
        })
    }

    /// Whether a step can begin.
    pub(crate) fn ready(&self) -> Result<()> {
        match self.current {
            Some(_) => Err(Error::Unusable),
            None => Ok(()),
        }
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
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
    /// [`Error::Unusable`] in the middle of a step; [`Error::Setting`] if the policy wants other
    /// positions than those that the cache was read with, or needs scores
    /// ([`KvCachePolicy::carries`]) that the units don't have: what is made as a unit is born cannot
    /// be made up for once a text is read. The cache is then as it was.
    pub fn set_policy(&mut self, policy: Arc<dyn KvCachePolicy>) -> Result<()> {
        self.ready()?;
        if policy.positions() != self.positions {
            return Err(Error::setting(
                "positions of a policy",
                format!("{:?}, as the cache was read", self.positions),
                format!("{:?}", policy.positions()),
            ));
        }
        if let Some(kind) = policy.carries()
            && self.units() > 0
            && self.scored_by.as_ref() != Some(&kind)
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
        self.needs = policy.needs();
        self.policy = policy;
        Ok(())
    }

    /// Tokens that the sequence has, evicted ones included.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Units that a KV head of a layer holds.
    pub fn len(&self, layer: usize, head: usize) -> usize {
        self.layers[layer].heads[head].positions.len()
    }

    /// Whether no token has been read.
    pub fn is_empty(&self) -> bool {
        self.seen == 0
    }

    /// Original positions of the units that a KV head of a layer holds, ascending.
    pub fn positions(&self, layer: usize, head: usize) -> &[u32] {
        &self.layers[layer].heads[head].positions
    }

    /// Scores that are carried with the units of a KV head of a layer; empty if there are none.
    pub fn scores(&self, layer: usize, head: usize) -> &[f32] {
        &self.layers[layer].heads[head].scores
    }

    /// The store of a layer.
    pub fn store(&self, layer: usize) -> &dyn KvStore {
        &*self.layers[layer].store
    }

    /// Bytes of keys and values now.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| l.bytes).sum()
    }

    /// Bytes of positions and scores now.
    pub fn metadata_bytes(&self) -> usize {
        let heads = self.layers.iter().flat_map(|l| &l.heads);
        heads
            .map(|h| 4 * (h.positions.capacity() + h.scores.capacity()))
            .sum()
    }

    /// Units over all heads and layers now.
    pub fn units(&self) -> usize {
        let heads = self.layers.iter().flat_map(|l| &l.heads);
        heads.map(|h| h.positions.len()).sum()
    }

    /// The most that was held at any moment so far.
    pub fn peak(&self) -> Peak {
        self.peak
    }

    /// From now on keeps the score that every unit is born with, `[layer][head][token]`, for
    /// [`births`](Self::births). This memory grows with the text; it is for traces.
    pub fn record_births(&mut self) {
        let layer = vec![Vec::new(); self.spec.kv_heads];
        self.births = Some(vec![layer; self.spec.layers]);
    }

    /// Scores as units were born with them, `[layer][head][token]`, since
    /// [`record_births`](Self::record_births); `None` if they are not recorded.
    pub fn births(&self) -> Option<&[Vec<Vec<f32>>]> {
        self.births.as_deref()
    }

    /// Starts a step of `incoming` new tokens, in a sequence that will have `total` tokens at the
    /// end of what is being read.
    ///
    /// # Errors
    /// [`Error::Unusable`] if an earlier step was not finished; [`Error::NotSupported`] if the
    /// sequence outgrows LongRoPE's original context and the store cannot turn its keys: the cache
    /// is then as it was.
    pub fn begin(&mut self, phase: Phase, incoming: usize, total: usize) -> Result<()> {
        self.ready()?;
        let total = total.max(self.seen + incoming);
        // Before the keys are turned: a failure there leaves layers that no longer agree.
        self.current = Some(Current {
            phase,
            incoming,
            total,
            next: 0,
            table: None,
        });
        self.set_length(total)?;
        if let (Some(current), Positions::Original) = (&mut self.current, self.positions) {
            current.table = Some(self.rope.range(self.seen..self.seen + incoming));
        }
        Ok(())
    }

    /// Attention of one layer: appends the new units, attends over what is kept, and evicts.
    ///
    /// Returns `[tokens, heads * head_dim]`, before the output projection.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::LayerOrder`], [`Error::Unusable`] outside of a step, the
    /// policy's and the device's errors. The cache is unusable afterwards.
    pub fn attend(&mut self, layer: usize, qkv: Qkv) -> Result<Tensor<2>> {
        self.attend_with(layer, None, qkv)
    }

    /// [`attend`](Self::attend) by an adapter that shows policies also what it made `qkv` from, by the
    /// matrix of [`CausalLm::qkv_weight`](crate::CausalLm::qkv_weight): `input`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    pub fn attend_from<'a>(
        &mut self,
        layer: usize,
        input: impl Into<LayerInput<'a>>,
        qkv: Qkv,
    ) -> Result<Tensor<2>> {
        self.attend_with(layer, Some(input.into()), qkv)
    }

    fn attend_with(
        &mut self,
        layer: usize,
        input: Option<LayerInput<'_>>,
        qkv: Qkv,
    ) -> Result<Tensor<2>> {
        let spec = self.spec.layer(layer);
        let current = self.current.as_mut().ok_or(Error::Unusable)?;
        if layer != current.next || layer >= self.spec.layers {
            return Err(Error::LayerOrder {
                expected: current.next,
                found: layer,
                layers: self.spec.layers,
            });
        }
        let t = qkv.check(&spec)?;
        if t != current.incoming {
            return Err(Error::shape("tokens of q, k, v", [current.incoming], [t]));
        }
        if let Some(input) = input {
            input.check(t, self.spec.hidden)?;
        }
        let input = input.filter(|_| self.needs.input);
        current.next += 1;
        let (phase, decoding) = (current.phase, current.phase == Phase::Decode);
        let (d, on_host) = (spec.head_dim, self.place.host);
        let (kept_qkv, Qkv { q, k, v }) = if self.needs.qkv {
            let (kept, qkv) = KeptQkv::keep(qkv, on_host)?;
            (Some(kept), qkv)
        } else {
            (None, qkv)
        };
        let this = &mut self.layers[layer];

        let lens: Vec<usize> = this.heads.iter().map(|h| h.positions.len()).collect();
        let mut rotation = None;
        let (q, k) = match &current.table {
            Some(table) => (
                rotate_grouped(q, d, table, &[0], on_host)?,
                rotate_grouped(k, d, table, &[0], on_host)?,
            ),
            None => {
                let longest = lens.iter().max().map_or(0, |n| n + t);
                let table = self.rope.contiguous(longest);
                if this.rotated != decoding {
                    this.turn(d, &table, !decoding, on_host)?;
                }
                let q = rotate_grouped(q, d, &table, &lens, on_host)?;
                let k = if this.rotated {
                    rotate_grouped(k, d, &table, &lens, on_host)?
                } else {
                    k
                };
                rotation = (!this.rotated).then_some(table);
                (q, k)
            }
        };
        this.store.append(k, v)?;
        let first = self.seen as u32;
        for head in &mut this.heads {
            head.positions.extend(first..first + t as u32);
        }
        let attention = Attention {
            layer: spec,
            store: &*this.store,
            scale: self.spec.softmax_scale,
            rotation: rotation.as_deref(),
        };
        let observed = match self.needs.observe {
            Some(what) => Some(attention.observe(q.clone(), what)?),
            None => None,
        };
        let out = attention.attend(q)?;
        this.bytes = this.store.bytes();
        let later = self.needs.surprisal && phase != Phase::Turn;
        this.pending = Some(Pending {
            qkv: kept_qkv,
            input: input.filter(|_| later).map(KeptInput::from),
            observed,
        });
        self.note_peak(layer);
        if !later {
            self.decide(layer, input, None)?;
        }
        Ok(out)
    }

    /// Ends a step. `surprisal` has one value per new token if the policy needs it: see
    /// [`LayerUnits::surprisal`].
    ///
    /// # Errors
    /// [`Error::LayerOrder`] if layers were left out, [`Error::Shape`] for a missing or wrong
    /// `surprisal`, the policy's errors.
    pub fn finish(&mut self, surprisal: Option<&[f32]>) -> Result<()> {
        let current = self.current.as_ref().ok_or(Error::Unusable)?;
        let (incoming, next) = (current.incoming, current.next);
        if next != self.spec.layers {
            return Err(Error::LayerOrder {
                expected: next,
                found: self.spec.layers,
                layers: self.spec.layers,
            });
        }
        if self.needs.surprisal {
            let found = surprisal.map_or(0, <[f32]>::len);
            if found != incoming {
                return Err(Error::shape("surprisal", [incoming], [found]));
            }
            for layer in 0..self.spec.layers {
                self.decide(layer, None, surprisal)?;
            }
        }
        self.seen += incoming;
        self.end();
        Ok(())
    }

    /// Asks the policy, without any new token, to bring the cache back to what it keeps at the
    /// beginning of a further prompt.
    ///
    /// # Errors
    /// The policy's, and [`Error::Unusable`].
    pub fn turn(&mut self, total: usize) -> Result<()> {
        self.begin(Phase::Turn, 0, total)?;
        for layer in 0..self.spec.layers {
            self.layers[layer].pending = Some(Pending {
                qkv: None,
                input: None,
                observed: None,
            });
            self.decide(layer, None, None)?;
        }
        self.end();
        Ok(())
    }

    /// The step is over, and all layers agree.
    fn end(&mut self) {
        let mut heads = self.layers.iter().flat_map(|l| &l.heads);
        let scored = heads.any(|h| !h.scores.is_empty());
        self.scored_by = self.policy.carries().filter(|_| scored);
        self.current = None;
    }

    fn decide(
        &mut self,
        layer: usize,
        input: Option<LayerInput<'_>>,
        surprisal: Option<&[f32]>,
    ) -> Result<()> {
        let current = self.current.as_ref().ok_or(Error::Unusable)?;
        let spec = self.spec.layer(layer);
        let this = &mut self.layers[layer];
        let Some(pending) = this.pending.take() else {
            return Ok(());
        };
        let longest = this.heads.iter().map(|h| h.positions.len()).max();
        let table = (self.positions == Positions::Compact && !this.rotated)
            .then(|| self.rope.contiguous(longest.unwrap_or(0)));
        let at = Step {
            layer: spec,
            phase: current.phase,
            seen: self.seen,
            incoming: current.incoming,
            total: current.total,
        };
        let verdict = self.policy.step(
            &at,
            &LayerUnits {
                layer: spec,
                incoming: current.incoming,
                heads: &this.heads,
                store: &*this.store,
                rotation: table.as_deref(),
                qkv: pending.qkv.as_ref(),
                input: input.or(pending.input.as_ref().map(LayerInput::from)),
                device: &self.place.device,
                surprisal,
                observed: pending.observed.as_ref(),
            },
        )?;
        if let (Some(births), Some(scores)) = (&mut self.births, &verdict.scores) {
            for (born, scores) in births[layer].iter_mut().zip(scores.heads()) {
                let new = scores.len().saturating_sub(current.incoming);
                born.extend_from_slice(&scores[new..]);
            }
        }
        self.apply(layer, verdict)
    }

    fn apply(&mut self, layer: usize, verdict: Verdict) -> Result<()> {
        let policy = &self.policy;
        let broken = |message: String| Error::Policy {
            policy: policy.name(),
            message,
        };
        let d = self.spec.head_dim;
        let this = &mut self.layers[layer];
        let heads = this.heads.len();
        if let Some(scores) = &verdict.scores
            && scores.heads().len() != heads
        {
            return Err(broken(format!(
                "scores for {} KV heads of {heads}",
                scores.heads().len()
            )));
        }
        let mut scores = verdict.scores.map(|s| s.into_inner().into_iter());
        for head in &mut this.heads {
            head.scores = scores.as_mut().and_then(Iterator::next).unwrap_or_default();
            let (found, expected) = (head.scores.len(), head.positions.len());
            if found != 0 && found != expected {
                return Err(broken(format!("{found} scores for {expected} units")));
            }
        }
        let (selection, folds) = match verdict.keep {
            Keep::All => (None, Vec::new()),
            Keep::Slots(kept) => (Some(kept), Vec::new()),
            Keep::Merged { kept, folds } => (Some(kept), folds),
        };
        if !folds.is_empty() && folds.len() != heads {
            return Err(broken(format!(
                "folds for {} KV heads of {heads}",
                folds.len()
            )));
        }
        for (head, folds) in folds.iter().enumerate().filter(|(_, f)| !f.is_empty()) {
            this.store.fold_values(head, folds)?;
        }
        if let Some(selection) = selection {
            let kept = selection.heads();
            crate::store::check_retain(kept, this.heads.iter().map(|h| h.positions.len()))
                .map_err(|e| broken(e.to_string()))?;
            let changed = kept
                .iter()
                .zip(&this.heads)
                .any(|(k, h)| k.len() < h.positions.len());
            if changed {
                if this.rotated {
                    let longest = this.heads.iter().map(|h| h.positions.len()).max();
                    let table = self.rope.contiguous(longest.unwrap_or(0));
                    this.turn(d, &table, true, self.place.host)?;
                }
                this.store.retain(kept)?;
                for (head, kept) in this.heads.iter_mut().zip(kept) {
                    gather(&mut head.positions, kept);
                    gather(&mut head.scores, kept);
                }
            }
        }
        this.store.settle()?;
        this.bytes = this.store.bytes();
        Ok(())
    }

    fn note_peak(&mut self, layer: usize) {
        let longest = self.layers[layer].heads.iter().map(|h| h.positions.len());
        self.peak.units_per_head = self.peak.units_per_head.max(longest.max().unwrap_or(0));
        self.peak.units = self.peak.units.max(self.units());
        self.peak.bytes = self.peak.bytes.max(self.bytes());
    }

    /// LongRoPE: chooses the factors for a sequence of `total` tokens, and turns the keys that
    /// are already rotated with the other ones.
    fn set_length(&mut self, total: usize) -> Result<()> {
        let before = self.rope.clone();
        if !self.rope.set_length(total) || self.seen == 0 {
            return Ok(());
        }
        let (d, on_host) = (self.spec.head_dim, self.place.host);
        for (index, layer) in self.layers.iter_mut().enumerate() {
            match self.positions {
                // Rotated at compact positions: back to un-rotated, with the old factors.
                Positions::Compact if layer.rotated => {
                    let longest = layer.heads.iter().map(|h| h.positions.len()).max();
                    let table = before.range(0..longest.unwrap_or(0));
                    layer.turn(d, &table, true, on_host)?;
                }
                Positions::Compact => {}
                Positions::Original => {
                    let (old, new) = (before.range(0..self.seen), self.rope.range(0..self.seen));
                    let heads = &layer.heads;
                    let turned = layer.store.turn_keys(&|head, keys| {
                        let positions = &heads[head].positions;
                        let row = |unit: usize| positions[unit] as usize;
                        let keys = unrotate_rows(keys, d, &old, &row, on_host)?;
                        rotate_rows(keys, d, &new, &row, on_host)
                    })?;
                    if !turned {
                        if index == 0 {
                            self.rope = before;
                            self.current = None;
                        }
                        return Err(Error::NotSupported {
                            operation: "a sequence that outgrows the original context of LongRoPE \
                                        in a later prompt (announce its length, or always use \
                                        the long factors)",
                            implementer: layer.store.name(),
                        });
                    }
                }
            }
        }
        Ok(())
    }
}

impl LayerCache {
    /// Rotates the stored keys at compact positions, or back. Leaves them alone where the store
    /// would lose precision.
    fn turn(&mut self, d: usize, table: &RopeTable, inverse: bool, on_host: bool) -> Result<()> {
        let rotate = if inverse { unrotate_rows } else { rotate_rows };
        let turned = self
            .store
            .turn_keys(&|_, keys| rotate(keys, d, table, &|i| i, on_host))?;
        if turned {
            self.rotated = !inverse;
        }
        Ok(())
    }
}

/// Keeps the listed elements, in place.
fn gather<T: Copy>(values: &mut Vec<T>, kept: &[u32]) {
    if values.is_empty() {
        return;
    }
    for (to, from) in kept.iter().enumerate() {
        values[to] = values[*from as usize];
    }
    values.truncate(kept.len());
}

/// Token ids as a tensor `[tokens]`, for an adapter's embedding.
pub fn ids_tensor(ids: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let len = ids.len();
    Tensor::from_data(TensorData::new(ids, [len]), device)
}
