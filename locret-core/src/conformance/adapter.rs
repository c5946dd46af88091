//! What every model adapter must satisfy.

use super::{ConformanceError, Promise, policy::Everything, record::Recording};
use crate::{
    Budget, CacheOptions, CausalLm, Error, Evict, Generate, KvCachePolicy, LayerUnits, Needs, Pass,
    Phase, Positions, Prefill, Result, Rows, Scorer, Scores, SequenceCache, Session, Step, Verdict,
    forward,
};
use std::sync::Arc;

/// How a model adapter is checked.
#[derive(Debug, Clone)]
pub struct AdapterCheck {
    /// How far hidden states and logits may be apart that should be equal, as a share of the
    /// largest of them (of 1, if they are smaller).
    pub tolerance: f32,
    /// Whether positions enter by rotation alone, so that a text further back is read like one at
    /// the start. False for models that add an embedding of the position.
    pub rotary_only: bool,
    /// How the caches compute.
    pub options: CacheOptions,
}

impl Default for AdapterCheck {
    fn default() -> Self {
        Self {
            tolerance: 1e-4,
            rotary_only: true,
            options: CacheOptions::default(),
        }
    }
}

/// Reads `ids` (16 tokens or more, of the model's vocabulary) in many ways, and checks what comes
/// back.
///
/// What is checked is the list of [`Promise`]s for adapters: shapes, finite numbers, every chunking
/// equal to one pass, no state between sequences, layers in order, errors passed on, queries and
/// keys that no position has entered, what they are made from (where the adapter says so), and a
/// bounded stream.
///
/// # Errors
/// [`ConformanceError`] for the first broken promise.
pub fn check_adapter(
    model: Arc<dyn CausalLm>,
    ids: &[u32],
    check: &AdapterCheck,
) -> Result<(), ConformanceError> {
    if ids.len() < 16 {
        return Err(ConformanceError::Unusable(format!(
            "{} tokens are too few, 16 are needed",
            ids.len()
        )));
    }
    let vocab = model.spec().vocab;
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
        return Err(ConformanceError::Unusable(format!(
            "token {id} is outside of the vocabulary of {vocab}"
        )));
    }
    let adapter = Checking { model, ids, check };
    let whole = adapter.one_pass()?;
    adapter.chunks(&whole)?;
    adapter.rows()?;
    adapter.interleaved(&whole)?;
    adapter.layers()?;
    adapter.projection()?;
    adapter.positions(&whole)?;
    adapter.stream()
}

/// Fails in one layer.
#[derive(Debug)]
struct Failing(usize);

impl KvCachePolicy for Failing {
    fn name(&self) -> String {
        "failing".into()
    }

    fn step(&self, at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        if at.layer.index == self.0 {
            return Err(Error::Policy {
                policy: self.name(),
                message: "fails on purpose".into(),
            });
        }
        Ok(Verdict::keep_all())
    }
}

/// Keeps nothing.
#[derive(Debug)]
struct Nothing;

impl KvCachePolicy for Nothing {
    fn name(&self) -> String {
        "nothing".into()
    }

    fn step(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        Verdict::keep(vec![Vec::new(); units.kv_heads()])
    }
}

/// The newest are the best.
#[derive(Debug)]
struct Newest;

impl Scorer for Newest {
    fn name(&self) -> String {
        "newest".into()
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let heads = 0..units.kv_heads();
        let of = |head| units.positions(head).iter().map(|p| *p as f32).collect();
        Scores::per_head(heads.map(of).collect())
    }
}

struct Checking<'a> {
    model: Arc<dyn CausalLm>,
    ids: &'a [u32],
    check: &'a AdapterCheck,
}

impl Checking<'_> {
    fn broken(&self, promise: Promise, case: &str, found: impl Into<String>) -> ConformanceError {
        ConformanceError::Broken {
            subject: "the adapter".into(),
            promise,
            case: format!("{} tokens, {case}", self.ids.len()),
            found: found.into(),
        }
    }

    fn failed(&self, case: &str, error: Error) -> ConformanceError {
        match error {
            Error::LayerOrder { .. } | Error::LayersMissing { .. } => {
                self.broken(Promise::Layers, case, error.to_string())
            }
            Error::Shape { .. } => self.broken(Promise::Shapes, case, error.to_string()),
            error => ConformanceError::Failed {
                subject: "the adapter".into(),
                case: format!("{} tokens, {case}", self.ids.len()),
                source: Box::new(error),
            },
        }
    }

    fn cache(&self, policy: impl KvCachePolicy + 'static) -> Result<SequenceCache> {
        let (spec, compute) = (self.model.spec(), self.model.compute());
        SequenceCache::new(spec, Arc::new(policy), compute, self.check.options)
    }

    /// One step of a sequence that will have `total` tokens.
    fn step(&self, cache: &mut SequenceCache, ids: &[u32], total: usize) -> Result<Rows> {
        self.pass(Phase::Prefill { last: false }, cache, ids, total)
    }

    fn pass(
        &self,
        phase: Phase,
        cache: &mut SequenceCache,
        ids: &[u32],
        total: usize,
    ) -> Result<Rows> {
        let mut pass = Pass::new([cache.step(phase, ids.len(), total)])?;
        let hidden = forward(&*self.model, ids, &mut pass)?;
        pass.finish(None)?;
        Ok(hidden)
    }

    /// Hidden states of `ids` in chunks of `chunk`, flat.
    fn read(&self, chunk: usize, case: &str) -> Result<Vec<f32>, ConformanceError> {
        let run = || -> Result<Vec<f32>> {
            let mut cache = self.cache(Everything::PLAIN)?;
            let mut all = Vec::new();
            for part in self.ids.chunks(chunk) {
                all.extend(self.step(&mut cache, part, self.ids.len())?.into_values()?);
            }
            Ok(all)
        };
        run().map_err(|e| self.failed(case, e))
    }

    fn same(
        &self,
        promise: Promise,
        case: &str,
        found: &[f32],
        expected: &[f32],
    ) -> Result<(), ConformanceError> {
        let doubles = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let largest = expected.iter().fold(1f32, |most, x| most.max(x.abs()));
        let allowed = f64::from(self.check.tolerance * largest);
        let (at, off) = super::largest_difference(doubles(found), doubles(expected));
        if found.len() == expected.len() && off <= allowed {
            return Ok(());
        }
        Err(self.broken(
            promise,
            case,
            format!(
                "{} numbers for {}, off by {off:.2e} at number {at}, {allowed:.2e} allowed",
                found.len(),
                expected.len()
            ),
        ))
    }

    fn one_pass(&self) -> Result<Vec<f32>, ConformanceError> {
        let case = "one pass";
        let spec = self.model.spec();
        spec.validate().map_err(|e| self.failed(case, e))?;
        let t = self.ids.len();
        let hidden = self
            .cache(Everything::PLAIN)
            .and_then(|mut cache| self.step(&mut cache, self.ids, t))
            .map_err(|e| self.failed(case, e))?;
        let due = |what, found: [usize; 2], due: [usize; 2]| match found == due {
            true => Ok(()),
            false => {
                let found = format!("{what} are {found:?}, {due:?} are due");
                Err(self.broken(Promise::Shapes, case, found))
            }
        };
        due("hidden states", hidden.shape(), [t, spec.hidden])?;
        let logits = self.model.logits(hidden.clone());
        let logits = logits.map_err(|e| self.failed(case, e))?;
        due("logits", logits.shape(), [t, spec.vocab])?;
        let numbers = |x: Rows| x.into_values().map_err(|e| self.failed(case, e));
        let (hidden, logits) = (numbers(hidden)?, numbers(logits)?);
        for (what, numbers) in [("hidden states", &hidden), ("logits", &logits)] {
            if let Some(at) = numbers.iter().position(|x| !x.is_finite()) {
                let found = format!("{what}: {} at number {at}", numbers[at]);
                return Err(self.broken(Promise::Finite, case, found));
            }
        }
        Ok(hidden)
    }

    fn chunks(&self, whole: &[f32]) -> Result<(), ConformanceError> {
        let t = self.ids.len();
        for chunk in [1, 2, 7, t / 2 + 1, t - 1] {
            let case = format!("chunks of {chunk}");
            self.same(
                Promise::ChunkInvariant,
                &case,
                &self.read(chunk, &case)?,
                whole,
            )?;
        }
        // Decoding is another phase with the same result.
        let run = || -> Result<Vec<f32>> {
            let mut cache = self.cache(Everything::PLAIN)?;
            let (head, tail) = self.ids.split_at(t - 3);
            let mut all = self.step(&mut cache, head, t)?.into_values()?;
            for id in tail {
                let hidden = self.pass(Phase::Decode, &mut cache, &[*id], t)?;
                all.extend(hidden.into_values()?);
            }
            Ok(all)
        };
        let case = "the last 3 tokens decoded";
        let found = run().map_err(|e| self.failed(case, e))?;
        self.same(Promise::ChunkInvariant, case, &found, whole)
    }

    fn rows(&self) -> Result<(), ConformanceError> {
        let case = "logits row by row";
        let run = || -> Result<_> {
            let mut cache = self.cache(Everything::PLAIN)?;
            let hidden = self.step(&mut cache, self.ids, self.ids.len())?;
            let mut apart = Vec::new();
            for row in 0..self.ids.len() {
                let logits = self.model.logits(hidden.slice(row..row + 1)?)?;
                apart.extend(logits.into_values()?);
            }
            Ok((apart, self.model.logits(hidden)?.into_values()?))
        };
        let (apart, together) = run().map_err(|e| self.failed(case, e))?;
        self.same(Promise::RowWise, case, &apart, &together)
    }

    /// Two sequences in turn: neither may show in the other.
    fn interleaved(&self, whole: &[f32]) -> Result<(), ConformanceError> {
        let case = "two sequences in turn";
        let other: Vec<u32> = self.ids.iter().rev().copied().collect();
        let t = self.ids.len();
        let run = || -> Result<[Vec<f32>; 2]> {
            let mut caches = [
                self.cache(Everything::PLAIN)?,
                self.cache(Everything::PLAIN)?,
            ];
            let mut found = [Vec::new(), Vec::new()];
            for at in (0..t).step_by(5) {
                let end = t.min(at + 5);
                for (i, ids) in [self.ids, &other].into_iter().enumerate() {
                    found[i].extend(self.step(&mut caches[i], &ids[at..end], t)?.into_values()?);
                }
            }
            Ok(found)
        };
        let [first, _] = run().map_err(|e| self.failed(case, e))?;
        self.same(Promise::Deterministic, case, &first, whole)?;
        // Nothing but the arithmetic of another chunking may be between two runs.
        let [again, _] = run().map_err(|e| self.failed(case, e))?;
        self.same(Promise::Deterministic, "the same again", &again, &first)
    }

    fn layers(&self) -> Result<(), ConformanceError> {
        let layers = self.model.spec().layers;
        let recording = Arc::new(Recording::new(Arc::new(Everything::PLAIN)));
        let case = "verdicts of one pass";
        let run = || -> Result<()> {
            let (spec, compute) = (self.model.spec(), self.model.compute());
            let mut cache =
                SequenceCache::new(spec, recording.clone(), compute, self.check.options)?;
            self.step(&mut cache, self.ids, self.ids.len()).map(drop)
        };
        run().map_err(|e| self.failed(case, e))?;
        let decisions = recording.decisions();
        let order: Vec<usize> = decisions.iter().map(|d| d.step.layer.index).collect();
        if !order.iter().copied().eq(0..layers) {
            let found = format!("layers {order:?} of {layers}");
            return Err(self.broken(Promise::Layers, case, found));
        }
        for layer in [0, layers - 1] {
            let case = format!("a policy that fails in layer {layer}");
            let cache = self.cache(Failing(layer));
            let mut cache = cache.map_err(|e| self.failed(&case, e))?;
            let step = cache.step(
                Phase::Prefill { last: true },
                self.ids.len(),
                self.ids.len(),
            );
            let mut pass = Pass::new([step]).map_err(|e| self.failed(&case, e))?;
            if forward(&*self.model, self.ids, &mut pass).is_ok() {
                let found = "hidden states instead of the error";
                return Err(self.broken(Promise::Layers, &case, found));
            }
        }
        Ok(())
    }

    /// What the adapter says that q, k and v are made from.
    fn projection(&self) -> Result<(), ConformanceError> {
        let model = &self.model;
        let (spec, t) = (model.spec(), self.ids.len());
        let (hidden, features) = (spec.hidden, spec.layer(0).qkv_features());
        let everything = Everything {
            positions: Positions::Original,
            needs: Needs::NOTHING.qkv().input(),
        };
        let recording = Arc::new(Recording::new(Arc::new(everything)));
        let outputs = hidden * spec.heads * spec.head_dim;
        for layer in 0..spec.layers {
            let case = format!("the matrix behind attention in layer {layer}");
            let weight = model.output_weight(layer);
            let weight = weight.map_err(|e| self.failed(&case, e))?;
            if let Some(found) = weight.map(|w| w.len()).filter(|len| *len != outputs) {
                let found = format!("{found} numbers, {outputs} are due");
                return Err(self.broken(Promise::Projection, &case, found));
            }
        }
        let case = "a pass that asks for the input of layers";
        if !spec.layer_input {
            let weight = |layer| model.qkv_weight(layer).map_err(|e| self.failed(case, e));
            for layer in 0..spec.layers {
                if weight(layer)?.is_some() {
                    let found = "a matrix, but no input goes with q, k and v";
                    return Err(self.broken(Promise::Projection, case, found));
                }
            }
            return Ok(());
        }
        let run = || -> Result<Vec<Option<Vec<f32>>>> {
            let mut cache =
                SequenceCache::new(spec, recording.clone(), model.compute(), self.check.options)?;
            self.step(&mut cache, self.ids, t)?;
            (0..spec.layers).map(|l| model.qkv_weight(l)).collect()
        };
        let weights = run().map_err(|e| self.failed(case, e))?;
        for (weight, decision) in weights.iter().zip(recording.decisions()) {
            let Some(weight) = weight else { continue };
            let layer = decision.step.layer.index;
            let case = format!("layer {layer}");
            let broken = |found: String| Err(self.broken(Promise::Projection, &case, found));
            if weight.len() != features * hidden {
                let found = weight.len();
                return broken(format!(
                    "a matrix of {found} numbers for [{features}, {hidden}]"
                ));
            }
            let (Some(input), Some([q, k, v])) = (&decision.seen.input, &decision.seen.qkv) else {
                return broken("a matrix, but the layer hands no input along".into());
            };
            let mut expected = Vec::with_capacity(t * features);
            for x in input.chunks_exact(hidden) {
                for row in weight.chunks_exact(hidden) {
                    let terms = row
                        .iter()
                        .zip(x)
                        .map(|(a, b)| f64::from(*a) * f64::from(*b));
                    expected.push(terms.sum::<f64>() as f32);
                }
            }
            let mut found = Vec::with_capacity(t * features);
            for token in 0..t {
                for part in [q, k, v] {
                    let width = part.len() / t;
                    found.extend_from_slice(&part[token * width..(token + 1) * width]);
                }
            }
            self.same(Promise::Projection, &case, &found, &expected)?;
        }
        Ok(())
    }

    fn positions(&self, whole: &[f32]) -> Result<(), ConformanceError> {
        if !self.check.rotary_only {
            return Ok(());
        }
        let t = self.ids.len();
        // What the first layer projects is a function of the token alone.
        let case = "the same tokens at two places";
        let everything = Everything {
            positions: Positions::Original,
            needs: Needs::NOTHING.qkv(),
        };
        let recording = Arc::new(Recording::new(Arc::new(everything)));
        let run = || -> Result<()> {
            let (spec, compute) = (self.model.spec(), self.model.compute());
            let mut cache =
                SequenceCache::new(spec, recording.clone(), compute, self.check.options)?;
            self.step(&mut cache, self.ids, 2 * t)?;
            self.step(&mut cache, self.ids, 2 * t).map(drop)
        };
        run().map_err(|e| self.failed(case, e))?;
        let decisions = recording.decisions();
        let mut first = decisions.iter().filter(|d| d.step.layer.index == 0);
        let (Some(a), Some(b)) = (first.next(), first.next()) else {
            return Err(self.broken(Promise::Layers, case, "no verdict on the first layer"));
        };
        let (a, b) = (a.seen.qkv.iter().flatten(), b.seen.qkv.iter().flatten());
        for (what, (a, b)) in ["q", "k", "v"].iter().zip(a.zip(b)) {
            self.same(Promise::PositionFree, &format!("{case}, {what}"), b, a)?;
        }
        // Rotation is relative: after everything is forgotten, a text is read as if it were new.
        let case = "the text again after everything was forgotten";
        let run = || -> Result<[Vec<f32>; 2]> {
            let mut cache = self.cache(Nothing)?;
            let first = self.step(&mut cache, self.ids, 2 * t)?.into_values()?;
            Ok([
                first,
                self.step(&mut cache, self.ids, 2 * t)?.into_values()?,
            ])
        };
        let [first, second] = run().map_err(|e| self.failed(case, e))?;
        self.same(Promise::PositionFree, case, &second, &first)?;
        // Where a longer text does not change the frequencies, also as in one pass.
        let rope = &self.model.spec().rope;
        if rope.is_long(t) != rope.is_long(2 * t) {
            return Ok(());
        }
        self.same(Promise::PositionFree, case, &first, whole)
    }

    /// A stream of several times the budget, and some generated text.
    fn stream(&self) -> Result<(), ConformanceError> {
        const BUDGET: usize = 8;
        const CHUNK: usize = 5;
        for positions in [Positions::Original, Positions::Compact] {
            let case = format!("a stream through a window of {BUDGET}, {positions:?} positions");
            let run = || -> Result<Session> {
                let evict = Evict::new(Newest, Budget::Units(BUDGET)).with_positions(positions);
                let mut session =
                    Session::with_options(self.model.clone(), Arc::new(evict), self.check.options)?;
                let prefill = Prefill::new(CHUNK, 0);
                session.prefill(&[self.ids, self.ids].concat(), &prefill)?;
                for token in session.generate(Generate::greedy(3))? {
                    token?;
                }
                Ok(session)
            };
            let session = run().map_err(|e| self.failed(&case, e))?;
            let peak = session.cache().peak().units_per_head;
            if peak != BUDGET + CHUNK {
                let found = format!("{peak} units a head, {} are due", BUDGET + CHUNK);
                return Err(self.broken(Promise::PeakUnits, &case, found));
            }
        }
        Ok(())
    }
}
