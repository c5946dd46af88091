//! Models whose matrices are K-quants: computed packed, they are what they are when widened to single precision.

mod common;

use burn::tensor::Device;
use common::gguf_file::File;
use locret_core::{
    CacheOptions, Compute, Host, Pass, Phase, SequenceCache, Weight, compute, forward,
};
use locret_models::{
    DType, Gguf, LoadOptions, LoadedModel, Loader, Value, WeightDtype, load_model,
};
use locret_policies::Full;
use std::sync::Arc;

const HIDDEN: u64 = 256;
const INNER: u64 = 512;
const VOCAB: u64 = 320;

/// Random blocks of a matrix whose numbers are about `size / 10`.
fn blocks(seed: &mut u64, dtype: DType, numbers: u64, size: f32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..numbers as usize / dtype.block() {
        let start = bytes.len();
        for _ in 0..dtype.block_bytes() {
            *seed ^= *seed << 13;
            *seed ^= *seed >> 7;
            *seed ^= *seed << 17;
            bytes.push((*seed >> 40) as u8);
        }
        // Where halves are: the middle of the codes is about the minimum.
        let halves: &[(usize, f32)] = match dtype {
            DType::Q4_K => &[(0, 4e-4), (2, 3e-3)],
            DType::Q5_K => &[(0, 2e-4), (2, 3e-3)],
            DType::Q6_K => &[(208, 6e-5)],
            DType::Q8_0 => &[(0, 8e-4)],
            DType::Q5_0 => &[(0, 7e-3)],
            other => panic!("no block of {other} is made here"),
        };
        for (at, x) in halves {
            let half = half::f16::from_f32(size * x).to_le_bytes();
            bytes[start + at..start + at + 2].copy_from_slice(&half);
        }
    }
    bytes
}

/// Two layers whose matrices are of such types as files called `Q4_K_M` and `Q5_K_M` mix.
fn model(q: f32) -> File {
    let settings = [
        ("block_count", 2),
        ("context_length", 512),
        ("embedding_length", HIDDEN as u32),
        ("feed_forward_length", INNER as u32),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", 64),
        ("vocab_size", VOCAB as u32),
    ];
    let mut file = File::default()
        .meta("general.architecture", Value::String("llama".into()))
        .meta("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    for (key, value) in settings {
        file = file.meta(&format!("llama.{key}"), Value::U32(value));
    }
    let mut seed = 7;
    let mut add = |name: &str, dtype, shape: [u64; 2]| {
        // Where attention looks at a single token, a rounding is magnified.
        let size = if name.ends_with("attn_q") { q } else { 1.0 };
        let bytes = blocks(&mut seed, dtype, shape[0] * shape[1], size);
        let so_far = std::mem::take(&mut file);
        file = so_far.tensor(&format!("{name}.weight"), &shape, dtype, bytes);
    };
    add("token_embd", DType::Q4_K, [VOCAB, HIDDEN]);
    add("output", DType::Q6_K, [VOCAB, HIDDEN]);
    for (layer, [k, v, o, down]) in [
        [DType::Q4_K, DType::Q6_K, DType::Q5_K, DType::Q6_K],
        [DType::Q5_0, DType::Q5_K, DType::Q8_0, DType::Q4_K],
    ]
    .into_iter()
    .enumerate()
    {
        let mut own = |name: &str, dtype, shape| add(&format!("blk.{layer}.{name}"), dtype, shape);
        own("attn_q", DType::Q4_K, [HIDDEN, HIDDEN]);
        own("attn_k", k, [HIDDEN / 2, HIDDEN]);
        own("attn_v", v, [HIDDEN / 2, HIDDEN]);
        own("attn_output", o, [HIDDEN, HIDDEN]);
        own("ffn_gate", DType::Q4_K, [INNER, HIDDEN]);
        own("ffn_up", DType::Q5_K, [INNER, HIDDEN]);
        own("ffn_down", down, [HIDDEN, INNER]);
    }
    let gain: Vec<f32> = (0..HIDDEN).map(|i| 0.9 + 0.001 * i as f32).collect();
    let norms = [
        "blk.0.attn",
        "blk.0.ffn",
        "blk.1.attn",
        "blk.1.ffn",
        "output",
    ];
    norms.iter().fold(file, |file, name| {
        file.f32(&format!("{name}_norm.weight"), &[HIDDEN], &gain)
    })
}

/// Logits `[tokens, vocab]`, the prompt read in chunks.
fn logits(loaded: &LoadedModel, ids: &[u32], chunk: usize) -> Vec<f32> {
    let (model, policy) = (&loaded.model, Arc::new(Full::new()));
    let options = CacheOptions::new();
    let mut cache = SequenceCache::new(model.spec(), policy, model.compute(), options).unwrap();
    let mut all = Vec::new();
    for part in ids.chunks(chunk) {
        let step = cache.step(Phase::Prefill { last: false }, part.len(), ids.len());
        let mut pass = Pass::new([step]).unwrap();
        let hidden = forward(&**model, part, &mut pass).unwrap();
        pass.finish(None).unwrap();
        all.extend(model.logits(hidden).unwrap().into_values().unwrap());
    }
    all
}

#[test]
fn packed_models_are_what_they_are_when_widened() {
    for q in [1.0, 0.3, 0.1, 0.03] {
        diag(q);
    }
    let file = model(0.1).write();
    let load = |weights| {
        let options = LoadOptions::new().weights(weights);
        load_model(file.path(), &options, &Device::flex()).unwrap()
    };
    let (packed, wide) = (load(WeightDtype::File), load(WeightDtype::F32));
    let ids: Vec<u32> = (0..40).map(|i| (i * 89 + 3) % VOCAB as u32).collect();
    // Rows of an embedding are bit for bit what was packed.
    let weights = packed.files.weights().unwrap();
    let embedding = |dtype| {
        let loader = Loader::new(&*weights, dtype, &compute(&Device::flex()));
        let name = "model.embed_tokens.weight".to_owned();
        assert_eq!(loader.weights().info(&name).unwrap().dtype, DType::Q4_K);
        let matrix = loader.matrix(&[(name, VOCAB as usize)], HIDDEN as usize);
        matrix.unwrap().rows(&ids).unwrap().into_values().unwrap()
    };
    assert_eq!(embedding(WeightDtype::File), embedding(WeightDtype::F32));
    let expected = logits(&wide, &ids, ids.len());
    let size = expected.iter().fold(0.0, |size: f32, x| size.max(x.abs()));
    assert!(size > 0.5, "logits of {size} tell nothing");
    // One token, few (decode), and many (prefill).
    for chunk in [1, 5, 16, 40] {
        let found = logits(&packed, &ids, chunk);
        assert_eq!(found.len(), expected.len());
        for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
            assert!(
                (a - b).abs() <= 1e-5 * size,
                "chunks of {chunk}, logit {i}: {a} for {b}, of {size} at most"
            );
        }
    }
}

#[test]
fn what_is_computed_with_is_what_the_reference_package_reads() {
    let folder = common::golden("gguf");
    let gguf = Gguf::open(folder.join("encodings.gguf")).unwrap();
    let host = Host::new(&Device::flex());
    let mut packed = 0;
    for (i, tensor) in gguf.tensors().iter().enumerate() {
        if !host.computes_with(tensor.dtype) {
            continue;
        }
        let [rows, columns] = [tensor.shape[0], tensor.shape[1]];
        let expected = &std::fs::read(folder.join("encodings.f32")).unwrap()
            [4 * i * rows * columns..][..4 * rows * columns];
        let weight = Weight {
            dtype: tensor.dtype,
            rows,
            columns,
            bytes: gguf.raw(tensor).unwrap().to_vec().into(),
        };
        let matrix = host.matrix(vec![weight]).unwrap();
        let found = matrix.values().unwrap();
        for (a, b) in found.iter().zip(expected.chunks_exact(4)) {
            // A zero times a negative scale may be either zero.
            let b = f32::from_le_bytes(b.try_into().unwrap());
            assert!(
                a.to_bits() == b.to_bits() || (*a == 0.0 && b == 0.0),
                "{}: {a} for {b}",
                tensor.name
            );
        }
        packed += usize::from(!tensor.dtype.is_float());
    }
    assert_eq!(packed, 6, "Q4_0, Q4_1, Q8_0, Q4_K, Q5_K and Q6_K");
}

fn diag(q: f32) {
    let file = model(q).write();
    let load = |weights| {
        let options = LoadOptions::new().weights(weights);
        load_model(file.path(), &options, &Device::flex()).unwrap()
    };
    let (packed, wide) = (load(WeightDtype::File), load(WeightDtype::F32));
    let ids: Vec<u32> = (0..40).map(|i| (i * 89 + 3) % VOCAB as u32).collect();
    eprintln!("DIAG q {q}");
    let whole = logits(&wide, &ids, ids.len());
    for chunk in [1, 5, 16, 40] {
        let (a, b) = (logits(&packed, &ids, chunk), logits(&wide, &ids, chunk));
        let off = |a: &[f32], b: &[f32]| {
            a.iter()
                .zip(b)
                .fold(0.0, |m: f32, (a, b)| m.max((a - b).abs()))
        };
        eprintln!(
            "DIAG chunk {chunk}: packed-wide {} wide-whole {} packed-whole {} last {}",
            off(&a, &b),
            off(&b, &whole),
            off(&a, &whole),
            whole.iter().fold(0.0, |s: f32, x| s.max(x.abs()))
        );
    }
}
