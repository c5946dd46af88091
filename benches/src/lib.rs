//! What the benches share: random numbers, and a model of SmolLM2-135M's shape with random weights.
#![deny(missing_docs)]

use burn::tensor::Device;
use locret_core::{ModelSpec, RopeConfig};
use locret_eval::{
    Result,
    random::{self, RandomWeights},
};
use locret_models::{Decoder, DecoderConfig, Layout, LoadOptions, WeightDtype};

/// `n` numbers, uniform in `[-scale, scale)`; the same seed gives the same numbers.
pub fn numbers(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    // The multiplier and increment are those of Knuth's MMIX generator.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
    };
    (0..n).map(|_| next()).collect()
}

/// Token ids below `vocab`.
pub fn ids(n: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let to_id = |x: f32| (((x + 1.0) / 2.0 * vocab as f32) as u32).min(vocab as u32 - 1);
    numbers(n, seed, 1.0).into_iter().map(to_id).collect()
}

/// SmolLM2-135M: 30 layers, 9 query and 3 KV heads of 64 features, a tied head.
pub fn smollm2() -> DecoderConfig {
    DecoderConfig {
        spec: ModelSpec::new(30, 9, 3, 576, 49_152)
            .with_head_dim(64)
            .with_rope(RopeConfig::plain(100_000.0, 64))
            .with_softmax_scale(0.125)
            .with_max_positions(Some(8192)),
        intermediate: 1536,
        norm_epsilon: 1e-5,
        tied: true,
        layout: Layout::Separate,
    }
}

/// A decoder with random 32-bit weights.
///
/// # Errors
/// As [`random::decoder`].
pub fn random_model(config: &DecoderConfig, device: &Device) -> Result<Decoder> {
    let weights = RandomWeights::new(config, 1);
    let options = LoadOptions::new().weights(WeightDtype::F32);
    random::decoder(config, &weights, &options, device)
}
