"""What kvpress's CaM and the D2O authors' cache make of keys and values.

    python3 make.py D2O    # a repository (or a bare copy) of github.com/AIoT-MLSys-Lab/D2O

Packages: kvpress 0.5.5 with transformers 5.2.0 (kvpress wants < 5.3: give it an environment of its own), torch 2.15.0,
safetensors, numpy. Half a minute, no GPU.

CaM: `CAMPress` over `StreamingLLMPress` (4 sinks) in the tiny Llama of locret-models/tests/golden/llama31, f32. TOKENS
ids one by one, so that all attention is counted; what is beyond TARGET goes as soon as there is one unit too many, and
then after every INTERVAL tokens. Its draws are those of `lot` below, which is the library's own, seed SEED.
  cam_M_INTERVAL_keys, cam_M_INTERVAL_values   F32 [layers, KV heads, TARGET, head_dim]: the cache at the end, with
                    M units that a value is spread over; keys rotated at original positions
  drawn             (golden.json) how many of the dropped units were drawn, of how many

D2O: the authors' `D2O_LayerKVCache`, at the commit below, as their attention calls it: one layer of 32 heads of 128
features (both are written into their code), keys rotated at original positions (theta 1000). PROMPT tokens are read
without eviction; then DECODED single tokens, of which the first cuts the cache to HH + RECENT units and every other one
drops a unit. Queries, keys and values are drawn by splitmix64 (`numbers`), token-major, q, k, v of a token in turn.
  d2o_keys, d2o_values F32 [len(heads), HH + RECENT, 128]   the cache at the end, of the heads in golden.json
  d2o_scores           F32 the same, [len(heads), HH + RECENT]   summed attention (infinite for the 4 sinks)
  d2o_outputs          F32 [DECODED, len(heads), 128]    attention's outputs of decoded tokens
  thresholds           (golden.json) after each decoded token
"""

import ast
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import torch
from kvpress import CAMPress, StreamingLLMPress
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

HERE = pathlib.Path(__file__).parent
MODELS = HERE.parents[3] / "locret-models/tests/golden"

TOKENS, TARGET, SEED = 96, 39, 5
CASES = [(6, 8), (32, 8), (5, 1)]

D2O_COMMIT = "12c99d8"
D2O_FILE = "LLM_merge_new/LMEval_kv_token_merge/modeling_llama3_7b_13b_d2o.py"
HEADS, DIM, THETA = 32, 128, 1000.0
PROMPT, DECODED, HH, RECENT = 39, 12, 12, 8
SHOWN = [0, 13, 31]

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x):
    x = (x + GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def lot(layer, head, position):
    state = SEED
    for part in (layer, head, position):
        state = mix(state ^ mix((part + GOLDEN) & MASK))
    return (state >> 40) / (1 << 24)


def numbers(seed, count):
    """splitmix64, from -1 to 1."""
    steps = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + steps * np.uint64(GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return torch.tensor((x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) * 2 - 1)


def cam(model, ids, window, interval):
    press = CAMPress(
        StreamingLLMPress(n_sink=4), compression_interval=interval, target_size=TARGET, merge_budget=window
    )
    # Positions of the units that a layer holds: kvpress drops what lies behind the sinks.
    held, drawn = {}, [0, 0]
    at = {"layer": None}
    original = press.compress

    def compress(module, hidden, keys, values, attentions, kwargs):
        layer = int(module.layer_idx)
        at["layer"], at["gone"] = layer, keys.shape[2] - TARGET
        at["positions"] = held.setdefault(layer, []) + list(range(at["seen"].get(layer, 0), step + 1))
        at["seen"][layer] = step + 1
        held[layer] = at["positions"][:4] + at["positions"][4 + at["gone"] :]
        return original(module, hidden, keys, values, attentions, kwargs)

    def bernoulli(likely):
        # [1, KV heads, dropped units]
        gone = at["positions"][4 : 4 + at["gone"]]
        assert likely.shape[2] == len(gone)
        lots = [[lot(at["layer"], head, p) for p in gone] for head in range(likely.shape[1])]
        lots = torch.tensor(lots, dtype=torch.float32)[None]
        # No draw may hang on rounding.
        assert ((lots - likely).abs() > 1e-5).all()
        drawn[0] += int((lots < likely).sum())
        drawn[1] += likely.numel()
        return (lots < likely).to(likely.dtype)

    at["seen"] = {}
    press.compress = compress
    plain, torch.bernoulli = torch.bernoulli, bernoulli
    cache = DynamicCache()
    with press(model):
        for step, token in enumerate(ids):
            where = torch.tensor([step])
            model(
                torch.tensor([[token]]), past_key_values=cache, use_cache=True, position_ids=where[None], cache_position=where
            )
    torch.bernoulli = plain
    keys = torch.cat([layer.keys for layer in cache.layers])
    values = torch.cat([layer.values for layer in cache.layers])
    assert keys.shape[2] == TARGET, keys.shape
    assert drawn[0] * 10 > drawn[1] and drawn[0] < drawn[1], drawn
    return keys.contiguous(), values.contiguous(), drawn


def authors_class(repository):
    show = ["git", "-C", repository, "show", f"{D2O_COMMIT}:{D2O_FILE}"]
    text = subprocess.run(show, check=True, capture_output=True, text=True).stdout
    found = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "D2O_LayerKVCache"]
    scope = dict(torch=torch, nn=torch.nn)
    exec(compile(ast.Module(found, []), D2O_FILE, "exec"), scope)
    return scope["D2O_LayerKVCache"]


def rotated(x, positions):
    """[heads, tokens, dim]"""
    half = DIM // 2
    angles = positions[:, None].double() * THETA ** (-2.0 * torch.arange(half).double() / DIM)
    cos, sin = angles.cos().float(), angles.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def d2o(repository):
    total = PROMPT + DECODED
    drawn = numbers(11, total * 3 * HEADS * DIM).view(total, 3, HEADS, DIM).permute(1, 2, 0, 3)
    positions = torch.arange(total)
    q, k = rotated(drawn[0], positions), rotated(drawn[1], positions)
    v = drawn[2].contiguous()

    def attend(queries, keys, values, first):
        logits = queries @ keys.transpose(-1, -2) / math.sqrt(DIM)
        rows = first + torch.arange(queries.shape[1])
        logits.masked_fill_(torch.arange(keys.shape[1])[None] > rows[:, None], float("-inf"))
        weights = logits.softmax(-1)
        return weights, weights @ values

    share = lambda units: (units + 0.5) / (PROMPT + 1)
    cache = authors_class(repository)(hh_ratio=share(HH), recent_ratio=share(RECENT))
    weights, _ = attend(q[:, :PROMPT], k[:, :PROMPT], v[:, :PROMPT], 0)
    prompt = weights.sum(1)
    past = (k[None, :, :PROMPT], v[None, :, :PROMPT])
    outputs, thresholds = [], []
    for token in range(PROMPT, total):
        past = (
            torch.cat((past[0], k[None, :, token : token + 1]), 2),
            torch.cat((past[1], v[None, :, token : token + 1]), 2),
        )
        weights, output = attend(q[:, token : token + 1], past[0][0], past[1][0], past[0].shape[2] - 1)
        paid = weights.sum(1)
        if token == PROMPT:
            paid = torch.cat((prompt + paid[:, :PROMPT], paid[:, PROMPT:]), 1)
        past = cache(past, paid, share(HH), share(RECENT), PROMPT)
        assert past[0].shape[2] == HH + RECENT
        outputs.append(output[SHOWN, 0])
        thresholds.append(float(cache.threshold))
    keys, values = (part[0][SHOWN].contiguous() for part in past)
    return keys, values, cache.hh_score[SHOWN].contiguous(), torch.stack(outputs), thresholds


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODELS / "llama31", dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = [(i * 77 + 13) % 180 for i in range(TOKENS)]
    tensors, draws = {}, {}
    for window, interval in CASES:
        name = f"cam_{window}_{interval}"
        tensors[f"{name}_keys"], tensors[f"{name}_values"], draws[name] = cam(model, ids, window, interval)
        print(name, tensors[f"{name}_values"].shape, draws[name])
    tensors["d2o_keys"], tensors["d2o_values"], tensors["d2o_scores"], tensors["d2o_outputs"], thresholds = d2o(sys.argv[1])
    print("d2o", thresholds)
    golden = {
        "made_with": {"kvpress": "0.5.5", "transformers": "5.2.0", "torch": "2.15.0", "D2O": D2O_COMMIT},
        "ids": ids,
        "target": TARGET,
        "seed": SEED,
        "cases": CASES,
        "drawn": draws,
        "prompt": PROMPT,
        "decoded": DECODED,
        "hh": HH,
        "recent": RECENT,
        "heads": SHOWN,
        "thresholds": thresholds,
    }
    (HERE / "golden.json").write_text(json.dumps(golden) + "\n")
    save_file(tensors, HERE / "golden.safetensors")
    (HERE / "golden.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
