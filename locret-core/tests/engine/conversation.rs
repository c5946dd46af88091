//! Prompts, generated text, and what comes between them.

use crate::{
    assert_close, model, model_of,
    policies::{Attended, Birth, Everything, KeyNorm, Newest, Surprise},
    positions, session, spec, text,
};
use locret_core::{
    Births, Budget, CacheOptions, Error, Evict, Generate, KvCachePolicy, Phase, Positions, Prefill,
    Sampling, Session, TokenScore, argmax,
    conformance::{Oracle, RandomModel, Tap, Tapped},
};
use proptest::prelude::*;
use std::sync::Arc;

const PREFILL: Prefill = Prefill::new(16, 4);

fn full() -> Everything {
    Everything::default()
}

fn tight() -> Evict<KeyNorm> {
    Evict::new(KeyNorm, Budget::Units(12)).recent(2)
}

fn draw(session: &mut Session, generate: Generate) -> Vec<u32> {
    let tokens = session.generate(generate).unwrap();
    tokens.map(|t| t.unwrap()).collect()
}

/// Logits of the naive version of a full cache after each token.
fn naive(model: &RandomModel, ids: &[u32]) -> Vec<Vec<f32>> {
    let out = Oracle::new(model, Positions::Original).forward(ids, ids.len());
    let single = |row: Vec<f64>| row.iter().map(|x| *x as f32).collect();
    out.logits.into_iter().map(single).collect()
}

#[test]
fn stopped_and_resumed_text_is_the_same_text() {
    let model = model();
    for compact in [false, true] {
        let positions = match compact {
            true => Positions::Compact,
            false => Positions::Original,
        };
        let start = || {
            let mut session = session(&model, tight().with_positions(positions));
            session.prefill(&text(50), &PREFILL).unwrap();
            session
        };
        let mut whole = start();
        let expected = draw(&mut whole, Generate::greedy(14));
        assert_eq!(expected.len(), 14);

        let mut parts = start();
        let mut found = draw(&mut parts, Generate::greedy(5));
        found.extend(draw(&mut parts, Generate::greedy(0)));
        // Stopped by dropping the iterator.
        let tokens = parts.generate(Generate::greedy(100)).unwrap();
        found.extend(tokens.take(6).map(|t| t.unwrap()));
        found.extend(draw(&mut parts, Generate::greedy(3)));
        assert_eq!(found, expected);
        assert_eq!(parts.tokens(), whole.tokens());
        assert_eq!(parts.tokens()[..50], text(50));
        assert_eq!(parts.tokens()[50..], expected);
        // Every token but the last has been read.
        assert_eq!(parts.cache().seen(), 63);
        assert_eq!(self::positions(&parts), self::positions(&whole));
    }
}

#[test]
fn greedy_text_is_the_most_likely_one() {
    let model = model();
    let mut session = session(&model, full());
    session.prefill(&text(30), &PREFILL).unwrap();
    let tokens = draw(&mut session, Generate::greedy(10));
    let mut ids = text(30);
    for token in tokens {
        let logits = naive(&model, &ids).pop().unwrap();
        assert_eq!(argmax(&logits), Some(token as usize));
        ids.push(token);
    }
}

#[test]
fn a_stop_token_is_the_last_one() {
    let model = model();
    let start = || {
        let mut session = session(&model, tight());
        session.prefill(&text(50), &PREFILL).unwrap();
        session
    };
    let sampling = Sampling {
        temperature: 1.0,
        seed: 5,
        ..Sampling::greedy()
    };
    let generate = |n| Generate::greedy(n).sampling(sampling);
    let all = draw(&mut start(), generate(20));
    let stop = all[7];
    let first = all.iter().position(|t| *t == stop).unwrap();
    let mut session = start();
    let mut tokens = session
        .generate(generate(20).stop_at([stop, 1000]))
        .unwrap();
    let found: Vec<u32> = tokens.by_ref().map(|t| t.unwrap()).collect();
    assert_eq!(found, all[..=first]);
    assert!(tokens.next().is_none());
    // Another seed, another text.
    let other = Sampling {
        seed: 6,
        ..sampling
    };
    assert_ne!(
        draw(&mut start(), Generate::greedy(20).sampling(other)),
        all
    );
}

#[test]
fn a_repetition_penalty_sees_the_prompt_and_the_text() {
    let model = model();
    let mut session = session(&model, full());
    session.prefill(&text(30), &PREFILL).unwrap();
    let strong = Sampling {
        repetition_penalty: 100.0,
        ..Sampling::greedy()
    };
    let prompt = text(30);
    let fresh: Vec<u32> = (0..61).filter(|id| !prompt.contains(id)).collect();
    let tokens = draw(
        &mut session,
        Generate::greedy(fresh.len() / 2).sampling(strong),
    );
    let mut unique = tokens.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), tokens.len());
    assert!(tokens.iter().all(|t| fresh.contains(t)), "{tokens:?}");
}

#[test]
fn the_last_generated_token_is_read_with_the_next_prompt() {
    let model = model();
    let tap = Arc::new(Tap::new(model.clone()));
    let mut session =
        Session::with_options(tap.clone(), Arc::new(full()), CacheOptions::default()).unwrap();
    let ids = text(60);
    session.prefill(&ids[..20], &PREFILL).unwrap();
    assert!(session.logits().is_some());
    let first = draw(&mut session, Generate::greedy(3));
    assert!(session.logits().is_none(), "the last token was not read");
    assert_eq!((session.cache().seen(), session.tokens().len()), (22, 23));
    session.prefill(&ids[20..40], &PREFILL).unwrap();
    assert_eq!((session.cache().seen(), session.tokens().len()), (43, 43));
    // Nothing is pending now.
    session.prefill(&ids[40..], &PREFILL).unwrap();
    let whole = [&ids[..20], &first, &ids[20..]].concat();
    assert_eq!(session.tokens(), whole);
    let read: Vec<u32> = tap.passes().iter().flat_map(|p| p.ids.clone()).collect();
    assert_eq!(read, whole);
    let expected = naive(&model, &whole).pop().unwrap();
    assert_close(session.logits().unwrap(), &expected, 1e-3);
    let report = session.report();
    assert_eq!((report.prefill_tokens, report.decode_tokens), (61, 2));
    assert!(report.prefill_rate() > 0.0 && report.decode_rate() > 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_full_cache_gives_the_same_however_a_text_is_cut(
        cuts in prop::collection::vec((1usize..40, 1usize..50, 0usize..50), 1..5),
        compact in any::<bool>(),
    ) {
        let model = model();
        let policy = Everything {
            positions: if compact { Positions::Compact } else { Positions::Original },
            ..full()
        };
        let mut session = session(&model, policy);
        let all = text(200);
        let expected = naive(&model, &all);
        let mut at = 0;
        for (tokens, chunk, local) in cuts {
            let prefill = Prefill::new(chunk, local);
            session.prefill(&all[at..at + tokens], &prefill).unwrap();
            at += tokens;
            assert_close(session.logits().unwrap(), &expected[at - 1], 1e-3);
        }
        prop_assert_eq!(session.tokens(), &all[..at]);
    }

    #[test]
    fn scores_are_those_of_the_naive_version(
        prompt in 1usize..40,
        generated in 0usize..3,
        scored in 0usize..150,
        more in 0usize..80,
    ) {
        let model = model();
        let mut session = session(&model, full());
        let all = text(300);
        session.prefill(&all[..prompt], &PREFILL).unwrap();
        let mut whole = all[..prompt].to_vec();
        whole.extend(draw(&mut session, Generate::greedy(generated)));
        for part in [&all[50..50 + scored], &all[220..220 + more]] {
            let start = whole.len();
            whole.extend_from_slice(part);
            let scores = session.score(part).unwrap();
            let logits = naive(&model, &whole);
            prop_assert_eq!(scores.len(), part.len());
            for (i, score) in scores.iter().enumerate() {
                let expected = TokenScore::of(&logits[start + i - 1], part[i]).unwrap();
                prop_assert!((score.nll - expected.nll).abs() < 1e-3);
                prop_assert_eq!(score.top, expected.top);
            }
            prop_assert_eq!(session.tokens(), &whole[..]);
            prop_assert_eq!(session.cache().seen(), whole.len());
        }
        // And it goes on from there.
        let expected = naive(&model, &whole).pop().unwrap();
        assert_close(session.logits().unwrap(), &expected, 1e-3);
    }
}

#[test]
fn scoring_evicts_nothing() {
    let model = model();
    let mut session = session(&model, tight());
    session.prefill(&text(50), &PREFILL).unwrap();
    let before = session.cache().len(0, 0);
    session.score(&text(70)).unwrap();
    assert_eq!(session.cache().len(0, 0), before + 70);
}

#[test]
fn with_surprisal_scores_and_text_are_the_same() {
    let model = model();
    let roomy = || Evict::new(Surprise, Budget::Units(1000));
    let (mut a, mut b) = (session(&model, roomy()), session(&model, full()));
    for session in [&mut a, &mut b] {
        session.prefill(&text(90), &PREFILL).unwrap();
    }
    assert_close(a.logits().unwrap(), b.logits().unwrap(), 1e-4);
    let generate = || Generate::greedy(7);
    assert_eq!(draw(&mut a, generate()), draw(&mut b, generate()));
    let (x, y) = (a.score(&text(80)).unwrap(), b.score(&text(80)).unwrap());
    for (x, y) in x.iter().zip(&y) {
        assert!((x.nll - y.nll).abs() < 1e-3 && x.top == y.top);
    }
}

#[test]
fn chunks_are_reported_in_order_and_the_tail_is_not_evicted() {
    let model = model();
    let mut session = session(&model, tight());
    let mut seen = Vec::new();
    let prefill = Prefill::new(16, 20);
    session
        .prefill_with(&text(60), &prefill, &mut |done| {
            assert_eq!(done.tokens, 60);
            assert_eq!(done.cache.seen(), done.done);
            let units = done.cache.len(1, 0);
            seen.push((done.index, done.done, done.phase, units));
            Ok(())
        })
        .unwrap();
    let body = |last| Phase::Prefill { last };
    assert_eq!(
        seen,
        [
            (0, 16, body(false), 12),
            (1, 32, body(false), 12),
            (2, 40, body(true), 12),
            (3, 56, Phase::Tail, 28),
            (4, 60, Phase::Tail, 32),
        ]
    );
    // Before the next prompt's first chunk, the budget holds again.
    let mut first = None;
    session
        .prefill_with(&text(3), &Prefill::default(), &mut |done| {
            first.get_or_insert(done.cache.len(1, 0));
            Ok(())
        })
        .unwrap();
    assert_eq!(first, Some(15));
}

#[test]
fn a_prompt_that_is_all_tail_keeps_everything() {
    let model = model();
    let mut session = session(&model, tight());
    let prefill = Prefill::new(7, 100);
    session.prefill(&text(40), &prefill).unwrap();
    assert_eq!(session.cache().len(0, 1), 40);
    let expected = naive(&model, &text(40)).pop().unwrap();
    assert_close(session.logits().unwrap(), &expected, 1e-3);
}

#[test]
fn bad_input_is_refused_and_changes_nothing() {
    let model = model();
    let mut session = session(&model, tight());
    let refused = |session: &mut Session| {
        let empty = session.prefill(&[], &PREFILL).unwrap_err();
        assert!(matches!(empty, Error::EmptyPrompt), "{empty}");
        let mut ids = text(20);
        ids[13] = 61;
        for error in [
            session.prefill(&ids, &PREFILL).unwrap_err(),
            session
                .prefill(&[&text(13)[..], &[61]].concat(), &PREFILL)
                .unwrap_err(),
        ] {
            assert!(
                matches!(
                    error,
                    Error::UnknownToken {
                        id: 61,
                        index: 13,
                        vocab: 61
                    }
                ),
                "{error}"
            );
        }
        let chunk = Prefill::new(0, 0);
        let error = session.prefill(&text(20), &chunk).unwrap_err();
        assert!(
            matches!(error, Error::Setting { what: "chunk", .. }),
            "{error}"
        );
        let error = session.score(&[3, u32::MAX]).unwrap_err();
        assert!(
            matches!(error, Error::UnknownToken { index: 1, .. }),
            "{error}"
        );
    };
    refused(&mut session);
    assert!(session.cache().is_empty() && session.tokens().is_empty());
    for error in [
        session.generate(Generate::greedy(1)).map(drop).unwrap_err(),
        session.score(&[1]).map(drop).unwrap_err(),
        session.score(&[]).map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, Error::EmptyPrompt), "{error}");
    }
    session.prefill(&text(50), &PREFILL).unwrap();
    let hot = Sampling {
        temperature: -1.0,
        ..Sampling::greedy()
    };
    let error = session
        .generate(Generate::greedy(1).sampling(hot))
        .map(drop);
    assert!(matches!(
        error,
        Err(Error::Setting {
            what: "temperature",
            ..
        })
    ));
    let drawn = draw(&mut session, Generate::greedy(2));
    refused(&mut session);
    // The token that was drawn last is still waiting.
    assert_eq!(session.tokens(), [text(50), drawn].concat());
    let mut other = self::session(&model, tight());
    other.prefill(&text(50), &PREFILL).unwrap();
    draw(&mut other, Generate::greedy(2));
    let next = |s: &mut Session| draw(s, Generate::greedy(5));
    assert_eq!(next(&mut session), next(&mut other));
}

#[test]
fn a_caller_can_stop_between_chunks_and_go_on() {
    let model = model();
    let ids = text(70);
    let policies: [fn() -> Arc<dyn KvCachePolicy>; 2] = [
        || Arc::new(full()),
        || Arc::new(Evict::new(Surprise, Budget::Units(1000))),
    ];
    for (policy, at) in policies.iter().flat_map(|p| [(p, 0), (p, 2)]) {
        let mut session = Session::new(model.clone(), policy()).unwrap();
        session.prefill(&ids[..10], &PREFILL).unwrap();
        draw(&mut session, Generate::greedy(1));
        let error = session
            .prefill_with(&ids[10..], &PREFILL, &mut |done| {
                if done.index == at {
                    return Err(Error::Device("the user wants to stop".into()));
                }
                Ok(())
            })
            .unwrap_err();
        assert!(matches!(error, Error::Device(_)), "{error}");
        let read = 16 * (at + 1);
        assert_eq!(session.cache().seen(), 10 + read);
        assert_eq!(session.tokens().len(), 10 + read);
        assert!(session.logits().is_none());
        // The logits of the prompt before must not become the next token.
        for error in [
            session.generate(Generate::greedy(1)).map(drop).unwrap_err(),
            session.score(&[1]).map(drop).unwrap_err(),
            session.fork().unwrap().score(&[1]).map(drop).unwrap_err(),
        ] {
            assert!(matches!(error, Error::EmptyPrompt), "{error}");
        }
        session.prefill(&ids[10 + read - 1..], &PREFILL).unwrap();
        let expected = naive(&model, session.tokens()).pop().unwrap();
        assert_eq!(session.tokens().len(), 71);
        assert_close(session.logits().unwrap(), &expected, 1e-3);
    }
}

#[test]
fn a_fork_has_the_waiting_token_too() {
    let model = model();
    let mut session = session(&model, tight());
    session.prefill(&text(50), &PREFILL).unwrap();
    let start = draw(&mut session, Generate::greedy(4));
    let mut fork = session.fork().unwrap();
    let (a, b) = (
        draw(&mut session, Generate::greedy(6)),
        draw(&mut fork, Generate::greedy(6)),
    );
    assert_eq!(a, b);
    assert_eq!(session.tokens(), [text(50), start, a].concat());
    assert_eq!(positions(&session), positions(&fork));
    let at_fork = session.report();
    fork.prefill(&text(40), &PREFILL).unwrap();
    assert_eq!(session.report(), at_fork);
}

#[test]
fn scores_at_birth_do_not_depend_on_what_is_evicted() {
    // In the first layer a score depends on the token alone; in the others on what was attended.
    let mut one = spec();
    one.layers = 1;
    let model = model_of(one);
    let births = |policy: Evict<Birth>, chunk: usize, local: usize| {
        let mut session = session(&model, policy);
        let mut births = Births::default();
        let prefill = Prefill::new(chunk, local);
        session
            .prefill_watched(&text(60), &prefill, &mut births)
            .unwrap();
        let tokens = session.generate(Generate::greedy(3)).unwrap();
        assert_eq!(tokens.watched(&mut births).count(), 3);
        session
            .prefill_watched(&text(20), &prefill, &mut births)
            .unwrap();
        (births.scores().to_vec(), session)
    };
    let (all, full) = births(Evict::new(Birth, Budget::Units(1000)), 200, 0);
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].len(), 2);
    for (chunk, local) in [(7, 3), (16, 0), (1, 0), (30, 60)] {
        let (some, session) = births(
            Evict::new(Birth, Budget::Units(9)).stabilizers(3),
            chunk,
            local,
        );
        // The same text was generated only if eviction did not change it.
        let tokens = session.tokens();
        assert_eq!(tokens.len(), 83);
        for (head, scores) in some[0].iter().enumerate() {
            assert_eq!(scores.len(), 83);
            for (at, score) in scores.iter().enumerate() {
                if tokens[at] == full.tokens()[at] {
                    assert!((score - all[0][head][at]).abs() < 1e-4, "{at}");
                }
            }
            // What is carried is what was born.
            let cache = session.cache();
            let held = cache.positions(0, head).iter().zip(cache.scores(0, head));
            assert!(held.clone().count() > 0);
            for (position, score) in held {
                assert_eq!(*score, scores[*position as usize]);
            }
        }
    }
}

#[test]
fn a_fork_can_go_on_under_another_policy() {
    let model = model();
    let mut session = session(&model, tight());
    session.prefill(&text(50), &PREFILL).unwrap();
    let mut fork = session.fork().unwrap();
    let tighter = Arc::new(Evict::new(Newest, Budget::Units(5)));
    fork.cache_mut().set_policy(tighter).unwrap();
    for session in [&mut session, &mut fork] {
        session.prefill(&text(40), &PREFILL).unwrap();
    }
    assert_eq!((session.cache().len(0, 0), fork.cache().len(0, 0)), (16, 9));
    let compact = Evict::new(Newest, Budget::Units(5)).with_positions(Positions::Compact);
    let error = fork.cache_mut().set_policy(Arc::new(compact)).unwrap_err();
    assert!(matches!(error, Error::Setting { .. }), "{error}");
}

#[test]
fn a_policy_that_needs_scores_is_refused_by_units_without_them() {
    let birth = |budget| Arc::new(Evict::new(Birth, Budget::Units(budget)));
    let model = model();
    let mut plain = session(&model, tight());
    // Nothing has been read: any policy can begin.
    plain.cache_mut().set_policy(birth(16)).unwrap();
    plain.cache_mut().set_policy(Arc::new(tight())).unwrap();
    plain.prefill(&text(50), &PREFILL).unwrap();
    for policy in [
        birth(5) as Arc<dyn KvCachePolicy>,
        Arc::new(Evict::new(Attended, Budget::Units(5))),
    ] {
        let error = plain.cache_mut().set_policy(policy).unwrap_err();
        assert!(matches!(error, Error::Setting { .. }), "{error}");
        assert!(error.to_string().contains("units have none"), "{error}");
    }
    // It is as it was, and goes on.
    assert_eq!(plain.cache().policy().name(), tight().name());
    plain.prefill(&text(40), &PREFILL).unwrap();

    let mut scored = Session::new(model, birth(16)).unwrap();
    scored.prefill(&text(50), &PREFILL).unwrap();
    let mut fork = scored.fork().unwrap();
    // Scores of another kind are no scores.
    let other = Arc::new(Evict::new(Attended, Budget::Units(5)));
    let error = fork.cache_mut().set_policy(other).unwrap_err();
    assert!(error.to_string().contains("those of birth"), "{error}");
    // The same kind with another budget is what would have been read with it from here on.
    fork.cache_mut().set_policy(birth(9)).unwrap();
    fork.prefill(&text(40), &PREFILL).unwrap();
    assert_eq!(fork.cache().scores(0, 0).len(), fork.cache().len(0, 0));
    // A policy without scores may come between, as long as nothing is read under it.
    fork.cache_mut().set_policy(Arc::new(tight())).unwrap();
    fork.cache_mut().set_policy(birth(9)).unwrap();
    fork.cache_mut().set_policy(Arc::new(tight())).unwrap();
    fork.prefill(&text(4), &PREFILL).unwrap();
    let error = fork.cache_mut().set_policy(birth(9)).unwrap_err();
    assert!(error.to_string().contains("units have none"), "{error}");
}

#[test]
fn sessions_of_one_policy_do_not_know_each_other() {
    let model = model();
    let policy: Arc<dyn KvCachePolicy> = Arc::new(Evict::new(Attended, Budget::Units(10)));
    let new = || {
        let tap = Arc::new(Tap::new(model.clone()));
        let session = Session::with_options(tap.clone(), policy.clone(), CacheOptions::default());
        (tap, session.unwrap())
    };
    let other: Vec<u32> = text(80).into_iter().rev().collect();
    let ((tap, mut a), (_, mut b)) = (new(), new());
    for i in 0..4 {
        a.prefill(&text(80)[20 * i..20 * (i + 1)], &PREFILL)
            .unwrap();
        b.prefill(&other[20 * i..20 * (i + 1)], &PREFILL).unwrap();
    }
    let (alone, mut c) = new();
    for i in 0..4 {
        c.prefill(&text(80)[20 * i..20 * (i + 1)], &PREFILL)
            .unwrap();
    }
    let passes: Vec<Tapped> = tap.passes();
    assert_eq!(passes, alone.passes());
    assert_eq!(positions(&a), positions(&c));
    assert_ne!(positions(&a), positions(&b));
    // A window is one, wherever it is read.
    let mut window = session(&model, Evict::new(Newest, Budget::Units(5)));
    window.prefill(&text(40), &Prefill::new(8, 0)).unwrap();
    assert_eq!(window.cache().positions(0, 0), [35, 36, 37, 38, 39]);
}
