//! A model of SmolLM2-135M's shape with random 32-bit weights: reading 512 tokens, and generating
//! one after another behind 512 and 2,048 units.

use burn::tensor::Device;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use locret_benches::{ids, random_model, smollm2};
use locret_core::{Budget, CausalLm, KvCachePolicy, Prefill, Session};
use locret_policies::{Full, KeyNorm, Window};
use std::{hint::black_box, sync::Arc};

const PREFILL: Prefill = Prefill::new(512, 0);

fn sessions(c: &mut Criterion) {
    let config = smollm2();
    let vocab = config.spec.vocab;
    let model: Arc<dyn CausalLm> =
        Arc::new(random_model(&config, &Device::flex()).expect("random weights fit"));
    let open = |policy: &Arc<dyn KvCachePolicy>| {
        Session::new(model.clone(), policy.clone()).expect("the policy fits")
    };

    let mut group = c.benchmark_group("prefill of 512 tokens");
    group.sample_size(10);
    group.throughput(Throughput::Elements(512));
    let prompt = ids(512, vocab, 1);
    let full: Arc<dyn KvCachePolicy> = Arc::new(Full::new());
    let budget = Budget::Units(256);
    let policies: [Arc<dyn KvCachePolicy>; 3] = [
        full.clone(),
        Arc::new(Window::policy(budget)),
        Arc::new(KeyNorm::policy(budget)),
    ];
    for policy in &policies {
        group.bench_function(policy.name(), |b| {
            b.iter(|| {
                let mut session = open(policy);
                let read = session.prefill(black_box(&prompt), &PREFILL);
                read.expect("the prompt is read");
                session
            });
        });
    }
    group.finish();

    let mut group = c.benchmark_group("decode");
    group.sample_size(10);
    group.throughput(Throughput::Elements(1));
    for units in [512, 2048] {
        let mut session = open(&full);
        let read = session.prefill(&ids(units, vocab, 2), &PREFILL);
        read.expect("the prompt is read");
        let next = ids(1, vocab, 3);
        // The cache grows by a unit with each step, as it does while text is generated.
        group.bench_function(format!("one token over {units} units"), |b| {
            b.iter(|| session.score(black_box(&next)).expect("a token is read"));
        });
    }
    group.finish();
}

criterion_group!(benches, sessions);
criterion_main!(benches);
