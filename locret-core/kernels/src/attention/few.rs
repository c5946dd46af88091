//! Few queries: lanes are features.

use super::{Call, FEW_TILE, Task};
use crate::{
    dtype::Number,
    scratch::Scratch,
    simd::{Simd, exp2_nonpositive, load, store},
    tiles::{Floats, each_type},
};

/// How many bytes ahead of their use keys and values are asked for: a processor does not do so by itself beyond
/// the end of a page, of which there are as many as there are sequences, layers and heads.
const AHEAD: usize = 4096;

/// The heads of a group that one pass over a tile serves: three, but two twice rather than three
/// and one.
pub(crate) fn heads_at_once(left: usize) -> usize {
    match left {
        1 => 1,
        2 | 4 => 2,
        _ => 3,
    }
}

/// Lanes are features; each query on its own, so that no score is ever masked.
#[inline(always)]
pub(super) fn few<S: Simd>(
    s: S,
    call: Call<'_>,
    task: &Task,
    top: &mut [f32],
    sum: &mut [f32],
    acc: &mut [f32],
) {
    let shape = call.shape;
    let (g, d) = (shape.group(), shape.head_dim);
    let loader = call.loader(task);
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
        for (x, to) in call.row(task, row).iter().zip(to) {
            *to = x * call.log2_scale();
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
pub(crate) fn dot_scores<S: Simd, E: Number, const R: usize>(
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
fn dots<S: Simd, E: Number, const R: usize, const K: usize>(
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
                let key = keys.as_ptr().add(at[j] + c);
                s.prefetch(key.cast::<u8>().wrapping_add(AHEAD));
                let key = E::load(s, key);
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
                dots[r][j] += q[r * d + c] * keys[at[j] + c].to_f32();
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
fn weigh_all<S: Simd, E: Number, const R: usize>(
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
                sum += p * value[f].to_f32();
            }
            acc[r * d + f] = sum;
        }
    }
}

/// The same for `C` vectors of features from vector `at`.
#[inline(always)]
fn weigh_rows<S: Simd, E: Number, const R: usize, const C: usize>(
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
                let value = row.add(c * S::LANES);
                s.prefetch(value.cast::<u8>().wrapping_add(AHEAD));
                let value = E::load(s, value);
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
