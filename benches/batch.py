"""Several sequences at once, here and in llama.cpp: SmolLM2-135M-Instruct, f16, alternating.

    cargo build --release --workspace --bin measure
    python3 benches/batch.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --write

Packages: llama-cpp-python 0.3.36, gguf 0.19.0, numpy. What is measured, how, and when nothing is reported is
as in peers.py, whose machinery this uses.

Each sequence has a prompt of its own and a full cache of f16 units, and generates greedily; reported are the
tokens of all of them together per second, once all prompts are read. llama.cpp decodes them in one batch
(`llama_batch`, one sequence id each), with flash attention and without, of which the better one counts. Its
tokens are chosen by numpy's argmax, which the script leaves out of its time; ours are in it.
"""

import argparse
import pathlib
import sys
import tempfile

import peers

BEGIN, END = "<!-- batch:begin -->", "<!-- batch:end -->"

LLAMA = """
import json, resource, sys, time
import ctypes, numpy as np, llama_cpp as L
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
path, ids, new, flash, n = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5])
imported = rss()
silent = L.llama_log_callback(lambda *_: None)
L.llama_log_set(silent, ctypes.c_void_p(0))
L.llama_backend_init()
model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
p = L.llama_context_default_params()
p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = n * (len(ids) + new + 64), 512, 512, n
p.n_threads = p.n_threads_batch = 2
p.kv_unified = sys.argv[6] == "1"
p.flash_attn_type = 1 if flash else 0
ctx = L.llama_init_from_model(model, p)
assert ctx, "no context"
batch = L.llama_batch_init(512, 0, 1)
def fill(rows):
    batch.n_tokens = len(rows)
    for i, (token, pos, seq, wanted) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, 1, wanted
        batch.seq_id[i][0] = seq
def best(i):
    return int(np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, i), (vocab,)).argmax())
def decode():
    assert L.llama_decode(ctx, batch) == 0, "llama_decode"
    L.llama_synchronize(ctx)
fill([(t, i, 0, i == 63) for i, t in enumerate(ids[:64])]); decode()
L.llama_memory_clear(L.llama_get_memory(ctx), True)
tokens, prefill = [], 0.0
for s in range(n):
    turn = s * len(ids) // n
    own = ids[turn:] + ids[:turn]
    for at in range(0, len(own), 512):
        piece = own[at:at + 512]
        fill([(t, at + i, s, at + i == len(own) - 1) for i, t in enumerate(piece)])
        t = time.perf_counter(); decode(); prefill += time.perf_counter() - t
    tokens.append(best(len(piece) - 1))
made, spent = [tokens[0]], 0.0
for step in range(new - 1):
    fill([(t, len(ids) + step, s, True) for s, t in enumerate(tokens)])
    t = time.perf_counter(); decode(); spent += time.perf_counter() - t
    tokens = [best(i) for i in range(n)]
    made.append(tokens[0])
print(json.dumps({"prefill": n * len(ids) / prefill, "decode": n * (new - 1) / spent,
                  "interpreter": imported, "tokens": made[:8]}))
"""


def measure(bench, args):
    """Runs everything."""
    full = ["--policy", "full", "--local", "0", "--kv", "f16"]
    ours = lambda n: bench.ours("f16", args.tokens, args.new, *full, "--sequences", n)
    llama = lambda n, flash, unified: [sys.executable, "-c", LLAMA, bench.file("f16"), bench.prompt(args.tokens),
                                       args.new, int(flash), n, int(unified)]
    contenders = {}
    for n in args.sequences:
        contenders[f"ours, {n}"] = ours(n)
        if n > 1:
            contenders[f"llama.cpp, {n}, flash"] = llama(n, True, False)
            contenders[f"llama.cpp, {n}, flash, one cache"] = llama(n, True, True)
            contenders[f"llama.cpp, {n}"] = llama(n, False, False)
            contenders[f"llama.cpp, {n}, one cache"] = llama(n, False, True)
    bench.group(args.rounds, contenders)


def report(bench, args):
    """The table, in Markdown."""
    decode = {name: bench.median(name, "decode") for name in bench.results}
    lone = decode["ours, 1"]
    lines = [
        f"{peers.cpu()}, two threads; llama-cpp-python 0.3.36; medians of {args.rounds} rounds; prompts of "
        f"{args.tokens} tokens, {args.new} generated; other load {bench.other():.0%}.",
        "",
        "| sequences at once | here, tok/s | to one | llama.cpp at its best, tok/s | ratio |",
        "|--:|--:|--:|---|--:|",
        f"| 1 | {lone:.1f} | | | |",
    ]
    for n in args.sequences:
        rivals = [name for name in decode if name.startswith(f"llama.cpp, {n}") and name[len(f"llama.cpp, {n}"):][:1] in ("", ",")]
        if not rivals:
            continue
        best = max(rivals, key=decode.get)
        own = decode[f"ours, {n}"]
        how = best.removeprefix(f"llama.cpp, {n}").removeprefix(", ") or "no flash"
        lines.append(f"| {n} | {own:.1f} | {own / lone:.2f} × | {decode[best]:.1f} ({how}) | {own / decode[best]:.2f} × |")
    lines += ["", "| run | prefill tok/s | decode tok/s | peak MiB |", "|---|--:|--:|--:|"]
    for name in bench.results:
        lines.append(f"| {name} | {bench.median(name, 'prefill'):.0f} | {decode[name]:.1f} | "
                     f"{bench.median(name, 'rss') / 2**20:.0f} |")
    return "\n".join(lines)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--gguf", required=True, type=pathlib.Path)
    ap.add_argument("--measure", type=pathlib.Path, default=peers.ROOT / "target/release/measure", help="our program")
    ap.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    ap.add_argument("--tokens", type=int, default=448, help="tokens of a prompt")
    ap.add_argument("--new", type=int, default=64, help="tokens to generate")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--keep", type=pathlib.Path, help="runs are kept in this file, and those that it has are not repeated")
    ap.add_argument("--max-other", type=float, default=0.10, help="share of the machine that others may use")
    ap.add_argument("--allow-busy", action="store_true", help="report on a busy machine, too; the table says so")
    ap.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = peers.Bench(args, pathlib.Path(scratch))
        measure(bench, args)
    if bench.other() > args.max_other and not args.allow_busy:
        sys.exit(f"not reported: other processes used {bench.other():.0%} of the machine")
    text = report(bench, args)
    print(text)
    if args.write:
        peers.write(text, BEGIN, END)


if __name__ == "__main__":
    main()
