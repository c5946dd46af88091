//! Every device that the tests are built with, by this repository's kernels for it, and Burn's operations on the CPU:
//! the same logits, the same kept units and the same answers for every policy, store and mode of positions as the
//! CPU kernels give, as far as the device's arithmetic allows.
//!
//! ```text
//! cargo test --release -p locret-examples --features vulkan --test devices
//! ```
//!
//! All policies take long where a processor plays the GPU; `LOCRET_POLICIES=locret,window` names some.

use locret_core::{
    Budget, CacheOptions, CausalLm, DType, Kernels, ModelSpec, Positions, Prefill, Quantization,
    Session, conformance::StoreCheck,
};
use locret_eval::{
    golden::GoldenLogits,
    trace::{Trace, trace},
};
use locret_examples::runtime::{compute, device};
use locret_models::{LoadOptions, WeightDtype, load_model_with};
use locret_policies::{
    Gate, HeadForm, HeadWeights, LayerHead, Method, PolicyConfig, QFilters, RetainingHeads,
};
use std::{
    env,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Policies by name, if not all.
const ONLY: &str = "LOCRET_POLICIES";

/// How far a logit may be off, and which share of the kept units may be others. Under 16-bit stores a number that is off
/// by the last of 32 bits may become its neighbour of 16, which is 1e-3 away between 1 and 2: several of these add up, and
/// may decide between units that are nearly alike. Of 32-bit stores all policies keep the same units, but for K-norm where
/// keys are off.
#[derive(Clone, Copy)]
struct Tolerance {
    logit: f32,
    half: f32,
    half_units: f64,
    key_norm: f64,
}

/// On the CPU.
const CPU: Tolerance = Tolerance {
    logit: 1e-4,
    half: 3e-3,
    half_units: 0.01,
    key_norm: 0.0,
};

/// In single precision throughout, in another order.
#[cfg(any(feature = "vulkan", feature = "metal", feature = "wgpu"))]
const EXACT: Tolerance = Tolerance {
    logit: 1e-4,
    half: 3e-3,
    half_units: 0.01,
    key_norm: 0.0,
};

/// Where Burn's backend, which retaining heads are computed by, multiplies `f32` matrices with what is left of them in
/// TF32, with 10 bits after the point, if that is the fastest way.
#[cfg(feature = "cuda")]
const TF32: Tolerance = Tolerance {
    logit: 3e-2,
    half: 3e-2,
    half_units: 0.02,
    key_norm: 0.02,
};

/// The tests on one device.
macro_rules! on {
    ($device:ident, $tolerance:expr) => {
        mod $device {
            #[test]
            fn logits_are_those_of_transformers() {
                super::logits(stringify!($device), $tolerance);
            }

            #[test]
            fn every_policy_keeps_and_answers_what_it_does_on_the_cpu() {
                super::policies(stringify!($device), $tolerance);
            }
        }
    };
}

on!(operations, super::CPU);
#[cfg(feature = "cuda")]
on!(cuda, super::TF32);
#[cfg(feature = "vulkan")]
on!(vulkan, super::EXACT);
#[cfg(feature = "metal")]
on!(metal, super::EXACT);
#[cfg(feature = "wgpu")]
on!(wgpu, super::EXACT);

/// What is asked for by `--kernels operations`, or has no kernel.
#[cfg(feature = "wgpu")]
#[test]
fn burns_operations_on_a_device() {
    logits("wgpu_operations", EXACT);
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../locret-models/tests/golden")
        .join(name)
}

/// What computes: on the CPU its kernels are the measure of all others.
fn kernels(on: &str) -> Kernels {
    match on.ends_with("operations") {
        true => Kernels::Operations,
        false => Kernels::Auto,
    }
}

fn model(name: &str, on: &str) -> Arc<dyn CausalLm> {
    let options = LoadOptions::new()
        .weights(WeightDtype::F32)
        .kernels(kernels(on));
    let device = match on.strip_suffix("operations") {
        Some("") => device("flex"),
        Some(other) => device(other.trim_end_matches('_')),
        None => device(on),
    };
    let device = device.unwrap_or_else(|e| panic!("{on}: {}", e.chain()));
    let compute = compute(&device, &options).unwrap();
    load_model_with(golden(name), &options, &compute)
        .unwrap()
        .model
}

/// Heads whose weights follow a formula.
fn heads(model: &dyn CausalLm) -> RetainingHeads {
    let (spec, d_r) = (model.spec(), 8);
    let weight = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 60.0;
    let layer = |l: usize| LayerHead {
        d_r,
        fc1: (0..d_r * spec.layer(l).qkv_features())
            .map(|i| weight(i + l))
            .collect(),
        fc2: (0..d_r * spec.kv_heads)
            .map(|i| weight(i + 3 * l))
            .collect(),
        ..LayerHead::default()
    };
    let weights = HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: Default::default(),
        ..HeadWeights::default()
    };
    RetainingHeads::for_model(&weights, model).unwrap()
}

/// Heads of another form than Locret's.
fn formed(model: &dyn CausalLm, form: HeadForm) -> RetainingHeads {
    let spec = model.spec();
    let (heads, group, features) = (spec.kv_heads, spec.heads / spec.kv_heads, 4);
    let list = |n: usize, from: usize| (0..n).map(move |i| weight(i + from)).collect::<Vec<f32>>();
    let layer = |l: usize| {
        let d_r = match form {
            HeadForm::Gate => heads * (group + 1) * features,
            _ => heads,
        };
        let mut bias = list(d_r, l + 3);
        if form == HeadForm::Gate {
            // Keys have none.
            bias[heads * group * features..].fill(0.0);
        }
        LayerHead {
            d_r,
            fc1: list(d_r * spec.hidden, l),
            fc1_bias: bias,
            gate: (form == HeadForm::Gate).then(|| Gate {
                query_norm: list(features, 5),
                key_norm: list(features, 6),
                base: list(heads * 2 * features, 7),
                offset: list(heads * group, 8),
            }),
            ..LayerHead::default()
        }
    };
    let weights = HeadWeights {
        form,
        layers: (0..spec.layers).map(layer).collect(),
        ..HeadWeights::default()
    };
    RetainingHeads::for_model(&weights, model).unwrap()
}

fn weight(i: usize) -> f32 {
    ((i * 37 % 101) as f32 - 50.0) / 60.0
}

/// A file of scores of heads, of which every other one is high.
fn head_scores(spec: &ModelSpec) -> PathBuf {
    let row = |l: usize| {
        let score = |h: usize| ((l + h) % 2).to_string();
        (0..spec.kv_heads).map(score).collect::<Vec<_>>().join("\t")
    };
    let rows: Vec<String> = (0..spec.layers).map(row).collect();
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("heads.tsv");
    std::fs::write(&file, rows.join("\n")).unwrap();
    file
}

/// A file of directions of queries.
fn filters(spec: &ModelSpec) -> PathBuf {
    let shape = [spec.layers, spec.kv_heads, spec.head_dim];
    let numbers = (0..shape.iter().product()).map(|i: usize| (i * 37 % 101) as f32 / 50.0 - 1.0);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("filters.safetensors");
    let filters = QFilters::new(numbers.collect(), shape).unwrap();
    filters.save(&file).unwrap();
    file
}

/// 90 tokens in chunks of 16, the last 10 without eviction; then eight greedy ones.
fn run(on: &str, config: &PolicyConfig, dtype: DType) -> (Trace, Vec<f32>) {
    let model = model("llama31", on);
    let spec = model.spec();
    let policy = match config.policy {
        Method::Locret => config.build_with_heads(spec, heads(&*model)).unwrap(),
        Method::KvZap => {
            let heads = formed(&*model, HeadForm::Linear);
            config.build_with_heads(spec, heads).unwrap()
        }
        Method::FastKvZip => {
            let heads = formed(&*model, HeadForm::Gate);
            config.build_with_heads(spec, heads).unwrap()
        }
        Method::QFilters | Method::DuoAttention => {
            let mut config = config.clone();
            match config.policy {
                Method::QFilters => config.filters = Some(filters(spec)),
                _ => {
                    config.patterns = Some(head_scores(spec));
                    (config.sinks, config.recent) = (Some(4), Some(20));
                }
            }
            config.build(spec, &**model.compute()).unwrap()
        }
        _ => config.build(spec, &**model.compute()).unwrap(),
    };
    // No token twice: keys of the same one have the same norm but for rounding.
    let ids: Vec<u32> = (0..90).map(|i| (i * 77 + 13) % 180).collect();
    let options = CacheOptions::new().kernels(kernels(on)).dtype(dtype);
    let mut session = Session::with_options(model, policy, options).unwrap();
    let prefill = Prefill::new(16, 10);
    let mut read = session.fork().unwrap();
    read.prefill(&ids, &prefill).unwrap();
    let logits = read.logits().unwrap().to_vec();
    let found = trace(&mut session, &ids, &prefill, 8, &mut |_| ()).unwrap();
    // A trace looks at verdicts; without one units may be chosen where they lie, and are the same.
    for (layer, heads) in found.kept.last().unwrap().iter().enumerate() {
        for (head, kept) in heads.iter().enumerate() {
            let read = read.cache().positions(layer, head);
            assert!(read.starts_with(kept), "{config:?}: {read:?}, {kept:?}");
        }
    }
    (found, logits)
}

fn logits(on: &str, tolerance: Tolerance) {
    for name in ["llama31", "llama32", "phi3_4k"] {
        let expected = GoldenLogits::read(&golden(name).join("golden.json")).unwrap();
        let expected = expected.only("default");
        let distance = expected.compare(&*model(name, on)).unwrap();
        println!("{on}, {name}: {distance:?}");
        assert!(
            distance.largest <= tolerance.logit,
            "{on}, {name}: {distance:?}"
        );
    }
}

fn policies(on: &str, tolerance: Tolerance) {
    let (mut failures, mut flipped, mut coded) = (Vec::new(), Vec::new(), 0);
    let model = model("llama31", "flex");
    let spec = model.spec();
    // Units of a head that the CPU kernels' store holds room for beyond those that are there.
    let reserve = StoreCheck::default().reserve;
    let most = reserve * 2 * spec.head_dim * size_of::<f32>() * spec.kv_heads * spec.layers;
    // A name that there is not would be a test of nothing.
    let only = env::var(ONLY).map(|names| {
        let names = names.split(',').map(|name| name.parse().unwrap());
        names.collect::<Vec<Method>>()
    });
    for method in only.unwrap_or_else(|_| Method::ALL.to_vec()) {
        for positions in [Positions::Compact, Positions::Original] {
            for (dtype, bits) in [
                (DType::F32, None),
                (DType::F16, None),
                (DType::F32, Some(8)),
                (DType::F32, Some(4)),
            ] {
                if method == Method::InfLlm && positions == Positions::Original {
                    continue;
                }
                let mut config = PolicyConfig::new(method).positions(positions);
                config.quantize = bits.map(Quantization::bits);
                if method.evicts() {
                    config.budget = Some(Budget::Units(24));
                }
                let case = format!("{on}, {method}, {positions:?}, {dtype}, {bits:?} bits");
                let (expected, there) = run("flex", &config, dtype);
                let (found, here) = run(on, &config, dtype);
                let off = (here.iter().zip(&there))
                    .map(|(a, b)| (a - b).abs())
                    .fold(0.0, f32::max);
                let others = others(&found, &expected);
                println!("{case}: logits {off:.1e} off, {others:.4} of the units are others");
                assert_eq!(here.len(), there.len());
                // Tensors have no reserve for tokens to come.
                let reserve = expected.peak_kv_bytes.checked_sub(found.peak_kv_bytes);
                assert!(reserve.is_some_and(|r| r <= most), "{case}: {reserve:?}");
                // Where another unit was kept, what comes after it is another text.
                let same = others > 0.0 || found.generated == expected.generated;
                let may_be = match (dtype, method) {
                    (DType::F32, Method::KeyNorm) => tolerance.key_norm,
                    (DType::F32, _) => 0.0,
                    _ => tolerance.half_units,
                };
                let may_differ = match dtype {
                    DType::F32 => tolerance.logit,
                    _ => tolerance.half,
                };
                // A number between two codes, or a step between two numbers of 16 bits, becomes either of them after
                // a difference in the last place, and what is computed from it is off by some part of a step. That
                // is seldom.
                let step = bits.map_or(0.0, |bits| 0.25 / ((1 << bits) - 1) as f32);
                coded += usize::from(bits.is_some());
                if others == 0.0 && off > may_differ && off <= step && same {
                    flipped.push(case);
                    continue;
                }
                if others > may_be || (others == 0.0 && off > may_differ) || !same {
                    failures.push(case);
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(10 * flipped.len() <= coded, "{flipped:#?}");
}

/// The share of kept units that are not kept in `expected`.
fn others(found: &Trace, expected: &Trace) -> f64 {
    assert_eq!(found.kept.len(), expected.kept.len());
    let heads = |trace: &Trace| {
        trace
            .kept
            .iter()
            .flatten()
            .flatten()
            .cloned()
            .collect::<Vec<_>>()
    };
    let (found, expected) = (heads(found), heads(expected));
    let pairs = found.iter().zip(&expected);
    let (mut other, mut all) = (0, 0);
    for (found, expected) in pairs {
        all += expected.len();
        other += found.iter().filter(|unit| !expected.contains(unit)).count();
    }
    other as f64 / all.max(1) as f64
}
