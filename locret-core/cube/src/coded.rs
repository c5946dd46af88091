//! Units of all heads as codes, in buffers of the device.

use crate::{
    kernels::codes::{self, Codes, NONE, TURNING},
    place::{Place, made},
    store::elementwise,
};
use burn::tensor::{DType as TensorType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use locret_core::{
    CodedHead, CodedPart, Error, Fold, Growth, KvStore, LayerSpec, QuantLayout, Quantization,
    QuantizedStore, Result, Room, Rows, check_append, check_retain, kernels::codes::block_of,
};
use std::{
    any::Any,
    io::{Read, Take, Write},
    sync::Arc,
};

/// Units of a cube where each has one number to move.
const UNITS: usize = 256;

/// Units of one layer as packed codes, and the first and the newest ones in 32 bits: what a [`QuantizedStore`] keeps in
/// host memory, bit for bit but for the rounding of Hadamard's matrix, with its first units wider. Forks share buffers
/// until one of them changes.
#[derive(Debug, Clone)]
pub(crate) struct CodedStore {
    place: Arc<Place>,
    layer: LayerSpec,
    config: Quantization,
    pub(crate) codes: Codes,
    heads: Vec<Head>,
    /// `[rows, 2 head_dim]`
    pub(crate) plain: CubeTensor,
    /// `[rows, record]`
    pub(crate) coded: CubeTensor,
    /// Steps and lows that runs share, `[runs, head_dim]`.
    pub(crate) shared: CubeTensor,
    /// The coded units of its head that end with a run.
    pub(crate) ends: CubeTensor,
    /// Where each head's rows lie.
    pub(crate) spans: CubeTensor,
}

/// How many of what a head has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Head {
    /// The first units.
    first: usize,
    coded: Room,
    /// The newest ones.
    tail: usize,
    /// Rows that there is memory for, of the first and the newest.
    room: usize,
    /// Units that are left of each run, none of them 0.
    runs: Vec<u32>,
}

impl Head {
    fn plain(&self) -> usize {
        self.first + self.tail
    }

    fn len(&self) -> usize {
        self.plain() + self.coded.rows()
    }
}

/// Memory for rows of which `gone` have just gone: of a single one it stays, since the next token takes it.
fn room(rows: usize, gone: usize) -> usize {
    rows + usize::from(gone == 1)
}

impl CodedStore {
    /// An empty store; `None` where a row's codes are not whole words.
    pub(crate) fn new(
        place: &Arc<Place>,
        layer: &LayerSpec,
        config: Quantization,
    ) -> Result<Option<Self>> {
        config.validate()?;
        let dim = layer.head_dim;
        let codes = Codes {
            dim,
            bits: config.bits.into(),
            width: config.group.min(dim),
            run: match config.layout {
                QuantLayout::PerToken => 0,
                QuantLayout::Kivi => config.group,
            },
            block: if config.hadamard { block_of(dim) } else { 1 },
        };
        if !codes.bytes().is_multiple_of(4) {
            return Ok(None);
        }
        let empty = || place.empty([0], TensorType::U32);
        let mut store = Self {
            place: place.clone(),
            layer: *layer,
            config,
            codes,
            heads: vec![Head::default(); layer.kv_heads],
            plain: empty(),
            coded: empty(),
            shared: empty(),
            ends: empty(),
            spans: empty(),
        };
        store.describe();
        Ok(Some(store))
    }

    pub(crate) fn lens(&self) -> Vec<usize> {
        self.heads.iter().map(Head::len).collect()
    }

    /// Words of a plain row.
    fn width(&self) -> usize {
        2 * self.layer.head_dim
    }

    /// The first row of each head, of which each has so many.
    fn starts(rows: impl Iterator<Item = usize>) -> Vec<usize> {
        let starts = rows.scan(0, |next, rows| {
            let start = *next;
            *next += rows;
            Some(start)
        });
        starts.collect()
    }

    fn plain_starts(&self) -> Vec<usize> {
        Self::starts(self.heads.iter().map(|head| head.room))
    }

    fn coded_starts(&self) -> Vec<usize> {
        Self::starts(self.heads.iter().map(|head| head.coded.capacity()))
    }

    fn run_starts(&self) -> Vec<usize> {
        Self::starts(self.heads.iter().map(|head| head.runs.len()))
    }

    /// Tells kernels where everything lies.
    fn describe(&mut self) {
        let (plain, coded, runs) = (self.plain_starts(), self.coded_starts(), self.run_starts());
        let spans = self.heads.iter().enumerate().flat_map(|(head, of)| {
            [
                plain[head],
                of.first,
                coded[head],
                of.coded.rows(),
                runs[head],
                of.runs.len(),
                of.len(),
            ]
        });
        let spans: Vec<u32> = spans.map(|n| n as u32).collect();
        let ends = self.heads.iter().flat_map(|head| {
            head.runs.iter().scan(0, |end, run| {
                *end += run;
                Some(*end)
            })
        });
        self.ends = self.place.indices(&ends.collect::<Vec<u32>>());
        self.spans = self.place.indices(&spans);
    }

    /// Rows of `width` words, of which row `i` is row `picks[i]` of these.
    fn picked(&self, rows: &CubeTensor, picks: &[u32], width: usize) -> Result<CubeTensor> {
        // Kernels count numbers in 32 bits.
        let words = picks.len().checked_mul(width);
        let Some(words) = words.filter(|words| u32::try_from(*words).is_ok()) else {
            let found = format!("{} rows of {width} words", picks.len());
            return Err(Error::Device(format!(
                "units of a layer are too many for GPU kernels: {found}"
            )));
        };
        let out = self.place.empty([words], TensorType::U32);
        if picks.iter().any(|pick| *pick != NONE) {
            let (count, cube) = elementwise(&self.place, words);
            codes::pick::launch(
                &self.place.client,
                count,
                cube,
                rows.clone().into_buffer_arg(),
                self.place.indices(picks).into_buffer_arg(),
                out.clone().into_buffer_arg(),
                width,
            );
        }
        Ok(out)
    }

    /// Puts the named plain rows of each head into memory of so many rows.
    fn move_plain(&mut self, kept: &[Vec<u32>], rooms: &[usize]) -> Result<()> {
        let starts = self.plain_starts();
        let picks = picks(kept, &starts, rooms.iter().copied());
        self.plain = self.picked(&self.plain, &picks, self.width())?;
        for (head, room) in self.heads.iter_mut().zip(rooms) {
            head.room = *room;
        }
        Ok(())
    }

    /// Gives each head's plain rows so much memory, which nobody else has.
    fn own_plain(&mut self, rooms: &[usize]) -> Result<()> {
        let same = self
            .heads
            .iter()
            .zip(rooms)
            .all(|(h, room)| h.room == *room);
        if same && self.plain.can_mut() {
            return Ok(());
        }
        let all = |head: &Head| (0..head.plain() as u32).collect();
        self.move_plain(&self.heads.iter().map(all).collect::<Vec<_>>(), rooms)
    }

    /// The same of coded rows.
    fn own_coded(&mut self, rooms: &[Room]) -> Result<()> {
        let mut heads = self.heads.iter().zip(rooms);
        let same = heads.all(|(head, room)| head.coded.capacity() == room.capacity());
        if !same || !self.coded.can_mut() {
            let all = |head: &Head| (0..head.coded.rows() as u32).collect();
            let kept: Vec<Vec<u32>> = self.heads.iter().map(all).collect();
            let capacities = rooms.iter().map(Room::capacity);
            let picks = picks(&kept, &self.coded_starts(), capacities);
            self.coded = self.picked(&self.coded, &picks, self.codes.record())?;
        }
        for (head, room) in self.heads.iter_mut().zip(rooms) {
            head.coded = *room;
        }
        Ok(())
    }

    /// Cubes for `most` pieces of work of each head.
    fn cubes(&self, most: usize) -> CubeCount {
        self.spread(most.div_ceil(UNITS), self.heads.len())
    }

    /// The first of the newest units stay numbers, in 16 bits.
    fn round_first(&mut self, stay: &[usize]) {
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
    fn encode(&mut self, units: &[usize]) -> Result<()> {
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

    /// So many cubes for each of so many heads, of which no axis has more than every device takes.
    fn spread(&self, cubes: usize, heads: usize) -> CubeCount {
        let cubes = cubes.max(1);
        let across = cubes.min(1 << 15);
        CubeCount::Static(across as u32, heads as u32, cubes.div_ceil(across) as u32)
    }

    /// Keys or values of some heads, `[units, head_dim]`, as appended, in new memory; none of them may be empty.
    pub(crate) fn numbers(&self, heads: std::ops::Range<usize>, values: bool) -> CubeTensor {
        let d = self.layer.head_dim;
        let lens: Vec<usize> = self.heads[heads.clone()].iter().map(Head::len).collect();
        let out = self.place.empty([lens.iter().sum(), d], TensorType::F32);
        let longest = lens.iter().copied().max().unwrap_or(0);
        codes::read::launch(
            &self.place.client,
            self.spread((longest * d).div_ceil(UNITS), heads.len()),
            CubeDim::new_1d(UNITS as u32),
            self.plain.clone().into_buffer_arg(),
            self.coded.clone().into_buffer_arg(),
            self.shared.clone().into_buffer_arg(),
            self.ends.clone().into_buffer_arg(),
            self.spans.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            heads.start as u32,
            values,
            self.codes,
        );
        if self.codes.block > 1 {
            codes::turn_read::launch(
                &self.place.client,
                self.spread(longest, heads.len()),
                CubeDim::new_1d(TURNING as u32),
                self.spans.clone().into_buffer_arg(),
                out.clone().into_buffer_arg(),
                heads.start as u32,
                self.codes,
            );
        }
        out
    }

    fn of_head(&self, head: usize, values: bool) -> Rows {
        match self.heads[head].len() {
            0 => Tensor::zeros([0, self.layer.head_dim], &self.place.device).into(),
            _ => made(self.numbers(head..head + 1, values)),
        }
    }

    /// The words of a buffer, in host memory.
    fn words(&self, buffer: &CubeTensor) -> Result<Vec<u32>> {
        let bytes = self.place.client.read_one(buffer.handle.clone());
        let bytes = bytes.map_err(|e| Error::Device(format!("{e:?}")))?;
        Ok(bytemuck::pod_collect_to_vec(&bytes[..]))
    }

    /// The same units in host memory.
    fn as_host(&self) -> Result<QuantizedStore> {
        let (d, codes) = (self.layer.head_dim, self.codes);
        let [plain, coded, shared] = [&self.plain, &self.coded, &self.shared];
        let (plain, coded) = (self.words(plain)?, self.words(coded)?);
        let shared = self.words(shared)?;
        let starts = (self.plain_starts().into_iter())
            .zip(self.coded_starts())
            .zip(self.run_starts());
        let heads = self
            .heads
            .iter()
            .zip(starts)
            .map(|(head, ((row, record), run))| {
                let part = |values: bool| {
                    let numbers = |rows: std::ops::Range<usize>| {
                        let rows = plain
                            .chunks_exact(2 * d)
                            .skip(row + rows.start)
                            .take(rows.len());
                        let at = if values { d } else { 0 };
                        rows.flat_map(move |row| &row[at..at + d])
                            .map(|x| f32::from_bits(*x))
                    };
                    let records = coded.chunks_exact(codes.record());
                    let records = records.skip(record).take(head.coded.rows());
                    let (mut bytes, mut pairs) = (Vec::new(), Vec::new());
                    for record in records {
                        let (row, rest) = record[codes.of(values)..].split_at(codes.words());
                        bytes.extend(row.iter().flat_map(|word| word.to_le_bytes()));
                        pairs.extend(
                            rest[..codes.pairs(values)]
                                .iter()
                                .flat_map(|pair| halves(*pair)),
                        );
                    }
                    if codes.run > 0 && !values {
                        for run in shared.chunks_exact(d).skip(run).take(head.runs.len()) {
                            for half in [0, 1] {
                                pairs.extend(run.iter().map(|pair| halves(*pair)[half]));
                            }
                        }
                    }
                    CodedPart {
                        first: numbers(0..head.first).map(half::f16::from_f32).collect(),
                        codes: bytes,
                        scales: pairs,
                        tail: numbers(head.first..head.plain()).collect(),
                    }
                };
                CodedHead {
                    keys: part(false),
                    values: part(true),
                    runs: head.runs.clone(),
                }
            });
        let store = QuantizedStore::on(&self.place.device, &self.layer, self.config)?;
        Ok(store.with_heads(heads.collect()))
    }

    /// Takes the units of a store in host memory instead of these.
    fn take_from(&mut self, host: &QuantizedStore) {
        let (d, codes) = (self.layer.head_dim, self.codes);
        let [mut plain, mut coded, mut shared] = [const { Vec::new() }; 3];
        let mut heads = Vec::with_capacity(self.heads.len());
        for CodedHead { keys, values, runs } in host.heads() {
            let parts = [keys, values];
            let rows = |numbers: usize| numbers / d;
            for row in 0..rows(keys.first.len()) {
                for part in parts {
                    let row = &part.first[row * d..(row + 1) * d];
                    plain.extend(row.iter().map(|x| x.to_f32().to_bits()));
                }
            }
            for row in 0..rows(keys.tail.len()) {
                for part in parts {
                    let row = &part.tail[row * d..(row + 1) * d];
                    plain.extend(row.iter().map(|x| x.to_bits()));
                }
            }
            let records = keys.codes.len() / codes.bytes();
            for row in 0..records {
                for (part, of_values) in parts.into_iter().zip([false, true]) {
                    let (bytes, pairs) = (codes.bytes(), codes.pairs(of_values));
                    let row_codes = part.codes[row * bytes..(row + 1) * bytes].chunks_exact(4);
                    coded.extend(row_codes.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
                    let row_pairs =
                        part.scales[2 * row * pairs..2 * (row + 1) * pairs].chunks_exact(2);
                    coded.extend(row_pairs.map(|pair| word(pair[0], pair[1])));
                }
            }
            for (run, _) in runs.iter().enumerate() {
                let of_run = &keys.scales[2 * run * d..2 * (run + 1) * d];
                let (steps, lows) = of_run.split_at(d);
                shared.extend(steps.iter().zip(lows).map(|(step, low)| word(*step, *low)));
            }
            let [first, tail] = [&keys.first.len(), &keys.tail.len()].map(|n| rows(*n));
            heads.push(Head {
                first,
                coded: Room::exact(records),
                tail,
                room: first + tail,
                runs: runs.clone(),
            });
        }
        self.heads = heads;
        [self.plain, self.coded, self.shared] =
            [plain, coded, shared].map(|words| self.place.indices(&words));
        self.describe();
    }
}

/// Step and low of a word.
fn halves(pair: u32) -> [half::f16; 2] {
    [pair as u16, (pair >> 16) as u16].map(half::f16::from_bits)
}

fn word(step: half::f16, low: half::f16) -> u32 {
    u32::from(step.to_bits()) | u32::from(low.to_bits()) << 16
}

/// For each row of new memory, of so many rows for each head, the row that it is of the old.
fn picks(kept: &[Vec<u32>], starts: &[usize], rooms: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut picks = Vec::new();
    for ((kept, start), room) in kept.iter().zip(starts).zip(rooms) {
        let end = picks.len() + room;
        picks.extend(kept.iter().map(|row| *start as u32 + row));
        picks.resize(end, NONE);
    }
    picks
}

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
