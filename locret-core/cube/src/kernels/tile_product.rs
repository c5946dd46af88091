//! Products of chunks with weights as a file has them, in tiles of 16-bit numbers: `y = x · Wᵀ` with sums of 32 bits.
//!
//! Weights of every kind are decoded into the same tiles, so that one kernel serves all of them: a library's product
//! would need them whole and widened. Inputs and weights are bf16 in one part or two ([`tiles`](super::tiles)), and
//! never f16: its range would not do for activations.

use super::{
    product::{Kind, decode},
    tiles::{self, Block, EIGHT, Eight, PLANE, ROWS, STEP, Side},
};
use cubecl::prelude::*;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Form {
    /// Planes below each other, and beside each other.
    pub(crate) planes: [usize; 2],
    /// Tiles of a plane below each other, and beside each other.
    pub(crate) tiles: [usize; 2],
    /// Columns of a turn: a multiple of 16.
    pub(crate) columns: usize,
    /// Parts of an input.
    pub(crate) input_parts: usize,
    /// Parts of a weight.
    pub(crate) weight_parts: usize,
    pub(crate) matrix_units: bool,
}

impl Form {
    /// For weights of a kind, with numbers in at most so many parts.
    pub(crate) fn new(kind: Kind, parts: usize, matrix_units: bool) -> Self {
        let (planes, tiles) = match (matrix_units, parts) {
            (true, 1) => ([2, 4], [4, 4]),
            // Two parts take more registers, of which two cubes are to have enough.
            (true, _) => ([2, 4], [2, 4]),
            (false, _) => ([2, 2], [1, 2]),
        };
        Self {
            planes,
            tiles,
            columns: 2 * STEP,
            input_parts: parts,
            // They are what is rounded to.
            weight_parts: if kind == Kind::BF16 { 1 } else { parts },
            matrix_units,
        }
    }

    /// Rows of a cube.
    pub(crate) fn rows(self) -> usize {
        self.planes[0] * self.tiles[0] * ROWS
    }

    /// Outputs of a cube.
    pub(crate) fn outputs(self) -> usize {
        self.planes[1] * self.tiles[1] * EIGHT
    }

    pub(crate) fn units(self) -> usize {
        self.planes[0] * self.planes[1] * PLANE
    }

    fn side(self, rows: usize, parts: usize) -> Side {
        Side::new(rows, self.columns, parts, self.matrix_units)
    }

    fn inputs(self) -> Side {
        self.side(self.rows(), self.input_parts)
    }

    fn weights(self) -> Side {
        self.side(self.outputs(), self.weight_parts)
    }

    fn block(self) -> Block {
        Block {
            down: self.tiles[0],
            across: self.tiles[1],
            steps: self.columns / STEP,
            left: self.inputs(),
            right: self.weights(),
            turned: false,
        }
    }

    /// Bytes of shared memory of a cube.
    pub(crate) fn shared(self) -> usize {
        self.inputs().bytes() + self.weights().bytes()
    }
}

/// Writes columns from `first` on of `out`, `[rows, across]`. `words` and `scales` are `[outputs, eights]` of
/// [`Kind`]; the width and stride of `x` are multiples of the length of its vectors.
///
/// Cubes: rows, outputs, so that cubes that run at once share weights.
#[cube(launch)]
pub(crate) fn product<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    words: &[u32],
    scales: &[u32],
    out: &mut [f32],
    outputs: u32,
    eights: u32,
    first: u32,
    across: u32,
    #[comptime] kind: Kind,
    #[comptime] form: Form,
) {
    let turn = comptime!(form.columns / EIGHT);
    let units = comptime!(form.units());
    let own_inputs = comptime!((form.rows() * form.columns / EIGHT).div_ceil(form.units()));
    let own_weights = comptime!((form.outputs() * form.columns / EIGHT).div_ceil(form.units()));
    let (unit, eights, outputs) = (UNIT_POS as usize, eights as usize, outputs as usize);
    let (lane, plane) = (unit % PLANE, unit / PLANE);
    let (rows, columns, stride) = (x.shape(0), x.shape(1), x.stride(0));
    let row = CUBE_POS_X as usize * comptime!(form.rows());
    let output = CUBE_POS_Y as usize * comptime!(form.outputs());
    let down = plane / comptime!(form.planes[1]) * comptime!(form.tiles[0] * ROWS);
    let right = plane % comptime!(form.planes[1]) * comptime!(form.tiles[1] * EIGHT);
    let mut inputs = Shared::<[Eight]>::new_aligned_slice(form.inputs().eights(), 16usize);
    let mut weights = Shared::<[Eight]>::new_aligned_slice(form.weights().eights(), 16usize);
    let mut sums = tiles::nothing(comptime!(form.tiles[0] * form.tiles[1]));

    for step in 0..eights.div_ceil(turn) {
        // What comes next is read while others still multiply what was here.
        let mut next_inputs = Sequence::<Array<f32>>::new();
        #[unroll]
        for i in 0..own_inputs {
            let at = i * units + unit;
            let (line, eight) = (at / turn, step * turn + at % turn);
            let mut width = columns;
            if row + line >= rows {
                width = 0usize;
            }
            next_inputs.push(tiles::eight(
                x.as_slice(),
                (row + line) * stride,
                eight,
                width,
            ));
        }
        let mut next_weights = Sequence::<Array<f32>>::new();
        #[unroll]
        for i in 0..own_weights {
            let at = i * units + unit;
            let (line, eight) = (at / turn, step * turn + at % turn);
            let mut own = Array::<f32>::new(EIGHT);
            if output + line < outputs && eight < eights {
                let numbers = decode(words, scales, (output + line) * eights + eight, kind);
                #[unroll]
                for k in 0..8usize {
                    own[k] = numbers[k];
                }
            } else {
                #[unroll]
                for k in 0..8usize {
                    own[k] = 0.0;
                }
            }
            next_weights.push(own);
        }
        sync_cube();
        #[unroll]
        for i in 0..own_inputs {
            let at = i * units + unit;
            if at < comptime!(form.rows() * form.columns / EIGHT) {
                let to = at / turn * comptime!(form.inputs().pitch) + at % turn;
                tiles::put(&next_inputs[i], &mut inputs, to, comptime!(form.inputs()));
            }
        }
        #[unroll]
        for i in 0..own_weights {
            let at = i * units + unit;
            if at < comptime!(form.outputs() * form.columns / EIGHT) {
                let to = at / turn * comptime!(form.weights().pitch) + at % turn;
                tiles::put(
                    &next_weights[i],
                    &mut weights,
                    to,
                    comptime!(form.weights()),
                );
            }
        }
        sync_cube();
        tiles::multiply::<Const<4>>(
            &inputs,
            &weights,
            &mut sums,
            down,
            right,
            lane,
            comptime!(form.block()),
        );
    }

    #[unroll]
    for tile in 0..comptime!(form.tiles[0] * form.tiles[1]) {
        let line = row + down + comptime!(tile / form.tiles[1] * ROWS) + lane / 4;
        let to = output + right + comptime!(tile % form.tiles[1] * EIGHT) + lane % 4 * 2;
        #[unroll]
        for h in 0..2usize {
            let sum = &sums[tile];
            let pair = sum[h];
            #[unroll]
            for e in 0..2usize {
                if line + h * 8 < rows && to + e < outputs {
                    out[(line + h * 8) * across as usize + first as usize + to + e] =
                        pair.extract(e);
                }
            }
        }
    }
}
