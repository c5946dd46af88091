//! Working memory of kernels, kept by each thread between calls.

use std::cell::RefCell;

thread_local! {
    static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Numbers in a cache line; slices are cut at multiples of it.
const LINE: usize = 16;

/// A buffer with more numbers than this (4 MiB) is freed after use.
const KEEP: usize = 1 << 20;

/// Memory on loan; goes back to the thread when dropped.
///
/// An owner rather than a function that takes a closure: what runs between is to be compiled for
/// the instruction set of its surroundings.
pub(super) struct Scratch(Vec<f32>);

impl Scratch {
    /// Borrows room for slices of the given lengths.
    pub(super) fn for_lengths(lengths: &[usize]) -> Self {
        let total = lengths
            .iter()
            .map(|n| n.next_multiple_of(LINE))
            .sum::<usize>()
            + LINE;
        let kept = KEPT.with_borrow_mut(|kept| {
            let fits = kept.iter().position(|m| m.len() >= total);
            fits.map(|i| kept.swap_remove(i)).or_else(|| kept.pop())
        });
        Self(match kept {
            Some(memory) if memory.len() >= total => memory,
            _ => vec![0.0; total.next_power_of_two()],
        })
    }

    /// The slices, each starting at a cache line, with unspecified contents.
    ///
    /// # Panics
    /// If they are longer together than what was asked for.
    pub(super) fn slices<const N: usize>(&mut self, lengths: [usize; N]) -> [&mut [f32]; N] {
        let start = self.0.as_ptr().align_offset(64).min(LINE);
        let mut rest = &mut self.0[start..];
        lengths.map(|n| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(n.next_multiple_of(LINE));
            rest = tail;
            &mut head[..n]
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.0.len() <= KEEP {
            let memory = std::mem::take(&mut self.0);
            KEPT.with_borrow_mut(|kept| kept.push(memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Scratch;

    #[test]
    fn slices_are_aligned_and_disjoint_and_loans_nest() {
        for _ in 0..3 {
            let lengths = [5, 0, 33];
            let mut outer = Scratch::for_lengths(&lengths);
            let [a, b, c] = outer.slices(lengths);
            assert_eq!((a.len(), b.len(), c.len()), (5, 0, 33));
            assert_eq!(a.as_ptr().align_offset(64), 0);
            assert_eq!(c.as_ptr().align_offset(64), 0);
            a.fill(1.0);
            c.fill(2.0);
            let mut inner = Scratch::for_lengths(&[100]);
            inner.slices([100])[0].fill(3.0);
            assert!(a.iter().all(|x| *x == 1.0) && c.iter().all(|x| *x == 2.0));
        }
    }
}
