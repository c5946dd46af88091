//! What quantisation of the whole cache does to SmolLM2's predictions of real text.

use burn::tensor::Device;
use locret_core::{KvCachePolicy, Prefill, Quantization, Session};
use locret_models::{FetchOptions, LoadOptions, WeightDtype, load_model, resolve};
use locret_policies::{Full, Quantized};
use serde::Deserialize;
use std::{path::Path, sync::Arc};

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    ids: Vec<u32>,
}

/// Weights of single precision: the references are computed with them.
fn exact() -> LoadOptions {
    LoadOptions::new().weights(WeightDtype::F32)
}

#[test]
fn eight_bits_cost_nothing_and_four_bits_little() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../locret-models/tests/golden/smollm2/golden.json");
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
    let text = &golden.cases.iter().find(|c| c.name == "long").unwrap().ids;
    let file =
        resolve("smollm2", &FetchOptions::default(), &|_| {}).expect("SmolLM2 can be fetched");
    let model = load_model(file, &exact(), &Device::flex()).unwrap().model;
    let (context, rest) = text[..1500].split_at(1000);
    // Mean -ln p of the continuation, and bytes of keys and values.
    let measure = |policy: Arc<dyn KvCachePolicy>| {
        let mut session = Session::new(model.clone(), policy).unwrap();
        let prefill = Prefill::new(256, 0);
        session.prefill(context, &prefill).unwrap();
        let scores = session.score(rest).unwrap();
        let sum: f64 = scores.iter().map(|s| f64::from(s.nll)).sum();
        (sum / scores.len() as f64, session.report().kv_bytes as f64)
    };
    let (exact, full) = measure(Arc::new(Full::new()));
    assert!(exact > 1.0, "{exact}");
    // The newest 32 units are exact, and there is room for 64 more.
    for (bits, nll, bytes) in [(8, 0.005, 0.36), (4, 0.05, 0.24)] {
        let quantized = Quantized::new(Full::new(), Quantization::bits(bits));
        assert_eq!(quantized.name(), format!("full+{bits}bit"));
        let (found, used) = measure(Arc::new(quantized));
        let change = (found / exact - 1.0).abs();
        assert!(change < nll, "{bits} bits: {found} for {exact}");
        assert!(used < bytes * full, "{bits} bits: {used} bytes of {full}");
        assert!(found != exact, "{bits} bits: nothing was quantised");
    }
}
