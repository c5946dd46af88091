"""Golden one-shot scores of kvpress's presses on SmolLM2-135M-Instruct.

    python3 make.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --prose areopagitica_gut.txt

Packages: kvpress 0.5.5 with transformers 5.2.0 (kvpress wants < 5.3: give it an environment of its
own), torch 2.15.0, gguf 0.19.0, tokenizers 0.22.2, safetensors 0.8.0, numpy 2.4.6, Jinja2 3.1.6,
regex 2026.11.15. The origin of both files: locret-models/tests/golden/smollm2/reference.py. Under a
minute. One pass over 256 tokens, f32, eager attention; every score is computed a second time from
the keys and attention weights by the formula in FORMULAS and must agree.

golden.json: prompt (256 ids), layers, window, kernel, names.
golden.safetensors: NAME F32 [len(layers), kv_heads, 256] for every name, larger = keep.

What the numbers mean:
  key_norm      -|k| of the key
  key_diff      -cos(k, mean of the normalised keys of that head); on **rotated** keys, as the cache of
                transformers holds them, so a score from keys before rotation differs
  snapkv        mean attention of the last 64 queries, average-pooled over 5 neighbours (zeros beyond
                the ends count), mean over the group; the last 64 entries are the layer's maximum + 1
  tova          the last query's attention averaged over all heads, the same row for every KV head; the
                last entry is the layer's maximum + 1
  h2o           attention summed over all queries / number of queries that could see the unit, mean
                over the group (ObservedAttentionPress)
"""

import argparse
import pathlib
import sys

import torch
from kvpress import KeyDiffPress, KnormPress, ObservedAttentionPress, SnapKVPress, TOVAPress
from safetensors.torch import save_file
from transformers import DynamicCache

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parents[3] / "locret-models/tests/golden/smollm2"))
import reference as ref  # noqa: E402

TOKENS, LAYERS = 256, [0, 10, 29]
WINDOW, KERNEL = 64, 5

PRESSES = {
    "key_norm": KnormPress,
    "key_diff": KeyDiffPress,
    "snapkv": lambda ratio: SnapKVPress(ratio, window_size=WINDOW, kernel_size=KERNEL),
    "tova": TOVAPress,
    "h2o": ObservedAttentionPress,
}


def groups(x, kv_heads):
    """[H, ...] -> mean over the query heads of each KV head [G, ...]."""
    return x.reshape(kv_heads, -1, *x.shape[1:]).mean(1)


def forced(scores, newest):
    return torch.cat((scores, (scores.max() + 1).expand(scores.shape[0], newest)), dim=1)


def key_diff(k, _):
    unit = k / k.norm(dim=-1, keepdim=True)
    mean = unit.mean(1, keepdim=True)
    return -(unit * (mean / mean.norm(dim=-1, keepdim=True))).sum(-1)


def snapkv(k, a):
    seen = a[:, -WINDOW:, :-WINDOW].mean(1)
    n, half = seen.shape[1], KERNEL // 2
    padded = torch.nn.functional.pad(seen, (half, half))
    pooled = sum(padded[:, i : i + n] for i in range(KERNEL)) / KERNEL
    return forced(groups(pooled, k.shape[0]), WINDOW)


# From the rotated keys k [G, n, d] and the attention weights a [H, n, n].
FORMULAS = {
    "key_norm": lambda k, a: -k.pow(2).sum(-1).sqrt(),
    "key_diff": key_diff,
    "snapkv": snapkv,
    "tova": lambda k, a: forced(a[:, -1, :-1].mean(0).expand(k.shape[0], -1), 1),
    "h2o": lambda k, a: groups(a.sum(1) / torch.arange(a.shape[-1], 0, -1), k.shape[0]),
}


@torch.no_grad()
def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--gguf", required=True)
    ap.add_argument("--prose", required=True)
    args = ap.parse_args()
    torch.set_num_threads(1)
    g = ref.Gguf(args.gguf)
    model, tok = ref.load_model(g, attn_implementation="eager"), ref.load_tokenizer(g)
    prose = pathlib.Path(args.prose).read_text(encoding="utf-8").replace("\r\n", "\n")
    prose = prose[prose.index("They, who to states") :]
    ids = tok.encode(prose[:40000]).ids[5000 : 5000 + TOKENS]

    cache = DynamicCache()
    plain = model(torch.tensor([ids]), past_key_values=cache, output_attentions=True, use_cache=True)
    tensors = {}
    for name, new in PRESSES.items():
        press, seen = new(0.5), {}
        original = press.score

        def record(module, *rest, seen=seen, original=original, **more):
            seen[module.layer_idx] = original(module, *rest, **more)
            return seen[module.layer_idx]

        press.score = record
        with press(model):
            model(torch.tensor([ids]), past_key_values=DynamicCache(), output_attentions=True, use_cache=True)
        assert len(seen) == model.config.num_hidden_layers
        for layer, got in seen.items():
            again = FORMULAS[name](cache.layers[layer].keys[0], plain.attentions[layer][0])
            error = (again - got[0]).abs().max()
            assert got.shape == (1, *again.shape) and error < 2e-5, (name, layer, float(error))
        tensors[name] = torch.cat([seen[i] for i in LAYERS]).contiguous()
        print(name, list(tensors[name].shape), float(tensors[name].min()), float(tensors[name].max()))
    golden = {
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": ref.GGUF_SHA256,
        "made_with": {"kvpress": "0.5.5", "transformers": "5.2.0", "torch": "2.15.0"},
        "prompt": ids,
        "layers": LAYERS,
        "window": WINDOW,
        "kernel": KERNEL,
        "names": list(PRESSES),
    }
    ref.write(HERE / "golden.json", golden)
    save_file(tensors, HERE / "golden.safetensors")
    (HERE / "golden.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
