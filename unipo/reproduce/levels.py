"""SEC on progressions of one to six terms: levels from easy to hard, whose answers share their steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.learner import Update
from unipo.methods.catalog import build
from unipo.reproduce.claim import Phases
from unipo.reproduce.mixed import demonstrations
from unipo.reproduce.progressions import Answer, progression, solved
from unipo.reproduce.seeing import SeeingPolicy
from unipo.reproduce.training import train
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Curriculum, RowPrompts
from unipo.sources.text.arms import Arms
from unipo.sources.text.tabular import TabularPrompts, tabular_rollouts
from unipo.tasks.tabular import TabularTask

LEVELS, NUMBERS, PER_STEP, WARM = 6, 4, 24, 0.1
EACH = NUMBERS * (NUMBERS - 1)
TRAINED = EACH - 2
SFT = build("sft", {})


@lru_cache(32)
def ladder(seed: int) -> tuple[TabularTask, list[Answer], Tensor]:
    """A task of twelve prompts at each level, all starts and steps in a random order; answers; what is seen of each prompt."""
    every = [(a, d) for a in range(NUMBERS) for d in range(1, NUMBERS)]
    draw = keyed_generator(seed, "ladder")
    asked = [(*every[i], n) for n in range(1, LEVELS + 1) for i in draw.permutation(EACH).tolist()]
    made = [progression(a, d, n, NUMBERS, LEVELS) for a, d, n in asked]
    answers = [answer for answer, _ in made]
    task = TabularTask(len(asked), NUMBERS + 1, LEVELS + 1, lambda q, tokens: float(tokens == answers[q]), end=NUMBERS)
    return task, answers, torch.stack([seen for _, seen in made])


@lru_cache(32)
def beginner(seed: int) -> SeeingPolicy:
    """A policy taught the answers to the prompts that are drawn until a share `WARM` of what it says is right."""
    _, answers, seen = ladder(seed)
    policy = SeeingPolicy(seen, LEVELS + 1, NUMBERS + 1, seed)
    shown = demonstrations({q: answer for q, answer in enumerate(answers) if q % EACH < TRAINED})
    while float(solved(policy, answers).mean()) < WARM:
        train((SFT,), policy, lambda step: shown, steps=2, rate=0.01)
    return policy


def curriculum_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Equal numbers of rollouts; two prompts of each level are never drawn. A recipe without arms goes from easy to hard.

    Exact success, the mean of five looks over the last fifth.
    """
    (recipe,), (task, answers, _) = phases, ladder(seed)
    policy, every = copy.deepcopy(beginner(seed)), TabularPrompts(task)
    levels = {f"level {1 + n}": RowPrompts([every[n * EACH + i] for i in range(TRAINED)], seed) for n in range(LEVELS)}
    stages = [(i * steps // LEVELS, prompts) for i, prompts in enumerate(levels.values())]
    choice = recipe.rollouts.arms
    prompts: Any = Curriculum(stages=stages) if choice is None else Arms(levels, choice, seed)
    rollouts = tabular_rollouts(task, policy, recipe.rollouts, seed, prompts, PER_STEP)
    drawn, looks = list[float](), list[Tensor]()

    def draw(step: int) -> Episodes:
        batch = rollouts.draw(step, step)
        drawn.append(float((1 + batch["prompt_id"] // EACH).double().mean()))
        return batch

    def told(update: Update) -> None:
        if rollouts.arms is not None:
            rollouts.arms.observe(update.episodes, update.fact("advantage"))
            rollouts.arms.settle()

    def watch(step: int) -> None:
        if step > 0.8 * steps and (steps - step) % max(1, steps // 25) == 0:
            looks.append(solved(policy, answers).reshape(LEVELS, EACH))

    train(phases, policy, draw, steps=steps, rate=rate, watch=watch, told=told)
    right, third = torch.stack(looks).mean(0), max(steps // 3, 1)
    shift = sum(drawn[-third:]) / third - sum(drawn[:third]) / third
    return {"hardest level": float(right[-1, :TRAINED].mean()), "unseen prompts": float(right[-1, TRAINED:].mean()),
            "all levels": float(right[:, :TRAINED].mean()), "shift of the level drawn": shift}  # fmt: skip
