//! The contract between the engine and a policy.
//!
//! A policy is an immutable decision-maker over data that the cache owns: it sees views and returns
//! a verdict. It holds no tensor of a sequence, so one policy serves any number of sequences, a
//! sequence can be forked or saved without asking it, and any policy works with any store.

use crate::{
    Dense, Error, Fold, Guard, KvStore, LayerSpec, LayerUnits, ModelSpec, Placement, Prefill,
    Ranking, Result, Rows, Scores, Selection, Views,
};
use serde::{Deserialize, Serialize};
use std::{fmt::Debug, sync::Arc};

/// Decides, after each layer of each step, which units stay in the cache.
///
/// Most policies are a [`Scorer`] inside an [`Evict`](crate::Evict); implement this trait when
/// what stays is not "the best-scored units".
///
/// ```
/// use locret_core::*;
///
/// /// Keeps every other unit once there are more than a thousand.
/// #[derive(Debug)]
/// struct Thin;
///
/// impl KvCachePolicy for Thin {
///     fn name(&self) -> String {
///         "thin".into()
///     }
///
///     fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
///         if !at.phase.evicts() || units.longest() <= 1000 {
///             return Ok(Verdict::keep_all());
///         }
///         let every_other = |head| (0..units.len(head) as u32).step_by(2).collect();
///         Verdict::keep((0..units.kv_heads()).map(every_other).collect())
///     }
/// }
/// ```
pub trait KvCachePolicy: Debug + Send + Sync {
    /// A short name for tables and messages.
    fn name(&self) -> String;

    /// What tells this policy from the same one with other settings, and from any other: two that could
    /// decide differently differ. What was read under one policy is taken up from a file by the same one
    /// alone.
    ///
    /// The default is its `Debug` text, which a policy that does not show all of its settings there must
    /// not rely on.
    fn fingerprint(&self) -> String {
        format!("{self:?}")
    }

    /// What the engine has to compute for this policy. What is not asked for is never computed.
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    /// Which positions attention uses once units are gone.
    fn positions(&self) -> Positions {
        Positions::Original
    }

    /// What the scores are called that this policy leaves with the units
    /// ([`Verdict::scores`]) and that it has to find with all units that are not new; `None` if it
    /// needs none. A cache whose units have no such scores refuses the policy
    /// ([`SequenceCache::set_policy`](crate::SequenceCache::set_policy)).
    fn carries(&self) -> Option<String> {
        None
    }

    /// How many numbers go with each unit of each KV head of `layer`, where any do: 1, a score, unless a
    /// policy keeps more ([`Scores::wide`]).
    fn carried_width(&self, _layer: &LayerSpec) -> usize {
        1
    }

    /// How many numbers this policy notes of each layer as a whole ([`Verdict::notes`]), whatever units are
    /// there: statistics of what was read, for instance. They are forked and saved with the sequence.
    fn noted(&self, _layer: &LayerSpec) -> usize {
        0
    }

    /// Checks the settings against a model and a way of reading, before anything is computed.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) that says what does not fit.
    fn validate(&self, _model: &ModelSpec, _prefill: &Prefill) -> Result<()> {
        Ok(())
    }

    /// An empty store for one layer.
    ///
    /// # Errors
    /// If the store cannot be made for these dimensions.
    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        Dense::boxed(layer, place)
    }

    /// The most units that a head of `layer` keeps after a chunk of a prompt, when the sequence
    /// will have `total` tokens; `None` if there is no bound.
    fn limit(&self, _layer: &LayerSpec, _total: usize) -> Option<usize> {
        None
    }

    /// What all heads of `layer` together keep after a chunk of a prompt, for plans: fewer units than
    /// `kv_heads` times [`limit`](Self::limit) where heads share a budget. Where layers share one, too
    /// (and are cut at once, [`Needs::all_layers`]), what they keep on average.
    fn held(&self, layer: &LayerSpec, total: usize) -> Option<Held> {
        Some(Held::scattered(layer.kv_heads * self.limit(layer, total)?))
    }

    /// Units beyond what is [held](Self::held) that a head may have while text is generated (on average,
    /// where heads share), before some are dropped; `None` if none are dropped then.
    fn decode_slack(&self) -> Option<usize> {
        None
    }

    /// Says what this step's queries see, if [`Needs::before`] asks to be asked. Called once for each layer of
    /// each step, before attention: `queries` are the new tokens' as attention will use them, `[tokens, heads *
    /// head_dim]`, rotated; their own units are among `units` already. Nothing is observed yet.
    ///
    /// What is not seen stays in the cache all the same: [`step`](Self::step) says what goes.
    ///
    /// # Errors
    /// Any; the sequence is then unusable.
    fn before(&self, _at: &Step, _queries: &Rows, _units: &LayerUnits<'_>) -> Result<Visible> {
        Ok(Visible::All)
    }

    /// Says what stays. Called once for each layer of each step, after attention.
    ///
    /// # Errors
    /// Any; the sequence is then unusable.
    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict>;

    /// What [`step`](Self::step) would say, if it can be said without looking at a score: that so many of each head's
    /// best units stay, by scores that they are born with. Asked for before `step`, and where there is an answer instead
    /// of it, of a layer that is computed on a device on which positions and scores can lie
    /// ([`Compute::unit_lists`](crate::Compute::unit_lists)): units are then chosen there, and nobody waits. `None`, the
    /// default, where `step` is to be asked.
    ///
    /// A policy around another one that looks at what that decides must not hand this on.
    ///
    /// # Errors
    /// Any; the sequence is then unusable.
    fn ranking(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Option<Ranking>> {
        Ok(None)
    }

    /// Says what stays in all layers at once, in a policy whose verdicts are due after the last layer
    /// ([`Needs::all_layers`], [`Needs::surprisal`]): one verdict for each layer.
    ///
    /// # Errors
    /// Any; the sequence is then unusable.
    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        let layers = at.iter().zip(units);
        layers.map(|(at, units)| self.step(at, units)).collect()
    }
}

#[deny(clippy::missing_trait_methods)]
impl<P: KvCachePolicy + ?Sized> KvCachePolicy for Arc<P> {
    fn name(&self) -> String {
        (**self).name()
    }

    fn fingerprint(&self) -> String {
        (**self).fingerprint()
    }

    fn needs(&self) -> Needs {
        (**self).needs()
    }

    fn positions(&self) -> Positions {
        (**self).positions()
    }

    fn carries(&self) -> Option<String> {
        (**self).carries()
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        (**self).carried_width(layer)
    }

    fn noted(&self, layer: &LayerSpec) -> usize {
        (**self).noted(layer)
    }

    fn validate(&self, model: &ModelSpec, prefill: &Prefill) -> Result<()> {
        (**self).validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        (**self).store(layer, place)
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        (**self).limit(layer, total)
    }

    fn held(&self, layer: &LayerSpec, total: usize) -> Option<Held> {
        (**self).held(layer, total)
    }

    fn decode_slack(&self) -> Option<usize> {
        (**self).decode_slack()
    }

    fn before(&self, at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        (**self).before(at, queries, units)
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        (**self).step(at, units)
    }

    fn ranking(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Option<Ranking>> {
        (**self).ranking(at, units)
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        (**self).steps(at, units)
    }
}

/// What a policy keeps of a layer; see [`KvCachePolicy::held`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Held {
    /// Units of all KV heads.
    pub units: usize,
    /// Whether they are the newest ones (and some at the beginning): stores of codes then free whole
    /// groups.
    pub newest: bool,
    /// Whether all layers share one budget, so that this is what they keep on average.
    pub over_layers: bool,
}

impl Held {
    /// So many units, from anywhere.
    pub fn scattered(units: usize) -> Self {
        Self {
            units,
            newest: false,
            over_layers: false,
        }
    }

    /// So many of the newest units.
    pub fn newest(units: usize) -> Self {
        Self {
            units,
            newest: true,
            over_layers: false,
        }
    }

    /// The same as the mean of layers that share one budget.
    #[must_use]
    pub fn of_all_layers(self) -> Self {
        Self {
            over_layers: true,
            ..self
        }
    }
}

/// Scores units; where most policies begin and end.
///
/// ```
/// use locret_core::*;
///
/// /// Keys with a small norm attract attention (arXiv 2406.11430).
/// #[derive(Debug)]
/// struct KeyNorm;
///
/// impl Scorer for KeyNorm {
///     fn name(&self) -> String {
///         "key-norm".into()
///     }
///
///     fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
///         units.score_heads(|head| Ok(-units.keys(head)?.into_tensor().square().sum_dim(1).sqrt()))
///     }
/// }
///
/// let policy = Evict::new(KeyNorm, Budget::Units(256)).recent(32);
/// assert_eq!(policy.name(), "key-norm");
/// ```
pub trait Scorer: Debug + Send + Sync {
    /// A short name for tables and messages.
    fn name(&self) -> String;

    /// What tells this scorer from the same one with other settings, and from any other; see
    /// [`KvCachePolicy::fingerprint`]. The default is its `Debug` text.
    fn fingerprint(&self) -> String {
        format!("{self:?}")
    }

    /// What the engine has to compute for this scorer.
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    /// Whether scores are made when a unit is born (or gathered over time) and carried with it.
    /// Then [`Scorer::score`] (or [`Scorer::carry`]) is called in every step and finds its earlier answers in
    /// [`LayerUnits::carried`]. Otherwise it is called only when something has to go, and
    /// nothing is carried.
    fn carries(&self) -> bool {
        false
    }

    /// How many numbers go with each unit, where any do: its score, which is the first one, and what else
    /// the scorer keeps of it ([`Scores::wide`]).
    fn carried_width(&self, _layer: &LayerSpec) -> usize {
        1
    }

    /// How many numbers the scorer notes of each layer as a whole; see [`KvCachePolicy::noted`]. If any,
    /// [`notes`](Self::notes) is asked in every step.
    fn noted(&self, _layer: &LayerSpec) -> usize {
        0
    }

    /// What is noted of the layer from here on, or `None` if that has not changed.
    /// [`LayerUnits::notes`] has what was noted before, here and in [`score`](Self::score).
    ///
    /// # Errors
    /// Any; the sequence is then unusable.
    fn notes(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    /// Whether newer units always score higher, for plans ([`Held::newest`]).
    fn keeps_newest(&self) -> bool {
        false
    }

    /// What the method keeps whatever its score, in a budget of `units`: see
    /// [`Evict::protecting`](crate::Evict::protecting).
    fn guard(&self, _units: usize) -> Guard {
        Guard::default()
    }

    /// Checks against a model before anything is computed.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) or [`Error::Shape`](crate::Error::Shape).
    fn validate(&self, _model: &ModelSpec) -> Result<()> {
        Ok(())
    }

    /// One score for each unit of each KV head, new units last; larger means keep.
    ///
    /// # Errors
    /// Any; the sequence is then unusable.
    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores>;

    /// The scores of the new units alone, `[new, kv_heads]`, where the layer is computed, of a scorer that
    /// [carries](Self::carries) one number with each unit, which stays what it is born with, and chooses by nothing else.
    /// Units can then be chosen without anybody waiting for a device ([`KvCachePolicy::ranking`]), and positions and
    /// carried scores should not be looked at here. `None`, the default, where [`score`](Self::score) is to be asked.
    ///
    /// # Errors
    /// Any; the sequence is then unusable.
    fn born(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Option<Rows>> {
        Ok(None)
    }

    /// What units carry on from a step in which nothing goes, if the scorer [carries](Self::carries)
    /// anything: their scores, unless these are needed only where something goes.
    ///
    /// # Errors
    /// Any; the sequence is then unusable.
    fn carry(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        self.score(at, units)
    }

    /// What the units of a head are chosen by, where that is not their `scores`: for scorers around others,
    /// which choose in two stages, or blocks of units at once; one number for each unit. `keeps` says how many
    /// each head keeps, and how many of them on its own account: where heads share a budget the others were
    /// found by `scores`, elsewhere these are none. What is protected ranks as `+∞`: what is not should stay
    /// below that.
    ///
    /// # Errors
    /// Any; the sequence is then unusable.
    fn ranks(
        &self,
        _at: &Step,
        _units: &LayerUnits<'_>,
        _scores: &Scores,
        _keeps: &[(usize, usize)],
    ) -> Result<Option<Scores>> {
        Ok(None)
    }
}

/// What the engine computes for a policy beside attention itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
#[must_use]
pub struct Needs {
    /// Queries, keys and values of new tokens before rotation ([`LayerUnits::qkv`]).
    pub qkv: bool,
    /// What the layer makes queries, keys and values from ([`LayerUnits::input`]). Not every adapter
    /// hands it along ([`ModelSpec::layer_input`]): a cache of another one refuses the policy.
    pub input: bool,
    /// The surprisal of each token ([`LayerUnits::surprisal`]). It is known only after the last
    /// layer, so that [`all_layers`](Self::all_layers) is meant, too.
    pub surprisal: bool,
    /// Every layer's verdict is asked for after the last layer
    /// ([`KvCachePolicy::steps`]), and all layers hold `budget + chunk` units at once.
    pub all_layers: bool,
    /// Attention paid by chosen queries ([`LayerUnits::observed`]); one more pass over the keys
    /// for those queries.
    pub observe: Option<Observe>,
    /// To be asked what queries see ([`KvCachePolicy::before`]). Otherwise they see everything, at no cost.
    pub before: bool,
    /// Units may be seen at one distance ([`View::far`](crate::View::far)), or elsewhere than where they lie
    /// ([`Views::placed`](crate::Views::placed)): keys then lie in the store as they were before rotation at all
    /// times, for which positions have to be [`Positions::Compact`].
    pub far: bool,
}

impl Needs {
    /// Nothing.
    pub const NOTHING: Self = Self {
        qkv: false,
        input: false,
        surprisal: false,
        all_layers: false,
        observe: None,
        before: false,
        far: false,
    };

    /// Queries, keys and values before rotation, too.
    pub const fn qkv(self) -> Self {
        Self { qkv: true, ..self }
    }

    /// The input of layers, too.
    pub const fn input(self) -> Self {
        Self {
            input: true,
            ..self
        }
    }

    /// The surprisal of tokens, too.
    pub const fn surprisal(self) -> Self {
        Self {
            surprisal: true,
            ..self
        }
    }

    /// All layers at once.
    pub const fn all_layers(self) -> Self {
        Self {
            all_layers: true,
            ..self
        }
    }

    /// Attention of these queries, too.
    pub const fn observe(self, queries: Queries, what: Observation) -> Self {
        Self {
            observe: Some(Observe { queries, what }),
            input: self.input || matches!(what, Observation::MaxWeightsByInput),
            ..self
        }
    }

    /// To be asked what queries see, too.
    pub const fn before(self) -> Self {
        Self {
            before: true,
            ..self
        }
    }

    /// To be asked what queries see, and to have units seen at one distance or elsewhere than where they lie, too.
    pub const fn far(self) -> Self {
        Self {
            before: true,
            far: true,
            ..self
        }
    }

    /// Whether verdicts come after the last layer.
    pub(crate) fn later(self) -> bool {
        self.surprisal || self.all_layers
    }

    /// What either needs.
    pub(crate) fn and(self, other: Self) -> Result<Self> {
        let observe = match (self.observe, other.observe) {
            (Some(own), Some(other)) if own != other => {
                let expected = format!("{own:?}, as the policy");
                return Err(Error::setting(
                    "observed attention",
                    expected,
                    format!("{other:?}"),
                ));
            }
            (own, other) => own.or(other),
        };
        Ok(Self {
            qkv: self.qkv || other.qkv,
            input: self.input || other.input,
            surprisal: self.surprisal || other.surprisal,
            all_layers: self.all_layers || other.all_layers,
            observe,
            before: self.before || other.before,
            far: self.far || other.far,
        })
    }
}

/// Which attention to observe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observe {
    /// Which queries of a step.
    pub queries: Queries,
    /// What of their attention.
    pub what: Observation,
}

/// Queries of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Queries {
    /// Every new token's.
    All,
    /// The last ones' (all, if there are fewer).
    Last(usize),
}

impl Queries {
    /// How many of `tokens` new tokens are chosen.
    pub fn count(self, tokens: usize) -> usize {
        match self {
            Self::All => tokens,
            Self::Last(n) => n.min(tokens),
        }
    }
}

/// What to gather of observed attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Observation {
    /// Per query head, the sum over queries of softmax weights.
    Weights,
    /// The same of units that are seen where they stand. What is seen at the one distance
    /// ([`View::far`](crate::View::far)) takes its part of the softmax and counts nothing.
    NearWeights,
    /// Per KV head, the maximum over queries and grouped heads of the pre-softmax logit.
    MaxLogits,
    /// Per query head, the maximum over queries of the softmax weight.
    MaxWeights,
    /// The same of weights that are divided by the length (the Euclidean norm) of the layer's input of the
    /// query's token: how much of it a unit's value may become. [`Needs::observe`] then asks for the
    /// [input](Needs::input), too.
    MaxWeightsByInput,
}

/// Which positions keys and queries are rotated at once units are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Positions {
    /// Every unit keeps the position that it had in the sequence. Keys are rotated once.
    #[default]
    Original,
    /// The units that are left stand at `0..n`, the newest query at `n - 1`, as the authors of
    /// Locret and of StreamingLLM do: positions never exceed the cache's length, so that a stream
    /// may be longer than anything the model was trained for.
    Compact,
}

/// Where in the work a verdict is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// A further prompt begins on a cache that is not empty. The cache can be brought back to its
    /// budget before the first chunk. No token is new: [`LayerUnits::qkv`],
    /// [`LayerUnits::observed`] and [`LayerUnits::surprisal`] are `None`.
    Turn,
    /// A chunk of a prompt was read; `last` if it is the last one before the tail.
    Prefill {
        /// Whether no further chunk follows.
        last: bool,
    },
    /// The prompt's last `local` tokens, which the published procedure reads without eviction.
    Tail,
    /// Text that is forced on the model: to score it, or to see what it attends to. Policies keep
    /// everything, as in the tail.
    Forced,
    /// A generated token.
    Decode,
}

impl Phase {
    /// Whether units are dropped in this phase by the published procedures: when a prompt begins and
    /// after its chunks, not in its tail, in text that is forced, or in what is generated.
    pub fn evicts(self) -> bool {
        matches!(self, Self::Turn | Self::Prefill { .. })
    }
}

/// Where a step stands in the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Step {
    /// The layer.
    pub layer: LayerSpec,
    /// The kind of step.
    pub phase: Phase,
    /// Tokens that the sequence had before this step.
    pub seen: usize,
    /// New tokens in this step.
    pub incoming: usize,
    /// Tokens that the sequence will have at the end of the prompt that is being read (while
    /// decoding: has now).
    pub total: usize,
}

impl Step {
    /// A step of `incoming` new tokens after `seen` ones, in a sequence that will have `total`.
    pub fn new(layer: LayerSpec, phase: Phase, seen: usize, incoming: usize, total: usize) -> Self {
        Self {
            layer,
            phase,
            seen,
            incoming,
            total,
        }
    }
}

/// What the queries of a step see of a layer; see [`KvCachePolicy::before`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Visible {
    /// Everything before them.
    #[default]
    All,
    /// What is named.
    Chosen(Views),
}

/// A policy's answer.
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct Verdict {
    /// What stays.
    pub keep: Keep,
    /// Scores to carry with the units, for all units before the verdict (they are gathered with
    /// them). `None` carries nothing.
    pub scores: Option<Scores>,
    /// What the layer has noted from here on, as many numbers as the policy says
    /// ([`KvCachePolicy::noted`]); `None` leaves it as it is.
    pub notes: Option<Vec<f32>>,
    /// Units that attention will seldom see, so that a store with a second tier may put them away
    /// ([`Spilled`](crate::Spilled)): blocks, for each its units by KV head, ascending, all of them units that were not
    /// named before. Everything else lies near at all times. Only where everything stays ([`Keep::All`]).
    pub away: Vec<Vec<Vec<u32>>>,
}

/// Which units stay.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Keep {
    /// All of them.
    All,
    /// Those that are named.
    Slots(Selection),
    /// Those that are named, after others' values were mixed into theirs.
    Merged {
        /// The units that stay.
        kept: Selection,
        /// By KV head, what is mixed into what, in units before the verdict.
        folds: Vec<Vec<Fold>>,
        /// Whether keys are mixed as values are, as they lie in the store: rotated at their own positions in
        /// [`Positions::Original`], not rotated in [`Positions::Compact`]. Only where the store does it
        /// ([`LayerUnits::folds_keys`]).
        keys: bool,
    },
}

impl Verdict {
    /// Everything stays, nothing is carried.
    pub fn keep_all() -> Self {
        Self {
            keep: Keep::All,
            scores: None,
            notes: None,
            away: Vec::new(),
        }
    }

    /// The named units of each KV head stay, nothing is carried.
    ///
    /// # Errors
    /// As [`Selection::new`].
    pub fn keep(kept: Vec<Vec<u32>>) -> Result<Self> {
        Ok(Self {
            keep: Keep::Slots(Selection::new(kept)?),
            ..Self::keep_all()
        })
    }

    /// The same verdict, with scores to carry.
    pub fn carrying(mut self, scores: Scores) -> Self {
        self.scores = Some(scores);
        self
    }

    /// The same verdict, with what is noted of the layer.
    pub fn noting(self, notes: Option<Vec<f32>>) -> Self {
        Self { notes, ..self }
    }

    /// The same verdict, with blocks of units that may be put [away](Self::away).
    pub fn putting_away(self, away: Vec<Vec<Vec<u32>>>) -> Self {
        Self { away, ..self }
    }
}
