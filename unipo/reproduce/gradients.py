"""BNPO: the noise of the gradient estimate at a fixed policy, on prompts of mixed difficulty (arXiv 2506.02864)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unipo.methods.catalog import build, find
from unipo.objectives import BatchMean
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.training import key, learner_of, near_uniform
from unipo.sources.keyed import keyed_generator
from unipo.tasks.tabular import TabularTask

PROMPTS, VOCABULARY, LENGTH, GROUP = 16, 6, 2, 8
DIFFICULTIES = {"uniform": (1.0, 1.0), "U-shaped": (0.5, 0.5)}


def mixed_difficulty(seed: int, a: float, b: float) -> TabularTask:
    """Each prompt has a random set of right answers, a share of all that is drawn from Beta(a, b)."""
    drawn = keyed_generator(seed, "difficulty", str(a))
    answers = VOCABULARY**LENGTH
    right = [drawn.permutation(answers) < rate * answers for rate in drawn.beta(a, b, PROMPTS)]
    return TabularTask(PROMPTS, VOCABULARY, LENGTH, lambda q, t: float(right[q][VOCABULARY * t[0] + t[1]]))


def gradients(recipe: Recipe, task: TabularTask, policy: TabularPolicy, seed: int, n: int) -> Tensor:
    """[n, parameters]: what `n` independent batches estimate; the same batches for every recipe."""
    learner, found = learner_of(policy, 0.0), []
    for i in range(n):
        policy.logits.grad = None
        learner.gradient(task.sample(policy, GROUP, key(seed, "batch", i)), recipe.objective)
        found.append(torch.zeros_like(policy.logits) if policy.logits.grad is None else policy.logits.grad)
    return torch.stack(found).flatten(1)


def relative_variance(found: Tensor) -> float:
    """E |g - E g|^2 / |E g|^2 without bias in numerator and |E g|^2: the size of the steps cancels."""
    variance = found.var(0, correction=1).sum()
    signal = found.mean(0).square().sum() - variance / len(found)
    return float(variance / signal.clamp(min=1e-12))


def trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """`steps` batches per family of difficulties; nothing is trained."""
    measured = {}
    for name, (a, b) in DIFFICULTIES.items():
        task = mixed_difficulty(seed, a, b)
        found = gradients(phases[0], task, near_uniform(task, seed), seed, steps)
        measured[f"relative variance, {name}"] = relative_variance(found)
    return measured


BASELINES = {
    "dr-grpo": build("dr-grpo", {}),
    "grpo": build("grpo", {}),
    "reinforce, batch mean": build("rloo", {}).but(center=BatchMean()),
}
CLAIMS = (
    Claim(
        slug="bnpo",
        statement=find("bnpo").claim,
        arms={"bnpo": (build("bnpo", {}),), **{name: (recipe,) for name, recipe in BASELINES.items()}},
        trial=trial,
        steps=300,
        tune="relative variance, uniform",
        minimise=True,
        grid=(0.0,),
        expectations=tuple(
            Expectation(arm=name, metric=f"relative variance, {family}", than="bnpo", least=0.0)
            for family in DIFFICULTIES
            for name in BASELINES
        ),
        note=f"Tabular language policy, {PROMPTS} prompts whose share of right answers is drawn from Beta(1, 1) and "
        f"Beta(0.5, 0.5), groups of {GROUP}, 300 batches per seed, the same for all. Relative variance is "
        "E|g - Eg|^2 / |Eg|^2, so that the size of the steps cancels. A seed draws another policy and other difficulties.",
    ),
)
