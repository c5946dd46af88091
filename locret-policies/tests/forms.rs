//! Heads of every form: files as they are published against the authors' own code, and policies that score with them.

use burn::tensor::Device;
use locret_core::{
    Budget, Decided, Evict, Kernels, ModelSpec, Needs, Positions, Prefill, Probe, Rows, Session,
    compute,
    conformance::{PolicyCheck, RandomModel, check_policy, small_spec},
};
use locret_policies::{
    Gate, HeadForm, HeadInput, HeadWeights, LayerHead, Locret, PolicyError, RetainingHeads,
};
use safetensors::SafeTensors;
use std::{path::PathBuf, sync::Arc};

const FORMS: [HeadForm; 5] = [
    HeadForm::Locret,
    HeadForm::Linear,
    HeadForm::Mlp,
    HeadForm::Decay,
    HeadForm::Gate,
];

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/forms")
        .join(name)
}

/// The model that `golden/forms/make.py` made heads for.
fn golden_spec() -> ModelSpec {
    ModelSpec::new(2, 4, 2, 24, 61)
        .with_head_dim(8)
        .with_layer_input()
}

/// One layer's part of a tensor `[layers, ...]`.
fn golden_layer(name: &str, layer: usize) -> Vec<f32> {
    let bytes = std::fs::read(golden("golden.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let view = all.tensor(name).unwrap();
    let values: Vec<f32> = (view.data().chunks_exact(4))
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let each = values.len() / view.shape()[0];
    values[layer * each..(layer + 1) * each].to_vec()
}

#[test]
fn published_files_score_as_their_authors_code() {
    for (file, form, name) in [
        ("kvzap_linear.safetensors", HeadForm::Linear, "kvzap_linear"),
        ("kvzap_mlp.safetensors", HeadForm::Mlp, "kvzap_mlp"),
        ("trimkv_weights.pth", HeadForm::Decay, "trimkv"),
        ("fastkvzip.pt", HeadForm::Gate, "fastkvzip"),
    ] {
        let spec = golden_spec();
        let weights = HeadWeights::load(golden(file), &spec).unwrap();
        assert_eq!(weights.form, form);
        for kernels in [Kernels::Auto, Kernels::Operations] {
            let compute = kernels.on(&Device::flex());
            let heads = RetainingHeads::new(&weights, &spec, &*compute).unwrap();
            assert_eq!((heads.form(), heads.reads()), (form, HeadInput::Layer));
            assert!(!heads.folded());
            for layer in 0..spec.layers {
                let x = golden_layer("input", layer);
                let due = golden_layer(name, layer);
                let rows = compute.rows(x.clone(), spec.hidden).unwrap();
                let found = heads.scores(layer, &[&rows]).unwrap();
                assert_eq!(found.len(), due.len());
                for (a, b) in found.iter().zip(&due) {
                    assert!((a - b).abs() < 2e-6 * b.abs().max(1.0), "{file}: {a} {b}");
                }
                // Single tokens take another way through the kernels.
                let one = compute
                    .rows(x[..spec.hidden].to_vec(), spec.hidden)
                    .unwrap();
                for (a, b) in heads.scores(layer, &[&one]).unwrap().iter().zip(&due) {
                    assert!((a - b).abs() < 2e-6 * b.abs().max(1.0), "{file}: {a} {b}");
                }
                assert!(heads.scores(layer, &[&rows, &rows]).is_err());
            }
        }
    }
}

/// Numbers from a formula.
fn number(i: usize) -> f32 {
    ((i * 7919 % 1009) as f32 / 504.5 - 1.0) / 2.0
}

fn random(form: HeadForm, spec: &ModelSpec, salt: usize) -> HeadWeights {
    let inputs = form.reads().features(spec);
    let (kv_heads, group) = (spec.kv_heads, spec.heads / spec.kv_heads);
    let list = |n: usize, from: usize| (0..n).map(|i| number(i + from)).collect::<Vec<f32>>();
    let layer = |l: usize| {
        let at = 31 * l + 1000 * salt;
        let (features, sinks) = (4, 2);
        let d_r = match form {
            HeadForm::Linear => kv_heads,
            HeadForm::Gate => kv_heads * (group + 1) * features,
            _ => 6,
        };
        let two = !matches!(form, HeadForm::Linear | HeadForm::Gate);
        let mut bias = list(d_r, at + 3);
        if form == HeadForm::Gate {
            bias[kv_heads * group * features..].fill(0.0);
        }
        LayerHead {
            d_r,
            fc1: list(d_r * inputs, at),
            fc1_bias: match form {
                HeadForm::Locret => Vec::new(),
                _ => bias,
            },
            fc2: if two {
                list(kv_heads * d_r, at + 5)
            } else {
                Vec::new()
            },
            fc2_bias: match form {
                HeadForm::Mlp | HeadForm::Decay => list(kv_heads, at + 7),
                _ => Vec::new(),
            },
            gate: (form == HeadForm::Gate).then(|| Gate {
                query_norm: list(features, at + 9),
                key_norm: list(features, at + 11),
                base: list(kv_heads * sinks * features, at + 13),
                offset: list(kv_heads * group, at + 17),
            }),
        }
    };
    HeadWeights {
        form,
        layers: (0..spec.layers).map(layer).collect(),
        metadata: Default::default(),
    }
}

#[test]
fn what_is_saved_is_loaded() {
    use locret_core::DType;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("heads.safetensors");
    let spec = small_spec(6, 2, 8);
    for form in FORMS {
        let mut heads = random(form, &spec, 1);
        heads.metadata.insert("from".into(), "a formula".into());
        heads.validate(&spec).unwrap();
        heads.save(&path, DType::F32).unwrap();
        assert_eq!(HeadWeights::load(&path, &spec).unwrap(), heads, "{form:?}");
        assert!(heads.parameters() > 20);
        // Heads of another model are refused, and none of another form fits.
        for other in [small_spec(6, 3, 8), small_spec(6, 1, 8)] {
            let found = HeadWeights::load(&path, &other);
            assert!(
                matches!(found, Err(PolicyError::Shape { .. })),
                "{form:?}: {found:?}"
            );
        }
        // Two forms have the same tensors.
        let same = [HeadForm::Mlp, HeadForm::Decay];
        let others = FORMS.into_iter().filter(|other| *other != form);
        for other in others.filter(|other| !(same.contains(other) && same.contains(&form))) {
            let wrong = HeadWeights {
                form: other,
                ..heads.clone()
            };
            let found = wrong.validate(&spec);
            assert!(
                matches!(found, Err(PolicyError::Shape { .. })),
                "{form:?} as {other:?}"
            );
        }
    }
}

#[test]
fn files_with_parts_that_lack_or_do_not_fit_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("heads.safetensors");
    let spec = small_spec(6, 2, 8);
    for form in FORMS {
        random(form, &spec, 1)
            .save(&path, locret_core::DType::F32)
            .unwrap();
        let whole = std::fs::read(&path).unwrap();
        let all = SafeTensors::deserialize(&whole).unwrap();
        let names: Vec<String> = all.names().into_iter().map(String::from).collect();
        let write = |change: &dyn Fn(&str, Vec<usize>) -> Option<(String, Vec<usize>)>| {
            let tensors = names.iter().filter_map(|name| {
                let view = all.tensor(name).unwrap();
                let (name, shape) = change(name, view.shape().to_vec())?;
                let len = shape.iter().product::<usize>();
                let mut data = view.data().to_vec();
                data.resize(4 * len, 0);
                Some((name, (shape, data)))
            });
            let tensors: Vec<_> = tensors.collect();
            let views = tensors.iter().map(|(name, (shape, data))| {
                let dtype = safetensors::Dtype::F32;
                let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), data);
                (name.clone(), view.unwrap())
            });
            let bytes = safetensors::serialize(views, None).unwrap();
            std::fs::write(&path, bytes).unwrap();
            HeadWeights::load(&path, &spec)
        };
        assert!(write(&|name, shape| Some((name.into(), shape))).is_ok());
        for wrong in &names {
            let missing = write(&|name, shape| (name != wrong).then(|| (name.into(), shape)));
            match missing {
                Err(PolicyError::MissingKeys { keys, .. }) => assert_eq!(keys, [wrong.as_str()]),
                other => panic!("{form:?} without {wrong}: {other:?}"),
            }
            // One more in each extent; of what a layer is free to choose, in one tensor alone.
            let extents = all.tensor(wrong).unwrap().shape().len();
            for at in 0..extents {
                let grown = write(&|name, mut shape| {
                    if name == wrong {
                        shape[at] += 1;
                    }
                    Some((name.into(), shape))
                });
                // A gate's sinks are in one tensor only.
                let free = wrong.ends_with("k_base") && at == 2;
                match grown {
                    Ok(_) if free => {}
                    Err(PolicyError::Shape { .. }) if !free => {}
                    other => panic!("{form:?}, {wrong}, extent {at}: {other:?}"),
                }
            }
            let flat = write(&|name, shape| {
                let n = shape.iter().product();
                Some((
                    name.into(),
                    if name == wrong {
                        vec![n, 1, 1, 1, 1]
                    } else {
                        shape
                    },
                ))
            });
            assert!(
                matches!(flat, Err(PolicyError::Shape { .. })),
                "{form:?}, {wrong}"
            );
        }
        // A tensor of another form among them.
        let other = match form {
            HeadForm::Locret => "layers.0.weight",
            _ => "model.layers.0.self_attn.fc1.weight",
        };
        let mixed = write(&|name, shape| {
            let first = name == names[0];
            Some((if first { other.into() } else { name.into() }, shape))
        });
        assert!(mixed.is_err(), "{form:?}: {mixed:?}");
    }
}

#[test]
fn heads_of_every_form_conform() {
    let mut cases = 0;
    for form in FORMS {
        for ada in [None, Some(0.2)] {
            let check = PolicyCheck {
                seeds: cases..cases + 3,
                fills_budget: ada.is_none(),
                ..PolicyCheck::default()
            };
            cases += 3;
            check_policy(&Device::flex(), &check, |case| {
                let weights = random(form, case.spec, case.seed as usize);
                let heads = RetainingHeads::for_model(&weights, case.model).unwrap();
                let policy = Evict::new(Locret::new(heads), Budget::Units(case.budget))
                    .with_positions(case.positions)
                    .while_decoding(case.decode);
                Arc::new(match ada {
                    Some(floor) => policy.ada(floor),
                    None => policy,
                })
            })
            .unwrap_or_else(|e| panic!("{form:?}, {ada:?}: {e}"));
        }
    }
}

/// What every layer reads, token by token, and which positions stay.
#[derive(Default)]
struct Tape {
    inputs: Vec<Vec<f32>>,
    kept: Vec<Vec<Vec<u32>>>,
}

impl Probe for Tape {
    fn needs(&self) -> Needs {
        Needs::NOTHING.input()
    }

    fn decided(&mut self, at: &Decided<'_>) -> locret_core::Result<()> {
        let layer = at.step.layer.index;
        self.inputs.resize(at.step.layer.layers, Vec::new());
        self.kept.resize(at.step.layer.layers, Vec::new());
        if let Some(input) = at.units.input() {
            self.inputs[layer].extend_from_slice(&input.values()?);
        }
        let heads = 0..at.units.kv_heads();
        self.kept[layer] = heads
            .map(|head| {
                let all = at.units.positions(head);
                match &at.verdict.keep {
                    locret_core::Keep::Slots(kept) => {
                        kept.head(head).iter().map(|u| all[*u as usize]).collect()
                    }
                    _ => all.to_vec(),
                }
            })
            .collect();
        Ok(())
    }
}

/// Units that decay are compared at their age, chunk after chunk, as in plain loops.
#[test]
fn scores_that_decay_are_compared_at_the_present() {
    let spec = small_spec(4, 2, 8);
    let model = RandomModel::new(spec.clone(), 7, &Device::flex()).unwrap();
    let mut weights = random(HeadForm::Decay, &spec, 3);
    for layer in &mut weights.layers {
        layer.fc2.iter_mut().for_each(|x| *x *= 6.0);
    }
    let (budget, chunk, tokens) = (12, 9, 90);
    let ids: Vec<u32> = (0..tokens as u32)
        .map(|i| (i * i * 7 + 3 * i) % 61)
        .collect();
    let heads = RetainingHeads::for_model(&weights, &model).unwrap();
    let policy = Evict::new(Locret::new(heads), Budget::Units(budget));
    assert_eq!(
        locret_core::KvCachePolicy::positions(&policy),
        Positions::Original
    );
    let mut tape = Tape::default();
    let mut session = Session::new(Arc::new(model), Arc::new(policy)).unwrap();
    session
        .prefill_watched(&ids, &Prefill::new(chunk, 0), &mut tape)
        .unwrap();
    let host = compute(&Device::flex());
    let placed = RetainingHeads::new(&weights, &spec, &*host).unwrap();
    let mut differs = false;
    for layer in 0..spec.layers {
        let rows = Rows::new(tape.inputs[layer].clone(), spec.hidden, &Device::flex()).unwrap();
        assert_eq!(rows.rows(), tokens);
        let born = placed.scores(layer, &[&rows]).unwrap();
        for head in 0..spec.kv_heads {
            let ln_beta = |i: u32| f64::from(born[i as usize * spec.kv_heads + head]);
            let best = |kept: &[u32], score: &dyn Fn(u32) -> f64| {
                let mut order = kept.to_vec();
                order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
                order.truncate(budget);
                order.sort_unstable();
                order
            };
            let (mut kept, mut by_birth) = (Vec::new(), Vec::new());
            for start in (0..tokens).step_by(chunk) {
                let end = (start + chunk).min(tokens);
                kept.extend(start as u32..end as u32);
                by_birth.extend(start as u32..end as u32);
                let age = |i: u32| end as f64 + 1.0 - f64::from(i);
                kept = best(&kept, &|i| age(i) * ln_beta(i));
                by_birth = best(&by_birth, &ln_beta);
            }
            assert_eq!(tape.kept[layer][head], kept, "layer {layer}, head {head}");
            differs |= kept != by_birth;
        }
    }
    assert!(differs, "age made no difference");
}
