"""What is not a product in the blocks of a Llama-like model, differentiable, in C (`blocks.c`): float32 on a CPU.

Each function passes over its rows once and keeps nothing that can be had from its inputs, where torch's operations write
and read memory for every power, mean, product and sum. Second derivatives are not there. Sums do not depend on the number
of threads.
"""

from __future__ import annotations

import ctypes
import warnings
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unipo.compilers import NotCompiled, loaded
from unipo.policies.layout import Layout

SOURCE = Path(__file__).with_name("blocks.c")
PIECE = 64
"""Rows of one partial sum in `blocks.c`."""
_LONG, _POINTER, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "norm": (_LONG, _LONG, *[_POINTER] * 3, ctypes.c_double, *[_POINTER] * 3, _INT),
    "norm_back": (_LONG, _LONG, *[_POINTER] * 7, _INT),
    "turn": (_LONG, _LONG, _LONG, _POINTER, _POINTER, ctypes.c_double, *[_POINTER] * 4, _INT),
    "turn_back": (_LONG, _LONG, _LONG, *[_POINTER] * 8, _INT),
    "gate": (_LONG, *[_POINTER] * 3, _INT),
    "gate_back": (_LONG, *[_POINTER] * 5, _INT),
    "attend": (_POINTER, _INT, _INT),
}


@cache
def library() -> Any:
    """The compiled functions; None, with one line that says why, where they cannot be had."""
    try:
        found = loaded(SOURCE)
    except NotCompiled as error:
        warnings.warn(f"scoring in torch's operations, which is slower: {error}", stacklevel=2)
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = list(arguments), None
    return found


def _at(x: Tensor | None) -> int | None:
    """Where its numbers begin. Raises TypeError for what C would misread."""
    if x is None:
        return None
    if x.dtype is not torch.float32 or x.device.type != "cpu" or not x.is_contiguous():
        raise TypeError(f"expected contiguous float32 on the CPU, found {x.dtype} on {x.device}")
    return x.data_ptr()


def _call(name: str, *arguments: Any) -> None:
    given = (_at(x) if isinstance(x, Tensor) else x for x in arguments)
    getattr(library(), name)(*given, torch.get_num_threads())


def _pieces(x: Tensor, rows: int, width: int) -> Tensor:
    """Partial sums of a gradient over pieces of its rows, to be added up."""
    return x.new_zeros((rows + PIECE - 1) // PIECE, width)


# ---- norms -------------------------------------------------------------------------------------------------------------
def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s, weight s / sqrt(mean s^2 + eps)) for s = x + delta, or x: [..., d], weight [d]."""
    summed, normed = _Norm.apply(x, delta, weight, eps)
    return summed, normed


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, delta = x.contiguous(), None if delta is None else delta.contiguous()
        summed, width = x if delta is None else torch.empty_like(x), x.shape[-1]
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _call("norm", inverse.numel(), width, x, delta, weight, eps, summed, y, inverse)
        ctx.save_for_backward(summed, weight, inverse)
        ctx.set_materialize_grads(False)
        ctx.added = delta is not None
        return summed, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, more: Tensor | None, grad: Tensor | None) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        if grad is None:
            return more, more if ctx.added else None, None, None
        rows, width = inverse.numel(), x.shape[-1]
        dx, dw = torch.empty_like(x), _pieces(x, rows, width)
        more = None if more is None else more.contiguous()
        _call("norm_back", rows, width, grad.contiguous(), more, x, weight, inverse, dx, dw)
        return dx, dx if ctx.added else None, dw.sum(0), None


# ---- rotations ---------------------------------------------------------------------------------------------------------
def turned(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """x [..., H, h] by the angles whose cosines and sines are [..., h], halves against each other; with `weight` [h] normed
    before."""
    return _Turn.apply(x, cos, sin, weight, eps)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        if cos.shape != (*x.shape[:-2], x.shape[-1]) or x.shape[-1] % 2:
            raise TypeError(f"angles {tuple(cos.shape)} do not suit heads {tuple(x.shape)}")
        y, inverse = torch.empty_like(x), None if weight is None else x.new_empty(x.shape[:-1])
        _call("turn", *_sizes(x), x, weight, eps, cos, sin, y, inverse)
        ctx.save_for_backward(x if weight is not None else None, cos, sin, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, cos, sin, weight, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        dx, (rows, _, size) = torch.empty_like(grad), _sizes(grad)
        dw = None if weight is None else _pieces(grad, rows, size)
        _call("turn_back", *_sizes(grad), grad, x, weight, inverse, cos, sin, dx, dw)
        return dx, None, None, None if dw is None else dw.sum(0), None


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Rows, heads and their size of [..., H, h]."""
    return x.numel() // (x.shape[-2] * x.shape[-1]), x.shape[-2], x.shape[-1]


# ---- gates -------------------------------------------------------------------------------------------------------------
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up."""
    return _Gate.apply(gate, up)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        _call("gate", y.numel(), gate, up, y)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _call("gate_back", dgate.numel(), grad.contiguous(), gate, up, dgate, dup)
        return dgate, dup


# ---- attention ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Runs:
    """A `Layout` as `blocks.c` reads it: `each` [R, 4] start, length, first and length of what is in front; runs behind one
    prompt, and that prompt before them, are a family, which begins at `family` [F + 1]. `longest`: columns seen by a run."""

    each: Tensor
    family: Tensor
    longest: int

    @classmethod
    def of(cls, layout: Layout) -> Runs:
        begins, found = [tail.start for tail in layout.tails], []
        for start, length in ((b.start + i * b.length, b.length) for b in layout.blocks for i in range(b.count)):
            tail = layout.tails[bisect_right(begins, start) - 1] if begins else None
            inside = tail is not None and tail.start <= start < tail.stop
            found.append((start, length, *((tail.first, tail.last - tail.first) if tail and inside else (start, 0))))
        found.sort(key=lambda run: (run[2], run[0]))
        first = [i for i, run in enumerate(found) if i == 0 or run[2] != found[i - 1][2]]
        return cls(torch.tensor(found), torch.tensor([*first, len(found)]), max(run[1] + run[3] for run in found))


class _Attention(ctypes.Structure):
    _fields_ = [
        *((n, _POINTER) for n in ("query", "key", "value", "out", "norm", "grad", "dquery", "dkey", "dvalue")),
        *((n, _POINTER) for n in ("run", "family")),
        *((n, _LONG) for n in ("families", "heads", "kv", "size", "longest")),
        ("scale", ctypes.c_double),
    ]


def attended(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float) -> Tensor:
    """query [T, H, h], key and value [T, K, h], H a multiple of K -> [T, H, h]: every token sees what is before it in its run,
    and what its run lies behind."""
    return _Attend.apply(query, key, value, runs, scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float) -> Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))
        if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            raise TypeError(f"heads differ: {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
        out, norm = torch.empty_like(query), query.new_empty(query.shape[:2])
        _attend(runs, scale, query, key, value, out, norm)
        ctx.save_for_backward(query, key, value, out, norm)
        ctx.runs, ctx.scale = runs, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        made = [torch.empty_like(x) for x in ctx.saved_tensors[:3]]
        _attend(ctx.runs, ctx.scale, *ctx.saved_tensors, grad.contiguous(), *made)
        return *made, None, None


def _attend(runs: Runs, scale: float, *states: Tensor) -> None:
    """Forward with query, key, value, out and norm; backward with the gradients too."""
    back, sizes = len(states) > 5, (states[0].shape[1], *states[1].shape[1:])
    pointers = [_at(x) for x in states] + [None] * (9 - len(states))
    order = (runs.each.data_ptr(), runs.family.data_ptr(), len(runs.family) - 1)
    of = _Attention(*pointers, *order, *sizes, runs.longest, scale)
    _call("attend", ctypes.addressof(of), int(back))
