//! Attention over what queries see, in Llama-3.1-8B's shape (32 query and 8 KV heads of 128 features): the last
//! 1,024 of 16,384 and of 65,536 tokens, densely and as MInference's table has it (512 columns and a band of
//! 2,048 + 64 units for each tile of 64 queries), and what it takes to find out where the last 64 queries look.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use locret_benches::numbers;
use locret_core::kernels::{
    attention::{AttnShape, Seeing, attend, attend_chosen},
    observe::survey,
    tiles::{DenseTiles, KvTiles},
    visible::{View, Views},
};
use std::hint::black_box;

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const TOKENS: usize = 1024;
const COLUMNS: usize = 512;
const BAND: usize = 2048;

/// What the tiles of `TOKENS` queries at the end of `n` units see.
fn views(n: usize) -> Views {
    let tile = |head: usize, tile: usize| {
        let first = n - TOKENS + tile * Views::BLOCK;
        // Columns are strewn over what lies before the band, at other units in each head.
        let column = |i: usize| (i * 7919 + head * 13) % (first - BAND);
        View {
            ranges: std::iter::once((first - BAND) as u32..(first + Views::BLOCK).min(n) as u32)
                .collect(),
            columns: (0..COLUMNS).map(|i| column(i) as u32).collect(),
            ..View::default()
        }
    };
    let tiles = TOKENS.div_ceil(Views::BLOCK);
    let list = |head: usize| (0..tiles).map(|at| tile(head, at)).collect();
    Views::new(Views::BLOCK, (0..HEADS).map(list).collect())
}

fn chosen(c: &mut Criterion) {
    let shape = AttnShape {
        tokens: TOKENS,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: DIM,
        scale: (DIM as f32).sqrt().recip(),
    };
    for n in [16_384, 65_536] {
        let mut group = c.benchmark_group(format!("chosen/{n}"));
        group.sample_size(10);
        group.throughput(Throughput::Elements(TOKENS as u64));
        let list = |seed: usize| -> Vec<bf16> {
            let all = numbers(n * DIM, seed as u64, 1.7);
            all.into_iter().map(bf16::from_f32).collect()
        };
        let units: Vec<[Vec<bf16>; 2]> = (0..KV_HEADS)
            .map(|head| [list(2 * head), list(2 * head + 1)])
            .collect();
        let tiles: Vec<DenseTiles<'_>> = units
            .iter()
            .map(|[keys, values]| DenseTiles::new(keys.as_slice(), values.as_slice(), DIM))
            .collect();
        let heads: Vec<&dyn KvTiles> = tiles.iter().map(|t| t as &dyn KvTiles).collect();
        let q = numbers(TOKENS * HEADS * DIM, 99, 1.7);
        let mut out = vec![0.0; q.len()];
        group.bench_function("dense", |b| {
            b.iter(|| attend(black_box(&q), &heads, shape, None, &mut out));
        });
        let views = views(n);
        let seeing = Seeing {
            views: &views,
            far: None,
        };
        group.bench_function("columns and a band", |b| {
            b.iter(|| attend_chosen(black_box(&q), &heads, shape, None, seeing, &mut out));
        });
        group.bench_function("survey of 64 queries", |b| {
            b.iter(|| survey(black_box(&q), &heads, shape, None, 64));
        });
        group.finish();
    }
}

criterion_group!(benches, chosen);
criterion_main!(benches);
