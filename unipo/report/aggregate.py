"""Several seeds as one number with an interval: means with Student's t, or interquartile means with a bootstrap.

Shapes: K seeds, E evaluation episodes of each, T points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unipo.report.text import points, probability
from unipo.statistics import CONFIDENCE, mean_interval, paired_difference_interval

Triple = tuple[float, float, float]
"""(value, low, high); NaN where unknown."""
Band = tuple[np.ndarray, np.ndarray, np.ndarray]
UNKNOWN: Triple = (math.nan, math.nan, math.nan)
RESAMPLES = 2000
ENOUGH_RUNS = 5
"""Of fewer runs a bootstrap of their order says next to nothing: where one side always wins it has no width at all."""
TAILS = (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """How the seeds of a configuration are summed up.

    final: the scores of every seed, [E] each (one value where only a mean is known) -> (value, low, high).
    over: (K, E) -> what that interval is over, in a few words.
    across: a curve of every seed, [T, K] -> value, low and high, [T] each.
    versus: two configurations, {seed: score} each -> (value, low, high); `versus_title` and `versus_text` say it.
    said: how to read the intervals, for under the table.
    """

    title: str
    final: Callable[[Sequence[np.ndarray]], Triple]
    over: Callable[[int, int], str]
    across: Callable[[np.ndarray], Band]
    versus: Callable[[Mapping[str, float], Mapping[str, float]], Triple]
    versus_title: str
    versus_text: Callable[[float, float, float], str]
    said: str


# ---- means -----------------------------------------------------------------------------------------------------------
def mean_of_seeds(scores: Sequence[np.ndarray]) -> Triple:
    """Mean over seeds of each seed's mean, t interval over the seeds."""
    return mean_interval([float(s.mean()) for s in scores])


def mean_across(table: np.ndarray) -> Band:
    """`mean_interval` of every row of `table` [T, K]."""
    value, low, high = np.array([mean_interval(row.tolist()) for row in table]).reshape(-1, 3).T
    return value, low, high


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Triple:
    """Mean difference over the seeds that both have, t interval: what a seed shares cancels."""
    shared = [s for s in ours if s in theirs]
    return paired_difference_interval([ours[s] for s in shared], [theirs[s] for s in shared]) if shared else UNKNOWN


# ---- interquartile means ---------------------------------------------------------------------------------------------
def iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean without the floor(n/4) lowest and the floor(n/4) highest of n values.

    Source: Agarwal et al. (2021), arXiv:2108.13264, section 4.
    """
    ordered = np.sort(x, axis=axis)
    cut = ordered.shape[axis] // 4
    return np.take(ordered, range(cut, ordered.shape[axis] - cut), axis=axis).mean(axis)


def iqm_of_episodes(scores: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> Triple:
    """IQM of all K E scores, and its percentile bootstrap in two stages: seeds, then the episodes of each drawn seed.

    Drawing episodes only would say how well these K policies are known, not how good the method is; seeds therefore are
    drawn too wherever there are several. Seeds with unequal numbers of episodes count by their means. One number: NaN bounds.
    """
    even = len({len(s) for s in scores}) == 1
    table = np.stack(scores) if even else np.array([[s.mean()] for s in scores])
    k, e = table.shape
    value = float(iqm(table.ravel()))
    if k * e == 1:
        return value, math.nan, math.nan
    rng = np.random.default_rng(seed)
    seeds, episodes = rng.integers(k, size=(resamples, k)), rng.integers(e, size=(resamples, k, e))
    low, high = np.quantile(iqm(table[seeds[:, :, None], episodes].reshape(resamples, -1)), TAILS)
    return value, float(low), float(high)


def iqm_across(table: np.ndarray, resamples: int = 1000, seed: int = 0) -> Band:
    """IQM over the seeds of every row of `table` [T, K]; the bootstrap draws the same seeds at every point of the curve."""
    k = table.shape[1]
    drawn = np.random.default_rng(seed).integers(k, size=(resamples, k))
    low, high = np.quantile(iqm(table[:, drawn]), TAILS, axis=-1)
    return iqm(table), low, high


def improvement(ours: Mapping[str, float], theirs: Mapping[str, float], resamples: int = RESAMPLES) -> Triple:
    """P(X > Y) + P(X = Y)/2 for a run X of ours and a run Y of theirs, bootstrap over the runs of either.

    NaN bounds below ENOUGH_RUNS runs of either, all unknown below two.
    Source: Agarwal et al. (2021), arXiv:2108.13264, section 4 (Mann-Whitney U).
    """
    x, y = np.array(list(ours.values())), np.array(list(theirs.values()))
    if min(len(x), len(y)) < 2:
        return UNKNOWN
    wins = (np.sign(x[:, None] - y) + 1) / 2
    if min(len(x), len(y)) < ENOUGH_RUNS:
        return float(wins.mean()), math.nan, math.nan
    rng = np.random.default_rng(0)
    i, j = rng.integers(len(x), size=(resamples, len(x))), rng.integers(len(y), size=(resamples, len(y)))
    low, high = np.quantile(wins[i[:, :, None], j[:, None, :]].mean((1, 2)), TAILS)
    return float(wins.mean()), float(low), float(high)


MEANS = Aggregate(
    title="mean over seeds", final=mean_of_seeds, over=lambda k, e: f"t, {k} seeds", across=mean_across,
    versus=paired_difference, versus_title="difference to {}, points", versus_text=points,
    said="Several seeds: Student's t over the seeds' final accuracies; differences are paired by seed. One seed: the interval "
         "that the run recorded over its held-out prompts. Bands in the curves: 95 % t intervals over seeds, after smoothing "
         "each run.",
)  # fmt: skip
INTERQUARTILE = Aggregate(
    title="interquartile mean",
    final=iqm_of_episodes,
    over=lambda k, e: " x ".join([f"{k} seed{'s' * (k > 1)}", *[f"{e} episodes"] * (e > 1)]),
    across=iqm_across, versus=improvement, versus_title="better than {}, P", versus_text=probability,
    said="After: the interquartile mean (IQM) of the returns of the last evaluation, over seeds x episodes where the run kept "
         "every episode's return, else over the seeds' mean returns. Intervals: 95 % percentile bootstrap in two stages, seeds "
         "and then the episodes of each; of one seed, over its episodes only. Below some five seeds a bootstrap is too "
         "narrow. P: the probability that a run ends with a higher mean return than a run of the other, bootstrap over runs "
         "from five on. Bands in the other curves: bootstrap over seeds, after smoothing each run.",
)  # fmt: skip
