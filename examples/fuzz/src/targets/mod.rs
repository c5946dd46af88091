//! What is fuzzed.

mod gguf;
mod http;
mod models;
mod schedules;
mod settings;
mod snapshots;
mod templates;
mod tensors;
mod tokenizers;

use crate::Target;
use burn::tensor::Device;
use locret_core::{
    Budget, CausalLm, Generate, KvCachePolicy, Prefill, Session,
    conformance::{RandomModel, small_spec},
};
use locret_policies::{Full, KeyNorm};
use std::sync::{Arc, LazyLock};

/// All of them.
pub const TARGETS: &[Target] = &[
    gguf::TARGET,
    models::CONFIG,
    models::SAFETENSORS,
    tensors::HEADS,
    tokenizers::JSON,
    tokenizers::MODEL,
    templates::TARGET,
    snapshots::TARGET,
    settings::POLICY,
    settings::GRID,
    settings::TASKS,
    http::TARGET,
    schedules::SESSION,
    schedules::BATCH,
];

/// Two layers of random weights.
static MODEL: LazyLock<Arc<dyn CausalLm>> = LazyLock::new(|| {
    let model = RandomModel::new(small_spec(4, 2, 8), 1, &Device::flex());
    Arc::new(model.expect("a model of random weights"))
});

/// Reads a few tokens with a model, and generates.
fn try_out(model: &Arc<dyn CausalLm>) {
    let policies: [Arc<dyn KvCachePolicy>; 2] = [
        Arc::new(Full::new()),
        Arc::new(KeyNorm::policy(Budget::Units(4))),
    ];
    for policy in policies {
        let Ok(mut session) = Session::new(model.clone(), policy) else {
            continue;
        };
        let _any = session.prefill(&[0, 1, 2, 1, 0, 2, 1], &Prefill::new(3, 1));
        if let Ok(tokens) = session.generate(Generate::greedy(2)) {
            tokens.for_each(drop);
        }
    }
}
