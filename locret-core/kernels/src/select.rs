//! The best of many scores, and keeping only some rows of a buffer.

use std::ops::Range;

/// The numbers (ascending) of the `k` best scores; all of them if there are no more than `k`.
///
/// Larger is better. Among equal scores the earlier one is kept; `-0.0` equals `0.0`. Scores in
/// the `protected` ranges count as `+∞` (they need not be distinct from an unprotected `+∞`, of
/// which again the earlier is kept); parts of ranges beyond the end are ignored. Linear time, no
/// full sort.
///
/// # Errors
/// The number of the first unprotected score that is NaN: it has no rank.
pub fn top_k(scores: &[f32], k: usize, protected: &[Range<usize>]) -> Result<Vec<u32>, usize> {
    let n = scores.len();
    // Ascending by goodness as unsigned integers; NaN cannot collide, since it is refused.
    let mut ranks = Vec::with_capacity(n);
    ranks.extend(scores.iter().map(|s| rank(*s)));
    for range in protected {
        let end = range.end.min(n);
        if range.start < end {
            ranks[range.start..end].fill(rank(f32::INFINITY));
        }
    }
    // Whatever ranks above +∞ or below -∞ is a NaN.
    let bounds = rank(f32::NEG_INFINITY)..=rank(f32::INFINITY);
    if let Some(nan) = ranks.iter().position(|r| !bounds.contains(r)) {
        return Err(nan);
    }
    if k >= n {
        return Ok((0..n as u32).collect());
    }
    if k == 0 {
        return Ok(Vec::new());
    }
    let mut order = ranks.clone();
    let (_, &mut threshold, better) = order.select_nth_unstable(n - k);
    // Of those that equal the threshold, only as many as are left after the better ones.
    let mut ties = k - better.iter().filter(|r| **r > threshold).count();
    let mut kept = Vec::with_capacity(k);
    for (i, r) in ranks.iter().enumerate() {
        if *r > threshold {
            kept.push(i as u32);
        } else if *r == threshold && ties > 0 {
            ties -= 1;
            kept.push(i as u32);
        }
    }
    Ok(kept)
}

/// An unsigned integer that is larger for a larger number.
fn rank(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits(); // -0.0 becomes 0.0
    if bits >> 31 == 0 {
        bits | 1 << 31
    } else {
        !bits
    }
}

/// Keeps the rows `kept` (ascending, unique) of a buffer `[rows, d]` and drops the others, in
/// place. The capacity stays: call [`Vec::shrink_to`] to hand memory back.
///
/// # Panics
/// If `buf` is not whole rows, or `kept` is not strictly ascending numbers of its rows.
pub fn compact_rows<T: Copy>(buf: &mut Vec<T>, d: usize, kept: &[u32]) {
    assert!(
        d > 0 && buf.len().is_multiple_of(d),
        "rows of {d} in {} items",
        buf.len()
    );
    let rows = buf.len() / d;
    assert!(
        kept.windows(2).all(|w| w[0] < w[1]) && kept.last().is_none_or(|l| (*l as usize) < rows),
        "kept rows must be strictly ascending and below {rows}"
    );
    let mut to = 0;
    // Rows that follow each other move together.
    for run in kept.chunk_by(|a, b| a + 1 == *b) {
        let from = run[0] as usize * d;
        let len = run.len() * d;
        if from != to {
            buf.copy_within(from..from + len, to);
        }
        to += len;
    }
    buf.truncate(to);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sorts everything.
    fn oracle(scores: &[f32], k: usize, protected: &[Range<usize>]) -> Vec<u32> {
        let score = |i: usize| {
            if protected.iter().any(|r| r.contains(&i)) {
                f32::INFINITY
            } else {
                scores[i]
            }
        };
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| score(*b).partial_cmp(&score(*a)).unwrap());
        order.truncate(k);
        order.sort_unstable();
        order.into_iter().map(|i| i as u32).collect()
    }

    fn score() -> impl Strategy<Value = f32> {
        prop_oneof![
            (-3i32..3).prop_map(|x| x as f32),
            any::<f32>().prop_filter("a number", |x| !x.is_nan()),
            Just(-0.0),
            Just(f32::INFINITY),
            Just(f32::NEG_INFINITY),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_sorting(
            scores in prop::collection::vec(score(), 0..60),
            k in 0usize..70,
            ranges in prop::collection::vec((0usize..70, 0usize..20), 0..3),
        ) {
            let protected: Vec<_> = ranges.iter().map(|(s, n)| *s..s + n).collect();
            prop_assert_eq!(
                top_k(&scores, k, &protected).unwrap(),
                oracle(&scores, k, &protected)
            );
        }

        #[test]
        fn rows_are_kept_in_order(
            d in 1usize..5,
            keep in prop::collection::vec(any::<bool>(), 0..40),
        ) {
            let mut buf: Vec<u16> = (0..(keep.len() * d) as u16).collect();
            let kept: Vec<u32> = (0..keep.len() as u32).filter(|i| keep[*i as usize]).collect();
            let expected: Vec<u16> = kept
                .iter()
                .flat_map(|r| (0..d).map(move |c| (*r as usize * d + c) as u16))
                .collect();
            compact_rows(&mut buf, d, &kept);
            prop_assert_eq!(buf, expected);
        }
    }

    #[test]
    fn a_nan_is_named_unless_protected() {
        let scores = [1.0, f32::NAN, 2.0, -f32::NAN];
        assert_eq!(top_k(&scores, 1, &[]), Err(1));
        assert_eq!(top_k(&scores, 9, &[1..2]), Err(3));
        assert_eq!(top_k(&scores, 2, &[1..2, 3..9]), Ok(vec![1, 3]));
    }

    #[test]
    #[should_panic(expected = "strictly ascending")]
    fn rows_out_of_order_are_refused() {
        compact_rows(&mut vec![0u8; 6], 2, &[1, 1]);
    }

    #[test]
    #[should_panic(expected = "below 3")]
    fn rows_beyond_the_end_are_refused() {
        compact_rows(&mut vec![0u8; 6], 2, &[3]);
    }
}
