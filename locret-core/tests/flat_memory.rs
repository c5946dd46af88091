//! The process's heap, counted: a stream is flat, and decoding copies no cache.

use burn::tensor::Device;
use locret_core::{
    Budget, CacheOptions, Evict, Generate, KvCachePolicy, LayerUnits, Positions, Prefill, Result,
    Scorer, Scores, Session, Step, Verdict,
    conformance::{RandomModel, small_spec},
};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static TOTAL: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is left to the system's allocator; only sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Relaxed);
        TOTAL.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Debug)]
struct Newest;

impl Scorer for Newest {
    fn name(&self) -> String {
        "newest".into()
    }

    fn score(&self, _at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let of = |head| units.positions(head).iter().map(|p| *p as f32).collect();
        Scores::per_head((0..units.kv_heads()).map(of).collect())
    }
}

#[derive(Debug)]
struct Full(Positions);

impl KvCachePolicy for Full {
    fn name(&self) -> String {
        "full".into()
    }

    fn positions(&self) -> Positions {
        self.0
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

fn text(tokens: usize) -> Vec<u32> {
    (0..tokens).map(|i| (i * 7 % 61) as u32).collect()
}

/// One test, since the heap is everybody's.
#[test]
fn the_heap_is_flat_while_reading_and_almost_still_while_decoding() {
    // On one thread: each keeps some scratch memory from when it is first needed, and on a busy machine a
    // second one may first be needed in any chunk.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    pool.unwrap().install(check);
}

fn check() {
    let device = Device::flex();
    let spec = small_spec(6, 2, 64);
    let model = Arc::new(RandomModel::new(spec.clone(), 1, &device).unwrap());

    // Each way once before it counts, for that scratch memory.
    for (round, positions) in (0..4).zip([Positions::Original, Positions::Compact].repeat(2)) {
        let policy = Evict::new(Newest, Budget::Units(64)).with_positions(positions);
        let mut session =
            Session::with_options(model.clone(), Arc::new(policy), CacheOptions::default())
                .unwrap();
        let prefill = Prefill::new(64, 0);
        let mut live = Vec::new();
        live.reserve_exact(200);
        let ids = text(64 * 128);
        session
            .prefill_with(&ids, &prefill, &mut |_| {
                live.push(LIVE.load(Relaxed));
                Ok(())
            })
            .unwrap();
        // The list of all tokens grows by 4 bytes each; a cache that keeps everything would take all of
        // this.
        let allowed = spec.full_cache_bytes(ids.len(), 4) / 16;
        let (first, last) = (live[8], live[live.len() - 1]);
        assert!(
            round < 2 || last <= first + allowed,
            "{positions:?}: {first} bytes after 9 chunks, {last} after {}",
            live.len()
        );
    }

    for positions in [Positions::Original, Positions::Compact] {
        let mut session = Session::with_options(
            model.clone(),
            Arc::new(Full(positions)),
            CacheOptions::default(),
        )
        .unwrap();
        session.prefill(&text(4096), &Prefill::default()).unwrap();
        // The first token may turn the cache.
        let mut tokens = session.generate(Generate::greedy(300)).unwrap();
        assert!(tokens.by_ref().take(10).all(|t| t.is_ok()));
        let before = TOTAL.load(Relaxed);
        let read = tokens.by_ref().take(256).filter(|t| t.is_ok()).count();
        let per_token = (TOTAL.load(Relaxed) - before) / read;
        drop(tokens);
        let cache = session.cache().bytes();
        assert!(cache >= spec.full_cache_bytes(4096, 4));
        // Room for 64 tokens is reserved at once, and a copy comes with it.
        assert!(
            per_token < cache / 16,
            "{positions:?}: {per_token} bytes were allocated per token in a cache of {cache}"
        );
    }
}
