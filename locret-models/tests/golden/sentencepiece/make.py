"""A small SentencePiece BPE vocabulary as a GGUF file, and what SentencePiece makes of some texts.

    python3 make.py

Packages: gguf 0.19.0, sentencepiece 0.2.3, tokenizers 0.23.3. Deterministic.

vocabulary.gguf: 450 pieces with byte fallback, trained on the text below; no tensors.
tokenizer.json:  the same as a file of the tokenizers library, in the way Llama 2 is published.
golden.json:     texts[] = {text, ids, decoded}: SentencePiece's own ids (no <s> in front) and text.
"""

import io
import json
import pathlib

import gguf
import sentencepiece as spm
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

HERE = pathlib.Path(__file__).parent

WORDS = (
    "the keeper of the lighthouse wrote every evening that the wind came from the north and that "
    "two ships had passed the harbour while the lamp was burning brightly over the water "
).split()

TEXTS = [
    "",
    "a",
    " ",
    "  two leading spaces",
    "trailing spaces  ",
    "The lighthouse keeper wrote 12 letters in 1984.",
    "the harbour, the lamp; the water!",
    "unknown: \u65e5\u672c\u8a9e \U0001f600 caf\u00e9 \u0142\u00f3d\u017a",
    "tabs\tand\nnew lines\r\n",
    "a \u2581 b",
    "<0x41> <unk>",
    "burningbrightlyoverthewater",
    "every  evening   every    evening",
]


def corpus():
    # A fixed, uneven mixture of the words, so that pieces have different frequencies.
    state, lines = 1, []
    for _ in range(3000):
        line = []
        for _ in range(12):
            state = (state * 1103515245 + 12345) % (1 << 31)
            line.append(WORDS[(state >> 8) % len(WORDS)][: 1 + (state >> 20) % 10])
        lines.append(" ".join(line))
    return lines


def train():
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=450,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        num_threads=1,
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def kind(sp, i):
    if sp.is_unknown(i):
        return gguf.TokenType.UNKNOWN
    if sp.is_control(i):
        return gguf.TokenType.CONTROL
    if sp.is_byte(i):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def write_gguf(sp):
    n = sp.get_piece_size()
    writer = gguf.GGUFWriter(HERE / "vocabulary.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([sp.id_to_piece(i) for i in range(n)])
    writer.add_token_scores([sp.get_score(i) for i in range(n)])
    writer.add_token_types([kind(sp, i) for i in range(n)])
    writer.add_bos_token_id(sp.bos_id())
    writer.add_eos_token_id(sp.eos_id())
    writer.add_unk_token_id(sp.unk_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def write_tokenizer(sp):
    n = sp.get_piece_size()
    vocab = {sp.id_to_piece(i): i for i in range(n)}
    normal = {sp.id_to_piece(i): i for i in range(n) if kind(sp, i) == gguf.TokenType.NORMAL}
    merges = []
    for piece, i in normal.items():
        for at in range(1, len(piece)):
            if piece[:at] in normal and piece[at:] in normal:
                merges.append((sp.get_score(i), piece[:at], piece[at:]))
    merges.sort(key=lambda m: (-m[0], -len(m[1])))
    tok = Tokenizer(
        BPE(
            vocab=vocab,
            merges=[(a, b) for _, a, b in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tok.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tok.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tok.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", sp.bos_id())]
    )
    tok.save(str(HERE / "tokenizer.json"), pretty=False)


def main():
    sp = train()
    write_gguf(sp)
    write_tokenizer(sp)
    texts = [
        {"text": t, "ids": sp.encode(t), "decoded": sp.decode(sp.encode(t))} for t in TEXTS
    ]
    with open(HERE / "golden.json", "w") as f:
        json.dump({"texts": texts}, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    main()
