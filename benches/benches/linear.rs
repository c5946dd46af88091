//! A token meets SmolLM2's head, `[49152, 576]`: the kernel in every type of the weights, and beside
//! it the plain reading of as many bytes, which is what bounds it. And a chunk of 512 tokens meets
//! the matrices of a layer, in operations per second: that is bound by arithmetic.

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

/// The sum of the words of `bytes`, by all threads, with no more work than that.
fn read(bytes: &[u8]) -> u64 {
    const WIDE: usize = 32;
    let share = bytes
        .len()
        .div_ceil(rayon::current_num_threads())
        .next_multiple_of(8 * WIDE);
    bytes
        .par_chunks(share)
        .map(|part| {
            let mut sums = [0u64; WIDE];
            for words in part.chunks_exact(8 * WIDE) {
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

fn chunk(c: &mut Criterion) {
    let shapes = [
        ("queries, keys and values", 960, 576),
        ("gate and up", 3072, 576),
        ("down", 576, 1536),
    ];
    for format in FORMATS {
        let mut group = c.benchmark_group(format!("chunk/{format:?}"));
        group.sample_size(20);
        for (name, rows, columns) in shapes {
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

criterion_group!(benches, linear, chunk);
criterion_main!(benches);
