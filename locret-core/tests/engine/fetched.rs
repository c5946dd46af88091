//! Conversations that are elsewhere until there is memory for their next turn.

use crate::{
    model,
    policies::{KeyNorm, Newest},
    text,
};
use locret_core::{
    Batch, Budget, CacheOptions, CausalLm, End, Ended, Error, Event, Evict, Generate,
    KvCachePolicy, Limits, Prefill, Request, Session,
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

const PREFILL: Prefill = Prefill::new(8, 3);
const GENERATED: usize = 70;

fn policy(i: usize) -> Arc<dyn KvCachePolicy> {
    match i % 2 {
        0 => Arc::new(Evict::new(KeyNorm, Budget::Units(10))),
        _ => Arc::new(Evict::new(Newest, Budget::Units(14))),
    }
}

fn session(model: &Arc<dyn CausalLm>, i: usize) -> Session {
    let mut session = Session::with_options(model.clone(), policy(i), CacheOptions::new()).unwrap();
    session.prefill(&text(20 + 5 * i), &PREFILL).unwrap();
    // More than the budget, which the next turn brings it back to.
    for id in session.generate(Generate::greedy(GENERATED)).unwrap() {
        id.unwrap();
    }
    session
}

/// What is heard: tokens and the end.
type Heard = Arc<Mutex<(Vec<u32>, Option<Ended>)>>;

fn submit(batch: &mut Batch, request: Request) -> Result<Heard, Error> {
    let heard = Heard::default();
    let own = heard.clone();
    let listen = move |event| {
        let mut own = own.lock().unwrap();
        match event {
            Event::Token(id) => own.0.push(id),
            Event::Ended(ended) => own.1 = Some(*ended),
            _ => {}
        }
    };
    batch.submit(request, Box::new(listen))?;
    Ok(heard)
}

fn turn(
    session: &Session,
    i: usize,
    fetch: impl FnOnce() -> Result<Session, Error> + Send + 'static,
) -> Request {
    let sizes = [session.tokens().len(), session.cache().bytes()];
    Request::fetch(sizes, fetch, text(9), policy(i))
        .prefill(PREFILL)
        .generate(Generate::greedy(12))
}

#[test]
fn turns_of_fetched_sessions_are_those_of_lone_ones_and_keep_the_cap() {
    let model: Arc<dyn CausalLm> = model();
    let sessions: Vec<Session> = (0..6).map(|i| session(&model, i)).collect();
    let most = sessions.iter().map(|s| s.cache().bytes()).max().unwrap();
    // Some two of them at once.
    let cap = 3 * most;
    let mut batch = Batch::new(model.clone(), Limits::new().memory(cap)).unwrap();
    let fetched = Arc::new(AtomicUsize::new(0));
    let heard: Vec<Heard> = (0..6)
        .map(|i| {
            let (session, fetched) = (sessions[i].fork().unwrap(), fetched.clone());
            let request = turn(&sessions[i], i, move || {
                fetched.fetch_add(1, Ordering::Relaxed);
                Ok(session)
            });
            submit(&mut batch, request).unwrap()
        })
        .collect();
    let mut waited = false;
    while batch.step() {
        let load = batch.load();
        assert!(load.promised <= cap && load.kv_bytes <= load.promised);
        // Nobody is brought before there is room.
        let there = fetched.load(Ordering::Relaxed);
        waited |= there < 6 && load.waiting == 6 - there;
    }
    assert!(waited);
    assert_eq!(batch.load().promised, 0);
    for (i, (heard, mut lone)) in heard.iter().zip(sessions).enumerate() {
        lone.prefill(&text(9), &PREFILL).unwrap();
        let tokens = lone.generate(Generate::greedy(12)).unwrap();
        let expected: Vec<u32> = tokens.collect::<Result<_, _>>().unwrap();
        let heard = heard.lock().unwrap();
        assert_eq!(heard.0, expected, "{i}");
        let end = &heard.1.as_ref().unwrap().end;
        assert!(matches!(end, End::Length), "{end:?}");
    }
}

#[test]
fn what_cannot_be_fetched_ends_alone() {
    let (model, other): (Arc<dyn CausalLm>, Arc<dyn CausalLm>) = (model(), model());
    let (good, foreign) = (session(&model, 0), session(&other, 0));
    let cap = 4 * good.cache().bytes();
    let mut batch = Batch::new(model.clone(), Limits::new().memory(cap)).unwrap();
    let lost = submit(&mut batch, turn(&good, 0, || Err(Error::Closed))).unwrap();
    let panics = submit(&mut batch, turn(&good, 0, || panic!("no disk"))).unwrap();
    let sizes = turn(&good, 0, move || Ok(foreign));
    let foreign = submit(&mut batch, sizes).unwrap();
    // Far more tokens than it said.
    let (long, small) = (session(&model, 0), [1, 1]);
    let request = Request::fetch(small, move || Ok(long), text(9), policy(0))
        .prefill(PREFILL)
        .generate(Generate::greedy(12));
    let short = submit(&mut batch, request).unwrap();
    let fork = good.fork().unwrap();
    let beside = submit(&mut batch, turn(&good, 0, move || Ok(fork))).unwrap();
    while batch.step() {}
    let end = |heard: &Heard| match heard.lock().unwrap().1.take().unwrap().end {
        End::Failed(error) => error.to_string(),
        end => format!("{end:?}"),
    };
    assert_eq!(end(&lost), Error::Closed.to_string());
    assert!(end(&panics).contains("no disk"));
    assert!(end(&foreign).contains("another model's"));
    assert_eq!(end(&short), "Length");
    assert_eq!(end(&beside), "Length");
    assert_eq!(batch.load().promised, 0);
    // What will never fit is refused before anything is brought.
    let mut batch = Batch::new(model, Limits::new().memory(good.cache().bytes() / 2)).unwrap();
    let refused = submit(&mut batch, turn(&good, 0, || panic!("not asked for")));
    assert!(matches!(refused, Err(Error::Memory { .. })));
}
