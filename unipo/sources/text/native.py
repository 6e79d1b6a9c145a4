"""The native form of decoding and drawing on a CPU: `fused.c`, compiled once per machine and kept in the user's cache.

Without a C compiler `library()` is None and torch's operations are used.
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unipo.compilers import NotCompiled, loaded

SOURCE = Path(__file__).with_name("fused.c")
LANES = 16
"""Most columns that `fused.c` reads at once: memory has a multiple of it, and as many beyond those in use."""


@dataclass(frozen=True, slots=True)
class Library:
    """The functions of `fused.c`, and the address of torch's products of bfloat16 (None: not there)."""

    step: Any
    draw: Any
    product: Any
    narrow: int | None


@cache
def library() -> Library | None:
    """The compiled functions; None where they cannot be had."""
    try:
        found = loaded(SOURCE)
    except NotCompiled as error:
        warnings.warn(f"decoding in torch's operations, which is slower: {error}", stacklevel=2)
        return None
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    found.step.argtypes, found.step.restype = [pointer, long, long, pointer, pointer, pointer], None
    found.draw.argtypes = [pointer, long, long, ctypes.c_double, pointer, pointer, pointer]
    found.product.argtypes = [long, long, long, pointer, long, pointer, pointer, ctypes.c_int]
    found.draw.restype = found.product.restype = None
    return Library(found.step, found.draw, found.product, _blas("gemm_bf16bf16f32_"))


def _blas(function: str) -> int | None:
    """Address of a Fortran function in torch's own library, with its vector code and its threads."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            found = getattr(ctypes.CDLL(str(path)), function, None)
            return None if found is None else ctypes.cast(found, ctypes.c_void_p).value
    return None


# ---- products ----------------------------------------------------------------------------------------------------------
PANEL = 64


@dataclass(frozen=True, slots=True)
class Panels:
    """A float32 matrix [in, out] in the order in which it is read: `data` [out / PANEL rounded up, in, PANEL].

    Measured beside MKL (one core, in 640, out 3,840): 1.1 times as fast for 64 rows, 2.8 times for 8.
    """

    native: Library
    data: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, native: Library, transposed: Tensor) -> Panels:
        """From [out, in]."""
        out, inside = transposed.shape
        data = transposed.new_zeros((out + PANEL - 1) // PANEL, inside, PANEL)
        whole = out // PANEL
        data[:whole] = transposed[: whole * PANEL].view(whole, PANEL, inside).transpose(1, 2)
        if out % PANEL:
            data[whole, :, : out % PANEL] = transposed[whole * PANEL :].t()
        return cls(native, data, (inside, out))

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] -> [n, out]."""
        x = x.contiguous()
        y = x.new_empty(len(x), self.shape[1])
        self.native.product(len(x), *self.shape, x.data_ptr(), self.shape[0], self.data.data_ptr(), y.data_ptr(), 0)
        return y


# ---- one step ----------------------------------------------------------------------------------------------------------
MATRICES = ("qkv", "out", "gate_up", "down")
VECTORS = ("qkv_bias", "qk", "out_bias", "gate_up_bias", "down_bias")


class _Layer(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in (*MATRICES, *VECTORS, "keys", "values")]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (n, ctypes.c_void_p)
            for n in ("narrow", "layer", "output", "embedding", "cos", "sin", "x", "y", "wide", "half")
        ),
        *((n, ctypes.c_int64) for n in ("layers", "heads", "kv", "size", "width", "inner", "words", "columns")),
        ("eps", ctypes.c_double),
    ]


class NativeStep:
    """`step` of a `FusedDecoding` on a CPU; it reads and writes that object's memory."""

    def __init__(self, native: Library, decoding: Any) -> None:
        parts, layers, output = decoding.parts, decoding.layers, decoding.output
        slots, width = decoding.slots, decoding.embedding.shape[1]
        attended, inner, words = parts.heads * parts.size, layers[0].down.shape[0], output.shape[1]
        narrow = None if isinstance(output, Panels) else native.narrow
        scratch = [torch.empty(slots, w) for w in (width, max(width, attended), max(layers[0].qkv.shape[1], 2 * inner))]
        half = torch.empty(slots, max(width, attended, inner) if narrow else 0, dtype=torch.bfloat16)
        embedding = decoding.embedding.detach().contiguous()
        memory = [(decoding.keys[i].data_ptr(), decoding.values[i].data_ptr()) for i in range(len(layers))]
        rows = [
            (*(_address(getattr(w, n)) for n in (*MATRICES, *VECTORS)), *kv)
            for w, kv in zip(layers, memory, strict=True)
        ]
        pointers = map(_address, (output, embedding, decoding.cos.contiguous(), decoding.sin, *scratch, half))
        sizes = len(rows), parts.heads, parts.keys, parts.size, width, inner, words, decoding.keys.shape[-1]
        self.native, self.logits, self.held = native, torch.empty(slots, words), (embedding, *scratch, half, decoding)
        self.layers = (_Layer * len(rows))(*(_Layer(*row) for row in rows))
        self.model = _Model(narrow, ctypes.addressof(self.layers), *pointers, *sizes, parts.eps)
        self.at = ctypes.addressof(self.model)

    def __call__(self, token: Tensor, row: Tensor, now: int) -> Tensor:
        """Logits [B, V] in memory that the next call overwrites."""
        logits = self.logits[: len(token)]
        self.native.step(self.at, len(token), now, row.data_ptr(), token.data_ptr(), logits.data_ptr())
        return logits


def _address(held: Tensor | Panels | None) -> int | None:
    """Where its memory begins; a matrix of bfloat16 weights is a transposed view."""
    tensor = held.data if isinstance(held, Panels) else held
    assert tensor is None or tensor.is_contiguous() or tensor.t().is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def drawn(native: Library, logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`drawing.inverted` of logits / temperature."""
    token, logp = torch.empty(len(logits), dtype=torch.long), torch.empty(len(logits))
    rows, words = logits.shape
    native.draw(logits.data_ptr(), rows, words, temperature, u.data_ptr(), token.data_ptr(), logp.data_ptr())
    return token, logp
