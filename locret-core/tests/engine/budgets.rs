//! Budgets are what they say, to the unit and to the byte.

use crate::{
    device, model_of,
    policies::{KeyNorm, Newest},
    positions, session, spec, text,
};
use locret_core::{
    Budget, CacheOptions, DType, DecodeEviction, Error, Evict, Guard, Kernels, KvCachePolicy,
    Prefill, Session,
};
use proptest::prelude::*;
use std::sync::Arc;

const PREFILL: Prefill = Prefill::new(16, 0);

proptest! {
    #[test]
    fn bytes_are_rounded_down_to_whole_units(bytes in 0usize..1 << 40, layers in 1usize..100) {
        let mut spec = spec();
        spec.layers = layers;
        let layer = spec.layer(0);
        let one = layers * layer.kv_heads * 2 * layer.head_dim * 4;
        let units = Budget::Bytes(bytes).units(&layer, 0);
        prop_assert!(units * one <= bytes && bytes < (units + 1) * one);
        prop_assert_eq!(Budget::Bytes(bytes).validate(&layer).is_ok(), units > 0);
    }

    #[test]
    fn a_ratio_is_rounded_up_to_whole_units(percent in 1usize..=100, total in 1usize..1_000_000) {
        let units = Budget::Ratio(percent as f64 / 100.0).units(&spec().layer(0), total);
        prop_assert_eq!(units, (percent * total).div_ceil(100));
    }
}

#[test]
fn a_budget_in_bytes_is_what_the_cache_takes() {
    let model = model_of(spec());
    let one = spec().full_cache_bytes(1, 4);
    for (dtype, kernels) in [
        (DType::F32, Kernels::Auto),
        (DType::F32, Kernels::Operations),
        (DType::F16, Kernels::Auto),
        (DType::BF16, Kernels::Operations),
    ] {
        // Not enough for one unit more.
        let policy = Evict::new(KeyNorm, Budget::Bytes(13 * one - 1));
        let options = CacheOptions::new().dtype(dtype).kernels(kernels);
        let mut session = Session::with_options(model.clone(), Arc::new(policy), options).unwrap();
        session.prefill(&text(100), &PREFILL).unwrap();
        let bytes = 12 * one * dtype.block_bytes() / 4;
        assert_eq!(session.cache().bytes(), bytes, "{options:?}");
        assert_eq!(session.report().kv_bytes, bytes);
        assert_eq!(session.cache().units(), 12 * 2 * spec().kv_heads);
        assert!(positions(&session).concat().iter().all(|p| p.len() == 12));
    }
}

#[test]
fn a_ratio_follows_the_whole_sequence() {
    let model = model_of(spec());
    let mut session = session(&model, Evict::new(Newest, Budget::Ratio(0.07)));
    session.prefill(&text(100), &PREFILL).unwrap();
    assert_eq!(session.cache().len(0, 0), 7);
    session.prefill(&text(101), &PREFILL).unwrap();
    assert_eq!(session.cache().len(1, 1), 15); // ceil(14.07)
}

#[test]
fn guards_hold_whatever_the_scores() {
    let model = model_of(spec());
    let run = |guard: Guard| {
        // The oldest have the best scores.
        #[derive(Debug)]
        struct Oldest;
        impl locret_core::Scorer for Oldest {
            fn name(&self) -> String {
                "oldest".into()
            }
            fn score(
                &self,
                _: &locret_core::Step,
                units: &locret_core::LayerUnits<'_>,
            ) -> locret_core::Result<locret_core::Scores> {
                units.score_heads(|head| {
                    let n = units.len(head);
                    let scores = units.positions(head).iter().map(|p| -(*p as f32));
                    Ok(locret_core::from_f32(scores.collect(), [n], &device()))
                })
            }
        }
        let mut kept = Vec::new();
        let mut session = session(&model, Evict::new(Oldest, Budget::Units(6)).guard(guard));
        session
            .prefill_with(&text(48), &PREFILL, &mut |done| {
                kept.push(done.cache.positions(1, 0).to_vec());
                Ok(())
            })
            .unwrap();
        kept
    };
    let plain = run(Guard::default());
    assert_eq!(plain, vec![vec![0, 1, 2, 3, 4, 5]; 3]);
    let recent = run(Guard {
        recent: 2,
        ..Guard::default()
    });
    assert_eq!(
        recent,
        [
            [0, 1, 2, 3, 14, 15],
            [0, 1, 2, 3, 30, 31],
            [0, 1, 2, 3, 46, 47]
        ]
    );
    // Stabilizers give way after the last chunk; those of earlier chunks had taken the places.
    let stabilizers = run(Guard {
        stabilizers: 2,
        ..Guard::default()
    });
    assert_eq!(
        stabilizers,
        [
            [0, 1, 2, 3, 14, 15],
            [0, 1, 2, 3, 30, 31],
            [0, 1, 2, 3, 30, 31]
        ]
    );
}

#[test]
fn sinks_stay_and_the_best_of_equals_is_the_earlier() {
    #[derive(Debug)]
    struct Equal;
    impl locret_core::Scorer for Equal {
        fn name(&self) -> String {
            "equal".into()
        }
        fn score(
            &self,
            _: &locret_core::Step,
            units: &locret_core::LayerUnits<'_>,
        ) -> locret_core::Result<locret_core::Scores> {
            locret_core::Scores::shared(vec![1.0; units.len(0)], units.kv_heads())
        }
    }
    let model = model_of(spec());
    let mut equal = session(&model, Evict::new(Equal, Budget::Units(5)).recent(1));
    equal.prefill(&text(40), &PREFILL).unwrap();
    assert_eq!(equal.cache().positions(0, 0), [0, 1, 2, 3, 39]);
    let mut newest = session(&model, Evict::new(Newest, Budget::Units(5)).sinks(2));
    newest.prefill(&text(40), &PREFILL).unwrap();
    assert_eq!(newest.cache().positions(1, 1), [0, 1, 37, 38, 39]);
}

#[test]
fn impossible_settings_are_refused_before_anything_is_read() {
    let model = model_of(spec());
    let evict = |budget| Evict::new(Newest, budget);
    let cases: Vec<(&str, Evict<Newest>)> = vec![
        ("budget", evict(Budget::Units(0))),
        ("budget ratio", evict(Budget::Ratio(0.0))),
        ("budget ratio", evict(Budget::Ratio(1.5))),
        ("budget ratio", evict(Budget::Ratio(f64::NAN))),
        ("budget in bytes", evict(Budget::Bytes(100))),
        ("stabilizers", evict(Budget::Units(8)).stabilizers(8)),
        ("stabilizers", evict(Budget::Units(8)).stabilizers(9)),
        (
            "stabilizers",
            evict(Budget::Units(8)).stabilizers(5).sinks(3),
        ),
        ("recent", evict(Budget::Units(8)).recent(8)),
        ("sinks", evict(Budget::Units(8)).sinks(9)),
        (
            "decode eviction interval",
            evict(Budget::Units(8)).while_decoding(DecodeEviction::Every(0)),
        ),
    ];
    for (setting, policy) in cases {
        let shown = format!("{policy:?}");
        assert!(policy.validate(&spec(), &PREFILL).is_err(), "{shown}");
        let mut session = session(&model, policy);
        match session.prefill(&text(40), &PREFILL) {
            Err(Error::Setting { what, .. }) => assert_eq!(what, setting, "{shown}"),
            other => panic!("{other:?} for {shown}"),
        }
        assert!(session.cache().is_empty() && session.tokens().is_empty());
    }
}
