"""The Gaussian task of the claim: its numbers, and that every arm runs."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from unipo.reproduce.optimizers import (
    CLAIMS,
    CURVATURE,
    DIVERGED,
    HESSIAN,
    TRANSPORT,
    Arm,
    losses,
    n_harpg,
    trial,
)
from unipo.reproduce.run import KEYS, VERDICTS, run_claim
from unipo.sources.keyed import keyed_generator

(CLAIM,) = CLAIMS


def test_the_surrogate_has_the_gradient_and_curvature_of_the_quadratic() -> None:
    """E loss = (|theta - th*|^2 + 10 SPREAD^2)/10: the gradient is CURVATURE (theta - th*), and so is the mean estimate."""
    theta = torch.linspace(-1, 2, 10, dtype=torch.float64).requires_grad_()
    _, surrogate = losses(theta, 200_000, keyed_generator(0, "test"))
    (found,) = torch.autograd.grad(surrogate.mean(), theta)
    torch.testing.assert_close(found, CURVATURE * (theta.detach() - 2), atol=0.05, rtol=0)


def test_an_exact_hessian_is_what_many_trajectories_estimate() -> None:
    exact, many = (trial(Arm(build=n_harpg, hessian=n), 1.0, 0, 12) for n in (0, 20_000))
    assert many["distance"] == pytest.approx(exact["distance"], rel=0.2)


def test_at_the_start_the_distance_is_four() -> None:
    assert trial(CLAIM.arms[TRANSPORT], 1.0, 0, 0)["distance"] == pytest.approx(4.0)


def test_every_arm_runs_and_counts_its_trajectories() -> None:
    verdict = run_claim(CLAIM, 2, Console(file=io.StringIO()), steps=15)
    assert tuple(verdict) == KEYS
    counted = {arm: numbers["trajectories"]["mean"] for arm, numbers in verdict["numbers"].items()}
    assert counted[TRANSPORT] == counted["n-harpg, exact Hessian"] == 15.0
    assert counted["n-harpg, 10 + 5, as many trajectories"] == 15.0
    assert counted[HESSIAN] == 15.0 * 33


def test_a_run_that_diverges_is_counted_as_such() -> None:
    found = trial(CLAIM.arms["sgd"], 100.0, 0, 200)
    assert (found["distance"], found["diverged"]) == (DIVERGED, 1.0)


def test_the_committed_verdict_has_all_arms_and_seeds() -> None:
    verdict = json.loads((VERDICTS / "npg-igt-harpg.json").read_text(encoding="utf-8"))
    assert set(verdict["numbers"]) == set(CLAIM.arms)
    assert len(verdict["seeds"]) >= 5
