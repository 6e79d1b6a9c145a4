"""Random numbers that are a function of (key, position), never of how often a generator was called."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(keys: Tensor) -> Tensor:
    """One well-mixed int64 per row of keys [n, k] (the finaliser of SplitMix64, folded over the columns)."""
    state = torch.zeros(len(keys), dtype=torch.long, device=keys.device)
    for column in keys.unbind(1):
        state = _finalise(state ^ (column + _GOLDEN))
    return state


def uniform(key: Tensor, position: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with 53 random bits, a function of (key, position): float64 of their broadcast shape."""
    step = (position + 1) * _GOLDEN
    bits = _finalise(key + (step if isinstance(step, Tensor) else _wrapped(step)))
    return ((bits >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


_GOLDEN = -7046029254386353131
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def _wrapped(x: int) -> int:
    """x modulo 2^64, as a signed 64-bit integer."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
