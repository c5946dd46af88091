//! How many kernels a layer launches for a token and for a chunk, as CubeCL's log has them; each launch takes the host
//! some microseconds, whatever the kernel does. And how often it waits for numbers of the device, which takes the
//! kernels that are still to run and some tens of microseconds.
//!
//! ```text
//! cargo test -p locret-examples --features wgpu --test launches -- --nocapture
//! ```

#![cfg(feature = "wgpu")]

use locret_core::{
    Budget, CacheOptions, CausalLm, Generate, Kernels, Positions, Prefill, Quantization, Sampling,
    Session, conformance::tensors_read,
};
use locret_examples::runtime::{compute, device};
use locret_models::{LoadOptions, WeightDtype, load_model_with};
use locret_policies::{HeadWeights, LayerHead, Method, PolicyConfig, RetainingHeads};
use std::{env, fs, path::PathBuf, process::Command, thread::sleep, time::Duration};

/// What the process whose log is read is told: kernels, chunks, tokens.
const ASKED: &str = "LOCRET_LAUNCHES";

/// Tokens of a chunk.
const CHUNK: usize = 16;

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../locret-models/tests/golden/llama31")
}

/// Reads and answers, in a process of its own.
#[test]
#[ignore = "another test starts it"]
fn reads() {
    let asked = env::var(ASKED).unwrap();
    let asked: Vec<usize> = asked.split(' ').map(|n| n.parse().unwrap()).collect();
    let [operations, chunks, tokens] = asked[..] else {
        panic!("{asked:?}")
    };
    let kernels = [Kernels::Auto, Kernels::Operations][operations];
    let options = LoadOptions::new()
        .weights(WeightDtype::F32)
        .kernels(kernels);
    let compute = compute(&device("wgpu").unwrap(), &options).unwrap();
    let model = load_model_with(golden(), &options, &compute).unwrap().model;
    let config = PolicyConfig::new(Method::Window)
        .budget(Budget::Units(24))
        .positions(Positions::Original);
    let policy = config.build(model.spec(), &*compute).unwrap();
    let mut session = Session::with_options(model, policy, CacheOptions::new()).unwrap();
    let ids: Vec<u32> = (0..chunks * CHUNK).map(|i| i as u32 * 7 % 180).collect();
    session.prefill(&ids, &Prefill::new(CHUNK, 0)).unwrap();
    for token in session.generate(Generate::greedy(tokens)).unwrap() {
        token.unwrap();
    }
    // The log is written by a thread that nobody waits for.
    sleep(Duration::from_secs(2));
}

/// Launches of reading so many chunks and answering with so many tokens.
fn launches(kernels: Kernels, chunks: usize, tokens: usize) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("launches");
    let settings = format!("[profiling]\nlogger = {{ level = \"minimal\", file = {log:?} }}\n");
    fs::write(folder.path().join("cubecl.toml"), settings).unwrap();
    let operations = u8::from(kernels == Kernels::Operations);
    let ran = Command::new(env::current_exe().unwrap())
        .args(["--exact", "reads", "--ignored"])
        .current_dir(folder.path())
        .env(ASKED, format!("{operations} {chunks} {tokens}"))
        .output()
        .unwrap();
    assert!(
        ran.status.success(),
        "{}",
        String::from_utf8_lossy(&ran.stdout)
    );
    let log = fs::read_to_string(log).unwrap();
    log.lines()
        .filter(|line| line.contains("Executing "))
        .count()
}

#[test]
fn a_layer_launches_few_kernels() {
    let layers = {
        let options = LoadOptions::new();
        let compute = compute(&device("flex").unwrap(), &options).unwrap();
        let loaded = load_model_with(golden(), &options, &compute).unwrap();
        loaded.model.spec().layers
    };
    let of = |kernels| {
        let before = launches(kernels, 4, 2);
        let token = launches(kernels, 4, 6) - before;
        let chunk = launches(kernels, 6, 2) - before;
        [
            token as f64 / (4 * layers) as f64,
            chunk as f64 / (2 * layers) as f64,
        ]
    };
    let [token, chunk] = of(Kernels::Auto);
    let [token_before, chunk_before] = of(Kernels::Operations);
    println!("launches of a layer, with what belongs to none: {token} a token, {chunk} a chunk");
    println!("by Burn's operations: {token_before} a token, {chunk_before} a chunk");
    assert!(token > 8.0 && token <= 20.0, "{token}");
    assert!(chunk > 8.0 && chunk <= 20.0, "{chunk}");
}

/// Retaining heads whose weights follow a formula.
fn heads(model: &dyn CausalLm) -> RetainingHeads {
    let (spec, d_r) = (model.spec(), 8);
    let weights = |n: usize| {
        (0..n)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 60.0)
            .collect()
    };
    let layer = |l: usize| LayerHead {
        d_r,
        fc1: weights(d_r * spec.layer(l).qkv_features()),
        fc2: weights(d_r * spec.kv_heads),
        ..LayerHead::default()
    };
    let weights = HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        ..HeadWeights::default()
    };
    RetainingHeads::for_model(&weights, model).unwrap()
}

/// What is read of the device by a chunk, apart from what belongs to a prompt, and by a token: in each layer, and apart
/// from that.
fn reads_of(method: Method, bits: Option<u8>, pool: usize, sampling: Sampling) -> [[usize; 2]; 2] {
    let options = LoadOptions::new().weights(WeightDtype::F32);
    let compute = compute(&device("wgpu").unwrap(), &options).unwrap();
    let model = load_model_with(golden(), &options, &compute).unwrap().model;
    let layers = model.spec().layers;
    let mut config = PolicyConfig::new(method)
        .budget(Budget::Units(24))
        .positions(Positions::Original);
    config.quantize = bits.map(Quantization::bits);
    config.pool = (pool > 1).then_some(pool);
    let policy = match method {
        Method::Locret => config.build_with_heads(model.spec(), heads(&*model)),
        _ => config.build(model.spec(), &*compute),
    };
    let read = |chunks: usize, tokens: usize| {
        let policy = policy.as_ref().unwrap().clone();
        let mut session =
            Session::with_options(model.clone(), policy, CacheOptions::new()).unwrap();
        let ids: Vec<u32> = (0..chunks * CHUNK).map(|i| i as u32 * 7 % 180).collect();
        let before = tensors_read();
        session.prefill(&ids, &Prefill::new(CHUNK, 0)).unwrap();
        let generate = Generate::greedy(tokens).sampling(sampling);
        for token in session.generate(generate).unwrap() {
            token.unwrap();
        }
        tensors_read() - before
    };
    let before = read(4, 2);
    [read(6, 2), read(4, 4)].map(|more| {
        let more = (more - before) / 2;
        [more / layers, more % layers]
    })
}

#[test]
fn a_layer_seldom_waits_for_the_device() {
    let drawn = Sampling {
        temperature: 1.0,
        ..Sampling::greedy()
    };
    let greedy = Sampling::greedy();
    // In each layer and apart from layers: a chunk, a token. Of a token only its number comes over.
    for (method, bits, pool, sampling, due) in [
        (Method::Window, None, 1, greedy, [[0, 0], [0, 1]]),
        (Method::Window, None, 1, drawn, [[0, 0], [0, 1]]),
        (Method::Window, Some(4), 1, greedy, [[0, 0], [0, 1]]),
        // Units are scored and chosen where they lie.
        (Method::Locret, None, 1, greedy, [[0, 0], [0, 1]]),
        // Which units stay: codes of the host's rules.
        (Method::Locret, Some(4), 1, greedy, [[1, 0], [0, 1]]),
        // Scores that are pooled are looked at.
        (Method::Locret, None, 3, greedy, [[1, 0], [1, 1]]),
        // How likely each token of a chunk was, and the logits after the last one.
        (Method::SirLlm, None, 1, greedy, [[0, 2], [0, 1]]),
        (Method::H2o, None, 1, greedy, [[1, 0], [1, 1]]),
        (Method::SnapKv, None, 1, greedy, [[1, 0], [1, 1]]),
    ] {
        let found = reads_of(method, bits, pool, sampling);
        let case = format!("{method}, {bits:?} bits, pooled over {pool}");
        println!("{case}: {found:?}");
        assert_eq!(found, due, "{case}");
    }
}
