"""How noisy the gradient of a batch is, from the gradients of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def parted(parameters: Sequence[nn.Parameter], shares: Sequence[Callable[[], object]]) -> float:
    """Add up what `shares` leave in `.grad`, one after the other; returns the variance of the sum, NaN for a single share.

    Each of the N calls back-propagates its share c_k of g = sum_k c_k, on parts of a batch of equal size that are independent
    of each other. Then N c_k are N estimates of g, whose mean it is, and its variance is estimated by

        V = sum_k |N c_k - g|^2 / (N - 1) / N = (N sum_k |c_k|^2 - |g|^2) / (N - 1)
    """
    before, total = [p.grad for p in parameters], dict[int, Tensor]()
    squares, n = 0.0, len(shares)
    for share in shares:
        for p in parameters:
            p.grad = None
        share()
        for i, p in enumerate(parameters):
            if p.grad is not None:
                squares += _square(p.grad)
                total[i] = total[i] + p.grad if i in total else p.grad
    whole = sum(_square(g) for g in total.values())
    for i, p in enumerate(parameters):
        grads = [g for g in (before[i], total.get(i)) if g is not None]
        p.grad = torch.stack(grads).sum(0) if len(grads) > 1 else grads[0] if grads else None
    return (n * squares - whole) / (n - 1) if n > 1 else math.nan


def _square(x: Tensor) -> float:
    return float(x.detach().double().square().sum())
