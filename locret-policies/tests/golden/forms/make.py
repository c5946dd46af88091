#!/usr/bin/env python3
"""Files of heads as others than Locret's authors publish them, and what their own code makes of some inputs.

    python make.py KVPRESS FASTKVZIP TRIMKV    # repositories (or bare copies) of github.com/NVIDIA/kvpress,
                                               # Janghyun1230/FastKVzip, ngocbh/trimkv

Packages: torch 2.15.0, transformers 5.23.0, safetensors 0.8.0. A few seconds, no GPU. Of each repository the one class
of the heads is taken, at the commit below; what else its file imports is left out.

A model of 2 layers, 24 features, 4 query heads, 2 KV heads; 7 tokens. Weights of small random numbers.

kvzap_linear.safetensors, kvzap_mlp.safetensors   KVzapModel.save_pretrained (d_R 6)
trimkv_weights.pth    the retention gates in a checkpoint's state_dict (d_R 10), alone, as the authors load them
fastkvzip.pt          {"module": state_dict of each layer's gate}: 16 features a head, 3 sinks
golden.safetensors    input [layers, 7, 24]; kvzap_linear, kvzap_mlp, fastkvzip [layers, 7, 2] scores, trimkv [layers,
                      7, 2] ln beta
"""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
import math
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

HERE = Path(__file__).parent
LAYERS, TOKENS, HIDDEN, HEADS, KV_HEADS = 2, 7, 24, 4, 2
SOURCES = {
    "kvpress": ("8bb29b9c3078452a86d692f29123fa6c793e2b05", "kvpress/presses/kvzap_press.py"),
    "fastkvzip": ("7d78b34be7a147a7b409d9307bdb53a2b5b84fa6", "prefill/attention/gate.py"),
    "trimkv": ("0456bc4eb5bc20972c7463cabf3ae859e498f7f6", "src/trimkv/models/llama/modeling_trimkv_llama.py"),
}


def classes(source, checkout, names):
    """The authors' classes of these names."""
    commit, path = SOURCES[source]
    show = ["git", "-C", str(checkout), "show", f"{commit}:{path}"]
    text = subprocess.run(show, check=True, capture_output=True, text=True).stdout
    wanted = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name in names]
    scope = dict(
        torch=torch, nn=nn, F=F, math=math, Optional=Optional, ACT2FN=ACT2FN, Qwen3RMSNorm=Qwen3RMSNorm,
        PretrainedConfig=PretrainedConfig, PreTrainedModel=PreTrainedModel,
    )
    exec(compile(ast.Module(wanted, []), path, "exec"), scope)
    return [scope[name] for name in names]


def randomise(module, scale):
    with torch.no_grad():
        for _, p in sorted(module.named_parameters()):
            p.copy_(torch.randn(p.shape) * scale)


def main():
    kvpress, fastkvzip, trimkv = sys.argv[1:]
    torch.manual_seed(18)
    x = torch.randn(LAYERS, TOKENS, HIDDEN)
    golden = {"input": x}

    config_class, model_class = classes("kvpress", kvpress, ["KVzapConfig", "KVzapModel"])
    for name, inner in [("linear", None), ("mlp", 6)]:
        config = config_class(input_dim=HIDDEN, output_dim=KV_HEADS, n_modules=LAYERS, hidden_dim=inner)
        model = model_class(config)
        randomise(model, 0.3)
        folder = HERE / "tmp"
        model.save_pretrained(folder)
        (folder / "model.safetensors").rename(HERE / f"kvzap_{name}.safetensors")
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()
        golden[f"kvzap_{name}"] = model(x.transpose(0, 1)).transpose(0, 1)

    (gate_class,) = classes("fastkvzip", fastkvzip, ["Weight"])
    gates = []
    for layer in range(LAYERS):
        gate = gate_class(layer, HIDDEN, 16, KV_HEADS, HEADS // KV_HEADS, torch.float32, sink=3)
        randomise(gate, 0.5)
        gates.append(gate)
    torch.save({"module": [gate.state_dict() for gate in gates]}, HERE / "fastkvzip.pt")
    golden["fastkvzip"] = torch.stack([gate(h.unsqueeze(0))[0].T for gate, h in zip(gates, x)])

    (retention_class,) = classes("trimkv", trimkv, ["RetentionGate"])
    config = SimpleNamespace(
        hidden_size=HIDDEN, retention_gate_intermediate_size=10, num_key_value_heads=KV_HEADS, hidden_act="silu",
        retention_gate_bias_init=10.0,
    )
    weights, betas = {}, []
    for layer in range(LAYERS):
        gate = retention_class(config)
        randomise(gate, 0.5)
        betas.append(gate(x[layer]))
        for key, value in gate.state_dict().items():
            weights[f"model.layers.{layer}.self_attn.retention_gate.{key}"] = value
    torch.save(weights, HERE / "trimkv_weights.pth")
    golden["trimkv"] = torch.stack(betas)
    save_file({k: v.detach().contiguous() for k, v in golden.items()}, HERE / "golden.safetensors")


main()
