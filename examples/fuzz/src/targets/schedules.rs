//! What a program may do with a session and with a batch, in any order and with any numbers.

use super::{MODEL, try_out};
use crate::{Feed, Input, Target};
use locret_core::{
    Batch, Budget, CacheOptions, DType, DecodeEviction, End, Event, Generate, KvCachePolicy,
    Limits, Positions, Prefill, Quantization, Request, Sampling, Session,
};
use locret_policies::{Full, H2o, InfLlm, KeyNorm, Quantized, SirLlm, SnapKv, Tova, Window};
use std::sync::{Arc, Mutex};

fn ready() {
    try_out(&MODEL);
}

pub(crate) const SESSION: Target = Target {
    name: "session",
    ready,
    make,
    read: session,
};

pub(crate) const BATCH: Target = Target {
    name: "batch",
    ready,
    make,
    read: batch,
};

/// The choices themselves: steps are taken until they are used up.
fn make(feed: &mut Feed<'_>) -> Input {
    Input {
        bytes: feed.take(256).to_vec(),
        ..Input::default()
    }
}

fn policy(feed: &mut Feed<'_>) -> Arc<dyn KvCachePolicy> {
    let n = 2 + feed.below(20);
    let budget = Budget::Units(n);
    let positions = feed.of(&[Positions::Original, Positions::Compact]);
    match feed.below(9) {
        0 => Arc::new(Full::new().with_positions(positions)),
        1 => Arc::new(Window::policy(budget)),
        2 => Arc::new(KeyNorm::policy(budget).with_positions(positions).ada(0.1)),
        3 => Arc::new(SirLlm::new().policy(budget, n / 4)),
        4 => Arc::new(H2o::policy(budget).while_decoding(DecodeEviction::Every(3))),
        5 => Arc::new(SnapKv::new().window(3).kernel(3).policy(budget)),
        6 => Arc::new(Tova::policy(budget)),
        7 => {
            let codes = Quantization {
                group: 4,
                residual: 4,
                ..Quantization::default()
            };
            Arc::new(Quantized::new(KeyNorm::policy(budget), codes))
        }
        _ => {
            let policy = InfLlm::new().init(1).local(8).block(4).topk(1);
            Arc::new(policy.representatives(1).exec_block(4))
        }
    }
}

fn ids(feed: &mut Feed<'_>) -> Vec<u32> {
    let length = feed.below(48);
    let first = feed.byte();
    let mut ids: Vec<u32> = (0..length as u32)
        .map(|i| (u32::from(first) + 7 * i) % 61)
        .collect();
    // One that the model does not have.
    if first == 200
        && let Some(id) = ids.last_mut()
    {
        *id = u32::MAX;
    }
    ids
}

fn prefill(feed: &mut Feed<'_>) -> Prefill {
    let chunk = feed.of(&[0, 1, 2, 3, 4, 8, 100, usize::MAX]);
    Prefill::new(chunk, feed.of(&[0, 1, 3, 200, usize::MAX]))
}

fn sampling(feed: &mut Feed<'_>) -> Sampling {
    if feed.below(3) > 0 {
        return Sampling::greedy();
    }
    let mut number = |usual: f32| match feed.below(4) {
        0 => f32::from_bits(feed.word() as u32),
        _ => usual,
    };
    Sampling {
        temperature: number(0.8),
        top_p: number(0.9),
        min_p: number(0.1),
        repetition_penalty: number(1.1),
        top_k: feed.of(&[0, 1, 5, usize::MAX]),
        seed: 3,
    }
}

fn session(input: &Input) {
    let mut feed = Feed::new(&input.bytes);
    let dtype = feed.of(&[DType::F32, DType::F16, DType::BF16, DType::Q4_0]);
    let (policy, options) = (policy(&mut feed), CacheOptions::new().dtype(dtype));
    let Ok(mut session) = Session::with_options(MODEL.clone(), policy.clone(), options) else {
        return;
    };
    let mut work = 0;
    while !feed.is_empty() && work < 400 {
        let before = session.tokens().len();
        match feed.below(6) {
            0 | 1 => {
                let _any = session.prefill(&ids(&mut feed), &prefill(&mut feed));
            }
            2 => {
                let generate = Generate::greedy(feed.below(12)).sampling(sampling(&mut feed));
                let generate = generate.stop_at([feed.below(61) as u32]);
                // Not always to its end.
                let most = feed.below(12);
                if let Ok(tokens) = session.generate(generate) {
                    tokens.take(most).for_each(drop);
                }
            }
            3 => {
                let _any = session.score(&ids(&mut feed));
            }
            4 => {
                if let Ok(fork) = session.fork() {
                    assert_eq!(fork.tokens(), session.tokens());
                    session = fork;
                }
            }
            _ => {
                let mut bytes = Vec::new();
                if session.write(&mut bytes).is_ok() {
                    let length = bytes.len() as u64;
                    let (model, policy) = (MODEL.clone(), policy.clone());
                    let read = Session::read(model, policy, options, &mut &bytes[..], length);
                    let read = read.expect("what was written is read");
                    assert_eq!(read.tokens(), session.tokens());
                    session = read;
                }
            }
        }
        work += 4 + session.tokens().len() - before;
        check(&session);
    }
}

/// What holds whatever happened.
fn check(session: &Session) {
    let (cache, spec) = (session.cache(), session.model().spec());
    for layer in 0..spec.layers {
        for head in 0..spec.kv_heads {
            let positions = cache.positions(layer, head);
            assert_eq!(positions.len(), cache.len(layer, head));
            assert!(positions.is_sorted_by(|a, b| a < b), "{positions:?}");
            let last = positions.last().map_or(0, |p| *p as usize + 1);
            assert!(last <= cache.seen(), "{last} of {}", cache.seen());
        }
    }
}

/// What was heard of a sequence: its tokens, and how it ended.
#[derive(Debug, Default)]
struct Heard {
    tokens: Vec<u32>,
    end: Option<End>,
}

/// Sequences come, are cancelled, and end; those that are let alone say what they say alone.
fn batch(input: &Input) {
    let mut feed = Feed::new(&input.bytes);
    let limits = Limits::new()
        .memory(feed.of(&[0, 20_000, 60_000, 1 << 20, usize::MAX]))
        .running(feed.of(&[1, 2, 5]))
        .waiting(feed.of(&[0, 1, 8]))
        .rows(feed.of(&[1, 8, 64]));
    let Ok(mut batch) = Batch::new(MODEL.clone(), limits) else {
        return;
    };
    let mut asked = Vec::new();
    while !feed.is_empty() && asked.len() < 6 {
        match feed.below(4) {
            0 | 1 => {
                let (policy, prompt, prefill) =
                    (policy(&mut feed), ids(&mut feed), prefill(&mut feed));
                let generate = Generate::greedy(feed.below(10)).sampling(sampling(&mut feed));
                let request = Request::new(prompt.clone(), policy.clone())
                    .prefill(prefill)
                    .generate(generate.clone());
                let heard = Arc::new(Mutex::new(Heard::default()));
                let sink = heard.clone();
                let submitted = batch.submit(
                    request,
                    Box::new(move |event| {
                        let mut heard = sink.lock().expect("no panic here");
                        match event {
                            Event::Token(token) => heard.tokens.push(token),
                            Event::Ended(ended) => heard.end = Some(ended.end),
                            _ => {}
                        }
                    }),
                );
                if let Ok(id) = submitted {
                    asked.push((id, policy, prompt, prefill, generate, heard));
                }
            }
            2 => {
                if !asked.is_empty() {
                    let at = feed.below(asked.len());
                    batch.cancel(asked[at].0);
                }
            }
            _ => {
                for _ in 0..feed.below(6) {
                    batch.step();
                }
            }
        }
    }
    while batch.step() {}
    let load = batch.load();
    assert_eq!(
        (load.running, load.waiting, load.promised),
        (0, 0, 0),
        "{load:?}"
    );
    for (_, policy, prompt, prefill, generate, heard) in asked {
        let heard = heard.lock().expect("no panic here");
        let end = heard.end.as_ref().expect("every sequence ends");
        if !matches!(end, End::Length | End::Stop) {
            continue;
        }
        let mut alone = Session::new(MODEL.clone(), policy).expect("it was one of a batch");
        alone
            .prefill(&prompt, &prefill)
            .expect("it was one of a batch");
        let tokens = alone.generate(generate).expect("it was one of a batch");
        let tokens: Vec<u32> = tokens.map(|token| token.expect("as in a batch")).collect();
        assert_eq!(heard.tokens, tokens);
    }
}
