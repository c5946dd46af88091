//! Units of which a part is put away: blocks that a policy names lie in a second tier, and come back when queries see
//! them.

use super::{
    Fold, Growth, KvStore, check_append, check_away, check_retain, check_units,
    growth::SpilledGrowth,
    no_keys,
    pieces::{Composite, Move, Run, pieces, push, take_out},
    saved,
    scratch::{Extent, Space, Tier},
};
use crate::{Error, LayerSpec, Result, Rows, SnapshotError};
use locret_kernels::tiles::KvTiles;
use rayon::prelude::*;
use std::{
    collections::{BTreeMap, btree_map::Entry},
    io::{Read, Take, Write},
    ops::Range,
    sync::Arc,
};

/// Units in a store of any kind, of which at most so many bytes are resident.
///
/// What a policy names in [`Verdict::away`](crate::Verdict::away) becomes blocks, each a small store of the same kind,
/// that lie in a [`Tier`] when there is no room for them: the one that was seen longest ago goes first, and is written
/// once, since blocks do not change. Everything else is always resident. Before attention, the engine says what queries
/// see ([`KvStore::bring`]), and the blocks among it are read, several at a time. If all of it is more than may be
/// resident, that is [`Error::Memory`]; what the tier says is [`Error::Tier`].
///
/// A fork shares what is put away. A snapshot has all units, and is taken up without more of them resident than may be.
///
/// Attention with the CPU kernels reads what is resident. Whoever asks for all keys of a head ([`KvStore::keys`]; Burn's
/// operations, and scorers that look at keys) is given all of them, read for that once, beside what is resident.
#[derive(Debug)]
pub struct Spilled {
    /// What is not in a block, in order of units.
    near: Box<dyn KvStore>,
    /// A store of the same kind without any unit.
    empty: Box<dyn KvStore>,
    blocks: Vec<Block>,
    /// By KV head, where its units are.
    heads: Vec<Vec<Run>>,
    tier: Tier,
    space: Option<Arc<Space>>,
    /// Bytes that may be resident, and those of blocks that are.
    bound: usize,
    resident: usize,
    /// Bytes of a new unit.
    unit: usize,
    /// Counts what was asked for.
    clock: u64,
    dim: usize,
}

/// A block of units.
#[derive(Debug)]
struct Block {
    /// By KV head.
    lens: Vec<u32>,
    /// What it takes where it is resident.
    bytes: usize,
    store: Option<Box<dyn KvStore>>,
    away: Option<Arc<Extent>>,
    used: u64,
}

impl Spilled {
    /// Units in a store like `near`, which is empty, of which at most `resident` bytes are resident in this layer.
    pub fn boxed(
        layer: &LayerSpec,
        near: Box<dyn KvStore>,
        tier: &Tier,
        resident: usize,
    ) -> Box<dyn KvStore> {
        let mut growth = near.growth();
        growth.append(2);
        Box::new(Self {
            empty: near.fork(),
            near,
            blocks: Vec::new(),
            heads: vec![Vec::new(); layer.kv_heads],
            tier: tier.clone(),
            space: None,
            bound: resident,
            resident: 0,
            unit: growth.bytes() / 2,
            clock: 0,
            dim: layer.head_dim,
        })
    }

    /// Writes a block to the tier, if it is not there, and lets go of it.
    fn put(&mut self, block: usize) -> Result<()> {
        let own = &mut self.blocks[block];
        let Some(store) = &own.store else {
            return Ok(());
        };
        if own.away.is_none() {
            let mut bytes = Vec::new();
            store.write(&mut bytes)?;
            if self.space.is_none() {
                self.space = Some(self.tier.open()?);
            }
            let extent = self.space.as_ref().map(|space| space.write(&bytes));
            own.away = extent.transpose()?.map(Arc::new);
        }
        own.store = None;
        self.resident -= own.bytes;
        Ok(())
    }

    /// Puts away what was seen longest ago until there is room for `more` bytes, or nothing is left that is not
    /// `needed`.
    fn make_room(&mut self, more: usize, needed: &[bool]) -> Result<()> {
        let taken = |this: &Self| this.near.bytes() + this.resident + more;
        if taken(self) <= self.bound {
            return Ok(());
        }
        let is_needed = |block: usize| needed.get(block).copied().unwrap_or_default();
        let mut order: Vec<(u64, usize)> = (self.blocks.iter().enumerate())
            .filter(|(index, block)| block.store.is_some() && !is_needed(*index))
            .map(|(index, block)| (block.used, index))
            .collect();
        order.sort_unstable();
        for (_, block) in order {
            if taken(self) <= self.bound {
                break;
            }
            self.put(block)?;
        }
        Ok(())
    }

    /// A block as it was, from the tier.
    fn fetched(&self, block: &Block) -> Result<Box<dyn KvStore>> {
        match &block.away {
            Some(away) => read_store(&*self.empty, &away.read()?, &block.lens),
            // All of it was dropped.
            None => Ok(self.empty.fork()),
        }
    }

    /// All keys or values of a head, from wherever they are.
    fn rows(&self, head: usize, of: &dyn Fn(&dyn KvStore) -> Result<Rows>) -> Result<Rows> {
        let (mut read, mut parts) = (BTreeMap::new(), Vec::new());
        for (place, slots) in pieces(&self.heads[head], 0..self.len(head)) {
            let rows = match read.entry(place) {
                Entry::Occupied(rows) => rows.into_mut(),
                Entry::Vacant(entry) => entry.insert(self.with(place, of)?),
            };
            parts.push(rows.slice(slots)?);
        }
        match parts.is_empty() {
            // No rows of the right width.
            true => of(&*self.empty),
            false => Rows::below(parts),
        }
    }

    /// Something of a place's store, which is read for it if it is put away.
    fn with(&self, place: u32, of: &dyn Fn(&dyn KvStore) -> Result<Rows>) -> Result<Rows> {
        match place
            .checked_sub(1)
            .map(|block| &self.blocks[block as usize])
        {
            None => of(&*self.near),
            Some(Block {
                store: Some(store), ..
            }) => of(&**store),
            Some(block) => of(&*self.fetched(block)?),
        }
    }

    /// The units of a head that lie here, of which others read as zeros.
    fn composite<'a>(
        &'a self,
        head: usize,
        tiles: impl Fn(&'a dyn KvStore) -> Option<Box<dyn KvTiles + 'a>>,
    ) -> Option<Box<dyn KvTiles + 'a>> {
        let mut places = vec![Some(tiles(&*self.near)?)];
        for block in &self.blocks {
            places.push(match &block.store {
                Some(store) if block.lens[head] > 0 => Some(tiles(&**store)?),
                _ => None,
            });
        }
        Some(Box::new(Composite {
            runs: &self.heads[head],
            places,
            dim: self.dim,
        }))
    }

    /// Whether all units are resident.
    fn all_here(&self) -> bool {
        let empty = |block: &Block| block.lens.iter().all(|len| *len == 0);
        let mut blocks = self.blocks.iter();
        blocks.all(|block| block.store.is_some() || empty(block))
    }

    /// The blocks that have some of these units, by KV head.
    fn blocks_of(&self, units: &[Vec<Range<usize>>]) -> Vec<bool> {
        let mut found = vec![false; self.blocks.len()];
        for (runs, ranges) in self.heads.iter().zip(units) {
            for range in ranges {
                for (place, _) in pieces(runs, range.clone()) {
                    if let Some(block) = place.checked_sub(1) {
                        found[block as usize] = true;
                    }
                }
            }
        }
        found
    }
}

/// A store as `bytes` have it, which holds so many units in each head.
fn read_store(empty: &dyn KvStore, bytes: &[u8], lens: &[u32]) -> Result<Box<dyn KvStore>> {
    let mut store = empty.fork();
    let mut left = bytes;
    let from: &mut dyn Read = &mut left;
    let mut from = from.take(bytes.len() as u64);
    store.read(&mut from)?;
    let same = |(head, len): (usize, &u32)| store.len(head) == *len as usize;
    match from.limit() == 0 && lens.iter().enumerate().all(same) {
        true => Ok(store),
        false => Err(damaged("a block of other units than it is said to have")),
    }
}

/// A store's units by places, in the order of places; `of` says by head where each is to go. By halves, so that nothing
/// is moved often.
fn split(
    mut store: Box<dyn KvStore>,
    of: Vec<Vec<u32>>,
    places: Range<u32>,
    out: &mut Vec<Box<dyn KvStore>>,
) -> Result<()> {
    if places.len() < 2 {
        out.push(store);
        return Ok(());
    }
    let middle = places.start + places.len() as u32 / 2;
    let lower = |of: &Vec<u32>| -> Vec<u32> {
        let all = (0..).zip(of).filter(|(_, place)| **place < middle);
        all.map(|(slot, _)| slot).collect()
    };
    let slots: Vec<Vec<u32>> = of.iter().map(lower).collect();
    let parts = of
        .into_iter()
        .map(|of| of.into_iter().partition(|place| *place < middle));
    let (low, high): (Vec<Vec<u32>>, Vec<Vec<u32>>) = parts.unzip();
    split(store.take(&slots)?, low, places.start..middle, out)?;
    split(store, high, middle..places.end, out)
}

fn damaged(what: &str) -> Error {
    SnapshotError::Damaged(what.into()).into()
}

impl KvStore for Spilled {
    fn name(&self) -> String {
        format!("{} in two tiers", self.near.name())
    }

    fn append(&mut self, keys: &Rows, values: &Rows) -> Result<()> {
        let new = check_append(keys, values, self.heads.len(), self.dim)?;
        if new > 1 {
            self.make_room(new * self.unit, &[])?;
        }
        let before: Vec<usize> = (0..self.heads.len()).map(|h| self.near.len(h)).collect();
        self.near.append(keys, values)?;
        for (runs, slot) in self.heads.iter_mut().zip(before) {
            let first = runs.last().map_or(0, Run::end) as u32;
            let run = Run {
                first,
                units: new as u32,
                place: 0,
                slot: slot as u32,
            };
            push(runs, run);
        }
        self.make_room(0, &[])
    }

    fn retain(&mut self, kept: &[Vec<u32>]) -> Result<()> {
        check_retain(kept, (0..self.heads.len()).map(|head| self.len(head)))?;
        let places = 1 + self.blocks.len();
        // By place and head, which slots stay.
        let mut slots = vec![vec![Vec::new(); kept.len()]; places];
        let mut heads = Vec::with_capacity(kept.len());
        for (head, (kept, runs)) in kept.iter().zip(&self.heads).enumerate() {
            let (mut new, mut at) = (Vec::new(), 0);
            for (number, unit) in kept.iter().enumerate() {
                while runs[at].end() <= *unit as usize {
                    at += 1;
                }
                let run = runs[at];
                let own = &mut slots[run.place as usize][head];
                push(
                    &mut new,
                    Run {
                        first: number as u32,
                        units: 1,
                        place: run.place,
                        slot: own.len() as u32,
                    },
                );
                own.push(run.slot + (unit - run.first));
            }
            heads.push(new);
        }
        self.near.retain(&slots[0])?;
        for block in 0..self.blocks.len() {
            let (kept, own) = (&slots[block + 1], &self.blocks[block]);
            let lens: Vec<u32> = kept.iter().map(|kept| kept.len() as u32).collect();
            if lens == own.lens {
                continue;
            }
            let mut store = match &own.store {
                Some(store) => store.fork(),
                None => self.fetched(own)?,
            };
            store.retain(kept)?;
            let (was, bytes) = (own.store.is_some(), store.bytes());
            self.resident -= if was { own.bytes } else { 0 };
            let gone = lens.iter().all(|len| *len == 0);
            let own = &mut self.blocks[block];
            *own = Block {
                lens,
                bytes: if gone { 0 } else { bytes },
                store: (!gone).then_some(store),
                away: None,
                used: own.used,
            };
            self.resident += own.bytes;
            if !was {
                self.put(block)?;
            }
        }
        self.heads = heads;
        Ok(())
    }

    fn len(&self, head: usize) -> usize {
        self.heads[head].last().map_or(0, Run::end)
    }

    fn is_empty(&self) -> bool {
        self.heads.iter().all(Vec::is_empty)
    }

    fn bytes(&self) -> usize {
        self.near.bytes() + self.resident
    }

    fn total_bytes(&self) -> usize {
        let blocks: usize = self.blocks.iter().map(|block| block.bytes).sum();
        self.near.bytes() + blocks
    }

    fn growth(&self) -> Box<dyn Growth> {
        Box::new(SpilledGrowth::new(
            self.empty.growth(),
            self.bound,
            self.unit,
        ))
    }

    fn keys(&self, head: usize) -> Result<Rows> {
        self.rows(head, &|store| store.keys(head))
    }

    fn values(&self, head: usize) -> Result<Rows> {
        self.rows(head, &|store| store.values(head))
    }

    fn keys_at(&self, head: usize, units: &[u32]) -> Result<Rows> {
        check_units(units, self.len(head))?;
        // By place, which slots, and which of the rows they are.
        let mut places: BTreeMap<u32, (Vec<u32>, Vec<usize>)> = BTreeMap::new();
        for (row, unit) in units.iter().enumerate() {
            let unit = *unit as usize;
            for (place, slots) in pieces(&self.heads[head], unit..unit + 1) {
                let (all, rows) = places.entry(place).or_default();
                all.push(slots.start as u32);
                rows.push(row);
            }
        }
        let (mut parts, mut order) = (Vec::new(), vec![0; units.len()]);
        let mut next = 0;
        for (place, (slots, rows)) in places {
            parts.push(self.with(place, &|store| store.keys_at(head, &slots))?);
            for row in rows {
                order[row] = next;
                next += 1;
            }
        }
        if parts.is_empty() {
            return self.empty.keys(head);
        }
        let all = Rows::below(parts)?;
        if order.is_sorted() {
            return Ok(all);
        }
        let rows = order.into_iter().map(|row| all.slice(row..row + 1));
        Rows::below(rows.collect::<Result<_>>()?)
    }

    fn tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>> {
        let all = || self.composite(head, |store| store.tiles(head));
        self.all_here().then(all).flatten()
    }

    fn tiered(&self) -> bool {
        true
    }

    fn bring(&mut self, seen: &[Vec<Range<usize>>]) -> Result<()> {
        let needed = self.blocks_of(seen);
        let chosen = |this: &Self, missing: bool| -> usize {
            let blocks = this.blocks.iter().zip(&needed);
            let blocks =
                blocks.filter(|(block, needed)| **needed && !(missing && block.store.is_some()));
            blocks.map(|(block, _)| block.bytes).sum()
        };
        let all = self.near.bytes() + chosen(self, false);
        if all > self.bound {
            return Err(Error::Memory {
                what: "what the queries of a step see of a layer at once",
                needed: all,
                left: self.bound,
            });
        }
        self.make_room(chosen(self, true), &needed)?;
        self.clock += 1;
        let mut missing = Vec::new();
        for (index, block) in self.blocks.iter_mut().enumerate() {
            if needed[index] {
                block.used = self.clock;
                if block.store.is_none() {
                    missing.push(index);
                }
            }
        }
        let this = &*self;
        let read = |block: &usize| Ok((*block, this.fetched(&this.blocks[*block])?));
        let read: Vec<(usize, Box<dyn KvStore>)> = match missing.len() {
            0 | 1 => missing.iter().map(read).collect::<Result<_>>()?,
            _ => missing.par_iter().map(read).collect::<Result<_>>()?,
        };
        for (index, store) in read {
            let block = &mut self.blocks[index];
            block.bytes = store.bytes();
            block.store = Some(store);
            self.resident += block.bytes;
        }
        Ok(())
    }

    fn brought(&self, seen: &[Vec<Range<usize>>]) -> bool {
        let needed = self.blocks_of(seen);
        let mut blocks = self.blocks.iter().zip(needed);
        blocks.all(|(block, needed)| !needed || block.store.is_some())
    }

    fn brought_tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>> {
        self.composite(head, |store| store.tiles(head))
    }

    fn turned_block(&self) -> usize {
        self.near.turned_block()
    }

    fn turned_tiles(&self, head: usize, keys: bool) -> Option<Box<dyn KvTiles + '_>> {
        self.composite(head, |store| store.turned_tiles(head, keys))
    }

    fn put_away(&mut self, blocks: &[Vec<Vec<u32>>]) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        let lens: Vec<usize> = (0..self.heads.len()).map(|head| self.len(head)).collect();
        check_away(blocks, &lens).map_err(|found| {
            let expected = "ascending units that are there, by KV head";
            Error::setting("what is put away", expected, found)
        })?;
        let first = self.blocks.len() as u32 + 1;
        let (mut heads, mut slots, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (head, runs) in self.heads.iter().enumerate() {
            let of_block = |(place, block): (u32, &Vec<Vec<u32>>)| -> Vec<Move> {
                let units = block[head].iter().zip(0..);
                units
                    .map(|(unit, slot)| Move {
                        unit: *unit,
                        place,
                        slot,
                    })
                    .collect()
            };
            let moves: Vec<Move> = (first..).zip(blocks).flat_map(of_block).collect();
            let mut order: Vec<[u32; 2]> = moves.iter().map(|m| [m.unit, m.place]).collect();
            order.sort_unstable();
            places.push(order.into_iter().map(|[_, place]| place).collect());
            let (new, taken) = take_out(runs, moves)?;
            heads.push(new);
            slots.push(taken);
        }
        // All at once, since what is near may be much more.
        let gathered = self.near.take(&slots)?;
        self.heads = heads;
        let mut stores = Vec::with_capacity(blocks.len());
        split(
            gathered,
            places,
            first..first + blocks.len() as u32,
            &mut stores,
        )?;
        for (block, store) in blocks.iter().zip(stores) {
            let bytes = store.bytes();
            self.blocks.push(Block {
                lens: block.iter().map(|units| units.len() as u32).collect(),
                bytes,
                store: Some(store),
                away: None,
                used: self.clock,
            });
            self.resident += bytes;
        }
        self.make_room(0, &[])
    }

    fn settle(&mut self) -> Result<()> {
        self.near.settle()
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        match self.blocks.is_empty() {
            true => self.near.fold_values(head, folds),
            false => Err(Error::NotSupported {
                operation: "merging units while others are put away",
                implementer: format!("the store {}", self.name()),
            }),
        }
    }

    fn folds_keys(&self) -> bool {
        self.blocks.is_empty() && self.near.folds_keys()
    }

    fn fold_keys(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        match self.folds_keys() {
            true => self.near.fold_keys(head, folds),
            false => Err(no_keys(&self.name())),
        }
    }

    fn write(&self, to: &mut dyn Write) -> Result<()> {
        saved::write_header(to, &self.name(), self.heads.len(), self.dim)?;
        // Those that are empty have left their numbers.
        let mut numbers = vec![0];
        let full = |block: &&Block| block.lens.iter().any(|len| *len > 0);
        for block in &self.blocks {
            let before = numbers.iter().copied().max().unwrap_or(0);
            numbers.push(if full(&block) { before + 1 } else { 0 });
        }
        saved::write_count(to, self.blocks.iter().filter(full).count())?;
        for block in self.blocks.iter().filter(full) {
            let bytes = match (&block.store, &block.away) {
                (Some(store), _) => {
                    let mut bytes = Vec::new();
                    store.write(&mut bytes)?;
                    bytes
                }
                (None, Some(away)) => away.read()?,
                (None, None) => Vec::new(),
            };
            saved::write(to, &block.lens)?;
            saved::write_count(to, bytes.len())?;
            saved::write(to, &bytes)?;
        }
        self.near.write(to)?;
        for runs in &self.heads {
            saved::write_count(to, runs.len())?;
            let places = runs
                .iter()
                .map(|run| [run.units, numbers[run.place as usize]]);
            saved::write(to, &places.collect::<Vec<[u32; 2]>>())?;
        }
        Ok(())
    }

    fn read(&mut self, from: &mut Take<&mut dyn Read>) -> Result<()> {
        let heads = self.heads.len();
        saved::read_header(from, &self.name(), heads, self.dim)?;
        let mut new = Self {
            near: self.empty.fork(),
            empty: self.empty.fork(),
            blocks: Vec::new(),
            heads: Vec::new(),
            tier: self.tier.clone(),
            space: None,
            resident: 0,
            clock: 0,
            ..*self
        };
        for _ in 0..saved::read_count(from, 1)? {
            let lens: Vec<u32> = saved::read(from, heads)?;
            let length = saved::read_count(from, 1)?;
            let bytes: Vec<u8> = saved::read(from, length)?;
            if lens.iter().all(|len| *len == 0) {
                return Err(damaged("a block of no units"));
            }
            let store = read_store(&*new.empty, &bytes, &lens)?;
            drop(bytes);
            let bytes = store.bytes();
            new.resident += bytes;
            new.blocks.push(Block {
                lens,
                bytes,
                store: Some(store),
                away: None,
                used: 0,
            });
            new.make_room(0, &[])?;
        }
        new.near.read(from)?;
        for head in 0..heads {
            let (mut runs, count) = (Vec::new(), saved::read_count(from, 1)?);
            let places: Vec<[u32; 2]> = saved::read(from, count)?;
            let mut next = vec![0u32; new.blocks.len() + 1];
            let mut first = 0u32;
            for [units, place] in places {
                let slot = next.get_mut(place as usize);
                let slot = slot.filter(|_| units > 0);
                let slot = slot.ok_or_else(|| damaged("units of a block that is not there"))?;
                let ends = (first.checked_add(units), slot.checked_add(units));
                let (Some(end), Some(slots)) = ends else {
                    return Err(damaged("more units than a store can have"));
                };
                let run = Run {
                    first,
                    units,
                    place,
                    slot: *slot,
                };
                push(&mut runs, run);
                (first, *slot) = (end, slots);
            }
            let lens = new.blocks.iter().map(|block| block.lens[head] as usize);
            let lens = std::iter::once(new.near.len(head)).chain(lens);
            if lens.zip(&next).any(|(len, next)| len != *next as usize) {
                return Err(damaged("units of a block that are nowhere, or twice"));
            }
            new.heads.push(runs);
        }
        new.make_room(0, &[])?;
        *self = new;
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvStore> {
        let block = |block: &Block| Block {
            lens: block.lens.clone(),
            store: block.store.as_ref().map(|store| store.fork()),
            away: block.away.clone(),
            ..*block
        };
        Box::new(Self {
            near: self.near.fork(),
            empty: self.empty.fork(),
            blocks: self.blocks.iter().map(block).collect(),
            heads: self.heads.clone(),
            tier: self.tier.clone(),
            space: self.space.clone(),
            ..*self
        })
    }
}
