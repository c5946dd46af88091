//! Positions and scores of units in plain loops, and what others must be like.

use super::{ConformanceError, Dice, Promise};
use crate::{Best, Compute, Error, KeptUnits, Result, Rows, UnitLists};
use burn::tensor::{Device, Int, Tensor, TensorData};
use std::{ops::Range, sync::Arc};

/// [`UnitLists`] in host memory, which sort everything: what others are compared with.
#[derive(Debug, Clone)]
pub struct PlainLists {
    device: Device,
    /// By KV head, position and score of each unit.
    heads: Vec<Vec<(u32, f32)>>,
    wrong: bool,
}

impl PlainLists {
    /// Of heads without units; what they keep is said on `device`.
    pub fn new(kv_heads: usize, device: &Device) -> Self {
        Self {
            device: device.clone(),
            heads: vec![Vec::new(); kv_heads],
            wrong: false,
        }
    }

    fn check(&mut self) {
        let mut scores = self.heads.iter().flatten();
        self.wrong |= scores.any(|(_, score)| score.is_nan());
    }
}

impl UnitLists for PlainLists {
    fn put(&mut self, positions: &[&[u32]], scores: &[&[f32]]) -> Result<()> {
        let lens = |lists: &[usize]| format!("{lists:?}");
        let found: Vec<usize> = positions.iter().map(|list| list.len()).collect();
        let due: Vec<usize> = scores.iter().map(|list| list.len()).collect();
        if found != due || found.len() != self.heads.len() {
            return Err(Error::shape("lists of units", lens(&due), lens(&found)));
        }
        let pairs = positions.iter().zip(scores);
        let pairs = pairs.map(|(p, s)| p.iter().copied().zip(s.iter().copied()).collect());
        self.heads = pairs.collect();
        self.wrong = false;
        self.check();
        Ok(())
    }

    fn append(&mut self, first: usize, scores: &Rows) -> Result<()> {
        let heads = self.heads.len();
        scores.expect("scores of new units", [scores.rows(), heads])?;
        for (i, row) in scores.values()?.chunks_exact(heads).enumerate() {
            for (head, score) in self.heads.iter_mut().zip(row) {
                head.push(((first + i) as u32, *score));
            }
        }
        self.check();
        Ok(())
    }

    fn keep(&mut self, best: &[Best]) -> Result<KeptUnits> {
        if best.len() != self.heads.len() {
            return Err(Error::shape("budgets", [self.heads.len()], [best.len()]));
        }
        if let Some((best, head)) =
            (best.iter().zip(&self.heads)).find(|(best, head)| best.keep > head.len())
        {
            return Err(Error::shape("units to keep", [head.len()], [best.keep]));
        }
        let mut kept = Vec::new();
        for (head, best) in self.heads.iter_mut().zip(best) {
            let len = head.len();
            let score = |unit: usize| {
                let free = (best.first..len - best.newest.min(len)).contains(&unit);
                match (free, head[unit].1) {
                    (false, _) => f32::INFINITY,
                    // No rank at all.
                    (true, score) if score.is_nan() => f32::NAN,
                    (true, score) => score + 0.0,
                }
            };
            let mut order: Vec<usize> = (0..len).collect();
            order.sort_by(|a, b| {
                let (a, b) = (score(*a), score(*b));
                (a.is_nan().cmp(&b.is_nan()))
                    .then(b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal))
            });
            order.truncate(best.keep);
            order.sort_unstable();
            kept.extend(order.iter().map(|unit| *unit as i32));
            *head = order.iter().map(|unit| head[*unit]).collect();
        }
        let lens = self.heads.iter().map(Vec::len).collect();
        // No tensor is empty.
        kept.push(0);
        let many = kept.len();
        let units = TensorData::new(kept, [many]);
        let units = Tensor::<1, Int>::from_data(units, &self.device);
        Ok(KeptUnits::new(lens, units))
    }

    fn read(&self) -> Result<Vec<(Vec<u32>, Vec<f32>)>> {
        if self.wrong {
            return Err(Error::NotFinite {
                what: "a score",
                at: "a KV head".into(),
            });
        }
        let heads = self.heads.iter();
        Ok(heads.map(|head| head.iter().copied().unzip()).collect())
    }

    fn bytes(&self) -> usize {
        8 * self.heads.iter().map(Vec::len).sum::<usize>()
    }

    fn fork(&self) -> Box<dyn UnitLists> {
        Box::new(self.clone())
    }
}

/// Compares what `compute` does with positions and scores ([`Compute::unit_lists`]) with [`PlainLists`], number by
/// number: random scores, equal ones, zeros of both signs and infinities, heads of different lengths, chunks and single
/// units, forks.
///
/// # Errors
/// [`ConformanceError`] for the first broken promise, and where there are no lists.
pub fn check_lists(compute: &Arc<dyn Compute>, seeds: Range<u64>) -> Result<(), ConformanceError> {
    for seed in seeds {
        let mut dice = Dice::new(seed);
        let kv_heads = dice.between(1, 4);
        let Some(lists) = compute.unit_lists(kv_heads) else {
            let what = format!("{} keeps no lists of units", compute.name());
            return Err(ConformanceError::Unusable(what));
        };
        let plain = Box::new(PlainLists::new(kv_heads, compute.device()));
        let subject = format!("lists of units by {}", compute.name());
        let case = format!("seed {seed}");
        match compared(&**compute, kv_heads, [plain, lists], &mut dice) {
            Ok(None) => {}
            Ok(Some(found)) => {
                return Err(ConformanceError::Broken {
                    subject,
                    promise: Promise::Arithmetic,
                    case,
                    found,
                });
            }
            Err(source) => {
                return Err(ConformanceError::Failed {
                    subject,
                    case,
                    source: Box::new(source),
                });
            }
        }
    }
    Ok(())
}

/// A score that is likely to have equals.
fn score(dice: &mut Dice, few: bool) -> f32 {
    match dice.between(0, 20) {
        0 => -0.0,
        1 => 0.0,
        2 => f32::INFINITY,
        3 => f32::NEG_INFINITY,
        4 => f32::MIN_POSITIVE / 8.0,
        _ if few => dice.between(0, 6) as f32 - 3.0,
        _ => dice.value() * 10f32.powi(dice.between(0, 8) as i32 - 4),
    }
}

/// Numbers that are the same, bit for bit.
fn same(a: &(Vec<u32>, Vec<f32>), b: &(Vec<u32>, Vec<f32>)) -> bool {
    let bits = |list: &[f32]| list.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    a.0 == b.0 && bits(&a.1) == bits(&b.1)
}

/// What is wrong with the second lists, if the first are right.
fn compared(
    compute: &dyn Compute,
    kv_heads: usize,
    [mut plain, mut lists]: [Box<dyn UnitLists>; 2],
    dice: &mut Dice,
) -> Result<Option<String>> {
    let few = dice.chance(0.5);
    let mut seen = dice.between(0, 1) * dice.between(0, 400);
    if seen > 0 {
        let mut of_head = |_| {
            let len = dice.between(0, seen);
            let positions: Vec<u32> = (0..len as u32).collect();
            let scores: Vec<f32> = (0..len).map(|_| score(dice, few)).collect();
            (positions, scores)
        };
        let (positions, scores): (Vec<_>, Vec<_>) = (0..kv_heads).map(&mut of_head).unzip();
        let positions: Vec<&[u32]> = positions.iter().map(Vec::as_slice).collect();
        let scores: Vec<&[f32]> = scores.iter().map(Vec::as_slice).collect();
        for lists in [&mut plain, &mut lists] {
            lists.put(&positions, &scores)?;
        }
    }
    for turn in 0..dice.between(1, 8) {
        let new = match dice.chance(0.4) {
            true => 1,
            false => dice.between(2, 700),
        };
        let scores: Vec<f32> = (0..new * kv_heads).map(|_| score(dice, few)).collect();
        let scores = compute.rows(scores, kv_heads)?;
        for lists in [&mut plain, &mut lists] {
            lists.append(seen, &scores)?;
        }
        seen += new;
        if dice.chance(0.3) {
            // One of the two goes on, and is not changed by what becomes of the other.
            let fork = lists.fork();
            lists.append(seen, &compute.rows(vec![1.0; kv_heads], kv_heads)?)?;
            lists = fork;
        }
        if dice.chance(0.7) {
            let lens: Vec<usize> = plain.read()?.iter().map(|(list, _)| list.len()).collect();
            let best = lens.iter().map(|len| {
                let keep = match dice.between(0, 5) {
                    0 => *len,
                    1 => len - len.min(&1),
                    _ => dice.between(0, *len),
                };
                let first = dice.between(0, keep);
                Best {
                    keep,
                    first: if dice.chance(0.5) { first } else { 0 },
                    newest: dice.between(0, keep - first),
                }
            });
            let best: Vec<Best> = best.collect();
            let (due, found) = (plain.keep(&best)?, lists.keep(&best)?);
            if found.lens() != due.lens() || found.read()? != due.read()? {
                let (found, due) = (found.read()?, due.read()?);
                return Ok(Some(format!(
                    "turn {turn}, {best:?}: {found:?}, {due:?} are due"
                )));
            }
        }
        let (due, found) = (plain.read()?, lists.read()?);
        if let Some(head) = (0..kv_heads).find(|head| !same(&due[*head], &found[*head])) {
            let (due, found) = (&due[head], &found[head]);
            return Ok(Some(format!(
                "turn {turn}, KV head {head}: {found:?}, {due:?} are due"
            )));
        }
    }
    let none = Best {
        keep: 0,
        first: 0,
        newest: 0,
    };
    let many = Best {
        keep: seen + 9,
        ..none
    };
    let wrong = [vec![none; kv_heads + 1], vec![many; kv_heads]];
    if let Some(wrong) = wrong.iter().find(|wrong| lists.keep(wrong).is_ok()) {
        return Ok(Some(format!("{wrong:?} is not refused")));
    }
    if lists
        .put(&vec![&[1][..]; kv_heads], &vec![&[][..]; kv_heads])
        .is_ok()
    {
        return Ok(Some("positions without scores are not refused".into()));
    }
    let nan = compute.rows(vec![f32::NAN; kv_heads], kv_heads)?;
    lists.append(seen, &nan)?;
    Ok(match lists.read() {
        Err(Error::NotFinite { .. }) => None,
        other => Some(format!("{other:?} of a score that is NaN")),
    })
}
