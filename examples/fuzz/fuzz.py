#!/usr/bin/env python3
"""Fuzzes one target: builds the fuzzer where it has to be, and runs it from the target's corpus.

    examples/fuzz/fuzz.py gguf --seconds 300         # fuzz
    examples/fuzz/fuzz.py gguf --keep 40             # and keep what reaches most in the corpus
    examples/fuzz/fuzz.py gguf --input FILE          # run one input again

Stable Rust and a C++ compiler. Crates of this workspace are built with counters at their branches, overflow checks
and debug assertions; those that they depend on are built as always.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLAGS = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Coverflow-checks=on",
    "-Cdebug-assertions=on",
]
BUILD = "cargo build --release --locked --workspace --features locret-fuzz/libfuzzer --bin fuzz"


def build() -> pathlib.Path:
    """Flags by a wrapper, so that they are those of the workspace's crates alone."""
    if os.environ.get("LOCRET_FUZZ_WRAPS"):
        # The kernels read no file; counters would make them several times slower.
        flags = [] if "locret_kernels" in sys.argv else FLAGS
        os.execvp(sys.argv[1], [*sys.argv[1:], *flags])
    environment = dict(os.environ, RUSTC_WORKSPACE_WRAPPER=str(HERE / "fuzz.py"), LOCRET_FUZZ_WRAPS="1")
    subprocess.run(BUILD.split(), cwd=ROOT, env=environment, check=True)
    target = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
    return pathlib.Path(target) / "release" / "fuzz"


def unpack(packed: pathlib.Path, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = packed.read_text().split() if packed.exists() else []
    for number, line in enumerate(lines):
        (folder / f"kept-{number}").write_bytes(bytes.fromhex(line))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=int, metavar="N", help="write the N longest of the fewest inputs that reach all into the corpus")
    parser.add_argument("--input", type=pathlib.Path)
    parser.add_argument("--built", type=pathlib.Path, help="a fuzzer that is built already")
    asked = parser.parse_args()
    fuzzer = asked.built or build()
    work = ROOT / "target" / "fuzz" / asked.target
    found, packed = work / "corpus", HERE / "corpus" / f"{asked.target}.hex"
    unpack(packed, found)
    environment = dict(os.environ, LOCRET_FUZZ=asked.target, RAYON_NUM_THREADS="1")
    # Files of each execution, in memory where there is a folder for that.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        environment["TMPDIR"] = scratch
        run = [fuzzer, "-print_final_stats=1", "-timeout=30", "-rss_limit_mb=4096", "-max_len=600"]
        run += [f"-artifact_prefix={work}/"]
        if asked.input:
            return subprocess.run([*run, asked.input.resolve()], env=environment).returncode
        run += [f"-max_total_time={asked.seconds}", f"-seed={asked.seed}", "-len_control=20", found]
        ended = subprocess.run(run, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
        (work / "log").write_text(ended.stderr)
        if ended.returncode != 0:
            sys.stderr.write(ended.stderr[-4000:])
            return ended.returncode
        counters = re.findall(r"\((\d+) inline 8-bit counters\)", ended.stderr)
        reached = re.findall(r"cov: (\d+)", ended.stderr)
        executions = re.findall(r"number_of_executed_units: (\d+)", ended.stderr)
        print(f"{asked.target}: {executions[-1]} executions in {asked.seconds} s, "
              f"{reached[-1]} of {sum(map(int, counters))} branches of the workspace, no fault")
        if asked.keep:
            with tempfile.TemporaryDirectory() as least:
                merge = [fuzzer, "-merge=1", "-max_len=600", "-timeout=30", least, found]
                subprocess.run(merge, env=environment, stderr=subprocess.DEVNULL, check=True)
                inputs = sorted((file.read_bytes() for file in pathlib.Path(least).iterdir()), key=lambda b: (len(b), b))
            packed.parent.mkdir(exist_ok=True)
            packed.write_text("".join(bytes.hex(data) + "\n" for data in inputs[-asked.keep :] if data))
    return 0


if __name__ == "__main__":
    if os.environ.get("LOCRET_FUZZ_WRAPS"):
        build()
    sys.exit(main())
