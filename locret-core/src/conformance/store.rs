//! What every store must satisfy.

use super::{ConformanceError, Dice, Promise, record::mixed};
use crate::{Error, Fold, Growth, KvStore, LayerSpec, Result, Rows, from_f32, stores::RESERVE};
use burn::tensor::{Device, Tensor};
use std::{io::Read, ops::Range};

/// How a store is checked. The default fits a dense 32-bit store.
#[derive(Debug, Clone)]
pub struct StoreCheck {
    /// One run of random operations for each seed.
    pub seeds: Range<u64>,
    /// How far numbers that are handed out may be from what was appended, as a share of the largest
    /// number appended; 0 means bit for bit.
    pub tolerance: f32,
    /// Bytes of one stored number, scales and the like included.
    pub bytes_per_value: f64,
    /// Units of a head for which a store may hold memory in reserve or in full precision, at 4
    /// bytes a number.
    pub reserve: usize,
    /// The sizes of heads to go through.
    pub head_dims: Vec<usize>,
    /// Units of a head that one append brings at most.
    pub max_append: usize,
    /// Whether [`KvStore::growth`] is exact where heads are cut back alike; otherwise it may be a
    /// quarter off.
    pub plans_exactly: bool,
}

impl Default for StoreCheck {
    fn default() -> Self {
        Self {
            seeds: 0..40,
            tolerance: 0.0,
            bytes_per_value: 4.0,
            reserve: RESERVE,
            head_dims: vec![8, 16, 20, 64],
            max_append: 150,
            plans_exactly: true,
        }
    }
}

/// Runs a store through random appends, evictions, turns and forks, next to plain lists.
///
/// `make` builds an empty store for a layer. After every operation keys, values, lengths and tiles
/// are compared: what was there stays bit for bit what it was, but for [`KvStore::settle`] in a
/// store with a tolerance. Bytes are compared when a step is over.
///
/// # Errors
/// [`ConformanceError`] for the first broken promise.
pub fn check_store(
    device: &Device,
    check: &StoreCheck,
    make: impl Fn(&LayerSpec) -> Result<Box<dyn KvStore>>,
) -> Result<(), ConformanceError> {
    for seed in check.seeds.clone() {
        let mut dice = Dice::new(seed);
        let kv_heads = dice.between(1, 4);
        let layer = LayerSpec {
            index: 0,
            layers: 1,
            heads: kv_heads * dice.pick(&[1, 3]),
            kv_heads,
            head_dim: dice.pick(&check.head_dims),
        };
        let case = format!("seed {seed}, {kv_heads} KV heads of {}", layer.head_dim);
        let store = make(&layer).map_err(|e| ConformanceError::Failed {
            subject: "the store's constructor".into(),
            case: case.clone(),
            source: Box::new(e),
        })?;
        let mut pair = Pair {
            check,
            device,
            layer,
            heads: vec![Lists::default(); kv_heads],
            away: vec![Vec::new(); kv_heads],
            largest: 0.0,
            case,
            log: Vec::new(),
            store,
        };
        pair.compare(None)?;
        pair.refusals()?;
        for _ in 0..dice.between(4, 14) {
            pair.operate(&mut dice)?;
        }
        pair.forks(&mut dice)?;
        pair.saved(&mut dice, make(&layer))?;
        pair.empties(&mut dice)?;
        check.growth(&make, layer, device)?;
    }
    Ok(())
}

impl StoreCheck {
    /// A plan of the store beside the store, heads cut back alike.
    fn growth(
        &self,
        make: impl Fn(&LayerSpec) -> Result<Box<dyn KvStore>>,
        layer: LayerSpec,
        device: &Device,
    ) -> Result<(), ConformanceError> {
        for newest in [false, true] {
            self.growth_of(&make, layer, device, newest)?;
        }
        Ok(())
    }

    /// Units are dropped from anywhere, or the oldest ones.
    fn growth_of(
        &self,
        make: &dyn Fn(&LayerSpec) -> Result<Box<dyn KvStore>>,
        layer: LayerSpec,
        device: &Device,
        newest: bool,
    ) -> Result<(), ConformanceError> {
        let subject = "the growth of a store";
        let failed = |source| ConformanceError::Failed {
            subject: subject.into(),
            case: format!("{layer:?}"),
            source: Box::new(source),
        };
        let mut store = make(&layer).map_err(failed)?;
        let mut growth = store.growth();
        let (heads, width) = (layer.kv_heads, layer.kv_heads * layer.head_dim);
        // A few units as numbers: which ones of a group are left decides when it is given back.
        let slack = (8 * layer.kv_heads * layer.head_dim * 2 * 4) as f64;
        // Where units can be put away all of them are: what is left is no more than was planned.
        let tiered = store.tiered();
        let mut away = Vec::new();
        let compare = |store: &dyn KvStore, growth: &dyn Growth, what: &str| {
            let (found, due) = (growth.bytes() as f64, store.bytes() as f64);
            // Which units of a store of codes are left is a matter of the text.
            let near = match self.plans_exactly {
                _ if tiered => found >= due,
                true => found == due,
                false => found >= 0.75 * due - slack && found <= 1.25 * due + slack,
            };
            match near && growth.units() == store.len(0) {
                true => Ok(()),
                false => Err(ConformanceError::Broken {
                    subject: format!("store {}", store.name()),
                    promise: Promise::Growth,
                    case: format!("{layer:?}, {what}"),
                    found: format!("{found} bytes of {} units, {due}", growth.units()),
                }),
            }
        };
        for (append, keep) in [
            (100, 80),
            (37, 80),
            (1, 80),
            (1, 80),
            (1, 81),
            (200, 300),
            (9, 7),
        ] {
            let rows = vec![0.5; append * width];
            let rows = Rows::new(rows, width, device).map_err(failed)?;
            store.append(&rows, &rows).map_err(failed)?;
            growth.append(append);
            let units = store.len(0);
            let what = format!("{append} appended to {}", units - append);
            if !tiered {
                compare(&*store, &*growth, &what)?;
            }
            let kept = keep.min(units);
            let unit = |i| match newest {
                true => units - kept + i,
                false => i * units / kept,
            };
            let list: Vec<u32> = (0..kept).map(|i| unit(i) as u32).collect();
            away.resize(units, false);
            away = list.iter().map(|unit| away[*unit as usize]).collect();
            store.retain(&vec![list; heads]).map_err(failed)?;
            growth.retain(keep, newest);
            store.settle().map_err(failed)?;
            growth.settle();
            if tiered {
                let near = (0..kept as u32).filter(|unit| !away[*unit as usize]);
                let block = vec![near.collect(); heads];
                store.put_away(&[block]).map_err(failed)?;
                away.fill(true);
            }
            compare(&*store, &*growth, &format!("cut back to {kept} of {units}"))?;
        }
        Ok(())
    }
}

/// One head's rows: keys and values.
#[derive(Debug, Clone, Default)]
struct Lists([Vec<Vec<f32>>; 2]);

/// A store and the lists that it should agree with.
struct Pair<'a> {
    check: &'a StoreCheck,
    device: &'a Device,
    layer: LayerSpec,
    store: Box<dyn KvStore>,
    heads: Vec<Lists>,
    /// Whether units were put away.
    away: Vec<Vec<bool>>,
    largest: f32,
    case: String,
    log: Vec<String>,
}

/// Blocks times Hadamard's matrix, whose signs are the parities of the bits that row and column share.
fn turned(x: &[f32], block: usize) -> Vec<f32> {
    let of_block = |x: &[f32]| -> Vec<f32> {
        let row = |row: usize| {
            let term = |(column, x): (usize, &f32)| match (row & column).count_ones() % 2 {
                0 => f64::from(*x),
                _ => -f64::from(*x),
            };
            let sum: f64 = x.iter().enumerate().map(term).sum();
            (sum / (block as f64).sqrt()) as f32
        };
        (0..block).map(row).collect()
    };
    x.chunks(block).flat_map(of_block).collect()
}

const PARTS: [&str; 2] = ["keys", "values"];

impl Pair<'_> {
    fn broken(&self, promise: Promise, found: impl Into<String>) -> ConformanceError {
        ConformanceError::Broken {
            subject: format!("store {}", self.store.name()),
            promise,
            case: format!("{}, after {}", self.case, self.log.join(", ")),
            found: found.into(),
        }
    }

    fn failed(&self, error: Error) -> ConformanceError {
        ConformanceError::Failed {
            subject: format!("store {}", self.store.name()),
            case: format!("{}, after {}", self.case, self.log.join(", ")),
            source: Box::new(error),
        }
    }

    fn operate(&mut self, dice: &mut Dice) -> Result<(), ConformanceError> {
        if self.store.tiered() && dice.chance(0.6) {
            self.put_away(dice)?;
        }
        match dice.between(0, 10) {
            0..=3 => {
                let tokens = dice.between(0, self.check.max_append);
                self.append(dice, tokens)?;
            }
            4..=5 => {
                for _ in 0..dice.between(1, 6) {
                    self.append(dice, 1)?;
                }
            }
            6..=8 => {
                let share = dice.pick(&[0.0, 0.1, 0.5, 0.95, 1.0]);
                self.retain(dice, share)?;
            }
            9 => self.fold(dice)?,
            _ => self.turn()?,
        }
        match dice.chance(0.7) {
            true => self.settle(),
            false => Ok(()),
        }
    }

    /// Some units are put away, some are brought back, and all of them stay what they were.
    fn put_away(&mut self, dice: &mut Dice) -> Result<(), ConformanceError> {
        self.log.push("some put away".into());
        let before = self.read()?;
        let share = dice.pick(&[0.1, 0.9]);
        for _ in 0..dice.between(1, 3) {
            let mut block = Vec::new();
            for (away, lists) in self.away.iter_mut().zip(&self.heads) {
                away.resize(lists.0[0].len(), false);
                let most = dice.between(0, 40);
                let near = (0..away.len()).filter(|unit| !away[*unit]);
                let chosen: Vec<usize> = near.filter(|_| dice.chance(share)).take(most).collect();
                chosen.iter().for_each(|unit| away[*unit] = true);
                block.push(chosen.into_iter().map(|unit| unit as u32).collect());
            }
            self.store.put_away(&[block]).map_err(|e| self.failed(e))?;
            self.compare(Some(before.clone()))?;
        }
        for head in 0..self.heads.len() {
            let Some(unit) = self.away[head].iter().position(|away| *away) else {
                continue;
            };
            let mut again = vec![Vec::new(); self.heads.len()];
            again[head].push(unit as u32);
            if self.store.put_away(&[again]).is_ok() {
                let found = format!("unit {unit} of KV head {head} was put away twice");
                return Err(self.broken(Promise::Refused, found));
            }
        }
        let seen: Vec<Vec<Range<usize>>> = (self.heads.iter())
            .map(|lists| {
                let n = lists.0[0].len();
                let range = |dice: &mut Dice| {
                    let start = dice.between(0, n);
                    start..dice.between(start, n.min(start + 50))
                };
                (0..dice.between(0, 2)).map(|_| range(dice)).collect()
            })
            .collect();
        match self.store.bring(&seen) {
            Ok(()) => {}
            Err(Error::Memory { .. }) => return self.compare(Some(before)),
            Err(error) => return Err(self.failed(error)),
        }
        if !self.store.brought(&seen) {
            return Err(self.broken(Promise::Tiles, "what was brought is not there"));
        }
        let d = self.layer.head_dim;
        for (head, ranges) in seen.into_iter().enumerate() {
            let Some(tiles) = self.store.brought_tiles(head) else {
                continue;
            };
            for range in ranges {
                let mut scratch = vec![f32::NAN; range.len() * d];
                let at = range.start * d..range.end * d;
                let same = tiles.keys(range.clone(), &mut scratch) == &before[head][0][at.clone()]
                    && tiles.values(range.clone(), &mut scratch) == &before[head][1][at];
                if !same {
                    let found = format!("units {range:?} of KV head {head} differ");
                    return Err(self.broken(Promise::Tiles, found));
                }
            }
        }
        let (resident, total) = (self.store.bytes(), self.store.total_bytes());
        if resident > total {
            let found = format!("{resident} bytes are resident of {total}");
            return Err(self.broken(Promise::Freed, found));
        }
        self.compare(Some(before))
    }

    /// A step is over.
    fn settle(&mut self) -> Result<(), ConformanceError> {
        self.log.push("settled".into());
        let before = self.read()?;
        self.store.settle().map_err(|e| self.failed(e))?;
        self.compare((self.check.tolerance == 0.0).then_some(before))?;
        self.bytes()
    }

    /// Values or keys are mixed, or it is refused and nothing has changed.
    fn fold(&mut self, dice: &mut Dice) -> Result<(), ConformanceError> {
        let head = dice.between(0, self.layer.kv_heads - 1);
        let n = self.heads[head].0[1].len();
        if n < 2 {
            return Ok(());
        }
        let unit = |dice: &mut Dice| dice.between(0, n - 1) as u32;
        let mut folds: Vec<Fold> = (0..dice.between(1, 5))
            .map(|_| Fold {
                from: unit(dice),
                into: unit(dice),
                share: dice.pick(&[0.5, 0.1, 0.19]),
            })
            .collect();
        if dice.chance(0.3) {
            // Its own value counts what this says.
            let (into, share) = (folds[0].into, dice.pick(&[0.5, 0.25]));
            folds.push(Fold {
                from: into,
                into,
                share,
            });
        }
        let part = usize::from(dice.chance(0.7));
        self.log
            .push(format!("{folds:?} in KV head {head}, part {part}"));
        let before = self.read()?;
        let (mixing, does) = match part {
            0 => (self.store.fold_keys(head, &folds), self.store.folds_keys()),
            _ => (self.store.fold_values(head, &folds), true),
        };
        match mixing {
            Ok(()) if does => {}
            Ok(()) => {
                let found = "keys were mixed, which `folds_keys` denies";
                return Err(self.broken(Promise::Mixture, found));
            }
            Err(Error::NotSupported { .. }) => return self.compare(Some(before)),
            Err(error) => return Err(self.failed(error)),
        }
        let d = self.layer.head_dim;
        let due = mixed(&before[head][part], d, &folds);
        let all = due.iter();
        self.largest = all.fold(self.largest, |most, x| most.max(x.abs()));
        let after = self.read()?;
        let into = |at: usize| folds.iter().any(|f| f.into as usize == at / d);
        // The order of a sum is the store's business.
        let allowed = self.check.tolerance.max(1e-6) * self.largest;
        let wrong = (0..due.len()).find(|at| {
            let (found, old) = (after[head][part][*at], before[head][part][*at]);
            match into(*at) {
                true => !((found - due[*at]).abs() <= allowed),
                false => found.to_bits() != old.to_bits(),
            }
        });
        if let Some(at) = wrong {
            return Err(self.broken(
                Promise::Mixture,
                format!(
                    "{} {} of KV head {head}: {}, {} is due",
                    ["key", "value"][part],
                    at / d,
                    after[head][part][at],
                    due[at]
                ),
            ));
        }
        // From here on this is what these units are; nothing else may have changed.
        for fold in &folds {
            let at = fold.into as usize;
            self.heads[head].0[part][at] = after[head][part][at * d..(at + 1) * d].to_vec();
        }
        let mut exact = before;
        exact[head][part].clone_from(&after[head][part]);
        self.compare(Some(exact))
    }

    fn append(&mut self, dice: &mut Dice, tokens: usize) -> Result<(), ConformanceError> {
        let (heads, d) = (self.layer.kv_heads, self.layer.head_dim);
        self.log.push(format!("{tokens} appended"));
        let before = self.read()?;
        let width = heads * d;
        let parts = [(); 2].map(|()| dice.values(tokens * width));
        for (part, values) in parts.iter().enumerate() {
            for row in 0..tokens {
                for head in 0..heads {
                    let at = row * width + head * d;
                    self.heads[head].0[part].push(values[at..at + d].to_vec());
                }
            }
            let all = values.iter();
            self.largest = all.fold(self.largest, |most, x| most.max(x.abs()));
        }
        let [keys, values] =
            parts.map(|x| Rows::from(from_f32::<2>(x, [tokens, width], self.device)));
        self.store
            .append(&keys, &values)
            .map_err(|e| self.failed(e))?;
        self.compare(Some(before))
    }

    fn retain(&mut self, dice: &mut Dice, share: f64) -> Result<(), ConformanceError> {
        let kept: Vec<Vec<u32>> = self
            .heads
            .iter()
            .map(|head| {
                let all = 0..head.0[0].len() as u32;
                all.filter(|_| dice.chance(share)).collect()
            })
            .collect();
        self.log.push(format!("{share} of the units retained"));
        let before = self.read()?;
        self.store.retain(&kept).map_err(|e| self.failed(e))?;
        let d = self.layer.head_dim;
        let survivors = before
            .iter()
            .zip(&kept)
            .map(|(parts, kept)| {
                [0, 1].map(|part| {
                    let rows = kept.iter().map(|u| *u as usize * d);
                    let rows = rows.flat_map(|at| &parts[part][at..at + d]);
                    rows.copied().collect()
                })
            })
            .collect();
        for ((head, away), kept) in self.heads.iter_mut().zip(&mut self.away).zip(&kept) {
            away.resize(head.0[0].len(), false);
            *away = kept.iter().map(|u| away[*u as usize]).collect();
            for part in &mut head.0 {
                *part = kept.iter().map(|u| part[*u as usize].clone()).collect();
            }
        }
        self.compare(Some(survivors))?;
        self.settle()
    }

    /// A quarter turn: exact in every float type.
    fn turn(&mut self) -> Result<(), ConformanceError> {
        self.log.push("keys turned".into());
        let before = self.read()?;
        let half = self.layer.head_dim / 2;
        let turns = self.store.turns_keys();
        let turned = self.store.turn_keys(&|_, keys| {
            let keys = keys.into_tensor();
            let (a, b) = (keys.clone().narrow(1, 0, half), keys.narrow(1, half, half));
            Ok(Tensor::cat(vec![b.neg(), a], 1).into())
        });
        match turned {
            Ok(()) if turns => {}
            Err(Error::NotSupported { .. }) if !turns => return self.compare(Some(before)),
            Err(error) => return Err(self.failed(error)),
            Ok(()) => {
                let found = "keys were turned, which `turns_keys` denies";
                return Err(self.broken(Promise::TurnedKeys, found));
            }
        }
        for head in &mut self.heads {
            for row in &mut head.0[0] {
                let (a, b) = row.split_at(half);
                *row = b.iter().map(|x| -x).chain(a.iter().copied()).collect();
            }
        }
        self.compare(None).map_err(|e| match e {
            ConformanceError::Broken {
                subject,
                case,
                found,
                ..
            } => ConformanceError::Broken {
                subject,
                promise: Promise::TurnedKeys,
                case,
                found,
            },
            other => other,
        })
    }

    fn forks(&mut self, dice: &mut Dice) -> Result<(), ConformanceError> {
        if self.heads[0].0[0].is_empty() {
            self.append(dice, 9)?;
        }
        self.log.push("forked".into());
        let mut fork = Pair {
            store: self.store.fork(),
            heads: self.heads.clone(),
            away: self.away.clone(),
            case: self.case.clone(),
            log: self.log.clone(),
            ..*self
        };
        fork.compare(None)?;
        let wrong = |e| match e {
            ConformanceError::Broken {
                subject,
                case,
                found,
                ..
            } => ConformanceError::Broken {
                subject,
                promise: Promise::Fork,
                case,
                found,
            },
            other => other,
        };
        for _ in 0..4 {
            self.operate(dice)?;
            fork.compare(None).map_err(wrong)?;
            fork.operate(dice)?;
            self.compare(None).map_err(wrong)?;
        }
        Ok(())
    }

    /// What was written and read again goes on in place of what was written. A store need not do this.
    fn saved(
        &mut self,
        dice: &mut Dice,
        empty: Result<Box<dyn KvStore>>,
    ) -> Result<(), ConformanceError> {
        self.log.push("saved and read".into());
        let mut bytes = Vec::new();
        match self.store.write(&mut bytes) {
            Err(Error::Snapshot(_)) if bytes.is_empty() => return Ok(()),
            written => written.map_err(|e| self.failed(e))?,
        }
        let before = self.read()?;
        for cut in [0, 1, bytes.len() / 3, bytes.len() / 2, bytes.len() - 1] {
            let mut from: &[u8] = &bytes[..cut];
            let from: &mut dyn Read = &mut from;
            match self.store.read(&mut from.take(cut as u64)) {
                Err(Error::Snapshot(_)) => {}
                other => {
                    let found = format!("{cut} of {} bytes: {other:?}", bytes.len());
                    return Err(self.broken(Promise::Saved, found));
                }
            }
            self.compare(Some(before.clone()))?;
        }
        let mut other = empty.map_err(|e| self.failed(e))?;
        let more = [&bytes[..], &[7; 3]].concat();
        let mut rest = &more[..];
        let from: &mut dyn Read = &mut rest;
        let mut from = from.take(more.len() as u64);
        other.read(&mut from).map_err(|e| self.failed(e))?;
        if rest != [7; 3] {
            let found = format!("{} bytes behind its end were read", 3 - rest.len());
            return Err(self.broken(Promise::Saved, found));
        }
        let written = std::mem::replace(&mut self.store, other);
        self.compare(Some(before))?;
        let mut again = Vec::new();
        self.store.write(&mut again).map_err(|e| self.failed(e))?;
        if again != bytes || written.name() != self.store.name() {
            return Err(self.broken(Promise::Saved, "what was read is written differently"));
        }
        self.operate(dice)
    }

    /// Nothing is left, and it can go on from there.
    fn empties(&mut self, dice: &mut Dice) -> Result<(), ConformanceError> {
        self.append(dice, 40)?;
        self.settle()?;
        self.retain(dice, 0.0)?;
        self.settle()?;
        self.append(dice, 3)?;
        self.retain(dice, 1.0)?;
        self.settle()
    }

    /// What does not fit changes nothing.
    fn refusals(&mut self) -> Result<(), ConformanceError> {
        let mut dice = Dice::new(1);
        self.append(&mut dice, 5)?;
        self.log.push("something impossible".into());
        let (heads, d) = (self.layer.kv_heads, self.layer.head_dim);
        let tensor = |rows: usize, columns: usize| {
            Rows::from(from_f32::<2>(
                vec![0.5; rows * columns],
                [rows, columns],
                self.device,
            ))
        };
        let width = heads * d;
        for (what, keys, values) in [
            ("wide keys", tensor(2, width + 1), tensor(2, width)),
            ("narrow values", tensor(2, width), tensor(2, width - 1)),
            ("more values than keys", tensor(2, width), tensor(3, width)),
        ] {
            if self.store.append(&keys, &values).is_ok() {
                return Err(self.broken(Promise::Refused, format!("{what} were accepted")));
            }
            self.compare(None)?;
        }
        let all: Vec<u32> = (0..5).collect();
        let of_last_head = |list: Vec<u32>| {
            let mut kept = vec![all.clone(); heads];
            kept[heads - 1] = list;
            kept
        };
        for (what, kept) in [
            ("a list too many", vec![all.clone(); heads + 1]),
            ("a list too few", vec![all.clone(); heads - 1]),
            ("a unit that is not there", of_last_head(vec![1, 5])),
            ("a unit named twice", of_last_head(vec![1, 1, 2])),
            ("units out of order", of_last_head(vec![3, 2])),
        ] {
            if self.store.retain(&kept).is_ok() {
                return Err(self.broken(Promise::Refused, format!("{what} was accepted")));
            }
            self.compare(None)?;
        }
        for (from, into) in [(0, 5), (5, 0)] {
            let fold = Fold {
                from,
                into,
                share: 0.5,
            };
            if self.store.fold_values(heads - 1, &[fold]).is_ok() {
                return Err(self.broken(Promise::Refused, format!("{fold:?} was accepted")));
            }
            self.compare(None)?;
        }
        Ok(())
    }

    /// What the store hands out, flat, by head.
    fn read(&self) -> Result<Vec<[Vec<f32>; 2]>, ConformanceError> {
        let one = |head| -> Result<_> {
            let (keys, values) = (self.store.keys(head)?, self.store.values(head)?);
            let due = [self.heads[head].0[0].len(), self.layer.head_dim];
            for dims in [keys.shape(), values.shape()] {
                if dims != due {
                    return Err(Error::shape("what a store hands out", due, dims));
                }
            }
            Ok([keys.into_values()?, values.into_values()?])
        };
        let heads = (0..self.layer.kv_heads).map(one);
        heads.collect::<Result<_>>().map_err(|e| match e {
            Error::Shape { .. } => self.broken(Promise::Content, e.to_string()),
            other => self.failed(other),
        })
    }

    /// Compares everything; `exact` is what has to be there bit for bit, of the first units.
    fn compare(&self, exact: Option<Vec<[Vec<f32>; 2]>>) -> Result<(), ConformanceError> {
        let (heads, d) = (self.layer.kv_heads, self.layer.head_dim);
        for head in 0..heads {
            let (found, due) = (self.store.len(head), self.heads[head].0[0].len());
            if found != due {
                return Err(self.broken(
                    Promise::Content,
                    format!("{found} units in KV head {head}, {due} are due"),
                ));
            }
        }
        let units: usize = self.heads.iter().map(|h| h.0[0].len()).sum();
        if self.store.is_empty() != (units == 0) {
            return Err(self.broken(Promise::Content, format!("empty or not with {units} units")));
        }
        let found = self.read()?;
        let allowed = self.check.tolerance * self.largest;
        for (head, parts) in found.iter().enumerate() {
            for part in 0..2 {
                let what = PARTS[part];
                let due = self.heads[head].0[part].concat();
                let off = parts[part].iter().zip(&due).position(|(a, b)| {
                    // Not `>`: a NaN is wrong, too. The bits of zeros may differ by a sign.
                    a != b && !((a - b).abs() <= allowed)
                });
                if let Some(at) = off {
                    return Err(self.broken(
                        Promise::Content,
                        format!(
                            "{what} of KV head {head}, unit {}: {}, {} is due ({allowed} allowed)",
                            at / d,
                            parts[part][at],
                            due[at]
                        ),
                    ));
                }
                if let Some(exact) = &exact {
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    let old = exact[head][part].len().min(parts[part].len());
                    if bits(&parts[part][..old]) != bits(&exact[head][part]) {
                        return Err(self.broken(
                            Promise::Survivors,
                            format!("{what} of KV head {head} are others than before"),
                        ));
                    }
                }
            }
        }
        self.tiles(&found)
    }

    fn tiles(&self, found: &[[Vec<f32>; 2]]) -> Result<(), ConformanceError> {
        let (heads, d) = (self.layer.kv_heads, self.layer.head_dim);
        let given = (0..heads)
            .filter(|h| self.store.tiles(*h).is_some())
            .count();
        if given != 0 && given != heads {
            return Err(self.broken(
                Promise::Tiles,
                format!("{given} of {heads} heads have tiles"),
            ));
        }
        for (head, parts) in found.iter().enumerate() {
            let Some(tiles) = self.store.tiles(head) else {
                continue;
            };
            let n = parts[0].len() / d;
            if (tiles.len(), tiles.is_empty()) != (n, n == 0) {
                return Err(self.broken(
                    Promise::Tiles,
                    format!("{} units in KV head {head}, {n} are due", tiles.len()),
                ));
            }
            // Ranges of all lengths, aligned to nothing.
            let ranges = [
                0..n,
                n / 3..n / 2,
                n.saturating_sub(1)..n,
                n / 2..n,
                0..n.min(7),
            ];
            self.turned(head, parts, &ranges)?;
            for range in ranges {
                let mut scratch = vec![f32::NAN; range.len() * d];
                let at = range.start * d..range.end * d;
                for (part, what) in PARTS.iter().enumerate() {
                    let rows = match part {
                        0 => tiles.keys(range.clone(), &mut scratch),
                        _ => tiles.values(range.clone(), &mut scratch),
                    };
                    if rows != &parts[part][at.clone()] {
                        return Err(self.broken(
                            Promise::Tiles,
                            format!("{what} {range:?} of KV head {head} differ"),
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Tiles as Hadamard's matrix left them are those of the store's keys and values.
    fn turned(
        &self,
        head: usize,
        parts: &[Vec<f32>; 2],
        ranges: &[Range<usize>],
    ) -> Result<(), ConformanceError> {
        let (block, d) = (self.store.turned_block(), self.layer.head_dim);
        if block == 0 || !d.is_multiple_of(block) {
            let found = format!("blocks of {block} in a head of {d}");
            return Err(self.broken(Promise::Tiles, found));
        }
        for keys in [false, true] {
            let Some(tiles) = self.store.turned_tiles(head, keys) else {
                return Err(self.broken(Promise::Tiles, "tiles, and none that are turned"));
            };
            for range in ranges {
                let mut scratch = vec![f32::NAN; range.len() * d];
                for (part, what) in PARTS.iter().enumerate() {
                    let of_part = &parts[part][range.start * d..range.end * d];
                    let due = match part == 1 || keys {
                        true => turned(of_part, block),
                        false => of_part.to_vec(),
                    };
                    let rows = match part {
                        0 => tiles.keys(range.clone(), &mut scratch),
                        _ => tiles.values(range.clone(), &mut scratch),
                    };
                    let allowed = 1e-5 * self.largest;
                    let near = |(a, b): (&f32, &f32)| a == b || (a - b).abs() <= allowed;
                    if rows.len() != due.len() || !rows.iter().zip(&due).all(near) {
                        let found = format!("turned {what} {range:?} of KV head {head} differ");
                        return Err(self.broken(Promise::Tiles, found));
                    }
                }
            }
        }
        Ok(())
    }

    fn bytes(&self) -> Result<(), ConformanceError> {
        let units: usize = self.heads.iter().map(|h| h.0[0].len()).sum();
        let numbers = |units: usize| 2.0 * (units * self.layer.head_dim) as f64;
        let reserve = self.layer.kv_heads * self.check.reserve;
        let most = numbers(units) * self.check.bytes_per_value + numbers(reserve) * 4.0;
        let found = self.store.bytes();
        if found as f64 > most || (units > 0 && self.store.total_bytes() == 0) {
            return Err(self.broken(
                Promise::Freed,
                format!("{found} bytes for {units} units, {most} at most are due"),
            ));
        }
        Ok(())
    }
}
