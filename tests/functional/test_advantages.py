"""Advantages: hand-computed numbers, the two exact rules, GAE against its recursion, BNPO against its derivation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import betaln
from torch import Tensor

from unipo import functional as F

VALUES = torch.tensor([1.0, 0.0, 0.0, 3.0, 5.0])
GROUP = torch.tensor([0, 0, 0, 1, 1])
SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def ragged(sizes: list[int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.randn(len(index), generator=generator, dtype=torch.float64), index


def assert_close(found: Tensor, expected: object, **tolerance: float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), **(tolerance or {}))  # type: ignore


# ---- centres and scales ----------------------------------------------------------------------------------------------
def test_centres_by_hand() -> None:
    assert_close(F.group_mean(VALUES, GROUP, 2), [1 / 3, 1 / 3, 1 / 3, 4, 4])
    assert_close(F.leave_one_out_mean(VALUES, GROUP, 2), [0, 0.5, 0.5, 5, 3])
    assert_close(F.batch_mean(VALUES), [1.8] * 5)


def test_scales_by_hand() -> None:
    a = math.sqrt(1 / 3)  # squares of the first group: 4/9 + 1/9 + 1/9 = 2/3
    assert_close(F.group_std(VALUES, GROUP, 2), [a, a, a, math.sqrt(2), math.sqrt(2)])
    b = math.sqrt(2 / 9)
    assert_close(F.group_std(VALUES, GROUP, 2, unbiased=False), [b, b, b, 1, 1])
    assert_close(F.batch_std(VALUES), [math.sqrt(18.8 / 4)] * 5)  # 35 - 5 * 1.8^2 = 18.8
    assert_close(F.batch_std(VALUES, unbiased=False), [math.sqrt(18.8 / 5)] * 5)


def test_normalize_by_hand() -> None:
    found = F.normalize(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.5, 0.5]), eps=0.5)
    assert_close(found, [1.0, -1.0])


@pytest.mark.parametrize("value", [0.3, 0.1, 1e-30, 1e30, -7.7])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_values_and_a_group_of_one_have_advantage_exactly_zero(
    value: float, size: int, dtype: torch.dtype
) -> None:
    values, index = torch.full((size,), value, dtype=dtype), torch.zeros(size, dtype=torch.long)
    centres = (F.group_mean(values, index, 1), F.leave_one_out_mean(values, index, 1), F.batch_mean(values))
    scales = (F.group_std(values, index, 1), F.group_std(values, index, 1, unbiased=False), F.batch_std(values))
    for centre in centres:
        assert torch.equal(centre, values)
        for scale in scales:
            assert torch.equal(scale, torch.zeros_like(values))
            for eps in (0.0, 1e-9):
                assert torch.equal(F.normalize(values, centre, scale, eps), torch.zeros_like(values))


def test_a_group_without_spread_is_silent_whatever_the_centre() -> None:
    assert_close(F.normalize(torch.ones(2), torch.tensor([0.0, 0.5]), torch.tensor([0.0, 2.0])), [0.0, 0.25])


def test_only_equal_values_count_as_without_spread() -> None:
    values, index = torch.tensor([0.5, 0.5 + 2**-24], dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    found = F.normalize(values, F.group_mean(values, index, 1), F.group_std(values, index, 1))
    assert_close(found, [-math.sqrt(0.5), math.sqrt(0.5)])


def test_empty_input_and_empty_groups() -> None:
    nothing, index = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for found in (
        F.group_mean(nothing, index, 3),
        F.leave_one_out_mean(nothing, index, 3),
        F.group_std(nothing, index, 3),
        F.batch_mean(nothing),
        F.batch_std(nothing),
        F.normalize(nothing, nothing, nothing),
    ):
        assert found.shape == (0,)
    assert_close(F.group_mean(torch.tensor([2.0, 4.0]), torch.tensor([1, 1]), 3), [3.0, 3.0])


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        F.group_mean(VALUES, GROUP[:-1], 2)
    with pytest.raises(ValueError, match="one length"):
        F.normalize(VALUES, VALUES[:, None], VALUES)
    with pytest.raises(ValueError, match="one length"):
        F.gae(VALUES, VALUES[:1], GROUP, 2, 1.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 99))
def test_group_advantages_sum_to_zero_and_leave_one_out_rescales_them(sizes: list[int], seed: int) -> None:
    values, index = ragged(sizes, seed)
    centred = values - F.group_mean(values, index, len(sizes))
    total = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, index, centred)
    assert_close(total, torch.zeros(len(sizes)), atol=1e-12, rtol=0)
    size = torch.tensor(sizes)[index]
    expected = torch.where(size > 1, size / (size - 1).clamp(min=1) * centred, 0.0)
    assert_close(values - F.leave_one_out_mean(values, index, len(sizes)), expected)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 99))
def test_permuting_rows_permutes_the_result(sizes: list[int], seed: int) -> None:
    values, index = ragged(sizes, seed)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    for function in (F.group_mean, F.leave_one_out_mean, F.group_std):
        assert_close(function(values[order], index[order], len(sizes)), function(values, index, len(sizes))[order])


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 99), st.floats(0.1, 100), st.floats(-100, 100))
def test_the_z_score_ignores_scale_and_offset(sizes: list[int], seed: int, scale: float, offset: float) -> None:
    def z(values: Tensor) -> Tensor:
        n = len(sizes)
        return F.normalize(values, F.group_mean(values, index, n), F.group_std(values, index, n))

    values, index = ragged(sizes, seed)
    assert_close(z(scale * values + offset), z(values), rtol=1e-6, atol=1e-6)


# ---- over time -------------------------------------------------------------------------------------------------------
def test_gae_by_hand() -> None:
    """gamma .9, lam .8 on rewards 1, 2 with values .5, .25 and 3 after the end; then one step 4 that ends at value 2."""
    reward, value = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.25, 2.0])
    index, bootstrap = torch.tensor([0, 0, 2]), torch.tensor([3.0, 9.0, 0.0])  # episode 1 has no step
    advantage, returns = F.gae(reward, value, index, 3, 0.9, 0.8, bootstrap)
    second = 2 + 0.9 * 3 - 0.25
    first = 1 + 0.9 * 0.25 - 0.5 + 0.72 * second
    assert_close(advantage, [first, second, 2.0])
    assert_close(returns, [first + 0.5, second + 0.25, 4.0])


def test_discounted_return_by_hand() -> None:
    reward, index = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 0, 0, 1])
    assert_close(F.discounted_return(reward, index, 2, 0.5), [3.0, 4.0, 4.0, 8.0])
    assert_close(F.discounted_return(reward, index, 2, 0.5, torch.tensor([16.0, 0.0])), [5.0, 8.0, 12.0, 8.0])


def gae_by_recursion(
    reward: Tensor, value: Tensor, index: Tensor, gamma: float, lam: float, bootstrap: Tensor
) -> Tensor:
    found, ahead = torch.zeros_like(value), 0.0
    for t in reversed(range(len(value))):
        last = t == len(value) - 1 or index[t + 1] != index[t]
        following = bootstrap[index[t]] if last else value[t + 1]
        ahead = float(reward[t] + gamma * following - value[t]) + gamma * lam * (0.0 if last else ahead)
        found[t] = ahead
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_its_recursion(sizes: list[int], seed: int, gamma: float, lam: float) -> None:
    reward, index = ragged(sizes, seed)
    value, bootstrap = torch.sin(5 * reward), torch.arange(len(sizes), dtype=torch.float64)
    found, _ = F.gae(reward, value, index, len(sizes), gamma, lam, bootstrap)
    assert_close(found, gae_by_recursion(reward, value, index, gamma, lam, bootstrap))


def test_gae_limits() -> None:
    """lam 0: the one-step error. lam 1: return minus value. The value at which every delta is 0: no advantage."""
    reward, index = ragged([3, 1, 5], 0)
    value = torch.cos(reward)
    monte_carlo = F.discounted_return(reward, index, 3, 0.9)
    assert_close(F.gae(reward, value, index, 3, 0.9, 1.0)[0], monte_carlo - value)
    assert_close(F.gae(reward, value, index, 3, 0.9, 1.0)[1], monte_carlo)
    assert_close(F.gae(reward, monte_carlo, index, 3, 0.9, 0.7)[0], torch.zeros(9), atol=1e-12, rtol=0)
    one_step = reward + 0.9 * torch.cat([value[1:], value[:1]]) * (torch.tensor([1, 1, 0, 0, 1, 1, 1, 1, 0])) - value
    assert_close(F.gae(reward, value, index, 3, 0.9, 0.0)[0], one_step)


def test_gae_of_nothing_and_of_a_long_episode() -> None:
    nothing, index = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert F.gae(nothing, nothing, index, 0, 1.0, 1.0)[0].shape == (0,)
    assert F.gae(nothing, nothing, index, 2, 1.0, 1.0, torch.ones(2))[1].shape == (0,)
    n = 5000
    found = F.discounted_return(torch.ones(n), torch.zeros(n, dtype=torch.long), 1, 0.99)
    expected = (1 - 0.99 ** torch.arange(n, 0, -1, dtype=torch.float64)) / 0.01
    assert_close(found, expected.float(), rtol=1e-5, atol=0)


def test_gae_refuses_unsorted_steps_and_a_short_bootstrap() -> None:
    with pytest.raises(ValueError, match="sort the steps"):
        F.gae(torch.ones(3), torch.ones(3), torch.tensor([0, 1, 0]), 2, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"`bootstrap` \[2\]"):
        F.gae(torch.ones(2), torch.ones(2), torch.tensor([0, 1]), 2, 1.0, 1.0, torch.ones(1))


# ---- BNPO ------------------------------------------------------------------------------------------------------------
def test_beta_parameters_by_hand() -> None:
    """Rates .4 and .6: m .5, v .02, common .25 / .02 - 1 = 11.5, a = b = 5.75, so both 1 + 5.75 / 3."""
    assert F.beta_parameters(torch.tensor([0.4, 0.6], dtype=torch.float64)) == pytest.approx((1 + 5.75 / 3,) * 2)
    alpha, beta = F.beta_parameters(torch.tensor([0.1, 0.3], dtype=torch.float64))  # m .2, v .02, common 7
    assert (alpha, beta) == pytest.approx((1 + 7 * 0.2 / 3, 1 + 7 * 0.8 / 3))


@pytest.mark.parametrize("rates", [[], [0.7], [0.3] * 7, [0.0, 1.0], [0.0, 0.0, 1.0]])
def test_beta_parameters_where_moments_fail(rates: list[float]) -> None:
    """None, one, equal rates; more variance than a Beta has (m (1 - m) < v makes a, b negative): no normalisation."""
    assert F.beta_parameters(torch.tensor(rates)) == (1.0, 1.0)


@pytest.mark.parametrize(("a", "b"), [(2.0, 3.0), (5.75, 5.75), (1.4, 5.6)])
def test_beta_parameters_minimise_the_second_moment_of_the_normalised_gradient(a: float, b: float) -> None:
    def second_moment(x: list[float]) -> float:
        return float(2 * betaln(*x) + betaln(a + 3 - 2 * x[0], b + 3 - 2 * x[1]))

    best = minimize(second_moment, [1.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).x
    assert best == pytest.approx([1 + a / 3, 1 + b / 3], abs=1e-4)
    m, v = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    rates = torch.tensor([m - math.sqrt(v / 2), m + math.sqrt(v / 2)], dtype=torch.float64)  # this mean and variance
    assert F.beta_parameters(rates) == pytest.approx(tuple(best), abs=1e-4)


def test_beta_scale_closed_forms() -> None:
    p = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert_close(F.beta_scale(p, 1.0, 1.0), torch.ones(3))
    assert_close(F.beta_scale(p, 1.5, 1.5), 8 / math.pi * (p * (1 - p)).sqrt())
    assert_close(F.beta_scale(p, 3.0, 1.0), 3 * p**2)
    assert_close(F.beta_scale(p, 1.0, 2.0), 2 * (1 - p))


def test_beta_scale_at_the_ends() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert_close(F.beta_scale(ends, 1.0, 1.0), [1.0, 1.0])  # 0^0 = 1
    assert_close(F.beta_scale(ends, 2.0, 1.0), [1e-6, 2.0])  # f = 0: 1 / f held at 1e6
    assert_close(F.beta_scale(ends, 2.0, 1.0, largest=10.0), [0.1, 2.0])
    advantage = F.normalize(ends, ends, F.beta_scale(ends, 2.0, 2.0))  # R = p there: 0 despite 1e6
    assert torch.equal(advantage, torch.zeros(2))


def test_beta_scale_in_float32_with_large_parameters() -> None:
    p = torch.tensor([0.499, 0.5, 0.5005])
    found = F.beta_scale(p, 37769.6, 37769.6)
    assert found.dtype == torch.float32
    exact = [((37768.6) * math.log(x * (1 - x)) - betaln(37769.6, 37769.6)) for x in p.double().tolist()]
    assert_close(found, torch.tensor(exact, dtype=torch.float64).exp().float(), rtol=1e-5, atol=0)


def test_beta_three_halves_is_group_normalisation_up_to_pi_over_eight() -> None:
    reward, index = torch.tensor([1.0, 0, 0, 0, 1, 1, 0], dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    mean = F.group_mean(reward, index, 2)
    z = F.normalize(reward, mean, F.group_std(reward, index, 2, unbiased=False))
    assert_close(F.normalize(reward, mean, F.beta_scale(mean, 1.5, 1.5)), math.pi / 8 * z)


def test_group_softmax_by_hand() -> None:
    """Shares of the named entries of each group: e^0 : e^log 3 = 1/4 : 3/4; alone 1; nobody named 0; others 0."""
    values = torch.tensor([0.0, 9.0, math.log(3.0), -2.0, 5.0])
    index, where = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([True, False, True, True, False])
    found = F.group_softmax(values, index, 3, where)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.0, 0.75, 1.0, 0.0]))
    far = F.group_softmax(values + 1e4, index, 3, where)
    torch.testing.assert_close(far, found, atol=1e-3, rtol=1e-3)


def test_group_variance_has_a_slope_where_the_std_has_none() -> None:
    x = torch.tensor([2.0, 2.0, 5.0, 1.0], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 0, 1, 1])
    found = F.group_variance(x, index, 2)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 8.0, 8.0], dtype=torch.float64))
    torch.testing.assert_close(F.group_variance(x, index, 2, unbiased=False)[2:], found[2:] / 2)
    (slope,) = torch.autograd.grad(found[0] + found[2], x)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, 4.0, -4.0], dtype=torch.float64))
