#!/usr/bin/env python3
"""Writes a checkpoint of Llama-3.1-8B's layer shapes with random bf16 weights, in shards.

    python3 examples/scripts/make_checkpoint.py /tmp/checkpoint --layers 5 --vocab 8192

For measuring what loading takes (`long_shapes --model /tmp/checkpoint`). Five layers are 2.2 GB.
`--shard-mb` is the size that a shard may have; a tensor is never split. Needs numpy.
"""

import argparse
import json
from pathlib import Path

import numpy as np

HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128


def shapes(layers: int, vocab: int):
    """Names as transformers has them, with their shapes, in the order of the model."""
    yield "model.embed_tokens.weight", (vocab, HIDDEN)
    for i in range(layers):
        for name, shape in (
            ("input_layernorm", (HIDDEN,)),
            ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
            ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
            ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
            ("post_attention_layernorm", (HIDDEN,)),
            ("mlp.gate_proj", (INTER, HIDDEN)),
            ("mlp.up_proj", (INTER, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, INTER)),
        ):
            yield f"model.layers.{i}.{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (vocab, HIDDEN)


def size(shape) -> int:
    return 2 * int(np.prod(shape))


def write_shard(path: Path, tensors, rng) -> None:
    header, at = {}, 0
    for name, shape in tensors:
        end = at + size(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, shape in tensors:
            if len(shape) == 1:
                file.write(np.full(shape, 0x3F80, dtype="<u2").tobytes())
                continue
            for start in range(0, shape[0], 1024):
                rows = min(1024, shape[0] - start)
                values = rng.standard_normal((rows, shape[1]), dtype=np.float32) * 0.02
                file.write((values.view("<u4") >> 16).astype("<u2").tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--shard-mb", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    shards, room = [], 0
    for tensor in shapes(args.layers, args.vocab):
        if size(tensor[1]) > room:
            shards.append([])
            room = args.shard_mb << 20
        shards[-1].append(tensor)
        room -= size(tensor[1])
    rng = np.random.default_rng(args.seed)
    places, total = {}, 0
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(args.folder / name, tensors, rng)
        for tensor, shape in tensors:
            places[tensor] = name
            total += size(shape)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (args.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": args.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": args.vocab,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    (args.folder / "config.json").write_text(json.dumps(config, indent=1))
    print(f"{args.folder}: {total / 1e9:.2f} GB in {len(shards)} shards")


if __name__ == "__main__":
    main()
