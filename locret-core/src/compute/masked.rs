//! Burn's operations where queries see less than everything before them: all scores, and masks.
//!
//! Nothing is saved by what is not seen. It is here so that every policy runs on every device.

use super::{
    Attention, Ops, Rows, Sight,
    ops::{Gather, grouped},
};
use crate::{Observation, Observe, Observed, Result, Survey, View, Views, host};
use burn::tensor::{Bool, Device, Tensor, TensorData, activation::softmax};
use std::ops::Range;

/// Queries of a block: bounds the score matrices to `group · BLOCK · units`.
const BLOCK: usize = 256;

/// A score that weighs nothing, and is a number even where all scores of a row are such.
const HIDDEN: f32 = -1e30;

/// How one query sees the units of its KV head.
#[derive(Clone, Copy, PartialEq)]
enum Seen {
    Near,
    Far,
    Not,
}

/// What the query whose own unit is `own` sees of `len` units.
fn row(view: &View, own: usize, len: usize) -> Vec<Seen> {
    let mut row = vec![Seen::Not; len];
    let mut mark = |range: &Range<u32>, how| {
        let range = range.start as usize..(range.end as usize).min(own + 1);
        if let Some(row) = row.get_mut(range) {
            row.fill(how);
        }
    };
    for range in &view.far {
        mark(range, Seen::Far);
    }
    for range in &view.ranges {
        mark(range, Seen::Near);
    }
    for unit in &view.columns {
        mark(&(*unit..unit + 1), Seen::Near);
    }
    row[(own + 1).saturating_sub(view.window)..=own].fill(Seen::Near);
    row
}

/// Masks `[group, block, units]` of what is not seen and of what is seen at one distance, for some queries of a
/// KV head.
struct Masks {
    hidden: Tensor<3, Bool>,
    far: Option<Tensor<3, Bool>>,
}

impl Masks {
    fn new(
        views: &Views,
        over: &Attention<'_>,
        head: usize,
        queries: Range<usize>,
        tokens: usize,
        device: &Device,
    ) -> Self {
        let (g, len) = (over.layer.group(), over.store.len(head));
        let mut seen = Vec::with_capacity(g * queries.len() * len);
        for h in head * g..(head + 1) * g {
            for token in queries.clone() {
                let view = views.of(h, over.layer.heads, token);
                seen.extend(row(view, len - tokens + token, len));
            }
        }
        let mask = |what: Seen| {
            let mask: Vec<bool> = seen.iter().map(|seen| *seen == what).collect();
            let data = TensorData::new(mask, [g, queries.len(), len]);
            Tensor::<3, Bool>::from_data(data, device)
        };
        Self {
            hidden: mask(Seen::Not),
            far: seen.contains(&Seen::Far).then(|| mask(Seen::Far)),
        }
    }
}

/// Scores of some queries of one KV head, `[group, block, units]`, and the mask of what they do not see.
struct Scored {
    scores: Tensor<3>,
    hidden: Tensor<3, Bool>,
    /// Of what is seen, what is seen at the one distance.
    far: Option<Tensor<3, Bool>>,
}

impl Scored {
    /// 0 for what is not seen, also in a row that sees nothing.
    fn weights(self) -> Tensor<3> {
        let Self { scores, hidden, .. } = self;
        let scores = scores.mask_fill(hidden.clone(), HIDDEN);
        softmax(scores, 2).mask_fill(hidden, 0.0)
    }

    /// What is observed of them.
    fn paid(self, what: Observation) -> Tensor<3> {
        match what {
            Observation::NearWeights => self.near_weights(),
            _ => self.weights(),
        }
    }

    /// 0 for what is seen at the one distance, too.
    fn near_weights(mut self) -> Tensor<3> {
        let far = self.far.take();
        let weights = self.weights();
        match far {
            Some(far) => weights.mask_fill(far, 0.0),
            None => weights,
        }
    }
}

/// What the scores of a KV head are made of.
struct Head<'a> {
    over: &'a Attention<'a>,
    sight: Sight<'a>,
    head: usize,
    /// `[group, tokens, head_dim]`
    q: Tensor<3>,
    far: Option<Tensor<3>>,
    /// `[1, head_dim, units]`
    keys: Tensor<3>,
    plain: Option<Tensor<3>>,
}

impl<'a> Head<'a> {
    fn new(
        ops: &Ops,
        q: &Tensor<2>,
        over: &'a Attention<'a>,
        sight: Sight<'a>,
        head: usize,
    ) -> Result<Self> {
        let (g, d) = (over.layer.group(), over.layer.head_dim);
        let across = |keys: Tensor<2>| keys.transpose().unsqueeze::<3>();
        let far = sight.far.map(|far| grouped(&far.tensor(), head, g, d));
        let plain = match far {
            Some(_) => Some(across(over.store.keys(head)?.into_tensor())),
            None => None,
        };
        let places = sight.views.places().map(|places| &places[head][..]);
        Ok(Self {
            over,
            sight,
            head,
            q: grouped(q, head, g, d),
            far,
            keys: across(ops.rotated_keys(over, head, places)?),
            plain,
        })
    }

    fn scored(&self, queries: Range<usize>) -> Scored {
        let part = |q: &Tensor<3>, keys: &Tensor<3>| {
            let q = q.clone().narrow(1, queries.start, queries.len());
            q.matmul(keys.clone()).mul_scalar(self.over.scale)
        };
        let (tokens, device) = (self.q.dims()[1], self.q.device());
        let masks = Masks::new(
            self.sight.views,
            self.over,
            self.head,
            queries.clone(),
            tokens,
            &device,
        );
        let scores = part(&self.q, &self.keys);
        let scores = match (&self.far, &self.plain, &masks.far) {
            (Some(far), Some(plain), Some(mask)) => {
                scores.mask_where(mask.clone(), part(far, plain))
            }
            _ => scores,
        };
        Scored {
            scores,
            hidden: masks.hidden,
            far: masks.far,
        }
    }
}

/// The queries from `first` on, block by block.
fn blocks(first: usize, tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let starts = (first..tokens).step_by(BLOCK);
    starts.map(move |start| start..(start + BLOCK).min(tokens))
}

impl Ops {
    pub(super) fn attend_masked(
        &self,
        q: Rows,
        over: &Attention<'_>,
        sight: Sight<'_>,
    ) -> Result<Rows> {
        let (g, d, t) = (over.layer.group(), over.layer.head_dim, q.rows());
        let q = q.into_tensor();
        let mut out = Vec::with_capacity(over.layer.kv_heads);
        for index in 0..over.layer.kv_heads {
            let head = Head::new(self, &q, over, sight, index)?;
            let values = over.store.values(index)?.into_tensor().unsqueeze::<3>();
            let parts = blocks(0, t).map(|queries| {
                let n = queries.len();
                let weights = head.scored(queries).weights();
                let part = weights.matmul(values.clone());
                part.swap_dims(0, 1).reshape([n, g * d])
            });
            out.push(Tensor::cat(parts.collect(), 0));
        }
        Ok(Tensor::cat(out, 1).into())
    }

    pub(super) fn observe_masked(
        &self,
        q: &Rows,
        over: &Attention<'_>,
        sight: Sight<'_>,
        what: Observe,
        gather: &Gather<'_>,
    ) -> Result<Observed> {
        let t = q.rows();
        let queries = what.queries.count(t);
        let (q, mut per_head) = (q.tensor(), Vec::new());
        for index in 0..over.layer.kv_heads {
            let head = Head::new(self, &q, over, sight, index)?;
            let n = over.store.len(index);
            let mut all: Option<Tensor<2>> = None;
            for part in blocks(t - queries, t) {
                let first = part.start - (t - queries);
                let scored = head.scored(part);
                let part = match gather.logits() {
                    true => {
                        let scores = scored.scores.mask_fill(scored.hidden, f32::NEG_INFINITY);
                        gather.largest(scores)
                    }
                    false => gather.weights(scored.paid(what.what), first),
                };
                all = Some(gather.and(all, part));
            }
            per_head.extend(gather.lists(all, n)?);
        }
        Ok(Observed {
            per_head,
            queries,
            what: what.what,
        })
    }

    pub(super) fn survey_all(&self, q: &Rows, over: &Attention<'_>, last: usize) -> Result<Survey> {
        let (g, t) = (over.layer.group(), q.rows());
        let blocks_of = Views::new(t.max(1), vec![vec![View::all()]; over.layer.kv_heads]);
        let sight = Sight {
            views: &blocks_of,
            far: None,
        };
        let q = q.tensor();
        let mut survey = Survey {
            units: Vec::new(),
            distances: Vec::new(),
        };
        for index in 0..over.layer.kv_heads {
            let head = Head::new(self, &q, over, sight, index)?;
            let n = over.store.len(index);
            let [mut units, mut distances] = [(); 2].map(|()| vec![vec![0.0; n]; g]);
            for queries in blocks(t.saturating_sub(last), t) {
                let first = n - t + queries.start;
                let weights = host::into_f32(head.scored(queries.clone()).weights())?;
                for (at, row) in weights.chunks_exact(n).enumerate() {
                    let (h, own) = (at / queries.len(), first + at % queries.len());
                    for (unit, weight) in row[..=own].iter().enumerate() {
                        units[h][unit] += weight;
                        distances[h][own - unit] += weight;
                    }
                }
            }
            survey.units.extend(units);
            survey.distances.extend(distances);
        }
        Ok(survey)
    }
}
