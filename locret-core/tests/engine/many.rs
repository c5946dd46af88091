//! Sequences of a batch are what each of them is alone, whoever comes and goes beside it.

use crate::{
    model,
    policies::{Attended, Birth, Coded, Everything, KeyNorm, Logits, Newest, Ragged, Surprise},
    text,
};
use locret_core::{
    Batch, Batcher, Budget, BudgetTable, CacheOptions, CausalLm, ChunkDone, DType, Decided,
    DecodeEviction, End, Ended, Error, Event, Evict, Generate, KvCachePolicy, LayerUnits, Limits,
    Positions, Prefill, PrefixCache, Probe, QuantLayout, Quantization, Request, Result, Sampling,
    Scorer, SequenceId, Session, Share, SnapshotError, SnapshotStore, Step, Stored, Verdict,
    conformance::RandomModel,
};
use proptest::prelude::*;
use std::{
    collections::HashMap,
    io::Write,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

/// What one sequence is asked to do; everything follows from a number.
#[derive(Debug, Clone)]
struct Case {
    prompt: Vec<u32>,
    policy: Arc<dyn KvCachePolicy>,
    prefill: Prefill,
    options: CacheOptions,
    generate: Generate,
}

fn codes(layout: QuantLayout) -> Quantization {
    Quantization {
        layout,
        group: 8,
        residual: 8,
        ..Quantization::default()
    }
}

fn evict<S: Scorer + 'static>(scorer: S, n: usize) -> Arc<dyn KvCachePolicy> {
    let positions = match n % 2 {
        0 => Positions::Original,
        _ => Positions::Compact,
    };
    let policy = Evict::new(scorer, Budget::Units(6 + n % 17)).with_positions(positions);
    let policy = match n % 5 {
        1 => policy.share(Share::Model),
        2 => policy.ada(0.1),
        3 => policy.table(BudgetTable::new(vec![vec![0.3], vec![1.4]]).unwrap()),
        _ => policy,
    };
    Arc::new(match n % 3 {
        0 => policy.while_decoding(DecodeEviction::Every(2)),
        _ => policy,
    })
}

fn case(n: usize) -> Case {
    let policy = match n % 8 {
        0 => evict(KeyNorm, n / 8),
        1 => evict(Birth, n / 8),
        2 => evict(Surprise, n / 8),
        3 => evict(Attended, n / 8),
        4 => evict(Logits, n / 8),
        5 => evict(Newest, n / 8),
        6 => Arc::new(Everything::default()),
        _ => Arc::new(Ragged {
            limit: 12 + n % 9,
            positions: Positions::Compact,
        }),
    };
    let policy = match n % 5 {
        3 => Arc::new(Coded(policy, codes(QuantLayout::PerToken))),
        4 => Arc::new(Coded(policy, codes(QuantLayout::Kivi))),
        _ => policy,
    };
    let start = n * 37 % 500;
    let length = 1 + n * 29 % 97;
    let generate = Generate::greedy(n * 7 % 13).stop_at([n as u32 % 61]);
    let sampling = Sampling {
        temperature: 0.9,
        seed: n as u64,
        ..Sampling::greedy()
    };
    Case {
        prompt: text(start + length)[start..].to_vec(),
        policy,
        prefill: Prefill::new(1 + n * 5 % 24, n * 3 % 9),
        options: CacheOptions::new().dtype([DType::F32, DType::F16, DType::BF16][n / 3 % 3]),
        generate: match n % 4 {
            3 => generate.sampling(sampling),
            _ => generate,
        },
    }
}

impl Case {
    fn request(&self) -> Request {
        Request::new(self.prompt.clone(), self.policy.clone())
            .prefill(self.prefill)
            .cache(self.options)
            .generate(self.generate.clone())
            .keep()
    }

    /// The session of this case alone, and what it generated.
    fn alone(&self, model: &Arc<RandomModel>) -> (Session, Vec<u32>) {
        let model: Arc<dyn CausalLm> = model.clone();
        let mut session = Session::with_options(model, self.policy.clone(), self.options).unwrap();
        session.prefill(&self.prompt, &self.prefill).unwrap();
        let tokens = session.generate(self.generate.clone()).unwrap();
        let tokens = tokens.collect::<Result<_>>().unwrap();
        (session, tokens)
    }
}

/// What was heard of a sequence.
#[derive(Debug, Default)]
struct Heard {
    read: Vec<usize>,
    tokens: Vec<u32>,
    ended: Option<Ended>,
}

type Ear = Arc<Mutex<Heard>>;

fn submit(batch: &mut Batch, request: Request) -> (SequenceId, Ear) {
    let ear = Ear::default();
    let sink = ear.clone();
    let id = batch.submit(
        request,
        Box::new(move |event| {
            let mut heard = sink.lock().unwrap();
            assert!(heard.ended.is_none(), "nothing comes after the end");
            match event {
                Event::Read { done, .. } => {
                    assert!(heard.tokens.is_empty(), "the prompt comes first");
                    heard.read.push(done);
                }
                Event::Token(id) => heard.tokens.push(id),
                Event::Ended(ended) => heard.ended = Some(*ended),
                other => panic!("{other:?}"),
            }
        }),
    );
    (id.unwrap(), ear)
}

fn take(ear: &Ear) -> Heard {
    std::mem::take(&mut ear.lock().unwrap())
}

/// Steps until nothing is left; memory is never more than promised, and never promised twice.
fn run(batch: &mut Batch) {
    while batch.step() {
        let load = batch.load();
        assert!(load.kv_bytes <= load.promised, "{load:?}");
        assert!(load.promised <= batch.limits().memory, "{load:?}");
    }
}

fn batch(model: &Arc<RandomModel>, limits: Limits) -> Batch {
    Batch::new(model.clone(), limits).unwrap()
}

fn check(model: &Arc<RandomModel>, case: &Case, heard: Heard) {
    let (alone, tokens) = case.alone(model);
    let ended = heard.ended.unwrap();
    assert!(
        matches!(ended.end, End::Length | End::Stop),
        "{case:?}: {:?}",
        ended.end
    );
    assert_eq!(heard.tokens, tokens, "{case:?}");
    let kept = ended.session.unwrap();
    assert_eq!(kept.tokens(), alone.tokens());
    assert_eq!(
        crate::positions(&kept),
        crate::positions(&alone),
        "{case:?}"
    );
    assert_eq!(kept.cache().peak(), alone.cache().peak(), "{case:?}");
    assert_eq!(heard.read.last(), Some(&case.prompt.len()));
    match (kept.logits(), alone.logits()) {
        (Some(found), Some(due)) => crate::assert_close(found, due, 1e-5),
        (found, due) => assert_eq!(found.is_some(), due.is_some()),
    }
}

#[test]
fn sixty_four_sequences_are_what_each_is_alone() {
    let model = model();
    let mut batch = batch(&model, Limits::new().running(64).rows(48));
    let cases: Vec<Case> = (0..64).map(case).collect();
    let ears: Vec<Ear> = cases
        .iter()
        .map(|case| submit(&mut batch, case.request()).1)
        .collect();
    run(&mut batch);
    assert_eq!(batch.load().ended, 64);
    for (case, ear) in cases.iter().zip(&ears) {
        check(&model, case, take(ear));
    }
    assert_eq!(batch.load().promised, 0);
}

/// Bytes that are enough for any case alone.
const ROOM: usize = 100_000;

#[test]
fn a_promise_is_enough() {
    let model = model();
    let mut front = batch(&model, Limits::new().memory(1));
    for n in 0..400 {
        let case = case(n);
        let needed = match front.submit(case.request(), Box::new(|_| {})) {
            Err(Error::Memory { needed, .. }) => needed,
            other => panic!("{other:?}"),
        };
        assert!(needed <= ROOM, "{n}: {needed}");
        // With nothing beyond it, so that none can be taken when it is too low.
        let mut batch = batch(&model, Limits::new().memory(needed));
        let (_, ear) = submit(&mut batch, case.request());
        run(&mut batch);
        check(&model, &case, take(&ear));
    }
}

#[derive(Debug, Clone)]
enum Act {
    Submit(usize),
    Step(usize),
    Cancel(usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        3 => (0..400usize).prop_map(Act::Submit),
        4 => (1..9usize).prop_map(Act::Step),
        1 => (0..40usize).prop_map(Act::Cancel),
    ];
    prop::collection::vec(act, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn whoever_comes_and_goes_the_others_get_their_tokens(
        acts in acts(),
        running in 1..10usize,
        rows in 1..64usize,
        memory in ROOM..400_000usize,
    ) {
        let model = model();
        let limits = Limits::new().running(running).rows(rows).memory(memory).waiting(64);
        let mut batch = batch(&model, limits);
        let mut all: Vec<(Case, SequenceId, Ear, bool)> = Vec::new();
        for act in acts {
            match act {
                Act::Submit(n) => {
                    let case = case(n);
                    let (id, ear) = submit(&mut batch, case.request());
                    all.push((case, id, ear, false));
                }
                Act::Step(n) => {
                    for _ in 0..n {
                        batch.step();
                        // Sessions that were kept take their memory from those that wait.
                        for (case, _, ear, cancelled) in &all {
                            let ended = ear.lock().unwrap().ended.is_some();
                            if ended && !cancelled {
                                check(&model, case, take(ear));
                            } else if ended {
                                take(ear);
                            }
                        }
                        let load = batch.load();
                        prop_assert!(load.kv_bytes <= load.promised && load.promised <= memory);
                    }
                }
                Act::Cancel(at) => {
                    if let Some((_, id, ear, cancelled)) = all.get_mut(at)
                        && batch.cancel(*id)
                    {
                        *cancelled = true;
                        let heard = take(ear);
                        prop_assert!(matches!(heard.ended.unwrap().end, End::Cancelled));
                    }
                }
            }
            all.retain(|(_, _, ear, cancelled)| {
                let heard = ear.lock().unwrap();
                !(*cancelled || heard.read.is_empty() && Arc::strong_count(ear) == 1)
            });
        }
        loop {
            let more = batch.step();
            all.retain(|(case, _, ear, _)| {
                let ended = ear.lock().unwrap().ended.is_some();
                if ended {
                    check(&model, case, take(ear));
                }
                !ended
            });
            if !more && batch.load().waiting == 0 {
                break;
            }
        }
        prop_assert_eq!(all.len(), 0);
        prop_assert_eq!(batch.load().promised, 0);
    }
}

/// Goes wrong in some step of some layer.
#[derive(Debug)]
struct Wrong {
    panics: bool,
    seen: usize,
    at_once: bool,
}

impl KvCachePolicy for Wrong {
    fn name(&self) -> String {
        "wrong".into()
    }
    fn needs(&self) -> locret_core::Needs {
        match self.at_once {
            true => locret_core::Needs::NOTHING.all_layers(),
            false => locret_core::Needs::NOTHING,
        }
    }
    fn step(&self, at: &Step, _: &LayerUnits<'_>) -> Result<Verdict> {
        match at.seen >= self.seen && at.layer.index == 1 {
            true if self.panics => panic!("out of order"),
            true => Err(Error::policy("wrong", "out of order")),
            false => Ok(Verdict::keep_all()),
        }
    }
}

#[test]
fn what_goes_wrong_in_one_sequence_stays_there() {
    let model = model();
    for seen in [0, 7, 40] {
        for (panics, at_once) in [(true, false), (true, true), (false, false), (false, true)] {
            let mut batch = batch(&model, Limits::new().rows(64));
            let wrong = Wrong {
                panics,
                seen,
                at_once,
            };
            let good: Vec<Case> = (0..6).map(|n| case(n * 11 + 1)).collect();
            let mut ears = Vec::new();
            for case in &good[..3] {
                ears.push(submit(&mut batch, case.request()).1);
            }
            let request = Request::new(text(40), Arc::new(wrong))
                .prefill(Prefill::new(7, 2))
                .generate(Generate::greedy(10))
                .keep();
            let (_, bad) = submit(&mut batch, request);
            for case in &good[3..] {
                ears.push(submit(&mut batch, case.request()).1);
            }
            run(&mut batch);
            let ended = take(&bad).ended.unwrap();
            assert!(ended.session.is_none());
            match ended.end {
                End::Failed(Error::Panicked(text)) if panics => assert_eq!(text, "out of order"),
                End::Failed(Error::Policy { .. }) if !panics => {}
                other => panic!("{other:?}"),
            }
            for (case, ear) in good.iter().zip(&ears) {
                check(&model, case, take(ear));
            }
            assert_eq!(batch.load().promised, 0);
        }
    }
}

/// A probe that has had enough, in one way or another.
struct Enough {
    chunks: usize,
    panics: bool,
}

impl Probe for Enough {
    fn chunk(&mut self, done: &ChunkDone<'_>) -> Result<()> {
        match done.index == self.chunks {
            true if self.panics => panic!("enough"),
            true => Err(Error::Device("enough".into())),
            false => Ok(()),
        }
    }
    fn decided(&mut self, _: &Decided<'_>) -> Result<()> {
        Ok(())
    }
}

#[test]
fn probes_and_listeners_end_their_own_sequence_at_most() {
    let model = model();
    let mut batch = batch(&model, Limits::new());
    let case = case(9);
    let (_, good) = submit(&mut batch, case.request());
    let mut bad = Vec::new();
    for panics in [true, false] {
        let probe = Box::new(Enough { chunks: 1, panics });
        let request = Request::new(text(30), case.policy.clone()).prefill(Prefill::new(8, 0));
        bad.push(submit(&mut batch, request.watched(probe)).1);
    }
    let deaf = Request::new(text(30), case.policy.clone()).generate(Generate::greedy(3));
    batch.submit(deaf, Box::new(|_| panic!("deaf"))).unwrap();
    run(&mut batch);
    for ear in &bad {
        let heard = take(ear);
        assert!(matches!(heard.ended.unwrap().end, End::Failed(_)));
        assert!(heard.tokens.is_empty());
    }
    check(&model, &case, take(&good));
    assert_eq!((batch.load().ended, batch.load().promised), (4, 0));
}

#[test]
fn a_long_prompt_holds_nobody_up_for_longer_than_a_chunk() {
    let model = model();
    let mut batch = batch(&model, Limits::new().rows(16));
    let policy: Arc<dyn KvCachePolicy> = Arc::new(Everything::default());
    let request = |tokens, generated| {
        Request::new(text(tokens), policy.clone())
            .prefill(Prefill::new(16, 4))
            .generate(Generate::greedy(generated))
    };
    let (_, talking) = submit(&mut batch, request(5, 60));
    while talking.lock().unwrap().tokens.is_empty() {
        batch.step();
    }
    let (_, long) = submit(&mut batch, request(400, 1));
    for _ in 0..5 {
        let before = talking.lock().unwrap().tokens.len();
        batch.step();
        // A token in every pass, and no pass has more than one chunk.
        assert_eq!(talking.lock().unwrap().tokens.len(), before + 1);
    }
    assert_eq!(long.lock().unwrap().read, [16, 32, 48, 64, 80]);
    // Whoever comes now with a short prompt reads first.
    let (_, short) = submit(&mut batch, request(12, 1));
    let before = batch.load().read;
    while short.lock().unwrap().tokens.is_empty() {
        batch.step();
    }
    assert!(batch.load().read - before <= 2 * 16);
    // But a stream of short ones does not keep the long one from going on.
    let at = long.lock().unwrap().read.len();
    for _ in 0..40 {
        submit(&mut batch, request(12, 1));
        batch.step();
    }
    assert!(long.lock().unwrap().read.len() >= at + 7);
    run(&mut batch);
    assert_eq!(take(&long).read.last(), Some(&400));
}

#[test]
fn conversations_go_on_from_where_they_were() {
    let model = model();
    let mut batch = batch(&model, Limits::new());
    for n in 0..24 {
        let case = case(n);
        let (mut alone, _) = case.alone(&model);
        let (_, ear) = submit(&mut batch, case.request());
        run(&mut batch);
        let kept = take(&ear).ended.unwrap().session.unwrap();
        assert!(batch.load().promised >= kept.cache().bytes());
        let further = text(200 + n)[180..].to_vec();
        alone.prefill(&further, &case.prefill).unwrap();
        let due = alone.generate(case.generate.clone()).unwrap();
        let due: Vec<u32> = due.collect::<Result<_>>().unwrap();
        let request = Request::resume(kept, further)
            .prefill(case.prefill)
            .generate(case.generate.clone())
            .keep();
        let (_, ear) = submit(&mut batch, request);
        run(&mut batch);
        let heard = take(&ear);
        assert_eq!(heard.tokens, due, "{case:?}");
        let kept = heard.ended.unwrap().session.unwrap();
        assert_eq!(kept.tokens(), alone.tokens());
        drop(kept);
        assert_eq!(batch.load().promised, 0, "{case:?}");
    }
}

#[test]
fn prefixes_are_prompts_of_their_own() {
    let model = model();
    let mut batch = batch(&model, Limits::new());
    for n in [1, 10, 22] {
        let case = case(n);
        let prefix = case.prompt.len() / 2;
        let mut alone =
            Session::with_options(model.clone(), case.policy.clone(), case.options).unwrap();
        let whole = Prefill::new(case.prefill.chunk, 0);
        alone.prefill(&case.prompt[..prefix], &whole).unwrap();
        alone
            .prefill(&case.prompt[prefix..], &case.prefill)
            .unwrap();
        let due = alone.generate(Generate::greedy(9)).unwrap();
        let due: Vec<u32> = due.collect::<Result<_>>().unwrap();
        let request = case.request().generate(Generate::greedy(9)).prefix(prefix);
        let (_, ear) = submit(&mut batch, request);
        run(&mut batch);
        let heard = take(&ear);
        assert_eq!(heard.tokens, due);
        assert_eq!(heard.read.last(), Some(&case.prompt.len()));
    }
}

#[test]
fn what_cannot_be_done_is_refused_before_it_gets_in_line() {
    let model = model();
    let policy: Arc<dyn KvCachePolicy> = Arc::new(Everything::default());
    let limits = Limits::new().waiting(2).memory(100_000);
    let mut all = batch(&model, limits);
    let request = |tokens: usize| Request::new(text(tokens), policy.clone());
    let quiet = || -> locret_core::Sink { Box::new(|_| {}) };
    let refused = |batch: &mut Batch, request| batch.submit(request, quiet()).unwrap_err();
    assert!(matches!(refused(&mut all, request(0)), Error::EmptyPrompt));
    let unknown = Request::new(vec![1, 61], policy.clone());
    let error = refused(&mut all, unknown);
    assert!(matches!(error, Error::UnknownToken { id: 61, .. }));
    let error = refused(&mut all, request(5).prefill(Prefill::new(0, 0)));
    assert!(matches!(error, Error::Setting { .. }));
    let error = refused(&mut all, request(5).prefix(5));
    assert!(matches!(error, Error::Setting { .. }));
    let sampling = Sampling {
        top_p: 2.0,
        ..Sampling::greedy()
    };
    let error = refused(&mut all, request(5).sampling(sampling));
    assert!(matches!(error, Error::Setting { .. }));
    // 256 bytes a unit of both heads, in two layers: 100,000 bytes are less than 200 tokens.
    let error = refused(&mut all, request(200));
    assert!(
        matches!(error, Error::Memory { left: 100_000, .. }),
        "{error}"
    );
    let error = refused(&mut all, request(5).generate(Generate::greedy(1_000_000)));
    assert!(matches!(error, Error::Memory { .. }), "{error}");
    submit(&mut all, request(5));
    submit(&mut all, request(5));
    let error = refused(&mut all, request(5));
    assert!(matches!(error, Error::QueueFull { limit: 2 }));
    all.step();
    submit(&mut all, request(5));
    run(&mut all);
    // A session of another batch.
    let (_, ear) = submit(&mut all, request(5).keep());
    run(&mut all);
    let kept = take(&ear).ended.unwrap().session.unwrap();
    let mut other = batch(&model, limits);
    let error = refused(&mut other, Request::resume(kept, text(3)));
    assert!(matches!(error, Error::Setting { .. }));
    assert_eq!(all.load().promised, 0);
    for limits in [
        Limits::new().running(0),
        Limits::new().waiting(0),
        Limits::new().rows(0),
    ] {
        assert!(Batch::new(model.clone(), limits).is_err());
    }
}

#[test]
fn memory_is_promised_in_the_order_of_the_queue_and_comes_back() {
    let model = model();
    let policy: Arc<dyn KvCachePolicy> = Arc::new(Everything::default());
    let request = |tokens: usize| {
        let generate = Generate::greedy(4);
        Request::new(text(tokens), policy.clone()).generate(generate)
    };
    let one = {
        let mut batch = batch(&model, Limits::new());
        submit(&mut batch, request(100));
        batch.step();
        batch.load().promised
    };
    let mut batch = batch(&model, Limits::new().memory(2 * one + one / 2));
    let ears: Vec<Ear> = (0..5)
        .map(|i| submit(&mut batch, request(if i == 3 { 10 } else { 100 })).1)
        .collect();
    batch.step();
    let load = batch.load();
    assert_eq!((load.running, load.waiting), (2, 3));
    // The fourth would fit, and waits for its turn.
    assert!(ears[3].lock().unwrap().read.is_empty());
    run(&mut batch);
    for ear in &ears {
        assert!(matches!(take(ear).ended.unwrap().end, End::Length));
    }
    assert_eq!(batch.load().promised, 0);
}

/// However unequal heads and layers become, what was promised before is enough.
#[test]
fn promises_are_kept_by_budgets_that_are_shared() {
    let model = model();
    for n in 0..40 {
        let mut policy = Evict::new(Birth, Budget::Units(5 + n % 11)).sinks(n % 3);
        policy = match n % 4 {
            0 => policy.ada(0.0),
            1 => policy.table(BudgetTable::new(vec![vec![2.0, 0.1], vec![0.0, 1.0]]).unwrap()),
            _ => policy.share(Share::Model).ada(0.0),
        };
        if n % 3 == 0 {
            policy = policy.while_decoding(DecodeEviction::Every(3));
        }
        let case = Case {
            prompt: text(150 + 13 * n),
            policy: Arc::new(policy.with_positions(Positions::Compact)),
            prefill: Prefill::new(1 + n * 5 % 24, n % 7),
            generate: Generate::greedy(70),
            ..case(n)
        };
        let mut batch = batch(&model, Limits::default());
        let kept = |batch: &mut Batch, request: Request| {
            let (_, ear) = submit(batch, request);
            assert!(batch.step());
            let promised = batch.load().promised;
            assert!(promised > 0);
            while batch.step() {
                assert!(batch.load().promised <= promised, "{case:?}");
            }
            take(&ear).ended.unwrap().session.unwrap()
        };
        let first = kept(&mut batch, case.request());
        let more = Request::resume(first, text(90)[9 + n..].to_vec());
        let more = more.prefill(case.prefill).generate(case.generate.clone());
        kept(&mut batch, more.keep());
        assert_eq!(batch.load().promised, 0);
    }
}

#[test]
fn a_batch_on_a_thread_of_its_own() {
    let model = model();
    let batcher = Batcher::new(model.clone(), Limits::new().running(5)).unwrap();
    let cases: Vec<Case> = (100..130).map(case).collect();
    std::thread::scope(|scope| {
        for cases in cases.chunks(10) {
            let (batcher, model) = (&batcher, &model);
            scope.spawn(move || {
                let handles: Vec<_> = cases
                    .iter()
                    .map(|case| batcher.submit(case.request()).unwrap())
                    .collect();
                for (case, handle) in cases.iter().zip(handles) {
                    let (tokens, ended) = handle.wait().unwrap();
                    assert_eq!(tokens, case.alone(model).1);
                    assert!(ended.session.is_some());
                }
            });
        }
    });
    // Endless ones end when nobody listens, when they are told to, and with the batch.
    let endless = || {
        let policy = evict(Newest, 0);
        Request::new(text(9), policy).generate(Generate::greedy(1 << 40))
    };
    let handle = batcher.submit(endless()).unwrap();
    let mut heard = handle.take(30);
    assert!(heard.any(|event| matches!(event, Event::Token(_))));
    drop(heard);
    let mut handle = batcher.submit(endless()).unwrap();
    handle.next();
    handle.cancel();
    assert!(matches!(handle.wait().unwrap().1.end, End::Cancelled));
    let last = batcher.submit(endless()).unwrap();
    batcher.close();
    assert!(matches!(batcher.submit(endless()), Err(Error::Closed)));
    drop(batcher);
    assert!(matches!(last.wait().unwrap().1.end, End::Cancelled));
    // One that is finished does what it was given.
    let batcher = Batcher::new(model.clone(), Limits::new()).unwrap();
    let handles: Vec<_> = cases
        .iter()
        .map(|case| batcher.submit(case.request()).unwrap())
        .collect();
    batcher.finish();
    for (case, handle) in cases.iter().zip(handles) {
        assert_eq!(handle.wait().unwrap().0, case.alone(&model).1);
    }
}

/// Snapshots in memory, which may refuse to keep them or lose them.
#[derive(Debug, Default)]
struct Shelf {
    kept: Mutex<HashMap<String, Vec<u8>>>,
    /// So often in a row it is full, before there is room.
    full: AtomicU64,
    loses: bool,
}

impl SnapshotStore for Shelf {
    fn put(&self, key: &str, write: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<()> {
        let left = |full: u64| full.checked_sub(1);
        if self
            .full
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, left)
            .is_ok()
        {
            return Err(SnapshotError::Damaged("no room".into()).into());
        }
        let mut bytes = Vec::new();
        write(&mut bytes)?;
        self.kept.lock().unwrap().insert(key.to_owned(), bytes);
        Ok(())
    }

    fn get(&self, key: &str) -> Result<Option<Stored>> {
        let bytes = self.kept.lock().unwrap().get(key).cloned();
        Ok(bytes.filter(|_| !self.loses).map(|bytes| Stored {
            length: bytes.len() as u64,
            from: Box::new(std::io::Cursor::new(bytes)),
        }))
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.kept.lock().unwrap().remove(key);
        Ok(())
    }
}

/// Sequences that take long, of all kinds, and a batch that has memory for two of them.
fn crowded(model: &Arc<RandomModel>, shelf: &Arc<Shelf>) -> (Batch, Vec<(Case, Ear)>) {
    let cases: Vec<Case> = (0..9)
        .map(|n| {
            let case = case(n);
            let generate = Generate::greedy(90 + 20 * n);
            let sampling = case.generate.sampling;
            Case {
                generate: generate.sampling(sampling),
                ..case
            }
        })
        .collect();
    let widest = |case: &Case| {
        let mut alone = batch(model, Limits::new());
        submit(&mut alone, case.request());
        alone.step();
        alone.load().promised
    };
    let memory = 2 * cases.iter().map(widest).max().unwrap();
    let limits = Limits::new().memory(memory).waiting(9);
    let mut batch = batch(model, limits).with_store(shelf.clone());
    let ears = cases.into_iter().map(|case| {
        let ear = submit(&mut batch, case.request()).1;
        (case, ear)
    });
    let ears = ears.collect();
    (batch, ears)
}

fn run_crowd(batch: &mut Batch, mut ended: impl FnMut()) {
    while batch.step() {
        let load = batch.load();
        assert!(load.kv_bytes <= load.promised && load.promised <= batch.limits().memory);
        ended();
    }
}

#[test]
fn sequences_that_take_turns_are_what_each_is_alone() {
    let model = model();
    let shelf = Arc::new(Shelf::default());
    let (mut batch, mut ears) = crowded(&model, &shelf);
    let mut checked = 0;
    run_crowd(&mut batch, || {
        ears.retain(|(case, ear)| {
            let there = ear.lock().unwrap().ended.is_some();
            if there {
                check(&model, case, take(ear));
                checked += 1;
            }
            !there
        });
    });
    assert_eq!(checked, 9);
    let load = batch.load();
    assert!(load.parked >= 7, "{load:?}");
    assert_eq!((load.promised, load.waiting), (0, 0));
    assert!(shelf.kept.lock().unwrap().is_empty());
}

#[test]
fn a_full_shelf_only_makes_others_wait_and_a_lost_one_costs_its_own_sequence() {
    let model = model();
    for (full, loses) in [(u64::MAX, false), (5, false), (0, true)] {
        let shelf = Shelf {
            full: full.into(),
            loses,
            ..Shelf::default()
        };
        let shelf = Arc::new(shelf);
        let (mut batch, mut ears) = crowded(&model, &shelf);
        let (mut lost, mut right) = (0, 0);
        run_crowd(&mut batch, || {
            ears.retain(|(case, ear)| {
                let mut heard = ear.lock().unwrap();
                let Some(ended) = heard.ended.take() else {
                    return true;
                };
                match ended.end {
                    End::Failed(Error::Snapshot(_)) if loses => lost += 1,
                    _ => {
                        heard.ended = Some(ended);
                        drop(heard);
                        check(&model, case, take(ear));
                        right += 1;
                    }
                }
                false
            });
        });
        assert_eq!(lost + right, 9);
        assert_eq!(lost > 0, loses);
        let load = batch.load();
        assert_eq!(load.promised, 0);
        // Whoever could not be put away is asked again when its turn has come again.
        assert_eq!(load.parked > 0, full < u64::MAX, "{load:?}");
        assert!(load.stayed >= full.min(6), "{load:?}");
        assert!(shelf.kept.lock().unwrap().is_empty());
    }
    // Whoever is away when it is cancelled leaves nothing behind.
    let shelf = Arc::new(Shelf::default());
    let (mut batch, ears) = crowded(&model, &shelf);
    while batch.load().parked == 0 {
        batch.step();
    }
    assert_eq!(shelf.kept.lock().unwrap().len(), 1);
    batch.cancel_all();
    assert!(shelf.kept.lock().unwrap().is_empty());
    for (_, ear) in ears {
        assert!(matches!(take(&ear).ended.unwrap().end, End::Cancelled));
    }
    assert_eq!(batch.load().promised, 0);
}

#[test]
fn a_prefix_is_read_once() {
    let model = model();
    let cache = Arc::new(PrefixCache::new(1 << 20));
    let limits = Limits::new().memory(3 << 20);
    let mut all = batch(&model, limits).with_prefixes(cache.clone()).unwrap();
    assert_eq!(all.load().promised, 1 << 20);
    let system = text(70);
    let prefill = Prefill::new(16, 3);
    for n in 0..8 {
        let policy = case(8 * (n + 1) + n).policy;
        let prompt = |i: usize| [system.clone(), text(200 + i)[190..].to_vec()].concat();
        let request = |i| {
            Request::new(prompt(i), policy.clone())
                .prefill(prefill)
                .generate(Generate::greedy(9))
                .prefix(70)
        };
        let alone = |i| {
            let mut alone =
                Session::with_options(model.clone(), policy.clone(), CacheOptions::new()).unwrap();
            alone.prefill(&system, &Prefill::new(16, 0)).unwrap();
            alone.prefill(&prompt(i)[70..], &prefill).unwrap();
            let due = alone.generate(Generate::greedy(9)).unwrap();
            due.collect::<Result<Vec<u32>>>().unwrap()
        };
        let before = all.load().read;
        // Three at once, of whom one reads; the first is cancelled, and the second has to read for itself.
        let (first, _) = submit(&mut all, request(0));
        let ears = [1, 2, 3].map(|i| (i, submit(&mut all, request(i)).1));
        all.step();
        assert!(all.cancel(first));
        run(&mut all);
        let mut shared = Vec::new();
        for (i, ear) in &ears {
            let heard = take(ear);
            assert_eq!(heard.tokens, alone(*i), "{policy:?}");
            assert_eq!(heard.read.last(), Some(&prompt(*i).len()));
            shared.push(heard.ended.unwrap().shared);
        }
        assert_eq!(shared, [0, 70, 70], "{policy:?}");
        let rest = |i: usize| prompt(i).len() - 70;
        let read = all.load().read - before;
        assert_eq!(read as usize, 16 + 70 + rest(1) + rest(2) + rest(3));
        // And whoever comes later finds it.
        let (_, ear) = submit(&mut all, request(4));
        run(&mut all);
        let heard = take(&ear);
        assert_eq!(heard.tokens, alone(4));
        assert_eq!(heard.ended.unwrap().shared, 70);
    }
    assert_eq!(all.load().promised, 1 << 20);
    drop(all);
    // Policies of other settings, and other texts, share nothing.
    assert!(cache.stats().entries >= 2);
    let small = batch(&model, Limits::new().memory(1000));
    assert!(matches!(
        small.with_prefixes(cache),
        Err(Error::Memory { .. })
    ));
}
