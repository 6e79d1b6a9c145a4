"""DRPO: length against accuracy. Reg-GRPO: many passes over a batch. Direct advantages offline. GEPO: equivalent answers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from unipo.episodes import Episodes
from unipo.methods.catalog import build
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.training import Draw, key, success, train
from unipo.sources.filters import LengthPenalty
from unipo.sources.keyed import keyed_generator
from unipo.sources.rollouts import Rollouts, Scored
from unipo.sources.tabular import tabular_rollouts
from unipo.tasks.tabular import TabularTask

SFT = build("sft", {})

# ---- DRPO ------------------------------------------------------------------------------------------------------------
THINK, END, LONGEST, QUESTIONS = 0, 1, 10, 8
CEILING, SHARPNESS, TOLERATED = 0.95, 1.5, 0.02


@lru_cache(maxsize=16)
def thinking(seed: int) -> TabularTask:
    """Thoughts and an end; the reward is the chance to be right, which rises with thoughts around what the prompt needs."""
    need = keyed_generator(seed, "thoughts").uniform(0.0, 6.0, size=QUESTIONS)

    def chance(prompt: int, tokens: tuple[int, ...]) -> float:
        thoughts = len(tokens) - 1
        return CEILING / (1.0 + math.exp(-SHARPNESS * (thoughts - need[prompt]))) if tokens[-1] == END else 0.0

    return TabularTask(QUESTIONS, 2, LONGEST, chance, end=END)


@lru_cache(maxsize=16)
def thinker(seed: int) -> NetworkPolicy:
    """A policy that was shown answers of every length to every prompt."""
    lengths = [n for _ in range(QUESTIONS) for n in range(LONGEST)]
    prompts = [[q] for q in range(QUESTIONS) for _ in range(LONGEST)]
    shown = Episodes.build([[THINK] * n + [END] for n in lengths], prompts, kind=["demo"] * len(prompts))
    policy = NetworkPolicy(thinking(seed), seed)
    train((SFT,), policy, lambda step: shown, steps=60, rate=0.03)
    return policy


def judged(rollouts: Rollouts, seed: int) -> Draw:
    """Batches of `rollouts` whose rewards are 1 with the task's chance, else 0."""
    chance, coins = rollouts.reward, torch.Generator().manual_seed(key(seed, "coins"))

    def score(prompts: Any, completions: Any, columns: Any) -> Scored:
        found = chance(prompts, completions, columns)
        won = torch.rand(len(found.reward), generator=coins, dtype=torch.float64) < found.reward
        return replace(found, reward=won.double())

    rollouts.reward = score
    return lambda step: rollouts.draw(step, step)


def length(task: TabularTask, policy: NetworkPolicy) -> float:
    """Exact mean number of tokens."""
    tokens = torch.tensor([len(s) for s in task.sequences], dtype=torch.float64)
    with torch.no_grad():
        return float((task.log_probability(policy).exp() * tokens).sum(1).mean())


def at_length(points: Sequence[tuple[float, float]], allowed: float) -> float:
    """The best accuracy of mean length `allowed`, by a policy of the sweep or a mixture of two."""
    best = max((accuracy for size, accuracy in points if size <= allowed), default=0.0)
    for (short, low), (long, high) in itertools.combinations(sorted(points), 2):
        if short <= allowed <= long and short < long:
            best = max(best, low + (high - low) * (allowed - short) / (long - short))
    return best


def length_trial(sweep: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact (mean length, accuracy) of a policy trained with each recipe of the sweep; what the best of them reach."""
    task, points = thinking(seed), []
    for recipe in sweep:
        policy = copy.deepcopy(thinker(seed))
        draw = judged(tabular_rollouts(task, policy, recipe.rollouts, seed), seed)
        train((recipe,), policy, draw, steps=steps, rate=rate)
        points.append((length(task, policy), success(task, policy)))
    sizes = [1.0 + i / 10 for i in range(10 * LONGEST - 9)]
    enough = [x for x in sizes if at_length(points, x) >= CEILING - TOLERATED]
    return {"length": min(enough, default=float(LONGEST)), "accuracy at 8": at_length(points, 8.0),
            "accuracy at 6": at_length(points, 6.0)}  # fmt: skip


def _shortened(slug: str) -> Phases:
    return tuple(build(slug, {}).but(relabel=(LengthPenalty(a),)) for a in (0.0, 0.02, 0.1, 0.3, 0.9))


DRPO = tuple(
    build("drpo-decoupled", {"drpo-decoupled": {"temper": t, "longest": float(LONGEST)}})
    for t in (math.inf, 1.0, 0.3, 0.1, 0.03)
)
PENALISED, UNSCALED = "grpo, length penalty", "dr-grpo, length penalty"
DRPO_CLAIM = Claim(
    slug="drpo-decoupled",
    statement="the same accuracy at a smaller mean length, and more at an equal one, than GRPO with a length penalty inside the "
    "reward",
    arms={"drpo": DRPO, PENALISED: _shortened("grpo"), UNSCALED: _shortened("dr-grpo")},
    trial=length_trial,
    steps=60,
    tune="accuracy at 8",
    grid=(0.01, 0.03),
    expectations=(
        Expectation(arm="drpo", metric="length", than=PENALISED, most=0.0),
        Expectation(arm="drpo", metric="accuracy at 8", than=PENALISED, least=0.0),
    ),
    note=f"Answers are thoughts and an end; the chance to be right rises with thoughts to {CEILING} around a number of them that the "
    f"prompt needs; {QUESTIONS} prompts, a network of one hidden layer that first thinks at every length, 60 updates. Each arm is "
    "a sweep of five policies (no pressure on length up to the strongest: temper inf to 0.03, penalty 0 to 0.9); numbers are "
    "exact, on mixtures of two policies of the sweep. Length: the smallest with an accuracy within "
    f"{TOLERATED} of the ceiling. Accuracy at 6: 0 where no policy of a sweep was that short. Division by the group's std makes "
    "GRPO's penalty the same at 0.02 and 0.3: where all answers are right only length is left, and the policy falls to about 5 "
    "tokens whatever the strength. Without that division (Dr. GRPO) the penalty works as well as DRPO.",
)

CLAIMS = (DRPO_CLAIM,)
