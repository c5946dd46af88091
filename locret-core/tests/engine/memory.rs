//! Peaks, exactly.

use crate::{
    device, model_of,
    policies::{Everything, KeyNorm, Newest, Surprise},
    spec, text,
};
use locret_core::{
    Budget, CacheOptions, DType, DecodeEviction, Evict, Generate, Kernels, KvCachePolicy,
    ModelSpec, Positions, Prefill, Session,
};
use proptest::prelude::*;
use std::sync::Arc;

fn after(
    spec: ModelSpec,
    policy: impl KvCachePolicy + 'static,
    options: CacheOptions,
    tokens: usize,
    prefill: Prefill,
) -> Session {
    let model = model_of(spec);
    let mut session = Session::with_options(model, Arc::new(policy), options).unwrap();
    session.prefill(&text(tokens), &prefill).unwrap();
    session
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_peak_is_the_budget_in_every_layer_and_one_chunk(
        layers in 1usize..5,
        kv_heads in 1usize..4,
        budget in 8usize..50,
        chunk in 2usize..40,
        extra in 0usize..30,
        compact in any::<bool>(),
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        kernels in prop::sample::select(vec![Kernels::Auto, Kernels::Operations]),
    ) {
        let mut spec = spec();
        (spec.layers, spec.heads, spec.kv_heads) = (layers, 2 * kv_heads, kv_heads);
        let positions = if compact { Positions::Compact } else { Positions::Original };
        let policy = Evict::new(KeyNorm, Budget::Units(budget)).with_positions(positions);
        let chunks = budget.div_ceil(chunk) + 2 + extra / chunk;
        let prefill = Prefill::new(chunk, 0);
        let options = CacheOptions::new().dtype(dtype).kernels(kernels);
        let session = after(spec.clone(), policy, options, chunks * chunk, prefill);
        let peak = session.report().prefill_peak;
        let units = (layers * budget + chunk) * kv_heads;
        prop_assert_eq!(peak.units_per_head, budget + chunk);
        prop_assert_eq!(peak.units, units);
        prop_assert_eq!(peak.bytes, units * 2 * spec.head_dim * dtype.block_bytes());
        let now = layers * budget * kv_heads * 2 * spec.head_dim * dtype.block_bytes();
        prop_assert_eq!(session.cache().bytes(), now);
    }
}

/// The peak of prompts is that of prompts, whatever was generated before.
#[test]
fn a_short_prompt_after_a_long_answer_is_not_charged_with_it() {
    let policy = Everything::default();
    let mut session = after(
        spec(),
        policy,
        CacheOptions::default(),
        10,
        Prefill::new(8, 2),
    );
    let long = session.report();
    assert_eq!(long.prefill_peak.units_per_head, 10);
    session
        .generate(Generate::greedy(30))
        .unwrap()
        .for_each(|t| {
            t.unwrap();
        });
    let report = session.report();
    assert_eq!(report.prefill_peak, long.prefill_peak);
    assert_eq!(report.peak.units_per_head, 39);
}

#[test]
fn with_surprisal_all_layers_hold_the_chunk() {
    let policy = Evict::new(Surprise, Budget::Units(20));
    let prefill = Prefill::new(16, 0);
    let session = after(spec(), policy, CacheOptions::default(), 160, prefill);
    let peak = session.report().prefill_peak;
    assert_eq!(peak.units_per_head, 36);
    assert_eq!(peak.units, 2 * 36 * spec().kv_heads);
    assert_eq!(peak.bytes, spec().full_cache_bytes(36, 4));
}

#[test]
fn the_tail_and_generated_text_come_on_top_of_the_budget() {
    let policy = Evict::new(Newest, Budget::Units(20));
    let prefill = Prefill::new(16, 10);
    let mut session = after(spec(), policy, CacheOptions::default(), 100, prefill);
    assert_eq!(session.cache().len(0, 0), 30);
    assert_eq!(session.report().prefill_peak.units_per_head, 36);
    let tokens = session.generate(Generate::greedy(50)).unwrap();
    for token in tokens {
        token.unwrap();
    }
    // The last token that was drawn has not been read.
    assert_eq!(session.cache().len(0, 0), 79);
    let report = session.report();
    assert_eq!(report.peak.units_per_head, 79);
    assert_eq!(report.prefill_peak.units_per_head, 36);
    assert_eq!(report.full_bytes, spec().full_cache_bytes(149, 4));
    assert!(report.kv_bytes < report.full_bytes && report.metadata_bytes > 0);
    let compression = report.full_bytes as f64 / report.peak.bytes as f64;
    assert_eq!(report.compression(), compression);
}

#[test]
fn decoding_in_a_bounded_cache_stays_there() {
    for every in [1, 4] {
        for positions in [Positions::Original, Positions::Compact] {
            let policy = Evict::new(Newest, Budget::Units(20))
                .with_positions(positions)
                .while_decoding(DecodeEviction::Every(every));
            let prefill = Prefill::new(16, 0);
            let mut session = after(spec(), policy, CacheOptions::default(), 100, prefill);
            let mut most = 0;
            for _ in 0..300 {
                let mut one = session.generate(Generate::greedy(1)).unwrap();
                one.next().unwrap().unwrap();
                drop(one);
                let len = session.cache().len(1, 1);
                assert!(len < 20 + every, "{len} units");
                most = most.max(session.cache().bytes());
            }
            // Some reserve for tokens that come one by one, but no growth.
            assert!(most <= spec().full_cache_bytes(20 + 64 + every, 4));
        }
    }
}

#[test]
fn a_long_stream_takes_no_more_than_a_short_one() {
    let mut spec = spec();
    spec.layers = 1;
    let policy = Evict::new(Newest, Budget::Units(64)).sinks(4);
    let model = model_of(spec);
    let mut session = Session::with_options(
        model,
        Arc::new(policy.with_positions(Positions::Compact)),
        CacheOptions::default(),
    )
    .unwrap();
    let prefill = Prefill::new(128, 0);
    let mut held = Vec::new();
    session
        .prefill_with(&text(16_384), &prefill, &mut |done| {
            held.push((done.cache.bytes(), done.cache.metadata_bytes()));
            Ok(())
        })
        .unwrap();
    assert_eq!(held.len(), 128);
    assert!(held[4..].iter().all(|h| *h == held[4]), "{held:?}");
    assert_eq!(session.cache().positions(0, 0).last(), Some(&16_383));
    assert_eq!(session.cache().positions(0, 0)[..5], [0, 1, 2, 3, 16_324]);
    assert!(device() == *session.model().compute().device());
}
