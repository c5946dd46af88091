//! Causal attention over a cache, in SmolLM2's shape (9 query and 3 KV heads of 64 features): a
//! chunk of 512 tokens over 4,096 units, and one token over 2,048.

use burn::tensor::{Device, Tensor, module, ops::AttentionModuleOptions};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use locret_benches::numbers;
use locret_core::{
    from_f32, into_f32,
    kernels::{
        attention::{AttnShape, attend},
        rope::RopeTable,
        tiles::{DenseTiles, Floats, KvTiles},
    },
};
use std::hint::black_box;

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;
const CASES: [(&str, usize, usize); 2] = [("chunk-512", 512, 4096), ("decode", 1, 2048)];

fn shape(tokens: usize) -> AttnShape {
    AttnShape {
        tokens,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: DIM,
        scale: 0.125,
    }
}

fn table(units: usize) -> RopeTable {
    let frequency = |i: usize| 100_000f32.powf(-(i as f32) / (DIM / 2) as f32);
    let frequencies: Vec<f32> = (0..DIM / 2).map(frequency).collect();
    RopeTable::new(&frequencies, 1.0, 0..units)
}

/// Keys, and values, of all heads.
fn units<T: Copy>(n: usize, of: impl Fn(f32) -> T) -> Vec<[Vec<T>; 2]> {
    let list = |seed| numbers(n * DIM, seed, 1.7).into_iter().map(&of).collect();
    let head = |head: usize| [list(2 * head as u64), list(2 * head as u64 + 1)];
    (0..KV_HEADS).map(head).collect()
}

fn kernel<'a, T>(
    q: &[f32],
    units: &'a [[Vec<T>; 2]],
    tokens: usize,
    rotation: Option<&RopeTable>,
    out: &mut [f32],
) where
    &'a [T]: Into<Floats<'a>>,
{
    let tiles: Vec<DenseTiles<'_>> = units
        .iter()
        .map(|[keys, values]| DenseTiles::new(keys.as_slice(), values.as_slice(), DIM))
        .collect();
    let heads: Vec<&dyn KvTiles> = tiles.iter().map(|t| t as &dyn KvTiles).collect();
    attend(q, &heads, shape(tokens), rotation, out);
}

fn attention(c: &mut Criterion) {
    for (name, tokens, n) in CASES {
        let mut group = c.benchmark_group(format!("attention/{name}"));
        group.sample_size(20);
        // Pairs of a query and a unit that it sees, over all query heads.
        let pairs = HEADS * (tokens * n - tokens * (tokens - 1) / 2);
        group.throughput(Throughput::Elements(pairs as u64));
        let q = numbers(tokens * HEADS * DIM, 99, 1.7);
        let mut out = vec![0.0; q.len()];
        let (full, short) = (units(n, |x| x), units(n, bf16::from_f32));
        let table = table(n);
        group.bench_function("f32", |b| {
            b.iter(|| kernel(black_box(&q), &full, tokens, None, &mut out));
        });
        group.bench_function("f32, keys rotated on the way", |b| {
            b.iter(|| kernel(black_box(&q), &full, tokens, Some(&table), &mut out));
        });
        group.bench_function("bf16", |b| {
            b.iter(|| kernel(black_box(&q), &short, tokens, None, &mut out));
        });
        let device = Device::flex();
        let side = |which: usize| -> Tensor<4> {
            let all = full.iter().flat_map(|head| head[which].clone()).collect();
            from_f32(all, [1, KV_HEADS, n, DIM], &device)
        };
        let (k, v) = (side(0), side(1));
        let query: Tensor<3> = from_f32(q.clone(), [tokens, HEADS, DIM], &device);
        let query: Tensor<4> = query.swap_dims(0, 1).unsqueeze();
        let options = AttentionModuleOptions {
            is_causal: true,
            ..Default::default()
        };
        group.bench_function("Burn's fused attention on flex", |b| {
            b.iter(|| {
                let (q, k, v) = (query.clone(), k.clone(), v.clone());
                into_f32(module::attention(q, k, v, None, None, options))
            });
        });
        group.finish();
    }
}

criterion_group!(benches, attention);
criterion_main!(benches);
