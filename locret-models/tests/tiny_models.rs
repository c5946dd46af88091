//! Small random models of every supported architecture against the logits and greedy
//! continuations that transformers gives for them (`tests/golden/make_tiny.py`).

mod common;

use burn::tensor::Device;
use common::Everything;
use locret_core::{
    CacheOptions, Generate, Kernels, Pass, Phase, Prefill, SequenceCache, Session, forward,
};
use locret_models::{
    LoadOptions, LoadedModel, Loader, ModelError, SafetensorsDir, WeightDtype, load_model,
};
use locret_policies::Full;
use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

const TOLERANCE: f32 = 1e-4;

const MODELS: [&str; 10] = [
    "llama2",
    "llama31",
    "llama32",
    "llama_biases",
    "mistral",
    "phi3_4k",
    "phi3_128k",
    "phi4_mini",
    "qwen2",
    "qwen3",
];

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
    for model in MODELS {
        let everything = Everything::read(model);
        for (config, case, folder) in everything.cases() {
            let name = format!("{model}/{config}, {} tokens", case.ids.len());
            for kernels in [Kernels::Auto, Kernels::Operations] {
                check(&name, folder.path(), &case, kernels);
            }
            seen += 1;
        }
    }
    assert!(seen >= 50, "{seen} cases");
}

#[test]
fn gguf_files_are_the_same_models() {
    let mut seen = 0;
    for model in MODELS {
        let file = common::golden(model).join("model.gguf");
        for (config, case, _folder) in Everything::read(model).cases() {
            // The others are further spellings of the same, or other models.
            if config != "config.json" {
                continue;
            }
            let name = format!("{model}/model.gguf, {} tokens", case.ids.len());
            for kernels in [Kernels::Auto, Kernels::Operations] {
                check(&name, &file, &case, kernels);
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
fn a_sequence_ends_with_a_binding_window() {
    let everything = Everything::read("phi3_4k");
    for config in ["config_sliding.json", "config_sliding_v4.json"] {
        let folder = everything.folder_with(config);
        let load = |config: &Path| load_model(config, &LoadOptions::default(), &Device::flex());
        let windowed = load(folder.path()).unwrap();
        let plain = load(everything.folder_with("config.json").path()).unwrap();
        assert_eq!(windowed.model.spec().attention_window, Some(24));
        // As long as all tokens are in the window, there is no difference.
        let ids: Vec<u32> = (3..27).collect();
        assert_eq!(
            logits(&windowed, &ids, 7, Kernels::Auto),
            logits(&plain, &ids, 7, Kernels::Auto)
        );
        let session = |prompt: &[u32]| {
            let mut session = Session::new(windowed.model.clone(), Arc::new(Full::new())).unwrap();
            session
                .prefill(prompt, &Prefill::new(16, 5))
                .map(|_| session)
        };
        let longer: Vec<u32> = (3..28).collect();
        let error = session(&longer).err().unwrap();
        assert!(error.to_string().contains("sliding_window"), "{error}");
        // While generating, too.
        let mut session = session(&ids[..20]).unwrap();
        let tokens = session.generate(Generate::greedy(10)).unwrap();
        let errors: Vec<_> = tokens.filter_map(Result::err).collect();
        assert_eq!(errors.len(), 1, "{errors:?}");
    }
}

#[test]
fn an_unknown_family_is_refused() {
    let folder = Everything::read("llama31").folder_with("config.json");
    let path = folder.path().join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config.replace("\"llama\"", "\"gpt2\"")).unwrap();
    let error = load_model(folder.path(), &LoadOptions::default(), &Device::flex()).unwrap_err();
    assert!(error.to_string().contains("gpt2"), "{error}");
}

/// A folder of a golden model whose tensors are those that `change` makes of them.
fn changed(
    model: &str,
    settings: &[(&str, serde_json::Value)],
    change: impl FnOnce(&mut Vec<(String, Vec<usize>, Vec<f32>)>),
) -> tempfile::TempDir {
    use safetensors::{Dtype, SafeTensors, tensor::TensorView};

    let folder = Everything::read(model).folder_with("config.json");
    let path = folder.path().join("config.json");
    let mut config = common::json(&path);
    for (key, value) in settings {
        config[*key] = value.clone();
    }
    fs::write(&path, config.to_string()).unwrap();
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file
        .iter()
        .map(|(name, view)| {
            let values = view.data().chunks_exact(4);
            let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            (name.to_owned(), view.shape().to_vec(), values.collect())
        })
        .collect();
    change(&mut tensors);
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape, values): (_, _, Vec<f32>)| {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (
            name.clone(),
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    folder
}

fn last_logits(folder: &Path) -> Result<Vec<f32>, ModelError> {
    let loaded = load_model(folder, &LoadOptions::default(), &Device::flex())?;
    let ids: Vec<u32> = (1..13).collect();
    let all = logits(&loaded, &ids, 5, Kernels::Auto);
    Ok(all[all.len() - loaded.config.vocab..].to_vec())
}

#[test]
fn a_head_of_its_own_is_used_though_the_configuration_says_tied() {
    let tied = [("tie_word_embeddings", true.into())];
    let untied = last_logits(changed("llama31", &[], |_| {}).path()).unwrap();
    assert_eq!(
        last_logits(changed("llama31", &tied, |_| {}).path()).unwrap(),
        untied
    );
    // One that is the embedding is no contradiction.
    let same = changed("llama31", &tied, |tensors| {
        let words = tensors
            .iter()
            .find(|t| t.0 == "model.embed_tokens.weight")
            .unwrap();
        let words = words.2.clone();
        tensors
            .iter_mut()
            .find(|t| t.0 == "lm_head.weight")
            .unwrap()
            .2 = words;
    });
    let without = changed("llama31", &tied, |tensors| {
        tensors.retain(|t| t.0 != "lm_head.weight")
    });
    assert_eq!(
        last_logits(same.path()).unwrap(),
        last_logits(without.path()).unwrap()
    );
    assert_ne!(last_logits(same.path()).unwrap(), untied);
}

#[test]
fn biases_are_those_that_the_settings_speak_of() {
    let zeros = |tensors: &mut Vec<(String, Vec<usize>, Vec<f32>)>| {
        let weights = tensors.iter().filter(|t| t.0.contains("self_attn"));
        let biases: Vec<_> = weights
            .map(|(name, shape, _)| {
                let name = name.replace(".weight", ".bias");
                (name, vec![shape[0]], vec![0.0; shape[0]])
            })
            .collect();
        tensors.extend(biases);
    };
    let with = [("attention_bias", true.into())];
    let plain = last_logits(changed("llama31", &[], |_| {}).path()).unwrap();
    let nothing = last_logits(changed("llama31", &with, zeros).path()).unwrap();
    for (a, b) in nothing.iter().zip(&plain) {
        assert!((a - b).abs() < 1e-5, "{a} for {b}");
    }
    // What the settings do not speak of is not used in silence, nor is what is missing made up.
    let silent = changed("llama31", &[], zeros);
    assert!(
        last_logits(silent.path())
            .unwrap_err()
            .to_string()
            .contains("biases")
    );
    let missing = changed("llama31", &with, |_| {});
    assert!(
        last_logits(missing.path())
            .unwrap_err()
            .to_string()
            .contains("biases")
    );
}

/// The matrix behind attention is the checkpoint's, and what stands before it is one if nothing is added to it.
#[test]
fn matrices_are_those_of_the_checkpoint() {
    for name in MODELS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(name);
        let options = LoadOptions::new().weights(WeightDtype::F32);
        let model = load_model(&folder, &options, &Device::flex())
            .unwrap()
            .model;
        let (spec, weights) = (model.spec(), SafetensorsDir::open(&folder).unwrap());
        assert!(spec.layer_input);
        let loader = Loader::new(&weights, WeightDtype::F32, model.compute());
        for layer in 0..spec.layers {
            let own = format!("model.layers.{layer}.self_attn");
            let output = [(format!("{own}.o_proj.weight"), spec.hidden)];
            let due = loader.matrix(&output, spec.heads * spec.head_dim).unwrap();
            let found = model.output_weight(layer).unwrap().unwrap();
            assert_eq!(found, due.values().unwrap(), "{name}");
            let more = ["q_proj.bias", "qkv_proj.bias", "q_norm.weight"];
            let more = more.iter().any(|part| loader.has(&format!("{own}.{part}")));
            let qkv = model.qkv_weight(layer).unwrap();
            assert_eq!(qkv.is_none(), more, "{name}");
        }
        assert!(model.output_weight(spec.layers).is_err());
    }
}

/// The same weights are the same model, wherever they are computed with; any other number, any other
/// setting is another one.
#[test]
fn a_fingerprint_is_that_of_every_weight() {
    // With biases of all kinds, and with norms of heads.
    for model in ["llama31", "llama_biases", "qwen3"] {
        fingerprints_of(model);
    }
}

fn fingerprints_of(model: &str) {
    let folder = Everything::read(model).folder_with("config.json");
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
        assert!(all.insert(of()), "{model} {name}");
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
        if let Some(own) = config.pointer_mut(key) {
            *own = value.into();
            fs::write(&path, config.to_string()).unwrap();
            assert!(all.insert(of()), "{model} {key}");
        }
    }
}

#[test]
fn tensors_that_no_layer_has_are_left_alone() {
    let plain = last_logits(changed("llama31", &[], |_| {}).path()).unwrap();
    let more = |name: &'static str| {
        move |tensors: &mut Vec<(String, Vec<usize>, Vec<f32>)>| {
            tensors.push((name.to_owned(), vec![2], vec![1.0; 2]));
        }
    };
    for harmless in [
        "score.weight",
        "vision_tower.embedding.weight",
        "model.layers.3.eh_proj.weight",
    ] {
        let folder = changed("llama31", &[], more(harmless));
        assert_eq!(last_logits(folder.path()).unwrap(), plain, "{harmless}");
    }
    let harmful = changed("llama31", &[], more("model.layers.0.self_attn.sinks"));
    assert!(matches!(
        last_logits(harmful.path()),
        Err(ModelError::UnusedTensors { .. })
    ));
}

#[test]
fn a_language_model_may_be_a_part_of_a_larger_one_or_have_no_head() {
    let plain = last_logits(changed("llama31", &[], |_| {}).path()).unwrap();
    let within = |rename: fn(&str) -> String| {
        changed("llama31", &[], move |tensors| {
            for (name, ..) in tensors.iter_mut() {
                *name = rename(name);
            }
            tensors.push(("vision_tower.patch.weight".into(), vec![2], vec![1.0; 2]));
        })
    };
    for rename in [
        (|name| format!("language_model.{name}")) as fn(&str) -> String,
        |name| match name.strip_prefix("model.") {
            Some(rest) => format!("model.language_model.{rest}"),
            None => name.to_owned(),
        },
    ] {
        assert_eq!(last_logits(within(rename).path()).unwrap(), plain);
    }
    // As a tied model is saved that is no language model to whoever saved it.
    let whole = last_logits(changed("llama32", &[], |_| {}).path()).unwrap();
    let bare = changed("llama32", &[], |tensors| {
        for (name, ..) in tensors.iter_mut() {
            *name = name.trim_start_matches("model.").to_owned();
        }
    });
    assert_eq!(last_logits(bare.path()).unwrap(), whole);
    let twice = within(|name| match name {
        "model.norm.weight" => "language_model.lm_head.weight".into(),
        "lm_head.weight" => name.to_owned(),
        _ => format!("language_model.{name}"),
    });
    let error = last_logits(twice.path()).unwrap_err();
    assert!(matches!(error, ModelError::Duplicate { .. }), "{error}");
}
