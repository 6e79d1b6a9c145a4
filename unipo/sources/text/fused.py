"""Decoding for the Llama family without the model's own forward pass: few large operations on memory that is laid out once.

Keys and values live in one preallocated block; every row's newest token is in the same column, so that a step writes one
slice whatever the rows' lengths. Ended rows are overwritten by the last ones, and waiting prompts take the places that are
free. Compared with the model's own logits on first use.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unipo.functional.chunked import Head
from unipo.sources.text.fused_weights import Matrix, Parts
from unipo.sources.text.native import LANES, NativeStep, Panels

Put = Callable[[int, Tensor, Tensor], None]
REFILL = 0.125
"""Waiting prompts are admitted when this share of the batch is free: each admission is a pass of its own."""
EXACT, COARSE = 64, 24
"""Largest difference of a logit from the model's own, in units of the precision and of the largest logit."""
PREFILL_TOKENS = 8192
"""Most prompt tokens (with padding) that are computed at once."""


def verified_parts(model: Any, dtype: torch.dtype | None = None) -> Parts | None:
    """The parts of `model` if it is of a known form and fused decoding gives the model's own logits; else None.

    `dtype`: of the copied matrices, where it is not the model's. A form that should give the logits and does not is told
    in one warning.
    """
    parts = Parts.of(model)
    while parts is not None and not _equals(parts, model, dtype):
        form = "fused" if parts.native is None else "native"
        warnings.warn(f"{type(model).__name__}: {form} decoding does not give this model's logits, so a slower form is used",
                      stacklevel=2)  # fmt: skip
        parts = None if parts.native is None else replace(parts, native=None)
    return parts if parts is None else _rounded(parts, dtype)


def _equals(parts: Parts, model: Any, dtype: torch.dtype | None) -> bool:
    return equals_model(parts, model, EXACT) and (dtype is None or equals_model(_rounded(parts, dtype), model, COARSE))


def _rounded(parts: Parts, dtype: torch.dtype | None) -> Parts:
    """With matrices of another precision; natively only where torch's library can multiply them."""
    if dtype is None or dtype == parts.dtype:
        return parts
    native = parts.native if parts.native is not None and parts.native.narrow is not None else None
    return replace(parts, dtype=dtype, native=native)


# ---- decoding ----------------------------------------------------------------------------------------------------------
KEYS, VALUES, COLUMNS, LENGTH, START, BLOCK = range(6)
"""Columns of `FusedDecoding.row`: the shared prompt (addresses, columns, columns in use), the first own column, its block."""


class FusedDecoding:
    """`Decoding` of at most `batch` of `rows` rows in all, with prompts up to `longest` and `tokens` more each.

    The native form keeps a prompt's keys and values once, for all rows that continue it; torch's operations need a copy
    in every row.
    """

    def __init__(self, parts: Parts, batch: int, rows: int, longest: int, tokens: int) -> None:
        self.parts, self.slots, self.shared = parts, min(batch, rows), parts.native is not None
        self.layers, self.output, self.embedding = parts.layers(), parts.output(), parts.inner.model.embed_tokens.weight
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.cos, self.sin = parts.rotations(longest + tokens)
        self.begin = 0 if self.shared else longest
        self.columns = self.begin + tokens * (1 if rows <= batch else 2)
        self.keys, self.values = self._memory(len(self.layers), self.slots, self.columns)
        self.mask = torch.empty(0 if self.shared else self.slots, self.columns, dtype=self.dtype, device=self.device)
        self.row = torch.zeros(self.slots, 6, dtype=torch.long, device=self.device)
        self.blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows, self.now, self.first, self.uneven = 0, self.begin, 0, False
        self.native = None if parts.native is None else NativeStep(parts.native, self)

    def _memory(self, a: int, b: int, columns: int) -> tuple[Tensor, Tensor]:
        """Keys [a, b, K, h, C] and values [a, b, K, C, h]: C is a multiple of LANES, with at least LANES columns to spare."""
        columns = (columns + 2 * LANES - 1) // LANES * LANES
        shape, like = (a, b, self.parts.keys), {"dtype": self.dtype, "device": self.device}
        keys = torch.empty(*shape, self.parts.size, columns, **like)
        return keys, torch.empty(*shape, columns, self.parts.size, **like)

    # ---- rows ----
    def room(self, prompts: Sequence[tuple[int, ...]], begun: int, live: int) -> int:
        """Equal prompts come in together where they fit, so that they are computed once."""
        free, left = self.slots - live, len(prompts) - begun
        n = min(free, left)
        if n == left or (live and n < REFILL * self.slots):
            return n if n == left else 0
        cut = begun + n
        while cut > begun and prompts[cut - 1] == prompts[cut]:
            cut -= 1
        return cut - begun or (0 if live else n)

    def admit(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Distinct prompts are computed once; equal ones are neighbours."""
        distinct = list(dict.fromkeys(prompts))
        which = {p: i for i, p in enumerate(distinct)}
        index = torch.tensor([which[p] for p in prompts], device=self.device)
        if not self.rows:
            self.now = self.begin
        used = set(self.row[: self.rows, BLOCK].tolist())
        self.blocks = {i: block for i, block in self.blocks.items() if i in used}
        logits, size = [], max(1, PREFILL_TOKENS // len(distinct[0]))
        for begin in range(0, len(distinct), size):
            part = distinct[begin : begin + size]
            of = index[(index >= begin) & (index < begin + len(part))] - begin
            logits.append(self._prefilled(part, of))
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
            self.row[holes] = self.row[tails]
            if not self.shared:
                self.mask[holes] = self.mask[tails]
            order[holes] = tails
        if self.rows:
            self._span()
        return order[: self.rows]

    def _span(self) -> None:
        """The first column in use, and whether rows differ in it."""
        start = self.row[: self.rows, START]
        self.first = int(start.min())
        self.uneven = int(start.max()) > self.first

    def _shifted(self) -> None:
        """Columns in use move to the front."""
        length = self.now - self.first
        self.keys[..., :length] = self.keys[..., self.first : self.now].clone()
        self.values[..., :length, :] = self.values[..., self.first : self.now, :].clone()
        self.mask[:, :length] = self.mask[:, self.first : self.now].clone()
        self.mask[:, length:] = 0.0
        self.row[:, START] -= self.first
        self.now, self.first = length, 0

    # ---- prompts ----
    def _prefilled(self, prompts: Sequence[tuple[int, ...]], index: Tensor) -> Tensor:
        """Logits after each prompt; new rows continue prompts[index]."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        g, width = len(prompts), int(lengths.max())
        ids = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts], device=self.device)
        cos, sin = self.cos[:width, None].repeat(g, 1, 1), self.sin[:width, None].repeat(g, 1, 1)
        put = (self._sharing if self.shared else self._copying)(lengths, index)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(g, width, -1, self.parts.size).transpose(1, 2) for x in (q, k, v))
            put(layer, k, v)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
            return out.transpose(1, 2).reshape(g * width, -1)

        x = self._forward(ids.view(-1), cos, sin, attend)
        return self._scaled(self._logits(x.view(g, width, -1)[torch.arange(g, device=self.device), lengths - 1]))

    def _sharing(self, lengths: Tensor, index: Tensor) -> Put:
        """Keys and values k, v [G, K, T, h] of a layer go into a block that the new rows point to."""
        width, new = int(lengths.max()), slice(self.rows, self.rows + len(index))
        keys, values = self._memory(len(lengths), len(self.layers), width)
        name = max(self.blocks, default=-1) + 1
        self.blocks[name], self.rows = (keys, values), new.stop
        for column, memory in ((KEYS, keys), (VALUES, values)):
            self.row[new, column] = memory.data_ptr() + index * (memory.stride(0) * memory.element_size())
        self.row[new, COLUMNS], self.row[new, LENGTH] = keys.shape[-1], lengths[index]
        self.row[new, START], self.row[new, BLOCK] = self.now, name

        def put(layer: int, k: Tensor, v: Tensor) -> None:
            keys[:, layer, ..., :width], values[:, layer, :, :width] = k.mT, v

        return put

    def _copying(self, lengths: Tensor, index: Tensor) -> Put:
        """Keys and values k, v [G, K, T, h] of a layer go into every new row, ending before column `now`."""
        width, new = int(lengths.max()), slice(self.rows, self.rows + len(index))
        start = self.now - lengths[index]
        self.row[new, START], self.rows = start, new.stop
        column = torch.arange(self.columns, device=self.device)
        self.mask[new] = torch.where(column < start[:, None], -torch.inf, 0.0)
        at = (column[:width] - (width - lengths[index, None])).clamp(min=0)

        def put(layer: int, k: Tensor, v: Tensor) -> None:
            used = slice(self.now - width, self.now)
            self.keys[layer, new, ..., used] = k.transpose(1, 2)[index[:, None], at].permute(0, 2, 3, 1)
            self.values[layer, new, :, used] = v.transpose(1, 2)[index[:, None], at].transpose(1, 2)

        return put

    # ---- tokens ----
    def step(self, token: Tensor) -> Tensor:
        if self.now == self.columns:
            self._shifted()
        logits = self._eager(token) if self.native is None else self.native(token, self.row, self.now)
        self.now += 1
        return self._scaled(logits)

    def _eager(self, token: Tensor) -> Tensor:
        n, now, first = self.rows, self.now, self.first
        position = now - self.row[:n, START] if self.uneven else torch.tensor([now - first], device=self.device)
        cos, sin = self.cos[position, None], self.sin[position, None]
        mask = self.mask[:n, first : now + 1] if self.uneven else None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer, :n], self.values[layer, :n]
            keys[..., now], values[:, :, now] = k, v
            return attention(q, keys[..., first : now + 1], values[:, :, first : now + 1], mask)

        return self._logits(self._forward(token, cos, sin, attend))

    def _logits(self, x: Tensor) -> Tensor:
        return _linear(self._normed(x), self.output, None)

    def _scaled(self, logits: Tensor) -> Tensor:
        return Head(None, self.parts.head.scale, self.parts.head.cap)(logits)

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


def _linear(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor) and weight.dtype == x.dtype:
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
    y = weight(x) if isinstance(weight, Panels) else torch.mm(x.to(weight.dtype), weight).to(x.dtype)
    return y if bias is None else y + bias


def _added(x: Tensor, y: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor) and weight.dtype == x.dtype:
        return torch.addmm(x if bias is None else x + bias, y, weight)
    return _linear(y, weight, bias).add_(x)


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


@torch.no_grad()
def equals_model(parts: Parts, model: Any, tolerance: float) -> bool:
    """Are logits the model's own, up to rounding: of uneven prompts, with rows that leave, and rows that join them?"""
    vocabulary, device = len(parts.inner.model.embed_tokens.weight), parts.inner.model.embed_tokens.weight.device
    rows = [tuple(i % vocabulary for i in row) for row in ((3, 4, 5, 6, 7, 8, 9), (10, 11, 12, 13), (14, 15, 16))]
    try:
        decoding = FusedDecoding(parts, 2, 3, 7, 2)
        made = [decoding.admit(rows[:2])]
        made.append(decoding.step(torch.tensor([2, 2], device=device) % vocabulary).clone())
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
    return error <= tolerance * torch.finfo(parts.dtype).eps * float(own.abs().max())
