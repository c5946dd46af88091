//! What a policy evicts is put away, and comes back when queries ask for it.

use crate::blocks;
use locret_core::{
    Error, Held, Keep, KvCachePolicy, KvStore, LayerSpec, LayerUnits, ModelSpec, Needs,
    Observation, Observe, Placement, Positions, Prefill, Queries, Ranking, Result, Rows, Scores,
    Selection, Step, Verdict, View, Views, Visible,
};
use std::{borrow::Cow, ops::Range};

/// Any policy that evicts, of whose units none is lost: what it would drop becomes blocks of `block` units of a KV
/// head, in the order in which they go, and each step's queries see, beside what the policy keeps, the `topk` blocks of
/// their head that are most like them. The lookup is [`InfLlm`](crate::InfLlm)'s: a block's representative is, for each
/// query head, the mean of its `representatives` keys that got most attention while they were near; its score is the
/// inner product with the mean of the step's queries, summed over the query heads.
///
/// The policy inside is shown what is near and nothing else, and judges as if the rest were gone. In a
/// [`Tiered`](crate::Tiered) store the rest lies in the second tier.
///
/// **Cost:** memory and files grow with the text, as [`Full`](crate::Full)'s do; attention is to what the policy
/// keeps, up to `topk + 1` blocks, and a step's own units, and one more pass over these for the sums of attention. With
/// each unit go those of the policy inside and one more than there are query heads in a group, or what the
/// representatives take; each step goes through those of all units.
///
/// **Positions:** those of the policy inside. With compact ones, what a head's queries see stands closely before them
/// ([`Views::placed`]), as if the rest had been dropped, and the lookup is between keys and queries at one distance, as
/// InfLLM's is. With original ones a unit stands where it stood in the text, which should not be longer than what the
/// model was trained for, and the lookup is as attention would be. With all blocks retrieved both are the full cache.
///
/// **Memory:** [`within`](Self::within) says how many units a step may see; without it `topk` blocks come on top of what
/// is near. With it there are fewer blocks, or none, while many tokens are read at once, when retrieving is worth least,
/// and more for a question and for the answer.
///
/// Policies that merge, or that choose themselves what queries see, cannot be inside.
#[derive(Debug, Clone)]
#[must_use]
pub struct PutAway<P> {
    inner: P,
    block: usize,
    topk: usize,
    representatives: usize,
    within: Option<usize>,
}

/// A unit that is near.
const NEAR: f32 = 0.0;

/// A unit that the policy has let go of, and that waits for a block to be full; still near.
const WAITS: f32 = -1.0;

impl<P: KvCachePolicy> PutAway<P> {
    /// `inner`, with blocks of 32 units, of which 8 are retrieved by 4 keys each.
    pub fn new(inner: P) -> Self {
        Self {
            inner,
            block: 32,
            topk: 8,
            representatives: 4,
            within: None,
        }
    }

    /// Units of a block.
    pub fn block(self, block: usize) -> Self {
        Self { block, ..self }
    }

    /// Blocks of each KV head that are retrieved.
    pub fn topk(self, topk: usize) -> Self {
        Self { topk, ..self }
    }

    /// Keys of a block that its representative is the mean of.
    pub fn representatives(self, representatives: usize) -> Self {
        Self {
            representatives,
            ..self
        }
    }

    /// The most units of a KV head that a step sees, its own tokens among them: so many of the `topk` blocks are
    /// retrieved as there is room for.
    pub fn within(self, units: usize) -> Self {
        Self {
            within: Some(units),
            ..self
        }
    }

    /// The most units of a KV head that are seen beside a step's own tokens and what the policy inside keeps.
    pub fn seen(&self) -> usize {
        self.topk.saturating_add(1).saturating_mul(self.block)
    }

    /// Whether what is seen stands closely together.
    fn compact(&self) -> bool {
        self.inner.positions() == Positions::Compact
    }

    /// Where a unit's numbers are.
    fn layout(&self, layer: &LayerSpec) -> Layout {
        let inner = match self.inner.carries() {
            Some(_) => self.inner.carried_width(layer),
            None => 0,
        };
        Layout {
            inner,
            own: blocks::width(layer, self.block),
        }
    }

    /// What a KV head's queries see.
    fn view(
        &self,
        at: &Step,
        queries: &[f32],
        units: &LayerUnits<'_>,
        head: usize,
    ) -> Result<Option<Vec<Range<u32>>>> {
        let layout = self.layout(&at.layer);
        let marks = layout.marks(units.carried(head));
        let (near, blocks) = parts(&marks, at.incoming);
        if blocks.is_empty() {
            return Ok(None);
        }
        let each = at.layer.group() * at.layer.head_dim;
        let mean = &queries[head * each..(head + 1) * each];
        let score = |block: &Vec<u32>| {
            let own = layout.representative(units.carried(head), block, each);
            own.zip(mean).map(|(k, q)| k * q).sum()
        };
        let scores: Vec<f32> = blocks.iter().map(score).collect();
        let seen: usize = near.iter().map(ExactSizeIterator::len).sum();
        let room = self
            .within
            .map_or(usize::MAX, |most| most.saturating_sub(seen));
        let topk = self.topk.min(room / self.block).min(blocks.len());
        let chosen = units.compute().select(&scores, topk, &[])?;
        let mut ranges = near;
        for block in chosen {
            ranges.extend(runs(&blocks[block as usize]));
        }
        Ok(Some(ranges))
    }

    /// The step's queries as they look blocks up.
    fn looking<'q>(
        &self,
        at: &Step,
        queries: &'q Rows,
        units: &LayerUnits<'_>,
    ) -> Result<Cow<'q, Rows>> {
        if !self.compact() {
            return Ok(Cow::Borrowed(queries));
        }
        // As far away as what is near reaches.
        let near = |head| {
            let marks = self.layout(&at.layer).marks(units.carried(head));
            marks.iter().filter(|mark| **mark <= NEAR).count()
        };
        let distance = (0..units.kv_heads()).map(near).max().unwrap_or_default();
        units.queries_at(distance).map(Cow::Owned)
    }

    /// The verdict, from what the policy inside says of what is near.
    fn answer(
        &self,
        at: &Step,
        units: &LayerUnits<'_>,
        near: &Selection,
        verdict: Verdict,
    ) -> Result<Verdict> {
        let (layout, heads) = (self.layout(&at.layer), units.kv_heads());
        let Verdict {
            keep,
            scores,
            notes,
            ..
        } = verdict;
        let broken = |found: &str| Error::policy(self.name(), found);
        let kept = match keep {
            Keep::All => None,
            Keep::Slots(kept) => Some(kept),
            _ => return Err(broken("the policy inside merges units")),
        };
        if scores
            .as_ref()
            .is_some_and(|scores| scores.heads().len() != heads)
            || kept
                .as_ref()
                .is_some_and(|kept| kept.heads().len() != heads)
        {
            return Err(broken("the policy inside answers for other KV heads"));
        }
        let (mut lists, mut away) = (Vec::with_capacity(heads), Vec::new());
        for head in 0..heads {
            let near = near.head(head);
            let mut numbers = units.carried(head).to_vec();
            numbers.resize(units.len(head) * layout.width(), 0.0);
            self.pay(at, units, head, near, &mut numbers)?;
            if let Some(scores) = &scores {
                let (first, list) = (scores.first(), scores.head(head));
                if layout.inner != scores.width()
                    || list.len() != near.len().saturating_sub(first) * layout.inner
                {
                    return Err(broken("the policy inside scores other units"));
                }
                let new = list.chunks_exact(layout.inner.max(1));
                for (unit, new) in near.iter().skip(first).zip(new) {
                    layout.of(&mut numbers, *unit)[..layout.inner].copy_from_slice(new);
                }
            }
            if let Some(kept) = &kept {
                let mut kept = kept.head(head).iter().peekable();
                for (slot, unit) in near.iter().enumerate() {
                    if kept.next_if(|kept| **kept as usize == slot).is_none() {
                        layout.of(&mut numbers, *unit)[layout.inner] = WAITS;
                    }
                }
                if kept.next().is_some() {
                    return Err(broken("the policy inside keeps units that are not there"));
                }
            }
            for block in self.blocks(at, units, head, &mut numbers)? {
                let mut of_all = vec![Vec::new(); heads];
                of_all[head] = block;
                away.push(of_all);
            }
            lists.push(numbers);
        }
        let numbers = Scores::wide(layout.width(), lists)?;
        Ok(Verdict::keep_all()
            .carrying(numbers)
            .noting(notes)
            .putting_away(away))
    }

    /// Adds up what the query heads of a KV head have paid to what is near.
    fn pay(
        &self,
        at: &Step,
        units: &LayerUnits<'_>,
        head: usize,
        near: &[u32],
        numbers: &mut [f32],
    ) -> Result<()> {
        let (layout, group) = (self.layout(&at.layer), at.layer.group());
        let Some(observed) = units.observed() else {
            return Ok(());
        };
        let waits = layout.marks(numbers).into_iter().enumerate();
        let waits = waits.filter(|(_, mark)| *mark == WAITS);
        let all: Vec<u32> = (near.iter().copied())
            .chain(waits.map(|(unit, _)| unit as u32))
            .collect();
        for query in 0..group {
            let paid = observed.weights(head * group + query)?;
            for unit in &all {
                let own = layout.of(numbers, *unit);
                own[layout.inner + 1 + query] += paid[*unit as usize];
            }
        }
        Ok(())
    }

    /// Makes blocks of what waits, and writes their representatives.
    fn blocks(
        &self,
        at: &Step,
        units: &LayerUnits<'_>,
        head: usize,
        numbers: &mut [f32],
    ) -> Result<Vec<Vec<u32>>> {
        let layout = self.layout(&at.layer);
        let marks = layout.marks(numbers);
        let made = marks.iter().copied().fold(0.0, f32::max);
        let waits = |unit: &u32| marks[*unit as usize] == WAITS;
        let waiting: Vec<u32> = (0..marks.len() as u32).filter(waits).collect();
        let mut blocks = Vec::new();
        for (index, block) in waiting.chunks_exact(self.block).enumerate() {
            let keys = match self.compact() {
                true => units.stored_keys(head, block)?,
                false => units.keys_at(head, block)?,
            };
            let keys = keys.values()?;
            let mut means = Vec::with_capacity(at.layer.group() * at.layer.head_dim);
            for query in 0..at.layer.group() {
                let own = layout.inner + 1 + query;
                let paid: Vec<f32> = (block.iter())
                    .map(|unit| layout.of(numbers, *unit)[own])
                    .collect();
                means.extend(blocks::representative(
                    units,
                    &keys,
                    &paid,
                    self.representatives,
                )?);
            }
            let mut parts = means.chunks(layout.own);
            for unit in block {
                let own = layout.of(numbers, *unit);
                own[layout.inner] = made + 1.0 + index as f32;
                let (part, rest) = (
                    parts.next().unwrap_or_default(),
                    &mut own[layout.inner + 1..],
                );
                rest.fill(0.0);
                rest[..part.len()].copy_from_slice(part);
            }
            blocks.push(block.to_vec());
        }
        Ok(blocks)
    }

    /// What is near of each KV head, and what it carries of the policy inside.
    fn near(&self, at: &Step, units: &LayerUnits<'_>) -> Result<(Selection, Vec<Vec<f32>>)> {
        blocks::check_whole(self.name(), at, units)?;
        let layout = self.layout(&at.layer);
        let (mut near, mut carried) = (Vec::new(), Vec::new());
        for head in 0..units.kv_heads() {
            let all = units.carried(head);
            let (old, n) = (units.len(head) - units.incoming(), units.len(head));
            let marks = layout.marks(all);
            let kept = |unit: &u32| marks.get(*unit as usize).is_none_or(|mark| *mark == NEAR);
            let list: Vec<u32> = (0..n as u32).filter(kept).collect();
            let own = list.iter().filter(|unit| (**unit as usize) < old);
            let own = own.flat_map(|unit| {
                let first = *unit as usize * layout.width();
                &all[first..first + layout.inner]
            });
            carried.push(own.copied().collect());
            near.push(list);
        }
        Ok((Selection::new(near)?, carried))
    }
}

/// How a unit's numbers lie: those of the policy inside, which block it is in, and what was paid to it or a part of its
/// block's representative.
#[derive(Debug, Clone, Copy)]
struct Layout {
    inner: usize,
    own: usize,
}

impl Layout {
    fn width(self) -> usize {
        self.inner + 1 + self.own
    }

    fn of(self, numbers: &mut [f32], unit: u32) -> &mut [f32] {
        let width = self.width();
        &mut numbers[unit as usize * width..][..width]
    }

    /// By unit: [`NEAR`], [`WAITS`], or the number of its block from 1 on.
    fn marks(self, numbers: &[f32]) -> Vec<f32> {
        let units = numbers.chunks_exact(self.width());
        units.map(|unit| unit[self.inner]).collect()
    }

    /// The numbers of a block's representative, of which there are `count`.
    fn representative<'a>(
        self,
        numbers: &'a [f32],
        block: &'a [u32],
        count: usize,
    ) -> impl Iterator<Item = &'a f32> {
        let parts = block.iter().flat_map(move |unit| {
            let first = *unit as usize * self.width() + self.inner + 1;
            &numbers[first..first + self.own]
        });
        parts.take(count)
    }
}

/// Ranges of what is near or waits, new units among them, and the units of each block.
fn parts(marks: &[f32], incoming: usize) -> (Vec<Range<u32>>, Vec<Vec<u32>>) {
    let (mut near, mut blocks): (Vec<Range<u32>>, Vec<Vec<u32>>) = Default::default();
    let new = std::iter::repeat_n(&NEAR, incoming);
    for (unit, mark) in marks.iter().chain(new).enumerate() {
        let unit = unit as u32;
        if *mark > NEAR {
            let block = *mark as usize - 1;
            if blocks.len() <= block {
                blocks.resize(block + 1, Vec::new());
            }
            blocks[block].push(unit);
            continue;
        }
        match near.last_mut() {
            Some(last) if last.end == unit => last.end += 1,
            _ => near.push(unit..unit + 1),
        }
    }
    (near, blocks)
}

/// Where each of `len` units stands if those in `ranges`, the newest among them, follow each other up to the last one.
fn closely(ranges: &[Range<u32>], len: usize) -> Vec<u32> {
    let mut seen = vec![false; len];
    for range in ranges {
        seen[range.start as usize..range.end as usize].fill(true);
    }
    let unseen = seen.iter().filter(|seen| !**seen).count();
    let mut next = unseen as u32;
    let place = |seen| {
        let place = next.min(len.saturating_sub(1) as u32);
        next += u32::from(seen);
        place
    };
    seen.into_iter().map(place).collect()
}

/// Ascending units as ranges.
fn runs(units: &[u32]) -> impl Iterator<Item = Range<u32>> + '_ {
    let runs = units.chunk_by(|a, b| a + 1 == *b);
    runs.map(|run| run[0]..run[0] + run.len() as u32)
}

#[deny(clippy::missing_trait_methods)]
impl<P: KvCachePolicy> KvCachePolicy for PutAway<P> {
    fn name(&self) -> String {
        format!("{} put away", self.inner.name())
    }

    fn fingerprint(&self) -> String {
        let Self {
            inner,
            block,
            topk,
            representatives,
            within,
        } = self;
        let inner = inner.fingerprint();
        format!(
            "PutAway {{ inner: {inner}, block: {block}, topk: {topk}, representatives: {representatives}, within: {within:?} }}"
        )
    }

    fn needs(&self) -> Needs {
        let needs = self.inner.needs();
        let needs = match self.compact() {
            true => needs.far(),
            false => needs.before(),
        };
        match needs.observe {
            // What it looks at is what counts here, too.
            Some(Observe {
                what: Observation::Weights,
                ..
            }) => needs,
            _ => needs.observe(Queries::All, Observation::Weights),
        }
    }

    fn positions(&self) -> Positions {
        self.inner.positions()
    }

    fn carries(&self) -> Option<String> {
        let inner = self.inner.carries().unwrap_or_else(|| "nothing".into());
        let Self {
            block,
            representatives,
            ..
        } = self;
        Some(format!(
            "{inner}, and blocks of {block} by {representatives} keys"
        ))
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        self.layout(layer).width()
    }

    fn noted(&self, layer: &LayerSpec) -> usize {
        self.inner.noted(layer)
    }

    fn validate(&self, model: &ModelSpec, prefill: &Prefill) -> Result<()> {
        blocks::check_sizes(self.block, self.topk, self.representatives)?;
        let needs = self.inner.needs();
        let observed = needs.observe.map(|observe| observe.what);
        if needs.before || observed.is_some_and(|what| what != Observation::Weights) {
            return Err(Error::setting(
                "policy whose units are put away",
                "one that lets queries see everything, and looks at weights if at anything",
                self.inner.name(),
            ));
        }
        self.inner.validate(model, prefill)
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        self.inner.store(layer, place)
    }

    fn limit(&self, _layer: &LayerSpec, _total: usize) -> Option<usize> {
        None
    }

    fn held(&self, _layer: &LayerSpec, _total: usize) -> Option<Held> {
        None
    }

    fn decode_slack(&self) -> Option<usize> {
        None
    }

    fn before(&self, at: &Step, queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        blocks::check_whole(self.name(), at, units)?;
        let mean = blocks::mean(&*self.looking(at, queries, units)?)?;
        let seen = (0..units.kv_heads()).map(|head| self.view(at, &mean, units, head));
        let seen = seen.collect::<Result<Vec<_>>>()?;
        if seen.iter().all(Option::is_none) {
            return Ok(Visible::All);
        }
        let places = seen.iter().zip(0..).map(|(seen, head)| {
            let all = std::iter::once(0..units.len(head) as u32);
            let ranges = seen.clone().unwrap_or_else(|| all.collect());
            closely(&ranges, units.len(head))
        });
        let places = places.collect();
        let lists = seen.into_iter().map(|ranges| {
            vec![match ranges {
                Some(ranges) => View {
                    ranges,
                    ..View::default()
                },
                None => View::all(),
            }]
        });
        let views = Views::new(at.incoming, lists.collect());
        Ok(Visible::Chosen(match self.compact() {
            true => views.placed(places),
            false => views,
        }))
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let (near, carried) = self.near(at, units)?;
        let part = units.part(&near, carried)?;
        let verdict = self.inner.step(at, &part.units())?;
        self.answer(at, units, &near, verdict)
    }

    /// What is put away is chosen here, by verdicts.
    fn ranking(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Option<Ranking>> {
        Ok(None)
    }

    fn steps(&self, at: &[Step], units: &[LayerUnits<'_>]) -> Result<Vec<Verdict>> {
        let layers = || at.iter().zip(units);
        let near = layers().map(|(at, units)| self.near(at, units));
        let (near, carried): (Vec<_>, Vec<_>) =
            near.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let parts = units.iter().zip(&near).zip(carried);
        let parts = parts.map(|((units, near), carried)| units.part(near, carried));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let shown: Vec<LayerUnits<'_>> = parts.iter().map(|part| part.units()).collect();
        let verdicts = self.inner.steps(at, &shown)?;
        let all = layers().zip(&near).zip(verdicts);
        all.map(|(((at, units), near), verdict)| self.answer(at, units, near, verdict))
            .collect()
    }
}
