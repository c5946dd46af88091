//! Units of all heads as codes, in buffers of the device.

mod encode;
mod host;
mod store;

use crate::{
    kernels::codes::{self, Codes, NONE, TURNING},
    place::{Place, made},
    store::elementwise,
};
use burn::tensor::{DType as TensorType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use locret_core::{
    Error, LayerSpec, QuantLayout, Quantization, Result, Room, Rows, kernels::codes::block_of,
};
use std::sync::Arc;

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
