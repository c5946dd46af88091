"""Tiny random models of the architectures that the crate reads, with their golden logits.

    python3 make_tiny.py [--search] [MODEL...]

Packages: torch 2.15.0, transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6. Under a minute. Writes
the folders llama2, llama31 (and llama31/sharded), llama32, llama_biases, mistral, phi3_4k, phi3_128k,
phi4_mini, qwen2 and qwen3 beside this script, or those that are named. The weights are drawn from torch's generator with a seed per model, chosen (--search) so
that no greedy step is too close to call. All weights are exactly representable in bf16, so one
golden serves llama31 in f32 and its bf16 shards. Computation is f32 throughout.

Per folder:
  config.json     as transformers 5 writes it (`rope_parameters`)
  config_v4.json  as published for transformers 4 (`rope_theta`, `rope_scaling`); the same model
  config_*.json   further spellings or variants, named in golden.json
  model.safetensors (llama31/sharded: two bf16 shards and model.safetensors.index.json)
  golden.json     `variants` {name: {config, cases[]}}; "default" goes with config.json and every
                  file listed in its `config`. A case has ids, positions, logits (base64 of
                  little-endian f32, [positions, vocab] row-major; the last position is the last
                  token), greedy: 16 ids, each the argmax after one pass over everything before it,
                  end tokens do not stop it, greedy_margins: largest minus second largest logit.
"""

import argparse
import base64
import copy
import itertools
import json
import pathlib
import shutil
import tempfile

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent

VOCAB = 192
GREEDY = 16
CLEAR = 2e-3


def published(kind, **more):
    """A config.json in the style of the published checkpoints of its time."""
    common = {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB,
    }
    return {**kind, **common, **more}


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}

LONG = [1.0, 1.25, 2.0, 5.5]
SHORT = [1.0, 1.02, 1.05, 1.1]

MODELS = {
    # MHA, no head_dim and no num_key_value_heads field as in the first Llama-2 configurations
    "llama2": dict(
        seed=1,
        v4=published(
            LLAMA, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, rms_norm_eps=1e-5, rope_scaling=None, pretraining_tp=1,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        lengths=[12, 50],
    ),  # fmt: skip
    # GQA 2:1, llama3 scaling whose bands (unscaled, blended, scaled) all occur, untied, three end tokens
    "llama31": dict(
        seed=1,
        v4=published(
            LLAMA, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=500.0,
            rope_scaling={
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32, "rope_type": "llama3",
            },
            attention_bias=False, mlp_bias=False, pretraining_tp=1, tie_word_embeddings=False,
            bos_token_id=186, eos_token_id=[187, 188, 189],
        ),
        lengths=[20, 32, 150],
    ),  # fmt: skip
    # GQA 4:1 (one KV head), tied embedding, head_dim spelt out and not hidden / heads
    "llama32": dict(
        seed=1,
        v4=published(
            LLAMA, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=1000.0,
            rope_scaling={
                "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32, "rope_type": "llama3",
            },
            attention_bias=False, mlp_bias=False, pretraining_tp=1, tie_word_embeddings=True,
            bos_token_id=186, eos_token_id=187,
        ),
        lengths=[20, 80],
    ),  # fmt: skip
    # MHA, plain RoPE, no sliding window; the variant `sliding` sees the last 24 tokens alone
    "phi3_4k": dict(
        seed=1,
        v4=published(
            PHI3, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=128, original_max_position_embeddings=128,
            rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, sliding_window=None, embd_pdrop=0.0,
            resid_pdrop=0.0, tie_word_embeddings=False, bos_token_id=1, eos_token_id=186, pad_token_id=186,
        ),
        lengths=[12, 50],
        variants={"sliding": dict(sliding_window=24)},
    ),  # fmt: skip
    # GQA 2:1, LongRoPE; lengths below, at and above the original 48, and one that crosses while
    # generating. `always_long` is the authors' rule: the long factors at every length. Its config files
    # say so by repeating the long factors as the short ones; config.json with the rule is the same model.
    "phi3_128k": dict(
        seed=1,
        v4=published(
            PHI3, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=192, original_max_position_embeddings=48,
            rms_norm_eps=1e-5, rope_theta=10000.0,
            rope_scaling={"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
            sliding_window=262144, embd_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=186, pad_token_id=186,
        ),
        lengths=[20, 40, 48, 120],
        spellings={"config_v4_su.json": dict(rope_scaling={"long_factor": LONG, "short_factor": SHORT, "type": "su"})},
        variants={"always_long": dict(rope_scaling={"long_factor": LONG, "short_factor": LONG, "type": "longrope"})},
    ),  # fmt: skip
    # biases on every projection
    "llama_biases": dict(
        seed=1,
        v4=published(
            LLAMA, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=10000.0,
            rope_scaling=None, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
            bos_token_id=186, eos_token_id=187,
        ),
        lengths=[12, 50],
    ),  # fmt: skip
    # norms of the heads of q and k, head_dim of its own, tied
    "qwen3": dict(
        seed=1,
        v4=published(
            QWEN3, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-6,
            rope_theta=1000000.0, rope_scaling=None, attention_bias=False, use_sliding_window=False,
            sliding_window=None, max_window_layers=2, tie_word_embeddings=True, bos_token_id=186, eos_token_id=186,
        ),
        lengths=[12, 50],
    ),  # fmt: skip
    # no window, head_dim of its own, as in the larger ones
    "mistral": dict(
        seed=1,
        v4=published(
            MISTRAL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-5,
            rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        ),
        lengths=[12, 50],
    ),  # fmt: skip
    # GQA, three quarters of the features rotated, tied, LongRoPE, as Phi-4-mini
    "phi4_mini": dict(
        seed=1,
        v4=published(
            PHI3, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=1, partial_rotary_factor=0.5, max_position_embeddings=192,
            original_max_position_embeddings=48, rms_norm_eps=1e-5, rope_theta=10000.0,
            rope_scaling={"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
            sliding_window=262144, embd_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=True,
            attention_bias=False, bos_token_id=1, eos_token_id=186, pad_token_id=186,
        ),
        lengths=[20, 48, 80],
    ),  # fmt: skip
    # biases on q, k and v; for the adapter that is written outside the crates
    "qwen2": dict(
        seed=1,
        v4=published(
            QWEN2, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6, rope_theta=1000000.0,
            use_sliding_window=False, sliding_window=128, max_window_layers=2, tie_word_embeddings=False,
            bos_token_id=186, eos_token_id=186,
        ),
        lengths=[12, 50],
    ),  # fmt: skip
}


def load_config(fields):
    with tempfile.TemporaryDirectory() as d:
        (pathlib.Path(d) / "config.json").write_text(json.dumps(fields))
        return AutoConfig.from_pretrained(d)


def build(fields):
    # Every attention here is transformers' eager one: no kernel choice can change the numbers.
    return AutoModelForCausalLM.from_config(
        load_config(copy.deepcopy(fields)), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def randomise(model, seed):
    """Weights wide enough for logits that differ, rounded to bf16 and held in f32."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            r = torch.randn(p.shape, generator=gen)
            if "norm" in name:
                p.copy_(1 + 0.2 * r)
            elif name.endswith("bias"):
                p.copy_(0.5 * r)
            elif "embed" in name:
                p.copy_(r * (0.25 if model.config.tie_word_embeddings else 1.0))
            else:
                p.copy_(r * 1.3 / p.shape[1] ** 0.5)
            p.copy_(p.bfloat16().float())


def prompt(name, length):
    """Ids over the whole vocabulary below the end tokens, from a small linear congruence."""
    x, out = sum(name.encode()) * 1000 + length, []
    for _ in range(length):
        x = (x * 1103515245 + 12345) % 2**31
        out.append((x >> 12) % 186)
    return out


@torch.no_grad()
def case(model, name, length):
    ids = prompt(name, length)
    one_pass = lambda t: model(torch.tensor([t]), use_cache=False).logits[0]
    logits = one_pass(ids)
    seq, margins = list(ids), []
    for _ in range(GREEDY):
        best = torch.topk(one_pass(seq)[-1], 2)
        margins.append(float(best.values[0] - best.values[1]))
        seq.append(int(best.indices[0]))
    positions = sorted({(length - 1) * k // 9 for k in range(10)})
    raw = logits[positions].numpy().astype("<f4").tobytes()
    return {
        "ids": ids,
        "positions": positions,
        "logits": base64.b64encode(raw).decode(),
        "greedy": seq[length:],
        "greedy_margins": [float(str(np.float32(m))) for m in margins],
    }, min(margins)


def state_to_save(model):
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def models_of(spec):
    """{variant: (config fields in the transformers 4 spelling, model)} with the same weights."""
    out = {}
    for variant, change in {"default": {}, **spec.get("variants", {})}.items():
        fields = {**spec["v4"], **change}
        model = build(fields)
        randomise(model, spec["seed"])
        out[variant] = (fields, model)
    return out


def run_cases(name, spec):
    worst, result = float("inf"), {}
    for variant, (_, model) in models_of(spec).items():
        cases = []
        for length in spec["lengths"]:
            c, margin = case(model, name, length)
            worst = min(worst, margin)
            cases.append(c)
        result[variant] = cases
    return result, worst


def save_sharded(folder, state):
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    # An uneven cut in name order, so that a layer's tensors lie in two files.
    cut = len(names) * 2 // 5
    files = {"model-00001-of-00002.safetensors": names[:cut], "model-00002-of-00002.safetensors": names[cut:]}
    weight_map, total = {}, 0
    for file, part in files.items():
        tensors = {n: state[n].bfloat16() for n in part}
        assert all(torch.equal(t.float(), state[n]) for n, t in tensors.items())
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        total += sum(t.numel() * 2 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=True) + "\n")


def verify(folder, config, c):
    """Loads what was written, with transformers, from files alone."""
    ids = c["ids"]
    with tempfile.TemporaryDirectory() as d:
        d = pathlib.Path(d)
        for f in folder.glob("model*"):
            shutil.copy(f, d)
        # "su" was LongRoPE's first name; transformers 5 does not read it any more.
        (d / "config.json").write_text(config.read_text().replace('"su"', '"longrope"'))
        model = AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            got = model(torch.tensor([ids]), use_cache=False).logits[0]
            # generate() decodes on a cache (and starts over where LongRoPE switches): a second way.
            model.generation_config.eos_token_id = None
            mask = torch.ones(1, len(ids), dtype=torch.long)
            said = model.generate(torch.tensor([ids]), attention_mask=mask, do_sample=False, max_new_tokens=GREEDY)
            said = said[0, len(ids) :].tolist()
    stored = np.frombuffer(base64.b64decode(c["logits"]), "<f4").reshape(len(c["positions"]), VOCAB)
    assert np.array_equal(got[c["positions"]].numpy(), stored), (folder, config)
    assert said == c["greedy"], (folder, config, len(ids))


def make(name, spec):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    cases, worst = run_cases(name, spec)
    assert worst > CLEAR, f"{name}: choose another seed"
    models = models_of(spec)
    state = state_to_save(models["default"][1])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    golden = {"vocab": VOCAB, "variants": {}}
    for variant, (fields, model) in models.items():
        suffix = "" if variant == "default" else "_" + variant
        files = [f"config{suffix}.json", f"config{suffix}_v4.json"]
        written = model.config.to_diff_dict()
        for key in ("_name_or_path", "_attn_implementation"):
            written.pop(key, None)
        written["architectures"] = fields["architectures"]
        written["dtype"] = "float32"
        write_json(folder / files[0], written)
        write_json(folder / files[1], {**fields, "transformers_version": "4.43.0"})
        if variant == "default":
            for file, change in spec.get("spellings", {}).items():
                write_json(folder / file, {**fields, **change, "transformers_version": "4.40.2"})
                files.append(file)
        golden["variants"][variant] = {"config": files, "cases": cases[variant]}
    if name == "llama31":
        save_sharded(folder / "sharded", state)
        for file in ("config.json", "config_v4.json"):
            fields = json.loads((folder / file).read_text())
            fields["dtype" if "dtype" in fields else "torch_dtype"] = "bfloat16"
            write_json(folder / "sharded" / file, fields)
    for v in golden["variants"].values():
        for file, c in itertools.product(v["config"], v["cases"]):
            verify(folder, folder / file, c)
    if name == "llama31":
        for c in golden["variants"]["default"]["cases"]:
            verify(folder / "sharded", folder / "sharded/config.json", c)
    write_json(folder / "golden.json", golden)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    weights = (folder / "model.safetensors").stat().st_size
    print(f"{name}: smallest greedy margin {worst:.2e}, weights {weights} B, folder {size} B")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--search", action="store_true", help="print, per model, the first seed clear enough")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("models", nargs="*")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    for name, spec in MODELS.items():
        if args.models and name not in args.models:
            continue
        if args.search:
            for seed in itertools.count(1):
                if run_cases(name, {**spec, "seed": seed})[1] > CLEAR:
                    print(name, seed)
                    break
        else:
            make(name, spec)


if __name__ == "__main__":
    main()
