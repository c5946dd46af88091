//! Folders as Hugging Face repositories are laid out: settings, safetensors and their index.

use super::try_out;
use crate::{Feed, Input, Target, edit, places};
use burn::tensor::Device;
use locret_models::{LoadOptions, ModelConfig, SafetensorsDir, WeightDtype, Weights, load_model};
use serde_json::{Value, json};
use std::{path::PathBuf, sync::LazyLock};

pub(crate) const CONFIG: Target = Target {
    name: "config",
    ready,
    make: make_config,
    read: read_config,
};

pub(crate) const SAFETENSORS: Target = Target {
    name: "safetensors",
    ready,
    make: make_tensors,
    read: read_tensors,
};

const FAMILIES: [&str; 9] = [
    "llama2",
    "llama31",
    "llama32",
    "llama_biases",
    "mistral",
    "phi3_128k",
    "phi4_mini",
    "qwen2",
    "qwen3",
];

struct Family {
    folder: PathBuf,
    config: Vec<u8>,
    weights: Vec<u8>,
}

static FOLDERS: LazyLock<Vec<Family>> = LazyLock::new(|| {
    let family = |name: &&str| {
        let golden =
            |file: &str| places::golden(&format!("locret-models/tests/golden/{name}/{file}"));
        let made = Family {
            folder: places::folder(name),
            config: golden("config.json"),
            weights: golden("model.safetensors"),
        };
        places::write(&made.folder.join("model.safetensors"), &made.weights);
        made
    };
    FAMILIES.iter().map(family).collect()
});

/// Values and names of settings.
static PARTS: LazyLock<Vec<Value>> = LazyLock::new(|| {
    vec![
        json!("rope_scaling"),
        json!({ "rope_type": "yarn", "factor": 4.0 }),
        json!({ "rope_type": "dynamic", "factor": 2.0 }),
        json!({ "type": "longrope", "short_factor": [1.0], "long_factor": [1e30] }),
        json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 0 }),
        json!("head_dim"),
        json!("sliding_window"),
        json!("layer_types"),
        json!("num_hidden_layers"),
        json!("partial_rotary_factor"),
        json!("text_config"),
        json!("quantization_config"),
        json!(["LlamaForCausalLM"]),
        json!("phi3"),
        json!("qwen3"),
        json!(1u64 << 40),
    ]
});

fn ready() {
    LazyLock::force(&FOLDERS);
    LazyLock::force(&PARTS);
}

fn make_config(feed: &mut Feed<'_>) -> Input {
    let kind = feed.below(FOLDERS.len());
    let seed = &FOLDERS[kind].config;
    let bytes = match feed.below(8) {
        0 => edit::text(&String::from_utf8_lossy(seed), &["{", "]", "\""], feed).into_bytes(),
        _ => {
            let value = serde_json::from_slice(seed).expect("a valid seed");
            edit::json(value, &PARTS, feed).to_string().into_bytes()
        }
    };
    Input {
        bytes,
        kind,
        ..Input::default()
    }
}

fn read_config(input: &Input) {
    let family = &FOLDERS[input.kind % FOLDERS.len()];
    places::write(&family.folder.join("config.json"), &input.bytes);
    places::write(&family.folder.join("model.safetensors"), &family.weights);
    if ModelConfig::from_dir(&family.folder).is_err() {
        return;
    }
    if let Ok(loaded) = load_model(&family.folder, &LoadOptions::new(), &Device::flex()) {
        try_out(&loaded.model);
    }
}

/// Kinds below the number of families are a file of weights; then come index files.
fn make_tensors(feed: &mut Feed<'_>) -> Input {
    let kind = feed.below(FOLDERS.len() + 2);
    let bytes = match FOLDERS.get(kind) {
        Some(family) => altered_tensors(&family.weights, feed),
        None => {
            let name = "locret-models/tests/golden/llama31/sharded/model.safetensors.index.json";
            let value = serde_json::from_slice(&places::golden(name)).expect("a valid seed");
            let names = ["../model.safetensors", "model.safetensors", "", "."];
            let parts: Vec<Value> = names.map(Value::from).into();
            edit::json(value, &parts, feed).to_string().into_bytes()
        }
    };
    Input {
        bytes,
        kind,
        ..Input::default()
    }
}

/// A file of safetensors with another header, or with bytes changed anywhere.
pub(super) fn altered_tensors(seed: &[u8], feed: &mut Feed<'_>) -> Vec<u8> {
    let length = u64::from_le_bytes(seed[..8].try_into().expect("eight bytes")) as usize;
    let (header, data) = seed[8..].split_at(length);
    if feed.below(4) == 0 {
        return edit::bytes(seed, &[0..8, 8..8 + length], feed);
    }
    let value: Value = serde_json::from_slice(header).expect("a valid seed");
    let parts = ["F32", "BF16", "F64", "I8", "U8", "F8_E4M3", "__metadata__"].map(Value::from);
    let header = edit::json(value, &parts, feed).to_string();
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), data].concat()
}

fn read_tensors(input: &Input) {
    let folder = places::folder("tensors");
    let family = &FOLDERS[input.kind.checked_rem(FOLDERS.len()).unwrap_or(0)];
    places::write(&folder.join("config.json"), &family.config);
    let (weights, index) = (
        folder.join("model.safetensors"),
        folder.join("model.safetensors.index.json"),
    );
    if input.kind < FOLDERS.len() {
        let _gone_or_never_there = std::fs::remove_file(&index);
        places::write(&weights, &input.bytes);
    } else {
        places::write(&weights, &family.weights);
        places::write(&index, &input.bytes);
    }
    let Ok(dir) = SafetensorsDir::open(&folder) else {
        return;
    };
    let names: Vec<String> = dir.names().into_iter().map(str::to_owned).collect();
    for name in names.iter().take(64) {
        let rows = dir.info(name).map_or(0, |info| info.rows());
        let _any = dir.raw_rows(name, 0..rows.min(2));
        let _any = dir.raw_rows(name, rows..rows + 1);
    }
    drop(dir);
    let options = LoadOptions::new().weights(WeightDtype::F32);
    if let Ok(loaded) = load_model(&folder, &options, &Device::flex()) {
        try_out(&loaded.model);
    }
}
