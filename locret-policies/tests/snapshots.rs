//! Every published policy over every store, saved at any moment and taken up again: bit for bit the same.

mod common;

use burn::tensor::Device;
use locret_core::{
    Budget, CacheOptions, CausalLm, DType, DecodeEviction, Error, Generate, Kernels, KvCachePolicy,
    Positions, Prefill, QuantLayout, Quantization, Result, Rows, Sampling, Session, Share,
    SnapshotError,
    conformance::{RandomModel, small_spec},
};
use locret_policies::{
    CamKeeps, HeadWeights, LayerHead, Method, PolicyConfig, RetainingHeads, TierConfig,
};
use std::sync::Arc;

const PREFILL: Prefill = Prefill::new(16, 4);

fn model() -> Arc<dyn CausalLm> {
    Arc::new(RandomModel::new(small_spec(6, 2, 16), 7, &Device::flex()).unwrap())
}

fn text(tokens: usize) -> Vec<u32> {
    (0..tokens)
        .map(|i| ((i * i + 7 * i + i / 5) % 61) as u32)
        .collect()
}

fn heads(model: &dyn CausalLm, shift: usize) -> HeadWeights {
    let weight = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 60.0;
    let spec = model.spec();
    let inputs = spec.layer(0).qkv_features();
    let layer = |l: usize| LayerHead {
        d_r: 6,
        fc1: (0..6 * inputs).map(|i| weight(i + l + shift)).collect(),
        fc2: (0..6 * spec.kv_heads).map(|i| weight(i + 3 * l)).collect(),
        ..LayerHead::default()
    };
    HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: Default::default(),
        ..HeadWeights::default()
    }
}

fn build(model: &dyn CausalLm, config: &PolicyConfig, folded: bool) -> Arc<dyn KvCachePolicy> {
    if config.policy != Method::Locret {
        let config = common::complete(config, model.spec());
        return config.build_for(model).unwrap();
    }
    let weights = heads(model, 0);
    let heads = match folded {
        true => RetainingHeads::for_model(&weights, model),
        false => RetainingHeads::new(&weights, model.spec(), &**model.compute()),
    };
    config
        .build_with_heads(model.spec(), heads.unwrap())
        .unwrap()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

#[track_caller]
fn assert_same(a: &Session, b: &Session, what: &str) {
    assert_eq!(a.tokens(), b.tokens(), "{what}");
    assert_eq!(a.logits().map(bits), b.logits().map(bits), "{what}");
    let (x, y) = (a.cache(), b.cache());
    assert_eq!((x.seen(), x.peak()), (y.seen(), y.peak()), "{what}");
    let spec = x.spec();
    for (layer, head) in (0..spec.layers).flat_map(|l| (0..spec.kv_heads).map(move |h| (l, h))) {
        assert_eq!(x.positions(layer, head), y.positions(layer, head), "{what}");
        let [p, q] = [x, y].map(|cache| bits(cache.scores(layer, head)));
        assert_eq!(p, q, "{what}");
        let rows = |rows: Result<Rows>| bits(&rows.unwrap().into_values().unwrap());
        let (x, y) = (x.store(layer), y.store(layer));
        assert_eq!(rows(x.keys(head)), rows(y.keys(head)), "{what}");
        assert_eq!(rows(x.values(head)), rows(y.values(head)), "{what}");
    }
}

fn generate(session: &mut Session, tokens: usize, sampling: Sampling) {
    let tokens = session.generate(Generate::greedy(tokens).sampling(sampling));
    tokens.unwrap().for_each(|token| assert!(token.is_ok()));
}

/// The most likely tokens, drawn ones, a further turn with more of them, and the logits at the end.
fn go_on(session: &mut Session, rest: &[u32]) {
    let drawn = Sampling {
        temperature: 1.2,
        top_k: 40,
        repetition_penalty: 1.1,
        seed: 11,
        ..Sampling::greedy()
    };
    if !rest.is_empty() {
        session.prefill(rest, &PREFILL).unwrap();
    }
    generate(session, 3, Sampling::greedy());
    generate(session, 4, drawn);
    session.prefill(&text(90)[60..], &PREFILL).unwrap();
    generate(session, 3, drawn);
    session.score(&[5, 6]).unwrap();
}

/// Saved in the middle of a prompt, after it, and while text is generated.
fn check(
    model: &Arc<dyn CausalLm>,
    policy: &Arc<dyn KvCachePolicy>,
    options: CacheOptions,
    what: &str,
) {
    let ids = text(60);
    for moment in 0..3 {
        let what = format!("{what}, moment {moment}");
        let mut session = Session::with_options(model.clone(), policy.clone(), options).unwrap();
        let read = session.prefill_with(&ids, &PREFILL, &mut |done| match (moment, done.index) {
            (0, 1) => Err(Error::EmptyPrompt),
            _ => Ok(()),
        });
        assert_eq!(read.is_err(), moment == 0, "{what}");
        if moment == 2 {
            generate(&mut session, 3, Sampling::greedy());
        }
        let mut bytes = Vec::new();
        session.write(&mut bytes).unwrap();
        let (model, policy, length) = (model.clone(), policy.clone(), bytes.len() as u64);
        let mut again = Session::read(model, policy, options, &mut &bytes[..], length).unwrap();
        assert_same(&session, &again, &what);
        let rest = &ids[session.tokens().len().min(60)..];
        go_on(&mut session, rest);
        go_on(&mut again, rest);
        assert_same(&session, &again, &what);
        assert_eq!(session.cache().bytes(), again.cache().bytes(), "{what}");
    }
}

#[test]
fn every_policy_goes_on_bit_for_bit_over_every_store() {
    let model = model();
    let (rows, kivi) = (QuantLayout::PerToken, QuantLayout::Kivi);
    let coded = |(bits, layout)| Quantization {
        bits,
        layout,
        group: 8,
        residual: 3,
        first: 1,
        hadamard: bits < 8,
    };
    let dense = [DType::F32, DType::F16, DType::BF16].map(|dtype| (dtype, None));
    let codes = [
        (8, rows),
        (4, rows),
        (3, rows),
        (2, rows),
        (8, kivi),
        (4, kivi),
        (2, kivi),
    ];
    let stores = dense
        .into_iter()
        .chain(codes.map(|c| (DType::F32, Some(coded(c)))));
    let mut cases = 0;
    for (dtype, quantize) in stores {
        for method in Method::ALL {
            for positions in [Positions::Original, Positions::Compact] {
                for kernels in [Kernels::Auto, Kernels::Operations] {
                    let mut config = PolicyConfig::new(method).positions(positions);
                    config.quantize = quantize;
                    if method == Method::InfLlm {
                        if positions == Positions::Original {
                            continue;
                        }
                        (config.n_init, config.n_local) = (Some(3), Some(11));
                        (config.block_size, config.repr_topk, config.topk) =
                            (Some(5), Some(2), Some(2));
                        config.tier =
                            [None, Some(TierConfig::Memory), Some(TierConfig::Disk(None))]
                                [cases % 3]
                                .clone();
                        config.resident = config.tier.as_ref().map(|_| match quantize {
                            None => Budget::Units(100),
                            // A chunk is numbers until it is codes.
                            Some(_) => Budget::Bytes(1 << 18),
                        });
                    }
                    if method.evicts() {
                        config.budget = Some(Budget::Units(20));
                        // Half of them drop units while text is generated, share budgets, merge.
                        let even = cases % 2 == 0;
                        config.decode = even.then_some(DecodeEviction::Every(2));
                        config.ada = (cases % 3 == 0).then_some(0.3);
                        config.share = (cases % 7 == 0).then_some(Share::Model);
                        config.merge = (cases % 5 == 0 && !method.merges()).then_some(0.2);
                        if method == Method::D2o {
                            // The last layer folds, and its threshold is saved.
                            config.exempt = Some((1, 0));
                        }
                        if method == Method::Cam {
                            config.keeps = (cases % 3 > 0).then_some(CamKeeps::Heavy);
                            config.window = Some(5);
                        }
                    }
                    let policy = build(&*model, &config, cases % 4 < 2);
                    let options = CacheOptions::new().dtype(dtype).kernels(kernels);
                    check(
                        &model,
                        &policy,
                        options,
                        &format!("{config:?}, {options:?}"),
                    );
                    cases += 1;
                }
            }
        }
    }
    // InfLLM has compact positions only.
    assert_eq!(cases, 10 * (Method::ALL.len() * 2 - 1) * 2);
}

#[test]
fn other_heads_and_other_settings_are_refused() {
    let model = model();
    let config = PolicyConfig::new(Method::Locret).budget(Budget::Units(20));
    let policy = build(&*model, &config, true);
    let options = CacheOptions::new();
    let mut session = Session::with_options(model.clone(), policy.clone(), options).unwrap();
    session.prefill(&text(60), &PREFILL).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    session.save(&path).unwrap();
    // Made again of the same weights, they are the same heads.
    let same = build(&*model, &config, true);
    let again = Session::restore(model.clone(), same, options, &path).unwrap();
    assert_same(&session, &again, "made again");

    let other = RetainingHeads::for_model(&heads(&*model, 1), &*model).unwrap();
    let with = |f: &dyn Fn(&mut PolicyConfig)| {
        let mut other = config.clone();
        f(&mut other);
        build(&*model, &other, true)
    };
    for other in [
        config.build_with_heads(model.spec(), other).unwrap(),
        build(&*model, &config, false),
        with(&|c| c.budget = Some(Budget::Units(21))),
        with(&|c| c.stabilizers = Some(3)),
        with(&|c| c.positions = Some(Positions::Original)),
        with(&|c| c.quantize = Some(Quantization::bits(8))),
        with(&|c| c.merge = Some(0.9)),
        with(&|c| c.share = Some(Share::Model)),
    ] {
        let fingerprint = other.fingerprint();
        match Session::restore(model.clone(), other, options, &path) {
            Err(Error::Snapshot(SnapshotError::OtherPolicy { expected, found })) => {
                assert_eq!((expected, found), (fingerprint, policy.fingerprint()));
            }
            found => panic!("{fingerprint}: {found:?}"),
        }
    }
}
