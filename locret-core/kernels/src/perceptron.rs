//! A perceptron of few outputs with one layer between.

use super::{
    elementwise::silu_row,
    linear::{Weight, matmul_between},
    scratch::Scratch,
    simd::{Isa, Simd, dispatch, load},
};
use rayon::prelude::*;

/// Numbers between the two products that a thread works on at a time, about.
const JOB: usize = 1 << 13;

/// `out = silu([xs₁ xs₂ …] · W₁ᵀ) · W₂ᵀ`. The numbers between the two
/// products are in memory that the thread keeps.
///
/// # Shapes
/// - `xs`: `[tokens, columns]` each, whose columns add up to those of `first`
/// - `first`: `[inner, columns]`
/// - `second`: `[outputs, inner]`
/// - `out`: `[tokens, outputs]`
///
/// # Panics
/// If the lengths don't fit each other.
pub fn perceptron(xs: &[&[f32]], first: &Weight<'_>, second: &[f32], out: &mut [f32]) {
    perceptron_with(Isa::best(), xs, first, second, out);
}

fn perceptron_with(isa: Isa, xs: &[&[f32]], first: &Weight<'_>, second: &[f32], out: &mut [f32]) {
    let (inner, columns) = (first.rows(), first.columns());
    assert!(
        inner > 0 && columns > 0 && second.len().is_multiple_of(inner),
        "a perceptron of {first:?} and {} numbers",
        second.len()
    );
    let outputs = second.len() / inner;
    let tokens = xs.iter().map(|x| x.len()).sum::<usize>() / columns;
    assert_eq!(out.len(), tokens * outputs, "outputs of a perceptron");
    if out.is_empty() {
        return;
    }
    let lengths = [tokens * inner];
    let mut memory = Scratch::for_lengths(&lengths);
    let [between] = memory.slices(lengths);
    matmul_between(xs, &[first], &mut [&mut *between]);
    let row = |(x, out): (&mut [f32], &mut [f32])| {
        dispatch!(isa, s => finish(s, x, second, out));
    };
    if between.len() < 2 * JOB || rayon::current_num_threads() == 1 {
        let rows = between.chunks_exact_mut(inner);
        rows.zip(out.chunks_exact_mut(outputs)).for_each(row);
    } else {
        between
            .par_chunks_exact_mut(inner)
            .zip(out.par_chunks_exact_mut(outputs))
            .with_min_len(JOB.div_ceil(inner))
            .for_each(row);
    }
}

/// SiLU of a row, and its products with the rows of `second`.
#[inline(always)]
fn finish<S: Simd>(s: S, x: &mut [f32], second: &[f32], out: &mut [f32]) {
    silu_row(s, x);
    let rows = second.chunks(4 * x.len());
    for (out, rows) in out.chunks_mut(4).zip(rows) {
        match out.len() {
            1 => dots::<S, 1>(s, x, rows, out),
            2 => dots::<S, 2>(s, x, rows, out),
            3 => dots::<S, 3>(s, x, rows, out),
            _ => dots::<S, 4>(s, x, rows, out),
        }
    }
}

#[inline(always)]
fn dots<S: Simd, const N: usize>(s: S, x: &[f32], rows: &[f32], out: &mut [f32]) {
    let whole = x.len() - x.len() % S::LANES;
    let mut sums = [s.splat(0.0); N];
    for at in (0..whole).step_by(S::LANES) {
        let x_at = load(s, &x[at..]);
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = s.fma(x_at, load(s, &rows[i * x.len() + at..]), *sum);
        }
    }
    for (i, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
        let rest = x[whole..].iter().zip(&rows[i * x.len() + whole..]);
        *out = s.sum(sum) + rest.map(|(a, b)| a * b).sum::<f32>();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Numbers;
    use proptest::prelude::*;

    proptest! {
        /// Beside a loop in double precision; numbers that are not finite reach what they take part in.
        #[test]
        fn perceptrons_agree_with_their_formula(
            tokens in prop_oneof![1usize..12, 60usize..70],
            widths in prop::collection::vec(1usize..40, 1..4),
            inner in prop_oneof![1usize..70, 300usize..330],
            outputs in 1usize..10,
            bad in prop::option::of((any::<prop::sample::Index>(), 0usize..2)),
            seed in any::<u64>(),
        ) {
            let columns: usize = widths.iter().sum();
            let mut numbers = Numbers::new(seed);
            let mut xs: Vec<Vec<f32>> = widths.iter().map(|w| numbers.take(tokens * w)).collect();
            if let Some((at, which)) = bad {
                let at = at.index(xs[0].len());
                xs[0][at] = [f32::NAN, f32::INFINITY][which];
            }
            let (first, second) = (numbers.take(inner * columns), numbers.take(outputs * inner));
            let parts: Vec<&[f32]> = xs.iter().map(Vec::as_slice).collect();
            let weight = Weight::from_f32(&first, inner, columns).unwrap();
            let mut expected = Vec::new();
            for token in 0..tokens {
                let x = parts.iter().zip(&widths).flat_map(|(x, w)| &x[token * w..(token + 1) * w]);
                let x: Vec<f64> = x.map(|x| f64::from(*x)).collect();
                let silu = |y: f64| y / (1.0 + (-y).exp());
                let dot = |row: &[f32], x: &[f64]| row.iter().zip(x).map(|(a, b)| f64::from(*a) * b).sum::<f64>();
                let between: Vec<f64> = first.chunks(columns).map(|row| silu(dot(row, &x))).collect();
                expected.extend(second.chunks(inner).map(|row| dot(row, &between)));
            }
            for isa in Isa::all() {
                let mut out = vec![7.0; tokens * outputs];
                perceptron_with(isa, &parts, &weight, &second, &mut out);
                for (found, expected) in out.iter().zip(&expected) {
                    let off = (f64::from(*found) - expected).abs();
                    prop_assert!(
                        off < 2e-4 || (!found.is_finite() && !expected.is_finite()),
                        "{isa:?} {found} for {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn nothing_makes_nothing() {
        let weight = Weight::from_f32(&[1.0, 2.0], 1, 2).unwrap();
        perceptron(&[&[]], &weight, &[3.0], &mut []);
        perceptron(&[&[1.0, 1.0]], &weight, &[], &mut []);
    }

    #[test]
    #[should_panic(expected = "outputs of a perceptron")]
    fn outputs_must_fit() {
        let weight = Weight::from_f32(&[1.0, 2.0], 1, 2).unwrap();
        perceptron(&[&[1.0, 1.0]], &weight, &[3.0], &mut [0.0; 2]);
    }
}
