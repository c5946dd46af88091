//! What everything that computes must satisfy.

use super::{ConformanceError, Dice, Promise};
use crate::{
    Attention, Compute, DType, Error, KvStore, LayerSpec, Observation, Observe, Placement,
    QuantLayout, Quantization, QuantizedStore, Queries, Result, RopeConfig, RopeTable, Rotation,
    Rows, Sight, TableRows, View, Views, Weight,
};
use std::{ops::Range, sync::Arc};

/// Compares everything that `compute` computes with plain loops in double precision, on random numbers
/// of random dimensions.
///
/// `tolerance` is how far a number may be off, as a share of the sum of the magnitudes that it is made
/// of; 2e-5 is right for 32-bit sums.
///
/// # Errors
/// [`ConformanceError`] for the first broken promise.
pub fn check_compute(
    compute: &Arc<dyn Compute>,
    tolerance: f64,
    seeds: Range<u64>,
) -> Result<(), ConformanceError> {
    for seed in seeds {
        let check = Checking {
            compute,
            tolerance,
            seed,
        };
        let dice = || Dice::new(seed);
        for (what, checked) in [
            ("products", check.products(&mut dice())),
            ("perceptrons", check.perceptrons(&mut dice())),
            ("norms", check.norms(&mut dice())),
            ("gates", check.gates(&mut dice())),
            ("rotations", check.rotations(&mut dice())),
            ("attention", check.attention(&mut dice())),
            ("selection", check.selection(&mut dice())),
            ("the largest of rows", check.largest(&mut dice())),
            ("surprisal", check.surprisal(&mut dice())),
            ("pieces of work", check.pieces(&mut dice())),
        ] {
            checked.map_err(|off| check.error(what, off))?;
        }
    }
    Ok(())
}

/// What is wrong: a number, or an error where none is due.
enum Off {
    Number(String),
    Failed(Error),
}

impl From<Error> for Off {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

type Checked = std::result::Result<(), Off>;

struct Checking<'a> {
    compute: &'a Arc<dyn Compute>,
    tolerance: f64,
    seed: u64,
}

/// A sum, and that of the magnitudes in it.
#[derive(Clone, Copy, Default)]
struct Sum(f64, f64);

impl Sum {
    fn of(terms: impl IntoIterator<Item = f64>) -> Self {
        terms
            .into_iter()
            .fold(Self::default(), |sum, x| Self(sum.0 + x, sum.1 + x.abs()))
    }
}

fn dot(a: &[f32], b: &[f32]) -> Sum {
    Sum::of(a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)))
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

impl Checking<'_> {
    fn error(&self, what: &str, off: Off) -> ConformanceError {
        let subject = format!("{what} by {}", self.compute.name());
        let case = format!("seed {}", self.seed);
        match off {
            Off::Number(found) => ConformanceError::Broken {
                subject,
                promise: Promise::Arithmetic,
                case,
                found,
            },
            Off::Failed(source) => ConformanceError::Failed {
                subject,
                case,
                source: Box::new(source),
            },
        }
    }

    fn near(&self, what: &str, found: &[f32], due: &[Sum]) -> Checked {
        let wrong = found.iter().zip(due).position(|(found, due)| {
            let off = (f64::from(*found) - due.0).abs();
            // Not `>`: a NaN is wrong, too.
            f64::from(*found) != due.0 && !(off <= self.tolerance * due.1.max(1.0))
        });
        match wrong {
            None if found.len() == due.len() => Ok(()),
            None => Err(Off::Number(format!(
                "{what}: {} numbers, {} are due",
                found.len(),
                due.len()
            ))),
            Some(at) => Err(Off::Number(format!(
                "{what}: {} at number {at}, {} is due",
                found[at], due[at].0
            ))),
        }
    }

    fn refused<T>(&self, what: &str, result: Result<T>) -> Checked {
        match result {
            Err(
                Error::Shape { .. }
                | Error::NotSupported { .. }
                | Error::NotFinite { .. }
                | Error::UnknownToken { .. },
            ) => Ok(()),
            Err(other) => Err(other.into()),
            Ok(_) => Err(Off::Number(format!("{what} was accepted"))),
        }
    }

    fn rows(&self, values: &[f32], width: usize) -> Result<Rows> {
        self.compute.rows(values.to_vec(), width)
    }

    fn products(&self, dice: &mut Dice) -> Checked {
        for dtype in DType::ALL {
            if !self.compute.computes_with(dtype) {
                let weight = self.weight(dice, dtype, 2, 256).0;
                self.refused(
                    "a type that is not computed with",
                    self.compute.matrix(vec![weight]),
                )?;
                continue;
            }
            let columns = match dtype.block() {
                1 => dice.between(1, 70),
                block => block * dice.between(1, 3),
            };
            let heights = [dice.between(1, 40), dice.between(1, 9)];
            let (weights, values): (Vec<_>, Vec<_>) = heights
                .map(|rows| self.weight(dice, dtype, rows, columns))
                .into_iter()
                .unzip();
            let values = values.concat();
            let matrix = self.compute.matrix(weights)?;
            let outputs = heights[0] + heights[1];
            if matrix.shape() != [outputs, columns] {
                return Err(Off::Number(format!("a matrix of {:?}", matrix.shape())));
            }
            let what = format!("{dtype} [{outputs}, {columns}]");
            let exact = |values: &[f32]| -> Vec<Sum> {
                values.iter().map(|x| Sum(f64::from(*x), 0.0)).collect()
            };
            self.near(&what, &matrix.values()?, &exact(&values))?;
            let ids = [outputs as u32 - 1, 0, outputs as u32 / 2];
            let row = |id: &u32| values[*id as usize * columns..][..columns].to_vec();
            let due: Vec<f32> = ids.iter().flat_map(row).collect();
            self.near(&what, &matrix.rows(&ids)?.values()?, &exact(&due))?;
            self.refused("a row that is not there", matrix.rows(&[outputs as u32]))?;
            // Cut where no matrix ends, too.
            let cut = dice.between(1, outputs - 1);
            for tokens in [1, 3, dice.between(9, 40)] {
                let x = dice.values(tokens * columns);
                let rows = self.rows(&x, columns)?;
                let parts = matrix.apply_parts(&rows, &[cut, outputs - cut])?;
                let (mut found, mut due) = (Vec::new(), Vec::new());
                for (part, outs) in parts.iter().zip([0..cut, cut..outputs]) {
                    found.extend_from_slice(&part.values()?);
                    for x in x.chunks(columns) {
                        let w = |out: usize| &values[out * columns..][..columns];
                        due.extend(outs.clone().map(|out| dot(x, w(out))));
                    }
                }
                self.near(&what, &found, &due)?;
                self.refused(
                    "parts that do not add up",
                    matrix.apply_parts(&rows, &[outputs + 1]),
                )?;
            }
            let narrow = self.rows(&dice.values(columns + 1), columns + 1)?;
            self.refused("an input that is too wide", matrix.apply(&narrow))?;
        }
        self.refused("a matrix of no parts", self.compute.matrix(Vec::new()))?;
        let empty = Weight::from_f32(&[], 2, 0);
        self.refused("a matrix without columns", self.compute.matrix(vec![empty]))?;
        let [one, two] = [1, 2].map(|columns| Weight::from_f32(&vec![1.0; columns], 1, columns));
        self.refused("different columns", self.compute.matrix(vec![one, two]))
    }

    /// Random numbers as they lie in a file, and what they stand for.
    fn weight(
        &self,
        dice: &mut Dice,
        dtype: DType,
        rows: usize,
        columns: usize,
    ) -> (Weight, Vec<f32>) {
        let numbers = rows * columns;
        let mut values = dice.values(numbers);
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => {
                let len = numbers / dtype.block() * dtype.block_bytes();
                let byte = |at: usize| {
                    let random = dice.between(0, 255) as u8;
                    // Every 16-bit number among them is then below 2.
                    random & if at % 2 == 1 { 0xbb } else { 0xff }
                };
                (0..len).map(byte).collect()
            }
        };
        dtype.decode(&bytes, &mut values);
        let weight = Weight {
            dtype,
            rows,
            columns,
            bytes: bytes.into(),
        };
        (weight, values)
    }

    fn perceptrons(&self, dice: &mut Dice) -> Checked {
        let widths = [dice.between(1, 30), dice.between(1, 9), dice.between(1, 9)];
        let (inner, outputs) = (dice.between(1, 50), dice.between(1, 9));
        let inputs = widths.iter().sum();
        let (first, second) = (dice.values(inner * inputs), dice.values(outputs * inner));
        let weight = Weight::from_f32(&first, inner, inputs);
        let perceptron = self.compute.perceptron(weight, second.clone())?;
        if perceptron.shape() != [inputs, inner, outputs] {
            return Err(Off::Number(format!(
                "a perceptron of {:?}",
                perceptron.shape()
            )));
        }
        for tokens in [1, dice.between(2, 30)] {
            let xs = widths.map(|width| dice.values(tokens * width));
            let mut due = Vec::new();
            for token in 0..tokens {
                let x = xs.iter().zip(widths);
                let x: Vec<f32> = x
                    .flat_map(|(x, width)| &x[token * width..(token + 1) * width])
                    .copied()
                    .collect();
                let between = first.chunks(inputs).map(|row| silu(dot(row, &x).0));
                let between: Vec<f64> = between.collect();
                due.extend(
                    second.chunks(inner).map(|row| {
                        Sum::of(row.iter().zip(&between).map(|(a, b)| f64::from(*a) * b))
                    }),
                );
            }
            let parts = xs.iter().zip(widths).map(|(x, width)| self.rows(x, width));
            let parts: Vec<Rows> = parts.collect::<Result<_>>()?;
            let parts: Vec<&Rows> = parts.iter().collect();
            let found = perceptron.apply(&parts)?;
            found.expect("a perceptron", [tokens, outputs])?;
            self.near("a perceptron", &found.into_values()?, &due)?;
            self.refused("a part too few", perceptron.apply(&parts[1..]))?;
        }
        Ok(())
    }

    fn norms(&self, dice: &mut Dice) -> Checked {
        let (rows, width) = (dice.between(1, 20), dice.between(1, 150));
        let parts = [(); 2].map(|()| dice.values(rows * width));
        let gain = dice.values(width);
        let [x, y] = &parts;
        let epsilon = 1e-5;
        let normed = |x: &[f32]| -> Vec<Sum> {
            let square = dot(x, x).0 / x.len() as f64;
            let root = (square + f64::from(epsilon)).sqrt();
            let pairs = x.iter().zip(&gain);
            pairs
                .map(|(x, gain)| Sum(f64::from(*x) / root * f64::from(*gain), 1.0))
                .collect()
        };
        let due: Vec<Sum> = x.chunks(width).flat_map(normed).collect();
        let (own, gains) = (self.rows(x, width)?, self.rows(&gain, width)?);
        let found = self.compute.norm(&own, &gains, epsilon)?;
        self.near("a norm", &found.values()?, &due)?;
        let sum: Vec<f32> = x.iter().zip(y).map(|(x, y)| x + y).collect();
        let due: Vec<Sum> = sum.chunks(width).flat_map(normed).collect();
        let mut added = own.clone();
        let other = self.rows(y, width)?;
        let found = self.compute.add_norm(&mut added, &other, &gains, epsilon)?;
        self.near("the norm of a sum", &found.values()?, &due)?;
        let exact = |x: &[f32]| -> Vec<Sum> { x.iter().map(|x| Sum((*x).into(), 0.0)).collect() };
        self.near("a sum", &added.values()?, &exact(&sum))?;
        self.near("what was copied before", &own.values()?, &exact(x))?;
        let wide = self.rows(&dice.values(width + 1), width + 1)?;
        self.refused("a wide gain", self.compute.norm(&own, &wide, epsilon))
    }

    fn gates(&self, dice: &mut Dice) -> Checked {
        let (rows, n) = (dice.between(1, 20), dice.between(1, 80));
        let x = dice.values(rows * 2 * n);
        let due = x.chunks(2 * n).flat_map(|row| {
            let (gate, up) = row.split_at(n);
            let pairs = gate.iter().zip(up);
            pairs.map(|(gate, up)| Sum(silu(f64::from(*gate)) * f64::from(*up), 1.0))
        });
        let due: Vec<Sum> = due.collect();
        let found = self.compute.gate(&self.rows(&x, 2 * n)?)?;
        self.near("gates", &found.values()?, &due)?;
        let odd = self.rows(&[1.0; 3], 3)?;
        self.refused("half a gate", self.compute.gate(&odd))
    }

    fn rotations(&self, dice: &mut Dice) -> Checked {
        let dim = 2 * dice.between(1, 16);
        let rotary = 2 * dice.between(1, dim / 2);
        let factor = dice.pick(&[1.0, 1.19]);
        let table = table_of(dice, rotary, factor, 60);
        let (groups, per_group) = (dice.between(1, 3), dice.between(1, 3));
        let tokens = dice.between(1, 12);
        let width = groups * per_group * dim;
        let x = dice.values(tokens * width);
        let first: Vec<usize> = (0..groups).map(|_| dice.between(0, 40)).collect();
        let each: Vec<u32> = (0..tokens).map(|_| dice.between(0, 59) as u32).collect();
        let half = rotary / 2;
        let due = |row: &dyn Fn(usize, usize) -> usize| -> Vec<Sum> {
            let mut due = Vec::new();
            for (at, head) in x.chunks(dim).enumerate() {
                let (token, group) = (
                    at / (groups * per_group),
                    at % (groups * per_group) / per_group,
                );
                let at = row(token, group) * half;
                for i in 0..dim {
                    let of = |from: &[f32], i: usize| f64::from(from[at + i]);
                    let (cos, sin) = (table.cos(), table.sin());
                    due.push(if i < half {
                        let (a, b) = (f64::from(head[i]), f64::from(head[half + i]));
                        Sum::of([a * of(cos, i), -b * of(sin, i)])
                    } else if i < rotary {
                        let (a, b) = (f64::from(head[i - half]), f64::from(head[i]));
                        Sum::of([b * of(cos, i - half), a * of(sin, i - half)])
                    } else {
                        Sum(f64::from(head[i]), 0.0)
                    });
                }
            }
            due
        };
        let cases = [
            (
                TableRows::From(&first),
                due(&|token, group| first[group] + token),
            ),
            (
                TableRows::Each(&each),
                due(&|token, _| each[token] as usize),
            ),
        ];
        for (rows, due) in cases {
            let by = Rotation {
                table: &table,
                head_dim: dim,
                rows,
                inverse: false,
            };
            let turned = self.compute.rotate(self.rows(&x, width)?, &by)?;
            self.near("a rotation", &turned.values()?, &due)?;
            let back = self.compute.rotate(turned, &by.undone())?;
            let due: Vec<Sum> = x.iter().map(|x| Sum(f64::from(*x), 0.1)).collect();
            self.near("a rotation undone", &back.values()?, &due)?;
        }
        let wide = table_of(dice, dim + 2, factor, 60);
        for (what, table, rows) in [
            ("a row beyond the table", &table, TableRows::From(&[60])),
            ("no group of heads", &table, TableRows::From(&[])),
            ("a table wider than a head", &wide, TableRows::From(&[0])),
        ] {
            let by = Rotation {
                table,
                head_dim: dim,
                rows,
                inverse: false,
            };
            self.refused(what, self.compute.rotate(self.rows(&x, width)?, &by))?;
        }
        Ok(())
    }

    fn attention(&self, dice: &mut Dice) -> Checked {
        let kv_heads = dice.between(1, 3);
        let layer = LayerSpec {
            index: 0,
            layers: 1,
            heads: kv_heads * dice.pick(&[1, 2, 4]),
            kv_heads,
            head_dim: 2 * dice.between(1, 20),
        };
        let (d, width) = (layer.head_dim, kv_heads * layer.head_dim);
        let old = dice.between(0, 70);
        // Of codes, what a store hands out is what is attended to.
        let coded = dice.chance(0.4).then(|| Quantization {
            bits: dice.pick(&[2, 3, 4, 8]),
            layout: dice.pick(&[QuantLayout::PerToken, QuantLayout::Kivi]),
            group: dice.between(1, 20),
            residual: dice.between(0, 9),
            first: dice.between(0, 5),
            hadamard: dice.chance(0.7),
        });
        let mut store = match coded {
            None => self.compute.store(&layer, DType::F32)?,
            Some(config) => {
                let place = Placement {
                    compute: Arc::clone(self.compute),
                    dtype: DType::F32,
                };
                QuantizedStore::boxed(&layer, &place, config)?
            }
        };
        let mut kept: Vec<[Vec<f32>; 2]> = vec![Default::default(); kv_heads];
        let mut append = |store: &mut dyn KvStore, dice: &mut Dice, n: usize| -> Checked {
            let parts = [(); 2].map(|()| dice.values(n * width));
            let [keys, values] = [0, 1].map(|part| self.rows(&parts[part], width));
            store.append(&keys?, &values?)?;
            for (head, kept) in kept.iter_mut().enumerate() {
                for (kept, part) in kept.iter_mut().zip(&parts) {
                    let rows = part.chunks(width).map(|row| &row[head * d..(head + 1) * d]);
                    kept.extend(rows.flatten());
                }
            }
            Ok(())
        };
        append(&mut *store, dice, old)?;
        store.settle()?;
        // Heads of different lengths.
        let lists: Vec<Vec<u32>> = (0..kv_heads)
            .map(|_| (0..old as u32).filter(|_| dice.chance(0.7)).collect())
            .collect();
        let many = dice.between(3, 40);
        let tokens = dice.pick(&[1, 2, many]);
        store.retain(&lists)?;
        let mut rest = vec![[Vec::new(), Vec::new()]; kv_heads];
        append(&mut *store, dice, tokens)?;
        for ((rest, kept), list) in rest.iter_mut().zip(&kept).zip(&lists) {
            let units = list.iter().map(|u| *u as usize).chain(old..old + tokens);
            for unit in units {
                for part in 0..2 {
                    rest[part].extend_from_slice(&kept[part][unit * d..(unit + 1) * d]);
                }
            }
        }
        if coded.is_some() {
            for (head, rest) in rest.iter_mut().enumerate() {
                *rest = [
                    store.keys(head)?.into_values()?,
                    store.values(head)?.into_values()?,
                ];
            }
        }
        let rotary = 2 * dice.between(1, d / 2);
        let table = table_of(dice, rotary, 1.0, old + tokens);
        let rotation = dice.chance(0.5).then_some(&table);
        let plain: Vec<Vec<f32>> = rest.iter().map(|[keys, _]| keys.clone()).collect();
        if let Some(table) = rotation {
            for [keys, _] in &mut rest {
                for (row, key) in keys.chunks_mut(d).enumerate() {
                    turned(key, table, row);
                }
            }
        }
        let over = Attention {
            layer,
            store: &*store,
            scale: dice.pick(&[1.0 / (d as f32).sqrt(), 0.3]),
            rotation,
            sight: None,
        };
        let q = dice.values(tokens * layer.heads * d);
        let (mut due, mut weights, mut largest) = (Vec::new(), Vec::new(), Vec::new());
        let last = dice.between(0, tokens);
        let factors: Vec<f32> = dice.values(last).iter().map(|x| x.abs()).collect();
        let mut most_paid = [Vec::new(), Vec::new()];
        for head in 0..kv_heads {
            let n = rest[head][0].len() / d;
            largest.push(vec![f64::NEG_INFINITY; n]);
            for _ in 0..layer.group() {
                weights.push(vec![0.0; n]);
                most_paid.iter_mut().for_each(|m| m.push(vec![0.0f64; n]));
            }
        }
        for token in 0..tokens {
            for head in 0..layer.heads {
                let q = &q[(token * layer.heads + head) * d..][..d];
                let [keys, values] = &rest[head / layer.group()];
                let seen = keys.len() / d - tokens + token + 1;
                let logit = |unit: usize| dot(q, &keys[unit * d..][..d]).0 * f64::from(over.scale);
                let logits: Vec<f64> = (0..seen).map(logit).collect();
                let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = logits.iter().map(|x| (x - most).exp()).sum();
                for feature in 0..d {
                    let terms = logits.iter().enumerate().map(|(unit, x)| {
                        (x - most).exp() / sum * f64::from(values[unit * d + feature])
                    });
                    due.push(Sum::of(terms));
                }
                if token >= tokens - last {
                    let factor = f64::from(factors[token + last - tokens]);
                    for (unit, x) in logits.iter().enumerate() {
                        let weight = (x - most).exp() / sum;
                        weights[head][unit] += weight;
                        for (paid, factor) in most_paid.iter_mut().zip([1.0, factor]) {
                            paid[head][unit] = paid[head][unit].max(factor * weight);
                        }
                        let largest = &mut largest[head / layer.group()][unit];
                        *largest = largest.max(*x);
                    }
                }
            }
        }
        let rows = self.rows(&q, layer.heads * d)?;
        let found = self.compute.attend(rows.clone(), &over)?;
        self.near("attention", &found.values()?, &due)?;
        let [plain_most, factored] = most_paid;
        for (what, due) in [
            (Observation::Weights, weights.clone()),
            // All of it is seen where it stands.
            (Observation::NearWeights, weights),
            (Observation::MaxLogits, largest),
            (Observation::MaxWeights, plain_most),
            (Observation::MaxWeightsByInput, factored),
        ] {
            let (queries, by) = (Queries::Last(last), &factors[..]);
            let factors = (what == Observation::MaxWeightsByInput).then_some(by);
            let what = Observe { queries, what };
            self.refused(
                "a factor too many",
                (self.compute).observe(&rows, &over, what, Some(&[1.0; 200])),
            )?;
            let found = self.compute.observe(&rows, &over, what, factors)?;
            let what = what.what;
            let due: Vec<Sum> = due.iter().flatten().map(|x| Sum(*x, 4.0)).collect();
            self.near(&format!("{what:?}"), &found.per_head.concat(), &due)?;
        }
        self.sight(dice, &q, &plain, &rest, &over)?;
        let wide = self.rows(&dice.values(layer.heads * d + 1), layer.heads * d + 1)?;
        self.refused("wide queries", self.compute.attend(wide, &over))?;
        let turned = table_of(dice, d + 2, 1.0, old + tokens);
        let over = Attention {
            rotation: Some(&turned),
            ..over
        };
        self.refused(
            "a table wider than a head",
            self.compute.attend(rows, &over),
        )
    }

    /// Queries that see less than everything before them, and surveys of those that see all.
    fn sight(
        &self,
        dice: &mut Dice,
        q: &[f32],
        plain: &[Vec<f32>],
        rest: &[[Vec<f32>; 2]],
        over: &Attention<'_>,
    ) -> Checked {
        let (layer, d) = (over.layer, over.layer.head_dim);
        let tokens = q.len() / (layer.heads * d);
        let lens: Vec<usize> = plain.iter().map(|keys| keys.len() / d).collect();
        let block = dice.between(1, tokens + 3);
        let views = views_of(dice, block, tokens, &layer, &lens);
        let views = match over.rotation.is_some() && dice.chance(0.5) {
            true => views.placed(lens.iter().map(|n| places(dice, *n)).collect()),
            false => views,
        };
        let mut seen_keys: Vec<Vec<f32>> = rest.iter().map(|[keys, _]| keys.clone()).collect();
        if let (Some(table), Some(places)) = (over.rotation, views.places()) {
            seen_keys = plain.to_vec();
            for (keys, places) in seen_keys.iter_mut().zip(places) {
                for (key, place) in keys.chunks_exact_mut(d).zip(places) {
                    turned(key, table, *place as usize);
                }
            }
        }
        let far = dice.values(q.len());
        let last = dice.between(0, tokens);
        let factors: Vec<f32> = dice.values(last).iter().map(|x| x.abs()).collect();
        let zeros = |head: usize| vec![0.0f64; lens[head / layer.group()]];
        let sums = || (0..layer.heads).map(zeros).collect::<Vec<_>>();
        let (mut due, mut paid, mut near) = (Vec::new(), sums(), sums());
        let (mut by_unit, mut by_distance) = (sums(), sums());
        let mut most_paid = [sums(), sums()];
        let mut largest: Vec<_> = lens.iter().map(|n| vec![f64::NEG_INFINITY; *n]).collect();
        for token in 0..tokens {
            for head in 0..layer.heads {
                let store = head / layer.group();
                let own = lens[store] - tokens + token;
                let of = |q: &[f32], keys: &[f32], unit: usize| {
                    let q = &q[(token * layer.heads + head) * d..][..d];
                    dot(q, &keys[unit * d..][..d]).0 * f64::from(over.scale)
                };
                let [keys, values] = &rest[store];
                let logit = |unit: usize| match seen(views.of(head, layer.heads, token), own, unit)
                {
                    None => f64::NEG_INFINITY,
                    Some(false) => of(q, &seen_keys[store], unit),
                    Some(true) => of(&far, &plain[store], unit),
                };
                let weights = |logits: &[f64]| -> Vec<f64> {
                    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = logits.iter().map(|x| (x - most).exp()).sum();
                    let weight = |x: &f64| match most.is_finite() {
                        true => (x - most).exp() / sum,
                        false => 0.0,
                    };
                    logits.iter().map(weight).collect()
                };
                let logits: Vec<f64> = (0..=own).map(logit).collect();
                let weight = weights(&logits);
                for feature in 0..d {
                    let terms = weight.iter().enumerate();
                    due.push(Sum::of(terms.map(|(unit, weight)| {
                        weight * f64::from(values[unit * d + feature])
                    })));
                }
                if token >= tokens - last {
                    let all: Vec<f64> = (0..=own).map(|unit| of(q, keys, unit)).collect();
                    for (unit, all) in weights(&all).into_iter().enumerate() {
                        by_unit[head][unit] += all;
                        by_distance[head][own - unit] += all;
                        paid[head][unit] += weight[unit];
                        if seen(views.of(head, layer.heads, token), own, unit) == Some(false) {
                            near[head][unit] += weight[unit];
                        }
                        let factor = f64::from(factors[token + last - tokens]);
                        for (paid, factor) in most_paid.iter_mut().zip([1.0, factor]) {
                            paid[head][unit] = paid[head][unit].max(factor * weight[unit]);
                        }
                        let largest = &mut largest[store][unit];
                        *largest = largest.max(logits[unit]);
                    }
                }
            }
        }
        let width = layer.heads * d;
        let (q, far) = (self.rows(q, width)?, self.rows(&far, width)?);
        let over = Attention {
            sight: Some(Sight {
                views: &views,
                far: Some(&far),
            }),
            ..*over
        };
        let found = self.compute.attend(q.clone(), &over)?;
        self.near("attention to what is seen", &found.values()?, &due)?;
        let sums =
            |due: &[Vec<f64>]| -> Vec<Sum> { due.iter().flatten().map(|x| Sum(*x, 4.0)).collect() };
        let queries = Queries::Last(last);
        for (what, due) in [
            (Observation::Weights, &paid),
            (Observation::NearWeights, &near),
            (Observation::MaxLogits, &largest),
            (Observation::MaxWeights, &most_paid[0]),
            (Observation::MaxWeightsByInput, &most_paid[1]),
        ] {
            let factors = (what == Observation::MaxWeightsByInput).then_some(&factors[..]);
            let found = (self.compute).observe(&q, &over, Observe { queries, what }, factors)?;
            self.near(
                &format!("{what:?} of what is seen"),
                &found.per_head.concat(),
                &sums(due),
            )?;
        }
        match self.compute.survey(&q, &over, last) {
            Err(Error::NotSupported { .. }) => {}
            survey => {
                let survey = survey?;
                self.near("a survey by unit", &survey.units.concat(), &sums(&by_unit))?;
                let found = survey.distances.concat();
                self.near("a survey by distance", &found, &sums(&by_distance))?;
            }
        }
        let blind = Sight {
            views: &views,
            far: None,
        };
        let far_units = views.lists().iter().flatten().any(|v| !v.far.is_empty());
        if far_units {
            let over = Attention {
                sight: Some(blind),
                ..over
            };
            self.refused(
                "far units without queries",
                self.compute.attend(q.clone(), &over),
            )?;
        }
        let short = Views::new(tokens + 1, vec![Vec::new(); layer.heads]);
        let over = Attention {
            sight: Some(Sight {
                views: &short,
                far: None,
            }),
            ..over
        };
        self.refused("views of no block", self.compute.attend(q.clone(), &over))?;
        let all = vec![vec![View::all(); tokens.div_ceil(block)]; layer.heads];
        let mut beyond: Vec<Vec<u32>> = lens.iter().map(|n| vec![0; *n]).collect();
        if let Some(last) = beyond.first_mut().and_then(|places| places.last_mut()) {
            *last = over.rotation.map_or(0, |table| table.len() as u32);
        }
        let beyond = Views::new(block, all).placed(beyond);
        let over = Attention {
            sight: Some(Sight {
                views: &beyond,
                far: None,
            }),
            ..over
        };
        self.refused("units beyond the table", self.compute.attend(q, &over))
    }

    /// Each is done once, also those that have pieces of their own.
    fn pieces(&self, dice: &mut Dice) -> Checked {
        let mut done = vec![0; dice.between(0, 40)];
        let pieces = done.iter_mut().map(|done| {
            let inner = || {
                let mut twice = [0, 0];
                let pieces = twice.iter_mut().map(|n| {
                    let piece = move || *n += 1;
                    Box::new(piece) as Box<dyn FnOnce() + Send + '_>
                });
                self.compute.each(pieces.collect());
                *done += twice[0] * twice[1];
            };
            Box::new(inner) as Box<dyn FnOnce() + Send + '_>
        });
        self.compute.each(pieces.collect());
        match done.iter().all(|n| *n == 1) {
            true => Ok(()),
            false => Err(Off::Number(format!("done so often: {done:?}"))),
        }
    }

    fn selection(&self, dice: &mut Dice) -> Checked {
        let n = dice.between(1, 60);
        let scores: Vec<f32> = (0..n).map(|_| dice.between(0, 9) as f32).collect();
        let keep = dice.between(0, n + 3);
        let sinks = dice.between(0, n.min(keep));
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| {
            let score = |i: &usize| {
                if *i < sinks {
                    f32::INFINITY
                } else {
                    scores[*i]
                }
            };
            score(b).total_cmp(&score(a)).then(a.cmp(b))
        });
        order.truncate(keep);
        order.sort_unstable();
        let found = self.compute.select(&scores, keep, &[0..sinks])?;
        if !found
            .iter()
            .map(|unit| *unit as usize)
            .eq(order.iter().copied())
        {
            let found = format!("{keep} of {scores:?}: {found:?}, {order:?} is due");
            return Err(Off::Number(found));
        }
        self.refused("a NaN", self.compute.select(&[1.0, f32::NAN], 1, &[]))
    }

    /// Of equals the first; of a row that has none, nothing.
    fn largest(&self, dice: &mut Dice) -> Checked {
        let (rows, width) = (dice.between(1, 5), dice.between(1, 3000));
        let mut all: Vec<f32> = (0..rows * width)
            .map(|_| dice.between(0, 40) as f32 - 60.0)
            .collect();
        for wrong in [f32::NEG_INFINITY, f32::INFINITY, f32::NAN] {
            if dice.chance(0.3) {
                all[dice.between(0, rows * width - 1)] = wrong;
            }
        }
        if dice.chance(0.3) {
            all[..width].fill(f32::NEG_INFINITY);
        }
        let Some(found) = self.compute.largest(&self.rows(&all, width)?)? else {
            return Ok(());
        };
        let due = all.chunks(width).map(|row| {
            let best = crate::argmax(row)?;
            row[best].is_finite().then_some(best as u32)
        });
        let due: Vec<_> = due.collect();
        match found == due {
            true => Ok(()),
            false => {
                let found = format!("{found:?} of rows of {width}, {due:?} is due");
                Err(Off::Number(found))
            }
        }
    }

    /// Softmax weights of logits, some of which say never; NaN of a NaN.
    fn surprisal(&self, dice: &mut Dice) -> Checked {
        let (rows, width) = (dice.between(1, 5), dice.between(2, 3000));
        let mut all: Vec<f32> = (0..rows * width)
            .map(|_| dice.between(0, 4000) as f32 / 100.0 - 60.0)
            .collect();
        let of: Vec<u32> = (0..rows)
            .map(|_| dice.between(0, width - 1) as u32)
            .collect();
        let wrong = dice.chance(0.3).then(|| dice.between(0, rows - 1));
        for (row, own) in all.chunks_mut(width).zip(&of) {
            let never = dice.between(0, width - 1);
            if never != *own as usize {
                row[never] = f32::NEG_INFINITY;
            }
        }
        if let Some(row) = wrong {
            all[row * width + dice.between(0, width - 1)] = f32::NAN;
        }
        let logits = self.rows(&all, width)?;
        let Some(found) = self.compute.surprisal(&logits, &of)? else {
            return Ok(());
        };
        let mut due = Vec::new();
        for (i, (row, own)) in all.chunks(width).zip(&of).enumerate() {
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            let nll = sum.ln() - f64::from(row[*own as usize]);
            if Some(i) == wrong {
                if !found[i].is_nan() {
                    let found = format!("{} of a row with a NaN", found[i]);
                    return Err(Off::Number(found));
                }
                due.push(Sum(0.0, 0.0));
            } else {
                due.push(Sum(nll, nll.abs()));
            }
        }
        let number = |(i, nll): (usize, &f32)| if Some(i) == wrong { 0.0 } else { *nll };
        let found: Vec<f32> = found.iter().enumerate().map(number).collect();
        self.near("surprisal", &found, &due)?;
        self.refused(
            "a token too many",
            self.compute.surprisal(&logits, &[of, vec![0]].concat()),
        )?;
        let unknown = vec![width as u32; rows];
        self.refused(
            "an unknown token",
            self.compute.surprisal(&logits, &unknown),
        )
    }
}

/// Views by chance, by KV head or by query head.
pub(super) fn views_of(
    dice: &mut Dice,
    block: usize,
    tokens: usize,
    layer: &LayerSpec,
    lens: &[usize],
) -> Views {
    let lists = dice.pick(&[layer.heads, layer.kv_heads]);
    let ranges = |dice: &mut Dice, len: usize| -> Vec<Range<u32>> {
        let mut range = |_| {
            let start = dice.between(0, len);
            start as u32..dice.between(start, len) as u32
        };
        let count = [0, 0, 1, 3];
        let count = count[range(0).start as usize % count.len()];
        (0..count).map(range).collect()
    };
    let mut view = |len: usize| View {
        ranges: ranges(dice, len),
        far: ranges(dice, len),
        columns: match dice.chance(0.5) {
            true => (0..dice.between(0, 30))
                .map(|_| dice.between(0, len - 1) as u32)
                .collect(),
            false => Vec::new(),
        },
        window: match dice.chance(0.5) {
            true => dice.between(0, len + 3),
            false => 0,
        },
    };
    let lists = (0..lists).map(|list| {
        let len = lens[list * lens.len() / lists];
        (0..tokens.div_ceil(block)).map(|_| view(len)).collect()
    });
    Views::new(block, lists.collect()).far_at(11)
}

/// Where so many units stand, by chance.
fn places(dice: &mut Dice, units: usize) -> Vec<u32> {
    let last = units.saturating_sub(1);
    (0..units).map(|_| dice.between(0, last) as u32).collect()
}

/// Whether a query whose own unit is `own` sees `unit`, and then whether at the one distance.
fn seen(view: &View, own: usize, unit: usize) -> Option<bool> {
    let of = |ranges: &[Range<u32>]| ranges.iter().any(|r| r.contains(&(unit as u32)));
    let column = || view.columns.contains(&(unit as u32));
    match unit > own {
        true => None,
        false if of(&view.ranges) || column() || own - unit < view.window => Some(false),
        false => of(&view.far).then_some(true),
    }
}

/// Cosines and sines of random frequencies.
fn table_of(dice: &mut Dice, rotary: usize, factor: f32, rows: usize) -> RopeTable {
    let config = RopeConfig::plain(dice.pick(&[100.0, 10_000.0]), rotary);
    RopeTable::new(&config.frequencies(false).0, factor, 0..rows)
}

fn turned(key: &mut [f32], table: &RopeTable, row: usize) {
    let half = table.rotary_dim() / 2;
    for i in 0..half {
        let (cos, sin) = (table.cos()[row * half + i], table.sin()[row * half + i]);
        let (a, b) = (key[i], key[half + i]);
        key[i] = a * cos - b * sin;
        key[half + i] = b * cos + a * sin;
    }
}
