//! Positions and scores that lie where a layer is computed: a cache whose units are chosen there is the one whose units
//! are chosen on the host, and nothing is brought over until somebody looks.

use crate::{
    device,
    policies::{Birth, KeyNorm, Surprise},
    positions, spec, text,
};
use locret_core::{
    Best, Births, Budget, BudgetTable, CacheOptions, Compute, DType, DecodeEviction, Error, Evict,
    Generate, Guard, Kernels, KvCachePolicy, LayerUnits, Needs, Positions, Prefill, Result, Rows,
    Scorer, Scores, Session, Share, Step, UnitLists,
    conformance::{Listing, PlainLists, RandomModel, check_lists},
};
use proptest::prelude::*;
use std::sync::Arc;

/// A session on the host, and one with lists of its own.
fn both(policy: &Arc<dyn KvCachePolicy>, dtype: DType) -> ([Session; 2], Listing) {
    let listing = Listing::new(Kernels::Auto.on(&device()));
    let model = || RandomModel::new(spec(), 7, &device()).unwrap();
    let sessions = [model(), model().computed_by(Arc::new(listing.clone()))].map(|model| {
        let options = CacheOptions::new().dtype(dtype);
        Session::with_options(Arc::new(model), policy.clone(), options).unwrap()
    });
    (sessions, listing)
}

fn generate(session: &mut Session, tokens: usize) -> Vec<u32> {
    let tokens = session.generate(Generate::greedy(tokens)).unwrap();
    tokens.map(|token| token.unwrap()).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

#[track_caller]
fn assert_same([a, b]: [&Session; 2]) {
    assert_eq!(a.cache().units(), b.cache().units());
    assert_eq!(a.cache().peak(), b.cache().peak());
    assert_eq!(bits(a.logits().unwrap()), bits(b.logits().unwrap()));
    assert_eq!(positions(a), positions(b));
    let spec = a.cache().spec();
    for layer in 0..spec.layers {
        for head in 0..spec.kv_heads {
            let [a, b] = [a, b].map(|session| bits(session.cache().scores(layer, head)));
            assert_eq!(a, b, "scores of layer {layer}, KV head {head}");
        }
    }
}

#[test]
fn plain_lists_choose_as_the_host_does() {
    let compute: Arc<dyn Compute> = Arc::new(Listing::new(Kernels::Auto.on(&device())));
    check_lists(&compute, 0..20).unwrap();
    proptest!(|(
        scores in prop::collection::vec(prop_oneof![
            (-3i32..3).prop_map(|x| x as f32),
            Just(-0.0),
            Just(f32::INFINITY),
            Just(f32::NEG_INFINITY),
            -1e3f32..1e3,
        ], 1..60),
        share in 0.0f64..1.0,
        first in 0usize..9,
        newest in 0usize..9,
    )| {
        let len = scores.len();
        let keep = (share * len as f64) as usize;
        let first = first.min(keep);
        let best = Best { keep, first, newest: newest.min(keep - first) };
        let positions: Vec<u32> = (0..len as u32).collect();
        let mut lists = PlainLists::new(1, &device());
        lists.put(&[&positions], &[&scores]).unwrap();
        let kept = lists.keep(&[best]).unwrap().read().unwrap();
        let protected = [0..best.first, len - best.newest..len];
        prop_assert_eq!(&kept[0], &compute.select(&scores, keep, &protected).unwrap());
    });
}

/// Logits are looked at in blocks of 64 rows: whole ones, parts, and one row that nothing follows.
#[test]
fn how_likely_tokens_were_is_the_same_where_their_logits_lie() {
    let evict = Evict::new(Surprise, Budget::Units(40)).recent(5);
    let policy: Arc<dyn KvCachePolicy> = Arc::new(evict);
    for chunk in [1, 16, 64, 65, 90] {
        let ([mut host, mut there], _) = both(&policy, DType::F32);
        for session in [&mut host, &mut there] {
            session
                .prefill(&text(180), &Prefill::new(chunk, 5))
                .unwrap();
        }
        assert_same([&host, &there]);
        assert!(host.cache().units() < 180 * spec().layers * spec().kv_heads);
        assert_eq!(generate(&mut host, 9), generate(&mut there, 9));
        assert_eq!(positions(&host), positions(&there));
    }
}

#[test]
fn a_cache_whose_units_are_chosen_where_they_lie_is_the_same() {
    let evict = |budget| Evict::new(Birth, Budget::Units(budget));
    let table = BudgetTable::new(vec![vec![1.0, 3.0], vec![2.0, 1.0]]).unwrap();
    let guard = Guard {
        sinks: 2,
        recent: 3,
        stabilizers: 6,
    };
    for policy in [
        evict(20),
        evict(24).guard(guard).with_positions(Positions::Compact),
        evict(20)
            .guard(guard)
            .while_decoding(DecodeEviction::Every(3)),
        evict(20)
            .while_decoding(DecodeEviction::Every(1))
            .with_positions(Positions::Compact),
        evict(20).pyramid(5.0).recent(4),
        evict(20).table(table),
        Evict::new(Birth, Budget::Ratio(0.3)).recent(30),
    ] {
        println!("{policy:?}");
        let policy: Arc<dyn KvCachePolicy> = Arc::new(policy);
        for dtype in [DType::F32, DType::F16] {
            let ([mut host, mut listed], listing) = both(&policy, dtype);
            for session in [&mut host, &mut listed] {
                session.prefill(&text(90), &Prefill::new(16, 5)).unwrap();
            }
            assert_eq!(listing.read(), 0);
            assert!(listing.chosen() > 2);
            // A fork looks; what it is a fork of has not.
            let forks = [&host, &listed].map(|session| session.fork().unwrap());
            assert_same(forks.each_ref());
            let read = listing.read();
            assert_eq!(read, spec().layers);
            assert_eq!(generate(&mut host, 9), generate(&mut listed, 9));
            for session in [&mut host, &mut listed] {
                session.prefill(&text(30), &Prefill::new(8, 0)).unwrap();
            }
            assert_eq!(listing.read(), read);
            assert_same([&host, &listed]);
            // What was looked at goes on where it lies.
            let chosen = listing.chosen();
            for session in [&mut host, &mut listed] {
                session.prefill(&text(40), &Prefill::new(10, 0)).unwrap();
            }
            assert!(listing.chosen() > chosen);
            assert_same([&host, &listed]);
            for session in forks {
                assert_eq!(session.cache().seen(), 90);
            }
        }
    }
}

#[test]
fn snapshots_and_other_policies_find_what_they_need() {
    let policy: Arc<dyn KvCachePolicy> = Arc::new(Evict::new(Birth, Budget::Units(20)).recent(4));
    let ([mut host, mut listed], listing) = both(&policy, DType::F32);
    let mut files = Vec::new();
    for session in [&mut host, &mut listed] {
        session.prefill(&text(70), &Prefill::new(16, 5)).unwrap();
        let mut bytes = Vec::new();
        session.write(&mut bytes).unwrap();
        files.push(bytes);
    }
    // Taken up by the other, which goes on in the same way.
    files.reverse();
    for (session, file) in [&mut host, &mut listed].into_iter().zip(&files) {
        let (model, options) = (session.model().clone(), session.cache().options());
        let (from, length) = (&mut &file[..], file.len() as u64);
        *session = Session::read(model, policy.clone(), options, from, length).unwrap();
        session.prefill(&text(33), &Prefill::new(16, 0)).unwrap();
    }
    assert_same([&host, &listed]);
    // A policy that is asked for verdicts, and one whose heads share a budget.
    let chosen = listing.chosen();
    let norm: Arc<dyn KvCachePolicy> = Arc::new(Evict::new(KeyNorm, Budget::Units(17)));
    let ada = Evict::new(Birth, Budget::Units(17)).share(Share::Layer);
    let pooled = Evict::new(Birth, Budget::Units(17)).pool(3);
    for policy in [
        Arc::new(ada) as Arc<dyn KvCachePolicy>,
        Arc::new(pooled),
        norm,
    ] {
        for session in [&mut host, &mut listed] {
            session.cache_mut().set_policy(policy.clone()).unwrap();
            session.prefill(&text(33), &Prefill::new(16, 0)).unwrap();
        }
        assert_same([&host, &listed]);
    }
    assert_eq!(listing.chosen(), chosen);
}

#[test]
fn who_looks_at_verdicts_is_shown_them() {
    let policy: Arc<dyn KvCachePolicy> = Arc::new(Evict::new(Birth, Budget::Units(20)));
    let ([mut host, mut listed], listing) = both(&policy, DType::F32);
    let mut births = [Births::default(), Births::default()];
    for (session, births) in [&mut host, &mut listed].into_iter().zip(&mut births) {
        let prefill = Prefill::new(16, 5);
        session
            .prefill_watched(&text(70), &prefill, births)
            .unwrap();
    }
    let [a, b] = births.each_ref().map(Births::scores);
    assert_eq!(a, b);
    assert_eq!(a[1][0].len(), 70);
    assert_same([&host, &listed]);
    assert_eq!(listing.chosen(), 0);
    // Somebody who counts chunks does not.
    let mut chunks = 0;
    let mut count = |_: &locret_core::ChunkDone<'_>| {
        chunks += 1;
        Ok(())
    };
    let more = listed.prefill_with(&text(40), &Prefill::new(16, 0), &mut count);
    more.unwrap();
    assert_eq!(chunks, 3);
    assert!(listing.chosen() > 0);
}

/// What is wrong with its scores.
#[derive(Debug, Clone, Copy)]
enum Wrong {
    Nan,
    Width,
}

impl Scorer for Wrong {
    fn name(&self) -> String {
        "wrong".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn carries(&self) -> bool {
        true
    }

    fn born(&self, _: &Step, units: &LayerUnits<'_>) -> Result<Option<Rows>> {
        let width = match self {
            Self::Nan => units.kv_heads(),
            Self::Width => units.kv_heads() + 1,
        };
        let mut scores = vec![0.5; units.incoming() * width];
        if let Some(last) = scores.last_mut() {
            *last = f32::NAN;
        }
        units.compute().rows(scores, width).map(Some)
    }

    fn score(&self, _: &Step, _: &LayerUnits<'_>) -> Result<Scores> {
        unreachable!("lists of units lie elsewhere")
    }
}

#[test]
fn what_is_wrong_with_scores_is_said() {
    let policy: Arc<dyn KvCachePolicy> = Arc::new(Evict::new(Wrong::Nan, Budget::Units(20)));
    let ([_, mut session], _) = both(&policy, DType::F32);
    session.prefill(&text(50), &Prefill::new(16, 0)).unwrap();
    for error in [
        session.cache().fetch().unwrap_err(),
        session.write(&mut Vec::new()).unwrap_err(),
    ] {
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    }
    let policy: Arc<dyn KvCachePolicy> = Arc::new(Evict::new(Wrong::Width, Budget::Units(20)));
    let ([_, mut session], _) = both(&policy, DType::F32);
    let error = session
        .prefill(&text(50), &Prefill::new(16, 0))
        .unwrap_err();
    assert!(error.to_string().contains("[16, 2] are due"), "{error}");
}
