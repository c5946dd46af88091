//! A token meets SmolLM2's head, `[49152, 576]`: the kernel in every type of the weights, and beside
//! it the plain reading of as many bytes, which is what bounds it. A chunk of 512 tokens meets the matrices of
//! a layer, in operations per second: that is bound by arithmetic. And a few tokens meet them and the head, in
//! tokens per second: weights are read once for all of them.
//!
//! Rows of K-quants have a multiple of 256 columns, as SmolLM2's have not: they meet the same (`wide-…`) in a model
//! of 1,024 features, beside `Q4_1`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use locret_benches::numbers;
use locret_core::{
    DType,
    kernels::{
        awake::awake,
        linear::{Weight, matmul},
        pages::Arena,
    },
};
use rayon::prelude::*;
use std::hint::black_box;

const ROWS: usize = 49_152;
const COLUMNS: usize = 576;
const FORMATS: [DType; 5] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q8_0,
    DType::Q4_1,
];

/// K-quants, and what they are compared with.
const WIDE: [DType; 4] = [DType::Q4_1, DType::Q4_K, DType::Q5_K, DType::Q6_K];

/// The sum of the words of `bytes`, by all threads, with no more work than that.
fn read(bytes: &[u8]) -> u64 {
    const WORDS: usize = 32;
    let share = bytes
        .len()
        .div_ceil(rayon::current_num_threads())
        .next_multiple_of(8 * WORDS);
    bytes
        .par_chunks(share)
        .map(|part| {
            let mut sums = [0u64; WORDS];
            for words in part.chunks_exact(8 * WORDS) {
                for (sum, word) in sums.iter_mut().zip(words.chunks_exact(8)) {
                    let word = word.try_into().map_or(0, u64::from_le_bytes);
                    *sum = sum.wrapping_add(word);
                }
            }
            sums.iter().fold(0, |a: u64, b| a.wrapping_add(*b))
        })
        .reduce(|| 0, u64::wrapping_add)
}

fn linear(c: &mut Criterion) {
    let x = numbers(COLUMNS, 7, 1.0);
    let mut out = vec![0.0; ROWS];
    for format in FORMATS {
        let len = ROWS * COLUMNS / format.block() * format.block_bytes();
        let mut group = c.benchmark_group(format!("linear/{format:?}"));
        group.sample_size(20);
        group.throughput(Throughput::Bytes(len as u64));
        // Any bytes do; these make no subnormal numbers.
        let bytes: Vec<u8> = (0..len).map(|i| 0x30 + (i % 11) as u8).collect();
        let mut large = Arena::default().zeros(len);
        large.copy_from_slice(&bytes);
        let usual = Weight::new(format, ROWS, COLUMNS, bytes).expect("whole blocks");
        let large = Weight::shared(format, ROWS, COLUMNS, large.freeze()).expect("whole blocks");
        for (pages, weight) in [("usual pages", &usual), ("large pages", &large)] {
            group.bench_function(format!("one token, {pages}"), |b| {
                b.iter(|| awake(|| matmul(black_box(&x), weight, &mut out)));
            });
            group.bench_function(format!("reading alone, {pages}"), |b| {
                b.iter(|| awake(|| read(black_box(weight.bytes()))));
            });
        }
    }
}

/// Tokens of a chunk.
const TOKENS: usize = 512;

/// What a token meets in a model.
struct Model {
    /// Before the names of its measurements.
    name: &'static str,
    formats: &'static [DType],
    /// Matrices of a layer: name, rows and columns.
    layer: [(&'static str, usize, usize); 4],
    layers: usize,
    /// Rows and columns of the head.
    head: (usize, usize),
}

static MODELS: [Model; 2] = [
    Model {
        name: "",
        formats: &FORMATS,
        layer: [
            ("queries, keys and values", 960, 576),
            ("output", 576, 576),
            ("gate and up", 3072, 576),
            ("down", 576, 1536),
        ],
        layers: 30,
        head: (ROWS, COLUMNS),
    },
    Model {
        name: "wide-",
        formats: &WIDE,
        layer: [
            ("queries, keys and values", 2048, 1024),
            ("output", 1024, 1024),
            ("gate and up", 5632, 1024),
            ("down", 1024, 2816),
        ],
        layers: 8,
        head: (ROWS, 1024),
    },
];

fn few(c: &mut Criterion) {
    for (model, format) in models() {
        let mut group = c.benchmark_group(format!("{}few/{format:?}", model.name));
        group.sample_size(20);
        let mut arena = Arena::default();
        let mut weight = |rows: usize, columns: usize| {
            let len = rows * columns / format.block() * format.block_bytes();
            let mut bytes = arena.zeros(len);
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = 0x30 + (i % 11) as u8;
            }
            Weight::shared(format, rows, columns, bytes.freeze()).expect("whole blocks")
        };
        // As many as a model has, so that each is read from memory.
        let layers = (0..model.layers).flat_map(|_| model.layer);
        let mut weights: Vec<Weight<'_>> = layers
            .map(|(_, rows, columns)| weight(rows, columns))
            .collect();
        weights.push(weight(model.head.0, model.head.1));
        let widest = weights.iter().map(Weight::columns).max().unwrap_or(0);
        for tokens in [1, 2, 4, 8, 12, 16] {
            let x = numbers(tokens * widest, 7, 1.0);
            let mut out = vec![0.0; tokens * ROWS];
            group.throughput(Throughput::Elements(tokens as u64));
            group.bench_function(format!("{tokens} tokens, all matrices of the model"), |b| {
                b.iter(|| {
                    awake(|| {
                        for weight in &weights {
                            let x = &x[..tokens * weight.columns()];
                            matmul(black_box(x), weight, &mut out[..tokens * weight.rows()]);
                        }
                    });
                });
            });
        }
    }
}

/// Every model in each of its formats.
fn models() -> impl Iterator<Item = (&'static Model, DType)> {
    let each = |model: &'static Model| model.formats.iter().map(move |format| (model, *format));
    MODELS.iter().flat_map(each)
}

fn chunk(c: &mut Criterion) {
    for (model, format) in models() {
        let mut group = c.benchmark_group(format!("{}chunk/{format:?}", model.name));
        group.sample_size(20);
        for (name, rows, columns) in model.layer {
            let x = numbers(TOKENS * columns, 7, 1.0);
            let mut out = vec![0.0; TOKENS * rows];
            let len = rows * columns / format.block() * format.block_bytes();
            let bytes: Vec<u8> = (0..len).map(|i| 0x30 + (i % 11) as u8).collect();
            let weight = Weight::new(format, rows, columns, bytes).expect("whole blocks");
            group.throughput(Throughput::Elements(2 * (TOKENS * rows * columns) as u64));
            group.bench_function(name, |b| {
                b.iter(|| matmul(black_box(&x), &weight, &mut out));
            });
        }
    }
}

criterion_group!(benches, linear, few, chunk);
criterion_main!(benches);
