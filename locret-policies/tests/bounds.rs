//! What holds for every policy at every step, whatever its settings: the bound, ascending unique
//! units, nothing dropped below the budget, and survivors that nobody touched.

mod common;

use burn::tensor::Device;
use common::{Numbers, drive, spec, steps};
use locret_core::{
    Budget, CacheOptions, DType, DecodeEviction, KvCachePolicy, ModelSpec, Phase, Positions,
    SequenceCache, compute,
};
use locret_policies::{HeadWeights, LayerHead, Method, PolicyConfig, RetainingHeads};
use proptest::prelude::*;
use std::{collections::HashMap, sync::Arc};

fn build(config: &PolicyConfig, spec: &ModelSpec) -> Arc<dyn KvCachePolicy> {
    let device = Device::default();
    if config.policy != Method::Locret {
        let config = common::complete(config, spec);
        return config.build(spec, &*compute(&device)).unwrap();
    }
    let mut numbers = Numbers(4);
    let layer = |_| LayerHead {
        d_r: 8,
        fc1: numbers.list(8 * spec.layer(0).qkv_features(), 0.5),
        fc2: numbers.list(8 * spec.kv_heads, 1.0),
        ..LayerHead::default()
    };
    let weights = HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: Default::default(),
        ..HeadWeights::default()
    };
    let heads = RetainingHeads::new(&weights, spec, &*compute(&device)).unwrap();
    config.build_with_heads(spec, heads).unwrap()
}

/// Keys and values of a unit as they were first seen in the store, by layer, head and position.
type Seen = HashMap<(usize, usize, u32), (Vec<f32>, Vec<f32>)>;

fn check_survivors(cache: &SequenceCache, seen: &mut Seen, with_keys: bool) {
    let d = cache.spec().head_dim;
    for layer in 0..cache.spec().layers {
        for head in 0..cache.spec().kv_heads {
            let store = cache.store(layer);
            let keys = store.keys(head).unwrap().into_values().unwrap();
            let values = store.values(head).unwrap().into_values().unwrap();
            let positions = cache.positions(layer, head);
            assert_eq!(keys.len(), positions.len() * d);
            for ((position, key), value) in
                positions.iter().zip(keys.chunks(d)).zip(values.chunks(d))
            {
                let found = (key.to_vec(), value.to_vec());
                let first = seen
                    .entry((layer, head, *position))
                    .or_insert_with(|| found.clone());
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&first.1), bits(&found.1), "value of unit {position}");
                if with_keys {
                    assert_eq!(bits(&first.0), bits(&found.0), "key of unit {position}");
                }
            }
        }
    }
}

#[derive(Debug, Clone)]
struct Case {
    kv_heads: usize,
    group: usize,
    config: PolicyConfig,
    turns: Vec<(usize, usize)>,
    chunk: usize,
    local: usize,
    dtype: DType,
    seed: u64,
}

fn any_case() -> impl Strategy<Value = Case> {
    let shape = (1usize..4, prop::sample::select(vec![1usize, 3, 8]));
    let method = prop::sample::select(Method::ALL.to_vec());
    let budget = (
        1usize..50,
        any::<bool>(),
        0usize..4,
        prop::sample::select(vec![1usize, 3]),
    );
    let talk = (
        prop::collection::vec((1usize..90, 0usize..8), 1..3),
        1usize..40,
        0usize..12,
    );
    let dtype = prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]);
    (shape, method, budget, talk, dtype, any::<u64>()).prop_map(
        |(
            (kv_heads, group),
            method,
            (budget, compact, decode, pool),
            (turns, chunk, local),
            dtype,
            seed,
        )| {
            let mut config = PolicyConfig::new(method).positions(if compact {
                Positions::Compact
            } else {
                Positions::Original
            });
            if method == Method::InfLlm {
                config.positions = None;
            }
            if method == Method::D2o {
                config.exempt = Some((0, 0));
            }
            if method.evicts() {
                config.budget = Some(Budget::Units(budget));
                config.pool = Some(pool);
                config.decode = Some(match decode {
                    0 => DecodeEviction::Off,
                    n => DecodeEviction::Every(n),
                });
            }
            Case {
                kv_heads,
                group,
                config,
                turns,
                chunk,
                local,
                dtype,
                seed,
            }
        },
    )
}

fn run(case: &Case) {
    let spec = spec(2, case.kv_heads, case.group, 8);
    let policy = build(&case.config, &spec);
    let options = CacheOptions::new().dtype(case.dtype);
    let mut cache =
        SequenceCache::new(&spec, policy, &compute(&Device::default()), options).unwrap();
    let mut numbers = Numbers(case.seed);
    let budget = match case.config.budget {
        Some(Budget::Units(n)) => n,
        _ => usize::MAX,
    };
    // Compact f32 keys are turned in place while decoding.
    let with_keys = case.config.positions == Some(Positions::Original) || case.dtype != DType::F32;
    let (mut seen, mut peak) = (Seen::new(), 0);
    for (turn, &(prompt, decode)) in case.turns.iter().enumerate() {
        let total = cache.seen() + prompt;
        if turn > 0 {
            cache.turn(total).unwrap();
            for layer in 0..2 {
                for head in 0..case.kv_heads {
                    assert!(cache.len(layer, head) <= budget);
                }
            }
        }
        for step in steps(
            &spec,
            &mut numbers,
            prompt,
            case.chunk,
            case.local,
            decode,
            turn == 0,
        ) {
            let before = cache.len(0, 0);
            drive(&mut cache, &step, total).unwrap();
            let grown = before + step.tokens;
            peak = peak.max(grown);
            let expected = match (step.phase, case.config.decode) {
                (Phase::Prefill { .. }, _) => grown.min(budget),
                (Phase::Decode, Some(DecodeEviction::Every(n))) if grown > budget + n - 1 => budget,
                _ => grown,
            };
            for layer in 0..2 {
                for head in 0..case.kv_heads {
                    let positions = cache.positions(layer, head);
                    assert_eq!(positions.len(), expected, "{:?}", step.phase);
                    assert!(positions.windows(2).all(|w| w[0] < w[1]));
                    assert!(positions.iter().all(|p| (*p as usize) < cache.seen()));
                    assert_eq!(cache.store(layer).len(head), expected);
                    let scores = cache.scores(layer, head).len();
                    let width = cache.policy().carried_width(&spec.layer(layer));
                    assert!(scores == 0 || scores == expected * width);
                }
            }
            assert_eq!(cache.peak().units_per_head, peak);
            // Those take what is dropped into themselves.
            if !case.config.policy.merges() {
                check_survivors(&cache, &mut seen, with_keys);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    #[test]
    fn the_bound_holds_and_survivors_are_untouched(case in any_case()) {
        run(&case);
    }
}

/// The peak of a long prompt is the budget and one chunk, exactly, in units and in bytes.
#[test]
fn the_peak_is_budget_and_chunk() {
    let spec = spec(3, 2, 3, 8);
    for method in Method::ALL.into_iter().filter(|m| m.evicts()) {
        let config = PolicyConfig::new(method).budget(Budget::Units(30));
        let policy = build(&config, &spec);
        let surprisal = policy.needs().surprisal;
        let mut cache = common::cache(&spec, policy);
        let mut numbers = Numbers(2);
        for step in steps(&spec, &mut numbers, 400, 20, 0, 0, true) {
            drive(&mut cache, &step, 400).unwrap();
        }
        let peak = cache.peak();
        assert_eq!(peak.units_per_head, 50, "{method}");
        // One layer after the other, but where the verdict waits for the last layer.
        let units = if surprisal {
            3 * 2 * 50
        } else {
            2 * (30 + 30 + 50)
        };
        assert_eq!(peak.units, units, "{method}");
        let unit = spec.unit_bytes(4);
        assert!(
            peak.bytes >= units * unit,
            "{method}: {} for {units} units",
            peak.bytes
        );
        // While a chunk is appended to what was just cut back there is no reserve.
        assert!(
            peak.bytes <= units * unit * 11 / 10,
            "{method}: {} for {units} units",
            peak.bytes
        );
        assert_eq!(cache.bytes(), 3 * 2 * 30 * unit, "{method}");
    }
}

/// Shares of the text grow with it.
#[test]
fn a_ratio_is_of_the_whole_text() {
    let spec = spec(1, 1, 1, 8);
    let config = PolicyConfig::new(Method::KeyNorm).budget(Budget::Ratio(0.25));
    let mut cache = common::cache(&spec, build(&config, &spec));
    let mut numbers = Numbers(2);
    for step in steps(&spec, &mut numbers, 101, 20, 0, 0, true) {
        drive(&mut cache, &step, 101).unwrap();
    }
    assert_eq!(cache.len(0, 0), 26);
    cache.turn(202).unwrap();
    for step in steps(&spec, &mut numbers, 101, 20, 0, 0, false) {
        drive(&mut cache, &step, 202).unwrap();
    }
    assert_eq!(cache.len(0, 0), 51);
}
