//! Tiles of keys and values, as the inner loops read them.

use crate::{
    rope::{RopeTable, Rows, rotate_into},
    simd::Simd,
    tiles::{Floats, KvTiles},
};
use std::ops::Range;

/// With this many rows a tile is copied before it is used.
const COPY_ROWS: usize = 64;

/// Reads tiles of one KV head.
pub(crate) struct Loader<'a> {
    pub(crate) store: &'a dyn KvTiles,
    rotation: Option<&'a RopeTable>,
    /// Where units stand, if not where they lie.
    places: Option<&'a [u32]>,
    d: usize,
    /// Whether enough rows use a tile to pay for a copy of it.
    copies: bool,
}

impl<'a> Loader<'a> {
    /// Tiles of `store`, whose units have `d` features, for `rows` queries.
    #[inline(always)]
    pub(crate) fn new(
        store: &'a dyn KvTiles,
        rotation: Option<&'a RopeTable>,
        d: usize,
        rows: usize,
    ) -> Self {
        Self {
            store,
            rotation,
            places: None,
            d,
            copies: rows >= COPY_ROWS,
        }
    }

    /// The same of units that stand elsewhere than where they lie.
    #[inline(always)]
    pub(crate) fn placed(self, places: Option<&'a [u32]>) -> Self {
        Self { places, ..self }
    }

    /// The keys of a tile, rotated if they have to be.
    #[inline(always)]
    pub(crate) fn keys<'s, S: Simd>(
        &'s self,
        s: S,
        units: Range<usize>,
        scratch: &'s mut [f32],
        rotated: &'s mut [f32],
    ) -> &'s [f32] {
        let len = units.len() * self.d;
        match self.rotation {
            None => &self.store.keys(units, scratch)[..len],
            Some(table) => {
                let rotated = &mut rotated[..len];
                self.rotate(s, table, units, scratch, rotated);
                rotated
            }
        }
    }

    /// Writes the keys of a tile, rotated.
    #[inline(always)]
    fn rotate<S: Simd>(
        &self,
        s: S,
        table: &RopeTable,
        units: Range<usize>,
        scratch: &mut [f32],
        out: &mut [f32],
    ) {
        let places = self.places.map(|places| &places[units.clone()]);
        let rows = Rows {
            first: units.start,
            places,
        };
        let keys = &self.store.keys(units, scratch)[..out.len()];
        rotate_into(s, keys, out, self.d, table, rows);
    }

    /// The values of a tile.
    #[inline(always)]
    pub(super) fn values<'s>(&'s self, units: Range<usize>, scratch: &'s mut [f32]) -> &'s [f32] {
        let len = units.len() * self.d;
        &self.store.values(units, scratch)[..len]
    }

    /// The keys of a tile in memory that is near.
    ///
    /// Broadcasts walk through a tile in columns. In the store that would be one miss after the
    /// other; a copy is made in the order in which memory is fetched ahead.
    #[inline(always)]
    pub(crate) fn near_keys<'s, S: Simd>(
        &'s self,
        s: S,
        units: Range<usize>,
        scratch: &'s mut [f32],
        rotated: &'s mut [f32],
    ) -> &'s [f32] {
        match self.store.stored_keys(units.clone()) {
            Some(Floats::F32(keys)) if self.copies && self.rotation.is_none() => {
                copy(keys, scratch)
            }
            _ => self.keys(s, units, scratch, rotated),
        }
    }

    /// The values of a tile in memory that is near.
    #[inline(always)]
    pub(super) fn near_values<'s>(
        &'s self,
        units: Range<usize>,
        scratch: &'s mut [f32],
    ) -> &'s [f32] {
        match self.store.stored_values(units.clone()) {
            Some(Floats::F32(values)) if self.copies => copy(values, scratch),
            _ => self.values(units, scratch),
        }
    }

    /// The keys and values of a tile that lies in several pieces, one after the other.
    #[inline(always)]
    pub(crate) fn gathered<'s, S: Simd>(
        &self,
        s: S,
        pieces: &[Range<usize>],
        keys: &'s mut [f32],
        values: &'s mut [f32],
        scratch: &mut [f32],
    ) -> (&'s [f32], &'s [f32]) {
        let mut at = 0;
        for piece in pieces {
            let to = at..at + piece.len() * self.d;
            let out = &mut keys[to.clone()];
            match self.rotation {
                None => out.copy_from_slice(&self.store.keys(piece.clone(), scratch)[..to.len()]),
                Some(table) => self.rotate(s, table, piece.clone(), scratch, out),
            }
            let stored = &self.store.values(piece.clone(), scratch)[..to.len()];
            values[to.clone()].copy_from_slice(stored);
            at = to.end;
        }
        (&keys[..at], &values[..at])
    }
}

fn copy<'s>(x: &[f32], scratch: &'s mut [f32]) -> &'s [f32] {
    let scratch = &mut scratch[..x.len()];
    scratch.copy_from_slice(x);
    scratch
}
