//! Many queries: lanes are (query, head of the group) rows.

use super::{Call, TILE, Task};
use crate::{
    micro::{outer, pack_rows, panels, unpack_lanes},
    scratch::Scratch,
    simd::{Simd, exp2_nonpositive, load, store},
};

/// Lanes are rows (query by query, the heads of the group within).
#[inline(always)]
pub(super) fn many<S: Simd>(
    s: S,
    call: Call<'_>,
    task: &Task,
    top_out: &mut [f32],
    sum_out: &mut [f32],
    acc_out: &mut [f32],
) {
    let shape = call.shape;
    let (g, d) = (shape.group(), shape.head_dim);
    let loader = call.loader(task);
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
    for lanes in panels(S::LANES, rows) {
        let panel = &mut q[lanes.start * d..lanes.end * d];
        let rows = lanes.start..lanes.end.min(rows);
        pack_rows(
            s,
            rows.map(|row| call.row(task, row)),
            call.log2_scale(),
            d,
            panel,
        );
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
                from: None,
                finite,
            };
            panel.run(s, lanes.len() / S::LANES);
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
pub(super) fn all_finite<S: Simd>(s: S, x: &[f32]) -> bool {
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
pub(crate) fn scores<S: Simd, const N: usize>(
    s: S,
    d: usize,
    keys: &[f32],
    q: &[f32],
    p: &mut [f32],
) {
    #[inline(always)]
    fn units_by<S: Simd, const B: usize, const N: usize>(
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
        k = units_by::<S, 8, N>(s, d, k, keys, q, p);
    } else {
        k = units_by::<S, 6, N>(s, d, k, keys, q, p);
    }
    k = units_by::<S, 4, N>(s, d, k, keys, q, p);
    k = units_by::<S, 2, N>(s, d, k, keys, q, p);
    units_by::<S, 1, N>(s, d, k, keys, q, p);
}

/// Sets scores `[units, lanes]` to -∞ where a lane's limit is reached.
#[inline(always)]
pub(crate) fn hide(p: &mut [f32], limits: &[usize]) {
    let rows = p.chunks_exact_mut(limits.len()).enumerate();
    for (k, p) in rows.skip(limits.iter().copied().min().unwrap_or(0)) {
        for (p, limit) in p.iter_mut().zip(limits) {
            if *limit <= k {
                *p = f32::NEG_INFINITY;
            }
        }
    }
}

/// Sets scores `[units, lanes]` to -∞ before a lane's first unit.
#[inline(always)]
pub(crate) fn hide_before(p: &mut [f32], from: &[usize]) {
    let most = from.iter().copied().max().unwrap_or(0);
    let rows = p.chunks_exact_mut(from.len()).enumerate();
    for (k, p) in rows.take(most) {
        for (p, from) in p.iter_mut().zip(from) {
            if k < *from {
                *p = f32::NEG_INFINITY;
            }
        }
    }
}

/// One tile against one panel of rows.
pub(super) struct Panel<'a> {
    pub(super) d: usize,
    /// `[units, d]`, as are the values.
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    /// `[d, lanes]`
    pub(super) q: &'a [f32],
    /// `[d, lanes]`: sums of weighted values.
    pub(super) acc: &'a mut [f32],
    /// `[lanes]`: maxima of scores, in powers of two.
    pub(super) top: &'a mut [f32],
    /// `[lanes]`: sums of weights.
    pub(super) sum: &'a mut [f32],
    /// Room for `[units, lanes]`.
    pub(super) p: &'a mut [f32],
    /// For each lane up to which unit of the tile it sees, if any sees fewer than all.
    pub(super) limits: Option<&'a [usize]>,
    /// For each lane the first unit of the tile that it sees, if any sees fewer than all; limits are then
    /// given, too.
    pub(super) from: Option<&'a [usize]>,
    /// Whether a weight of 0 makes any value vanish.
    pub(super) finite: bool,
}

impl Panel<'_> {
    /// With so many vectors of rows.
    #[inline(always)]
    pub(super) fn run<S: Simd>(self, s: S, vectors: usize) {
        match vectors {
            1 => self.step::<S, 1>(s),
            2 => self.step::<S, 2>(s),
            // Never reached with fewer registers, and then not compiled either.
            _ if S::LANES == 16 => self.step::<S, 3>(s),
            _ => unreachable!("panels have at most three vectors"),
        }
    }

    #[inline(always)]
    fn step<S: Simd, const N: usize>(self, s: S) {
        let (d, width) = (self.d, N * S::LANES);
        let units = self.keys.len() / d;
        let p = &mut self.p[..units * width];
        scores::<S, N>(s, d, self.keys, self.q, p);
        if let Some(limits) = self.limits {
            hide(p, limits);
        }
        if let Some(from) = self.from {
            hide_before(p, from);
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
                    let from = self.from.map_or(0, |from| from[lane]);
                    for k in from..limits[lane].min(units) {
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
    fn features_by<S: Simd, const B: usize, const N: usize>(
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
        f = features_by::<S, 8, N>(s, d, f, values, p, rescale, acc);
    } else {
        f = features_by::<S, 6, N>(s, d, f, values, p, rescale, acc);
    }
    f = features_by::<S, 4, N>(s, d, f, values, p, rescale, acc);
    f = features_by::<S, 2, N>(s, d, f, values, p, rescale, acc);
    features_by::<S, 1, N>(s, d, f, values, p, rescale, acc);
}
