"""Golden one-shot choices of further presses of kvpress: what stays, of the same prompt and layers as in make.py.

    python3 more.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Packages and the model file as for make.py. A minute. One pass over 256 tokens, f32; each layer is judged as if those
before it had kept everything.

more.json: settings, and kept[name][layer of golden.json's `layers`][KV head] = positions that stay.
  streaming        StreamingLLMPress, 4 sinks, RATIO
  ada_snapkv       AdaKVPress over SnapKVPress, RATIO
  ada_expected     AdaKVPress over ExpectedAttentionPress without the values' norms, RATIO
  pyramid_snapkv   PyramidKVPress, BETA, PYRAMID units a layer on average: whole numbers in all of 30 layers
  kvzap            KVzapPress, RATIO, with linear heads of `number`s
  fast_kvzip       FastKVzipPress, RATIO over all layers, with gates of `number`s
  fast_kvzip_layer the same, RATIO of each layer
"""

import argparse
import json
import pathlib
import sys

import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    FastKVzipPress,
    KVzapPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
)
from kvpress.presses.fastkvzip_press import FastKVzipGate
from make import number
from transformers import DynamicCache

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parents[3] / "locret-models/tests/golden/smollm2"))
import reference as ref  # noqa: E402

GOLDEN = json.loads((HERE / "golden.json").read_text())
LAYERS, WINDOW, KERNEL = GOLDEN["layers"], GOLDEN["window"], GOLDEN["kernel"]
RATIO, PYRAMID, BETA = 0.5, 116, 2


def numbers(start, *shape):
    n = torch.Size(shape).numel()
    return torch.tensor([number(start + i) for i in range(n)]).view(shape)


def kvzap(config):
    """The press with the heads that make.py has."""
    press = KVzapPress(RATIO, model_type="linear")
    d, g = config.hidden_size, config.num_key_value_heads
    layers = torch.nn.ModuleList(torch.nn.Linear(d, g) for _ in range(config.num_hidden_layers))
    for i, head in enumerate(layers):
        head.weight.copy_(numbers(31 * i, g, d))
        head.bias.copy_(numbers(31 * i + 3, g))
    press.kvzap_model = type("Heads", (), {"layers": layers})()
    press.post_init_from_model = lambda model: None
    return press


def fast_kvzip(config, layerwise):
    press = FastKVzipPress(RATIO, layerwise=layerwise)
    d, g = config.hidden_size, config.num_key_value_heads
    group, out, sink = config.num_attention_heads // g, 16, 16
    press.gates = []
    for i in range(config.num_hidden_layers):
        gate = FastKVzipGate(i, d, g, group, torch.float32, out, sink)
        rows, at = g * group * out, 31 * i
        gate.q_proj.weight.copy_(numbers(at, rows, d))
        gate.q_proj.bias.copy_(numbers(at + 3, rows))
        gate.k_proj.weight.copy_(numbers(at + rows * d, g * out, d))
        gate.q_norm.weight.copy_(1 + numbers(at + 9, out))
        gate.k_norm.weight.copy_(1 + numbers(at + 11, out))
        gate.k_base.copy_(numbers(at + 13, g, 1, sink, out))
        gate.b.copy_(numbers(at + 17, g, 1, group))
        press.gates.append(gate)
    return press


def rows_of(kept, all_rows):
    """Which rows of `all_rows` [n, d] the rows of `kept` are."""
    found = (kept[:, None] == all_rows[None]).all(-1)
    assert (found.sum(-1) == 1).all()
    return sorted(found.float().argmax(-1).tolist())


@torch.no_grad()
def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--gguf", required=True)
    args = ap.parse_args()
    torch.set_num_threads(1)
    model = ref.load_model(ref.Gguf(args.gguf), attn_implementation="sdpa")
    ids = torch.tensor([json.loads((HERE / "../scores/golden.json").read_text())["prompt"]])
    n = ids.shape[1]

    def choices(press):
        original, seen = press.compress, {}

        def record(module, hidden, keys, vals, attentions, kwargs):
            module.masked_key_indices = None
            k, _ = original(module, hidden, keys, vals, attentions, kwargs)
            masked, module.masked_key_indices = module.masked_key_indices, None
            heads = range(keys.shape[1])
            if masked is None:
                seen[module.layer_idx] = [rows_of(k[0, h], keys[0, h]) for h in heads]
            else:
                gone = [set(masked[2][masked[1] == h].tolist()) for h in heads]
                seen[module.layer_idx] = [[i for i in range(n) if i not in g] for g in gone]
            return keys, vals

        press.compress = record
        with press(model):
            model(ids, past_key_values=DynamicCache(), use_cache=True)
        return [seen[i] for i in LAYERS]

    def masked(press):
        """What a press keeps that masks after the pass."""
        with press(model):
            model(ids, past_key_values=DynamicCache(), use_cache=True)
        kept = []
        for i in LAYERS:
            masks = model.model.layers[i].self_attn.masked_key_indices
            gone = [set(masks[2][masks[1] == h].tolist()) for h in range(model.config.num_key_value_heads)]
            kept.append([[u for u in range(n) if u not in g] for g in gone])
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        return kept

    snap = lambda: SnapKVPress(RATIO, window_size=WINDOW, kernel_size=KERNEL)
    kept = {
        "streaming": choices(StreamingLLMPress(RATIO, n_sink=4)),
        "ada_snapkv": choices(AdaKVPress(snap())),
        "ada_expected": choices(AdaKVPress(ExpectedAttentionPress(RATIO, use_vnorm=False))),
        "pyramid_snapkv": choices(
            PyramidKVPress(1 - PYRAMID / n, window_size=WINDOW, kernel_size=KERNEL, beta=BETA)
        ),
        "kvzap": choices(kvzap(model.config)),
        "fast_kvzip": masked(fast_kvzip(model.config, False)),
        "fast_kvzip_layer": masked(fast_kvzip(model.config, True)),
    }
    for name, layers in kept.items():
        print(name, [[len(h) for h in layer] for layer in layers])
    golden = {
        "made_with": {"kvpress": "0.5.5", "transformers": "5.2.0", "torch": "2.15.0"},
        "pyramid": PYRAMID,
        "beta": BETA,
        "kept": kept,
    }
    (HERE / "more.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
