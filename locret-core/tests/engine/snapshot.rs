//! Sessions that are saved and taken up again, and everything that is refused.

use crate::{
    device, model, model_of,
    policies::{
        Attended, Birth, Coded, Everything, KeyNorm, Mixing, Newest, Ragged, Several, Surprise,
    },
    spec, text,
};
use locret_core::{
    Budget, CacheOptions, CausalLm, Compute, DType, DecodeEviction, Error, Evict, Folder, Generate,
    Kernels, KvCachePolicy, ModelSpec, Needs, Pass, Phase, Positions, Prefill, QuantLayout,
    Quantization, Result, RopeConfig, RopeScaling, Rows, Sampling, Scorer, Session, SnapshotError,
    SnapshotStore, conformance::RandomModel, forward,
};
use sha2::{Digest, Sha256};
use std::{
    io::{Read, Write},
    sync::Arc,
};

const PREFILL: Prefill = Prefill::new(16, 4);

fn evict<S: Scorer + 'static>(scorer: S, positions: Positions) -> Arc<dyn KvCachePolicy> {
    Arc::new(
        Evict::new(scorer, Budget::Units(20))
            .recent(2)
            .with_positions(positions)
            .while_decoding(DecodeEviction::Every(3)),
    )
}

fn policies(positions: Positions) -> Vec<Arc<dyn KvCachePolicy>> {
    let limit = 20;
    vec![
        evict(KeyNorm, positions),
        evict(Birth, positions),
        evict(Surprise, positions),
        evict(Attended, positions),
        Arc::new(Ragged { limit, positions }),
        Arc::new(Mixing { limit, positions }),
        Arc::new(Several { limit, positions }),
        Arc::new(Everything {
            positions,
            needs: Needs::NOTHING,
        }),
    ]
}

fn codes() -> Vec<Quantization> {
    let layouts = [QuantLayout::PerToken, QuantLayout::Kivi];
    let all = layouts.into_iter().flat_map(|layout| {
        [2, 3, 4, 8].map(|bits| Quantization {
            bits,
            layout,
            group: 8,
            residual: 3,
            first: 2,
            hadamard: bits < 8,
        })
    });
    all.collect()
}

fn written(session: &Session) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.write(&mut bytes).unwrap();
    bytes
}

/// Taken up by the same model and policy.
fn taken_up(of: &Session, options: CacheOptions, bytes: &[u8]) -> Result<Session> {
    let (model, policy) = (of.model().clone(), of.cache().policy().clone());
    Session::read(model, policy, options, &mut &bytes[..], bytes.len() as u64)
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

/// All that can be seen of a session, but for times and reserves.
#[track_caller]
fn assert_same(a: &Session, b: &Session, what: &str) {
    assert_eq!(a.tokens(), b.tokens(), "{what}");
    assert_eq!(a.logits().map(bits), b.logits().map(bits), "{what}");
    let (x, y) = (a.cache(), b.cache());
    assert_eq!(x.seen(), y.seen(), "{what}");
    assert_eq!(x.peak(), y.peak(), "{what}");
    assert_eq!(x.prefill_peak(), y.prefill_peak(), "{what}");
    let counts = |s: &Session| (s.report().prefill_tokens, s.report().decode_tokens);
    assert_eq!(counts(a), counts(b), "{what}");
    let spec = x.spec();
    for (layer, head) in (0..spec.layers).flat_map(|l| (0..spec.kv_heads).map(move |h| (l, h))) {
        assert_eq!(x.positions(layer, head), y.positions(layer, head), "{what}");
        assert_eq!(
            bits(x.scores(layer, head)),
            bits(y.scores(layer, head)),
            "{what}"
        );
        let rows = |rows: Result<Rows>| bits(&rows.unwrap().into_values().unwrap());
        let (x, y) = (x.store(layer), y.store(layer));
        assert_eq!(rows(x.keys(head)), rows(y.keys(head)), "{what}");
        assert_eq!(rows(x.values(head)), rows(y.values(head)), "{what}");
    }
}

/// The most likely tokens, then drawn ones, a further turn, and the logits at the end.
fn go_on(session: &mut Session, rest: &[u32]) {
    if !rest.is_empty() {
        session.prefill(rest, &PREFILL).unwrap();
    }
    let drawn = Sampling {
        temperature: 1.2,
        seed: 11,
        ..Sampling::greedy()
    };
    for generate in [Generate::greedy(4), Generate::greedy(5).sampling(drawn)] {
        for token in session.generate(generate).unwrap() {
            token.unwrap();
        }
    }
    session.prefill(&text(90)[60..], &PREFILL).unwrap();
    for token in session
        .generate(Generate::greedy(3).sampling(drawn))
        .unwrap()
    {
        token.unwrap();
    }
    session.score(&[5, 6, 7]).unwrap();
}

/// Saves a session at several moments, and compares what becomes of both.
fn check(
    model: Arc<dyn CausalLm>,
    policy: Arc<dyn KvCachePolicy>,
    options: CacheOptions,
    what: &str,
) {
    let ids = text(60);
    let start = || Session::with_options(model.clone(), policy.clone(), options).unwrap();
    let stop = |session: &mut Session, chunks: usize| {
        let stopped =
            session.prefill_with(&ids, &PREFILL, &mut |done| match done.index + 1 == chunks {
                true => Err(Error::EmptyPrompt),
                false => Ok(()),
            });
        assert!(matches!(stopped, Err(Error::EmptyPrompt)), "{stopped:?}");
    };
    for moment in [
        "nothing",
        "a chunk",
        "the last chunk",
        "a prompt",
        "a token",
        "scores",
    ] {
        let what = format!("{what}, after {moment}");
        let mut session = start();
        match moment {
            "nothing" => {}
            "a chunk" => stop(&mut session, 2),
            // The tail has not been read.
            "the last chunk" => stop(&mut session, 4),
            _ => session.prefill(&ids, &PREFILL).unwrap(),
        }
        match moment {
            "a token" => {
                let tokens = session.generate(Generate::greedy(3)).unwrap();
                assert_eq!(tokens.filter(|t| t.is_ok()).count(), 3);
            }
            "scores" => drop(session.score(&[1, 2, 3]).unwrap()),
            _ => {}
        }
        let bytes = written(&session);
        let mut again = taken_up(&session, options, &bytes).unwrap();
        assert_same(&session, &again, &what);
        // Nothing is lost that does not show yet.
        assert!(written(&again) == bytes, "{what}: written differently");
        let rest = &ids[session.tokens().len().min(60)..];
        go_on(&mut session, rest);
        go_on(&mut again, rest);
        assert_same(&session, &again, &what);
        assert_eq!(session.cache().bytes(), again.cache().bytes(), "{what}");
    }
}

#[test]
fn sessions_go_on_bit_for_bit_over_every_dense_store() {
    for kernels in [Kernels::Auto, Kernels::Operations] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for positions in [Positions::Original, Positions::Compact] {
                for policy in policies(positions) {
                    let options = CacheOptions::new().dtype(dtype).kernels(kernels);
                    let what = format!("{}, {options:?}, {positions:?}", policy.name());
                    check(model(), policy, options, &what);
                }
            }
        }
    }
}

#[test]
fn sessions_go_on_bit_for_bit_over_codes() {
    for (index, codes) in codes().into_iter().enumerate() {
        for positions in [Positions::Original, Positions::Compact] {
            let kernels = [Kernels::Auto, Kernels::Operations][index % 2];
            for policy in policies(positions) {
                let options = CacheOptions::new().kernels(kernels);
                let what = format!("{}, {codes:?}, {options:?}, {positions:?}", policy.name());
                check(model(), Arc::new(Coded(policy, codes)), options, &what);
            }
        }
    }
}

#[test]
fn long_factors_are_taken_up_too() {
    let mut spec = spec();
    let factors = |from: f64| (0..8).map(|i| from + f64::from(i)).collect();
    spec.rope = RopeConfig {
        scaling: RopeScaling::LongRope {
            short: factors(1.0),
            long: factors(2.0),
            original_max: 70,
            attention_factor: 1.1,
            switch: Default::default(),
        },
        ..spec.rope
    };
    // The text crosses 70 tokens while it goes on, or has crossed them before.
    for positions in [Positions::Original, Positions::Compact] {
        let policy = || evict(Birth, positions);
        check(
            model_of(spec.clone()),
            policy(),
            CacheOptions::new(),
            "LongRoPE",
        );
        let mut long = Session::new(model_of(spec.clone()), policy()).unwrap();
        long.prefill(&text(100), &PREFILL).unwrap();
        let mut again = taken_up(&long, CacheOptions::new(), &written(&long)).unwrap();
        assert_same(&long, &again, "beyond the original context");
        go_on(&mut long, &[]);
        go_on(&mut again, &[]);
        assert_same(&long, &again, "beyond the original context");
    }
}

#[test]
fn whatever_safetensors_reads_can_look_into_a_snapshot() {
    let mut session = Session::new(model(), evict(Birth, Positions::Compact)).unwrap();
    session.prefill(&text(60), &PREFILL).unwrap();
    let bytes = written(&session);
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids: Vec<u8> = session
        .tokens()
        .iter()
        .flat_map(|id| id.to_le_bytes())
        .collect();
    assert_eq!(file.tensor("tokens").unwrap().data(), ids);
    let scores: Vec<u8> = (session.cache().scores(1, 0).iter())
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let saved = file.tensor("layers.1.heads.0.scores").unwrap();
    assert_eq!((saved.data(), saved.shape()), (&scores[..], &[24][..]));
    let store = file.tensor("layers.0.store").unwrap();
    let mut own = Vec::new();
    session.cache().store(0).write(&mut own).unwrap();
    assert_eq!(store.data(), own);
    let digest = Sha256::digest(&bytes[..bytes.len() - 32]);
    assert_eq!(file.tensor("sha256").unwrap().data(), &digest[..]);
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!(metadata["format"], "locret-session");
    assert_eq!(metadata["policy"], "birth");
}

fn saved() -> (Session, Vec<u8>) {
    let mut session = Session::new(model(), evict(Birth, Positions::Original)).unwrap();
    session.prefill(&text(60), &PREFILL).unwrap();
    let bytes = written(&session);
    (session, bytes)
}

fn refused(
    model: Arc<dyn CausalLm>,
    policy: Arc<dyn KvCachePolicy>,
    options: CacheOptions,
    bytes: &[u8],
) -> SnapshotError {
    let read = Session::read(model, policy, options, &mut &bytes[..], bytes.len() as u64);
    match read {
        Err(Error::Snapshot(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// A model that does not say which one it is.
#[derive(Debug)]
struct Silent(RandomModel);

impl CausalLm for Silent {
    fn spec(&self) -> &ModelSpec {
        self.0.spec()
    }

    fn compute(&self) -> &Arc<dyn Compute> {
        self.0.compute()
    }

    fn hidden(&self, ids: &[u32], pass: &mut Pass<'_>) -> Result<Rows> {
        self.0.hidden(ids, pass)
    }

    fn logits(&self, hidden: Rows) -> Result<Rows> {
        self.0.logits(hidden)
    }
}

fn other_weights() -> RandomModel {
    RandomModel::new(spec(), 8, &device()).unwrap()
}

#[test]
fn another_model_is_refused() {
    let (session, bytes) = saved();
    let policy = || evict(Birth, Positions::Original);
    let options = CacheOptions::new();
    let own = session.model().fingerprint().unwrap().unwrap();
    let mut shape = spec();
    shape.vocab += 1;
    let mut rope = spec();
    rope.rope.theta = 9_999.0;
    let others: [Arc<dyn CausalLm>; 4] = [
        Arc::new(other_weights()),
        model_of(shape),
        model_of(rope),
        Arc::new(Silent(RandomModel::new(spec(), 7, &device()).unwrap())),
    ];
    for other in others {
        match refused(other.clone(), policy(), options, &bytes) {
            SnapshotError::OtherModel { expected, found } => {
                assert!(found.contains(&own), "{found}");
                if let Some(fingerprint) = other.fingerprint().unwrap() {
                    assert!(expected.contains(&fingerprint), "{expected}");
                }
            }
            error => panic!("{error}"),
        }
    }
    // Of models that don't say which one they are the shape alone is compared.
    let silent = |seed| -> Arc<dyn CausalLm> {
        Arc::new(Silent(RandomModel::new(spec(), seed, &device()).unwrap()))
    };
    let mut session = Session::new(silent(7), policy()).unwrap();
    session.prefill(&text(60), &PREFILL).unwrap();
    let bytes = written(&session);
    let length = bytes.len() as u64;
    Session::read(silent(8), policy(), options, &mut &bytes[..], length).unwrap();
    let error = refused(model(), policy(), options, &bytes);
    assert!(matches!(error, SnapshotError::OtherModel { .. }), "{error}");
}

#[test]
fn another_policy_or_store_is_refused() {
    let (_, bytes) = saved();
    let options = CacheOptions::new();
    let units = |units| Evict::new(Birth, Budget::Units(units)).recent(2);
    let every = DecodeEviction::Every(3);
    let others: [Arc<dyn KvCachePolicy>; 5] = [
        evict(Newest, Positions::Original),
        evict(Birth, Positions::Compact),
        Arc::new(units(21).while_decoding(every)),
        Arc::new(units(20)),
        Arc::new(units(20).while_decoding(every).sinks(1)),
    ];
    for policy in others {
        let own = policy.fingerprint();
        match refused(model(), policy, options, &bytes) {
            SnapshotError::OtherPolicy { expected, found } => {
                assert_eq!(expected, own);
                assert_eq!(found, evict(Birth, Positions::Original).fingerprint());
            }
            error => panic!("{error}"),
        }
    }
    let policy = evict(Birth, Positions::Original);
    let half = options.dtype(DType::F16);
    let error = refused(model(), policy.clone(), half, &bytes);
    assert!(matches!(error, SnapshotError::OtherStore { .. }), "{error}");
    // Where it is computed is another matter.
    let elsewhere = options.kernels(Kernels::Operations);
    let length = bytes.len() as u64;
    let mut session = Session::read(model(), policy, elsewhere, &mut &bytes[..], length).unwrap();
    assert!(session.cache().store(0).tiles(0).is_none());
    go_on(&mut session, &[]);
}

#[test]
fn foreign_files_are_refused() {
    let (session, bytes) = saved();
    let weights = {
        let data = [0u8; 16];
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![4], &data);
        let format = [("format".to_owned(), "pt".to_owned())].into();
        safetensors::serialize([("weight", view.unwrap())], Some(format)).unwrap()
    };
    let with_header = |json: &str, more: usize| {
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.bytes());
        file.extend(vec![0; more]);
        file
    };
    let long = format!(
        "{{\"__metadata__\":{{\"format\":\"{}\"}}}}",
        "x".repeat(70_000)
    );
    let deep = "[".repeat(100_000);
    let files = [
        Vec::new(),
        vec![0; 7],
        vec![0; 8],
        vec![0; 4096],
        vec![255; 4096],
        b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0".to_vec(),
        weights,
        with_header("{}", 0),
        with_header("[]", 5),
        with_header("{\"__metadata__\":7}", 0),
        with_header("{\"__metadata__\":{}}", 0),
        with_header("{\"__metadata__\":{\"format\":\"locret-session\"", 0),
        with_header(&long, 9),
        with_header(&deep, 0),
        bytes[..50].to_vec(),
    ];
    for (index, file) in files.iter().enumerate() {
        let model = session.model().clone();
        let policy = session.cache().policy().clone();
        let error = refused(model, policy, CacheOptions::new(), file);
        assert!(
            matches!(error, SnapshotError::Foreign(_)),
            "{index}: {error}"
        );
    }
    // A later version is named as such, whatever else it has.
    let later = with_header(
        "{\"__metadata__\":{\"format\":\"locret-session\",\"version\":\"2\",\"new\":\"x\"}}",
        32,
    );
    let policy = session.cache().policy().clone();
    match refused(session.model().clone(), policy, CacheOptions::new(), &later) {
        SnapshotError::Version { found, known } => assert_eq!((&found[..], known), ("2", 1)),
        error => panic!("{error}"),
    }
}

#[test]
fn a_file_that_is_cut_off_or_altered_is_refused() {
    let (session, bytes) = saved();
    let read = |bytes: &[u8]| taken_up(&session, CacheOptions::new(), bytes);
    assert_same(&session, &read(&bytes).unwrap(), "unaltered");
    for length in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
        let cut = read(&bytes[..length]);
        assert!(matches!(cut, Err(Error::Snapshot(_))), "{length}: {cut:?}");
        // The file is said to be whole, and ends while it is read.
        let (model, policy) = (session.model().clone(), session.cache().policy().clone());
        let whole = bytes.len() as u64;
        let mut from = &bytes[..length];
        let cut = Session::read(model, policy, CacheOptions::new(), &mut from, whole);
        assert!(
            matches!(&cut, Err(Error::Snapshot(SnapshotError::Damaged(_)))),
            "{length}: {cut:?}"
        );
    }
    let long = read(&[&bytes[..], &[0]].concat());
    assert!(matches!(
        long,
        Err(Error::Snapshot(SnapshotError::Damaged(_)))
    ));
    for at in (0..bytes.len()).step_by(13) {
        let mut altered = bytes.clone();
        altered[at] ^= 1;
        let found = read(&altered);
        assert!(matches!(found, Err(Error::Snapshot(_))), "{at}: {found:?}");
    }
}

#[test]
fn what_could_not_be_taken_up_is_not_saved() {
    let refused = |session: &Session| match session.write(&mut Vec::new()) {
        Err(Error::Snapshot(SnapshotError::NotSaved(what))) => what,
        other => panic!("{other:?}"),
    };
    // A policy that would have made another store.
    let (mut session, bytes) = saved();
    let codes = Quantization::bits(8);
    let policy = Arc::new(Coded(evict(Birth, Positions::Original), codes));
    session.cache_mut().set_policy(policy).unwrap();
    refused(&session);
    let policy = Arc::new(Coded(evict(KeyNorm, Positions::Original), codes));
    session.cache_mut().set_policy(policy).unwrap();
    let what = refused(&session);
    assert!(what.contains("f32") && what.contains("8bit"), "{what}");
    // One of the same store is fine.
    let policy = evict(Newest, Positions::Original);
    session.cache_mut().set_policy(policy).unwrap();
    let mut again = taken_up(&session, CacheOptions::new(), &written(&session)).unwrap();
    assert_same(&session, &again, "another policy");
    go_on(&mut session, &[]);
    go_on(&mut again, &[]);
    assert_same(&session, &again, "another policy");

    // Tokens that the session does not know.
    let (mut session, _) = saved();
    let model = session.model().clone();
    let mut pass = Pass::new([session.cache_mut().step(Phase::Forced, 1, 61)]).unwrap();
    forward(&*model, &[3], &mut pass).unwrap();
    pass.finish(None).unwrap();
    refused(&session);

    // A pass that was not finished.
    let mut session = taken_up(&session, CacheOptions::new(), &bytes).unwrap();
    drop(Pass::new([session.cache_mut().step(Phase::Forced, 1, 61)]).unwrap());
    let error = session.write(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, Error::Unusable), "{error}");

    // A device that is full.
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 = (self.0)
                .checked_sub(bytes.len())
                .ok_or(std::io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (session, bytes) = saved();
    for room in [0, 8, 3000, bytes.len() - 1] {
        match session.write(&mut Full(room)) {
            Err(Error::Snapshot(SnapshotError::Io { source, .. })) => {
                assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
            }
            other => panic!("{other:?}"),
        }
    }
    session.write(&mut Full(bytes.len())).unwrap();
}

#[test]
fn a_file_is_the_old_one_until_it_is_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("conversation");
    let options = CacheOptions::new();
    let restore = || Session::restore(model(), evict(Birth, Positions::Original), options, &path);
    match restore() {
        Err(Error::Snapshot(SnapshotError::Io { what, source })) => {
            assert!(what.contains("conversation"), "{what}");
            assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
        }
        other => panic!("{other:?}"),
    }
    let (mut session, _) = saved();
    session.save(&path).unwrap();
    assert_same(&session, &restore().unwrap(), "saved");
    let before = session.fork().unwrap();
    go_on(&mut session, &[]);
    let policy = Arc::new(Coded(
        evict(KeyNorm, Positions::Original),
        Quantization::bits(8),
    ));
    let own = session.cache().policy().clone();
    session.cache_mut().set_policy(policy).unwrap();
    session.save(&path).unwrap_err();
    assert_same(&before, &restore().unwrap(), "the old one");
    session.cache_mut().set_policy(own).unwrap();
    session.save(&path).unwrap();
    assert_same(&session, &restore().unwrap(), "the new one");
    // Nothing else is left of either.
    let names = std::fs::read_dir(folder.path()).unwrap();
    assert_eq!(names.count(), 1);
    assert!(session.save(folder.path().join("no/such/folder")).is_err());
    assert!(session.save(folder.path()).is_err());
    assert!(session.save("/").is_err());
}

#[test]
fn a_folder_keeps_what_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let store = Folder::new(folder.path().join("a/b")).unwrap();
    assert!(store.get("one").unwrap().is_none());
    store.remove("one").unwrap();
    let put = |key: &str, bytes: &[u8]| {
        store.put(key, &mut |to| {
            to.write_all(bytes).unwrap();
            Ok(())
        })
    };
    let get = |key: &str| {
        let mut bytes = Vec::new();
        let mut stored = store.get(key).unwrap()?;
        stored.from.read_to_end(&mut bytes).unwrap();
        assert_eq!(stored.length, bytes.len() as u64);
        Some(bytes)
    };
    let long = "x".repeat(128);
    for key in ["one", "A.b_c-9", "0", "-", "_", "a..", &long] {
        put(key, key.as_bytes()).unwrap();
        put(key, b"again").unwrap();
        assert_eq!(get(key).as_deref(), Some(&b"again"[..]), "{key}");
    }
    put("one", b"other").unwrap();
    let failed = store.put("one", &mut |to| {
        to.write_all(b"half").unwrap();
        Err(Error::EmptyPrompt)
    });
    assert!(matches!(failed, Err(Error::EmptyPrompt)), "{failed:?}");
    assert_eq!(get("one").unwrap(), b"other");
    store.remove("one").unwrap();
    assert_eq!(get("one"), None);
    assert_eq!(get("0").unwrap(), b"again");
    let longer = "x".repeat(129);
    for key in [
        "", ".", "..", ".x", "a/b", "a\\b", "../a", "a b", "ä", "a\0", "a\n", &longer,
    ] {
        for found in [
            put(key, b"").map(drop),
            store.get(key).map(drop),
            store.remove(key),
        ] {
            match found {
                Err(Error::Snapshot(SnapshotError::Key(named))) => assert_eq!(named, key),
                other => panic!("{key:?}: {other:?}"),
            }
        }
    }
}
