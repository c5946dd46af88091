//! Snapshots that were altered, cut off, put together from others, or forged: an error or the session that
//! was saved, no panic, and no more memory than the file's size and a MiB.

use burn::tensor::Device;
use locret_core::{
    Budget, CacheOptions, CausalLm, DType, Error, Evict, Generate, Kernels, KvCachePolicy, KvStore,
    LayerSpec, LayerUnits, Needs, Placement, Positions, Prefill, QuantLayout, Quantization,
    QuantizedStore, Result, Rows, Scorer, Scores, Session, Spilled, Step, Tier, Verdict, View,
    Views, Visible,
    conformance::{RandomModel, small_spec},
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is left to the system's allocator; only sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
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

/// Old units score as they did when they came; keys and queries say how.
#[derive(Debug)]
struct Birth;

impl Scorer for Birth {
    fn name(&self) -> String {
        "birth".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.qkv()
    }

    fn carries(&self) -> bool {
        true
    }

    fn score(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Scores> {
        let of = |head: usize| -> Result<Vec<f32>> {
            let mut scores = units.carried(head).to_vec();
            if let Some(qkv) = units.qkv() {
                let keys = qkv.k.values()?;
                let width = at.layer.kv_heads * at.layer.head_dim;
                scores.extend(keys.chunks(width).map(|key| key[head * at.layer.head_dim]));
            }
            Ok(scores)
        };
        let scores: Result<_> = (0..units.kv_heads()).map(of).collect();
        Scores::per_head(scores?)
    }
}

/// Everything stays, in a dense store or as codes.
#[derive(Debug)]
struct Full {
    positions: Positions,
    codes: Option<Quantization>,
}

/// Queries see the newest units alone, and older ones are put away in blocks, so that so many units are resident.
#[derive(Debug)]
struct Away(usize, Option<Quantization>);

impl KvCachePolicy for Away {
    fn name(&self) -> String {
        "away".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.before()
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        let near = match self.1 {
            Some(codes) => QuantizedStore::boxed(layer, place, codes)?,
            None => place.compute.store(layer, place.dtype)?,
        };
        let resident = self.0 * layer.kv_heads * 2 * layer.head_dim * 4;
        Ok(Spilled::boxed(layer, near, &Tier::memory(), resident))
    }

    fn before(&self, at: &Step, _queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        let view = View {
            window: 4,
            ..View::default()
        };
        let lists = vec![vec![view]; units.kv_heads()];
        Ok(Visible::Chosen(Views::new(at.incoming, lists)))
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let blocks = |n: usize| n.saturating_sub(4) / 3;
        let new = blocks(at.seen)..blocks(at.seen + at.incoming);
        let block = |b: usize| vec![(3 * b as u32..3 * b as u32 + 3).collect(); units.kv_heads()];
        Ok(Verdict::keep_all().putting_away(new.map(block).collect()))
    }
}

/// The newest units stay, with three numbers each.
#[derive(Debug)]
struct Triples(usize);

impl KvCachePolicy for Triples {
    fn name(&self) -> String {
        "triples".into()
    }

    fn carries(&self) -> Option<String> {
        Some("triples".into())
    }

    fn carried_width(&self, _layer: &LayerSpec) -> usize {
        3
    }

    fn noted(&self, _layer: &LayerSpec) -> usize {
        2
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let heads = 0..units.kv_heads();
        let numbers = heads.clone().map(|head| {
            let (mut numbers, n) = (units.carried(head).to_vec(), units.len(head));
            for position in &units.positions(head)[n - units.incoming()..] {
                numbers.extend([0.0, *position as f32, -1.0]);
            }
            numbers
        });
        let numbers = Scores::wide(3, numbers.collect())?;
        let newest = |head| {
            let n = units.len(head) as u32;
            (n.saturating_sub(self.0 as u32)..n).collect()
        };
        let seen = units.notes().first().copied().unwrap_or(0.0) + units.incoming() as f32;
        let notes = Some(vec![seen, at.layer.index as f32]);
        let kept = Verdict::keep(heads.map(newest).collect())?;
        Ok(kept.carrying(numbers).noting(notes))
    }
}

impl KvCachePolicy for Full {
    fn name(&self) -> String {
        "full".into()
    }

    fn positions(&self) -> Positions {
        self.positions
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        match self.codes {
            Some(codes) => QuantizedStore::boxed(layer, place, codes),
            None => place.compute.store(layer, place.dtype),
        }
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

fn codes(bits: u8, layout: QuantLayout) -> Option<Quantization> {
    Some(Quantization {
        bits,
        layout,
        group: 4,
        residual: 3,
        first: 2,
        hadamard: bits != 4,
    })
}

fn text(tokens: usize) -> Vec<u32> {
    (0..tokens).map(|i| ((i * i + 3 * i) % 61) as u32).collect()
}

/// What snapshots are taken up with.
#[derive(Clone)]
struct With {
    model: Arc<dyn CausalLm>,
    policy: Arc<dyn KvCachePolicy>,
    options: CacheOptions,
}

impl With {
    fn read(&self, bytes: &[u8]) -> Result<Session> {
        let (model, policy) = (self.model.clone(), self.policy.clone());
        let length = bytes.len() as u64;
        Session::read(model, policy, self.options, &mut &bytes[..], length)
    }

    /// The same, with the most memory that was taken meanwhile.
    fn read_counted(&self, bytes: &[u8]) -> (Result<Session>, usize) {
        let before = LIVE.load(Relaxed);
        PEAK.store(before, Relaxed);
        let session = self.read(bytes);
        (session, PEAK.load(Relaxed) - before)
    }
}

fn written(session: &Session) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.write(&mut bytes).unwrap();
    bytes
}

/// Every kind of store and of state, and its snapshot.
fn all(model: &Arc<dyn CausalLm>, tokens: usize) -> Vec<(With, Vec<u8>)> {
    let (auto, operations) = (Kernels::Auto, Kernels::Operations);
    let full = |positions, codes| -> Arc<dyn KvCachePolicy> { Arc::new(Full { positions, codes }) };
    let birth = |positions| -> Arc<dyn KvCachePolicy> {
        let policy = Evict::new(Birth, Budget::Units(tokens / 2));
        Arc::new(policy.recent(2).with_positions(positions))
    };
    let (original, compact) = (Positions::Original, Positions::Compact);
    let (rows, kivi) = (QuantLayout::PerToken, QuantLayout::Kivi);
    let kinds = [
        (birth(original), DType::F32, auto),
        (birth(compact), DType::F16, auto),
        (birth(compact), DType::F32, operations),
        (full(compact, None), DType::F32, auto),
        (full(original, None), DType::BF16, operations),
        // These generate nothing, for which there is no room.
        (Arc::new(Away(tokens / 2 + 8, None)), DType::F32, auto),
        (Arc::new(Triples(tokens / 2)), DType::F32, auto),
        (
            Arc::new(Away(tokens / 2 + 8, codes(8, rows))),
            DType::F32,
            auto,
        ),
        (full(original, codes(8, rows)), DType::F32, auto),
        (full(compact, codes(4, kivi)), DType::F32, auto),
        (full(original, codes(2, kivi)), DType::F32, operations),
    ];
    let made = kinds
        .into_iter()
        .enumerate()
        .map(|(index, (policy, dtype, kernels))| {
            let with = With {
                model: model.clone(),
                policy,
                options: CacheOptions::new().dtype(dtype).kernels(kernels),
            };
            let (model, policy) = (with.model.clone(), with.policy.clone());
            let mut session = Session::with_options(model, policy, with.options).unwrap();
            let prefill = Prefill::new(tokens / 2, 2);
            session.prefill(&text(tokens), &prefill).unwrap();
            if index % 2 == 0 {
                let tokens = session.generate(Generate::greedy(2)).unwrap();
                assert_eq!(tokens.filter(|t| t.is_ok()).count(), 2);
            }
            let bytes = written(&session);
            (with, bytes)
        });
    made.collect()
}

fn header(bytes: &[u8]) -> Range<usize> {
    8..8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

/// Makes the hash right again.
fn sign(bytes: &mut [u8]) {
    if let Some(end) = bytes.len().checked_sub(32) {
        let digest = Sha256::digest(&bytes[..end]);
        bytes[end..].copy_from_slice(&digest);
    }
}

/// Replaces the header, with spaces up to where numbers are aligned.
fn with_header(bytes: &[u8], new: &[u8]) -> Vec<u8> {
    let mut new = new.to_vec();
    new.resize(new.len().next_multiple_of(8), b' ');
    let length = (new.len() as u64).to_le_bytes();
    [&length[..], &new, &bytes[header(bytes).end..]].concat()
}

/// A number that a count or an extent should not be.
fn number(dice: &mut ChaCha8Rng) -> u64 {
    match dice.random_range(0..7) {
        0 => 0,
        1 => dice.random_range(1..100),
        2 => 1 << dice.random_range(0..64),
        3 => u64::MAX - dice.random_range(0..3),
        4 => u64::from(u32::MAX) + dice.random_range(0..2),
        5 => i64::MAX as u64,
        _ => dice.random(),
    }
}

/// A run of digits, or of letters, or anything at all of a header becomes something else.
fn edit(bytes: &[u8], dice: &mut ChaCha8Rng) -> Vec<u8> {
    let old = &bytes[header(bytes)];
    let runs = |of: fn(&u8) -> bool| -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for at in (0..old.len()).filter(|at| of(&old[*at])) {
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += 1,
                _ => runs.push(at..at + 1),
            }
        }
        runs
    };
    let pick = |runs: Vec<Range<usize>>, dice: &mut ChaCha8Rng| {
        runs[dice.random_range(0..runs.len())].clone()
    };
    let (at, new): (Range<usize>, Vec<u8>) = match dice.random_range(0..6) {
        0 | 1 => {
            let at = pick(runs(u8::is_ascii_digit), dice);
            let old: u64 = std::str::from_utf8(&old[at.clone()])
                .unwrap()
                .parse()
                .unwrap_or(0);
            let new = match dice.random_range(0..3) {
                0 => old.wrapping_add(1),
                1 => old.wrapping_sub(1),
                _ => number(dice),
            };
            (at, new.to_string().into_bytes())
        }
        2 => {
            let at = pick(runs(u8::is_ascii_alphabetic), dice);
            let words = ["true", "false", "null", "U8", "F32", "tokens", "x", ""];
            (at, words[dice.random_range(0..words.len())].into())
        }
        // A piece is gone, or there twice, or somewhere else.
        3 => {
            let at = dice.random_range(0..old.len());
            (
                at..(at + dice.random_range(1..80)).min(old.len()),
                Vec::new(),
            )
        }
        4 => {
            let (from, to) = (
                dice.random_range(0..old.len()),
                dice.random_range(0..old.len()),
            );
            let piece = old[from..(from + dice.random_range(1..80)).min(old.len())].to_vec();
            (to..to, piece)
        }
        _ => {
            let at = dice.random_range(0..old.len());
            (at..at + 1, vec![dice.random()])
        }
    };
    with_header(bytes, &[&old[..at.start], &new, &old[at.end..]].concat())
}

/// One way of damage; whether the hash was made right again.
fn damage(base: &[u8], other: &[u8], dice: &mut ChaCha8Rng) -> (Vec<u8>, bool) {
    let mut bytes = base.to_vec();
    let signed = match dice.random_range(0..12) {
        0 | 1 => {
            for _ in 0..dice.random_range(1..9) {
                let at = dice.random_range(0..bytes.len());
                bytes[at] ^= 1 << dice.random_range(0..8);
            }
            dice.random()
        }
        2 => {
            bytes.truncate(dice.random_range(0..bytes.len()));
            dice.random()
        }
        3 => {
            let more = dice.random_range(1..200);
            bytes.extend((0..more).map(|_| dice.random::<u8>()));
            dice.random()
        }
        // A piece of another snapshot, or of this one, in the place of one.
        4 | 5 => {
            let from = if dice.random() { other } else { base };
            let length = dice.random_range(1..600).min(from.len()).min(bytes.len());
            let (source, target) = (
                dice.random_range(0..=from.len() - length),
                dice.random_range(0..=bytes.len() - length),
            );
            bytes[target..target + length].copy_from_slice(&from[source..source + length]);
            dice.random()
        }
        // A piece is gone, or there twice.
        6 => {
            let at = dice.random_range(0..bytes.len());
            let end = (at + dice.random_range(1..300)).min(bytes.len());
            match dice.random() {
                true => drop(bytes.drain(at..end)),
                false => {
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
            }
            dice.random()
        }
        // Counts, among whatever else is there.
        7 | 8 => {
            let from = header(&bytes).end;
            let at = from + dice.random_range(0..bytes.len() - from - 40);
            let at = if dice.random() {
                at - (at - from) % 8
            } else {
                at
            };
            bytes[at..at + 8].copy_from_slice(&number(dice).to_le_bytes());
            true
        }
        _ => {
            bytes = edit(&bytes, dice);
            for _ in 0..dice.random_range(0..2) {
                bytes = edit(&bytes, dice);
            }
            true
        }
    };
    if signed {
        sign(&mut bytes);
    }
    (bytes, signed)
}

/// One test, since the heap is everybody's.
#[test]
fn ten_thousand_damaged_snapshots_and_some_large_ones() {
    let device = Device::flex();
    let spec = small_spec(4, 2, 8);
    let model: Arc<dyn CausalLm> = Arc::new(RandomModel::new(spec, 1, &device).unwrap());
    let bases = all(&model, 24);
    for (with, bytes) in &bases {
        assert!(written(&with.read(bytes).unwrap()) == *bytes);
    }
    headers_take_no_more_than_they_are_long(&bases[0]);
    let mut dice = ChaCha8Rng::seed_from_u64(7);
    let (mut errors, mut forged, mut over) = (0, 0, i64::MIN);
    for round in 0..10_000 {
        let (with, base) = &bases[round % bases.len()];
        let (_, other) = &bases[dice.random_range(0..bases.len())];
        let (bytes, signed) = damage(base, other, &mut dice);
        let (read, peak) = with.read_counted(&bytes);
        assert!(
            peak <= bytes.len() + (1 << 20),
            "round {round}: {peak} bytes for a file of {}",
            bytes.len()
        );
        over = over.max(peak as i64 - bytes.len() as i64);
        match read {
            Err(Error::Snapshot(_)) => errors += 1,
            Err(other) => panic!("round {round}: {other}"),
            Ok(session) if bytes == *base => assert!(written(&session) == *base),
            // What says all the right things of itself is a session, if of nobody's. It must not panic.
            Ok(mut session) if signed => {
                forged += 1;
                let _any = session.prefill(&text(9), &Prefill::new(16, 0));
                if let Ok(tokens) = session.generate(Generate::greedy(2)) {
                    tokens.for_each(drop);
                }
                let _any = session.write(&mut Vec::new());
            }
            Ok(_) => panic!("round {round}: an altered file was taken for a session"),
        }
    }
    println!("{errors} errors, {forged} forged, {over} bytes more than the file at most");
    // All parts of the reader were reached.
    assert!(
        errors > 5_000 && forged > 500,
        "{errors} errors, {forged} forged"
    );

    // Of files of some MiB nothing is there twice, whole or not.
    let mut spec = small_spec(4, 4, 512);
    spec.layers = 3;
    let model: Arc<dyn CausalLm> = Arc::new(RandomModel::new(spec, 1, &device).unwrap());
    for (with, bytes) in all(&model, 160) {
        let what = format!(
            "{:?}, {:?}, {} bytes",
            with.policy,
            with.options,
            bytes.len()
        );
        assert!(bytes.len() > 300_000, "{what}");
        let end = header(&bytes).end;
        let mut wrong_count = bytes.clone();
        // Of the first store: behind its name, its heads and its features.
        let store = wrong_count.windows(4).position(|w| w == b"KVS1").unwrap();
        let name = u64::from_le_bytes(bytes[store + 4..store + 12].try_into().unwrap());
        let count = store + 12 + name as usize + 16;
        assert!(store > end);
        wrong_count[count..count + 8].copy_from_slice(&u64::from(u32::MAX).to_le_bytes());
        sign(&mut wrong_count);
        let mut unsigned = bytes.clone();
        *unsigned.last_mut().unwrap() ^= 1;
        let mut names = bytes.clone();
        names[end - 1] = b'x';
        for (which, file, fine) in [
            ("whole", &bytes, true),
            ("half", &bytes[..bytes.len() / 2].to_vec(), false),
            ("a wrong count", &wrong_count, false),
            ("another hash", &unsigned, false),
            ("another header", &names, false),
        ] {
            let (read, peak) = with.read_counted(file);
            assert_eq!(read.is_ok(), fine, "{what}, {which}: {read:?}");
            assert!(peak <= file.len() + (1 << 20), "{what}, {which}: {peak}");
            if fine {
                println!("{what}: {} bytes more", peak as i64 - file.len() as i64);
            }
        }
    }
}

/// Headers that are as large as the file, full of what a reader might keep.
fn headers_take_no_more_than_they_are_long((with, base): &(With, Vec<u8>)) {
    let start = |text: &str| {
        let old = String::from_utf8(base[header(base)].to_vec()).unwrap();
        let at = old.find(text).unwrap();
        old[..at].to_owned()
    };
    let known = start("\"tokens\"");
    let texts = start("\"state\"");
    for json in [
        format!(
            "{known}{}",
            "\"x\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},".repeat(40_000)
        ),
        format!("{known}\"tokens\":{{\"shape\":[{}", "0,".repeat(1_000_000)),
        format!("{texts}{}", "\"a\":\"\",".repeat(300_000)),
        format!(
            "{texts}{}",
            format!("\"a\":\"{}\",", "\\u0041".repeat(10_000)).repeat(30)
        ),
        format!("{texts}\"state\":\"{}\"}}", "\\\"a\\\":[],".repeat(7_000)),
        format!(
            "{{\"__metadata__\":{{\"format\":\"{}\"",
            "x".repeat(3_000_000)
        ),
        format!("{{\"__metadata__\":{}", "[".repeat(2_000_000)),
        format!("{{{}", " ".repeat(3_000_000)),
    ] {
        let file = with_header(base, json.as_bytes());
        let (read, peak) = with.read_counted(&file);
        let text = &json[json.len() - 40..];
        assert!(matches!(read, Err(Error::Snapshot(_))), "{text}: {read:?}");
        assert!(
            peak <= file.len() + (1 << 20),
            "{text}: {peak} of {}",
            file.len()
        );
    }
}
