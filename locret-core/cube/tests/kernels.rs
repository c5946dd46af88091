//! Kernels on whatever device WGSL reaches, Mesa's lavapipe among them, against plain loops.
//!
//! ```text
//! cargo test -p locret-cube --features wgpu
//! ```
#![cfg(any(feature = "wgpu", feature = "cuda"))]

use burn::tensor::Device;
use locret_core::{
    Attention, Compute, DType, Dense, Error, LayerSpec, Placement, RopeConfig, RopeTable,
    conformance::{StoreCheck, check_compute, check_store},
};
use locret_cube::Cube;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

#[path = "kernels/coded.rs"]
mod coded;
#[path = "kernels/lists.rs"]
mod lists;
#[path = "kernels/observed.rs"]
mod observed;

#[cfg(feature = "cuda")]
fn device() -> Device {
    Device::cuda(burn::tensor::DeviceIndex::Default)
}

#[cfg(not(feature = "cuda"))]
fn device() -> Device {
    Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)
}

fn cube() -> Cube {
    Cube::new(&device()).unwrap()
}

#[test]
fn everything_is_what_plain_loops_compute() {
    for parts in [None, Some(1), Some(3)] {
        let compute: Arc<dyn Compute> = match parts {
            None => Arc::new(cube()),
            Some(parts) => Arc::new(cube().in_parts(parts)),
        };
        check_compute(&compute, 2e-5, 0..8).unwrap();
    }
}

#[test]
fn stores_keep_what_they_are_given() {
    for (dtype, tolerance) in [(DType::F32, 0.0), (DType::F16, 5e-4)] {
        let check = StoreCheck {
            seeds: 0..8,
            tolerance,
            bytes_per_value: dtype.block_bytes() as f64,
            ..StoreCheck::default()
        };
        let place = Placement {
            compute: Arc::new(cube()),
            dtype,
        };
        check_store(&device(), &check, |layer| Dense::boxed(layer, &place)).unwrap();
    }
}

#[test]
fn other_devices_are_refused() {
    let error = Cube::new(&Device::flex()).unwrap_err();
    assert!(matches!(error, Error::Setting { .. }), "{error}");
}

/// Heads as models have them, which are wider than those of the conformance suite: units of several lengths, keys
/// rotated as they are loaded or not, all query heads of a group, in one part and in several.
#[test]
fn attention_of_heads_of_models() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    // Features, of which some are rotated; KV heads, query heads of each, tokens, units before them.
    for (case, (dim, rotary, kv_heads, group, tokens, old)) in [
        (64, 64, 3, 3, 1, 200),
        (64, 64, 3, 3, 33, 90),
        (80, 32, 2, 1, 5, 70),
        (96, 96, 2, 1, 40, 0),
        (128, 128, 2, 4, 1, 150),
        (128, 128, 2, 4, 19, 61),
        (256, 64, 1, 8, 3, 50),
        // Too wide for a tile: Burn's operations.
        (512, 512, 1, 2, 2, 20),
    ]
    .into_iter()
    .enumerate()
    {
        for dtype in [DType::F32, DType::F16] {
            let layer = LayerSpec {
                index: 0,
                layers: 1,
                heads: kv_heads * group,
                kv_heads,
                head_dim: dim,
            };
            let mut numbers =
                |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-1.0..1.0)).collect() };
            let width = kv_heads * dim;
            let compute = cube();
            let rows = |values: Vec<f32>, width| compute.rows(values, width).unwrap();
            let mut store = compute.store(&layer, dtype).unwrap();
            let [old_keys, old_values] = [(); 2].map(|()| rows(numbers(old * width), width));
            let [keys, values] = [(); 2].map(|()| rows(numbers(tokens * width), width));
            if old > 0 {
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
            store.append(&keys, &values).unwrap();
            let config = RopeConfig::plain(10_000.0, rotary);
            let table = RopeTable::new(&config.frequencies(false).0, 1.0, 0..old + tokens);
            let q = numbers(tokens * layer.heads * dim);
            for (rotation, parts) in [(None, 1), (Some(&table), 3)] {
                let over = Attention {
                    layer,
                    store: &*store,
                    scale: 1.0 / (dim as f32).sqrt(),
                    rotation,
                    sight: None,
                };
                let compute = cube().in_parts(parts);
                let found = compute
                    .attend(rows(q.clone(), layer.heads * dim), &over)
                    .unwrap();
                let off = found
                    .values()
                    .unwrap()
                    .iter()
                    .zip(attended(&q, &over))
                    .map(|(found, due)| (f64::from(*found) - due).abs())
                    .fold(0.0, f64::max);
                println!("case {case}, {dtype}, {parts} parts: {off:.1e} off");
                assert!(
                    off < 5e-6,
                    "case {case}, {dtype}, {parts} parts: {off:e} off"
                );
            }
        }
    }
}

/// The same in loops.
fn attended(q: &[f32], over: &Attention<'_>) -> Vec<f64> {
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
                let product = q[at..at + d].iter().zip(key);
                product
                    .map(|(a, b)| f64::from(*a) * f64::from(*b))
                    .sum::<f64>()
                    * f64::from(over.scale)
            };
            let scores: Vec<f64> = keys.chunks(d).take(seen).map(score).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
            for (score, value) in scores.iter().zip(values.chunks(d)) {
                let weight = (score - most).exp() / sum;
                for (out, x) in out[at..at + d].iter_mut().zip(value) {
                    *out += weight * f64::from(*x);
                }
            }
        }
    }
    out
}
