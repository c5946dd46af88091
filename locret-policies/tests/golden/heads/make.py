"""Small files of retaining heads as PyTorch and safetensors write them.

    python3 make.py            (packages: torch 2.15.0, safetensors 0.8.0, numpy 2.4.6)

A model of 2 layers, 3 query heads, 1 KV head of 2 features: fc1 [4, 10], fc2 [1, 4]. Element i of the
tensor that is number n in the order layer 0 fc1, layer 0 fc2, layer 1 fc1, layer 1 fc2 is
(i % 7 - 3) / 8 + n / 4, which every float type of the files holds exactly.
"""

import pathlib

import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
SHAPES = {"fc1": (4, 10), "fc2": (1, 4)}


def heads(dtype):
    out = {}
    for layer in range(2):
        for name, shape in SHAPES.items():
            i = torch.arange(shape[0] * shape[1])
            values = (i % 7 - 3) / 8 + len(out) / 4
            out[f"model.layers.{layer}.self_attn.{name}.weight"] = values.reshape(shape).to(dtype)
    return out


def main():
    save_file(heads(torch.float32), HERE / "f32.safetensors", metadata={"origin": "make.py"})
    save_file(heads(torch.float16), HERE / "f16.safetensors")
    save_file(heads(torch.bfloat16), HERE / "bf16.safetensors")
    torch.save(heads(torch.bfloat16), HERE / "heads.bin")
    # As a state dict of modules has it: an ordered dict of parameters, some of them views.
    both = torch.nn.Parameter(torch.stack([heads(torch.float32)[f"model.layers.{i}.self_attn.fc1.weight"] for i in (0, 1)]))
    views = dict(heads(torch.float32))
    for i in (0, 1):
        views[f"model.layers.{i}.self_attn.fc1.weight"] = both[i]
    torch.save(views, HERE / "views.bin")
    torch.save(heads(torch.float16), HERE / "legacy.bin", _use_new_zipfile_serialization=False)
    # Inside a whole checkpoint.
    whole = heads(torch.float32)
    whole["model.embed_tokens.weight"] = torch.zeros(4, 4)
    whole["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(6, 4, dtype=torch.int8)
    whole["model.layers.0.mlp.fc1.weight"] = torch.zeros(3)
    save_file(whole, HERE / "whole.safetensors")


if __name__ == "__main__":
    main()
