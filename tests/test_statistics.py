"""Intervals against published numbers, enumeration and coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from unipo.statistics import (
    bootstrap_interval,
    length_controlled,
    mean_interval,
    paired_difference_interval,
    pass_at_k,
    wilson_interval,
)


def test_wilson_by_hand() -> None:
    # 8 of 10, z = 1.959964: (0.8 + 0.19207 -+ 1.959964 sqrt(0.016 + 0.0096036)) / 1.384146
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.490162, abs=1e-6)
    assert high == pytest.approx(0.943318, abs=1e-6)


@pytest.mark.parametrize(("c", "n"), [(0, 7), (3, 7), (7, 7), (1, 1), (123, 256)])
def test_wilson_bounds_solve_the_score_equation(c: int, n: int) -> None:
    """Wilson's bounds are the p at which |p^ - p| = z sqrt(p (1 - p) / n)."""
    z = stats.norm.ppf(0.975)
    for p in wilson_interval(c, n):
        assert abs(c / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), abs=1e-12)


def test_wilson_is_symmetric_and_stays_inside() -> None:
    low, high = wilson_interval(2, 9)
    mirrored = wilson_interval(7, 9)
    assert (1 - high, 1 - low) == pytest.approx(mirrored)
    assert wilson_interval(0, 20)[0] == 0.0
    assert wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_covers() -> None:
    """Exact coverage at p = 0.3, n = 40, by enumerating the binomial: near 95 %."""
    covered = sum(
        stats.binom.pmf(c, 40, 0.3) for c in range(41) if wilson_interval(c, 40)[0] <= 0.3 <= wilson_interval(c, 40)[1]
    )
    assert 0.93 < covered < 0.975


def test_mean_interval_by_hand() -> None:
    # 1..5: mean 3, s = sqrt(2.5), t_4 = 2.776445: half width 2.776445 sqrt(0.5) = 1.963243
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3.0, 3 - 1.963243, 3 + 1.963243), abs=1e-6)


def test_mean_interval_of_one_value_has_no_bounds() -> None:
    mean, low, high = mean_interval([0.5])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_pairing_cancels_what_is_shared() -> None:
    seeds = np.array([0.1, 0.9, 0.4, 0.7])
    mean, low, high = paired_difference_interval(list(seeds + 0.05), list(seeds))
    assert (mean, low, high) == pytest.approx((0.05, 0.05, 0.05))
    assert paired_difference_interval(list(seeds), list(seeds + 0.05))[0] == pytest.approx(-0.05)


def test_bootstrap_agrees_with_the_normal_interval_and_repeats() -> None:
    x = np.random.default_rng(1).normal(2.0, 3.0, 400)
    mean, low, high = bootstrap_interval(list(x))
    half = 1.96 * x.std() / 20
    assert mean == pytest.approx(x.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.03)
    assert bootstrap_interval(list(x)) == (mean, low, high)
    assert bootstrap_interval([1, 2, 100], statistic=np.median)[0] == 2.0


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (4, 3, 2), (4, 1, 4)])
def test_pass_at_k_counts_subsets(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets))


def test_pass_at_k_is_unbiased() -> None:
    p, n, k = 0.3, 8, 4
    expected = sum(stats.binom.pmf(c, n, p) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="successes=3, n=2"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="at least one finite number"):
        mean_interval([])
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="2 and 1 values"):
        paired_difference_interval([1, 2], [1])
    with pytest.raises(ValueError, match="at least k samples"):
        pass_at_k(2, 1, 3)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=95)


# ---- win rates at equal length ---------------------------------------------------------------------------------------
def planted(a: float, b: float, n: int, seed: int, shift: float = 20.0) -> tuple[list[float], list[float]]:
    """n wins with logit a + b tanh(d / s), d normal around `shift` characters."""
    random = np.random.default_rng(seed)
    d = shift + 40.0 * random.normal(size=n)
    chance = 1.0 / (1.0 + np.exp(-(a + b * np.tanh(d / d.std()))))
    return (random.random(n) < chance).astype(float).tolist(), d.tolist()


def test_a_planted_length_bias_is_taken_out() -> None:
    """Answers that are no better win because they are longer; the interval covers the truth as often as it says."""
    covered, raw = 0, []
    for seed in range(100):
        wins, longer = planted(0.0, 1.5, 400, seed)
        _, low, high, slope = length_controlled(wins, longer)
        covered += low <= 0.5 <= high
        raw.append(sum(wins) / len(wins))
        assert slope == pytest.approx(1.5, abs=1.0)
    assert sum(raw) / len(raw) > 0.57
    assert 88 <= covered <= 100
    wins, longer = planted(0.8, -1.0, 20000, 7)
    assert length_controlled(wins, longer)[0] == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.02)


def test_without_lengths_it_is_the_win_rate() -> None:
    wins = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 0.5]
    rate, low, high, slope = length_controlled(wins, [3.0] * 8)
    assert rate == pytest.approx(5.0 / 8.0, abs=2e-3), "a wide prior on the logit"
    assert low < rate < high
    assert slope == 0.0
    assert length_controlled([0.5] * 6, [1.0, -2.0, 3.0, 0.0, 5.0, 1.0])[0] == pytest.approx(0.5)


def test_exchanged_sides_have_the_other_rate() -> None:
    wins, longer = planted(0.4, 0.7, 300, 3)
    rate, low, high, slope = length_controlled(wins, longer)
    other = length_controlled([1 - w for w in wins], [-d for d in longer])
    assert other == pytest.approx((1 - rate, 1 - high, 1 - low, slope))


def test_the_fit_is_the_maximum_of_the_likelihood() -> None:
    """The gradient of the penalised likelihood is 0 there, and the sandwich is written out."""
    wins, longer = planted(-0.3, 0.9, 80, 5)
    rate, low, _, b = length_controlled(wins, longer)
    a, d, y = math.log(rate / (1 - rate)), np.array(longer), np.array(wins)
    x = np.stack([np.ones(80), np.tanh(d / d.std())], 1)
    p = 1 / (1 + np.exp(-x @ [a, b]))
    assert np.abs(x.T @ (y - p) - np.array([a, b]) / 100).max() < 1e-6
    bread = np.linalg.inv(x.T @ np.diag(p * (1 - p)) @ x + np.eye(2) / 100)
    error = math.sqrt((bread @ (x.T @ np.diag((y - p) ** 2) @ x) @ bread)[0, 0] * 80 / 79)
    assert low == pytest.approx(1 / (1 + math.exp(-(a - 1.959964 * error))), abs=1e-6)


def test_one_side_that_always_wins_and_answers_to_one_prompt() -> None:
    rate, low, high, _ = length_controlled([1.0] * 50, [float(i) for i in range(50)])
    assert 0.9 < low < rate <= high <= 1.0
    wins, longer = planted(0.3, 0.0, 100, 9)
    alone = length_controlled(wins, longer)
    four = length_controlled(wins * 4, longer * 4, [i for _ in range(4) for i in range(100)])
    assert four[0] == pytest.approx(alone[0], abs=2e-3)
    assert four[2] - four[1] == pytest.approx(alone[2] - alone[1], rel=0.02), "copies of a prompt are no new evidence"
    with pytest.raises(ValueError, match="a difference of lengths for each win"):
        length_controlled([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="wins from 0 to 1"):
        length_controlled([2.0], [1.0])
