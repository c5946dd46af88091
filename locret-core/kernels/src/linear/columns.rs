//! An output that many jobs write to.

use crate::simd::{Simd, store};

/// Numbers in the widest panel's rows.
pub(super) const WIDEST: usize = 48;

/// Columns of the output, which jobs write side by side.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    out: *mut f32,
    /// Numbers in a row of the output.
    pub(super) stride: usize,
    tokens: usize,
}

// SAFETY: jobs on different threads write different columns (see `write`).
unsafe impl Send for Columns {}

// SAFETY: as above.
unsafe impl Sync for Columns {}

impl Columns {
    /// An output `[tokens, …]`.
    pub(super) fn of(out: &mut [f32], tokens: usize) -> Self {
        Self {
            out: out.as_mut_ptr(),
            stride: out.len() / tokens,
            tokens,
        }
    }

    /// Where `n` numbers of a token start, from `column` on.
    #[inline(always)]
    fn at(self, token: usize, column: usize, n: usize) -> *mut f32 {
        assert!(token < self.tokens && column + n <= self.stride);
        self.out.wrapping_add(token * self.stride + column)
    }

    /// Where `n` numbers of the first of some tokens start, from `column` on; those of the next token are a
    /// stride further.
    #[inline(always)]
    pub(super) fn block(self, first: usize, tokens: usize, column: usize, n: usize) -> *mut f32 {
        assert!(tokens > 0 && first + tokens <= self.tokens);
        self.at(first, column, n)
    }

    /// Reads `n` numbers of a token, from `column` on; lanes beyond them are 0.
    ///
    /// # Safety
    /// No other thread may write these columns, and the output must still be borrowed.
    #[inline(always)]
    pub(super) unsafe fn read<S: Simd, const N: usize>(
        self,
        s: S,
        token: usize,
        column: usize,
        n: usize,
        to: &mut [S::V; N],
    ) {
        let mut from = self.at(token, column, n).cast_const();
        let mut part = [0.0; WIDEST];
        if n < N * S::LANES {
            // SAFETY: `at` has checked that there are as many; these are other numbers than the copy.
            unsafe { part[..n].as_mut_ptr().copy_from_nonoverlapping(from, n) };
            from = part[..N * S::LANES].as_ptr();
        }
        for (v, to) in to.iter_mut().enumerate() {
            // SAFETY: N vectors, of the output or of the copy.
            *to = unsafe { s.load(from.add(v * S::LANES)) };
        }
    }

    /// Writes `n` numbers of a token, from `column` on; lanes beyond them are left out.
    ///
    /// # Safety
    /// No other thread may access these columns, and the output must still be borrowed.
    #[inline(always)]
    pub(super) unsafe fn write<S: Simd, const N: usize>(
        self,
        s: S,
        token: usize,
        column: usize,
        n: usize,
        sums: &[S::V; N],
    ) {
        let to = self.at(token, column, n);
        if n >= N * S::LANES {
            for (v, sums) in sums.iter().enumerate() {
                // SAFETY: `at` has checked that there is room for N vectors.
                unsafe { s.store(to.add(v * S::LANES), *sums) };
            }
            return;
        }
        let mut part = [0.0; WIDEST];
        for (to, sums) in part.chunks_exact_mut(S::LANES).zip(sums) {
            store(s, to, *sums);
        }
        // SAFETY: as above, for `n` numbers; the copy is elsewhere.
        unsafe { to.copy_from_nonoverlapping(part[..n].as_ptr(), n) };
    }

    /// Writes the first `n` of some numbers of a token, from `column` on.
    ///
    /// # Safety
    /// As for [`write`](Self::write).
    #[inline(always)]
    pub(super) unsafe fn put<const N: usize>(
        self,
        token: usize,
        column: usize,
        numbers: [f32; N],
        n: usize,
    ) {
        let to = self.at(token, column, n);
        // SAFETY: `at` has checked that there is room; the numbers are elsewhere.
        unsafe {
            match n == N {
                true => to.cast::<[f32; N]>().write_unaligned(numbers),
                false => to.copy_from_nonoverlapping(numbers[..n].as_ptr(), n),
            }
        }
    }
}
