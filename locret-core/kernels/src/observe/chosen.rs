//! The same where queries see less than everything before them.

use super::{BLOCK, Gather, SERIAL, larger};
use crate::{
    attention::{AttnShape, Loader, Seeing, TILE, hide, hide_before, scores},
    micro::pack_rows,
    rope::RopeTable,
    scratch::Scratch,
    simd::{Isa, Simd, dispatch, exp2_nonpositive, load, store},
    tiles::KvTiles,
    visible::{Tiles, View, before},
};
use rayon::prelude::*;
use std::ops::Range;

/// As [`observe_weights`](super::observe_weights), of what each query sees: weights are those of
/// [`attend_chosen`](crate::attention::attend_chosen).
///
/// # Panics
/// As the two.
pub fn observe_weights_chosen(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    seeing: Seeing<'_>,
    chosen: &[usize],
) -> Vec<Vec<f32>> {
    let call = Call::new(q, heads, shape, key_rotation, seeing, chosen);
    call.run(Isa::best(), What::Weights(Gather::Sum))
}

/// As [`observe_max_weights`](super::observe_max_weights), of what each query sees.
///
/// # Panics
/// As [`observe_weights_chosen`], and if there are not as many factors as chosen queries.
pub fn observe_max_weights_chosen(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    seeing: Seeing<'_>,
    chosen: &[usize],
    factors: Option<&[f32]>,
) -> Vec<Vec<f32>> {
    super::check_factors(chosen, factors);
    let call = Call::new(q, heads, shape, key_rotation, seeing, chosen);
    call.run(Isa::best(), What::Weights(Gather::Largest(factors)))
}

/// The same of units that a query sees where they stand: what is seen at the one distance takes its part of the
/// softmax, and counts nothing.
///
/// # Panics
/// As [`observe_weights_chosen`].
pub fn observe_near_weights_chosen(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    seeing: Seeing<'_>,
    chosen: &[usize],
) -> Vec<Vec<f32>> {
    let call = Call::new(q, heads, shape, key_rotation, seeing, chosen);
    Call {
        near_only: true,
        ..call
    }
    .run(Isa::best(), What::Weights(Gather::Sum))
}

/// As [`observe_max_logits`](super::observe_max_logits), over the queries that see a unit.
///
/// # Panics
/// As [`observe_weights_chosen`].
pub fn observe_max_logits_chosen(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    seeing: Seeing<'_>,
    chosen: &[usize],
) -> Vec<Vec<f32>> {
    let call = Call::new(q, heads, shape, key_rotation, seeing, chosen);
    call.largest_of_groups(call.run(Isa::best(), What::Logits))
}

/// What is gathered of the chosen queries' attention, by query head.
#[derive(Clone, Copy)]
enum What<'a> {
    /// Softmax weights.
    Weights(Gather<'a>),
    /// The largest scores before the softmax.
    Logits,
}

#[derive(Clone, Copy)]
struct Call<'a> {
    q: &'a [f32],
    far: &'a [f32],
    heads: &'a [&'a dyn KvTiles],
    shape: AttnShape,
    rotation: Option<&'a RopeTable>,
    seeing: Seeing<'a>,
    chosen: &'a [usize],
    /// Whether what is seen at the one distance counts nothing.
    near_only: bool,
}

impl<'a> Call<'a> {
    fn new(
        q: &'a [f32],
        heads: &'a [&'a dyn KvTiles],
        shape: AttnShape,
        rotation: Option<&'a RopeTable>,
        seeing: Seeing<'a>,
        chosen: &'a [usize],
    ) -> Self {
        shape.check(q, heads, rotation);
        seeing.check(q, heads, shape, rotation);
        super::check_chosen(shape, chosen);
        Self {
            q,
            far: seeing.far.unwrap_or_default(),
            heads,
            shape,
            rotation,
            seeing,
            chosen,
            near_only: false,
        }
    }

    /// By query head, what each unit is paid.
    fn run(&self, isa: Isa, what: What<'_>) -> Vec<Vec<f32>> {
        let shape = self.shape;
        let nothing = match what {
            What::Weights(_) => 0.0,
            What::Logits => f32::NEG_INFINITY,
        };
        let len = |head: usize| self.heads[head / shape.group()].len();
        let mut out: Vec<Vec<f32>> = (0..shape.heads)
            .map(|head| vec![nothing; len(head)])
            .collect();
        let one = |(head, out): (usize, &mut Vec<f32>)| {
            let (block, mut at) = (self.seeing.views.block(), 0);
            for part in self.chosen.chunk_by(|a, b| a / block == b / block) {
                let view = self.seeing.views.of(head, shape.heads, part[0]);
                let part = at..at + part.len();
                at = part.end;
                dispatch!(isa, s => block_of(s, self, head, view, part, what, out));
            }
        };
        let work = self.chosen.len() * shape.heads * TILE * shape.head_dim;
        if work < SERIAL || rayon::current_num_threads() == 1 {
            out.iter_mut().enumerate().for_each(one);
        } else {
            out.par_iter_mut().enumerate().with_max_len(1).for_each(one);
        }
        out
    }

    /// By KV head, the largest of its query heads'.
    fn largest_of_groups(&self, each: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
        let of_group = |group: &[Vec<f32>]| {
            let mut most = group[0].clone();
            for list in &group[1..] {
                for (most, x) in most.iter_mut().zip(list) {
                    *most = larger(*most, *x);
                }
            }
            most
        };
        each.chunks(self.shape.group()).map(of_group).collect()
    }
}

/// What some of the chosen queries, of one block, pay.
#[inline(always)]
fn block_of<S: Simd>(
    s: S,
    call: &Call<'_>,
    head: usize,
    view: &View,
    chosen: Range<usize>,
    what: What<'_>,
    out: &mut [f32],
) {
    let most = if S::LANES == 16 { BLOCK } else { 2 * S::LANES };
    for start in chosen.clone().step_by(most) {
        let part = start..(start + most).min(chosen.end);
        match part.len().div_ceil(S::LANES) {
            1 => panel::<S, 1>(s, call, head, view, part, what, out),
            2 => panel::<S, 2>(s, call, head, view, part, what, out),
            _ if S::LANES == 16 => panel::<S, 3>(s, call, head, view, part, what, out),
            _ => unreachable!("panels have at most two vectors here"),
        }
    }
}

/// A tile of a panel: its pieces, where its scores begin, and what each lane sees of it.
struct Tile {
    pieces: Vec<Range<usize>>,
    at: usize,
    units: usize,
    bounds: Option<Vec<Range<usize>>>,
    far: bool,
}

/// At most `N` vectors of queries, a query a lane.
#[inline(always)]
fn panel<S: Simd, const N: usize>(
    s: S,
    call: &Call<'_>,
    head: usize,
    view: &View,
    part: Range<usize>,
    what: What<'_>,
    out: &mut [f32],
) {
    let (shape, width, d) = (call.shape, N * S::LANES, call.shape.head_dim);
    let chosen = &call.chosen[part.clone()];
    let tiled = call.heads[head / shape.group()];
    // Lanes beyond the chosen queries repeat the last one, with no weight.
    let query = |lane: usize| chosen[lane.min(chosen.len() - 1)];
    let own = |lane: usize| tiled.len() - shape.tokens + query(lane);
    let runs = view.runs(own(0)..own(width) + 1);
    let all = [&runs.near, &runs.edge, &runs.far];
    let units: usize = all.iter().copied().flatten().map(Range::len).sum();
    let tile = TILE * d;
    let lengths = [d * width, units * width, tile, tile, tile];
    let mut memory = Scratch::for_lengths(&lengths);
    let [q, p, k_buf, v_buf, other] = memory.slices(lengths);
    let scale = match what {
        What::Weights(_) => shape.scale * std::f32::consts::LOG2_E,
        What::Logits => shape.scale,
    };
    let (mut done, mut at) = (Vec::new(), 0);
    for (way, runs) in all.into_iter().enumerate() {
        if runs.is_empty() {
            continue;
        }
        let far = way == 2;
        let loader = Loader::new(tiled, call.rotation.filter(|_| !far), d, width)
            .placed(call.seeing.views.places_of(head / shape.group()));
        let from = if far { call.far } else { call.q };
        let row = |lane: usize| &from[(query(lane) * shape.heads + head) * d..][..d];
        pack_rows(s, (0..width).map(row), scale, d, q);
        let mut tiles = Tiles::new(runs, TILE);
        while let Some(pieces) = tiles.next() {
            let units: usize = pieces.iter().map(Range::len).sum();
            let last = pieces[pieces.len() - 1].end;
            let open = match way {
                0 => last <= own(0) + 1,
                1 => false,
                _ => last <= view.window_start(own(0)),
            };
            let keys = match pieces {
                [piece] => loader.near_keys(s, piece.clone(), k_buf, other),
                _ => loader.gathered(s, pieces, k_buf, v_buf, other).0,
            };
            let p = &mut p[at * width..(at + units) * width];
            scores::<S, N>(s, d, keys, q, p);
            let bounds = (!open).then(|| {
                let of = |lane: usize| {
                    let start = before(pieces, view.window_start(own(lane)));
                    let end = before(pieces, own(lane) + 1);
                    match way {
                        0 => 0..end,
                        1 => start..end.max(start),
                        _ => 0..start,
                    }
                };
                (0..width).map(of).collect::<Vec<_>>()
            });
            if let Some(bounds) = &bounds {
                let (mut from, mut to) = ([0; 48], [0; 48]);
                for (lane, bounds) in bounds.iter().enumerate() {
                    (from[lane], to[lane]) = (bounds.start, bounds.end);
                }
                hide(p, &to[..width]);
                hide_before(p, &from[..width]);
            }
            done.push(Tile {
                pieces: pieces.to_vec(),
                at,
                units,
                bounds,
                far,
            });
            at += units;
        }
    }
    let mut share = [1.0; 48];
    if let What::Weights(gather) = what {
        softmax::<S, N>(s, p, &mut share);
        for (share, index) in share.iter_mut().zip(part) {
            *share *= gather.factor(index);
        }
    }
    for tile in done.iter().filter(|tile| !(tile.far && call.near_only)) {
        let p = &p[tile.at * width..(tile.at + tile.units) * width];
        let units = tile.pieces.iter().cloned().flatten();
        for ((k, p), unit) in p.chunks_exact(width).enumerate().zip(units) {
            for lane in 0..chosen.len() {
                let seen = tile.bounds.as_ref().is_none_or(|b| b[lane].contains(&k));
                // A row that is NaN must not reach units that it does not see.
                match (seen, what) {
                    (true, What::Weights(gather)) => {
                        out[unit] = gather.and(out[unit], p[lane] * share[lane]);
                    }
                    (true, What::Logits) => out[unit] = larger(out[unit], p[lane]),
                    _ => {}
                }
            }
        }
    }
}

/// Turns scores `[units, lanes]` in powers of two into weights, and says what a lane's are to be multiplied with.
#[inline(always)]
fn softmax<S: Simd, const N: usize>(s: S, p: &mut [f32], share: &mut [f32; 48]) {
    let width = N * S::LANES;
    let none = s.splat(f32::NEG_INFINITY);
    let (mut top, mut total) = ([none; N], [s.splat(0.0); N]);
    for p in p.chunks_exact(width) {
        for v in 0..N {
            top[v] = s.max(top[v], load(s, &p[v * S::LANES..]));
        }
    }
    for top in &mut top {
        *top = s.if_eq(*top, none, s.splat(0.0), *top);
    }
    for p in p.chunks_exact_mut(width) {
        for v in 0..N {
            let p = &mut p[v * S::LANES..];
            let weight = exp2_nonpositive(s, s.sub(load(s, p), top[v]));
            total[v] = s.add(total[v], weight);
            store(s, p, weight);
        }
    }
    for v in 0..N {
        store(s, &mut share[v * S::LANES..], s.div(s.splat(1.0), total[v]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        attention::{attend_chosen, tests::*},
        testing::{Numbers, views},
    };
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(crate::testing::cases(64))]
        /// Weights times values are the output, and with one query at a time nothing is left to chance.
        #[test]
        fn weights_are_those_of_attention(case in case(), block in 1usize..90, skip in 0usize..150) {
            let (q, keys, mut values, table) = case.data();
            let (shape, d) = (case.shape, case.shape.head_dim);
            let far = Numbers::new(case.seed ^ 1).take(q.len());
            let views = case.views(block);
            let seeing = Seeing { views: &views, far: Some(&far) };
            let chosen: Vec<usize> = (skip % shape.tokens..shape.tokens).collect();
            // One feature of all values is 1, so that its output is whether anything is seen.
            values.iter_mut().for_each(|v| v.chunks_mut(d).for_each(|v| v[0] = 1.0));
            let tiles = tiles_of(&keys, &values, d);
            let mut out = vec![0.0; q.len()];
            attend_chosen(&q, &refs(&tiles), shape, table.as_ref(), seeing, &mut out);
            for isa in Isa::all() {
                let heads = refs(&tiles);
                let call = Call::new(&q, &heads, shape, table.as_ref(), seeing, &chosen);
                let paid = call.run(isa, What::Weights(Gather::Sum));
                for (head, paid) in paid.iter().enumerate() {
                    for f in 0..d {
                        let values = values[head / shape.group()].chunks(d);
                        let sum: f64 = paid.iter().zip(values).map(|(w, v)| f64::from(w * v[f])).sum();
                        let due: f64 = chosen.iter().map(|t| f64::from(out[(t * shape.heads + head) * d + f])).sum();
                        prop_assert!((sum - due).abs() < 2e-5 * (1.0 + chosen.len() as f64), "{isa:?} {sum} {due}");
                    }
                }
            }
        }

        /// The largest of what each query pays alone.
        #[test]
        fn the_largest_weights_are_those_of_single_queries(case in case(), block in 1usize..90, skip in 0usize..150) {
            let (q, keys, values, table) = case.data();
            let (shape, d) = (case.shape, case.shape.head_dim);
            let far = Numbers::new(case.seed ^ 1).take(q.len());
            let views = case.views(block);
            let seeing = Seeing { views: &views, far: Some(&far) };
            let chosen: Vec<usize> = (skip % shape.tokens..shape.tokens).step_by(2).collect();
            let factors: Vec<f32> = Numbers::new(case.seed ^ 2).take(chosen.len()).iter().map(|x| x.abs()).collect();
            let tiles = tiles_of(&keys, &values, d);
            let heads = refs(&tiles);
            for isa in Isa::all() {
                let run = |chosen: &[usize], gather| {
                    let call = Call::new(&q, &heads, shape, table.as_ref(), seeing, chosen);
                    call.run(isa, What::Weights(gather))
                };
                let found = run(&chosen, Gather::Largest(Some(&factors)));
                let mut due: Vec<Vec<f32>> = found.iter().map(|list| vec![0.0; list.len()]).collect();
                for (token, factor) in chosen.iter().zip(&factors) {
                    let alone = run(std::slice::from_ref(token), Gather::Sum);
                    for (due, paid) in due.iter_mut().flatten().zip(alone.iter().flatten()) {
                        *due = due.max(factor * paid);
                    }
                }
                for (found, due) in found.iter().flatten().zip(due.iter().flatten()) {
                    prop_assert!((found - due).abs() < 1e-5, "{isa:?} {found} {due}");
                }
            }
        }

        #[test]
        fn logits_are_the_largest_of_those_that_are_seen(case in case(), block in 1usize..90, skip in 0usize..150) {
            let (q, keys, values, _) = case.data();
            let (shape, d) = (case.shape, case.shape.head_dim);
            let far = Numbers::new(case.seed ^ 1).take(q.len());
            let views = views(case.seed, shape.tokens, block, &case.lens, shape.group());
            let seeing = Seeing { views: &views, far: Some(&far) };
            let chosen: Vec<usize> = (skip % shape.tokens..shape.tokens).step_by(3).collect();
            let tiles = tiles_of(&keys, &values, d);
            let heads = refs(&tiles);
            let mut due: Vec<Vec<f64>> = case.lens.iter().map(|n| vec![f64::NEG_INFINITY; *n]).collect();
            for token in &chosen {
                for head in 0..shape.heads {
                    let (store, view) = (head / shape.group(), views.of(head, shape.heads, *token));
                    let own = case.lens[store] - shape.tokens + token;
                    for unit in 0..=own {
                        let within = |ranges: &[Range<u32>]| ranges.iter().any(|r| r.contains(&(unit as u32)));
                        let near = within(&view.ranges) || view.columns.contains(&(unit as u32)) || own - unit < view.window;
                        let q = match (near, within(&view.far)) {
                            (true, _) => &q,
                            (false, true) => &far,
                            _ => continue,
                        };
                        let q = &q[(token * shape.heads + head) * d..][..d];
                        let pairs = q.iter().zip(&keys[store][unit * d..]);
                        let dot: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        let dot = dot * f64::from(shape.scale);
                        due[store][unit] = due[store][unit].max(dot);
                    }
                }
            }
            for isa in Isa::all() {
                let call = Call::new(&q, &heads, shape, None, seeing, &chosen);
                let found = call.largest_of_groups(call.run(isa, What::Logits));
                for (found, due) in found.iter().flatten().zip(due.iter().flatten()) {
                    let found = f64::from(*found);
                    prop_assert!(found == *due || (found - due).abs() < 1e-5 * (1.0 + due.abs()), "{isa:?} {found} {due}");
                }
            }
        }
    }
}
