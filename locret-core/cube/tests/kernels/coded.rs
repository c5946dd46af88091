//! Units as codes: what the device keeps, beside what the CPU's store keeps of the same units, and attention to it.

use super::{attended, cube, device};
use locret_core::{
    Attention, Compute, DType, KvStore, LayerSpec, Observation, Observe, Ops, Placement,
    QuantLayout, Quantization, QuantizedStore, Queries, RopeConfig, RopeTable, Rows,
    conformance::{StoreCheck, check_store},
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

fn configs() -> Vec<Quantization> {
    let all = [
        (8, QuantLayout::PerToken, 64, 32, false),
        (4, QuantLayout::PerToken, 16, 0, true),
        (4, QuantLayout::PerToken, 16, 5, false),
        (3, QuantLayout::PerToken, 64, 9, true),
        (3, QuantLayout::PerToken, 20, 0, false),
        (2, QuantLayout::PerToken, 64, 5, false),
        (8, QuantLayout::Kivi, 32, 16, false),
        (4, QuantLayout::Kivi, 10, 0, false),
        (2, QuantLayout::Kivi, 32, 3, true),
        (3, QuantLayout::Kivi, 7, 3, false),
    ];
    let config = |(index, (bits, layout, group, residual, hadamard))| Quantization {
        bits,
        layout,
        group,
        residual,
        first: index % 4,
        hadamard,
    };
    all.into_iter().enumerate().map(config).collect()
}

fn layer(kv_heads: usize, group: usize, head_dim: usize) -> LayerSpec {
    LayerSpec {
        index: 0,
        layers: 1,
        heads: kv_heads * group,
        kv_heads,
        head_dim,
    }
}

#[test]
fn stores_of_codes_keep_what_they_promise() {
    for config in configs() {
        let step = 1.0 / ((1 << config.bits) - 1) as f32;
        let (run, waiting) = match config.layout {
            QuantLayout::PerToken => (0.0, 0),
            _ => (2.0, config.group - 1),
        };
        let check = StoreCheck {
            seeds: 0..4,
            // As for the CPU's store.
            tolerance: if config.hadamard { 6.5 } else { 1.0 } * step + 3e-3,
            bytes_per_value: f64::from(config.bits) / 8.0
                + f64::from(u8::from(config.bits == 3)) / 16.0
                + 4.0 / config.group.min(8) as f64
                + run,
            reserve: 2 * 64 + config.residual + waiting,
            head_dims: vec![16, 32, 64],
            plans_exactly: false,
            ..StoreCheck::default()
        };
        let place = Placement {
            compute: Arc::new(cube()),
            dtype: DType::F32,
        };
        check_store(&device(), &check, |layer| {
            QuantizedStore::boxed(layer, &place, config)
        })
        .unwrap_or_else(|e| panic!("{config:?}: {e}"));
    }
}

/// A store here and one in host memory, which are told the same.
struct Both {
    here: Box<dyn KvStore>,
    there: QuantizedStore,
    layer: LayerSpec,
    random: ChaCha8Rng,
}

impl Both {
    fn new(layer: LayerSpec, config: Quantization, seed: u64) -> Self {
        let compute = cube();
        Self {
            here: compute.coded_store(&layer, config).unwrap(),
            there: QuantizedStore::on(&device(), &layer, config).unwrap(),
            layer,
            random: ChaCha8Rng::seed_from_u64(seed),
        }
    }

    fn append(&mut self, tokens: usize) {
        let width = self.layer.kv_heads * self.layer.head_dim;
        let mut rows = || {
            let size = self.random.random_range(0.01f32..30.0);
            let numbers = (0..tokens * width).map(|_| size * self.random.random_range(-1.0..1.0));
            Rows::new(numbers.collect(), width, &device()).unwrap()
        };
        let (keys, values) = (rows(), rows());
        self.here.append(&keys, &values).unwrap();
        self.there.append(&keys, &values).unwrap();
    }

    /// Keeps each unit with some probability.
    fn retain(&mut self, share: f64) {
        let heads = 0..self.layer.kv_heads;
        let kept: Vec<Vec<u32>> = heads
            .map(|head| {
                let all = 0..self.here.len(head) as u32;
                all.filter(|_| self.random.random_bool(share)).collect()
            })
            .collect();
        self.here.retain(&kept).unwrap();
        self.there.retain(&kept).unwrap();
    }

    fn settle(&mut self) {
        self.here.settle().unwrap();
        self.there.settle().unwrap();
    }

    fn saved(store: &dyn KvStore) -> Vec<u8> {
        let mut bytes = Vec::new();
        store.write(&mut bytes).unwrap();
        bytes
    }
}

#[test]
fn codes_are_those_of_the_cpu() {
    for (index, config) in configs().into_iter().enumerate() {
        for dim in [32, 96] {
            let mut both = Both::new(layer(2, 1, dim), config, index as u64);
            for (tokens, share) in [
                (40, 1.0),
                (70, 0.6),
                (1, 1.0),
                (1, 0.99),
                (33, 0.9),
                (1, 1.0),
                (60, 0.2),
            ] {
                both.append(tokens);
                both.retain(share);
                both.settle();
            }
            let what = format!("{config:?}, heads of {dim}");
            for head in 0..2 {
                let pairs = [
                    (both.here.keys(head), both.there.keys(head)),
                    (both.here.values(head), both.there.values(head)),
                ];
                for (here, there) in pairs {
                    let [here, there] = [here, there].map(|x| x.unwrap().into_values().unwrap());
                    assert_eq!(here.len(), there.len(), "{what}");
                    let pairs = here.iter().zip(&there).enumerate();
                    if config.hadamard {
                        // Sums are in another order: a code may be its neighbour, which is seldom.
                        let far = |(_, (a, b)): &(usize, (&f32, &f32))| (*a - *b).abs() > 1e-4;
                        let others = pairs.filter(far).count();
                        assert!(others * 50 <= here.len(), "{what}: {others} are others");
                    } else {
                        let mut pairs = pairs;
                        let other = pairs.find(|(_, (a, b))| a.to_bits() != b.to_bits());
                        assert_eq!(other, None, "{what}");
                    }
                }
            }
            if !config.hadamard {
                assert!(
                    Both::saved(&*both.here) == Both::saved(&both.there),
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn attention_to_codes() {
    // Features, of which some are rotated; KV heads, query heads of each, tokens.
    for (case, (dim, rotary, kv_heads, group, tokens)) in [
        (64, 64, 3, 3, 1),
        (64, 32, 2, 2, 33),
        (96, 96, 2, 1, 9),
        (128, 128, 2, 4, 1),
        (128, 128, 1, 4, 19),
    ]
    .into_iter()
    .enumerate()
    {
        for (index, config) in configs().into_iter().enumerate() {
            // Every form, and every code, with some of the others.
            if (index + case) % 3 != 0 {
                continue;
            }
            let layer = layer(kv_heads, group, dim);
            let mut both = Both::new(layer, config, index as u64);
            both.append(150);
            both.settle();
            both.retain(0.7);
            both.append(20);
            both.settle();
            both.retain(0.9);
            both.append(tokens);
            let table = RopeTable::new(
                &RopeConfig::plain(10_000.0, rotary).frequencies(false).0,
                1.0,
                0..200 + tokens,
            );
            let q = (0..tokens * layer.heads * dim).map(|_| both.random.random_range(-1.0..1.0));
            let q: Vec<f32> = q.collect();
            for (rotation, parts) in [(None, 1), (Some(&table), 3)] {
                // Keys are up to 30, and scores far apart else.
                let over = Attention {
                    layer,
                    store: &*both.here,
                    scale: 0.1 / (dim as f32).sqrt(),
                    rotation,
                    sight: None,
                };
                let compute = cube().in_parts(parts);
                let rows = compute.rows(q.clone(), layer.heads * dim).unwrap();
                let found = compute.attend(rows.clone(), &over).unwrap();
                let (found, due) = (found.into_values().unwrap(), attended(&q, &over));
                let off = found.iter().zip(&due);
                let off = off.map(|(found, due)| (f64::from(*found) - due).abs());
                let off = off.fold(0.0, f64::max);
                let what = format!("case {case}, {config:?}, {parts} parts");
                println!("{what}: {off:.1e} off");
                // Values are up to 30.
                assert!(off < 30.0 * 5e-6, "{what}: {off:e} off");
                let asked = Observe {
                    queries: Queries::Last(tokens),
                    what: Observation::Weights,
                };
                let here = compute.observe(&rows, &over, asked, None).unwrap();
                let there = Ops::new(&device())
                    .observe(&rows, &over, asked, None)
                    .unwrap();
                for (here, there) in here.per_head.iter().zip(&there.per_head) {
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() < 5e-6 * tokens as f32;
                    assert!(here.iter().zip(there).all(near), "{what}: observed");
                }
            }
        }
    }
}
