//! What a processor can do at most, and how much of it the kernels reach: multiplications and additions in registers, the
//! plain reading of memory, and beside them products and attention of SmolLM2-135M's shape, with one thread and with more.
//!
//! ```text
//! cargo run --release --workspace --bin limits -- --threads 1 --threads 2
//! ```
//!
//! In every round each is done once, so that other load meets all of them; reported are medians, in Markdown. Weights
//! are as many as a model has, so that each is read from memory and not from a cache.

use clap::Parser;
use locret_benches::numbers;
use locret_core::{
    DType,
    kernels::{
        attention::{AttnShape, attend},
        awake::awake,
        instruction_set,
        linear::{Weight, matmul},
        pages::Arena,
        tiles::{DenseTiles, KvTiles},
    },
};
use rayon::prelude::*;
use std::{hint::black_box, time::Instant};

/// Measures what bounds the kernels, and how near they come
#[derive(Debug, Parser)]
struct Args {
    /// Threads; may be given several times [default: 1, and all]
    #[arg(long, value_name = "N")]
    threads: Vec<usize>,
    /// How often each is measured
    #[arg(long, value_name = "N", default_value_t = 9)]
    rounds: usize,
}

/// Types, and matrices that they can make: those of SmolLM2, and of a model whose rows are whole blocks of K-quants.
const FORMATS: [(DType, &[(usize, usize)], usize); 9] = [
    (DType::F32, &SMOL, 30),
    (DType::F16, &SMOL, 30),
    (DType::BF16, &SMOL, 30),
    (DType::Q8_0, &SMOL, 30),
    (DType::Q4_0, &SMOL, 30),
    (DType::Q4_1, &SMOL, 30),
    (DType::Q4_K, &WIDE, 8),
    (DType::Q5_K, &WIDE, 8),
    (DType::Q6_K, &WIDE, 8),
];
const SMOL: [(usize, usize); 4] = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
const WIDE: [(usize, usize); 4] = [(2048, 1024), (1024, 1024), (5632, 1024), (1024, 2816)];
const VOCABULARY: usize = 49_152;
const CHUNKS: [usize; 3] = [64, 256, 512];

/// Something that is measured.
struct Work<'a> {
    name: String,
    /// Bytes, or operations, of one time.
    amount: f64,
    unit: &'static str,
    /// Which other work is the most there can be of it.
    bound: Option<usize>,
    run: Box<dyn FnMut() + Send + 'a>,
}

/// A matrix's place among the bytes of all, and its rows and columns.
struct Part {
    rows: usize,
    columns: usize,
    first: usize,
    bytes: usize,
}

fn parts(format: DType, shapes: &[(usize, usize)], layers: usize) -> Vec<Part> {
    let head = (VOCABULARY, shapes[0].1);
    let all = (0..layers)
        .flat_map(|_| shapes.iter().copied())
        .chain([head]);
    let mut first = 0;
    all.map(|(rows, columns)| {
        let bytes = rows * columns / format.block() * format.block_bytes();
        let part = Part {
            rows,
            columns,
            first,
            bytes,
        };
        first += bytes;
        part
    })
    .collect()
}

/// The sum of all words, by all threads, with no more work than that.
fn read(bytes: &[u8]) -> u64 {
    const WORDS: usize = 32;
    let share = bytes.len().div_ceil(rayon::current_num_threads());
    let sum = |part: &[u8]| {
        let mut sums = [0u64; WORDS];
        for words in part.chunks_exact(8 * WORDS) {
            for (sum, word) in sums.iter_mut().zip(words.chunks_exact(8)) {
                *sum = sum.wrapping_add(word.try_into().map_or(0, u64::from_le_bytes));
            }
        }
        sums.iter().fold(0, |a: u64, b| a.wrapping_add(*b))
    };
    let parts = bytes.par_chunks(share.next_multiple_of(8 * WORDS).max(1));
    parts.map(sum).reduce(|| 0, u64::wrapping_add)
}

/// Steps of the loop of multiplications and additions.
const STEPS: usize = 1 << 20;

/// Multiplications and additions that wait for nothing: operations of one thread.
fn multiply(seed: f32) -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions.
            return unsafe { x86::wide(seed) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the instructions.
            return unsafe { x86::half(seed) };
        }
    }
    let mut sums = [seed; 64];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = sum.mul_add(0.999, 1e-3);
        }
        black_box(&mut sums);
    }
    (STEPS * 64 * 2) as f64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::STEPS;
    use std::{arch::x86_64::*, hint::black_box};

    /// Sums that are in the making at once: two additions a cycle, each done after four or five.
    const SUMS: usize = 12;

    #[target_feature(enable = "avx512f")]
    pub fn wide(seed: f32) -> f64 {
        let (a, b) = (_mm512_set1_ps(0.999), _mm512_set1_ps(1e-3));
        let mut sums = [_mm512_set1_ps(seed); SUMS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        (STEPS * SUMS * 16 * 2) as f64
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn half(seed: f32) -> f64 {
        let (a, b) = (_mm256_set1_ps(0.999), _mm256_set1_ps(1e-3));
        let mut sums = [_mm256_set1_ps(seed); SUMS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        (STEPS * SUMS * 8 * 2) as f64
    }
}

fn main() {
    let args = Args::parse();
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let mut threads = args.threads.clone();
    if threads.is_empty() {
        threads = vec![1, all];
        threads.dedup();
    }
    let name = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = name
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("Unknown processor", |line| {
            line.trim_start_matches(['\t', ' ', ':'])
        });
    println!(
        "{name} ({all} cores), instructions {}; medians of {} rounds.",
        instruction_set(),
        args.rounds
    );
    let measured: Vec<Vec<Line>> = threads.iter().map(|n| measure(*n, args.rounds)).collect();
    let heads: Vec<String> = threads
        .iter()
        .map(|n| {
            format!(
                " {n} thread{} | of the most |",
                if *n == 1 { "" } else { "s" }
            )
        })
        .collect();
    println!("\n| work |{}", heads.concat());
    println!("|---|{}", "--:|--:|".repeat(threads.len()));
    for at in 0..measured[0].len() {
        let cells: Vec<String> = measured.iter().map(|lines| lines[at].cells()).collect();
        println!("| {} |{}", measured[0][at].name, cells.concat());
    }
}

/// A line of the table, with one number of threads.
struct Line {
    name: String,
    rate: f64,
    unit: &'static str,
    share: Option<f64>,
}

impl Line {
    fn cells(&self) -> String {
        let share = self.share.map_or(String::new(), |s| format!("{s:.2}"));
        format!(" {:.1} {} | {share} |", self.rate / 1e9, self.unit)
    }
}

fn measure(threads: usize, rounds: usize) -> Vec<Line> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("threads");
    pool.install(|| {
        let mut lines = medians(&mut [peak(threads)], rounds);
        for (format, shapes, layers) in FORMATS {
            lines.extend(token(format, shapes, layers, rounds));
        }
        for (format, shapes, _) in FORMATS {
            lines.extend(chunks(format, shapes, threads, rounds));
        }
        lines.extend(attention(threads, rounds));
        lines
    })
}

/// Each once a round: medians of the rates, and of the shares in the rounds.
fn medians(work: &mut [Work<'_>], rounds: usize) -> Vec<Line> {
    let mut rates = vec![Vec::new(); work.len()];
    for round in 0..=rounds {
        for (work, rates) in work.iter_mut().zip(&mut rates) {
            let start = Instant::now();
            (work.run)();
            // The first round warms up.
            if round > 0 {
                rates.push(work.amount / start.elapsed().as_secs_f64());
            }
        }
    }
    let median = |mut list: Vec<f64>| {
        list.sort_by(f64::total_cmp);
        list.get(list.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let share =
        |own: &[f64], most: &[f64]| median(own.iter().zip(most).map(|(a, b)| a / b).collect());
    let line = |(work, own): (&Work<'_>, &Vec<f64>)| Line {
        name: work.name.clone(),
        rate: median(own.clone()),
        unit: work.unit,
        share: work.bound.map(|other| share(own, &rates[other])),
    };
    work.iter().zip(&rates).map(line).collect()
}

/// What registers can do, by as many threads of their own: those of the pool look for work meanwhile only where
/// they are kept awake.
fn peak(threads: usize) -> Work<'static> {
    // Long enough for threads to be on processors of their own.
    const TIMES: usize = 24;
    let alone = move |i: usize| (0..TIMES).map(|_| multiply(i as f32)).sum::<f64>();
    Work {
        name: "multiplications and additions in registers".into(),
        amount: alone(0) * threads as f64,
        unit: "GFLOP/s",
        bound: None,
        run: Box::new(move || {
            std::thread::scope(|scope| {
                for i in 0..threads {
                    scope.spawn(move || black_box(alone(i)));
                }
            });
        }),
    }
}

/// One token meets all matrices of a model; and their bytes are read.
fn token(format: DType, shapes: &[(usize, usize)], layers: usize, rounds: usize) -> Vec<Line> {
    let parts = parts(format, shapes, layers);
    let len = parts.last().map_or(0, |part| part.first + part.bytes);
    let mut arena = Arena::default();
    let mut bytes = arena.zeros(len);
    // Any bytes do; these make no subnormal numbers.
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = 0x30 + (i % 11) as u8;
    }
    let bytes = bytes.freeze();
    let weight = |part: &Part| {
        let own = bytes.slice(part.first..part.first + part.bytes);
        Weight::shared(format, part.rows, part.columns, own).expect("whole blocks")
    };
    let weights: Vec<Weight<'_>> = parts.iter().map(weight).collect();
    let widest = parts.iter().map(|part| part.columns).max().unwrap_or(0);
    let x = numbers(widest, 7, 1.0);
    let mut out = vec![0.0; VOCABULARY];
    let mut work = [
        Work {
            name: format!("reading {} MB of {format:?}", len / 1_000_000),
            amount: len as f64,
            unit: "GB/s",
            bound: None,
            run: Box::new(|| {
                black_box(awake(|| read(&bytes)));
            }),
        },
        Work {
            name: format!("one token, {format:?}"),
            amount: len as f64,
            unit: "GB/s",
            bound: Some(0),
            run: Box::new(|| {
                awake(|| {
                    for weight in &weights {
                        let x = &x[..weight.columns()];
                        matmul(black_box(x), weight, &mut out[..weight.rows()]);
                    }
                });
            }),
        },
    ];
    medians(&mut work, rounds)
}

/// Chunks meet the matrices of a layer.
fn chunks(format: DType, shapes: &[(usize, usize)], threads: usize, rounds: usize) -> Vec<Line> {
    let parts = parts(format, shapes, 1);
    let layer = &parts[..shapes.len()];
    let len = layer.last().map_or(0, |part| part.first + part.bytes);
    let bytes: Vec<u8> = (0..len).map(|i| 0x30 + (i % 11) as u8).collect();
    let weight = |part: &Part| {
        let own = bytes[part.first..part.first + part.bytes].to_vec();
        Weight::new(format, part.rows, part.columns, own).expect("whole blocks")
    };
    let weights: Vec<Weight<'_>> = layer.iter().map(weight).collect();
    let sizes: usize = layer.iter().map(|part| part.rows * part.columns).sum();
    let of = |tokens: usize| {
        let weights = &weights;
        let columns = weights.iter().map(Weight::columns).max().unwrap_or(0);
        let rows = weights.iter().map(Weight::rows).max().unwrap_or(0);
        let x = numbers(tokens * columns, 7, 1.0);
        let mut out = vec![0.0; tokens * rows];
        Work {
            name: format!("{tokens} tokens, {format:?}"),
            amount: 2.0 * (tokens * sizes) as f64,
            unit: "GFLOP/s",
            bound: Some(0),
            run: Box::new(move || {
                awake(|| {
                    for weight in weights {
                        let x = &x[..tokens * weight.columns()];
                        matmul(black_box(x), weight, &mut out[..tokens * weight.rows()]);
                    }
                });
            }),
        }
    };
    let mut work = vec![peak(threads)];
    work.extend(CHUNKS.map(of));
    medians(&mut work, rounds).split_off(1)
}

/// Chunks attend to 4,096 units: 9 query and 3 KV heads of 64 features.
fn attention(threads: usize, rounds: usize) -> Vec<Line> {
    const UNITS: usize = 4096;
    let (heads, kv_heads, head_dim) = (9, 3, 64);
    let side = |seed| numbers(UNITS * head_dim, seed, 1.7);
    let units: Vec<[Vec<f32>; 2]> = (0..kv_heads)
        .map(|head| [side(2 * head as u64), side(2 * head as u64 + 1)])
        .collect();
    let units = &units;
    let of = |tokens: usize| {
        let q = numbers(tokens * heads * head_dim, 99, 1.7);
        let mut out = vec![0.0; q.len()];
        let pairs = heads * (tokens * UNITS - tokens * (tokens - 1) / 2);
        let shape = AttnShape {
            tokens,
            heads,
            kv_heads,
            head_dim,
            scale: 0.125,
        };
        Work {
            name: format!("{tokens} tokens attend to {UNITS} units, f32"),
            amount: (4 * pairs * head_dim) as f64,
            unit: "GFLOP/s",
            bound: Some(0),
            run: Box::new(move || {
                let tiles: Vec<DenseTiles<'_>> = units
                    .iter()
                    .map(|[k, v]| DenseTiles::new(k.as_slice(), v.as_slice(), head_dim))
                    .collect();
                let heads: Vec<&dyn KvTiles> = tiles.iter().map(|t| t as &dyn KvTiles).collect();
                awake(|| attend(black_box(&q), &heads, shape, None, &mut out));
            }),
        }
    };
    let mut work = vec![peak(threads)];
    work.extend(CHUNKS.map(of));
    medians(&mut work, rounds).split_off(1)
}
