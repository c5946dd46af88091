//! Several sequences in one pass are what each of them is alone.

use crate::{
    assert_close, device, model,
    policies::{Attended, Birth, Everything, KeyNorm, Logits, Newest, Ragged, Surprise},
    spec, text,
};
use locret_core::{
    Budget, CacheOptions, CausalLm, DType, DecodeEviction, Evict, Kernels, KvCachePolicy, Pass,
    Phase, Positions, Scorer, SequenceCache, SequenceStep, compute, forward,
};
use std::sync::Arc;

fn evict<S: Scorer + 'static>(scorer: S, positions: Positions) -> Arc<dyn KvCachePolicy> {
    Arc::new(
        Evict::new(scorer, Budget::Units(10))
            .with_positions(positions)
            .while_decoding(DecodeEviction::Every(2)),
    )
}

/// Eight sequences of all kinds.
fn policies() -> [Arc<dyn KvCachePolicy>; 8] {
    let (original, compact) = (Positions::Original, Positions::Compact);
    [
        evict(KeyNorm, original),
        evict(Birth, compact),
        evict(Surprise, original),
        evict(Attended, compact),
        evict(Logits, original),
        evict(Newest, compact),
        Arc::new(Everything::default()),
        Arc::new(Ragged {
            limit: 12,
            positions: compact,
        }),
    ]
}

/// The new tokens of one sequence.
type Part = (Phase, Vec<u32>);

fn step<'a>(cache: &'a mut SequenceCache, (phase, ids): &Part) -> SequenceStep<'a> {
    let total = cache.seen() + ids.len();
    cache.step(*phase, ids.len(), total)
}

/// Surprisal of any tokens: what it is does not matter here.
fn surprisal(ids: &[u32]) -> Vec<f32> {
    ids.iter().map(|id| (id % 7) as f32).collect()
}

fn together(model: &dyn CausalLm, caches: &mut [SequenceCache], parts: &[Part]) -> Vec<Vec<f32>> {
    let ids: Vec<u32> = parts.iter().flat_map(|(_, ids)| ids.clone()).collect();
    let steps = caches.iter_mut().zip(parts).map(|(c, part)| step(c, part));
    let mut pass = Pass::new(steps).unwrap();
    let hidden = forward(model, &ids, &mut pass).unwrap();
    pass.finish(Some(&surprisal(&ids))).unwrap();
    let mut first = 0;
    let rows = parts.iter().map(|(_, ids)| {
        let rows = first..first + ids.len();
        first = rows.end;
        hidden.slice(rows).unwrap().into_values().unwrap()
    });
    rows.collect()
}

#[test]
fn eight_sequences_in_one_pass_are_eight_lone_ones() {
    let model = model();
    let options = [
        (Kernels::Auto, DType::F32),
        (Kernels::Auto, DType::F16),
        (Kernels::Operations, DType::F32),
    ];
    for (kernels, dtype) in options {
        let caches = || -> Vec<SequenceCache> {
            let options = CacheOptions::new().dtype(dtype).kernels(kernels);
            let made = policies().into_iter().map(|policy| {
                SequenceCache::new(model.spec(), policy, &compute(&device()), options).unwrap()
            });
            made.collect()
        };
        let (mut joint, mut lone) = (caches(), caches());
        let text = text(300);
        // Chunks of different lengths, chunks beside single tokens, and single tokens alone.
        let chunk = |i: usize, round: usize| -> Part {
            let start = 11 * i + 17 * round;
            let last = round == 1;
            match (round, i % 3) {
                (0 | 1, _) => (Phase::Prefill { last }, text[start..start + 9 + i].to_vec()),
                (2, 0) => (Phase::Tail, text[start..start + 3].to_vec()),
                _ => (Phase::Decode, vec![text[start]]),
            }
        };
        for round in 0..9 {
            let parts: Vec<Part> = (0..8).map(|i| chunk(i, round)).collect();
            let found = together(&*model, &mut joint, &parts);
            for (i, part) in parts.iter().enumerate() {
                let alone = &mut lone[i..=i];
                let due = together(&*model, alone, std::slice::from_ref(part));
                assert_close(&found[i], &due[0], 1e-5);
            }
        }
        for (joint, lone) in joint.iter().zip(&lone) {
            assert_eq!(joint.seen(), lone.seen());
            assert_eq!(joint.bytes(), lone.bytes());
            for layer in 0..spec().layers {
                for head in 0..spec().kv_heads {
                    assert_eq!(joint.positions(layer, head), lone.positions(layer, head));
                    let scores = [joint, lone].map(|cache| cache.scores(layer, head));
                    assert_close(scores[0], scores[1], 1e-4);
                }
            }
        }
        // Most of them have dropped units.
        let dropped = joint.iter().filter(|c| c.len(0, 0) < c.seen()).count();
        assert_eq!(dropped, 7);
    }
}

#[test]
fn an_error_of_one_sequence_ends_those_of_its_pass_and_no_other() {
    let model = model();
    let cache = |policy: Arc<dyn KvCachePolicy>| {
        let options = CacheOptions::default();
        SequenceCache::new(model.spec(), policy, &compute(&device()), options).unwrap()
    };
    let mut good = cache(Arc::new(Everything::default()));
    let mut beside = cache(Arc::new(Everything::default()));
    let mut bad = cache(evict(Surprise, Positions::Original));
    let steps = [good.step(Phase::Tail, 2, 2), bad.step(Phase::Tail, 3, 3)];
    let mut pass = Pass::new(steps).unwrap();
    forward(&*model, &text(5), &mut pass).unwrap();
    // What one of them needs is missing.
    assert!(pass.finish(None).is_err());
    assert!(good.fork().is_err() && bad.fork().is_err());
    beside.turn(2).unwrap();
}
