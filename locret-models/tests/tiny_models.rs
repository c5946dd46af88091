//! Small random models of every supported architecture against the logits and greedy
//! continuations that transformers gives for them (`tests/golden/make_tiny.py`).

mod common;

use burn::tensor::Device;
use common::{Everything, KeepAll};
use locret_core::{
    CacheOptions, Generate, Kernels, Phase, Prefill, SequenceCache, Session, into_f32,
};
use locret_models::{LoadOptions, LoadedModel, load_model};
use std::{path::Path, sync::Arc};

const TOLERANCE: f32 = 1e-4;

/// Logits `[tokens, vocab]` of all tokens, the prompt read in chunks.
fn logits(loaded: &LoadedModel, ids: &[u32], chunk: usize, kernels: Kernels) -> Vec<f32> {
    let model = &loaded.model;
    let options = CacheOptions {
        kernels,
        ..CacheOptions::default()
    };
    let policy = Arc::new(KeepAll);
    let mut cache = SequenceCache::new(model.spec(), policy, model.device(), options).unwrap();
    let mut all = Vec::new();
    for part in ids.chunks(chunk) {
        cache
            .begin(Phase::Prefill { last: false }, part.len(), ids.len())
            .unwrap();
        let hidden = model.hidden(part, &mut cache).unwrap();
        cache.finish(None).unwrap();
        all.extend(into_f32(model.logits(hidden).unwrap()).unwrap());
    }
    all
}

fn check(name: &str, folder: &Path, case: &common::Case, kernels: Kernels) {
    let options = LoadOptions {
        kernels,
        ..LoadOptions::default()
    };
    let loaded = load_model(folder, &options, &Device::flex()).unwrap();
    let vocab = loaded.config.vocab;
    for chunk in [case.ids.len(), 1, 7, 16] {
        let found = logits(&loaded, &case.ids, chunk, kernels);
        for (row, position) in case.positions.iter().enumerate() {
            let found = &found[position * vocab..][..vocab];
            let expected = &case.logits[row * vocab..][..vocab];
            for (token, (a, b)) in found.iter().zip(expected).enumerate() {
                assert!(
                    (a - b).abs() <= TOLERANCE,
                    "{name}, {kernels:?}, chunk {chunk}, position {position}, token {token}: \
                     {a} for {b}"
                );
            }
        }
    }
    let options = CacheOptions {
        kernels,
        ..CacheOptions::default()
    };
    let mut session =
        Session::with_options(loaded.model.clone(), Arc::new(KeepAll), options).unwrap();
    let prefill = Prefill {
        chunk: 16,
        local: 5,
    };
    session.prefill(&case.ids, &prefill).unwrap();
    let tokens = session
        .generate(Generate::greedy(case.greedy.len()))
        .unwrap();
    let tokens: Vec<u32> = tokens.map(Result::unwrap).collect();
    // A continuation that outgrows LongRoPE's original context is another matter: transformers
    // then reads everything again with the other factors.
    assert_eq!(
        tokens[..case.comparable(&loaded.config)],
        case.greedy[..case.comparable(&loaded.config)],
        "{name}, {kernels:?}"
    );
}

#[test]
fn logits_and_continuations_are_those_of_transformers() {
    let mut seen = 0;
    for model in ["llama2", "llama31", "llama32", "phi3_4k", "phi3_128k"] {
        let everything = Everything::read(model);
        for (config, case, folder) in everything.cases() {
            let name = format!("{model}/{config}, {} tokens", case.ids.len());
            for kernels in [Kernels::Auto, Kernels::Operations] {
                check(&name, folder.path(), &case, kernels);
            }
            seen += 1;
        }
    }
    assert!(seen >= 20, "{seen} cases");
}

#[test]
fn shards_of_bf16_are_the_same_model() {
    let everything = Everything::read("llama31");
    let (_, case, _folder) = everything.cases().remove(2);
    check(
        "llama31/sharded",
        &common::golden("llama31/sharded"),
        &case,
        Kernels::Auto,
    );
}

#[test]
fn a_binding_window_is_refused() {
    let everything = Everything::read("phi3_4k");
    for config in ["config_sliding.json", "config_sliding_v4.json"] {
        let folder = everything.folder_with(config);
        let error =
            load_model(folder.path(), &LoadOptions::default(), &Device::flex()).unwrap_err();
        assert!(error.to_string().contains("sliding_window"), "{error}");
    }
}

#[test]
fn an_unknown_family_is_refused() {
    let error = load_model(
        common::golden("qwen2"),
        &LoadOptions::default(),
        &Device::flex(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("qwen2"), "{error}");
}
