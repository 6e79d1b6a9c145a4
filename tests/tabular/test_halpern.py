"""Halpern iteration: its special cases, the recursion of its error, and its bounds."""

from __future__ import annotations

import math

import pytest
import torch

from unipo.sources.keyed import keyed_generator
from unipo.tabular.halpern import (
    AffineSum,
    always,
    anchor_paper,
    anchor_plain,
    anchored_extragradient,
    exact_resolvent,
    halpern,
    refresh_paper,
    resolvent_halpern,
    sampled_resolvent,
)


def made(seed: int = 0, n: int = 100, d: int = 10) -> tuple[AffineSum, torch.Tensor]:
    generator = keyed_generator(seed, "sum")
    return AffineSum.random_cocoercive(n, d, generator), torch.from_numpy(generator.normal(size=d))


def never(k: int) -> float:
    return 0.0


def test_cocoercivity_is_the_smallest_constant() -> None:
    operator, _ = made()
    L = operator.cocoercivity
    generator = keyed_generator(0, "pairs")
    ratios = []
    for _ in range(200):
        u = torch.from_numpy(generator.normal(size=10))
        v = torch.from_numpy(generator.normal(size=10))
        apart = (operator.matrices @ (u - v)).square().sum(1).mean()
        ratios.append(float(apart / ((operator(u) - operator(v)) @ (u - v))))
    assert max(ratios) <= L * (1 + 1e-9)
    assert max(ratios) > 0.5 * L
    torch.testing.assert_close(operator(operator.zero), torch.zeros(10, dtype=torch.float64), atol=1e-12, rtol=0)


def test_without_anchor_it_is_the_forward_step() -> None:
    operator, u = made()
    run = halpern(operator, u, 500, keyed_generator(0), constant=0.5, anchor=lambda k: 0.0)
    for k in range(4):
        torch.testing.assert_close(run.path[k + 1], run.path[k] - operator(run.path[k]) / 2.0)


def test_a_whole_batch_is_deterministic() -> None:
    """b = n without replacement, and p = 1: the same iterates, whatever is drawn."""
    operator, u = made()
    L = operator.cocoercivity
    plain = halpern(operator, u, 2000, keyed_generator(0), constant=L, refresh=always)
    whole = halpern(operator, u, 4000, keyed_generator(1), constant=L, refresh=never, batch=100)
    steps = min(len(plain.path), len(whole.path))
    torch.testing.assert_close(plain.path[:steps], whole.path[:steps])
    assert plain.calls.tolist()[:3] == [100, 200, 300]
    assert whole.calls.tolist()[:3] == [100, 300, 500]


def test_the_expected_error_shrinks_by_1_minus_p() -> None:
    """E[ F~_k - F(u_k) ] = (1 - p) (F~_{k-1} - F(u_{k-1})), by the mean over all single components."""
    operator, u = made(n=7)
    v, wrong, p = u + 0.3, torch.ones(10, dtype=torch.float64), 0.3
    step = torch.stack(
        [operator.part(v, torch.tensor([i])) - operator.part(u, torch.tensor([i])) for i in range(7)]
    ).mean(0)
    estimate = p * operator(v) + (1 - p) * (operator(u) + wrong + step)
    torch.testing.assert_close(estimate - operator(v), (1 - p) * wrong)


@pytest.mark.parametrize(("anchor", "tends_to"), [(anchor_paper, 8.0), (anchor_plain, 4.0)])
def test_the_residual_bound_and_its_constant(anchor, tends_to: float) -> None:  # type: ignore[no-untyped-def]
    """|F(u_k)| (k + 4) / (L |u_0 - u*|) <= 16, and for large k it is 4 lambda_k (k + 4): F(u_k) ~ lambda_k / eta (u_0 - u*)."""
    for seed in range(4):
        operator, u = made(seed)
        L = operator.cocoercivity
        for refresh in (always, refresh_paper(100)):
            run = halpern(
                operator, u, 60_000, keyed_generator(seed, "page"), constant=L, refresh=refresh, anchor=anchor
            )
            k = torch.arange(len(run.calls)) + 4
            scaled = run.residuals(operator) * k / (L * (u - operator.zero).norm())
            assert float(scaled.max()) <= 16.0
        assert float(scaled[-1]) == pytest.approx(tends_to, rel=0.15)


def test_variance_reduction_is_cheaper() -> None:
    operator, u = made(0, n=400, d=20)
    L, last = operator.cocoercivity, []
    for refresh in (always, refresh_paper(400)):
        run = halpern(operator, u, 100_000, keyed_generator(0, "run"), constant=L, refresh=refresh)
        last.append(float(run.residuals(operator)[-1]))
        assert int(run.calls[-1]) >= 100_000 > int(run.calls[-2])
    assert last[1] < 0.6 * last[0]


def test_the_resolvent_bound() -> None:
    """|u_k - J(u_k)| <= 2 |u_0 - u*| / (k + 1) for a monotone operator that is not cocoercive."""
    generator = keyed_generator(0, "bilinear")
    operator = AffineSum.random_bilinear(20, 8, generator)
    start, eta = torch.from_numpy(generator.normal(size=8)), 0.7
    path = resolvent_halpern(lambda u, k: exact_resolvent(operator, eta, u), start, 300)
    for k, u in enumerate(path):
        distance = (u - exact_resolvent(operator, eta, u)).norm()
        assert float(distance) <= 2 * float((start - operator.zero).norm()) / (k + 1) + 1e-12


def test_the_sampled_resolvent_finds_the_exact_one() -> None:
    generator = keyed_generator(1, "bilinear")
    operator = AffineSum.random_bilinear(20, 8, generator)
    u = torch.from_numpy(generator.normal(size=8))
    exact = exact_resolvent(operator, 0.7, u)
    torch.testing.assert_close(exact + 0.7 * operator(exact), u)
    errors = [
        float((sampled_resolvent(operator, 0.7, u, steps, keyed_generator(steps)) - exact).norm())
        for steps in (50, 2000)
    ]
    assert errors[1] < 1e-4 < errors[0]


def test_anchored_extragradient_solves_what_forward_steps_cannot() -> None:
    generator = keyed_generator(2, "bilinear")
    operator = AffineSum.random_bilinear(20, 8, generator)
    start = torch.from_numpy(generator.normal(size=8))
    L = math.sqrt(float(torch.linalg.eigvalsh(operator.matrices.mean(0).T @ operator.matrices.mean(0)).max()))
    path = anchored_extragradient(operator, start, 2000, 1 / (8 * L))
    residuals = torch.stack([operator(u).norm() for u in path])
    assert float(residuals[-1]) < 0.1 * float(residuals[0])
    assert float(residuals[1000] * 1000) == pytest.approx(float(residuals[2000] * 2000), rel=0.2)
