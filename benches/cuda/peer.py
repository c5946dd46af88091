#!/usr/bin/env python3
"""A full cache by transformers: a model of published dimensions with random weights in bf16, attention by SDPA.

    benches/cuda/peer.py --layers 2 --tokens 131072

The prompt is read in chunks, like here, but in larger ones, which suits a full cache better; then tokens are
generated one by one. Prints JSON: tokens of the prompt, tokens per second of both, and the most memory that torch took.
"""

import argparse
import json
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

SHAPES = {
    "llama-3.1-8b": dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0
    ),
    "smollm2": dict(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--max-new", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="at sizes for a CPU")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    shape, vocab = dict(SHAPES[args.shape]), 49152 if args.shape == "smollm2" else 128256
    if args.layers <= 2:
        vocab = 4096
    if args.small:
        shape.update(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
        args.tokens, args.chunk, args.max_new, vocab = 256, 64, 4, 512
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=args.layers, vocab_size=vocab, max_position_embeddings=131072 + 1024,
        attn_implementation="sdpa", **shape,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    ids = torch.randint(vocab, (1, args.tokens), device=device)

    def done():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def read(ids, new):
        cache, begun = DynamicCache(), done()
        for part in ids.split(args.chunk, dim=1):
            out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        prefill, begun = done() - begun, done()
        for _ in range(new - 1):
            out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        return prefill, done() - begun

    read(ids[:, : min(args.tokens, 2 * args.chunk)], 4)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prefill, decode = read(ids, args.max_new)
    figures = {
        "who": "transformers, SDPA, full cache",
        "prompt": args.tokens,
        "prefill": args.tokens / prefill,
        "decode": (args.max_new - 1) / decode,
        "torch_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "torch": torch.__version__,
    }
    print(json.dumps(figures))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file)


if __name__ == "__main__":
    main()
