//! Products of tiles in shared memory, by a device's matrix units or by plain loops over the same memory.
//!
//! Tiles are rows of numbers of 16 bits (bf16, whose range is that of 32 bits), eight of them in a vector of four
//! words. A number of 32 bits is one of them, the nearest, or the sum of two, its parts: the nearest, and the
//! nearest to what that leaves. Parts of a tile lie one behind the other.
//!
//! A plane multiplies a [`Block`]: tiles of 16 rows by 8 columns, of which a unit has four sums, in rows `lane / 4`
//! and `lane / 4 + 8`, and in columns `2 (lane % 4)` and the next one. That is where `mma.m16n8k16` of NVIDIA's cards
//! has them, and so do the loops, which read what its registers would be loaded with from where `ldmatrix` is pointed
//! to: all but the two instructions themselves is the same, and is run where there are no matrix units.

use cubecl::{
    cmma::{MatrixIdent, MmaDefinition},
    prelude::*,
};
use half::bf16;

/// Units of a plane.
pub(crate) const PLANE: usize = 32;

/// Rows of a tile of sums.
pub(crate) const ROWS: usize = 16;

/// Columns of a tile of sums, and numbers of a vector.
pub(crate) const EIGHT: usize = 8;

/// Inner numbers of a step.
pub(crate) const STEP: usize = 16;

/// Eight numbers of 16 bits.
pub(crate) type Eight = Vector<u32, Const<4>>;

/// Two neighbouring sums.
pub(crate) type Pair = Vector<f32, Const<2>>;

/// How a matrix lies in shared memory, in eights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Side {
    /// Of a row: odd, so that rows below each other lie in different banks.
    pub(crate) pitch: usize,
    /// Rows.
    pub(crate) rows: usize,
    /// Parts of a number: one or two.
    pub(crate) parts: usize,
    /// Whether the device has matrix units.
    pub(crate) matrix_units: bool,
}

impl Side {
    /// Rows of so many numbers, which are a multiple of 16.
    pub(crate) fn new(rows: usize, numbers: usize, parts: usize, matrix_units: bool) -> Self {
        Self {
            pitch: numbers / EIGHT + 1,
            rows,
            parts,
            matrix_units,
        }
    }

    /// Eights between parts.
    pub(crate) fn apart(self) -> usize {
        self.rows * self.pitch
    }

    /// Eights of all parts.
    pub(crate) fn eights(self) -> usize {
        self.parts * self.apart()
    }

    /// Bytes of all parts.
    pub(crate) fn bytes(self) -> usize {
        2 * EIGHT * self.eights()
    }
}

/// What a plane multiplies at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Block {
    /// Tiles below each other.
    pub(crate) down: usize,
    /// Tiles beside each other: an even number.
    pub(crate) across: usize,
    /// Steps of 16 inner numbers.
    pub(crate) steps: usize,
    pub(crate) left: Side,
    pub(crate) right: Side,
    /// Whether rows of the right side are inner numbers, and not columns.
    pub(crate) turned: bool,
}

/// The nearest number of 16 bits, in the upper half of a word whose lower half means nothing.
#[cube]
fn rounded(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    // Half of what is left out, and of two numbers as near the even one.
    bits + 0x7fffu32 + (bits >> 16u32 & 1u32)
}

/// The nearest numbers of 16 bits to two, in a word, the first in its lower half.
#[cube]
pub(crate) fn pair(first: f32, second: f32, #[comptime] side: Side) -> u32 {
    // Who has matrix units has an instruction for this.
    if comptime!(side.matrix_units) {
        let mut both = Pair::empty();
        both.insert(0usize, first);
        both.insert(1usize, second);
        u32::reinterpret(Vector::<bf16, Const<2>>::cast_from(both))
    } else {
        (rounded(first) >> 16u32) | (rounded(second) & 0xffff_0000u32)
    }
}

/// Number `k` of a word.
#[cube]
pub(crate) fn number(word: u32, #[comptime] k: usize) -> f32 {
    f32::reinterpret(if comptime!(k == 0) {
        word << 16u32
    } else {
        word & 0xffff_0000u32
    })
}

/// Puts eight numbers into a tile.
#[cube]
pub(crate) fn put(numbers: &Array<f32>, tile: &mut [Eight], at: usize, #[comptime] side: Side) {
    let mut left = Array::<f32>::new(EIGHT);
    #[unroll]
    for i in 0..8usize {
        left[i] = numbers[i];
    }
    #[unroll]
    for part in 0..side.parts {
        let mut eight = Eight::empty();
        #[unroll]
        for i in 0..4usize {
            let word = pair(left[2 * i], left[2 * i + 1], side);
            eight.insert(i, word);
            if comptime!(part + 1 < side.parts) {
                left[2 * i] -= number(word, 0usize);
                left[2 * i + 1] -= number(word, 1usize);
            }
        }
        tile[comptime!(part * side.apart()) + at] = eight;
    }
}

/// Eight numbers of a row of `width` that begins at number `from`; zeros behind its end. All of them are multiples
/// of the length of vectors.
#[cube]
pub(crate) fn eight<T: Numeric, N: Size>(
    rows: &[Vector<T, N>],
    from: usize,
    at: usize,
    width: usize,
) -> Array<f32> {
    let long = N::value().comptime();
    let mut out = Array::<f32>::new(EIGHT);
    #[unroll]
    for i in 0..comptime!(EIGHT / long) {
        let first = at * EIGHT + i * long;
        let mut own = Vector::<f32, N>::new(0.0f32);
        if first < width {
            own = Vector::<f32, N>::cast_from(rows[(from + first) / long]);
        }
        #[unroll]
        for k in 0..long {
            out[i * long + k] = own.extract(k);
        }
    }
    out
}

/// Tiles of sums that are nothing yet.
#[cube]
pub(crate) fn nothing(#[comptime] tiles: usize) -> Sequence<Array<Pair>> {
    let mut sums = Sequence::<Array<Pair>>::new();
    #[unroll]
    for _ in 0..tiles {
        let mut tile = Array::<Pair>::new(2usize);
        tile[0] = Pair::new(0.0f32);
        tile[1] = Pair::new(0.0f32);
        sums.push(tile);
    }
    sums
}

/// Adds to `sums`, `[down, across]` tiles, the product of `left`, rows from `row` on, and of `right`, columns from
/// `column` on. Of two parts each, what is smaller than all others is left out: the product of both second ones.
///
/// `left` may be vectors of one word, where its rows are written word by word.
#[cube]
pub(crate) fn multiply<L: Size>(
    left: &[Vector<u32, L>],
    right: &[Eight],
    sums: &mut Sequence<Array<Pair>>,
    row: usize,
    column: usize,
    lane: usize,
    #[comptime] block: Block,
) {
    if comptime!(block.left.matrix_units) {
        by_matrix_units::<L>(left, right, sums, row, column, lane, block);
    } else {
        by_loops::<L>(left, right, sums, row, column, lane, block);
    }
}

/// Where unit `lane` has its row of the four matrices of eight by eight that `ldmatrix` takes of 16 rows: rows from
/// `row` on above and below, and both of the next eight inner numbers. Unit `8 m + r` has row `r` of matrix `m`.
#[cube]
fn left_at(row: usize, step: usize, lane: usize, #[comptime] side: Side) -> usize {
    (row + lane % 16) * comptime!(side.pitch) + step * 2 + lane / 16
}

/// The same of two tiles' columns from `column` on, each with its two eights of inner numbers.
#[cube]
fn right_at(column: usize, step: usize, lane: usize, #[comptime] block: Block) -> usize {
    if comptime!(block.turned) {
        (step * STEP + lane % 16) * comptime!(block.right.pitch) + column / EIGHT + lane / 16
    } else {
        (column + lane / 16 * 8 + lane % 8) * comptime!(block.right.pitch) + step * 2 + lane / 8 % 2
    }
}

#[cube]
fn by_matrix_units<L: Size>(
    left: &[Vector<u32, L>],
    right: &[Eight],
    sums: &mut Sequence<Array<Pair>>,
    row: usize,
    column: usize,
    lane: usize,
    #[comptime] block: Block,
) {
    let size = L::value().comptime();
    let long = comptime!(4 / size);
    let mma = MmaDefinition::<bf16, bf16, f32>::new(16usize, 8usize, 16usize);
    #[unroll]
    for step in 0..block.steps {
        let mut rows = Sequence::<Array<Vector<bf16, Const<2>>>>::new();
        #[unroll]
        for part in 0..block.left.parts {
            #[unroll]
            for i in 0..block.down {
                let at = comptime!(part * block.left.apart())
                    + left_at(row + i * ROWS, step, lane, comptime!(block.left));
                let words = mma.load_matrix::<Vector<u32, L>, Const<1>>(
                    &left[at * long..at * long + long],
                    MatrixIdent::A,
                    4usize,
                    false,
                );
                let mut four = Array::<Vector<bf16, Const<2>>>::new(4usize);
                #[unroll]
                for k in 0..4usize {
                    four[k] = Vector::<bf16, Const<2>>::reinterpret(words[k]);
                }
                rows.push(four);
            }
        }
        #[unroll]
        for j in 0..comptime!(block.across / 2) {
            #[unroll]
            for part in 0..block.right.parts {
                let at = comptime!(part * block.right.apart())
                    + right_at(column + j * 2 * EIGHT, step, lane, block);
                let words = mma.load_matrix::<Eight, Const<1>>(
                    &right[at..at + 1],
                    MatrixIdent::B,
                    4usize,
                    block.turned,
                );
                let mut first = Array::<Vector<bf16, Const<2>>>::new(2usize);
                let mut second = Array::<Vector<bf16, Const<2>>>::new(2usize);
                #[unroll]
                for k in 0..2usize {
                    first[k] = Vector::<bf16, Const<2>>::reinterpret(words[k]);
                    second[k] = Vector::<bf16, Const<2>>::reinterpret(words[k + 2]);
                }
                #[unroll]
                for of in 0..block.left.parts {
                    if comptime!(of + part < 2) {
                        #[unroll]
                        for i in 0..block.down {
                            let own = &rows[comptime!(of * block.down + i)];
                            let to = comptime!(i * block.across + j * 2);
                            mma.execute_inplace(own, &first, &mut sums[to]);
                            mma.execute_inplace(own, &second, &mut sums[comptime!(to + 1)]);
                        }
                    }
                }
            }
        }
    }
}

/// What the units' instructions do, from where they are pointed to: unit `4 r + w` gets word `w` of row `r` of each
/// matrix, or, of turned ones, number `r` of rows `2 w` and `2 w + 1`.
#[cube]
fn by_loops<L: Size>(
    left: &[Vector<u32, L>],
    right: &[Eight],
    sums: &mut Sequence<Array<Pair>>,
    row: usize,
    column: usize,
    lane: usize,
    #[comptime] block: Block,
) {
    let size = L::value().comptime();
    #[unroll]
    for tile in 0..comptime!(block.down * block.across) {
        let own = row + comptime!(tile / block.across * ROWS);
        let two = column + comptime!(tile % block.across / 2 * 2 * EIGHT);
        let second = comptime!(tile % block.across % 2);
        let mut found = Array::<f32>::new(4usize);
        #[unroll]
        for i in 0..4usize {
            found[i] = 0.0;
        }
        // Both first parts, and each second one with the other first one.
        for parts in 0..comptime!(block.left.parts + block.right.parts - 1) {
            let from_left = parts % 2 * comptime!(block.left.apart());
            let from_right = parts / 2 * comptime!(block.right.apart());
            for word in 0..comptime!(block.steps * STEP / 2) {
                let (step, inner, w) = (word / 8, word / 4 % 2, word % 4);
                let mut rows = Array::<u32>::new(2usize);
                #[unroll]
                for h in 0..2usize {
                    let pointing = (h + 2 * inner) * 8 + lane / 4;
                    let at = from_left + left_at(own, step, pointing, comptime!(block.left));
                    let at = at * 4 + w;
                    rows[h] = left[at / size].extract_dynamic(at % size);
                }
                let matrix = second * 2 + inner;
                #[unroll]
                for k in 0..2usize {
                    #[unroll]
                    for e in 0..2usize {
                        let y = if comptime!(block.turned) {
                            let pointing = matrix * 8 + w * 2 + k;
                            let at = from_right + right_at(two, step, pointing, block);
                            number(right[at].extract_dynamic(lane % 4), e)
                        } else {
                            let pointing = matrix * 8 + lane % 4 * 2 + e;
                            let at = from_right + right_at(two, step, pointing, block);
                            number(right[at].extract_dynamic(w), k)
                        };
                        #[unroll]
                        for h in 0..2usize {
                            found[h * 2 + e] += number(rows[h], k) * y;
                        }
                    }
                }
            }
        }
        let sum = &mut sums[tile];
        #[unroll]
        for h in 0..2usize {
            let mut both = sum[h];
            #[unroll]
            for e in 0..2usize {
                let own = both.extract(e) + found[h * 2 + e];
                both.insert(e, own);
            }
            sum[h] = both;
        }
    }
}
