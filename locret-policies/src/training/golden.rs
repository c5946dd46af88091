//! Steps and rates against those of PyTorch (`tests/golden/training`).

use super::{
    HeadTrainer, Loss, TrainConfig,
    head::{Optimisation, SavedParam, transpose},
};
use crate::{HeadForm, LayerHead};
use burn::tensor::Device;
use std::path::Path;

/// Tensors of the golden file, which PyTorch made.
struct Golden {
    tensors: Vec<u8>,
    numbers: serde_json::Value,
}

impl Golden {
    fn load() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/training");
        let numbers = std::fs::read(folder.join("golden.json")).unwrap();
        Self {
            tensors: std::fs::read(folder.join("golden.safetensors")).unwrap(),
            numbers: serde_json::from_slice(&numbers).unwrap(),
        }
    }

    /// One layer's part of a tensor `[layers, ...]`.
    fn layer(&self, name: &str, layer: usize) -> Vec<f32> {
        let all = safetensors::SafeTensors::deserialize(&self.tensors).unwrap();
        let view = all.tensor(name).unwrap();
        let values: Vec<f32> = (view.data().chunks_exact(4))
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let each = values.len() / view.shape()[0];
        values[layer * each..(layer + 1) * each].to_vec()
    }

    fn number(&self, key: &str) -> f64 {
        self.numbers[key].as_f64().unwrap()
    }
}

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() < 1e-5, "{what}, {i}: {a} {b}");
    }
}

/// A trainer that begins with these weights.
fn trainer(head: &LayerHead) -> HeadTrainer {
    let param = |values: &[f32], rows: usize| {
        let columns = values.len() / rows;
        SavedParam {
            shape: [columns, rows],
            value: transpose(values, rows, columns),
            moments: None,
        }
    };
    let kv_heads = head.fc2.len() / head.d_r;
    let device = Device::flex().autodiff();
    let params = vec![param(&head.fc1, head.d_r), param(&head.fc2, kv_heads)];
    HeadTrainer::of(HeadForm::Locret, params, Optimisation::default(), &device).unwrap()
}

#[test]
fn steps_equal_those_of_pytorch() {
    let golden = Golden::load();
    let layers = golden.number("layers") as usize;
    let rate = golden.number("lr");
    for name in ["joint", "joint_strong", "layerwise"] {
        let case = &golden.numbers["cases"][name];
        let alpha = case["alpha"].as_f64().unwrap() as f32;
        // The authors average the regression over layers and sum the smoothing. Layer by layer,
        // everything is the number of layers times as large.
        let loss = match name {
            "layerwise" => TrainConfig {
                alpha,
                ..TrainConfig::default()
            }
            .loss(layers),
            _ => Loss {
                regression: 1.0 / layers as f32,
                smoothing: alpha,
                ..Loss::default()
            },
        };
        let mut joint = [0.0; 6];
        for layer in 0..layers {
            let head = LayerHead {
                d_r: golden.number("d_r") as usize,
                fc1: golden.layer("initial.fc1", layer),
                fc2: golden.layer("initial.fc2", layer),
                ..LayerHead::default()
            };
            let mut trainer = trainer(&head);
            let (inputs, labels) = (golden.layer("inputs", layer), golden.layer("labels", layer));
            let scores = trainer.scores(inputs.clone(), &[]).unwrap();
            let expected = golden.layer("initial.scores", layer);
            for (a, b) in scores.iter().zip(&expected) {
                assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{a} {b}");
            }
            for step in 1..=5 {
                let found = trainer
                    .step(inputs.clone(), labels.clone(), &[], &loss, rate, 0)
                    .unwrap();
                joint[step - 1] += found;
                if name == "layerwise" {
                    let expected = case["losses"][layer][step - 1].as_f64().unwrap();
                    assert!((f64::from(found) - expected).abs() < 1e-5, "{found}");
                }
                if step == 1 || step == 5 {
                    let weights = trainer.weights().unwrap();
                    for (part, found) in [("fc1", &weights.fc1), ("fc2", &weights.fc2)] {
                        let key = format!("{name}.step{step}.{part}");
                        assert_close(&key, found, &golden.layer(&key, layer));
                    }
                }
            }
        }
        if name != "layerwise" {
            for (step, found) in joint[..5].iter().enumerate() {
                let expected = case["losses"][step].as_f64().unwrap();
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-5 * expected,
                    "{name} {found}"
                );
            }
        }
    }
}

#[test]
fn the_schedule_is_that_of_the_authors_library() {
    let golden = Golden::load();
    let schedule = &golden.numbers["schedule"];
    let of = |key: &str| schedule[key].as_f64().unwrap();
    let config = TrainConfig {
        learning_rate: of("lr"),
        warmup: of("warmup") / of("total"),
        ..TrainConfig::default()
    };
    for pair in schedule["at"].as_array().unwrap() {
        let step = pair[0].as_u64().unwrap() as usize;
        let rate = config.rate(step, of("total") as usize);
        assert!(
            (rate - pair[1].as_f64().unwrap()).abs() < 1e-15,
            "{step}: {rate}"
        );
    }
}
