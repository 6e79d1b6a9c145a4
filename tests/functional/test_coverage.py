"""Data-set characteristics: by hand, against sets of tuples, and the paper's identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unipo.functional import (
    digitise,
    distinct_rows,
    log_state_action_coverage,
    row_entropy,
    state_action_coverage,
    trajectory_quality,
)

DRAWN = np.random.default_rng(43)
OBSERVATIONS, ACTIONS = DRAWN.integers(-4, 4, (500, 3)), DRAWN.integers(0, 3, 500)


def test_quality_of_random_is_zero_and_of_expert_one() -> None:
    random, expert = [-200.0, -180.0, -220.0], [-110.0, -90.0]
    assert trajectory_quality(np.array(random), -200, -100) == 0
    assert trajectory_quality(torch.tensor(expert), -200, -100) == 1
    assert trajectory_quality(np.array([-75.0]), -200, -100) == pytest.approx(1.25)


def test_quality_is_invariant_to_affine_maps_of_the_return_only() -> None:
    """A shift of every step's reward is one only where all episodes are equally long."""
    returns, lengths = np.array([1.0, 2.0, 6.0]), np.array([4, 4, 10])
    assert trajectory_quality(3 * returns + 5, 3 * 1 + 5, 3 * 6 + 5) == pytest.approx(trajectory_quality(returns, 1, 6))
    assert trajectory_quality(returns, 1, 6) == pytest.approx(0.4)
    assert trajectory_quality(returns + lengths, 1 + 4, 6 + 10) == pytest.approx(4 / 11)


def test_quality_of_a_mixture_is_the_mean_by_episodes() -> None:
    a, b = np.array([1.0, 3.0, 2.0]), np.array([10.0])
    parts = [3 * trajectory_quality(a, 0, 10), trajectory_quality(b, 0, 10)]
    assert trajectory_quality(np.concatenate([a, b]), 0, 10) == pytest.approx(sum(parts) / 4)


def test_distinct_rows_are_those_of_a_set() -> None:
    pairs = {(*o, a) for o, a in zip(OBSERVATIONS.tolist(), ACTIONS.tolist(), strict=True)}
    assert distinct_rows(OBSERVATIONS, ACTIONS) == len(pairs) > 100
    assert distinct_rows(torch.from_numpy(OBSERVATIONS), torch.from_numpy(ACTIONS)) == len(pairs)
    assert distinct_rows(OBSERVATIONS[:0], ACTIONS[:0]) == 0


def test_columns_do_not_mix_and_large_numbers_do_not_collide() -> None:
    assert distinct_rows(np.array([[1, 12], [11, 2]])) == 2
    assert distinct_rows(np.array([2**53, 2**53 + 1, 2**53])) == 2
    wide = np.eye(70, dtype=np.int64) * 2**40
    assert distinct_rows(wide) == 70
    assert distinct_rows(np.array([[True, False], [True, True]]), np.array([0, 0])) == 2
    assert distinct_rows(np.zeros((3, 2, 2), dtype=np.uint8)) == 1


def test_entropy_bounds_the_count_with_equality_for_even_rows() -> None:
    """Counts 3 and 1: H = log 4 - 3/4 log 3."""
    assert row_entropy(np.array([5, 5, 7, 5])) == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert math.exp(row_entropy(OBSERVATIONS, ACTIONS)) < distinct_rows(OBSERVATIONS, ACTIONS)
    even = np.arange(6).repeat(4)
    assert math.exp(row_entropy(even)) == pytest.approx(distinct_rows(even))


def test_coverage_of_the_reference_is_one() -> None:
    reference = (OBSERVATIONS, ACTIONS)
    assert state_action_coverage(OBSERVATIONS, ACTIONS, reference) == 1
    assert log_state_action_coverage(OBSERVATIONS, ACTIONS, reference) == 1
    few = distinct_rows(OBSERVATIONS[:20], ACTIONS[:20])
    every = distinct_rows(*reference)
    assert state_action_coverage(OBSERVATIONS[:20], ACTIONS[:20], reference) == pytest.approx(few / every)
    assert log_state_action_coverage(OBSERVATIONS[:20], ACTIONS[:20], reference) == pytest.approx(
        math.log(few) / math.log(every)
    )


def test_a_union_has_at_most_the_sum_and_at_least_the_larger() -> None:
    both = distinct_rows(OBSERVATIONS)
    first, second = distinct_rows(OBSERVATIONS[:300]), distinct_rows(OBSERVATIONS[300:])
    assert max(first, second) <= both < first + second


def test_bins_by_hand() -> None:
    """Four bins between 0 and 2, resp. -1 and 1: edges belong above, what lies outside to the last bin of its side."""
    x = np.array([[0.0, -1.0], [0.49, -0.51], [0.5, -0.5], [2.0, 9.0], [-3.0, 0.99]])
    assert digitise(x, [0, -1], [2, 1], bins=4).tolist() == [[0, 0], [0, 0], [1, 1], [3, 3], [0, 3]]
    assert digitise(torch.tensor([0.0, 0.3, 0.99]), [0.0], [1.0], bins=10).tolist() == [[0], [3], [9]]
    assert distinct_rows(digitise(x, [0, -1], [2, 1], bins=4)) == 4


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="best > worst"):
        trajectory_quality(np.ones(3), 1.0, 1.0)
    with pytest.raises(ValueError, match="best > worst"):
        trajectory_quality(np.ones(0), 0.0, 1.0)
    with pytest.raises(ValueError, match="digitise"):
        distinct_rows(np.array([0.5, 0.25]))
    with pytest.raises(ValueError, match="one length"):
        distinct_rows(np.array([1, 2]), np.array([1]))
    with pytest.raises(ValueError, match="global limits"):
        digitise(np.ones((2, 2)), [0, -np.inf], [1, 1])
    with pytest.raises(ValueError, match="NaN"):
        digitise(np.array([np.nan]), [0], [1])
    with pytest.raises(ValueError, match="fuller one"):
        log_state_action_coverage(np.ones(3, int), np.ones(3, int), (np.ones(2, int), np.ones(2, int)))
