//! SmolLM2-135M-Instruct from its GGUF file against transformers on the same dequantised weights
//! (`tests/golden/smollm2`). The file is fetched if it is not there.

mod common;

use burn::tensor::Device;
use common::KeepAll;
use locret_core::{CacheOptions, CausalLm, Generate, Kernels, Prefill, Session};
use locret_models::{FetchOptions, LoadOptions, WeightDtype, load_model, resolve};
use std::{path::PathBuf, sync::Arc};

/// On logits after dequantising the same file.
const TOLERANCE: f32 = 2e-3;

/// The same where packed weights meet activations of eight bits: while a token is decoded, and at
/// the head.
const ROUNDED: f32 = 0.6;

/// The root of the mean square of these differences over the vocabulary.
const ROUNDED_MEAN: f32 = 0.12;

fn file() -> PathBuf {
    resolve("smollm2", &FetchOptions::default(), &|_| {}).expect("SmolLM2 can be fetched")
}

fn model(kernels: Kernels, weights: WeightDtype) -> Arc<dyn CausalLm> {
    let options = LoadOptions {
        kernels,
        weights,
        ..LoadOptions::default()
    };
    load_model(file(), &options, &Device::flex()).unwrap().model
}

fn session(model: &Arc<dyn CausalLm>, kernels: Kernels) -> Session {
    let options = CacheOptions {
        kernels,
        ..CacheOptions::default()
    };
    Session::with_options(model.clone(), Arc::new(KeepAll), options).unwrap()
}

#[test]
fn logits_and_text_are_those_of_transformers() {
    let golden = common::json(&common::golden("smollm2/golden.json"));
    for kernels in [Kernels::Auto, Kernels::Operations] {
        let model = model(kernels, WeightDtype::F32);
        for case in golden["cases"].as_array().unwrap() {
            let name = case["name"].as_str().unwrap();
            let ids: Vec<u32> = common::numbers(&case["ids"]);
            if ids.len() > 1000 && kernels == Kernels::Operations {
                // The long one takes this path half a minute and shows nothing that the short
                // ones and the small models do not.
                continue;
            }
            let mut session = session(&model, kernels);
            let prefill = Prefill {
                chunk: 512,
                local: 30,
            };
            session.prefill(&ids, &prefill).unwrap();
            let logits = session.logits().unwrap();
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
            let top: Vec<u32> = common::numbers(&case["top20"]["ids"]);
            assert_eq!(order[..20], top, "{name}, {kernels:?}");
            let values = case["top20"]["values"].as_array().unwrap();
            for (id, expected) in top.iter().zip(values) {
                let (found, expected) = (logits[*id as usize], expected.as_f64().unwrap() as f32);
                assert!(
                    (found - expected).abs() <= TOLERANCE,
                    "{name}, {kernels:?}, token {id}: {found} for {expected}"
                );
            }
            let expected: Vec<u32> = common::numbers(&case["greedy"]);
            let tokens = session.generate(Generate::greedy(expected.len())).unwrap();
            let tokens: Vec<u32> = tokens.map(Result::unwrap).collect();
            assert_eq!(tokens, expected, "{name}, {kernels:?}");
        }
    }
}

#[test]
fn any_chunking_gives_what_one_pass_gives() {
    let golden = common::json(&common::golden("smollm2/golden.json"));
    let ids: Vec<u32> = common::numbers(&golden["cases"][3]["ids"]);
    let ids = &ids[..700];
    let model = model(Kernels::Auto, WeightDtype::F32);
    let logits = |chunk, local| {
        let mut session = session(&model, Kernels::Auto);
        session.prefill(ids, &Prefill { chunk, local }).unwrap();
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

/// The type of the file is what is loaded where nothing else is said; prompts are read exactly, and
/// tokens are decoded within what eight bits of activations leave.
#[test]
fn packed_weights_say_what_their_values_say() {
    let golden = common::json(&common::golden("smollm2/golden.json"));
    let packed = model(Kernels::Auto, WeightDtype::default());
    let plain = model(Kernels::Auto, WeightDtype::F32);
    for case in golden["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let ids: Vec<u32> = common::numbers(&case["ids"]);
        if ids.len() > 1000 {
            continue;
        }
        let mut sessions = [&packed, &plain].map(|model| session(model, Kernels::Auto));
        for session in &mut sessions {
            session.prefill(&ids, &Prefill::default()).unwrap();
        }
        let greedy: Vec<u32> = common::numbers(&case["greedy"]);
        for (step, token) in greedy.iter().enumerate() {
            let [found, expected] = [0, 1].map(|i| sessions[i].logits().unwrap().to_vec());
            let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            let largest = differences.clone().fold(0.0, f32::max);
            let square: f32 = differences.map(|d| d * d).sum();
            let mean = (square / found.len() as f32).sqrt();
            println!("{name} step {step}: {largest} {mean}");
            assert!(
                largest <= ROUNDED && mean <= ROUNDED_MEAN,
                "{name}, step {step}: logits differ by {largest}, {mean} in the mean"
            );
            for session in &mut sessions {
                session.score(&[*token]).unwrap();
            }
        }
    }
}
