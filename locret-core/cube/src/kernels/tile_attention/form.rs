//! Sizes of tiles of an attention, and where they lie.

use crate::kernels::tiles::{Block, EIGHT, PLANE, ROWS, STEP, Side};

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Form {
    /// Features of a head.
    pub(crate) dim: usize,
    /// Pairs of features of the keys that are rotated as they are loaded.
    pub(crate) half: usize,
    /// Query heads of a KV head.
    pub(crate) group: usize,
    /// Planes of a cube.
    pub(crate) planes: usize,
    /// Tiles of 16 rows of a plane.
    pub(crate) down: usize,
    /// Keys of a turn: a multiple of 16.
    pub(crate) keys: usize,
    /// Parts of a number.
    pub(crate) parts: usize,
    /// Whether what is made are parts of a row's units, which [`join`](super::attention::join) puts together.
    pub(crate) split: bool,
    pub(crate) matrix_units: bool,
}

impl Form {
    /// With at most `shared` bytes; `None` where heads are so wide that a tile does not fit.
    pub(crate) fn new(
        dim: usize,
        half: usize,
        group: usize,
        parts: usize,
        matrix_units: bool,
        shared: usize,
    ) -> Option<Self> {
        let form = |[planes, down, keys]: [usize; 3]| Self {
            dim,
            half,
            group,
            planes,
            down,
            keys,
            parts,
            split: false,
            matrix_units,
        };
        let sizes = match matrix_units {
            true => [[4, 2, 32], [4, 1, 32], [4, 1, 16]],
            false => [[2, 2, 32], [2, 1, 16], [1, 1, 16]],
        };
        let mut forms = sizes.into_iter().map(form);
        forms.find(|form| form.shared() <= shared)
    }

    /// Rows of a cube.
    pub(crate) fn rows(self) -> usize {
        self.planes * self.down * ROWS
    }

    /// Rows of a unit.
    pub(super) fn own_rows(self) -> usize {
        2 * self.down
    }

    pub(crate) fn units(self) -> usize {
        self.planes * PLANE
    }

    /// Features, and zeros up to whole steps.
    pub(super) fn padded(self) -> usize {
        self.dim.next_multiple_of(STEP)
    }

    fn side(self, rows: usize, numbers: usize) -> Side {
        Side::new(rows, numbers, self.parts, self.matrix_units)
    }

    pub(super) fn queries(self) -> Side {
        self.side(self.rows(), self.padded())
    }

    /// Of keys, and of values.
    pub(super) fn tile(self) -> Side {
        self.side(self.keys, self.padded())
    }

    pub(super) fn weights(self) -> Side {
        self.side(self.rows(), self.keys)
    }

    pub(super) fn scoring(self) -> Block {
        Block {
            down: self.down,
            across: self.keys / EIGHT,
            steps: self.padded() / STEP,
            left: self.queries(),
            right: self.tile(),
            turned: false,
        }
    }

    pub(super) fn mixing(self) -> Block {
        Block {
            across: self.padded() / EIGHT,
            steps: self.keys / STEP,
            left: self.weights(),
            turned: true,
            ..self.scoring()
        }
    }

    /// Numbers through which units of a row find a sum, where a plane cannot.
    pub(super) fn exchanged(self) -> usize {
        match self.matrix_units {
            true => 1,
            false => self.own_rows() * self.units(),
        }
    }

    /// Bytes of shared memory of a cube.
    pub(crate) fn shared(self) -> usize {
        self.queries().bytes()
            + 2 * self.tile().bytes()
            + self.weights().bytes()
            + size_of::<f32>() * self.exchanged()
    }
}
