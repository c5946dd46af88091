//! Causal attention with grouped queries, where the cache lies.
//!
//! Keys are read in tiles and softmax is kept as a running maximum and sum (arXiv 2205.14135,
//! 2307.08691), so that no matrix of scores exists. Two ways of putting numbers into vectors:
//!
//! - **Many queries** (prefill): lanes are (query, head of the group) rows. Scores of a tile are
//!   the outer products of broadcast keys with packed queries, softmax runs down the lanes without
//!   any reduction across them, and the output is kept transposed, so that neither keys nor values
//!   are ever packed. Rows of one KV head share its tiles; tiles that no row of a panel may see are
//!   skipped.
//! - **Few queries** (decode): lanes are features; a tile of keys is read once for the heads of a
//!   group.
//!
//! Work is cut by (KV head, block of queries, range of units) in a way that depends on the shape
//! alone; ranges are merged by their maxima and sums. Results therefore don't depend on threads.

use super::{
    micro::{outer, pack_rows, panels, unpack_lanes},
    rope::{RopeTable, rotate_into},
    scratch::Scratch,
    simd::{Isa, Simd, dispatch, exp2_nonpositive, load, store},
    tiles::{Element, Floats, KvTiles, each_type},
};
use rayon::prelude::*;
use std::ops::Range;

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttnShape {
    /// New tokens, one query each per head.
    pub tokens: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// What `q·k` is multiplied with before softmax, usually `1/√head_dim`.
    pub scale: f32,
}

impl AttnShape {
    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// How many units of a head with `len` units query `token` sees.
    pub(super) fn sees(&self, len: usize, token: usize) -> usize {
        (len + token + 1).saturating_sub(self.tokens)
    }

    pub(super) fn check(&self, q: &[f32], heads: &[&dyn KvTiles], rotation: Option<&RopeTable>) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads) && self.head_dim > 0,
            "{self:?}"
        );
        assert_eq!(
            q.len(),
            self.tokens * self.heads * self.head_dim,
            "length of q for {self:?}"
        );
        assert_eq!(heads.len(), self.kv_heads, "KV heads");
        if let Some(table) = rotation {
            let longest = heads.iter().map(|h| h.len()).max().unwrap_or(0);
            assert!(
                table.len() >= longest && table.rotary_dim() <= self.head_dim,
                "a rotary table of {} rows and {} features for {longest} units of {}",
                table.len(),
                table.rotary_dim(),
                self.head_dim
            );
        }
    }
}

/// Causal softmax attention of new tokens over the units of each KV head.
///
/// # Shapes
/// - `q`: `[tokens, heads, head_dim]`, rotated, not scaled.
/// - `heads`: `kv_heads` stores; query head `h` reads store `h / group`. Lengths may differ.
/// - `out`: `[tokens, heads, head_dim]`.
///
/// The queries are aligned to the end of each store: with `len` units, query `i` sees units
/// `0..=len - tokens + i`. With `key_rotation`, keys are stored before rotation and unit `i` of
/// each head is rotated by row `i` of the table as it is read; `q` must be rotated already.
///
/// # Numbers that are not finite
/// They reach exactly the rows that see them, as in the textbook formula: a row with a NaN score,
/// or a `+∞` one, or none but `-∞` ones, becomes NaN; a score of `-∞` among finite ones has
/// weight 0; a value that isn't finite makes its feature NaN or infinite. A row that sees no unit
/// at all (`len < tokens`) becomes 0.
///
/// # Panics
/// If the length of `q`, `heads` or `out` does not fit `shape`, if `heads` is not a multiple of
/// `kv_heads`, or if the table has fewer rows than the longest head has units.
pub fn attend(
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    key_rotation: Option<&RopeTable>,
    out: &mut [f32],
) {
    attend_with(Isa::best(), q, heads, shape, key_rotation, out);
}

/// Units in a tile: its keys or values (24 KiB at 64 features) fit the first cache beside a panel
/// of queries.
pub(super) const TILE: usize = 96;

/// The same with features in lanes; whole vectors of scores.
pub(super) const FEW_TILE: usize = 64;

/// Rows (queries × heads of the group) that share a tile before it is read again.
const BLOCK_ROWS: usize = 192;

/// Up to this many rows are handled with features in lanes.
const FEW_ROWS: usize = 6;

/// With this many rows a tile is copied before it is used.
pub(super) const COPY_ROWS: usize = 64;

/// A range of units is not cut into pieces shorter than this.
const PIECE: usize = 256;

/// Below this many multiply-adds the calling thread does all.
pub(super) const SERIAL: usize = 1 << 18;

/// One piece of work: some queries of a KV head over some of its units.
#[derive(Debug, Clone)]
struct Task {
    head: usize,
    tokens: Range<usize>,
    units: Range<usize>,
}

/// How a call is cut up; a function of the shape and the lengths only.
#[derive(Debug)]
struct Plan {
    /// Tokens in a block of queries.
    block: usize,
    tasks: Vec<Task>,
    /// `[kv_heads * blocks + 1]`: where the tasks of a block begin.
    first: Vec<usize>,
    /// Numbers that a task leaves: maxima and sums `[rows]`, sums of values `[rows, head_dim]`.
    stride: usize,
    /// Units of each KV head.
    lens: Vec<usize>,
}

impl Plan {
    fn new(shape: AttnShape, heads: &[&dyn KvTiles]) -> Self {
        let g = shape.group();
        let block = (BLOCK_ROWS / g).clamp(1, shape.tokens);
        let blocks = shape.tokens.div_ceil(block);
        // Enough pieces that a few processors have something to do each.
        let wanted = if shape.kv_heads * blocks >= 12 {
            1
        } else {
            32usize.div_ceil(shape.kv_heads * blocks)
        };
        let mut tasks = Vec::new();
        let mut first = vec![0];
        for (head, store) in heads.iter().enumerate() {
            for b in 0..blocks {
                let tokens = b * block..((b + 1) * block).min(shape.tokens);
                let seen = shape.sees(store.len(), tokens.end - 1);
                let pieces = (seen / PIECE).clamp(1, wanted);
                // Whole tiles, so that each is converted or rotated once.
                let step = seen.div_ceil(pieces).next_multiple_of(TILE).max(TILE);
                for start in (0..seen.max(1)).step_by(step) {
                    tasks.push(Task {
                        head,
                        tokens: tokens.clone(),
                        units: start..(start + step).min(seen),
                    });
                }
                first.push(tasks.len());
            }
        }
        Self {
            block,
            tasks,
            first,
            stride: block * g * (shape.head_dim + 2),
            lens: heads.iter().map(|h| h.len()).collect(),
        }
    }
}

/// What all tasks of a call share.
#[derive(Clone, Copy)]
struct Call<'a> {
    q: &'a [f32],
    heads: &'a [&'a dyn KvTiles],
    shape: AttnShape,
    rotation: Option<&'a RopeTable>,
}

fn attend_with(
    isa: Isa,
    q: &[f32],
    heads: &[&dyn KvTiles],
    shape: AttnShape,
    rotation: Option<&RopeTable>,
    out: &mut [f32],
) {
    shape.check(q, heads, rotation);
    assert_eq!(out.len(), q.len(), "length of the output for {shape:?}");
    if shape.tokens == 0 || shape.heads == 0 {
        return;
    }
    let plan = Plan::new(shape, heads);
    let call = Call {
        q,
        heads,
        shape,
        rotation,
    };
    let longest = heads.iter().map(|h| h.len()).max().unwrap_or(0);
    let work = 2 * shape.tokens * shape.heads * longest * shape.head_dim;
    let serial = work < SERIAL || rayon::current_num_threads() == 1;
    let total = plan.tasks.len() * plan.stride;
    let mut memory = Scratch::for_lengths(&[total]);
    let [partials] = memory.slices([total]);
    let run = |(task, partial): (&Task, &mut [f32])| {
        let rows = plan.block * shape.group();
        let (top, rest) = partial.split_at_mut(rows);
        let (sum, acc) = rest.split_at_mut(rows);
        if task.tokens.len() * shape.group() <= FEW_ROWS {
            dispatch!(isa, s => few(s, call, task, top, sum, acc));
        } else {
            dispatch!(isa, s => many(s, call, task, top, sum, acc));
        }
    };
    if serial {
        let pairs = plan.tasks.iter().zip(partials.chunks_mut(plan.stride));
        pairs.for_each(run);
    } else {
        let partials = partials.par_chunks_mut(plan.stride);
        let pairs = plan.tasks.par_iter().zip(partials);
        pairs.with_max_len(1).for_each(run);
    }
    let partials = &*partials;
    let finish = |(token, out): (usize, &mut [f32])| {
        for (head, out) in out.chunks_mut(shape.head_dim).enumerate() {
            plan.merge(shape, partials, token, head, out);
        }
    };
    let row = shape.heads * shape.head_dim;
    if serial || out.len() < 1 << 15 {
        out.chunks_mut(row).enumerate().for_each(finish);
    } else {
        let rows = out.par_chunks_mut(row).enumerate();
        rows.with_min_len(16).for_each(finish);
    }
}

impl Plan {
    /// The output of one query of one head, from what the tasks of its block left.
    fn merge(
        &self,
        shape: AttnShape,
        partials: &[f32],
        token: usize,
        head: usize,
        out: &mut [f32],
    ) {
        let (g, d) = (shape.group(), shape.head_dim);
        let rows = self.block * g;
        let row = token % self.block * g + head % g;
        let block = head / g * shape.tokens.div_ceil(self.block) + token / self.block;
        let tasks = self.first[block]..self.first[block + 1];
        let pieces = partials[tasks.start * self.stride..tasks.end * self.stride]
            .chunks(self.stride)
            .map(|piece| {
                let acc = &piece[2 * rows + row * d..][..d];
                (piece[row], piece[rows + row], acc)
            });
        if tasks.len() == 1 {
            for (_, sum, acc) in pieces {
                for (out, acc) in out.iter_mut().zip(acc) {
                    *out = acc / sum;
                }
            }
        } else {
            let top = pieces
                .clone()
                .map(|p| p.0)
                .fold(f32::NEG_INFINITY, f32::max);
            let top = if top == f32::NEG_INFINITY { 0.0 } else { top };
            out.fill(0.0);
            let mut total = 0.0;
            for (piece_top, sum, acc) in pieces {
                let weight = (piece_top - top).exp2();
                total += weight * sum;
                for (out, acc) in out.iter_mut().zip(acc) {
                    *out += weight * acc;
                }
            }
            for out in out.iter_mut() {
                *out /= total;
            }
        }
        if shape.sees(self.lens[head / g], token) == 0 {
            out.fill(0.0);
        }
    }
}

/// The factor on queries: softmax is computed with powers of two.
#[inline(always)]
fn log2_scale(shape: AttnShape) -> f32 {
    shape.scale * std::f32::consts::LOG2_E
}

/// Reads tiles of one KV head.
pub(super) struct Loader<'a> {
    pub(super) store: &'a dyn KvTiles,
    pub(super) rotation: Option<&'a RopeTable>,
    pub(super) d: usize,
    /// Whether enough rows use a tile to pay for a copy of it.
    pub(super) copies: bool,
}

impl Loader<'_> {
    /// The keys of a tile, rotated if they have to be.
    #[inline(always)]
    pub(super) fn keys<'s, S: Simd>(
        &'s self,
        s: S,
        units: Range<usize>,
        scratch: &'s mut [f32],
        rotated: &'s mut [f32],
    ) -> &'s [f32] {
        let (len, first) = (units.len() * self.d, units.start);
        let keys = &self.store.keys(units, scratch)[..len];
        match self.rotation {
            None => keys,
            Some(table) => {
                let rotated = &mut rotated[..len];
                rotate_into(s, keys, rotated, self.d, table, first);
                rotated
            }
        }
    }

    #[inline(always)]
    fn values<'s>(&'s self, units: Range<usize>, scratch: &'s mut [f32]) -> &'s [f32] {
        let len = units.len() * self.d;
        &self.store.values(units, scratch)[..len]
    }

    /// The keys of a tile in memory that is near.
    ///
    /// Broadcasts walk through a tile in columns. In the store that would be one miss after the
    /// other; a copy is made in the order in which memory is fetched ahead.
    #[inline(always)]
    pub(super) fn near_keys<'s, S: Simd>(
        &'s self,
        s: S,
        units: Range<usize>,
        scratch: &'s mut [f32],
        rotated: &'s mut [f32],
    ) -> &'s [f32] {
        match self.store.stored_keys(units.clone()) {
            Some(Floats::F32(keys)) if self.copies && self.rotation.is_none() => {
                copy(keys, scratch)
            }
            _ => self.keys(s, units, scratch, rotated),
        }
    }

    /// The values of a tile in memory that is near.
    #[inline(always)]
    fn near_values<'s>(&'s self, units: Range<usize>, scratch: &'s mut [f32]) -> &'s [f32] {
        match self.store.stored_values(units.clone()) {
            Some(Floats::F32(values)) if self.copies => copy(values, scratch),
            _ => self.values(units, scratch),
        }
    }
}

fn copy<'s>(x: &[f32], scratch: &'s mut [f32]) -> &'s [f32] {
    let scratch = &mut scratch[..x.len()];
    scratch.copy_from_slice(x);
    scratch
}

/// Lanes are rows (query by query, the heads of the group within).
#[inline(always)]
fn many<S: Simd>(
    s: S,
    call: Call<'_>,
    task: &Task,
    top_out: &mut [f32],
    sum_out: &mut [f32],
    acc_out: &mut [f32],
) {
    let shape = call.shape;
    let (g, d) = (shape.group(), shape.head_dim);
    let loader = Loader {
        store: call.heads[task.head],
        rotation: call.rotation,
        d,
        copies: task.tokens.len() * g >= COPY_ROWS,
    };
    let len = loader.store.len();
    let rows = task.tokens.len() * g;
    let vectors = rows.div_ceil(S::LANES);
    let width = vectors * S::LANES;
    let tile = TILE * d;
    let rotated = if call.rotation.is_some() { tile } else { 0 };
    let lengths = [
        width * d,
        width * d,
        width,
        width,
        TILE * 3 * S::LANES,
        tile,
        tile,
        rotated,
    ];
    let mut memory = Scratch::for_lengths(&lengths);
    let [q, acc, top, sum, p, k_buf, v_buf, rot_buf] = memory.slices(lengths);
    acc.fill(0.0);
    sum.fill(0.0);
    top.fill(f32::NEG_INFINITY);
    let row_of = |row: usize| {
        let token = task.tokens.start + row / g;
        &call.q[(token * shape.heads + task.head * g + row % g) * d..][..d]
    };
    for lanes in panels(S::LANES, rows) {
        let panel = &mut q[lanes.start * d..lanes.end * d];
        let rows = lanes.start..lanes.end.min(rows);
        pack_rows(s, rows.map(row_of), log2_scale(shape), d, panel);
    }
    // The units that the last query of a panel of rows sees; padding sees what the last does.
    let sees = |row: usize| shape.sees(len, task.tokens.start + row.min(rows - 1) / g);
    for start in task.units.clone().step_by(TILE) {
        let units = start..(start + TILE).min(task.units.end);
        let keys = loader.near_keys(s, units.clone(), k_buf, rot_buf);
        let values = loader.near_values(units.clone(), v_buf);
        let finite = units.end <= sees(0) || all_finite(s, values);
        for lanes in panels(S::LANES, rows) {
            let visible = units.end.min(sees(lanes.end - 1));
            if visible <= start {
                continue;
            }
            let visible = visible - start;
            let mut limits = [0; 48];
            let masked = start + visible > sees(lanes.start);
            if masked {
                for (limit, row) in limits.iter_mut().zip(lanes.clone()) {
                    *limit = sees(row).saturating_sub(start);
                }
            }
            let panel = Panel {
                d,
                keys: &keys[..visible * d],
                values: &values[..visible * d],
                q: &q[lanes.start * d..lanes.end * d],
                acc: &mut acc[lanes.start * d..lanes.end * d],
                top: &mut top[lanes.clone()],
                sum: &mut sum[lanes.clone()],
                p,
                limits: masked.then_some(&limits[..lanes.len()]),
                finite,
            };
            match lanes.len() / S::LANES {
                1 => panel.step::<S, 1>(s),
                2 => panel.step::<S, 2>(s),
                // Never reached with fewer registers, and then not compiled either.
                _ if S::LANES == 16 => panel.step::<S, 3>(s),
                _ => unreachable!("panels have at most three vectors"),
            }
        }
    }
    top_out[..rows].copy_from_slice(&top[..rows]);
    sum_out[..rows].copy_from_slice(&sum[..rows]);
    for lanes in panels(S::LANES, rows) {
        let panel = &acc[lanes.start * d..lanes.end * d];
        let out = &mut acc_out[lanes.start * d..lanes.end.min(rows) * d];
        assert!(out.len() <= lanes.len() * d);
        // SAFETY: `out` has a row of d numbers for each lane up to the last row.
        unsafe { unpack_lanes(s, panel, lanes.len(), out.len() / d, out.as_mut_ptr(), d) };
    }
}

/// Whether no number is infinite or NaN.
#[inline(always)]
fn all_finite<S: Simd>(s: S, x: &[f32]) -> bool {
    let chunks = x.chunks_exact(S::LANES);
    let rest = chunks.remainder().iter().all(|x| x.is_finite());
    let mut zeros = s.splat(0.0);
    for x in chunks {
        // 0 · ∞ and 0 · NaN are NaN, which stays in the sum.
        zeros = s.fma(load(s, x), s.splat(0.0), zeros);
    }
    rest && s.sum(zeros) == 0.0
}

/// Scores `[units, N · LANES]` of a panel of packed queries.
#[inline(always)]
pub(super) fn scores<S: Simd, const N: usize>(
    s: S,
    d: usize,
    keys: &[f32],
    q: &[f32],
    p: &mut [f32],
) {
    #[inline(always)]
    fn go<S: Simd, const B: usize, const N: usize>(
        s: S,
        d: usize,
        from: usize,
        keys: &[f32],
        q: &[f32],
        p: &mut [f32],
    ) -> usize {
        let units = keys.len() / d;
        let width = N * S::LANES;
        let mut k = from;
        while k + B <= units {
            let mut acc = [[s.splat(0.0); N]; B];
            let keys = &keys[k * d..(k + B) * d];
            // SAFETY: `keys` holds B rows of d numbers, `q` d rows of N vectors (checked below).
            unsafe { outer(s, d, keys.as_ptr(), d, 1, q.as_ptr(), &mut acc) };
            for (acc, p) in acc.iter().zip(p[k * width..].chunks_exact_mut(width)) {
                for (v, acc) in acc.iter().enumerate() {
                    store(s, &mut p[v * S::LANES..], *acc);
                }
            }
            k += B;
        }
        k
    }
    assert!(q.len() >= d * N * S::LANES);
    let mut k = 0;
    if S::LANES == 16 || N == 1 {
        k = go::<S, 8, N>(s, d, k, keys, q, p);
    } else {
        k = go::<S, 6, N>(s, d, k, keys, q, p);
    }
    k = go::<S, 4, N>(s, d, k, keys, q, p);
    k = go::<S, 2, N>(s, d, k, keys, q, p);
    go::<S, 1, N>(s, d, k, keys, q, p);
}

/// Sets scores `[units, lanes]` to -∞ where a lane's limit is reached.
#[inline(always)]
pub(super) fn hide(p: &mut [f32], limits: &[usize]) {
    let rows = p.chunks_exact_mut(limits.len()).enumerate();
    for (k, p) in rows.skip(limits.iter().copied().min().unwrap_or(0)) {
        for (p, limit) in p.iter_mut().zip(limits) {
            if *limit <= k {
                *p = f32::NEG_INFINITY;
            }
        }
    }
}

/// One tile against one panel of rows.
struct Panel<'a> {
    d: usize,
    /// `[units, d]`, as are the values.
    keys: &'a [f32],
    values: &'a [f32],
    /// `[d, lanes]`
    q: &'a [f32],
    /// `[d, lanes]`: sums of weighted values.
    acc: &'a mut [f32],
    /// `[lanes]`: maxima of scores, in powers of two.
    top: &'a mut [f32],
    /// `[lanes]`: sums of weights.
    sum: &'a mut [f32],
    /// Room for `[units, lanes]`.
    p: &'a mut [f32],
    /// For each lane how many units of the tile it sees, if any sees fewer than all.
    limits: Option<&'a [usize]>,
    /// Whether a weight of 0 makes any value vanish.
    finite: bool,
}

impl Panel<'_> {
    #[inline(always)]
    fn step<S: Simd, const N: usize>(self, s: S) {
        let (d, width) = (self.d, N * S::LANES);
        let units = self.keys.len() / d;
        let p = &mut self.p[..units * width];
        scores::<S, N>(s, d, self.keys, self.q, p);
        if let Some(limits) = self.limits {
            hide(p, limits);
        }
        let rescale = softmax_step::<S, N>(s, p, self.top, self.sum);
        if self.finite || self.limits.is_none() {
            weigh::<S, N>(s, d, self.values, p, &rescale, self.acc);
        } else if let Some(limits) = self.limits {
            // A value that is not finite must not reach rows that don't see it.
            let mut factors = [0.0; 48];
            for v in 0..N {
                store(s, &mut factors[v * S::LANES..], rescale[v]);
            }
            for (f, acc) in self.acc.chunks_exact_mut(width).enumerate() {
                for lane in 0..width {
                    let mut sum = acc[lane] * factors[lane];
                    for k in 0..limits[lane].min(units) {
                        sum += p[k * width + lane] * self.values[k * d + f];
                    }
                    acc[lane] = sum;
                }
            }
        }
    }
}

/// Turns scores `[units, lanes]` into weights, keeping maxima and sums; returns what earlier sums
/// have to be multiplied with.
#[inline(always)]
fn softmax_step<S: Simd, const N: usize>(
    s: S,
    p: &mut [f32],
    top: &mut [f32],
    sum: &mut [f32],
) -> [S::V; N] {
    let width = N * S::LANES;
    let mut old = [s.splat(0.0); N];
    for (v, old) in old.iter_mut().enumerate() {
        *old = load(s, &top[v * S::LANES..]);
    }
    let mut new = old;
    for p in p.chunks_exact(width) {
        for (v, new) in new.iter_mut().enumerate() {
            *new = s.max(*new, load(s, &p[v * S::LANES..]));
        }
    }
    // Where all scores so far are -∞, any reference gives the weights 0.
    let none = s.splat(f32::NEG_INFINITY);
    let (mut reference, mut rescale, mut sums) = (new, new, new);
    for v in 0..N {
        reference[v] = s.if_eq(new[v], none, s.splat(0.0), new[v]);
        rescale[v] = exp2_nonpositive(s, s.sub(old[v], reference[v]));
        sums[v] = s.mul(load(s, &sum[v * S::LANES..]), rescale[v]);
    }
    for p in p.chunks_exact_mut(width) {
        for v in 0..N {
            let p = &mut p[v * S::LANES..];
            let weight = exp2_nonpositive(s, s.sub(load(s, p), reference[v]));
            sums[v] = s.add(sums[v], weight);
            store(s, p, weight);
        }
    }
    for v in 0..N {
        store(s, &mut top[v * S::LANES..], new[v]);
        store(s, &mut sum[v * S::LANES..], sums[v]);
    }
    rescale
}

/// `acc[f] = acc[f] · rescale + Σ_k values[k, f] · p[k]` for rows of lanes.
#[inline(always)]
fn weigh<S: Simd, const N: usize>(
    s: S,
    d: usize,
    values: &[f32],
    p: &[f32],
    rescale: &[S::V; N],
    acc: &mut [f32],
) {
    #[inline(always)]
    fn go<S: Simd, const B: usize, const N: usize>(
        s: S,
        d: usize,
        from: usize,
        values: &[f32],
        p: &[f32],
        rescale: &[S::V; N],
        acc: &mut [f32],
    ) -> usize {
        let width = N * S::LANES;
        let mut f = from;
        while f + B <= d {
            let rows = &mut acc[f * width..(f + B) * width];
            let mut sums = [[s.splat(0.0); N]; B];
            for (sums, row) in sums.iter_mut().zip(rows.chunks_exact(width)) {
                for v in 0..N {
                    sums[v] = s.mul(load(s, &row[v * S::LANES..]), rescale[v]);
                }
            }
            // SAFETY: f + B <= d, `values` holds a row of d and `p` N vectors for each unit
            // (checked below).
            unsafe {
                outer(
                    s,
                    p.len() / width,
                    values.as_ptr().add(f),
                    1,
                    d,
                    p.as_ptr(),
                    &mut sums,
                );
            }
            for (sums, row) in sums.iter().zip(rows.chunks_exact_mut(width)) {
                for (v, sum) in sums.iter().enumerate() {
                    store(s, &mut row[v * S::LANES..], *sum);
                }
            }
            f += B;
        }
        f
    }
    assert!(values.len() >= p.len() / (N * S::LANES) * d);
    let mut f = 0;
    if S::LANES == 16 || N == 1 {
        f = go::<S, 8, N>(s, d, f, values, p, rescale, acc);
    } else {
        f = go::<S, 6, N>(s, d, f, values, p, rescale, acc);
    }
    f = go::<S, 4, N>(s, d, f, values, p, rescale, acc);
    f = go::<S, 2, N>(s, d, f, values, p, rescale, acc);
    go::<S, 1, N>(s, d, f, values, p, rescale, acc);
}

/// The heads of a group that one pass over a tile serves: three, but two twice rather than three
/// and one.
pub(super) fn heads_at_once(left: usize) -> usize {
    match left {
        1 => 1,
        2 | 4 => 2,
        _ => 3,
    }
}

/// Lanes are features; each query on its own, so that no score is ever masked.
#[inline(always)]
fn few<S: Simd>(
    s: S,
    call: Call<'_>,
    task: &Task,
    top: &mut [f32],
    sum: &mut [f32],
    acc: &mut [f32],
) {
    let shape = call.shape;
    let (g, d) = (shape.group(), shape.head_dim);
    let loader = Loader {
        store: call.heads[task.head],
        rotation: call.rotation,
        d,
        copies: task.tokens.len() * g >= COPY_ROWS,
    };
    let len = loader.store.len();
    let rows = task.tokens.len() * g;
    top[..rows].fill(f32::NEG_INFINITY);
    sum[..rows].fill(0.0);
    acc[..rows * d].fill(0.0);
    let tile = FEW_TILE * d;
    let rotated = if call.rotation.is_some() { tile } else { 0 };
    let lengths = [rows * d, 3 * FEW_TILE, tile, tile, rotated];
    let mut memory = Scratch::for_lengths(&lengths);
    let [q, p, k_buf, v_buf, rot_buf] = memory.slices(lengths);
    for (row, to) in q.chunks_exact_mut(d).enumerate() {
        let token = task.tokens.start + row / g;
        let from = &call.q[(token * shape.heads + task.head * g + row % g) * d..][..d];
        for (x, to) in from.iter().zip(to) {
            *to = x * log2_scale(shape);
        }
    }
    for start in task.units.clone().step_by(FEW_TILE) {
        let units = start..(start + FEW_TILE).min(task.units.end);
        let keys = match loader.store.stored_keys(units.clone()) {
            Some(keys) if call.rotation.is_none() => keys,
            _ => Floats::F32(loader.keys(s, units.clone(), k_buf, rot_buf)),
        };
        let values = match loader.store.stored_values(units.clone()) {
            Some(values) => values,
            None => Floats::F32(loader.values(units.clone(), v_buf)),
        };
        for local in 0..task.tokens.len() {
            let visible = shape.sees(len, task.tokens.start + local).min(units.end);
            if visible <= start {
                continue;
            }
            let n = (visible - start) * d;
            let mut row = local * g;
            while row < (local + 1) * g {
                let group = Rows {
                    d,
                    keys: keys.slice(0..n),
                    values: values.slice(0..n),
                    q: &q[row * d..],
                    p,
                    top: &mut top[row..],
                    sum: &mut sum[row..],
                    acc: &mut acc[row * d..],
                };
                match heads_at_once((local + 1) * g - row) {
                    1 => group.step::<S, 1>(s),
                    2 => group.step::<S, 2>(s),
                    _ => group.step::<S, 3>(s),
                }
                row += heads_at_once((local + 1) * g - row);
            }
        }
    }
}

/// Scores `[R, FEW_TILE]` of `R` rows `q` (scaled) against the keys of a tile; those beyond the
/// tile's units, up to a whole vector, are -∞.
#[inline(always)]
pub(super) fn dot_scores<S: Simd, E: Element, const R: usize>(
    s: S,
    d: usize,
    keys: &[E],
    q: &[f32],
    p: &mut [f32],
) {
    let units = keys.len() / d;
    assert!(q.len() >= R * d && p.len() >= R * FEW_TILE && units <= FEW_TILE);
    // Twelve sums, three queries and a key fill sixteen registers; conversion needs some more.
    if E::CONVERTED && S::LANES != 16 && R == 3 {
        for k in (0..units).step_by(3) {
            dots::<S, E, R, 3>(s, d, k, units, keys, q, p);
        }
    } else {
        for k in (0..units).step_by(4) {
            dots::<S, E, R, 4>(s, d, k, units, keys, q, p);
        }
    }
    for r in 0..R {
        p[r * FEW_TILE + units..r * FEW_TILE + units.next_multiple_of(16)].fill(f32::NEG_INFINITY);
    }
}

/// Scores of `R` rows against `K` (at most 4) keys from `k`.
#[inline(always)]
fn dots<S: Simd, E: Element, const R: usize, const K: usize>(
    s: S,
    d: usize,
    k: usize,
    units: usize,
    keys: &[E],
    q: &[f32],
    p: &mut [f32],
) {
    assert!(units > 0 && keys.len() >= units * d && q.len() >= R * d);
    let whole = d - d % S::LANES;
    // Beyond the last key it is read again, and what comes of it is left out.
    let mut at = [0; K];
    for (j, at) in at.iter_mut().enumerate() {
        *at = (k + j).min(units - 1) * d;
    }
    let mut sums = [[s.splat(0.0); K]; R];
    for c in (0..whole).step_by(S::LANES) {
        // SAFETY: `at` are starts of rows of d numbers in `keys`, c + LANES <= d, and `q` has R
        // such rows (checked above).
        unsafe {
            let mut rows = [s.splat(0.0); R];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = s.load(q.as_ptr().add(r * d + c));
            }
            for j in 0..K {
                let key = E::load(s, keys.as_ptr().add(at[j] + c));
                for r in 0..R {
                    sums[r][j] = s.fma(rows[r], key, sums[r][j]);
                }
            }
        }
    }
    // A loop of its own, so short that the sums never leave their registers.
    let mut dots = [[0.0; 4]; R];
    for r in 0..R {
        let mut four = [s.splat(0.0); 4];
        four[..K].copy_from_slice(&sums[r]);
        dots[r] = s.sum4(four);
    }
    for r in 0..R {
        for c in whole..d {
            for j in 0..K {
                dots[r][j] += q[r * d + c] * keys[at[j] + c].get();
            }
        }
        let p = &mut p[r * FEW_TILE + k..(r + 1) * FEW_TILE];
        let n = K.min(p.len());
        p[..n].copy_from_slice(&dots[r][..n]);
    }
}

/// One tile against a few heads of one query.
struct Rows<'a> {
    d: usize,
    keys: Floats<'a>,
    values: Floats<'a>,
    q: &'a [f32],
    p: &'a mut [f32],
    top: &'a mut [f32],
    sum: &'a mut [f32],
    acc: &'a mut [f32],
}

impl Rows<'_> {
    #[inline(always)]
    fn step<S: Simd, const R: usize>(self, s: S) {
        let d = self.d;
        let units = self.keys.len() / d;
        each_type!(self.keys, keys => dot_scores::<S, _, R>(s, d, keys, self.q, self.p));
        let mut rescale = [0.0; R];
        for r in 0..R {
            let p = &mut self.p[r * FEW_TILE..r * FEW_TILE + units.next_multiple_of(S::LANES)];
            let mut new = s.splat(self.top[r]);
            for p in p.chunks_exact(S::LANES) {
                new = s.max(new, load(s, p));
            }
            let new = s.largest(new);
            let reference = if new == f32::NEG_INFINITY { 0.0 } else { new };
            let mut sums = s.splat(0.0);
            for p in p.chunks_exact_mut(S::LANES) {
                let weight = exp2_nonpositive(s, s.sub(load(s, p), s.splat(reference)));
                sums = s.add(sums, weight);
                store(s, p, weight);
            }
            rescale[r] = (self.top[r] - reference).exp2();
            self.top[r] = new;
            self.sum[r] = self.sum[r] * rescale[r] + s.sum(sums);
        }
        each_type!(self.values, values => {
            weigh_all::<S, _, R>(s, d, values, self.p, &rescale, self.acc);
        });
    }
}

/// `acc[r] = acc[r] · rescale[r] + Σ_k p[r, k] · values[k]`.
#[inline(always)]
fn weigh_all<S: Simd, E: Element, const R: usize>(
    s: S,
    d: usize,
    values: &[E],
    p: &[f32],
    rescale: &[f32; R],
    acc: &mut [f32],
) {
    let vectors = d / S::LANES;
    let mut at = 0;
    while at < vectors {
        match vectors - at {
            // As for scores: conversion needs registers of its own.
            3.. if E::CONVERTED && S::LANES != 16 && R == 3 => {
                weigh_rows::<S, E, R, 3>(s, d, at, values, p, rescale, acc);
                at += 3;
            }
            1 => {
                weigh_rows::<S, E, R, 1>(s, d, at, values, p, rescale, acc);
                at += 1;
            }
            2 | 3 => {
                weigh_rows::<S, E, R, 2>(s, d, at, values, p, rescale, acc);
                at += 2;
            }
            _ => {
                weigh_rows::<S, E, R, 4>(s, d, at, values, p, rescale, acc);
                at += 4;
            }
        }
    }
    for r in 0..R {
        for f in vectors * S::LANES..d {
            let mut sum = acc[r * d + f] * rescale[r];
            for (value, p) in values.chunks_exact(d).zip(&p[r * FEW_TILE..]) {
                sum += p * value[f].get();
            }
            acc[r * d + f] = sum;
        }
    }
}

/// The same for `C` vectors of features from vector `at`.
#[inline(always)]
fn weigh_rows<S: Simd, E: Element, const R: usize, const C: usize>(
    s: S,
    d: usize,
    at: usize,
    values: &[E],
    p: &[f32],
    rescale: &[f32; R],
    acc: &mut [f32],
) {
    let f = at * S::LANES;
    let units = values.len() / d;
    assert!(
        f + C * S::LANES <= d && p.len() >= R * FEW_TILE && units <= FEW_TILE && acc.len() >= R * d
    );
    let mut sums = [[s.splat(0.0); C]; R];
    for r in 0..R {
        for c in 0..C {
            let old = load(s, &acc[r * d + f + c * S::LANES..]);
            sums[r][c] = s.mul(old, s.splat(rescale[r]));
        }
    }
    for k in 0..units {
        // SAFETY: `values` holds `units` rows of d numbers, f + C · LANES <= d, and `p` R rows of
        // at least as many weights (checked above).
        unsafe {
            // All weights before any value: three rows then need sixteen registers, not one more.
            let mut weights = [s.splat(0.0); R];
            for (r, weight) in weights.iter_mut().enumerate() {
                *weight = s.splat(*p.as_ptr().add(r * FEW_TILE + k));
            }
            let row = values.as_ptr().add(k * d + f);
            for c in 0..C {
                let value = E::load(s, row.add(c * S::LANES));
                for r in 0..R {
                    sums[r][c] = s.fma(weights[r], value, sums[r][c]);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (c, sum) in sums.iter().enumerate() {
            store(s, &mut acc[r * d + f + c * S::LANES..], *sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{rope, testing::*, tiles::DenseTiles};
    use half::{bf16, f16};
    use proptest::prelude::*;

    /// The textbook formula in double precision.
    fn oracle(
        q: &[f32],
        keys: &[Vec<f32>],
        values: &[Vec<f32>],
        shape: AttnShape,
        table: Option<&RopeTable>,
    ) -> Vec<f32> {
        let d = shape.head_dim;
        let mut out = Vec::new();
        for token in 0..shape.tokens {
            for head in 0..shape.heads {
                let store = head / shape.group();
                let mut keys = keys[store].clone();
                if let Some(table) = table {
                    rope::rotate(&mut keys, d, d, table, |i| i, false);
                }
                let len = keys.len() / d;
                let seen = (len + token + 1).saturating_sub(shape.tokens);
                let q = &q[(token * shape.heads + head) * d..][..d];
                let logits: Vec<f64> = (0..seen)
                    .map(|k| {
                        let dot: f64 = q
                            .iter()
                            .zip(&keys[k * d..])
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum();
                        dot * f64::from(shape.scale)
                    })
                    .collect();
                let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = logits.iter().map(|l| (l - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                for f in 0..d {
                    let sum: f64 = (0..seen)
                        .map(|k| weights[k] * f64::from(values[store][k * d + f]))
                        .sum();
                    out.push(if seen == 0 { 0.0 } else { (sum / total) as f32 });
                }
            }
        }
        out
    }

    fn same(a: &[f32], b: &[f32], tolerance: f32) -> Result<(), String> {
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let close = (a - b).abs() <= tolerance || a == b || (a.is_nan() && b.is_nan());
            if !close {
                return Err(format!("at {i}: {a} for {b}"));
            }
        }
        Ok(())
    }

    fn tiles<'a>(keys: &'a [Vec<f32>], values: &'a [Vec<f32>], d: usize) -> Vec<DenseTiles<'a>> {
        keys.iter()
            .zip(values)
            .map(|(k, v)| DenseTiles::new(&k[..], &v[..], d))
            .collect()
    }

    fn refs<'a>(tiles: &'a [DenseTiles<'a>]) -> Vec<&'a dyn KvTiles> {
        tiles.iter().map(|t| t as &dyn KvTiles).collect()
    }

    #[derive(Debug, Clone)]
    struct Case {
        shape: AttnShape,
        lens: Vec<usize>,
        rotary: Option<usize>,
        seed: u64,
    }

    fn case() -> impl Strategy<Value = Case> {
        let sizes = (
            prop_oneof![1usize..4, 4usize..40, 60usize..150],
            1usize..4,
            1usize..6,
            prop_oneof![1usize..40, Just(64), Just(80), Just(96), Just(128)],
        );
        (sizes, 0usize..4, any::<u64>())
            .prop_flat_map(|((tokens, kv_heads, group, d), rotary, seed)| {
                let len = prop_oneof![Just(0usize), 0usize..20, 0usize..300, Just(600)];
                (
                    Just((tokens, kv_heads, group, d, rotary, seed)),
                    prop::collection::vec(len, kv_heads),
                )
            })
            .prop_map(|((tokens, kv_heads, group, d, rotary, seed), more)| Case {
                shape: AttnShape {
                    tokens,
                    heads: kv_heads * group,
                    kv_heads,
                    head_dim: d,
                    scale: 1.0 / (d as f32).sqrt(),
                },
                lens: more.into_iter().map(|m| tokens + m).collect(),
                rotary: match rotary {
                    0 => Some(d / 2 * 2),
                    1 => Some(d / 4 * 2),
                    _ => None,
                },
                seed,
            })
    }

    impl Case {
        fn data(&self) -> (Vec<f32>, Vec<Vec<f32>>, Vec<Vec<f32>>, Option<RopeTable>) {
            let (s, d) = (self.shape, self.shape.head_dim);
            let mut rng = Numbers::new(self.seed);
            let mut q = rng.take(s.tokens * s.heads * d);
            // Large enough that softmax is far from uniform.
            q.iter_mut().for_each(|x| *x *= 6.0);
            let keys = self.lens.iter().map(|n| rng.take(n * d)).collect();
            let values = self.lens.iter().map(|n| rng.take(n * d)).collect();
            let table = self.rotary.map(|r| {
                let f: Vec<f32> = (0..r / 2).map(|i| 1.0 / (1.0 + i as f32)).collect();
                RopeTable::new(&f, 1.25, 0..self.lens.iter().copied().max().unwrap_or(0))
            });
            (q, keys, values, table)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn every_path_agrees_with_the_textbook(case in case()) {
            let (q, keys, values, table) = case.data();
            let expected = oracle(&q, &keys, &values, case.shape, table.as_ref());
            let tiles = tiles(&keys, &values, case.shape.head_dim);
            for isa in Isa::all() {
                let mut out = vec![f32::NAN; q.len()];
                attend_with(isa, &q, &refs(&tiles), case.shape, table.as_ref(), &mut out);
                if let Err(e) = same(&out, &expected, 1e-5) {
                    prop_assert!(false, "{isa:?} {e}");
                }
            }
        }

        #[test]
        fn numbers_that_are_not_finite_reach_the_rows_that_see_them_only(
            case in case(),
            places in prop::collection::vec((0usize..3, any::<prop::sample::Index>(), 0usize..3), 1..4),
        ) {
            let (mut q, mut keys, mut values, table) = case.data();
            for (what, place, which) in places {
                let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][which];
                let place = place.index(1 << 20);
                let head = place % keys.len();
                let list = match what {
                    0 => &mut q,
                    1 => &mut keys[head],
                    _ => &mut values[head],
                };
                let n = list.len();
                list[place % n] = bad;
            }
            let expected = oracle(&q, &keys, &values, case.shape, table.as_ref());
            let tiles = tiles(&keys, &values, case.shape.head_dim);
            for isa in Isa::all() {
                let mut out = vec![0.0; q.len()];
                attend_with(isa, &q, &refs(&tiles), case.shape, table.as_ref(), &mut out);
                if let Err(e) = same(&out, &expected, 1e-5) {
                    prop_assert!(false, "{isa:?} {e}");
                }
            }
        }

        #[test]
        fn sixteen_bit_stores_are_what_their_numbers_are(case in case()) {
            let (q, keys, values, table) = case.data();
            let d = case.shape.head_dim;
            let k16: Vec<Vec<f16>> = keys.iter().map(|k| k.iter().map(|x| f16::from_f32(*x)).collect()).collect();
            let v16: Vec<Vec<bf16>> = values.iter().map(|v| v.iter().map(|x| bf16::from_f32(*x)).collect()).collect();
            let keys: Vec<Vec<f32>> = k16.iter().map(|k| k.iter().map(|x| x.to_f32()).collect()).collect();
            let values: Vec<Vec<f32>> = v16.iter().map(|v| v.iter().map(|x| x.to_f32()).collect()).collect();
            let dense = tiles(&keys, &values, d);
            let half: Vec<DenseTiles<'_>> = k16.iter().zip(&v16).map(|(k, v)| DenseTiles::new(&k[..], &v[..], d)).collect();
            for isa in Isa::all() {
                let (mut a, mut b) = (vec![0.0; q.len()], vec![1.0; q.len()]);
                attend_with(isa, &q, &refs(&dense), case.shape, table.as_ref(), &mut a);
                attend_with(isa, &q, &refs(&half), case.shape, table.as_ref(), &mut b);
                prop_assert_eq!(&a, &b);
            }
        }
    }

    fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
            .install(f)
    }

    #[test]
    fn results_do_not_depend_on_threads() {
        for tokens in [1, 2, 70, 300] {
            let case = Case {
                shape: AttnShape {
                    tokens,
                    heads: 9,
                    kv_heads: 3,
                    head_dim: 64,
                    scale: 0.125,
                },
                lens: vec![3000, 1500, 300 + tokens],
                rotary: None,
                seed: 5,
            };
            let (q, keys, values, _) = case.data();
            let tiles = tiles(&keys, &values, 64);
            let run = |threads| {
                with_threads(threads, || {
                    let mut out = vec![0.0; q.len()];
                    attend(&q, &refs(&tiles), case.shape, None, &mut out);
                    out
                })
            };
            let (one, two, five) = (run(1), run(2), run(5));
            assert_eq!(one, two);
            assert_eq!(one, five);
            same(&one, &oracle(&q, &keys, &values, case.shape, None), 1e-5).unwrap();
        }
    }

    #[test]
    fn queries_before_the_first_unit_see_nothing() {
        let shape = AttnShape {
            tokens: 4,
            heads: 2,
            kv_heads: 2,
            head_dim: 3,
            scale: 1.0,
        };
        let (keys, values) = (
            vec![vec![0.5; 6], vec![]],
            vec![vec![1.0, 2.0, 3.0, 1.0, 2.0, 3.0], vec![]],
        );
        let tiles = tiles(&keys, &values, 3);
        let mut out = vec![9.0; 24];
        attend(&[1.0; 24], &refs(&tiles), shape, None, &mut out);
        let row = [1.0, 2.0, 3.0, 0.0, 0.0, 0.0];
        assert_eq!(out, [[0.0; 12].as_slice(), &row, &row].concat());
    }

    #[test]
    #[should_panic(expected = "a rotary table of 3 rows")]
    fn a_short_table_is_refused() {
        let shape = AttnShape {
            tokens: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            scale: 1.0,
        };
        let table = RopeTable::new(&[1.0], 1.0, 0..3);
        let (keys, values) = (vec![vec![0.0; 8]], vec![vec![0.0; 8]]);
        let tiles = tiles(&keys, &values, 2);
        attend(&[0.0; 2], &refs(&tiles), shape, Some(&table), &mut [0.0; 2]);
    }
}
