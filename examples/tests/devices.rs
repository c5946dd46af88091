//! Accelerators beside the CPU: the same logits, the same kept units and the same answers for every
//! policy. Tried are those that the tests are built with:
//!
//! ```text
//! cargo test --release -p locret-examples --features vulkan --test devices
//! ```
#![cfg(any(
    feature = "cuda",
    feature = "vulkan",
    feature = "metal",
    feature = "webgpu"
))]

use locret_core::{Budget, CacheOptions, CausalLm, Positions, Prefill, Quantization, Session};
use locret_examples::{
    golden::GoldenLogits,
    runtime::device,
    trace::{Trace, trace},
};
use locret_models::{LoadOptions, WeightDtype, load_model};
use locret_policies::{HeadWeights, LayerHead, Method, PolicyConfig, RetainingHeads};
use std::{path::PathBuf, sync::Arc};

const DEVICES: &[&str] = &[
    #[cfg(feature = "cuda")]
    "cuda",
    #[cfg(feature = "vulkan")]
    "vulkan",
    #[cfg(feature = "metal")]
    "metal",
    #[cfg(feature = "webgpu")]
    "webgpu",
];

/// How far a logit may be off.
const TOLERANCE: f32 = 1e-3;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../locret-models/tests/golden")
        .join(name)
}

fn model(name: &str, on: &str) -> Arc<dyn CausalLm> {
    let options = LoadOptions {
        weights: WeightDtype::F32,
        ..LoadOptions::default()
    };
    let device = device(on).unwrap_or_else(|e| panic!("{on}: {}", e.chain()));
    load_model(golden(name), &options, &device).unwrap().model
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
    };
    let weights = HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: Default::default(),
    };
    RetainingHeads::new(&weights, spec, model.device()).unwrap()
}

/// 90 tokens in chunks of 16, the last 10 without eviction; then eight greedy ones.
fn run(model: Arc<dyn CausalLm>, config: &PolicyConfig) -> (Trace, Vec<f32>) {
    let spec = model.spec();
    let policy = match config.policy {
        Method::Locret => config.build_with_heads(spec, heads(&*model)).unwrap(),
        _ => config.build(spec, model.device()).unwrap(),
    };
    let ids: Vec<u32> = (0..90).map(|i| (i * i + 7 * i) % 180).collect();
    let mut session = Session::with_options(model, policy, CacheOptions::default()).unwrap();
    let prefill = Prefill {
        chunk: 16,
        local: 10,
    };
    let mut read = session.fork().unwrap();
    read.prefill(&ids, &prefill).unwrap();
    let logits = read.logits().unwrap().to_vec();
    let found = trace(&mut session, &ids, &prefill, 8, &mut |_| ()).unwrap();
    (found, logits)
}

#[test]
fn logits_are_those_of_transformers() {
    for on in DEVICES {
        for name in ["llama31", "llama32", "phi3_4k"] {
            let expected = GoldenLogits::read(&golden(name).join("golden.json")).unwrap();
            let distance = expected.compare(&*model(name, on)).unwrap();
            println!("{on}, {name}: {distance:?}");
            assert!(distance.largest <= TOLERANCE, "{on}, {name}: {distance:?}");
        }
    }
}

#[test]
fn every_policy_keeps_and_answers_what_it_does_on_the_cpu() {
    for on in DEVICES {
        for method in Method::ALL {
            for positions in [Positions::Compact, Positions::Original] {
                for bits in [None, Some(8), Some(4)] {
                    let mut config = PolicyConfig::new(method).positions(positions);
                    config.quantize = bits.map(Quantization::bits);
                    if method != Method::Full {
                        config.budget = Some(Budget::Units(24));
                    }
                    let case = format!("{on}, {method}, {positions:?}, {bits:?} bits");
                    let (expected, there) = run(model("llama31", "flex"), &config);
                    let (found, here) = run(model("llama31", on), &config);
                    let off = (here.iter().zip(&there))
                        .map(|(a, b)| (a - b).abs())
                        .fold(0.0, f32::max);
                    println!("{case}: {off:.1e}");
                    assert_eq!(here.len(), there.len());
                    assert!(off <= TOLERANCE, "{case}: {off}");
                    assert_eq!(found.kept, expected.kept, "{case}");
                    assert_eq!(found.generated, expected.generated, "{case}");
                    assert_eq!(found.peak_kv_bytes, expected.peak_kv_bytes, "{case}");
                }
            }
        }
    }
}
