"""Estimation, checked by numbers: off-policy evaluation, agnostic search, Bayesian gradients, quality of data sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from unipo.functional import bpg_model_1, bpg_model_2
from unipo.methods.estimation_theory import STUDIES
from unipo.reproduce import estimation_datasets
from unipo.reproduce.claim import Claim, Expectation
from unipo.sources.keyed import keyed_generator
from unipo.tabular.agnostic import generative, hoeffding, importance_values, tables, trajectory_trees
from unipo.tabular.least_squares import (
    Moments,
    condition,
    distance,
    fqe_step,
    lstd,
    next_features,
    population_moments,
    realizable,
    sample_moments,
    target_noise,
    two_state_chain,
)
from unipo.tabular.mdp import EpisodicMDP, FiniteMDP, random_mdp

STATEMENTS = {study.slug: study.claim for study in STUDIES}

# ---- row 62: realizable is enough for LSTD, not for fitted Q evaluation ----------------------------------------------
STATES, ACTIONS, FEATURES, REPEATS = 20, 3, 5, 8
DISCOUNTS, SIZES, SHOWN = 3 * (0.5, 0.8, 0.9, 0.95), (500, 1000, 2000, 4000, 8000), 4000


def realizable_problem(
    generator: np.random.Generator, seed: int, discount: float
) -> tuple[FiniteMDP, Tensor, Tensor, Tensor, Tensor]:
    """A random process where Q^pi = x^T w; its policy, a random law of the data, features and w."""
    policy = torch.from_numpy(generator.dirichlet(np.ones(ACTIONS), STATES))
    law = torch.from_numpy(generator.dirichlet(np.ones(STATES * ACTIONS))).reshape(STATES, ACTIONS)
    features = torch.from_numpy(generator.normal(size=(STATES, ACTIONS, FEATURES)))
    weights = torch.from_numpy(generator.normal(size=FEATURES))
    return (
        realizable(random_mdp(STATES, ACTIONS, seed, discount), policy, features, weights),
        policy,
        law,
        features,
        weights,
    )


def errors(solve: Callable[[Moments, int], Tensor], seed: int, discount: float, steps: int) -> tuple[Tensor, float]:
    """Root mean square under mu of Q^ - Q, [sizes, repeats], and kappa sigma sqrt(d)."""
    generator = keyed_generator(seed, "realizable", str(discount))
    mdp, policy, law, features, weights = realizable_problem(generator, int(generator.integers(2**31)), discount)
    truth, following, found = population_moments(mdp, policy, law, features), next_features(features, policy), []
    for n in (n for n in SIZES for _ in range(REPEATS)):
        state, action = np.divmod(generator.choice(law.numel(), n, p=law.flatten().numpy()), ACTIONS)
        edges = mdp.transition[state, action].cumsum(1)
        after = torch.searchsorted(edges, torch.from_numpy(generator.random((n, 1)))).clamp(max=STATES - 1)[:, 0]
        seen = sample_moments(features[state, action], mdp.reward[state, action], following[after], discount)
        found.append(distance(truth.gram, solve(seen, steps), weights))
    return torch.stack(found).reshape(len(SIZES), REPEATS), condition(truth) * target_noise(
        mdp, policy, law
    ) * FEATURES**0.5


def iterated(moments: Moments, steps: int) -> Tensor:
    weights = torch.zeros_like(moments.reward)
    for _ in range(steps):
        weights = fqe_step(moments, weights)
    return weights


def evaluation_trial(
    solve: Callable[[Moments, int], Tensor], rate: float, seed: int, steps: int
) -> Mapping[str, float]:
    """Twelve random processes, and the chain with a tenth of the data in its second state."""
    every = [errors(solve, 100 * seed + i, discount, steps) for i, discount in enumerate(DISCOUNTS)]
    found, scale = torch.stack([e for e, _ in every]), torch.tensor([s for _, s in every], dtype=torch.float64)
    slope = np.polyfit(np.log(SIZES), found.log().mean((0, 2)).numpy(), 1)[0]
    shown = found[:, SIZES.index(SHOWN)]
    ratio = shown / (scale[:, None] / SHOWN**0.5)
    mdp, features = two_state_chain()
    law = torch.tensor([[0.9], [0.1]], dtype=torch.float64)
    chain = population_moments(mdp, torch.ones(2, 1, dtype=torch.float64), law, features)
    wrong = float((solve(chain, steps) - 3).abs())
    return {
        "slope in n": float(slope),
        "error / scale, median": float(ratio.median()),
        "error / scale, largest": float(ratio.max()),
        "correlation with scale": estimation_datasets.correlation(shown.log().mean(1), scale.log()),
        "log10 error, chain": math.log10(max(wrong, 1e-16)),
    }


EVALUATION = Claim(
    slug="realizable-offpolicy",
    statement=STATEMENTS["realizable-offpolicy"],
    arms={"lstd": lambda moments, steps: lstd(moments), "fqe": iterated},
    trial=evaluation_trial,
    steps=200,
    tune="slope in n",
    grid=(0.0,),
    expectations=(
        Expectation(arm="lstd", metric="slope in n", least=-0.6, most=-0.4),
        Expectation(arm="lstd", metric="error / scale, median", least=0.1, most=1.0),
        Expectation(arm="lstd", metric="error / scale, largest", most=3.0),
        Expectation(arm="lstd", metric="correlation with scale", least=0.5),
        Expectation(arm="lstd", metric="log10 error, chain", most=-8.0),
        Expectation(arm="fqe", metric="log10 error, chain", least=3.0),
    ),
    note=f"{len(DISCOUNTS)} random processes per seed ({STATES} states, {ACTIONS} actions, {FEATURES} features, discounts 0.5 to "
    f"0.95), data from a random law, {REPEATS} data sets of each size in {SIZES}; scale is kappa sigma sqrt(d/n) at n = {SHOWN}. "
    "Kappa, the condition of the whitened Bellman matrix, stands for the third factor of the paper, whose text and constants "
    "were not at hand. The chain: two states with features 1 and 2, a tenth of the data in the second, exact moments, 200 "
    "iterations. On the random processes fitted Q evaluation converges, to the same answer.",
)

# ---- row 147: trajectory trees pay for what the class reaches, not for the number of states --------------------------
POLICIES, HORIZON, BLOCKS = 64, 6, (16, 64, 256)
REACH = sum(min(POLICIES, 2 ** (h + 1)) for h in range(HORIZON))


@cache
def walk(states: int, seed: int) -> tuple[EpisodicMDP, Tensor]:
    """Points of [0, 1]; action 0 moves left and 1 right, by 0.25 with noise 0.15; a random smooth reward in [0, 1/H].

    And 64 policies that go right below a threshold. Finer grids approach one continuous problem.
    """
    generator, x = keyed_generator(seed, "walk"), np.linspace(0, 1, states)
    means = np.clip(x[:, None] + np.array([-0.25, 0.25]), 0, 1)
    density = np.exp(-0.5 * ((x - means[..., None]) / 0.15) ** 2)
    waves, phases = generator.normal(size=4), generator.uniform(0, 2 * np.pi, 4)
    height = sum(w * np.sin(2 * np.pi * (k + 1) * x + p) for k, (w, p) in enumerate(zip(waves, phases, strict=True)))
    reward = torch.from_numpy((height - height.min()) / (height.max() - height.min()) / HORIZON)
    mdp = EpisodicMDP(
        transition=torch.from_numpy(density / density.sum(-1, keepdims=True)).expand(HORIZON, -1, -1, -1),
        reward=reward[:, None].expand(HORIZON, states, 2),
        initial=torch.nn.functional.one_hot(torch.tensor(states // 2), states),
    )
    below = torch.from_numpy(x) < ((torch.arange(POLICIES) + 0.5) / POLICIES)[:, None]
    return mdp, below.to(torch.int64)[:, None].expand(-1, HORIZON, -1)


def tree_estimates(states: int, seed: int, trees: int) -> tuple[dict[int, Tensor], float]:
    """V^ [blocks, P] by number of trees in a block, and calls per tree."""
    mdp, policies = walk(states, seed)
    draw = generative(mdp, keyed_generator(seed, "trees", states))
    parts = [trajectory_trees(mdp, policies, draw, 64, states // 2) for _ in range(trees // 64)]
    returns = torch.cat([part.returns for part in parts])
    values = {n: returns.reshape(-1, n, POLICIES).mean(1) for n in BLOCKS}
    return values, sum(part.calls for part in parts) / trees


def importance_estimates(states: int, seed: int, trees: int) -> tuple[dict[int, Tensor], float]:
    """The same from uniformly acting episodes, as many as the trees' calls pay for."""
    (mdp, policies), (_, calls) = walk(states, seed), tree_estimates(states, seed, trees)
    generator, uniform = keyed_generator(seed, "uniform", states), torch.full((HORIZON, states, 2), 0.5).double()
    values = {}
    for n in BLOCKS:
        runs = (mdp.sample(uniform, round(n * calls / HORIZON), generator) for _ in range(trees // n))
        values[n] = torch.stack([importance_values(seen, policies, 2) for seen in runs])
    return values, calls


def search_trial(
    arm: tuple[Callable[[int, int, int], tuple[dict[int, Tensor], float]], int], rate: float, seed: int, steps: int
) -> Mapping[str, float]:
    """`steps` blocks of 256 trees: errors over all 64 policies at once, and what the best of the estimates loses."""
    estimate, states = arm
    mdp, policies = walk(states, seed)
    true = torch.stack([mdp.expected_return(policy) for policy in tables(policies, 2)])
    values, calls = estimate(states, seed, steps * max(BLOCKS))
    worst = {n: (found - true).abs().amax(1) for n, found in values.items()}
    most = max(BLOCKS)
    lost = true.max() - true[values[most].argmax(1)]
    slope = np.polyfit(np.log(BLOCKS), [float(worst[n].mean().log()) for n in BLOCKS], 1)[0]
    return {
        "log uniform error": float(worst[most].mean().log()),
        "slope in calls": float(slope),
        "calls per tree": calls,
        "error / bound": float(worst[most].max()) / hoeffding(POLICIES, most, 0.05),
        "lost / twice the bound": float(lost.max()) / (2 * hoeffding(POLICIES, most, 0.05)),
        "uniform error": float(worst[most].mean()),
        "lost": float(lost.mean()),
    }


TREE_ARMS = tuple(f"trees, {states} states" for states in (64, 256, 512))
SEARCH = Claim(
    slug="agnostic-rl",
    statement=STATEMENTS["agnostic-rl"],
    arms={
        **{name: (tree_estimates, states) for name, states in zip(TREE_ARMS, (64, 256, 512), strict=True)},
        "importance, 512 states": (importance_estimates, 512),
    },
    trial=search_trial,
    steps=24,
    tune="log uniform error",
    grid=(0.0,),
    expectations=(
        *(Expectation(arm=name, metric="slope in calls", least=-0.6, most=-0.4) for name in TREE_ARMS),
        *(Expectation(arm=name, metric="calls per tree", most=REACH + 1e-9) for name in TREE_ARMS),
        *(Expectation(arm=name, metric="error / bound", most=1.0) for name in TREE_ARMS),
        *(Expectation(arm=name, metric="lost / twice the bound", most=1.0) for name in TREE_ARMS),
        *(
            Expectation(arm=name, metric="log uniform error", than=TREE_ARMS[0], least=-0.2, most=0.2)
            for name in TREE_ARMS[1:]
        ),
        Expectation(arm="importance, 512 states", metric="log uniform error", than=TREE_ARMS[2], least=0.0),
    ),
    note=f"{POLICIES} threshold policies on a noisy walk of {HORIZON} steps, on grids of growing size. Uniform error: the "
    f"largest |V^ - V| over the class, mean over 24 blocks of 256 trees; slopes from blocks of {BLOCKS}. Bound: Hoeffding "
    f"at delta 0.05. Calls per tree are at most the sum over steps of min(64, 2^(h+1)) = {REACH}. Importance sampling gets as "
    "many calls, as uniformly acting episodes. Values are exact. Before, policies that go away from their threshold were tried, "
    "which differ little and ask 12.5 calls per tree: with 16 blocks all was reproduced but the comparison between grids, "
    "inconclusive; with 64 all of it. The thesis' constants and its online algorithm (POPLER) are left out.",
)

# ---- row 137: the Gaussian bandit ------------------------------------------------------------------------------------
FISHER = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
REWARDS = {"r=a": (1, (1.0, 0.0)), "r=a^2": (2, (0.0, 2.0))}
SAMPLES, NOISE = (5, 10, 20), 0.01
EXACT = {"r=a": 0.01, "r=a^2": 0.04}  # a tenth of the length of the gradient, squared
Estimator = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def monte_carlo(scores: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of R u and the covariance of that mean."""
    each = scores * returns[:, None]
    return each.mean(0), torch.cov(each.T) / len(each)


def gradient_trial(estimate: Estimator, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """`steps` estimates of each gradient from each number of samples; the same actions for every estimator."""
    measured: dict[str, float] = {}
    for name, (power, exact) in REWARDS.items():
        true = torch.tensor(exact, dtype=torch.float64)
        for m in SAMPLES:
            actions = torch.from_numpy(keyed_generator(seed, "bandit", name, m).normal(size=(steps, m)))
            found = [estimate(torch.stack([a, a.square() - 1], 1), a**power) for a in actions]
            mean = torch.stack([x for x, _ in found])
            error = (mean - true).square().sum(1).mean()
            expected = torch.stack([c.trace() for _, c in found]).mean()
            measured[f"squared error, {name}, M={m}"] = float(error)
            measured[f"main component, {name}, M={m}"] = float(mean.mean(0)[power - 1])
        measured[f"error / reported, {name}, M={m}"] = float(error / expected)
    return measured


GRADIENT = Claim(
    slug="bayesian-pg",
    statement=STATEMENTS["bayesian-pg"],
    arms={
        "Model 1": lambda scores, returns: bpg_model_1(scores, returns, FISHER, NOISE),
        "Model 2": lambda scores, returns: bpg_model_2(scores, returns, FISHER, NOISE),
        "Monte Carlo": monte_carlo,
    },
    trial=gradient_trial,
    steps=400,
    tune="squared error, r=a, M=10",
    minimise=True,
    grid=(0.0,),
    expectations=(
        *(
            Expectation(arm=model, metric=f"squared error, {name}, M={m}", than="Monte Carlo", most=0.0)
            for model in ("Model 1", "Model 2")
            for name in REWARDS
            for m in SAMPLES
        ),
        *(Expectation(arm="Model 1", metric=f"squared error, {name}, M=20", most=most) for name, most in EXACT.items()),
    ),
    note="The paper's bandit: a ~ N(0, 1), scores (a, a^2 - 1), G = diag(1, 2), rewards a and a^2, exact gradients (1, 0) and "
    "(0, 2), s^2 = 0.01, 400 estimates per seed and number of samples. Both models shrink towards 0, so errors are compared "
    "and not biases. Error / reported: squared error over the trace of the covariance that the estimator reports for "
    "itself, 1 if calibrated. Left out: the paper's mountain car and ship steering.",
)

CLAIMS: tuple[Claim, ...] = (EVALUATION, SEARCH, GRADIENT, estimation_datasets.CLAIM)
