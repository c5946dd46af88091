//! Policies that no budget bounds against plain loops, and against what every policy must satisfy.

mod common;

use burn::tensor::Device;
use common::{Numbers, cache, drive, spec, steps};
use locret_core::{
    DecodeEviction, KvCachePolicy, ModelSpec, Phase, Positions,
    conformance::{PolicyCheck, check_policy},
};
use locret_policies::{DuoAttention, KeyNorm, Threshold};
use std::{collections::BTreeSet, sync::Arc};

/// Positions that stay by a rule on the units that are there: layer, head, positions, keys.
type Rule<'a> = &'a dyn Fn(usize, usize, &[(usize, f64)]) -> BTreeSet<usize>;

/// Both through one prompt and some tokens after it; `cuts` says in which phases something goes.
fn compare(
    spec: &ModelSpec,
    policy: Arc<dyn KvCachePolicy>,
    cuts: &dyn Fn(Phase) -> bool,
    rule: Rule<'_>,
) {
    let mut numbers = Numbers(3);
    let mut real = cache(spec, policy);
    let (layers, heads, d) = (spec.layers, spec.kv_heads, spec.head_dim);
    // By layer and head, position and length of the key.
    let mut naive = vec![vec![Vec::<(usize, f64)>::new(); heads]; layers];
    let (mut seen, mut gone) = (0, 0);
    for step in steps(spec, &mut numbers, 90, 16, 7, 12, true) {
        drive(&mut real, &step, 90).unwrap();
        for (layer, naive) in naive.iter_mut().enumerate() {
            for (head, units) in naive.iter_mut().enumerate() {
                for token in 0..step.tokens {
                    let at = (token * heads + head) * d;
                    let key = &step.layers[layer][1][at..at + d];
                    let square: f64 = key.iter().map(|x| f64::from(*x).powi(2)).sum();
                    units.push((seen + token, square.sqrt()));
                }
                if cuts(step.phase) {
                    let stays = rule(layer, head, units);
                    gone += units.len() - stays.len();
                    units.retain(|unit| stays.contains(&unit.0));
                }
                let due: Vec<u32> = units.iter().map(|unit| unit.0 as u32).collect();
                assert_eq!(real.positions(layer, head), due, "{:?}", step.phase);
            }
        }
        seen += step.tokens;
    }
    assert!(gone > 50, "{gone}");
}

#[test]
fn thresholds_equal_plain_loops() {
    for positions in [Positions::Original, Positions::Compact] {
        for decoding in [false, true] {
            let spec = spec(2, 3, 2, 8);
            let policy = Threshold::new(KeyNorm, -3.3)
                .sinks(2)
                .window(5)
                .with_positions(positions)
                .while_decoding(decoding);
            assert_eq!(policy.limit(&spec.layer(0), 90), None);
            let cuts = |phase| {
                matches!(phase, Phase::Prefill { .. }) || (decoding && phase == Phase::Decode)
            };
            compare(&spec, Arc::new(policy), &cuts, &|_, _, units| {
                let newest = units.len().saturating_sub(5);
                let stays = |(i, unit): &(usize, &(usize, f64))| {
                    unit.0 < 2 || *i >= newest || unit.1 <= 3.3
                };
                let units = units.iter().enumerate().filter(stays);
                units.map(|(_, unit)| unit.0).collect()
            });
        }
    }
}

#[test]
fn streaming_heads_equal_plain_loops() {
    let spec = spec(2, 3, 2, 8);
    let scores = [vec![0.1, 0.9, 0.2], vec![0.3, 1.7, 0.25]];
    let policy = DuoAttention::new(&scores, 0.5).unwrap().sinks(3).recent(9);
    let streaming = [[true, false, true], [false, false, true]];
    let decoding = policy.clone().while_decoding(DecodeEviction::Every(1));
    for (policy, decodes) in [(policy, false), (decoding, true)] {
        for (layer, row) in streaming.iter().enumerate() {
            for (head, streams) in row.iter().enumerate() {
                assert_eq!(policy.streams(layer, head), *streams);
            }
        }
        let cuts =
            |phase| matches!(phase, Phase::Prefill { .. }) || (decodes && phase == Phase::Decode);
        compare(&spec, Arc::new(policy), &cuts, &|layer, head, units| {
            let n = units.len();
            let stays = |i: &usize| !streaming[layer][head] || *i < 3 || i + 9 >= n;
            (0..n).filter(stays).map(|i| units[i].0).collect()
        });
    }
}

#[test]
fn they_conform() {
    let device = Device::flex();
    check_policy(&device, &PolicyCheck::default(), |case| {
        // What no budget bounds keeps everything where nothing scores too little.
        let least = match case.budget {
            1_048_576.. => f32::NEG_INFINITY,
            _ => -2.0,
        };
        let policy = Threshold::new(KeyNorm, least).window(4).sinks(1);
        let decoding = case.decode != DecodeEviction::Off;
        Arc::new(
            policy
                .with_positions(case.positions)
                .while_decoding(decoding),
        )
    })
    .unwrap();
    check_policy(&device, &PolicyCheck::default(), |case| {
        // Every other head; one layer's only one, where there is one.
        let row = |l: usize| {
            (0..case.spec.kv_heads)
                .map(|h| ((l + h) % 2) as f64)
                .collect()
        };
        let scores: Vec<Vec<f64>> = (0..case.spec.layers).map(row).collect();
        let policy = DuoAttention::new(&scores, 0.5).unwrap();
        let policy = policy.sinks(2).recent(case.budget - 2);
        Arc::new(
            policy
                .with_positions(case.positions)
                .while_decoding(case.decode),
        )
    })
    .unwrap();
}

#[test]
fn tables_of_heads_are_checked() {
    for bad in [
        vec![],
        vec![vec![]],
        vec![vec![0.1], vec![0.1, 0.2]],
        vec![vec![f64::NAN]],
    ] {
        assert!(DuoAttention::new(&bad, 0.5).is_err(), "{bad:?}");
    }
    for share in [-0.1, 1.1, f64::NAN] {
        assert!(DuoAttention::new(&[vec![0.1]], share).is_err(), "{share}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("full_attention_heads.tsv");
    std::fs::write(&file, "0.9\t0.1\n0.2\t1e-1\n").unwrap();
    let policy = DuoAttention::load(&file, 0.5).unwrap();
    let found = [
        policy.streams(0, 0),
        policy.streams(0, 1),
        policy.streams(1, 1),
    ];
    assert_eq!(found, [false, true, true]);
    std::fs::write(&file, "0.9\tmuch\n").unwrap();
    assert!(DuoAttention::load(&file, 0.5).is_err());
    assert!(DuoAttention::load(folder.path().join("nowhere"), 0.5).is_err());
    let policy = DuoAttention::new(&[vec![0.1, 0.2]], 0.5).unwrap();
    assert!(
        policy
            .validate(&spec(2, 2, 1, 8), &Default::default())
            .is_err()
    );
}
