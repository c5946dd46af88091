"""Golden one-shot scores and choices of kvpress's presses of 2025 and 2026 on SmolLM2-135M-Instruct.

    python3 make.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Packages: kvpress 0.5.5 with transformers 5.2.0 (kvpress wants < 5.3: give it an environment of its
own), torch 2.15.0, gguf 0.19.0, tokenizers 0.22.2, safetensors 0.8.0, numpy 2.4.6, Jinja2 3.1.6,
regex 2026.11.15. The origin of the model file: locret-models/tests/golden/smollm2/reference.py. The
prompt is that of ../scores/golden.json. A minute. One pass over 256 tokens, f32.

golden.json: layers, settings, and kept[name][layer of `layers`][KV head] = positions that stay.
golden.safetensors: F32 scores [len(layers), kv_heads, 256], larger = keep, and what went in where it
was drawn here (q_filters [30, 3, 64], sketch [len(layers), 3, 64, 48]).
"""

import argparse
import json
import pathlib
import sys

import torch
from kvpress import (
    ChunkKVPress,
    CompactorPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    DMSPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    LagKVPress,
    MergingPress,
    QFilterPress,
    ScorerPress,
    SnapKVPress,
)
from safetensors.torch import save_file
from transformers import DynamicCache

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parents[3] / "locret-models/tests/golden/smollm2"))
import reference as ref  # noqa: E402

LAYERS = [0, 10, 29]
LAG, WINDOW, KERNEL, TILE, BLOCK = 32, 16, 5, 61, 20
RATIO = 0.5


def number(i):
    """The formula that the tests make weights of."""
    return ((i * 7919 % 1009) / 504.5 - 1.0) / 2.0


class Heads(ScorerPress):
    """Linear heads whose weights are `number`s: what KVzap's are."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        d, g = hidden_states.shape[-1], keys.shape[1]
        at = 31 * module.layer_idx
        w = torch.tensor([number(at + i) for i in range(g * d)]).view(g, d)
        b = torch.tensor([number(at + 3 + i) for i in range(g)])
        return (hidden_states @ w.T + b).transpose(1, 2)


def rows_of(kept, all_rows):
    """Which rows of `all_rows` [n, d] the rows of `kept` are."""
    found = (kept[:, None] == all_rows[None]).all(-1)
    assert (found.sum(-1) == 1).all()
    return sorted(found.float().argmax(-1).tolist())


def order(kept, all_rows):
    return (kept[:, None] == all_rows[None]).all(-1).float().argmax(-1).argsort()


@torch.no_grad()
def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--gguf", required=True)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(20)
    model = ref.load_model(ref.Gguf(args.gguf), attn_implementation="sdpa")
    ids = torch.tensor([json.loads((HERE / "../scores/golden.json").read_text())["prompt"]])
    n = ids.shape[1]
    tensors, kept, folded = {}, {}, {}

    def scores(name, press):
        original, seen = press.score, {}

        def record(module, *rest, **more):
            seen[module.layer_idx] = original(module, *rest, **more)
            return seen[module.layer_idx].clone()

        press.score = record
        with press(model):
            model(ids, past_key_values=DynamicCache(), use_cache=True)
        assert len(seen) == model.config.num_hidden_layers
        tensors[name] = torch.cat([seen[i] for i in LAYERS]).float().contiguous()
        print(name, float(tensors[name].min()), float(tensors[name].max()))

    def choices(name, press, values=False):
        """What stays, of every layer as if the layers before had kept all: `compress` is only watched."""
        original, seen = press.compress, {}

        def record(module, hidden, keys, vals, attentions, kwargs):
            module.masked_key_indices = None
            k, v = original(module, hidden, keys, vals, attentions, kwargs)
            masked = module.masked_key_indices
            module.masked_key_indices = None
            if masked is None:
                seen[module.layer_idx] = [rows_of(k[0, h], keys[0, h]) for h in range(keys.shape[1])]
                if values:
                    # In the order of positions, as the choices are.
                    folded[module.layer_idx] = torch.stack([v[0, h, order(k[0, h], keys[0, h])] for h in range(keys.shape[1])])
            else:
                gone = [set(masked[2][masked[1] == h].tolist()) for h in range(keys.shape[1])]
                seen[module.layer_idx] = [[i for i in range(n) if i not in g] for g in gone]
            return keys, vals

        press.compress = record
        with press(model):
            model(ids, past_key_values=DynamicCache(), use_cache=True)
        kept[name] = [seen[i] for i in LAYERS]
        print(name, [[len(h) for h in layer] for layer in kept[name]])

    scores("expected_attention", ExpectedAttentionPress(RATIO))
    scores("expected_attention_mean", ExpectedAttentionPress(RATIO, use_covariance=False, use_vnorm=False))
    scores("lagkv", LagKVPress(RATIO, lag_size=LAG))
    scores("cur", CURPress(RATIO))

    q = QFilterPress(RATIO)
    filters = torch.randn(30, 3, 64)
    q.post_init_from_model = lambda model: None
    q.q_filters = filters
    tensors["filters"] = filters
    scores("q_filters", q)

    drawn, randn = [], torch.randn

    def recorded(*shape, **more):
        drawn.append(randn(*shape, **more))
        return drawn[-1]

    torch.randn = recorded
    scores("compactor", CompactorPress(RATIO, chunk_size=TILE, blending=0.35))
    torch.randn = randn
    tensors["sketch"] = torch.cat([drawn[i] for i in LAYERS]).contiguous()

    snap = lambda: SnapKVPress(RATIO, window_size=WINDOW, kernel_size=KERNEL)
    expected = lambda: ExpectedAttentionPress(RATIO, use_vnorm=False)
    choices("chunkkv_expected", ChunkKVPress(expected(), chunk_length=BLOCK))
    choices("critical_snapkv", CriticalKVPress(snap()))
    choices("critical_expected", CriticalKVPress(expected()))
    choices("critical_ada_snapkv", CriticalAdaKVPress(snap()))
    choices("critical_ada_expected", CriticalAdaKVPress(expected()))

    duo = DuoAttentionPress(0.5)
    duo.sink_size, duo.recent_size = 4, 32
    table = torch.tensor([number(7 * i) + 0.5 for i in range(90)]).view(30, 3)
    duo.streaming_mask = table < table.flatten().sort().values[45]
    duo.post_init_from_model = lambda model: None
    choices("duo", duo)

    # A threshold judges by masks alone, which the press adds to the module.
    dms = DMSPress(Heads(), threshold=0.0, sliding_window_size=WINDOW)
    with dms(model):
        model(ids, past_key_values=DynamicCache(), use_cache=True)
        masks = [model.model.layers[i].self_attn.masked_key_indices for i in range(30)]
    gone = lambda i, h: set(masks[i][2][masks[i][1] == h].tolist())
    kept["threshold"] = [[[p for p in range(n) if p not in gone(i, h)] for h in range(3)] for i in LAYERS]
    print("threshold", [[len(h) for h in layer] for layer in kept["threshold"]])
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None

    choices("merging", MergingPress(expected(), similarity_threshold=0.3), values=True)
    tensors["merged_values"] = folded[10].contiguous()

    golden = {
        "made_with": {"kvpress": "0.5.5", "transformers": "5.2.0", "torch": "2.15.0"},
        "layers": LAYERS,
        "ratio": RATIO,
        "lag": LAG,
        "window": WINDOW,
        "kernel": KERNEL,
        "tile": TILE,
        "block": BLOCK,
        "kept": kept,
    }
    (HERE / "golden.json").write_text(json.dumps(golden) + "\n")
    save_file(tensors, HERE / "golden.safetensors")
    (HERE / "golden.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
