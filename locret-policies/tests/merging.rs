//! CaM against kvpress's, D2O against its authors' (`golden/merging`): the cache at the end, merged as theirs.

mod common;

use burn::tensor::Device;
use common::{Numbers, StepInput, cache, drive};
use locret_core::{
    Budget, DecodeEviction, Evict, KvCachePolicy, KvStore, ModelSpec, Phase, Positions, Prefill,
    RopeConfig, Session,
};
use locret_models::{LoadOptions, WeightDtype, load_model};
use locret_policies::{Cam, D2o, D2oForm, Heavy, Window};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

#[derive(Deserialize)]
struct Golden {
    ids: Vec<u32>,
    target: usize,
    seed: u64,
    /// Units that a value is spread over, tokens between two cuts.
    cases: Vec<(usize, usize)>,
    drawn: BTreeMap<String, (usize, usize)>,
    prompt: usize,
    decoded: usize,
    hh: usize,
    recent: usize,
    heads: Vec<usize>,
    thresholds: Vec<f32>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/merging")
}

fn golden() -> (Golden, Vec<u8>) {
    let text = std::fs::read_to_string(folder().join("golden.json")).unwrap();
    let tensors = std::fs::read(folder().join("golden.safetensors")).unwrap();
    (serde_json::from_str(&text).unwrap(), tensors)
}

fn tensor(bytes: &[u8], name: &str) -> Vec<f32> {
    let all = SafeTensors::deserialize(bytes).unwrap();
    let data = all.tensor(name).unwrap().data().to_vec();
    let quads = data.chunks_exact(4);
    quads
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

#[track_caller]
fn assert_near(what: &str, found: &[f32], due: &[f32]) {
    assert_eq!(found.len(), due.len(), "{what}");
    let largest = due.iter().fold(0f32, |most, x| most.max(x.abs()));
    for (i, (a, b)) in found.iter().zip(due).enumerate() {
        assert!(
            (a - b).abs() <= 1e-4 * largest,
            "{what}, number {i}: {a} for {b}"
        );
    }
}

fn numbers_of(store: &dyn KvStore, head: usize, keys: bool) -> Vec<f32> {
    let rows = match keys {
        true => store.keys(head),
        false => store.values(head),
    };
    rows.unwrap().into_values().unwrap()
}

#[test]
fn cam_is_that_of_kvpress() {
    let (golden, bytes) = golden();
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../locret-models/tests/golden");
    let options = LoadOptions::new().weights(WeightDtype::F32);
    let loaded = load_model(models.join("llama31"), &options, &Device::flex()).unwrap();
    let spec = loaded.model.spec().clone();
    let run = |window: usize, interval: usize, seed: u64, sums: bool| {
        let inner = Window::policy(Budget::Units(golden.target));
        let inner = inner.with_positions(Positions::Original);
        let policy = Cam::new(inner).window(window).seed(seed).sums(sums);
        let mut session = Session::new(loaded.model.clone(), Arc::new(policy)).unwrap();
        let prefill = Prefill::new(interval, 0);
        session.prefill(&golden.ids, &prefill).unwrap();
        let all = |keys: bool| -> Vec<f32> {
            let heads = (0..spec.layers).flat_map(|l| (0..spec.kv_heads).map(move |h| (l, h)));
            heads
                .flat_map(|(layer, head)| numbers_of(session.cache().store(layer), head, keys))
                .collect()
        };
        [all(true), all(false)]
    };
    assert_eq!(golden.cases.len(), 3);
    for (window, interval) in &golden.cases {
        let name = format!("cam_{window}_{interval}");
        let [keys, values] = run(*window, *interval, golden.seed, true);
        assert_near(&name, &keys, &tensor(&bytes, &format!("{name}_keys")));
        let due = tensor(&bytes, &format!("{name}_values"));
        assert_near(&name, &values, &due);
        // Not all were drawn, and other lots make other values.
        let (drawn, of) = golden.drawn[&name];
        assert!(drawn < of && 10 * drawn > of);
        let [_, others] = run(*window, *interval, golden.seed + 1, true);
        assert_ne!(values, others);
        // Where no more units go into one than it is one of, means are sums.
        let [_, bounded] = run(*window, *interval, golden.seed, false);
        assert_eq!(bounded == values, interval <= window, "{name}");
    }
}

/// Theirs is one layer of 32 heads of 128 features, whose first decoded token brings a whole prompt down to its budget.
#[test]
fn d2o_is_that_of_its_authors() {
    let (golden, bytes) = golden();
    let (heads, d) = (32, 128);
    let budget = golden.hh + golden.recent;
    let spec = ModelSpec::new(1, heads, heads, 4, 16)
        .with_head_dim(d)
        .with_rope(RopeConfig::plain(1000.0, d))
        .with_layer_input();
    let mut numbers = Numbers(11);
    let mut step = |phase, tokens: usize| {
        let mut qkv = [const { Vec::new() }; 3];
        for _ in 0..tokens {
            for part in &mut qkv {
                part.extend(numbers.list(heads * d, 1.0));
            }
        }
        StepInput {
            phase,
            tokens,
            layers: vec![qkv],
            surprisal: vec![1.0; tokens],
        }
    };
    let prompt = step(Phase::Tail, golden.prompt);
    let decoded: Vec<StepInput> = (0..golden.decoded)
        .map(|_| step(Phase::Decode, 1))
        .collect();

    let inner = Evict::new(Heavy, Budget::Units(budget))
        .sinks(4)
        .recent(golden.recent)
        .while_decoding(DecodeEviction::Every(1));
    let policy = |form: D2oForm| -> Arc<dyn KvCachePolicy> {
        Arc::new(D2o::new(inner.clone()).form(form).exempt(0, 0))
    };
    let run = |form: D2oForm| {
        let mut cache = cache(&spec, policy(form));
        drive(&mut cache, &prompt, golden.prompt).unwrap();
        let mut outputs = Vec::new();
        let mut thresholds = Vec::new();
        for (i, step) in decoded.iter().enumerate() {
            let total = golden.prompt + i + 1;
            let all = drive(&mut cache, step, total).unwrap();
            let shown = golden.heads.iter();
            outputs.extend(shown.flat_map(|head| all[0][head * d..][..d].to_vec()));
            thresholds.extend_from_slice(cache.notes(0));
        }
        (cache, outputs, thresholds)
    };
    let (cache, outputs, thresholds) = run(D2oForm::Code);
    let of_heads = |keys: bool| -> Vec<f32> {
        let shown = golden.heads.iter();
        shown
            .flat_map(|head| numbers_of(cache.store(0), *head, keys))
            .collect()
    };
    assert_near("thresholds", &thresholds, &golden.thresholds);
    assert_near("keys", &of_heads(true), &tensor(&bytes, "d2o_keys"));
    assert_near("values", &of_heads(false), &tensor(&bytes, "d2o_values"));
    assert_near("outputs", &outputs, &tensor(&bytes, "d2o_outputs"));
    let due = tensor(&bytes, "d2o_scores");
    for (head, due) in golden.heads.iter().zip(due.chunks(budget)) {
        let found = cache.scores(0, *head);
        assert_eq!(found.len(), budget);
        // Theirs are infinite for the first four.
        assert!(due[..4].iter().all(|x| x.is_infinite()));
        assert_near("scores", &found[4..], &due[4..]);
    }
    // The paper's shares are others.
    let (_, paper, _) = run(D2oForm::Paper);
    assert!(
        paper
            .iter()
            .zip(&outputs)
            .any(|(a, b)| (a - b).abs() > 0.01)
    );
}
