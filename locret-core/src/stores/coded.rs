//! A store that keeps keys and values as small integers.

use super::{
    Fold, Growth, KvStore, Placement, check_append, check_folds, check_retain, folded,
    growth::{self, CodedGrowth},
    no_keys, saved,
};
use crate::{Error, LayerSpec, Result, Rows, SnapshotError};
use burn::tensor::Device;
use half::f16;
use locret_kernels::{
    codes::{Packing, block_of, decode_rows, decode_run, hadamard},
    select::compact_rows,
    tiles::{Floats, KvTiles},
};
use serde::{Deserialize, Serialize};
use std::{
    io::{Read, Take, Write},
    ops::Range,
};

/// How a [`QuantizedStore`] keeps its units.
///
/// Numbers become codes of `bits` bits, `x ≈ low + step · code`; `low` and `step` are kept in 16
/// bits for each group of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quantization {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Which numbers share a group.
    pub layout: QuantLayout,
    /// Numbers in a group. Along the features it is cut off at the head's.
    pub group: usize,
    /// The newest units that stay in 32 bits, at least.
    pub residual: usize,
    /// The first units, which stay in 16 bits. Models put what is by far the largest into the keys of a text's
    /// beginning, and most of their attention there.
    pub first: usize,
    /// Whether keys and values are multiplied with Hadamard's matrix before they become codes, in blocks of as many
    /// features as the largest power of two that divides the head's (64 of 64, 32 of 96): what is large in one
    /// feature is spread over all of them, and steps are smaller.
    pub hadamard: bool,
}

/// Which numbers share a `low` and a `step`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuantLayout {
    /// Features of one unit, for keys and for values. Dropping units frees exactly their share.
    #[default]
    PerToken,
    /// KIVI (arXiv 2402.02750 §3): keys in groups of tokens for each feature, since some features
    /// of keys are far larger than others; values as in `PerToken`. A group's `low` and `step`
    /// stay until its last unit is dropped. Units enter in whole groups, so that up to `group - 1`
    /// more than the residual stay in 32 bits.
    Kivi,
}

impl Default for Quantization {
    fn default() -> Self {
        Self {
            bits: 4,
            layout: QuantLayout::PerToken,
            group: 64,
            residual: 32,
            first: 0,
            hadamard: false,
        }
    }
}

impl Quantization {
    /// Codes of this many bits in the form that goes with them.
    ///
    /// That is by token for 3, 4 and 8 bits, and KIVI's in groups of 32 for 2, measured as `-ln p` of
    /// a continuation of 1,500 tokens of essays (SmolLM2-135M; 3.176 from 65.2 MiB of 32-bit keys
    /// and values), without Hadamard's matrix and with no first units of 16 bits:
    ///
    /// | bits | by token, groups of 64 | KIVI, groups of 32 |
    /// |---|---|---|
    /// | 8 | 3.177, 19.7 MiB | |
    /// | 4 | 3.183, 11.8 MiB | 3.174, 13.2 MiB |
    /// | 2 | 5.441, 7.8 MiB | 3.399, 9.3 MiB |
    /// | 4, KeyDiff keeps 256 units (exact: 3.276, 12.7 MiB) | 3.292, 4.4 MiB | 3.278, 5.3 MiB |
    /// | 2, KeyDiff keeps 256 units | 4.636, 3.7 MiB | 3.474, 4.6 MiB |
    ///
    /// With 2 and 3 bits the matrix and four first units of 16 bits go: 2 bits lose a sixth of what they lose
    /// without. With 4 they gain nothing (`docs/ablation.md`), and attention to plain codes is faster.
    pub fn bits(bits: u8) -> Self {
        let default = Self {
            bits,
            ..Self::default()
        };
        let turned = Self {
            first: 4,
            hadamard: true,
            ..default
        };
        match bits {
            2 => Self {
                layout: QuantLayout::Kivi,
                group: 32,
                ..turned
            },
            3 => turned,
            _ => default,
        }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::Setting`] for other bits than 2, 3, 4 and 8, and for empty groups.
    pub fn validate(&self) -> Result<()> {
        if ![2, 3, 4, 8].contains(&self.bits) {
            return Err(Error::setting("bits of a code", "2, 3, 4 or 8", self.bits));
        }
        if self.group == 0 {
            return Err(Error::setting("group", "at least 1 number", 0));
        }
        Ok(())
    }

    /// A short name for tables and messages.
    pub fn name(&self) -> String {
        let layout = match self.layout {
            QuantLayout::PerToken => "",
            QuantLayout::Kivi => "-kivi",
        };
        let turned = if self.hadamard { "-hadamard" } else { "" };
        format!("{}bit{layout}{turned}", self.bits)
    }

    /// What becomes of `tail` units that are numbers, beside `first` that stay for good and `coded` that are codes: how
    /// many more stay, and how many become codes.
    pub fn due(&self, first: usize, coded: usize, tail: usize) -> [usize; 2] {
        let units = tail.saturating_sub(self.residual);
        let stay = match coded {
            0 => units.min(self.first.saturating_sub(first)),
            _ => 0,
        };
        let left = units - stay;
        match self.layout {
            QuantLayout::PerToken => [stay, left],
            QuantLayout::Kivi => [stay, left - left % self.group.max(1)],
        }
    }

    /// How a store of such codes grows, of so many KV heads of `dim` features.
    pub fn growth(&self, kv_heads: usize, dim: usize) -> Box<dyn Growth> {
        Box::new(CodedGrowth::new(kv_heads, dim, *self))
    }

    /// How the codes of a head of `dim` features are packed.
    pub(super) fn packing(&self, dim: usize) -> Packing {
        Packing::new(self.bits, dim)
    }
}

/// Units as packed integer codes, and the newest ones in 32 bits.
///
/// New units are kept as they are until the step is over ([`KvStore::settle`]), so that attention
/// within a chunk is exact and what the policy drops at once is never quantised. Codes, steps and
/// lows of a unit are made once and never again: dropping others moves them, bit for bit.
///
/// All of it lies in host memory: where something else than the CPU kernels attends, and has no such store of its
/// own, keys and values are uploaded when they are asked for.
#[derive(Debug, Clone)]
pub struct QuantizedStore {
    heads: Vec<Head>,
    shape: Shape,
    device: Device,
}

/// Sizes that all heads share.
#[derive(Debug, Clone, Copy)]
struct Shape {
    dim: usize,
    config: Quantization,
}

/// One KV head, and what a store elsewhere makes of itself to be saved.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// Its keys.
    pub keys: Part,
    /// Its values.
    pub values: Part,
    /// KIVI only: how many units are left of each group of keys, none of them 0.
    pub runs: Vec<u32>,
}

/// Keys or values of one head: the first units, those that are codes, and the newest ones.
#[derive(Debug, Clone, Default)]
pub struct Part {
    /// `[units, dim]`
    pub first: Vec<f16>,
    /// `[units, row_bytes]`
    pub codes: Vec<u8>,
    /// Step and low of each group: by unit `[groups, 2]`, or, for keys in KIVI's layout, by run
    /// `[2, dim]`.
    pub scales: Vec<f16>,
    /// `[units, dim]`
    pub tail: Vec<f32>,
}

impl QuantizedStore {
    /// An empty store.
    ///
    /// # Errors
    /// As [`Quantization::validate`].
    pub fn new(layer: &LayerSpec, place: &Placement, config: Quantization) -> Result<Self> {
        Self::on(place.compute.device(), layer, config)
    }

    /// An empty store whose units come to `device` where something else than the CPU kernels attends.
    ///
    /// # Errors
    /// As [`Quantization::validate`].
    pub fn on(device: &Device, layer: &LayerSpec, config: Quantization) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            heads: vec![Head::default(); layer.kv_heads],
            shape: Shape {
                dim: layer.head_dim,
                config,
            },
            device: device.clone(),
        })
    }

    /// An empty store of codes where the [`Compute`](crate::Compute) wants it, as
    /// [`KvCachePolicy::store`](crate::KvCachePolicy::store) returns it: this one, unless it has another.
    ///
    /// # Errors
    /// As [`Compute::coded_store`](crate::Compute::coded_store).
    pub fn boxed(
        layer: &LayerSpec,
        place: &Placement,
        config: Quantization,
    ) -> Result<Box<dyn KvStore>> {
        place.compute.coded_store(layer, config)
    }

    /// All that is kept, by KV head.
    #[doc(hidden)]
    pub fn heads(&self) -> &[Head] {
        &self.heads
    }

    /// The same store with other units.
    #[doc(hidden)]
    #[must_use]
    pub fn with_heads(self, heads: Vec<Head>) -> Self {
        Self { heads, ..self }
    }

    /// Units of `head` that are kept as codes.
    pub fn quantized(&self, head: usize) -> usize {
        self.heads[head].coded(self.shape)
    }

    fn rows(&self, rows: usize, fill: impl FnOnce(&mut [f32])) -> Result<Rows> {
        let mut values = vec![0.0; rows * self.shape.dim];
        fill(&mut values);
        Rows::new(values, self.shape.dim, &self.device)
    }
}

impl Shape {
    fn packing(self) -> Packing {
        self.config.packing(self.dim)
    }

    /// Bytes of a unit's codes.
    fn row_bytes(self) -> usize {
        self.packing().row_bytes()
    }

    /// Features that are turned together before they are coded; 1 if they are not.
    fn block(self) -> usize {
        match self.config.hadamard {
            true => block_of(self.dim),
            false => 1,
        }
    }

    /// Features that are turned back together where numbers are read as appended (`turned`: as they were coded).
    fn back(self, turned: bool) -> usize {
        if turned { 1 } else { self.block() }
    }

    /// The largest code.
    fn top(self) -> f32 {
        ((1u32 << self.config.bits) - 1) as f32
    }

    /// Features in a group.
    fn width(self) -> usize {
        self.config.group.min(self.dim)
    }

    /// Steps and lows of a unit.
    fn row_scales(self) -> usize {
        2 * self.dim.div_ceil(self.width())
    }

    /// All that decides what a saved store means.
    fn saved_name(self) -> String {
        let Quantization {
            group,
            residual,
            first,
            hadamard,
            ..
        } = self.config;
        let turned = if hadamard { " h" } else { "" };
        let name = Quantization {
            hadamard: true,
            ..self.config
        }
        .name();
        format!("{name} g{group} r{residual} f{first}{turned}")
    }

    fn kivi(self) -> bool {
        self.config.layout == QuantLayout::Kivi
    }

    /// Quantises one unit, turned already, by groups of features.
    fn encode_row(self, row: &[f32], codes: &mut Vec<u8>, scales: &mut Vec<f16>) {
        let (start, packing) = (codes.len(), self.packing());
        codes.resize(start + self.row_bytes(), 0);
        for (index, group) in row.chunks(self.width()).enumerate() {
            let (step, low) = scale(group.iter().copied(), self.top());
            scales.extend([step, low]);
            let (step, low) = (step.to_f32(), low.to_f32());
            for (i, x) in group.iter().enumerate() {
                let code = code(*x, step, low, self.top());
                packing.put(&mut codes[start..], index * self.width() + i, code);
            }
        }
    }

    /// Quantises a group of units, turned already, by features.
    fn encode_group(self, rows: &[f32], codes: &mut Vec<u8>, scales: &mut Vec<f16>) {
        let (d, start, stride) = (self.dim, codes.len(), self.row_bytes());
        let packing = self.packing();
        codes.resize(start + rows.len() / d * stride, 0);
        let mut lows = Vec::with_capacity(d);
        for feature in 0..d {
            let column = rows.iter().skip(feature).step_by(d).copied();
            let (step, low) = scale(column.clone(), self.top());
            scales.push(step);
            lows.push(low);
            let (step, low) = (step.to_f32(), low.to_f32());
            for (row, x) in codes[start..].chunks_mut(stride).zip(column) {
                packing.put(row, feature, code(x, step, low, self.top()));
            }
        }
        scales.extend(lows);
    }

    /// Quantised units by groups of features, as numbers `[range.len(), dim]`.
    fn decode_rows(self, part: &Part, range: Range<usize>, turned: bool, out: &mut [f32]) {
        let of = |width: usize| range.start * width..range.end * width;
        let codes = &part.codes[of(self.row_bytes())];
        let scales = &part.scales[of(self.row_scales())];
        decode_rows(
            self.packing(),
            codes,
            scales,
            self.width(),
            self.back(turned),
            out,
        );
    }

    /// Quantised keys in KIVI's layout, as numbers `[range.len(), dim]`.
    fn decode_runs(
        self,
        part: &Part,
        runs: &[u32],
        range: Range<usize>,
        turned: bool,
        out: &mut [f32],
    ) {
        let (d, bytes) = (self.dim, self.row_bytes());
        let mut start = 0;
        for (len, scales) in runs.iter().zip(part.scales.chunks_exact(2 * d)) {
            let units = start..start + *len as usize;
            start = units.end;
            let wanted = units.start.max(range.start)..units.end.min(range.end);
            if wanted.is_empty() {
                continue;
            }
            let out = &mut out[(wanted.start - range.start) * d..(wanted.end - range.start) * d];
            let codes = &part.codes[wanted.start * bytes..wanted.end * bytes];
            decode_run(self.packing(), codes, scales, self.back(turned), out);
        }
    }
}

/// Step and low for numbers between which there are `top` steps.
fn scale(numbers: impl Iterator<Item = f32> + Clone, top: f32) -> (f16, f16) {
    // A NaN among them makes all of them NaN, rather than vanish.
    if numbers.clone().any(|x| !x.is_finite()) {
        return (f16::NAN, f16::NAN);
    }
    let bound = f16::MAX.to_f32();
    let numbers = numbers.map(|x| x.clamp(-bound, bound));
    let low = numbers.clone().fold(f32::INFINITY, f32::min);
    let high = numbers.fold(f32::NEG_INFINITY, f32::max);
    let mut low16 = f16::from_f32(low);
    if low16.to_f32() > low {
        low16 = below(low16);
    }
    let step = (high - low16.to_f32()) / top;
    let mut step16 = f16::from_f32(step);
    // Rounded up, so that the largest number is within reach.
    if step16.to_f32() < step {
        step16 = f16::from_bits(step16.to_bits() + 1);
    }
    (step16, low16)
}

/// The next smaller number.
fn below(x: f16) -> f16 {
    let bits = x.to_bits();
    match bits {
        0 => f16::from_bits(0x8001),
        b if b & 0x8000 == 0 => f16::from_bits(b - 1),
        b => f16::from_bits(b + 1),
    }
}

fn code(x: f32, step: f32, low: f32, top: f32) -> u8 {
    if step > 0.0 {
        // Half a step is added and the rest cut off: rounding without a call.
        ((x - low) / step + 0.5).clamp(0.0, top) as u8
    } else {
        0
    }
}

impl Head {
    /// Units that are kept as codes.
    fn coded(&self, shape: Shape) -> usize {
        self.values.codes.len() / shape.row_bytes()
    }

    /// Units that are not, by their place: the first, and the newest.
    fn plain(&self, shape: Shape) -> [usize; 2] {
        let Part { first, tail, .. } = &self.values;
        [first.len(), tail.len()].map(|numbers| numbers / shape.dim)
    }

    fn len(&self, shape: Shape) -> usize {
        self.coded(shape) + self.plain(shape).iter().sum::<usize>()
    }

    /// The parts of a range of units: of the first, of those that are codes, and of the newest.
    fn split(&self, shape: Shape, range: Range<usize>) -> [Range<usize>; 3] {
        let (first, coded) = (self.plain(shape)[0], self.coded(shape));
        let ends = [0, first, first + coded, self.len(shape)];
        [0, 1, 2].map(|part| {
            let at = |unit: usize| unit.clamp(ends[part], ends[part + 1]) - ends[part];
            at(range.start)..at(range.end)
        })
    }

    /// Keys of any range, `[range.len(), dim]`, as appended or turned.
    fn keys(&self, shape: Shape, range: Range<usize>, turned: bool, out: &mut [f32]) {
        let [first, coded, tail] = self.split(shape, range);
        let out = self.keys.copy_first(shape, first, turned, out);
        let (out, rest) = out.split_at_mut(coded.len() * shape.dim);
        if shape.kivi() {
            shape.decode_runs(&self.keys, &self.runs, coded, turned, out);
        } else {
            shape.decode_rows(&self.keys, coded, turned, out);
        }
        self.keys.copy_tail(shape, tail, turned, rest);
    }

    /// Values of any range, `[range.len(), dim]`, as appended or turned.
    fn values(&self, shape: Shape, range: Range<usize>, turned: bool, out: &mut [f32]) {
        let [first, coded, tail] = self.split(shape, range);
        let out = self.values.copy_first(shape, first, turned, out);
        let (out, rest) = out.split_at_mut(coded.len() * shape.dim);
        shape.decode_rows(&self.values, coded, turned, out);
        self.values.copy_tail(shape, tail, turned, rest);
    }

    /// Quantises the oldest of the units that are not yet.
    fn settle(&mut self, shape: Shape) {
        let d = shape.dim;
        let [first, tail] = self.plain(shape);
        let [stay, units] = shape.config.due(first, self.coded(shape), tail);
        if stay > 0 {
            for part in [&mut self.keys, &mut self.values] {
                part.first.reserve_exact(stay * d);
                let first = part.tail.drain(..stay * d);
                part.first.extend(first.map(rounded));
                trim_tail(&mut part.tail, d, stay);
            }
        }
        if units == 0 {
            return;
        }
        let (bytes, scales) = (shape.row_bytes(), shape.row_scales());
        for part in [&mut self.keys, &mut self.values] {
            reserve(&mut part.codes, units, bytes);
            hadamard(&mut part.tail[..units * d], shape.block());
        }
        reserve(&mut self.values.scales, units, scales);
        let Part {
            codes,
            scales: made,
            tail,
            ..
        } = &mut self.values;
        for row in tail[..units * d].chunks(d) {
            shape.encode_row(row, codes, made);
        }
        let Part {
            codes,
            scales: made,
            tail,
            ..
        } = &mut self.keys;
        if shape.kivi() {
            let rows = shape.config.group;
            made.reserve_exact(units / rows * 2 * d);
            self.runs.reserve_exact(units / rows);
            for group in tail[..units * d].chunks(rows * d) {
                shape.encode_group(group, codes, made);
                self.runs.push(rows as u32);
            }
        } else {
            reserve(made, units, scales);
            for row in tail[..units * d].chunks(d) {
                shape.encode_row(row, codes, made);
            }
        }
        for part in [&mut self.keys, &mut self.values] {
            part.tail.drain(..units * d);
            trim_tail(&mut part.tail, d, units);
        }
    }

    fn retain(&mut self, shape: Shape, kept: &[u32]) {
        let ([before, tail], coded) = (self.plain(shape), self.coded(shape));
        let dropped = self.len(shape) - kept.len();
        if dropped == 0 {
            return;
        }
        let below = |end: usize| kept.partition_point(|u| (*u as usize) < end);
        let from = |units: &[u32], start: usize| -> Vec<u32> {
            units.iter().map(|u| u - start as u32).collect()
        };
        let (begin, end) = (below(before), below(before + coded));
        let oldest = &kept[..begin];
        let first = &from(&kept[begin..end], before)[..];
        let rest = from(&kept[end..], before + coded);
        let (d, bytes, scales) = (shape.dim, shape.row_bytes(), shape.row_scales());
        for part in [&mut self.keys, &mut self.values] {
            compact_rows(&mut part.first, d, oldest);
            part.first.shrink_to_fit();
            compact_rows(&mut part.codes, bytes, first);
            compact_rows(&mut part.tail, d, &rest);
            trim(&mut part.codes, bytes, dropped);
            trim_tail(&mut part.tail, d, tail - rest.len());
        }
        compact_rows(&mut self.values.scales, scales, first);
        trim(&mut self.values.scales, scales, dropped);
        if !shape.kivi() {
            compact_rows(&mut self.keys.scales, scales, first);
            trim(&mut self.keys.scales, scales, dropped);
            return;
        }
        let mut left = first;
        let mut end = 0;
        let mut alive = Vec::new();
        let mut runs = Vec::new();
        for (run, len) in self.runs.iter().enumerate() {
            end += len;
            let (here, later) = left.split_at(left.partition_point(|u| *u < end));
            left = later;
            if !here.is_empty() {
                alive.push(run as u32);
                runs.push(here.len() as u32);
            }
        }
        runs.shrink_to_fit();
        self.runs = runs;
        compact_rows(&mut self.keys.scales, 2 * d, &alive);
        self.keys.scales.shrink_to_fit();
    }

    /// Replaces the value of one unit, or its key where that has a group of its own.
    fn set(&mut self, shape: Shape, keys: bool, unit: usize, value: &[f32]) {
        let ([first, _], coded, d) = (self.plain(shape), self.coded(shape), shape.dim);
        let part = match keys {
            true => &mut self.keys,
            false => &mut self.values,
        };
        if unit < first {
            let old = &mut part.first[unit * d..][..d];
            let pairs = old.iter_mut().zip(value);
            pairs.for_each(|(old, value)| *old = rounded(*value));
            return;
        }
        let unit = unit - first;
        if unit >= coded {
            part.tail[(unit - coded) * d..][..d].copy_from_slice(value);
            return;
        }
        let (mut codes, mut made) = (Vec::new(), Vec::new());
        let mut value = value.to_vec();
        hadamard(&mut value, shape.block());
        shape.encode_row(&value, &mut codes, &mut made);
        let (bytes, scales) = (shape.row_bytes(), shape.row_scales());
        part.codes[unit * bytes..][..bytes].copy_from_slice(&codes);
        part.scales[unit * scales..][..scales].copy_from_slice(&made);
    }

    fn read(shape: Shape, from: &mut Take<&mut dyn Read>) -> Result<Self> {
        let width = shape.row_bytes().max(shape.row_scales()).max(shape.dim);
        let first = saved::read_count(from, width)?;
        if first > shape.config.first {
            let most = shape.config.first;
            let found = format!("{first} first units, {most} at most are due");
            return Err(SnapshotError::Damaged(found).into());
        }
        let coded = saved::read_count(from, width)?;
        let tail = saved::read_count(from, width)?;
        let runs = saved::read_count(from, 2 * shape.dim)?;
        let runs: Vec<u32> = saved::read(from, runs)?;
        let possible = 1..=u32::try_from(shape.config.group).unwrap_or(u32::MAX);
        let members: u64 = runs.iter().map(|run| u64::from(*run)).sum();
        let due = if shape.kivi() { coded as u64 } else { 0 };
        if members != due || !runs.iter().all(|run| possible.contains(run)) {
            let most = shape.config.group;
            let found =
                format!("groups of {members} keys, {due} in groups of {most} at most are due");
            return Err(SnapshotError::Damaged(found).into());
        }
        let by_row = coded * shape.row_scales();
        let of_keys = match shape.kivi() {
            true => runs.len() * 2 * shape.dim,
            false => by_row,
        };
        let mut part = |scales| -> Result<Part> {
            Ok(Part {
                first: saved::read(from, first * shape.dim)?,
                codes: saved::read(from, coded * shape.row_bytes())?,
                scales: saved::read(from, scales)?,
                tail: saved::read(from, tail * shape.dim)?,
            })
        };
        Ok(Self {
            keys: part(of_keys)?,
            values: part(by_row)?,
            runs,
        })
    }

    fn bytes(&self) -> usize {
        let part = |part: &Part| {
            let halves = part.first.capacity() + part.scales.capacity();
            part.codes.capacity() + 2 * halves + 4 * part.tail.capacity()
        };
        part(&self.keys) + part(&self.values) + 4 * self.runs.capacity()
    }
}

impl Part {
    /// Rows of the tail.
    fn rows(&self, shape: Shape, rows: Range<usize>) -> &[f32] {
        &self.tail[rows.start * shape.dim..rows.end * shape.dim]
    }

    /// Rows of the tail, as they are or turned.
    fn copy_tail(&self, shape: Shape, rows: Range<usize>, turned: bool, out: &mut [f32]) {
        let out = &mut out[..rows.len() * shape.dim];
        out.copy_from_slice(self.rows(shape, rows));
        if turned {
            hadamard(out, shape.block());
        }
    }

    /// The same of the first units; what is left of `out`.
    fn copy_first<'a>(
        &self,
        shape: Shape,
        rows: Range<usize>,
        turned: bool,
        out: &'a mut [f32],
    ) -> &'a mut [f32] {
        let (out, rest) = out.split_at_mut(rows.len() * shape.dim);
        Floats::F16(&self.first).to_f32(rows.start * shape.dim..rows.end * shape.dim, out);
        if turned {
            hadamard(out, shape.block());
        }
        rest
    }
}

/// A number in 16 bits, the largest there is for what is larger.
fn rounded(x: f32) -> f16 {
    let bound = f16::MAX.to_f32();
    match x.is_finite() {
        true => f16::from_f32(x.clamp(-bound, bound)),
        false => f16::NAN,
    }
}

/// Room for `units` more rows: exactly for a chunk, in steps for single tokens.
fn reserve<T>(buffer: &mut Vec<T>, units: usize, row: usize) {
    if buffer.capacity() - buffer.len() < units * row {
        let rows = buffer.len() / row;
        buffer.reserve_exact((growth::grown(rows, units) - rows) * row);
    }
}

/// Hands memory back after `dropped` units are gone, but for what the next single token takes anyway.
fn trim<T>(buffer: &mut Vec<T>, row: usize, dropped: usize) {
    let rows = buffer.len() / row;
    buffer.shrink_to(growth::cut(rows, dropped, buffer.capacity() / row) * row);
}

/// Hands back the memory of `gone` rows; of a single one it stays, since the next token takes it. This looks
/// at nothing that was before, so that a copy, which has no room to spare, never takes more than its original.
fn trim_tail(tail: &mut Vec<f32>, row: usize, gone: usize) {
    let spare = if gone <= 1 { row } else { 0 };
    tail.shrink_to(tail.len() + spare);
}

impl KvStore for QuantizedStore {
    fn name(&self) -> String {
        self.shape.config.name()
    }

    fn append(&mut self, keys: &Rows, values: &Rows) -> Result<()> {
        let (g, d) = (self.heads.len(), self.shape.dim);
        let t = check_append(keys, values, g, d)?;
        let (keys, values) = (keys.values()?, values.values()?);
        for (index, head) in self.heads.iter_mut().enumerate() {
            for (to, from) in [
                (&mut head.keys.tail, &keys),
                (&mut head.values.tail, &values),
            ] {
                to.reserve_exact(t * d);
                for row in 0..t {
                    let at = (row * g + index) * d;
                    to.extend_from_slice(&from[at..at + d]);
                }
            }
        }
        Ok(())
    }

    fn retain(&mut self, kept: &[Vec<u32>]) -> Result<()> {
        let shape = self.shape;
        check_retain(kept, self.heads.iter().map(|head| head.len(shape)))?;
        for (head, kept) in self.heads.iter_mut().zip(kept) {
            head.retain(shape, kept);
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        for head in &mut self.heads {
            head.settle(self.shape);
        }
        Ok(())
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        let shape = self.shape;
        let head = &mut self.heads[head];
        check_folds(folds, head.len(shape))?;
        let value = |head: &Head, unit: u32| {
            let mut out = vec![0.0; shape.dim];
            head.values(shape, unit as usize..unit as usize + 1, false, &mut out);
            out
        };
        for (unit, value) in folded(folds, |unit| value(head, unit)) {
            head.set(shape, false, unit as usize, &value);
        }
        Ok(())
    }

    fn folds_keys(&self) -> bool {
        !self.shape.kivi()
    }

    fn fold_keys(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        let shape = self.shape;
        if shape.kivi() {
            return Err(no_keys(&self.name()));
        }
        let head = &mut self.heads[head];
        check_folds(folds, head.len(shape))?;
        let key = |head: &Head, unit: u32| {
            let mut out = vec![0.0; shape.dim];
            head.keys(shape, unit as usize..unit as usize + 1, false, &mut out);
            out
        };
        for (unit, key) in folded(folds, |unit| key(head, unit)) {
            head.set(shape, true, unit as usize, &key);
        }
        Ok(())
    }

    fn len(&self, head: usize) -> usize {
        self.heads[head].len(self.shape)
    }

    fn is_empty(&self) -> bool {
        self.heads.iter().all(|head| head.len(self.shape) == 0)
    }

    fn bytes(&self) -> usize {
        self.heads.iter().map(Head::bytes).sum()
    }

    fn growth(&self) -> Box<dyn Growth> {
        self.shape.config.growth(self.heads.len(), self.shape.dim)
    }

    fn keys(&self, head: usize) -> Result<Rows> {
        let (head, shape) = (&self.heads[head], self.shape);
        let n = head.len(shape);
        self.rows(n, |out| head.keys(shape, 0..n, false, out))
    }

    fn values(&self, head: usize) -> Result<Rows> {
        let (head, shape) = (&self.heads[head], self.shape);
        let n = head.len(shape);
        self.rows(n, |out| head.values(shape, 0..n, false, out))
    }

    fn tiles(&self, head: usize) -> Option<Box<dyn KvTiles + '_>> {
        Some(Box::new(Tiles {
            head: &self.heads[head],
            shape: self.shape,
            turned: [false; 2],
        }))
    }

    fn turned_block(&self) -> usize {
        self.shape.block()
    }

    fn turned_tiles(&self, head: usize, keys: bool) -> Option<Box<dyn KvTiles + '_>> {
        let turned = self.shape.block() > 1;
        Some(Box::new(Tiles {
            head: &self.heads[head],
            shape: self.shape,
            turned: [turned && keys, turned],
        }))
    }

    fn write(&self, to: &mut dyn Write) -> Result<()> {
        let shape = self.shape;
        saved::write_header(to, &shape.saved_name(), self.heads.len(), shape.dim)?;
        for head in &self.heads {
            let [first, tail] = head.plain(shape);
            saved::write_count(to, first)?;
            saved::write_count(to, head.coded(shape))?;
            saved::write_count(to, tail)?;
            saved::write_count(to, head.runs.len())?;
            saved::write(to, &head.runs)?;
            for part in [&head.keys, &head.values] {
                saved::write(to, &part.first)?;
                saved::write(to, &part.codes)?;
                saved::write(to, &part.scales)?;
                saved::write(to, &part.tail)?;
            }
        }
        Ok(())
    }

    fn read(&mut self, from: &mut Take<&mut dyn Read>) -> Result<()> {
        let shape = self.shape;
        saved::read_header(from, &shape.saved_name(), self.heads.len(), shape.dim)?;
        let heads = (0..self.heads.len()).map(|_| Head::read(shape, from));
        self.heads = heads.collect::<Result<_>>()?;
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvStore> {
        Box::new(self.clone())
    }
}

/// One head's units for the CPU kernels.
struct Tiles<'a> {
    head: &'a Head,
    shape: Shape,
    /// Whether keys, and values, are handed out as they were coded.
    turned: [bool; 2],
}

impl Tiles<'_> {
    /// A range that is not coded, as it lies there.
    fn plain<'s>(&self, part: &'s Part, turned: bool, range: &Range<usize>) -> Option<&'s [f32]> {
        if turned {
            return None;
        }
        let before = self.head.plain(self.shape)[0] + self.head.coded(self.shape);
        let rows = range.start.checked_sub(before)?..range.end - before;
        Some(part.rows(self.shape, rows))
    }

    fn plain_keys(&self, range: &Range<usize>) -> Option<&[f32]> {
        self.plain(&self.head.keys, self.turned[0], range)
    }

    fn plain_values(&self, range: &Range<usize>) -> Option<&[f32]> {
        self.plain(&self.head.values, self.turned[1], range)
    }
}

impl KvTiles for Tiles<'_> {
    fn len(&self) -> usize {
        self.head.len(self.shape)
    }

    fn keys<'a>(&'a self, range: Range<usize>, scratch: &'a mut [f32]) -> &'a [f32] {
        if let Some(rows) = self.plain_keys(&range) {
            return rows;
        }
        let out = &mut scratch[..range.len() * self.shape.dim];
        self.head.keys(self.shape, range, self.turned[0], out);
        out
    }

    fn values<'a>(&'a self, range: Range<usize>, scratch: &'a mut [f32]) -> &'a [f32] {
        if let Some(rows) = self.plain_values(&range) {
            return rows;
        }
        let out = &mut scratch[..range.len() * self.shape.dim];
        self.head.values(self.shape, range, self.turned[1], out);
        out
    }

    fn stored_keys(&self, range: Range<usize>) -> Option<Floats<'_>> {
        self.plain_keys(&range).map(Floats::F32)
    }

    fn stored_values(&self, range: Range<usize>) -> Option<Floats<'_>> {
        self.plain_values(&range).map(Floats::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, compute};
    use proptest::prelude::*;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..n)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn store(kv_heads: usize, dim: usize, config: Quantization) -> QuantizedStore {
        let layer = LayerSpec {
            index: 0,
            layers: 1,
            heads: kv_heads,
            kv_heads,
            head_dim: dim,
        };
        let place = Placement {
            compute: compute(&Device::default()),
            dtype: DType::F32,
        };
        QuantizedStore::new(&layer, &place, config).unwrap()
    }

    /// Appends `tokens` tokens; returns their keys and values by head.
    fn append(store: &mut QuantizedStore, tokens: usize, seed: u64) -> Vec<[Vec<f32>; 2]> {
        let (g, d) = (store.heads.len(), store.shape.dim);
        let given = [seed, seed ^ 0xff].map(|seed| numbers(tokens * g * d, seed));
        let device = Device::default();
        let [k, v] = given.clone().map(|x| Rows::new(x, g * d, &device).unwrap());
        store.append(&k, &v).unwrap();
        let of = |x: &Vec<f32>, head: usize| -> Vec<f32> {
            let rows = x.chunks(g * d).map(|row| &row[head * d..(head + 1) * d]);
            rows.flatten().copied().collect()
        };
        (0..g).map(|h| given.each_ref().map(|x| of(x, h))).collect()
    }

    fn read(store: &QuantizedStore, head: usize) -> [Vec<f32>; 2] {
        [store.keys(head), store.values(head)].map(|x| x.unwrap().into_values().unwrap())
    }

    fn any_config() -> impl Strategy<Value = Quantization> {
        let bits = prop::sample::select(vec![2u8, 3, 4, 8]);
        let all = (bits, any::<[bool; 2]>(), 1usize..40, 0usize..20, 0usize..6);
        all.prop_map(
            |(bits, [kivi, hadamard], group, residual, first)| Quantization {
                bits,
                layout: if kivi {
                    QuantLayout::Kivi
                } else {
                    QuantLayout::PerToken
                },
                group,
                residual,
                first,
                hadamard,
            },
        )
    }

    /// Blocks times Sylvester's matrix.
    fn turned(x: &[f32], block: usize) -> Vec<f32> {
        let sign = |i: usize, j: usize| match (i & j).count_ones() % 2 {
            0 => 1.0,
            _ => -1.0,
        };
        let of_block = |x: &[f32]| -> Vec<f32> {
            let row = |i: usize| -> f64 {
                let terms = x
                    .iter()
                    .enumerate()
                    .map(|(j, x)| sign(i, j) * f64::from(*x));
                terms.sum::<f64>() / (block as f64).sqrt()
            };
            (0..x.len()).map(|i| row(i) as f32).collect()
        };
        x.chunks(block).flat_map(of_block).collect()
    }

    proptest! {
        /// Every number is within half a step of what it was, where a step is the range of its
        /// group by the number of steps (and the rounding of 16 bits).
        #[test]
        fn codes_are_the_nearest_ones(
            config in any_config(),
            dim in 1usize..40,
            tokens in 1usize..70,
            scale in prop::sample::select(vec![1e-3f32, 1.0, 300.0]),
            seed in any::<u64>(),
        ) {
            let mut store = store(1, dim, config);
            let given = numbers(2 * tokens * dim, seed).iter().map(|x| x * scale + scale).collect::<Vec<_>>();
            let (k, v) = given.split_at(tokens * dim);
            let device = Device::default();
            let rows = |x: &[f32]| Rows::new(x.to_vec(), dim, &device).unwrap();
            store.append(&rows(k), &rows(v)).unwrap();
            prop_assert_eq!(read(&store, 0), [k.to_vec(), v.to_vec()]);
            store.settle().unwrap();
            let coded = store.quantized(0);
            let old = tokens.saturating_sub(config.residual);
            let first = old.min(config.first);
            let whole = match config.layout {
                QuantLayout::PerToken => old - first,
                QuantLayout::Kivi => (old - first) - (old - first) % config.group,
            };
            prop_assert_eq!(coded, whole);
            prop_assert_eq!(store.heads[0].plain(store.shape), [first, tokens - first - whole]);
            let block = store.shape.block();
            let found = read(&store, 0);
            let exact = [k.to_vec(), v.to_vec()];
            for (found, exact) in found.iter().zip(&exact) {
                prop_assert_eq!(&found[(first + coded) * dim..], &exact[(first + coded) * dim..]);
                for (found, exact) in found[..first * dim].iter().zip(exact) {
                    prop_assert_eq!(*found, f16::from_f32(*exact).to_f32());
                }
            }
            // Where codes are made.
            let [found, exact] = [found, exact].map(|parts| parts.map(|x| turned(&x, block)));
            let largest = 4.0 * scale * (block as f32).sqrt();
            let top = f32::from(u16::MAX >> (16 - config.bits));
            for (part, given) in exact.iter().enumerate() {
                let by_token = part == 1 || config.layout == QuantLayout::PerToken;
                for unit in 0..tokens {
                    for c in 0..dim {
                        let at = unit * dim + c;
                        if !(first..first + coded).contains(&unit) {
                            continue;
                        }
                        let group: Vec<f32> = if by_token {
                            let start = c - c % config.group;
                            given[unit * dim + start..unit * dim + dim.min(start + config.group)].to_vec()
                        } else {
                            let start = unit - (unit - first) % config.group;
                            (start..start + config.group).map(|u| given[u * dim + c]).collect()
                        };
                        let high = group.iter().copied().fold(f32::MIN, f32::max);
                        let low = group.iter().copied().fold(f32::MAX, f32::min);
                        // `low` may have been rounded down by a 1024th, the step up by one.
                        let step = (high - low + low.abs() / 1024.0) / top * (1.0 + 1.0 / 1024.0) + 6e-8;
                        let off = (found[part][at] - given[at]).abs();
                        prop_assert!(off <= step * 0.501 + largest * 2e-6, "unit {unit}, feature {c}: {} for {}, step {step}", found[part][at], given[at]);
                    }
                }
            }
        }

        /// Whatever comes and goes: codes, steps and lows of a unit are made once.
        #[test]
        fn survivors_keep_their_codes(
            config in any_config(),
            dim in prop::sample::select(vec![5usize, 8, 12, 64]),
            rounds in prop::collection::vec((0usize..50, any::<u64>(), 0u64..4), 1..8),
        ) {
            let mut store = store(2, dim, config);
            let mut exact: Vec<[Vec<f32>; 2]> = vec![Default::default(); 2];
            for (tokens, seed, drop) in rounds {
                if tokens > 0 {
                    for (all, new) in exact.iter_mut().zip(append(&mut store, tokens, seed)) {
                        for (all, new) in all.iter_mut().zip(new) {
                            all.extend(new);
                        }
                    }
                }
                let kept: Vec<Vec<u32>> = (0..2u64).map(|head| {
                    let lots = numbers(store.len(head as usize), seed ^ (head + 7));
                    (0..lots.len() as u32).filter(|u| drop == 0 || lots[*u as usize] > drop as f32 / 2.0 - 1.0).collect()
                }).collect();
                let before: Vec<_> = (0..2).map(|h| read(&store, h)).collect();
                let coded: Vec<_> = (0..2).map(|h| {
                    let first = store.heads[h].plain(store.shape)[0];
                    first..first + store.quantized(h)
                }).collect();
                store.retain(&kept).unwrap();
                for head in 0..2 {
                    let after = read(&store, head);
                    for part in 0..2 {
                        let pick = |all: &[f32]| -> Vec<f32> {
                            kept[head].iter().flat_map(|u| &all[*u as usize * dim..][..dim]).copied().collect()
                        };
                        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                        prop_assert_eq!(bits(&after[part]), bits(&pick(&before[head][part])));
                        exact[head][part] = pick(&exact[head][part]);
                    }
                    let left = kept[head].iter().filter(|u| coded[head].contains(&(**u as usize))).count();
                    prop_assert_eq!(store.quantized(head), left);
                    if config.layout == QuantLayout::Kivi {
                        let runs = &store.heads[head].runs;
                        prop_assert_eq!(runs.iter().sum::<u32>() as usize, left);
                        prop_assert!(runs.iter().all(|len| *len > 0));
                        prop_assert_eq!(store.heads[head].keys.scales.len(), runs.len() * 2 * dim);
                    }
                }
                store.settle().unwrap();
                for head in 0..2 {
                    let n = store.len(head);
                    prop_assert_eq!(n, kept[head].len());
                    // All ranges of tiles are what keys and values are.
                    let all = read(&store, head);
                    let tiles = store.tiles(head).unwrap();
                    let block = store.shape.block();
                    let coded_so = [true, false].map(|keys| store.turned_tiles(head, keys).unwrap());
                    for range in [0..n, n / 3..n, n / 2..n / 2 + n / 4, n..n] {
                        let mut scratch = vec![f32::NAN; range.len() * dim];
                        let at = range.start * dim..range.end * dim;
                        prop_assert_eq!(tiles.keys(range.clone(), &mut scratch), &all[0][at.clone()]);
                        prop_assert_eq!(tiles.values(range.clone(), &mut scratch), &all[1][at.clone()]);
                        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 3e-5);
                        let due = [0, 1].map(|part| turned(&all[part][at.clone()], block));
                        prop_assert!(near(coded_so[0].keys(range.clone(), &mut scratch), &due[0]));
                        prop_assert!(near(coded_so[0].values(range.clone(), &mut scratch), &due[1]));
                        prop_assert_eq!(coded_so[1].keys(range.clone(), &mut scratch), &all[0][at]);
                        prop_assert!(near(coded_so[1].values(range, &mut scratch), &due[1]));
                    }
                    // Numbers are between -1 and 1, no step is larger than 2 / top; turned, all together are off by as
                    // much as half of the largest step each.
                    let block = store.shape.block() as f32;
                    let top = f32::from(u16::MAX >> (16 - config.bits));
                    for part in 0..2 {
                        for (a, b) in all[part].iter().zip(&exact[head][part]) {
                            prop_assert!((a - b).abs() <= 1.01 * block / top + 1e-3, "{a} for {b}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_unit_takes_its_codes_and_its_share_of_scales() {
        let f32_bytes = 2 * 4096 * 64 * 4;
        for (bits, layout, most) in [
            (4, QuantLayout::PerToken, 0.16),
            (4, QuantLayout::Kivi, 0.16),
            (8, QuantLayout::PerToken, 0.29),
            (3, QuantLayout::PerToken, 0.13),
            (2, QuantLayout::PerToken, 0.10),
        ] {
            let config = Quantization {
                bits,
                layout,
                ..Quantization::default()
            };
            let mut store = store(1, 64, config);
            for seed in 0..7 {
                append(&mut store, 512, seed);
                store.settle().unwrap();
            }
            // Read by chunks and then token by token, with the reserve that this needs.
            append(&mut store, 412, 7);
            store.settle().unwrap();
            for seed in 8..108 {
                append(&mut store, 1, seed);
                store.settle().unwrap();
            }
            let share = store.bytes() as f64 / f64::from(f32_bytes);
            assert!(share <= most, "{config:?}: {share}");
            let exact = f64::from(bits) / 32.0 + 32.0 / 32.0 / 64.0;
            assert!(
                share > exact,
                "{config:?}: {share} is less than codes and scales"
            );
        }
    }

    #[test]
    fn a_group_is_freed_with_its_last_unit() {
        let config = Quantization {
            layout: QuantLayout::Kivi,
            group: 16,
            residual: 0,
            first: 0,
            ..Quantization::default()
        };
        let mut store = store(1, 8, config);
        append(&mut store, 64, 1);
        store.settle().unwrap();
        assert_eq!(store.heads[0].runs, [16, 16, 16, 16]);
        let scales = store.heads[0].keys.scales.clone();
        // All of the second group, and all but one of the others.
        store.retain(&[vec![3, 40, 63]]).unwrap();
        assert_eq!(store.heads[0].runs, [1, 1, 1]);
        let left = &store.heads[0].keys.scales;
        assert_eq!(left[..16], scales[..16]);
        assert_eq!(left[16..], scales[32..]);
        assert_eq!(left.capacity(), 48);
        store.retain(&[vec![]]).unwrap();
        assert_eq!(
            (
                store.heads[0].runs.len(),
                store.heads[0].keys.scales.capacity()
            ),
            (0, 0)
        );
    }

    #[test]
    fn numbers_that_have_no_code() {
        let config = Quantization {
            residual: 0,
            first: 0,
            hadamard: false,
            ..Quantization::default()
        };
        let mut store = store(1, 4, config);
        let device = Device::default();
        let rows = vec![
            1.0,
            f32::NAN,
            2.0,
            3.0, //
            1e9,
            -1e9,
            0.0,
            1.0, //
            7.5,
            7.5,
            7.5,
            7.5, //
            1e-30,
            2e-30,
            0.0,
            0.0,
        ];
        let rows = Rows::new(rows, 4, &device).unwrap();
        store.append(&rows, &rows).unwrap();
        store.settle().unwrap();
        let [keys, values] = read(&store, 0);
        assert!(keys[..4].iter().all(|x| x.is_nan()));
        assert!((keys[4] - 65504.0).abs() < 100.0 && (keys[5] + 65504.0).abs() < 100.0);
        assert_eq!(keys[8..12], [7.5; 4]);
        assert!(keys[12..].iter().all(|x| x.abs() < 1e-7));
        assert!(values[4..].iter().all(|x| x.is_finite()));
        // Turned, they reach their block and no further.
        let config = Quantization {
            hadamard: true,
            ..config
        };
        let mut store = QuantizedStore {
            shape: Shape { dim: 4, config },
            ..store
        };
        store.heads[0] = Head::default();
        store.append(&rows, &rows).unwrap();
        store.settle().unwrap();
        let [keys, _] = read(&store, 0);
        assert!(keys[..4].iter().all(|x| x.is_nan()));
        assert!(keys[4..].iter().all(|x| x.is_finite()));
        assert_eq!(keys[8..12], [7.5; 4]);
        // Of the first units each number stands for itself.
        let config = Quantization { first: 4, ..config };
        let mut store = QuantizedStore {
            shape: Shape { dim: 4, config },
            ..store
        };
        store.heads[0] = Head::default();
        store.append(&rows, &rows).unwrap();
        store.settle().unwrap();
        let [keys, _] = read(&store, 0);
        assert!(keys[1].is_nan() && keys[4..6] == [65504.0, -65504.0]);
        assert_eq!([keys[0], keys[2], keys[3]], [1.0, 2.0, 3.0]);
    }

    #[test]
    fn impossible_settings_are_refused() {
        for config in [
            Quantization::bits(0),
            Quantization::bits(1),
            Quantization::bits(5),
            Quantization::bits(16),
            Quantization {
                group: 0,
                ..Quantization::default()
            },
        ] {
            assert!(
                matches!(config.validate(), Err(Error::Setting { .. })),
                "{config:?}"
            );
        }
    }

    #[test]
    fn values_are_folded_and_keys_are_not() {
        for residual in [0, 4, 9] {
            let mut store = store(
                2,
                16,
                Quantization {
                    bits: 8,
                    residual,
                    ..Quantization::default()
                },
            );
            append(&mut store, 9, 5);
            store.settle().unwrap();
            let before = [read(&store, 0), read(&store, 1)];
            let fold = |from, into, share| Fold { from, into, share };
            store
                .fold_values(1, &[fold(0, 3, 0.25), fold(8, 3, 0.25), fold(3, 5, 0.5)])
                .unwrap();
            let after = [read(&store, 0), read(&store, 1)];
            assert_eq!(after[0], before[0]);
            assert_eq!(after[1][0], before[1][0]);
            let row = |x: &Vec<f32>, u: usize| x[u * 16..][..16].to_vec();
            let (old, new) = (&before[1][1], &after[1][1]);
            for c in 0..16 {
                let three = 0.5 * row(old, 3)[c] + 0.25 * (row(old, 0)[c] + row(old, 8)[c]);
                assert!((row(new, 3)[c] - three).abs() < 0.01);
                let five = 0.5 * (row(old, 5)[c] + row(old, 3)[c]);
                assert!((row(new, 5)[c] - five).abs() < 0.01);
            }
            for unit in [0, 1, 2, 4, 6, 7, 8] {
                assert_eq!(row(new, unit), row(old, unit));
            }
            assert!(store.fold_values(0, &[fold(9, 0, 0.5)]).is_err());
        }
    }
}
