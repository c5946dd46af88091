//! Layers laid over several devices compute what they do on one: here over two implementations on the CPU, in
//! every order.

mod common;

use burn::tensor::Device;
use common::golden;
use locret_core::{
    Budget, CacheOptions, CausalLm, Compute, DType, DecodeEviction, DeviceMap, End, Error, Event,
    Generate, Host, KvCachePolicy, Limits, Ops, Positions, Prefill, Quantization, Request, Session,
    Share, plan, plan_layers,
};
use locret_models::{LoadOptions, ModelError, ModelFiles, WeightDtype, load_model_with};
use locret_policies::{HeadWeights, LayerHead, Method, PolicyConfig, RetainingHeads};
use std::sync::{Arc, Mutex};

const FAMILIES: [&str; 8] = [
    "llama31",
    "llama32",
    "llama_biases",
    "mistral",
    "phi3_128k",
    "phi4_mini",
    "qwen2",
    "qwen3",
];

fn host() -> Arc<dyn Compute> {
    Arc::new(Host::new(&Device::flex()))
}

fn ops() -> Arc<dyn Compute> {
    Arc::new(Ops::new(&Device::flex()))
}

fn load(name: &str, compute: &Arc<dyn Compute>) -> Arc<dyn CausalLm> {
    let options = LoadOptions::new().weights(WeightDtype::F32);
    let loaded = load_model_with(golden(name), &options, compute).unwrap();
    loaded.model
}

/// All ways to lay so many layers over the CPU's kernels and Burn's operations with at most one border, both ends
/// beside their layers or on the other side; and one with two borders, where there are layers enough.
fn maps(layers: usize) -> Vec<(String, Arc<dyn Compute>)> {
    let mut all: Vec<(String, DeviceMap)> = Vec::new();
    for border in 0..=layers {
        let (host, ops) = (host(), ops());
        let parts = [(host.clone(), border), (ops.clone(), layers - border)];
        let map = DeviceMap::of(parts).unwrap();
        let turned = DeviceMap::of([(ops.clone(), border), (host.clone(), layers - border)]);
        all.push((format!("{border} by kernels"), map.clone()));
        all.push((format!("{border} by operations"), turned.unwrap()));
        let ends = map.with_input(ops).unwrap().with_output(host).unwrap();
        all.push((format!("{border} by kernels, ends apart"), ends));
    }
    if layers > 2 {
        let two = [(host(), 1), (ops(), 1), (host(), layers - 2)];
        all.push(("two borders".into(), DeviceMap::of(two).unwrap()));
    }
    (all.into_iter())
        .map(|(name, map)| (name, Arc::new(map) as Arc<dyn Compute>))
        .collect()
}

/// 90 tokens, none of them twice.
fn ids() -> Vec<u32> {
    (0..90).map(|i| (i * 77 + 13) % 180).collect()
}

/// What is kept, the logits after the prompt, and ten greedy tokens.
#[derive(Debug)]
struct Run {
    kept: Vec<Vec<u32>>,
    logits: Vec<f32>,
    tokens: Vec<u32>,
}

fn kept(session: &Session) -> Vec<Vec<u32>> {
    let (cache, spec) = (session.cache(), session.model().spec());
    let heads = (0..spec.layers).flat_map(|l| (0..spec.kv_heads).map(move |h| (l, h)));
    heads.map(|(l, h)| cache.positions(l, h).to_vec()).collect()
}

fn go_on(session: &mut Session) -> Run {
    let (kept, logits) = (kept(session), session.logits().unwrap().to_vec());
    let tokens = session.generate(Generate::greedy(10)).unwrap();
    Run {
        kept,
        logits,
        tokens: tokens.map(Result::unwrap).collect(),
    }
}

fn read(model: &Arc<dyn CausalLm>, policy: Arc<dyn KvCachePolicy>, dtype: DType) -> Session {
    let options = CacheOptions::new().dtype(dtype);
    let mut session = Session::with_options(model.clone(), policy, options).unwrap();
    session.prefill(&ids(), &Prefill::new(16, 10)).unwrap();
    session
}

fn same(case: &str, found: &Run, expected: &Run, tolerance: f32) {
    assert_eq!(found.kept, expected.kept, "{case}");
    assert_eq!(found.logits.len(), expected.logits.len());
    let off = (found.logits.iter().zip(&expected.logits)).map(|(a, b)| (a - b).abs());
    let off = off.fold(0.0, f32::max);
    assert!(off <= tolerance, "{case}: logits {off:.1e} off");
    assert_eq!(found.tokens, expected.tokens, "{case}");
}

/// Rounding of 32-bit sums in another order.
const TOLERANCE: f32 = 1e-5;

#[test]
fn every_family_computes_the_same_on_every_map() {
    let window = || {
        let config = PolicyConfig::new(Method::Window).budget(Budget::Units(24));
        config.positions(Positions::Compact)
    };
    for name in FAMILIES {
        let alone = load(name, &host());
        let policy = || window().build(alone.spec(), &**alone.compute()).unwrap();
        let expected = go_on(&mut read(&alone, policy(), DType::F32));
        for (map, compute) in maps(alone.spec().layers) {
            let model = load(name, &compute);
            let case = format!("{name}, {map}");
            let found = go_on(&mut read(&model, policy(), DType::F32));
            same(&case, &found, &expected, TOLERANCE);
            // It is the same model.
            assert_eq!(
                model.fingerprint().unwrap(),
                alone.fingerprint().unwrap(),
                "{case}"
            );
        }
    }
}

/// Heads whose weights follow a formula.
fn heads(model: &dyn CausalLm, folded: bool) -> RetainingHeads {
    let (spec, d_r) = (model.spec(), 8);
    let weight = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 60.0;
    let list = |n: usize, from: usize| (0..n).map(|i| weight(i + from)).collect();
    let layer = |l: usize| LayerHead {
        d_r,
        fc1: list(d_r * spec.layer(l).qkv_features(), l),
        fc2: list(d_r * spec.kv_heads, 3 * l),
        ..LayerHead::default()
    };
    let weights = HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        ..HeadWeights::default()
    };
    match folded {
        true => RetainingHeads::for_model(&weights, model).unwrap(),
        false => RetainingHeads::new(&weights, spec, &**model.compute()).unwrap(),
    }
}

/// Policies that ask for different things: nothing, features, attention, the layer's input, all layers at once, a
/// look before attention, matrices of the model's; and stores.
fn policies() -> Vec<(&'static str, PolicyConfig, DType)> {
    let of = |method| PolicyConfig::new(method).budget(Budget::Units(24));
    let window = of(Method::Window);
    let mut critical = of(Method::SnapKv);
    critical.critical = true;
    let mut shared = of(Method::SnapKv);
    (shared.ada, shared.share) = (Some(0.2), Some(Share::Model));
    let mut evicting = of(Method::Tova);
    evicting.decode = Some(DecodeEviction::Every(4));
    let mut codes = of(Method::H2o);
    codes.quantize = Some(Quantization::bits(8));
    let mut few = window.clone();
    few.quantize = Some(Quantization::bits(4));
    vec![
        ("full", PolicyConfig::new(Method::Full), DType::F32),
        ("window", window.clone(), DType::F32),
        (
            "window, original",
            window.clone().positions(Positions::Original),
            DType::F32,
        ),
        ("h2o", of(Method::H2o), DType::F32),
        ("h2o, codes of 8 bits", codes, DType::F32),
        ("window, codes of 4 bits", few, DType::F32),
        ("window, f16", window, DType::F16),
        ("tova that evicts while decoding", evicting, DType::F32),
        ("sirllm", of(Method::SirLlm), DType::F32),
        ("a budget of the whole model", shared, DType::F32),
        ("criticalkv", critical, DType::F32),
        ("compactor", of(Method::Compactor), DType::F32),
        ("locret", of(Method::Locret), DType::F32),
        ("infllm", of(Method::InfLlm), DType::F32),
        (
            "minference",
            PolicyConfig::new(Method::MInference),
            DType::F32,
        ),
    ]
}

fn built(config: &PolicyConfig, model: &dyn CausalLm) -> Vec<Arc<dyn KvCachePolicy>> {
    match config.policy {
        Method::Locret => [true, false]
            .map(|folded| heads(model, folded))
            .map(|heads| config.build_with_heads(model.spec(), heads).unwrap())
            .into(),
        _ => vec![config.build_for(model).unwrap()],
    }
}

#[test]
fn every_policy_keeps_the_same_on_a_map() {
    let alone = load("llama31", &host());
    for (name, config, dtype) in policies() {
        let expected = built(&config, &*alone);
        for (map, compute) in maps(alone.spec().layers) {
            let model = load("llama31", &compute);
            let policies = built(&config, &*model);
            for (policy, expected) in policies.into_iter().zip(&expected) {
                // A number that is off by the last of its bits may become a neighbour of 16, 8 or 4 bits.
                let narrow = dtype != DType::F32 || config.quantize.is_some();
                let tolerance = if narrow { 3e-3 } else { TOLERANCE };
                let expected = go_on(&mut read(&alone, expected.clone(), dtype));
                let found = go_on(&mut read(&model, policy, dtype));
                same(&format!("{name}, {map}"), &found, &expected, tolerance);
            }
        }
    }
}

#[test]
fn snapshots_and_forks_go_on_where_layers_lie_elsewhere() {
    let all = maps(3);
    let config = PolicyConfig::new(Method::H2o).budget(Budget::Units(24));
    let mut snapshots = Vec::new();
    let mut expected = None;
    for (map, compute) in &all {
        let model = load("llama31", compute);
        let mut session = read(&model, config.build_for(&*model).unwrap(), DType::F32);
        let mut fork = session.fork().unwrap();
        let mut bytes = Vec::new();
        session.write(&mut bytes).unwrap();
        snapshots.push((map, bytes));
        let run = go_on(&mut session);
        same(map, &go_on(&mut fork), &run, 0.0);
        expected.get_or_insert(run);
    }
    let expected = expected.unwrap();
    // Each of them in the one after the next, of the other kind.
    for (i, (from, bytes)) in snapshots.iter().enumerate() {
        let (to, compute) = &all[(i + 2) % all.len()];
        let model = load("llama31", compute);
        let policy = config.build_for(&*model).unwrap();
        let mut session = Session::read(
            model,
            policy,
            CacheOptions::new(),
            &mut &bytes[..],
            bytes.len() as u64,
        )
        .unwrap();
        same(
            &format!("{from}, then {to}"),
            &go_on(&mut session),
            &expected,
            TOLERANCE,
        );
    }
}

#[test]
fn sequences_of_a_batch_answer_as_each_does_alone() {
    let texts: Vec<Vec<u32>> = (0..3).map(|i| ids()[i * 7..40 + i * 20].to_vec()).collect();
    let config = PolicyConfig::new(Method::SnapKv).budget(Budget::Units(24));
    let alone = load("llama31", &host());
    let expected: Vec<Vec<u32>> = (texts.iter())
        .map(|text| {
            let policy = config.build_for(&*alone).unwrap();
            let mut session = Session::new(alone.clone(), policy).unwrap();
            session.prefill(text, &Prefill::new(16, 10)).unwrap();
            let tokens = session.generate(Generate::greedy(10)).unwrap();
            tokens.map(Result::unwrap).collect()
        })
        .collect();
    for (map, compute) in maps(3) {
        let model = load("llama31", &compute);
        assert_eq!(batched(&model, &config, &texts), expected, "{map}");
    }
}

/// What each of several sequences at once is answered with.
fn batched(model: &Arc<dyn CausalLm>, config: &PolicyConfig, texts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let limits = Limits::new().running(texts.len()).waiting(texts.len());
    let mut batch = locret_core::Batch::new(model.clone(), limits).unwrap();
    let answers = Arc::new(Mutex::new(vec![Vec::new(); texts.len()]));
    for (i, text) in texts.iter().enumerate() {
        let request = Request::new(text.clone(), config.build_for(&**model).unwrap())
            .prefill(Prefill::new(16, 10))
            .generate(Generate::greedy(10));
        let answers = answers.clone();
        let sink = move |event| match event {
            Event::Token(id) => answers.lock().unwrap()[i].push(id),
            Event::Ended(ended) => assert!(!matches!(ended.end, End::Failed(_)), "{ended:?}"),
            _ => {}
        };
        batch.submit(request, Box::new(sink)).unwrap();
    }
    while batch.step() {}
    let answers = answers.lock().unwrap();
    answers.clone()
}

#[test]
fn a_plan_of_a_map_is_what_it_takes_and_that_of_its_parts_adds_up() {
    let (prefill, tokens) = (Prefill::new(16, 10), [90, 10]);
    for (name, config, dtype) in policies() {
        // What codes and shares take depends on the text, and of InfLLM's units some are put away.
        let estimated = config.quantize.is_some() || config.share.is_some();
        if estimated || config.policy == Method::InfLlm {
            continue;
        }
        for (map, compute) in maps(3).into_iter().step_by(4) {
            let model = load("llama31", &compute);
            let spec = model.spec();
            let policy = built(&config, &*model).remove(0);
            let options = CacheOptions::new().dtype(dtype);
            let planned = plan(spec, &*policy, &compute, options, &prefill, tokens).unwrap();
            let mut session = read(&model, policy.clone(), dtype);
            let report = session.report();
            assert_eq!(
                report.prefill_peak.bytes, planned.prefill.bytes,
                "{name}, {map}"
            );
            go_on(&mut session);
            assert_eq!(session.report().kv_bytes, planned.bytes, "{name}, {map}");
            // Each layer alone: at rest they add up, and at its peak each is as large as the largest.
            let one = |layer: usize| {
                let range = layer..layer + 1;
                plan_layers(spec, &*policy, &compute, options, &prefill, tokens, range).unwrap()
            };
            let each: Vec<_> = (0..3).map(one).collect();
            let rest: usize = each.iter().map(|plan| plan.bytes).sum();
            assert_eq!(rest, planned.bytes, "{name}, {map}");
            let peaks: usize = each.iter().map(|plan| plan.prefill.bytes).sum();
            assert!(peaks >= planned.prefill.bytes, "{name}, {map}");
            let layer = |l: usize| session.cache().store(l).bytes();
            let held: Vec<usize> = (0..3).map(layer).collect();
            let planned: Vec<usize> = each.iter().map(|plan| plan.bytes).collect();
            assert_eq!(held, planned, "{name}, {map}");
        }
    }
}

#[test]
fn maps_that_do_not_fit_are_errors() {
    let setting = |error: &Error, what: &str| {
        let text = error.to_string();
        assert!(
            matches!(error, Error::Setting { .. }) && text.contains(what),
            "{text}"
        );
    };
    setting(&DeviceMap::of([]).unwrap_err(), "at least one layer");
    setting(
        &DeviceMap::of([(host(), 0)]).unwrap_err(),
        "at least one layer",
    );
    let two: Arc<dyn Compute> = Arc::new(DeviceMap::of([(host(), 2)]).unwrap());
    setting(
        &DeviceMap::of([(two.clone(), 1)]).unwrap_err(),
        "a layer on a map",
    );
    let one = DeviceMap::of([(host(), 1)]).unwrap();
    setting(
        &one.clone().with_input(two.clone()).unwrap_err(),
        "a layer on a map",
    );
    setting(
        &one.with_output(two.clone()).unwrap_err(),
        "a layer on a map",
    );
    // Three layers on a map of two.
    let options = LoadOptions::new();
    let failed = load_model_with(golden("llama31"), &options, &two).unwrap_err();
    let ModelError::Core(failed) = failed else {
        panic!("{failed}")
    };
    setting(&failed, "the model's 3 layers");
    let spec = ModelFiles::open(golden("llama31"))
        .unwrap()
        .config()
        .unwrap()
        .spec();
    let policy = PolicyConfig::new(Method::Full).build(&spec, &*two).unwrap();
    let cache = locret_core::SequenceCache::new(&spec, policy.clone(), &two, CacheOptions::new());
    setting(&cache.unwrap_err(), "the model's 3 layers");
    let (prefill, options) = (Prefill::default(), CacheOptions::new());
    let planned = plan_layers(&spec, &*policy, &host(), options, &prefill, [9, 1], 1..4);
    setting(&planned.unwrap_err(), "0..3");
}
