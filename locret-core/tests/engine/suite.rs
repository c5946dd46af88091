//! The conformance suite over simple policies, every dense store and both kinds of kernels.

use crate::{
    device, model_of,
    policies::{
        Attended, Birth, Chance, Coded, Everything, KeyNorm, Largest, Logits, Mixing, Newest,
        Ragged, Surprise,
    },
    text,
};
use locret_core::{
    Budget, BudgetTable, CacheOptions, Compute, DType, Dense, Evict, Kernels, KvCachePolicy,
    LayerSpec, LayerUnits, Needs, Observation, Placement, Positions, QuantLayout, Quantization,
    QuantizedStore, Result, RopeConfig, RopeScaling, Scorer, Share, Step, Verdict,
    conformance::{
        AdapterCheck, Case, Listing, PolicyCheck, StoreCheck, check_adapter, check_compute,
        check_policy, check_store, small_spec,
    },
};
use std::sync::Arc;

fn evict<S: Scorer + 'static>(case: &Case<'_>, scorer: S) -> Evict<S> {
    Evict::new(scorer, Budget::Units(case.budget))
        .with_positions(case.positions)
        .while_decoding(case.decode)
}

#[test]
fn a_scorer_over_keys() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(evict(case, KeyNorm).sinks(2).recent(3))
    })
    .unwrap();
}

#[test]
fn a_window() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(evict(case, Newest).sinks(4))
    })
    .unwrap();
}

#[test]
fn chance_with_ties() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(evict(case, Chance(case.seed)))
    })
    .unwrap();
}

#[test]
fn scores_from_birth_with_stabilizers() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(evict(case, Birth).stabilizers(case.budget / 3))
    })
    .unwrap();
}

#[test]
fn surprisal() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(evict(case, Surprise).sinks(1).recent(2))
    })
    .unwrap();
}

#[test]
fn observed_weights() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(evict(case, Attended))
    })
    .unwrap();
}

#[test]
fn observed_largest_weights() {
    for what in [Observation::MaxWeights, Observation::MaxWeightsByInput] {
        check_policy(&device(), &PolicyCheck::default(), |case| {
            Arc::new(evict(case, Largest(what)))
        })
        .unwrap();
    }
}

#[test]
fn observed_logits() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(evict(case, Logits).recent(2))
    })
    .unwrap();
}

/// Budgets that are shared over the model, and tables of budgets.
#[test]
fn budgets_that_differ_between_heads_and_layers() {
    let check = PolicyCheck {
        fills_budget: false,
        ..PolicyCheck::default()
    };
    check_policy(&device(), &check, |case| {
        Arc::new(evict(case, KeyNorm).recent(3).share(Share::Model))
    })
    .unwrap();
    check_policy(&device(), &check, |case| {
        let policy = evict(case, Birth).sinks(1).ada(0.0).stabilizers(2);
        Arc::new(policy.share(Share::Model))
    })
    .unwrap();
    let row = |case: &Case<'_>, layer: usize, heads: usize| {
        let share = |head| 0.3 + ((case.seed as usize + 5 * layer + 3 * head) % 7) as f64;
        (0..heads).map(share).collect::<Vec<f64>>()
    };
    let table = |case: &Case<'_>, heads: usize| {
        let rows = (0..case.spec.layers).map(|layer| row(case, layer, heads));
        BudgetTable::new(rows.collect()).unwrap()
    };
    // What all of the model have together does not say that no head's share is reached.
    check_policy(&device(), &check, |case| {
        let heads = case.spec.kv_heads;
        Arc::new(evict(case, KeyNorm).recent(3).table(table(case, heads)))
    })
    .unwrap();
    check_policy(&device(), &check, |case| {
        Arc::new(evict(case, Attended).ada(0.2).table(table(case, 1)))
    })
    .unwrap();
}

#[test]
fn heads_of_different_lengths() {
    let check = PolicyCheck {
        fills_budget: false,
        ..PolicyCheck::default()
    };
    check_policy(&device(), &check, |case| {
        Arc::new(Ragged {
            limit: case.budget,
            positions: case.positions,
        })
    })
    .unwrap();
}

#[test]
fn mixed_values() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(Mixing {
            limit: case.budget,
            positions: case.positions,
        })
    })
    .unwrap();
}

/// Another policy's verdicts, on all layers at once.
#[derive(Debug)]
struct AtOnce<P>(P);

impl<P: KvCachePolicy> KvCachePolicy for AtOnce<P> {
    fn name(&self) -> String {
        format!("{} at once", self.0.name())
    }

    fn needs(&self) -> Needs {
        self.0.needs().all_layers()
    }

    fn positions(&self) -> Positions {
        self.0.positions()
    }

    fn carries(&self) -> Option<String> {
        self.0.carries()
    }

    fn limit(&self, layer: &LayerSpec, total: usize) -> Option<usize> {
        self.0.limit(layer, total)
    }

    fn decode_slack(&self) -> Option<usize> {
        self.0.decode_slack()
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        self.0.step(at, units)
    }
}

#[test]
fn verdicts_on_all_layers_at_once() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(AtOnce(evict(case, Birth).recent(2)))
    })
    .unwrap();
}

#[test]
fn a_policy_with_a_store_of_few_bits() {
    let codes = Quantization {
        residual: 4,
        ..Quantization::bits(8)
    };
    let check = PolicyCheck {
        dense: false,
        dtypes: vec![DType::F32],
        tolerance: 5e-2,
        store_tolerance: off_by(codes),
        ..PolicyCheck::default()
    };
    check_policy(&device(), &check, |case| {
        Arc::new(Coded(evict(case, Birth).stabilizers(4), codes))
    })
    .unwrap();
    check_policy(&device(), &check, |case| {
        let policy = Mixing {
            limit: case.budget,
            positions: case.positions,
        };
        Arc::new(Coded(policy, codes))
    })
    .unwrap();
}

#[test]
fn a_full_cache() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        Arc::new(Everything {
            positions: case.positions,
            needs: Needs::NOTHING,
        })
    })
    .unwrap();
}

#[test]
fn a_ratio() {
    check_policy(&device(), &PolicyCheck::default(), |case| {
        // `like_full` asks for a budget that is never reached.
        let ratio = if case.budget > 1000 { 1.0 } else { 0.3 };
        let policy = Evict::new(KeyNorm, Budget::Ratio(ratio)).recent(2);
        Arc::new(
            policy
                .with_positions(case.positions)
                .while_decoding(case.decode),
        )
    })
    .unwrap();
}

#[test]
fn whatever_computes() {
    for kernels in [Kernels::Auto, Kernels::Operations] {
        check_compute(&kernels.on(&device()), 2e-5, 0..60).unwrap();
    }
    // It looks at logits where they lie.
    let listing = Listing::new(Kernels::Auto.on(&device()));
    check_compute(&(Arc::new(listing) as Arc<dyn Compute>), 2e-5, 0..20).unwrap();
}

#[test]
fn dense_stores() {
    for kernels in [Kernels::Auto, Kernels::Operations] {
        for (dtype, tolerance) in [(DType::F32, 0.0), (DType::F16, 5e-4), (DType::BF16, 4e-3)] {
            let check = StoreCheck {
                tolerance,
                bytes_per_value: dtype.block_bytes() as f64,
                ..StoreCheck::default()
            };
            let compute = kernels.on(&device());
            let place = Placement { compute, dtype };
            check_store(&device(), &check, |layer| Dense::boxed(layer, &place)).unwrap();
        }
    }
}

/// How far off a number may be, as a share of the largest: half a step of the whole range, and the 16 bits of step and
/// low. Turned, a number is a mean of all those of its block, each of which is off on its own: numbers between -√3 and
/// √3 become normal ones of variance 1, of which 64 span some 6.5; what they are off by has a standard deviation of a
/// step over √12, and among millions the largest is six of these: `6 · 6.5 / √12 / √3 = 6.5` steps of the largest.
pub(crate) fn off_by(config: Quantization) -> f32 {
    let step = 1.0 / ((1 << config.bits) - 1) as f32;
    let turned = if config.hadamard { 6.5 } else { 1.0 };
    turned * step + 3e-3
}

#[test]
fn stores_of_few_bits() {
    for (index, (bits, layout, group, residual, hadamard)) in [
        (8, QuantLayout::PerToken, 64, 32, false),
        (4, QuantLayout::PerToken, 16, 0, true),
        (4, QuantLayout::PerToken, 16, 0, false),
        (3, QuantLayout::PerToken, 64, 9, true),
        (2, QuantLayout::PerToken, 64, 5, false),
        (8, QuantLayout::PerToken, 64, 32, true),
        (8, QuantLayout::Kivi, 32, 16, true),
        (8, QuantLayout::Kivi, 32, 16, false),
        (4, QuantLayout::Kivi, 10, 0, false),
        (3, QuantLayout::Kivi, 32, 16, false),
        (2, QuantLayout::Kivi, 64, 3, true),
        (2, QuantLayout::Kivi, 64, 3, false),
    ]
    .into_iter()
    .enumerate()
    {
        let config = Quantization {
            bits,
            layout,
            group,
            residual,
            first: index % 5,
            hadamard,
        };
        let (run, waiting) = match layout {
            QuantLayout::PerToken => (0.0, 0),
            // A group of keys that has one unit left keeps its scales.
            _ => (2.0, group - 1),
        };
        let check = StoreCheck {
            seeds: 0..30,
            tolerance: off_by(config),
            // Two planes of 3 bits end with whole bytes both.
            bytes_per_value: f64::from(bits) / 8.0
                + f64::from(u8::from(bits == 3)) / 16.0
                + 4.0 / group.min(8) as f64
                + run,
            reserve: 2 * 64 + residual + waiting,
            head_dims: vec![8, 20, 64],
            plans_exactly: false,
            ..StoreCheck::default()
        };
        let place = Placement {
            compute: [Kernels::Auto, Kernels::Operations][index % 2].on(&device()),
            dtype: DType::F32,
        };
        check_store(&device(), &check, |layer| {
            QuantizedStore::boxed(layer, &place, config)
        })
        .unwrap();
    }
}

#[test]
fn adapters() {
    for (heads, kv_heads, head_dim) in [(4, 4, 8), (6, 2, 16), (8, 1, 64)] {
        for kernels in [Kernels::Auto, Kernels::Operations] {
            let check = AdapterCheck {
                options: CacheOptions::new().kernels(kernels),
                ..AdapterCheck::default()
            };
            let mut spec = small_spec(heads, kv_heads, head_dim);
            let model = model_of(spec.clone());
            check_adapter(model, &text(37), &check).unwrap();
            spec.rope = RopeConfig {
                scaling: RopeScaling::Llama3 {
                    factor: 8.0,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max: 40,
                },
                ..RopeConfig::plain(10_000.0, head_dim)
            };
            check_adapter(model_of(spec), &text(20), &check).unwrap();
        }
    }
}
