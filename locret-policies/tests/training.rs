//! Training of retaining heads: labels against plain loops, and the promise that a stopped run goes
//! on to the same result.
#![cfg(feature = "training")]

use burn::tensor::Device;
use locret_core::{
    CacheOptions, CausalLm, DType, Decided, Needs, Pass, Phase, Probe, Rows, SequenceCache,
    conformance::{RandomModel, small_spec},
    forward,
};
use locret_policies::{Full, HeadInput, HeadWeights, PolicyError, training::*};
use proptest::prelude::*;
use std::{
    ops::ControlFlow,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 8;

fn model() -> RandomModel {
    RandomModel::new(small_spec(HEADS, KV_HEADS, DIM), 5, &Device::flex()).unwrap()
}

fn ids(count: usize, salt: u32) -> Vec<u32> {
    (0..count as u32)
        .map(|i| (i * i * 7 + i * 3 + salt * 11) % 61)
        .collect()
}

fn samples() -> Vec<Sample> {
    (0..5)
        .map(|s| Sample {
            prompt: ids(40 + 7 * s, s as u32),
            answers: vec![
                Answer {
                    query: ids(3, 50 + s as u32),
                    answer: ids(5, 60 + s as u32),
                },
                Answer {
                    query: Vec::new(),
                    answer: ids(19, 70 + s as u32),
                },
            ],
        })
        .collect()
}

/// One of four samples only measures.
fn collecting() -> CollectConfig {
    let mut config = CollectConfig::default();
    config.validation = 0.25;
    config
}

fn goes_on<T>(_: T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn collected(folder: &Path, config: &CollectConfig) -> Shards {
    collect(&model(), &samples(), folder, config, &mut |p| goes_on(p))
        .unwrap()
        .unwrap()
}

/// What heads of the published form are trained on.
fn rows(shard: &Shard, layer: usize) -> ShardLayer<'_> {
    shard
        .layer(layer, HeadInput::Qkv, LabelKind::MaxLogit)
        .unwrap()
}

/// Writes down the queries, keys and values of everything that is read, and what they are made from.
#[derive(Default)]
struct Tape(Vec<[Vec<f32>; 4]>);

impl Probe for Tape {
    fn needs(&self) -> Needs {
        Needs::NOTHING.qkv().input()
    }

    fn decided(&mut self, at: &Decided<'_>) -> locret_core::Result<()> {
        let (qkv, input) = (at.units.qkv().unwrap(), at.units.input().unwrap());
        let of = |x: &Rows| x.clone().into_values();
        self.0
            .push([of(&qkv.q)?, of(&qkv.k)?, of(&qkv.v)?, of(input)?]);
        Ok(())
    }
}

/// Per layer, the un-rotated q, k and v, and the input, of a whole text that is read in one go.
fn tape(model: &RandomModel, ids: &[u32]) -> Vec<[Vec<f32>; 4]> {
    let full = Arc::new(Full::default());
    let options = CacheOptions::default();
    let mut cache = SequenceCache::new(model.spec(), full, model.compute(), options).unwrap();
    let mut tape = Tape::default();
    let step = cache.step(Phase::Forced, ids.len(), ids.len());
    let mut pass = Pass::new([step.watched(&mut tape)]).unwrap();
    forward(model, ids, &mut pass).unwrap();
    pass.finish(None).unwrap();
    tape.0
}

fn rotated(x: &[f32], position: usize) -> Vec<f64> {
    let half = DIM / 2;
    let mut out = vec![0.0; DIM];
    for i in 0..half {
        let angle = position as f64 / 10_000f64.powf(2.0 * i as f64 / DIM as f64);
        let (a, b) = (f64::from(x[i]), f64::from(x[i + half]));
        out[i] = a * angle.cos() - b * angle.sin();
        out[i + half] = b * angle.cos() + a * angle.sin();
    }
    out
}

/// `q·k/√d` of query head `head` at token `at` and the unit of token `unit`.
fn logit(qkv: &[Vec<f32>; 4], head: usize, at: usize, unit: usize) -> f64 {
    let group = HEADS / KV_HEADS;
    let q = &qkv[0][(at * HEADS + head) * DIM..][..DIM];
    let k = &qkv[1][(unit * KV_HEADS + head / group) * DIM..][..DIM];
    let dot: f64 = rotated(q, at)
        .iter()
        .zip(rotated(k, unit))
        .map(|(a, b)| a * b)
        .sum();
    dot / (DIM as f64).sqrt()
}

/// `‖W_O v‖` of the value of KV head `head / group` and the slice of query head `head`.
fn through_output(output: &[f32], values: &[f32], head: usize, unit: usize) -> f64 {
    let v = &values[(unit * KV_HEADS + head / (HEADS / KV_HEADS)) * DIM..][..DIM];
    let row = |row: &[f32]| -> f64 {
        let own = row[head * DIM..(head + 1) * DIM].iter().zip(v);
        own.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let squares = output.chunks(HEADS * DIM).map(|r| row(r).powi(2));
    squares.sum::<f64>().sqrt()
}

/// Labels of a sample in one layer from the whole attention matrix, `[token][kv_head]`.
fn naive_labels(
    model: &RandomModel,
    sample: &Sample,
    layer: usize,
    kind: LabelKind,
    options: &LabelOptions,
) -> Vec<f64> {
    let output = model.output_weight(layer).unwrap().unwrap();
    let (prompt, group) = (sample.prompt.len(), HEADS / KV_HEADS);
    let mut labels = vec![f64::NEG_INFINITY; prompt * KV_HEADS];
    let mut norms = Vec::new();
    for answer in &sample.answers {
        let all = [&sample.prompt[..], &answer.query, &answer.answer].concat();
        let from = prompt + answer.query.len().saturating_sub(options.query_tokens);
        let qkv = &tape(model, &all)[layer];
        norms = (qkv[2].chunks(DIM))
            .map(|v| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt())
            .collect();
        for head in 0..HEADS {
            let rows: Vec<Vec<f64>> = (from..all.len())
                .map(|at| (0..=at).map(|unit| logit(qkv, head, at, unit)).collect())
                .collect();
            let weight =
                |r: &Vec<f64>, unit: usize| r[unit].exp() / r.iter().map(|l| l.exp()).sum::<f64>();
            for unit in 0..prompt {
                let value = match kind {
                    LabelKind::MaxLogit => rows
                        .iter()
                        .map(|r| r[unit])
                        .fold(f64::NEG_INFINITY, f64::max),
                    LabelKind::Mass => {
                        let all = rows.iter().map(|r| weight(r, unit));
                        (all.sum::<f64>() / rows.len() as f64).ln()
                    }
                    LabelKind::Kvzip => rows
                        .iter()
                        .map(|r| weight(r, unit))
                        .fold(0.0, f64::max)
                        .ln(),
                    LabelKind::KvzipPlus => {
                        let most = rows.iter().enumerate().map(|(i, r)| {
                            let width = qkv[3].len() / all.len();
                            let input = qkv[3][(from + i) * width..][..width].iter();
                            let input = input.map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                            weight(r, unit) / input
                        });
                        let value = through_output(&output, &qkv[2], head, unit);
                        (most.fold(0.0, f64::max) * value).ln()
                    }
                };
                let label = &mut labels[unit * KV_HEADS + head / group];
                *label = label.max(value);
            }
        }
    }
    if options.value_norm {
        for (label, norm) in labels.iter_mut().zip(norms) {
            *label += norm.ln();
        }
    }
    labels
}

fn near(what: &str, found: &[f32], due: &[f64]) {
    assert_eq!(found.len(), due.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(due).enumerate() {
        assert!((f64::from(*a) - b).abs() < 1e-4, "{what}, {i}: {a} {b}");
    }
}

#[test]
fn labels_equal_a_naive_full_attention() {
    let model = model();
    for (query_tokens, value_norm) in [(0, false), (2, false), (usize::MAX, true)] {
        let folder = tempfile::tempdir().unwrap();
        let mut config = collecting();
        config.chunk = 13;
        config.labels = LabelKind::ALL.to_vec();
        if value_norm {
            config.labels.retain(|kind| *kind != LabelKind::KvzipPlus);
        }
        config.reads = vec![HeadInput::Layer, HeadInput::Qkv];
        config.query_tokens = query_tokens;
        config.value_norm = value_norm;
        config.inputs = InputDtype::F16;
        let options = LabelOptions {
            chunk: 13,
            query_tokens,
            value_norm,
        };
        let shards = collected(folder.path(), &config);
        for (sample, shard) in samples().iter().zip(shards.all()) {
            assert_eq!(shard.rows(), sample.prompt.len());
            let tape = tape(&model, &sample.prompt);
            for kind in &config.labels {
                let alone = labels(&model, sample, *kind, &options).unwrap();
                for layer in 0..LAYERS {
                    let what = format!("{kind:?} {options:?} layer {layer}");
                    let found = shard.layer(layer, HeadInput::Qkv, *kind).unwrap().labels();
                    near(
                        &what,
                        &found,
                        &naive_labels(&model, sample, layer, *kind, &options),
                    );
                    let alone =
                        (0..shard.rows()).flat_map(|i| alone[layer].iter().map(move |h| h[i]));
                    assert!(alone.eq(found), "{what}");
                }
            }
            for (layer, [q, k, v, input]) in tape.iter().enumerate() {
                let rows = |parts: &[&Vec<f32>]| -> Vec<f64> {
                    let row = |i: usize| {
                        let of = move |part: &&Vec<f32>| {
                            let width = part.len() / shard.rows();
                            part[i * width..(i + 1) * width].to_vec()
                        };
                        parts.iter().flat_map(of).collect::<Vec<_>>()
                    };
                    (0..shard.rows()).flat_map(row).map(f64::from).collect()
                };
                for (read, due) in [
                    (HeadInput::Qkv, rows(&[q, k, v])),
                    (HeadInput::Layer, rows(&[input])),
                ] {
                    let found = shard.layer(layer, read, config.labels[0]).unwrap();
                    assert_eq!(found.features(), read.features(model.spec()));
                    let inputs = found.inputs(0..shard.rows());
                    assert_eq!(inputs.len(), due.len());
                    for (a, b) in inputs.iter().zip(due) {
                        let off = (f64::from(*a) - b).abs();
                        assert!(off <= 1e-3 * b.abs().max(1.0), "{a} {b}");
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn labels_of_any_shape_equal_the_naive_ones(
        prompt in 1usize..70,
        answers in prop::collection::vec((0usize..6, 1usize..40), 1..4),
        chunk in 1usize..80,
        query_tokens in 0usize..8,
        salt in 0u32..1000,
    ) {
        let model = model();
        let answers = answers.iter().enumerate().map(|(i, (query, answer))| Answer {
            query: ids(*query, salt + i as u32),
            answer: ids(*answer, salt + 100 + i as u32),
        });
        let sample = Sample { prompt: ids(prompt, salt + 7), answers: answers.collect() };
        let options = LabelOptions { chunk, query_tokens, ..LabelOptions::default() };
        for kind in LabelKind::ALL {
            let found = labels(&model, &sample, kind, &options).unwrap();
            for (layer, found) in found.iter().enumerate() {
                let due = naive_labels(&model, &sample, layer, kind, &options);
                let found = (0..prompt).flat_map(|i| found.iter().map(move |head| head[i]));
                near(&format!("{kind:?} layer {layer}"), &found.collect::<Vec<_>>(), &due);
            }
        }
    }
}

#[test]
fn labels_need_what_they_are_made_of() {
    let model = model();
    let sample = &samples()[0];
    let options = LabelOptions {
        value_norm: true,
        ..LabelOptions::default()
    };
    let error = labels(&model, sample, LabelKind::KvzipPlus, &options).unwrap_err();
    assert!(error.to_string().contains("value_norm"), "{error}");
    let options = LabelOptions {
        chunk: 0,
        ..LabelOptions::default()
    };
    assert!(labels(&model, sample, LabelKind::Mass, &options).is_err());
    let folder = tempfile::tempdir().unwrap();
    for change in [
        (|c| c.labels.clear()) as fn(&mut CollectConfig),
        |c| c.reads.clear(),
        |c| c.labels = vec![LabelKind::Mass; 2],
        |c| c.reads = vec![HeadInput::Qkv; 2],
    ] {
        let mut config = collecting();
        change(&mut config);
        let found = collect(&model, &samples(), folder.path(), &config, &mut |p| {
            goes_on(p)
        });
        assert!(
            matches!(found, Err(PolicyError::Setting { .. })),
            "{config:?}"
        );
    }
}

#[test]
fn a_collection_goes_on_where_it_was_stopped() {
    let mut config = collecting();
    config.max_rows = 30;
    config.span = 10;
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let expected = collected(whole.path(), &config);
    let mut calls = 0;
    let stopped = collect(&model(), &samples(), parts.path(), &config, &mut |p| {
        calls += 1;
        if p.samples == 3 {
            ControlFlow::Break(())
        } else {
            goes_on(p)
        }
    });
    assert!(stopped.unwrap().is_none());
    assert_eq!(calls, 3);
    let file = |folder: &Path, i: usize| folder.join(format!("sample-{i:05}.safetensors"));
    // What a kill leaves at worst: a damaged file from elsewhere, and none of the rest.
    std::fs::write(file(parts.path(), 1), b"half a file").unwrap();
    assert!(!file(parts.path(), 3).exists());
    let kept = std::fs::metadata(file(parts.path(), 0))
        .unwrap()
        .modified()
        .unwrap();
    let found = collected(parts.path(), &config);
    for (a, b) in expected.all().iter().zip(found.all()) {
        assert_eq!(a.spans(), b.spans());
        for layer in 0..LAYERS {
            let of = |shard: &Shard| rows(shard, layer).labels();
            assert_eq!(of(a), of(b));
        }
    }
    let again = std::fs::metadata(file(parts.path(), 0))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(kept, again, "a sample that is there is not read again");
    // Other settings do not take over what is there.
    let mut other = config;
    other.value_norm = true;
    let labels = rows(&collected(parts.path(), &other).all()[0], 0).labels();
    assert_ne!(labels, rows(&found.all()[0], 0).labels());
}

fn settings() -> TrainConfig {
    let mut config = TrainConfig::default();
    config.d_r = 16;
    config.epochs = 3;
    config.span = 16;
    config.seed = 4;
    config.ranking = 0.3;
    config
}

fn trained(shards: &Shards, folder: &Path, config: &TrainConfig) -> Trained {
    train(shards, folder, config, &Device::flex().autodiff(), &|p| {
        goes_on(p)
    })
    .unwrap()
    .unwrap()
}

#[test]
fn a_stopped_training_ends_with_the_same_weights() {
    let data = tempfile::tempdir().unwrap();
    let shards = collected(data.path(), &collecting());
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let expected = trained(&shards, folders[0].path(), &settings());
    let mut one_thread = settings();
    one_thread.threads = 1;
    assert_eq!(
        trained(&shards, folders[1].path(), &one_thread).heads,
        expected.heads
    );

    let device = Device::flex().autodiff();
    let mut stops = 0;
    // Each run is broken off after some more steps, in the middle of an epoch.
    for limit in (5..).step_by(9) {
        let steps = AtomicUsize::new(0);
        let run = train(
            &shards,
            folders[2].path(),
            &settings(),
            &device,
            &|p| match p {
                TrainProgress::Step { .. } if steps.fetch_add(1, Ordering::Relaxed) >= limit => {
                    ControlFlow::Break(())
                }
                _ => ControlFlow::Continue(()),
            },
        );
        match run.unwrap() {
            None => stops += 1,
            Some(done) => {
                assert_eq!(done.heads, expected.heads);
                for (a, b) in done.layers.iter().zip(&expected.layers) {
                    assert_eq!(a.curve, b.curve);
                    assert_eq!(a.validation.len(), b.validation.len());
                    for (a, b) in a.validation.iter().zip(&b.validation) {
                        // Decimal digits in a checkpoint may lose the last bit.
                        assert!((a.pearson - b.pearson).abs() < 1e-12, "{a:?} {b:?}");
                        assert_eq!(a.recall, b.recall);
                    }
                }
                break;
            }
        }
    }
    assert!(stops >= 2, "{stops}");
    let mut other_seed = settings();
    other_seed.seed = 5;
    assert_ne!(
        trained(&shards, folders[2].path(), &other_seed).heads,
        expected.heads
    );
}

/// Everything from nothing to heads, in `folder`.
fn from_nothing(folder: &Path) -> Trained {
    let shards = collected(&folder.join("samples"), &collecting());
    let mut config = settings();
    config.epochs = 40;
    trained(&shards, &folder.join("heads"), &config)
}

#[test]
fn a_killed_process_is_continued_to_the_same_weights() {
    const CHILD: &str = "LOCRET_TEST_TRAINING_FOLDER";
    if let Some(folder) = std::env::var_os(CHILD) {
        from_nothing(Path::new(&folder));
        return;
    }
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let started = std::time::Instant::now();
    let expected = from_nothing(whole.path());
    let time = started.elapsed();
    let mut kills = 0;
    for part in 1..=4 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "a_killed_process_is_continued_to_the_same_weights",
                "--exact",
            ])
            .env(CHILD, killed.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(time.mul_f64(0.12 * f64::from(part)));
        child.kill().unwrap();
        kills += usize::from(!child.wait().unwrap().success());
    }
    assert!(kills > 0, "every child was done before it was killed");
    assert_eq!(from_nothing(killed.path()).heads, expected.heads);
}

/// Heads can learn what depends on q, k and v alone.
#[test]
fn training_lowers_the_loss_and_ranks_units() {
    let data = tempfile::tempdir().unwrap();
    let shards = collected(data.path(), &collecting());
    let folder = tempfile::tempdir().unwrap();
    let mut config = settings();
    config.epochs = 60;
    config.alpha = 0.0;
    config.ranking = 0.0;
    config.learning_rate = 3e-3;
    let result = trained(&shards, folder.path(), &config);
    for layer in &result.layers {
        let (first, last) = (layer.curve[0].1, layer.curve[layer.curve.len() - 1].1);
        assert!(
            last < 0.5 * first,
            "layer {}: {first} to {last}",
            layer.layer
        );
        assert_eq!(layer.validation.len(), 60);
    }
    let validation = result.validation().unwrap();
    assert!(validation.pearson > 0.3, "{validation:?}");
    assert!(validation.recall[2] > 0.35, "{validation:?}");

    let path = folder.path().join("heads.safetensors");
    result.heads.save(&path, DType::F32).unwrap();
    let loaded = HeadWeights::load(&path, model().spec()).unwrap();
    assert_eq!(loaded.layers, result.heads.layers);
}

#[test]
fn fewer_epochs_are_proposed_for_less_time() {
    let data = tempfile::tempdir().unwrap();
    let shards = collected(data.path(), &collecting());
    let device = Device::flex().autodiff();
    let config = settings();
    assert_eq!(epochs_within(&shards, &config, &device, 0.0).unwrap(), 1);
    assert_eq!(epochs_within(&shards, &config, &device, 3600.0).unwrap(), 3);
}

#[test]
fn impossible_requests_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let model = model();
    let mut bad = samples();
    bad[2].answers[0].answer = vec![61];
    let config = collecting();
    let error = collect(&model, &bad, folder.path(), &config, &mut |p| goes_on(p)).unwrap_err();
    assert!(error.to_string().contains("sample 2"), "{error}");
    assert!(collect(&model, &[], folder.path(), &config, &mut |p| goes_on(p)).is_err());

    let shards = collected(folder.path(), &config);
    let plain = Device::flex();
    let work = folder.path().join("work");
    let error = train(&shards, &work, &settings(), &plain, &|p| goes_on(p)).unwrap_err();
    assert!(error.to_string().contains("autodiff"), "{error}");
    let mut hot = settings();
    hot.learning_rate = 1e30;
    hot.warmup = 0.0;
    let device = Device::flex().autodiff();
    let error = train(&shards, &work, &hot, &device, &|p| goes_on(p)).unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
}
