"""SmolLM2-135M-Instruct here and in llama.cpp and transformers, on the same file, alternating.

    cargo build --release --examples
    python3 benches/peers.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --prompt-tokens 2048 --rounds 5

Packages: llama-cpp-python 0.3.36, gguf 0.19.0, numpy; for `--peers transformers` also torch 2.15.0
and transformers 5.23.0. The Rust side is the `trace` example, so that what is measured is what a
user gets. Each peer runs in a process of its own; per round every contender runs once, so that
other load on the machine meets all of them. Reported are medians, and ratios to the first peer.

Refuses to report when the other load was high: the share of processor time that this script's
children did not use is measured over each run.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent


def dequantized(source, target, kind):
    """The GGUF file with every matrix as f32 or f16."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        value, types = field.contents(), field.types
        if types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, types[-1])
        else:
            writer.add_key_value(name, value, types[0])
    writer.add_file_type(0 if kind == "f32" else 1)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind == "f16" and data.ndim == 2:
            data = data.astype(np.float16)
        writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA = """
import json, sys, time, resource
from llama_cpp import Llama
path, ids, new, flash = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3]), sys.argv[4] == "1"
m = Llama(path, n_ctx=len(ids) + new + 8, n_batch=512, n_ubatch=512, n_threads=2, n_threads_batch=2,
          flash_attn=flash, verbose=False, logits_all=False)
m.eval(ids[:64]); m.reset()
t = time.perf_counter(); m.eval(ids); prefill = time.perf_counter() - t
token = m.sample(temp=0.0); made = [token]
t = time.perf_counter()
for _ in range(new - 1):
    m.eval([token]); token = m.sample(temp=0.0); made.append(token)
decode = time.perf_counter() - t
print(json.dumps({"prefill": len(ids) / prefill, "decode": (new - 1) / decode,
                  "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "tokens": made[:8]}))
"""

TORCH = """
import json, sys, time, resource, torch
sys.path.insert(0, sys.argv[4])
import reference as ref
torch.set_num_threads(2)
ids, new = json.load(open(sys.argv[2])), int(sys.argv[3])
m = ref.load_model(ref.Gguf(sys.argv[1]))
x = torch.tensor([ids])
with torch.inference_mode():
    m(x[:, :64])
    t = time.perf_counter(); cache = None
    for i in range(0, len(ids), 512):
        out = m(x[:, i:i + 512], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
    prefill = time.perf_counter() - t
    token = out.logits[:, -1:].argmax(-1); made = [int(token)]
    t = time.perf_counter()
    for _ in range(new - 1):
        out = m(token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1); made.append(int(token))
    decode = time.perf_counter() - t
print(json.dumps({"prefill": len(ids) / prefill, "decode": (new - 1) / decode,
                  "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "tokens": made[:8]}))
"""


def ours(args, ids_file, out, extra):
    program = ROOT / "target" / "release" / "examples" / "trace"
    command = [program, "--model", args.gguf, "--ids-file", ids_file, "--chunk", "512"]
    command += ["--max-new", str(args.new), "--json", out, *extra]
    return [str(part) for part in command]


def busy():
    """Processor ticks that were not idle, over all processes."""
    with open("/proc/stat") as f:
        ticks = [int(x) for x in f.readline().split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4]


def run(command, out=None):
    usage = os.times()
    before, start = busy(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{done.stderr}")
    after = os.times()
    own = after.children_user + after.children_system - usage.children_user - usage.children_system
    other = max(0.0, (busy() - before) / os.sysconf("SC_CLK_TCK") - own) / (wall * os.cpu_count())
    if out is None:
        result = json.loads(done.stdout.strip().splitlines()[-1])
    else:
        trace = json.loads(pathlib.Path(out).read_text())
        result = {
            "prefill": trace["prefill_tokens_per_second"],
            "decode": trace["decode_tokens_per_second"],
            "tokens": trace["generated"][:8],
            "rss": trace.get("peak_process_bytes", 0),
        }
    return {**result, "cpu": own, "other": other}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("--gguf", required=True)
    ap.add_argument("--prompt-tokens", type=int, default=2048)
    ap.add_argument("--new", type=int, default=64)
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--peers", default="llama-f32,llama-f16,llama-q4")
    ap.add_argument("--max-other", type=float, default=0.10, help="share of the machine that others may use")
    ap.add_argument("--ours", action="append", default=[], metavar="NAME=FLAGS",
                    help="a contender of ours: flags of the trace example")
    args = ap.parse_args()
    golden = json.loads((ROOT / "locret-models/tests/golden/smollm2/golden.json").read_text())
    ids = next(c for c in golden["cases"] if c["name"] == "long")["ids"]
    while len(ids) < args.prompt_tokens:
        ids = ids + ids
    contenders = [spec.partition("=")[::2] for spec in args.ours] or [("ours f32, full", "--policy full")]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        ids_file, out = scratch / "ids.json", scratch / "trace.json"
        ids_file.write_text(json.dumps(ids[: args.prompt_tokens]))
        runs = {}
        for peer in args.peers.split(","):
            if peer.startswith("llama-"):
                kind = peer.removeprefix("llama-")
                path, flash = args.gguf, "1"
                if kind in ("f32", "f16"):
                    path, flash = scratch / f"{kind}.gguf", "0" if kind == "f32" else "1"
                    dequantized(args.gguf, path, kind)
                command = [sys.executable, "-c", LLAMA, path, ids_file, args.new, flash]
            elif peer == "transformers":
                command = [sys.executable, "-c", TORCH, args.gguf, ids_file, args.new,
                           ROOT / "locret-models/tests/golden/smollm2"]
            else:
                sys.exit(f"unknown peer {peer}")
            runs[peer] = ([str(part) for part in command], None)
        for name, flags in contenders:
            runs[name] = (ours(args, ids_file, out, flags.split()), out)
        results = {name: [] for name in runs}
        for round_ in range(args.rounds):
            for name, (command, file) in runs.items():
                results[name].append(run(command, file))
                last = results[name][-1]
                print(f"round {round_ + 1}, {name}: {last['prefill']:.0f} / {last['decode']:.1f} tok/s, "
                      f"other load {last['other']:.0%}", file=sys.stderr)
    other = statistics.median(r["other"] for all_ in results.values() for r in all_)
    if other > args.max_other:
        sys.exit(f"not reported: other processes used {other:.0%} of the machine (at most {args.max_other:.0%})")
    median = lambda name, key: statistics.median(r[key] for r in results[name])
    first = next(iter(results))
    print(f"{args.prompt_tokens} tokens in chunks of 512, {args.new} generated, medians of {args.rounds} "
          f"alternating rounds, other load {other:.0%}\n")
    print("| | prefill tok/s | × | decode tok/s | × | CPU s | peak MiB |\n|---|---|---|---|---|---|---|")
    for name in results:
        p, d = median(name, "prefill"), median(name, "decode")
        print(f"| {name} | {p:.0f} | {p / median(first, 'prefill'):.2f} | {d:.1f} | "
              f"{d / median(first, 'decode'):.2f} | {median(name, 'cpu'):.1f} | {median(name, 'rss') / 2**20:.0f} |")


if __name__ == "__main__":
    main()
