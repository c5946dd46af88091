//! Attention over what queries see, where that is not everything before them.
//!
//! A task is a block of queries of the query heads that share a view. Its units come in tiles as in `many`, but
//! only those that a query sees: a tile that lies in one piece is read where it is, one of several pieces (single
//! columns in the extreme) is gathered first. Causality and windows are bounds of each row within a tile.

use super::{BLOCK_ROWS, Loader, SERIAL, TILE, many};
use crate::{
    attention::AttnShape,
    micro::{pack_rows, panels, unpack_lanes},
    rope::RopeTable,
    scratch::Scratch,
    simd::{Isa, Simd, dispatch},
    tiles::KvTiles,
    visible::{Tiles, View, Views, before},
};
use rayon::prelude::*;
use std::ops::Range;

/// Which of its units queries see, and how.
#[derive(Debug, Clone, Copy)]
pub struct Seeing<'a> {
    /// What they see.
    pub views: &'a Views,
    /// The queries as they meet units in [`View::far`], `[tokens, heads, head_dim]`: rotated at the one
    /// distance, while the stored keys are not rotated at all. Needed if there are such units.
    pub far: Option<&'a [f32]>,
}

/// As [`attend`](super::attend), but each query meets only what it sees. A query that sees nothing becomes 0.
///
/// # Panics
/// As `attend`; if a store has fewer units than there are tokens; if the views do not fit
/// ([`Views::check`], [`Views::check_places`]); if there are far units without queries for them.
pub fn attend_chosen(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    seeing: Seeing<'_>,
    out: &mut [f32],
) {
    attend_with(Isa::best(), q, heads, shape, key_rotation, seeing, out);
}

impl Seeing<'_> {
    /// Checks all that a kernel trusts in.
    pub(crate) fn check(
        &self,
        q: &[f32],
        heads: &[&dyn KvTiles],
        shape: AttnShape,
        rotation: Option<&RopeTable>,
    ) {
        let lens: Vec<usize> = heads.iter().map(|head| head.len()).collect();
        assert!(
            lens.iter().all(|len| *len >= shape.tokens),
            "{lens:?} units for {} tokens",
            shape.tokens
        );
        let checked = self.views.check(shape.tokens, shape.heads, &lens);
        if let Err(wrong) =
            checked.and_then(|()| self.views.check_places(rotation.map(RopeTable::len)))
        {
            panic!("{wrong}");
        }
        let mut views = self.views.lists().iter().flatten();
        match self.far {
            Some(far) => assert_eq!(far.len(), q.len(), "queries for far units"),
            None => assert!(
                views.all(|view| view.far.is_empty()),
                "queries for far units"
            ),
        }
    }
}

/// A block of queries, or a part of it, of the query heads that share a view.
struct Task<'a> {
    view: &'a View,
    store: usize,
    heads: Range<usize>,
    tokens: Range<usize>,
}

/// What all tasks of a call share.
#[derive(Clone, Copy)]
struct Call<'a> {
    q: &'a [f32],
    far: &'a [f32],
    heads: &'a [&'a dyn KvTiles],
    shape: AttnShape,
    rotation: Option<&'a RopeTable>,
    views: &'a Views,
}

impl<'a> Call<'a> {
    /// A query of a task; those of a token's heads follow each other.
    #[inline(always)]
    fn row(&self, task: &Task<'_>, q: &'a [f32], row: usize) -> &'a [f32] {
        let (g, d) = (task.heads.len(), self.shape.head_dim);
        let (token, head) = (task.tokens.start + row / g, task.heads.start + row % g);
        &q[(token * self.shape.heads + head) * d..][..d]
    }
}

fn attend_with(
    isa: Isa,
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    rotation: Option<&RopeTable>,
    seeing: Seeing<'_>,
    out: &mut [f32],
) {
    shape.check(q, heads, rotation);
    assert_eq!(out.len(), q.len(), "length of the output for {shape:?}");
    if shape.tokens == 0 || shape.heads == 0 {
        return;
    }
    seeing.check(q, heads, shape, rotation);
    let (lists, block) = (seeing.views.lists(), seeing.views.block());
    let (sharing, d) = (shape.heads / lists.len(), shape.head_dim);
    // Parts of blocks, so that a tile meets as many rows as elsewhere.
    let part = (BLOCK_ROWS / sharing).clamp(1, block.min(shape.tokens));
    let parts = block.min(shape.tokens).div_ceil(part);
    let mut tasks = Vec::new();
    for (list, views) in lists.iter().enumerate() {
        for (at, view) in views.iter().enumerate() {
            let tokens = at * block..((at + 1) * block).min(shape.tokens);
            for start in tokens.clone().step_by(part) {
                tasks.push(Task {
                    view,
                    store: list * heads.len() / lists.len(),
                    heads: list * sharing..(list + 1) * sharing,
                    tokens: start..(start + part).min(tokens.end),
                });
            }
        }
    }
    let call = Call {
        q,
        far: seeing.far.unwrap_or_default(),
        heads,
        shape,
        rotation,
        views: seeing.views,
    };
    let serial =
        2 * shape.tokens * shape.heads * TILE * d < SERIAL || rayon::current_num_threads() == 1;
    let stride = part * sharing * d;
    let total = tasks.len() * stride;
    let mut memory = Scratch::for_lengths(&[total]);
    let [results] = memory.slices([total]);
    let run = |(task, result): (&Task<'_>, &mut [f32])| {
        dispatch!(isa, s => block_of(s, call, task, result));
    };
    if serial {
        tasks.iter().zip(results.chunks_mut(stride)).for_each(run);
    } else {
        let pairs = tasks.par_iter().zip(results.par_chunks_mut(stride));
        pairs.with_max_len(1).for_each(run);
    }
    let (results, per_list) = (&*results, tasks.len() / lists.len());
    let finish = |(token, out): (usize, &mut [f32])| {
        for (head, out) in out.chunks_exact_mut(d).enumerate() {
            let within = token % block;
            let task = head / sharing * per_list + token / block * parts + within / part;
            let row = within % part * sharing + head % sharing;
            out.copy_from_slice(&results[task * stride + row * d..][..d]);
        }
    };
    let row = shape.heads * d;
    if serial || out.len() < 1 << 15 {
        out.chunks_mut(row).enumerate().for_each(finish);
    } else {
        let rows = out.par_chunks_mut(row).enumerate();
        rows.with_min_len(16).for_each(finish);
    }
}

/// The outputs of a task, `[tokens, heads, head_dim]`.
#[inline(always)]
fn block_of<S: Simd>(s: S, call: Call<'_>, task: &Task<'_>, out: &mut [f32]) {
    let (shape, g, d) = (call.shape, task.heads.len(), call.shape.head_dim);
    let store = call.heads[task.store];
    let rows = task.tokens.len() * g;
    let width = rows.div_ceil(S::LANES) * S::LANES;
    // The unit of a row's own token; padding is as the last row.
    let first = store.len() - shape.tokens + task.tokens.start;
    let own = |row: usize| first + row.min(rows - 1) / g;
    let runs = task.view.runs(first..own(rows - 1) + 1);
    let lengths = [
        width * d,
        width * d,
        width,
        width,
        TILE * 3 * S::LANES,
        TILE * d,
        TILE * d,
        TILE * d,
    ];
    let mut memory = Scratch::for_lengths(&lengths);
    let [q, acc, top, sum, p, k_buf, v_buf, other] = memory.slices(lengths);
    acc.fill(0.0);
    sum.fill(0.0);
    top.fill(f32::NEG_INFINITY);
    let mut sees = vec![false; width];
    let log2_scale = shape.scale * std::f32::consts::LOG2_E;
    for (way, runs) in [&runs.near, &runs.edge, &runs.far].into_iter().enumerate() {
        if runs.is_empty() {
            continue;
        }
        let far = way == 2;
        let loader = Loader::new(store, call.rotation.filter(|_| !far), d, rows)
            .placed(call.views.places_of(task.store));
        // The edge meets the same queries as what is near, which may not be there.
        let from = if far { call.far } else { call.q };
        for lanes in panels(S::LANES, rows) {
            let panel = &mut q[lanes.start * d..lanes.end * d];
            let rows = lanes.start..lanes.end.min(rows);
            let rows = rows.map(|row| call.row(task, from, row));
            pack_rows(s, rows, log2_scale, d, panel);
        }
        let mut tiles = Tiles::new(runs, TILE);
        while let Some(pieces) = tiles.next() {
            let units: usize = pieces.iter().map(Range::len).sum();
            let last = pieces[pieces.len() - 1].end;
            // Which units of the tile a row sees: from, and up to.
            let bounds = |row: usize| {
                let start = || before(pieces, task.view.window_start(own(row)));
                match way {
                    0 => 0..before(pieces, own(row) + 1),
                    1 => start()..before(pieces, own(row) + 1),
                    _ => 0..start(),
                }
            };
            let open = match way {
                0 => last <= own(0) + 1,
                1 => false,
                _ => last <= task.view.window_start(own(0)),
            };
            let (keys, values) = match pieces {
                [piece] => (
                    loader.near_keys(s, piece.clone(), k_buf, other),
                    loader.near_values(piece.clone(), v_buf),
                ),
                _ => loader.gathered(s, pieces, k_buf, v_buf, other),
            };
            let finite = open || many::all_finite(s, values);
            for lanes in panels(S::LANES, rows) {
                let (mut from, mut to) = ([0; 48], [units; 48]);
                if !open {
                    for (at, row) in lanes.clone().enumerate() {
                        let bounds = bounds(row);
                        (from[at], to[at]) = (bounds.start, bounds.end.max(bounds.start));
                    }
                }
                let (from, to) = (&from[..lanes.len()], &to[..lanes.len()]);
                let mut any = false;
                for ((from, to), sees) in from.iter().zip(to).zip(&mut sees[lanes.clone()]) {
                    *sees |= from < to;
                    any |= from < to;
                }
                if !any {
                    continue;
                }
                let panel = many::Panel {
                    d,
                    keys,
                    values,
                    q: &q[lanes.start * d..lanes.end * d],
                    acc: &mut acc[lanes.start * d..lanes.end * d],
                    top: &mut top[lanes.clone()],
                    sum: &mut sum[lanes.clone()],
                    p,
                    limits: (!open).then_some(to),
                    from: (way == 1).then_some(from),
                    finite,
                };
                panel.run(s, lanes.len() / S::LANES);
            }
        }
    }
    for lanes in panels(S::LANES, rows) {
        let panel = &acc[lanes.start * d..lanes.end * d];
        let out = &mut out[lanes.start * d..lanes.end.min(rows) * d];
        assert!(out.len() <= lanes.len() * d);
        // SAFETY: `out` has a row of d numbers for each lane up to the last row.
        unsafe { unpack_lanes(s, panel, lanes.len(), out.len() / d, out.as_mut_ptr(), d) };
    }
    for ((row, sum), sees) in out.chunks_exact_mut(d).zip(&*sum).zip(&sees) {
        match sees {
            true => row.iter_mut().for_each(|x| *x /= sum),
            false => row.fill(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        attention::{attend, tests::*},
        rope,
        testing::Numbers,
    };
    use proptest::prelude::*;

    /// The textbook formula over what a query sees, in double precision.
    fn oracle(
        q: [&[f32]; 2],
        keys: &[Vec<f32>],
        values: &[Vec<f32>],
        shape: AttnShape,
        table: Option<&RopeTable>,
        views: &Views,
    ) -> Vec<f32> {
        let d = shape.head_dim;
        let mut out = Vec::new();
        for token in 0..shape.tokens {
            for head in 0..shape.heads {
                let store = head / shape.group();
                let mut turned = keys[store].clone();
                if let Some(table) = table {
                    let place = |unit| views.places_of(store).map_or(unit, |p| p[unit] as usize);
                    rope::rotate(&mut turned, d, d, table, place, false);
                }
                let len = turned.len() / d;
                let own = len - shape.tokens + token;
                let view = views.of(head, shape.heads, token);
                let within = |ranges: &[Range<u32>], unit: usize| {
                    ranges.iter().any(|r| r.contains(&(unit as u32)))
                };
                let logit = |unit: usize| {
                    let near = within(&view.ranges, unit)
                        || view.columns.contains(&(unit as u32))
                        || own - unit < view.window;
                    let (q, keys) = match (near, within(&view.far, unit)) {
                        (true, _) => (q[0], &turned),
                        (false, true) => (q[1], &keys[store]),
                        (false, false) => return f64::NEG_INFINITY,
                    };
                    let q = &q[(token * shape.heads + head) * d..][..d];
                    let pairs = q.iter().zip(&keys[unit * d..]);
                    let dot: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    dot * f64::from(shape.scale)
                };
                let logits: Vec<f64> = (0..=own).map(logit).collect();
                let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weight = |x: &f64| {
                    if top.is_finite() {
                        (x - top).exp()
                    } else {
                        0.0
                    }
                };
                let weights: Vec<f64> = logits.iter().map(weight).collect();
                let total: f64 = weights.iter().sum();
                for f in 0..d {
                    let terms = weights.iter().enumerate();
                    let terms = terms.map(|(k, w)| w * f64::from(values[store][k * d + f]));
                    let sum: f64 = terms.sum();
                    out.push(if total == 0.0 {
                        0.0
                    } else {
                        (sum / total) as f32
                    });
                }
            }
        }
        out
    }

    proptest! {
        #![proptest_config(crate::testing::cases(160))]
        #[test]
        fn what_is_seen_is_attended_to(case in case(), block in 1usize..90) {
            let (q, keys, values, table) = case.data();
            let (shape, d) = (case.shape, case.shape.head_dim);
            let far = Numbers::new(case.seed ^ 1).take(q.len());
            let views = case.views(block);
            let expected = oracle([&q, &far], &keys, &values, shape, table.as_ref(), &views);
            let tiles = tiles_of(&keys, &values, d);
            let seeing = Seeing { views: &views, far: Some(&far) };
            for isa in Isa::all() {
                let mut out = vec![f32::NAN; q.len()];
                attend_with(isa, &q, &refs(&tiles), shape, table.as_ref(), seeing, &mut out);
                if let Err(e) = same(&out, &expected, 1e-5) {
                    prop_assert!(false, "{isa:?} {e}");
                }
            }
        }

        #[test]
        fn all_that_is_there_is_as_if_nothing_had_been_chosen(case in case(), block in 1usize..90) {
            let (q, keys, values, table) = case.data();
            let shape = case.shape;
            let blocks = shape.tokens.div_ceil(block);
            let views = Views::new(block, vec![vec![View::all(); blocks]; shape.heads]);
            let tiles = tiles_of(&keys, &values, shape.head_dim);
            let seeing = Seeing { views: &views, far: None };
            let [mut all, mut chosen] = [vec![0.0; q.len()], vec![1.0; q.len()]];
            attend(&q, &refs(&tiles), shape, table.as_ref(), &mut all);
            attend_chosen(&q, &refs(&tiles), shape, table.as_ref(), seeing, &mut chosen);
            if let Err(e) = same(&all, &chosen, 1e-5) {
                prop_assert!(false, "{e}");
            }
        }

        #[test]
        fn what_is_not_seen_may_be_anything(case in case(), block in 1usize..90, window in 0usize..40) {
            let (q, mut keys, mut values, table) = case.data();
            let (shape, d) = (case.shape, case.shape.head_dim);
            let blocks = shape.tokens.div_ceil(block);
            let view = View { window, columns: vec![0], ..View::default() };
            let views = Views::new(block, vec![vec![view; blocks]; shape.kv_heads]);
            let seeing = Seeing { views: &views, far: None };
            let run = |keys: &[Vec<f32>], values: &[Vec<f32>]| {
                let tiles = tiles_of(keys, values, d);
                let mut out = vec![0.0; q.len()];
                attend_chosen(&q, &refs(&tiles), shape, table.as_ref(), seeing, &mut out);
                out
            };
            let before = run(&keys, &values);
            prop_assert!(before.iter().all(|x| x.is_finite()));
            // Beyond every window, and within some windows only.
            for (head, len) in case.lens.iter().enumerate() {
                let hidden = (len - shape.tokens).saturating_sub(window);
                for unit in 1..=hidden.saturating_sub(1) {
                    keys[head][unit * d] = f32::NAN;
                    values[head][unit * d] = f32::INFINITY;
                }
            }
            prop_assert_eq!(&before, &run(&keys, &values));
            let newest = case.lens[0] - 1;
            values[0][newest * d] = f32::NAN;
            let after = run(&keys, &values);
            for (token, (row, was)) in after.chunks(shape.heads * d).zip(before.chunks(shape.heads * d)).enumerate() {
                if token + 1 < shape.tokens {
                    // Such a tile's values are added up in another order.
                    prop_assert!(same(row, was, 1e-5).is_ok(), "{row:?} {was:?}");
                } else if window > 0 || newest == 0 {
                    prop_assert!(row[0].is_nan());
                }
            }
        }
    }

    #[test]
    fn queries_that_see_themselves_or_nothing() {
        let shape = AttnShape {
            tokens: 5,
            heads: 2,
            kv_heads: 1,
            head_dim: 3,
            scale: 1.0,
        };
        let values: Vec<f32> = (0..18).map(|x| x as f32).collect();
        let (keys, values) = (vec![vec![0.5; 18]], vec![values]);
        let tiles = tiles_of(&keys, &values, 3);
        let own = View {
            window: 1,
            ..View::default()
        };
        let views = Views::new(5, vec![vec![own], vec![View::default()]]);
        let seeing = Seeing {
            views: &views,
            far: None,
        };
        let mut out = vec![9.0; 30];
        attend_chosen(&[1.0; 30], &refs(&tiles), shape, None, seeing, &mut out);
        for (token, row) in out.chunks(6).enumerate() {
            assert_eq!(row[..3], values[0][(token + 1) * 3..(token + 2) * 3]);
            assert_eq!(row[3..], [0.0; 3]);
        }
    }

    #[test]
    #[should_panic(expected = "queries for far units")]
    fn far_units_without_queries_are_refused() {
        let shape = AttnShape {
            tokens: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            scale: 1.0,
        };
        let (keys, values) = (vec![vec![0.0; 8]], vec![vec![0.0; 8]]);
        let tiles = tiles_of(&keys, &values, 2);
        let far = View {
            far: std::iter::once(0..2).collect(),
            ..View::default()
        };
        let views = Views::new(1, vec![vec![far]]).far_at(3);
        let seeing = Seeing {
            views: &views,
            far: None,
        };
        attend_chosen(&[0.0; 2], &refs(&tiles), shape, None, seeing, &mut [0.0; 2]);
    }
}
