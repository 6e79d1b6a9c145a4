"""Intervals: a result is printed with one or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); (0, 1) for no trials."""
    if n <= 0:
        return 0.0, 1.0
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) by Student's t; the interval of a single value is infinite."""
    x = np.asarray(values, dtype=float)
    if not len(x):
        return math.nan, -math.inf, math.inf
    mean = float(x.mean())
    if len(x) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.5 + confidence / 2, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return mean, mean - half, mean + half


def paired_difference_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high) of a - b over pairs, such as the same seeds under two methods, by Student's t."""
    if len(a) != len(b):
        raise ValueError(f"paired values come in equal numbers; found {len(a)} and {len(b)}")
    return mean_interval(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), confidence)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that at least one of k completions is right, from `correct` of n (arXiv 2107.03374, eq. 1)."""
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, found {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
