#!/usr/bin/env python3
"""What InfLLM's own code retrieves and computes with small Llamas whose weights a formula makes.

    python make.py CHECKOUT        # of github.com/thunlp/InfLLM, at 12b7079

Needs torch, no GPU: the authors' ContextManager, rotary embedding and PyTorch attention run as they are, on tensors
that only claim to lie on a GPU. Around them stands a plain Llama, so that no version of transformers matters.

In the authors' code the mask of the remainder counts distances from the end of the whole input, so that it hides
nothing, and the first queries of an execution block see up to `exc_block_size - 1` units at the window's edge twice:
where they stand, and at the one distance. Cases with execution blocks of one token, where this cannot happen, run
the code unchanged. In the others the mask's offset is what it is for blocks of one, and `twice_seen` says how far
logits are from those of the unchanged code.

golden.json: cases[]: name, layers, heads, kv_heads, head_dim, hidden, inner, vocab, theta, seed, settings, prompt,
forced (tokens after the prompt, one at a time), retrieved [step][layer]: sorted blocks of each execution block;
gap: the smallest difference between a retrieved block's score and one that was not; logits of every `every`th token
and of all from the prompt's last one on.
"""

import contextlib
import importlib
import json
import math
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch

HERE = Path(__file__).parent
CHECKOUT = Path(sys.argv[1])
torch.set_num_threads(1)


def on_cpu(make):
    def made(*args, **kwargs):
        if str(kwargs.get("device", "cpu")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


for name in ["arange", "empty", "zeros"]:
    setattr(torch, name, on_cpu(getattr(torch, name)))
torch.Tensor.is_cuda = property(lambda _: True)
torch.cuda.stream = lambda _: contextlib.nullcontext()
torch.cuda.Event = MagicMock
torch.cuda.current_stream = MagicMock

# Their package imports more than these modules need.
for name in ["inf_llm", "inf_llm.attention"]:
    package = types.ModuleType(name)
    package.__path__ = [str(CHECKOUT / name.replace(".", "/"))]
    sys.modules[name] = package
context = importlib.import_module("inf_llm.attention.context_manager")
rope = importlib.import_module("inf_llm.attention.rope")
inf_llm = importlib.import_module("inf_llm.attention.inf_llm")


def numbers(count, seed):
    """In -1..1, by a hash of their place that Rust computes alike."""
    x = torch.arange(count, dtype=torch.int64) + (seed << 20)
    for shift, factor in [(16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)]:
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x >> 8).double() / (1 << 23) - 1.0).float()


class Llama:
    def __init__(self, case):
        self.case = case
        h, d, inner = case["hidden"], case["head_dim"], case["inner"]
        self.place = 0

        def matrix(rows, columns, scale):
            self.place += 1
            x = numbers(rows * columns, case["seed"] * 100 + self.place).reshape(rows, columns)
            return x * (scale / math.sqrt(columns))

        q, kv = case["heads"] * d, case["kv_heads"] * d
        self.embedding = matrix(case["vocab"], h, math.sqrt(h))
        self.layers = [
            dict(
                q=matrix(q, h, 2.5),
                k=matrix(kv, h, 2.5),
                v=matrix(kv, h, 1.5),
                o=matrix(h, q, 1.5),
                gate=matrix(inner, h, 1.5),
                up=matrix(inner, h, 1.5),
                down=matrix(h, inner, 1.5),
            )
            for _ in range(case["layers"])
        ]
        self.head = matrix(case["vocab"], h, 3.0)
        self.position_embedding = rope.RotaryEmbeddingESM(d, case["theta"], 1.0)
        self.attend = inf_llm.inf_llm_forward(
            **case["settings"], max_cached_block=32, fattn=False, cache_strategy="lru", async_global_stream=False
        )

    def norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def forward(self, ids, past):
        case = self.case
        x = self.embedding[torch.tensor(ids)][None]
        for index, layer in enumerate(self.layers):
            project = lambda name: (lambda x: x @ layer[name].T)
            inner = self.norm(x)
            out, past[index] = self.attend(
                None, inner, inner, self.position_embedding, True, past[index],
                project("q"), project("k"), project("v"), project("o"),
                case["head_dim"], case["heads"], case["kv_heads"],
            )  # fmt: skip
            x = x + out
            inner = self.norm(x)
            x = x + (torch.nn.functional.silu(inner @ layer["gate"].T) * (inner @ layer["up"].T)) @ layer["down"].T
        return (self.norm(x) @ self.head.T)[0]


class Watched:
    """What their code retrieves, and the mask's offset."""

    def __init__(self, corrected):
        self.retrieved, self.gap = [], math.inf
        choose = context.ContextManager.calc_block_topk
        gather = context.ContextManager.get_global_hidden_and_mask

        def watched(manager, queries):
            chosen = choose(manager, queries)
            self.retrieved.append(sorted(chosen[0]))
            if manager.num_global_block > manager.topk:
                mean = queries.mean(dim=2).reshape(-1)
                scores = (manager.block_k[0].get_data() @ mean).sort(descending=True).values
                spread = float(scores.std())
                self.gap = min(self.gap, float(scores[manager.topk - 1] - scores[manager.topk]) / spread)
            return chosen

        def masked(manager, queries, chosen):
            k, v, (offset, window), blocks, count = gather(manager, queries, chosen)
            if corrected:
                size = manager.global_remainder[0].size(-2)
                offset += manager._global_remainder_ed - manager._global_remainder_st - size
            return k, v, (offset, window), blocks, count

        context.ContextManager.calc_block_topk = watched
        context.ContextManager.get_global_hidden_and_mask = masked
        self.undo = (choose, gather)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        context.ContextManager.calc_block_topk, context.ContextManager.get_global_hidden_and_mask = self.undo


def run(case, corrected):
    model, past, logits = Llama(case), [None] * case["layers"], []
    block = case["settings"]["exc_block_size"]
    retrieved = []
    with Watched(corrected) as watched, torch.no_grad():

        def feed(ids):
            watched.retrieved = []
            logits.append(model.forward(ids, past))
            steps = -(-len(ids) // block)
            # Layer by layer, and within it by execution block.
            by_layer = [watched.retrieved[i * steps : (i + 1) * steps] for i in range(case["layers"])]
            retrieved.extend([list(step) for step in zip(*by_layer)])

        # As their GreedySearch: the prompt without its last token in pieces, then that one.
        piece = 4 * block
        for start in range(0, len(case["prompt"]) - 1, piece):
            feed(case["prompt"][start : min(start + piece, len(case["prompt"]) - 1)])
        feed(case["prompt"][-1:])
        for token in case["forced"]:
            feed([token])
    return torch.cat(logits), retrieved, watched.gap


def tokens(count, vocab, seed):
    return (numbers(count, 9000 + seed).double().add(1).mul(vocab / 2).long() % vocab).tolist()


def case(name, prompt, forced, seed, heads, kv_heads, head_dim, settings, theta=10000.0, hidden=24, vocab=61):
    return dict(
        name=name, layers=2, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden, inner=40, vocab=vocab,
        theta=theta, seed=seed, settings=settings, prompt=tokens(prompt, vocab, seed),
        forced=tokens(forced, vocab, seed + 50),
    )  # fmt: skip


def settings(n_init, n_local, block_size, topk, repr_topk, exc_block_size):
    return dict(
        n_init=n_init, n_local=n_local, block_size=block_size, topk=topk, repr_topk=repr_topk,
        exc_block_size=exc_block_size,
    )  # fmt: skip


CASES = [
    case("as it is, a token at a time", 170, 0, 1, 4, 2, 16, settings(4, 24, 8, 3, 2, 1)),
    case("as it is, one head for each", 130, 0, 2, 3, 3, 8, settings(3, 17, 6, 2, 3, 1), theta=500000.0),
    case("blocks of 16, groups of 2", 300, 25, 3, 4, 2, 16, settings(8, 32, 8, 4, 2, 16)),
    case("blocks of 16, groups of 3", 260, 12, 5, 6, 2, 8, settings(5, 21, 12, 3, 4, 16), theta=500000.0),
    case("no beginning", 200, 9, 6, 4, 1, 16, settings(0, 16, 16, 2, 1, 8)),
    case("shorter than the window", 30, 4, 7, 4, 2, 16, settings(4, 64, 8, 3, 2, 16)),
]

EVERY = 17


def short(x):
    return [float(f"{value:.7g}") for value in x.flatten().tolist()]


def main():
    cases = []
    for given in CASES:
        single = given["settings"]["exc_block_size"] == 1
        logits, retrieved, gap = run(given, corrected=not single)
        plain = run(given, corrected=False)[0]
        twice = float((logits - plain).abs().max())
        last = len(given["prompt"]) - 1
        rows = sorted({*range(0, last, EVERY), *range(last, len(logits))})
        print(f"{given['name']}: {len(retrieved)} steps, gap {gap:.1e}, seen twice {twice:.1e}")
        assert gap > 1e-4, given["name"]
        assert not single or twice == 0.0
        cases.append({**given, "retrieved": retrieved, "gap": gap if math.isfinite(gap) else None, "rows": rows,
                      "twice_seen": twice, "logits": [short(logits[row]) for row in rows]})  # fmt: skip
    text = json.dumps({"cases": cases}, separators=(",", ":"))
    (HERE / "golden.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
