#!/usr/bin/env python3
"""What MInference's own code chooses and computes, on numbers that a formula makes.

    python make.py CHECKOUT        # of github.com/microsoft/MInference, at fb56c91

Needs torch (with its triton) and a C++ compiler, no GPU: the estimates are the authors' PyTorch functions, the
blocks and columns of a tile come from their CUDA function, compiled as plain C++, and the outputs from their
Triton kernels, run by Triton's interpreter in single precision. What they import beside that is left out.
"""

import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest.mock import MagicMock

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

HERE = Path(__file__).parent
CHECKOUT = Path(sys.argv[1])
torch.set_num_threads(2)


def on_cpu(make):
    """A function that makes tensors where there is no GPU."""

    def made(*args, **kwargs):
        if str(kwargs.get("device", "cpu")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


torch.arange, torch.full = on_cpu(torch.arange), on_cpu(torch.full)


def numbers(count, seed):
    """In -1..1, by a hash of their place that Rust computes alike."""
    x = torch.arange(count, dtype=torch.int64) + (seed << 20)
    for shift, factor in [(16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)]:
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x >> 8).double() / (1 << 23) - 1.0).float()


def inputs(heads, n, d, seed, near=1.0):
    """Queries, keys and values `[1, heads, n, d]`; some keys attract attention, and queries like keys that are
    near, the longer the smaller `near` is."""
    q, k, v = (numbers(heads * n * d, 3 * seed + i).reshape(1, heads, n, d).clone() for i in range(3))
    at = torch.arange(n)
    k[:, :, at % 97 == 13] *= 2.0
    angle = at.double()[:, None] * torch.tensor([near / (1 + 3 * i) for i in range(d // 2)]).double()
    turn = torch.cat([angle.cos(), angle.sin()], 1).float()
    return q + 2.0 * turn, k + 2.0 * turn, v


def block_lists():
    """Their function that turns columns and diagonals into a tile's blocks and columns."""
    source = (CHECKOUT / "csrc/vertical_slash_index.cu").read_text()
    start = source.index("__device__ void save_blocks")
    end = source.index("void convert_vertical_slash_indexes_64x64(")
    shim = """
#include <algorithm>
using std::max;
#define __device__ static
#define __global__ static
struct Dim { int x, y, z; };
static thread_local Dim blockIdx, blockDim, threadIdx;
"""
    call = """
extern "C" void run(const int* lens, const int* v, const int* s, int* bc, int* bo, int* cc, int* ci, int batch,
                    int heads, int rows, int nnz_v, int nnz_s) {
    blockDim = {1, 1, 1};
    threadIdx = {0, 0, 0};
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++)
            for (int r = 0; r < rows; r++) {
                blockIdx = {h, b, r};
                convert_vertical_slash_indexes_kernel(lens, v, s, bc, bo, cc, ci, heads, rows, 64, 64, nnz_v, nnz_s);
            }
}
"""
    folder = Path(tempfile.mkdtemp())
    (folder / "lists.cpp").write_text(shim + source[start:end] + call)
    library = folder / "lists.so"
    subprocess.run(["c++", "-O1", "-shared", "-fPIC", "-o", library, folder / "lists.cpp"], check=True)
    run = ctypes.CDLL(str(library)).run

    def convert(seqlens, v, s, context, block_m, block_n):
        batch, heads, nnz_v = v.shape
        nnz_s, rows = s.shape[-1], -(-context // block_m)
        v, s = v.contiguous(), s.contiguous()
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.int32)
        out = [
            zeros(batch, heads, rows),
            zeros(batch, heads, rows, nnz_s),
            zeros(batch, heads, rows),
            zeros(batch, heads, rows, nnz_v),
        ]
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in [seqlens, v, s, *out]]
        run(*pointers, batch, heads, rows, nnz_v, nnz_s)
        CONVERTED.append(out)
        return tuple(out)

    return convert


CONVERTED = []


def module(name, file, **given):
    """A module of theirs from its file, with what it imports from elsewhere stubbed."""
    loaded = types.ModuleType(name)
    loaded.__package__ = name.rpartition(".")[0]
    loaded.__file__ = str(CHECKOUT / file)
    loaded.__dict__.update(given)
    sys.modules[name] = loaded
    code = compile((CHECKOUT / file).read_text(), loaded.__file__, "exec")
    exec(code, loaded.__dict__)
    return loaded


def stub(name, **given):
    made = types.ModuleType(name)
    made.__path__ = []
    made.__dict__.update(given)
    sys.modules[name] = made
    return made


def load():
    for name in ["minference", "minference.ops", "minference.modules"]:
        stub(name)
    stub("minference.cuda", convert_vertical_slash_indexes=block_lists())
    # Which of several configurations is fastest does not matter here.
    triton.autotune = lambda **_: lambda kernel: kernel
    attention = module("minference.ops.pit_sparse_flash_attention_v2", "minference/ops/pit_sparse_flash_attention_v2.py")
    blocks = module("minference.ops.block_sparse_flash_attention", "minference/ops/block_sparse_flash_attention.py")
    for name in ["streaming_kernel", "flash_attn_triton"]:
        sys.modules[f"minference.ops.{name}"] = MagicMock()
    for name in ["flexprefill", "kvcompression", "quest"]:
        stub(f"minference.modules.{name}", flexprefill_forward=None, quest_forward=None)
    # Their star import brings these along.
    stub("minference.modules.snapkv", torch=torch, math=math, nn=torch.nn, F=torch.nn.functional)
    stub("transformers")
    stub("transformers.models")
    stub("transformers.models.llama")
    stub("transformers.models.llama.modeling_llama", rotate_half=None)
    stub("transformers.utils", is_flash_attn_2_available=lambda: False)
    stub("transformers.utils.import_utils", _is_package_available=lambda _: False)
    forward = module("minference.modules.minference_forward", "minference/modules/minference_forward.py")
    return attention, blocks, forward


class SinglePrecision:
    """Their kernels compute in half precision, whatever they are given; here they are to be exact."""

    def __enter__(self):
        self.half = tl.float16
        tl.float16 = tl.float32

    def __exit__(self, *_):
        tl.float16 = self.half


def short(x):
    return [float(f"{value:.7g}") for value in x.flatten().tolist()]


EVERY = 20


def vertical_slash(forward, heads, n, d, vertical, slash, seed):
    q, k, v = inputs(heads, n, d, seed)
    patterns = {str(h): ("vertical_and_slash", vertical, slash, 1) for h in range(heads)}
    config = {"best_pattern": [patterns]}
    chosen = []
    attend = forward.vertical_slash_sparse_attention

    def watched(q, k, v, columns, diagonals):
        chosen.append((columns.flatten().sort().values.tolist(), diagonals.flatten().sort().values.tolist()))
        return attend(q, k, v, columns, diagonals)

    forward.vertical_slash_sparse_attention = watched
    outs, tiles = [], []
    for head in range(heads):
        CONVERTED.clear()
        part = [x[:, head : head + 1] for x in (q, k, v)]
        with SinglePrecision():
            outs.append(forward.minference_prefill_kernel(*part, head, 0, config)[0, 0])
        counts, blocks, columns, indices = (x[0, 0] for x in CONVERTED[0])
        tiles.append(
            [
                {"blocks": blocks[t, : counts[t]].tolist(), "columns": indices[t, : columns[t]].tolist()}
                for t in range(len(counts))
            ]
        )
    forward.vertical_slash_sparse_attention = attend
    return {
        "heads": heads,
        "tokens": n,
        "dim": d,
        "seed": seed,
        "vertical": vertical,
        "slash": slash,
        "columns": [c for c, _ in chosen],
        "diagonals": [s for _, s in chosen],
        "tiles": tiles,
        "every": EVERY,
        "out": [short(out[::EVERY]) for out in outs],
    }


def block_sparse(module, heads, n, d, blocks, seed):
    q, k, v = inputs(heads, n, d, seed)
    with SinglePrecision():
        out = module.block_sparse_attention(q, k, v, blocks)[0]
    return {
        "heads": heads,
        "tokens": n,
        "dim": d,
        "seed": seed,
        "blocks": blocks,
        "every": EVERY,
        "out": [short(out[h, ::EVERY]) for h in range(heads)],
    }


def search(forward, n, d, seeds):
    found = []
    for seed in seeds:
        # Some heads look at few units, some at near ones, and some at all.
        near, factor = [(0.006, 2.0), (1.0, 2.0), (0.03, 1.0), (0.3, 0.7)][seed % 4]
        q, k, _ = inputs(1, n, d, seed, near)
        q, k = factor * q, factor * k
        name, vertical, slash, score = forward.search_pattern(q, k, 0)
        found.append({"seed": seed, "near": near, "factor": factor, "pattern": [name, vertical, slash], "score": score})
    return {"tokens": n, "dim": d, "heads": found}


def main():
    attention, blocks, forward = load()
    golden = {
        "vertical_slash": [
            vertical_slash(forward, 2, 700, 16, 40, 120, 1),
            vertical_slash(forward, 2, 448, 32, 90, 160, 2),
            vertical_slash(forward, 1, 50, 16, 30, 50, 3),
        ],
        "block_sparse": [block_sparse(blocks, 2, 500, 16, 3, 4)],
        "search": search(forward, 8000, 8, range(4, 8)),
    }
    (HERE / "golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


main()
