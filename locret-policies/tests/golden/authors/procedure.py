"""Locret inference (arXiv 2410.01805, Algorithm 1) as the authors' published code behaves, written
out naively: plain tensors, no cache class, one loop over the layers.

Rules, as read from the behaviour of github.com/huangyuxiang03/Locret:
  * keys are cached before rotation; at every step the whole cache of a layer is rotated at the
    positions 0..n and the t new queries at the last t of them (`compact`). `original` rotates every
    unit and query at its place in the text instead; all other rules are the same;
  * a unit's score comes from its token's q, k, v before rotation and never changes;
  * the prompt without its last `local` tokens is read in chunks; after a chunk every layer and KV
    head keeps the `budget` best units on its own, back in sequence order, scores with them;
  * unless the chunk is the last one, its newest `stabilizers` units count as +inf in this selection,
    while their stored scores stay as they are;
  * the last `local` tokens and the generated ones are appended with no eviction.

One deviation, on purpose: the authors' torch.topk may return equal scores in any order. Here a stable
sort keeps the earlier unit. The authors put the dtype's largest value where +inf stands here, which
selects the same units.

Packages: torch 2.15.0, numpy 2.4.6.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F


def splitmix64(seed, start, count):
    """The outputs number `start`..`start + count` of the generator whose state begins at `seed`."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def random_heads(seed, layers, fc1_shape, fc2_shape, fc1_bound, fc2_bound):
    """[(fc1, fc2)] of every layer from one stream: row-major, fc1 before fc2, layer 0 first.

    value = ((next() >> 40) / 2^24 * 2 - 1) * bound, every operation in f32.
    """
    heads, at = [], 0
    for _ in range(layers):
        pair = []
        for shape, bound in ((fc1_shape, fc1_bound), (fc2_shape, fc2_bound)):
            bits = splitmix64(seed, at, shape[0] * shape[1]) >> np.uint64(40)
            at += bits.size
            unit = bits.astype(np.float32) / np.float32(2**24) * np.float32(2) - np.float32(1)
            pair.append(torch.from_numpy((unit * np.float32(bound)).reshape(shape)))
        heads.append(tuple(pair))
    return heads


class Weights:
    """The tensors of a Llama or Phi-3 model (transformers' names), fused ones taken apart."""

    def __init__(self, model, inv_freq, rope_scale=1.0, dtype=torch.float32):
        c, s = model.config, model.state_dict()
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.eps = c.rms_norm_eps
        self.inv_freq, self.rope_scale, self.dtype = inv_freq.float(), rope_scale, dtype
        w = lambda name: s[name + ".weight"].to(dtype)
        self.embed, self.norm, self.head = w("model.embed_tokens"), w("model.norm"), w("lm_head")
        self.layers = []
        for i in range(c.num_hidden_layers):
            p = f"model.layers.{i}."
            if p + "self_attn.qkv_proj.weight" in s:
                widths = [self.heads * self.d, self.kv_heads * self.d, self.kv_heads * self.d]
                q, k, v = w(p + "self_attn.qkv_proj").split(widths)
                gate, up = w(p + "mlp.gate_up_proj").chunk(2)
            else:
                q, k, v = (w(p + f"self_attn.{n}_proj") for n in "qkv")
                gate, up = w(p + "mlp.gate_proj"), w(p + "mlp.up_proj")
            self.layers.append(
                dict(
                    q=q, k=k, v=v, gate=gate, up=up,
                    o=w(p + "self_attn.o_proj"),
                    down=w(p + "mlp.down_proj"),
                    before=w(p + "input_layernorm"),
                    after=w(p + "post_attention_layernorm"),
                )
            )  # fmt: skip

    def rms(self, x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    def rotate(self, x, positions):
        """x [heads, t, d] at integer positions [t] or [heads, t]; angles in f32 as transformers has them."""
        angle = positions.float().unsqueeze(-1) * self.inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        cos = (angle.cos() * self.rope_scale).to(self.dtype)
        sin = (angle.sin() * self.rope_scale).to(self.dtype)
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin


class Run:
    """One sequence: per layer the units k, v [G, n, d], their scores and original positions [G, n]."""

    def __init__(self, weights, heads, positions="compact"):
        self.w, self.positions = weights, positions
        self.heads = [(a.to(weights.dtype), b.to(weights.dtype)) for a, b in heads]
        self.seen, self.memo = 0, {}
        self.cache = [None] * len(weights.layers)
        self.born = [[] for _ in weights.layers]  # every score ever given, [G, t] a step

    def qkv(self, i, x):
        """Layer i, x [t, hidden] -> q [H, t, d], k and v [G, t, d] before rotation, scores [G, t]."""
        layer, (fc1, fc2) = self.w.layers[i], self.heads[i]
        x = self.w.rms(x, layer["before"])
        flat = [F.linear(x, layer[n]) for n in "qkv"]
        score = F.linear(F.silu(F.linear(torch.cat(flat, dim=-1), fc1)), fc2).T
        return (*(f.reshape(f.shape[0], -1, self.w.d).transpose(0, 1) for f in flat), score)

    def first_layer(self, ids):
        """As qkv(0, .), but a token at a time: the same id gives the same bits wherever it stands,
        so that exact ties between repeated tokens are exact."""
        for t in ids:
            if t not in self.memo:
                self.memo[t] = self.qkv(0, self.w.embed[t : t + 1])
        return (torch.cat(parts, dim=1) for parts in zip(*(self.memo[t] for t in ids)))

    @torch.no_grad()
    def forward(self, ids):
        """Reads ids after what is cached, returns the logits of all of them [t, vocab]."""
        w, t = self.w, len(ids)
        x = w.embed[torch.tensor(ids)]
        place = torch.arange(self.seen, self.seen + t)
        for i, layer in enumerate(w.layers):
            q, k, v, score = self.first_layer(ids) if i == 0 else self.qkv(i, x)
            self.born[i].append(score)
            where = place.expand(w.kv_heads, t)
            if self.cache[i] is not None:
                old = self.cache[i]
                k, v = torch.cat((old[0], k), 1), torch.cat((old[1], v), 1)
                score, where = torch.cat((old[2], score), 1), torch.cat((old[3], where), 1)
            self.cache[i] = (k, v, score, where)

            n = k.shape[1]
            if self.positions == "compact":
                key_at = torch.arange(n).expand(w.kv_heads, n)
                query_at = torch.arange(n - t, n)
            else:
                key_at, query_at = where, place
            rotated_q = w.rotate(q, query_at)
            rotated_k = w.rotate(k, key_at)
            hidden = torch.ones(t, n, dtype=torch.bool).triu(n - t + 1)
            group = w.heads // w.kv_heads
            heads = []
            for h in range(w.heads):
                logits = rotated_q[h] @ rotated_k[h // group].T / math.sqrt(w.d)
                heads.append(logits.masked_fill(hidden, -math.inf).softmax(-1) @ v[h // group])
            x = x + F.linear(torch.cat(heads, dim=-1), layer["o"])
            y = w.rms(x, layer["after"])
            x = x + F.linear(F.silu(F.linear(y, layer["gate"])) * F.linear(y, layer["up"]), layer["down"])
        self.seen += t
        return F.linear(w.rms(x, w.norm), w.head)

    def evict(self, budget, stabilizers):
        """Keeps the best `budget` units of every layer and head; `stabilizers` 0 on the last chunk.

        Returns the original positions kept [L][G][n] and the margins at the cut [L][G]: worst kept
        score minus best dropped score, stabilizers left out; +inf where nothing was dropped.
        """
        kept, margins = [], []
        for i, (k, v, score, where) in enumerate(self.cache):
            n = score.shape[1]
            wanted = score.clone()
            if stabilizers:
                wanted[:, -stabilizers:] = math.inf
            keep = min(budget, n)
            order = torch.sort(wanted, dim=-1, descending=True, stable=True).indices
            if keep < n:
                sorted_scores = wanted.gather(1, order)
                assert torch.isfinite(sorted_scores[:, keep - 1 : keep + 1]).all()
                margins.append(sorted_scores[:, keep - 1] - sorted_scores[:, keep])
            else:
                margins.append(torch.full((score.shape[0],), math.inf, dtype=score.dtype))
            index = order[:, :keep].sort(-1).values
            wide = index.unsqueeze(-1).expand(-1, -1, k.shape[-1])
            self.cache[i] = (k.gather(1, wide), v.gather(1, wide), score.gather(1, index), where.gather(1, index))
            kept.append(self.cache[i][3])
        return kept, margins


def locret(weights, heads, ids, *, chunk, budget, stabilizers, local, max_new, positions="compact", watch=None):
    """The whole procedure on one prompt. `watch(margins)` may raise to give up after a chunk.

    Returns kept [chunks][L] of [G, n], margins [chunks, L, G], scores [L, G, prompt] as born, the
    logits at the last prompt token, the greedy ids (end tokens do not stop it) and their margins.
    """
    run = Run(weights, heads, positions)
    end = len(ids) - local
    kept, margins = [], []
    for b in range(0, end, chunk):
        run.forward(ids[b : min(b + chunk, end)])
        k, m = run.evict(budget, stabilizers if b + chunk < end else 0)
        kept.append(k)
        margins.append(torch.stack(m))
        if watch:
            watch(margins[-1])
    logits = last = run.forward(ids[end:])[-1]
    tokens, gaps = [], []
    for n in range(max_new):
        best = torch.topk(last, 2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        if n + 1 < max_new:
            last = run.forward([tokens[-1]])[-1]
    scores = torch.stack([torch.cat(s, 1)[:, : len(ids)] for s in run.born])
    return dict(
        kept=kept, margins=torch.stack(margins), scores=scores, logits=logits, tokens=tokens, token_margins=gaps
    )


def bitmaps(kept, length):
    """[chunks, L, G, ceil(length / 8)] u8; bit p % 8 (least significant first) of byte p // 8 = kept."""
    out = np.zeros((len(kept), len(kept[0]), kept[0][0].shape[0], (length + 7) // 8), dtype=np.uint8)
    for c, layers in enumerate(kept):
        for i, heads in enumerate(layers):
            for h, where in enumerate(heads.tolist()):
                for p in where:
                    out[c, i, h, p // 8] |= 1 << (p % 8)
    return out


def default_inv_freq(theta, d):
    return 1.0 / (theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d))
