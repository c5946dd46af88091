"""Golden logits, greedy continuations and token ids of SmolLM2-135M-Instruct.

    python3 make.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --prose areopagitica_gut.txt

Packages and the origin of both files: see reference.py beside this script. About two minutes on
two CPU cores; f32 throughout, deterministic.

golden.json:
  cases[]   name, ids; `text` (where the ids are the tokenization of one), `messages` (the chat case);
            top20 = {ids, values}: largest logits at the last token, descending;
            min_gap: smallest difference between neighbours of the top 21;
            at[] = {position, ids, values}: the top 5 at eight further positions;
            greedy: 32 ids, each the argmax, the first at the last prompt token; end-of-turn tokens do not stop it;
            greedy_margins: largest minus second largest logit at each of those steps.
  strings[] text, ids (special tokens in the text become their ids, as Hugging Face tokenizers do),
            ids_literal (the same characters as plain text, nothing is special).
"""

import argparse
import pathlib

import torch

import reference as ref

HERE = pathlib.Path(__file__).parent

SHORT = (
    "The lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote a line in the "
    "log: wind from the north, visibility good, two ships passed. In the morning he"
)

MESSAGES = [
    {"role": "system", "content": "You answer in one short paragraph."},
    {"role": "user", "content": "Why does ice float on water? Mention the year 1612, please."},
    {"role": "assistant", "content": "Because ice is less dense than liquid water."},
    {"role": "user", "content": "And why is it less dense?\n\n- Explain the bonds\n- Keep it simple"},
]

# Without a system message the template supplies its own.
MESSAGES_NO_SYSTEM = [{"role": "user", "content": "Name three rivers in Europe."}]

STRINGS = [
    "",
    " ",
    "a",
    "Hello, world!",
    "Hello  world   with    runs     of spaces",
    "  leading and trailing  ",
    "tab\tand\ttabs\t\tdouble",
    "line one\nline two\n\n\nline five\r\nwindows",
    "   \n  \n\t \n x",
    "ends in newline\n",
    "ends in spaces    ",
    "In 1984 there were 12345678 items at 3.14159 each, 50% off",
    "1 22 333 4444 007 1e10 0xFF",
    "a1b2c3 x9",
    "\u0661\u0662\u0663 and \u00bd and \u2167 and \u00b2",
    "It's we're I'll you've he'd I'm can't O'Neil's IT'S",
    "na\u00efve caf\u00e9 \u00fcber \u00dfharf \u0142\u00f3d\u017a",
    "e\u0301 versus \u00e9",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u4e2d\u6587\u6e2c\u8a66",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442 \u0438 \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f600 \U0001f680\U0001f680 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "zero\u200bwidth non\u00a0breaking\u3000ideographic\u2003em\u2028line",
    "null\u0000byte and \u001b[31mescape\u007f",
    "\U0001d518\U0001d52b\U0001d526\U0001d520\U0001d52c\U0001d521\U0001d522 \ufffd \ufeffbom",
    "fn main() { let x: Vec<u8> = vec![0; 16]; println!(\"{:?}\", &x[..4]); }",
    "    def f(a,b):\n        return a**b  # comment\n",
    "https://example.org/path?q=1&r=%20#frag user@example.org",
    "snake_case camelCase SCREAMING_CASE kebab-case __dunder__",
    "!!! ??? ... --- *** ### $$$ @@@ ^^^ ~~~ ``` ||| \\\\\\",
    "<|im_start|>user\nignore this<|im_end|>",
    "before<|endoftext|>after <|im_end|> spaced <|im_start|>",
    "<|im_start |> <|im_end| > <| im_end|> <|IM_END|> not special",
    "<repo_name>x<file_sep>y<empty_output>",
    "\u0120already \u010amapped \u00c3\u00a9 letters",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


@torch.no_grad()
def greedy(model, ids, n):
    """Plain greedy decoding, first with the whole prompt, then token by token on its cache."""
    out = model(torch.tensor([ids]), use_cache=True)
    full, cache, last = out.logits[0], out.past_key_values, out.logits[0, -1]
    tokens, margins = [], []
    for _ in range(n):
        best = torch.topk(last, 2)
        tokens.append(int(best.indices[0]))
        margins.append(ref.f32(best.values[0] - best.values[1]))
        out = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
        cache, last = out.past_key_values, out.logits[0, -1]
    return full, tokens, margins


def case(model, name, ids, **extra):
    logits, tokens, margins = greedy(model, ids, 32)
    # A second way to the same numbers: one pass over prompt and continuation, no cache.
    with torch.no_grad():
        again = model(torch.tensor([ids + tokens]), use_cache=False).logits[0]
    assert (again[: len(ids)] - logits).abs().max() < 1e-3
    assert again[len(ids) - 1 : -1].argmax(-1).tolist() == tokens
    n = len(ids)
    positions = sorted({(n - 1) * k // 8 for k in range(8)})
    assert len(positions) == 8
    t21 = ref.top(logits[-1], 21)["values"]
    min_gap = min(a - b for a, b in zip(t21, t21[1:]))
    print(f"{name}: {n} ids, min top-21 gap {min_gap:.2e}, min greedy margin {min(margins):.2e}")
    assert min_gap > 3e-4 and min(margins) > 3e-3, "choose another prompt: too close to call"
    return {
        "name": name,
        **extra,
        "ids": ids,
        "top20": ref.top(logits[-1], 20),
        "min_gap": ref.f32(min_gap),
        "at": [{"position": p, **ref.top(logits[p], 5)} for p in positions],
        "greedy": tokens,
        "greedy_margins": margins,
    }


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--gguf", required=True)
    ap.add_argument("--prose", required=True)
    ap.add_argument("--long", type=int, default=2200, help="tokens of the long case")
    args = ap.parse_args()
    torch.set_num_threads(2)
    g = ref.Gguf(args.gguf)
    tok, literal, model = ref.load_tokenizer(g), ref.literal_bpe(g), ref.load_model(g)

    strings = []
    for s in STRINGS:
        tok.encode_special_tokens = True
        plain = tok.encode(s).ids
        tok.encode_special_tokens = False
        ids = tok.encode(s).ids
        assert plain == literal(s), s
        assert tok.decode(plain, skip_special_tokens=False) == s, s
        assert tok.decode(ids, skip_special_tokens=False) == s, s
        strings.append({"text": s, "ids": ids, "ids_literal": plain})

    prose = pathlib.Path(args.prose).read_text(encoding="utf-8").replace("\r\n", "\n")
    prose = prose[prose.index("They, who to states") :]
    prose_ids = tok.encode(prose[:20000]).ids
    assert prose_ids == literal(prose[:20000])
    chat = ref.render_chat(g, MESSAGES)
    chat2 = ref.render_chat(g, MESSAGES_NO_SYSTEM)
    golden = {
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": ref.GGUF_SHA256,
        "made_with": {"transformers": "5.23.0", "torch": "2.15.0", "gguf": "0.19.0", "tokenizers": "0.23.3"},
        "cases": [
            case(model, "short", tok.encode(SHORT).ids, text=SHORT),
            case(model, "chat", tok.encode(chat).ids, text=chat, messages=MESSAGES),
            case(model, "chat_default_system", tok.encode(chat2).ids, text=chat2, messages=MESSAGES_NO_SYSTEM),
            case(model, "long", prose_ids[: args.long]),
        ],
        "strings": strings,
    }
    ref.write(HERE / "golden.json", golden)


if __name__ == "__main__":
    main()
