//! Units as codes, `low + step · code`: how they lie, and how they are made, read and moved.
//!
//! A layer has two buffers of rows, of words of 32 bits, one head's behind the other's. A *plain* row is a unit in 32
//! bits, its key and then its value; a *coded* one is a record ([`Codes::record`]) of the key's codes, steps and lows,
//! and then the value's. Codes lie as the CPU kernels have them, with equal bytes. Steps and lows are halves, a pair of
//! them a word, and where a run of units shares those of its keys (KIVI), they lie in a third buffer, `[runs, dim]`.
//!
//! A head's units are the first ones, which are plain; the coded ones; and the newest ones, plain again and right
//! behind the first. [`SPAN`] words say where.

mod made;
mod moved;

pub(crate) use made::{encode, pairs, round, shared_pairs, turn_plain};
pub(crate) use moved::{append, pick, read, turn_read};

use super::product::half;
use cubecl::prelude::*;

/// Words of a head in `spans`: first plain row, plain rows before the codes, first coded row, coded rows, first run,
/// runs, units.
pub(crate) const SPAN: usize = 7;

/// The picked row of one that is not there.
pub(crate) const NONE: u32 = u32::MAX;

/// How units become codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Codes {
    /// Features of a head.
    pub(crate) dim: usize,
    /// Bits of a code: 2, 3, 4 or 8.
    pub(crate) bits: usize,
    /// Features of a unit that share a step and a low.
    pub(crate) width: usize,
    /// Units whose keys share them instead, feature by feature; 0: none do.
    pub(crate) run: usize,
    /// Features that are multiplied with Hadamard's matrix together; 1: none are.
    pub(crate) block: usize,
}

impl Codes {
    /// The bits of a code that lie together.
    fn low_bits(self) -> usize {
        if self.bits == 3 { 2 } else { self.bits }
    }

    /// Bytes of a row's lower bits, or all.
    fn low_bytes(self) -> usize {
        self.dim.div_ceil(8 / self.low_bits())
    }

    /// Bytes of a row's codes.
    pub(crate) fn bytes(self) -> usize {
        self.low_bytes()
            + if self.bits == 3 {
                self.dim.div_ceil(8)
            } else {
                0
            }
    }

    /// Words of a row's codes.
    pub(crate) fn words(self) -> usize {
        self.bytes() / 4
    }

    /// Pairs of a step and a low of a key, or of a value.
    pub(crate) fn pairs(self, values: bool) -> usize {
        match self.run > 0 && !values {
            true => 0,
            false => self.dim.div_ceil(self.width),
        }
    }

    /// The first word of a value.
    pub(crate) fn of(self, values: bool) -> usize {
        match values {
            true => self.words() + self.pairs(false),
            false => 0,
        }
    }

    /// Words of a unit.
    pub(crate) fn record(self) -> usize {
        2 * self.words() + self.pairs(false) + self.pairs(true)
    }

    /// Whether keys, or values, have their steps and lows from runs.
    pub(super) fn runs(self, values: bool) -> bool {
        self.run > 0 && !values
    }

    /// The largest code.
    fn top(self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }
}

/// Which of the numbers of a head a unit has, where cubes on two axes, X and Z, have them.
#[cube]
fn number_of_head() -> usize {
    let cube = (CUBE_POS_Z * CUBE_COUNT_X + CUBE_POS_X) as usize;
    cube * CUBE_DIM as usize + UNIT_POS as usize
}

/// Byte `at` of the words from `first` on.
#[cube]
fn byte(words: &[u32], first: usize, at: usize) -> u32 {
    words[first + at / 4] >> (8 * (at % 4) as u32) & 255u32
}

/// The code of a feature of the row whose codes begin at word `first`.
#[cube]
fn code(words: &[u32], first: usize, feature: usize, #[comptime] codes: Codes) -> f32 {
    let stride = comptime!(codes.low_bytes());
    let shift = (feature / stride * comptime!(codes.low_bits())) as u32;
    let mask = comptime!((1u32 << codes.low_bits()) - 1);
    let mut code = byte(words, first, feature % stride) >> shift & mask;
    if comptime!(codes.bits == 3) {
        let third = byte(words, first, stride + feature / 8) >> (feature % 8) as u32 & 1u32;
        code += third * 4u32;
    }
    f32::cast_from(code)
}

/// The run of the `coded`-th coded unit of a head: the first that ends behind it.
#[cube]
pub(crate) fn run_of(ends: &[u32], first: usize, runs: usize, coded: usize) -> usize {
    let mut low = 0usize;
    let mut high = runs;
    while low < high {
        let middle = (low + high) / 2;
        if ends[first + middle] as usize > coded {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

/// A feature of a key or value as it was coded; `at` is the first word of its record, `run` the row of what its run
/// shares.
#[cube]
fn coded_number(
    coded: &[u32],
    shared: &[u32],
    at: usize,
    run: usize,
    feature: usize,
    #[comptime] values: bool,
    #[comptime] codes: Codes,
) -> f32 {
    let first = at + comptime!(codes.of(values));
    let steps = code(coded, first, feature, codes);
    let pair = if comptime!(codes.runs(values)) {
        shared[run * comptime!(codes.dim) + feature]
    } else {
        coded[first + comptime!(codes.words()) + feature / comptime!(codes.width)]
    };
    // Exact, so that it is the same with one rounding or two.
    steps * half(pair & 0xffffu32) + half(pair >> 16u32)
}

/// A feature of unit `unit` of a head, whose words in `spans` begin at `span`, as it lies there. `run` counts from the
/// head's first.
#[cube]
pub(crate) fn number(
    plain: &[u32],
    coded: &[u32],
    shared: &[u32],
    spans: &[u32],
    span: usize,
    unit: usize,
    run: usize,
    feature: usize,
    #[comptime] values: bool,
    #[comptime] codes: Codes,
) -> f32 {
    let dim = comptime!(codes.dim);
    let before = spans[span + 1] as usize;
    let many = spans[span + 3] as usize;
    if unit >= before && unit < before + many {
        let row = spans[span + 2] as usize + unit - before;
        let run = spans[span + 4] as usize + run;
        let at = row * comptime!(codes.record());
        coded_number(coded, shared, at, run, feature, values, codes)
    } else {
        let gone = select(unit >= before, many, 0usize);
        let row = spans[span] as usize + unit - gone;
        let at = row * 2 * dim + comptime!(if values { codes.dim } else { 0 }) + feature;
        f32::reinterpret(plain[at])
    }
}

/// Multiplies blocks of a row in shared memory with Hadamard's matrix, without the factor; a cube has `units` units.
#[cube]
fn turn(
    row: &mut [f32],
    #[comptime] numbers: usize,
    #[comptime] block: usize,
    #[comptime] units: usize,
) {
    #[unroll]
    for stage in 0..comptime!(block.ilog2() as usize) {
        let apart = comptime!(1usize << stage);
        sync_cube();
        for pair in range_stepped(UNIT_POS as usize, comptime!(numbers / 2), units) {
            let at = pair / apart * (2 * apart) + pair % apart;
            let (a, b) = (row[at], row[at + apart]);
            row[at] = a + b;
            row[at + apart] = a - b;
        }
    }
    sync_cube();
}

/// Units of a cube that turns a row.
pub(crate) const TURNING: usize = 64;
