//! `train_heads` on a model of a few thousand weights: what it writes, and how it fails.

use burn::tensor::Device;
use clap::Parser;
use locret_core::{Budget, DType, Generate, Prefill, Session};
use locret_examples::cli::{rank_heads, train_heads};
use locret_models::{LoadOptions, ModelFiles, load_model};
use locret_policies::{
    HeadForm, HeadWeights, Method, PolicyConfig,
    training::{Answer, CollectConfig, Sample, TrainConfig, collect, train},
};
use serde_json::json;
use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

/// A folder with a model of three layers and a vocabulary of 192 tokens, and a tokenizer that makes
/// a token of every character.
fn model(dir: &Path) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../locret-models/tests/golden/llama31");
    let to = dir.join("model");
    fs::create_dir(&to).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let characters = ('!'..='~').chain(['Ġ', 'Ċ']);
    let vocab: serde_json::Map<String, serde_json::Value> = characters
        .enumerate()
        .map(|(i, c)| (c.to_string(), json!(i)))
        .collect();
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": [],
        },
    });
    fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    to
}

/// Four texts in the forms that files have.
fn data(dir: &Path) -> PathBuf {
    let story = "The miller of the valley had three sons and a cat. ".repeat(4);
    let lines = [
        json!({"conversations": [
            {"from": "human", "value": format!("{story}Who had a cat?")},
            {"from": "gpt", "value": "The miller had one."},
        ]}),
        json!({"instruction": "How many sons?", "input": story, "output": "Three."}),
        json!({"prompt": story, "answers": ["The cat.", " So it was."]}),
        json!({"prompt": story, "answers": [{"query": "\nWhose sons? ", "answer": "The miller's"}]}),
    ];
    let path = dir.join("data.jsonl");
    let text: Vec<String> = lines.iter().map(ToString::to_string).collect();
    fs::write(&path, text.join("\n")).unwrap();
    path
}

/// Runs the example; the error's chain if it fails.
fn run(dir: &Path, data: &str, flags: &str) -> Result<PathBuf, String> {
    let (model, out) = (dir.join("model"), dir.join("heads.safetensors"));
    let (model, file) = (model.display().to_string(), out.display().to_string());
    let mut all = vec!["train_heads", "--out", &file, "--data", data];
    if !flags.contains("--model") {
        all.extend(["--model", &model]);
    }
    if !flags.contains("--d-r") {
        all.extend(["--d-r", "8"]);
    }
    all.extend(flags.split_whitespace());
    let args = train_heads::Args::try_parse_from(all);
    train_heads::run(&args.map_err(|e| e.to_string())?).map_err(|e| e.chain())?;
    Ok(out)
}

#[test]
fn heads_and_pictures_are_written_and_are_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path());
    let data = data(dir.path()).display().to_string();
    let flags = "--epochs 2 --dtype f32";
    let spec = ModelFiles::open(&model).unwrap().config().unwrap().spec();
    let heads =
        |flags: &str| HeadWeights::load(run(dir.path(), &data, flags).unwrap(), &spec).unwrap();
    let first = heads(flags);
    assert!(first.layers.iter().all(|l| l.d_r == 8));
    assert!(
        first.metadata["training"].contains("\"epochs\":2"),
        "{:?}",
        first.metadata
    );
    let curve = fs::read_to_string(dir.path().join("heads.loss.svg")).unwrap();
    assert!(curve.contains("worst layer"));
    assert!(!dir.path().join("heads.safetensors.work").exists());
    assert!(heads(flags) == first, "another result from the same flags");
    assert!(heads("--epochs 2 --dtype f32 --seed 1").layers != first.layers);
}

#[test]
fn every_option_has_an_influence() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let data = data(dir.path()).display().to_string();
    let spec = ModelFiles::open(dir.path().join("model")).unwrap();
    let spec = spec.config().unwrap().spec();
    let weights = |flags: &str| {
        let heads = HeadWeights::load(run(dir.path(), &data, flags).unwrap(), &spec).unwrap();
        let bits = (heads.layers.iter())
            .flat_map(|l| [&l.fc1, &l.fc2, &l.fc1_bias, &l.fc2_bias])
            .flatten();
        bits.map(|x| x.to_bits()).collect::<Vec<u32>>()
    };
    // Far from its labels the loss is as steep everywhere: rates are high enough to come near them.
    let mut all = vec![("", weights("--epochs 4 --learning-rate 0.1"))];
    for flags in [
        "--label mass",
        "--label kvzip",
        "--label kvzip-plus",
        "--value-norm",
        "--query-tokens 1",
        "--standardise",
        "--pool-labels 1",
        "--sinks 0",
        "--alpha 0.5",
        "--ranking 1",
        "--query-aware 4",
        "--max-tokens 60",
        "--repeat",
        "--repeat --piece 9",
        "--max-rows 70",
        "--span 16",
        "--square",
        "--label kvzip --head linear",
        "--label kvzip --head mlp",
        "--label kvzip --head decay",
    ] {
        let found = weights(&format!("--epochs 4 --learning-rate 0.1 {flags}"));
        for (others, same) in &all {
            assert!(
                found != *same,
                "{flags:?} and {others:?} gave the same weights"
            );
        }
        all.push((flags, found));
    }
}

#[test]
fn kinds_are_ranked_on_the_same_texts() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path()).display().to_string();
    let data = data(dir.path()).display().to_string();
    let out = dir.path().join("heads").display().to_string();
    let run = |flags: &str| {
        let mut all = vec![
            "rank_heads",
            "--out",
            &out,
            "--data",
            &data,
            "--model",
            &model,
        ];
        all.extend("--d-r 8 --epochs 2 --contexts 0".split_whitespace());
        all.extend(flags.split_whitespace());
        let args = rank_heads::Args::try_parse_from(all).map_err(|e| e.to_string())?;
        rank_heads::run(&args).map_err(|e| e.chain())
    };
    run("--labels logit,kvzip --heads locret,decay,linear --dtype f32").unwrap();
    let spec = ModelFiles::open(dir.path().join("model")).unwrap();
    let spec = spec.config().unwrap().spec();
    for (name, form) in [
        ("logit-locret", Some(HeadForm::Locret)),
        ("logit-decay", None),
        ("logit-linear", Some(HeadForm::Linear)),
        ("kvzip-locret", Some(HeadForm::Locret)),
        ("kvzip-decay", Some(HeadForm::Decay)),
        ("kvzip-linear", Some(HeadForm::Linear)),
    ] {
        let file = dir.path().join(format!("heads.{name}.safetensors"));
        let found = file
            .exists()
            .then(|| HeadWeights::load(&file, &spec).unwrap().form);
        assert_eq!(found, form, "{name}");
    }
    // One at a time is the same.
    let alone = crate::run(
        dir.path(),
        &data,
        "--epochs 2 --dtype f32 --label kvzip --head linear",
    );
    let alone = HeadWeights::load(alone.unwrap(), &spec).unwrap();
    let ranked = dir.path().join("heads.kvzip-linear.safetensors");
    assert!(HeadWeights::load(ranked, &spec).unwrap().layers == alone.layers);
    assert!(run("--head linear").unwrap_err().contains("--heads"));
}

#[test]
fn a_time_limit_takes_fewer_texts_and_epochs() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let data = data(dir.path()).display().to_string();
    let flags = "--epochs 500 --minutes-limit 0 --keep-work";
    // One text is read before the time is looked at; alone it is for training.
    let out = run(dir.path(), &data, flags).unwrap();
    let read = fs::read_dir(dir.path().join("heads.safetensors.work/samples"))
        .unwrap()
        .count();
    assert_eq!(read, 1);
    let spec = ModelFiles::open(dir.path().join("model"))
        .unwrap()
        .config()
        .unwrap()
        .spec();
    let heads = HeadWeights::load(out, &spec).unwrap();
    assert!(
        heads.metadata["training"].contains("\"epochs\":1"),
        "{:?}",
        heads.metadata
    );
}

#[test]
fn mistakes_are_errors_that_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let good = data(dir.path()).display().to_string();
    let empty = dir.path().join("empty.jsonl");
    fs::write(&empty, "").unwrap();
    let empty = empty.display().to_string();
    let cases = [
        ("/none.jsonl", "", "/none.jsonl"),
        (&*empty, "", "no text"),
        (&*good, "--d-r 0", "d_r"),
        (&*good, "--epochs 0", "epochs"),
        (&*good, "--pool-labels 2", "pool"),
        (&*good, "--learning-rate=-1", "learning_rate"),
        (&*good, "--label best", "logit"),
        (&*good, "--model /none", "/none"),
    ];
    for (data, flags, expected) in cases {
        let error = run(dir.path(), data, flags).unwrap_err();
        assert!(error.contains(expected), "{flags}: {error}");
    }
}

/// Heads belong to no architecture: what a model makes of its tokens in front of the rotation is enough.
#[test]
fn heads_are_trained_and_used_on_every_architecture() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../locret-models/tests/golden");
    for name in [
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
    ] {
        // From both kinds of files by turns, since they are the same models.
        let gguf = golden.join(name).join("model.gguf");
        let folder = golden.join(name);
        for (path, budget) in [(gguf, 24), (folder, 16)] {
            let dir = tempfile::tempdir().unwrap();
            let loaded = load_model(&path, &LoadOptions::new(), &Device::flex()).unwrap();
            let model = loaded.model;
            let ids = |from: u32, n: u32| (from..from + n).map(|i| i * i % 186).collect();
            let samples: Vec<Sample> = (0..4)
                .map(|i| Sample {
                    prompt: ids(i * 50, 40),
                    answers: vec![Answer {
                        query: ids(i * 31 + 7, 4),
                        answer: ids(i * 17 + 3, 6),
                    }],
                })
                .collect();
            let mut collecting = CollectConfig::default();
            collecting.validation = 0.25;
            let go_on = ControlFlow::Continue(());
            let work = dir.path();
            let shards = collect(&*model, &samples, work, &collecting, &mut |_| go_on).unwrap();
            let mut config = TrainConfig::default();
            (config.d_r, config.epochs, config.learning_rate) = (8, 12, 2e-2);
            let device = Device::flex().autodiff();
            let trained = train(&shards.unwrap(), work, &config, &device, &|_| go_on);
            let trained = trained.unwrap().unwrap();
            let what = format!("{name}, {}", path.display());
            for layer in &trained.layers {
                assert!(
                    layer.curve.iter().all(|(_, loss)| loss.is_finite()),
                    "{what}"
                );
                let (first, last) = (layer.curve[0].1, layer.curve[layer.curve.len() - 1].1);
                assert!(
                    last < 0.8 * first,
                    "{what}, layer {}: {first} to {last}",
                    layer.layer
                );
            }
            let file = dir.path().join("heads.safetensors");
            trained.heads.save(&file, DType::F32).unwrap();
            assert!(HeadWeights::load(&file, model.spec()).unwrap().layers == trained.heads.layers);

            let mut policy = PolicyConfig::new(Method::Locret).budget(Budget::Units(budget));
            policy.heads = Some(file);
            let policy = policy.build_for(&*model).unwrap();
            let mut session = Session::new(model.clone(), policy).unwrap();
            let prompt: Vec<u32> = ids(5, 60);
            session.prefill(&prompt, &Prefill::new(10, 6)).unwrap();
            let generated = session.generate(Generate::greedy(5)).unwrap();
            assert_eq!(generated.filter(|token| token.is_ok()).count(), 5, "{what}");
            // The budget, and a chunk.
            assert_eq!(
                session.report().prefill_peak.units_per_head,
                budget + 10,
                "{what}"
            );
        }
    }
}
