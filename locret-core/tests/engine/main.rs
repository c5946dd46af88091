//! The engine, its stores and its contract, against naive versions of themselves.

mod batch;
mod budgets;
mod contract;
mod conversation;
mod drift;
mod fetched;
mod hostile;
mod kernels;
mod listed;
mod longrope;
mod many;
mod memory;
mod policies;
mod prefix;
mod saved;
mod shared;
mod snapshot;
mod suite;
mod tiers;
mod visible;

use burn::tensor::Device;
use locret_core::{
    CacheOptions, CausalLm, KvCachePolicy, ModelSpec, Session,
    conformance::{RandomModel, small_spec},
};
use std::sync::Arc;

fn device() -> Device {
    Device::flex()
}

fn spec() -> ModelSpec {
    small_spec(6, 2, 16)
}

fn model_of(spec: ModelSpec) -> Arc<RandomModel> {
    Arc::new(RandomModel::new(spec, 7, &device()).unwrap())
}

fn model() -> Arc<RandomModel> {
    model_of(spec())
}

/// Tokens that repeat only after a long while.
fn text(tokens: usize) -> Vec<u32> {
    (0..tokens)
        .map(|i| ((i * i + 7 * i + i / 5) % 61) as u32)
        .collect()
}

fn session(model: &Arc<RandomModel>, policy: impl KvCachePolicy + 'static) -> Session {
    let model: Arc<dyn CausalLm> = model.clone();
    Session::with_options(model, Arc::new(policy), CacheOptions::default()).unwrap()
}

/// Positions by layer and KV head.
fn positions(session: &Session) -> Vec<Vec<Vec<u32>>> {
    let cache = session.cache();
    let spec = cache.spec();
    let layer = |l| (0..spec.kv_heads).map(move |h| cache.positions(l, h).to_vec());
    (0..spec.layers).map(|l| layer(l).collect()).collect()
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance, "number {i}: {a}, {b} is due");
    }
}
