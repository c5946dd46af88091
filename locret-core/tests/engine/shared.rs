//! Budgets that heads and layers share: the bound, who goes first, and what plans say.

use crate::{
    device, model, model_of,
    policies::{Chance, KeyNorm},
    positions, session, spec, text,
};
use locret_core::{
    Budget, BudgetTable, CacheOptions, DType, Error, Evict, KvCachePolicy, LayerUnits, ModelSpec,
    Needs, Phase, Prefill, Result, Scorer, Scores, Session, Share, Step, compute, plan,
};
use proptest::prelude::*;
use std::sync::Arc;

/// All units are alike.
#[derive(Debug)]
struct Equal;

impl Scorer for Equal {
    fn name(&self) -> String {
        "equal".into()
    }

    fn score(&self, _: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let heads = 0..units.kv_heads();
        Scores::per_head(heads.map(|head| vec![1.0; units.len(head)]).collect())
    }
}

#[test]
fn of_equals_the_lower_layer_and_then_the_lower_head_goes_first() {
    let policy = Evict::new(Equal, Budget::Units(5))
        .recent(1)
        .ada(0.0)
        .share(Share::Model);
    let mut session = session(&model(), policy);
    let mut kept = Vec::new();
    session
        .prefill_with(&text(32), &Prefill::new(16, 0), &mut |done| {
            let heads = [(0, 0), (0, 1), (1, 0), (1, 1)];
            kept.push(heads.map(|(layer, head)| done.cache.positions(layer, head).to_vec()));
            Ok(())
        })
        .unwrap();
    let first: Vec<u32> = (0..16).collect();
    assert_eq!(
        kept[0],
        [first.clone(), vec![0, 15], vec![15], vec![15]],
        "20 units, one of each head its newest"
    );
    let second: Vec<u32> = (0..16).chain([31]).collect();
    assert_eq!(kept[1], [second, vec![31], vec![31], vec![31]]);
}

#[test]
fn each_head_keeps_its_floor_and_what_is_protected() {
    // One head's scores are above all others'.
    #[derive(Debug)]
    struct First;
    impl Scorer for First {
        fn name(&self) -> String {
            "first".into()
        }
        fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
            let score = |head: usize| match (at.layer.index, head) {
                (0, 1) => 2.0,
                _ => 1.0,
            };
            let heads = 0..units.kv_heads();
            Scores::per_head(heads.map(|h| vec![score(h); units.len(h)]).collect())
        }
    }
    let policy = Evict::new(First, Budget::Units(10)).share(Share::Model);
    assert_eq!(policy.limit(&spec().layer(1), 100), Some(40 - 3 * 2));
    assert_eq!(policy.held(&spec().layer(1), 100).unwrap().units, 20);
    let mut plain = session(&model(), policy);
    plain.prefill(&text(64), &Prefill::new(32, 0)).unwrap();
    let heads = positions(&plain).concat();
    assert_eq!(heads.each_len(), [2, 34, 2, 2]);
    // More is protected than the floor.
    let policy = Evict::new(First, Budget::Units(10)).share(Share::Model);
    let mut session = session(&model(), policy.sinks(1).recent(3));
    session.prefill(&text(64), &Prefill::new(32, 0)).unwrap();
    let heads = positions(&session).concat();
    assert_eq!(heads.each_len(), [4, 28, 4, 4]);
    assert_eq!(heads[0], [0, 61, 62, 63]);
}

trait Lengths {
    fn each_len(&self) -> Vec<usize>;
}

impl Lengths for Vec<Vec<u32>> {
    fn each_len(&self) -> Vec<usize> {
        self.iter().map(Vec::len).collect()
    }
}

/// A share for each layer and head.
fn table(spec: &ModelSpec, heads: usize, seed: usize) -> BudgetTable {
    let share = |i: usize| 0.1 + (seed + 7 * i) as f64 % 5.0;
    let rows = (0..spec.layers).map(|l| (0..heads).map(|h| share(l * heads + h)).collect());
    BudgetTable::new(rows.collect()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// The bound holds after every chunk, and a plan is what the cache takes, to the byte.
    #[test]
    fn the_bound_holds_and_plans_are_right(
        layers in 1usize..5,
        kv_heads in 1usize..4,
        budget in 1usize..40,
        (chunk, chunks, local) in (2usize..40, 1usize..6, prop::sample::select(vec![0usize, 2, 9])),
        floor in prop::sample::select(vec![0.0, 0.2, 0.9]),
        shape in 0usize..5,
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        seed in 0usize..1000,
    ) {
        let mut spec = spec();
        (spec.layers, spec.heads, spec.kv_heads) = (layers, 2 * kv_heads, kv_heads);
        let plain = Evict::new(Chance(seed as u64), Budget::Units(budget));
        let (policy, uniform_in_layers) = match shape {
            0 => (plain.ada(floor).share(Share::Model), true),
            1 => (plain.share(Share::Layer), true),
            2 => (plain.table(table(&spec, 1, seed)), true),
            3 => (plain.ada(floor).table(table(&spec, 1, seed)), true),
            _ => (plain.table(table(&spec, kv_heads, seed)), false),
        };
        prop_assert_eq!(policy.needs().all_layers, shape == 0);
        let tokens = chunk * chunks + local;
        let prefill = Prefill::new(chunk, local);
        let options = CacheOptions::new().dtype(dtype);
        let limits: Vec<usize> = (0..layers)
            .map(|l| policy.limit(&spec.layer(l), tokens).unwrap())
            .collect();
        let held: Vec<usize> = (0..layers)
            .map(|l| policy.held(&spec.layer(l), tokens).unwrap().units)
            .collect();
        let all = layers * kv_heads * budget;
        prop_assert_eq!(held.iter().sum::<usize>(), all);
        let planned = plan(&spec, &policy, &compute(&device()), options, &prefill, [tokens, 0]).unwrap();
        let mut session = Session::with_options(model_of(spec.clone()), Arc::new(policy), options).unwrap();
        let mut broken = None;
        session.prefill_with(&text(tokens), &prefill, &mut |done| {
            if done.phase == Phase::Tail {
                return Ok(());
            }
            let heads = |l| (0..kv_heads).map(move |h| done.cache.len(l, h));
            let over = (0..layers).any(|l| heads(l).any(|n| n > limits[l]));
            if done.cache.units() > all || over {
                broken = Some(done.cache.units());
            }
            Ok(())
        }).unwrap();
        prop_assert_eq!(broken, None, "{} units may be there", all);
        let (report, cache) = (session.report(), session.cache());
        if uniform_in_layers {
            prop_assert_eq!(planned.prefill.units, report.prefill_peak.units);
            prop_assert_eq!(planned.prefill.bytes, report.prefill_peak.bytes);
            prop_assert_eq!(planned.bytes, cache.bytes());
        } else {
            // Heads are cut when they are full, each at its own time, and plans round their mean up.
            let unit = spec.unit_bytes(dtype.block_bytes());
            let round = layers * (kv_heads - 1) * unit;
            prop_assert!(planned.prefill.bytes >= report.prefill_peak.bytes);
            prop_assert!(planned.bytes >= cache.bytes());
            let filled = chunk * chunks >= *limits.iter().max().unwrap();
            prop_assert!(!filled || planned.bytes <= cache.bytes() + round);
        }
        let filled = held.iter().all(|units| chunk * chunks * kv_heads >= *units);
        if filled && uniform_in_layers && local == 0 {
            prop_assert_eq!(cache.bytes(), all * spec.unit_bytes(dtype.block_bytes()));
        }
    }
}

/// All layers hold a chunk at once where they share, and one does where a table says what each has.
#[test]
fn the_peak_is_what_the_documents_say() {
    let (budget, chunk, layers, heads) = (20, 16, spec().layers, spec().kv_heads);
    let peak = |policy: Evict<KeyNorm>| {
        let mut session = session(&model(), policy);
        session
            .prefill(&text(160), &Prefill::new(chunk, 0))
            .unwrap();
        session.report().prefill_peak.units
    };
    let plain = || Evict::new(KeyNorm, Budget::Units(budget));
    assert_eq!(
        peak(plain().share(Share::Model)),
        layers * heads * (budget + chunk)
    );
    let one = heads * (layers * budget + chunk);
    assert_eq!(peak(plain().table(table(&spec(), 1, 3))), one);
    assert_eq!(peak(plain().ada(0.2).table(table(&spec(), 1, 3))), one);
    assert_eq!(peak(plain().share(Share::Layer)), one);
}

#[test]
fn budgets_of_layers_are_said_once() {
    let plain = || Evict::new(KeyNorm, Budget::Units(8));
    let own = || table(&spec(), 1, 0);
    for policy in [
        plain().share(Share::Model).pyramid(20.0),
        plain().share(Share::Model).table(own()),
        plain().pyramid(20.0).table(own()),
    ] {
        match policy.validate(&spec(), &Prefill::default()) {
            Err(Error::Setting { what, .. }) => assert_eq!(what, "budgets of layers"),
            other => panic!("{other:?}"),
        }
    }
    let mut other = spec();
    other.layers += 1;
    let wrong = plain().table(table(&other, 1, 0));
    assert!(matches!(
        wrong.validate(&spec(), &Prefill::default()),
        Err(Error::Shape { .. })
    ));
    let floor = plain().ada(1.5).share(Share::Model);
    assert!(floor.validate(&spec(), &Prefill::default()).is_err());
    assert_eq!(plain().share(Share::Layer).needs(), Needs::NOTHING);
}
