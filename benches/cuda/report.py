#!/usr/bin/env python3
"""What `run` has left in a folder, as a section of docs/performance.md.

    benches/cuda/report.py target/cuda-out            # prints it
    benches/cuda/report.py target/cuda-out --write    # between the markers
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BEGIN, END = "<!-- cuda:begin -->", "<!-- cuda:end -->"
GIB = 1 << 30
GROUPS = {
    "two-layers": "two layers of Llama-3.1-8B, bf16",
    "all-layers": "Llama-3.1-8B, bf16",
    "smollm2": "SmolLM2-135M, f32",
}
POLICIES = {"locret": "Locret", "window": "Window", "full": "full cache"}


def figures(folder):
    file = folder / "figures.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def row(line):
    group, _, name = line["step"].partition(".")
    found = line["figures"]
    if group == "peer":
        shape, who, planned = GROUPS.get(name, name), found["who"], ""
        taken = found.get("torch_bytes")
    else:
        shape, who = GROUPS.get(group, group), POLICIES.get(name, name)
        planned = f"{found['plan']['total'] / GIB:.2f} GiB"
        taken = None if line["device_mib"] is None else line["device_mib"] << 20
    memory = "" if not taken else f"{taken / GIB:.2f} GiB"
    decode = f"{found['decode']:.1f}" if found["decode"] else "not reached"
    return [shape, who, f"{found['prompt']:,}", f"{found['prefill']:,.0f}", decode, memory, planned]


def section(folder):
    lines = figures(folder)
    about = folder / "about.txt"
    notes = about.read_text().strip().splitlines() if about.exists() else []
    if not lines:
        sys.exit(f"{folder}: no figures.jsonl with a line in it")
    out = [
        "Random weights; tokens a second. Memory is the most that the card had in use, less what it had before; for",
        "the peer what torch took. A run stops reading when its time is up: the tokens are those that were read.",
        "",
        "| model | cache | prompt | prefill | decode | memory | plan |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    out += ["| " + " | ".join(row(line)) + " |" for line in lines]
    out += ["", "```text", *notes, "```"]
    return "\n".join(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--write", nargs="?", const=ROOT / "docs/performance.md", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()
    made = section(args.folder)
    if args.write is None:
        print(made)
        return
    text = args.write.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{args.write}: no {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    args.write.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
