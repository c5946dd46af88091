//! Many tokens: rows of weights become panels, which hundreds of activations are multiplied with.

use super::{
    BLOCK, Job, Layout,
    columns::{Columns, WIDEST},
    weight::{Weight, convert},
};
use crate::{
    micro::{outer, pack_lanes, panels},
    scratch::Scratch,
    simd::{Isa, Simd, dispatch},
};
use std::ops::Range;

/// Rows in a job of many tokens, at most; whole groups of any inner loop.
const ROWS: usize = 96;

/// Rows in a job of many tokens, of a matrix that has `rows`: an even number of jobs, so that two
/// threads end together, and whole vectors.
fn job_rows(rows: usize) -> usize {
    let jobs = rows.div_ceil(ROWS);
    if jobs == 1 {
        return ROWS;
    }
    rows.div_ceil(jobs.next_multiple_of(2)).next_multiple_of(16)
}

/// Columns that are converted at a time, at most: a panel of as many fits the second cache beside the
/// activations.
const DEEPEST: usize = 1536;

/// Columns that are converted at a time: pieces of a row of about the same length, in whole blocks.
fn depth(columns: usize, block: usize) -> usize {
    let pieces = columns.div_ceil(DEEPEST);
    columns.div_ceil(pieces).next_multiple_of(block.max(BLOCK))
}

/// Columns between two requests for what is converted next: no more at a time than a processor can wait
/// for beside its work.
const STEP: usize = 192;

/// Tokens in a job of many tokens.
const TOKENS: usize = 512;

/// Asks for the memory of up to `n` columns of a row, if there is such a row.
#[inline(always)]
fn fetch<S: Simd>(s: S, weight: &Weight<'_>, row: usize, column: usize, n: usize) {
    if row < weight.rows && column < weight.columns {
        let dtype = weight.dtype;
        // Also of a part of a block.
        let bytes = |columns: usize| columns * dtype.block_bytes() / dtype.block();
        let at = row * weight.row_bytes + bytes(column);
        let end = at + bytes(n.min(weight.columns - column));
        for line in (at..end).step_by(64) {
            s.prefetch(weight.bytes.as_ptr().wrapping_add(line));
        }
    }
}

pub(super) fn many_tokens(
    isa: Isa,
    xs: &[&[f32]],
    tokens: usize,
    weights: &[&Weight<'_>],
    outs: &mut [&mut [f32]],
    serial: bool,
) {
    let layout = Layout::of(xs, tokens, weights, outs, job_rows);
    for first in (0..tokens).step_by(TOKENS) {
        let input = Input {
            xs,
            widths: &layout.widths,
            columns: layout.columns,
            tokens: first..tokens.min(first + TOKENS),
        };
        layout.run(serial, |job, out| {
            dispatch!(isa, s => many_rows(s, weights[job.weight], job, &input, out));
        });
    }
}

/// The activations of many tokens, which are read where they lie.
struct Input<'a> {
    xs: &'a [&'a [f32]],
    widths: &'a [usize],
    /// The sum of the widths.
    columns: usize,
    /// Those that are read now.
    tokens: Range<usize>,
}

/// Rows of weights become panels, whose lanes are the rows: outputs are then written as they lie, and
/// an activation is read wherever it lies, since it is multiplied with a whole vector of weights.
#[inline(always)]
fn many_rows<S: Simd>(s: S, weight: &Weight<'_>, job: &Job, input: &Input<'_>, out: Columns) {
    let (n, columns) = (job.rows.len(), input.columns);
    let deep = depth(columns, weight.dtype.block());
    let widest = panels(S::LANES, n).map(|p| p.len()).max().unwrap_or(0);
    let lengths = [S::LANES * deep, widest * deep];
    let mut memory = Scratch::for_lengths(&lengths);
    let [converted, panel] = memory.slices(lengths);
    for from in (0..columns).step_by(deep) {
        let to = columns.min(from + deep);
        let depth = to - from;
        for lanes in panels(S::LANES, n) {
            let width = lanes.len();
            let panel = &mut panel[..depth * width];
            for first in lanes.clone().step_by(S::LANES) {
                let rows =
                    job.rows.start + first..job.rows.end.min(job.rows.start + first + S::LANES);
                let (mut group, m): ([&[f32]; 16], usize) = ([&[]; 16], rows.len());
                for ((row, near), group) in
                    rows.zip(converted.chunks_exact_mut(depth)).zip(&mut group)
                {
                    convert(s, weight, row, from..to, near);
                    *group = near;
                }
                pack_lanes(s, &group[..m], depth, first - lanes.start, width, panel);
            }
            // More rows, columns further on, or another job's rows.
            let next = if lanes.end < n {
                (job.rows.start + lanes.end, from)
            } else if to < columns {
                (job.rows.start, to)
            } else {
                (job.rows.end, 0)
            };
            let mut block = Block {
                weight,
                next,
                tokens: input.tokens.clone(),
                stride: 0,
                depth: 0,
                from_zero: false,
                out,
                column: job.column + lanes.start,
                rows: width.min(n - lanes.start),
            };
            let mut start = 0;
            for (x, stride) in input.xs.iter().zip(input.widths) {
                let (low, high) = (start.max(from), to.min(start + stride));
                if low < high {
                    (block.stride, block.depth) = (*stride, high - low);
                    block.from_zero = low == 0;
                    let (x, panel) = (&x[low - start..], &panel[(low - from) * width..]);
                    match width / S::LANES {
                        1 => block.run::<S, 1>(s, x, panel),
                        2 => block.run::<S, 2>(s, x, panel),
                        _ if S::LANES == 16 => block.run::<S, 3>(s, x, panel),
                        _ => unreachable!("panels have at most two vectors here"),
                    }
                    block.next.1 += high - low;
                }
                start += stride;
            }
        }
    }
}

/// Many tokens and the panel of weights that they are multiplied with.
struct Block<'a> {
    weight: &'a Weight<'a>,
    /// The row and the column of what is converted next.
    next: (usize, usize),
    tokens: Range<usize>,
    /// Numbers from a token to the next one.
    stride: usize,
    /// Columns that take part.
    depth: usize,
    /// Whether these are the first columns.
    from_zero: bool,
    out: Columns,
    /// The column of the output that the first row goes to.
    column: usize,
    /// Rows in the panel, whose other lanes are 0.
    rows: usize,
}

impl Block<'_> {
    /// `out[t, r] += Σ_k x[t, k] · panel[k, r]` for panels of `N` vectors.
    #[inline(always)]
    fn run<S: Simd, const N: usize>(&self, s: S, x: &[f32], panel: &[f32]) {
        let width = N * S::LANES;
        assert!(panel.len() >= self.depth * width && self.rows <= width && width <= WIDEST);
        let mut t = self.tokens.start;
        if S::LANES == 16 || N == 1 {
            t = self.tokens_by::<S, 8, N>(s, t, x, panel);
        } else {
            t = self.tokens_by::<S, 6, N>(s, t, x, panel);
        }
        t = self.tokens_by::<S, 4, N>(s, t, x, panel);
        t = self.tokens_by::<S, 2, N>(s, t, x, panel);
        self.tokens_by::<S, 1, N>(s, t, x, panel);
    }

    #[inline(always)]
    fn tokens_by<S: Simd, const B: usize, const N: usize>(
        &self,
        s: S,
        from: usize,
        x: &[f32],
        panel: &[f32],
    ) -> usize {
        let (depth, width) = (self.depth, N * S::LANES);
        let each = (B * width).div_ceil(self.tokens.len());
        let mut t = from;
        while t + B <= self.tokens.end {
            let x = &x[t * self.stride..(t + B - 1) * self.stride + depth];
            let mut acc = [[s.splat(0.0); N]; B];
            if !self.from_zero {
                for (b, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: these columns are our job's.
                    unsafe { self.out.read(s, t + b, self.column, self.rows, acc) };
                }
            }
            let next = self.next.0 + (t - self.tokens.start) / B * each;
            for k in (0..depth).step_by(STEP) {
                for row in next..(next + each).min(self.next.0 + width) {
                    fetch(s, self.weight, row, self.next.1 + k, STEP);
                }
                let steps = STEP.min(depth - k);
                // SAFETY: B rows of `depth` numbers, `stride` apart (sliced just before); `panel` has as
                // many rows of N vectors (checked by `run`).
                unsafe {
                    let (x, panel) = (x.as_ptr().add(k), panel.as_ptr().add(k * width));
                    outer(s, steps, x, self.stride, 1, panel, &mut acc);
                }
            }
            for (b, acc) in acc.iter().enumerate() {
                // SAFETY: as above.
                unsafe { self.out.write(s, t + b, self.column, self.rows, acc) };
            }
            t += B;
        }
        t
    }
}
