//! InfLLM against the authors' own code, against plain loops, through the conformance suite, and with a second tier.

use burn::tensor::Device;
use locret_core::{
    Budget, CacheOptions, CausalLm, DType, Error, Generate, KvCachePolicy, ModelSpec, Pass, Phase,
    Prefill, Qkv, QuantLayout, Quantization, Result, RopeConfig, Rows, SequenceCache, Session,
    Tier, Visible, compute,
    conformance::{Case, Decision, PolicyCheck, RandomModel, Recording, check_policy, small_spec},
    forward, plan,
};
use locret_models::{FetchOptions, LoadOptions, WeightDtype, load_model, resolve};
use locret_policies::{InfLlm, Quantized, Tiered};
use proptest::prelude::*;
use safetensors::{Dtype, serialize, tensor::TensorView};
use serde::Deserialize;
use std::{collections::BTreeMap, ops::Range, sync::Arc};

/// Numbers in -1..1 by a hash of their place, as `make.py` makes them.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let number = |place: usize| {
        let mut x = place as u64 + (seed << 20);
        for (shift, factor) in [(16, 0x7feb_352d), (15, 0x846c_a68b), (16, 1)] {
            x = ((x ^ (x >> shift)).wrapping_mul(factor)) & 0xffff_ffff;
        }
        ((x >> 8) as f64 / f64::from(1 << 23) - 1.0) as f32
    };
    (0..count).map(number).collect()
}

#[derive(Deserialize)]
struct Golden {
    cases: Vec<GoldenCase>,
}

#[derive(Deserialize)]
struct GoldenCase {
    name: String,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    hidden: usize,
    inner: usize,
    vocab: usize,
    theta: f64,
    seed: u64,
    settings: Settings,
    prompt: Vec<u32>,
    forced: Vec<u32>,
    retrieved: Vec<Vec<Vec<u32>>>,
    rows: Vec<usize>,
    logits: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Settings {
    n_init: usize,
    n_local: usize,
    block_size: usize,
    topk: usize,
    repr_topk: usize,
    exc_block_size: usize,
}

impl Settings {
    fn policy(&self) -> InfLlm {
        InfLlm::new()
            .init(self.n_init)
            .local(self.n_local)
            .block(self.block_size)
            .topk(self.topk)
            .representatives(self.repr_topk)
            .exec_block(self.exc_block_size)
    }
}

/// The Llama of a case, by way of its files.
fn llama(case: &GoldenCase) -> Arc<dyn CausalLm> {
    let (h, d) = (case.hidden, case.head_dim);
    let (q, kv) = (case.heads * d, case.kv_heads * d);
    let mut place = 0;
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let mut matrix = |name: String, rows: usize, columns: usize, scale: f64| {
        place += 1;
        let mut values = numbers(rows * columns, case.seed * 100 + place);
        let scale = (scale / (columns as f64).sqrt()) as f32;
        values.iter_mut().for_each(|x| *x *= scale);
        tensors.insert(name, (vec![rows, columns], bytes(&values)));
    };
    matrix(
        "model.embed_tokens.weight".into(),
        case.vocab,
        h,
        (h as f64).sqrt(),
    );
    for layer in 0..case.layers {
        for (name, rows, columns, scale) in [
            ("self_attn.q_proj", q, h, 2.5),
            ("self_attn.k_proj", kv, h, 2.5),
            ("self_attn.v_proj", kv, h, 1.5),
            ("self_attn.o_proj", h, q, 1.5),
            ("mlp.gate_proj", case.inner, h, 1.5),
            ("mlp.up_proj", case.inner, h, 1.5),
            ("mlp.down_proj", h, case.inner, 1.5),
        ] {
            let name = format!("model.layers.{layer}.{name}.weight");
            matrix(name, rows, columns, scale);
        }
    }
    matrix("lm_head.weight".into(), case.vocab, h, 3.0);
    let norms = (0..case.layers).flat_map(|layer| {
        ["input_layernorm", "post_attention_layernorm"]
            .map(|name| format!("model.layers.{layer}.{name}.weight"))
    });
    for name in norms.chain(["model.norm.weight".into()]) {
        tensors.insert(name, (vec![h], bytes(&vec![1.0; h])));
    }
    let views = tensors.iter().map(|(name, (shape, data))| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), data).unwrap(),
        )
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("model.safetensors"),
        serialize(views, None).unwrap(),
    )
    .unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": case.vocab,
        "hidden_size": h,
        "intermediate_size": case.inner,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": d,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": case.theta,
        "tie_word_embeddings": false,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let options = LoadOptions::new().weights(WeightDtype::F32);
    load_model(folder.path(), &options, &Device::flex())
        .unwrap()
        .model
}

/// Blocks that a step let queries see, of `seen` units before it.
fn retrieved(policy: &Settings, visible: &Visible, seen: usize) -> Vec<u32> {
    let Visible::Chosen(views) = visible else {
        return Vec::new();
    };
    let left = seen.saturating_sub(policy.n_local);
    let init = left.min(policy.n_init);
    let rest = init + (left - init) / policy.block_size * policy.block_size;
    let blocks = |list: &Vec<locret_core::View>| -> Vec<u32> {
        let all = list[0].far.iter().filter(|far| far.start as usize >= init);
        let blocks = all.filter(|far| (far.start as usize) < rest);
        let number = |far: &Range<u32>| {
            assert_eq!(far.len(), policy.block_size);
            (far.start - init as u32) / policy.block_size as u32
        };
        blocks.map(number).collect()
    };
    let first = blocks(&views.lists()[0]);
    // One set for all heads of a layer.
    assert!(views.lists().iter().all(|list| blocks(list) == first));
    first
}

/// A prompt in execution blocks, its last token alone, and then tokens one by one, as the authors feed them: what was
/// decided, and the logits of every token (of the last one of each step with `last`).
fn fed(
    model: &Arc<dyn CausalLm>,
    settings: &Settings,
    prompt: &[u32],
    forced: &[u32],
    last: bool,
) -> (Vec<Decision>, Vec<Vec<f32>>) {
    let recording = Arc::new(Recording::new(Arc::new(settings.policy())));
    let options = CacheOptions::default();
    let mut cache =
        SequenceCache::new(model.spec(), recording.clone(), model.compute(), options).unwrap();
    let (end, rest) = prompt.split_last().unwrap();
    let chunks = rest.chunks(settings.exc_block_size);
    let steps = chunks.map(|ids| (ids.to_vec(), Phase::Prefill { last: false }));
    let forced = forced.iter().map(|id| (vec![*id], Phase::Forced));
    let steps = steps.chain([(vec![*end], Phase::Tail)]).chain(forced);
    let mut logits = Vec::new();
    for (ids, phase) in steps {
        let total = cache.seen() + ids.len();
        let step = cache.step(phase, ids.len(), total);
        let mut pass = Pass::new([step]).unwrap();
        let mut hidden = forward(&**model, &ids, &mut pass).unwrap();
        pass.finish(None).unwrap();
        if last {
            let values = hidden.into_values().unwrap();
            let width = model.spec().hidden;
            let row = values[values.len() - width..].to_vec();
            hidden = model.compute().rows(row, width).unwrap();
        }
        let rows = model.logits(hidden).unwrap().into_values().unwrap();
        logits.extend(rows.chunks(model.spec().vocab).map(<[f32]>::to_vec));
    }
    (recording.decisions(), logits)
}

#[test]
fn blocks_and_logits_are_the_authors() {
    let golden: Golden = serde_json::from_str(include_str!("golden/infllm/golden.json")).unwrap();
    for case in golden.cases {
        let (model, name) = (llama(&case), &case.name);
        let (decisions, logits) = fed(&model, &case.settings, &case.prompt, &case.forced, false);
        assert_eq!(
            decisions.len(),
            case.retrieved.len() * case.layers,
            "{name}"
        );
        let due = case.retrieved.iter().flatten();
        for (decision, due) in decisions.iter().zip(due) {
            let step = decision.step;
            let found = retrieved(&case.settings, &decision.visible, step.seen);
            assert_eq!(&found, due, "{name}: {step:?}");
        }
        let mut most = 0f32;
        for (row, due) in case.rows.iter().zip(&case.logits) {
            let pairs = logits[*row].iter().zip(due);
            most = pairs.map(|(a, b)| (a - b).abs()).fold(most, f32::max);
        }
        assert!(most < 1e-3, "{name}: logits are off by {most:.1e}");
    }
}

#[derive(Deserialize)]
struct SmolLm2 {
    settings: Settings,
    prompt: Vec<u32>,
    forced: Vec<u32>,
    retrieved: Vec<Vec<Vec<u32>>>,
    last: Vec<(Vec<usize>, Vec<f32>)>,
}

#[test]
fn blocks_and_logits_of_smollm2_are_the_authors() {
    let golden: SmolLm2 = serde_json::from_str(include_str!("golden/infllm/smollm2.json")).unwrap();
    let file =
        resolve("smollm2", &FetchOptions::default(), &|_| {}).expect("SmolLM2 can be fetched");
    let options = LoadOptions::new().weights(WeightDtype::F32);
    let model = load_model(file, &options, &Device::flex()).unwrap().model;
    let (decisions, logits) = fed(
        &model,
        &golden.settings,
        &golden.prompt,
        &golden.forced,
        true,
    );
    let layers = model.spec().layers;
    assert_eq!(decisions.len(), golden.retrieved.len() * layers);
    for (decision, due) in decisions.iter().zip(golden.retrieved.iter().flatten()) {
        let step = decision.step;
        let found = retrieved(&golden.settings, &decision.visible, step.seen);
        assert_eq!(&found, due, "{step:?}");
    }
    let ends = &logits[logits.len() - golden.last.len()..];
    for (found, (ids, due)) in ends.iter().zip(&golden.last) {
        for (id, due) in ids.iter().zip(due) {
            assert!((found[*id] - due).abs() < 1e-3, "{} for {due}", found[*id]);
        }
    }
}

/// InfLLM of one layer in plain loops, in double precision: lists of units that move on.
struct Naive {
    settings: Settings,
    heads: usize,
    kv_heads: usize,
    d: usize,
    /// By KV head, by unit, not rotated.
    keys: Vec<Vec<Vec<f64>>>,
    values: Vec<Vec<Vec<f64>>>,
    /// By query head, by unit.
    paid: Vec<Vec<f64>>,
    init: Vec<usize>,
    blocks: Vec<Vec<usize>>,
    /// By block, by query head.
    representatives: Vec<Vec<Vec<f64>>>,
    remainder: Vec<usize>,
    /// How near the nearest decision was, of what was paid and of what was retrieved.
    gap: f64,
}

fn rotated(x: &[f64], position: usize) -> Vec<f64> {
    let half = x.len() / 2;
    let mut out = x.to_vec();
    for i in 0..half {
        let angle = position as f64 * 10_000f64.powf(-2.0 * i as f64 / x.len() as f64);
        let (sin, cos) = angle.sin_cos();
        out[i] = x[i] * cos - x[i + half] * sin;
        out[i + half] = x[i + half] * cos + x[i] * sin;
    }
    out
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The `count` largest, ascending by place, and how much larger they are than the next one.
fn largest(x: &[f64], count: usize) -> (Vec<usize>, f64) {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|a, b| x[*b].total_cmp(&x[*a]));
    let gap = match order.get(count) {
        Some(next) => x[order[count - 1]] - x[*next],
        None => f64::INFINITY,
    };
    order.truncate(count);
    order.sort_unstable();
    (order, gap)
}

impl Naive {
    fn new(settings: Settings, [heads, kv_heads, d]: [usize; 3]) -> Self {
        Self {
            settings,
            heads,
            kv_heads,
            d,
            keys: vec![Vec::new(); kv_heads],
            values: vec![Vec::new(); kv_heads],
            paid: vec![Vec::new(); heads],
            init: Vec::new(),
            blocks: Vec::new(),
            representatives: Vec::new(),
            remainder: Vec::new(),
            gap: f64::INFINITY,
        }
    }

    /// One execution block: outputs, and which blocks were retrieved.
    fn step(&mut self, [q, k, v]: [&[Vec<f64>]; 3]) -> (Vec<Vec<f64>>, Vec<usize>) {
        let (d, group, local) = (self.d, self.heads / self.kv_heads, self.settings.n_local);
        let (t, before) = (q.len(), self.keys[0].len());
        for g in 0..self.kv_heads {
            self.keys[g].extend(k.iter().map(|row| row[g * d..(g + 1) * d].to_vec()));
            self.values[g].extend(v.iter().map(|row| row[g * d..(g + 1) * d].to_vec()));
        }
        self.paid
            .iter_mut()
            .for_each(|paid| paid.resize(before + t, 0.0));
        let far: Vec<Vec<Vec<f64>>> = (0..self.heads)
            .map(|h| {
                let of = |row: &Vec<f64>| rotated(&row[h * d..(h + 1) * d], local - 1);
                q.iter().map(of).collect()
            })
            .collect();
        let chosen: Vec<usize> = match self.blocks.len() <= self.settings.topk {
            true => (0..self.blocks.len()).collect(),
            false => {
                let score = |representatives: &Vec<Vec<f64>>| -> f64 {
                    let each = representatives.iter().zip(&far);
                    each.map(|(k, q)| q.iter().map(|q| dot(q, k)).sum::<f64>() / t as f64)
                        .sum()
                };
                let scores: Vec<f64> = self.representatives.iter().map(score).collect();
                let (chosen, gap) = largest(&scores, self.settings.topk);
                self.gap = self.gap.min(gap);
                chosen
            }
        };
        self.remainder.extend(before..before + t);
        let mut out = vec![vec![0.0; self.heads * d]; t];
        for (h, far) in far.iter().enumerate() {
            let (keys, values) = (&self.keys[h / group], &self.values[h / group]);
            for (i, (row, far)) in q.iter().zip(far).enumerate() {
                let own = before + i;
                let query = rotated(&row[h * d..(h + 1) * d], own);
                let mut logits = Vec::new();
                for unit in self.remainder.iter().filter(|unit| **unit <= own) {
                    let near = own - unit < local;
                    let logit = match near {
                        true => dot(&query, &rotated(&keys[*unit], *unit)),
                        false => dot(far, &keys[*unit]),
                    };
                    logits.push((*unit, logit, near));
                }
                let blocks = chosen.iter().flat_map(|block| &self.blocks[*block]);
                for unit in self.init.iter().chain(blocks) {
                    logits.push((*unit, dot(far, &keys[*unit]), false));
                }
                let weight = |x: f64| (x / (d as f64).sqrt()).exp();
                let sum: f64 = logits.iter().map(|(_, x, _)| weight(*x)).sum();
                for (unit, x, near) in logits {
                    let weight = weight(x) / sum;
                    if near {
                        self.paid[h][unit] += weight;
                    }
                    for (out, value) in out[i][h * d..].iter_mut().zip(&values[unit]) {
                        *out += weight * value;
                    }
                }
            }
        }
        if self.init.len() < self.settings.n_init && self.remainder.len() > local {
            let left = self.remainder.len() - local;
            let moved = left.min(self.settings.n_init - self.init.len());
            self.init.extend(self.remainder.drain(..moved));
        }
        while self.remainder.len() >= local + self.settings.block_size {
            let block: Vec<usize> = self.remainder.drain(..self.settings.block_size).collect();
            let mut all = Vec::new();
            for h in 0..self.heads {
                let paid: Vec<f64> = block.iter().map(|unit| self.paid[h][*unit]).collect();
                let (best, gap) = largest(&paid, self.settings.repr_topk);
                self.gap = self.gap.min(gap);
                let mut mean = vec![0.0; d];
                for at in &best {
                    let key = &self.keys[h / group][block[*at]];
                    mean.iter_mut()
                        .zip(key)
                        .for_each(|(m, k)| *m += k / best.len() as f64);
                }
                all.push(mean);
            }
            self.blocks.push(block);
            self.representatives.push(all);
        }
        (out, chosen)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn plain_loops_say_the_same(
        kv_heads in 1usize..4,
        group in 1usize..4,
        half in 2usize..9,
        steps in prop::collection::vec(1usize..40, 1..14),
        n_init in 0usize..9,
        n_local in 5usize..40,
        block_size in 1usize..14,
        topk in 1usize..5,
        repr_topk in 1usize..5,
        seed in 0u64..1000,
        tier in 0usize..3,
    ) {
        let (heads, d) = (kv_heads * group, 2 * half);
        let n: usize = steps.iter().sum();
        let settings = || Settings {
            n_init,
            n_local,
            block_size,
            topk,
            repr_topk: repr_topk.min(block_size),
            exc_block_size: 40,
        };
        let infllm = settings().policy();
        let resident = Budget::Units(infllm.seen() + 40);
        let policy: Arc<dyn KvCachePolicy> = match tier {
            0 => Arc::new(infllm),
            1 => Arc::new(Tiered::new(infllm, Tier::memory(), resident)),
            _ => Arc::new(Tiered::new(infllm, Tier::disk(None), resident)),
        };
        let spec = ModelSpec::new(1, heads, kv_heads, heads * d, 16)
            .with_head_dim(d)
            .with_rope(RopeConfig::plain(10_000.0, d))
            .with_softmax_scale(1.0 / (d as f32).sqrt());
        let compute = compute(&Device::flex());
        let recording = Arc::new(Recording::new(policy));
        let options = CacheOptions::default();
        let mut cache = SequenceCache::new(&spec, recording.clone(), &compute, options).unwrap();
        let widths = [heads * d, kv_heads * d, kv_heads * d];
        let parts: Vec<Vec<f32>> = (0..3)
            .map(|part| {
                let mut x = numbers(n * widths[part], 3 * seed + part as u64);
                x.iter_mut().for_each(|x| *x *= 2.0);
                x
            })
            .collect();
        let mut naive = Naive::new(settings(), [heads, kv_heads, d]);
        let mut first = 0;
        for t in steps {
            let part = |which: usize| -> Rows {
                let width = widths[which];
                let values = parts[which][first * width..(first + t) * width].to_vec();
                compute.rows(values, width).unwrap()
            };
            let wide = |which: usize| -> Vec<Vec<f64>> {
                let width = widths[which];
                let rows = parts[which][first * width..(first + t) * width].chunks(width);
                rows.map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect()
            };
            let step = cache.step(Phase::Prefill { last: false }, t, n);
            let mut pass = Pass::new([step]).unwrap();
            let out = pass.attend(0, Qkv::new(part(0), part(1), part(2))).unwrap();
            pass.finish(None).unwrap();
            let (due, chosen) = naive.step([&wide(0), &wide(1), &wide(2)]);
            // Too near for single precision: whatever comes after it may differ.
            if naive.gap < 1e-4 {
                break;
            }
            let last = recording.decisions().pop().unwrap();
            let found = retrieved(&settings(), &last.visible, first);
            let chosen: Vec<u32> = chosen.into_iter().map(|block| block as u32).collect();
            prop_assert_eq!(found, chosen);
            let out = out.into_values().unwrap();
            for (found, due) in out.iter().zip(due.concat()) {
                prop_assert!((f64::from(*found) - due).abs() < 1e-4, "{} for {}", found, due);
            }
            first += t;
        }
    }
}

/// A small one, or one that sees everything.
fn small(case: &Case<'_>) -> InfLlm {
    if case.budget == 1 << 20 {
        return InfLlm::new();
    }
    let seed = case.seed as usize;
    InfLlm::new()
        .init(seed % 5)
        .local(6 + seed % 23)
        .block(1 + seed % 7)
        .topk(1 + seed % 3)
        .representatives(1 + seed % (1 + seed % 7).min(3))
}

#[test]
fn everything_conforms() {
    let check = PolicyCheck {
        seeds: 0..30,
        ..PolicyCheck::default()
    };
    check_policy(&Device::flex(), &check, |case| Arc::new(small(case))).unwrap();
    for (bits, layout) in [
        (8, QuantLayout::PerToken),
        (8, QuantLayout::Kivi),
        (4, QuantLayout::PerToken),
    ] {
        let coarse = bits == 4;
        let check = PolicyCheck {
            seeds: 30..38,
            dense: false,
            dtypes: vec![DType::F32],
            tolerance: if coarse { 0.3 } else { 0.02 },
            store_tolerance: if coarse { 0.1 } else { 0.03 },
            ..PolicyCheck::default()
        };
        let config = Quantization {
            bits,
            layout,
            group: 16,
            residual: 4,
            first: 2,
            hadamard: bits == 8,
        };
        check_policy(&Device::flex(), &check, |case| {
            let policy = Quantized::new(small(case), config);
            Arc::new(Tiered::new(policy, Tier::memory(), Budget::Units(400)))
        })
        .unwrap_or_else(|e| panic!("{bits} bits, {layout:?}: {e}"));
    }
}

#[test]
fn with_two_tiers_too() {
    for tier in [Tier::memory(), Tier::disk(None)] {
        let check = PolicyCheck {
            seeds: 40..56,
            dense: false,
            ..PolicyCheck::default()
        };
        check_policy(&Device::flex(), &check, |case| {
            let policy = small(case);
            let resident = match case.budget == 1 << 20 {
                true => Budget::Units(1 << 12),
                // What is seen, a chunk, and what is forced.
                false => Budget::Units(policy.seen() + 60),
            };
            Arc::new(Tiered::new(policy, tier.clone(), resident))
        })
        .unwrap_or_else(|e| panic!("{tier:?}: {e}"));
    }
}

#[test]
fn resident_bytes_are_flat_and_all_bytes_linear() {
    let spec = small_spec(6, 2, 16);
    let model = Arc::new(RandomModel::new(spec.clone(), 3, &Device::flex()).unwrap());
    let policy = InfLlm::new().init(4).local(40).block(8).topk(4);
    let (chunk, chunks) = (16, 40);
    let ids: Vec<u32> = (0..chunk * chunks)
        .map(|i| ((i * i + 7 * i + i / 5) % 61) as u32)
        .collect();
    let prefill = Prefill::new(chunk, 0);
    let read = |policy: Arc<dyn KvCachePolicy>| -> Result<(Session, Vec<[usize; 2]>)> {
        let mut session = Session::new(model.clone(), policy)?;
        let mut bytes = Vec::new();
        session.prefill_with(&ids, &prefill, &mut |done| {
            bytes.push([done.cache.bytes(), done.cache.total_bytes()]);
            Ok(())
        })?;
        Ok((session, bytes))
    };
    let (plain, all) = read(Arc::new(policy.clone())).unwrap();
    let unit = spec.unit_bytes(4) * spec.layers * spec.kv_heads;
    for (index, bytes) in all.iter().enumerate() {
        let due = (index + 1) * chunk * unit;
        assert!(
            bytes.iter().all(|bytes| *bytes == due),
            "{bytes:?} for {due}"
        );
    }
    // Just what is seen at once, and then twice that.
    let tight = policy.seen() + chunk;
    for units in [tight, 2 * tight] {
        for tier in [Tier::memory(), Tier::disk(None)] {
            let tiered = Tiered::new(policy.clone(), tier, Budget::Bytes(units * unit));
            let (tiered, options) = (Arc::new(tiered), CacheOptions::default());
            let planned = plan(
                &spec,
                &*tiered,
                model.compute(),
                options,
                &prefill,
                [ids.len(), 0],
            );
            let planned = planned.unwrap().peak.bytes;
            let (session, bytes) = read(tiered).unwrap();
            assert_eq!(session.logits(), plain.logits());
            let peak = session.cache().peak().bytes;
            assert_eq!(planned, units * unit);
            assert!(
                peak <= planned && peak + 9 * unit > planned,
                "{peak} of {planned}"
            );
            let most = |range: &[[usize; 2]]| range.iter().map(|bytes| bytes[0]).max();
            let (early, late) = bytes.split_at(10);
            assert!(most(late) <= most(early).max(Some(planned)));
            assert!(
                late.iter()
                    .all(|bytes| bytes[0] + 24 * unit >= planned && bytes[0] <= planned)
            );
            for (index, [_, total]) in bytes.iter().enumerate() {
                assert_eq!(*total, (index + 1) * chunk * unit);
            }
        }
    }
    // In units, single tokens have room, too.
    let resident = Budget::Units(policy.seen());
    let tiered = Tiered::new(policy.clone(), Tier::disk(None), resident).step(chunk);
    let (mut tiered, _) = read(Arc::new(tiered)).unwrap();
    let mut plain = plain;
    let say = |session: &mut Session| -> Vec<u32> {
        let tokens = session.generate(Generate::greedy(80)).unwrap();
        tokens.map(|token| token.unwrap()).collect()
    };
    assert_eq!(say(&mut tiered), say(&mut plain));
    assert!(tiered.cache().peak().bytes <= (policy.seen() + 64) * unit);
    let less = Tiered::new(policy, Tier::memory(), Budget::Bytes((tight - 12) * unit));
    let error = read(Arc::new(less)).unwrap_err();
    assert!(matches!(error, Error::Memory { .. }), "{error}");
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let spec = small_spec(4, 2, 16);
    let check = |policy: InfLlm, chunk: usize| policy.validate(&spec, &Prefill::new(chunk, 1));
    check(InfLlm::new(), 512).unwrap();
    let error = check(InfLlm::new(), 513).unwrap_err().to_string();
    assert!(
        error.contains("at most 512") && error.contains("513"),
        "{error}"
    );
    check(InfLlm::new().exec_block(600), 513).unwrap();
    for policy in [
        InfLlm::new().local(0),
        InfLlm::new().block(0).representatives(0),
        InfLlm::new().topk(0),
        InfLlm::new().representatives(0),
        InfLlm::new().representatives(129),
    ] {
        assert!(check(policy.clone(), 16).is_err(), "{policy:?}");
    }
    let tiered = Tiered::new(InfLlm::new(), Tier::memory(), Budget::Ratio(0.5));
    assert!(tiered.validate(&spec, &Prefill::new(16, 1)).is_err());
}
