//! SmolLM2-135M-Instruct from its GGUF file against transformers on the same dequantised weights
//! (`tests/golden/smollm2`). The file is fetched if it is not there.

mod common;

use burn::tensor::Device;
use locret_core::{CacheOptions, CausalLm, Generate, Kernels, Prefill, Session};
use locret_models::{Activations, FetchOptions, LoadOptions, WeightDtype, load_model, resolve};
use locret_policies::Full;
use std::{path::PathBuf, sync::Arc};

/// On logits after dequantising the same file.
const TOLERANCE: f32 = 2e-3;

/// On the root mean square of what rounded activations do to logits, over the logits' spread: for
/// any token, and on average.
const ROUNDED: (f32, f32) = (0.25, 0.08);

fn file() -> PathBuf {
    resolve("smollm2", &FetchOptions::default(), &|_| {}).expect("SmolLM2 can be fetched")
}

fn model(kernels: Kernels, weights: WeightDtype, activations: Activations) -> Arc<dyn CausalLm> {
    let options = LoadOptions::new()
        .kernels(kernels)
        .weights(weights)
        .activations(activations);
    load_model(file(), &options, &Device::flex()).unwrap().model
}

fn session(model: &Arc<dyn CausalLm>, kernels: Kernels) -> Session {
    let options = CacheOptions::new().kernels(kernels);
    Session::with_options(model.clone(), Arc::new(Full::new()), options).unwrap()
}

#[test]
fn logits_and_text_are_those_of_transformers() {
    let golden = common::json(&common::golden("smollm2/golden.json"));
    // Packed weights, which are the default, stand for the same numbers.
    for (kernels, weights) in [
        (Kernels::Auto, WeightDtype::F32),
        (Kernels::Auto, WeightDtype::default()),
        (Kernels::Operations, WeightDtype::F32),
    ] {
        let model = model(kernels, weights, Activations::Exact);
        for case in golden["cases"].as_array().unwrap() {
            let name = case["name"].as_str().unwrap();
            let ids: Vec<u32> = common::numbers(&case["ids"]);
            if ids.len() > 1000 && kernels == Kernels::Operations {
                // The long one takes this path half a minute and shows nothing that the short
                // ones and the small models do not.
                continue;
            }
            let mut session = session(&model, kernels);
            let prefill = Prefill::new(512, 30);
            session.prefill(&ids, &prefill).unwrap();
            let logits = session.logits().unwrap();
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
            let top: Vec<u32> = common::numbers(&case["top20"]["ids"]);
            assert_eq!(order[..20], top, "{name}, {kernels:?}, {weights:?}");
            let values = case["top20"]["values"].as_array().unwrap();
            for (id, expected) in top.iter().zip(values) {
                let (found, expected) = (logits[*id as usize], expected.as_f64().unwrap() as f32);
                assert!(
                    (found - expected).abs() <= TOLERANCE,
                    "{name}, {kernels:?}, {weights:?}, token {id}: {found} for {expected}"
                );
            }
            let expected: Vec<u32> = common::numbers(&case["greedy"]);
            let tokens = session.generate(Generate::greedy(expected.len())).unwrap();
            let tokens: Vec<u32> = tokens.map(Result::unwrap).collect();
            assert_eq!(tokens, expected, "{name}, {kernels:?}, {weights:?}");
        }
    }
}

#[test]
fn any_chunking_gives_what_one_pass_gives() {
    let golden = common::json(&common::golden("smollm2/golden.json"));
    let ids: Vec<u32> = common::numbers(&golden["cases"][3]["ids"]);
    let ids = &ids[..700];
    let model = model(Kernels::Auto, WeightDtype::F32, Activations::Exact);
    let logits = |chunk, local| {
        let mut session = session(&model, Kernels::Auto);
        session.prefill(ids, &Prefill::new(chunk, local)).unwrap();
        session.logits().unwrap().to_vec()
    };
    let one_pass = logits(700, 0);
    for (chunk, local) in [(17, 0), (64, 0), (100, 33), (699, 1), (350, 700)] {
        let found = logits(chunk, local);
        for (token, (a, b)) in found.iter().zip(&one_pass).enumerate() {
            assert!(
                (a - b).abs() <= 1e-4,
                "chunk {chunk}, local {local}, token {token}: {a} for {b}"
            );
        }
    }
}

/// Decoding with rounded activations stays within what eight bits leave; reading does not round
/// but at the head.
#[test]
fn rounded_activations_cost_what_is_stated() {
    let golden = common::json(&common::golden("smollm2/golden.json"));
    let rounded = model(Kernels::Auto, WeightDtype::File, Activations::Bytes);
    let exact = model(Kernels::Auto, WeightDtype::File, Activations::Exact);
    let case = golden["cases"].as_array().unwrap().iter();
    let mut case = case.filter(|case| case["name"] == "chat");
    let case = case.next().expect("a chat");
    let ids: Vec<u32> = common::numbers(&case["ids"]);
    let mut sessions = [&rounded, &exact].map(|model| session(model, Kernels::Auto));
    for session in &mut sessions {
        session.prefill(&ids, &Prefill::default()).unwrap();
    }
    let mut off = Vec::new();
    for token in common::numbers::<u32>(&case["greedy"]) {
        let [found, expected] = [0, 1].map(|i| sessions[i].logits().unwrap().to_vec());
        let n = expected.len() as f32;
        let mean = expected.iter().sum::<f32>() / n;
        let spread: f32 = expected.iter().map(|x| (x - mean).powi(2)).sum();
        let square: f32 = found
            .iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).powi(2))
            .sum();
        off.push((square / spread).sqrt());
        for session in &mut sessions {
            session.score(&[token]).unwrap();
        }
    }
    let mean = off.iter().sum::<f32>() / off.len() as f32;
    println!("logits off by {mean:.3} of their spread on average");
    assert!(
        off.iter().all(|x| *x <= ROUNDED.0) && mean <= ROUNDED.1,
        "{off:?}"
    );
    // It does round.
    assert!(mean > 0.001, "{off:?}");
}
