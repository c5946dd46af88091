//! Texts that many sequences begin with.

use crate::{
    model, model_of,
    policies::{Birth, Coded, KeyNorm, Newest},
    spec, text,
};
use locret_core::{
    Budget, CacheOptions, CausalLm, DType, Evict, Folder, Generate, Kernels, KvCachePolicy,
    Positions, Prefill, PrefixCache, Quantization, Scorer, Session, SnapshotStore, Stored,
};
use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

const PREFILL: Prefill = Prefill::new(16, 4);
const OPTIONS: fn() -> CacheOptions = CacheOptions::new;

fn evict<S: Scorer + 'static>(scorer: S) -> Arc<dyn KvCachePolicy> {
    let policy = Evict::new(scorer, Budget::Units(20)).recent(2);
    Arc::new(policy.with_positions(Positions::Compact))
}

fn any() -> Arc<dyn CausalLm> {
    model()
}

fn read(model: &Arc<dyn CausalLm>, policy: &Arc<dyn KvCachePolicy>, ids: &[u32]) -> Session {
    let mut session = Session::with_options(model.clone(), policy.clone(), OPTIONS()).unwrap();
    session.prefill(ids, &PREFILL).unwrap();
    session
}

/// Tokens and logits after a question.
fn answer(session: &mut Session, question: &[u32]) -> (Vec<u32>, Vec<u32>) {
    session.prefill(question, &PREFILL).unwrap();
    let bits = session.logits().unwrap().iter().map(|x| x.to_bits());
    let bits = bits.collect();
    let tokens = session.generate(Generate::greedy(5)).unwrap();
    (tokens.map(|t| t.unwrap()).collect(), bits)
}

#[test]
fn a_prefix_is_two_prompts_after_eviction_too() {
    for policy in [evict(KeyNorm), evict(Birth), evict(Newest)] {
        let (model, cache) = (any(), PrefixCache::new(1 << 20));
        let (prefix, question) = (text(60), &text(90)[60..]);
        let get = || cache.get(&model, &policy, OPTIONS(), &PREFILL, &prefix);
        assert!(get().unwrap().is_none());
        let mut session = read(&model, &policy, &prefix);
        assert!(cache.insert(&session).unwrap());
        let due = answer(&mut session, question);
        for _ in 0..3 {
            let mut session = get().unwrap().unwrap();
            assert_eq!(session.tokens(), prefix);
            assert_eq!(session.cache().len(0, 0), 24);
            assert_eq!(answer(&mut session, question), due);
        }
        let stats = cache.stats();
        assert_eq!((stats.hits, stats.misses, stats.entries), (3, 1, 1));
    }
}

#[test]
fn an_entry_is_one_of_everything_that_matters() {
    let (model, policy, cache) = (any(), evict(Birth), PrefixCache::new(1 << 20));
    let ids = text(60);
    assert!(cache.insert(&read(&model, &policy, &ids)).unwrap());
    type Policy = Arc<dyn KvCachePolicy>;
    let hit = |model: &_, policy: &Policy, options, prefill: Prefill, ids: &[u32]| -> bool {
        let found = cache.get(model, policy, options, &prefill, ids);
        found.unwrap().is_some()
    };
    assert!(hit(&model, &policy, OPTIONS(), PREFILL, &ids));
    // Made again, it is the same policy.
    assert!(hit(&model, &evict(Birth), OPTIONS(), PREFILL, &ids));
    let other: Arc<dyn CausalLm> = model_of(spec());
    assert!(!hit(&other, &policy, OPTIONS(), PREFILL, &ids));
    assert!(!hit(&model, &evict(Newest), OPTIONS(), PREFILL, &ids));
    for options in [
        OPTIONS().dtype(DType::F16),
        OPTIONS().kernels(Kernels::Operations),
    ] {
        assert!(!hit(&model, &policy, options, PREFILL, &ids));
    }
    for prefill in [Prefill::new(17, 4), Prefill::new(16, 5)] {
        assert!(!hit(&model, &policy, OPTIONS(), prefill, &ids));
    }
    let mut changed = ids.clone();
    changed[30] += 1;
    for other in [&ids[..59], &text(61), &changed, &[]] {
        assert!(!hit(&model, &policy, OPTIONS(), PREFILL, other));
    }
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.entries), (2, 10, 1));
}

#[test]
fn only_one_whole_prompt_is_a_prefix() {
    let (model, policy, cache) = (any(), evict(KeyNorm), PrefixCache::new(1 << 20));
    let whole = || read(&model, &policy, &text(60));
    let mut twice = whole();
    twice.prefill(&[1, 2], &PREFILL).unwrap();
    let mut generated = whole();
    let tokens = generated.generate(Generate::greedy(2)).unwrap();
    assert_eq!(tokens.count(), 2);
    let mut scored = whole();
    scored.score(&[1, 2]).unwrap();
    let mut stopped = Session::with_options(model.clone(), policy.clone(), OPTIONS()).unwrap();
    stopped
        .prefill_with(&text(60), &PREFILL, &mut |_| {
            Err(locret_core::Error::EmptyPrompt)
        })
        .unwrap_err();
    let resumed = {
        let mut session = stopped.fork().unwrap();
        session.prefill(&text(60)[16..], &PREFILL).unwrap();
        session
    };
    let mut passed_on = whole();
    passed_on.cache_mut().set_policy(evict(Newest)).unwrap();
    let nothing = Session::with_options(model.clone(), policy.clone(), OPTIONS()).unwrap();
    let others = [
        twice, generated, scored, stopped, resumed, passed_on, nothing,
    ];
    for (index, session) in others.iter().enumerate() {
        assert!(!cache.insert(session).unwrap(), "{index}");
        // Nor after it was saved and taken up.
        let mut bytes = Vec::new();
        session.write(&mut bytes).unwrap();
        let (policy, length) = (session.cache().policy().clone(), bytes.len() as u64);
        let again = Session::read(model.clone(), policy, OPTIONS(), &mut &bytes[..], length);
        assert!(!cache.insert(&again.unwrap()).unwrap(), "{index}");
    }
    // In the store of a policy that it had before it read anything.
    let coded = Arc::new(Coded(policy.clone(), Quantization::bits(8)));
    let mut session = Session::with_options(model.clone(), coded, OPTIONS()).unwrap();
    session.cache_mut().set_policy(policy.clone()).unwrap();
    session.prefill(&text(60), &PREFILL).unwrap();
    assert!(!cache.insert(&session).unwrap());
    assert_eq!(cache.stats(), Default::default());
    assert!(cache.insert(&whole()).unwrap());
}

#[test]
fn what_was_asked_for_longest_ago_goes_first() {
    let (model, policy) = (any(), evict(KeyNorm));
    let texts: Vec<Vec<u32>> = (0..5).map(|i| text(100)[i..60 + i].to_vec()).collect();
    let one = {
        let cache = PrefixCache::new(usize::MAX);
        cache.insert(&read(&model, &policy, &texts[0])).unwrap();
        cache.stats().bytes
    };
    let session = read(&model, &policy, &texts[0]);
    let numbers = 4 * (60 + spec().vocab);
    let metadata = 4 * session.cache().units();
    assert_eq!(one, session.cache().bytes() + metadata + numbers);

    let cache = PrefixCache::new(3 * one + one / 2);
    let insert = |i: usize| assert!(cache.insert(&read(&model, &policy, &texts[i])).unwrap());
    let there = |i: usize| {
        let found = cache.get(&model, &policy, OPTIONS(), &PREFILL, &texts[i]);
        found.unwrap().is_some()
    };
    (0..3).for_each(insert);
    assert_eq!((cache.stats().entries, cache.stats().bytes), (3, 3 * one));
    // The first one was asked for, the second one longest ago.
    assert!(there(0));
    insert(3);
    assert_eq!((cache.stats().entries, cache.stats().bytes), (3, 3 * one));
    assert_eq!([0, 1, 2, 3].map(there), [true, false, true, true]);
    // Kept once more, it is not there twice.
    insert(0);
    assert_eq!(cache.stats().bytes, 3 * one);
    insert(4);
    assert_eq!([2, 0, 3, 4].map(there), [false, true, true, true]);

    // What is larger than everything together is not kept, and nothing goes for it.
    let small = PrefixCache::new(one - 1);
    assert!(small.insert(&read(&model, &policy, &texts[0])).unwrap());
    assert_eq!((small.stats().entries, small.stats().bytes), (0, 0));
}

#[test]
fn a_folder_behind_it_serves_other_processes() {
    let folder = tempfile::tempdir().unwrap();
    let store = || -> Arc<dyn SnapshotStore> { Arc::new(Folder::new(folder.path()).unwrap()) };
    let (policy, ids) = (evict(Birth), text(60));
    let files = || -> Vec<_> {
        let names = std::fs::read_dir(folder.path()).unwrap();
        names.map(|entry| entry.unwrap().path()).collect()
    };
    let due = {
        let (model, cache) = (any(), PrefixCache::new(1 << 20).with_store(store()));
        let mut session = read(&model, &policy, &ids);
        assert!(cache.insert(&session).unwrap());
        assert!(cache.insert(&session).unwrap());
        answer(&mut session, &[7, 8, 9])
    };
    let [file] = &files()[..] else {
        panic!("{:?}", files())
    };
    // As another process sees it.
    let fresh = || (any(), PrefixCache::new(1 << 20).with_store(store()));
    let (model, cache) = fresh();
    let get = || {
        cache
            .get(&model, &policy, OPTIONS(), &PREFILL, &ids)
            .unwrap()
    };
    for hits in 1..4 {
        assert_eq!(answer(&mut get().unwrap(), &[7, 8, 9]), due);
        let stats = cache.stats();
        assert_eq!((stats.hits, stats.stored_hits, stats.entries), (hits, 1, 1));
    }
    let other = cache.get(&model, &policy, OPTIONS(), &PREFILL, &ids[1..]);
    assert!(other.unwrap().is_none());

    // Damaged, foreign and somebody else's files are misses, and gone.
    let whole = std::fs::read(file).unwrap();
    let mut altered = whole.clone();
    altered[whole.len() / 2] ^= 1;
    let elsewhere = {
        let mut bytes = Vec::new();
        read(&any(), &policy, &ids[1..]).write(&mut bytes).unwrap();
        bytes
    };
    let other_model = {
        let other = locret_core::conformance::RandomModel::new(spec(), 8, &crate::device());
        let mut bytes = Vec::new();
        let model: Arc<dyn CausalLm> = Arc::new(other.unwrap());
        read(&model, &policy, &ids).write(&mut bytes).unwrap();
        bytes
    };
    for bytes in [&altered[..], &whole[..100], b"", &elsewhere, &other_model] {
        std::fs::write(file, bytes).unwrap();
        let (model, cache) = fresh();
        let found = cache.get(&model, &policy, OPTIONS(), &PREFILL, &ids);
        assert!(found.unwrap().is_none());
        let stats = cache.stats();
        assert_eq!((stats.hits, stats.misses, stats.removed), (0, 1, 1));
        assert!(files().is_empty());
        // It is read anew, and there again.
        assert!(cache.insert(&read(&model, &policy, &ids)).unwrap());
        // But for the times that it took, the same.
        assert_eq!(&files(), std::slice::from_ref(file));
    }
}

/// A store that fails when it is told to.
#[derive(Debug)]
struct Broken(Folder, AtomicBool);

impl Broken {
    fn check(&self) -> locret_core::Result<()> {
        match self.1.load(Relaxed) {
            true => Err(locret_core::Error::Device("it is broken".into())),
            false => Ok(()),
        }
    }
}

impl SnapshotStore for Broken {
    fn put(
        &self,
        key: &str,
        write: &mut dyn FnMut(&mut dyn Write) -> locret_core::Result<()>,
    ) -> locret_core::Result<()> {
        self.check()?;
        self.0.put(key, write)
    }

    fn get(&self, key: &str) -> locret_core::Result<Option<Stored>> {
        self.check()?;
        self.0.get(key)
    }

    fn remove(&self, key: &str) -> locret_core::Result<()> {
        self.check()?;
        self.0.remove(key)
    }
}

#[test]
fn a_store_that_fails_costs_the_reading_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let broken = Broken(Folder::new(folder.path()).unwrap(), AtomicBool::new(true));
    let store = Arc::new(broken);
    let (model, policy, ids) = (any(), evict(Birth), text(60));
    let cache = PrefixCache::new(1 << 20).with_store(store.clone());
    let get = || {
        cache
            .get(&model, &policy, OPTIONS(), &PREFILL, &ids)
            .unwrap()
    };
    assert!(get().is_none());
    let session = read(&model, &policy, &ids);
    cache.insert(&session).unwrap_err();
    // In memory it is.
    assert!(get().is_some());
    store.1.store(false, Relaxed);
    assert!(cache.insert(&session).unwrap());
    assert!(std::fs::read_dir(folder.path()).unwrap().count() == 1);
}

#[test]
fn many_threads_share_it() {
    let (model, policy) = (any(), evict(Birth));
    let texts: Vec<Vec<u32>> = (0..6).map(|i| text(100)[i..40 + i].to_vec()).collect();
    let due: Vec<_> = texts
        .iter()
        .map(|ids| answer(&mut read(&model, &policy, ids), &[3, 4]))
        .collect();
    let one = {
        let cache = PrefixCache::new(usize::MAX);
        cache.insert(&read(&model, &policy, &texts[0])).unwrap();
        cache.stats().bytes
    };
    // Room for half of them.
    let cache = PrefixCache::new(3 * one);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (cache, model, policy, texts, due) = (&cache, &model, &policy, &texts, &due);
            scope.spawn(move || {
                for round in 0..30 {
                    let i = (round * (thread + 1) + thread) % texts.len();
                    let found = cache.get(model, policy, OPTIONS(), &PREFILL, &texts[i]);
                    let mut session = found.unwrap().unwrap_or_else(|| {
                        let session = read(model, policy, &texts[i]);
                        cache.insert(&session).unwrap();
                        session
                    });
                    assert_eq!(answer(&mut session, &[3, 4]), due[i]);
                    let stats = cache.stats();
                    assert!(stats.bytes <= 3 * one && stats.entries <= 3, "{stats:?}");
                }
            });
        }
    });
    let stats = cache.stats();
    assert_eq!(stats.hits + stats.misses, 120);
    assert!(stats.hits > 10, "{stats:?}");
}
