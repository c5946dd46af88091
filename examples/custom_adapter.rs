//! A model that no crate here knows, `locret_examples::qwen2`, checked.
//!
//! ```text
//! cargo run --release --example custom_adapter [FOLDER]
//! ```
//! FOLDER has `config.json` and safetensors; by default a small random model. The adapter goes
//! through the public conformance suite, and where FOLDER has a `golden.json`, its logits are
//! compared with those of transformers. `docs/writing-an-adapter.md` explains it step by step.

use burn::tensor::Device;
use locret_core::{
    CausalLm,
    conformance::{AdapterCheck, check_adapter},
};
use locret_eval::golden::{Distance, GoldenLogits};
use locret_examples::qwen2::Qwen2;
use std::{path::Path, sync::Arc};

type Failure = Box<dyn std::error::Error>;

const TINY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../locret-models/tests/golden/qwen2"
);

fn main() -> Result<(), Failure> {
    let folder = std::env::args().nth(1).unwrap_or(TINY.into());
    check(Path::new(&folder), &Device::default()).map(drop)
}

/// Runs the conformance suite, and compares with `golden.json` if there is one.
fn check(folder: &Path, device: &Device) -> Result<Option<Distance>, Failure> {
    let model = Arc::new(Qwen2::load(folder, device)?);
    let vocab = model.spec().vocab as u32;
    let ids: Vec<u32> = (0..24).map(|i| (i * 37 + 11) % vocab).collect();
    check_adapter(model.clone(), &ids, &AdapterCheck::default())?;
    println!("conformance suite: passed with {} tokens", ids.len());
    let golden = folder.join("golden.json");
    if !golden.exists() {
        return Ok(None);
    }
    let distance = GoldenLogits::read(&golden)?.compare(&*model)?;
    println!(
        "transformers' logits: {} compared, the largest difference is {:.1e}",
        distance.logits, distance.largest
    );
    match distance.largest <= 1e-4 {
        true => Ok(Some(distance)),
        false => Err("a logit is off by more than 1e-4".into()),
    }
}

#[test]
fn the_small_qwen2_is_that_of_transformers() {
    let found = check(Path::new(TINY), &Device::flex()).unwrap();
    let distance = found.expect("a golden file");
    assert!(distance.largest <= 1e-4, "{distance:?}");
    assert!(distance.logits >= 192 * 10, "{distance:?}");
}
