"""SmolLM2-135M-Instruct here and in llama.cpp, candle and transformers, each at its best: same file, same prompt.

    cargo build --release --workspace --bin measure
    python3 benches/peers.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --heads heads.safetensors --write

Packages: llama-cpp-python 0.3.36, gguf 0.19.0, numpy, torch 2.15.0, transformers 5.23.0. candle 0.11.1 is built by
cargo from `benches/candle` (some minutes).

What is measured here is the `measure` program. Every run is a process of its own; each warms up on a short text
before its clock starts. All read the prompt in chunks of 512 with two threads. Matrices of the same file are used as
they are (Q4_1), or as the f32 or f16 numbers they stand for (transformers: bf16). Keys and values here are f16 in full
caches and f32 in bounded ones.

First every setting of every peer runs (--screen rounds): llama.cpp with flash attention and without, keys and values in
f16, f32 and 8 bits (which it has with flash attention alone); transformers with its fused attention and the plain one.
Of each kind of weights the settings that read fastest and those that decode fastest then race against ours: in a
round every contender runs once, there and back, so that other load on the machine meets all of them. Reported are
medians of the race, and ratios of medians to the best peer's.

Three groups: a prompt of 2,048 tokens; one of 8,000 (--long-rounds); and 4,096 beside 32,768 (--stream-rounds). The
peer's memory at 32,768 tokens is that of a context of this length of which only 512 tokens were read, which is less than
what reading all takes: that would be minutes.

--k-quants measures another group and nothing else: a model in `Q4_K_M` as llama.cpp quantises it. Rows of such
blocks have a multiple of 256 columns, as 576 is not, so that SmolLM2 would be mostly of other types. Its weights
are random, in Llama's architecture: 1,024 features, 16 and 4 heads of 64, 2,816 between, 8 layers, and the
vocabulary of the file.

With --keep a run that was stopped goes on where it was.

Refuses to report when the other load was high: the share of processor time that this script's
children did not use is measured over each run. --allow-busy reports all the same, and says so.
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

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"
K_MARKS = "<!-- k-quants:begin -->", "<!-- k-quants:end -->"

# Runs in a process of its own: the memory of this one would count as the peak of its children.
DEQUANTIZE = """
import sys, gguf, numpy as np
source, target, kind = sys.argv[1:]
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
"""

# Random weights in Llama's shape and the vocabulary of a file, as llama.cpp quantises them.
K_QUANTS = """
import sys, gguf, llama_cpp, numpy as np
source, wide, target = sys.argv[1:]
HIDDEN, HEADS, KV, INNER, LAYERS = 1024, 16, 4, 2816, 8
reader = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(wide, "llama")
for name, field in reader.fields.items():
    if not name.startswith("tokenizer."):
        continue
    value, types = field.contents(), field.types
    if types[0] == gguf.GGUFValueType.ARRAY:
        writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, types[-1])
    else:
        writer.add_key_value(name, value, types[0])
vocab = len(reader.fields["tokenizer.ggml.tokens"].contents())
writer.add_file_type(1)
writer.add_block_count(LAYERS)
writer.add_context_length(8192)
writer.add_embedding_length(HIDDEN)
writer.add_feed_forward_length(INNER)
writer.add_head_count(HEADS)
writer.add_head_count_kv(KV)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(HIDDEN // HEADS)
writer.add_rope_freq_base(10000.0)
writer.add_vocab_size(vocab)
rng = np.random.default_rng(7)
def matrix(name, rows, columns):
    data = rng.standard_normal((rows, columns), dtype=np.float32) / np.sqrt(columns)
    writer.add_tensor(name + ".weight", data.astype(np.float16))
def norm(name):
    writer.add_tensor(name + ".weight", np.ones(HIDDEN, dtype=np.float32))
matrix("token_embd", vocab, HIDDEN)
matrix("output", vocab, HIDDEN)
norm("output_norm")
for layer in range(LAYERS):
    own = f"blk.{layer}."
    for name in ("attn_norm", "ffn_norm"):
        norm(own + name)
    for name, rows, columns in (
        ("attn_q", HIDDEN, HIDDEN), ("attn_k", HIDDEN * KV // HEADS, HIDDEN), ("attn_v", HIDDEN * KV // HEADS, HIDDEN),
        ("attn_output", HIDDEN, HIDDEN), ("ffn_gate", INNER, HIDDEN), ("ffn_up", INNER, HIDDEN), ("ffn_down", HIDDEN, INNER),
    ):
        matrix(own + name, rows, columns)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 2
if llama_cpp.llama_model_quantize(wide.encode(), target.encode(), params) != 0:
    sys.exit("llama.cpp did not quantise the model")
"""

LLAMA = """
import json, resource, sys, time, llama_cpp
from llama_cpp import Llama
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
path, ids, new, flash, context, kv = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5]), int(sys.argv[6])
imported = rss()
m = Llama(path, n_ctx=max(context, len(ids) + new + 8), n_batch=512, n_ubatch=512, n_threads=2, type_k=kv, type_v=kv,
          n_threads_batch=2, flash_attn=flash, verbose=False, logits_all=False)
m.eval(ids[:64]); m.eval([m.sample(temp=0.0)]); m.reset()
t = time.perf_counter(); m.eval(ids); prefill = time.perf_counter() - t
token = m.sample(temp=0.0); made = [token]
t = time.perf_counter()
for _ in range(new - 1):
    m.eval([token]); token = m.sample(temp=0.0); made.append(token)
decode = time.perf_counter() - t
built = " ".join(part.partition(" = ")[0].strip() for part in llama_cpp.llama_print_system_info().decode().split("|") if part.strip().endswith("= 1"))
print(json.dumps({"prefill": len(ids) / prefill, "decode": (new - 1) / decode if new > 1 else 0.0,
                  "interpreter": imported, "tokens": made[:8], "system": built}))
"""

TORCH = """
import json, resource, sys, time, torch
sys.path.insert(0, sys.argv[4])
import reference as ref
torch.set_num_threads(2)
ids, new = json.load(open(sys.argv[2])), int(sys.argv[3])
m = ref.load_model(ref.Gguf(sys.argv[1])).to(getattr(torch, sys.argv[6]))
m.set_attn_implementation(sys.argv[5])
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
print(json.dumps({"prefill": len(ids) / prefill, "decode": (new - 1) / decode if new > 1 else 0.0,
                  "tokens": made[:8]}))
"""


def busy():
    """Processor seconds of all processes that were not idle."""
    with open("/proc/stat") as f:
        ticks = [int(x) for x in f.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def run(command):
    """One process: what it says of itself, its processor time, its peak memory, and other load."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        before, start = busy(), time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall, after = time.perf_counter() - start, busy()
        out.seek(0), err.seek(0)
        if child.returncode != 0:
            sys.exit(f"{command[0]} failed ({child.returncode}):\n{err.read()[-4000:]}")
        result = json.loads(out.read().strip().splitlines()[-1])
    own = usage.ru_utime + usage.ru_stime
    result["cpu"] = own
    result["rss"] = usage.ru_maxrss * 1024 - result.pop("interpreter", 0)
    result["other"] = max(0.0, after - before - own) / (wall * os.cpu_count())
    return result


class Bench:
    """Contenders by group, and what their runs gave."""

    def __init__(self, args, scratch):
        self.args, self.scratch, self.prompts, self.results, self.best = args, scratch, {}, {}, {}
        golden = json.loads((ROOT / "locret-models/tests/golden/smollm2/golden.json").read_text())
        self.ids = next(c for c in golden["cases"] if c["name"] == "long")["ids"]
        self.files = {"q4": args.gguf}
        if args.keep and args.keep.is_file():
            for line in args.keep.read_text().splitlines():
                name, result = json.loads(line)
                self.results.setdefault(name, []).append(result)

    def prompt(self, tokens):
        if tokens not in self.prompts:
            ids = (self.ids * (tokens // len(self.ids) + 1))[:tokens]
            self.prompts[tokens] = self.scratch / f"{tokens}.json"
            self.prompts[tokens].write_text(json.dumps(ids))
        return self.prompts[tokens]

    def file(self, kind):
        if kind not in self.files:
            path = self.scratch / f"{kind}.gguf"
            subprocess.run([sys.executable, "-c", DEQUANTIZE, self.args.gguf, path, kind], check=True)
            self.files[kind] = path
        return self.files[kind]

    def k_quants(self):
        path, wide = self.scratch / "k.gguf", self.scratch / "k-f16.gguf"
        subprocess.run([sys.executable, "-c", K_QUANTS, self.args.gguf, wide, path], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wide.unlink()
        self.files["k"] = path

    def ours(self, kind, tokens, new, *flags):
        weights = {"q4": "file", "k": "file"}.get(kind, kind)
        model = self.files["k"] if kind == "k" else self.args.gguf
        return [self.args.measure, "--model", model, "--weights", weights, "--chunk", "512", "--ids-file", self.prompt(tokens), "--max-new", new, *flags]

    def peers(self, kind):
        """All settings of all peers for one kind of weights: names, and commands of a prompt and new tokens."""
        types = {"f16": 1, "f32": 0, "q8_0": 8}
        found = {}
        for flash, kv in (("flash", "f16"), ("flash", "q8_0"), ("flash", "f32"), ("no flash", "f16"), ("no flash", "f32")):
            found[f"llama.cpp {NAMES[kind]}, {flash}, cache {kv}"] = lambda tokens, new, context=0, flash=flash, kv=kv: [
                sys.executable, "-c", LLAMA, self.file(kind), self.prompt(tokens), new, int(flash == "flash"), context,
                types[kv]]
        if self.args.candle:
            found[f"candle {NAMES[kind]}"] = lambda tokens, new: [
                self.args.candle, self.file(kind), self.prompt(tokens), new]
        dtype = {"f32": "float32", "f16": "bfloat16"}.get(kind)
        if dtype and not self.args.no_transformers:
            for attention in ("sdpa", "eager"):
                found[f"transformers {dtype}, {attention}"] = lambda tokens, new, attention=attention: [
                    sys.executable, "-c", TORCH, self.args.gguf, self.prompt(tokens), new,
                    ROOT / "locret-models/tests/golden/smollm2", attention, dtype]
        return found

    def group(self, rounds, contenders):
        """Runs all contenders, one after the other, as often as there are rounds; there and back,
        since what ran before leaves a machine warm or memory in pieces."""
        for round_ in range(rounds):
            turn = list(contenders.items())
            for name, command in turn[::-1] if round_ % 2 else turn:
                if len(self.results.setdefault(name, [])) > round_:
                    continue
                result = run([str(part) for part in command])
                self.results[name].append(result)
                if self.args.keep:
                    with open(self.args.keep, "a") as kept:
                        kept.write(json.dumps([name, result]) + "\n")
                print(f"round {round_ + 1} of {rounds}, {name}: {result['prefill']:.0f} / "
                      f"{result['decode']:.1f} tok/s, {result['cpu']:.1f} CPU s, "
                      f"{result['rss'] / 2**20:.0f} MiB, other load {result['other']:.0%}",
                      file=sys.stderr)

    def median(self, name, key):
        return statistics.median(r[key] for r in self.results[name])

    def other(self):
        return statistics.median(r["other"] for runs in self.results.values() for r in runs)


FULL = ["--policy", "full", "--local", "0", "--kv", "f16"]
NAMES = {"f32": "f32", "f16": "f16", "q4": "Q4_1", "k": "Q4_K_M"}
# What is asked of a prompt's and of decoded tokens' rates, beside the best peer's.
ASKED = {"f32": (1.15, 1.15), "f16": (1.15, 1.15), "q4": (1.15, 1.25), "k": (1.15, 1.25)}


def race(bench, args, kinds):
    """Screens the peers of these kinds of weights and lets the best ones race against ours."""
    for kind in kinds:
        settings = bench.peers(kind)
        bench.group(args.screen, {f"screen: {name}": command(args.short, args.new) for name, command in settings.items()})
        for phase in ("prefill", "decode"):
            best = max(settings, key=lambda name: bench.median(f"screen: {name}", phase))
            bench.best[kind, phase] = best, settings[best]
    contenders = {}
    for kind in kinds:
        contenders[f"ours {NAMES[kind]}"] = bench.ours(kind, args.short, args.new, *FULL)
        for phase in ("prefill", "decode"):
            name, command = bench.best[kind, phase]
            contenders[name] = command(args.short, args.new)
    bench.group(args.rounds, contenders)
    few = {}
    for kind in kinds:
        few[f"ours {NAMES[kind]}, 64 tokens"] = bench.ours(kind, 64, args.new, *FULL)
        for phase in ("prefill", "decode"):
            name, command = bench.best[kind, phase]
            few[f"{name}, 64 tokens"] = command(64, args.new)
    bench.group(args.rounds, few)


def measure(bench, args):
    """Runs everything; the bounded policy's flags and name."""
    long, near, far, new = args.long, args.near, args.far, args.new
    window = ["--policy", "window", "--budget", args.budget]
    bounded, name = window, "Window"
    if args.heads:
        bounded, name = ["--policy", "locret", "--budget", args.budget, "--heads", args.heads], "Locret"
    race(bench, args, ["f32", "f16", "q4"])
    contenders = {f"ours f16, {name}, long": bench.ours("f16", long, new, *bounded)}
    if args.heads:
        contenders["ours f16, Window, long"] = bench.ours("f16", long, new, *window)
    for phase in ("prefill", "decode"):
        peer, command = bench.best["f16", phase]
        contenders[f"{peer}, long"] = command(long, new)
    bench.group(args.long_rounds, contenders)
    if args.stream_rounds == 0:
        return name
    stream = bench.peers("q4")["llama.cpp Q4_1, flash, cache f16"]
    bench.group(args.stream_rounds, {
        f"ours q4, {name}, near": bench.ours("q4", near, 2, *bounded),
        f"ours q4, {name}, far": bench.ours("q4", far, 2, *bounded),
        "llama.cpp q4, far": stream(min(512, far), 2, far),
    })
    return name


def measure_k(bench, args):
    """Runs the group of K-quants."""
    bench.k_quants()
    race(bench, args, ["k"])


def raced(bench, args, kinds):
    """Rows of a race: what, ours, the best peer, ratio, sign, target."""
    rows = []
    for kind in kinds:
        for phase, target in zip(("prefill", "decode"), ASKED[kind]):
            for after, tokens in (("", args.short), (", 64 tokens", 64)):
                ours = f"ours {NAMES[kind]}{after}"
                peers = {bench.best[kind, p][0] + after for p in ("prefill", "decode")}
                best = max(sorted(peers), key=lambda name: bench.median(name, phase))
                rate, other = bench.median(ours, phase), bench.median(best, phase)
                if after and phase == "prefill":
                    rows.append((f"first token of 64, {NAMES[kind]}", f"{64e3 / rate:.0f} ms",
                                 f"{best.removesuffix(after)}: {64e3 / other:.0f} ms", rate / other, "≥", None))
                    continue
                work = f"prefill {tokens:,}" if phase == "prefill" else f"decode at {tokens:,}"
                rows.append((f"{work}, {NAMES[kind]}", f"{rate:.1f} tok/s",
                             f"{best.removesuffix(after)}: {other:.1f} tok/s", rate / other, "≥",
                             target if not after else None))
    return rows


def table(bench, args, rows, rounds):
    """The tables, in Markdown."""
    lines = []
    if bench.other() > args.max_other:
        lines += [f"**Other processes used {bench.other():.0%} of the machine: no figures to rely on.**", ""]
    packages = ["llama-cpp-python 0.3.36"] + ["candle 0.11.1"] * bool(args.candle) + [
        "transformers 5.23.0"] * (not args.no_transformers)
    lines += [f"{cpu()}, two threads; {', '.join(packages)}; medians of {rounds}; other load {bench.other():.0%}."]
    built = {r["system"] for runs in bench.results.values() for r in runs if "system" in r}
    lines += [f"llama.cpp was built with {text}." for text in sorted(built)]
    lines += ["", "| work | here | the best peer at its best | ratio | asked for | |", "|---|---|---|---|---|---|"]
    for work, ours, peer, ratio, sign, target in rows:
        asked, met = "", ""
        if target is not None:
            asked = f"{sign} {target:.2f}"
            met = "met" if (ratio >= target if sign == "≥" else ratio <= target) else "missed"
        lines.append(f"| {work} | {ours} | {peer} | {ratio:.2f} | {asked} | {met} |")
    m = bench.median
    lines += ["", "| run | prefill tok/s | decode tok/s | CPU s | peak MiB |", "|---|---|---|---|---|"]
    lines += [f"| {run_} | {m(run_, 'prefill'):.0f} | {m(run_, 'decode'):.1f} | {m(run_, 'cpu'):.1f} | "
              f"{m(run_, 'rss') / 2**20:.0f} |" for run_ in bench.results if not run_.startswith("screen: ")]
    lines += ["", f"All settings, {'one run' if args.screen == 1 else f'medians of {args.screen} runs'} each:", "",
              "| setting | prefill tok/s | decode tok/s |", "|---|---|---|"]
    lines += [f"| {run_.removeprefix('screen: ')} | {m(run_, 'prefill'):.0f} | {m(run_, 'decode'):.1f} |"
              for run_ in bench.results if run_.startswith("screen: ")]
    return "\n".join(lines)


def report_k(bench, args):
    """The tables of K-quants, in Markdown."""
    return table(bench, args, raced(bench, args, ["k"]), f"{args.rounds} rounds")


def report(bench, args, name):
    """The tables, in Markdown."""
    m = bench.median
    prefill = {n: m(n, "prefill") for n in bench.results}
    decode = {n: m(n, "decode") for n in bench.results}
    bounded, near, far = f"ours f16, {name}, long", f"ours q4, {name}, near", f"ours q4, {name}, far"
    n = lambda x: f"{x:,}"
    short, long, at = n(args.short), n(args.long), f"{name} budget {n(args.budget)}"
    rows = raced(bench, args, ["f32", "f16", "q4"])
    for work, rates in ((f"prefill {long}", prefill), (f"decode after {long}", decode)):
        peers = {bench.best["f16", p][0] + ", long" for p in ("prefill", "decode")}
        best = max(sorted(peers), key=rates.get)
        rows.append((f"{work}, {at}, f16", f"{rates[bounded]:.1f} tok/s",
                     f"{best.removesuffix(', long')}: {rates[best]:.1f} tok/s", rates[bounded] / rates[best], "≥", 2.0))
    if args.stream_rounds > 0:
        rows.append((f"time per token of {n(args.far)} over {n(args.near)}, {at}, Q4_1", f"{1e3 / prefill[far]:.2f} ms",
                     f"{1e3 / prefill[near]:.2f} ms", prefill[near] / prefill[far], "≤", 1.05))
    if args.heads:
        window = "ours f16, Window, long"
        rows.append((f"Locret over Window, budget {n(args.budget)}, prefill {long}",
                     f"{args.long / prefill[bounded]:.1f} s", f"{args.long / prefill[window]:.1f} s",
                     prefill[window] / prefill[bounded], "≤", 1.05))
    rounds = f"{args.rounds} rounds ({short} tokens), {args.long_rounds} ({long})"
    if args.stream_rounds > 0:
        ours, theirs = m(far, "rss"), m("llama.cpp q4, far", "rss")
        rows.append((f"peak memory, {n(args.far)} tokens, {at}, Q4_1", f"{ours / 2**20:.0f} MiB",
                     f"llama.cpp Q4_1: {theirs / 2**20:.0f} MiB", ours / theirs, "≤", 0.5))
        rounds += f" and {args.stream_rounds} ({n(args.far)})"
    return table(bench, args, rows, rounds)


def candle():
    """Builds candle's program; where it is."""
    folder = HERE / "candle"
    subprocess.run(["cargo", "build", "--release", "--manifest-path", folder / "Cargo.toml", "--target-dir",
                    ROOT / "target/candle"], check=True)
    return ROOT / "target/candle/release/candle-peer"


def cpu():
    """What processor this is."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    isa = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{names[0] if names else 'unknown processor'} ({os.cpu_count()} cores, {isa})"


def write(text, begin=BEGIN, end=END):
    """Puts the tables between their markers in docs/performance.md."""
    path = ROOT / "docs/performance.md"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{path} has no {begin} … {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--gguf", required=True, type=pathlib.Path)
    ap.add_argument("--heads", type=pathlib.Path, help="Locret's retaining heads; without them Window stands in")
    ap.add_argument("--measure", type=pathlib.Path, default=ROOT / "target/release/measure", help="our program")
    ap.add_argument("--budget", type=int, default=1024)
    ap.add_argument("--new", type=int, default=64, help="tokens to generate")
    ap.add_argument("--short", type=int, default=2048, help="tokens of the short prompt")
    ap.add_argument("--long", type=int, default=8000, help="tokens of the long prompt")
    ap.add_argument("--near", type=int, default=4096, help="tokens of the shorter stream")
    ap.add_argument("--far", type=int, default=32768, help="tokens of the longer stream")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--long-rounds", type=int, default=3)
    ap.add_argument("--stream-rounds", type=int, default=1, help="0 leaves this group out")
    ap.add_argument("--k-quants", action="store_true", help="a model in Q4_K_M, and nothing else")
    ap.add_argument("--keep", type=pathlib.Path, help="runs are kept in this file, and those that it has are not repeated")
    ap.add_argument("--screen", type=int, default=1, help="rounds in which all settings of the peers run")
    ap.add_argument("--no-transformers", action="store_true")
    ap.add_argument("--no-candle", action="store_true")
    ap.add_argument("--max-other", type=float, default=0.10, help="share of the machine that others may use")
    ap.add_argument("--allow-busy", action="store_true", help="report on a busy machine, too; the table says so")
    ap.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = ap.parse_args()
    for file in (args.gguf, args.measure, args.heads):
        if file is not None and not file.is_file():
            sys.exit(f"{file} is not there")
    args.candle = None if args.no_candle else candle()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, pathlib.Path(scratch))
        name = measure_k(bench, args) if args.k_quants else measure(bench, args)
        file = "peers-k-quants.json" if args.k_quants else "peers.json"
        (ROOT / "target" / file).write_text(json.dumps(bench.results, indent=1))
    print(f"took {(time.perf_counter() - started) / 60:.1f} minutes", file=sys.stderr)
    if bench.other() > args.max_other and not args.allow_busy:
        sys.exit(f"not reported: other processes used {bench.other():.0%} of the machine "
                 f"(at most {args.max_other:.0%}; --allow-busy reports all the same)")
    text = report_k(bench, args) if args.k_quants else report(bench, args, name)
    print(text)
    if args.write:
        write(text, *(K_MARKS if args.k_quants else (BEGIN, END)))


if __name__ == "__main__":
    main()
