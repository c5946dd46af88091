//! What a policy is shown of a layer, and what it answers with.

use crate::{
    Attention, Compute, Error, KvStore, LayerSpec, Observation, Result, RopeTable, Rotation, Rows,
    TableRows,
    engine::{Lists, Rope},
    host, stores,
};
use burn::tensor::Tensor;
use std::ops::Range;

/// Queries, keys and values of new tokens in one layer, **before** rotation.
///
/// Token-major, as projections produce them: no head axis, no batch axis. Tokens of several sequences
/// stand one below the other.
#[derive(Debug, Clone)]
pub struct Qkv {
    /// `[tokens, heads * head_dim]`
    pub q: Rows,
    /// `[tokens, kv_heads * head_dim]`
    pub k: Rows,
    /// `[tokens, kv_heads * head_dim]`
    pub v: Rows,
    input: Option<Rows>,
}

impl Qkv {
    /// Queries, keys and values: tensors, or [`Rows`].
    pub fn new(q: impl Into<Rows>, k: impl Into<Rows>, v: impl Into<Rows>) -> Self {
        Self {
            q: q.into(),
            k: k.into(),
            v: v.into(),
            input: None,
        }
    }

    /// Hands along what they are made from, `[tokens, hidden]`: the hidden state after the normalisation
    /// before attention. For adapters that say so in [`ModelSpec::layer_input`].
    ///
    /// [`ModelSpec::layer_input`]: crate::ModelSpec::layer_input
    #[must_use]
    pub fn made_from(self, input: impl Into<Rows>) -> Self {
        Self {
            input: Some(input.into()),
            ..self
        }
    }

    /// What [`made_from`](Self::made_from) was told.
    pub(crate) fn take_input(&mut self) -> Option<Rows> {
        self.input.take()
    }

    /// The same, where `compute` computes.
    pub(crate) fn moved_to(self, compute: &dyn Compute) -> Result<Self> {
        let input = self.input.map(|input| input.moved_to(compute));
        Ok(Self {
            q: self.q.moved_to(compute)?,
            k: self.k.moved_to(compute)?,
            v: self.v.moved_to(compute)?,
            input: input.transpose()?,
        })
    }

    /// Checks that these are `tokens` tokens of a layer, with their input if it is due.
    pub(crate) fn check(
        &self,
        layer: &LayerSpec,
        tokens: usize,
        hidden: Option<usize>,
    ) -> Result<()> {
        self.q.expect("q", [tokens, layer.heads * layer.head_dim])?;
        self.k
            .expect("k", [tokens, layer.kv_heads * layer.head_dim])?;
        self.v
            .expect("v", [tokens, layer.kv_heads * layer.head_dim])?;
        let what = "the input of a layer";
        match (&self.input, hidden) {
            (Some(input), Some(hidden)) => input.expect(what, [tokens, hidden]),
            (None, Some(hidden)) => Err(Error::shape(what, [tokens, hidden], "none")),
            (Some(input), None) => {
                let expected = "none, as `ModelSpec::layer_input` does not say so";
                Err(Error::shape(what, expected, input.shape()))
            }
            (None, None) => Ok(()),
        }
    }

    /// Those of some tokens.
    pub(crate) fn slice(&self, tokens: Range<usize>) -> Result<Self> {
        let input = self.input.as_ref();
        Ok(Self {
            q: self.q.slice(tokens.clone())?,
            k: self.k.slice(tokens.clone())?,
            v: self.v.slice(tokens.clone())?,
            input: input.map(|input| input.slice(tokens)).transpose()?,
        })
    }
}

/// Attention that chosen queries of a step paid, gathered because
/// [`Needs::observe`](crate::Needs) asked for it.
#[derive(Debug, Clone)]
pub struct Observed {
    /// For weights: per **query** head, per unit, the sum over the chosen queries of the softmax
    /// weight (of those that see the unit where it stands, for near ones), or the largest of them. For logits: per
    /// **KV** head, per unit, the maximum over the chosen queries and the
    /// query heads of the group of `softmax_scale · q·k` (`-∞` where no chosen query sees it).
    pub per_head: Vec<Vec<f32>>,
    /// How many queries were chosen; they are the last ones of the step.
    pub queries: usize,
    /// What `per_head` holds.
    pub what: Observation,
}

impl Observed {
    /// For each unit of its KV head, the sum over the chosen queries of the softmax weight that
    /// **query** head `head` paid. Those of KV head `j` are `j * group..(j + 1) * group`.
    ///
    /// # Errors
    /// [`Error::Setting`] if neither [`Observation::Weights`] nor [`Observation::NearWeights`] was asked for, or
    /// there is no such head.
    pub fn weights(&self, head: usize) -> Result<&[f32]> {
        let what = match self.what {
            Observation::NearWeights => Observation::NearWeights,
            _ => Observation::Weights,
        };
        self.list(what, "query head", head)
    }

    /// For each unit of **KV** head `head`, the maximum over the chosen queries and the query heads
    /// of the group of `softmax_scale · q·k`; `-∞` where no chosen query sees it.
    ///
    /// # Errors
    /// [`Error::Setting`] if something else than [`Observation::MaxLogits`] was asked for, or there is no such
    /// head.
    pub fn max_logits(&self, head: usize) -> Result<&[f32]> {
        self.list(Observation::MaxLogits, "KV head", head)
    }

    /// For each unit of its KV head, the largest softmax weight that a chosen query of **query** head `head`
    /// gave it, 0 where none sees it; divided by the length of what the query's token was made from, if
    /// [`Observation::MaxWeightsByInput`] was asked for.
    ///
    /// # Errors
    /// [`Error::Setting`] if none of the two was asked for, or there is no such head.
    pub fn max_weights(&self, head: usize) -> Result<&[f32]> {
        let what = match self.what {
            Observation::MaxWeightsByInput => self.what,
            _ => Observation::MaxWeights,
        };
        self.list(what, "query head", head)
    }

    fn list(&self, what: Observation, which: &'static str, head: usize) -> Result<&[f32]> {
        if self.what != what {
            return Err(Error::setting(
                "observed attention",
                format!("{what:?}, asked for in `Needs::observe`"),
                format!("{:?}", self.what),
            ));
        }
        let list = self.per_head.get(head).map(Vec::as_slice);
        list.ok_or_else(|| Error::setting(which, format!("below {}", self.per_head.len()), head))
    }
}

/// Where the attention of a step's last queries goes, by unit and by distance: [`LayerUnits::survey`].
#[derive(Debug, Clone, PartialEq)]
pub struct Survey {
    /// Per **query** head, per unit of its KV head: the sum over the queries of the softmax weight.
    pub units: Vec<Vec<f32>>,
    /// Per **query** head, per distance in units from a query to what it looks at (0: to itself): the sum over
    /// the queries of the softmax weight. As many as there are units.
    pub distances: Vec<Vec<f32>>,
}

/// What a policy sees of one layer: every unit that is in its cache now, the new ones last.
///
/// Units of a KV head are numbered from 0 in sequence order. Lengths can differ between heads
/// where a budget is ragged.
#[derive(Debug)]
pub struct LayerUnits<'a> {
    pub(crate) layer: LayerSpec,
    pub(crate) incoming: usize,
    pub(crate) lists: &'a Lists,
    pub(crate) notes: &'a [f32],
    pub(crate) store: &'a dyn KvStore,
    pub(crate) rope: &'a Rope,
    /// Where the next token stands, if not behind all units.
    pub(crate) next: Option<usize>,
    pub(crate) rotation: Option<&'a RopeTable>,
    pub(crate) scale: f32,
    pub(crate) compute: &'a dyn Compute,
    pub(crate) qkv: Option<&'a Qkv>,
    pub(crate) input: Option<&'a Rows>,
    pub(crate) surprisal: Option<&'a [f32]>,
    pub(crate) observed: Option<&'a Observed>,
    /// Before attention, where units may be seen at one distance: queries that were not rotated.
    pub(crate) plain: Option<&'a Rows>,
    /// Which of the store's units these are, if not all.
    pub(crate) picked: Option<&'a [Vec<u32>]>,
    /// Where units stood for this step's queries, by KV head, if not where they lie.
    pub(crate) places: Option<&'a [Vec<u32>]>,
}

/// Some units of a layer, or all of them with other numbers: [`LayerUnits::part`],
/// [`LayerUnits::carrying`].
#[derive(Debug)]
pub struct Part<'a> {
    of: &'a LayerUnits<'a>,
    /// `None` for those that are seen anyway.
    units: Option<&'a Selection>,
    lists: Lists,
    observed: Option<Observed>,
    /// `None` for what was noted of the layer anyway.
    notes: Option<&'a [f32]>,
}

impl<'a> Part<'a> {
    /// As if this had been noted of the layer.
    #[must_use]
    pub fn noting(self, notes: &'a [f32]) -> Self {
        Self {
            notes: Some(notes),
            ..self
        }
    }

    /// As a policy sees them.
    pub fn units(&self) -> LayerUnits<'_> {
        LayerUnits {
            lists: &self.lists,
            notes: self.notes.unwrap_or(self.of.notes),
            observed: self.observed.as_ref().or(self.of.observed),
            picked: self.units.map(Selection::heads).or(self.of.picked),
            ..*self.of
        }
    }
}

/// What the cache keeps of one KV head's units beside keys and values.
#[derive(Debug, Clone, Default)]
pub(crate) struct HeadMeta {
    /// Original positions, ascending.
    pub(crate) positions: Vec<u32>,
    /// Carried scores; either empty or those of each unit that has been scored, unit by unit.
    pub(crate) scores: Vec<f32>,
}

impl<'a> LayerUnits<'a> {
    /// The layer.
    pub fn layer(&self) -> &LayerSpec {
        &self.layer
    }

    /// KV heads.
    pub fn kv_heads(&self) -> usize {
        self.lists.kv_heads()
    }

    /// Units that `head` holds, the new ones included.
    ///
    /// # Panics
    /// Here and below, for a head that the layer does not have.
    pub fn len(&self, head: usize) -> usize {
        self.lists.len(head)
    }

    /// Whether no head holds anything.
    pub fn is_empty(&self) -> bool {
        self.longest() == 0
    }

    /// The most units that a head holds.
    pub fn longest(&self) -> usize {
        self.lists.longest()
    }

    /// How many of the units are new in this step: the last ones of every head.
    pub fn incoming(&self) -> usize {
        self.incoming
    }

    /// Positions in the original sequence of the units of `head`, ascending.
    ///
    /// # Panics
    /// Here and in [`carried`](Self::carried), in [`KvCachePolicy::ranking`](crate::KvCachePolicy::ranking) alone, if
    /// they lie on a device that fails.
    pub fn positions(&self, head: usize) -> &'a [u32] {
        &self.lists.heads()[head].positions
    }

    /// The scores that earlier verdicts left with the units of `head`: one for each unit that is
    /// not new (`len - incoming`), or as many as the policy says
    /// ([`carried_width`](crate::KvCachePolicy::carried_width)), unit by unit; or none at all.
    pub fn carried(&self, head: usize) -> &'a [f32] {
        &self.lists.heads()[head].scores
    }

    /// What earlier verdicts noted of this layer as a whole ([`Verdict::notes`](crate::Verdict::notes)); nothing at
    /// first.
    pub fn notes(&self) -> &'a [f32] {
        self.notes
    }

    /// The position at which attention will have the token that comes next: behind all units of `head` in
    /// [`Positions::Compact`](crate::Positions::Compact), behind all of the text elsewhere.
    pub fn next_position(&self, head: usize) -> usize {
        self.next.unwrap_or_else(|| self.store.len(head))
    }

    /// The angles at which attention rotates queries and keys that stand at `positions`: row 0 is the first of them.
    pub fn angles(&self, positions: Range<usize>) -> RopeTable {
        self.rope.range(positions)
    }

    /// The factor on `q · k` before softmax.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// What computes, for scores of one's own.
    pub fn compute(&self) -> &'a dyn Compute {
        self.compute
    }

    /// Where the attention of the last `last` of `queries` goes, if they see everything before them: for
    /// policies that choose what queries see ([`KvCachePolicy::before`](crate::KvCachePolicy::before)).
    ///
    /// # Errors
    /// Those of [`Compute::survey`].
    pub fn survey(&self, queries: &Rows, last: usize) -> Result<Survey> {
        if self.picked.is_some() {
            return Err(Error::NotSupported {
                operation: "sums of attention to some units",
                implementer: "this view".into(),
            });
        }
        let over = Attention {
            layer: self.layer,
            store: self.store,
            scale: self.scale,
            rotation: self.rotation,
            sight: None,
        };
        self.compute.survey(queries, &over, last)
    }

    /// The keys of `head`, `[units, head_dim]`, rotated as attention saw them in this step.
    ///
    /// # Errors
    /// If the store cannot hand them out.
    pub fn keys(&self, head: usize) -> Result<Rows> {
        if let Some(picked) = self.picked {
            let all: Vec<u32> = (0..picked[head].len() as u32).collect();
            return self.keys_at(head, &all);
        }
        let keys = self.store.keys(head)?;
        match self.rotation {
            Some(table) => {
                let places = self.places.map(|places| &places[head][..]);
                let by = Rotation::placed(table, self.layer.head_dim, places);
                self.compute.rotate(keys, &by)
            }
            None => Ok(keys),
        }
    }

    /// The keys of some units of `head`, `[units, head_dim]`, as they lie in the store: not rotated yet, if
    /// units are seen at one distance ([`Needs::far`](crate::Needs::far)).
    ///
    /// # Errors
    /// If the store cannot hand them out; [`Error::Shape`] for units that are not there.
    pub fn stored_keys(&self, head: usize, units: &[u32]) -> Result<Rows> {
        match self.picked {
            None => self.store.keys_at(head, units),
            Some(picked) => {
                stores::check_units(units, self.len(head))?;
                let units: Vec<u32> = units.iter().map(|u| picked[head][*u as usize]).collect();
                self.store.keys_at(head, &units)
            }
        }
    }

    /// The keys of some units of `head`, `[units, head_dim]`, rotated as attention saw them in this step.
    ///
    /// # Errors
    /// As [`stored_keys`](Self::stored_keys).
    pub fn keys_at(&self, head: usize, units: &[u32]) -> Result<Rows> {
        let keys = self.stored_keys(head, units)?;
        let Some(table) = self.rotation else {
            return Ok(keys);
        };
        let at = |unit: &u32| match self.picked {
            None => *unit,
            Some(picked) => picked[head][*unit as usize],
        };
        let stands = |unit: u32| match self.places {
            None => unit,
            Some(places) => places[head][unit as usize],
        };
        let rows: Vec<u32> = units.iter().map(at).map(stands).collect();
        let by = Rotation {
            table,
            head_dim: self.layer.head_dim,
            rows: TableRows::Each(&rows),
            inverse: false,
        };
        self.compute.rotate(keys, &by)
    }

    /// The same layer as if it held some of its units alone, its new ones among them, and as if these carried other
    /// numbers (for all units that are not new, or none): for policies around others that are to judge these. What is
    /// seen of a unit is as it is: its keys are rotated as attention saw them.
    ///
    /// # Errors
    /// [`Error::Setting`] for units that do not ascend, are not there, or lack new ones; [`Error::NotSupported`] for a
    /// part of a part.
    pub fn part(&'a self, units: &'a Selection, carried: Vec<Vec<f32>>) -> Result<Part<'a>> {
        if self.picked.is_some() {
            return Err(Error::NotSupported {
                operation: "a part of a part of a layer's units",
                implementer: "this view".into(),
            });
        }
        let lists = units.heads();
        let lens = (0..self.kv_heads()).map(|head| self.len(head));
        stores::check_retain(lists, lens)?;
        let mut heads = Vec::with_capacity(lists.len());
        for (head, (list, scores)) in lists.iter().zip(carried).enumerate() {
            let old = self.len(head) - self.incoming;
            let new = list.iter().filter(|unit| **unit as usize >= old).count();
            if new != self.incoming {
                let expected = format!("all {} new units", self.incoming);
                return Err(Error::setting("part of a layer's units", expected, new));
            }
            let positions = list.iter().map(|u| self.positions(head)[*u as usize]);
            heads.push(HeadMeta {
                positions: positions.collect(),
                scores,
            });
        }
        let observed = self.observed.map(|all| {
            let group = all.per_head.len() / lists.len().max(1);
            let pick = |(head, paid): (usize, &Vec<f32>)| {
                let list = &lists[head / group.max(1)];
                list.iter().map(|unit| paid[*unit as usize]).collect()
            };
            Observed {
                per_head: all.per_head.iter().enumerate().map(pick).collect(),
                ..*all
            }
        });
        Ok(Part {
            of: self,
            units: Some(units),
            lists: Lists::of(heads),
            observed,
            notes: None,
        })
    }

    /// The same units as if they carried other numbers (by KV head, for all that are not new, or none): for scorers
    /// around others, which keep more of a unit than the scorer inside does.
    pub fn carrying(&'a self, carried: Vec<Vec<f32>>) -> Part<'a> {
        let heads = self
            .lists
            .heads()
            .iter()
            .zip(carried)
            .map(|(head, scores)| HeadMeta {
                positions: head.positions.clone(),
                scores,
            });
        Part {
            of: self,
            units: None,
            lists: Lists::of(heads.collect()),
            observed: None,
            notes: None,
        }
    }

    /// The new tokens' queries as they meet units that are seen `distance` away
    /// ([`Views::far_at`](crate::Views::far_at)), `[tokens, heads * head_dim]`; keys are then taken as they lie in
    /// the store. Only for [`before`](crate::KvCachePolicy::before), where [`Needs::far`](crate::Needs::far) is
    /// asked for.
    ///
    /// # Errors
    /// [`Error::NotSupported`] elsewhere, [`Error::Device`].
    pub fn queries_at(&self, distance: usize) -> Result<Rows> {
        let queries = self.plain.ok_or_else(|| Error::NotSupported {
            operation: "queries at one distance (`Needs::far`, before attention)",
            implementer: "this view".into(),
        })?;
        let head_dim = self.layer.head_dim;
        self.rope
            .at_distance(queries.clone(), distance, head_dim, self.compute)
    }

    /// The values of `head`, `[units, head_dim]`.
    ///
    /// # Errors
    /// If the store cannot hand them out.
    pub fn values(&self, head: usize) -> Result<Rows> {
        let values = self.store.values(head)?;
        match self.picked {
            None => Ok(values),
            Some(picked) => stores::picked(&values, &picked[head]),
        }
    }

    /// Whether keys can be mixed as values can ([`Keep::Merged`](crate::Keep::Merged)).
    pub fn folds_keys(&self) -> bool {
        self.store.folds_keys()
    }

    /// The new tokens' queries, keys and values before rotation, if [`Needs::qkv`] asked for them.
    /// `None` in [`Phase::Turn`], where no token is new.
    ///
    /// [`Needs::qkv`]: crate::Needs::qkv
    /// [`Phase::Turn`]: crate::Phase::Turn
    pub fn qkv(&self) -> Option<&'a Qkv> {
        self.qkv
    }

    /// What the layer made the new tokens' queries, keys and values from, `[tokens, hidden]`, if
    /// [`Needs::input`] asked for it. `None` in [`Phase::Turn`], where no token is new.
    ///
    /// [`Needs::input`]: crate::Needs::input
    /// [`Phase::Turn`]: crate::Phase::Turn
    pub fn input(&self) -> Option<&'a Rows> {
        self.input
    }

    /// `-ln p(token | tokens before it)` of each new token, if [`Needs::surprisal`] asked for it.
    /// A token without a prediction (the first of the sequence) has NaN. `None` in
    /// [`Phase::Turn`].
    ///
    /// [`Needs::surprisal`]: crate::Needs::surprisal
    /// [`Phase::Turn`]: crate::Phase::Turn
    pub fn surprisal(&self) -> Option<&'a [f32]> {
        self.surprisal
    }

    /// The attention that [`Needs::observe`] asked for. `None` in [`Phase::Turn`], where no query
    /// is there to pay any.
    ///
    /// [`Needs::observe`]: crate::Needs::observe
    /// [`Phase::Turn`]: crate::Phase::Turn
    pub fn observed(&self) -> Option<&'a Observed> {
        self.observed
    }

    /// Scores by an expression over one head at a time: `f` returns `[units]` for each head, or
    /// `[units, 1]` as a reduction over the features leaves it.
    ///
    /// # Errors
    /// Those of `f`, [`Error::Shape`] for anything but one number a unit, and as
    /// [`Scores::per_head`].
    pub fn score_heads<const D: usize>(
        &self,
        mut f: impl FnMut(usize) -> Result<Tensor<D>>,
    ) -> Result<Scores> {
        let mut all = Vec::with_capacity(self.kv_heads());
        for head in 0..self.kv_heads() {
            let (scores, units) = (f(head)?, self.len(head));
            let dims = scores.dims();
            if dims[0] != units || dims[1..].iter().any(|d| *d != 1) {
                return Err(Error::shape("scores of a KV head", [units, 1], dims));
            }
            all.push(host::into_f32(scores)?);
        }
        Scores::per_head(all)
    }
}

/// One score per unit of each KV head; larger means keep. Or several numbers per unit, for policies that keep
/// more than that.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    lists: Vec<Vec<f32>>,
    width: usize,
    first: usize,
}

impl Scores {
    /// From one list per KV head.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a NaN: it has no rank. Infinities are allowed.
    pub fn per_head(scores: Vec<Vec<f32>>) -> Result<Self> {
        Self::wide(1, scores)
    }

    /// `width` numbers for each unit, from one list per KV head, unit by unit.
    ///
    /// # Errors
    /// [`Error::Setting`] for a width of 0, [`Error::Shape`] for a list of another length than whole units have,
    /// [`Error::NotFinite`] for a NaN.
    pub fn wide(width: usize, lists: Vec<Vec<f32>>) -> Result<Self> {
        if width == 0 {
            return Err(Error::setting("numbers of a unit", "at least 1", 0));
        }
        for (head, list) in lists.iter().enumerate() {
            if !list.len().is_multiple_of(width) {
                let expected = format!("a multiple of {width}");
                return Err(Error::shape("numbers of a KV head", expected, list.len()));
            }
            if let Some(at) = list.iter().position(|s| s.is_nan()) {
                return Err(Error::NotFinite {
                    what: "a score",
                    at: format!("KV head {head}, unit {}", at / width),
                });
            }
        }
        Ok(Self {
            lists,
            width,
            first: 0,
        })
    }

    /// Says that the lists begin with unit `first` of each head: those before it keep what they carry. So a long
    /// cache's numbers need not be gone through for every token.
    #[must_use]
    pub fn after(self, first: usize) -> Self {
        Self { first, ..self }
    }

    /// The unit that the lists begin with.
    pub fn first(&self) -> usize {
        self.first
    }

    /// The same list for every KV head.
    ///
    /// # Errors
    /// As [`Scores::per_head`].
    pub fn shared(scores: Vec<f32>, kv_heads: usize) -> Result<Self> {
        Self::per_head(vec![scores; kv_heads])
    }

    /// Numbers of a unit.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The scores of one KV head, unit by unit.
    pub fn head(&self, head: usize) -> &[f32] {
        &self.lists[head]
    }

    /// All scores, by KV head.
    pub fn heads(&self) -> &[Vec<f32>] {
        &self.lists
    }

    /// The lists themselves.
    pub fn into_inner(self) -> Vec<Vec<f32>> {
        self.lists
    }
}

/// Which units stay: for each KV head their numbers, ascending and unique.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection(Vec<Vec<u32>>);

impl Selection {
    /// From one list per KV head.
    ///
    /// # Errors
    /// [`Error::Setting`] if a list is not strictly ascending.
    pub fn new(kept: Vec<Vec<u32>>) -> Result<Self> {
        for (head, list) in kept.iter().enumerate() {
            if let Some(at) = list.windows(2).position(|w| w[0] >= w[1]) {
                return Err(Error::setting(
                    "selection",
                    "strictly ascending unit numbers",
                    format!("{} after {} in KV head {head}", list[at + 1], list[at]),
                ));
            }
        }
        Ok(Self(kept))
    }

    /// The kept units of one KV head.
    pub fn head(&self, head: usize) -> &[u32] {
        &self.0[head]
    }

    /// All lists, by KV head.
    pub fn heads(&self) -> &[Vec<u32>] {
        &self.0
    }
}
