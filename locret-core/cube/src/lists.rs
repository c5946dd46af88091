//! Positions and scores of units in buffers of the device, where the best of them are chosen.

use crate::{
    kernels::lists::{self, UNITS},
    place::Place,
    store::bounds,
};
use burn::tensor::{DType as TensorType, Int, Tensor};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;
use locret_core::{Best, Error, KeptUnits, Result, Room, Rows, UnitLists, waited};
use std::sync::Arc;

/// Lists of all heads, one head's behind the other's, in one buffer of positions and one of scores. Where there is room
/// new units are put where they stay; forks share buffers until one of them changes.
#[derive(Debug, Clone)]
pub(crate) struct CubeLists {
    place: Arc<Place>,
    rooms: Vec<Room>,
    /// Made when there is something to put into them.
    buffers: Option<Buffers>,
}

#[derive(Debug, Clone)]
struct Buffers {
    positions: CubeTensor,
    /// Bits of 32-bit floats.
    scores: CubeTensor,
    /// First unit and number of units of each head, for kernels.
    bounds: CubeTensor,
    /// By KV head, how many scores were NaN that are gone, and may have been counted several times.
    wrong: CubeTensor,
}

/// Numbers of all rooms.
fn total(rooms: &[Room]) -> usize {
    rooms.iter().map(Room::capacity).sum()
}

impl CubeLists {
    pub(crate) fn new(place: &Arc<Place>, kv_heads: usize) -> Self {
        Self {
            place: place.clone(),
            rooms: vec![Room::default(); kv_heads],
            buffers: None,
        }
    }

    fn indices(&self, many: usize) -> CubeTensor {
        self.place.empty([many], TensorType::U32)
    }

    /// The buffers, which may be empty.
    fn buffers(&self) -> Buffers {
        self.buffers.clone().unwrap_or_else(|| Buffers {
            positions: self.indices(1),
            scores: self.indices(1),
            bounds: bounds(&self.place, &self.rooms),
            wrong: self.place.indices(&vec![0; self.rooms.len()]),
        })
    }

    fn check<T>(&self, what: &'static str, lists: &[T]) -> Result<()> {
        match lists.len() == self.rooms.len() {
            true => Ok(()),
            false => Err(Error::shape(what, [self.rooms.len()], [lists.len()])),
        }
    }

    /// So many cubes for each head.
    fn cubes(&self, most: usize) -> CubeCount {
        CubeCount::Static(most.div_ceil(UNITS) as u32, self.rooms.len() as u32, 1)
    }
}

impl UnitLists for CubeLists {
    fn put(&mut self, positions: &[&[u32]], scores: &[&[f32]]) -> Result<()> {
        self.check("lists of positions", positions)?;
        self.check("lists of scores", scores)?;
        for (positions, scores) in positions.iter().zip(scores) {
            if positions.len() != scores.len() {
                let (due, found) = ([positions.len()], [scores.len()]);
                return Err(Error::shape("scores of a KV head", due, found));
            }
        }
        self.rooms = (positions.iter())
            .map(|list| Room::exact(list.len()))
            .collect();
        let all = scores
            .concat()
            .iter()
            .map(|x| x.to_bits())
            .collect::<Vec<_>>();
        self.buffers = Some(Buffers {
            positions: self.place.indices(&positions.concat()),
            scores: self.place.indices(&all),
            bounds: bounds(&self.place, &self.rooms),
            wrong: self.place.indices(&vec![0; self.rooms.len()]),
        });
        Ok(())
    }

    fn append(&mut self, first: usize, scores: &Rows) -> Result<()> {
        let new = scores.rows();
        scores.expect("scores of new units", [new, self.rooms.len()])?;
        if new == 0 {
            return Ok(());
        }
        let scores = self.place.rows(scores)?;
        let old = self.buffers.take();
        let mut rooms = self.rooms.clone();
        rooms.iter_mut().for_each(|room| room.append(new));
        let grown =
            (rooms.iter().zip(&self.rooms)).any(|(new, old)| new.capacity() != old.capacity());
        let own = |old: &Buffers| old.positions.can_mut() && old.scores.can_mut();
        let moved = grown || !old.as_ref().is_some_and(own);
        self.buffers = old;
        let old = self.buffers();
        let longest = rooms.iter().map(Room::rows).max().unwrap_or(0);
        self.rooms = rooms;
        let mut made = Buffers {
            bounds: bounds(&self.place, &self.rooms),
            ..old.clone()
        };
        if moved {
            let many = total(&self.rooms);
            [made.positions, made.scores] = [(); 2].map(|()| self.indices(many));
        }
        // No buffer is read and written at once.
        let [from_positions, from_scores] = match moved {
            true => [old.positions, old.scores],
            false => [(); 2].map(|()| self.indices(1)),
        };
        lists::append::launch(
            &self.place.client,
            self.cubes(if moved { longest } else { new }),
            CubeDim::new_1d(UNITS as u32),
            scores.into_tensor_arg(),
            from_positions.into_buffer_arg(),
            from_scores.into_buffer_arg(),
            old.bounds.into_buffer_arg(),
            made.bounds.clone().into_buffer_arg(),
            made.positions.clone().into_buffer_arg(),
            made.scores.clone().into_buffer_arg(),
            first as u32,
            moved,
        );
        self.buffers = Some(made);
        Ok(())
    }

    fn keep(&mut self, best: &[Best]) -> Result<KeptUnits> {
        self.check("budgets of KV heads", best)?;
        for (best, room) in best.iter().zip(&self.rooms) {
            let protected = best.first.saturating_add(best.newest);
            if best.keep > room.rows() || protected > best.keep {
                let found = format!("{best:?}");
                return Err(Error::shape("units to keep", [room.rows()], found));
            }
        }
        let old = self.buffers();
        for (room, best) in self.rooms.iter_mut().zip(best) {
            if best.keep < room.rows() {
                room.retain(best.keep);
            }
        }
        let many = total(&self.rooms);
        let made = Buffers {
            positions: self.indices(many),
            scores: self.indices(many),
            bounds: bounds(&self.place, &self.rooms),
            wrong: self.indices(self.rooms.len()),
        };
        let lens: Vec<usize> = best.iter().map(|best| best.keep).collect();
        let kept = self.indices(lens.iter().sum());
        let asked = best
            .iter()
            .flat_map(|best| [best.keep, best.first, best.newest]);
        let asked: Vec<u32> = asked.map(|n| n as u32).collect();
        lists::select::launch(
            &self.place.client,
            CubeCount::Static(self.rooms.len() as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            old.positions.into_buffer_arg(),
            old.scores.into_buffer_arg(),
            old.bounds.into_buffer_arg(),
            old.wrong.into_buffer_arg(),
            self.place.indices(&asked).into_buffer_arg(),
            made.bounds.clone().into_buffer_arg(),
            kept.clone().into_buffer_arg(),
            made.positions.clone().into_buffer_arg(),
            made.scores.clone().into_buffer_arg(),
            made.wrong.clone().into_buffer_arg(),
        );
        self.buffers = Some(made);
        let kept = Tensor::<1, Int>::from_primitive::<CubeBackend>(kept);
        Ok(KeptUnits::new(lens, kept))
    }

    fn read(&self) -> Result<Vec<(Vec<u32>, Vec<f32>)>> {
        let Some(buffers) = &self.buffers else {
            return Ok(vec![Default::default(); self.rooms.len()]);
        };
        let all = [&buffers.positions, &buffers.scores, &buffers.wrong];
        let handles = all.map(|buffer| buffer.handle.clone()).to_vec();
        let failed = |e| Error::Device(format!("{e:?}"));
        let read = waited(|| self.place.client.read(handles).map_err(failed))?;
        let words = |at: usize| bytemuck::pod_collect_to_vec::<u8, u32>(&read[at][..]);
        let (positions, scores, wrong) = (words(0), words(1), words(2));
        let mut start = 0;
        let mut lists = Vec::with_capacity(self.rooms.len());
        for (head, (room, wrong)) in self.rooms.iter().zip(wrong).enumerate() {
            let own = start..start + room.rows();
            start += room.capacity();
            let scores = scores[own.clone()].iter().map(|x| f32::from_bits(*x));
            let scores: Vec<f32> = scores.collect();
            if wrong > 0 || scores.iter().any(|x| x.is_nan()) {
                return Err(Error::NotFinite {
                    what: "a score",
                    at: format!("KV head {head}"),
                });
            }
            lists.push((positions[own].to_vec(), scores));
        }
        Ok(lists)
    }

    fn bytes(&self) -> usize {
        8 * total(&self.rooms)
    }

    fn fork(&self) -> Box<dyn UnitLists> {
        Box::new(self.clone())
    }
}
