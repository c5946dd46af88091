//! Locret as its authors run it, against a naive version of their procedure in PyTorch
//! (`golden/authors/procedure.py`): the same units kept after every chunk in every layer and head,
//! the same scores, the same text. SmolLM2 is fetched if it is not there.

mod common;

use burn::tensor::Device;
use common::Numbers;
use locret_core::{
    Births, Budget, CacheOptions, CausalLm, ChunkDone, Decided, Generate, Kernels, ModelSpec,
    Positions, Prefill, Probe, Result, Session,
};
use locret_models::{FetchOptions, LoadOptions, WeightDtype, load_model, resolve};
use locret_policies::{HeadWeights, LayerHead, Locret, RetainingHeads};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

#[derive(Deserialize)]
struct Golden {
    settings: Settings,
    /// The prompt of all cases, where they share one.
    #[serde(default)]
    prompt: Vec<u32>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Settings {
    chunk: usize,
    budget: usize,
    stabilizers: usize,
    local: usize,
    d_r: usize,
    fc1_bound: f32,
    fc2_bound: f32,
    chunks: usize,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    seed: String,
    positions: Positions,
    #[serde(default)]
    model: String,
    #[serde(default)]
    rope: String,
    #[serde(default)]
    prompt: Vec<u32>,
    #[serde(default)]
    score_layers: Option<Vec<usize>>,
    #[serde(default)]
    exact_ties: Vec<(usize, usize, usize)>,
    #[serde(default)]
    top20: Option<Top>,
    #[serde(default)]
    last_logits: Option<Vec<f32>>,
    greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct Top {
    ids: Vec<u32>,
    values: Vec<f32>,
}

fn golden(folder: &str) -> (Golden, Vec<u8>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(folder);
    let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
    let tensors = std::fs::read(folder.join("golden.safetensors")).unwrap();
    (serde_json::from_str(&text).unwrap(), tensors)
}

/// The random heads of `golden/authors/procedure.py`: one stream, fc1 before fc2, layer by layer.
fn heads(spec: &ModelSpec, settings: &Settings, seed: u64) -> HeadWeights {
    let mut numbers = Numbers(seed);
    let inputs = spec.layer(0).qkv_features();
    let layer = |_| LayerHead {
        d_r: settings.d_r,
        fc1: numbers.list(settings.d_r * inputs, settings.fc1_bound),
        fc2: numbers.list(spec.kv_heads * settings.d_r, settings.fc2_bound),
        ..LayerHead::default()
    };
    HeadWeights {
        layers: (0..spec.layers).map(layer).collect(),
        metadata: Default::default(),
        ..HeadWeights::default()
    }
}

/// What is scored, and what is kept after each chunk, `[chunk][layer][head]`.
#[derive(Default)]
struct Watched {
    births: Births,
    kept: Vec<Vec<Vec<Vec<u32>>>>,
}

impl Probe for Watched {
    fn decided(&mut self, at: &Decided<'_>) -> Result<()> {
        self.births.decided(at)
    }

    fn chunk(&mut self, done: &ChunkDone<'_>) -> Result<()> {
        let (cache, spec) = (done.cache, done.cache.spec());
        let layers = (0..spec.layers).map(|layer| {
            let heads = (0..spec.kv_heads).map(|head| cache.positions(layer, head).to_vec());
            heads.collect()
        });
        self.kept.push(layers.collect());
        Ok(())
    }
}

/// With heads that read queries, keys and values, as the authors', or with folded ones.
fn check(
    settings: &Settings,
    case: &Case,
    prompt: &[u32],
    tensors: &SafeTensors<'_>,
    model: Arc<dyn CausalLm>,
    kernels: Kernels,
    folded: bool,
) {
    let spec = model.spec().clone();
    let name = format!("{} with {kernels:?}, folded: {folded}", case.name);
    let weights = heads(&spec, settings, case.seed.parse().unwrap());
    let heads = match folded {
        true => RetainingHeads::for_model(&weights, &*model).unwrap(),
        false => RetainingHeads::new(&weights, &spec, &**model.compute()).unwrap(),
    };
    assert_eq!(heads.folded(), folded, "{name}");
    let policy = Locret::authors(heads, Budget::Units(settings.budget), settings.stabilizers);
    let policy = policy.with_positions(case.positions);
    let options = CacheOptions::new().kernels(kernels);
    let mut session = Session::with_options(model, Arc::new(policy), options).unwrap();
    let mut watched = Watched::default();
    let prefill = Prefill::new(settings.chunk, settings.local);
    session
        .prefill_watched(prompt, &prefill, &mut watched)
        .unwrap();
    let Watched { births, kept } = watched;

    // After the chunks comes the tail, without eviction.
    assert_eq!(kept.len(), settings.chunks + 1, "{name}");
    let expected = tensors.tensor(&format!("{}.kept", case.name)).unwrap();
    let margins = floats(tensors, &format!("{}.margins", case.name));
    let (bits, row) = (expected.data(), expected.shape()[3]);
    let mut clear = 0;
    for (chunk, layers) in kept[..settings.chunks].iter().enumerate() {
        for (layer, heads) in layers.iter().enumerate() {
            for (head, found) in heads.iter().enumerate() {
                let at = (chunk * spec.layers + layer) * spec.kv_heads + head;
                let bits = &bits[at * row..(at + 1) * row];
                let expected: Vec<u32> = (0..prompt.len() as u32)
                    .filter(|p| bits[*p as usize / 8] >> (p % 8) & 1 == 1)
                    .collect();
                let tie = case.exact_ties.contains(&(chunk, layer, head));
                assert!(
                    margins[at] > 1e-5 || tie,
                    "{name}: a cut that is too close to call"
                );
                assert_eq!(
                    *found, expected,
                    "{name}: chunk {chunk}, layer {layer}, head {head}"
                );
                clear += usize::from(margins[at].is_finite());
            }
        }
    }
    assert!(
        clear > spec.layers * spec.kv_heads * 2,
        "{name}: {clear} cuts"
    );

    let expected = floats(tensors, &format!("{}.scores", case.name));
    let all = (0..spec.layers).collect();
    let layers = case.score_layers.as_ref().unwrap_or(&all);
    assert_eq!(expected.len(), layers.len() * spec.kv_heads * prompt.len());
    let mut rows = expected.chunks(prompt.len());
    let mut worst = 0f32;
    for layer in layers {
        for head in &births.scores()[*layer] {
            assert_eq!(head.len(), prompt.len(), "{name}");
            for (found, expected) in head.iter().zip(rows.next().unwrap()) {
                worst = worst.max((found - expected).abs());
            }
        }
    }
    assert!(worst < 1e-4, "{name}: a score is off by {worst}");

    let logits = session.logits().unwrap().to_vec();
    if let Some(top) = &case.top20 {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        assert_eq!(order[..20], top.ids, "{name}");
        for (id, expected) in top.ids.iter().zip(&top.values) {
            let found = logits[*id as usize];
            assert!(
                (found - expected).abs() < 2e-3,
                "{name}: {found} for {expected}"
            );
        }
    }
    if let Some(expected) = &case.last_logits {
        for (found, expected) in logits.iter().zip(expected) {
            assert!(
                (found - expected).abs() < 1e-3,
                "{name}: {found} for {expected}"
            );
        }
    }
    let tokens = session
        .generate(Generate::greedy(case.greedy.len()))
        .unwrap();
    let tokens: Vec<u32> = tokens.map(Result::unwrap).collect();
    assert_eq!(tokens, case.greedy, "{name}");
    // Nothing is evicted while decoding; the last token has not been fed.
    let left = settings.budget + settings.local + tokens.len() - 1;
    for layer in 0..spec.layers {
        for head in 0..spec.kv_heads {
            assert_eq!(session.cache().len(layer, head), left, "{name}");
        }
    }
    let peak = session.cache().peak().units_per_head;
    assert!(
        peak <= left.max(settings.budget + settings.chunk),
        "{name}: {peak}"
    );
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = tensors.tensor(name).unwrap().data().to_vec();
    let quads = data.chunks_exact(4);
    quads
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// Weights of single precision: the references are computed with them.
fn exact() -> LoadOptions {
    LoadOptions::new().weights(WeightDtype::F32)
}

#[test]
fn smollm2_keeps_what_the_authors_procedure_keeps() {
    let (golden, bytes) = golden("authors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let file =
        resolve("smollm2", &FetchOptions::default(), &|_| {}).expect("SmolLM2 can be fetched");
    let model = load_model(file, &exact(), &Device::flex()).unwrap().model;
    assert_eq!(golden.prompt.len(), 600);
    for case in &golden.cases {
        for folded in [false, true] {
            check(
                &golden.settings,
                case,
                &golden.prompt,
                &tensors,
                model.clone(),
                Kernels::Auto,
                folded,
            );
        }
    }
}

#[test]
fn small_models_with_scaled_rotations_too() {
    let (golden, bytes) = golden("authors_tiny");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let models: PathBuf =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../locret-models/tests/golden");
    for case in &golden.cases {
        for kernels in [Kernels::Auto, Kernels::Operations] {
            let always_long = case.rope == "always long";
            let options = exact().always_long(always_long).kernels(kernels);
            let loaded = load_model(models.join(&case.model), &options, &Device::flex()).unwrap();
            for folded in [false, true] {
                check(
                    &golden.settings,
                    case,
                    &case.prompt,
                    &tensors,
                    loaded.model.clone(),
                    kernels,
                    folded,
                );
            }
        }
    }
}
