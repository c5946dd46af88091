//! What later tokens make of a text's units: labels.

use super::Sample;
use crate::{PolicyError, Result};
use locret_core::{
    CacheOptions, CausalLm, Decided, Matrix, Needs, Observation, Pass, Phase, Probe, Queries, Rows,
    SequenceCache, Step, Weight, forward, layer_compute,
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a unit's label is. All are the largest over the answers of a sample and over the query heads
/// that share the KV head.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum LabelKind {
    /// The largest attention logit that an answer's token has for it, before the softmax, as the
    /// authors do (arXiv 2410.01805 §3.2).
    #[default]
    MaxLogit,
    /// The logarithm of the attention weight that it gets from an answer, averaged over the
    /// answer's tokens.
    Mass,
    /// The logarithm of the largest attention weight that an answer's token pays it: KVzip's score (arXiv
    /// 2505.23416 §3.2), as KVzap fits it (arXiv 2601.07891 §3). That is the largest `logit - log-sum-exp of
    /// the query's logits`: a constant on all logits of a query, which changes nothing in attention, changes
    /// nothing here, so that labels of different heads and layers have one scale.
    Kvzip,
    /// The logarithm of the largest `weight · ‖W_O v‖ / ‖h‖`: what the unit's value adds to the hidden state
    /// through the slice `W_O` of the query head, beside the layer's input `h` of the answer's token (KVzip+,
    /// arXiv 2601.07891 §3). For models that say what their output matrix is
    /// ([`CausalLm::output_weight`](locret_core::CausalLm::output_weight)) and hand their layers' input along.
    KvzipPlus,
}

impl LabelKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::MaxLogit, Self::Mass, Self::Kvzip, Self::KvzipPlus];

    /// Its name in files and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::MaxLogit => "max-logit",
            Self::Mass => "mass",
            Self::Kvzip => "kvzip",
            Self::KvzipPlus => "kvzip-plus",
        }
    }

    fn observation(self) -> Observation {
        match self {
            Self::MaxLogit => Observation::MaxLogits,
            Self::Mass => Observation::Weights,
            Self::Kvzip => Observation::MaxWeights,
            Self::KvzipPlus => Observation::MaxWeightsByInput,
        }
    }

    /// What was observed of an answer in one piece and then in another.
    fn and(self, a: f32, b: f32) -> f32 {
        match self {
            Self::Mass => a + b,
            _ => a.max(b),
        }
    }

    /// The label of what was observed of an answer of `tokens` tokens.
    fn label(self, observed: f32, tokens: usize) -> f32 {
        match self {
            Self::MaxLogit => observed,
            // Below this, differences between weights mean nothing.
            Self::Mass => (observed / tokens as f32).max(1e-8).ln(),
            Self::Kvzip | Self::KvzipPlus => observed.max(1e-12).ln(),
        }
    }
}

/// How answers are forced on a model for labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LabelOptions {
    /// Tokens that go through the model together.
    pub chunk: usize,
    /// How many of a query's last tokens count beside the answer's.
    pub query_tokens: usize,
    /// Adds the logarithm of the norm of a unit's value to its label: attention to a value of
    /// small norm changes little. Not for [`LabelKind::KvzipPlus`], which has a factor of its own.
    pub value_norm: bool,
}

impl Default for LabelOptions {
    fn default() -> Self {
        Self {
            chunk: 512,
            query_tokens: 0,
            value_norm: false,
        }
    }
}

/// The labels of all units of a sample's prompt, `[layers][kv_heads][tokens]`.
///
/// The prompt is read with a full cache and original positions, and each answer is forced on a fork of it, in
/// chunks: of an answer's attention there is never more than the engine reduces at a time.
///
/// # Errors
/// [`PolicyError::Setting`] for impossible options, an impossible sample, or a kind of label that the model
/// has not enough to say for; the model's and the engine's.
pub fn labels(
    model: &dyn CausalLm,
    sample: &Sample,
    kind: LabelKind,
    options: &LabelOptions,
) -> Result<Vec<Vec<Vec<f32>>>> {
    let spec = model.spec();
    sample.validate(0, spec.vocab)?;
    options.validate(&[kind])?;
    let factors = Factors::new(model, &[kind], options.value_norm)?;
    let mut values = Values {
        factors: &factors,
        lists: vec![UnitFactors::default(); spec.layers],
    };
    let mut cache = full(model)?;
    feed(
        model,
        &mut cache,
        &sample.prompt,
        options.chunk,
        &mut values,
    )?;
    forced(model, &cache, sample, kind, options, &values.lists)
}

impl LabelOptions {
    pub(super) fn validate(&self, kinds: &[LabelKind]) -> Result<()> {
        let wrong = |message: &str| Err(PolicyError::setting("training", message));
        if self.chunk == 0 {
            return wrong("chunk must be at least 1");
        }
        if self.value_norm && kinds.contains(&LabelKind::KvzipPlus) {
            return wrong(
                "value_norm and labels of kind kvzip-plus, which weigh values themselves",
            );
        }
        Ok(())
    }
}

/// An empty full cache.
pub(super) fn full(model: &dyn CausalLm) -> Result<SequenceCache> {
    let (policy, options) = (Arc::new(crate::Full::default()), CacheOptions::default());
    Ok(SequenceCache::new(
        model.spec(),
        policy,
        model.compute(),
        options,
    )?)
}

/// Puts tokens through the model.
pub(super) fn feed(
    model: &dyn CausalLm,
    cache: &mut SequenceCache,
    ids: &[u32],
    chunk: usize,
    probe: &mut dyn Probe,
) -> Result<()> {
    let total = cache.seen() + ids.len();
    for ids in ids.chunks(chunk) {
        let step = cache.step(Phase::Forced, ids.len(), total);
        let mut pass = Pass::new([step.watched(&mut *probe)])?;
        forward(model, ids, &mut pass)?;
        pass.finish(None)?;
    }
    Ok(())
}

/// Labels by layer, KV head and token of a sample whose prompt is in `cache`.
pub(super) fn forced(
    model: &dyn CausalLm,
    cache: &SequenceCache,
    sample: &Sample,
    kind: LabelKind,
    options: &LabelOptions,
    factors: &[UnitFactors],
) -> Result<Vec<Vec<Vec<f32>>>> {
    let spec = model.spec();
    let tokens = sample.prompt.len();
    let mut best = vec![vec![vec![f32::NEG_INFINITY; tokens]; spec.kv_heads]; spec.layers];
    for answer in &sample.answers {
        let mut fork = cache.fork()?;
        let counted = options.query_tokens.min(answer.query.len());
        let (unseen, watched) = answer.query.split_at(answer.query.len() - counted);
        feed(model, &mut fork, unseen, options.chunk, &mut Unwatched)?;
        let mut watching = Watching {
            layers: vec![Vec::new(); spec.layers],
            prompt: tokens,
            kind,
        };
        let watched = [watched, &answer.answer].concat();
        feed(model, &mut fork, &watched, options.chunk, &mut watching)?;
        for ((best, observed), factors) in best.iter_mut().zip(watching.layers).zip(factors) {
            let each = observed.len() / spec.kv_heads;
            for (head, list) in observed.into_iter().enumerate() {
                // Gathered for all kinds of labels together, and one kind's alone.
                let more = (kind == LabelKind::KvzipPlus)
                    .then(|| factors.of_query_head.get(head))
                    .flatten();
                for (token, best) in best[head / each].iter_mut().enumerate() {
                    let label = kind.label(list[token], watched.len());
                    *best = best.max(label + more.map_or(0.0, |m| m[token]));
                }
            }
        }
    }
    for (layer, (best, factors)) in best.iter_mut().zip(factors).enumerate() {
        for (head, best) in best.iter_mut().enumerate() {
            if let (true, Some(more)) = (options.value_norm, factors.of_kv_head.get(head)) {
                best.iter_mut().zip(more).for_each(|(b, more)| *b += more);
            }
            if let Some(token) = best.iter().position(|x| !x.is_finite()) {
                return Err(locret_core::Error::NotFinite {
                    what: "a label",
                    at: format!("layer {layer}, KV head {head}, token {token}"),
                }
                .into());
            }
        }
    }
    Ok(best)
}

/// Logarithms of what a layer's units are weighed with, by token.
#[derive(Debug, Clone, Default)]
pub(super) struct UnitFactors {
    /// `ln ‖v‖`, `[kv_heads][token]`.
    of_kv_head: Vec<Vec<f32>>,
    /// `ln ‖W_O v‖`, `[heads][token]`.
    of_query_head: Vec<Vec<f32>>,
}

/// What makes [`UnitFactors`] of values.
#[derive(Debug)]
pub(super) struct Factors {
    value_norm: bool,
    /// `W_Oᵀ W_O` of each query head, by layer and KV head one below the other, `[group · head_dim,
    /// head_dim]`: `‖W_O v‖² = vᵀ (W_Oᵀ W_O) v` takes `head_dim²` operations a unit instead of `head_dim ·
    /// hidden`.
    squares: Vec<Vec<Arc<dyn Matrix>>>,
}

impl Factors {
    pub(super) fn new(model: &dyn CausalLm, kinds: &[LabelKind], value_norm: bool) -> Result<Self> {
        let mut squares = Vec::new();
        if kinds.contains(&LabelKind::KvzipPlus) {
            let missing = |what: &str| {
                let message = format!("labels of kind kvzip-plus need {what}");
                PolicyError::setting("training", message)
            };
            if !model.spec().layer_input {
                return Err(missing("a model that hands its layers' input along"));
            }
            for layer in 0..model.spec().layers {
                let weight = model.output_weight(layer)?;
                let weight = weight.ok_or_else(|| missing("the model's output matrices"))?;
                squares.push(squares_of(model, layer, &weight)?);
            }
        }
        Ok(Self {
            value_norm,
            squares,
        })
    }

    pub(super) fn needed(&self) -> bool {
        self.value_norm || !self.squares.is_empty()
    }

    /// Adds those of new values, `[tokens, kv_heads * head_dim]`.
    pub(super) fn add(
        &self,
        step: &Step,
        values: &Rows,
        to: &mut UnitFactors,
    ) -> locret_core::Result<()> {
        let (dim, kv_heads, group) = (
            step.layer.head_dim,
            step.layer.kv_heads,
            step.layer.heads / step.layer.kv_heads,
        );
        // A value of zeros weighs nothing, whatever it is paid.
        let ln = |norm: f32| norm.max(1e-8).ln();
        let all = values.values()?;
        let of_head = |head: usize| {
            let rows = all.chunks_exact(kv_heads * dim);
            rows.map(move |row| &row[head * dim..(head + 1) * dim])
        };
        if self.value_norm {
            to.of_kv_head.resize(kv_heads, Vec::new());
            for (head, list) in to.of_kv_head.iter_mut().enumerate() {
                list.extend(of_head(head).map(|v| ln(dot(v, v).sqrt())));
            }
        }
        let Some(squares) = self.squares.get(step.layer.index) else {
            return Ok(());
        };
        to.of_query_head.resize(kv_heads * group, Vec::new());
        for (head, square) in squares.iter().enumerate() {
            let own: Vec<f32> = of_head(head).flatten().copied().collect();
            let device = values.device();
            let through = square.apply(&Rows::new(own, dim, &device)?)?;
            let through = through.values()?;
            for (v, row) in of_head(head).zip(through.chunks_exact(group * dim)) {
                for (h, part) in row.chunks_exact(dim).enumerate() {
                    // Rounding can leave a square of nearly nothing below it.
                    let norm = dot(v, part).max(0.0).sqrt();
                    to.of_query_head[head * group + h].push(ln(norm));
                }
            }
        }
        Ok(())
    }
}

/// Of one layer's output matrix `[hidden, heads * head_dim]`.
fn squares_of(model: &dyn CausalLm, layer: usize, weight: &[f32]) -> Result<Vec<Arc<dyn Matrix>>> {
    let (spec, compute) = (model.spec(), layer_compute(model.compute(), layer));
    let (dim, hidden, group) = (spec.head_dim, spec.hidden, spec.heads / spec.kv_heads);
    let width = spec.heads * dim;
    if weight.len() != hidden * width {
        let expected = format!("[{hidden}, {width}]");
        return Err(locret_core::Error::Shape {
            what: "a model's output matrix",
            expected,
            found: format!("{} numbers", weight.len()),
        }
        .into());
    }
    let square = |head: usize| -> locret_core::Result<Vec<f32>> {
        let mut across = Vec::with_capacity(dim * hidden);
        for feature in head * dim..(head + 1) * dim {
            across.extend(weight.iter().skip(feature).step_by(width));
        }
        let rows = compute.rows(across.clone(), hidden)?;
        let matrix = compute.matrix(vec![Weight::from_f32(&across, dim, hidden)])?;
        matrix.apply(&rows)?.into_values()
    };
    (0..spec.kv_heads)
        .map(|head| {
            let of_group = (head * group..(head + 1) * group).map(square);
            let all = of_group.collect::<locret_core::Result<Vec<_>>>()?.concat();
            Ok(compute.matrix(vec![Weight::from_f32(&all, group * dim, dim)])?)
        })
        .collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Sees nothing.
struct Unwatched;

impl Probe for Unwatched {}

/// Weighs the values of what is read.
struct Values<'a> {
    factors: &'a Factors,
    lists: Vec<UnitFactors>,
}

impl Probe for Values<'_> {
    fn needs(&self) -> Needs {
        match self.factors.needed() {
            true => Needs::NOTHING.qkv(),
            false => Needs::NOTHING,
        }
    }

    fn decided(&mut self, at: &Decided<'_>) -> locret_core::Result<()> {
        let Some(qkv) = at.units.qkv() else {
            return Ok(());
        };
        let list = &mut self.lists[at.step.layer.index];
        self.factors.add(at.step, &qkv.v, list)
    }
}

/// Writes down what new tokens attend to among the prompt's units.
struct Watching {
    /// By layer: the largest logits, `[kv_heads][token]`, or sums or maxima of weights, `[heads][token]`.
    layers: Vec<Vec<Vec<f32>>>,
    prompt: usize,
    kind: LabelKind,
}

impl Probe for Watching {
    fn needs(&self) -> Needs {
        Needs::NOTHING.observe(Queries::All, self.kind.observation())
    }

    fn decided(&mut self, at: &Decided<'_>) -> locret_core::Result<()> {
        let Some(observed) = at.units.observed() else {
            return Ok(());
        };
        let so_far = &mut self.layers[at.step.layer.index];
        if so_far.is_empty() {
            let lists = observed.per_head.iter();
            *so_far = lists.map(|list| list[..self.prompt].to_vec()).collect();
            return Ok(());
        }
        for (all, list) in so_far.iter_mut().zip(&observed.per_head) {
            for (a, x) in all.iter_mut().zip(list) {
                *a = self.kind.and(*a, *x);
            }
        }
        Ok(())
    }
}
