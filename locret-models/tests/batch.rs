//! Tokens of several sequences in one pass through a decoder are what each of them is alone.

use burn::tensor::Device;
use half::f16;
use locret_core::{
    Budget, CacheOptions, CausalLm, DType, DecodeEviction, Kernels, KvCachePolicy, ModelSpec, Pass,
    Phase, Positions, RopeConfig, SequenceCache, Share, forward,
};
use locret_models::{
    Activations, Decoder, DecoderConfig, Layout, Loader, Result, TensorInfo, WeightDtype, Weights,
};
use locret_policies::{Full, H2o, KeyDiff, KeyNorm, Random, SirLlm, SnapKv, Tova, Window};
use std::{borrow::Cow, collections::BTreeMap, ops::Range, path::Path, sync::Arc};

/// Random numbers of 24 bits: Knuth's MMIX generator.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u32 {
        self.0 = (self.0)
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as u32
    }

    /// From -1 to 1.
    fn number(&mut self) -> f32 {
        self.next() as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Random weights in memory: matrices of one type, gains around 1.
#[derive(Debug)]
struct Memory(BTreeMap<String, (TensorInfo, Vec<u8>)>);

impl Memory {
    fn new(config: &DecoderConfig, dtype: DType) -> Self {
        let (spec, inner) = (&config.spec, config.intermediate);
        let hidden = spec.hidden;
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let mut all = BTreeMap::new();
        let mut dice = Dice(7);
        let mut add = |name: String, shape: &[usize]| {
            let dtype = match shape.len() {
                1 => DType::F32,
                _ => dtype,
            };
            let columns = shape[shape.len() - 1];
            let scale = (3.0 / columns as f32).sqrt();
            let numbers = shape.iter().product::<usize>();
            let bytes = match dtype {
                DType::Q4_1 => (0..numbers / 32)
                    .flat_map(|_| {
                        // Codes from 0 to 15 times a scale, and a smallest number.
                        let step = scale / 8.0 * (1.0 + 0.3 * dice.number());
                        let ends = [step, -7.5 * step].map(|x| f16::from_f32(x).to_le_bytes());
                        let codes: [u8; 16] = std::array::from_fn(|_| dice.next() as u8);
                        ends.concat().into_iter().chain(codes)
                    })
                    .collect(),
                _ => (0..numbers)
                    .map(|_| match shape.len() {
                        1 => 1.0 + 0.2 * dice.number(),
                        _ => scale * dice.number(),
                    })
                    .flat_map(f32::to_le_bytes)
                    .collect(),
            };
            let shape = shape.to_vec();
            all.insert(
                format!("{name}.weight"),
                (TensorInfo { shape, dtype }, bytes),
            );
        };
        add("model.embed_tokens".into(), &[spec.vocab, hidden]);
        add("model.norm".into(), &[hidden]);
        for layer in 0..spec.layers {
            for (name, shape) in [
                ("input_layernorm", &[hidden][..]),
                ("post_attention_layernorm", &[hidden]),
                ("self_attn.q_proj", &[q, hidden]),
                ("self_attn.k_proj", &[kv, hidden]),
                ("self_attn.v_proj", &[kv, hidden]),
                ("self_attn.o_proj", &[hidden, q]),
                ("mlp.gate_proj", &[inner, hidden]),
                ("mlp.up_proj", &[inner, hidden]),
                ("mlp.down_proj", &[hidden, inner]),
            ] {
                add(format!("model.layers.{layer}.{name}"), shape);
            }
        }
        Self(all)
    }
}

impl Weights for Memory {
    fn path(&self) -> &Path {
        Path::new("memory")
    }

    fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.get(name).map(|(info, _)| info)
    }

    fn raw_rows(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let (info, bytes) = &self.0[name];
        let row = bytes.len() / info.rows();
        Ok(Cow::Borrowed(&bytes[rows.start * row..rows.end * row]))
    }
}

/// Head dimension, hidden and inner features: one model of a few blocks a row, and one whose products
/// are worth several threads.
const SHAPES: [[usize; 3]; 2] = [[16, 64, 96], [64, 384, 1056]];

fn model([head_dim, hidden, intermediate]: [usize; 3], dtype: DType) -> Decoder {
    let spec = ModelSpec::new(2, hidden / head_dim, 2, hidden, 90)
        .with_head_dim(head_dim)
        .with_rope(RopeConfig::plain(10_000.0, head_dim))
        .with_softmax_scale((head_dim as f32).sqrt().recip());
    let config = DecoderConfig {
        spec,
        intermediate,
        norm_epsilon: 1e-5,
        tied: true,
        layout: Layout::Separate,
    };
    let weights = Memory::new(&config, dtype);
    let compute = Kernels::Auto.with(&Device::flex(), Activations::Exact);
    let loader = Loader::new(&weights, WeightDtype::File, &compute);
    let model = Decoder::load(&config, &loader).unwrap();
    loader.finish().unwrap();
    model
}

/// Sixteen sequences of all kinds, each with a text of its own in its cache.
fn caches(model: &Decoder, dtype: DType) -> Vec<SequenceCache> {
    let budget = Budget::Units(24);
    let policies: [Arc<dyn KvCachePolicy>; 10] = [
        Arc::new(Full::new()),
        Arc::new(Window::policy(budget).while_decoding(DecodeEviction::Every(1))),
        Arc::new(KeyNorm::policy(budget).with_positions(Positions::Compact)),
        Arc::new(KeyDiff::policy(budget).while_decoding(DecodeEviction::Every(2))),
        Arc::new(H2o::policy(budget).while_decoding(DecodeEviction::Every(1))),
        Arc::new(SnapKv::new().policy(budget)),
        Arc::new(Tova::policy(budget).ada(0.3)),
        Arc::new(KeyNorm::policy(budget).share(Share::Model)),
        Arc::new(SirLlm::new().policy(budget, 4)),
        Arc::new(Random::policy(3, budget)),
    ];
    let policies = policies.into_iter().cycle().take(17);
    let caches = policies.enumerate().map(|(i, policy)| {
        let options = CacheOptions::new().dtype(dtype);
        let mut cache = SequenceCache::new(model.spec(), policy, model.compute(), options).unwrap();
        let ids = ids(20 + 7 * i, i as u32);
        together(model, std::slice::from_mut(&mut cache), &[ids], |_| {
            Phase::Prefill { last: true }
        });
        cache
    });
    caches.collect()
}

fn ids(n: usize, salt: u32) -> Vec<u32> {
    let mut dice = Dice(u64::from(salt));
    (0..n).map(|_| dice.next() % 90).collect()
}

/// Hidden states of each sequence's new tokens, read in one pass.
fn together(
    model: &Decoder,
    caches: &mut [SequenceCache],
    parts: &[Vec<u32>],
    phase: impl Fn(usize) -> Phase,
) -> Vec<Vec<f32>> {
    let all = parts.concat();
    let steps = caches.iter_mut().zip(parts).enumerate();
    let steps = steps.map(|(i, (cache, ids))| {
        let total = cache.seen() + ids.len();
        cache.step(phase(i), ids.len(), total)
    });
    let mut pass = Pass::new(steps).unwrap();
    let hidden = forward(model, &all, &mut pass).unwrap();
    // What the surprisal is does not matter here, as long as it is the same.
    let surprisal: Vec<f32> = all.iter().map(|id| (id % 7) as f32).collect();
    pass.finish(Some(&surprisal)).unwrap();
    let mut first = 0;
    let rows = parts.iter().map(|ids| {
        let rows = first..first + ids.len();
        first = rows.end;
        hidden.slice(rows).unwrap().into_values().unwrap()
    });
    rows.collect()
}

fn alone(
    model: &Decoder,
    caches: &mut [SequenceCache],
    parts: &[Vec<u32>],
    phase: impl Fn(usize) -> Phase,
) -> Vec<Vec<f32>> {
    let each = caches.iter_mut().zip(parts).enumerate();
    let each = each.map(|(i, (cache, ids))| {
        let part = std::slice::from_ref(ids);
        together(model, std::slice::from_mut(cache), part, |_| phase(i)).remove(0)
    });
    each.collect()
}

/// Both types of weights, both shapes, dense stores of 32 and 16 bits.
fn models(check: impl Fn(&str, &Decoder, DType)) {
    for shape in SHAPES {
        for weights in [DType::F32, DType::Q4_1] {
            let model = model(shape, weights);
            for store in [DType::F32, DType::F16] {
                check(&format!("{shape:?}, {weights}, {store}"), &model, store);
            }
        }
    }
}

#[test]
fn sixteen_decoded_tokens_in_one_pass_are_sixteen_lone_ones_bit_for_bit() {
    let bits = |rows: &[Vec<f32>]| -> Vec<Vec<u32>> {
        let rows = rows.iter();
        rows.map(|row| row.iter().map(|x| x.to_bits()).collect())
            .collect()
    };
    models(|name, model, store| {
        for sequences in [2, 3, 5, 8, 11, 16] {
            let (mut joint, mut lone) = (caches(model, store), caches(model, store));
            let (joint, lone) = (&mut joint[..sequences], &mut lone[..sequences]);
            for round in 0..6 {
                let parts: Vec<Vec<u32>> = (0..sequences as u32)
                    .map(|i| ids(1, 100 * round + i))
                    .collect();
                let found = together(model, joint, &parts, |_| Phase::Decode);
                let expected = alone(model, lone, &parts, |_| Phase::Decode);
                assert!(found.concat().iter().all(|x| x.is_finite()));
                for i in 0..sequences {
                    assert_eq!(
                        bits(&found[i..=i]),
                        bits(&expected[i..=i]),
                        "{name}: sequence {i} of {sequences}, round {round}"
                    );
                }
            }
        }
    });
}

#[test]
fn more_tokens_in_one_pass_differ_by_rounding_alone() {
    models(|name, model, store| {
        // Where keys and values are rounded to 16 bits, the last bit of 32 can decide which way, and the two
        // ways are up to 2⁻¹⁰ of the number apart: 1.6e-4 is what comes of it (`-- --nocapture`).
        let tolerance = match store {
            DType::F32 => 1e-5,
            _ => 5e-4,
        };
        let mut most_off = 0.0f32;
        let (mut joint, mut lone) = (caches(model, store), caches(model, store));
        for round in 0..6 {
            // Seventeen decoded tokens, and chunks beside them in every other round.
            let chunk = |i: usize| round % 2 == 1 && i % 4 == 1;
            let phase = |i: usize| match chunk(i) {
                true => Phase::Tail,
                false => Phase::Decode,
            };
            let parts: Vec<Vec<u32>> = (0..17)
                .map(|i| ids(if chunk(i) { 11 } else { 1 }, (100 * round + i) as u32))
                .collect();
            let found = together(model, &mut joint, &parts, phase);
            let expected = alone(model, &mut lone, &parts, phase);
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found.len(), expected.len());
                for (a, b) in found.iter().zip(expected) {
                    most_off = most_off.max((a - b).abs() / b.abs().max(1.0));
                    let most = tolerance * b.abs().max(1.0);
                    assert!(
                        (a - b).abs() <= most,
                        "{name}: {i}, round {round}: {a} for {b}"
                    );
                }
            }
        }
        println!("{name}: {most_off:.1e} off");
        for (joint, lone) in joint.iter().zip(&lone) {
            assert_eq!(joint.seen(), lone.seen());
            assert_eq!(joint.positions(1, 0), lone.positions(1, 0));
        }
    });
}
