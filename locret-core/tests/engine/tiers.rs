//! Stores with a second tier, and what can go wrong with it.

use crate::{device, model, spec, text};
use locret_core::{
    Attention, CacheOptions, CausalLm, DType, Dense, Error, Generate, Kernels, KvCachePolicy,
    KvStore, LayerSpec, LayerUnits, Needs, Pass, Phase, Placement, Positions, Prefill, QuantLayout,
    Quantization, QuantizedStore, Result, Rows, Scratch, SequenceCache, Session, Sight, Spilled,
    Step, Tier, Verdict, View, Views, Visible,
    conformance::{PolicyCheck, StoreCheck, check_policy, check_store},
    forward, plan,
};
use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

fn place(kernels: Kernels, dtype: DType) -> Placement {
    Placement {
        compute: kernels.on(&device()),
        dtype,
    }
}

#[test]
fn stores_in_two_tiers() {
    for (index, tier) in [Tier::memory(), Tier::disk(None)].iter().enumerate() {
        for (dtype, tolerance) in [(DType::F32, 0.0), (DType::F16, 5e-4), (DType::BF16, 4e-3)] {
            let place = place(Kernels::Auto, dtype);
            for resident in [0, 30_000, usize::MAX] {
                let check = StoreCheck {
                    seeds: 20 * index as u64..20 * index as u64 + 20,
                    tolerance,
                    ..StoreCheck::default()
                };
                let done = check_store(&device(), &check, |layer| {
                    let near = Dense::boxed(layer, &place)?;
                    Ok(Spilled::boxed(layer, near, tier, resident))
                });
                done.unwrap_or_else(|e| panic!("{tier:?}, {dtype:?}, {resident}: {e}"));
            }
        }
    }
    let tensors = place(Kernels::Operations, DType::F32);
    let check = StoreCheck {
        seeds: 0..15,
        ..StoreCheck::default()
    };
    check_store(&device(), &check, |layer| {
        let near = Dense::boxed(layer, &tensors)?;
        Ok(Spilled::boxed(layer, near, &Tier::memory(), 20_000))
    })
    .unwrap();
}

#[test]
fn stores_of_few_bits_in_two_tiers() {
    for (bits, layout, residual, hadamard) in [
        (8, QuantLayout::PerToken, 5, true),
        (4, QuantLayout::Kivi, 0, false),
        (3, QuantLayout::PerToken, 7, true),
        (2, QuantLayout::Kivi, 12, true),
    ] {
        let config = Quantization {
            bits,
            layout,
            group: 8,
            residual,
            first: 3,
            hadamard,
        };
        let check = StoreCheck {
            seeds: 0..25,
            // Coarse groups, and codes of few bits.
            tolerance: crate::suite::off_by(config),
            bytes_per_value: 4.0,
            ..StoreCheck::default()
        };
        let place = place(Kernels::Auto, DType::F32);
        for tier in [Tier::memory(), Tier::disk(None)] {
            check_store(&device(), &check, |layer| {
                let near = QuantizedStore::boxed(layer, &place, config)?;
                Ok(Spilled::boxed(layer, near, &tier, 20_000))
            })
            .unwrap_or_else(|e| panic!("{bits} bits, {tier:?}: {e}"));
        }
    }
}

/// Everything stays. What is older than the newest units is put away in blocks of 8, and queries see every third block
/// (another third each time), the first ones, and the newest.
#[derive(Debug, Clone)]
struct Thirds {
    tier: Tier,
    resident: usize,
    bits: Option<u8>,
}

const NEWEST: usize = 20;
const BLOCK: usize = 8;

/// Units that may be resident: a third of 400, what is near with room for 64 more, and a chunk.
const BOUND: usize = 230;

impl Thirds {
    fn blocks(n: usize) -> usize {
        n.saturating_sub(NEWEST) / BLOCK
    }
}

impl KvCachePolicy for Thirds {
    fn name(&self) -> String {
        "thirds".into()
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING.before()
    }

    fn store(&self, layer: &LayerSpec, place: &Placement) -> Result<Box<dyn KvStore>> {
        let near = match self.bits {
            None => Dense::boxed(layer, place)?,
            Some(bits) => QuantizedStore::boxed(layer, place, Quantization::bits(bits))?,
        };
        Ok(Spilled::boxed(layer, near, &self.tier, self.resident))
    }

    fn before(&self, at: &Step, _queries: &Rows, units: &LayerUnits<'_>) -> Result<Visible> {
        let blocks = (0..Self::blocks(at.seen)).filter(|b| (b + at.seen).is_multiple_of(3));
        let ranges = blocks.map(|b| (b * BLOCK) as u32..((b + 1) * BLOCK) as u32);
        let rest = (Self::blocks(at.seen) * BLOCK) as u32..(at.seen + at.incoming) as u32;
        let view = View {
            ranges: ranges.chain(std::iter::once(rest)).collect(),
            ..View::default()
        };
        let lists = vec![vec![view]; units.kv_heads()];
        Ok(Visible::Chosen(Views::new(at.incoming, lists)))
    }

    fn step(&self, at: &Step, units: &LayerUnits<'_>) -> Result<Verdict> {
        let blocks = Self::blocks(at.seen)..Self::blocks(at.seen + at.incoming);
        let block = |b: usize| {
            let units_of: Vec<u32> = (b * BLOCK..(b + 1) * BLOCK).map(|u| u as u32).collect();
            vec![units_of; units.kv_heads()]
        };
        Ok(Verdict::keep_all().putting_away(blocks.map(block).collect()))
    }
}

fn thirds(tier: Tier, resident: usize) -> Arc<Thirds> {
    Arc::new(Thirds {
        tier,
        resident,
        bits: None,
    })
}

/// Bytes of a unit of a layer.
fn unit() -> usize {
    spec().kv_heads * 2 * spec().head_dim * 4
}

const PREFILL: Prefill = Prefill::new(10, 1);

fn read(policy: Arc<dyn KvCachePolicy>, tokens: usize) -> Result<Session> {
    let mut session = Session::new(model(), policy)?;
    session.prefill(&text(tokens), &PREFILL)?;
    Ok(session)
}

#[test]
fn policies_over_stores_in_two_tiers() {
    for (bits, resident) in [(None, 1 << 20), (None, usize::MAX), (Some(8), usize::MAX)] {
        let check = PolicyCheck {
            seeds: 0..14,
            dense: false,
            dtypes: vec![DType::F32],
            tolerance: if bits.is_some() { 5e-2 } else { 1e-4 },
            store_tolerance: if bits.is_some() {
                1.0 / 255.0 + 3e-3
            } else {
                0.0
            },
            ..PolicyCheck::default()
        };
        check_policy(&device(), &check, |case| {
            let roomy = case.budget == 1 << 20;
            match roomy {
                // Nothing is hidden.
                true => Arc::new(crate::policies::Everything {
                    positions: Positions::Original,
                    needs: Needs::NOTHING,
                }),
                false => Arc::new(Thirds {
                    tier: Tier::memory(),
                    resident,
                    bits,
                }),
            }
        })
        .unwrap();
    }
}

#[test]
fn what_is_resident_is_bounded_and_changes_nothing() {
    let roomy = read(thirds(Tier::memory(), usize::MAX), 400).unwrap();
    let due = roomy.logits().unwrap().to_vec();
    let bound = BOUND * unit();
    for tier in [
        Tier::memory(),
        Tier::disk(None),
        Tier::disk(Some(std::env::temp_dir())),
    ] {
        let mut session = read(thirds(tier, bound), 400).unwrap();
        assert_eq!(session.logits().unwrap(), due);
        let (cache, full) = (session.cache(), 400 * unit() * spec().layers);
        assert!(cache.peak().bytes <= bound * spec().layers);
        assert!(cache.bytes() <= bound * spec().layers && cache.total_bytes() >= full);
        assert!(cache.total_bytes() <= full + 64 * unit() * spec().layers);
        // Forks share what is put away, and go on apart.
        let mut fork = session.fork().unwrap();
        let policy = session.cache().policy().clone();
        let mut written = Vec::new();
        session.write(&mut written).unwrap();
        let length = written.len() as u64;
        let options = CacheOptions::default();
        let from = &mut &written[..];
        let mut again = Session::read(model(), policy, options, from, length).unwrap();
        assert!(again.cache().bytes() <= bound * spec().layers);
        let say = |session: &mut Session| -> Vec<u32> {
            let tokens = session.generate(Generate::greedy(30)).unwrap();
            tokens.map(|token| token.unwrap()).collect()
        };
        let said = say(&mut session);
        drop(session);
        assert_eq!(say(&mut again), said);
        assert_eq!(say(&mut fork), said);
        assert!(fork.cache().peak().bytes <= bound * spec().layers);
    }
}

#[test]
fn plans_know_the_bound() {
    let bound = BOUND * unit();
    let policy = thirds(Tier::memory(), bound);
    let compute = Kernels::Auto.on(&device());
    let options = CacheOptions::default();
    let planned = plan(&spec(), &*policy, &compute, options, &PREFILL, [400, 0]).unwrap();
    assert_eq!(planned.peak.bytes, bound * spec().layers);
    let small = plan(&spec(), &*policy, &compute, options, &PREFILL, [40, 0]).unwrap();
    let found = read(policy, 40).unwrap().cache().peak().bytes;
    assert!(small.peak.bytes >= found, "{small:?} {found}");
    assert!(small.peak.bytes <= found + 64 * unit() * spec().layers);
}

#[test]
fn seeing_more_at_once_than_may_be_resident_is_an_error() {
    let error = read(thirds(Tier::memory(), 40 * unit()), 400).unwrap_err();
    let Error::Memory { needed, left, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(left, 40 * unit());
    assert!(needed > left && needed < 60 * unit(), "{needed}");
    // Whoever sees everything has to have room for all of it.
    let everything = Thirds {
        tier: Tier::memory(),
        resident: 100 * unit(),
        bits: None,
    };
    let mut session = read(Arc::new(everything), 90).unwrap();
    let all = crate::policies::Everything {
        positions: Positions::Original,
        needs: Needs::NOTHING,
    };
    session.cache_mut().set_policy(Arc::new(all)).unwrap();
    let error = session.prefill(&text(40), &PREFILL).unwrap_err();
    assert!(matches!(error, Error::Memory { .. }), "{error}");
}

#[test]
fn attention_to_what_was_not_brought_is_refused() {
    let layer = spec().layer(0);
    let place = place(Kernels::Auto, DType::F32);
    let near = Dense::boxed(&layer, &place).unwrap();
    let mut store = Spilled::boxed(&layer, near, &Tier::memory(), 0);
    let width = layer.kv_heads * layer.head_dim;
    let rows = place.compute.rows(vec![0.5; 12 * width], width).unwrap();
    store.append(&rows, &rows).unwrap();
    store
        .put_away(&[vec![(0..6).collect(); layer.kv_heads]])
        .unwrap();
    assert!(!store.brought(&vec![vec![4..7]; layer.kv_heads]));
    assert!(store.tiles(0).is_none());
    let q = layer.heads * layer.head_dim;
    let q = place.compute.rows(vec![0.5; q], q).unwrap();
    for (first, fine) in [(6, true), (5, false)] {
        let view = View {
            ranges: std::iter::once(first..12).collect(),
            ..View::default()
        };
        let views = Views::new(1, vec![vec![view]; layer.kv_heads]);
        let over = Attention {
            layer,
            store: &*store,
            scale: 1.0,
            rotation: None,
            sight: Some(Sight {
                views: &views,
                far: None,
            }),
        };
        let found = place.compute.attend(q.clone(), &over);
        assert_eq!(found.is_ok(), fine, "{found:?}");
    }
}

/// A file that fails when it is told to.
#[derive(Debug, Default)]
struct Faulty {
    reads: AtomicBool,
    writes: AtomicBool,
}

/// The bytes, and whose orders it takes.
#[derive(Debug)]
struct FaultyFile(Arc<Faulty>, Mutex<Vec<u8>>);

impl Scratch for FaultyFile {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        if self.0.writes.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let (mut all, at) = (self.1.lock().unwrap(), at as usize);
        let end = all.len().max(at + bytes.len());
        all.resize(end, 0);
        all[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        if self.0.reads.load(Ordering::Relaxed) {
            return Err(io::Error::other("a scratched disk"));
        }
        let at = at as usize;
        bytes.copy_from_slice(&self.1.lock().unwrap()[at..at + bytes.len()]);
        Ok(())
    }
}

fn faulty() -> (Arc<Faulty>, Tier) {
    let orders = Arc::new(Faulty::default());
    let own = orders.clone();
    let tier = Tier::new("faulty", move || {
        Ok(Box::new(FaultyFile(own.clone(), Mutex::default())))
    });
    (orders, tier)
}

/// One token for each of two sequences in one pass: what becomes of them.
fn beside(sessions: &mut [Session; 2], apart: bool) -> Result<Vec<Result<()>>> {
    let steps = sessions.iter_mut().map(|session| {
        let cache = session.cache_mut();
        let total = cache.seen() + 1;
        cache.step(Phase::Decode, 1, total)
    });
    let mut pass = match apart {
        true => Pass::apart(steps)?,
        false => Pass::new(steps)?,
    };
    forward(&*model(), &[1, 2], &mut pass)?;
    pass.finish_each(None)
}

#[test]
fn errors_of_the_tier_end_their_own_sequence() {
    for writes in [false, true] {
        let (orders, tier) = faulty();
        let bound = BOUND * unit();
        let healthy = || read(thirds(Tier::memory(), bound), 400).unwrap();
        let mut both = [read(thirds(tier.clone(), bound), 400).unwrap(), healthy()];
        let mut alone = [healthy(), healthy()];
        let order = if writes {
            &orders.writes
        } else {
            &orders.reads
        };
        order.store(true, Ordering::Relaxed);
        // Reading fails at once, writing when a block has to make room for another.
        let mut ended = None;
        for _ in 0..60 {
            let found = beside(&mut both, true).unwrap();
            assert!(beside(&mut alone, true).unwrap().iter().all(Result::is_ok));
            assert!(found[1].is_ok());
            if let Err(error) = found.into_iter().next().unwrap() {
                ended.get_or_insert(error);
                break;
            }
        }
        let Some(Error::Tier { what, source }) = ended else {
            panic!("{ended:?}");
        };
        assert!(what.starts_with("faulty"), "{what}");
        assert_eq!(
            source.kind() == io::ErrorKind::StorageFull,
            writes,
            "{source}"
        );
        let error = both[0].prefill(&[1], &PREFILL).unwrap_err();
        assert!(matches!(error, Error::Unusable), "{error}");
        // The other one is where it would be without a neighbour.
        let [_, other] = &both;
        for layer in 0..spec().layers {
            let store = |session: &Session| session.cache().store(layer).keys(0).unwrap();
            let (found, due) = (store(other), store(&alone[1]));
            assert_eq!(found.values().unwrap(), due.values().unwrap());
        }
    }
}

/// Reads a text in two sequences, chunk by chunk beside each other; a sequence that ends with an error takes no part
/// any more.
fn lockstep(policies: [Arc<dyn KvCachePolicy>; 2], tokens: usize) -> [Result<SequenceCache>; 2] {
    let model = model();
    let mut caches = policies.map(|policy| {
        let options = CacheOptions::default();
        SequenceCache::new(model.spec(), policy, model.compute(), options)
    });
    for chunk in text(tokens).chunks(10) {
        let alive: Vec<bool> = caches.iter().map(Result::is_ok).collect();
        let running = caches.iter_mut().filter_map(|cache| cache.as_mut().ok());
        let steps = running.map(|cache| {
            let last = cache.seen() + chunk.len() == tokens;
            cache.step(Phase::Prefill { last }, chunk.len(), tokens)
        });
        let mut pass = Pass::apart(steps).unwrap();
        let ids = chunk.repeat(alive.iter().filter(|alive| **alive).count());
        forward(&*model, &ids, &mut pass).unwrap();
        let mut ended = pass.finish_each(None).unwrap().into_iter();
        for (cache, _) in caches.iter_mut().zip(alive).filter(|(_, alive)| *alive) {
            if let Some(Err(error)) = ended.next() {
                *cache = Err(error);
            }
        }
    }
    caches
}

fn same_units(found: &SequenceCache, due: &SequenceCache) {
    assert_eq!(found.seen(), due.seen());
    for layer in 0..spec().layers {
        for head in 0..spec().kv_heads {
            let all = |cache: &SequenceCache| {
                let store = cache.store(layer);
                let parts = [store.keys(head).unwrap(), store.values(head).unwrap()];
                parts.map(|rows| rows.into_values().unwrap())
            };
            assert_eq!(all(found), all(due));
        }
    }
}

/// A disk with room for so many bytes, beyond which the system says what it says of a full one.
#[cfg(target_os = "linux")]
#[derive(Debug)]
struct SmallDisk {
    file: std::fs::File,
    full: std::fs::File,
    room: u64,
}

#[cfg(target_os = "linux")]
impl Scratch for SmallDisk {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let fits = at + bytes.len() as u64 <= self.room;
        let file = if fits { &self.file } else { &self.full };
        file.write_all_at(bytes, at)
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, bytes, at)
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_is_an_error_of_one_sequence() {
    let bound = BOUND * unit();
    let small = Tier::new("a small disk", || {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full")?;
        Ok(Box::new(SmallDisk {
            file: tempfile::tempfile()?,
            full,
            room: 2 << 10,
        }))
    });
    let [full, fine] = lockstep([thirds(small, bound), thirds(Tier::disk(None), bound)], 400);
    let error = full.unwrap_err();
    let Error::Tier { what, source } = &error else {
        panic!("{error}");
    };
    assert!(what.contains("writing"), "{what}");
    assert_eq!(source.kind(), io::ErrorKind::StorageFull, "{error}");
    let policies = || thirds(Tier::memory(), bound);
    let [alone, _] = lockstep([policies(), policies()], 400);
    same_units(&fine.unwrap(), &alone.unwrap());
}

/// This process's open files in a folder, that have no name any more.
#[cfg(target_os = "linux")]
fn nameless(folder: &std::path::Path) -> Vec<std::fs::File> {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let own = open.filter(|entry| {
        let target = std::fs::read_link(entry.path());
        target.is_ok_and(|target| target.starts_with(folder))
    });
    let write = |entry: std::fs::DirEntry| {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).open(entry.path())
    };
    own.filter_map(|entry| write(entry).ok()).collect()
}

#[cfg(target_os = "linux")]
#[test]
fn a_scratch_file_that_is_cut_off_is_an_error_of_one_sequence() {
    let bound = BOUND * unit();
    let folder = tempfile::tempdir().unwrap();
    let own = Tier::disk(Some(folder.path().into()));
    let mut both = [own, Tier::disk(None)].map(|tier| read(thirds(tier, bound), 400).unwrap());
    // Nothing is to be seen of them but by their descriptors: one for each layer.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let files = nameless(folder.path());
    assert_eq!(files.len(), spec().layers);
    for file in files {
        assert!(file.metadata().unwrap().len() > 1000);
        file.set_len(100).unwrap();
    }
    let mut ended = None;
    for _ in 0..20 {
        let found = beside(&mut both, true).unwrap();
        assert!(found[1].is_ok());
        if let Err(error) = found.into_iter().next().unwrap() {
            ended = Some(error);
            break;
        }
    }
    let Some(Error::Tier { what, source }) = ended else {
        panic!("{ended:?}");
    };
    assert!(what.contains("reading"), "{what}");
    // If something was written behind it meanwhile there is a hole.
    let kinds = [io::ErrorKind::UnexpectedEof, io::ErrorKind::InvalidData];
    assert!(kinds.contains(&source.kind()), "{source}");
}

#[test]
fn a_folder_that_is_not_there_is_an_error_once_something_is_put_away() {
    let tier = Tier::disk(Some("/nowhere/at/all".into()));
    read(thirds(tier.clone(), BOUND * unit()), 100).unwrap();
    let error = read(thirds(tier, BOUND * unit()), 400).unwrap_err();
    assert!(matches!(error, Error::Tier { .. }), "{error}");
    assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
}
