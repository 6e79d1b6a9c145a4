"""Divergences: the table of Monte-Carlo gradients by enumeration in float64, closed forms, excluded outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unipo import functional as F
from unipo.functional.weights import LOG_LIMIT

INF = float("inf")
V = 6


def categorical(seed: int) -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(f: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    x = logits.clone().requires_grad_()
    return torch.autograd.grad(f(x.log_softmax(-1)), x)[0]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# ---- estimators ------------------------------------------------------------------------------------------------------
def test_estimators_by_hand() -> None:
    l = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)  # noqa: E741
    close(F.k1(l), l)
    close(F.k2(l), torch.tensor([0.125, 0.5, 0.0], dtype=torch.float64))
    close(F.k3(l), torch.tensor([math.exp(-0.5) - 0.5, math.e - 2, 0.0], dtype=torch.float64))
    close(F.weighted_k3(l, torch.full((3,), 2.0).double()), 2 * F.k3(l))


@pytest.mark.parametrize("seed", range(5))
def test_values_by_enumeration(seed: int) -> None:
    """k1 and k3 are unbiased for KL(pi || q)."""
    p, q = categorical(seed).log_softmax(0), categorical(seed + 50).log_softmax(0)
    exact = F.kl(p[None], q[None])[0]
    close((p.exp() * F.k1(p - q)).sum(), exact)
    close((p.exp() * F.k3(p - q)).sum(), exact)


@pytest.mark.parametrize("seed", range(5))
def test_expected_gradients_by_enumeration(seed: int) -> None:
    """The table: samples y of pi (weights detached), the estimator differentiated directly, over all V outcomes."""
    logits, q = categorical(seed), categorical(seed + 50).log_softmax(0)
    pi = logits.softmax(0)
    to_q = gradient(lambda p: F.kl(p[None], q[None])[0], logits)
    from_q = gradient(lambda p: F.kl(q[None], p[None])[0], logits)
    assert (to_q - from_q).norm() > 0.01  # the two directions are told apart
    close(gradient(lambda p: (pi * F.k1(p - q)).sum(), logits), torch.zeros(V).double())
    close(gradient(lambda p: (pi * F.k2(p - q)).sum(), logits), to_q)
    close(gradient(lambda p: (pi * F.k3(p - q)).sum(), logits), from_q)
    close(gradient(lambda p: (pi * F.weighted_k3(p - q, (p - p.detach()).exp())).sum(), logits), to_q)
    close(gradient(lambda p: -(q.exp() * p).sum(), logits), from_q)  # samples of q: maximum likelihood


def test_weighted_k3_off_policy_and_sample_by_sample() -> None:
    """Samples of pi_old, rho = pi / pi_old: still grad KL(pi || q); per sample rho * l * grad log pi."""
    logits, q, old = categorical(1), categorical(2).log_softmax(0), categorical(3).log_softmax(0)
    found = gradient(lambda p: (old.exp() * F.weighted_k3(p - q, (p - old).exp())).sum(), logits)
    close(found, gradient(lambda p: F.kl(p[None], q[None])[0], logits))
    p = logits.log_softmax(0).requires_grad_()
    (per_sample,) = torch.autograd.grad(F.weighted_k3(p - q, (p - old).exp()).sum(), p)
    close(per_sample, ((p - old).exp() * (p - q)).detach())


def test_k3_is_safe_in_float32() -> None:
    small = torch.tensor([1e-2, -1e-2, 1e-3, -1e-3])
    torch.testing.assert_close(F.k3(small), small**2 / 2 - small**3 / 6, rtol=2e-3, atol=0)
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = F.k3(far)
    torch.testing.assert_close(value, torch.tensor([math.exp(LOG_LIMIT) - 1 - LOG_LIMIT, 1e4 - 1]))
    value.sum().backward()
    assert far.grad.tolist() == [0.0, 1.0]
    assert F.k3(torch.tensor([-5.0]), log_limit=2.0).item() == pytest.approx(math.exp(2) - 3)


@settings(max_examples=50, deadline=None)
@given(st.floats(-25, 25))
def test_k2_and_k3_are_never_negative(value: float) -> None:
    l = torch.tensor([value], dtype=torch.float64)  # noqa: E741
    assert F.k2(l) >= 0
    assert F.k3(l) >= -1e-16


# ---- full distributions ----------------------------------------------------------------------------------------------
def test_full_distributions_by_hand() -> None:
    p, q = (
        torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(),
        torch.tensor([[0.25, 0.75]], dtype=torch.float64).log(),
    )
    close(F.kl(p, q), torch.tensor([0.5 * math.log(2) + 0.5 * math.log(2 / 3)], dtype=torch.float64))
    close(F.kl(q, p), torch.tensor([0.25 * math.log(0.5) + 0.75 * math.log(1.5)], dtype=torch.float64))
    close(F.entropy(q), torch.tensor([0.25 * math.log(4) + 0.75 * math.log(4 / 3)], dtype=torch.float64))
    close(
        F.entropy(torch.full((3, V), -math.log(V), dtype=torch.float64)),
        torch.full((3,), math.log(V), dtype=torch.float64),
    )
    m = torch.tensor([[0.375, 0.625]], dtype=torch.float64).log()
    close(F.generalised_jsd(p, q, 0.5), (F.kl(p, m) + F.kl(q, m)) / 2)


def test_full_distributions_gradients() -> None:
    p, q = categorical(0)[None].requires_grad_(), categorical(1)[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: F.kl(a.log_softmax(-1), b.log_softmax(-1)), (p, q))
    assert torch.autograd.gradcheck(lambda a: F.entropy(a.log_softmax(-1)), p)
    for beta in (0.0, 0.3, 1.0):
        assert torch.autograd.gradcheck(
            lambda a, b, beta=beta: F.generalised_jsd(a.log_softmax(-1), b.log_softmax(-1), beta), (p, q)
        )


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_excluded_outcomes_add_nothing(beta: float) -> None:
    """Two outcomes at -inf: the value and gradient of the distribution without them, and gradient 0 there."""
    logits, q = categorical(4)[None], categorical(5)[None]
    keep = torch.tensor([True, False, True, True, False, True])
    x = logits.masked_fill(~keep, -INF).log_softmax(-1).requires_grad_()
    y = q.masked_fill(~keep, -INF).log_softmax(-1)
    small = logits[:, keep].log_softmax(-1).requires_grad_()
    for function in (F.kl, lambda a, b: F.entropy(a), lambda a, b: F.generalised_jsd(a, b, beta)):
        full, part = function(x, y), function(small, q[:, keep].log_softmax(-1))
        close(full, part)
        (g,), (h,) = torch.autograd.grad(full.sum(), x), torch.autograd.grad(part.sum(), small)
        close(g[:, keep], h)
        assert torch.equal(g[:, ~keep], torch.zeros(1, 2).double())


def test_an_outcome_that_only_one_excludes() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert F.kl(p, q).item() == INF
    assert F.kl(q, p).item() == pytest.approx(math.log(2))
    expected = 0.5 * math.log(4 / 3) + 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert F.generalised_jsd(p, q, 0.5).item() == pytest.approx(expected)


def test_jsd_ends_are_no_limits_of_the_middle() -> None:
    student, teacher = categorical(6).log_softmax(0)[None], categorical(7).log_softmax(0)[None]
    forward, reverse = F.kl(teacher, student), F.kl(student, teacher)
    assert (forward - reverse).abs() > 1e-3
    close(F.generalised_jsd(student, teacher, 0.0), forward)
    close(F.generalised_jsd(student, teacher, 1.0), reverse)
    tiny = 1e-6
    low, high = F.generalised_jsd(student, teacher, tiny), F.generalised_jsd(student, teacher, 1 - tiny)
    torch.testing.assert_close(low / tiny, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(high / tiny, reverse, rtol=1e-4, atol=0)


def test_jsd_refuses_beta_outside_its_range_and_unequal_shapes() -> None:
    p = categorical(0).log_softmax(0)[None]
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="beta"):
            F.generalised_jsd(p, p, beta)
    for call in (lambda: F.kl(p, p[0]), lambda: F.generalised_jsd(p, p[0], 0.5), lambda: F.weighted_k3(p, p[0])):
        with pytest.raises(ValueError, match="one shape"):
            call()


def test_no_rows() -> None:
    nothing = torch.zeros(0, V)
    for found in (F.kl(nothing, nothing), F.entropy(nothing), F.generalised_jsd(nothing, nothing, 0.5)):
        assert found.shape == (0,)
    for k in (F.k1, F.k2, F.k3):
        assert k(torch.zeros(0)).shape == (0,)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(0, 999), st.floats(0, 1))
def test_divergences_are_zero_on_themselves_positive_otherwise_and_ignore_order(a: int, b: int, beta: float) -> None:
    p, q = categorical(a).log_softmax(0)[None], categorical(b).log_softmax(0)[None]
    order = torch.randperm(V, generator=torch.Generator().manual_seed(a))
    jsd = F.generalised_jsd(p, q, beta)
    assert jsd >= -1e-12
    assert F.generalised_jsd(p, q, 0.5) <= math.log(2)
    close(F.generalised_jsd(p, q, 0.5), F.generalised_jsd(q, p, 0.5))
    close(F.kl(p, q), F.kl(p[:, order], q[:, order]))
    close(jsd, F.generalised_jsd(p[:, order], q[:, order], beta))
    close(F.generalised_jsd(p, p, beta), torch.zeros(1).double())
    assert 0 < F.entropy(p) <= math.log(V)
