"""Attention over a `Layout`, as an attention function of `transformers`: exact, without padding and without masks.

A token behind a shared prompt attends to two sets of keys, the prompt and its own run. Each part is an ordinary attention
with output o and log-normaliser z, and they are merged by

    w = sigmoid(z_prompt - z_own)      o = o_own + w (o_prompt - o_own)      z = log(e^z_prompt + e^z_own)

Backward is one ordinary backward per part, given the merged o and z: the derivative of softmax needs nothing else of the
other part (as in ring attention, arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from unipo.functional.chunked import wide
from unipo.policies.kernels import Runs, attended
from unipo.policies.layout import Block, Layout

ALMOST_ALL = 0.9
"""Where more of the row is scored, the last layer is computed whole."""
NAME = "unipo_shared_prompts"
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_current: ContextVar[Layout] = ContextVar("layout")
_runs_of: ContextVar[Runs | None] = ContextVar("runs", default=None)


class Unsupported(RuntimeError):
    """This attention is of a kind that a `Layout` does not describe: a window, a soft cap, sinks, a position bias."""


@contextmanager
def attending(config: Any, layout: Layout, native: bool = False) -> Iterator[None]:
    """While it lasts, models of this configuration attend as the layout says; `native`: in C, given float32 on a CPU."""
    before, token = config._attn_implementation, _current.set(layout)
    runs = _runs_of.set(Runs.of(layout) if native else None)
    config._attn_implementation = registered()
    try:
        yield
    finally:
        config._attn_implementation = before
        _current.reset(token)
        _runs_of.reset(runs)


@contextmanager
def last_only_where_scored(decoder: Any, layout: Layout) -> Iterator[None]:
    """While it lasts, the feed-forward part of the last layer is computed at scored places alone, 0 elsewhere.

    Nothing reads the others: the keys and values of a prompt in the last layer come before that part.
    """
    rows = layout.scored.unique()
    last = getattr(decoder, "layers", None)
    part = getattr(last[-1], "mlp", None) if last is not None and len(last) else None
    if part is None or len(rows) > ALMOST_ALL * len(layout.tokens):
        yield
        return

    def take(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0].index_select(1, rows.to(inputs[0].device)), *inputs[1:]

    def put(module: Any, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        return out.new_zeros(1, len(layout.tokens), out.shape[-1]).index_copy(1, rows.to(out.device), out)

    hooks = [part.register_forward_pre_hook(take), part.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
              scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
              softcap: float | None = None, s_aux: Any = None, position_bias: Any = None,
              **rest: Any) -> tuple[Tensor, None]:  # fmt: skip
    """query [1, h, T, d], key and value [1, k, T, d], h a multiple of k -> [1, T, h, d]. Raises `Unsupported`."""
    layout = _current.get()
    _refuse(
        layout, sliding_window, softcap=softcap, s_aux=s_aux, position_bias=position_bias, attention_mask=attention_mask
    )
    if query.shape[2] != len(layout.tokens) or key.shape[2] != len(layout.tokens):
        raise Unsupported("keys and queries are not those of the row")
    if torch.is_autocast_enabled(query.device.type):
        query, key = query.to(value.dtype), key.to(value.dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key, value = (x.squeeze(0) for x in (query, key, value))  # x[0] would write its gradient into zeros
    runs = _runs_of.get() if query.shape[-1] == value.shape[-1] else None
    if runs is not None:
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        return attended(q, k, v, runs, scale)[None], None
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return _InParts.apply(query, key, value, layout, scale)[None], None
    return in_sequences(query, key, value, layout, scale)[None], None


def _refuse(layout: Layout, window: int | None, **given: Any) -> None:
    asked = [name for name, value in given.items() if value is not None]
    if window is not None and window < layout.longest:
        asked.append("sliding_window")
    if asked:
        raise Unsupported(f"attention with {', '.join(asked)}")


def _no_mask(
    *_: Any, config: Any = None, mask_function: Any = None, local_size: int | None = None, **rest: Any
) -> None:
    if local_size is not None and local_size < _current.get().longest:
        raise Unsupported(f"attention within {local_size} positions")


@cache
def registered() -> str:
    """The name under which Hugging Face models find `attention`; registered when it is first asked for: slow to import."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME


# ---- any device: whole sequences, padded on the right ------------------------------------------------------------------
def in_sequences(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """[h, T, d] x [k, T, d] -> [T, h, d]: every sequence attends with its prompt in front, gathered from the row."""
    behind = {start: tail for tail in layout.tails for start in range(tail.start, tail.stop)}
    out = query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])
    row = torch.arange(query.shape[1], device=query.device)
    many = query.shape[0] // key.shape[0]
    for block in layout.blocks:
        tail = behind.get(block.start)
        own = row[block.start : block.stop].view(block.count, block.length)
        front = row[tail.first : tail.last].expand(block.count, -1) if tail else own[:, :0]
        at = torch.cat([front, own], 1)
        q, k, v = (
            x[:, at].transpose(0, 1) for x in (query, key.repeat_interleave(many, 0), value.repeat_interleave(many, 0))
        )
        found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[:, :, front.shape[1] :]
        out = out.index_copy(0, own.reshape(-1), found.transpose(1, 2).flatten(0, 1))
    return out


# ---- CPU: the prompt and the own run apart -----------------------------------------------------------------------------
class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        heads, many = query.shape[0], query.shape[0] // key.shape[0]
        k, v = _repeated(key, many), _repeated(value, many)
        out = query.new_empty(query.shape[1], heads, value.shape[-1])
        norm = torch.empty(out.shape[:2], dtype=wide(out[:0]).dtype)
        own, behind = _own(layout), _behind(layout)
        for block in own:
            o, z = _flash(*(_runs(x, block) for x in (query, k, v)), 0.0, True, scale=scale)
            _rows(out, block).copy_(o.transpose(1, 2))
            _rows(norm, block).copy_(z.transpose(1, 2))
        for mine, prompt in behind:
            o, z = _flash(_runs(query, mine), _runs(k, prompt), _runs(v, prompt), 0.0, False, scale=scale)
            z, before = z.transpose(1, 2), _rows(norm, mine)
            _rows(out, mine).lerp_(o.transpose(1, 2), torch.sigmoid(z - before).to(out.dtype)[..., None])
            before.copy_(torch.logaddexp(z, before))
        ctx.save_for_backward(query, k, v, out, norm)
        ctx.own, ctx.behind, ctx.scale, ctx.many = own, behind, scale, many
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, k, v, out, norm = ctx.saved_tensors
        made = [torch.empty_like(out) for _ in range(3)]
        grad, out, norm = (x.transpose(0, 1) for x in (grad, out, norm))

        def pulled(mine: Block, seen: Block, causal: bool) -> tuple[Tensor, ...]:
            g, q, o, z = (_runs(x, mine) for x in (grad, query, out, norm))
            return _flash_backward(g, q, _runs(k, seen), _runs(v, seen), o, z, 0.0, causal, scale=ctx.scale)

        for block in ctx.own:
            for into, x in zip(made, pulled(block, block, True), strict=True):
                _rows(into, block).copy_(x.transpose(1, 2))
        for mine, prompt in ctx.behind:
            for into, x, part in zip(made, pulled(mine, prompt, False), (mine, prompt, prompt), strict=True):
                _rows(into, part).add_(x.transpose(1, 2))
        dq, *rest = (x.transpose(0, 1) for x in made)
        dk, dv = (x.unflatten(0, (-1, ctx.many)).sum(1) if ctx.many > 1 else x for x in rest)
        return dq, dk, dv, None, None


def _own(layout: Layout) -> list[Block]:
    """Every run, those of one length taken together where they lie side by side."""
    same = (list(group) for _, group in groupby(layout.blocks, key=lambda block: block.length))
    return [Block(group[0].start, sum(block.count for block in group), group[0].length) for group in same]


def _behind(layout: Layout) -> list[tuple[Block, Block]]:
    """(tails, their prompts), those of one size taken together where both lie side by side."""
    found: list[tuple[Block, Block]] = []
    for tail in layout.tails:
        mine, prompt = Block(tail.start, 1, tail.stop - tail.start), Block(tail.first, 1, tail.last - tail.first)
        if found and all(
            a.length == b.length and a.stop == b.start for a, b in zip(found[-1], (mine, prompt), strict=True)
        ):
            before, above = found.pop()
            mine = Block(before.start, before.count + 1, mine.length)
            prompt = Block(above.start, above.count + 1, prompt.length)
        found.append((mine, prompt))
    return found


def _repeated(x: Tensor, many: int) -> Tensor:
    """[k, T, d] -> [k * many, T, d], a row's heads side by side in memory."""
    if many == 1:
        return x
    return x.transpose(0, 1)[:, :, None].expand(-1, -1, many, -1).flatten(1, 2).transpose(0, 1)


def _runs(x: Tensor, block: Block) -> Tensor:
    """[h, T, ...] -> [count, h, length, ...], a view."""
    return x[:, block.start : block.stop].unflatten(1, (block.count, block.length)).transpose(0, 1)


def _rows(x: Tensor, block: Block) -> Tensor:
    """[T, ...] -> [count, length, ...], a view."""
    return x[block.start : block.stop].unflatten(0, (block.count, block.length))
