//! Every policy against the cache in plain loops: what stays, its scores, and what attention
//! returns.

mod common;

use burn::tensor::Device;
use common::{Folding, Naive, Numbers, Rule, Settings, cache, drive, spec, steps};
use locret_core::{
    Budget, BudgetTable, DecodeEviction, Evict, Guard, KvCachePolicy, ModelSpec, Positions, Scorer,
    Share, compute,
};
use locret_policies::{
    Cam, ChunkKv, Compactor, Critical, Cur, D2o, D2oForm, ExpectedAttention, Full, H2o,
    HeadWeights, Heavy, KeyDiff, KeyNorm, LagKv, LayerHead, Locret, Merge, MergeBy, OutputNorms,
    QFilters, Random, RetainingHeads, SirLlm, SnapKv, Tova, Window,
};
use proptest::{prelude::*, test_runner::TestRunner};
use std::{cell::Cell, sync::Arc};

/// A conversation: prompts of these lengths, each with some generated tokens after it.
#[derive(Debug, Clone)]
struct Talk {
    turns: Vec<(usize, usize)>,
    chunk: usize,
    local: usize,
}

fn heads(spec: &ModelSpec, seed: u64, d_r: usize) -> HeadWeights {
    let mut numbers = Numbers(seed);
    let inputs = spec.layer(0).qkv_features();
    let layer = |_| LayerHead {
        d_r,
        fc1: numbers.list(d_r * inputs, 0.5),
        fc2: numbers.list(spec.kv_heads * d_r, 1.0),
        ..LayerHead::default()
    };
    HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: Default::default(),
        ..HeadWeights::default()
    }
}

fn policy(spec: &ModelSpec, settings: &Settings) -> Arc<dyn KvCachePolicy> {
    fn evict<S: Scorer + 'static>(
        scorer: S,
        spec: &ModelSpec,
        settings: &Settings,
    ) -> Arc<dyn KvCachePolicy> {
        match (&settings.critical, settings.blocks) {
            (Some(layers), _) => {
                let compute = compute(&Device::default());
                let norms = OutputNorms::new(layers, spec, &*compute).unwrap();
                bounded(Critical::new(scorer, norms), settings)
            }
            (None, Some(tokens)) => bounded(ChunkKv::new(scorer).block(tokens), settings),
            (None, None) => bounded(scorer, settings),
        }
    }
    fn bounded<S: Scorer + 'static>(scorer: S, settings: &Settings) -> Arc<dyn KvCachePolicy> {
        let mut policy = Evict::new(scorer, Budget::Units(settings.budget))
            .guard(settings.guard)
            .with_positions(settings.positions)
            .while_decoding(settings.decode)
            .pool(settings.pool);
        if let Some(beta) = settings.pyramid {
            policy = policy.pyramid(beta);
        }
        if let Some(floor) = settings.ada {
            policy = policy.ada(floor);
        }
        if settings.model {
            policy = policy.share(Share::Model);
        }
        if let Some(table) = &settings.table {
            policy = policy.table(BudgetTable::new(table.clone()).unwrap());
        }
        match settings.fold {
            Some(Folding::D2o {
                code,
                keys,
                smoothing,
                exempt: (first, last),
            }) => {
                let form = match code {
                    true => D2oForm::Code,
                    false => D2oForm::Paper,
                };
                let policy = D2o::new(policy).form(form).keys(keys).exempt(first, last);
                return Arc::new(policy.smoothing(smoothing as f32));
            }
            Some(Folding::Cam { next, seed, sums }) => {
                return Arc::new(Cam::new(policy).window(next).seed(seed).sums(sums));
            }
            None => {}
        }
        match settings.merge {
            Some(threshold) => {
                let by = match settings.weighted {
                    true => MergeBy::Weighted,
                    false => MergeBy::Mean,
                };
                Arc::new(Merge::new(policy, threshold).by(by))
            }
            None => Arc::new(policy),
        }
    }
    match &settings.rule {
        Rule::Full => Arc::new(Full::new().with_positions(settings.positions)),
        Rule::Window => evict(Window, spec, settings),
        Rule::KeyNorm => evict(KeyNorm, spec, settings),
        Rule::KeyDiff => evict(KeyDiff, spec, settings),
        Rule::SirLlm(decay) => evict(SirLlm::new().decay(*decay as f32), spec, settings),
        Rule::Locret(layers) => {
            let layers = layers.iter().map(|(fc1, fc2)| LayerHead {
                d_r: fc2.len() / spec.kv_heads,
                fc1: fc1.clone(),
                fc2: fc2.clone(),
                ..LayerHead::default()
            });
            let weights = HeadWeights {
                layers: layers.collect(),
                metadata: Default::default(),
                ..HeadWeights::default()
            };
            let heads = RetainingHeads::new(&weights, spec, &*compute(&Device::default())).unwrap();
            evict(Locret::new(heads), spec, settings)
        }
        Rule::H2o => evict(H2o, spec, settings),
        Rule::Heavy => evict(Heavy, spec, settings),
        Rule::SnapKv(window, kernel) => evict(
            SnapKv::new().window(*window).kernel(*kernel),
            spec,
            settings,
        ),
        Rule::Tova => evict(Tova, spec, settings),
        Rule::ExpectedAttention(future, shared) => {
            let scorer = ExpectedAttention::new().future(*future);
            let epsilon = if *shared {
                ExpectedAttention::SHARED_EPSILON
            } else {
                0.0
            };
            evict(scorer.epsilon(epsilon), spec, settings)
        }
        Rule::LagKv(lag) => evict(LagKv::new().lag(*lag), spec, settings),
        Rule::Cur(window) => evict(Cur::new().window(*window), spec, settings),
        Rule::QFilters(layers) => {
            let shape = [spec.layers, spec.kv_heads, spec.head_dim];
            evict(
                QFilters::new(layers.concat(), shape).unwrap(),
                spec,
                settings,
            )
        }
        Rule::Compactor(tile, sketches) => {
            let scorer = Compactor::new().tile(*tile).sketches(sketches.clone());
            evict(scorer, spec, settings)
        }
    }
}

/// Both caches through the same conversation. Returns how many times something was evicted.
fn compare(spec: &ModelSpec, settings: &Settings, talk: &Talk, seed: u64) -> usize {
    let mut numbers = Numbers(seed);
    let policy = policy(spec, settings);
    policy.validate(spec, &Default::default()).unwrap();
    let (carries, width) = (
        policy.carries().is_some(),
        policy.carried_width(&spec.layer(0)),
    );
    let mut real = cache(spec, policy);
    let mut naive = Naive::new(spec, settings.clone());
    let mut evictions = 0;
    for (turn, &(prompt, decode)) in talk.turns.iter().enumerate() {
        let total = naive.seen + prompt;
        if turn > 0 {
            real.turn(total).unwrap();
            naive.turn();
        }
        for step in steps(
            spec,
            &mut numbers,
            prompt,
            talk.chunk,
            talk.local,
            decode,
            turn == 0,
        ) {
            let before = real.units();
            let found = drive(&mut real, &step, total).unwrap();
            let expected = naive.step(&step);
            // Too close to call in another order of summation.
            if naive.margin < 1e-5 {
                return evictions;
            }
            evictions +=
                usize::from(real.units() < before + step.tokens * spec.layers * spec.kv_heads);
            for (layer, (found, expected)) in found.iter().zip(&expected).enumerate() {
                for (i, (a, b)) in found.iter().zip(expected).enumerate() {
                    assert!(
                        (f64::from(*a) - b).abs() < 1e-4,
                        "output {i} of layer {layer}: {a} for {b}, {:?}",
                        step.phase
                    );
                }
                for head in 0..spec.kv_heads {
                    assert_eq!(
                        real.positions(layer, head),
                        naive.positions(layer, head),
                        "layer {layer}, head {head}, {:?}, {settings:?}",
                        step.phase
                    );
                    // Where values are weighed, scores are kept only where something goes.
                    if !carries || settings.critical.is_some() {
                        continue;
                    }
                    let units = &naive.units[layer][head];
                    let scores = real.scores(layer, head);
                    assert_eq!(scores.len(), units.len() * width);
                    // The last number of a unit is what it was paid so far, where that is asked for.
                    let cam = matches!(settings.fold, Some(Folding::Cam { .. }));
                    for (numbers, unit) in scores.chunks(width).zip(units).filter(|_| cam) {
                        let (a, b) = (f64::from(numbers[width - 1]), unit.attention);
                        assert!((a - b).abs() < 1e-4 * b.max(1.0), "{a} for {b}");
                    }
                    if cam && width == 1 {
                        continue;
                    }
                    // The first number of a unit is its score.
                    for (a, unit) in scores.iter().step_by(width).zip(units) {
                        let (a, b) = (f64::from(*a), unit.score);
                        assert!(
                            (a - b).abs() < 1e-4 * b.abs().max(1.0),
                            "score {a} for {b} of unit {}",
                            unit.position
                        );
                    }
                }
            }
        }
    }
    evictions
}

/// Output projections `[hidden, heads * head_dim]`, by layer.
fn projections(spec: &ModelSpec) -> Vec<Vec<f32>> {
    let mut numbers = Numbers(23);
    let size = spec.hidden * spec.heads * spec.head_dim;
    (0..spec.layers).map(|_| numbers.list(size, 1.0)).collect()
}

fn rules(spec: &ModelSpec) -> Vec<Rule> {
    let locret = heads(spec, 5, 12)
        .layers
        .into_iter()
        .map(|head| (head.fc1, head.fc2));
    vec![
        Rule::Full,
        Rule::Window,
        Rule::KeyNorm,
        Rule::KeyDiff,
        Rule::SirLlm(0.7),
        Rule::Locret(locret.collect()),
        Rule::H2o,
        Rule::Heavy,
        Rule::SnapKv(7, 5),
        Rule::SnapKv(40, 3),
        Rule::Tova,
        Rule::ExpectedAttention(24, false),
        Rule::ExpectedAttention(9, true),
        Rule::LagKv(6),
        Rule::Cur(5),
        Rule::Compactor(
            6,
            (0..spec.layers)
                .map(|l| Numbers(l as u64 + 3).list(spec.kv_heads * spec.head_dim * 48, 0.25))
                .collect(),
        ),
        Rule::QFilters(
            (0..spec.layers)
                .map(|l| Numbers(l as u64).list(spec.kv_heads * spec.head_dim, 1.0))
                .collect(),
        ),
    ]
}

#[test]
fn every_policy_equals_plain_loops() {
    for (kv_heads, group) in [(3, 1), (1, 3), (2, 8)] {
        let spec = spec(2, kv_heads, group, 8);
        for rule in rules(&spec) {
            for positions in [Positions::Original, Positions::Compact] {
                let settings = Settings {
                    guard: Guard {
                        sinks: 2,
                        recent: 3,
                        stabilizers: 6,
                    },
                    positions,
                    decode: DecodeEviction::Every(4),
                    ..Settings::plain(rule.clone(), 24)
                };
                let talk = Talk {
                    turns: vec![(70, 11), (9, 3), (33, 2)],
                    chunk: 16,
                    local: 5,
                };
                let evictions = (0..3)
                    .map(|seed| compare(&spec, &settings, &talk, seed))
                    .sum::<usize>();
                if !matches!(settings.rule, Rule::Full) {
                    assert!(evictions > 10, "{settings:?}: {evictions}");
                }
            }
        }
    }
}

fn any_settings() -> impl Strategy<Value = (ModelSpec, Settings, Talk, u64)> {
    let shape = (1usize..4, prop::sample::select(vec![1usize, 3, 8]));
    let budget = (4usize..40, 0usize..4, 0usize..6, 0usize..9);
    let reading = (
        1usize..24,
        0usize..6,
        prop::collection::vec((1usize..80, 0usize..6), 1..3),
    );
    let modes = (
        any::<bool>(),
        0usize..4,
        prop::sample::select(vec![1usize, 3, 5]),
    );
    let cells = prop::collection::vec(0.1f64..3.0, 2 * 3);
    let around = 0usize..4;
    let shapes = (0usize..3, 0usize..4, 0usize..3, 0usize..5, cells, around);
    (
        shape,
        budget,
        reading,
        modes,
        any::<prop::sample::Index>(),
        shapes,
        any::<u64>(),
    )
        .prop_map(
            |(
                (kv_heads, group),
                (budget, sinks, recent, stabilizers),
                (chunk, local, turns),
                (compact, decode, pool),
                rule,
                shape,
                seed,
            )| {
                let spec = spec(2, kv_heads, group, 8);
                let around = shape.5;
                let (pyramid, model, table) = match shape.3 {
                    0 => (None, true, None),
                    1 => {
                        let rows = shape.4.chunks(3).map(|row| row[..kv_heads].to_vec());
                        (None, false, Some(rows.collect()))
                    }
                    2 => {
                        let rows = shape.4.iter().take(2).map(|share| vec![*share]);
                        (None, false, Some(rows.collect()))
                    }
                    _ => ([None, Some(3.0), Some(20.0)][shape.0], false, None),
                };
                let sinks = sinks.min(budget - 2);
                let mut rules = rules(&spec);
                let rule = rules.swap_remove(rule.index(rules.len()));
                let fold = match seed / 2 % 4 {
                    0 => Some(Folding::D2o {
                        code: seed % 5 < 2,
                        keys: seed % 7 < 5,
                        smoothing: [0.5, 0.25][(seed % 3 / 2) as usize],
                        exempt: ((seed % 11 / 8) as usize, 0),
                    }),
                    1 if observes_all(&rule) => Some(Folding::Cam {
                        next: 1 + (seed % 9) as usize,
                        seed,
                        sums: seed.is_multiple_of(3),
                    }),
                    _ => None,
                };
                let settings = Settings {
                    rule,
                    budget,
                    guard: Guard {
                        sinks,
                        recent: recent.min(budget - sinks - 1),
                        stabilizers: stabilizers.min(budget - sinks - 1),
                    },
                    positions: if compact {
                        Positions::Compact
                    } else {
                        Positions::Original
                    },
                    decode: match decode {
                        0 => DecodeEviction::Off,
                        n => DecodeEviction::Every(n),
                    },
                    pool,
                    pyramid,
                    ada: [None, Some(0.2), Some(0.7), Some(0.0)][shape.1],
                    model,
                    table,
                    merge: [None, Some(-1.0), Some(0.5)][shape.2].filter(|_| fold.is_none()),
                    fold,
                    weighted: seed.is_multiple_of(2),
                    blocks: (around == 1).then_some(5),
                    critical: (around == 2).then(|| projections(&spec)),
                };
                (
                    spec,
                    settings,
                    Talk {
                        turns,
                        chunk,
                        local,
                    },
                    seed,
                )
            },
        )
}

#[test]
fn any_policy_with_any_settings_equals_plain_loops() {
    let (cases, evictions) = (Cell::new(0), Cell::new(0));
    let config = ProptestConfig {
        source_file: Some(file!()),
        ..ProptestConfig::with_cases(96)
    };
    let mut runner = TestRunner::new(config);
    let result = runner.run(&any_settings(), |(spec, settings, talk, seed)| {
        let evicted = compare(&spec, &settings, &talk, seed);
        cases.set(cases.get() + usize::from(evicted > 0));
        evictions.set(evictions.get() + evicted);
        Ok(())
    });
    result.unwrap_or_else(|e| panic!("{e}\n{runner}"));
    // The full cache, short texts and close scores leave some cases without any.
    assert!(
        cases.get() >= 24,
        "{cases:?} of 96 cases, {evictions:?} evictions"
    );
}

/// Whether attention can be summed beside what the rule itself looks at.
fn observes_all(rule: &Rule) -> bool {
    !matches!(rule, Rule::SnapKv(..) | Rule::Tova)
}

fn d2o(code: bool, keys: bool) -> Option<Folding> {
    Some(Folding::D2o {
        code,
        keys,
        smoothing: 0.5,
        exempt: (0, 1),
    })
}

fn cam(next: usize, sums: bool) -> Option<Folding> {
    Some(Folding::Cam {
        next,
        seed: 7,
        sums,
    })
}

/// Shares of the budget for layers and heads, pooled selection, and merging, with every scorer.
#[test]
fn every_policy_with_every_shape_equals_plain_loops() {
    let spec = spec(3, 3, 3, 8);
    let talk = Talk {
        turns: vec![(70, 11), (33, 6)],
        chunk: 16,
        local: 5,
    };
    for rule in rules(&spec).into_iter().skip(1) {
        let base = Settings {
            guard: Guard {
                sinks: 2,
                recent: 3,
                stabilizers: 6,
            },
            decode: DecodeEviction::Every(2),
            ..Settings::plain(rule, 24)
        };
        let variants = [
            Settings {
                blocks: Some(4),
                ..base.clone()
            },
            Settings {
                blocks: Some(7),
                ada: Some(0.3),
                positions: Positions::Compact,
                ..base.clone()
            },
            Settings {
                critical: Some(projections(&spec)),
                ..base.clone()
            },
            Settings {
                critical: Some(projections(&spec)),
                ada: Some(0.3),
                positions: Positions::Compact,
                ..base.clone()
            },
            Settings {
                pyramid: Some(20.0),
                ..base.clone()
            },
            Settings {
                ada: Some(0.2),
                ..base.clone()
            },
            Settings {
                pyramid: Some(4.0),
                ada: Some(0.4),
                positions: Positions::Compact,
                ..base.clone()
            },
            Settings {
                model: true,
                ..base.clone()
            },
            Settings {
                model: true,
                ada: Some(0.05),
                positions: Positions::Compact,
                merge: Some(0.3),
                ..base.clone()
            },
            Settings {
                table: Some(vec![vec![0.5, 2.0, 1.0], vec![0.2; 3], vec![3.0, 1.0, 0.7]]),
                ..base.clone()
            },
            Settings {
                table: Some(vec![vec![1.0], vec![0.3], vec![2.5]]),
                ada: Some(0.2),
                positions: Positions::Compact,
                ..base.clone()
            },
            Settings {
                merge: Some(0.3),
                positions: Positions::Compact,
                ..base.clone()
            },
            Settings {
                merge: Some(0.0),
                weighted: true,
                ..base.clone()
            },
            Settings {
                pool: 5,
                ada: Some(0.0),
                merge: Some(-1.0),
                ..base.clone()
            },
            Settings {
                fold: d2o(false, true),
                ..base.clone()
            },
            Settings {
                fold: d2o(false, true),
                ada: Some(0.2),
                positions: Positions::Compact,
                ..base.clone()
            },
            Settings {
                fold: d2o(true, true),
                positions: Positions::Compact,
                ..base.clone()
            },
            Settings {
                fold: d2o(true, false),
                model: true,
                ..base.clone()
            },
            Settings {
                fold: cam(4, false),
                positions: Positions::Compact,
                ..base.clone()
            },
            Settings {
                fold: cam(3, true),
                ada: Some(0.3),
                ..base.clone()
            },
            Settings {
                fold: cam(32, false),
                model: true,
                ..base.clone()
            },
        ];
        for settings in variants {
            if matches!(settings.fold, Some(Folding::Cam { .. })) && !observes_all(&settings.rule) {
                continue;
            }
            let evictions: usize = (0..4)
                .map(|seed| compare(&spec, &settings, &talk, seed))
                .sum();
            let least = match (&settings.rule, settings.blocks) {
                (Rule::LagKv(_), Some(_)) => 0,
                _ => 11,
            };
            assert!(evictions >= least, "{settings:?}: {evictions}");
        }
    }
}

/// The same text gives the same selection by lot whatever the chunks.
#[test]
fn lots_do_not_depend_on_chunks() {
    let spec = spec(2, 3, 1, 8);
    let kept = |chunk: usize, seed: u64| {
        let mut numbers = Numbers(1);
        let mut cache = cache(&spec, Arc::new(Random::policy(seed, Budget::Units(20))));
        for step in steps(&spec, &mut numbers, 120, chunk, 0, 0, true) {
            drive(&mut cache, &step, 120).unwrap();
        }
        let of = |layer| (0..3).map(move |head| (layer, head));
        (0..2)
            .flat_map(of)
            .map(|(l, h)| cache.positions(l, h).to_vec())
            .collect::<Vec<_>>()
    };
    let base = kept(7, 1);
    assert_eq!(base, kept(120, 1));
    assert_eq!(base, kept(1, 1));
    assert_ne!(base, kept(7, 2));
    // Not the first ones, not the last ones, and not the same in all heads.
    assert!(base.iter().all(|p| p[0] < 60 && p[19] >= 60));
    assert_ne!(base[0], base[1]);
    assert_ne!(base[0], base[3]);
    let random = Random::new(1);
    let mut best: Vec<u32> = (0..120).collect();
    best.sort_by(|a, b| random.lot(1, 2, *b).total_cmp(&random.lot(1, 2, *a)));
    best.truncate(20);
    best.sort_unstable();
    assert_eq!(base[5], best);
}
