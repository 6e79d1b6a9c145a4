"""Intervals and estimators for what a run measured: success rates, means over seeds, pass@k. Pure numpy and scipy.

An interval at confidence c covers the true value in a share c of repetitions of the whole experiment. NaN bounds mean
that the data cannot give one (a single seed has no spread).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

CONFIDENCE = 0.95


def wilson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """(low, high) of a success rate p from `successes` out of `n` independent trials.

        (p^ + z^2/2n +- z sqrt(p^(1-p^)/n + z^2/4n^2)) / (1 + z^2/n)

    It stays in [0, 1] and is right near the ends, where the normal interval p^ +- z s has no width. No trials: (0, 1).
    Source: Wilson (1927), JASA 22:209. Raises ValueError unless 0 <= successes <= n.
    """
    _check_confidence(confidence)
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, found successes={successes}, n={n}")
    if n == 0:
        return 0.0, 1.0
    z2 = float(special.ndtri(0.5 + confidence / 2)) ** 2
    p = successes / n
    centre, width = p + z2 / (2 * n), math.sqrt(z2 * p * (1 - p) / n + z2**2 / (4 * n**2))
    low, high = (centre - width) / (1 + z2 / n), (centre + width) / (1 + z2 / n)
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """(mean, low, high) of independent values such as one number per seed: mean +- t_{n-1} s / sqrt(n).

    s is the sample standard deviation (n - 1); Student's t, so five seeds are paid for honestly. One value: NaN bounds.
    Raises ValueError for no values, or for one that is not finite.
    """
    _check_confidence(confidence)
    x = _finite(values)
    mean, n = float(x.mean()), len(x)
    if n == 1:
        return mean, math.nan, math.nan
    half = float(special.stdtrit(n - 1, 0.5 + confidence / 2)) * float(x.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def paired_difference_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """(mean, low, high) of a_i - b_i, where a_i and b_i share a seed or a prompt; what they share cancels.

    Raises ValueError for unequal lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"expected pairs, found {len(a)} and {len(b)} values: give the same seeds, in the same order")
    return mean_interval((_finite(a) - _finite(b)).tolist(), confidence)


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[..., np.ndarray] = np.mean,
    confidence: float = CONFIDENCE,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(statistic, low, high) by the percentile bootstrap: quantiles of the statistic over resamples with replacement.

    `statistic(x, axis=-1)` reduces one axis, as `np.mean` and `np.median` do. Same seed, same interval. It is too narrow
    below some ten values: use `mean_interval` there. Source: Efron (1979).
    """
    _check_confidence(confidence)
    x = _finite(values)
    drawn = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    low, high = np.quantile(statistic(x[drawn], axis=-1), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(statistic(x, axis=-1)), float(low), float(high)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right), from n samples of which c were right.

        1 - C(n-c, k) / C(n, k)

    The plug-in 1 - (1 - c/n)^k is biased downwards. Source: Chen et al. (2021), arXiv:2107.03374, eq. 1.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"expected 0 <= c <= n and 1 <= k <= n, found n={n}, c={c}, k={k}: draw at least k samples")
    return 1.0 - float(special.comb(n - c, k, exact=True) / special.comb(n, k, exact=True))


def _finite(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"expected a list of at least one finite number, found {values!r}")
    return x


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1 such as 0.95, found {confidence}")
