//! The CPU kernels and Burn's operations are two ways to the same numbers.

use crate::{
    device,
    policies::{Attended, Birth, Chance, KeyNorm, Largest, Logits, Ragged},
    text,
};
use locret_core::{
    Budget, CacheOptions, DType, Evict, Generate, Kernels, KvCachePolicy, LayerUnits, ModelSpec,
    Needs, Observation, Positions, Prefill, Queries, Result, Session, Step, Verdict,
    conformance::{Decision, RandomModel, Recording, Tap, Tapped, small_spec},
    is_host_device,
};
use proptest::prelude::*;
use std::sync::Arc;

type Make = fn(Positions) -> Arc<dyn KvCachePolicy>;

const POLICIES: [Make; 6] = [
    |p| Arc::new(Evict::new(KeyNorm, Budget::Units(20)).with_positions(p)),
    |p| Arc::new(Evict::new(Birth, Budget::Units(20)).with_positions(p)),
    |p| Arc::new(Evict::new(Attended, Budget::Units(20)).with_positions(p)),
    |p| Arc::new(Evict::new(Logits, Budget::Units(20)).with_positions(p)),
    |p| {
        let scorer = Largest(Observation::MaxWeightsByInput);
        Arc::new(Evict::new(scorer, Budget::Units(20)).with_positions(p))
    },
    |positions| {
        Arc::new(Ragged {
            limit: 24,
            positions,
        })
    },
];

struct Ran {
    passes: Vec<Tapped>,
    decisions: Vec<Decision>,
    logits: Vec<f32>,
}

fn run(
    spec: &ModelSpec,
    policy: Arc<dyn KvCachePolicy>,
    options: CacheOptions,
    tokens: usize,
    chunk: usize,
) -> Ran {
    let model = RandomModel::new(spec.clone(), 3, &device()).unwrap();
    let tap = Arc::new(Tap::new(Arc::new(model)));
    let recording = Arc::new(Recording::new(policy).store_tolerance(4e-3).with_units());
    let mut session = Session::with_options(tap.clone(), recording.clone(), options).unwrap();
    let prefill = Prefill::new(chunk, 3);
    session.prefill(&text(tokens), &prefill).unwrap();
    let logits = session.logits().unwrap().to_vec();
    for token in session.generate(Generate::greedy(4)).unwrap() {
        token.unwrap();
    }
    Ran {
        passes: tap.passes(),
        decisions: recording.decisions(),
        logits,
    }
}

fn far(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let off = |(a, b): (&f32, &f32)| if a == b { 0.0 } else { (a - b).abs() };
    a.iter().zip(b).map(off).fold(0.0, f32::max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn both_ways_give_the_same_numbers(
        (kv_heads, group) in (1usize..=3, prop::sample::select(vec![1usize, 3, 8])),
        head_dim in prop::sample::select(vec![8usize, 10, 16, 24, 40, 64]),
        tokens in 1usize..150,
        chunk in 1usize..70,
        compact in any::<bool>(),
        which in 0..POLICIES.len(),
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        scaled in any::<bool>(),
    ) {
        let mut spec = small_spec(kv_heads * group, kv_heads, head_dim);
        if scaled {
            spec.softmax_scale *= 1.3;
        }
        let positions = if compact { Positions::Compact } else { Positions::Original };
        let [a, b] = [Kernels::Auto, Kernels::Operations].map(|kernels| {
            run(&spec, POLICIES[which](positions), CacheOptions::new().dtype(dtype).kernels(kernels), tokens, chunk)
        });
        // A number that lies between two of 16 bits can become either of them.
        let tolerance = match dtype {
            DType::F32 => 2e-5,
            DType::F16 => 5e-3,
            _ => 4e-2,
        };
        // Almost equal scores can be ranked either way: then the runs part.
        let fork = a.decisions.iter().zip(&b.decisions).position(|(x, y)| x.kept != y.kept);
        let same = fork.unwrap_or(a.decisions.len());
        for (x, y) in a.decisions[..same].iter().zip(&b.decisions) {
            prop_assert_eq!(x.step, y.step);
            for (x, y) in x.seen.keys.iter().zip(&y.seen.keys) {
                prop_assert!(far(x, y) <= 5.0 * tolerance, "keys off by {}", far(x, y));
            }
            for (x, y) in x.seen.values.iter().zip(&y.seen.values) {
                prop_assert!(far(x, y) <= 5.0 * tolerance, "values off by {}", far(x, y));
            }
            match (&x.seen.observed, &y.seen.observed) {
                (Some((x, i)), Some((y, j))) => {
                    prop_assert_eq!(i, j);
                    let off = far(&x.concat(), &y.concat());
                    prop_assert!(off <= 10.0 * tolerance, "observed off by {}", off);
                }
                (None, None) => {}
                other => prop_assert!(false, "{:?}", other),
            }
        }
        let passes = same / spec.layers;
        for (x, y) in a.passes[..passes].iter().zip(&b.passes) {
            let off = far(&x.hidden, &y.hidden);
            prop_assert!(off <= tolerance, "hidden states off by {}", off);
        }
        // With 32 bits no two scores are that close here.
        if dtype == DType::F32 {
            prop_assert_eq!(fork, None);
            prop_assert!(far(&a.logits, &b.logits) <= 10.0 * tolerance);
        }
    }
}

#[test]
fn nobody_observed_is_nothing_observed() {
    #[derive(Debug)]
    struct Watching(Observation);
    impl KvCachePolicy for Watching {
        fn name(&self) -> String {
            "watching".into()
        }
        fn needs(&self) -> Needs {
            Needs::NOTHING.observe(Queries::Last(0), self.0)
        }
        fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
            let observed = units.observed().expect("what was asked for");
            assert_eq!(observed.queries, 0);
            let (rows, nothing) = match self.0 {
                Observation::MaxLogits => (at.layer.kv_heads, f32::NEG_INFINITY),
                _ => (at.layer.heads, 0.0),
            };
            assert_eq!(observed.per_head.len(), rows);
            let all = observed.per_head.concat();
            assert_eq!(all.len(), rows * units.longest());
            assert!(all.iter().all(|x| *x == nothing), "{all:?}");
            Ok(Verdict::keep_all())
        }
    }
    let model = Arc::new(RandomModel::new(small_spec(6, 2, 16), 1, &device()).unwrap());
    for kernels in [Kernels::Auto, Kernels::Operations] {
        for what in [
            Observation::Weights,
            Observation::MaxLogits,
            Observation::MaxWeights,
            Observation::MaxWeightsByInput,
        ] {
            let options = CacheOptions::new().kernels(kernels);
            let policy = Arc::new(Watching(what));
            let mut session = Session::with_options(model.clone(), policy, options).unwrap();
            session.prefill(&text(30), &Prefill::new(7, 1)).unwrap();
        }
    }
}

#[test]
fn flex_is_host_memory_and_operations_avoid_it() {
    assert!(is_host_device(&device()));
    let spec = small_spec(2, 1, 8);
    let model = Arc::new(RandomModel::new(spec, 1, &device()).unwrap());
    for (kernels, tiles) in [(Kernels::Auto, true), (Kernels::Operations, false)] {
        let options = CacheOptions::new().kernels(kernels);
        let policy = Arc::new(Evict::new(Chance(1), Budget::Units(9)));
        let mut session = Session::with_options(model.clone(), policy, options).unwrap();
        session.prefill(&text(20), &Prefill::default()).unwrap();
        assert_eq!(session.cache().store(0).tiles(0).is_some(), tiles);
    }
}
