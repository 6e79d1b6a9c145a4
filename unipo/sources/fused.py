"""Decoding for the Llama family without the model's own forward pass: few large operations on memory that is laid out once.

Keys and values live in one preallocated block; every row's newest token is in the same column, so that a step writes one
slice whatever the rows' lengths. Ended rows are overwritten by the last ones, and waiting prompts take the places that are
free. Compared with the model's own logits on first use.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unipo.functional.chunked import Head
from unipo.sources.fused_weights import Parts

REFILL = 0.125
"""Waiting prompts are admitted when this share of the batch is free: each admission is a pass of its own."""
PREFILL_TOKENS = 8192
"""Most prompt tokens (with padding) that are computed at once."""


def verified_parts(model: Any) -> Parts | None:
    """The parts of `model` if it is of a known form and fused decoding gives the model's own logits; else None.

    A model that looks right and gives other logits is told in one warning.
    """
    parts = Parts.of(model)
    if parts is None or equals_model(parts, model):
        return parts
    warnings.warn(f"{type(model).__name__}: fused decoding does not give this model's logits, so the model is called for "
                  "every token: correct, but slower", stacklevel=2)  # fmt: skip
    return None


class FusedDecoding:
    """`Decoding` of at most `batch` of `rows` rows in all, with prompts up to `longest` and `tokens` more each."""

    def __init__(self, parts: Parts, batch: int, rows: int, longest: int, tokens: int) -> None:
        self.parts, self.slots, self.longest = parts, min(batch, rows), longest
        self.layers, self.output, self.embedding = parts.layers(), parts.output(), parts.inner.model.embed_tokens.weight
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.cos, self.sin = parts.rotations(longest + tokens)
        self.columns = longest + tokens * (1 if rows <= batch else 2)
        blocks, like = (len(self.layers), self.slots, parts.keys), {"dtype": self.dtype, "device": self.device}
        self.keys = torch.empty(*blocks, parts.size, self.columns, **like)
        self.values = torch.empty(*blocks, self.columns, parts.size, **like)
        self.mask = torch.empty(self.slots, self.columns, **like)
        self.start = torch.empty(self.slots, dtype=torch.long, device=self.device)
        self.rows, self.now, self.first, self.uneven = 0, longest, 0, False

    # ---- rows ----
    def room(self, waiting: Sequence[int], live: int) -> int:
        free = self.slots - live
        enough = not live or free >= REFILL * self.slots or free >= len(waiting)
        return min(free, len(waiting)) if enough else 0

    def admit(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Distinct prompts are computed once; every row gets a copy of the keys and values, ending before column `now`."""
        distinct = list(dict.fromkeys(prompts))
        which = {p: i for i, p in enumerate(distinct)}
        index = torch.tensor([which[p] for p in prompts], device=self.device)
        first, self.rows = self.rows, self.rows + len(prompts)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        if not first:
            self.now = self.longest
        self.start[first : self.rows] = self.now - lengths
        column = torch.arange(self.columns, device=self.device)
        self.mask[first : self.rows] = torch.where(column < self.now - lengths[:, None], -torch.inf, 0.0)
        logits = []
        size = max(1, PREFILL_TOKENS // len(distinct[0]))
        for begin in range(0, len(distinct), size):
            part = distinct[begin : begin + size]
            hit = ((index >= begin) & (index < begin + len(part))).nonzero().squeeze(1)
            logits.append(self._prefilled(part, index[hit] - begin, hit + first))
        self._span()
        return torch.cat(logits)[index]

    def keep(self, going: Tensor) -> Tensor:
        """The last rows move into the places of ended ones."""
        order = torch.arange(len(going), device=self.device)
        self.rows = int(going.sum())
        holes = (~going[: self.rows]).nonzero().squeeze(1)
        tails = going[self.rows :].nonzero().squeeze(1) + self.rows
        if len(holes):
            used = slice(self.first, self.now)
            self.keys[:, holes, ..., used] = self.keys[:, tails, ..., used]
            self.values[:, holes, :, used] = self.values[:, tails, :, used]
            self.mask[holes], self.start[holes] = self.mask[tails], self.start[tails]
            order[holes] = tails
        if self.rows:
            self._span()
        return order[: self.rows]

    def _span(self) -> None:
        """The first column in use, and whether rows differ in it."""
        start = self.start[: self.rows]
        self.first = int(start.min())
        self.uneven = int(start.max()) > self.first

    def _shifted(self) -> None:
        """Columns in use move to the front."""
        length = self.now - self.first
        self.keys[..., :length] = self.keys[..., self.first : self.now].clone()
        self.values[..., :length, :] = self.values[..., self.first : self.now, :].clone()
        self.mask[:, :length] = self.mask[:, self.first : self.now].clone()
        self.mask[:, length:] = 0.0
        self.start -= self.first
        self.now, self.first = length, 0

    # ---- tokens ----
    def step(self, token: Tensor) -> Tensor:
        if self.now == self.columns:
            self._shifted()
        n, now, first = self.rows, self.now, self.first
        position = now - self.start[:n] if self.uneven else torch.tensor([now - first], device=self.device)
        cos, sin = self.cos[position, None], self.sin[position, None]
        mask = self.mask[:n, first : now + 1] if self.uneven else None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer, :n], self.values[layer, :n]
            keys[..., now], values[:, :, now] = k, v
            return attention(q, keys[..., first : now + 1], values[:, :, first : now + 1], mask)

        x = self._forward(token, cos, sin, attend)
        self.now = now + 1
        return self._logits(x)

    def _prefilled(self, prompts: Sequence[tuple[int, ...]], index: Tensor, rows: Tensor) -> Tensor:
        """Logits after each prompt; keys and values of prompt index[i] go to row rows[i]."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        g, width = len(prompts), int(lengths.max())
        ids = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts], device=self.device)
        cos, sin = self.cos[:width, None].repeat(g, 1, 1), self.sin[:width, None].repeat(g, 1, 1)
        column = torch.arange(width, device=self.device)
        right = (column - (width - lengths[:, None])).clamp(min=0)
        at = torch.arange(g, device=self.device)[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(g, width, -1, self.parts.size) for x in (q, k, v))
            self.keys[layer, rows, ..., self.now - width : self.now] = k[at, right].permute(0, 2, 3, 1)[index]
            self.values[layer, rows, :, self.now - width : self.now] = v[at, right].transpose(1, 2)[index]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
            return out.transpose(1, 2).reshape(g * width, -1)

        x = self._forward(ids.view(-1), cos, sin, attend)
        return self._logits(x.view(g, width, -1)[at.squeeze(1), lengths - 1])

    def _logits(self, x: Tensor) -> Tensor:
        return Head(None, self.parts.head.scale, self.parts.head.cap)(torch.mm(self._normed(x), self.output))

    def _forward(self, ids: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        """Hidden states [n, d] of tokens [n] at rotations `cos`, `sin`; `attend(layer, q, k, v)` gives [n, H h]."""
        heads, keys, size = self.parts.heads, self.parts.keys, self.parts.size
        x = F.embedding(ids, self.embedding)
        for i, w in enumerate(self.layers):
            qkv = _linear(self._normed(x), w.qkv, w.qkv_bias).view(len(ids), heads + 2 * keys, size)
            qk = qkv[:, : heads + keys]
            if w.qk is not None:
                qk = self._normed(qk).mul_(w.qk)
            qk = rotated(qk, cos, sin)
            out = attend(i, qk[:, :heads], qk[:, heads:], qkv[:, heads + keys :])
            x = _added(x, out, w.out, w.out_bias)
            inner = _linear(self._normed(x), w.gate_up, w.gate_up_bias)
            half = inner.shape[1] // 2
            x = _added(x, F.silu(inner[:, :half]).mul_(inner[:, half:]), w.down, w.down_bias)
        return x

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), None, self.parts.eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _added(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.addmm(x if bias is None else x + bias, y, weight)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [n, heads, h]: the first half's a and second half's b become a cos - b sin, b cos + a sin."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    out = x * cos
    out[..., :half].addcmul_(b, sin, value=-1)
    out[..., half:].addcmul_(a, sin)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One query a row: q [n, H, h] (scaled), k [n, K, h, T], v [n, K, T, h], mask [n, T] added; returns [n, H h].

    In float32 on a CPU batched products are 3 to 5 times as fast as the fused kernel is for one query.
    """
    n, keys, size, length = k.shape
    if q.dtype != torch.float32 or q.device.type != "cpu":
        added = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(q[:, :, None], k.mT, v, added, scale=1.0, enable_gqa=True)
        return out.reshape(n, -1)
    grouped = q.reshape(n * keys, -1, size)
    scores = torch.bmm(grouped, k.reshape(n * keys, size, length))
    if mask is not None:
        scores.view(n, -1, length).add_(mask[:, None])
    return torch.bmm(scores.softmax(-1), v.reshape(n * keys, length, size)).view(n, -1)


def equals_model(parts: Parts, model: Any) -> bool:
    """Are logits the model's own, up to rounding: of uneven prompts, with rows that leave, and rows that join them?"""
    vocabulary, device = len(parts.inner.model.embed_tokens.weight), parts.inner.model.embed_tokens.weight.device
    rows = [tuple(i % vocabulary for i in row) for row in ((3, 4, 5, 6, 7, 8, 9), (10, 11, 12, 13), (14, 15, 16))]
    try:
        decoding = FusedDecoding(parts, 2, 3, 7, 2)
        made = [decoding.admit(rows[:2])]
        made.append(decoding.step(torch.tensor([2, 2], device=device) % vocabulary))
        decoding.keep(torch.tensor([False, True], device=device))
        made.append(decoding.admit(rows[2:]))
        made.append(decoding.step(torch.tensor([3, 4], device=device) % vocabulary))
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError):
        return False
    whole = [rows[0], rows[1], (*rows[0], 2 % vocabulary), (*rows[1], 2 % vocabulary), rows[2]]
    whole += [(*whole[3], 3 % vocabulary), (*rows[2], 4 % vocabulary)]
    own = torch.cat([model(input_ids=torch.tensor([r], device=device), use_cache=False).logits[:, -1] for r in whole])
    logits = torch.cat(made)
    error = float((logits - own.to(logits.dtype)).abs().max())
    return error <= 64 * torch.finfo(parts.inner.dtype).eps * float(own.abs().max())
