"""Golden run of the authors' Locret procedure (procedure.py beside this script) on SmolLM2-135M.

    python3 make.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --prose areopagitica_gut.txt [--search]

Packages and the origin of both files: locret-models/tests/golden/smollm2/reference.py; also
safetensors 0.8.0. A few minutes on two CPU cores. Model and heads in f32; every case is repeated in
f64 and must keep the same units and say the same tokens there. `--search` looks for seeds whose
selections are not too close to call and prints them; SEEDS below are what it found.

The retaining heads are random and not stored: see random_heads in procedure.py. One splitmix64
stream from the case's seed fills, row-major, fc1 [64, 960] (bound FC1_BOUND) then fc2 [3, 64] (bound
FC2_BOUND) of layer 0, then of layer 1, and so on through layer 29.

golden.json:
  settings (chunk, budget, stabilizers, local, d_r, fc1_bound, fc2_bound, chunks), prompt: 600 ids,
  cases[]: name, seed (a decimal string, u64), positions ("compact" | "original"),
           score_layers: the layers in NAME.scores, min_margin: the smallest margin of any cut that
           is not an exact tie, exact_ties: [[chunk, layer, kv_head]] where the cut runs between
           equal scores, f64_score_error: largest |f32 - f64| of a score,
           top20 = {ids, values} at the last prompt token, greedy: 32 ids (the first is the argmax
           there; end tokens do not stop it), greedy_margins: largest minus second largest logit.
golden.safetensors, for every case NAME:
  NAME.kept    U8  [chunks, layers, kv_heads, 75]: bit p % 8 (least significant first) of byte p / 8
               is set if the unit born at prompt position p is in the cache after that chunk's cut
  NAME.margins F32 [chunks, layers, kv_heads]: worst kept score minus best dropped score, stabilizers
               left out (they count as +inf); +inf where the cut dropped nothing; 0 is an exact tie
  NAME.scores  F32 [len(score_layers), kv_heads, 600]: the score each prompt token was born with
"""

import argparse
import itertools
import math
import pathlib
import sys

import numpy as np
import torch
from safetensors.numpy import save_file

import procedure

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parents[3] / "locret-models/tests/golden/smollm2"))
import reference as ref  # noqa: E402

PROMPT = 600
SETTINGS = dict(chunk=128, budget=160, stabilizers=32, local=16)
D_R, FC1_BOUND, FC2_BOUND = 64, 0.0625, 0.375
SEEDS = {"compact": 96, "ties": 17, "original": 770}
SCORE_LAYERS = {"compact": list(range(30)), "ties": [0, 10, 29], "original": [0, 10, 29]}
CLEAR = 3e-5  # a cut with a smaller margin, exact ties in layer 0 aside, disqualifies a seed


class TooClose(Exception):
    pass


def heads_of(weights, seed):
    width = (weights.heads + 2 * weights.kv_heads) * weights.d
    return procedure.random_heads(
        seed, len(weights.layers), (D_R, width), (weights.kv_heads, D_R), FC1_BOUND, FC2_BOUND
    )


def check_margins(margins, ties_allowed):
    """margins [layers, G] of one chunk."""
    ties = (margins[0] == 0) if ties_allowed else torch.zeros_like(margins[0], dtype=torch.bool)
    close = margins < CLEAR
    close[0] &= ~ties
    if close.any():
        raise TooClose


def first_layer_ties(weights, heads, ids):
    """The number of exact ties at layer 0's cuts. Its scores need no attention, so this is quick."""
    unique, back = np.unique(ids, return_inverse=True)
    run = procedure.Run(weights, heads[:1])
    score = run.qkv(0, weights.embed[torch.from_numpy(unique)])[3].numpy()[:, back]
    end, budget, ties = len(ids) - SETTINGS["local"], SETTINGS["budget"], 0
    for row in score:
        held = np.arange(0)
        for b in range(0, end, SETTINGS["chunk"]):
            e = min(b + SETTINGS["chunk"], end)
            held = np.concatenate((held, np.arange(b, e)))
            wanted = row[held].copy()
            if e < end:
                wanted[-SETTINGS["stabilizers"] :] = np.inf
            order = np.argsort(-wanted, kind="stable")
            if len(held) > budget:
                margin = wanted[order[budget - 1]] - wanted[order[budget]]
                ties += int(margin == 0)
                if 0 < margin < CLEAR:
                    raise TooClose
            held = held[np.sort(order[:budget])]
    return ties


def attempt(weights, ids, name, seed):
    r = procedure.locret(
        weights, heads_of(weights, seed), ids, **SETTINGS, max_new=32,
        positions="original" if name == "original" else "compact",
        watch=lambda m: check_margins(m, name == "ties"),
    )  # fmt: skip
    t21 = ref.top(r["logits"], 21)["values"]
    if min(r["token_margins"]) < 5e-3 or min(a - b for a, b in zip(t21, t21[1:])) < 5e-4:
        raise TooClose
    return r


def search(weights, ids, name, start):
    """The first seed from `start` on that passes; only "ties" may, and must, cut between equals."""
    shallow = procedure.Weights.__new__(procedure.Weights)
    shallow.__dict__ = {**weights.__dict__, "layers": weights.layers[:1]}
    for seed in itertools.count(start):
        try:
            if (first_layer_ties(shallow, heads_of(shallow, seed), ids) > 0) != (name == "ties"):
                continue
            print(f"{name}: trying {seed}", flush=True)
            attempt(weights, ids, name, seed)
        except TooClose:
            continue
        return seed


def check_against_transformers(model, weights, ids):
    """With room for everything the procedure is the plain model, chunk by chunk or at once."""
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0]
    heads = heads_of(weights, 0)
    once = procedure.Run(weights, heads).forward(ids)
    assert (once - plain).abs().max() < 1e-4, (once - plain).abs().max()
    for positions in ("compact", "original"):
        roomy = procedure.locret(
            weights, heads, ids, **{**SETTINGS, "budget": len(ids)}, max_new=1, positions=positions
        )
        assert (roomy["logits"] - plain[-1]).abs().max() < 1e-4
        assert all(len(k[0]) == len(set(k[0].tolist())) for chunk in roomy["kept"] for k in chunk)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--gguf", required=True)
    ap.add_argument("--prose", required=True)
    ap.add_argument("--search", action="store_true")
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    g = ref.Gguf(args.gguf)
    model, tok = ref.load_model(g), ref.load_tokenizer(g)
    prose = pathlib.Path(args.prose).read_text(encoding="utf-8").replace("\r\n", "\n")
    prose = prose[prose.index("They, who to states") :]
    ids = tok.encode(prose[:40000]).ids[3000 : 3000 + PROMPT]
    inv_freq = procedure.default_inv_freq(100000.0, 64)
    weights = procedure.Weights(model, inv_freq)
    if args.search:
        for name in SEEDS:
            print(name, search(weights, ids, name, SEEDS[name]), flush=True)
        return

    check_against_transformers(model, weights, ids)
    exact = procedure.Weights(model, inv_freq, dtype=torch.float64)
    tensors, cases = {}, []
    for name, seed in SEEDS.items():
        positions = "original" if name == "original" else "compact"
        r = attempt(weights, ids, name, seed)
        r64 = procedure.locret(
            exact, heads_of(weights, seed), ids, **SETTINGS, max_new=32, positions=positions
        )
        kept = procedure.bitmaps(r["kept"], len(ids))
        assert np.array_equal(kept, procedure.bitmaps(r64["kept"], len(ids)))
        assert r["tokens"] == r64["tokens"]
        for c, layers in enumerate(r["kept"]):
            read = min((c + 1) * SETTINGS["chunk"], len(ids) - SETTINGS["local"])
            for where in itertools.chain.from_iterable(layers):
                assert len(where) == min(SETTINGS["budget"], read) and bool((where.diff() > 0).all())
                last = c + 1 == len(r["kept"])
                assert last or set(range(read - SETTINGS["stabilizers"], read)) <= set(where.tolist())
        margins = r["margins"]
        assert torch.equal(margins == 0, r64["margins"] == 0)
        error = float((r["scores"] - r64["scores"]).abs().max())
        assert error < 3e-5, "ill-conditioned: choose another seed"
        clear = float(margins[(margins != 0) & (margins < math.inf)].min())
        ties = (margins == 0).nonzero().tolist()
        print(f"{name}: seed {seed}, smallest margin {clear:.2e}, {len(ties)} ties, f64 score error {error:.2e}")
        tensors[f"{name}.kept"] = kept
        tensors[f"{name}.margins"] = margins.numpy()
        tensors[f"{name}.scores"] = r["scores"][SCORE_LAYERS[name]].numpy()
        cases.append(
            {
                "name": name,
                "seed": str(seed),
                "positions": positions,
                "score_layers": SCORE_LAYERS[name],
                "min_margin": ref.f32(clear),
                "exact_ties": ties,
                "f64_score_error": ref.f32(error),
                "top20": ref.top(r["logits"], 20),
                "greedy": r["tokens"],
                "greedy_margins": ref.f32s(r["token_margins"]),
            }
        )
    golden = {
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": ref.GGUF_SHA256,
        "made_with": {"torch": "2.15.0", "gguf": "0.19.0", "transformers": "5.23.0"},
        "settings": {**SETTINGS, "d_r": D_R, "fc1_bound": FC1_BOUND, "fc2_bound": FC2_BOUND, "chunks": len(kept)},
        "prompt": ids,
        "cases": cases,
    }
    ref.write(HERE / "golden.json", golden)
    save_file(tensors, HERE / "golden.safetensors")
    (HERE / "golden.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
