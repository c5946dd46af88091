//! Tables of angles on the device.

use crate::place::Place;
use burn::tensor::DType as TensorType;
use burn_cubecl::tensor::CubeTensor;
use locret_core::RopeTable;
use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

/// Numbers of all tables that stay on the device, unless they are the last two: those of many sequences' newest tokens, or
/// of a few ones' compact positions.
const KEPT: usize = 1 << 24;

/// Cosines and sines `[rows, half]` that lie on the device already, the one that was used last in front. All
/// layers of a step ask for the same.
#[derive(Debug, Default)]
pub(crate) struct Tables(Mutex<Vec<Table>>);

#[derive(Debug, Clone)]
pub(crate) struct Table {
    /// What a table is made of, and nothing else.
    frequencies: Vec<f32>,
    factor: f32,
    positions: Range<usize>,
    pub(crate) cos: CubeTensor,
    pub(crate) sin: CubeTensor,
}

impl Table {
    fn of(&self, table: &RopeTable) -> bool {
        self.positions == table.positions()
            && self.factor == table.factor()
            && self.frequencies == table.frequencies()
    }

    fn numbers(&self) -> usize {
        2 * self.positions.len() * self.half()
    }

    /// Pairs of features that are rotated.
    pub(crate) fn half(&self) -> usize {
        self.frequencies.len()
    }
}

impl Tables {
    pub(crate) fn get(&self, place: &Place, table: &RopeTable) -> Table {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match kept.iter().position(|kept| kept.of(table)) {
            Some(at) => kept.remove(at),
            None => Table {
                frequencies: table.frequencies().to_vec(),
                factor: table.factor(),
                positions: table.positions(),
                cos: place.list(table.cos(), TensorType::F32),
                sin: place.list(table.sin(), TensorType::F32),
            },
        };
        kept.insert(0, found.clone());
        let mut numbers = 0;
        let fits = |table: &Table| {
            numbers += table.numbers();
            numbers <= KEPT
        };
        let fitting = kept.iter().map(fits).take_while(|fits| *fits).count();
        kept.truncate(fitting.max(2));
        found
    }
}
