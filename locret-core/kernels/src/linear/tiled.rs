//! Many tokens, where the processor multiplies tiles: weights and activations become tiles of bfloat16 pieces.

use super::{
    BLOCK, Job, Layout,
    columns::Columns,
    few::{Codes, Dot},
    weight::{Bytes, Nibbles, Weight, half_at},
};
use crate::{
    dtype::DType,
    scratch::Scratch,
    simd::{
        Avx512, Simd,
        amx::{Amx, PIECES, SIDE, SQUARE, STEP, TILE},
        load, store,
    },
};
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

/// Rows in a job, at most: so many that all activations are read seldom.
const ROWS: usize = 192;

/// Columns that take part at a time, at most: what is packed of the activations then stays in the second cache, and of
/// the weights of a job, too.
const DEEPEST: usize = 768;

/// Tokens that are packed at a time.
const TOKENS: usize = 512;

/// Rows in a job, of a matrix that has `rows`: an even number of jobs, so that two threads end together, and whole
/// squares.
fn job_rows(rows: usize) -> usize {
    let jobs = rows.div_ceil(ROWS).next_multiple_of(2);
    rows.div_ceil(jobs).next_multiple_of(SQUARE)
}

/// Columns that take part at a time: pieces of a row of about the same length, in whole steps.
fn depth(columns: usize) -> usize {
    let pieces = columns.div_ceil(DEEPEST);
    columns.div_ceil(pieces).next_multiple_of(STEP)
}

/// From so many tokens on tiles are faster than vectors, however many of the last square are missing.
const PAYS: usize = 64;

/// Whether products with these weights are products of tiles.
pub(super) fn pays(weights: &[&Weight<'_>], tokens: usize) -> bool {
    tokens >= PAYS && weights.iter().all(|w| fits(w.dtype))
}

/// Whether numbers of this type, or the codes of its blocks, are bfloat16 numbers.
pub(super) fn fits(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::Q8_0 | DType::Q4_0 | DType::Q4_1)
}

// A block of codes has a scale, and is multiplied in one step.
const _: () = assert!(BLOCK == STEP);

/// What [`matmul`](super::matmul) and its like compute, for many tokens.
pub(super) fn many_tokens(
    s: Avx512,
    amx: Amx,
    xs: &[&[f32]],
    tokens: usize,
    weights: &[&Weight<'_>],
    outs: &mut [&mut [f32]],
    serial: bool,
) {
    let layout = Layout::of(xs, tokens, weights, outs, job_rows);
    let (widths, columns) = (&layout.widths, layout.columns);
    let deep = depth(columns);
    for first in (0..tokens).step_by(TOKENS) {
        let tokens = first..tokens.min(first + TOKENS);
        for from in (0..columns).step_by(deep) {
            let part = from..columns.min(from + deep);
            let group = Group::of(part.len());
            let lengths = [tokens.len().div_ceil(SQUARE) * 2 * group.len()];
            let mut memory = Scratch::for_lengths(&lengths);
            let [packed] = memory.slices(lengths);
            let pack = |(i, packed): (usize, &mut [f32])| {
                let first = tokens.start + i * SIDE;
                let rows = first..tokens.end.min(first + SIDE);
                s.vectorize(
                    #[inline(always)]
                    || group.pack(s, xs, widths, rows, part.clone(), packed),
                );
            };
            if serial {
                let groups = packed.chunks_exact_mut(group.len());
                groups.enumerate().for_each(pack);
            } else {
                let groups = packed.par_chunks_exact_mut(group.len());
                groups.enumerate().for_each(pack);
            }
            let input = Input {
                packed,
                group,
                tokens: tokens.clone(),
                columns: part,
            };
            layout.run(serial, |job, out| {
                let weight = weights[job.weight];
                s.vectorize(
                    #[inline(always)]
                    || match weight.dtype {
                        DType::BF16 => plain(s, amx, weight, job, &input, out),
                        DType::Q8_0 => coded::<Bytes>(s, amx, weight, job, &input, out),
                        DType::Q4_0 => coded::<Nibbles<false>>(s, amx, weight, job, &input, out),
                        DType::Q4_1 => coded::<Nibbles<true>>(s, amx, weight, job, &input, out),
                        dtype => unreachable!("no tiles are made of {dtype}"),
                    },
                );
            });
        }
    }
}

/// The activations of many tokens in some columns.
struct Input<'a> {
    /// [`Group`] by group, an even number.
    packed: &'a [f32],
    group: Group,
    tokens: Range<usize>,
    columns: Range<usize>,
}

impl Input<'_> {
    /// The tiles of two groups of tokens, and the sums of their steps.
    #[inline(always)]
    fn pair(&self, pair: usize) -> [(&[u16], &[f32]); 2] {
        [2 * pair, 2 * pair + 1].map(
            #[inline(always)]
            |i| {
                let own = &self.packed[i * self.group.len()..][..self.group.len()];
                let (tiles, sums) = own.split_at(self.group.tiles());
                (bytemuck::cast_slice(tiles), sums)
            },
        )
    }
}

/// What 16 tokens become: for each step [`PIECES`] tiles, whose rows are tokens, and behind them for each step their
/// sums.
#[derive(Clone, Copy)]
struct Group {
    steps: usize,
}

impl Group {
    /// Of so many columns.
    fn of(columns: usize) -> Self {
        Self {
            steps: columns.div_ceil(STEP),
        }
    }

    /// Single-precision numbers as large as the tiles.
    const fn tiles(self) -> usize {
        self.steps * PIECES * TILE / 2
    }

    /// The same of all.
    const fn len(self) -> usize {
        self.tiles() + self.steps * SIDE
    }

    /// Tiles and sums of up to 16 tokens; rows beyond them, and columns beyond the last one, are 0.
    #[inline(always)]
    fn pack(
        self,
        s: Avx512,
        xs: &[&[f32]],
        widths: &[usize],
        tokens: Range<usize>,
        columns: Range<usize>,
        packed: &mut [f32],
    ) {
        if tokens.len() < SIDE {
            packed.fill(0.0);
        }
        let (tiles, sums) = packed.split_at_mut(self.tiles());
        let tiles: &mut [u16] = bytemuck::cast_slice_mut(tiles);
        let mut row = [0.0; DEEPEST];
        let row = &mut row[..self.steps * STEP];
        for (i, token) in tokens.enumerate() {
            let mut start = 0;
            for (x, width) in xs.iter().zip(widths) {
                let own = start.max(columns.start)..columns.end.min(start + width);
                if own.start < own.end {
                    let from = &x[token * width + own.start - start..][..own.len()];
                    row[own.start - columns.start..][..own.len()].copy_from_slice(from);
                }
                start += width;
            }
            split_row::<PIECES>(s, row, i, tiles);
            for (x, sums) in row.chunks_exact(STEP).zip(sums.chunks_exact_mut(SIDE)) {
                sums[i] = s.sum(s.add(load(s, x), load(s, &x[SIDE..])));
            }
        }
    }
}

/// The pieces of a row of whole steps, as row `i` of tiles.
#[inline(always)]
fn split_row<const N: usize>(s: Avx512, row: &[f32], i: usize, tiles: &mut [u16]) {
    assert!(i < SIDE);
    let steps = row.chunks_exact(STEP).zip(tiles.chunks_exact_mut(N * TILE));
    for (from, to) in steps {
        for half in [0, SIDE] {
            let (from, to) = (from[half..].as_ptr(), to[i * STEP + half..].as_mut_ptr());
            // SAFETY: a step has twice 16 numbers, and there are N tiles.
            unsafe { s.split::<N>(from, to) };
        }
    }
}

/// Rows of bfloat16 numbers in some columns become tiles, which all tokens are multiplied with.
#[inline(always)]
fn plain(s: Avx512, amx: Amx, weight: &Weight<'_>, job: &Job, input: &Input<'_>, out: Columns) {
    let (n, steps) = (job.rows.len(), input.columns.len().div_ceil(STEP));
    let (squares, group) = (n.div_ceil(SQUARE), steps * TILE);
    let lengths = [group / 2, squares * group];
    let mut memory = Scratch::for_lengths(&lengths);
    let [below, beside] = memory.slices(lengths);
    let below: &mut [u16] = bytemuck::cast_slice_mut(below);
    for (i, first) in (0..squares * SQUARE).step_by(SIDE).enumerate() {
        let own = job.rows.start + first..job.rows.end.min(job.rows.start + first + SIDE);
        if own.len() < SIDE {
            below.fill(0);
        }
        for (line, r) in own.enumerate() {
            as_it_lies(weight, r, &input.columns, line, below);
        }
        turn(s, below, i % 2, &mut beside[i / 2 * group..][..group]);
    }
    let beside: &[u16] = bytemuck::cast_slice(beside);
    let (tiles, add) = (amx.tiles(), input.columns.start > 0);
    for (pair, first) in input.tokens.clone().step_by(SQUARE).enumerate() {
        let x = input.pair(pair).map(|(tiles, _)| tiles.as_ptr());
        for (square, w) in beside.chunks_exact(2 * group).enumerate() {
            let (to, w) = (Square::of(input, job, out, first, square), w.as_ptr());
            // SAFETY: all tiles are there, and these columns are our job's.
            unsafe {
                if let Some(to) = to.whole() {
                    tiles.multiply(steps, x, w, to, out.stride, add);
                    continue;
                }
                let mut part = Part([0.0; SQUARE * SQUARE]);
                to.read(&mut part);
                tiles.multiply(steps, x, w, part.0.as_mut_ptr(), SQUARE, true);
                to.write(&part);
            }
        }
    }
}

/// Rows of tiles, below each other, become one half of tiles whose rows are side by side, two numbers of each at a time.
#[inline(always)]
fn turn(s: Avx512, below: &[u16], half: usize, beside: &mut [f32]) {
    for (tile, from) in below.chunks_exact(TILE).enumerate() {
        // Pairs of numbers are turned as if they were one.
        let mut lines = [std::ptr::null(); SIDE];
        for (line, from) in lines.iter_mut().zip(from.chunks_exact(STEP)) {
            *line = from.as_ptr().cast::<f32>();
        }
        let to = &mut beside[(2 * tile + half) * TILE / 2..][..TILE / 2];
        // SAFETY: 16 rows of 16 pairs, and room for as many.
        unsafe { s.transpose(&lines, to.as_mut_ptr(), SIDE) };
    }
}

/// Rows of blocks of codes become tiles of codes, which are bfloat16 numbers. Their products with activations are
/// multiplied with the scales of the blocks, step by step.
#[inline(always)]
fn coded<C: Codes + Dot>(
    s: Avx512,
    amx: Amx,
    weight: &Weight<'_>,
    job: &Job,
    input: &Input<'_>,
    out: Columns,
) {
    let (n, steps) = (job.rows.len(), input.columns.len() / BLOCK);
    let (squares, group) = (n.div_ceil(SQUARE), steps * TILE);
    let each = squares * steps * SQUARE;
    let lengths = [steps * STEP, group / 2, squares * group, each, each];
    let mut memory = Scratch::for_lengths(&lengths);
    let [row, below, beside, scales, minima] = memory.slices(lengths);
    let below: &mut [u16] = bytemuck::cast_slice_mut(below);
    for (i, first) in (0..squares * SQUARE).step_by(SIDE).enumerate() {
        let own = job.rows.start + first..job.rows.end.min(job.rows.start + first + SIDE);
        if own.len() < SIDE {
            below.fill(0);
        }
        let from = i / 2 * steps * SQUARE;
        let scales = &mut scales[from..][..steps * SQUARE];
        let minima = &mut minima[from..][..steps * SQUARE];
        for (line, r) in own.enumerate() {
            let bytes = &weight.bytes[r * weight.row_bytes..][..weight.row_bytes];
            let blocks = bytes[input.columns.start / BLOCK * C::BYTES..].chunks_exact(C::BYTES);
            for (step, (block, to)) in blocks.zip(row.chunks_exact_mut(BLOCK)).enumerate() {
                let at = step * SQUARE + i % 2 * SIDE + line;
                // SAFETY: a block begins with one or two halves, and has as many codes as there is room for.
                unsafe {
                    let scale = f16::from_bits(half_at(block.as_ptr())).to_f32();
                    scales[at] = scale;
                    minima[at] = match (C::SUMS, C::MINIMUM) {
                        (false, _) => 0.0,
                        (_, true) => f16::from_bits(half_at(block[2..].as_ptr())).to_f32(),
                        (_, false) => -8.0 * scale,
                    };
                    let codes = block[C::CODES..].as_ptr();
                    let (lows, highs) = to.split_at_mut(SIDE);
                    let first = C::codes(s, codes, 0);
                    store(s, lows, first[0]);
                    match C::TOGETHER {
                        2 => store(s, highs, first[1]),
                        _ => store(s, highs, C::codes(s, codes, SIDE)[0]),
                    }
                }
            }
            split_row::<1>(s, row, line, below);
        }
        turn(s, below, i % 2, &mut beside[i / 2 * group..][..group]);
    }
    let beside: &[u16] = bytemuck::cast_slice(beside);
    let tiles = amx.tiles();
    let mut fresh = [const { Part([0.0; SQUARE * SQUARE]) }; 2];
    let mut sums = Part([0.0; SQUARE * SQUARE]);
    for (pair, first) in input.tokens.clone().step_by(SQUARE).enumerate() {
        let x = input.pair(pair);
        for square in 0..squares {
            let to = Square::of(input, job, out, first, square);
            sums.0.fill(0.0);
            // SAFETY: these columns are our job's.
            unsafe { to.read(&mut sums) };
            let own = square * steps * SQUARE..(square + 1) * steps * SQUARE;
            let scaled = Scaled {
                scales: &scales[own.clone()],
                minima: &minima[own],
                tokens: x.map(|(_, sums)| sums),
            };
            for step in 0..steps {
                let x = x.map(|(tiles, _)| tiles[step * PIECES * TILE..][..PIECES * TILE].as_ptr());
                let w = beside[(square * steps + step) * 2 * TILE..][..2 * TILE].as_ptr();
                let to = fresh[step % 2].0.as_mut_ptr();
                // SAFETY: all tiles of a step are there, and a square of its own.
                unsafe { tiles.multiply(1, x, w, to, SQUARE, false) };
                // While the next ones are multiplied.
                if step > 0 {
                    scaled.add::<C>(s, step - 1, &fresh[(step - 1) % 2], &mut sums);
                }
            }
            scaled.add::<C>(s, steps - 1, &fresh[(steps - 1) % 2], &mut sums);
            // SAFETY: as above.
            unsafe { to.write(&sums) };
        }
    }
}

/// What belongs to the codes of a square and to a pair of groups of tokens, step by step.
struct Scaled<'a> {
    scales: &'a [f32],
    minima: &'a [f32],
    tokens: [&'a [f32]; 2],
}

impl Scaled<'_> {
    /// `sums[t, r] += scales[r] · fresh[t, r] + minima[r] · tokens[t]`
    #[inline(always)]
    fn add<C: Dot>(&self, s: Avx512, step: usize, fresh: &Part, sums: &mut Part) {
        let (scales, minima) = (
            &self.scales[step * SQUARE..][..SQUARE],
            &self.minima[step * SQUARE..][..SQUARE],
        );
        let scales = [load(s, scales), load(s, &scales[SIDE..])];
        let minima = [load(s, minima), load(s, &minima[SIDE..])];
        let tokens = self.tokens.iter().flat_map(|of| &of[step * SIDE..][..SIDE]);
        let rows = fresh
            .0
            .chunks_exact(SQUARE)
            .zip(sums.0.chunks_exact_mut(SQUARE));
        for ((fresh, sums), token) in rows.zip(tokens) {
            for (half, at) in [0, SIDE].into_iter().enumerate() {
                let mut sum = load(s, &sums[at..]);
                sum = s.fma(scales[half], load(s, &fresh[at..]), sum);
                if C::SUMS {
                    sum = s.fma(minima[half], s.splat(*token), sum);
                }
                store(s, &mut sums[at..], sum);
            }
        }
    }
}

/// A row of bfloat16 numbers as row `i` of tiles; columns beyond the last one are 0.
#[inline(always)]
fn as_it_lies(
    weight: &Weight<'_>,
    row: usize,
    columns: &Range<usize>,
    i: usize,
    tiles: &mut [u16],
) {
    let bytes = &weight.bytes[row * weight.row_bytes..][..weight.row_bytes];
    let bytes = &bytes[2 * columns.start..2 * columns.end];
    for (from, to) in bytes.chunks(2 * STEP).zip(tiles.chunks_exact_mut(TILE)) {
        let to: &mut [u8] = bytemuck::cast_slice_mut(&mut to[i * STEP..][..STEP]);
        if let (Ok(to), Ok(from)) = (
            <&mut [u8; 2 * STEP]>::try_from(&mut *to),
            <&[u8; 2 * STEP]>::try_from(from),
        ) {
            *to = *from;
            continue;
        }
        let (to, rest) = to.split_at_mut(from.len());
        to.copy_from_slice(from);
        rest.fill(0);
    }
}

/// Outputs of a square, side by side.
#[repr(align(64))]
struct Part([f32; SQUARE * SQUARE]);

/// Where the outputs of a pair of groups of tokens and of 32 rows lie, as many of them as there are.
struct Square {
    at: *mut f32,
    stride: usize,
    tokens: usize,
    rows: usize,
    /// Whether something is there that outputs are added to.
    add: bool,
}

impl Square {
    #[inline(always)]
    fn of(input: &Input<'_>, job: &Job, out: Columns, first: usize, square: usize) -> Self {
        let tokens = SQUARE.min(input.tokens.end - first);
        let rows = SQUARE.min(job.rows.len() - square * SQUARE);
        Self {
            at: out.block(first, tokens, job.column + square * SQUARE, rows),
            stride: out.stride,
            tokens,
            rows,
            add: input.columns.start > 0,
        }
    }

    /// Where they start, if none is missing.
    #[inline(always)]
    fn whole(&self) -> Option<*mut f32> {
        (self.tokens == SQUARE && self.rows == SQUARE).then_some(self.at)
    }

    /// What outputs are added to, if there is something.
    ///
    /// # Safety
    /// The outputs must still be borrowed, and no other thread may write them.
    #[inline(always)]
    unsafe fn read(&self, part: &mut Part) {
        if self.add {
            for (t, part) in part
                .0
                .chunks_exact_mut(SQUARE)
                .take(self.tokens)
                .enumerate()
            {
                // SAFETY: `of` has checked that there are as many.
                unsafe {
                    let from = self.at.add(t * self.stride).cast_const();
                    part.as_mut_ptr().copy_from_nonoverlapping(from, self.rows);
                }
            }
        }
    }

    /// Writes them.
    ///
    /// # Safety
    /// The outputs must still be borrowed, and no other thread may access them.
    #[inline(always)]
    unsafe fn write(&self, part: &Part) {
        for (t, part) in part.0.chunks_exact(SQUARE).take(self.tokens).enumerate() {
            // SAFETY: `of` has checked that there are as many.
            unsafe {
                let to = self.at.add(t * self.stride);
                to.copy_from_nonoverlapping(part.as_ptr(), self.rows);
            }
        }
    }
}
