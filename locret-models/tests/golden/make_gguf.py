"""The tiny models of make_tiny.py as GGUF files, laid out as llama.cpp's conversion lays them out.

    python3 make_gguf.py [MODEL...]

Packages: gguf 0.19.0, safetensors 0.8.0, numpy 2.4.6. A second. Reads config_v4.json and
model.safetensors of each folder beside this script and writes model.gguf there. The golden logits are
those that transformers gave for the safetensors: all weights are bf16 numbers, so nothing is rounded.

What differs from the safetensors, beside names:
- matrices are bf16, vectors f32;
- `llama` (Llama and Mistral): rows of q and k, and their biases, go from (half, i) to (i, half) within
  each head, since GGML rotates neighbours where transformers rotates halves;
- `llama` with scaled frequencies (Llama 3.1 on): `rope_freqs.weight`, the divisor of each frequency
  (the rule is that of Llama 3.1's reference code: wavelengths up to original / high_freq_factor stay,
  from original / low_freq_factor on are divided by `factor`, between them both are blended);
- `phi3`: q, k, v and gate, up stay in one matrix each; LongRoPE's factors are tensors, and the factor
  on cosines and sines is a setting; the window is one, too, 0 for none;
- a vocabulary, from which the architectures without `vocab_size` take its size.
"""

import json
import math
import pathlib
import sys

import gguf
import numpy as np
from safetensors import safe_open

HERE = pathlib.Path(__file__).parent
MODELS = [
    "llama2",
    "llama31",
    "llama32",
    "llama_biases",
    "mistral",
    "phi3_4k",
    "phi3_128k",
    "phi4_mini",
    "qwen2",
    "qwen3",
]
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3"}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OF_LAYERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    name, kind = name.rsplit(".", 1)
    if name in WHOLE:
        return f"{WHOLE[name]}.{kind}"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{OF_LAYERS[part]}.{kind}"


def neighbours(x, heads):
    """Rows (head, half, i) as (head, i, half)."""
    halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def divisors(config, head_dim):
    """What Llama 3.1 divides each frequency by."""
    scaling = config["rope_scaling"]
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (i / head_dim)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            blend = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - blend) / factor + blend))
    return np.array(out, dtype=np.float32)


def make(model):
    folder = HERE / model
    config = json.loads((folder / "config_v4.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or hidden // heads
    context = config["max_position_embeddings"]
    vocab = config["vocab_size"]
    scaling = config.get("rope_scaling") or {}

    w = gguf.GGUFWriter(folder / "model.gguf", arch)
    w.add_context_length(context)
    w.add_embedding_length(hidden)
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config.get("rope_theta", 10000.0))
    w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    if "head_dim" in config:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    if arch == "llama":
        w.add_vocab_size(vocab)
        w.add_rope_dimension_count(head_dim)
        if scaling:
            w.add_tensor("rope_freqs.weight", divisors(config, head_dim))
    if arch == "phi3":
        rotated = int(head_dim * config.get("partial_rotary_factor", 1.0))
        original = config["original_max_position_embeddings"]
        w.add_rope_dimension_count(rotated)
        w.add_rope_scaling_orig_ctx_len(original)
        w.add_sliding_window(config["sliding_window"] or 0)
        if scaling:
            factor = context / original
            w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
            for length in ("long", "short"):
                factors = np.array(scaling[f"{length}_factor"], dtype=np.float32)
                w.add_tensor(f"rope_factors_{length}.weight", factors)

    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list([f"token{i}" for i in range(vocab)])
    w.add_token_types([gguf.TokenType.NORMAL] * vocab)
    end = config["eos_token_id"]
    w.add_bos_token_id(config["bos_token_id"])
    w.add_eos_token_id(end[0] if isinstance(end, list) else end)

    with safe_open(folder / "model.safetensors", "numpy") as tensors:
        for name in sorted(tensors.keys()):
            x = tensors.get_tensor(name)
            if arch == "llama" and ".q_proj." in name:
                x = neighbours(x, heads)
            if arch == "llama" and ".k_proj." in name:
                x = neighbours(x, kv_heads)
            if x.ndim == 1:
                w.add_tensor(gguf_name(name), np.ascontiguousarray(x))
                continue
            kind = gguf.GGMLQuantizationType.BF16
            packed = gguf.quantize(np.ascontiguousarray(x), kind)
            assert np.array_equal(gguf.dequantize(packed, kind), x), name
            w.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    print(f"{model}: {arch}, {(folder / 'model.gguf').stat().st_size} bytes")


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        make(name)
