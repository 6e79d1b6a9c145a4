"""Means and variances of numbers that arrive in parts, and how well one number explains another."""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.functional.shapes import same_length

__all__ = ["merged_moments", "weighted_r2"]


def merged_moments(count: float, mean: float, variance: float, values: Tensor) -> tuple[float, float, float]:
    """(count, mean, population variance) of `count` numbers seen before, with those moments, and `values` [n] together.

        m = m0 + (m1 - m0) n1 / n         n v = n0 v0 + n1 v1 + (m1 - m0)^2 n0 n1 / n      (Chan et al. 1979)
    """  # fmt: skip
    n = len(values)
    total = count + n
    if n == 0:
        return count, mean, variance
    x = values.double()
    shift, own = float(x.mean()) - mean, float(x.var(correction=0))
    merged = (count * variance + n * own + shift * shift * count * n / total) / total
    return total, mean + shift * n / total, merged


def weighted_r2(actual: Tensor, predicted: Tensor, weight: Tensor) -> Tensor:
    """R^2 of the linear regression actual ~ a + b * predicted under weights [n] >= 0: the squared weighted correlation.

    0 where `predicted` does not vary; NaN where `actual` does not: there is nothing to explain.
    """
    same_length(actual=actual, predicted=predicted, weight=weight)
    w = weight / weight.sum()
    x, y = predicted - (w * predicted).sum(), actual - (w * actual).sum()
    square = (w * x * x).sum() * (w * y * y).sum()
    if not bool((w * x * x).sum() > 0) and bool((w * y * y).sum() > 0):
        return torch.zeros_like(square)
    return (w * x * y).sum().square() / square
