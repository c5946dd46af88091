//! What a store of codes does with its units.

use super::{CodedStore, Head, picks, room};
use crate::{kernels::codes, store::elementwise};
use locret_core::{
    Fold, Growth, KvStore, QuantLayout, QuantizedStore, Result, Room, Rows, check_append,
    check_retain,
};
use std::{
    any::Any,
    io::{Read, Take, Write},
};

impl KvStore for CodedStore {
    fn name(&self) -> String {
        self.config.name()
    }

    fn append(&mut self, keys: &Rows, values: &Rows) -> Result<()> {
        let (d, heads) = (self.layer.head_dim, self.heads.len());
        let t = check_append(keys, values, heads, d)?;
        if t == 0 {
            return Ok(());
        }
        let [keys, values] = [self.place.rows(keys)?, self.place.rows(values)?];
        let rooms = self
            .heads
            .iter()
            .map(|head| head.room.max(head.plain() + t));
        self.own_plain(&rooms.collect::<Vec<_>>())?;
        let rows = self.plain_starts().into_iter().zip(&self.heads);
        let rows = rows.map(|(start, head)| (start + head.plain()) as u32);
        let rows = self.place.indices(&rows.collect::<Vec<_>>());
        let (count, cube) = elementwise(&self.place, t * heads * d);
        codes::append::launch(
            &self.place.client,
            count,
            cube,
            keys.into_tensor_arg(),
            values.into_tensor_arg(),
            rows.into_buffer_arg(),
            self.plain.clone().into_buffer_arg(),
            d,
        );
        self.heads.iter_mut().for_each(|head| head.tail += t);
        self.describe();
        Ok(())
    }

    fn retain(&mut self, kept: &[Vec<u32>]) -> Result<()> {
        check_retain(kept, self.heads.iter().map(Head::len))?;
        if self
            .heads
            .iter()
            .zip(kept)
            .all(|(head, kept)| kept.len() == head.len())
        {
            return Ok(());
        }
        let mut heads = self.heads.clone();
        let [mut plain, mut coded, mut runs] = [const { Vec::new() }; 3];
        for ((head, new), kept) in self.heads.iter().zip(&mut heads).zip(kept) {
            let (before, many) = (head.first as u32, head.coded.rows() as u32);
            let (first, rest) = kept.split_at(kept.partition_point(|unit| *unit < before));
            let of_codes = rest.partition_point(|unit| *unit < before + many);
            let (codes, tail) = rest.split_at(of_codes);
            let numbers = first.iter().copied();
            plain.push(numbers.chain(tail.iter().map(|unit| unit - many)).collect());
            coded.push(codes.iter().map(|unit| unit - before).collect());
            match head.len() - kept.len() {
                0 => {}
                1 => new.coded.retain(codes.len()),
                _ => new.coded = Room::exact(codes.len()),
            }
            let gone = head.plain() - first.len() - tail.len();
            (new.first, new.tail) = (first.len(), tail.len());
            if gone > 0 || head.room > head.plain() + 1 {
                new.room = room(new.plain(), gone);
            }
            let mut left: Vec<u32> = codes.iter().map(|unit| unit - before).collect();
            let (mut alive, mut lens, mut end) = (Vec::new(), Vec::new(), 0);
            for (run, len) in head.runs.iter().enumerate() {
                end += len;
                let later = left.split_off(left.partition_point(|unit| *unit < end));
                if !left.is_empty() {
                    alive.push(run as u32);
                    lens.push(left.len() as u32);
                }
                left = later;
            }
            runs.push(alive);
            new.runs = lens;
        }
        let rooms: Vec<usize> = heads.iter().map(|head| head.room).collect();
        let changed =
            |of: fn(&Head) -> usize| (self.heads.iter()).zip(&heads).any(|(a, b)| of(a) != of(b));
        let runs_changed = changed(|head| head.runs.len());
        if changed(|head| head.coded.rows()) || changed(|head| head.coded.capacity()) {
            let capacities = heads.iter().map(|head| head.coded.capacity());
            let picks = picks(&coded, &self.coded_starts(), capacities);
            self.coded = self.picked(&self.coded, &picks, self.codes.record())?;
        }
        if runs_changed {
            let lens = heads.iter().map(|head| head.runs.len());
            let picks = picks(&runs, &self.run_starts(), lens);
            self.shared = self.picked(&self.shared, &picks, self.layer.head_dim)?;
        }
        if changed(Head::plain) || changed(|head| head.room) {
            self.move_plain(&plain, &rooms)?;
        }
        self.heads = heads;
        self.describe();
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        let due = self.heads.iter().map(|head| {
            let Head {
                first, coded, tail, ..
            } = head;
            self.config.due(*first, coded.rows(), *tail)
        });
        let (stay, units): (Vec<usize>, Vec<usize>) =
            due.map(|[stay, units]| (stay, units)).unzip();
        let any = |of: &[usize]| of.iter().any(|n| *n > 0);
        if !any(&stay) && !any(&units) {
            return Ok(());
        }
        let rooms: Vec<usize> = self.heads.iter().map(|head| head.room).collect();
        self.own_plain(&rooms)?;
        if any(&stay) {
            self.round_first(&stay);
        }
        if any(&units) {
            self.encode(&units)?;
        }
        self.describe();
        Ok(())
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        let mut host = self.as_host()?;
        host.fold_values(head, folds)?;
        self.take_from(&host);
        Ok(())
    }

    fn folds_keys(&self) -> bool {
        self.config.layout != QuantLayout::Kivi
    }

    fn fold_keys(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        let mut host = self.as_host()?;
        host.fold_keys(head, folds)?;
        self.take_from(&host);
        Ok(())
    }

    fn len(&self, head: usize) -> usize {
        self.heads[head].len()
    }

    fn is_empty(&self) -> bool {
        self.heads.iter().all(|head| head.len() == 0)
    }

    fn bytes(&self) -> usize {
        let words = |head: &Head| {
            head.room * self.width()
                + head.coded.capacity() * self.codes.record()
                + head.runs.len() * (self.layer.head_dim + 1)
        };
        4 * self.heads.iter().map(words).sum::<usize>()
    }

    fn growth(&self) -> Box<dyn Growth> {
        let (heads, d) = (self.heads.len(), self.layer.head_dim);
        Box::new(Wider {
            inner: self.config.growth(heads, d),
            more: heads * self.config.first * 2 * d * 2,
        })
    }

    fn keys(&self, head: usize) -> Result<Rows> {
        Ok(self.of_head(head, false))
    }

    fn values(&self, head: usize) -> Result<Rows> {
        Ok(self.of_head(head, true))
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn write(&self, to: &mut dyn Write) -> Result<()> {
        self.as_host()?.write(to)
    }

    fn read(&mut self, from: &mut Take<&mut dyn Read>) -> Result<()> {
        let mut host = QuantizedStore::on(&self.place.device, &self.layer, self.config)?;
        host.read(from)?;
        self.take_from(&host);
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvStore> {
        Box::new(self.clone())
    }
}

/// The growth of a store of codes whose first units take twice as much.
struct Wider {
    inner: Box<dyn Growth>,
    /// How much more that is at most.
    more: usize,
}

impl Growth for Wider {
    fn append(&mut self, units: usize) {
        self.inner.append(units);
    }

    fn retain(&mut self, units: usize, newest: bool) {
        self.inner.retain(units, newest);
    }

    fn settle(&mut self) {
        self.inner.settle();
    }

    fn units(&self) -> usize {
        self.inner.units()
    }

    fn bytes(&self) -> usize {
        match self.inner.units() {
            0 => self.inner.bytes(),
            _ => self.inner.bytes() + self.more,
        }
    }

    fn bound(&mut self) {
        self.inner.bound();
    }
}
