#!/usr/bin/env python3
"""What the GPU kernels become on NVIDIA's cards, without a card: CUDA C++, compiled to machine code.

    benches/cuda/inspect_kernels.py [ARCHITECTURE…] [--only TEXT] [--folder DIR] [--sources DIR]

Prints for each kernel and architecture (sm_80, sm_89, sm_90a): threads of a block, registers of a thread, bytes that
it spills to memory, bytes of shared memory of a block, blocks that fit on a multiprocessor and what part of its
threads they are, machine instructions, and among them those of tensor cores, loads of global memory, loads and stores
of shared memory, products and sums, barriers. "turn" is the shortest loop that has all instructions of tensor cores, and
how many there are in it. Ends with an error if an innermost loop, or more than one in a hundred instructions,
spills or fetches a register, if a block does not fit, or if a kernel in tiles has no instruction of tensor cores.

Needs Rust, and from PyPI, in an environment that it makes itself in the folder (target/cuda by default):
nvidia-cuda-nvrtc-cu12, nvidia-cuda-runtime-cu12, nvidia-cuda-cccl-cu12, nvidia-cuda-nvdisasm. Nothing is run.
"""

import argparse
import ctypes
import glob
import os
import pathlib
import re
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = [
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-cccl-cu12",
    "nvidia-cuda-nvdisasm",
]
# Of a multiprocessor: registers, threads, bytes of shared memory, blocks.
LIMITS = {
    "sm_80": (65536, 2048, 164 * 1024, 32),
    "sm_89": (65536, 1536, 100 * 1024, 24),
    "sm_90a": (65536, 2048, 228 * 1024, 32),
}
# What share of the instructions may move spilled registers. ptxas spills a few of them, outside of the innermost loops,
# to fit one more block, since it is not told of the shared memory, which limits blocks first.
SPILLED = 0.01
# Kernels that multiply in tensor cores.
TENSOR = "tiles, "
COUNTED = [
    ("tensor", r"[HIQ]G?MMA"),
    ("load", r"LDG"),
    ("shared", r"LDS|STS"),
    ("fma", r"FFMA|FADD|FMUL"),
    ("barrier", r"BAR"),
]


def environment(folder):
    """The folder of NVIDIA's packages, installed if need be."""
    place = folder / "venv"
    found = lambda: sorted(glob.glob(str(place / "lib/python3*/site-packages/nvidia")))
    if not found():
        venv.create(place, with_pip=True)
        subprocess.run([place / "bin/pip", "install", "-q", *PACKAGES], check=True)
    return pathlib.Path(found()[0])


def one(pattern):
    found = sorted(glob.glob(str(pattern)))
    if not found:
        sys.exit(f"no {pattern}")
    return found[0]


class Compiler:
    def __init__(self, packages):
        self.includes = [one(packages / part / "include") for part in ("cuda_runtime", "cuda_cccl")]
        self.lib = ctypes.CDLL(one(packages / "cuda_nvrtc/lib/libnvrtc.so.*"))
        self.disassembler = one(packages / "*/bin/nvdisasm")

    def binary(self, text, architecture):
        """Machine code and the assembler's words on it."""
        lib, program = self.lib, ctypes.c_void_p()
        status = lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
        options = [f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
        options += [f"--include-path={path}" for path in self.includes]
        options = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = status or lib.nvrtcCompileProgram(program, len(options), options)
        log = self.get(program, "ProgramLog").decode(errors="replace")
        if status:
            sys.exit(log)
        return self.get(program, "CUBIN"), log

    def get(self, program, what):
        size = ctypes.c_size_t()
        getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        getattr(self.lib, f"nvrtcGet{what}")(program, data)
        return data.raw

    def instructions(self, binary, path):
        path.write_bytes(binary)
        listing = subprocess.run([self.disassembler, "-c", path], capture_output=True, text=True, check=True).stdout
        path.with_suffix(".sass").write_text(listing)
        return parsed(listing)


def parsed(listing):
    """The names of a listing's instructions, and its loops: numbers of the first and the last instruction."""
    names, labels, jumps = [], {}, []
    for line in listing.split("\n"):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+(?:\.[A-Z0-9_.]+)?)(.*)", line):
            if to := found[1].startswith("BRA") and re.search(r"`\((\.L_x_\d+)\)", found[2]):
                jumps.append((len(names), to[1]))
            names.append(found[1])
    # What follows the end jumps to itself for ever.
    loops = [(labels[to], at) for at, to in jumps if labels.get(to, at) < at]
    return names, loops


def innermost(loops):
    within = lambda one, other: one != other and other[0] <= one[0] and one[1] <= other[1]
    return [loop for loop in loops if not any(within(other, loop) for other in loops)]


def turn(names, loops):
    """Instructions of the shortest loop that has all of tensor cores, and how many these are; 0 of none."""
    places = [at for at, name in enumerate(names) if re.match(COUNTED[0][1], name)]
    around = [b - a + 1 for a, b in loops if places and a <= places[0] and places[-1] <= b]
    return min(around, default=0), len(places) if around else 0


def resident(architecture, threads, registers, shared):
    """Blocks that fit on a multiprocessor."""
    all_registers, all_threads, all_shared, blocks = LIMITS[architecture]
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    by = [blocks, all_threads // (warps * 32), all_registers // (of_warp * warps)]
    # Every block takes a KiB of its own.
    by.append(all_shared // (-(-shared // 1024) * 1024 + 1024))
    return min(by)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="sm_80, sm_89, sm_90a; all of them by default")
    parser.add_argument("--only", default="", help="kernels whose names have this in them")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "target/cuda")
    parser.add_argument("--sources", type=pathlib.Path, help="CUDA C++ that `--example cuda_source` has written before")
    args = parser.parse_args()
    architectures = args.architectures or list(LIMITS)
    if unknown := [name for name in architectures if name not in LIMITS]:
        parser.error(f"unknown: {unknown}")
    sources = args.sources or args.folder / "kernels"
    cargo = ["cargo", "run", "-p", "locret-cube", "--features", "cuda-source,wgpu", "--example", "cuda_source", "--"]
    quiet = {"CARGO_INCREMENTAL": "0", "CARGO_PROFILE_DEV_DEBUG": "false"}
    if not args.sources:
        subprocess.run([*cargo, sources], cwd=ROOT, env=os.environ | quiet, check=True)
    compiler = Compiler(environment(args.folder))
    counted = [name for name, _ in COUNTED]
    print("| kernel | | threads | registers | spilled | shared | resident | occupied | instructions |", " | ".join(counted), "| turn |")
    print("|---|---|" + "--:|" * (8 + len(counted)))
    wrong = []
    for file in sorted(sources.glob("*.cu")):
        text = file.read_text()
        name, threads, shared = [line[3:] for line in text.split("\n")[:3]]
        threads, shared = int(threads.split()[0]), int(shared.split()[0])
        if args.only not in name:
            continue
        for architecture in architectures:
            binary, log = compiler.binary(text, architecture)
            number = lambda pattern: sum(int(n) for n in re.findall(pattern, log))
            registers = number(r"Used (\d+) registers")
            stored = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
            names, loops = compiler.instructions(binary, file.with_suffix(f".{architecture}.cubin"))
            of = lambda pattern: sum(bool(re.match(pattern, name)) for name in names)
            moved = [any(re.match("STL|LDL", name) for name in names[a : b + 1]) for a, b in innermost(loops)]
            blocks = resident(architecture, threads, registers, shared)
            occupied = f"{100 * blocks * threads // LIMITS[architecture][1]} %"
            counts = [of(pattern) for _, pattern in COUNTED]
            numbers = [threads, registers, stored, shared, blocks, occupied, len(names), *counts, " / ".join(map(str, turn(names, loops)))]
            print(f"| {name} | {architecture} |", " | ".join(map(str, numbers)), "|", flush=True)
            case = f"{name}, {architecture}"
            if stored / 4 > SPILLED * len(names) or any(moved):
                wrong.append(f"{case}: {stored} bytes are spilled, in {sum(moved)} innermost loops")
            if blocks == 0:
                wrong.append(f"{case}: a block does not fit")
            if name.startswith(TENSOR) and counts[0] == 0:
                wrong.append(f"{case}: no instruction of tensor cores")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
