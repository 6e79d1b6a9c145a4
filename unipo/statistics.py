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


def length_controlled(wins: Sequence[float], longer: Sequence[float], group: Sequence[int] | None = None,
                      confidence: float = CONFIDENCE) -> tuple[float, float, float, float]:  # fmt: skip
    """(win rate at equal length, low, high, slope): what is left of a win rate when neither side may win by being longer.

        logit P(win_i) = a + b tanh(d_i / s),     d_i = own length - the other's,   s their standard deviation
        rate = sigmoid(a), the fit at d = 0

    `wins` in [0, 1], a tie is 1/2. Maximum likelihood, with a normal prior of standard deviation 10 on a and b, which keeps them
    finite where one side always wins; the interval is sigmoid of a +- z times its sandwich error, in which entries of one
    `group` (answers to one prompt) may depend on each other. With the sides exchanged it is 1 - rate. All d equal: b is 0. A
    bias is taken out as far as it is one of length: what both a longer and a better answer have counts as length.
    Source: Dubois et al. (2024), arXiv:2404.04475, without their term for the difficulty of the instruction.
    """
    _check_confidence(confidence)
    y, d = _finite(wins), _finite(longer)
    if len(y) != len(d):
        raise ValueError(f"expected a difference of lengths for each win, found {len(d)} for {len(y)}")
    if not ((y >= 0) & (y <= 1)).all():
        raise ValueError("expected wins from 0 to 1, a tie being 1/2")
    spread = float(d.std())
    x = np.stack([np.ones(len(y)), np.tanh(d / spread) if spread > 0 else np.zeros(len(y))], 1)
    beta, prior = np.zeros(2), np.eye(2) / 100.0
    for _ in range(100):
        p = special.expit(x @ beta)
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + prior, x.T @ (y - p) - prior @ beta)
        beta = beta + step * min(1.0, 4.0 / max(float(np.abs(step).max()), 1e-300))
        if np.abs(step).max() < 1e-10:
            break
    p = special.expit(x @ beta)
    bread = np.linalg.inv((x.T * (p * (1 - p))) @ x + prior)
    numbers = np.unique(np.arange(len(y)) if group is None else np.asarray(group), return_inverse=True)[1]
    scores = np.zeros((int(numbers.max()) + 1, 2))
    np.add.at(scores, numbers, x * (y - p)[:, None])
    n = len(scores)
    error = math.sqrt((bread @ (scores.T @ scores) @ bread)[0, 0] * (n / (n - 1) if n > 1 else math.nan))
    z = float(special.ndtri(0.5 + confidence / 2))
    rate, low, high = (float(special.expit(beta[0] + side * z * error)) for side in (0.0, -1.0, 1.0))
    return (rate if n > 1 else float(special.expit(beta[0]))), low, high, float(beta[1])


def _finite(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"expected a list of at least one finite number, found {values!r}")
    return x


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1 such as 0.95, found {confidence}")
