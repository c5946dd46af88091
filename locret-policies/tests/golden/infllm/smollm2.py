#!/usr/bin/env python3
"""What InfLLM's own code retrieves with SmolLM2-135M on the prompt of ../authors, and what it says then.

    python smollm2.py CHECKOUT SmolLM2-135M-Instruct.Q4_1.gguf

As make.py beside it, whose words on the authors' mask hold here, too; also needs gguf. The file is the one that
locret-models/tests/golden/smollm2/reference.py tells of. A minute on one core.

smollm2.json: settings, prompt and forced tokens (the greedy ones), retrieved [step][layer], gap as in golden.json; last:
of the prompt's last token and of each forced one, the 20 largest logits as [ids, values].
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

import make

HERE = Path(__file__).parent
SETTINGS = make.settings(8, 96, 16, 4, 4, 32)
FORCED = 12


class SmolLM2:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.tensors = {t.name: t for t in reader.tensors}
        field = lambda name: reader.fields[name].contents()
        self.heads, self.kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
        self.head_dim, self.count = field("llama.rope.dimension_count"), field("llama.block_count")
        self.embedding = self.tensor("token_embd.weight")
        self.layers = [self.layer(i) for i in range(self.count)]
        self.gain = self.tensor("output_norm.weight")
        theta = float(field("llama.rope.freq_base"))
        self.position_embedding = make.rope.RotaryEmbeddingESM(self.head_dim, theta, 1.0)
        self.attend = make.inf_llm.inf_llm_forward(
            **SETTINGS, max_cached_block=32, fattn=False, cache_strategy="lru", async_global_stream=False
        )

    def tensor(self, name):
        t = self.tensors[name]
        return torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32))

    def turned(self, name, heads):
        """Rows as half-rotated embeddings want them: files have them for interleaved ones."""
        x = self.tensor(name)
        d = x.shape[0] // heads
        return x.reshape(heads, d // 2, 2, -1).transpose(1, 2).reshape(x.shape).contiguous()

    def layer(self, i):
        of = lambda name: self.tensor(f"blk.{i}.{name}.weight")
        return dict(
            q=self.turned(f"blk.{i}.attn_q.weight", self.heads),
            k=self.turned(f"blk.{i}.attn_k.weight", self.kv_heads),
            v=of("attn_v"), o=of("attn_output"), first=of("attn_norm"), second=of("ffn_norm"),
            gate=of("ffn_gate"), up=of("ffn_up"), down=of("ffn_down"),
        )  # fmt: skip

    def norm(self, x, gain):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * gain

    def forward(self, ids, past):
        x = self.embedding[torch.tensor(ids)][None]
        for index, layer in enumerate(self.layers):
            project = lambda name: (lambda x: x @ layer[name].T)
            inner = self.norm(x, layer["first"])
            out, past[index] = self.attend(
                None, inner, inner, self.position_embedding, True, past[index],
                project("q"), project("k"), project("v"), project("o"),
                self.head_dim, self.heads, self.kv_heads,
            )  # fmt: skip
            x = x + out
            inner = self.norm(x, layer["second"])
            x = x + (torch.nn.functional.silu(inner @ layer["gate"].T) * (inner @ layer["up"].T)) @ layer["down"].T
        return (self.norm(x[:, -1:], self.gain) @ self.embedding.T)[0, 0]


def main():
    prompt = json.loads((HERE.parent / "authors/golden.json").read_text())["prompt"]
    model, block = SmolLM2(sys.argv[2]), SETTINGS["exc_block_size"]
    past, retrieved, forced, last = [None] * model.count, [], [], []
    with make.Watched(corrected=True) as watched, torch.no_grad():

        def feed(ids):
            watched.retrieved = []
            logits = model.forward(ids, past)
            steps = -(-len(ids) // block)
            by_layer = [watched.retrieved[i * steps : (i + 1) * steps] for i in range(model.count)]
            retrieved.extend([list(step) for step in zip(*by_layer)])
            return logits

        for start in range(0, len(prompt) - 1, 4 * block):
            feed(prompt[start : min(start + 4 * block, len(prompt) - 1)])
        logits = feed(prompt[-1:])
        for _ in range(FORCED):
            top = logits.topk(20)
            last.append([top.indices.tolist(), make.short(top.values)])
            forced.append(top.indices[0].item())
            logits = feed(forced[-1:])
        top = logits.topk(20)
        last.append([top.indices.tolist(), make.short(top.values)])
    print(f"{len(retrieved)} steps, gap {watched.gap:.1e}")
    assert watched.gap > 1e-4
    out = dict(settings=SETTINGS, prompt=prompt, forced=forced, retrieved=retrieved, gap=watched.gap, last=last)
    (HERE / "smollm2.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
