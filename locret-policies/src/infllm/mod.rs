//! InfLLM: everything is kept, and each block of queries fetches the distant blocks that it needs (arXiv
//! 2402.04617).

use crate::blocks;
use locret_core::{
    Error, KvCachePolicy, LayerSpec, LayerUnits, ModelSpec, Needs, Observation, Positions, Prefill,
    Queries, Result, Rows, Scores, Step, Verdict, View, Views, Visible,
};
use std::ops::Range;

/// InfLLM (arXiv 2402.04617 §3), training-free memory for texts longer than a model was trained for.
///
/// **Keeps** everything. Units that leave the window of the newest `local` ones become *blocks* of `block` units, but
/// for the first `init` ones, which are always seen. A block is remembered by a *representative* of each query head:
/// the mean of its `representatives` keys that got most attention while they were in the window. An execution block
/// of queries sees the window where it stands and, all at the distance of the window's edge, the beginning, what has
/// left the window without filling a block, and the `topk` blocks whose representatives are most like the mean of
/// its queries; one set of blocks for all heads of a layer. One softmax goes over all of it.
///
/// Blocks are named to the store ([`Verdict::away`]), which may put them away: inside a
/// [`Tiered`](crate::Tiered) only the window, what is always seen and a bounded number of blocks are resident.
///
/// **Cost:** a step's attention is to at most `init + local + (topk + 1) · block` units and its own, and one more pass
/// over these for the sums of attention. With each unit go as many numbers as a KV head has query heads: what they
/// paid, and later the representative.
///
/// **Chunked prefill:** a chunk is an execution block, so it has at most [`exec_block`](Self::exec_block) tokens (512
/// as published); longer ones are refused, since retrieval by the mean of other queries is another method. The
/// authors feed the prompt's last token alone, as `Prefill::new(512, 1)` does. Text that is forced on the model is an
/// execution block, however long.
///
/// **Differs from the authors' code** in one thing: there, the mask that is to keep the two parts of a block's
/// attention apart hides nothing, so that its first queries see up to `exec_block - 1` units at the window's edge
/// twice. Here, as in the paper, a unit is seen once.
///
/// Rotary embeddings with LongRoPE's factors are used as the model has them; the authors ignore such factors.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct InfLlm {
    init: usize,
    local: usize,
    block: usize,
    topk: usize,
    representatives: usize,
    exec_block: usize,
}

impl Default for InfLlm {
    fn default() -> Self {
        Self::new()
    }
}

impl InfLlm {
    /// As published: the first 128 units, the newest 4096, 16 blocks of 128 with 4 keys each in their
    /// representatives, execution blocks of 512.
    pub fn new() -> Self {
        Self {
            init: 128,
            local: 4096,
            block: 128,
            topk: 16,
            representatives: 4,
            exec_block: 512,
        }
    }

    /// The published sizes, of 6,400 units, scaled to another number: that many units of each KV head are seen
    /// beside a step's own tokens (but 4 at least). A fiftieth each for the beginning and a block, a third for
    /// retrieved blocks, the rest for the window. Blocks have 16 units where there is room for some: smaller ones
    /// would take much of their size again for the representative.
    pub fn within(units: usize) -> Self {
        let published = Self::new();
        let block = (units / 50).max(16).min((units / 4).max(1));
        let (init, topk) = (units / 50, (units * 8 / 25 / block).max(1));
        Self {
            init,
            local: units.saturating_sub(init + (topk + 1) * block).max(1),
            block,
            topk,
            representatives: published.representatives.min(block),
            ..published
        }
    }

    /// First units, which are always seen.
    pub fn init(self, init: usize) -> Self {
        Self { init, ..self }
    }

    /// Newest units, which are seen where they stand.
    pub fn local(self, local: usize) -> Self {
        Self { local, ..self }
    }

    /// Units of a block.
    pub fn block(self, block: usize) -> Self {
        Self { block, ..self }
    }

    /// Blocks that are retrieved.
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

    /// The most tokens of a chunk.
    pub fn exec_block(self, exec_block: usize) -> Self {
        Self { exec_block, ..self }
    }

    /// The most units of a KV head that are seen beside a step's own tokens.
    pub fn seen(&self) -> usize {
        let blocks = self.topk.saturating_add(1).saturating_mul(self.block);
        self.init.saturating_add(self.local).saturating_add(blocks)
    }

    /// The most tokens of a chunk.
    pub fn longest_chunk(&self) -> usize {
        self.exec_block
    }

    /// Where a sequence of `n` units has its parts.
    fn parts(&self, n: usize) -> Parts {
        let left = n.saturating_sub(self.local);
        let init = left.min(self.init);
        Parts {
            init,
            blocks: (left - init) / self.block,
            block: self.block,
        }
    }

    /// The blocks that are most like the mean query, ascending.
    fn retrieve(
        &self,
        at: &Step,
        units: &LayerUnits<'_>,
        parts: &Parts,
        mean: &[f32],
    ) -> Result<Vec<u32>> {
        let width = self.carried_width(&at.layer);
        let each = at.layer.group() * at.layer.head_dim;
        let mut scores = vec![0.0; parts.blocks];
        for (head, mean) in mean.chunks_exact(each).enumerate() {
            let carried = units.carried(head);
            for (block, score) in scores.iter_mut().enumerate() {
                let first = parts.units(block).start * width;
                let own = &carried[first..first + each];
                *score += own.iter().zip(mean).map(|(k, q)| k * q).sum::<f32>();
            }
        }
        units.compute().select(&scores, self.topk, &[])
    }

    /// For each query head of a KV head, the mean of the keys of a block that got most attention.
    fn representative(
        &self,
        at: &Step,
        units: &LayerUnits<'_>,
        head: usize,
        block: Range<usize>,
        paid: &[f32],
    ) -> Result<Vec<f32>> {
        let width = self.carried_width(&at.layer);
        let block: Vec<u32> = (block.start as u32..block.end as u32).collect();
        let keys = units.stored_keys(head, &block)?;
        let keys = keys.values()?;
        let mut all = Vec::with_capacity(at.layer.group() * at.layer.head_dim);
        for query in 0..at.layer.group() {
            let paid: Vec<f32> = paid.iter().skip(query).step_by(width).copied().collect();
            let own = blocks::representative(units, &keys, &paid, self.representatives)?;
            all.extend(own);
        }
        Ok(all)
    }
}

/// Parts of a sequence: the beginning, blocks, and what may still be in the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parts {
    init: usize,
    blocks: usize,
    block: usize,
}

impl Parts {
    /// The units of a block.
    fn units(&self, block: usize) -> Range<usize> {
        let first = self.init + block * self.block;
        first..first + self.block
    }

    /// The first unit that is in no block.
    fn rest(&self) -> usize {
        self.init + self.blocks * self.block
    }
}

impl KvCachePolicy for InfLlm {
    fn name(&self) -> String {
        "infllm".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
            .far()
            .observe(Queries::All, Observation::NearWeights)
    }

    fn positions(&self) -> Positions {
        Positions::Compact
    }

    fn carries(&self) -> Option<String> {
        let Self {
            init,
            local,
            block,
            representatives,
            ..
        } = self;
        Some(format!(
            "infllm: {init} first, {local} newest, blocks of {block} by {representatives} keys"
        ))
    }

    fn carried_width(&self, layer: &LayerSpec) -> usize {
        blocks::width(layer, self.block)
    }

    fn validate(&self, _model: &ModelSpec, prefill: &Prefill) -> Result<()> {
        let settings = [
            ("local window", self.local),
            ("execution block", self.exec_block),
        ];
        if let Some((what, _)) = settings.into_iter().find(|(_, size)| *size == 0) {
            return Err(Error::setting(what, "at least 1", 0));
        }
        blocks::check_sizes(self.block, self.topk, self.representatives)?;
        if prefill.chunk > self.exec_block {
            return Err(Error::setting(
                "chunk of infllm",
                format!("at most {} tokens, an execution block", self.exec_block),
                prefill.chunk,
            ));
        }
        Ok(())
    }

    fn before(&self, at: &Step, _queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        blocks::check_whole(self.name(), at, units)?;
        let n = at.seen + at.incoming;
        if n <= self.local {
            return Ok(Visible::All);
        }
        let parts = self.parts(at.seen);
        let distance = self.local - 1;
        let blocks = match parts.blocks <= self.topk {
            true => (0..parts.blocks as u32).collect(),
            false => {
                let queries = units.queries_at(distance)?;
                self.retrieve(at, units, &parts, &blocks::mean(&queries)?)?
            }
        };
        let narrow = |range: Range<usize>| range.start as u32..range.end as u32;
        let blocks = blocks.into_iter().map(|block| parts.units(block as usize));
        let far = std::iter::once(0..parts.init)
            .chain(blocks)
            .chain(std::iter::once(parts.rest()..n));
        let view = View {
            window: self.local,
            far: far.filter(|range| !range.is_empty()).map(narrow).collect(),
            ..View::default()
        };
        let views = Views::new(at.incoming, vec![vec![view]; units.kv_heads()]);
        Ok(Visible::Chosen(views.far_at(distance)))
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        blocks::check_whole(self.name(), at, units)?;
        let width = self.carried_width(&at.layer);
        let (before, n) = (self.parts(at.seen), at.seen + at.incoming);
        let after = self.parts(n);
        // What is in a block has been judged.
        let first = before.rest();
        let mut lists = Vec::with_capacity(units.kv_heads());
        for head in 0..units.kv_heads() {
            let mut numbers = units.carried(head)[first * width..].to_vec();
            numbers.resize((n - first) * width, 0.0);
            if let Some(observed) = units.observed() {
                for query in 0..at.layer.group() {
                    let paid = observed.weights(head * at.layer.group() + query)?;
                    let own = numbers.iter_mut().skip(query).step_by(width);
                    own.zip(&paid[first..]).for_each(|(own, paid)| *own += paid);
                }
            }
            for block in before.blocks..after.blocks {
                let block = after.units(block);
                let own = (block.start - first) * width..(block.end - first) * width;
                let of_block = &numbers[own.clone()];
                let mut made = self.representative(at, units, head, block, of_block)?;
                made.resize(own.len(), 0.0);
                numbers[own].copy_from_slice(&made);
            }
            lists.push(numbers);
        }
        let away = (before.blocks..after.blocks).map(|block| {
            let units_of = after.units(block);
            let list: Vec<u32> = (units_of.start as u32..units_of.end as u32).collect();
            vec![list; units.kv_heads()]
        });
        let numbers = Scores::wide(width, lists)?.after(first);
        Ok(Verdict::keep_all()
            .carrying(numbers)
            .putting_away(away.collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_sizes_scale_to_a_budget() {
        let published = InfLlm::new();
        assert_eq!(published.seen(), 6400);
        assert_eq!(InfLlm::within(6400), published);
        for units in 4..9000 {
            let policy = InfLlm::within(units);
            assert_eq!(policy.seen(), units, "{policy:?}");
            assert!(policy.representatives <= policy.block && policy.local >= units / 4);
        }
    }

    /// The authors' procedure, which moves units from a list to another as they leave.
    #[test]
    fn parts_are_those_of_units_that_leave_one_by_one() {
        for (init, local, block) in [(3, 7, 4), (0, 5, 3), (8, 2, 1)] {
            let policy = InfLlm::new().init(init).local(local).block(block);
            for step in 1..6 {
                let (mut n, mut first, mut blocks, mut rest) = (0, 0, 0, 0);
                for _ in 0..40 {
                    n += step;
                    rest += step;
                    if first < init && rest > local {
                        let moved = (init - first).min(rest - local);
                        first += moved;
                        rest -= moved;
                    }
                    while rest >= local + block {
                        blocks += 1;
                        rest -= block;
                    }
                    let parts = policy.parts(n);
                    assert_eq!((parts.init, parts.blocks), (first, blocks), "{n}");
                    assert_eq!(parts.rest(), n - rest);
                }
            }
        }
    }
}
