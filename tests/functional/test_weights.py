"""Weights and masks: hand-computed numbers, overflow, and the log form against the ratio form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unipo import functional as F
from unipo.functional.weights import LOG_LIMIT

NAN, INF = float("nan"), float("inf")


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- ratios ----------------------------------------------------------------------------------------------------------
def test_ratios_by_hand() -> None:
    l, index = F.log_ratio(numbers(-1, -2, -3), numbers(-1.5, -1, -3)), torch.tensor([0, 0, 2])  # noqa: E741
    torch.testing.assert_close(l, numbers(0.5, -1, 0))
    torch.testing.assert_close(F.token_ratio(l), numbers(math.exp(0.5), math.exp(-1), 1))
    torch.testing.assert_close(F.sequence_ratio(l, index, 3), numbers(math.exp(-0.5), 1, 1))  # segment 1 is empty
    torch.testing.assert_close(F.geometric_ratio(l, index, 3), numbers(math.exp(-0.25), 1, 1))


def test_the_level_is_the_index() -> None:
    l = numbers(0.1, 0.2, 0.3, 0.4)  # noqa: E741
    token, turn = torch.arange(4), torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(F.sequence_ratio(l, token, 4), F.token_ratio(l))
    torch.testing.assert_close(F.geometric_ratio(l, token, 4), F.token_ratio(l))
    torch.testing.assert_close(F.sequence_ratio(l, turn, 2), F.geometric_ratio(l, turn, 2).square())
    product = F.sequence_ratio(l, turn, 2).prod()
    torch.testing.assert_close(F.sequence_ratio(l, torch.zeros(4).long(), 1)[0], product)


def test_overflowing_ratios_stay_finite_in_float32() -> None:
    l = torch.tensor([math.log(1e30), -math.log(1e30), 500.0], requires_grad=True)  # noqa: E741
    ratio = F.token_ratio(l)
    torch.testing.assert_close(ratio, torch.tensor([LOG_LIMIT, -LOG_LIMIT, LOG_LIMIT]).exp())
    assert ratio.square().sum().isfinite()
    ratio.sum().backward()
    assert torch.equal(l.grad, torch.zeros(3))
    index = torch.zeros(3, dtype=torch.long)
    assert F.sequence_ratio(l, index, 1).item() == pytest.approx(math.exp(LOG_LIMIT), rel=1e-6)
    many = torch.tensor([40.0, -40.0])  # summed before it is clamped: the two cancel exactly
    assert F.sequence_ratio(many, index[:2], 1).item() == 1.0
    torch.testing.assert_close(F.token_ratio(torch.tensor([3.0]), log_limit=2.0), torch.tensor([math.exp(2)]))


def test_ratio_gradients() -> None:
    logp = numbers(-1, -2, -0.5).requires_grad_()
    other, index = numbers(-1.2, -1.5, -0.4), torch.tensor([0, 0, 1])

    def total(x: Tensor) -> Tensor:
        l = F.log_ratio(x, other)  # noqa: E741
        return F.sequence_ratio(l, index, 2).sum() + 3 * F.geometric_ratio(l, index, 2).sum() + F.token_ratio(l).sum()

    assert torch.autograd.gradcheck(total, logp)


def test_log_ratio_keeps_the_policy_type_and_passes_nan_on() -> None:
    found = F.log_ratio(torch.tensor([-1.0, -1.0]), numbers(-2.0, NAN))
    assert found.dtype == torch.float32
    assert found[0] == 1
    assert found[1].isnan()


def test_shapes_are_checked() -> None:
    flat, column, one = torch.ones(3), torch.ones(3, 1), torch.zeros(3, dtype=torch.long)
    for call in (
        lambda: F.log_ratio(flat, column),
        lambda: F.clip_mask(flat, column, 0.2, 0.2),
        lambda: F.dual_clip_mask(flat, column, 3.0),
        lambda: F.ring_mask(flat, column, 0.2, 0.2, 0.6, 2.0),
        lambda: F.taper(flat, column),
        lambda: F.sequence_ratio(flat, one[:2], 1),
        lambda: F.geometric_ratio(flat, one[:2], 1),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


# ---- masks -----------------------------------------------------------------------------------------------------------
RATIO = numbers(0.3, 0.7, 0.9, 1.0, 1.1, 1.5, 4.0)
UP, DOWN, FLAT = torch.ones(7).double(), -torch.ones(7).double(), torch.zeros(7).double()


def kept(mask: Tensor) -> list[int]:
    assert mask.dtype == torch.bool
    return mask.long().tolist()


def test_masks_by_hand() -> None:
    assert kept(F.clip_mask(RATIO, UP, 0.2, 0.2)) == [1, 1, 1, 1, 1, 0, 0]
    assert kept(F.clip_mask(RATIO, DOWN, 0.2, 0.2)) == [0, 0, 1, 1, 1, 1, 1]
    assert kept(F.clip_mask(RATIO, UP, 0.2, 0.6)) == [1, 1, 1, 1, 1, 1, 0]
    assert kept(F.clip_mask(RATIO, DOWN, 0.4, 0.2)) == [0, 1, 1, 1, 1, 1, 1]
    assert kept(F.clip_mask(RATIO, FLAT, 0.2, 0.2)) == [1] * 7
    assert kept(F.dual_clip_mask(RATIO, DOWN, 3.0)) == [1, 1, 1, 1, 1, 1, 0]
    assert kept(F.dual_clip_mask(RATIO, UP, 3.0)) == [1] * 7
    assert kept(F.two_side_mask(RATIO, 0.2, 0.2)) == [0, 0, 1, 1, 1, 0, 0]
    assert kept(F.ring_mask(RATIO, UP, 0.2, 0.2, 0.6, 2.0)) == [1, 0, 1, 1, 1, 0, 0]
    assert kept(F.ring_mask(RATIO, DOWN, 0.2, 0.2, 0.6, 2.0)) == [0, 0, 1, 1, 1, 0, 1]
    assert kept(F.ring_mask(RATIO, FLAT, 0.2, 0.2, 0.6, 2.0)) == [1, 0, 1, 1, 1, 0, 1]


def test_bounds_themselves_are_kept() -> None:
    edges = numbers(1 - 0.25, 1 + 0.25)
    for advantage in (torch.ones(2).double(), -torch.ones(2).double()):
        assert kept(F.clip_mask(edges, advantage, 0.25, 0.25)) == [1, 1]
        assert kept(F.two_side_mask(edges, 0.25, 0.25)) == [1, 1]
        assert kept(F.dual_clip_mask(numbers(3.0, 3.0), advantage, 3.0)) == [1, 1]
    assert kept(F.ring_mask(numbers(0.5, 3.0), numbers(1, -1), 0.25, 0.25, 0.5, 2.0)) == [1, 1]


def test_ring_without_a_ring_is_two_side() -> None:
    for advantage in (UP, DOWN, FLAT):
        assert torch.equal(F.ring_mask(RATIO, advantage, 0.2, 0.2, 1.0, INF), F.two_side_mask(RATIO, 0.2, 0.2))


def test_on_policy_nothing_is_masked() -> None:
    ones, advantage = torch.ones(3), torch.tensor([-1.0, 0.0, 1.0])
    for mask in (
        F.clip_mask(ones, advantage, 0.2, 0.2),
        F.dual_clip_mask(ones, advantage, 3.0),
        F.two_side_mask(ones, 0.2, 0.2),
        F.ring_mask(ones, advantage, 0.2, 0.2, 0.6, 2.0),
    ):
        assert mask.all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_the_log_form_has_the_gradient_of_dual_clip_ppo(seed: int, low: float, high: float) -> None:
    """Maximise min(r A, clip(r) A), for A < 0 not below c A, by autograd; against mask * r * A on grad(logp)."""
    generator = torch.Generator().manual_seed(seed)
    behavior = -torch.rand(50, generator=generator, dtype=torch.float64)
    logp = (behavior + torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(50, generator=generator, dtype=torch.float64)
    ratio = F.token_ratio(F.log_ratio(logp, behavior))
    clipped = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    surrogate = torch.where(advantage < 0, torch.maximum(clipped, 3.0 * advantage), clipped)
    (expected,) = torch.autograd.grad(surrogate.sum(), logp)
    mask = F.clip_mask(ratio, advantage, low, high) & F.dual_clip_mask(ratio, advantage, 3.0)
    torch.testing.assert_close((mask * ratio * advantage).detach(), expected)


# ---- tapers ----------------------------------------------------------------------------------------------------------
def test_truncate_by_hand() -> None:
    """AIPO's example: ratios .5 1 3 9 20 at cap 8."""
    torch.testing.assert_close(F.truncate(numbers(0.5, 1, 3, 9, 20), 8.0), numbers(0.5, 1, 3, 8, 8))
    torch.testing.assert_close(F.truncate(numbers(0.1, 1e30), 2.0, low=0.5), numbers(0.5, 2))
    torch.testing.assert_close(F.truncate(numbers(0.5, NAN), 1.0, low=1.0), numbers(1, 1))


def test_taper_by_hand() -> None:
    ratio, advantage = numbers(0.5, 2, 0.5, 2, 3), numbers(1, 1, -1, -1, 0)
    torch.testing.assert_close(F.taper(ratio, advantage), numbers(1, 1, 0.5, 1, 1))
    torch.testing.assert_close(F.taper(ratio, advantage, (0.0, 2.5), (1.0, 1.5)), numbers(0.5, 2, 1, 1.5, 2.5))


def test_taper_limits_are_importance_sampling_and_plain_reinforce() -> None:
    ratio, advantage = numbers(0.1, 5, 0.1, 5), numbers(1, 1, -1, -1)
    assert torch.equal(F.taper(ratio, advantage, (0.0, INF), (0.0, INF)), ratio)
    assert torch.equal(F.taper(ratio, advantage, (1.0, 1.0), (1.0, 1.0)), torch.ones(4).double())
    assert torch.equal(F.taper(torch.ones(4), advantage.float()), torch.ones(4))


def test_taper_reads_no_behaviour_of_good_samples() -> None:
    assert F.taper(numbers(NAN, 0.5), numbers(1, -1)).tolist() == [1, 0.5]


def test_taper_on_bad_samples_is_the_gradient_of_the_taper_potential() -> None:
    """V(pi) = R pi if pi <= mu else R mu (1 + log(pi / mu)); dV / dlog pi = mu * taper * R."""
    mu, reward = numbers(0.3, 0.3, 0.3), numbers(-1, -2, -0.5)
    logp = numbers(0.1, 0.29, 0.8).log().requires_grad_()
    pi = logp.exp()
    potential = torch.where(pi <= mu, reward * pi, reward * mu * (1 + (pi / mu).log()))
    (expected,) = torch.autograd.grad(potential.sum(), logp)
    torch.testing.assert_close(mu * F.taper((pi / mu).detach(), reward) * reward, expected)


def test_taper_unclipped_is_unbiased_by_enumeration() -> None:
    """sum_y mu(y) w R grad log pi(y) = grad E_pi[R] with w = pi / mu; the default taper is not that."""
    logits = numbers(0.3, -0.2, 1.0).requires_grad_()
    mu, reward = numbers(0.5, 0.3, 0.2), numbers(1, -1, -2)
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * reward).sum(), logits, retain_graph=True)
    ratio = (logp.exp() / mu).detach()

    def estimate(weight: Tensor) -> Tensor:
        return torch.autograd.grad((mu * weight * reward * logp).sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(estimate(F.taper(ratio, reward, (0.0, INF), (0.0, INF))), exact)
    assert (estimate(F.taper(ratio, reward)) - exact).abs().max() > 0.05


# ---- effective sample size -------------------------------------------------------------------------------------------
def test_effective_sample_size_by_hand() -> None:
    assert F.effective_sample_size(torch.full((5,), 7.0)).item() == pytest.approx(1.0)
    assert F.effective_sample_size(numbers(1, 0, 0, 0)).item() == 0.25
    assert F.effective_sample_size(numbers(1, 3)).item() == pytest.approx(16 / 20)
    assert F.effective_sample_size(torch.tensor([1e30, 1e30])).item() == 1.0
    assert F.effective_sample_size(torch.tensor([1e30, 1.0])).item() == pytest.approx(0.5)
    assert F.effective_sample_size(torch.tensor([1e-30, 3e-30])).item() == pytest.approx(0.8)
    assert F.effective_sample_size(torch.zeros(0)).item() == 1.0
    assert F.effective_sample_size(torch.zeros(3)).item() == 1.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 1e3), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_effective_sample_size_is_a_share_and_ignores_scale_and_order(weights: list[float], scale: float) -> None:
    w = torch.tensor(weights, dtype=torch.float64)
    share = F.effective_sample_size(w).item()
    assert 1 / len(w) - 1e-12 <= share <= 1 + 1e-12
    assert F.effective_sample_size(scale * w.flip(0)).item() == pytest.approx(share)
