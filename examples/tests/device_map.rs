//! Some layers on the host and the rest on a device: the same logits, kept units and answers as all of them on the host.
//!
//! ```text
//! cargo test -p locret-examples --features wgpu --test device_map
//! ```

#![cfg(feature = "wgpu")]

use locret_core::{
    Budget, CacheOptions, CausalLm, Compute, DeviceMap, Generate, KvCachePolicy, Positions,
    Prefill, Quantization, Session,
};
use locret_eval::random;
use locret_examples::{
    args::ModelArgs,
    devices::computes,
    runtime::{compute, device},
};
use locret_models::{LoadOptions, WeightDtype, load_model_with};
use locret_policies::{Method, PolicyConfig};
use std::{path::PathBuf, sync::Arc};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../locret-models/tests/golden")
        .join(name)
}

fn options() -> LoadOptions {
    LoadOptions::new().weights(WeightDtype::F32)
}

fn on(name: &str) -> Arc<dyn Compute> {
    compute(&device(name).unwrap(), &options()).unwrap()
}

fn load(name: &str, compute: &Arc<dyn Compute>) -> Arc<dyn CausalLm> {
    let loaded = load_model_with(golden(name), &options(), compute).unwrap();
    loaded.model
}

/// Of three layers: one and two, two and one, none and three with the embedding on the host, and the one in the middle.
fn maps() -> Vec<(&'static str, Arc<dyn Compute>)> {
    let (host, wgpu) = (on("flex"), on("wgpu"));
    let of = |parts: &[(&Arc<dyn Compute>, usize)]| {
        DeviceMap::of(parts.iter().map(|(on, layers)| ((*on).clone(), *layers))).unwrap()
    };
    let ends = of(&[(&wgpu, 3)]).with_input(host.clone()).unwrap();
    vec![
        ("host, device", Arc::new(of(&[(&host, 1), (&wgpu, 2)]))),
        ("device, host", Arc::new(of(&[(&wgpu, 2), (&host, 1)]))),
        (
            "device, host, device",
            Arc::new(of(&[(&wgpu, 1), (&host, 1), (&wgpu, 1)])),
        ),
        ("device but for the embedding", Arc::new(ends)),
    ]
}

/// 90 tokens, none of them twice.
fn ids() -> Vec<u32> {
    (0..90).map(|i| (i * 77 + 13) % 180).collect()
}

struct Run {
    kept: Vec<Vec<u32>>,
    logits: Vec<f32>,
    tokens: Vec<u32>,
}

fn policy(config: &PolicyConfig, model: &dyn CausalLm) -> Arc<dyn KvCachePolicy> {
    match config.policy {
        Method::Locret => {
            let heads = random::heads(model, 8, 5).unwrap();
            config.build_with_heads(model.spec(), heads).unwrap()
        }
        _ => config.build_for(model).unwrap(),
    }
}

fn go_on(session: &mut Session) -> Run {
    let (cache, spec) = (session.cache(), session.model().spec());
    let heads = (0..spec.layers).flat_map(|l| (0..spec.kv_heads).map(move |h| (l, h)));
    let kept = heads.map(|(l, h)| cache.positions(l, h).to_vec()).collect();
    let logits = session.logits().unwrap().to_vec();
    let tokens = session.generate(Generate::greedy(10)).unwrap();
    Run {
        kept,
        logits,
        tokens: tokens.map(Result::unwrap).collect(),
    }
}

fn read(model: &Arc<dyn CausalLm>, config: &PolicyConfig) -> Session {
    let mut session = Session::new(model.clone(), policy(config, &**model)).unwrap();
    session.prefill(&ids(), &Prefill::new(16, 10)).unwrap();
    session
}

/// Logits may be off by rounding.
fn same(case: &str, found: &Run, expected: &Run) {
    assert_eq!(found.kept, expected.kept, "{case}");
    assert_eq!(found.logits.len(), expected.logits.len());
    let off = (found.logits.iter().zip(&expected.logits)).map(|(a, b)| (a - b).abs());
    let off = off.fold(0.0, f32::max);
    println!("{case}: logits {off:.1e} off");
    assert!(off <= 1e-4, "{case}: logits {off:.1e} off");
    assert_eq!(found.tokens, expected.tokens, "{case}");
}

fn policies() -> Vec<(&'static str, PolicyConfig)> {
    let of = |method| PolicyConfig::new(method).budget(Budget::Units(24));
    let mut codes = of(Method::Window);
    codes.quantize = Some(Quantization::bits(8));
    vec![
        ("window", of(Method::Window)),
        (
            "window, original",
            of(Method::Window).positions(Positions::Original),
        ),
        ("locret", of(Method::Locret)),
        ("h2o", of(Method::H2o)),
        ("codes of 8 bits", codes),
        ("sirllm", of(Method::SirLlm)),
    ]
}

#[test]
fn layers_on_host_and_device_compute_what_one_device_does() {
    for (name, config) in policies() {
        let alone = load("llama31", &on("flex"));
        let expected = go_on(&mut read(&alone, &config));
        for (map, compute) in maps() {
            let model = load("llama31", &compute);
            same(
                &format!("{name}, {map}"),
                &go_on(&mut read(&model, &config)),
                &expected,
            );
        }
    }
}

#[test]
fn families_with_biases_norms_of_heads_and_tied_heads() {
    let config = PolicyConfig::new(Method::Window).budget(Budget::Units(24));
    for name in ["llama32", "llama_biases", "phi4_mini", "qwen2", "qwen3"] {
        let alone = load(name, &on("flex"));
        let expected = go_on(&mut read(&alone, &config));
        for wanted in [0, 1, 2, 3] {
            let args = ModelArgs {
                device: "wgpu".into(),
                gpu_layers: Some(wanted),
                ..ModelArgs::default()
            };
            let model = load(name, &computes(&args, alone.spec().layers).unwrap());
            let case = format!("{name}, --gpu-layers {wanted}");
            same(&case, &go_on(&mut read(&model, &config)), &expected);
            // Whatever lies where, it is the same model.
            assert_eq!(model.fingerprint().unwrap(), alone.fingerprint().unwrap());
        }
    }
}

#[test]
fn snapshots_go_from_map_to_map() {
    let config = PolicyConfig::new(Method::H2o).budget(Budget::Units(24));
    let mut all = maps();
    all.push(("host", on("flex")));
    all.push(("device", on("wgpu")));
    let alone = load("llama31", &on("flex"));
    let expected = go_on(&mut read(&alone, &config));
    let mut bytes = Vec::new();
    read(&alone, &config).write(&mut bytes).unwrap();
    for (map, compute) in all {
        let model = load("llama31", &compute);
        let length = bytes.len() as u64;
        let (policy, options) = (policy(&config, &*model), CacheOptions::new());
        let mut session = Session::read(model, policy, options, &mut &bytes[..], length).unwrap();
        // What was read here is handed on to the next.
        bytes.clear();
        session.write(&mut bytes).unwrap();
        same(map, &go_on(&mut session), &expected);
    }
}

/// A model that knows of no map, on caches that lie on one: what it projects is brought to each layer's device, and what
/// comes of it back.
#[test]
fn an_adapter_need_not_know_of_maps() {
    let config = PolicyConfig::new(Method::SnapKv).budget(Budget::Units(24));
    let model = load("llama31", &on("flex"));
    let expected = go_on(&mut read(&model, &config));
    for (map, compute) in maps() {
        let unaware: Arc<dyn CausalLm> = Arc::new(Unaware {
            model: model.clone(),
            compute,
        });
        let found = go_on(&mut read(&unaware, &config));
        same(map, &found, &expected);
        let cache = read(&unaware, &config);
        let cache = cache.cache();
        assert!(
            (0..3).any(|layer| cache.compute(layer).name() == "GPU kernels"),
            "{map}"
        );
    }
}

/// The host's model under another compute's name.
#[derive(Debug)]
struct Unaware {
    model: Arc<dyn CausalLm>,
    compute: Arc<dyn Compute>,
}

impl CausalLm for Unaware {
    fn spec(&self) -> &locret_core::ModelSpec {
        self.model.spec()
    }

    fn compute(&self) -> &Arc<dyn Compute> {
        &self.compute
    }

    fn hidden(
        &self,
        ids: &[u32],
        pass: &mut locret_core::Pass<'_>,
    ) -> locret_core::Result<locret_core::Rows> {
        self.model.hidden(ids, pass)
    }

    fn logits(&self, hidden: locret_core::Rows) -> locret_core::Result<locret_core::Rows> {
        self.model.logits(hidden)
    }
}
