//! One-shot scores on SmolLM2 against those of kvpress on the same model (`golden/scores`).

use burn::tensor::Device;
use locret_core::{
    Budget, CausalLm, Decided, Evict, Prefill, Probe, Result, Scorer, Scores, Session,
};
use locret_models::{FetchOptions, LoadOptions, WeightDtype, load_model, resolve};
use locret_policies::{H2o, KeyDiff, KeyNorm, SnapKv, Tova};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::{path::Path, sync::Arc};

#[derive(Deserialize)]
struct Golden {
    prompt: Vec<u32>,
    layers: Vec<usize>,
    window: usize,
    kernel: usize,
}

/// Scores every layer's units as the policy was shown them, with a scorer like the policy's own.
struct Spy<S> {
    scorer: S,
    seen: Vec<Scores>,
}

impl<S: Scorer> Probe for Spy<S> {
    fn decided(&mut self, at: &Decided<'_>) -> Result<()> {
        let scores = self.scorer.score(at.step, at.units)?;
        // What the policy carries on is what it scored.
        if let Some(carried) = &at.verdict.scores {
            assert_eq!(carried.heads(), scores.heads());
        }
        self.seen.push(scores);
        Ok(())
    }
}

/// Weights of single precision: the references are computed with them.
fn exact() -> LoadOptions {
    LoadOptions::new().weights(WeightDtype::F32)
}

#[test]
fn scores_are_those_of_kvpress() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/scores");
    let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
    let golden: Golden = serde_json::from_str(&text).unwrap();
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let file =
        resolve("smollm2", &FetchOptions::default(), &|_| {}).expect("SmolLM2 can be fetched");
    let model = load_model(file, &exact(), &Device::flex()).unwrap().model;
    let tokens = golden.prompt.len();

    fn scores<S: Scorer + Clone + 'static>(
        model: &Arc<dyn CausalLm>,
        scorer: S,
        ids: &[u32],
    ) -> Vec<Scores> {
        let policy = Evict::new(scorer.clone(), Budget::Units(ids.len() / 2));
        let mut session = Session::new(model.clone(), Arc::new(policy)).unwrap();
        let seen = Vec::new();
        let mut spy = Spy { scorer, seen };
        let prefill = Prefill::new(ids.len(), 0);
        session.prefill_watched(ids, &prefill, &mut spy).unwrap();
        assert_eq!(spy.seen.len(), model.spec().layers);
        spy.seen
    }

    let snapkv = SnapKv::new().window(golden.window).kernel(golden.kernel);
    let ids = &golden.prompt;
    // How many of the newest units kvpress marks instead of scoring.
    let cases = [
        ("key_norm", scores(&model, KeyNorm, ids), 0),
        ("key_diff", scores(&model, KeyDiff, ids), 0),
        ("snapkv", scores(&model, snapkv, ids), golden.window),
        ("tova", scores(&model, Tova, ids), 1),
        ("h2o", scores(&model, H2o, ids), 0),
    ];
    for (name, found, marked) in cases {
        let expected = tensors.tensor(name).unwrap();
        let expected: Vec<f32> = expected
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let kv_heads = model.spec().kv_heads;
        let mut compared = 0;
        assert_eq!(expected.len(), golden.layers.len() * kv_heads * tokens);
        for (layer, expected) in golden.layers.iter().zip(expected.chunks(kv_heads * tokens)) {
            for (head, expected) in expected.chunks(tokens).enumerate() {
                let found = found[*layer].head(head);
                assert_eq!(found.len(), tokens);
                for unit in 0..tokens - marked {
                    let (a, b) = (found[unit], expected[unit]);
                    // Attention weights are small: what counts is their ratio.
                    assert!(
                        (a - b).abs() <= 1e-5 + 1e-3 * b.abs(),
                        "{name}, layer {layer}, head {head}, unit {unit}: {a} for {b}"
                    );
                }
                let (scored, newest) = found.split_at(tokens - marked);
                match name {
                    // The newest unit has a score as all others do: the weights of one query.
                    "tova" => assert!((found.iter().sum::<f32>() - 1.0).abs() < 1e-4),
                    // The window's units are as good as the best.
                    "snapkv" => {
                        let most = scored.iter().copied().fold(f32::MIN, f32::max);
                        assert!(newest.iter().all(|s| *s >= most));
                    }
                    _ => assert!(newest.is_empty()),
                }
                compared += scored.len();
            }
        }
        assert!(marked < tokens && !golden.layers.is_empty());
        let heads = golden.layers.len() * kv_heads;
        assert_eq!(compared, heads * (tokens - marked), "{name}");
    }
}
