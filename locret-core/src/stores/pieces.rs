//! Units of a head that lie in several places: which are where, and as one to kernels.

use crate::{Error, Result};
use locret_kernels::tiles::{Floats, KvTiles};
use std::ops::Range;

/// Consecutive units of a head that lie side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The first one's number.
    pub(super) first: u32,
    pub(super) units: u32,
    /// 0 for what is near, else one more than the block's number.
    pub(super) place: u32,
    /// Which unit of that place the first one is.
    pub(super) slot: u32,
}

impl Run {
    pub(super) fn end(&self) -> usize {
        (self.first + self.units) as usize
    }
}

/// Puts units behind the last run, or into it.
pub(super) fn push(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.place == run.place && last.slot + last.units == run.slot => {
            last.units += run.units;
        }
        _ if run.units > 0 => runs.push(run),
        _ => {}
    }
}

/// The parts of runs that lie in a range of units.
pub(super) fn pieces(
    runs: &[Run],
    range: Range<usize>,
) -> impl Iterator<Item = (u32, Range<usize>)> + '_ {
    let first = runs.partition_point(|run| run.end() <= range.start);
    let within = runs[first..]
        .iter()
        .take_while(move |run| (run.first as usize) < range.end);
    within.map(move |run| {
        let start = range.start.max(run.first as usize);
        let end = range.end.min(run.end());
        let slot = run.slot as usize + (start - run.first as usize);
        (run.place, slot..slot + (end - start))
    })
}

/// A unit that is moved, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Move {
    pub(super) unit: u32,
    pub(super) place: u32,
    pub(super) slot: u32,
}

/// The runs of a head once units were moved from what is near to other places, and the slots that they had there, in
/// the order of units.
pub(super) fn take_out(runs: &[Run], mut moves: Vec<Move>) -> Result<(Vec<Run>, Vec<u32>)> {
    let refused = |unit: u32, found: &str| {
        let expected = "units that lie near, each once";
        Error::setting(
            "what is put away",
            expected,
            format!("unit {unit}, {found}"),
        )
    };
    moves.sort_unstable();
    if let Some(pair) = moves.windows(2).find(|pair| pair[0].unit == pair[1].unit) {
        return Err(refused(pair[0].unit, "which is named twice"));
    }
    let mut new = Vec::with_capacity(runs.len() + 1);
    let mut slots = Vec::with_capacity(moves.len());
    let (mut near, mut left) = (0, &moves[..]);
    for run in runs {
        let split = left.partition_point(|moved| (moved.unit as usize) < run.end());
        let (own, rest) = left.split_at(split);
        left = rest;
        if run.place != 0 {
            if let Some(moved) = own.first() {
                return Err(refused(moved.unit, "which is in a block"));
            }
            push(&mut new, *run);
            continue;
        }
        let mut stay = |new: &mut Vec<Run>, units: Range<u32>| {
            let run = Run {
                first: units.start,
                units: units.end - units.start,
                place: 0,
                slot: near,
            };
            near += run.units;
            push(new, run);
        };
        let mut first = run.first;
        for moved in own {
            stay(&mut new, first..moved.unit);
            let there = Run {
                first: moved.unit,
                units: 1,
                place: moved.place,
                slot: moved.slot,
            };
            push(&mut new, there);
            slots.push(run.slot + (moved.unit - run.first));
            first = moved.unit + 1;
        }
        stay(&mut new, first..run.end() as u32);
    }
    Ok((new, slots))
}

/// Units of one head that lie in several places.
pub(super) struct Composite<'a> {
    pub(super) runs: &'a [Run],
    /// By place, of those that can be read.
    pub(super) places: Vec<Option<Box<dyn KvTiles + 'a>>>,
    pub(super) dim: usize,
}

impl Composite<'_> {
    fn place(&self, place: u32) -> Option<&dyn KvTiles> {
        self.places[place as usize].as_deref()
    }

    /// The one place where a range lies.
    fn single(&self, range: Range<usize>) -> Option<(&dyn KvTiles, Range<usize>)> {
        let mut all = pieces(self.runs, range);
        match (all.next(), all.next()) {
            (Some((place, slots)), None) => Some((self.place(place)?, slots)),
            _ => None,
        }
    }

    /// Rows of a range, one piece after the other.
    fn gathered<'s>(
        &self,
        range: Range<usize>,
        scratch: &'s mut [f32],
        plain: for<'t> fn(&'t dyn KvTiles, Range<usize>) -> Option<Floats<'t>>,
        read: for<'t> fn(&'t dyn KvTiles, Range<usize>, &'t mut [f32]) -> &'t [f32],
    ) -> &'s [f32] {
        let out = &mut scratch[..range.len() * self.dim];
        let mut at = 0;
        for (place, slots) in pieces(self.runs, range) {
            let part = &mut out[at..at + slots.len() * self.dim];
            at += part.len();
            let Some(tiles) = self.place(place) else {
                part.fill(0.0);
                continue;
            };
            match plain(tiles, slots.clone()) {
                Some(Floats::F32(x)) => part.copy_from_slice(x),
                Some(floats) => {
                    // Halves are converted into the scratch memory that they are given.
                    let whole = 0..floats.len();
                    floats.to_f32(whole, part);
                }
                None => {
                    let mut own = vec![0.0; part.len()];
                    part.copy_from_slice(read(tiles, slots, &mut own));
                }
            }
        }
        out
    }
}

impl KvTiles for Composite<'_> {
    fn len(&self) -> usize {
        self.runs.last().map_or(0, Run::end)
    }

    fn keys<'a>(&'a self, range: Range<usize>, scratch: &'a mut [f32]) -> &'a [f32] {
        match self.single(range.clone()) {
            Some((tiles, slots)) => tiles.keys(slots, scratch),
            None => self.gathered(
                range,
                scratch,
                |t, r| t.stored_keys(r),
                |t, r, s| t.keys(r, s),
            ),
        }
    }

    fn values<'a>(&'a self, range: Range<usize>, scratch: &'a mut [f32]) -> &'a [f32] {
        match self.single(range.clone()) {
            Some((tiles, slots)) => tiles.values(slots, scratch),
            None => self.gathered(
                range,
                scratch,
                |t, r| t.stored_values(r),
                |t, r, s| t.values(r, s),
            ),
        }
    }

    fn stored_keys(&self, range: Range<usize>) -> Option<Floats<'_>> {
        let (tiles, slots) = self.single(range)?;
        tiles.stored_keys(slots)
    }

    fn stored_values(&self, range: Range<usize>) -> Option<Floats<'_>> {
        let (tiles, slots) = self.single(range)?;
        tiles.stored_values(slots)
    }
}
