//! Numbers that become codes.

use super::{CodedStore, UNITS, picks, room};
use crate::kernels::codes::{self, TURNING};
use cubecl::prelude::*;
use locret_core::{Result, Room};

impl CodedStore {
    /// The first of the newest units stay numbers, in 16 bits.
    pub(super) fn round_first(&mut self, stay: &[usize]) {
        let (d, starts) = (self.layer.head_dim, self.plain_starts());
        let at = self.heads.iter().zip(starts).zip(stay);
        let at =
            at.flat_map(|((head, start), stay)| [(start + head.first) as u32, *stay as u32, 0]);
        let at = self.place.indices(&at.collect::<Vec<u32>>());
        let most = stay.iter().max().map_or(0, |stay| stay * self.width());
        codes::round::launch(
            &self.place.client,
            self.cubes(most),
            CubeDim::new_1d(UNITS as u32),
            self.plain.clone().into_buffer_arg(),
            at.into_buffer_arg(),
            d,
        );
        for (head, stay) in self.heads.iter_mut().zip(stay) {
            head.first += stay;
            head.tail -= stay;
        }
    }

    /// The first of the newest units become codes, for which there is room in `rooms`.
    pub(super) fn encode(&mut self, units: &[usize]) -> Result<()> {
        let before: Vec<usize> = self.heads.iter().map(|head| head.coded.rows()).collect();
        let mut rooms: Vec<Room> = self.heads.iter().map(|head| head.coded).collect();
        for (room, units) in rooms.iter_mut().zip(units) {
            if *units > 0 {
                room.append(*units);
            }
        }
        self.own_coded(&rooms)?;
        let runs_before: Vec<usize> = self.heads.iter().map(|head| head.runs.len()).collect();
        if self.codes.run > 0 {
            let (run, starts) = (self.codes.run, self.run_starts());
            let kept: Vec<Vec<u32>> = (runs_before.iter())
                .map(|runs| (0..*runs as u32).collect())
                .collect();
            for (head, units) in self.heads.iter_mut().zip(units) {
                head.runs.extend(vec![run as u32; units / run]);
            }
            let now = self.heads.iter().map(|head| head.runs.len());
            let picks = picks(&kept, &starts, now);
            self.shared = self.picked(&self.shared, &picks, self.layer.head_dim)?;
        }
        let (plain, coded, runs) = (self.plain_starts(), self.coded_starts(), self.run_starts());
        let at = (0..units.len()).flat_map(|head| {
            [
                plain[head] + self.heads[head].first,
                units[head],
                coded[head] + before[head],
            ]
        });
        let at: Vec<u32> = at.map(|n| n as u32).collect();
        let at = self.place.indices(&at);
        let runs = runs.iter().zip(runs_before);
        let runs: Vec<u32> = runs
            .map(|(start, before)| (start + before) as u32)
            .collect();
        let runs = self.place.indices(&runs);
        let most = units.iter().copied().max().unwrap_or(0);
        let (client, codes) = (&self.place.client, self.codes);
        let cube = || CubeDim::new_1d(UNITS as u32);
        if codes.block > 1 {
            codes::turn_plain::launch(
                client,
                self.spread(most, self.heads.len()),
                CubeDim::new_1d(TURNING as u32),
                self.plain.clone().into_buffer_arg(),
                at.clone().into_buffer_arg(),
                codes,
            );
        }
        codes::pairs::launch(
            client,
            self.cubes(most * (codes.pairs(false) + codes.pairs(true))),
            cube(),
            self.plain.clone().into_buffer_arg(),
            self.coded.clone().into_buffer_arg(),
            at.clone().into_buffer_arg(),
            codes,
        );
        if let Some(runs_due) = most.checked_div(codes.run) {
            codes::shared_pairs::launch(
                client,
                self.cubes(runs_due * codes.dim),
                cube(),
                self.plain.clone().into_buffer_arg(),
                self.shared.clone().into_buffer_arg(),
                at.clone().into_buffer_arg(),
                runs.clone().into_buffer_arg(),
                codes,
            );
        }
        codes::encode::launch(
            client,
            self.cubes(most * 2 * codes.words()),
            cube(),
            self.plain.clone().into_buffer_arg(),
            self.shared.clone().into_buffer_arg(),
            self.coded.clone().into_buffer_arg(),
            at.into_buffer_arg(),
            runs.into_buffer_arg(),
            codes,
        );
        let left = self.heads.iter().zip(units).map(|(head, units)| {
            let first = head.first as u32;
            (0..first).chain(first + *units as u32..head.plain() as u32)
        });
        let left: Vec<Vec<u32>> = left.map(Iterator::collect).collect();
        let rooms = left.iter().zip(units);
        let rooms: Vec<usize> = rooms.map(|(left, gone)| room(left.len(), *gone)).collect();
        self.move_plain(&left, &rooms)?;
        for (head, units) in self.heads.iter_mut().zip(units) {
            head.tail -= units;
        }
        Ok(())
    }
}
