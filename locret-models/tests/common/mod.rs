//! Reading golden files, and writing small ones.
#![allow(dead_code, reason = "each test binary uses a part of this")]

pub mod gguf_file;

use base64::{Engine, prelude::BASE64_STANDARD};
use locret_models::ModelConfig;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub fn numbers<T: TryFrom<u64>>(value: &Value) -> Vec<T> {
    let list = value.as_array().unwrap().iter();
    list.map(|x| T::try_from(x.as_u64().unwrap()).ok().unwrap())
        .collect()
}

/// Base64 of little-endian `f32`.
pub fn floats(text: &str) -> Vec<f32> {
    let bytes = BASE64_STANDARD.decode(text).unwrap();
    let quads = bytes.chunks_exact(4);
    quads
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// One prompt of a golden model.
#[derive(Debug, Clone)]
pub struct Case {
    pub ids: Vec<u32>,
    pub positions: Vec<usize>,
    /// `[positions, vocab]`
    pub logits: Vec<f32>,
    pub greedy: Vec<u32>,
}

impl Case {
    /// How many greedy tokens were made with the RoPE factors that the prompt was read with.
    pub fn comparable(&self, config: &ModelConfig) -> usize {
        let prompt = self.ids.len();
        let same = |made: &usize| config.rope.is_long(prompt + made) == config.rope.is_long(prompt);
        (0..self.greedy.len()).take_while(same).count()
    }
}

/// All variants of a golden model.
pub struct Everything {
    folder: PathBuf,
    golden: Value,
}

impl Everything {
    pub fn read(model: &str) -> Self {
        let folder = golden(model);
        let golden = json(&folder.join("golden.json"));
        Self { folder, golden }
    }

    /// Every supported configuration file with every prompt, in a folder of its own.
    pub fn cases(&self) -> Vec<(String, Case, TempDir)> {
        let mut all = Vec::new();
        for (variant, value) in self.golden["variants"].as_object().unwrap() {
            if variant == "sliding" {
                continue;
            }
            for config in value["config"].as_array().unwrap() {
                let config = config.as_str().unwrap();
                for case in value["cases"].as_array().unwrap() {
                    let case = Case {
                        ids: numbers(&case["ids"]),
                        positions: numbers(&case["positions"]),
                        logits: floats(case["logits"].as_str().unwrap()),
                        greedy: numbers(&case["greedy"]),
                    };
                    all.push((config.to_owned(), case, self.folder_with(config)));
                }
            }
        }
        all
    }

    /// A model folder with `config` as its `config.json`.
    pub fn folder_with(&self, config: &str) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let copy = |from: &Path, to: &str| {
            std::fs::copy(from, dir.path().join(to)).unwrap();
        };
        copy(&self.folder.join(config), "config.json");
        copy(&self.folder.join("model.safetensors"), "model.safetensors");
        dir
    }
}
