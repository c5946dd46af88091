//! Causal attention over units that are codes, in SmolLM2's shape (9 query and 3 KV heads of 64 features): a chunk of
//! 512 tokens and one token over 4,096 units, keys as they are and rotated on the way.

use burn::tensor::Device;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use locret_benches::numbers;
use locret_core::{
    Attention, Compute, DType, KvStore, LayerSpec, Placement, Quantization, QuantizedStore,
    RopeTable, Rows, compute,
};
use std::{hint::black_box, sync::Arc};

const LAYER: LayerSpec = LayerSpec {
    index: 0,
    layers: 1,
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
};
const UNITS: usize = 4096;

fn store(compute: &Arc<dyn Compute>, bits: u8, tokens: usize) -> Box<dyn KvStore> {
    let place = Placement {
        compute: compute.clone(),
        dtype: DType::F32,
    };
    let config = Quantization::bits(bits);
    let mut store = QuantizedStore::boxed(&LAYER, &place, config).expect("settings");
    let width = LAYER.kv_heads * LAYER.head_dim;
    for (seed, tokens) in [(1, UNITS - tokens), (3, tokens)] {
        let rows = [0, 1].map(|part| {
            let values = numbers(tokens * width, seed + part, 1.7);
            compute.rows(values, width).expect("rows")
        });
        store.append(&rows[0], &rows[1]).expect("units");
        // The newest ones are those of the step.
        if seed == 1 {
            store.settle().expect("codes");
        }
    }
    store
}

fn codes(c: &mut Criterion) {
    let compute = compute(&Device::flex());
    let frequency = |i: usize| 100_000f32.powf(-(i as f32) / 32.0);
    let frequencies: Vec<f32> = (0..32).map(frequency).collect();
    let table = RopeTable::new(&frequencies, 1.0, 0..UNITS);
    for (name, tokens) in [("chunk-512", 512), ("decode", 1)] {
        let mut group = c.benchmark_group(format!("codes/{name}"));
        group.sample_size(20);
        let pairs = LAYER.heads * (tokens * UNITS - tokens * (tokens - 1) / 2);
        group.throughput(Throughput::Elements(pairs as u64));
        let width = LAYER.heads * LAYER.head_dim;
        let q: Rows = compute
            .rows(numbers(tokens * width, 99, 1.7), width)
            .expect("queries");
        for bits in [8, 4, 2] {
            let store = store(&compute, bits, tokens);
            for (how, rotation) in [("", None), (", keys rotated on the way", Some(&table))] {
                let over = Attention {
                    layer: LAYER,
                    store: &*store,
                    scale: 0.125,
                    rotation,
                    sight: None,
                };
                group.bench_function(format!("{bits} bits{how}"), |b| {
                    b.iter(|| {
                        compute
                            .attend(black_box(q.clone()), &over)
                            .expect("attention")
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, codes);
criterion_main!(benches);
