//! What attention pays to each unit, for policies and training labels that ask.
//!
//! Only the chosen queries are computed, in blocks: memory is `block × units`, never
//! `queries × units`.

mod chosen;

pub use chosen::{
    observe_max_logits_chosen, observe_max_weights_chosen, observe_near_weights_chosen,
    observe_weights_chosen,
};

use super::{
    attention::{
        AttnShape, FEW_TILE, Loader, SERIAL, TILE, dot_scores, heads_at_once, hide, scores,
    },
    micro::{pack_rows, panels},
    rope::RopeTable,
    scratch::Scratch,
    simd::{Isa, Simd, dispatch, exp2_nonpositive, load, store},
    tiles::{Floats, KvTiles, each_type},
};
use rayon::prelude::*;
use std::ops::Range;

/// For each **query head**, for each unit: the sum over the chosen queries of the softmax weight
/// that the query gives it; `[heads][units of its KV head]`.
///
/// Inputs are those of [`attend`](super::attention::attend); `chosen` are numbers of queries
/// (`0..tokens`), strictly ascending. A query gives nothing to units that it does not see. A row
/// of scores with a NaN or `+∞` makes NaN of all units that its query sees.
///
/// # Panics
/// As `attend`, and if `chosen` is not strictly ascending numbers of queries.
pub fn observe_weights(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    chosen: &[usize],
) -> Vec<Vec<f32>> {
    let call = Call::new(q, heads, shape, key_rotation, chosen);
    weights_with(Isa::best(), &call)
}

/// For each **query head**, for each unit: the largest softmax weight that one of the chosen queries gives it, 0
/// where none sees it; `[heads][units of its KV head]`. `factors`, one for each chosen query and none of them
/// negative, are multiplied to its weights before.
///
/// Inputs as for [`observe_weights`], and a NaN goes as far.
///
/// # Panics
/// As [`observe_weights`], and if there are not as many factors as chosen queries.
pub fn observe_max_weights(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    chosen: &[usize],
    factors: Option<&[f32]>,
) -> Vec<Vec<f32>> {
    let call = Call::new(q, heads, shape, key_rotation, chosen).largest(factors);
    weights_with(Isa::best(), &call)
}

/// For each **KV head**, for each unit: the largest `scale · q·k` over the chosen queries that see
/// it and the query heads of the group, before softmax; `[kv_heads][units]`, `-∞` where no chosen
/// query sees the unit, NaN where one of the products is.
///
/// Inputs as for [`observe_weights`].
///
/// # Panics
/// As [`observe_weights`].
pub fn observe_max_logits(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    chosen: &[usize],
) -> Vec<Vec<f32>> {
    max_logits_with(Isa::best(), q, heads, shape, key_rotation, chosen)
}

/// Up to this many chosen queries are handled with features in lanes.
const FEW: usize = 5;

/// Chosen queries in a task are a multiple of this, which fills panels of any instruction set.
const BLOCK: usize = 48;

/// Units in a task where units are independent of each other: whole tiles.
const PIECE: usize = 5 * TILE;

/// Units in a task of few queries: whole tiles.
const FEW_PIECE: usize = 8 * FEW_TILE;

#[derive(Clone, Copy)]
struct Call<'a> {
    q: &'a [f32],
    heads: &'a [&'a dyn KvTiles],
    shape: AttnShape,
    rotation: Option<&'a RopeTable>,
    chosen: &'a [usize],
    /// What becomes of the weights that a unit gets.
    gather: Gather<'a>,
    /// Whether the calling thread does all.
    serial: bool,
}

/// What becomes of the weights that a unit gets from the chosen queries.
#[derive(Clone, Copy)]
enum Gather<'a> {
    /// Their sum.
    Sum,
    /// The largest, after each query's are multiplied by a factor of its own.
    Largest(Option<&'a [f32]>),
}

impl Gather<'_> {
    /// The factor on what chosen query number `index` pays.
    fn factor(self, index: usize) -> f32 {
        match self {
            Self::Largest(Some(factors)) => factors[index],
            _ => 1.0,
        }
    }

    fn and(self, a: f32, b: f32) -> f32 {
        match self {
            Self::Sum => a + b,
            Self::Largest(_) => larger(a, b),
        }
    }
}

/// NaN if either is.
fn larger(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

impl<'a> Call<'a> {
    fn new(
        q: &'a [f32],
        heads: &'a [&'a dyn KvTiles],
        shape: AttnShape,
        rotation: Option<&'a RopeTable>,
        chosen: &'a [usize],
    ) -> Self {
        shape.check(q, heads, rotation);
        check_chosen(shape, chosen);
        let longest = heads.iter().map(|h| h.len()).max().unwrap_or(0);
        let work = chosen.len() * shape.heads * longest * shape.head_dim;
        Self {
            q,
            heads,
            shape,
            rotation,
            chosen,
            gather: Gather::Sum,
            serial: work < SERIAL || rayon::current_num_threads() == 1,
        }
    }

    /// The same for the largest weights.
    fn largest(self, factors: Option<&'a [f32]>) -> Self {
        check_factors(self.chosen, factors);
        Self {
            gather: Gather::Largest(factors),
            ..self
        }
    }

    fn loader(&self, head: usize, rows: usize) -> Loader<'a> {
        Loader::new(self.heads[head], self.rotation, self.shape.head_dim, rows)
    }

    /// Numbers in buffers for a tile of `units`, as stored and rotated.
    fn tile(&self, units: usize) -> [usize; 2] {
        let tile = units * self.shape.head_dim;
        [tile, if self.rotation.is_some() { tile } else { 0 }]
    }

    /// The query of a token for query head `h` of a group.
    fn row(&self, token: usize, head: usize, h: usize) -> &'a [f32] {
        let (g, d) = (self.shape.group(), self.shape.head_dim);
        &self.q[(token * self.shape.heads + head * g + h) * d..][..d]
    }

    fn each<T: Send>(&self, tasks: Vec<T>, f: impl Fn(T) + Sync + Send) {
        if self.serial {
            tasks.into_iter().for_each(f);
        } else {
            tasks.into_par_iter().with_max_len(1).for_each(f);
        }
    }
}

fn check_chosen(shape: AttnShape, chosen: &[usize]) {
    assert!(
        chosen.windows(2).all(|w| w[0] < w[1]) && chosen.last().is_none_or(|l| *l < shape.tokens),
        "chosen queries must be strictly ascending and below {}",
        shape.tokens
    );
}

fn check_factors(chosen: &[usize], factors: Option<&[f32]>) {
    if let Some(factors) = factors {
        assert_eq!(
            factors.len(),
            chosen.len(),
            "a factor for each chosen query"
        );
    }
}

/// For each **query head**, what [`observe_weights`] says of the last `last` queries (all, if there are fewer);
/// and, from the same weights, for each distance between a query and a unit the sum over these queries: entry 0
/// is what they pay to their own units. As many distances as units.
///
/// # Panics
/// As [`attend`](super::attention::attend).
pub fn survey(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    last: usize,
) -> [Vec<Vec<f32>>; 2] {
    survey_with(Isa::best(), q, heads, shape, key_rotation, last)
}

fn survey_with(
    isa: Isa,
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    rotation: Option<&RopeTable>,
    last: usize,
) -> [Vec<Vec<f32>>; 2] {
    let chosen: Vec<usize> = (shape.tokens.saturating_sub(last)..shape.tokens).collect();
    let call = Call::new(q, heads, shape, rotation, &chosen);
    let lens: Vec<usize> = heads.iter().map(|h| h.len()).collect();
    let [units, distances] = many(isa, &call, &lens, true);
    [units, distances]
}

fn weights_with(isa: Isa, call: &Call<'_>) -> Vec<Vec<f32>> {
    let (shape, chosen) = (call.shape, call.chosen);
    let g = shape.group();
    let lens: Vec<usize> = call.heads.iter().map(|h| h.len()).collect();
    if (1..=FEW).contains(&chosen.len()) {
        let mut out: Vec<Vec<f32>> = (0..shape.heads).map(|h| vec![0.0; lens[h / g]]).collect();
        let rows = g * chosen.len();
        let mut logits: Vec<Vec<f32>> = lens
            .iter()
            .map(|len| vec![0.0; len.div_ceil(FEW_PIECE) * FEW_PIECE * rows])
            .collect();
        let tasks = logits.iter_mut().enumerate().flat_map(|(head, logits)| {
            let pieces = logits.chunks_mut(FEW_PIECE * rows).enumerate();
            pieces.map(move |(piece, logits)| (head, piece * FEW_PIECE, logits))
        });
        call.each(tasks.collect(), |(head, start, logits)| {
            dispatch!(isa, s => few_logits(s, call, head, start, logits));
        });
        let tasks = out.chunks_mut(g).zip(&mut logits).enumerate();
        call.each(tasks.collect(), |(head, (out, logits))| {
            dispatch!(isa, s => few_weights(s, call, head, logits, out));
        });
        return out;
    }
    let [units, _] = many(isa, call, &lens, false);
    units
}

/// Sums (or what else is gathered) by unit and, if they are wanted, by distance: for each query head.
fn many(isa: Isa, call: &Call<'_>, lens: &[usize], distances: bool) -> [Vec<Vec<f32>>; 2] {
    let (shape, chosen) = (call.shape, call.chosen);
    let g = shape.group();
    let zeros = |h: usize| vec![0.0; lens[h / g]];
    let mut out = [(); 2].map(|()| (0..shape.heads).map(zeros).collect::<Vec<_>>());
    if chosen.is_empty() || shape.heads == 0 {
        return out;
    }
    // Several tasks for each KV head, each with sums of its own, added up in a fixed order.
    let parts = 16usize.div_ceil(shape.kv_heads);
    let per_task = chosen.len().div_ceil(parts).next_multiple_of(BLOCK);
    let starts = || (0..chosen.len()).step_by(per_task);
    let parts = || starts().map(|start| start..(start + per_task).min(chosen.len()));
    let sums = (0..shape.kv_heads)
        .flat_map(|head| parts().map(move |part| (head, part)))
        .map(|(head, part)| {
            let by_distance = if distances { g * lens[head] } else { 0 };
            (
                head,
                part,
                vec![0.0; g * lens[head]],
                vec![0.0; by_distance],
            )
        });
    let mut sums: Vec<(usize, Range<usize>, Vec<f32>, Vec<f32>)> = sums.collect();
    call.each(
        sums.iter_mut().collect(),
        |(head, part, units, distances)| {
            dispatch!(isa, s => many_weights(s, call, *head, part.clone(), units, distances));
        },
    );
    for (head, _, units, distances) in sums {
        for (out, sums) in out.iter_mut().zip([units, distances]) {
            for (h, sums) in sums.chunks_exact(lens[head].max(1)).enumerate() {
                for (out, sum) in out[head * g + h].iter_mut().zip(sums) {
                    *out = call.gather.and(*out, *sum);
                }
            }
        }
    }
    out
}

/// Sums `[group, units]` over some of the chosen queries and a KV head, and `[group, distances]` if there is room
/// for them.
#[inline(always)]
fn many_weights<S: Simd>(
    s: S,
    call: &Call<'_>,
    head: usize,
    part: Range<usize>,
    sums: &mut [f32],
    distances: &mut [f32],
) {
    let most = if S::LANES == 16 { 3 } else { 2 } * S::LANES;
    for start in part.clone().step_by(most) {
        let block = start..(start + most).min(part.end);
        match block.len().div_ceil(S::LANES) {
            1 => block_weights::<S, 1>(s, call, head, block, sums, distances),
            2 => block_weights::<S, 2>(s, call, head, block, sums, distances),
            _ if S::LANES == 16 => block_weights::<S, 3>(s, call, head, block, sums, distances),
            _ => unreachable!("blocks have at most two vectors here"),
        }
    }
}

/// The same for at most `N` vectors of queries: a lane is a query, each head has its own panel.
#[inline(always)]
fn block_weights<S: Simd, const N: usize>(
    s: S,
    call: &Call<'_>,
    head: usize,
    part: Range<usize>,
    sums: &mut [f32],
    distances: &mut [f32],
) {
    let (shape, width) = (call.shape, N * S::LANES);
    let chosen = &call.chosen[part.clone()];
    let (g, d) = (shape.group(), shape.head_dim);
    let loader = call.loader(head, g * chosen.len());
    let len = loader.store.len();
    // Lanes beyond the chosen queries repeat the last one, with no weight.
    let query = |lane: usize| chosen[lane.min(chosen.len() - 1)];
    let mut limits = [0; 48];
    for (lane, limit) in limits[..width].iter_mut().enumerate() {
        *limit = shape.sees(len, query(lane));
    }
    let limits = &limits[..width];
    let (all_see, any_sees) = (limits[0], limits[width - 1]);
    let [tile, rotated] = call.tile(TILE);
    let lengths = [g * d * width, g * any_sees * width, tile, rotated];
    let mut memory = Scratch::for_lengths(&lengths);
    let [q, p, k_buf, rot_buf] = memory.slices(lengths);
    for (h, q) in q.chunks_exact_mut(d * width).enumerate() {
        pack_rows(
            s,
            (0..width).map(|lane| call.row(query(lane), head, h)),
            shape.scale * std::f32::consts::LOG2_E,
            d,
            q,
        );
    }
    if any_sees == 0 {
        return;
    }
    for start in (0..any_sees).step_by(TILE) {
        let units = start..(start + TILE).min(any_sees);
        let keys = loader.near_keys(s, units.clone(), k_buf, rot_buf);
        for (q, p) in q
            .chunks_exact(d * width)
            .zip(p.chunks_exact_mut(any_sees * width))
        {
            scores::<S, N>(s, d, keys, q, &mut p[start * width..units.end * width]);
        }
    }
    let by_head = p.chunks_exact_mut(any_sees * width);
    for (h, (p, sums)) in by_head.zip(sums.chunks_exact_mut(len)).enumerate() {
        hide(p, limits);
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
        let mut share = [0.0; 48];
        for v in 0..N {
            let one = s.div(s.splat(1.0), total[v]);
            store(s, &mut share[v * S::LANES..], one);
        }
        share[chosen.len()..].fill(0.0);
        for (share, index) in share.iter_mut().zip(part.clone()) {
            *share *= call.gather.factor(index);
        }
        for (k, p) in p.chunks_exact(width).enumerate() {
            if k < all_see {
                let mut gathered = s.splat(0.0);
                for v in 0..N {
                    let at = v * S::LANES;
                    let (p, share) = (load(s, &p[at..]), load(s, &share[at..]));
                    gathered = match call.gather {
                        Gather::Sum => s.fma(p, share, gathered),
                        Gather::Largest(_) => s.max_nan(gathered, s.mul(p, share)),
                    };
                }
                match call.gather {
                    Gather::Sum => sums[k] += s.sum(gathered),
                    Gather::Largest(_) => {
                        let mut lanes = [0.0; 16];
                        store(s, &mut lanes, gathered);
                        sums[k] = lanes.into_iter().fold(sums[k], larger);
                    }
                }
            } else {
                // A row that is NaN must not reach units that it does not see.
                for lane in 0..chosen.len() {
                    if k < limits[lane] {
                        sums[k] = call.gather.and(sums[k], p[lane] * share[lane]);
                    }
                }
            }
        }
        if !distances.is_empty() {
            let distances = &mut distances[h * len..(h + 1) * len];
            for (k, p) in p.chunks_exact(width).enumerate() {
                // Queries follow each other, and so do their distances from a unit.
                let hidden = limits.iter().take_while(|limit| **limit <= k).count();
                let first = (limits[0] + hidden).saturating_sub(k + 1);
                let lanes = hidden..chosen.len();
                let weights = p[lanes.clone()].iter().zip(&share[lanes]);
                for (sum, (p, share)) in distances[first..].iter_mut().zip(weights) {
                    *sum += p * share;
                }
            }
        }
    }
}

/// Scores in powers of two `[chosen · group, FEW_PIECE]` of units from `start`.
#[inline(always)]
fn few_logits<S: Simd>(s: S, call: &Call<'_>, head: usize, start: usize, logits: &mut [f32]) {
    let (g, d) = (call.shape.group(), call.shape.head_dim);
    let loader = call.loader(head, 0);
    let rows = g * call.chosen.len();
    let [tile, rotated] = call.tile(FEW_TILE);
    let lengths = [rows * d, 3 * FEW_TILE, tile, rotated];
    let mut memory = Scratch::for_lengths(&lengths);
    let [q, p, k_buf, rot_buf] = memory.slices(lengths);
    for (row, to) in q.chunks_exact_mut(d).enumerate() {
        let from = call.row(call.chosen[row / g], head, row % g);
        for (x, to) in from.iter().zip(to) {
            *to = x * (call.shape.scale * std::f32::consts::LOG2_E);
        }
    }
    let end = (start + FEW_PIECE).min(loader.store.len());
    for first in (start..end).step_by(FEW_TILE) {
        let units = first..(first + FEW_TILE).min(end);
        let keys = match loader.store.stored_keys(units.clone()) {
            Some(keys) if call.rotation.is_none() => keys,
            _ => Floats::F32(loader.keys(s, units.clone(), k_buf, rot_buf)),
        };
        let mut row = 0;
        while row < rows {
            let (n, q) = (heads_at_once(rows - row), &q[row * d..]);
            each_type!(keys, keys => match n {
                1 => dot_scores::<S, _, 1>(s, d, keys, q, p),
                2 => dot_scores::<S, _, 2>(s, d, keys, q, p),
                _ => dot_scores::<S, _, 3>(s, d, keys, q, p),
            });
            for r in 0..n {
                let to = &mut logits[(row + r) * FEW_PIECE + first - start..][..units.len()];
                to.copy_from_slice(&p[r * FEW_TILE..][..units.len()]);
            }
            row += n;
        }
    }
}

/// Turns the scores of a KV head into weights, and gathers them over the chosen queries.
#[inline(always)]
fn few_weights<S: Simd>(
    s: S,
    call: &Call<'_>,
    head: usize,
    logits: &mut [f32],
    out: &mut [Vec<f32>],
) {
    let (g, len) = (call.shape.group(), call.heads[head].len());
    let rows = g * call.chosen.len();
    for row in 0..rows {
        let sees = call.shape.sees(len, call.chosen[row / g]);
        // The row's units in each piece; whole vectors, the rest of the last one hidden.
        let visible = |piece: usize| {
            let n = sees.saturating_sub(piece * FEW_PIECE).min(FEW_PIECE);
            (n, n.next_multiple_of(S::LANES))
        };
        let mut top = s.splat(f32::NEG_INFINITY);
        for (piece, logits) in logits.chunks_exact_mut(rows * FEW_PIECE).enumerate() {
            let (n, whole) = visible(piece);
            let logits = &mut logits[row * FEW_PIECE..][..whole];
            logits[n..].fill(f32::NEG_INFINITY);
            for x in logits.chunks_exact(S::LANES) {
                top = s.max(top, load(s, x));
            }
        }
        let top = s.largest(top);
        let top = if top == f32::NEG_INFINITY { 0.0 } else { top };
        let mut total = s.splat(0.0);
        for (piece, logits) in logits.chunks_exact_mut(rows * FEW_PIECE).enumerate() {
            let logits = &mut logits[row * FEW_PIECE..][..visible(piece).1];
            for x in logits.chunks_exact_mut(S::LANES) {
                let weight = exp2_nonpositive(s, s.sub(load(s, x), s.splat(top)));
                total = s.add(total, weight);
                store(s, x, weight);
            }
        }
        let share = call.gather.factor(row / g) / s.sum(total);
        let out = &mut out[row % g];
        for (piece, logits) in logits.chunks_exact(rows * FEW_PIECE).enumerate() {
            let weights = &logits[row * FEW_PIECE..][..visible(piece).0];
            let from = piece * FEW_PIECE;
            for (out, weight) in out[from.min(len)..].iter_mut().zip(weights) {
                *out = call.gather.and(*out, weight * share);
            }
        }
    }
}

fn max_logits_with(
    isa: Isa,
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    rotation: Option<&RopeTable>,
    chosen: &[usize],
) -> Vec<Vec<f32>> {
    let call = Call::new(q, heads, shape, rotation, chosen);
    let mut out: Vec<Vec<f32>> = heads
        .iter()
        .map(|h| vec![f32::NEG_INFINITY; h.len()])
        .collect();
    if chosen.is_empty() || shape.heads == 0 {
        return out;
    }
    let room = (chosen.len() * shape.group()).next_multiple_of(16) * shape.head_dim;
    let mut packed = vec![0.0; shape.kv_heads * room];
    call.each(
        packed.chunks_mut(room).enumerate().collect(),
        |(head, q)| {
            dispatch!(isa, s => pack_all(s, &call, head, q));
        },
    );
    let tasks = out.iter_mut().enumerate().flat_map(|(head, out)| {
        let pieces = out.chunks_mut(PIECE).enumerate();
        pieces.map(move |(piece, out)| (head, piece * PIECE, out))
    });
    call.each(tasks.collect(), |(head, start, out)| {
        let q = &packed[head * room..(head + 1) * room];
        dispatch!(isa, s => piece_max(s, &call, head, start, q, out));
    });
    out
}

/// Packs the chosen queries of a KV head, query by query with the heads of the group within, into
/// panels.
#[inline(always)]
fn pack_all<S: Simd>(s: S, call: &Call<'_>, head: usize, q: &mut [f32]) {
    let (g, d) = (call.shape.group(), call.shape.head_dim);
    let rows = g * call.chosen.len();
    for lanes in panels(S::LANES, rows) {
        // Lanes beyond the rows repeat the last one, which changes no maximum.
        let row = |lane: usize| {
            let row = lane.min(rows - 1);
            call.row(call.chosen[row / g], head, row % g)
        };
        let panel = &mut q[lanes.start * d..lanes.end * d];
        pack_rows(s, lanes.map(row), call.shape.scale, d, panel);
    }
}

/// Maxima for the units from `start`.
#[inline(always)]
fn piece_max<S: Simd>(
    s: S,
    call: &Call<'_>,
    head: usize,
    start: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let (g, d) = (call.shape.group(), call.shape.head_dim);
    let rows = g * call.chosen.len();
    let loader = call.loader(head, rows);
    let len = loader.store.len();
    let sees = |lane: usize| call.shape.sees(len, call.chosen[lane.min(rows - 1) / g]);
    let [tile, rotated] = call.tile(TILE);
    let lengths = [TILE * 3 * S::LANES, TILE * S::LANES, tile, rotated];
    let mut memory = Scratch::for_lengths(&lengths);
    let [p, best, k_buf, rot_buf] = memory.slices(lengths);
    for (i, out) in out.chunks_mut(TILE).enumerate() {
        let first = start + i * TILE;
        let keys = loader.near_keys(s, first..first + out.len(), k_buf, rot_buf);
        let best = &mut best[..out.len() * S::LANES];
        best.fill(f32::NEG_INFINITY);
        for lanes in panels(S::LANES, rows) {
            let visible = sees(lanes.end - 1).min(first + out.len());
            if visible <= first {
                continue;
            }
            let mut limits = [usize::MAX; 48];
            let masked = visible > sees(lanes.start);
            if masked {
                for (limit, lane) in limits.iter_mut().zip(lanes.clone()) {
                    *limit = sees(lane).saturating_sub(first);
                }
            }
            let limits = masked.then_some(&limits[..lanes.len()]);
            let (keys, q) = (
                &keys[..(visible - first) * d],
                &q[lanes.start * d..lanes.end * d],
            );
            match lanes.len() / S::LANES {
                1 => panel_max::<S, 1>(s, d, keys, q, limits, p, best),
                2 => panel_max::<S, 2>(s, d, keys, q, limits, p, best),
                _ if S::LANES == 16 => panel_max::<S, 3>(s, d, keys, q, limits, p, best),
                _ => unreachable!("panels have at most two vectors here"),
            }
        }
        for (out, best) in out.iter_mut().zip(best.chunks_exact(S::LANES)) {
            *out = best.iter().copied().fold(f32::NEG_INFINITY, larger);
        }
    }
}

/// Maxima `[units, LANES]` over the vectors of a panel.
#[inline(always)]
fn panel_max<S: Simd, const N: usize>(
    s: S,
    d: usize,
    keys: &[f32],
    q: &[f32],
    limits: Option<&[usize]>,
    p: &mut [f32],
    best: &mut [f32],
) {
    let width = N * S::LANES;
    let p = &mut p[..keys.len() / d * width];
    scores::<S, N>(s, d, keys, q, p);
    if let Some(limits) = limits {
        hide(p, limits);
    }
    for (p, best) in p.chunks_exact(width).zip(best.chunks_exact_mut(S::LANES)) {
        let mut top = load(s, best);
        for v in 0..N {
            top = s.max_nan(top, load(s, &p[v * S::LANES..]));
        }
        store(s, best, top);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{rope, testing::*, tiles::DenseTiles};
    use proptest::prelude::*;

    /// `[heads][chosen][units seen]` logits in double precision.
    fn logits(
        q: &[f32],
        keys: &[Vec<f32>],
        shape: AttnShape,
        table: Option<&RopeTable>,
        chosen: &[usize],
    ) -> Vec<Vec<Vec<f64>>> {
        let d = shape.head_dim;
        (0..shape.heads)
            .map(|head| {
                let mut keys = keys[head / shape.group()].clone();
                if let Some(table) = table {
                    rope::rotate(&mut keys, d, d, table, |i| i, false);
                }
                let row = |query: &usize| {
                    let seen = (keys.len() / d + query + 1).saturating_sub(shape.tokens);
                    let q = &q[(query * shape.heads + head) * d..][..d];
                    let dot = |k: usize| -> f64 {
                        q.iter()
                            .zip(&keys[k * d..])
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum::<f64>()
                            * f64::from(shape.scale)
                    };
                    (0..seen).map(dot).collect()
                };
                chosen.iter().map(row).collect()
            })
            .collect()
    }

    fn same(a: &[f32], b: &[f64], tolerance: f64) -> Result<(), String> {
        if a.len() != b.len() {
            return Err(format!("{} numbers for {}", a.len(), b.len()));
        }
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let a = f64::from(*a);
            if !((a - b).abs() <= tolerance * (1.0 + b.abs())
                || a == *b
                || (a.is_nan() && b.is_nan()))
            {
                return Err(format!("at {i}: {a} for {b}"));
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(crate::testing::cases(96))]
        #[test]
        fn all_agree_with_the_textbook(
            (tokens, kv_heads, group) in (1usize..120, 1usize..4, 1usize..5),
            d in prop_oneof![1usize..20, Just(64), Just(80)],
            more in prop::collection::vec(prop_oneof![Just(0usize), 0usize..40, 0usize..700], 3),
            every in prop_oneof![Just(1usize), 1usize..6, Just(200)],
            skip in 0usize..120,
            rotary in any::<bool>(),
            bad in prop::option::of((0usize..3, any::<prop::sample::Index>(), any::<bool>())),
            seed in any::<u64>(),
        ) {
            let shape = AttnShape { tokens, heads: kv_heads * group, kv_heads, head_dim: d, scale: 0.3 };
            let lens: Vec<usize> = (0..kv_heads).map(|h| tokens + more[h]).collect();
            let chosen: Vec<usize> = (skip % tokens..tokens).step_by(every).collect();
            let mut rng = Numbers::new(seed);
            let mut q = rng.take(tokens * shape.heads * d);
            q.iter_mut().for_each(|x| *x *= 4.0);
            let mut keys: Vec<Vec<f32>> = lens.iter().map(|n| rng.take(n * d)).collect();
            if let Some((which, place, in_q)) = bad {
                let list = if in_q { &mut q } else { &mut keys[0] };
                let n = list.len();
                list[place.index(n)] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][which];
            }
            let table = rotary.then(|| {
                let f: Vec<f32> = (0..d / 2).map(|i| 1.0 / (1.0 + i as f32)).collect();
                RopeTable::new(&f, 1.0, 0..*lens.iter().max().unwrap())
            });
            let expected = logits(&q, &keys, shape, table.as_ref(), &chosen);
            let tiles: Vec<DenseTiles<'_>> = keys.iter().map(|k| DenseTiles::new(&k[..], &k[..], d)).collect();
            let heads: Vec<&dyn KvTiles> = tiles.iter().map(|t| t as &dyn KvTiles).collect();
            let factors: Vec<f32> = rng.take(chosen.len()).iter().map(|x| x.abs()).collect();
            for isa in Isa::all() {
                let call = Call::new(&q, &heads, shape, table.as_ref(), &chosen);
                let weights = weights_with(isa, &call);
                for factors in [None, Some(&factors[..])] {
                    let most = weights_with(isa, &call.largest(factors));
                    for (head, most) in most.iter().enumerate() {
                        let mut tops = vec![0.0f64; lens[head / group]];
                        for (index, row) in expected[head].iter().enumerate() {
                            let factor = factors.map_or(1.0, |f| f64::from(f[index]));
                            let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                            let total: f64 = row.iter().map(|x| (x - top).exp()).sum();
                            for (most, x) in tops.iter_mut().zip(row) {
                                let weight = factor * (x - top).exp() / total;
                                if !(most.is_nan() || *most > weight) {
                                    *most = weight;
                                }
                            }
                        }
                        if let Err(e) = same(most, &tops, 2e-5) {
                            prop_assert!(false, "{isa:?} largest weights of head {head}: {e}");
                        }
                    }
                }
                for (head, weights) in weights.iter().enumerate() {
                    let mut sums = vec![0.0; lens[head / group]];
                    for row in &expected[head] {
                        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        let total: f64 = row.iter().map(|x| (x - top).exp()).sum();
                        for (sum, x) in sums.iter_mut().zip(row) {
                            *sum += (x - top).exp() / total;
                        }
                    }
                    if let Err(e) = same(weights, &sums, 2e-5) {
                        prop_assert!(false, "{isa:?} weights of head {head}: {e}");
                    }
                }
                let best = max_logits_with(isa, &q, &heads, shape, table.as_ref(), &chosen);
                for (head, best) in best.iter().enumerate() {
                    let mut tops = vec![f64::NEG_INFINITY; lens[head]];
                    for row in expected[head * group..(head + 1) * group].iter().flatten() {
                        for (top, x) in tops.iter_mut().zip(row) {
                            if !(top.is_nan() || *top > *x) {
                                *top = *x;
                            }
                        }
                    }
                    if let Err(e) = same(best, &tops, 1e-5) {
                        prop_assert!(false, "{isa:?} logits of KV head {head}: {e}");
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(crate::testing::cases(48))]
        #[test]
        fn surveys_agree_with_the_textbook(
            (tokens, kv_heads, group) in (1usize..120, 1usize..4, 1usize..5),
            d in prop_oneof![1usize..20, Just(64)],
            more in prop::collection::vec(prop_oneof![Just(0usize), 0usize..40, 0usize..700], 3),
            last in 0usize..130,
            seed in any::<u64>(),
        ) {
            let shape = AttnShape { tokens, heads: kv_heads * group, kv_heads, head_dim: d, scale: 0.3 };
            let lens: Vec<usize> = (0..kv_heads).map(|h| tokens + more[h]).collect();
            let mut rng = Numbers::new(seed);
            let q: Vec<f32> = rng.take(tokens * shape.heads * d).iter().map(|x| 4.0 * x).collect();
            let keys: Vec<Vec<f32>> = lens.iter().map(|n| rng.take(n * d)).collect();
            let chosen: Vec<usize> = (tokens.saturating_sub(last)..tokens).collect();
            let expected = logits(&q, &keys, shape, None, &chosen);
            let tiles: Vec<DenseTiles<'_>> = keys.iter().map(|k| DenseTiles::new(&k[..], &k[..], d)).collect();
            let heads: Vec<&dyn KvTiles> = tiles.iter().map(|t| t as &dyn KvTiles).collect();
            for isa in Isa::all() {
                let found = survey_with(isa, &q, &heads, shape, None, last);
                for head in 0..shape.heads {
                    let len = lens[head / group];
                    let mut due = [vec![0.0; len], vec![0.0; len]];
                    for row in &expected[head] {
                        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        let total: f64 = row.iter().map(|x| (x - top).exp()).sum();
                        for (unit, x) in row.iter().enumerate() {
                            due[0][unit] += (x - top).exp() / total;
                            due[1][row.len() - 1 - unit] += (x - top).exp() / total;
                        }
                    }
                    for (found, due) in found.iter().zip(&due) {
                        if let Err(e) = same(&found[head], due, 2e-5) {
                            prop_assert!(false, "{isa:?} head {head}: {e}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_threads() {
        let (tokens, d) = (200, 64);
        let shape = AttnShape {
            tokens,
            heads: 6,
            kv_heads: 2,
            head_dim: d,
            scale: 0.125,
        };
        let mut rng = Numbers::new(11);
        let q = rng.take(tokens * 6 * d);
        let keys = [rng.take(1500 * d), rng.take(700 * d)];
        let tiles = keys.each_ref().map(|k| DenseTiles::new(&k[..], &k[..], d));
        let heads = tiles.each_ref().map(|t| t as &dyn KvTiles);
        for chosen in [vec![199], (3..200).collect::<Vec<_>>()] {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                pool.unwrap().install(|| {
                    (
                        observe_weights(&q, &heads, shape, None, &chosen),
                        observe_max_weights(&q, &heads, shape, None, &chosen, None),
                        observe_max_logits(&q, &heads, shape, None, &chosen),
                    )
                })
            };
            assert_eq!(run(1), run(3));
        }
    }

    #[test]
    fn no_chosen_query_observes_nothing() {
        let shape = AttnShape {
            tokens: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            scale: 1.0,
        };
        let tiles = DenseTiles::new(&[1f32; 6][..], &[1f32; 6][..], 2);
        let heads: [&dyn KvTiles; 1] = [&tiles];
        let q = [1.0; 2];
        assert_eq!(observe_weights(&q, &heads, shape, None, &[]), [[0.0; 3]]);
        let most = observe_max_weights(&q, &heads, shape, None, &[], Some(&[]));
        assert_eq!(most, [[0.0; 3]]);
        assert_eq!(
            observe_max_logits(&q, &heads, shape, None, &[]),
            [[f32::NEG_INFINITY; 3]]
        );
    }

    #[test]
    #[should_panic(expected = "strictly ascending and below 2")]
    fn queries_that_do_not_exist_are_refused() {
        let shape = AttnShape {
            tokens: 2,
            heads: 1,
            kv_heads: 1,
            head_dim: 1,
            scale: 1.0,
        };
        let tiles = DenseTiles::new(&[1f32; 2][..], &[1f32; 2][..], 1);
        observe_weights(&[1.0; 2], &[&tiles], shape, None, &[1, 2]);
    }
}
