//! Activations and norms, each in one pass over memory.

use super::simd::{Isa, Simd, dispatch, exp, load, store};
use rayon::prelude::*;

/// Numbers in a job; fewer in all than two jobs are handled by the calling thread alone.
const JOB: usize = 1 << 14;

/// SwiGLU (arXiv 2002.05202) of the output of a fused projection, whose rows are `n` gates and then
/// `n` ups: `out = silu(gate) · up`, number by number.
///
/// # Shapes
/// - `x`: `[rows, 2 n]`
/// - `out`: `[rows, n]`
///
/// # Panics
/// If the shapes don't fit each other.
pub fn swiglu_fused(x: &[f32], n: usize, out: &mut [f32]) {
    swiglu_fused_with(Isa::best(), x, n, out);
}

/// RMS norm (arXiv 1910.07467): `out = x / √(mean(x²) + eps) · weight` for each row.
///
/// # Shapes
/// - `x`, `out`: `[rows, n]`
/// - `weight`: `[n]`
///
/// # Panics
/// If the shapes don't fit each other.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    rms_norm_with(Isa::best(), x, weight, eps, out);
}

/// `residual += x`, then [`rms_norm`] of the sum into `out`.
///
/// # Shapes
/// - `residual`, `x`, `out`: `[rows, n]`
/// - `weight`: `[n]`
///
/// # Panics
/// If the shapes don't fit each other.
pub fn add_rms_norm(residual: &mut [f32], x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    add_rms_norm_with(Isa::best(), residual, x, weight, eps, out);
}

/// `a += b`, number by number.
///
/// # Panics
/// If the lengths differ.
pub fn add(a: &mut [f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "lengths of sums");
    let job = |(a, b): (&mut [f32], &[f32])| {
        for (a, b) in a.iter_mut().zip(b) {
            *a += b;
        }
    };
    if serial(a.len()) {
        job((a, b));
    } else {
        a.par_chunks_mut(JOB).zip(b.par_chunks(JOB)).for_each(job);
    }
}

/// A copy, made by all threads.
pub fn copied(x: &[f32]) -> Vec<f32> {
    if serial(x.len()) {
        return x.to_vec();
    }
    let mut out = Vec::with_capacity(x.len());
    out.spare_capacity_mut()
        .par_chunks_mut(JOB)
        .zip(x.par_chunks(JOB))
        .for_each(|(to, from)| {
            to[..from.len()].write_copy_of_slice(from);
        });
    // SAFETY: there is room for at least as many numbers as in `x`, in pieces of the same length, and
    // each piece was written.
    unsafe { out.set_len(x.len()) };
    out
}

fn serial(numbers: usize) -> bool {
    numbers < 2 * JOB || rayon::current_num_threads() == 1
}

#[inline(always)]
fn silu_vector<S: Simd>(s: S, x: S::V) -> S::V {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

/// Calls `f` with vectors of `x` and `y` and stores what it returns; the last, partial ones are
/// padded with zeros.
#[inline(always)]
fn zip_map<S: Simd>(s: S, x: &[f32], y: &[f32], out: &mut [f32], f: impl Fn(S::V, S::V) -> S::V) {
    let whole = out.len() - out.len() % S::LANES;
    let (x, x_rest) = x.split_at(whole);
    let (y, y_rest) = y.split_at(whole);
    let (out, out_rest) = out.split_at_mut(whole);
    let chunks = x.chunks_exact(S::LANES).zip(y.chunks_exact(S::LANES));
    for ((x, y), out) in chunks.zip(out.chunks_exact_mut(S::LANES)) {
        store(s, out, f(load(s, x), load(s, y)));
    }
    if !out_rest.is_empty() {
        let (mut a, mut b) = ([0.0; 16], [0.0; 16]);
        a[..x_rest.len()].copy_from_slice(x_rest);
        b[..y_rest.len()].copy_from_slice(y_rest);
        let v = f(load(s, &a), load(s, &b));
        store(s, &mut a, v);
        out_rest.copy_from_slice(&a[..out_rest.len()]);
    }
}

#[inline(always)]
pub(super) fn silu_row<S: Simd>(s: S, x: &mut [f32]) {
    let mut chunks = x.chunks_exact_mut(S::LANES);
    for x in &mut chunks {
        let y = silu_vector(s, load(s, x));
        store(s, x, y);
    }
    let rest = chunks.into_remainder();
    if rest.is_empty() {
        return;
    }
    let mut last = [0.0; 16];
    last[..rest.len()].copy_from_slice(rest);
    let y = silu_vector(s, load(s, &last));
    store(s, &mut last, y);
    rest.copy_from_slice(&last[..rest.len()]);
}

#[inline(always)]
fn swiglu_body<S: Simd>(s: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    zip_map(
        s,
        gate,
        up,
        out,
        #[inline(always)]
        |gate, up| s.mul(silu_vector(s, gate), up),
    );
}

fn swiglu_fused_with(isa: Isa, x: &[f32], n: usize, out: &mut [f32]) {
    assert!(
        x.len() == 2 * out.len() && (n > 0 || out.is_empty()) && out.len().is_multiple_of(n.max(1)),
        "fused SwiGLU of {} numbers into {} in rows of {n}",
        x.len(),
        out.len()
    );
    if out.is_empty() {
        return;
    }
    let row = |(x, out): (&[f32], &mut [f32])| {
        let (gate, up) = x.split_at(n);
        dispatch!(isa, s => swiglu_body(s, gate, up, out));
    };
    if serial(out.len()) {
        x.chunks_exact(2 * n)
            .zip(out.chunks_exact_mut(n))
            .for_each(row);
    } else {
        x.par_chunks_exact(2 * n)
            .zip(out.par_chunks_exact_mut(n))
            .with_min_len(JOB.div_ceil(n))
            .for_each(row);
    }
}

/// The reciprocal root of the mean square.
#[inline(always)]
fn rms_reciprocal<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    let chunks = x.chunks_exact(4 * S::LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for (i, sum) in sums.iter_mut().enumerate() {
            let x = load(s, &x[i * S::LANES..]);
            *sum = s.fma(x, x, *sum);
        }
    }
    let whole = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
    let square = s.sum(whole) + rest.iter().map(|x| x * x).sum::<f32>();
    1.0 / (square / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn norm_row<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = s.splat(rms_reciprocal(s, x, eps));
    zip_map(
        s,
        x,
        weight,
        out,
        #[inline(always)]
        |x, weight| s.mul(s.mul(x, scale), weight),
    );
}

fn rms_norm_with(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let n = weight.len();
    assert!(
        x.len() == out.len() && (n > 0 || out.is_empty()) && out.len().is_multiple_of(n.max(1)),
        "norm of {} numbers into {} in rows of {n}",
        x.len(),
        out.len()
    );
    if out.is_empty() {
        return;
    }
    let row = |(x, out): (&[f32], &mut [f32])| {
        dispatch!(isa, s => norm_row(s, x, weight, eps, out));
    };
    if serial(out.len()) {
        x.chunks_exact(n).zip(out.chunks_exact_mut(n)).for_each(row);
    } else {
        x.par_chunks_exact(n)
            .zip(out.par_chunks_exact_mut(n))
            .with_min_len(JOB.div_ceil(n))
            .for_each(row);
    }
}

fn add_rms_norm_with(
    isa: Isa,
    residual: &mut [f32],
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let n = weight.len();
    assert!(
        x.len() == out.len()
            && residual.len() == out.len()
            && (n > 0 || out.is_empty())
            && out.len().is_multiple_of(n.max(1)),
        "sum and norm of {} and {} numbers into {} in rows of {n}",
        residual.len(),
        x.len(),
        out.len()
    );
    if out.is_empty() {
        return;
    }
    let row = |((residual, x), out): ((&mut [f32], &[f32]), &mut [f32])| {
        for (r, x) in residual.iter_mut().zip(x) {
            *r += x;
        }
        dispatch!(isa, s => norm_row(s, residual, weight, eps, out));
    };
    if serial(out.len()) {
        residual
            .chunks_exact_mut(n)
            .zip(x.chunks_exact(n))
            .zip(out.chunks_exact_mut(n))
            .for_each(row);
    } else {
        residual
            .par_chunks_exact_mut(n)
            .zip(x.par_chunks_exact(n))
            .zip(out.par_chunks_exact_mut(n))
            .with_min_len(JOB.div_ceil(n))
            .for_each(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Numbers;
    use proptest::prelude::*;

    fn silu_with(isa: Isa, x: &mut [f32]) {
        dispatch!(isa, s => silu_row(s, x));
    }

    fn exact_silu(x: f32) -> f64 {
        f64::from(x) / (1.0 + (-f64::from(x)).exp())
    }

    fn close(a: f32, b: f64) -> bool {
        let a = f64::from(a);
        a == b || (a - b).abs() <= 5e-7 * b.abs() + 1e-36 || (a.is_nan() && b.is_nan())
    }

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut x = Numbers::new(seed).take(n);
        for (i, x) in x.iter_mut().enumerate() {
            *x *= [1.0, 10.0, 80.0][i % 3];
        }
        x
    }

    proptest! {
        #[test]
        fn activations_agree_with_their_formula(
            rows in 1usize..5,
            n in 1usize..70,
            bad in prop::option::of((any::<prop::sample::Index>(), 0usize..3)),
            seed in any::<u64>(),
        ) {
            let mut x = values(rows * 2 * n, seed);
            if let Some((at, which)) = bad {
                let at = at.index(x.len());
                x[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][which];
            }
            for isa in Isa::all() {
                let mut y = x.clone();
                silu_with(isa, &mut y);
                for (x, y) in x.iter().zip(&y) {
                    prop_assert!(close(*y, exact_silu(*x)), "{isa:?} silu({x}) = {y}");
                }
                let mut out = vec![0.0; rows * n];
                swiglu_fused_with(isa, &x, n, &mut out);
                for (row, out) in x.chunks(2 * n).zip(out.chunks(n)) {
                    for i in 0..n {
                        let expected = exact_silu(row[i]) * f64::from(row[n + i]);
                        prop_assert!(close(out[i], expected), "{isa:?} {} for {expected}", out[i]);
                    }
                }
            }
        }

        #[test]
        fn norms_agree_with_their_formula(
            rows in 1usize..5,
            n in 1usize..150,
            eps in prop_oneof![Just(1e-5f32), Just(1e-6), Just(0.5)],
            bad in prop::option::of((any::<prop::sample::Index>(), 0usize..2)),
            seed in any::<u64>(),
        ) {
            let mut rng = Numbers::new(seed);
            let (mut x, more, weight) = (rng.take(rows * n), rng.take(rows * n), rng.take(n));
            if let Some((at, which)) = bad {
                let at = at.index(x.len());
                x[at] = [f32::NAN, f32::INFINITY][which];
            }
            for isa in Isa::all() {
                let mut plain = vec![0.0; x.len()];
                rms_norm_with(isa, &x, &weight, eps, &mut plain);
                let (mut residual, mut fused) = (x.clone(), vec![0.0; x.len()]);
                add_rms_norm_with(isa, &mut residual, &more, &weight, eps, &mut fused);
                for (summed, out) in [(false, &plain), (true, &fused)] {
                    for row in 0..rows {
                        let at = row * n..(row + 1) * n;
                        let input: Vec<f64> = x[at.clone()]
                            .iter()
                            .zip(&more[at.clone()])
                            .map(|(x, m)| f64::from(if summed { x + m } else { *x }))
                            .collect();
                        let square: f64 = input.iter().map(|x| x * x).sum::<f64>() / n as f64;
                        for i in 0..n {
                            let expected = input[i] / (square + f64::from(eps)).sqrt() * f64::from(weight[i]);
                            let y = out[at.start + i];
                            prop_assert!(
                                (f64::from(y) - expected).abs() < 2e-6 || (y.is_nan() && expected.is_nan()),
                                "{isa:?} {y} for {expected}"
                            );
                        }
                    }
                }
                for i in 0..x.len() {
                    let sum = x[i] + more[i];
                    prop_assert!(residual[i] == sum || sum.is_nan());
                }
            }
        }
    }

    #[test]
    fn large_inputs_are_handled_as_small_ones() {
        let (rows, n) = (90, 700);
        let mut rng = Numbers::new(1);
        let (x, y, w) = (rng.take(rows * 2 * n), rng.take(rows * n), rng.take(n));
        let mut fused = vec![0.0; rows * n];
        swiglu_fused(&x, n, &mut fused);
        let (mut sum, mut norm) = (y.clone(), vec![0.0; rows * n]);
        add_rms_norm(&mut sum, &x[..rows * n], &w, 1e-5, &mut norm);
        let mut plain = vec![0.0; rows * n];
        rms_norm(&sum, &w, 1e-5, &mut plain);
        assert_eq!(plain, norm);
        let mut added = y.clone();
        add(&mut added, &x[..rows * n]);
        assert_eq!(added, sum);
        for row in 0..rows {
            let at = row * n..(row + 1) * n;
            let mut one = vec![0.0; n];
            swiglu_fused(&x[2 * row * n..2 * (row + 1) * n], n, &mut one);
            assert_eq!(one, fused[at.clone()]);
            rms_norm(&sum[at.clone()], &w, 1e-5, &mut one);
            assert_eq!(one, norm[at]);
        }
    }

    #[test]
    fn silu_far_from_zero() {
        for isa in Isa::all() {
            let mut x = [-87.0, -89.0, -1e30, 1e30, 89.0];
            silu_with(isa, &mut x);
            assert!(close(x[0], exact_silu(-87.0)), "{isa:?} {}", x[0]);
            assert_eq!(&x[1..], &[0.0, 0.0, 1e30, 89.0], "{isa:?}");
        }
    }

    #[test]
    fn nothing_is_done_to_nothing() {
        swiglu_fused(&[], 0, &mut []);
        rms_norm(&[], &[], 1e-5, &mut []);
        add_rms_norm(&mut [], &[], &[], 1e-5, &mut []);
    }

    #[test]
    #[should_panic(expected = "in rows of 3")]
    fn rows_must_be_whole() {
        rms_norm(&[0.0; 4], &[0.0; 3], 1e-5, &mut [0.0; 4]);
    }

    #[test]
    fn copies_of_any_length_are_the_same() {
        for n in [0, 1, JOB, 2 * JOB - 1, 2 * JOB, 2 * JOB + 1, 5 * JOB + 7] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(copied(&x), x);
        }
    }
}
