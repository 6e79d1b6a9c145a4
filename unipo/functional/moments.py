"""Means and variances of numbers that arrive in parts, and how well one number explains another."""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.functional.shapes import same_length

__all__ = ["merged_moments", "moments_of", "weighted_r2"]


Moments = tuple[float, float, float]
"""How many numbers, their mean, and their population variance."""


def moments_of(values: Tensor) -> Moments:
    """(count, mean, population variance) of `values` [n]; zeros for none."""
    if not len(values):
        return 0.0, 0.0, 0.0
    x = values.double()
    return float(len(x)), float(x.mean()), float(x.var(correction=0))


def merged_moments(first: Moments, second: Moments) -> Moments:
    """The moments of two sets of numbers together (Chan et al. 1979).

        m = m1 + (m2 - m1) n2 / n         n v = n1 v1 + n2 v2 + (m2 - m1)^2 n1 n2 / n
    """  # fmt: skip
    (n1, m1, v1), (n2, m2, v2) = first, second
    n = n1 + n2
    if not n:
        return 0.0, 0.0, 0.0
    shift = m2 - m1
    return n, m1 + shift * n2 / n, (n1 * v1 + n2 * v2 + shift * shift * n1 * n2 / n) / n


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
