//! What a policy drops and queries fetch back: against plain loops, the full cache, and through the conformance suite.

mod common;

use burn::tensor::Device;
use locret_core::{
    Budget, CacheOptions, CausalLm, DType, Error, Evict, Generate, KvCachePolicy, ModelSpec, Pass,
    Phase, Positions, Prefill, Qkv, QuantLayout, Quantization, RopeConfig, RopeScaling,
    SequenceCache, Session, Tier, View, Visible, compute,
    conformance::{Case, PolicyCheck, RandomModel, Recording, check_policy, small_spec},
};
use locret_policies::{
    Full, HeadWeights, KeyNorm, LayerHead, Merge, Method, PolicyConfig, PutAway, Quantized,
    RetainingHeads, Tiered,
};
use proptest::prelude::*;
use std::sync::Arc;

fn heads(model: &dyn CausalLm) -> RetainingHeads {
    let spec = model.spec();
    let weight = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 60.0;
    let layer = |l: usize| LayerHead {
        d_r: 6,
        fc1: (0..6 * spec.layer(0).qkv_features())
            .map(|i| weight(i + l))
            .collect(),
        fc2: (0..6 * spec.kv_heads).map(|i| weight(i + 3 * l)).collect(),
        ..LayerHead::default()
    };
    let weights = HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        ..HeadWeights::default()
    };
    RetainingHeads::new(&weights, spec, &**model.compute()).unwrap()
}

fn built(config: &PolicyConfig, model: &dyn CausalLm) -> Arc<dyn KvCachePolicy> {
    match config.policy {
        Method::Locret => config.build_with_heads(model.spec(), heads(model)).unwrap(),
        _ => {
            let config = common::complete(config, model.spec());
            config.build_for(model).unwrap()
        }
    }
}

/// What puts away: merging does not go with it.
fn evicting() -> impl Iterator<Item = Method> {
    let all = Method::ALL.into_iter();
    all.filter(|method| method.evicts() && !method.merges())
}

fn text(tokens: usize) -> Vec<u32> {
    (0..tokens)
        .map(|i| ((i * i + 7 * i + i / 5) % 61) as u32)
        .collect()
}

#[test]
fn with_all_blocks_retrieved_it_is_the_full_cache() {
    let model = Arc::new(RandomModel::new(small_spec(6, 2, 16), 5, &Device::flex()).unwrap());
    let read = |policy: Arc<dyn KvCachePolicy>| {
        let mut session = Session::new(model.clone(), policy).unwrap();
        session.prefill(&text(150), &Prefill::new(20, 3)).unwrap();
        let logits = session.logits().unwrap().to_vec();
        let said = session.generate(Generate::greedy(12)).unwrap();
        let said: Vec<u32> = said.map(|token| token.unwrap()).collect();
        let last = session.score(&text(9)).unwrap();
        (
            logits,
            said,
            last.iter().map(|s| s.nll).collect::<Vec<f32>>(),
        )
    };
    let full = read(Arc::new(Full::new()));
    for method in evicting() {
        for positions in [Positions::Original, Positions::Compact] {
            for ada in [None, Some(0.2)] {
                let mut config = PolicyConfig::new(method)
                    .budget(Budget::Units(24))
                    .positions(positions);
                (config.put_away, config.ada) = (true, ada);
                (config.block_size, config.repr_topk) = (Some(7), Some(2));
                let some = read(built(&config, &*model));
                config.topk = Some(1 << 20);
                let all = read(built(&config, &*model));
                let off = |found: &[f32], due: &[f32]| {
                    let pairs = found.iter().zip(due);
                    pairs.map(|(a, b)| (a - b).abs()).fold(0f32, f32::max)
                };
                let name = format!("{method}, {positions:?}, {ada:?}");
                assert_eq!(all.1, full.1, "{name}");
                assert!(off(&all.0, &full.0) < 1e-4, "{name}");
                assert!(off(&all.2, &full.2) < 1e-4, "{name}");
                // A part of them is something else.
                config.topk = Some(1);
                let one = read(built(&config, &*model));
                assert!(off(&one.0, &full.0) > 1e-3, "{name}");
                assert!(some.0.iter().all(|x| x.is_finite()));
            }
        }
    }
}

/// A layer whose rotation turns nothing.
fn spec(heads: usize, kv_heads: usize, d: usize) -> ModelSpec {
    ModelSpec::new(1, heads, kv_heads, heads * d, 16)
        .with_head_dim(d)
        .with_rope(RopeConfig {
            theta: 10_000.0,
            rotary_dim: d,
            scaling: RopeScaling::Linear { factor: 1e30 },
        })
        .with_softmax_scale(1.0 / (d as f32).sqrt())
}

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let number = |place: usize| {
        let mut x = place as u64 + (seed << 20);
        for (shift, factor) in [(16, 0x7feb_352d), (15, 0x846c_a68b), (16, 1)] {
            x = ((x ^ (x >> shift)).wrapping_mul(factor)) & 0xffff_ffff;
        }
        ((x >> 8) as f64 / f64::from(1 << 22) - 2.0) as f32
    };
    (0..count).map(number).collect()
}

/// The `count` largest, ascending by place, and how much larger they are than the next one.
fn largest(x: &[f64], count: usize) -> (Vec<usize>, f64) {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|a, b| x[*b].total_cmp(&x[*a]));
    let gap = match order.get(count) {
        Some(next) => x[order[count - 1]] - x[*next],
        None => f64::INFINITY,
    };
    order.truncate(count);
    order.sort_unstable();
    (order, gap)
}

/// One KV head: what is near, what waits, blocks and their representatives by query head.
#[derive(Default)]
struct Naive {
    keys: Vec<Vec<f64>>,
    near: Vec<usize>,
    waits: Vec<usize>,
    blocks: Vec<Vec<usize>>,
    representatives: Vec<Vec<Vec<f64>>>,
    /// By query head of the group, by unit.
    paid: Vec<Vec<f64>>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sees(view: &View, unit: usize) -> bool {
    view.window == usize::MAX || view.ranges.iter().any(|r| r.contains(&(unit as u32)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn plain_loops_retrieve_the_same(
        kv_heads in 1usize..4,
        group in 1usize..4,
        steps in prop::collection::vec(1usize..30, 2..14),
        budget in 4usize..25,
        block in 1usize..9,
        topk in 1usize..4,
        representatives in 1usize..4,
        seed in 0u64..1000,
        tiered in any::<bool>(),
        compact in any::<bool>(),
        within in prop::option::of(0usize..90),
    ) {
        let (heads, d) = (kv_heads * group, 8);
        let representatives = representatives.min(block);
        let positions = if compact { Positions::Compact } else { Positions::Original };
        let inner = Evict::new(KeyNorm, Budget::Units(budget)).with_positions(positions);
        let mut policy = PutAway::new(inner).block(block).topk(topk).representatives(representatives);
        if let Some(units) = within {
            policy = policy.within(units);
        }
        let resident = Budget::Units(budget + policy.seen() + 30);
        let policy: Arc<dyn KvCachePolicy> = match tiered {
            true => Arc::new(Tiered::new(policy, Tier::memory(), resident)),
            false => Arc::new(policy),
        };
        let (spec, compute) = (spec(heads, kv_heads, d), compute(&Device::flex()));
        let recording = Arc::new(Recording::new(policy));
        let options = CacheOptions::default();
        let mut cache = SequenceCache::new(&spec, recording.clone(), &compute, options).unwrap();
        let n: usize = steps.iter().sum();
        let widths = [heads * d, kv_heads * d, kv_heads * d];
        let parts: Vec<Vec<f32>> = (0..3).map(|p| numbers(n * widths[p], 3 * seed + p as u64)).collect();
        let mut naive: Vec<Naive> = (0..kv_heads).map(|_| Naive::default()).collect();
        let mut first = 0;
        'steps: for t in steps {
            let rows = |which: usize| {
                let width = widths[which];
                parts[which][first * width..(first + t) * width].to_vec()
            };
            let part = |which: usize| compute.rows(rows(which), widths[which]).unwrap();
            let mut pass = Pass::new([cache.step(Phase::Prefill { last: false }, t, n)]).unwrap();
            pass.attend(0, Qkv::new(part(0), part(1), part(2))).unwrap();
            pass.finish(None).unwrap();
            let decision = recording.decisions().pop().unwrap();
            let (q, k) = (rows(0), rows(1));
            let (observed, _) = decision.seen.observed.clone().unwrap();
            for (head, naive) in naive.iter_mut().enumerate() {
                let mut shown: Vec<usize> = (naive.near.iter().chain(&naive.waits)).copied().collect();
                shown.extend(first..first + t);
                let mean = |query: usize| -> Vec<f64> {
                    let of = |i: usize| {
                        let at = |token: usize| f64::from(q[(token * heads + head * group + query) * d + i]);
                        (0..t).map(at).sum::<f64>() / t as f64
                    };
                    (0..d).map(of).collect()
                };
                let means: Vec<Vec<f64>> = (0..group).map(mean).collect();
                let score = |all: &Vec<Vec<f64>>| -> f64 {
                    all.iter().zip(&means).map(|(k, q)| dot(k, q)).sum()
                };
                let scores: Vec<f64> = naive.representatives.iter().map(score).collect();
                let room = within.map_or(usize::MAX, |units| units.saturating_sub(shown.len()));
                let fits = topk.min(room / block).min(scores.len());
                let (chosen, gap) = match fits {
                    0 => (Vec::new(), f64::INFINITY),
                    _ => largest(&scores, fits),
                };
                if gap < 1e-4 {
                    break 'steps;
                }
                shown.extend(chosen.iter().flat_map(|block| naive.blocks[*block].clone()));
                let view = match &decision.visible {
                    Visible::Chosen(views) => views.lists()[head][0].clone(),
                    _ => View::all(),
                };
                for unit in 0..first + t {
                    prop_assert_eq!(sees(&view, unit), shown.contains(&unit), "unit {}", unit);
                }
                let places = match &decision.visible {
                    Visible::Chosen(views) => views.places(),
                    _ => None,
                };
                prop_assert!(places.is_none() || compact);
                if let Some(places) = places {
                    shown.sort_unstable();
                    for (unit, place) in shown.iter().rev().zip((0..first + t).rev()) {
                        prop_assert_eq!(places[head][*unit] as usize, place, "unit {}", unit);
                    }
                } else {
                    prop_assert!(!compact || shown.len() == first + t || matches!(decision.visible, Visible::All));
                }
                // What is paid to what is near, and who goes.
                let wide = |row: &[f32]| row.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
                naive.keys.extend((0..t).map(|i| wide(&k[(i * kv_heads + head) * d..][..d])));
                naive.near.extend(first..first + t);
                naive.paid.resize(group, Vec::new());
                for (query, paid) in naive.paid.iter_mut().enumerate() {
                    paid.resize(first + t, 0.0);
                    for unit in naive.near.iter().chain(&naive.waits) {
                        paid[*unit] += f64::from(observed[head * group + query][*unit]);
                    }
                }
                let norms: Vec<f64> = (naive.near.iter())
                    .map(|unit| -dot(&naive.keys[*unit], &naive.keys[*unit]).sqrt())
                    .collect();
                let (kept, gap) = largest(&norms, budget.min(norms.len()));
                if gap < 1e-4 {
                    break 'steps;
                }
                let kept: Vec<usize> = kept.into_iter().map(|at| naive.near[at]).collect();
                naive.waits.extend(naive.near.iter().filter(|unit| !kept.contains(unit)));
                naive.waits.sort_unstable();
                naive.near = kept;
                while naive.waits.len() >= block {
                    let own: Vec<usize> = naive.waits.drain(..block).collect();
                    let mut all = Vec::new();
                    for paid in &naive.paid {
                        let paid: Vec<f64> = own.iter().map(|unit| paid[*unit]).collect();
                        let (best, gap) = largest(&paid, representatives);
                        if gap < 1e-5 {
                            break 'steps;
                        }
                        let mut mean = vec![0.0; d];
                        for at in &best {
                            let key = &naive.keys[own[*at]];
                            mean.iter_mut().zip(key).for_each(|(m, k)| *m += k / best.len() as f64);
                        }
                        all.push(mean);
                    }
                    naive.representatives.push(all);
                    naive.blocks.push(own);
                }
            }
            first += t;
        }
    }
}

fn small(
    case: &Case<'_>,
    method: Method,
    quantize: Option<Quantization>,
) -> Arc<dyn KvCachePolicy> {
    let mut config = PolicyConfig::new(method)
        .budget(Budget::Units(case.budget))
        .positions(case.positions);
    config.decode = Some(case.decode);
    let seed = case.seed as usize;
    let mut policy = built(&config, case.model);
    let putting = PutAway::new(policy)
        .block(1 + seed % 6)
        .topk(1 + seed % 3)
        .representatives(1);
    let resident = Budget::Units(case.budget.min(1 << 12) + putting.seen() + 80);
    policy = Arc::new(putting);
    if let Some(config) = quantize {
        policy = Arc::new(Quantized::new(policy, config));
    }
    match (seed % 3, quantize) {
        (0, _) => policy,
        // What is near is numbers for a while.
        (1, Some(_)) => Arc::new(Tiered::new(policy, Tier::memory(), Budget::Bytes(1 << 22))),
        (1, None) => Arc::new(Tiered::new(policy, Tier::memory(), resident)),
        (_, Some(_)) => Arc::new(Tiered::new(
            policy,
            Tier::disk(None),
            Budget::Bytes(1 << 22),
        )),
        (_, None) => Arc::new(Tiered::new(policy, Tier::disk(None), resident)),
    }
}

#[test]
fn every_method_conforms() {
    for (index, method) in evicting().enumerate() {
        let check = PolicyCheck {
            seeds: 4 * index as u64..4 * index as u64 + 4,
            fills_budget: false,
            dense: false,
            dtypes: vec![DType::F32],
            ..PolicyCheck::default()
        };
        check_policy(&Device::flex(), &check, |case| small(case, method, None))
            .unwrap_or_else(|e| panic!("{method}: {e}"));
    }
}

#[test]
fn over_units_of_few_bits() {
    for (bits, layout) in [
        (8, QuantLayout::PerToken),
        (8, QuantLayout::Kivi),
        (4, QuantLayout::PerToken),
        (4, QuantLayout::Kivi),
    ] {
        let config = Quantization {
            bits,
            layout,
            group: 16,
            residual: 4,
            first: 2,
            hadamard: bits == 8,
        };
        let check = PolicyCheck {
            seeds: 0..6,
            fills_budget: false,
            dense: false,
            dtypes: vec![DType::F32],
            tolerance: if bits == 4 { 1.0 } else { 0.1 },
            store_tolerance: if bits == 4 { 0.1 } else { 0.03 },
            ..PolicyCheck::default()
        };
        for method in [Method::Locret, Method::KeyNorm] {
            check_policy(&Device::flex(), &check, |case| {
                small(case, method, Some(config))
            })
            .unwrap_or_else(|e| panic!("{method}, {bits} bits, {layout:?}: {e}"));
        }
    }
}

#[test]
fn what_is_resident_is_what_is_near_and_what_was_fetched() {
    let model = Arc::new(RandomModel::new(small_spec(6, 2, 16), 5, &Device::flex()).unwrap());
    let spec = model.spec().clone();
    let mut config = PolicyConfig::new(Method::Locret).budget(Budget::Units(40));
    (config.put_away, config.block_size, config.topk) = (true, Some(8), Some(3));
    let plain = built(&config, &*model);
    config.tier = Some(locret_policies::TierConfig::Disk(None));
    // Near, what waits, what is fetched, and a chunk.
    let unit = spec.unit_bytes(4) * spec.layers * spec.kv_heads;
    config.resident = Some(Budget::Bytes((40 + 8 + 24 + 20) * unit));
    let tiered = built(&config, &*model);
    let read = |policy: Arc<dyn KvCachePolicy>| {
        let mut session = Session::new(model.clone(), policy).unwrap();
        session.prefill(&text(600), &Prefill::new(20, 0)).unwrap();
        session
    };
    let (plain, tiered) = (read(plain), read(tiered));
    assert_eq!(plain.logits(), tiered.logits());
    assert!(tiered.cache().peak().bytes <= 92 * unit);
    assert!(tiered.cache().bytes() <= 92 * unit);
    assert_eq!(tiered.cache().total_bytes(), 600 * unit);
    assert_eq!(plain.cache().bytes(), 600 * unit);

    // In units, with too little room for blocks while chunks are read, and for two of them with single tokens.
    config.resident = Some(Budget::Units(70));
    let mut bounded = read(built(&config, &*model));
    config.topk = Some(2);
    config.resident = Some(Budget::Units(1 << 20));
    let mut two = read(built(&config, &*model));
    assert_ne!(bounded.logits(), two.logits());
    config.budget = Some(Budget::Units(40));
    config.put_away = false;
    (config.topk, config.block_size, config.tier, config.resident) = (None, None, None, None);
    let evicting = read(built(&config, &*model));
    let off = |a: &Session, b: &Session| {
        let pairs = a.logits().unwrap().iter().zip(b.logits().unwrap());
        pairs.map(|(a, b)| (a - b).abs()).fold(0f32, f32::max)
    };
    // What waits to be a block is all that is seen beside what is kept.
    assert!(off(&bounded, &evicting) < off(&two, &evicting));
    bounded.score(&text(3)).unwrap();
    two.score(&text(3)).unwrap();
    // With room for some more single tokens.
    assert!(bounded.cache().peak().bytes <= (70 + 64) * unit);
}

#[test]
fn what_cannot_be_inside_is_refused() {
    let spec = small_spec(4, 2, 16);
    let check = |policy: Arc<dyn KvCachePolicy>| policy.validate(&spec, &Prefill::new(16, 0));
    let window = || {
        let config = PolicyConfig::new(Method::Window).budget(Budget::Units(20));
        config.build(&spec, &*compute(&Device::flex())).unwrap()
    };
    check(Arc::new(PutAway::new(window()))).unwrap();
    check(Arc::new(PutAway::new(PutAway::new(window())))).unwrap_err();
    check(Arc::new(PutAway::new(window()).block(0))).unwrap_err();
    check(Arc::new(PutAway::new(window()).topk(0))).unwrap_err();
    check(Arc::new(PutAway::new(window()).representatives(33))).unwrap_err();
    let mut merging = PolicyConfig::new(Method::Window).budget(Budget::Units(20));
    (merging.put_away, merging.merge) = (true, Some(0.5));
    assert!(merging.build(&spec, &*compute(&Device::flex())).is_err());
    // By hand it is found out when something is merged.
    let merging = Merge::new(Evict::new(KeyNorm, Budget::Units(20)), -1.0);
    let model = Arc::new(RandomModel::new(small_spec(4, 2, 16), 5, &Device::flex()).unwrap());
    let mut session = Session::new(model, Arc::new(PutAway::new(merging))).unwrap();
    let error = session
        .prefill(&text(60), &Prefill::new(20, 0))
        .unwrap_err();
    assert!(matches!(error, Error::Policy { .. }), "{error}");
}
