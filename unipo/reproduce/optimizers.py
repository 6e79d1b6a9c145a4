"""Momentum with less bias, one trajectory per iteration: N-PG-IGT and HARPG (arXiv 2302.01734) on a Gaussian policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unipo.optimizers import (
    Decay,
    HessianAidedRecursive,
    ImplicitGradientTransport,
    NormalisedMomentum,
    StochasticGradient,
    gradient_difference,
)
from unipo.reproduce.claim import Claim, Expectation
from unipo.sources.keyed import keyed_generator

DIMENSIONS, SPREAD, OPTIMUM, DIVERGED = 10, 1.5, 2.0, 1e3
CURVATURE = 2 / DIMENSIONS
"""The Hessian of the expected loss is this times the identity."""

Optimiser = StochasticGradient | NormalisedMomentum | ImplicitGradientTransport | HessianAidedRecursive


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """`build(g0, seed)` makes the optimiser; `steps // share` iterations are run.

    Trajectories of an iteration: `batch` for the gradient, `hessian` for the Hessian term (0: the term is exact).
    """

    build: Callable[[float, int], Optimiser]
    batch: int = 1
    hessian: int = 0
    share: int = 1


def losses(theta: Tensor, n: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """log p(a) [n] of actions a ~ N(theta, SPREAD^2 I), and surrogates log p(a) * loss(a) [n]; loss = |a - th*|^2 / 10."""
    noise = torch.from_numpy(generator.normal(size=(n, DIMENSIONS)))
    action = theta.detach() + SPREAD * noise
    log_prob = -(action - theta).square().sum(1) / (2 * SPREAD**2)
    return log_prob, log_prob * (action - OPTIMUM).square().mean(1)


def distance(theta: Tensor) -> float:
    """|theta - th*|^2 / 10: the mean loss above its minimum. NaN and what is larger than DIVERGED: DIVERGED."""
    found = float((theta.detach() - OPTIMUM).square().mean())
    return found if found < DIVERGED else DIVERGED


def trial(arm: Arm, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Where th_0 = 0 has come to, whether it diverged, and how many trajectories it was given."""
    theta, optimiser = torch.zeros(DIMENSIONS, dtype=torch.float64, requires_grad=True), arm.build(rate, seed)
    state, generator = optimiser.init([theta]), keyed_generator(seed, "gaussian policy")

    def difference(parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
        if arm.hessian == 0:
            return [CURVATURE * w for w in direction]
        return gradient_difference(parameters, direction, *losses(parameters[0], arm.hessian, generator))

    for _ in range(steps // arm.share):
        if distance(theta) == DIVERGED:
            break
        gradient = torch.autograd.grad(losses(theta, arm.batch, generator)[1].mean(), [theta])
        if isinstance(optimiser, HessianAidedRecursive):
            state, _ = optimiser.step([theta], gradient, state, difference)
        else:
            state, _ = optimiser.step([theta], gradient, state)
    reached = distance(optimiser.deployed([theta], state)[0])
    return {
        "distance": reached,
        "diverged": float(reached == DIVERGED),
        "trajectories": float((steps // arm.share) * (arm.batch + arm.hessian)),
    }


def harpg(rate: float, seed: int) -> HessianAidedRecursive:
    return HessianAidedRecursive(rate=Decay(rate, 1 / 2), normalise=False, seed=seed)


def n_harpg(rate: float, seed: int) -> HessianAidedRecursive:
    return HessianAidedRecursive(rate=Decay(rate), seed=seed)


MOMENTUM, TRANSPORT, PLAIN, HESSIAN = "normalised momentum", "n-pg-igt", "sgd", "n-harpg, 32 for the Hessian"
CLAIMS = (
    Claim(
        slug="npg-igt-harpg",
        statement="With one trajectory per iteration, N-PG-IGT ends nearer to the optimum than normalised momentum and "
        "stochastic gradient ascent; so does N-HARPG, given a batch for its Hessian term.",
        arms={
            TRANSPORT: Arm(build=lambda rate, seed: ImplicitGradientTransport(rate=Decay(rate))),
            MOMENTUM: Arm(build=lambda rate, seed: NormalisedMomentum(rate=Decay(rate))),
            PLAIN: Arm(build=lambda rate, seed: StochasticGradient(rate=Decay(rate, 2 / 3))),
            HESSIAN: Arm(build=n_harpg, hessian=32),
            "harpg, 32 for the Hessian": Arm(build=harpg, hessian=32),
            "n-harpg, 1 for the Hessian": Arm(build=n_harpg, hessian=1),
            "n-harpg, exact Hessian": Arm(build=n_harpg),
            "n-harpg, 10 + 5, as many trajectories": Arm(build=n_harpg, batch=10, hessian=5, share=15),
        },
        trial=trial,
        steps=1500,
        tune="distance",
        minimise=True,
        grid=(0.03, 0.1, 0.3, 1.0, 2.0, 4.0),
        expectations=(
            Expectation(arm=MOMENTUM, metric="distance", than=TRANSPORT, least=0.0),
            Expectation(arm=PLAIN, metric="distance", than=TRANSPORT, least=0.0),
            Expectation(arm=MOMENTUM, metric="distance", than=HESSIAN, least=0.0),
        ),
        note=f"Policy N(theta, {SPREAD}^2 I) in {DIMENSIONS} dimensions, reward -|a - th*|^2/10 with th* = "
        f"({OPTIMUM:g}, ..., {OPTIMUM:g}), th_0 = 0, no baseline, 1500 iterations, distance |theta - th*|^2/10 of the "
        "deployed theta, at the start 4. A learning rate is the first step size g0. The expected loss is quadratic, which is "
        "what transport assumes. N-HARPG is compared at equal iterations, with 33 times the trajectories; the arms without "
        "an expectation show it with a single trajectory for the Hessian (two per iteration), with the exact Hessian (no "
        f"trajectory), and with all trajectories counted. A run that diverges counts as {DIVERGED:g}; two tuning seeds "
        "do not always see that a rate diverges on others.",
    ),
)
