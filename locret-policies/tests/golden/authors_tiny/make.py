"""Golden runs of the authors' Locret procedure on the tiny llama31 and phi3_128k models.

    python3 make.py [--search]

Packages: torch 2.15.0, transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6. Under a minute. The
models are in locret-models/tests/golden (make_tiny.py made them); the procedure and the rule for the
random heads are in ../authors/procedure.py. Both prompts are longer than the model's original
context; Phi-3 runs as the authors run it, with the long factors at every length. Every case is
repeated in f64 and must keep the same units and say the same tokens there. `--search` prints, per
case, the first seed whose selections are not too close to call.

golden.json: settings (chunk, budget, stabilizers, local, d_r, fc1_bound, fc2_bound, chunks) and
cases[]: name, model, seed (a decimal string, u64), positions ("compact" | "original"), rope
("as configured" | "always long"), fc1 and fc2 shapes, prompt, min_margin, f64_score_error,
last_logits (all of them, at the last prompt token), greedy: 32 ids (the first is the argmax there;
end tokens do not stop it), greedy_margins.
golden.safetensors, for every case NAME:
  NAME.kept    U8  [chunks, layers, kv_heads, ceil(prompt / 8)]: bit p % 8 (least significant first)
               of byte p / 8 is set if the unit of prompt position p is kept after that chunk's cut
  NAME.margins F32 [chunks, layers, kv_heads]: worst kept score minus best dropped score, stabilizers
               left out; +inf where nothing was dropped
  NAME.scores  F32 [layers, kv_heads, prompt]: the score each prompt token was born with
"""

import argparse
import itertools
import math
import pathlib
import sys

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
MODELS = HERE.parents[3] / "locret-models/tests/golden"
sys.path += [str(HERE.parent / "authors"), str(MODELS / "smollm2")]
import procedure  # noqa: E402
import reference as ref  # noqa: E402

PROMPT, VOCAB, MAX_NEW = 150, 186, 32
SETTINGS = dict(chunk=32, budget=40, stabilizers=8, local=8)
D_R, FC1_BOUND, FC2_BOUND = 16, 0.25, 0.5
CLEAR = 1e-4
SEEDS = {"llama31": 1, "llama31_original": 2, "phi3_128k": 2, "phi3_128k_original": 1}


def prompt():
    """150 ids without a repetition, so that no two units of layer 0 tie."""
    return [(7 + 101 * i) % VOCAB for i in range(PROMPT)]


def llama3_inv_freq(r, d):
    """Frequencies whose wavelength exceeds original / low are divided by factor, those under
    original / high are kept, those between are blended linearly in original / wavelength."""
    inv = procedure.default_inv_freq(r["rope_theta"], d)
    low, high, original = r["low_freq_factor"], r["high_freq_factor"], r["original_max_position_embeddings"]
    turns = original / (2 * math.pi / inv)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return inv * (blend + (1 - blend) / r["factor"])


def longrope(config, factors):
    r = config.rope_parameters
    d = config.hidden_size // config.num_attention_heads
    powers = r["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)
    original = r["original_max_position_embeddings"]
    ratio = config.max_position_embeddings / original
    return 1.0 / (torch.tensor(r[factors]) * powers), math.sqrt(1 + math.log(ratio) / math.log(original))


def load(name):
    model = AutoModelForCausalLM.from_pretrained(
        MODELS / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if name == "llama31":
        inv_freq, scale = llama3_inv_freq(model.config.rope_parameters, model.config.head_dim), 1.0
    else:
        inv_freq, scale = longrope(model.config, "long_factor")
    weights = {t: procedure.Weights(model, inv_freq, scale, dtype=t) for t in (torch.float32, torch.float64)}
    # Above the original context transformers uses the long factors too, so the naive model must agree.
    ids = prompt()
    with torch.no_grad():
        plain = model(torch.tensor([ids]), use_cache=False).logits[0]
    naive = procedure.Run(weights[torch.float32], heads_of(weights[torch.float32], 0)).forward(ids)
    assert (naive - plain).abs().max() < 1e-4, (name, (naive - plain).abs().max())
    return weights


def shapes(weights):
    width = (weights.heads + 2 * weights.kv_heads) * weights.d
    return (D_R, width), (weights.kv_heads, D_R)


def heads_of(weights, seed):
    return procedure.random_heads(seed, len(weights.layers), *shapes(weights), FC1_BOUND, FC2_BOUND)


def attempt(weights, name, seed):
    positions = "original" if name.endswith("_original") else "compact"
    f32, f64 = torch.float32, torch.float64
    heads = heads_of(weights[f32], seed)
    r, exact = (
        procedure.locret(weights[t], heads, prompt(), **SETTINGS, max_new=MAX_NEW, positions=positions)
        for t in (f32, f64)
    )
    clear = float(r["margins"].min())
    error = float((r["scores"] - exact["scores"]).abs().max())
    same = r["tokens"] == exact["tokens"] and np.array_equal(
        procedure.bitmaps(r["kept"], PROMPT), procedure.bitmaps(exact["kept"], PROMPT)
    )
    ok = same and clear > CLEAR and min(r["token_margins"]) > 2e-3 and error < CLEAR / 5
    return ok, positions, clear, error, r


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--search", action="store_true")
    args = ap.parse_args()
    torch.set_num_threads(1)
    models = {name: load(name) for name in ("llama31", "phi3_128k")}
    tensors, cases = {}, []
    for name, seed in SEEDS.items():
        model = name.removesuffix("_original")
        weights = models[model]
        if args.search:
            print(name, next(s for s in itertools.count(1) if attempt(weights, name, s)[0]), flush=True)
            continue
        ok, positions, clear, error, r = attempt(weights, name, seed)
        assert ok, f"{name}: choose another seed"
        spread = r["scores"].std()
        print(f"{name}: seed {seed}, smallest margin {clear:.2e}, f64 score error {error:.2e}, spread {spread:.2f}")
        fc1, fc2 = shapes(weights[torch.float32])
        tensors[f"{name}.kept"] = procedure.bitmaps(r["kept"], PROMPT)
        tensors[f"{name}.margins"] = r["margins"].numpy()
        tensors[f"{name}.scores"] = r["scores"].contiguous().numpy()
        cases.append(
            {
                "name": name,
                "model": model,
                "seed": str(seed),
                "positions": positions,
                "rope": "as configured" if model == "llama31" else "always long",
                "fc1": list(fc1),
                "fc2": list(fc2),
                "prompt": prompt(),
                "min_margin": ref.f32(clear),
                "f64_score_error": ref.f32(error),
                "last_logits": ref.f32s(r["logits"]),
                "greedy": r["tokens"],
                "greedy_margins": ref.f32s(r["token_margins"]),
            }
        )
    if args.search:
        return
    settings = {**SETTINGS, "d_r": D_R, "fc1_bound": FC1_BOUND, "fc2_bound": FC2_BOUND, "chunks": len(r["kept"])}
    ref.write(HERE / "golden.json", {"settings": settings, "cases": cases})
    save_file(tensors, HERE / "golden.safetensors")
    (HERE / "golden.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
