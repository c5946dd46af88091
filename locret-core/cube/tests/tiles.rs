//! Kernels for matrix units, with plain loops for the units' own instruction, against plain loops that round where
//! they do.
//!
//! ```text
//! cargo test -p locret-cube --features wgpu --test tiles
//! ```

use burn::tensor::{Device, Tensor};
use locret_core::{
    Attention, Compute, DType, Error, LayerSpec, RopeConfig, RopeTable, Rows, Weight,
    conformance::check_compute,
};
use locret_cube::{Cube, Parts};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

fn device() -> Device {
    Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)
}

fn cube(parts: Parts) -> Cube {
    Cube::new(&device())
        .unwrap()
        .with_modelled_matrix_units(parts)
}

/// A number as the sum of so many bf16.
fn split(x: f32, parts: Parts) -> [f64; 2] {
    let first = half::bf16::from_f32(x).to_f32();
    let second = match parts {
        Parts::One => 0.0,
        Parts::Two => half::bf16::from_f32(x - first).to_f32(),
    };
    [first.into(), second.into()]
}

/// The product of both, as it is computed: without that of the second parts.
fn product(a: [f64; 2], b: [f64; 2]) -> f64 {
    a[0] * b[0] + a[0] * b[1] + a[1] * b[0]
}

fn numbers(random: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.random_range(-1.0..1.0)).collect()
}

/// Weights of a type, and what they stand for.
fn weight(
    random: &mut ChaCha8Rng,
    dtype: DType,
    rows: usize,
    columns: usize,
) -> (Weight, Vec<f32>) {
    let mut values = numbers(random, rows * columns);
    let bytes: Vec<u8> = match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => {
            let bytes = rows * columns / dtype.block() * dtype.block_bytes();
            // Every number of 16 bits among them is below 2.
            let byte = |at: usize| random.random::<u8>() & if at % 2 == 1 { 0xbb } else { 0xff };
            (0..bytes).map(byte).collect()
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

/// How far products may be from exact ones, in parts of the sum of their magnitudes: what [`Parts`] says.
fn promised(dtype: DType, parts: Parts) -> f64 {
    let last = |bits: i32| 2f64.powi(-bits);
    match (parts, dtype) {
        (Parts::One, DType::BF16) => last(8),
        (Parts::One, _) => last(7),
        (Parts::Two, DType::BF16) => last(16),
        (Parts::Two, DType::F16) => last(15),
        (Parts::Two, _) => 3.0 * last(16),
    }
}

#[test]
fn everything_is_what_plain_loops_compute() {
    let compute: Arc<dyn Compute> = Arc::new(cube(Parts::Two));
    check_compute(&compute, 4e-5, 0..2).unwrap();
}

#[test]
fn matrix_units_that_are_not_there_are_refused() {
    let error = Cube::new(&device())
        .unwrap()
        .with_matrix_units(Parts::Two)
        .unwrap_err();
    assert!(matches!(error, Error::NotSupported { .. }), "{error}");
}

/// Products of every type, of rows and outputs that end within tiles, and of columns that end within a turn.
#[test]
fn products_are_rounded_as_promised() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    for dtype in DType::ALL {
        if !cube(Parts::One).computes_with(dtype) {
            continue;
        }
        let shapes: &[_] = match dtype.block() {
            1 => &[(9, 5, 37), (70, 67, 40), (33, 130, 96)],
            32 => &[(9, 5, 32), (70, 67, 96)],
            _ => &[(40, 67, 256)],
        };
        for &(tokens, outputs, columns) in shapes {
            let (weight, values) = weight(&mut random, dtype, outputs, columns);
            let x = numbers(&mut random, tokens * columns);
            for parts in [Parts::One, Parts::Two] {
                let compute = cube(parts);
                let matrix = compute.matrix(vec![weight.clone()]).unwrap();
                let rows = compute.rows(x.clone(), columns).unwrap();
                let found = matrix.apply(&rows).unwrap().into_values().unwrap();
                let (mut off, mut rounding) = (0.0f64, 0.0f64);
                for (i, found) in found.iter().enumerate() {
                    let x = &x[i / outputs * columns..][..columns];
                    let w = &values[i % outputs * columns..][..columns];
                    let (mut due, mut exact, mut all) = (0.0, 0.0, 0.0);
                    for (x, w) in x.iter().zip(w) {
                        let own = f64::from(*x) * f64::from(*w);
                        due += product(split(*x, parts), split(*w, parts));
                        exact += own;
                        all += own.abs();
                    }
                    off = off.max((f64::from(*found) - due).abs() / all);
                    rounding = rounding.max((f64::from(*found) - exact).abs() / all);
                }
                let case = format!("{dtype} [{outputs}, {columns}] and {tokens}, {parts:?}");
                println!("{case}: {off:.1e} off, {rounding:.1e} with rounding");
                // Sums of some hundred terms in 32 bits, in another order.
                assert!(off < 1e-6, "{case}: {off:e} off");
                let promised = promised(dtype, parts);
                assert!(rounding <= promised + 1e-6, "{case}: {rounding:e}");
                // A part of it at least: else it is another kernel's work.
                if (parts, dtype) != (Parts::Two, DType::F16) {
                    assert!(rounding > promised / 64.0, "{case}: {rounding:e}");
                }
            }
        }
    }
}

/// Inputs whose rows lie apart and begin where no vector does.
#[test]
fn inputs_may_be_part_of_others() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let (tokens, outputs, columns) = (21, 19, 64);
    let (weight, values) = weight(&mut random, DType::BF16, outputs, columns);
    for (wide, from) in [(80, 4), (80, 5), (79, 8)] {
        let all = numbers(&mut random, tokens * wide);
        let compute = cube(Parts::Two);
        let whole: Tensor<2> = compute.rows(all.clone(), wide).unwrap().tensor();
        let part: Rows = whole.slice([0..tokens, from..from + columns]).into();
        let matrix = compute.matrix(vec![weight.clone()]).unwrap();
        let found = matrix.apply(&part).unwrap().into_values().unwrap();
        for (i, found) in found.iter().enumerate() {
            let x = &all[i / outputs * wide + from..][..columns];
            let w = &values[i % outputs * columns..][..columns];
            let parts = |x: &f32| split(*x, Parts::Two);
            let due: f64 = x
                .iter()
                .zip(w)
                .map(|(x, w)| product(parts(x), parts(w)))
                .sum();
            let all: f64 = x.iter().zip(w).map(|(x, w)| f64::from((x * w).abs())).sum();
            let off = (f64::from(*found) - due).abs() / all;
            assert!(off < 4e-7, "{wide} wide, from {from}: {off:e} off");
        }
    }
}

/// One case of attention: features, of which some are rotated, KV heads, query heads of each, tokens, units before.
type Case = (usize, usize, usize, usize, usize, usize);

/// Heads of models and others: widths that no vector and no step divides, lengths that differ from head to head, and
/// more rows than a cube has.
const CASES: [Case; 7] = [
    (64, 64, 3, 3, 33, 90),
    (64, 0, 1, 1, 9, 0),
    (80, 32, 2, 1, 35, 70),
    (96, 96, 2, 1, 40, 0),
    (128, 128, 2, 4, 19, 61),
    (18, 6, 2, 2, 12, 30),
    (20, 12, 2, 2, 12, 30),
];

/// Queries, and a store of units.
fn attention(
    random: &mut ChaCha8Rng,
    compute: &Cube,
    dtype: DType,
    (dim, _, kv_heads, group, tokens, old): Case,
    leading: bool,
) -> (LayerSpec, Box<dyn locret_core::KvStore>, Vec<f32>) {
    let layer = LayerSpec {
        index: 0,
        layers: 1,
        heads: kv_heads * group,
        kv_heads,
        head_dim: dim,
    };
    let width = kv_heads * dim;
    let rows = |values: Vec<f32>, width| compute.rows(values, width).unwrap();
    let mut store = compute.store(&layer, dtype).unwrap();
    let mut q = numbers(random, tokens * layer.heads * dim);
    let [mut old_keys, old_values] = [(); 2].map(|()| numbers(random, old * width));
    let [mut keys, values] = [(); 2].map(|()| numbers(random, tokens * width));
    if leading {
        // The first unit of a head has the largest score of all queries: what is rounded does not depend on tiles.
        q.chunks_mut(dim).for_each(|q| q[dim - 1] = 1.0);
        let all = if old > 0 { &mut old_keys } else { &mut keys };
        let last = all[..width].chunks_mut(dim);
        last.for_each(|key| key[dim - 1] = 5.0 * (dim as f32).sqrt());
    }
    if old > 0 {
        let [old_keys, old_values] = [old_keys, old_values].map(|values| rows(values, width));
        store.append(&old_keys, &old_values).unwrap();
        // Each head loses other units, and other many.
        let kept = |head: usize| {
            let stays = |unit: &u32| *unit as usize % (head + 3) != 1;
            (0..old as u32).filter(stays).collect()
        };
        store
            .retain(&(0..kv_heads).map(kept).collect::<Vec<_>>())
            .unwrap();
    }
    let [keys, values] = [keys, values].map(|values| rows(values, width));
    store.append(&keys, &values).unwrap();
    (layer, store, q)
}

/// Attention in loops that round as the kernel does; weights only where the largest score is that of the first unit.
fn attended(q: &[f32], over: &Attention<'_>, parts: Parts, weights: Option<Parts>) -> Vec<f64> {
    let (layer, d) = (over.layer, over.layer.head_dim);
    let tokens = q.len() / (layer.heads * d);
    let mut out = vec![0.0; q.len()];
    for head in 0..layer.heads {
        let of = head / layer.group();
        let mut keys = over.store.keys(of).unwrap().into_values().unwrap();
        let values = over.store.values(of).unwrap().into_values().unwrap();
        if let Some(table) = over.rotation {
            let half = table.rotary_dim() / 2;
            for (row, key) in keys.chunks_mut(d).enumerate() {
                for i in 0..half {
                    let (cos, sin) = (table.cos()[row * half + i], table.sin()[row * half + i]);
                    let (a, b) = (key[i], key[half + i]);
                    key[i] = a * cos - b * sin;
                    key[half + i] = b * cos + a * sin;
                }
            }
        }
        for token in 0..tokens {
            let at = (token * layer.heads + head) * d;
            let seen = keys.len() / d - tokens + token + 1;
            let score = |key: &[f32]| -> f64 {
                let both = q[at..at + d].iter().zip(key);
                both.map(|(a, b)| product(split(a * over.scale, parts), split(*b, parts)))
                    .sum()
            };
            let scores: Vec<f64> = keys.chunks(d).take(seen).map(score).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if weights.is_some() {
                assert_eq!(most, scores[0], "the first unit leads");
            }
            let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
            for (score, value) in scores.iter().zip(values.chunks(d)) {
                let weight = (score - most).exp();
                for (out, x) in out[at..at + d].iter_mut().zip(value) {
                    let value = split(*x, parts);
                    *out += match weights {
                        Some(parts) => product(split(weight as f32, parts), value),
                        None => weight * (value[0] + value[1]),
                    } / sum;
                }
            }
        }
    }
    out
}

/// Largest and mean distance.
fn off(found: &[f32], due: &[f64]) -> (f64, f64) {
    assert_eq!(found.len(), due.len());
    let off = found.iter().zip(due);
    let off: Vec<f64> = off.map(|(a, b)| (f64::from(*a) - b).abs()).collect();
    let most = off.iter().copied().fold(0.0, f64::max);
    (most, off.iter().sum::<f64>() / off.len() as f64)
}

/// Where the first unit leads, every number that is rounded is known. One that lies as near to two may still become
/// the other one, and then is off by what a part of one weight is.
#[test]
fn attention_is_rounded_as_promised() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    for (case, of) in CASES.into_iter().enumerate() {
        for (dtype, parts) in [(DType::F16, Parts::One), (DType::F32, Parts::Two)] {
            let compute = cube(parts).in_parts(1);
            let (layer, store, q) = attention(&mut random, &compute, dtype, of, true);
            let over = Attention {
                layer,
                store: &*store,
                scale: 1.0 / (of.0 as f32).sqrt(),
                rotation: None,
                sight: None,
            };
            let rows = compute.rows(q.clone(), layer.heads * of.0).unwrap();
            let found = compute.attend(rows, &over).unwrap().into_values().unwrap();
            let (most, mean) = off(&found, &attended(&q, &over, parts, Some(parts)));
            let (exact, _) = off(&found, &attended(&q, &over, Parts::Two, None));
            let case = format!("case {case}, {dtype}, {parts:?}");
            println!("{case}: {most:.1e} off, {mean:.1e} in the mean, {exact:.1e} with rounding");
            // Scores near 5 in 32 bits are some 5e-7 off themselves, and so are sums of a hundred weights.
            let (limit, of_mean) = match parts {
                Parts::One => (1e-4, 2e-6),
                Parts::Two => (3e-6, 4e-7),
            };
            assert!(most < limit && mean < of_mean, "{case}: {most:e}, {mean:e}");
        }
    }
}

/// Any scores, keys that are rotated as they are loaded, and units in parts.
#[test]
fn attention_in_two_parts_is_nearly_that_of_32_bits() {
    let mut random = ChaCha8Rng::seed_from_u64(9);
    for (case, of) in CASES.into_iter().enumerate() {
        let dtype = [DType::F32, DType::F16][case % 2];
        let (layer, store, q) = attention(&mut random, &cube(Parts::Two), dtype, of, false);
        let config = RopeConfig::plain(10_000.0, of.1.max(2));
        let table = RopeTable::new(&config.frequencies(false).0, 1.0, 0..of.4 + of.5);
        for parts in [1, 3] {
            let over = Attention {
                layer,
                store: &*store,
                scale: 1.0 / (of.0 as f32).sqrt(),
                rotation: (of.1 > 0).then_some(&table),
                sight: None,
            };
            let compute = cube(Parts::Two).in_parts(parts);
            let rows = compute.rows(q.clone(), layer.heads * of.0).unwrap();
            let found = compute.attend(rows, &over).unwrap().into_values().unwrap();
            let (most, mean) = off(&found, &attended(&q, &over, Parts::Two, None));
            let case = format!("case {case}, {dtype}, {parts} parts");
            println!("{case}: {most:.1e} off, {mean:.1e} in the mean");
            assert!(most < 1e-5, "{case}: {most:e} off");
        }
    }
}
