//! Rotary position embedding: tables and rotation of halves.

use super::simd::{Isa, Simd, dispatch, load, store};
use rayon::prelude::*;
use std::ops::Range;

/// Fewer numbers than this are handled by the calling thread alone.
const PARALLEL: usize = 1 << 15;

/// Cosines and sines of consecutive positions, `[positions, rotary_dim / 2]` each.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    inv_freq: Vec<f32>,
    factor: f32,
    positions: Range<usize>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// The rows of `positions`: row 0 is `positions.start`.
    ///
    /// `inv_freq` are the `rotary_dim / 2` frequencies in radians per position; cosines and sines
    /// are multiplied by `factor` (1 but for scalings such as LongRoPE). The angle is the `f32`
    /// product of position and frequency, as published models were run.
    pub fn new(inv_freq: &[f32], factor: f32, positions: Range<usize>) -> Self {
        let half = inv_freq.len();
        let mut cos = vec![0.0; positions.len() * half];
        let mut sin = cos.clone();
        let fill = |(row, (cos, sin)): (usize, (&mut [f32], &mut [f32]))| {
            let position = (positions.start + row) as f32;
            for ((f, cos), sin) in inv_freq.iter().zip(cos).zip(sin) {
                let (s, c) = (position * f).sin_cos();
                (*cos, *sin) = (c * factor, s * factor);
            }
        };
        // Without frequencies there are no chunks, but their length must not be 0.
        let width = half.max(1);
        if cos.len() < PARALLEL / 8 {
            let rows = cos.chunks_mut(width).zip(sin.chunks_mut(width));
            rows.enumerate().for_each(fill);
        } else {
            cos.par_chunks_mut(width)
                .zip(sin.par_chunks_mut(width))
                .with_min_len(16)
                .enumerate()
                .for_each(fill);
        }
        Self {
            inv_freq: inv_freq.to_vec(),
            factor,
            positions,
            cos,
            sin,
        }
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// How many features of a head are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// The factor that cosines and sines carry.
    pub fn factor(&self) -> f32 {
        self.factor
    }

    /// The frequencies in radians per position, `rotary_dim / 2` of them.
    pub fn frequencies(&self) -> &[f32] {
        &self.inv_freq
    }

    /// The positions that the rows are for.
    pub fn positions(&self) -> Range<usize> {
        self.positions.clone()
    }

    /// All cosines, `[len, rotary_dim / 2]`.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// All sines, `[len, rotary_dim / 2]`.
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }

    /// Cosines and sines of one row.
    #[inline(always)]
    fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let half = self.inv_freq.len();
        let at = row * half..(row + 1) * half;
        (&self.cos[at.clone()], &self.sin[at])
    }
}

/// Rotates rows in place: `(x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin)` where `x₁` and `x₂` are
/// the first and second half of the first `rotary_dim` features; the features after them stay.
///
/// `x` holds rows of `head_dim` numbers that start `stride` numbers apart; numbers between rows
/// stay. `row_of(i)` is the **row of the table** for row `i` of `x`. For queries `[t, H, d]`, that
/// is stride `d` and `row_of = |i| first + i / H`. With `inverse`, the rotation is undone, the
/// table's factor included.
///
/// # Panics
/// If `rotary_dim > head_dim`, `head_dim > stride`, the last row is cut off, or a table row is
/// missing.
pub fn rotate(
    x: &mut [f32],
    head_dim: usize,
    stride: usize,
    table: &RopeTable,
    row_of: impl Fn(usize) -> usize + Sync,
    inverse: bool,
) {
    rotate_with(Isa::best(), x, head_dim, stride, table, row_of, inverse);
}

fn rotate_with(
    isa: Isa,
    x: &mut [f32],
    head_dim: usize,
    stride: usize,
    table: &RopeTable,
    row_of: impl Fn(usize) -> usize + Sync,
    inverse: bool,
) {
    assert!(
        table.rotary_dim() <= head_dim && head_dim <= stride,
        "rotating {} of {head_dim} features in rows {stride} apart",
        table.rotary_dim()
    );
    assert!(
        x.len().is_multiple_of(stride) || x.len() % stride >= head_dim,
        "the last row is cut off"
    );
    #[inline(always)]
    fn body<S: Simd>(
        s: S,
        x: &mut [f32],
        stride: usize,
        first: usize,
        table: &RopeTable,
        row_of: impl Fn(usize) -> usize,
        inverse: bool,
    ) {
        let half = table.inv_freq.len();
        let scale = if inverse {
            1.0 / (table.factor * table.factor)
        } else {
            1.0
        };
        for (i, row) in x.chunks_mut(stride).enumerate() {
            let (cos, sin) = table.row(row_of(first + i));
            let (x1, x2) = row[..2 * half].split_at_mut(half);
            rotate_row(s, x1, x2, cos, sin, scale, inverse);
        }
    }
    let rows_in_job = (PARALLEL / 4).div_ceil(stride);
    if x.len() < PARALLEL {
        dispatch!(isa, s => body(s, x, stride, 0, table, row_of, inverse));
    } else {
        let jobs = x.par_chunks_mut(rows_in_job * stride).enumerate();
        jobs.for_each(|(job, x)| {
            let first = job * rows_in_job;
            dispatch!(isa, s => body(s, x, stride, first, table, &row_of, inverse));
        });
    }
}

/// One row in place.
#[inline(always)]
fn rotate_row<S: Simd>(
    s: S,
    x1: &mut [f32],
    x2: &mut [f32],
    cos: &[f32],
    sin: &[f32],
    scale: f32,
    inverse: bool,
) {
    let sign = if inverse { -scale } else { scale };
    let half = cos.len();
    let (x1, x2, sin) = (&mut x1[..half], &mut x2[..half], &sin[..half]);
    let whole = half - half % S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        let (a, b) = (load(s, &x1[i..]), load(s, &x2[i..]));
        let (c, n) = (load(s, &cos[i..]), load(s, &sin[i..]));
        let (c, n) = if scale == 1.0 && !inverse {
            (c, n)
        } else {
            (s.mul(c, s.splat(scale)), s.mul(n, s.splat(sign)))
        };
        // Products rounded before the sum, as two multiplications and an addition would be.
        store(s, &mut x1[i..], s.sub(s.mul(a, c), s.mul(b, n)));
        store(s, &mut x2[i..], s.add(s.mul(b, c), s.mul(a, n)));
    }
    for i in whole..half {
        let (a, b) = (x1[i], x2[i]);
        let (c, n) = (cos[i] * scale, sin[i] * sign);
        x1[i] = a * c - b * n;
        x2[i] = b * c + a * n;
    }
}

/// Which row of a table is for row `i`: `places[i]`, or where there are none `first + i`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) first: usize,
    pub(super) places: Option<&'a [u32]>,
}

/// Rotates rows `[rows, d]` into `out`.
#[inline(always)]
pub(super) fn rotate_into<S: Simd>(
    s: S,
    x: &[f32],
    out: &mut [f32],
    d: usize,
    table: &RopeTable,
    rows: Rows<'_>,
) {
    let half = table.inv_freq.len();
    for (i, (x, out)) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)).enumerate() {
        let row = match rows.places {
            Some(places) => places[i] as usize,
            None => rows.first + i,
        };
        let (cos, sin) = table.row(row);
        let (x1, rest) = x.split_at(half);
        let (x2, tail) = rest.split_at(half);
        let (y1, rest) = out.split_at_mut(half);
        let (y2, out_tail) = rest.split_at_mut(half);
        let whole = half - half % S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            let (a, b) = (load(s, &x1[i..]), load(s, &x2[i..]));
            let (c, n) = (load(s, &cos[i..]), load(s, &sin[i..]));
            store(s, &mut y1[i..], s.sub(s.mul(a, c), s.mul(b, n)));
            store(s, &mut y2[i..], s.add(s.mul(b, c), s.mul(a, n)));
        }
        for i in whole..half {
            y1[i] = x1[i] * cos[i] - x2[i] * sin[i];
            y2[i] = x2[i] * cos[i] + x1[i] * sin[i];
        }
        out_tail.copy_from_slice(tail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Numbers;
    use proptest::prelude::*;

    fn frequencies(half: usize) -> Vec<f32> {
        (0..half)
            .map(|i| 1.0 / 10_000f32.powf(i as f32 / half as f32))
            .collect()
    }

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        Numbers::new(seed).take(n)
    }

    const IN_ORDER: Rows<'_> = Rows {
        first: 0,
        places: None,
    };

    proptest! {
        #[test]
        fn rotation_agrees_with_its_definition_and_is_undone(
            rows in 1usize..6,
            half in 0usize..40,
            tail in 0usize..9,
            gap in 0usize..5,
            first in 0usize..5000,
            factor in 0.5f32..2.0,
            seed in any::<u64>(),
        ) {
            let d = 2 * half + tail.max(1);
            let stride = d + gap;
            let inv_freq = frequencies(half);
            let table = RopeTable::new(&inv_freq, factor, first..first + rows);
            let x = numbers(rows * stride - gap, seed);
            // Rows in reverse, to see that positions are asked for.
            let row_of = |i: usize| rows - 1 - i;
            for isa in Isa::all() {
                let mut y = x.clone();
                rotate_with(isa, &mut y, d, stride, &table, row_of, false);
                for i in 0..x.len() {
                    let (r, c) = (i / stride, i % stride);
                    let position = first + row_of(r);
                    let expected = if c < 2 * half {
                        let angle = position as f32 * inv_freq[c % half];
                        let (sin, cos) = (f64::from(angle).sin(), f64::from(angle).cos());
                        let (a, b) = (f64::from(x[r * stride + c % half]), f64::from(x[r * stride + c % half + half]));
                        f64::from(factor) * if c < half { a * cos - b * sin } else { b * cos + a * sin }
                    } else {
                        f64::from(x[i])
                    };
                    prop_assert!((f64::from(y[i]) - expected).abs() < 1e-6, "{isa:?} row {r} feature {c}: {} for {expected}", y[i]);
                    if c >= 2 * half {
                        prop_assert_eq!(y[i], x[i]);
                    }
                }
                rotate_with(isa, &mut y, d, stride, &table, row_of, true);
                for i in 0..x.len() {
                    prop_assert!((y[i] - x[i]).abs() < 2e-6, "{isa:?}");
                }
                if gap == 0 {
                    let (mut a, mut b) = (x.clone(), vec![f32::NAN; x.len()]);
                    rotate_with(isa, &mut a, d, d, &table, |i| i, false);
                    dispatch!(isa, s => rotate_into(s, &x, &mut b, d, &table, IN_ORDER));
                    prop_assert_eq!(a, b);
                    let places: Vec<u32> = (0..rows as u32).rev().collect();
                    let rows = Rows { first: 0, places: Some(&places) };
                    let (mut a, mut b) = (x.clone(), vec![f32::NAN; x.len()]);
                    rotate_with(isa, &mut a, d, d, &table, row_of, false);
                    dispatch!(isa, s => rotate_into(s, &x, &mut b, d, &table, rows));
                    prop_assert_eq!(a, b);
                }
            }
        }
    }

    #[test]
    fn large_inputs_are_rotated_as_small_ones() {
        let (d, rows) = (64, 2000);
        let table = RopeTable::new(&frequencies(32), 1.0, 7..7 + rows);
        let x = numbers(rows * d, 3);
        let mut all = x.clone();
        rotate(&mut all, d, d, &table, |i| i, false);
        for (i, row) in x.chunks(d).enumerate() {
            let mut row = row.to_vec();
            rotate(&mut row, d, d, &table, |_| i, false);
            assert_eq!(row, all[i * d..(i + 1) * d]);
        }
    }

    #[test]
    fn tables_have_a_row_for_each_position() {
        let f = frequencies(24);
        assert!(RopeTable::new(&f, 1.5, 3..3).is_empty());
        assert_eq!(RopeTable::new(&[], 1.0, 3..900).len(), 897);
        // Alone and by all threads.
        for end in [100, 900] {
            let table = RopeTable::new(&f, 1.5, 3..end);
            assert_eq!(table.len(), end - 3);
            assert_eq!(table.rotary_dim(), 48);
            for (position, (cos, sin)) in
                (3..end).zip(table.cos().chunks(24).zip(table.sin().chunks(24)))
            {
                for i in 0..24 {
                    let angle = position as f32 * f[i];
                    assert_eq!((cos[i], sin[i]), (angle.cos() * 1.5, angle.sin() * 1.5));
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "cut off")]
    fn half_a_row_is_refused() {
        let table = RopeTable::new(&frequencies(2), 1.0, 0..4);
        rotate(&mut [0.0; 7], 4, 4, &table, |i| i, false);
    }
}
