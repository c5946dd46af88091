//! The adapter of `custom_adapter.rs` keeps the promises of the conformance suite and gives the
//! logits of transformers, and refuses what is not a Qwen2.

#[path = "../custom_adapter.rs"]
#[allow(dead_code, reason = "the example's `main`")]
mod custom_adapter;

use burn::tensor::Device;
use custom_adapter::{Qwen2, check};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../locret-models/tests/golden")
        .join(name)
}

#[test]
fn the_small_qwen2_is_that_of_transformers() {
    let found = check(&golden("qwen2"), &Device::flex()).unwrap();
    let distance = found.expect("a golden file");
    assert!(distance.largest <= 1e-4, "{distance:?}");
    assert!(distance.logits >= 192 * 10, "{distance:?}");
}

#[test]
fn another_family_is_refused() {
    let error = Qwen2::load(&golden("llama31"), &Device::flex()).unwrap_err();
    assert!(error.to_string().contains("Qwen2"), "{error}");
}

#[test]
fn the_example_is_short() {
    let lines = include_str!("../custom_adapter.rs").lines().count();
    assert!(lines < 200, "{lines} lines");
}
