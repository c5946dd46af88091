//! One-shot scores and choices on SmolLM2 against those of kvpress on the same model (`golden/field`).

use burn::tensor::Device;
use locret_core::{
    Budget, CausalLm, Decided, Evict, Keep, KvCachePolicy, LayerUnits, Needs, Prefill, Probe,
    Result, Scorer, Scores, Session, Share, Step, Verdict,
};
use locret_models::{FetchOptions, LoadOptions, WeightDtype, load_model, resolve};
use locret_policies::{
    ChunkKv, Compactor, Critical, Cur, DuoAttention, ExpectedAttention, FastKvZip, Gate, H2o,
    HeadForm, HeadWeights, KvZap, LagKv, LayerHead, Merge, MergeBy, OutputNorms, QFilterProbe,
    QFilters, RetainingHeads, SnapKv, Threshold, Window,
};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

#[derive(Deserialize)]
struct Golden {
    layers: Vec<usize>,
    lag: usize,
    window: usize,
    kernel: usize,
    block: usize,
    tile: usize,
    kept: BTreeMap<String, Vec<Vec<Vec<u32>>>>,
}

#[derive(Deserialize)]
struct Prompt {
    prompt: Vec<u32>,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

static GOLDEN: LazyLock<Golden> = LazyLock::new(|| {
    let text = std::fs::read_to_string(folder("field/golden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
});

static TENSORS: LazyLock<Vec<u8>> =
    LazyLock::new(|| std::fs::read(folder("field/golden.safetensors")).unwrap());

/// In single precision: the references are computed with such weights.
static MODEL: LazyLock<Arc<dyn CausalLm>> = LazyLock::new(|| {
    let file =
        resolve("smollm2", &FetchOptions::default(), &|_| {}).expect("SmolLM2 can be fetched");
    let options = LoadOptions::new().weights(WeightDtype::F32);
    load_model(file, &options, &Device::flex()).unwrap().model
});

fn prompt() -> Vec<u32> {
    let text = std::fs::read_to_string(folder("scores/golden.json")).unwrap();
    serde_json::from_str::<Prompt>(&text).unwrap().prompt
}

fn tensor(name: &str) -> Vec<f32> {
    let all = SafeTensors::deserialize(&TENSORS).unwrap();
    let data = all.tensor(name).unwrap().data().to_vec();
    let quads = data.chunks_exact(4);
    quads
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// A policy that keeps everything and asks for what another one needs.
#[derive(Debug)]
struct Watched(Needs);

impl KvCachePolicy for Watched {
    fn name(&self) -> String {
        "watched".into()
    }

    fn needs(&self) -> Needs {
        self.0
    }

    fn step(&self, _at: &Step, _units: &LayerUnits<'_>) -> Result<Verdict> {
        Ok(Verdict::keep_all())
    }
}

/// What a scorer says of every layer's units, which were read at once and are all there.
struct Spy<S> {
    scorer: S,
    seen: Vec<Scores>,
}

impl<S: Scorer> Probe for Spy<S> {
    fn decided(&mut self, at: &Decided<'_>) -> Result<()> {
        self.seen.push(self.scorer.score(at.step, at.units)?);
        Ok(())
    }
}

fn read(policy: impl KvCachePolicy + 'static, probe: &mut dyn Probe) {
    let ids = prompt();
    let mut session = Session::new(MODEL.clone(), Arc::new(policy)).unwrap();
    let prefill = Prefill::new(ids.len(), 0);
    session.prefill_watched(&ids, &prefill, probe).unwrap();
}

/// `[layer][KV head][unit]`, of the golden layers.
fn scores<S: Scorer>(scorer: S) -> Vec<Vec<Vec<f32>>> {
    let watched = Watched(scorer.needs());
    let seen = Vec::new();
    let mut spy = Spy { scorer, seen };
    read(watched, &mut spy);
    let layers = GOLDEN.layers.iter().map(|layer| {
        let scores = &spy.seen[*layer];
        let heads = scores.heads().iter();
        heads
            .map(|list| list.iter().step_by(scores.width()).copied().collect())
            .collect()
    });
    layers.collect()
}

/// By layer and KV head, the golden scores.
fn due(name: &str) -> Vec<Vec<Vec<f32>>> {
    let (heads, tokens) = (MODEL.spec().kv_heads, prompt().len());
    let all = tensor(name);
    assert_eq!(all.len(), GOLDEN.layers.len() * heads * tokens);
    let layers = all.chunks(heads * tokens);
    layers
        .map(|layer| layer.chunks(tokens).map(<[f32]>::to_vec).collect())
        .collect()
}

/// Equal but for a thousandth of the larger ones and `least`, from unit `first` on.
#[track_caller]
fn assert_near(
    name: &str,
    found: &[Vec<Vec<f32>>],
    due: &[Vec<Vec<f32>>],
    first: usize,
    least: f32,
) {
    let mut compared = 0;
    for (layer, (found, due)) in found.iter().zip(due).enumerate() {
        assert_eq!(found.len(), due.len());
        for (head, (found, due)) in found.iter().zip(due).enumerate() {
            assert_eq!(found.len(), due.len());
            for (unit, (a, b)) in found.iter().zip(due).enumerate().skip(first) {
                assert!(
                    (a - b).abs() <= least + 1e-3 * b.abs(),
                    "{name}, layer {layer}, head {head}, unit {unit}: {a} for {b}"
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 1000, "{compared}");
}

#[test]
fn expected_attention_is_that_of_kvpress() {
    let scorer = ExpectedAttention::new();
    assert_near(
        "expected attention",
        &scores(scorer),
        &due("expected_attention"),
        4,
        1e-6,
    );
    let plain = scorer.covariance(false).value_norm(false);
    let found = scores(plain);
    assert_near(
        "by the mean",
        &found,
        &due("expected_attention_mean"),
        4,
        1e-6,
    );
    for head in found.iter().flatten() {
        let (sinks, rest) = head.split_at(4);
        assert!(sinks.iter().all(|s| *s > 1.0) && rest.iter().all(|s| *s < 1.0));
    }
}

#[test]
fn lagkv_is_that_of_kvpress() {
    let found = scores(LagKv::new().lag(GOLDEN.lag));
    let due = due("lagkv");
    // What waits has no judgement yet; there it is marked.
    let judged = 4 + ((prompt().len() - 4) / GOLDEN.lag - 1) * GOLDEN.lag;
    let (mut same, mut all) = (0, 0);
    for (found, due) in found.iter().flatten().zip(due.iter().flatten()) {
        for unit in 4..judged {
            // Two units that are as good as equal may change places.
            assert!((found[unit] - due[unit]).abs() < 1.5 / GOLDEN.lag as f32);
            same += usize::from((found[unit] - due[unit]).abs() < 1e-6);
            all += 1;
        }
        assert!(due[judged..].iter().all(|s| *s == 1.0));
        let waiting = &found[judged..];
        assert!(waiting.windows(2).all(|w| w[0] < w[1]) && waiting[0] > 1.0);
    }
    assert!(all > 1000 && all - same <= 4, "{same} of {all}");
}

#[test]
fn cur_is_that_of_kvpress() {
    let mut found = scores(Cur::new());
    for head in found.iter_mut().flatten() {
        // As published, divided by the sum of all, which the first units' marks hide.
        let squares = |unit: usize| head[unit];
        let rest: f32 = (4..head.len()).map(squares).sum();
        head.iter_mut().for_each(|s| *s /= rest);
    }
    let mut due = due("cur");
    for head in due.iter_mut().flatten() {
        let rest: f32 = head[4..].iter().sum();
        assert!(head[..4].iter().all(|s| *s == 1.0));
        head.iter_mut().for_each(|s| *s /= rest);
    }
    assert_near("cur", &found, &due, 4, 1e-6);
}

#[test]
fn compactor_is_that_of_kvpress() {
    let spec = MODEL.spec();
    let size = spec.kv_heads * spec.head_dim * Compactor::COLUMNS;
    // Random matrices as they were drawn there, of the layers that are compared.
    let mut sketches = vec![vec![0.0; size]; spec.layers];
    for (layer, drawn) in GOLDEN.layers.iter().zip(tensor("sketch").chunks(size)) {
        sketches[*layer] = drawn.iter().map(|x| x / 48f32.sqrt()).collect();
    }
    let scorer = Compactor::new().tile(GOLDEN.tile).sketches(sketches);
    // The first eight and the last four units are marked, not scored.
    let inner = |all: Vec<Vec<Vec<f32>>>| -> Vec<Vec<Vec<f32>>> {
        let head = |list: &Vec<f32>| list[8..list.len() - 4].to_vec();
        let layers = all.iter();
        layers
            .map(|layer| layer.iter().map(head).collect())
            .collect()
    };
    let (found, due) = (inner(scores(scorer)), inner(due("compactor")));
    assert_near("compactor", &found, &due, 0, 1e-3);
}

/// `n` weights from a formula.
fn numbers(start: usize, n: usize) -> Vec<f32> {
    let number = |i: usize| ((i * 7919 % 1009) as f32 / 504.5 - 1.0) / 2.0;
    (start..start + n).map(number).collect()
}

fn heads(form: HeadForm, layer: impl Fn(usize) -> LayerHead) -> RetainingHeads {
    let weights = HeadWeights {
        form,
        layers: (0..MODEL.spec().layers).map(layer).collect(),
        ..HeadWeights::default()
    };
    RetainingHeads::for_model(&weights, &**MODEL).unwrap()
}

fn kvzap() -> KvZap {
    let spec = MODEL.spec();
    KvZap::new(heads(HeadForm::Linear, |l| LayerHead {
        d_r: spec.kv_heads,
        fc1: numbers(31 * l, spec.kv_heads * spec.hidden),
        fc1_bias: numbers(31 * l + 3, spec.kv_heads),
        ..LayerHead::default()
    }))
}

fn fast_kvzip() -> FastKvZip {
    let (spec, features, sinks) = (MODEL.spec(), 16, 16);
    let (queries, keys) = (spec.heads * features, spec.kv_heads * features);
    // Norms are near 1; only queries have a bias.
    let norm = |at| numbers(at, features).iter().map(|x| 1.0 + x).collect();
    FastKvZip::new(heads(HeadForm::Gate, |l| {
        let mut bias = numbers(31 * l + 3, queries + keys);
        bias[queries..].fill(0.0);
        LayerHead {
            d_r: queries + keys,
            fc1: numbers(31 * l, (queries + keys) * spec.hidden),
            fc1_bias: bias,
            gate: Some(Gate {
                query_norm: norm(31 * l + 9),
                key_norm: norm(31 * l + 11),
                base: numbers(31 * l + 13, spec.kv_heads * sinks * features),
                offset: numbers(31 * l + 17, spec.heads),
            }),
            ..LayerHead::default()
        }
    }))
}

#[test]
fn a_threshold_keeps_what_it_keeps_in_kvpress() {
    let policy = Threshold::new(kvzap(), 0.0).window(GOLDEN.window);
    assert_kept("threshold", policy);
}

#[test]
fn streaming_heads_keep_what_they_keep_in_kvpress() {
    let number = |i: usize| (f64::from((i * 7919 % 1009) as u32) / 504.5 - 1.0) / 2.0;
    let (layers, heads) = (MODEL.spec().layers, MODEL.spec().kv_heads);
    let row = |l: usize| {
        (0..heads)
            .map(|h| number(7 * (l * heads + h)) + 0.5)
            .collect()
    };
    let scores: Vec<Vec<f64>> = (0..layers).map(row).collect();
    let policy = DuoAttention::new(&scores, 0.5).unwrap().sinks(4).recent(32);
    assert_kept("duo", policy);
}

#[test]
fn q_filters_are_those_of_kvpress() {
    let spec = MODEL.spec();
    let shape = [spec.layers, spec.kv_heads, spec.head_dim];
    // Published directions point away from the queries.
    let turned = tensor("filters").iter().map(|x| -x).collect();
    let found = scores(QFilters::new(turned, shape).unwrap());
    assert_near("q filters", &found, &due("q_filters"), 0, 1e-3);
}

/// What stays of every layer, by a policy under which all of it is read at once.
#[derive(Default)]
struct Kept {
    units: Vec<Vec<Vec<u32>>>,
}

impl Probe for Kept {
    fn decided(&mut self, at: &Decided<'_>) -> Result<()> {
        let all = || (0..at.units.kv_heads()).map(|head| (0..at.units.len(head) as u32).collect());
        self.units.push(match &at.verdict.keep {
            Keep::Slots(kept) | Keep::Merged { kept, .. } => kept.heads().to_vec(),
            _ => all().collect(),
        });
        Ok(())
    }
}

/// The golden choices, and as many found ones.
#[track_caller]
fn assert_kept(name: &str, policy: impl KvCachePolicy + 'static) {
    assert_kept_as(name, Arc::new(policy), &GOLDEN.kept[name]);
}

#[track_caller]
fn assert_kept_as(name: &str, policy: Arc<dyn KvCachePolicy>, due: &[Vec<Vec<u32>>]) {
    let mut kept = Kept::default();
    read(policy, &mut kept);
    assert_eq!(due.len(), GOLDEN.layers.len());
    let mut gone = 0;
    for (layer, due) in GOLDEN.layers.iter().zip(due) {
        for (head, (found, due)) in kept.units[*layer].iter().zip(due).enumerate() {
            assert_eq!(found, due, "{name}, layer {layer}, head {head}");
            gone += prompt().len() - due.len();
        }
    }
    assert!(gone > 500, "{name}: {gone} units gone");
}

/// Heads and gates that guess KVzip's scores, with a budget.
#[test]
fn surrogates_keep_what_they_keep_in_kvpress() {
    let half = Budget::Units(prompt().len() / 2);
    // No unit is protected there.
    assert_kept_after("kvzap", Evict::new(kvzap(), half));
    // A fiftieth of the text is, and the first four.
    let recent = (prompt().len() as f64 * 0.02) as usize;
    let gates = || {
        let policy = Evict::new(fast_kvzip(), half).sinks(FastKvZip::SINKS);
        policy.recent(recent).ada(0.0)
    };
    assert_kept_after("fast_kvzip_layer", gates());
    assert_kept_after("fast_kvzip", gates().share(Share::Model));
}

/// What is there after all layers, since what a budget over the model leaves is known only then. In the first layer a
/// score is one of the token alone: of equal tokens others stay there.
#[track_caller]
fn assert_kept_after(name: &str, policy: impl KvCachePolicy + 'static) {
    let ids = prompt();
    let mut session = Session::new(MODEL.clone(), Arc::new(policy)).unwrap();
    session.prefill(&ids, &Prefill::new(ids.len(), 0)).unwrap();
    let due = &MORE.kept[name];
    assert_eq!(due.len(), GOLDEN.layers.len());
    for (layer, due) in GOLDEN.layers.iter().zip(due) {
        for (head, due) in due.iter().enumerate() {
            let found = session.cache().positions(*layer, head);
            if *layer > 0 {
                assert_eq!(found, due, "{name}, layer {layer}, head {head}");
                continue;
            }
            let tokens = |units: &[u32]| {
                let mut tokens: Vec<u32> = units.iter().map(|u| ids[*u as usize]).collect();
                tokens.sort_unstable();
                tokens
            };
            assert_eq!(tokens(found), tokens(due), "{name}, head {head}");
        }
    }
}

static MORE: LazyLock<More> = LazyLock::new(|| {
    let text = std::fs::read_to_string(folder("field/more.json")).unwrap();
    serde_json::from_str(&text).unwrap()
});

#[derive(Deserialize)]
struct More {
    pyramid: usize,
    beta: f64,
    kept: BTreeMap<String, Vec<Vec<Vec<u32>>>>,
}

/// Windows, and budgets that are shared out over heads or layers.
#[test]
fn windows_and_shares_are_those_of_kvpress() {
    let more = &*MORE;
    let half = prompt().len() / 2;
    let budget = Budget::Units(half);
    // Rounded down there and up here.
    let floor = (0.2 * half as f64).floor() / half as f64;
    let kept = |name: &str, policy| assert_kept_as(name, policy, &more.kept[name]);
    kept("streaming", Arc::new(Window::policy(budget)));
    let ada = Evict::new(snapkv(), budget).ada(floor);
    kept("ada_snapkv", Arc::new(ada));
    let expected = ExpectedAttention::new().value_norm(false);
    kept(
        "ada_expected",
        Arc::new(Evict::new(expected, budget).ada(floor)),
    );
    let pyramid = Evict::new(snapkv(), Budget::Units(more.pyramid)).pyramid(more.beta);
    kept("pyramid_snapkv", Arc::new(pyramid));
}

fn snapkv() -> SnapKv {
    SnapKv::new().window(GOLDEN.window).kernel(GOLDEN.kernel)
}

#[test]
fn blocks_are_those_of_kvpress() {
    let scorer = ChunkKv::new(ExpectedAttention::new().value_norm(false)).block(GOLDEN.block);
    // Five whole blocks and the text's last one, which is shorter.
    let budget = Budget::Units(GOLDEN.kept["chunkkv_expected"][0][0].len());
    assert_kept("chunkkv_expected", Evict::new(scorer, budget));
}

#[test]
fn critical_units_are_those_of_kvpress() {
    let norms = Arc::new(OutputNorms::for_model(&**MODEL).unwrap());
    let budget = prompt().len() / 2;
    let expected = ExpectedAttention::new().value_norm(false);
    // Ada-KV's share of the budget, rounded down there and up here.
    let floor = (0.2 * budget as f64).floor() / budget as f64;
    let budget = Budget::Units(budget);
    let around = Critical::new(snapkv(), norms.clone());
    assert_kept("critical_snapkv", Evict::new(around.clone(), budget));
    let ada = Evict::new(around, budget).ada(floor);
    assert_kept("critical_ada_snapkv", ada);
    let around = Critical::new(expected, norms);
    assert_kept("critical_expected", Evict::new(around.clone(), budget));
    let ada = Evict::new(around, budget).ada(floor);
    assert_kept("critical_ada_expected", ada);
}

#[test]
fn merged_values_are_those_of_kvpress() {
    let scorer = ExpectedAttention::new().value_norm(false);
    let budget = Budget::Units(prompt().len() / 2);
    let policy = Merge::new(Evict::new(scorer, budget), 0.3).by(MergeBy::Weighted);
    assert_kept("merging", policy.clone());
    let ids = prompt();
    let mut session = Session::new(MODEL.clone(), Arc::new(policy)).unwrap();
    session.prefill(&ids, &Prefill::new(ids.len(), 0)).unwrap();
    let due = tensor("merged_values");
    let heads = MODEL.spec().kv_heads;
    let mut mixed = 0;
    for (head, due) in due.chunks(due.len() / heads).enumerate() {
        // The golden values are those of layer 10.
        let found = session.cache().store(10).values(head).unwrap();
        for (a, b) in found.values().unwrap().iter().zip(due) {
            assert!((a - b).abs() <= 1e-5 + 1e-3 * b.abs(), "{a} for {b}");
        }
        mixed += due.len();
    }
    assert_eq!(mixed, heads * ids.len() / 2 * MODEL.spec().head_dim);
}

/// Directions that were measured on the text itself tell what gets attention, and so point to the queries.
#[test]
fn measured_directions_point_to_queries() {
    let mut probe = QFilterProbe::new();
    read(Watched(probe.needs()), &mut probe);
    let filters = probe.filters().unwrap();
    let (along, paid) = (scores(filters.clone()), scores(H2o));
    let mut positive = 0;
    for (along, paid) in along.iter().flatten().zip(paid.iter().flatten()) {
        // Without the first units, which get attention whatever they are.
        let pairs = || along.iter().zip(paid).skip(4);
        let pairs: Vec<[f64; 2]> = pairs()
            .map(|(a, b)| [f64::from(*a), f64::from(b.ln())])
            .collect();
        let mean = |i: usize| pairs.iter().map(|p| p[i]).sum::<f64>() / pairs.len() as f64;
        let means = [mean(0), mean(1)];
        let sum = |i: usize, j: usize| -> f64 {
            let apart = pairs.iter().map(|p| (p[i] - means[i]) * (p[j] - means[j]));
            apart.sum()
        };
        let correlation = sum(0, 1) / (sum(0, 0) * sum(1, 1)).sqrt();
        println!("{correlation:.2}");
        positive += usize::from(correlation > 0.0);
    }
    assert!(positive >= 6, "{positive} of 9 heads");
    // Files say where directions point.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("filters.safetensors");
    filters.save(&file).unwrap();
    let again = QFilters::load(&file).unwrap();
    assert_eq!(again.fingerprint(), filters.fingerprint());
}
