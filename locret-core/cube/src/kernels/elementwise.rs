//! Norms, gates and rotations: what a layer does between its products. Rows of inputs may lie apart.

use super::reduced;
use cubecl::prelude::*;

/// Units of a cube that has one row.
pub(crate) const ROW_UNITS: usize = 128;

/// RMS norm of each row: `x / √(mean(x²) + epsilon) · gain`, and with `add` of `x + y`, which is `sum` then. A cube
/// has a row.
#[cube(launch)]
pub(crate) fn norm(
    x: &Tensor<f32>,
    y: &Tensor<f32>,
    gain: &[f32],
    sum: &mut [f32],
    out: &mut [f32],
    epsilon: f32,
    #[comptime] add: bool,
) {
    let width = x.shape(1);
    let (row, unit) = (CUBE_POS, UNIT_POS as usize);
    if row >= x.shape(0) {
        terminate!();
    }
    let mut parts = Shared::<[f32]>::new_slice(ROW_UNITS);
    let mut square = 0.0f32;
    for i in range_stepped(unit, width, ROW_UNITS) {
        let mut own = x[row * x.stride(0) + i];
        if comptime!(add) {
            own += y[row * y.stride(0) + i];
            sum[row * width + i] = own;
        }
        square += own * own;
    }
    parts[unit] = square;
    let squares = reduced::sum(&mut parts, unit, ROW_UNITS);
    let by = f32::sqrt(squares / width as f32 + epsilon);
    for i in range_stepped(unit, width, ROW_UNITS) {
        let mut own = x[row * x.stride(0) + i];
        if comptime!(add) {
            own += y[row * y.stride(0) + i];
        }
        out[row * width + i] = own / by * gain[i];
    }
}

/// `silu(gate) · up`, `[rows, 2 n]` to `[rows, n]`.
#[cube(launch)]
pub(crate) fn gate(gate_up: &Tensor<f32>, out: &mut [f32]) {
    let n = gate_up.shape(1) / 2;
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let at = ABSOLUTE_POS / n * gate_up.stride(0) + ABSOLUTE_POS % n;
    let gate = gate_up[at];
    out[ABSOLUTE_POS] = gate / (1.0 + f32::exp(-gate)) * gate_up[at + n];
}

/// Which row of the table rotates a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum From {
    /// As many rows behind the first one as the token is.
    First,
    /// The same, from a first row of each group of so many heads.
    Groups(usize),
    /// Its own.
    Each,
}

/// How a kernel rotates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Turn {
    /// Features of a head.
    pub(crate) dim: usize,
    /// Pairs of them that are rotated.
    pub(crate) half: usize,
    pub(crate) from: From,
    /// Whether the rotation is undone, and what is missing after that is added.
    pub(crate) inverse: bool,
}

/// Rotates each head of `[tokens, heads * dim]`, or undoes that, by rows that begin with `first` or are in `rows`; `factor` is the one that cosines and sines carry.
/// A unit has a pair of features, or one that stays.
#[cube(launch)]
pub(crate) fn rotate(
    x: &Tensor<f32>,
    cos: &[f32],
    sin: &[f32],
    rows: &[u32],
    out: &mut [f32],
    first: u32,
    factor: f32,
    #[comptime] turn: Turn,
) {
    let width = x.shape(1);
    let pieces = comptime!(turn.dim - turn.half);
    let half = comptime!(turn.half);
    let heads = width / comptime!(turn.dim);
    let (at, piece) = (ABSOLUTE_POS / pieces, ABSOLUTE_POS % pieces);
    let (token, head) = (at / heads, at % heads);
    if token >= x.shape(0) {
        terminate!();
    }
    let from = token * x.stride(0) + head * comptime!(turn.dim) + piece;
    let to = token * width + head * comptime!(turn.dim) + piece;
    if piece < half {
        let row = match comptime!(turn.from) {
            From::First => first as usize + token,
            From::Groups(heads) => rows[head / heads] as usize + token,
            From::Each => rows[token] as usize,
        };
        let (c, s) = (cos[row * half + piece], sin[row * half + piece]);
        let (a, b) = (x[from], x[from + half]);
        if comptime!(turn.inverse) {
            let by = 1.0 / (factor * factor);
            let first = (a * c + b * s) * by;
            let second = (b * c - a * s) * by;
            let missing = a - (first * c - second * s);
            let also = b - (second * c + first * s);
            out[to] = first + (missing * c + also * s) * by;
            out[to + half] = second + (also * c - missing * s) * by;
        } else {
            out[to] = a * c - b * s;
            out[to + half] = b * c + a * s;
        }
    } else {
        out[to + half] = x[from + half];
    }
}
