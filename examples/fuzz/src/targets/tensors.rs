//! Files of retaining heads: safetensors, PyTorch's, in the forms of several authors.

use super::models::altered_tensors;
use crate::{Feed, Input, Target, edit, places};
use burn::tensor::Device;
use locret_core::{Activations, Kernels, ModelSpec, RopeConfig};
use locret_policies::{HeadWeights, RetainingHeads};
use std::{path::Path, sync::LazyLock};

pub(crate) const HEADS: Target = Target {
    name: "heads",
    ready: || {
        LazyLock::force(&SEEDS);
    },
    make,
    read,
};

const NAMES: [&str; 8] = [
    "heads/f32.safetensors",
    "heads/bf16.safetensors",
    "heads/whole.safetensors",
    "forms/kvzap_mlp.safetensors",
    "heads/heads.bin",
    "heads/views.bin",
    "heads/legacy.bin",
    "forms/trimkv_weights.pth",
];

static SEEDS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let golden = |name: &&str| places::golden(&format!("locret-policies/tests/golden/{name}"));
    NAMES.iter().map(golden).collect()
});

fn make(feed: &mut Feed<'_>) -> Input {
    let kind = feed.below(SEEDS.len());
    let bytes = match NAMES[kind].ends_with("safetensors") {
        true => altered_tensors(&SEEDS[kind], feed),
        false => edit::bytes(&SEEDS[kind], &[], feed),
    };
    Input {
        bytes,
        kind,
        ..Input::default()
    }
}

fn read(input: &Input) {
    let name = Path::new(NAMES[input.kind % NAMES.len()]);
    let path = places::path("heads").with_extension(name.extension().unwrap_or_default());
    places::write(&path, &input.bytes);
    // That of the seeds.
    let spec = ModelSpec::new(2, 3, 1, 4, 16)
        .with_head_dim(2)
        .with_rope(RopeConfig::plain(1000.0, 2));
    let Ok(heads) = HeadWeights::load(&path, &spec) else {
        return;
    };
    let _any = heads.advice();
    heads.validate(&spec).expect("what was loaded fits");
    let compute = Kernels::Auto.with(&Device::flex(), Activations::default());
    let _any = RetainingHeads::new(&heads, &spec, &*compute);
}
