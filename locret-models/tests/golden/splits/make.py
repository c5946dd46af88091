"""How the tokenizers library splits, with the splitting rules of several families' tokenizer.json.

    python3 make.py

Packages: tokenizers 0.23.3, gguf 0.19.0. Half a minute. Deterministic.

vocabulary.gguf: a byte-level vocabulary of some 1,300 tokens. It is trained on pieces between white
                 space, so that its merges cross digits, capitals, contractions and punctuation: wherever
                 two rules split differently, ids differ. `tokenizer.ggml.pre` is "qwen2"; the others
                 are that file with another name there.
golden.json:     for each rule the tokenizer.json without its vocabulary and merges, and what it makes
                 of the texts of ../vocabularies/make.py: how many ids there are, the SHA-256 of all of
                 them, and the ids of the first texts. `texts` has the SHA-256 of the texts.

The rules are those of the published tokenizer.json of Qwen2.5 and Qwen3 (qwen2), Phi-4-mini (gpt-4o),
Mistral-Nemo (tekken), Llama 3 (llama-bpe), Phi-4 (dbrx) and SmolLM2 (smollm).
"""

import hashlib
import json
import pathlib
import sys

import gguf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(HERE.parent / "vocabularies"))
sys.modules.setdefault("sentencepiece", type(sys)("sentencepiece"))  # of the other script, not needed here
from make import summary, texts  # noqa: E402

TOKENS = 1300
WORDS = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
CAPITALS = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACE = "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
LETTERS = "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
SIGNS = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
SLASHES = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*"
LEAD = "[^\\r\\n\\p{L}\\p{N}]?"
LLAMA3 = SHORT + LETTERS + "|\\p{N}{1,3}" + SIGNS + SPACE
PATTERNS = {
    "llama-bpe": LLAMA3,
    "dbrx": LLAMA3,
    "qwen2": SHORT + LETTERS + "|\\p{N}" + SIGNS + SPACE,
    "gpt-4o": f"{LEAD}{WORDS}{SHORT}?|{LEAD}{CAPITALS}{SHORT}?|\\p{{N}}{{1,3}}{SLASHES}{SPACE}",
    "tekken": f"{LEAD}{WORDS}|{LEAD}{CAPITALS}|\\p{{N}}{SLASHES}{SPACE}",
    "smollm": None,
}


def train(corpus):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\\s?\\S+|\\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


def tokenizer(name, vocab, merges):
    whole = name in ("llama-bpe", "tekken")
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    pattern = PATTERNS[name]
    if pattern is None:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=True)]
    else:
        parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    if name == "qwen2":
        made.normalizer = normalizers.NFC()
    return made


def main():
    corpus = list(texts())
    vocab, merges = train(corpus)
    tokens = sorted(vocab, key=vocab.get)
    writer = gguf.GGUFWriter(HERE / "vocabulary.gguf", "none")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    golden = {"texts": hashlib.sha256("\0".join(corpus).encode()).hexdigest(), "rules": {}}
    for name in PATTERNS:
        made = tokenizer(name, vocab, merges)
        file = json.loads(made.to_str())
        file["model"]["vocab"], file["model"]["merges"] = {}, []
        golden["rules"][name] = {"tokenizer": file, **summary(lambda t: made.encode(t).ids, corpus)}
    sums = {name: rule["sha256"] for name, rule in golden["rules"].items()}
    assert len(set(sums.values())) >= 5, sums
    text = json.dumps(golden, separators=(",", ":")).replace("]],", "]],\n")
    (HERE / "golden.json").write_text(text.replace("},", "},\n") + "\n")
    print(sums)


if __name__ == "__main__":
    main()
