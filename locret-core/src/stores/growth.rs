//! How stores grow and shrink: by rules that a store and a plan of it share.

use super::{QuantLayout, Quantization};

/// What one layer's store will take, without any unit in it: the same steps, and only their bytes.
///
/// Heads are taken to be cut back alike. A plan drives this as a cache drives a [`KvStore`]: appends,
/// cuts back, settles.
///
/// [`KvStore`]: crate::KvStore
pub trait Growth {
    /// So many new units in every head.
    fn append(&mut self, units: usize);

    /// So many units stay in every head, if there are more: the newest ones, or some from anywhere.
    fn retain(&mut self, units: usize, newest: bool);

    /// The step is over.
    fn settle(&mut self) {}

    /// Units that a head holds.
    fn units(&self) -> usize;

    /// As [`KvStore::bytes`](crate::KvStore::bytes).
    fn bytes(&self) -> usize;

    /// From now on [`bytes`](Self::bytes) are never too low, whichever units are dropped, as a promise of memory
    /// has to be. Where they do not depend on that, there is nothing to do.
    fn bound(&mut self) {}
}

/// Where a buffer to which single tokens are appended has room for a multiple of this.
pub(crate) const RESERVE: usize = 64;

/// Room for `rows` and at least one more, which is the same wherever on the way there a buffer was copied
/// or read from a file: a copy has no reserve, and grows to where its original is.
fn next(rows: usize) -> usize {
    (rows / RESERVE + 1) * RESERVE
}

/// The capacity of a buffer of `rows` where `new` do not fit: exactly theirs for a chunk, so that memory
/// is what the bound says; more for a single token, so that decoding does not copy the cache for every
/// one.
pub(super) fn grown(rows: usize, new: usize) -> usize {
    match new {
        1 => next(rows),
        _ => rows + new,
    }
}

/// The capacity of a buffer of which `rows` are left and `dropped` are gone. Dropping one unit for each
/// generated token must not copy the cache each time: the room that the next one takes anyway stays.
pub(super) fn cut(rows: usize, dropped: usize, capacity: usize) -> usize {
    match dropped <= 1 && capacity >= next(rows) {
        true => next(rows),
        false => rows,
    }
}

/// Rows of a buffer, and how many there is room for: the rule by which dense stores grow and shrink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    rows: usize,
    capacity: usize,
}

impl Room {
    /// Exactly so many rows.
    pub fn exact(rows: usize) -> Self {
        Self {
            rows,
            capacity: rows,
        }
    }

    /// Rows that are taken.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows that there is memory for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// So many more rows; where they do not fit, exactly as much more room for several of them, and some in reserve
    /// for a single one.
    pub fn append(&mut self, new: usize) {
        if self.capacity - self.rows < new {
            self.capacity = grown(self.rows, new);
        }
        self.rows += new;
    }

    /// Keeps so many of the rows.
    pub fn retain(&mut self, kept: usize) {
        self.capacity = cut(kept, self.rows - kept, self.capacity);
        self.rows = kept;
    }
}

/// Of a dense store in host memory.
#[derive(Debug)]
pub(super) struct DenseGrowth {
    buffer: Room,
    /// Bytes of a unit of all heads.
    unit: usize,
}

impl DenseGrowth {
    pub(super) fn new(heads: usize, dim: usize, value: usize) -> Self {
        Self {
            buffer: Room::default(),
            unit: heads * 2 * dim * value,
        }
    }
}

impl Growth for DenseGrowth {
    fn append(&mut self, units: usize) {
        self.buffer.append(units);
    }

    fn retain(&mut self, units: usize, _newest: bool) {
        if units < self.buffer.rows {
            self.buffer.retain(units);
        }
    }

    fn units(&self) -> usize {
        self.buffer.rows
    }

    fn bytes(&self) -> usize {
        self.buffer.capacity * self.unit
    }
}

/// Of a dense store of tensors, which have no reserve.
#[derive(Debug)]
pub(super) struct TensorGrowth {
    units: usize,
    unit: usize,
}

impl TensorGrowth {
    pub(super) fn new(heads: usize, dim: usize, value: usize) -> Self {
        Self {
            units: 0,
            unit: heads * 2 * dim * value,
        }
    }
}

impl Growth for TensorGrowth {
    fn append(&mut self, units: usize) {
        self.units += units;
    }

    fn retain(&mut self, units: usize, _newest: bool) {
        self.units = self.units.min(units);
    }

    fn units(&self) -> usize {
        self.units
    }

    fn bytes(&self) -> usize {
        self.units * self.unit
    }
}

/// Of a store of codes: an estimate, since it depends on the text which units are dropped. Unless it is
/// the oldest, they are taken to go by lot, older and newer ones alike. A bound takes each part at its
/// largest: of codes as if only numbers had been dropped, of numbers as if only codes.
#[derive(Debug)]
pub(super) struct CodedGrowth {
    config: Quantization,
    /// The first units, which stay numbers.
    first: usize,
    /// Units that are codes, and those that are numbers.
    coded: Room,
    tail: Room,
    /// Groups of tokens that have a member left, where keys are scaled by group.
    groups: f64,
    /// Of a bound: units that a head holds, whatever they are.
    bound: Option<usize>,
    /// Bytes of a unit of all heads as codes and as numbers, and of what a group shares.
    coded_bytes: usize,
    tail_bytes: usize,
    group_bytes: usize,
    first_bytes: usize,
}

impl CodedGrowth {
    pub(super) fn new(heads: usize, dim: usize, config: Quantization) -> Self {
        let codes = 2 * config.packing(dim).row_bytes();
        // Two 16-bit numbers for each group.
        let by_token = 4 * dim.div_ceil(config.group.clamp(1, dim));
        let (unit, group) = match config.layout {
            QuantLayout::PerToken => (codes + 2 * by_token, 0),
            // And how many members a group has left.
            QuantLayout::Kivi => (codes + by_token, 4 * dim + 4),
        };
        Self {
            config,
            first: 0,
            coded: Room::default(),
            tail: Room::default(),
            groups: 0.0,
            bound: None,
            coded_bytes: heads * unit,
            tail_bytes: heads * 2 * dim * 4,
            group_bytes: heads * group,
            first_bytes: heads * 2 * dim * 2,
        }
    }

    /// The most units that are numbers once a step is over.
    fn longest_tail(&self) -> usize {
        match self.config.layout {
            QuantLayout::PerToken => self.config.residual,
            // As many as wait for their group to be full.
            QuantLayout::Kivi => self.config.residual + self.config.group.max(1) - 1,
        }
    }
}

impl Growth for CodedGrowth {
    fn append(&mut self, units: usize) {
        // Room for exactly these: units that are numbers take as much as many that are codes.
        let needed = self.tail.rows + units;
        self.tail.capacity = self.tail.capacity.max(needed);
        self.tail.rows = needed;
        if let Some(all) = &mut self.bound {
            *all += units;
        }
    }

    fn retain(&mut self, units: usize, newest: bool) {
        let (len, before) = (self.units(), self.coded.rows as f64);
        if units >= len {
            return;
        }
        if let Some(all) = &mut self.bound {
            *all = units;
            self.first = self.first.min(units);
            self.coded.rows = self.coded.rows.min(units);
            self.coded.capacity = self.coded.capacity.min(next(units));
            self.tail.rows = self.tail.rows.min(units);
            self.groups = self.groups.min(units as f64);
            return;
        }
        if newest {
            // The oldest go first.
            let gone = self.first.min(len - units);
            self.first -= gone;
            self.coded.rows = self.coded.rows.saturating_sub(len - units - gone);
            self.groups = self.coded.rows.div_ceil(self.config.group.max(1)) as f64;
        } else {
            let left = units as f64 / len as f64;
            self.first = (self.first as f64 * left).round() as usize;
            self.coded.rows = (before * left).round() as usize;
            // The share of groups of which at least one member is left.
            let members = before / self.groups.max(1.0);
            self.groups *= 1.0 - (1.0 - left).powf(members);
        }
        self.first = self.first.min(units);
        self.coded.rows = self.coded.rows.min(units - self.first);
        self.tail.rows = units - self.first - self.coded.rows;
        self.coded.capacity = cut(self.coded.rows, len - units, self.coded.capacity);
    }

    fn settle(&mut self) {
        let group = self.config.group.max(1);
        if let Some(all) = self.bound {
            let more = self.tail.rows.saturating_sub(self.config.residual);
            // None of them may have been left.
            self.first = self.config.first.min(all);
            self.coded.rows = (self.coded.rows + more).min(all);
            if more > 0 {
                // It may have been one, for which there is a reserve.
                let room = next(self.coded.rows.saturating_sub(1));
                self.coded.capacity = self.coded.capacity.max(room);
            }
            self.groups = (self.groups + (more / group) as f64).min(all as f64);
            self.tail.rows = self.tail.rows.min(self.longest_tail());
            self.tail.capacity = self.tail.rows + 1;
            return;
        }
        let [stay, units] = (self.config).due(self.first, self.coded.rows, self.tail.rows);
        self.first += stay;
        self.tail.rows -= stay;
        if units > 0 {
            self.coded.append(units);
            self.tail.rows -= units;
            self.groups += units as f64 / group as f64;
        }
        if self.tail.capacity > self.tail.rows + 1 {
            self.tail.capacity = self.tail.rows;
        }
    }

    fn units(&self) -> usize {
        self.bound
            .unwrap_or(self.first + self.coded.rows + self.tail.rows)
    }

    fn bound(&mut self) {
        let all = self.units();
        self.bound = Some(all);
        if all > 0 {
            self.first = self.config.first.min(all);
            self.coded = Room {
                rows: all,
                capacity: next(all),
            };
            self.groups = all as f64;
            self.tail.rows = all.min(self.longest_tail());
            self.tail.capacity = self.tail.rows + 1;
        }
    }

    fn bytes(&self) -> usize {
        self.first * self.first_bytes
            + self.coded.capacity * self.coded_bytes
            + (self.groups * self.group_bytes as f64) as usize
            + self.tail.capacity * self.tail_bytes
    }
}

/// Of a store of which a part is put away: all bytes, up to the bound. Which blocks are resident depends on the text,
/// and there are never more than that.
pub(super) struct SpilledGrowth {
    inner: Box<dyn Growth>,
    bound: usize,
    /// Where single tokens are appended, what is near reserves room of its own.
    reserve: usize,
}

impl SpilledGrowth {
    /// Of a store of which `inner` would have all units, with so many bytes for each new one.
    pub(super) fn new(inner: Box<dyn Growth>, bound: usize, unit: usize) -> Self {
        Self {
            inner,
            bound,
            reserve: RESERVE * unit,
        }
    }
}

impl Growth for SpilledGrowth {
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
            0 => 0,
            _ => (self.inner.bytes() + self.reserve).min(self.bound.max(self.reserve)),
        }
    }

    fn bound(&mut self) {
        self.inner.bound();
    }
}
