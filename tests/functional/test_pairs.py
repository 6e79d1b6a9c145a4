"""Pairs: links by hand and by their minima, all pairs of a group against explicit pairs, CoPG's identities."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unipo import functional as F


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(f: object, at: float) -> float:
    x = numbers(at).requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0].item()  # type: ignore


def test_links_by_hand() -> None:
    margin = numbers(0, math.log(3), -math.log(3))
    torch.testing.assert_close(F.logistic(margin), numbers(math.log(2), math.log(4 / 3), math.log(4)))
    smooth = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert F.logistic(margin, 0.25)[1].item() == pytest.approx(smooth)
    torch.testing.assert_close(F.squared(numbers(0, 2, 5), 2.0), numbers(4, 0, 9))
    torch.testing.assert_close(F.hinge(numbers(0, 0.25, 1, 3)), numbers(1, 0.75, 0, 0))
    torch.testing.assert_close(F.hinge(numbers(0, 3), target=2.0), numbers(2, 0))


def test_links_push_the_margin_up() -> None:
    assert slope(F.logistic, 0.0) == pytest.approx(-0.5)
    assert slope(F.logistic, 1.0) == pytest.approx(-1 / (1 + math.e))
    assert slope(F.hinge, 0.5) == -1
    assert slope(F.hinge, 1.5) == 0
    assert slope(lambda m: F.squared(m, 2.0), 0.5) == -3


def test_label_smoothing_moves_the_minimum_to_its_log_odds() -> None:
    assert slope(lambda m: F.logistic(m, 0.1), math.log(9)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(F.logistic(numbers(0.7), 0.5), F.logistic(numbers(-0.7), 0.5))


def test_logistic_is_stable_in_float32() -> None:
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = F.logistic(far)
    assert loss.tolist() == [1e4, 0.0]
    loss.sum().backward()
    assert far.grad.tolist() == [-1.0, 0.0]


def test_pair_margin_by_hand() -> None:
    """Two pairs of answers, scored per step: pair 0 is {1, 2} against {4}, pair 1 is {} against {8}."""
    score, chosen, index = numbers(1, 2, 4, 8), torch.tensor([True, True, False, False]), torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(F.pair_margin(score, chosen, index, 3), numbers(-1, -8, 0))
    torch.testing.assert_close(F.pair_margin(score, ~chosen, index, 3), numbers(1, 8, 0))
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(F.pair_margin(score[order], chosen[order], index[order], 3), numbers(-1, -8, 0))
    with pytest.raises(ValueError, match="one length"):
        F.pair_margin(score, chosen[:2], index, 3)


def test_no_pairs() -> None:
    nothing, index = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for found in (F.logistic(nothing), F.squared(nothing, 1.0), F.hinge(nothing), F.pairwise_square(nothing, index, 0)):
        assert found.shape == (0,)
    assert F.pair_margin(nothing, nothing.bool(), index, 2).tolist() == [0, 0]


# ---- all pairs of a group --------------------------------------------------------------------------------------------
def test_pairwise_square_by_hand() -> None:
    score, index = numbers(1, 3, 7, 5, 2, 2.5), torch.tensor([0, 0, 1, 3, 3, 3])
    expected = numbers(4, 0, 0, (9 + 6.25 + 0.25) / 3)  # a pair, a group of one, an empty group, three pairs
    torch.testing.assert_close(F.pairwise_square(score, index, 4), expected)


def test_pairwise_square_of_equal_scores_is_exactly_zero() -> None:
    assert F.pairwise_square(torch.full((7,), 0.3), torch.zeros(7, dtype=torch.long), 1).item() == 0.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 99), st.floats(-1e3, 1e3))
def test_pairwise_square_equals_explicit_pairs(sizes: list[int], seed: int, offset: float) -> None:
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(len(index), generator=generator, dtype=torch.float64).requires_grad_()

    def explicit(group: int) -> Tensor:
        pairs = list(combinations(score[index == group], 2))
        return torch.stack([(a - b).square() for a, b in pairs]).mean() if pairs else 0 * score.sum()

    expected = torch.stack([explicit(g) for g in range(len(sizes))])
    found = F.pairwise_square(score, index, len(sizes))
    torch.testing.assert_close(found, expected)
    weight = torch.arange(1.0, len(sizes) + 1).double()
    (a,), (b,) = (torch.autograd.grad((weight * x).sum(), score, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(F.pairwise_square(score + offset, index, len(sizes)), found, rtol=1e-6, atol=1e-9)
    order = torch.randperm(len(index), generator=generator)
    torch.testing.assert_close(F.pairwise_square(score[order], index[order], len(sizes)), found)


def copg(logp: Tensor, reward: Tensor, ref: Tensor, beta: float) -> Tensor:
    index = torch.zeros(len(reward), dtype=torch.long)
    return F.pairwise_square(reward - beta * (logp - ref), index, 1)[0] / (2 * beta)


def test_copg_gradient_is_twice_rloo_on_regularised_rewards() -> None:
    """Over all pairs: -(2 / n) sum_i (Rb_i - mean_{j != i} Rb_j) grad log pi(y_i)."""
    logp, ref, reward = numbers(-1, -2, -0.5, -3).requires_grad_(), numbers(-1.1, -1.7, -0.9, -2), numbers(1, 0, 0.3, 0)
    (found,) = torch.autograd.grad(copg(logp, reward, ref, 0.2), logp)
    regularised = (reward - 0.2 * (logp - ref)).detach()
    baseline = F.leave_one_out_mean(regularised, torch.zeros(4, dtype=torch.long), 1)
    torch.testing.assert_close(found, -(2 / 4) * (regularised - baseline))


def test_copg_of_a_pair_with_half_a_reward_between_is_ipo() -> None:
    beta, logp, ref = 0.3, numbers(-1, -2), numbers(-1.4, -1.9)
    margin = F.pair_margin(logp - ref, torch.tensor([True, False]), torch.tensor([0, 0]), 1)
    ipo = beta / 2 * F.squared(margin, 1 / (2 * beta))[0]
    torch.testing.assert_close(copg(logp, numbers(0.5, 0.0), ref, beta), ipo)


def test_copg_is_zero_at_its_closed_form_minimum() -> None:
    beta, reward, ref = 0.3, numbers(1, 0, 0.5), numbers(0.2, 0.5, 0.3).log()
    best = (ref + reward / beta).log_softmax(0)
    assert copg(best, reward, ref, beta).item() == pytest.approx(0, abs=1e-24)
    assert copg(ref, reward, ref, beta).item() > 0.1
