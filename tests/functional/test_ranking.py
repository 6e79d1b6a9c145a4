"""Ranking accuracy and spacing: closed forms, thresholds, invariances, hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from unipo import functional as F


def normal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- ranking (arXiv 2405.19534) --------------------------------------------------------------------------------------
def test_ties_are_wrong_and_a_constant_changes_nothing() -> None:
    won, lost = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-2.0, -1.0, -2.0])
    assert F.ranks_right(won, lost).tolist() == [True, False, False]
    assert F.ranks_right(won - 7, lost - 7).tolist() == [True, False, False]


def test_the_optimal_policy_is_the_idealised_one() -> None:
    """pi = ref exp(r / beta) / Z has log-ratio log ref_w / ref_l + logit(alpha) / beta with alpha = sigmoid(r_w - r_l)."""
    beta, reward, reference = 0.3, normal(6), normal(6, 1).log_softmax(0)
    best = (reference + reward / beta).log_softmax(0)
    alpha = torch.sigmoid(reward[:3] - reward[3:])
    found = F.idealised_log_ratio(reference[:3] - reference[3:], alpha, beta)
    torch.testing.assert_close(found, best[:3] - best[3:])


def test_unanimous_raters_have_no_finite_ratio() -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        F.idealised_log_ratio(torch.zeros(2), 1.0, 0.1)
    assert float(F.idealised_log_ratio(torch.tensor([-50.0], dtype=torch.float64), 1 - 1e-3, 0.1)) == pytest.approx(
        -50 + 10 * math.log(999)
    )


def test_right_exactly_where_the_loss_is_below_the_difficulty() -> None:
    """R = 1 iff -log sigmoid(beta (z + c)) < -log sigmoid(beta c), for any log-probabilities."""
    beta, reference, policy = 0.1, 20 * normal(400), 20 * normal(400, 1)
    loss = F.logistic(beta * (policy - reference))
    right = F.ranks_right(policy, torch.zeros(400, dtype=torch.float64))
    assert torch.equal(loss < F.ranking_difficulty(reference, beta), right)
    assert 0.3 < float(right.double().mean()) < 0.7


def test_a_loss_of_six_tenths_ranks_what_the_reference_ranks() -> None:
    reference = normal(400).abs()  # c <= 0
    assert float(F.ranking_difficulty(reference, 0.1).min()) >= math.log(2) - 1e-12
    assert float(F.ranking_difficulty(torch.tensor(-20.0), 0.1)) == pytest.approx(math.log1p(math.exp(-2.0)))


@pytest.mark.parametrize(("c", "right"), [(4.9, True), (5.1, False)])
def test_zero_ipo_loss_ranks_right_below_half_over_tau(c: float, right: bool) -> None:
    tau = 0.1
    policy = -c + 1 / (2 * tau)
    assert float(F.squared(torch.tensor(policy + c), 1 / (2 * tau))) < 1e-9
    assert (policy > 0) == right


# ---- spacing and importance (arXiv 2410.10166) -----------------------------------------------------------------------
def test_distances_by_hand() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert F.neighbour_distance(points, 1).tolist() == [1, 1, 2, 4]
    assert F.neighbour_distance(points, 2).tolist() == [3, 2, 3, 6]
    assert F.neighbour_distance(points, 9).tolist() == [7, 6, 4, 7]
    assert F.neighbour_distance(points[:1], 1).tolist() == [0]
    with pytest.raises(ValueError, match="k of 1 or more"):
        F.neighbour_distance(points, 0)


def test_distances_are_those_of_a_loop_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipo.functional.neighbours.CHUNK", 60)
    points = normal(40).reshape(20, 2)
    by_hand = [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[2] for i, p in enumerate(points)]
    torch.testing.assert_close(F.neighbour_distance(points, 3), torch.tensor(by_hand, dtype=torch.float64))


def test_copies_have_the_lowest_spacing_and_fewer_than_k_are_not_seen() -> None:
    """k + 1 equal points are each other's k nearest: distance exactly 0, the floor of the spacing; k of them are not seen."""
    points = torch.cat([normal(40).reshape(20, 2), torch.full((4, 2), 3.7, dtype=torch.float64)])
    three = F.neighbour_distance(points, 3)
    assert three[-4:].tolist() == [0.0] * 4
    spacing = F.log_spacing(three)
    assert bool((spacing[-4:] < spacing[:-4].min()).all())
    assert float(spacing[-1]) == pytest.approx(math.log(1e-3 * float(three[:-4].median())))
    assert bool((F.neighbour_distance(points, 4)[-4:] > 0).all())


def test_spacing_ignores_shifts_and_adds_log_a_of_a_scale() -> None:
    points = normal(40).reshape(20, 2)
    spacing = F.log_spacing(F.neighbour_distance(points, 2))
    torch.testing.assert_close(F.log_spacing(F.neighbour_distance(points + 100, 2)), spacing, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(F.log_spacing(F.neighbour_distance(9 * points, 2)), spacing + math.log(9))
    assert F.log_spacing(torch.zeros(3)).tolist() == [0, 0, 0]


def test_importance_by_hand() -> None:
    """Standardised (1, 3) is (-1, 1); a constant term is 0 for all."""
    margin, quality, spacing = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0]), torch.tensor([2.0, -2.0])
    torch.testing.assert_close(F.importance(margin, quality, spacing, 0.5, 0.25), torch.tensor([-0.75, 0.75]))
    assert F.standardised(torch.full((3,), 1e6)).tolist() == [0, 0, 0]


def test_importance_moves_with_the_rows() -> None:
    margin, quality, points = normal(12), normal(12, 1), normal(24, 2).reshape(12, 2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

    def of(rows: torch.Tensor) -> torch.Tensor:
        spacing = F.log_spacing(F.neighbour_distance(points[rows], 2))
        return F.importance(margin[rows], quality[rows], spacing, 0.5, 0.5)

    torch.testing.assert_close(of(order), of(torch.arange(12))[order])
