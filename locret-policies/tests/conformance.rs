//! Every policy, in every shape of the budget, over every store, in both position modes: the
//! conformance suite, by one table.

mod common;

use burn::tensor::Device;
use locret_core::{
    Budget, KvCachePolicy, QuantLayout, Quantization, Share,
    conformance::{Case, PolicyCheck, check_policy},
};
use locret_policies::{
    CamKeeps, D2oForm, HeadWeights, LayerHead, MergeBy, Method, PolicyConfig, RetainingHeads,
};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

/// How a budget is shared out: name, pyramid, Ada, over the model.
const SHAPES: [(&str, Option<f64>, Option<f64>, Option<Share>); 5] = [
    ("uniform", None, None, None),
    ("pyramid", Some(20.0), None, None),
    ("ada", None, Some(0.2), None),
    ("pyramid and ada", Some(3.0), Some(0.5), None),
    ("over the model", None, Some(0.1), Some(Share::Model)),
];

/// What chooses by more than scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Around {
    Nothing,
    Critical,
    Blocks,
}

/// Merging, and what goes around a scorer.
const AROUND: [(Option<f32>, Around); 4] = [
    (None, Around::Nothing),
    (Some(0.5), Around::Nothing),
    (None, Around::Critical),
    (Some(0.5), Around::Blocks),
];

/// Stores: name, quantisation, how far off a number and a hidden state may be. Where keys and values are turned before
/// they are coded, a number is a mean of all those of its block, each of which is off on its own.
fn stores() -> Vec<(&'static str, Option<Quantization>, f32, f32)> {
    let store = |bits, layout, hadamard| Quantization {
        bits,
        layout,
        group: 16,
        residual: 4,
        first: 2,
        hadamard,
    };
    let (rows, kivi) = (QuantLayout::PerToken, QuantLayout::Kivi);
    vec![
        ("dense", None, 0.0, 1e-4),
        ("8 bit", Some(store(8, rows, false)), 0.01, 0.2),
        ("8 bit KIVI", Some(store(8, kivi, true)), 0.03, 0.2),
        ("4 bit", Some(store(4, rows, false)), 0.1, 2.0),
        ("4 bit KIVI", Some(store(4, kivi, true)), 0.45, 2.0),
        ("3 bit", Some(store(3, rows, true)), 0.95, 5.0),
        ("2 bit", Some(store(2, rows, false)), 0.5, 10.0),
        ("2 bit KIVI", Some(store(2, kivi, true)), 2.2, 10.0),
    ]
}

fn policy(config: &PolicyConfig, case: &Case<'_>, folded: &AtomicUsize) -> Arc<dyn KvCachePolicy> {
    if config.policy != Method::Locret {
        let config = common::complete(config, case.spec);
        return config.build_for(case.model).unwrap();
    }
    // Weights that differ, from a formula.
    let weight = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 60.0;
    let layer = |l: usize| LayerHead {
        d_r: 6,
        fc1: (0..6 * case.spec.layer(0).qkv_features())
            .map(|i| weight(i + l))
            .collect(),
        fc2: (0..6 * case.spec.kv_heads)
            .map(|i| weight(i + 3 * l))
            .collect(),
        ..LayerHead::default()
    };
    let weights = HeadWeights {
        layers: (0..case.spec.layers).map(layer).collect(),
        metadata: Default::default(),
        ..HeadWeights::default()
    };
    // Every other case asks for heads that read the layer's input. They are folded only where queries,
    // keys and values together are wider than that.
    let heads = match case.seed % 2 {
        0 => RetainingHeads::for_model(&weights, case.model).unwrap(),
        _ => RetainingHeads::new(&weights, case.spec, &**case.model.compute()).unwrap(),
    };
    folded.fetch_add(usize::from(heads.folded()), Relaxed);
    config.build_with_heads(case.spec, heads).unwrap()
}

/// Returns how many cases, and how many of them had folded heads.
fn check(methods: impl Iterator<Item = Method>) -> (u64, usize) {
    let mut cases = 0;
    let folded = AtomicUsize::new(0);
    for method in methods {
        for (shape, pyramid, ada, share) in SHAPES {
            for (store, quantize, store_tolerance, tolerance) in stores() {
                for (merge, around) in AROUND {
                    let full = !method.evicts();
                    let plain = merge.is_none() && around == Around::Nothing;
                    let merges = method.merges();
                    if (merges && merge.is_some())
                        || (full && (shape != "uniform" || !plain))
                        || (merge.is_some() && shape == "pyramid")
                        || (around != Around::Nothing && !["uniform", "ada"].contains(&shape))
                        // What is chosen does not depend on the store but for its rounding.
                        || (around != Around::Nothing && !["dense", "4 bit KIVI"].contains(&store))
                        // Heads from memory come without the model.
                        || (around == Around::Critical && method == Method::Locret)
                    {
                        continue;
                    }
                    let check = PolicyCheck {
                        seeds: cases..cases + 1,
                        fills_budget: ada.is_none(),
                        dense: quantize.is_none(),
                        store_tolerance,
                        tolerance,
                        ..PolicyCheck::default()
                    };
                    cases += 1;
                    check_policy(&Device::flex(), &check, |case| {
                        let mut config = PolicyConfig::new(method).positions(case.positions);
                        config.quantize = quantize;
                        if method == Method::InfLlm {
                            // It has compact ones only.
                            config.positions = None;
                        }
                        if !full {
                            config.budget = Some(Budget::Units(case.budget));
                            config.decode = Some(case.decode);
                            config.pyramid = pyramid;
                            config.ada = ada;
                            config.share = share;
                            config.merge = merge;
                            config.merge_by = merge.map(|_| match cases % 2 {
                                0 => MergeBy::Weighted,
                                _ => MergeBy::Mean,
                            });
                            config.critical = around == Around::Critical;
                            if method == Method::D2o {
                                config.form = [None, Some(D2oForm::Code)][cases as usize % 2];
                                // All layers, or all but the first one.
                                config.exempt = Some((cases as usize % 3 / 2, 0));
                                config.mix_keys = (cases % 5 == 0).then_some(false);
                            }
                            if method == Method::Cam {
                                config.keeps = [None, Some(CamKeeps::Heavy)][cases as usize % 2];
                                config.sums = cases % 5 == 0;
                                config.window = Some(1 + cases as usize % 7);
                                config.seed = Some(cases);
                            }
                            config.blocks = (around == Around::Blocks).then_some(5);
                        }
                        policy(&config, case, &folded)
                    })
                    .unwrap_or_else(|e| {
                        panic!("{method}, {shape}, {store}, merging {merge:?}, {around:?}: {e}")
                    });
                }
            }
        }
    }
    (cases, folded.into_inner())
}

#[test]
fn every_policy_shape_and_store_conforms() {
    let (cases, folded) = check(Method::ALL.into_iter().filter(|method| !method.merges()));
    assert!(cases > 500, "{cases}");
    assert!(folded > 40, "{folded} policies with folded heads");
}

#[test]
fn policies_that_merge_conform() {
    let (cases, _) = check(Method::ALL.into_iter().filter(|method| method.merges()));
    assert!(cases > 80, "{cases}");
}
