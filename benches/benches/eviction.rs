//! What a verdict costs: choosing the best units, keeping them in place, and Locret's scores.

use burn::tensor::Device;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use locret_benches::{numbers, random_model, smollm2};
use locret_core::{CausalLm, DType, LayerSpec, Rows, compute, kernels::select::top_k};
use locret_policies::{HeadWeights, LayerHead, RetainingHeads};
use std::hint::black_box;

const HEADS: usize = 8;
const UNITS: usize = 16_384;
const KEPT: usize = 4096;

fn selection(c: &mut Criterion) {
    let mut group = c.benchmark_group("selection");
    group.throughput(Throughput::Elements((HEADS * UNITS) as u64));
    let scores: Vec<Vec<f32>> = (0..HEADS)
        .map(|head| numbers(UNITS, head as u64, 1.0))
        .collect();
    let protected = [0..4, UNITS - 64..UNITS];
    group.bench_function("4096 of 8 x 16384", |b| {
        b.iter(|| {
            for head in black_box(&scores) {
                black_box(top_k(head, KEPT, &protected)).expect("no NaN");
            }
        });
    });
    group.finish();
}

fn compaction(c: &mut Criterion) {
    const DIM: usize = 64;
    let mut group = c.benchmark_group("compaction, 8 x 16384 units of 64 features to 4096");
    group.sample_size(10);
    let device = Device::flex();
    let layer = LayerSpec {
        index: 0,
        layers: 1,
        heads: HEADS,
        kv_heads: HEADS,
        head_dim: DIM,
    };
    let kept: Vec<Vec<u32>> = (0..HEADS)
        .map(|head| top_k(&numbers(UNITS, head as u64, 1.0), KEPT, &[]).expect("no NaN"))
        .collect();
    let values = numbers(UNITS * HEADS * DIM, 7, 1.0);
    for dtype in [DType::F32, DType::BF16] {
        let compute = compute(&device);
        let rows = compute
            .rows(values.clone(), HEADS * DIM)
            .expect("whole rows");
        let mut full = compute.store(&layer, dtype).expect("a float type");
        full.append(&rows, &rows).expect("units fit");
        group.bench_function(format!("{dtype:?}").to_lowercase(), |b| {
            b.iter_batched(
                || full.fork(),
                |mut store| {
                    store.retain(black_box(&kept)).expect("units are there");
                    store
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// The heads that come with the examples are 256 wide, the published ones 1024; reading queries, keys and
/// values, and folded, as they are used.
fn scoring(c: &mut Criterion) {
    let mut group = c.benchmark_group("locret scores of one layer");
    group.sample_size(20);
    let mut config = smollm2();
    config.spec.layers = 1;
    let model = random_model(&config, &Device::flex()).expect("random weights fit");
    let spec = &config.spec;
    let features = spec.layer(0).qkv_features();
    for d_r in [256, 1024] {
        let head = LayerHead {
            d_r,
            fc1: numbers(d_r * features, 1, 0.05),
            fc2: numbers(spec.kv_heads * d_r, 2, 0.05),
            ..LayerHead::default()
        };
        let weights = HeadWeights {
            layers: vec![head],
            ..HeadWeights::default()
        };
        let plain = RetainingHeads::new(&weights, spec, &**model.compute());
        let folded = RetainingHeads::for_model(&weights, &model);
        let widths = [spec.heads, spec.kv_heads, spec.kv_heads].map(|n| n * spec.head_dim);
        for (heads, widths) in [(plain, &widths[..]), (folded, &[spec.hidden])] {
            let heads = heads.expect("the heads fit");
            let how = if heads.folded() { ", folded" } else { "" };
            for tokens in [512, 1] {
                let parts = widths.iter().zip(3..);
                let part = |(w, i): (&usize, u64)| {
                    let rows = model.compute().rows(numbers(tokens * w, i, 1.0), *w);
                    rows.expect("whole rows")
                };
                let parts: Vec<Rows> = parts.map(part).collect();
                let parts: Vec<&Rows> = parts.iter().collect();
                group.throughput(Throughput::Elements(tokens as u64));
                group.bench_function(format!("{tokens} tokens, d_R {d_r}{how}"), |b| {
                    b.iter(|| {
                        let scores = heads.scores(0, black_box(&parts));
                        scores.expect("the input fits")
                    });
                });
            }
        }
    }
    group.finish();
}

criterion_group!(benches, selection, compaction, scoring);
criterion_main!(benches);
