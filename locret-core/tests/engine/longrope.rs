//! LongRoPE changes its factors with the length: in one prompt, between prompts, while decoding.

use crate::{
    assert_close, device, model_of,
    policies::{Everything, KeyNorm},
    spec, text,
};
use locret_core::{
    Budget, CacheOptions, DType, Error, Evict, Generate, Kernels, KvCachePolicy, LongRopeSwitch,
    ModelSpec, Needs, Positions, Prefill, RopeScaling, Session,
    conformance::{Oracle, RandomModel, Tap},
};
use std::sync::Arc;

const ORIGINAL: usize = 40;

fn long_spec(switch: LongRopeSwitch) -> ModelSpec {
    let mut spec = spec();
    let half = spec.head_dim / 2;
    spec.rope.scaling = RopeScaling::LongRope {
        short: vec![1.0; half],
        long: (0..half).map(|i| 2.0 + i as f64).collect(),
        original_max: ORIGINAL,
        attention_factor: 1.2,
        switch,
    };
    spec
}

fn everything(positions: Positions) -> Arc<dyn KvCachePolicy> {
    Arc::new(Everything {
        positions,
        needs: Needs::NOTHING,
    })
}

fn options() -> Vec<CacheOptions> {
    [Kernels::Auto, Kernels::Operations]
        .into_iter()
        .map(|kernels| CacheOptions::new().kernels(kernels))
        .collect()
}

/// Logits of the naive version after each of several prompts.
fn naive(model: &RandomModel, prompts: &[&[u32]]) -> Vec<Vec<f32>> {
    let mut oracle = Oracle::new(model, Positions::Original);
    prompts
        .iter()
        .map(|ids| {
            let out = oracle.forward(ids, oracle.seen() + ids.len());
            let last = out.logits.last().unwrap().iter();
            last.map(|x| *x as f32).collect()
        })
        .collect()
}

#[test]
fn the_factors_matter() {
    let by_length = naive(&model_of(long_spec(LongRopeSwitch::ByLength)), &[&text(30)]);
    let always = naive(
        &model_of(long_spec(LongRopeSwitch::AlwaysLong)),
        &[&text(30)],
    );
    let off = by_length[0]
        .iter()
        .zip(&always[0])
        .map(|(a, b)| (a - b).abs());
    assert!(off.fold(0.0, f32::max) > 0.05);
}

#[test]
fn a_long_prompt_in_chunks_is_read_with_the_long_factors_from_the_start() {
    let model = model_of(long_spec(LongRopeSwitch::ByLength));
    let ids = text(90);
    let expected = naive(&model, &[&ids]);
    for options in options() {
        for positions in [Positions::Original, Positions::Compact] {
            for (chunk, local) in [(90, 0), (16, 0), (7, 5), (1, 0), (30, 60)] {
                let mut session =
                    Session::with_options(model.clone(), everything(positions), options).unwrap();
                session.prefill(&ids, &Prefill::new(chunk, local)).unwrap();
                assert_close(session.logits().unwrap(), &expected[0], 1e-3);
            }
        }
    }
}

#[test]
fn a_conversation_that_grows_beyond_the_original_context_turns_its_keys() {
    let model = model_of(long_spec(LongRopeSwitch::ByLength));
    let ids = text(120);
    // Exactly the original context, then one token more, then much more.
    let prompts = [
        &ids[..10],
        &ids[10..ORIGINAL],
        &ids[ORIGINAL..ORIGINAL + 1],
        &ids[ORIGINAL + 1..],
    ];
    let expected = naive(&model, &prompts);
    for options in options() {
        for positions in [Positions::Original, Positions::Compact] {
            let mut session =
                Session::with_options(model.clone(), everything(positions), options).unwrap();
            for (ids, expected) in prompts.iter().zip(&expected) {
                let prefill = Prefill::new(9, 2);
                session.prefill(ids, &prefill).unwrap();
                assert_close(session.logits().unwrap(), expected, 1e-3);
            }
        }
    }
}

#[test]
fn generated_text_crosses_the_original_context() {
    let model = model_of(long_spec(LongRopeSwitch::ByLength));
    let ids = text(ORIGINAL - 4);
    for options in options() {
        for positions in [Positions::Original, Positions::Compact] {
            let tap = Arc::new(Tap::new(model.clone()));
            let mut session =
                Session::with_options(tap.clone(), everything(positions), options).unwrap();
            session.prefill(&ids, &Prefill::default()).unwrap();
            let tokens = session.generate(Generate::greedy(12)).unwrap();
            let tokens: Vec<u32> = tokens.map(|t| t.unwrap()).collect();
            assert_eq!(tokens.len(), 12);
            let mut oracle = Oracle::new(&model, positions);
            for pass in tap.passes() {
                let total = oracle.seen() + pass.ids.len();
                let out = oracle.forward(&pass.ids, total);
                let hidden: Vec<f32> = out.hidden.concat().iter().map(|x| *x as f32).collect();
                assert_close(&pass.hidden, &hidden, 1e-4);
            }
            assert_eq!(oracle.seen(), ORIGINAL - 4 + 11);
        }
    }
}

#[test]
fn a_store_of_few_bits_refuses_the_turn_and_is_as_it_was() {
    let model = model_of(long_spec(LongRopeSwitch::ByLength));
    let prefill = Prefill::default();
    for kernels in [Kernels::Auto, Kernels::Operations] {
        let options = CacheOptions::new().dtype(DType::F16).kernels(kernels);
        let new = || {
            let policy = everything(Positions::Original);
            let mut session = Session::with_options(model.clone(), policy, options).unwrap();
            session.prefill(&text(20), &prefill).unwrap();
            let mut tokens = session.generate(Generate::greedy(2)).unwrap();
            tokens.next().unwrap().unwrap();
            session
        };
        let (mut session, mut other) = (new(), new());
        let error = session.prefill(&text(30), &prefill).unwrap_err();
        assert!(matches!(error, Error::NotSupported { .. }), "{error}");
        assert_eq!(session.tokens(), other.tokens());
        // A shorter prompt goes on as if nothing had been tried.
        session.prefill(&text(5), &prefill).unwrap();
        other.prefill(&text(5), &prefill).unwrap();
        assert_eq!(session.logits().unwrap(), other.logits().unwrap());
        // Generated text ends at the original context with the same error.
        let mut tokens = session.generate(Generate::greedy(100)).unwrap();
        let error = tokens.find_map(Result::err).unwrap();
        assert!(matches!(error, Error::NotSupported { .. }), "{error}");
        assert!(tokens.next().is_none());
        assert_eq!(session.cache().seen(), ORIGINAL);
    }
}

#[test]
fn compact_keys_of_few_bits_need_no_turn() {
    let model = model_of(long_spec(LongRopeSwitch::ByLength));
    let ids = text(90);
    let expected = naive(&model, &[&ids[..30], &ids[30..]]);
    for kernels in [Kernels::Auto, Kernels::Operations] {
        let options = CacheOptions::new().dtype(DType::F16).kernels(kernels);
        let policy = everything(Positions::Compact);
        let mut session = Session::with_options(model.clone(), policy, options).unwrap();
        for (ids, expected) in [&ids[..30], &ids[30..]].iter().zip(&expected) {
            session.prefill(ids, &Prefill::new(16, 0)).unwrap();
            assert_close(session.logits().unwrap(), expected, 2e-2);
        }
    }
}

#[test]
fn always_long_never_switches() {
    let model = model_of(long_spec(LongRopeSwitch::AlwaysLong));
    let ids = text(90);
    let whole = naive(&model, &[&ids]);
    let parts = naive(&model, &[&ids[..30], &ids[30..]]);
    assert_close(&parts[1], &whole[0], 1e-5);
    let options = CacheOptions::new().dtype(DType::F16);
    let policy = everything(Positions::Original);
    let mut session = Session::with_options(model, policy, options).unwrap();
    session.prefill(&ids[..30], &Prefill::default()).unwrap();
    session.prefill(&ids[30..], &Prefill::default()).unwrap();
    assert_close(session.logits().unwrap(), &whole[0], 2e-2);
}

#[test]
fn evicted_and_forked_caches_turn_what_they_hold() {
    let model = model_of(long_spec(LongRopeSwitch::ByLength));
    let prefill = Prefill::new(8, 0);
    for positions in [Positions::Original, Positions::Compact] {
        let policy = Arc::new(Evict::new(KeyNorm, Budget::Units(12)).with_positions(positions));
        let mut session =
            Session::with_options(model.clone(), policy, CacheOptions::default()).unwrap();
        session.prefill(&text(35), &prefill).unwrap();
        let mut fork = session.fork().unwrap();
        fork.prefill(&text(30), &prefill).unwrap();
        let crossed = fork.logits().unwrap().to_vec();
        // The origin still has the short factors.
        session.prefill(&text(3), &prefill).unwrap();
        let short = session.logits().unwrap().to_vec();
        let mut again = Session::with_options(
            model.clone(),
            Arc::new(Evict::new(KeyNorm, Budget::Units(12)).with_positions(positions)),
            CacheOptions::default(),
        )
        .unwrap();
        again.prefill(&text(35), &prefill).unwrap();
        let mut other = again.fork().unwrap();
        again.prefill(&text(3), &prefill).unwrap();
        assert_eq!(again.logits().unwrap(), short);
        other.prefill(&text(30), &prefill).unwrap();
        assert_eq!(other.logits().unwrap(), crossed);
        assert!(device() == *session.model().compute().device());
    }
}
