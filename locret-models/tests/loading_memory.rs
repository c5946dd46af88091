//! The process's heap, counted while a checkpoint is loaded.

mod common;

use burn::tensor::Device;
use common::gguf_file::File;
use locret_models::{DType, LoadOptions, Value, WeightDtype, load_model};
use serde_json::{Map, json};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is left to the system's allocator; only sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const HIDDEN: usize = 256;
const INNER: usize = 512;
const VOCAB: usize = 48_000;

/// One layer, and an embedding that is nearly all of the model; in two shards of `bf16`.
fn write(dir: &Path) -> usize {
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let shards = [
        vec![
            ("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]),
            ("model.norm.weight".into(), vec![HIDDEN]),
        ],
        vec![
            (layer("input_layernorm"), vec![HIDDEN]),
            (layer("self_attn.q_proj"), vec![HIDDEN, HIDDEN]),
            (layer("self_attn.k_proj"), vec![HIDDEN / 2, HIDDEN]),
            (layer("self_attn.v_proj"), vec![HIDDEN / 2, HIDDEN]),
            (layer("self_attn.o_proj"), vec![HIDDEN, HIDDEN]),
            (layer("post_attention_layernorm"), vec![HIDDEN]),
            (layer("mlp.gate_proj"), vec![INNER, HIDDEN]),
            (layer("mlp.up_proj"), vec![INNER, HIDDEN]),
            (layer("mlp.down_proj"), vec![HIDDEN, INNER]),
            ("lm_head.weight".into(), vec![VOCAB, HIDDEN]),
        ],
    ];
    let (mut places, mut total) = (Map::new(), 0);
    for (i, tensors) in shards.into_iter().enumerate() {
        let file = format!("model-{i}.safetensors");
        let (mut header, mut at) = (Map::new(), 0);
        for (name, shape) in tensors {
            let end = at + 2 * shape.iter().product::<usize>();
            let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]});
            places.insert(name.clone(), file.clone().into());
            header.insert(name, entry);
            at = end;
        }
        let header = json!(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + at, 0x3c);
        fs::write(dir.join(file), bytes).unwrap();
        total += at / 2;
    }
    let index = json!({ "weight_map": places });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "vocab_size": VOCAB, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
        "tie_word_embeddings": false
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    total
}

/// Rows of an embedding that is nearly all of a model even where it is packed.
const LARGE: usize = 192_000;

/// A GGUF file of K-quants as [`write`]'s model is of `bf16`, and the bytes of its tensors.
fn k_quants() -> (tempfile::NamedTempFile, usize) {
    let mut file = File::default()
        .meta("general.architecture", Value::String("llama".into()))
        .meta("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 4096),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", INNER),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("vocab_size", LARGE),
    ] {
        file = file.meta(&format!("llama.{key}"), Value::U32(value as u32));
    }
    for (name, shape, dtype) in [
        ("token_embd", vec![LARGE, HIDDEN], DType::Q4_K),
        ("output", vec![LARGE, HIDDEN], DType::Q6_K),
        ("output_norm", vec![HIDDEN], DType::F32),
        ("blk.0.attn_norm", vec![HIDDEN], DType::F32),
        ("blk.0.attn_q", vec![HIDDEN, HIDDEN], DType::Q4_K),
        ("blk.0.attn_k", vec![HIDDEN / 2, HIDDEN], DType::Q4_K),
        ("blk.0.attn_v", vec![HIDDEN / 2, HIDDEN], DType::Q6_K),
        ("blk.0.attn_output", vec![HIDDEN, HIDDEN], DType::Q5_K),
        ("blk.0.ffn_norm", vec![HIDDEN], DType::F32),
        ("blk.0.ffn_gate", vec![INNER, HIDDEN], DType::Q5_K),
        ("blk.0.ffn_up", vec![INNER, HIDDEN], DType::Q4_K),
        ("blk.0.ffn_down", vec![HIDDEN, INNER], DType::Q6_K),
    ] {
        let bytes = vec![0x3c; dtype.bytes(shape.iter().product()).unwrap()];
        let shape: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
        file = file.tensor(&format!("{name}.weight"), &shape, dtype, bytes);
    }
    let total = file.tensors.iter().map(|tensor| tensor.3.len()).sum();
    (file.write(), total)
}

/// One test, since the heap is everybody's.
#[test]
fn loading_takes_little_more_than_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let values = write(dir.path());
    let check = |path: &Path, weights, vocab, resident: usize| {
        let before = LIVE.load(Relaxed);
        PEAK.store(before, Relaxed);
        let options = LoadOptions::new().weights(weights);
        let loaded = load_model(path, &options, &Device::flex()).unwrap();
        let peak = PEAK.load(Relaxed) - before;
        assert!(
            peak >= resident && peak * 100 <= resident * 115,
            "{weights:?} of {}: {peak} bytes for a model of {resident}",
            path.display()
        );
        assert_eq!(loaded.model.spec().vocab, vocab);
    };
    for (weights, bytes) in [
        (WeightDtype::File, 2),
        (WeightDtype::BF16, 2),
        (WeightDtype::F16, 2),
        (WeightDtype::F32, 4),
    ] {
        check(dir.path(), weights, VOCAB, values * bytes);
    }
    // Packed, K-quants take as many bytes as in their file.
    let (file, bytes) = k_quants();
    check(file.path(), WeightDtype::File, LARGE, bytes);
}
