//! Small random models of every supported architecture against the logits and greedy
//! continuations that transformers gives for them (`tests/golden/make_tiny.py`).

mod common;

use burn::tensor::Device;
use common::Everything;
use locret_core::{
    CacheOptions, Generate, Kernels, Pass, Phase, Prefill, SequenceCache, Session, forward,
};
use locret_models::{LoadOptions, LoadedModel, ModelError, WeightDtype, load_model};
use locret_policies::Full;
use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

const TOLERANCE: f32 = 1e-4;

/// Logits `[tokens, vocab]` of all tokens, the prompt read in chunks.
fn logits(loaded: &LoadedModel, ids: &[u32], chunk: usize, kernels: Kernels) -> Vec<f32> {
    let model = &loaded.model;
    let options = CacheOptions::new().kernels(kernels);
    let policy = Arc::new(Full::new());
    let mut cache = SequenceCache::new(model.spec(), policy, model.compute(), options).unwrap();
    let mut all = Vec::new();
    for part in ids.chunks(chunk) {
        let step = cache.step(Phase::Prefill { last: false }, part.len(), ids.len());
        let mut pass = Pass::new([step]).unwrap();
        let hidden = forward(&**model, part, &mut pass).unwrap();
        pass.finish(None).unwrap();
        all.extend(model.logits(hidden).unwrap().into_values().unwrap());
    }
    all
}

fn check(name: &str, folder: &Path, case: &common::Case, kernels: Kernels) {
    let options = LoadOptions::new()
        .kernels(kernels)
        .weights(WeightDtype::F32);
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
    let options = CacheOptions::new().kernels(kernels);
    let mut session =
        Session::with_options(loaded.model.clone(), Arc::new(Full::new()), options).unwrap();
    let prefill = Prefill::new(16, 5);
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

/// Loads a folder in every way; all of them have to fail alike.
fn refused(folder: &Path, check: impl Fn(&ModelError) -> bool) {
    for kernels in [Kernels::Auto, Kernels::Operations] {
        for weights in [WeightDtype::F32, WeightDtype::BF16, WeightDtype::File] {
            let options = LoadOptions::new().weights(weights).kernels(kernels);
            let error = load_model(folder, &options, &Device::flex()).unwrap_err();
            assert!(check(&error), "{weights:?}, {kernels:?}: {error}");
        }
    }
}

#[test]
fn weights_that_are_not_numbers_are_named() {
    let folder = Everything::read("llama31").folder_with("config.json");
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let table: serde_json::Value = serde_json::from_slice(&whole[8..8 + header]).unwrap();
    for name in [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
    ] {
        let start = table[name]["data_offsets"][0].as_u64().unwrap() as usize;
        for value in [f32::NAN, f32::NEG_INFINITY] {
            let mut bad = whole.clone();
            let at = 8 + header + start + 4;
            bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
            fs::write(&path, bad).unwrap();
            refused(
                folder.path(),
                |error| matches!(error, ModelError::NotFinite { tensor, row: 0, .. } if tensor == name),
            );
        }
    }
}

#[test]
fn missing_and_unknown_weights_are_named() {
    let folder = Everything::read("llama31").folder_with("config.json");
    let path = folder.path().join("config.json");
    let config: serde_json::Value = common::json(&path);
    let with = |key: &str, value: u64| {
        let mut config = config.clone();
        assert!(config[key].is_u64(), "{key}");
        config[key] = value.into();
        fs::write(&path, config.to_string()).unwrap();
    };
    with("num_hidden_layers", 4);
    refused(folder.path(), |error| {
        matches!(error, ModelError::MissingTensors { names, .. }
            if names[0].starts_with("model.layers.3."))
    });
    with("num_hidden_layers", 2);
    refused(folder.path(), |error| {
        matches!(error, ModelError::UnusedTensors { names, .. }
            if names.len() == 9 && names.iter().all(|n| n.starts_with("model.layers.2.")))
    });
    with("intermediate_size", 40);
    refused(
        folder.path(),
        |error| matches!(error, ModelError::Shape { tensor, .. } if tensor.contains("mlp.")),
    );
    with("num_attention_heads", 0);
    refused(
        folder.path(),
        |error| matches!(error, ModelError::Config { what, .. } if what == "number of heads"),
    );
    with("num_key_value_heads", 3);
    refused(
        folder.path(),
        |error| matches!(error, ModelError::Config { what, .. } if what == "number of KV heads"),
    );
}

/// The same weights are the same model, wherever they are computed with; any other number, any other
/// setting is another one.
#[test]
fn a_fingerprint_is_that_of_every_weight() {
    let folder = Everything::read("llama31").folder_with("config.json");
    let fingerprint = |weights, kernels| {
        let options = LoadOptions::new().weights(weights).kernels(kernels);
        let loaded = load_model(folder.path(), &options, &Device::flex()).unwrap();
        let first = loaded.model.fingerprint().unwrap().unwrap();
        assert_eq!(loaded.model.fingerprint().unwrap().as_ref(), Some(&first));
        assert_eq!(first.len(), 64);
        first
    };
    let of = || fingerprint(WeightDtype::F32, Kernels::Auto);
    let own = of();
    assert_eq!(fingerprint(WeightDtype::F32, Kernels::Operations), own);
    let rounded = fingerprint(WeightDtype::BF16, Kernels::Auto);
    assert_eq!(fingerprint(WeightDtype::BF16, Kernels::Operations), rounded);
    let mut all = BTreeSet::from([own.clone(), rounded]);

    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let table: serde_json::Value = serde_json::from_slice(&whole[8..8 + header]).unwrap();
    let tensors = table.as_object().unwrap().iter();
    for (name, tensor) in tensors.filter(|(name, _)| *name != "__metadata__") {
        // The last number, one bit off.
        let end = tensor["data_offsets"][1].as_u64().unwrap() as usize;
        let mut other = whole.clone();
        other[8 + header + end - 4] ^= 1;
        fs::write(&path, other).unwrap();
        assert!(all.insert(of()), "{name}");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(of(), own);

    let path = folder.path().join("config.json");
    let config: serde_json::Value = common::json(&path);
    for (key, value) in [
        ("/rms_norm_eps", 1e-4),
        ("/rope_parameters/rope_theta", 400.0),
    ] {
        let mut config = config.clone();
        *config.pointer_mut(key).unwrap() = value.into();
        fs::write(&path, config.to_string()).unwrap();
        assert!(all.insert(of()), "{key}");
    }
}
