//! What tells policies apart: each from every other, by all that they could decide differently for.

mod common;

use burn::tensor::Device;
use locret_core::{
    Budget, CausalLm, DecodeEviction, KvCachePolicy, Positions, QuantLayout, Quantization, Share,
    conformance::{RandomModel, small_spec},
};
use locret_policies::{
    CamKeeps, D2oForm, HeadWeights, LayerHead, MergeBy, Method, PolicyConfig, RetainingHeads,
};
use std::{collections::BTreeMap, sync::Arc};

fn model() -> RandomModel {
    // Queries, keys and values are wider than the hidden state: heads can be folded.
    RandomModel::new(small_spec(6, 2, 16), 7, &Device::flex()).unwrap()
}

fn weights(model: &RandomModel, change: impl Fn(usize, &mut LayerHead)) -> HeadWeights {
    let weight = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 60.0;
    let spec = model.spec();
    let layer = |l: usize| {
        let mut head = LayerHead {
            d_r: 6,
            fc1: (0..6 * spec.layer(0).qkv_features())
                .map(|i| weight(i + l))
                .collect(),
            fc2: (0..6 * spec.kv_heads).map(|i| weight(i + 3 * l)).collect(),
            ..LayerHead::default()
        };
        change(l, &mut head);
        head
    };
    HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: Default::default(),
        ..HeadWeights::default()
    }
}

fn build(model: &RandomModel, config: &PolicyConfig) -> Arc<dyn KvCachePolicy> {
    if config.policy != Method::Locret {
        let config = common::complete(config, model.spec());
        return config.build_for(model).unwrap();
    }
    let heads = weights(model, |_, _| ());
    let heads = RetainingHeads::new(&heads, model.spec(), &**model.compute()).unwrap();
    config.build_with_heads(model.spec(), heads).unwrap()
}

/// A method as it was published.
fn published(method: Method) -> PolicyConfig {
    match method {
        method if !method.evicts() => PolicyConfig::new(method),
        _ => PolicyConfig::new(method).budget(Budget::Units(40)),
    }
}

/// Every setting that a method has, changed.
fn changed(method: Method) -> Vec<(String, PolicyConfig)> {
    let mut all = Vec::new();
    let mut change = |what: &str, f: &dyn Fn(&mut PolicyConfig)| {
        let mut config = published(method);
        f(&mut config);
        all.push((format!("{method}, {what}"), config));
    };
    let others = match method.default_positions() {
        Positions::Original => Positions::Compact,
        _ => Positions::Original,
    };
    change("as published", &|_| ());
    if method == Method::InfLlm {
        for (index, what) in ["init", "local", "block", "topk", "keys", "chunk"]
            .iter()
            .enumerate()
        {
            change(what, &|c| {
                let settings = [
                    &mut c.n_init,
                    &mut c.n_local,
                    &mut c.block_size,
                    &mut c.topk,
                    &mut c.repr_topk,
                    &mut c.exec_block,
                ];
                *settings.into_iter().nth(index).unwrap() = Some(3 + 7 * (index % 4 / 2) * index);
            });
        }
        change("budget", &|c| c.budget = Some(Budget::Units(200)));
    } else {
        change("positions", &|c| c.positions = Some(others));
    }
    let plain = Quantization::default();
    let kivi = QuantLayout::Kivi;
    for (what, quantize) in [
        ("4 bits", plain),
        ("8 bits", Quantization { bits: 8, ..plain }),
        ("2 bits", Quantization { bits: 2, ..plain }),
        ("3 bits", Quantization { bits: 3, ..plain }),
        ("first units", Quantization { first: 4, ..plain }),
        (
            "turned",
            Quantization {
                hadamard: true,
                ..plain
            },
        ),
        ("groups of 32", Quantization { group: 32, ..plain }),
        (
            "a residual of 33",
            Quantization {
                residual: 33,
                ..plain
            },
        ),
        (
            "KIVI",
            Quantization {
                layout: kivi,
                ..plain
            },
        ),
    ] {
        change(what, &|c| c.quantize = Some(quantize));
    }
    if method == Method::MInference {
        for sizes in [(30, 50), (30, 51), (31, 50)] {
            change(&format!("{sizes:?}"), &|c| {
                (c.vertical, c.slash) = (Some(sizes.0), Some(sizes.1));
            });
        }
    }
    if method == Method::DuoAttention {
        change("fewer heads", &|c| c.streaming = Some(0.25));
        change("sinks", &|c| c.sinks = Some(127));
        change("newest", &|c| c.recent = Some(255));
        change("decode", &|c| c.decode = Some(DecodeEviction::Every(2)));
    }
    if !method.evicts() {
        return all;
    }
    if method.takes_heads() && method != Method::Locret {
        for (threshold, sinks, recent) in [(0.5, 1, 9), (0.6, 1, 9), (0.5, 2, 9), (0.5, 1, 8)] {
            change(&format!("{threshold}, {sinks}, {recent}"), &|c| {
                (c.budget, c.threshold) = (None, Some(threshold));
                (c.sinks, c.recent) = (Some(sinks), Some(recent));
            });
        }
    }
    for (what, budget) in [
        ("41 units", Budget::Units(41)),
        ("half", Budget::Ratio(0.5)),
        (
            "a little more than half",
            Budget::Ratio(0.500_000_000_000_1),
        ),
        ("all", Budget::Ratio(1.0)),
        ("bytes", Budget::Bytes(400_000)),
    ] {
        change(what, &|c| c.budget = Some(budget));
    }
    // What is set differs from what the scorer says, even where it is the same number of units.
    for units in [0, 1, 5, 10, 20] {
        change(&format!("{units} sinks"), &|c| c.sinks = Some(units));
        change(&format!("{units} newest"), &|c| c.recent = Some(units));
        let what = format!("{units} stabilizers");
        change(&what, &|c| c.stabilizers = Some(units));
    }
    for every in [1, 2] {
        let decode = Some(DecodeEviction::Every(every));
        change(&format!("every {every}"), &|c| c.decode = decode);
    }
    for units in [3, 5] {
        change(&format!("pool {units}"), &|c| c.pool = Some(units));
    }
    for beta in [1.0, 20.0, 20.5] {
        change(&format!("pyramid {beta}"), &|c| c.pyramid = Some(beta));
    }
    for floor in [0.2, 0.25, 1.0] {
        change(&format!("ada {floor}"), &|c| c.ada = Some(floor));
        change(&format!("ada {floor} over the model"), &|c| {
            (c.ada, c.share) = (Some(floor), Some(Share::Model));
        });
    }
    for share in [Share::Layer, Share::Model] {
        change(&format!("sharing over the {share}"), &|c| {
            c.share = Some(share)
        });
    }
    if !method.merges() {
        for (what, settings) in [
            ("put away", [None; 3]),
            ("in larger blocks", [Some(33), None, None]),
            ("more of them", [None, Some(9), None]),
            ("by more keys", [None, None, Some(5)]),
        ] {
            change(what, &|c| {
                c.put_away = true;
                [c.block_size, c.topk, c.repr_topk] = settings;
            });
        }
        for sizes in [None, Some((30, 50)), Some((30, 51)), Some((31, 50))] {
            change(&format!("sparse, {sizes:?}"), &|c| {
                c.sparse = true;
                (c.vertical, c.slash) = sizes.unzip();
            });
        }
        for threshold in [0.5, 0.500_001] {
            let what = format!("merge {threshold}");
            change(&what, &|c| c.merge = Some(threshold));
            change(&format!("{what}, weighted"), &|c| {
                (c.merge, c.merge_by) = (Some(threshold), Some(MergeBy::Weighted));
            });
            change(&format!("{what} and codes"), &|c| {
                (c.merge, c.quantize) = (Some(threshold), Some(plain));
            });
        }
    }
    change("in blocks", &|c| c.blocks = Some(20));
    change("in larger blocks", &|c| c.blocks = Some(21));
    if method != Method::Locret {
        // Heads from memory come without the model.
        change("by what values become", &|c| c.critical = true);
    }
    match method {
        Method::Random => change("seed", &|c| c.seed = Some(1)),
        Method::Compactor => {
            change("seed", &|c| c.seed = Some(1));
            change("blending", &|c| c.blending = Some(0.36));
        }
        Method::SirLlm => {
            change("decay", &|c| c.decay = Some(0.9));
            change("another decay", &|c| c.decay = Some(0.900_000_1));
        }
        Method::SnapKv => {
            change("window", &|c| c.window = Some(63));
            change("kernel", &|c| c.kernel = Some(7));
        }
        Method::ExpectedAttention => change("future", &|c| c.future = Some(511)),
        Method::LagKv => change("lag", &|c| c.lag = Some(127)),
        Method::Cur => change("window", &|c| c.window = Some(15)),
        Method::D2o => {
            change("form", &|c| c.form = Some(D2oForm::Code));
            change("keys", &|c| c.mix_keys = Some(false));
            change("smoothing", &|c| c.smoothing = Some(0.4));
            change("exempt", &|c| c.exempt = Some((2, 0)));
            change("whole layers", &|c| c.exempt_whole = true);
        }
        Method::Cam => {
            change("seed", &|c| c.seed = Some(1));
            change("window", &|c| c.window = Some(31));
            change("keeps", &|c| c.keeps = Some(CamKeeps::Heavy));
            change("sums", &|c| c.sums = true);
        }
        _ => {}
    }
    all
}

#[test]
fn whatever_could_decide_differently_differs() {
    let model = model();
    let mut known = BTreeMap::new();
    for (what, config) in Method::ALL.into_iter().flat_map(changed) {
        let policy = build(&model, &config);
        let fingerprint = policy.fingerprint();
        // Made again, it is the same, whoever holds it.
        assert_eq!(build(&model, &config).fingerprint(), fingerprint, "{what}");
        assert_eq!(Arc::new(policy).fingerprint(), fingerprint, "{what}");
        if let Some(other) = known.insert(fingerprint.clone(), what.clone()) {
            panic!("{what} and {other}: {fingerprint}");
        }
    }
    assert!(known.len() > 350, "{}", known.len());
}

#[test]
fn heads_are_told_apart_by_every_weight() {
    let model = model();
    let config = published(Method::Locret);
    let place = |weights: &HeadWeights, folded: bool| {
        let heads = match folded {
            true => RetainingHeads::for_model(weights, &model),
            false => RetainingHeads::new(weights, model.spec(), &**model.compute()),
        };
        let heads = heads.unwrap();
        assert_eq!(heads.folded(), folded);
        let policy = config.build_with_heads(model.spec(), heads).unwrap();
        policy.fingerprint()
    };
    let mut known = BTreeMap::new();
    let last = 6 * model.spec().layer(0).qkv_features() - 1;
    let changes: [(&str, &dyn Fn(usize, &mut LayerHead)); 6] = [
        ("nothing", &|_, _| ()),
        ("the first weight", &|l, h| {
            if l == 0 {
                h.fc1[0] += 1e-7;
            }
        }),
        ("the last weight of a first matrix", &|l, h| {
            if l == 1 {
                h.fc1[last] += 1e-7;
            }
        }),
        ("a weight of a second matrix", &|l, h| {
            if l == 1 {
                h.fc2[11] += 1e-7;
            }
        }),
        ("the order of layers", &|l, h| {
            let weight = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 60.0;
            (0..h.fc1.len()).for_each(|i| h.fc1[i] = weight(i + 1 - l));
            (0..h.fc2.len()).for_each(|i| h.fc2[i] = weight(i + 3 * (1 - l)));
        }),
        ("two weights, exchanged", &|l, h| {
            if l == 0 {
                h.fc1.swap(7, 8);
            }
        }),
    ];
    for (what, change) in changes {
        let weights = weights(&model, change);
        for folded in [false, true] {
            let fingerprint = place(&weights, folded);
            assert_eq!(place(&weights.clone(), folded), fingerprint);
            let what = format!("{what}, folded {folded}");
            if let Some(other) = known.insert(fingerprint, what.clone()) {
                panic!("{what} and {other}");
            }
        }
    }
    assert_eq!(known.len(), 12);
}
