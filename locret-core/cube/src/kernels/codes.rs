//! Units as codes, `low + step · code`: how they lie, and how they are made, read and moved.
//!
//! A layer has two buffers of rows, of words of 32 bits, one head's behind the other's. A *plain* row is a unit in 32
//! bits, its key and then its value; a *coded* one is a record ([`Codes::record`]) of the key's codes, steps and lows,
//! and then the value's. Codes lie as the CPU kernels have them, with equal bytes. Steps and lows are halves, a pair of
//! them a word, and where a run of units shares those of its keys (KIVI), they lie in a third buffer, `[runs, dim]`.
//!
//! A head's units are the first ones, which are plain; the coded ones; and the newest ones, plain again and right
//! behind the first. [`SPAN`] words say where.

use super::product::half;
use cubecl::prelude::*;

/// Words of a head in `spans`: first plain row, plain rows before the codes, first coded row, coded rows, first run,
/// runs, units.
pub(crate) const SPAN: usize = 7;

/// The picked row of one that is not there.
pub(crate) const NONE: u32 = u32::MAX;

/// The largest number of 16 bits.
const LARGEST: f32 = 65504.0;

/// And the smallest.
const SMALLEST: f32 = -65504.0;

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

/// Keys or values of heads from `first` on as numbers, but turned as they were coded: `out`, `[units, dim]`, one head's
/// behind the other's. Cubes: features of a head (on two axes, X and Z), heads.
#[cube(launch)]
pub(crate) fn read(
    plain: &[u32],
    coded: &[u32],
    shared: &[u32],
    ends: &[u32],
    spans: &[u32],
    out: &mut [f32],
    first: u32,
    #[comptime] values: bool,
    #[comptime] codes: Codes,
) {
    let dim = comptime!(codes.dim);
    let at = number_of_head();
    let (unit, feature) = (at / dim, at % dim);
    let head = first as usize + CUBE_POS_Y as usize;
    let span = head * SPAN;
    let mut to = 0usize;
    for other in first as usize..head {
        to += spans[other * SPAN + 6] as usize;
    }
    if unit < spans[span + 6] as usize {
        let mut run = 0usize;
        if comptime!(codes.runs(values)) {
            let before = spans[span + 1] as usize;
            if unit >= before {
                let runs = spans[span + 5] as usize;
                run = run_of(ends, spans[span + 4] as usize, runs, unit - before);
            }
        }
        out[(to + unit) * dim + feature] = number(
            plain, coded, shared, spans, span, unit, run, feature, values, codes,
        );
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

/// Turns rows of numbers where they lie: the coded units of heads from `first` on in what [`read`] made. Cubes: units
/// (on two axes, X and Z), heads.
#[cube(launch)]
pub(crate) fn turn_read(spans: &[u32], out: &mut [f32], first: u32, #[comptime] codes: Codes) {
    let dim = comptime!(codes.dim);
    let unit = (CUBE_POS_Z * CUBE_COUNT_X + CUBE_POS_X) as usize;
    let head = first as usize + CUBE_POS_Y as usize;
    let span = head * SPAN;
    let mut to = unit;
    for other in first as usize..head {
        to += spans[other * SPAN + 6] as usize;
    }
    let before = spans[span + 1] as usize;
    if unit < before || unit >= before + spans[span + 3] as usize {
        terminate!();
    }
    let mut row = Shared::<[f32]>::new_slice(comptime!(codes.dim));
    for feature in range_stepped(UNIT_POS as usize, dim, TURNING) {
        row[feature] = out[to * dim + feature];
    }
    turn(
        &mut row,
        comptime!(codes.dim),
        comptime!(codes.block),
        TURNING,
    );
    let by = comptime!(1.0 / (codes.block as f32).sqrt());
    for feature in range_stepped(UNIT_POS as usize, dim, TURNING) {
        out[to * dim + feature] = row[feature] * by;
    }
}

/// Puts new units `[tokens, heads * dim]` behind a head's others. Of a head, `rows` has the row for the first of them.
#[cube(launch)]
pub(crate) fn append(
    new_keys: &Tensor<f32>,
    new_values: &Tensor<f32>,
    rows: &[u32],
    plain: &mut [u32],
    #[comptime] dim: usize,
) {
    let (tokens, width) = (new_keys.shape(0), new_keys.shape(1));
    let (token, at) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
    if token >= tokens {
        terminate!();
    }
    let (head, feature) = (at / dim, at % dim);
    let to = (rows[head] as usize + token) * 2 * dim + feature;
    plain[to] = u32::reinterpret(new_keys[token * new_keys.stride(0) + at]);
    plain[to + dim] = u32::reinterpret(new_values[token * new_values.stride(0) + at]);
}

/// Row `i` of `out` becomes row `picks[i]` of `rows`, if it is not [`NONE`]; of `[rows, width]` words.
#[cube(launch)]
pub(crate) fn pick(rows: &[u32], picks: &[u32], out: &mut [u32], #[comptime] width: usize) {
    let (row, at) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
    if row < picks.len() && picks[row] != NONE {
        out[ABSOLUTE_POS] = rows[picks[row] as usize * width + at];
    }
}

/// The bits of a number of 16 bits that is nearest to a finite one, of two as near the even one.
#[cube]
fn to_half(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    let size = bits & 0x7fff_ffffu32;
    // Below the smallest normal one they are multiples of 2⁻²⁴.
    let exponent = size >> 23u32;
    let shift = u32::min(126u32 - u32::min(exponent, 126u32), 25u32);
    let mantissa = (size & 0x7f_ffffu32) | 0x80_0000u32;
    let kept = mantissa >> shift;
    let rest = mantissa & ((1u32 << shift) - 1u32);
    let middle = (1u32 << shift) / 2u32;
    let up = rest > middle || (rest == middle && kept % 2u32 == 1u32);
    let small = kept + select(up, 1u32, 0u32);
    let rounded = size + 0xfffu32 + (size >> 13u32 & 1u32);
    let normal = (u32::max(rounded, 0x3800_0000u32) - 0x3800_0000u32) >> 13u32;
    let size = select(size < 0x3880_0000u32, small, normal);
    size | (bits >> 16u32 & 0x8000u32)
}

/// The nearest number that 16 bits have room for.
#[cube]
fn within(x: f32) -> f32 {
    let x = f32::min(x, LARGEST);
    f32::max(x, SMALLEST)
}

/// Whether a number is neither infinite nor undefined.
#[cube]
fn finite(x: f32) -> bool {
    u32::reinterpret(x) & 0x7f80_0000u32 != 0x7f80_0000u32
}

/// Step and low, as a word, of numbers from `low` to `high`, of which so many are `broken`: not finite.
#[cube]
fn pair_of(low: f32, high: f32, broken: u32, #[comptime] codes: Codes) -> u32 {
    let low = within(low);
    let high = within(high);
    let mut low16 = to_half(low);
    if half(low16) > low {
        // The next smaller one.
        if low16 == 0u32 {
            low16 = 0x8001u32;
        } else if low16 & 0x8000u32 == 0u32 {
            low16 -= 1u32;
        } else {
            low16 += 1u32;
        }
    }
    let step = (high - half(low16)) / comptime!(codes.top());
    let mut step16 = to_half(step);
    // Rounded up, so that the largest number is within reach.
    if half(step16) < step {
        step16 += 1u32;
    }
    select(broken > 0u32, 0x7e00_7e00u32, low16 << 16u32 | step16)
}

/// Rounds a head's rows of numbers to 16 bits: as many from row `at[3 h]` on as `at[3 h + 1]` says. What is no number
/// stays none. Cubes: numbers of a head, heads.
#[cube(launch)]
pub(crate) fn round(plain: &mut [u32], at: &[u32], #[comptime] dim: usize) {
    let head = CUBE_POS_Y as usize;
    let i = number_of_head();
    if i < at[head * 3 + 1] as usize * 2 * dim {
        let number = at[head * 3] as usize * 2 * dim + i;
        let x = f32::reinterpret(plain[number]);
        let near = half(to_half(within(x)));
        plain[number] = select(finite(x), u32::reinterpret(near), 0x7fc0_0000u32);
    }
}

/// Turns a head's plain rows, keys and values, before they become codes: as many from row `at[3 h]` on as `at[3 h +
/// 1]` says. Cubes: rows (on two axes, X and Z), heads.
#[cube(launch)]
pub(crate) fn turn_plain(plain: &mut [u32], at: &[u32], #[comptime] codes: Codes) {
    let numbers = comptime!(2 * codes.dim);
    let head = CUBE_POS_Y as usize;
    let row = (CUBE_POS_Z * CUBE_COUNT_X + CUBE_POS_X) as usize;
    if row >= at[head * 3 + 1] as usize {
        terminate!();
    }
    let first = (at[head * 3] as usize + row) * numbers;
    let mut both = Shared::<[f32]>::new_slice(comptime!(2 * codes.dim));
    for i in range_stepped(UNIT_POS as usize, numbers, TURNING) {
        both[i] = f32::reinterpret(plain[first + i]);
    }
    turn(&mut both, comptime!(2 * codes.dim), codes.block, TURNING);
    let by = comptime!(1.0 / (codes.block as f32).sqrt());
    for i in range_stepped(UNIT_POS as usize, numbers, TURNING) {
        plain[first + i] = u32::reinterpret(both[i] * by);
    }
}

/// Steps and lows of plain rows that become coded ones, in their records: as many rows as `at[3 h + 1]` says from row
/// `at[3 h]` on, to those from row `at[3 h + 2]` on. Cubes: pairs of a head, heads.
#[cube(launch)]
pub(crate) fn pairs(plain: &[u32], coded: &mut [u32], at: &[u32], #[comptime] codes: Codes) {
    let dim = comptime!(codes.dim);
    let of_key = comptime!(codes.pairs(false));
    let each = comptime!(codes.pairs(false) + codes.pairs(true));
    let head = CUBE_POS_Y as usize;
    let i = number_of_head();
    let (row, of) = (i / each, i % each);
    if row < at[head * 3 + 1] as usize {
        let value = of >= of_key;
        let group = of - select(value, of_key, 0usize);
        let mut from = (at[head * 3] as usize + row) * 2 * dim;
        let mut to = (at[head * 3 + 2] as usize + row) * comptime!(codes.record())
            + comptime!(codes.words());
        if value {
            from += dim;
            to += comptime!(codes.of(true));
        }
        let start = group * comptime!(codes.width);
        let mut low = f32::reinterpret(plain[from + start]);
        let mut high = low;
        let mut broken = 0u32;
        for feature in start..usize::min(start + comptime!(codes.width), dim) {
            let x = f32::reinterpret(plain[from + feature]);
            low = f32::min(low, x);
            high = f32::max(high, x);
            broken += select(finite(x), 0u32, 1u32);
        }
        coded[to + group] = pair_of(low, high, broken, codes);
    }
}

/// Steps and lows that runs of keys share: of the head's `at[3 h + 1]` plain rows from row `at[3 h]` on, to those of the
/// runs from `runs[h]` on. Cubes: features of a head's runs, heads.
#[cube(launch)]
pub(crate) fn shared_pairs(
    plain: &[u32],
    shared: &mut [u32],
    at: &[u32],
    runs: &[u32],
    #[comptime] codes: Codes,
) {
    let dim = comptime!(codes.dim);
    let many = comptime!(codes.run);
    let head = CUBE_POS_Y as usize;
    let i = number_of_head();
    let (run, feature) = (i / dim, i % dim);
    if (run + 1) * many <= at[head * 3 + 1] as usize {
        let from = (at[head * 3] as usize + run * many) * 2 * dim + feature;
        let mut low = f32::reinterpret(plain[from]);
        let mut high = low;
        let mut broken = 0u32;
        for row in 0..many {
            let x = f32::reinterpret(plain[from + row * 2 * dim]);
            low = f32::min(low, x);
            high = f32::max(high, x);
            broken += select(finite(x), 0u32, 1u32);
        }
        shared[(runs[head] as usize + run) * dim + feature] = pair_of(low, high, broken, codes);
    }
}

/// The code of a number.
#[cube]
fn code_of(x: f32, pair: u32, #[comptime] codes: Codes) -> u32 {
    let step = half(pair & 0xffffu32);
    let mut code = 0u32;
    if step > 0.0 {
        // Half a step is added and the rest cut off.
        let at = (x - half(pair >> 16u32)) / step + 0.5;
        code = u32::cast_from(f32::max(f32::min(at, comptime!(codes.top())), 0.0f32));
    }
    code
}

/// Codes of plain rows that become coded ones, of which steps and lows are there: rows as those of [`pairs`], runs as
/// those of [`shared_pairs`]. Cubes: words of a head, heads.
#[cube(launch)]
pub(crate) fn encode(
    plain: &[u32],
    shared: &[u32],
    coded: &mut [u32],
    at: &[u32],
    runs: &[u32],
    #[comptime] codes: Codes,
) {
    let dim = comptime!(codes.dim);
    let words = comptime!(codes.words());
    let stride = comptime!(codes.low_bytes());
    let bits = comptime!(codes.low_bits());
    let head = CUBE_POS_Y as usize;
    let i = number_of_head();
    let (row, of) = (i / (2 * words), i % (2 * words));
    if row < at[head * 3 + 1] as usize {
        let value = of >= words;
        let word = of % words;
        let mut from = (at[head * 3] as usize + row) * 2 * dim;
        let mut to = (at[head * 3 + 2] as usize + row) * comptime!(codes.record());
        if value {
            from += dim;
            to += comptime!(codes.of(true));
        }
        let shared_by = runs[head] as usize + row / comptime!(usize::max(codes.run, 1));
        let own = to + comptime!(codes.words());
        let mut made = 0u32;
        for index in 0..4usize {
            let place = word * 4 + index;
            for slot in 0..comptime!(8 / codes.low_bits()) {
                let feature = slot * stride + place;
                if place < stride && feature < dim {
                    let mut pair = coded[own + feature / comptime!(codes.width)];
                    if comptime!(codes.run > 0) {
                        // A key's are its run's.
                        if !value {
                            pair = shared[shared_by * dim + feature];
                        }
                    }
                    let code = code_of(f32::reinterpret(plain[from + feature]), pair, codes);
                    let low = code & comptime!((1u32 << codes.low_bits()) - 1);
                    made += low << (index * 8 + slot * bits) as u32;
                }
            }
            if comptime!(codes.bits == 3) {
                for slot in 0..8usize {
                    if place >= stride && (place - stride) * 8 + slot < dim {
                        let feature = (place - stride) * 8 + slot;
                        let mut pair = coded[own + feature / comptime!(codes.width)];
                        if comptime!(codes.run > 0) {
                            // A key's are its run's.
                            if !value {
                                pair = shared[shared_by * dim + feature];
                            }
                        }
                        let code = code_of(f32::reinterpret(plain[from + feature]), pair, codes);
                        made += (code >> 2u32) << (index * 8 + slot) as u32;
                    }
                }
            }
        }
        coded[to + word] = made;
    }
}
