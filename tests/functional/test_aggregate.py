"""Aggregations: hand-computed numbers, additivity over splits, nothing and stepless episodes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unipo import functional as F

X = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
EPISODE = torch.tensor([0, 0, 0, 2])  # episode 1 has no step, and counts


def pair(found: tuple[Tensor, float]) -> tuple[float, float]:
    return found[0].item(), float(found[1])


def test_by_hand() -> None:
    assert pair(F.token_mean(X)) == (16, 4)
    assert pair(F.episode_mean(X, EPISODE, 3)) == (2 + 0 + 10, 3)
    assert pair(F.episode_sum(X, 3)) == (16, 3)
    assert pair(F.constant(X, 3, 5.0)) == (16, 15)


def test_gradients_by_hand() -> None:
    """Each step's share: 1/N, 1/(E T_i), 1/E, 1/(E L)."""
    for aggregate, expected in (
        (F.token_mean, [1 / 4] * 4),
        (lambda x: F.episode_mean(x, EPISODE, 3), [1 / 9, 1 / 9, 1 / 9, 1 / 3]),
        (lambda x: F.episode_sum(x, 3), [1 / 3] * 4),
        (lambda x: F.constant(x, 3, 5.0), [1 / 15] * 4),
    ):
        x = X.clone().requires_grad_()
        numerator, denominator = aggregate(x)
        (numerator / denominator).backward()
        torch.testing.assert_close(x.grad, torch.tensor(expected, dtype=torch.float64))


def test_nothing_is_zero_and_differentiable() -> None:
    index = torch.zeros(0, dtype=torch.long)
    for n in (0, 2):
        for aggregate in (
            F.token_mean,
            lambda x, n=n: F.episode_mean(x, index, n),
            lambda x, n=n: F.episode_sum(x, n),
            lambda x, n=n: F.constant(x, n, 7.0),
        ):
            x = torch.zeros(0, requires_grad=True)
            numerator, denominator = aggregate(x)
            loss = numerator / denominator
            assert loss.item() == 0.0
            loss.backward()
            assert x.grad.shape == (0,)


def test_bad_input() -> None:
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="budget"):
            F.constant(X, 3, budget)
    with pytest.raises(ValueError, match="one length"):
        F.episode_mean(X, EPISODE[:2], 3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), st.integers(0, 99))
def test_both_parts_add_up_over_any_split_of_episodes(sizes: list[int], seed: int) -> None:
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = torch.randn(len(index), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    n, cut = len(sizes), 1 + seed % (len(sizes) - 1)
    first = index < cut
    for aggregate in (
        lambda x, i, n: F.token_mean(x),
        F.episode_mean,
        lambda x, i, n: F.episode_sum(x, n),
        lambda x, i, n: F.constant(x, n, 7.0),
    ):
        whole = pair(aggregate(x, index, n))
        parts = pair(aggregate(x[first], index[first], cut)), pair(aggregate(x[~first], index[~first] - cut, n - cut))
        assert parts[0][0] + parts[1][0] == pytest.approx(whole[0], abs=1e-12)
        assert parts[0][1] + parts[1][1] == pytest.approx(whole[1])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        assert pair(aggregate(x[order], index[order], n)) == pytest.approx(whole, abs=1e-12)


def test_equal_lengths_make_the_four_agree_up_to_the_length() -> None:
    x, index = torch.arange(6.0), torch.tensor([0, 0, 1, 1, 2, 2])
    means = [a / b for a, b in (F.token_mean(x), F.episode_mean(x, index, 3), F.constant(x, 3, 2.0))]
    assert [m.item() for m in means] == pytest.approx([2.5] * 3)
    total, n = F.episode_sum(x, 3)
    assert (total / n).item() == pytest.approx(5.0)
