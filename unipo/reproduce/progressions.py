"""Arithmetic progressions: prompts of mixed difficulty whose answers share their steps, at equal numbers of rollouts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache

import torch

from unipo.episodes import Episodes
from unipo.methods.catalog import build
from unipo.reproduce.claim import Phases
from unipo.reproduce.seeing import SeeingPolicy
from unipo.reproduce.training import train
from unipo.sources.keyed import keyed_generator
from unipo.sources.text.tabular import tabular_rollouts
from unipo.tasks.tabular import TabularTask

PROMPTS, PER_STEP, DIGITS, TERMS = 60, 20, 5, 5
WARM = 0.2
SFT = build("sft", {})
Answer = tuple[int, ...]


def progression(a: int, d: int, n: int, numbers: int, longest: int) -> tuple[Answer, torch.Tensor]:
    """n terms behind a in steps of d, modulo `numbers`, and the end; and what is seen of the prompt: a, d and n, as onehots."""
    one = torch.eye(numbers)
    answer = (*((a + d * k) % numbers for k in range(1, n + 1)), numbers)
    return answer, torch.cat([one[a], one[d], (torch.arange(longest) < n).float()])


@lru_cache(64)
def progressions(seed: int) -> tuple[TabularTask, list[Answer], torch.Tensor]:
    """A task; its answers: n terms of a + k d modulo 5 and the end; and what a policy sees of each prompt: a, d and n."""
    every = [(a, d, n) for a in range(DIGITS) for d in range(1, DIGITS) for n in range(1, TERMS + 1)]
    order = keyed_generator(seed, "progressions").permutation(len(every))[:PROMPTS]
    asked = [every[i] for i in order.tolist()]
    made = [progression(a, d, n, DIGITS, TERMS) for a, d, n in asked]
    answers, seen = [answer for answer, _ in made], torch.stack([seen for _, seen in made])
    task = TabularTask(PROMPTS, DIGITS + 1, TERMS + 1, lambda q, tokens: float(tokens == answers[q]), end=DIGITS)
    return task, answers, seen


def solved(policy: SeeingPolicy, answers: list[Answer]) -> torch.Tensor:
    """[P] the exact probability of each prompt's one right answer."""
    shown = Episodes.build(answers, [[q] for q in range(len(answers))])
    with torch.no_grad():
        return shown.reduce(policy.signals(shown, ["logp"])["logp"]).exp()


@lru_cache(64)
def pupil(seed: int) -> SeeingPolicy:
    """A policy that is right `WARM` of the time in the mean, by likelihood of the answers: short ones half, long ones hardly."""
    _, answers, seen = progressions(seed)
    policy = SeeingPolicy(seen, TERMS + 1, DIGITS + 1, seed)
    shown = Episodes.build(answers, [[q] for q in range(PROMPTS)], kind=["demo"] * PROMPTS)
    while float(solved(policy, answers).mean()) < WARM:
        train((SFT,), policy, lambda step: shown, steps=2, rate=0.01)
    return policy


def difficulty_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact success over the last fifth of as many rollouts as `steps` batches without any refill take; and on the prompts
    with up to two terms and with more, at the end."""
    (task, answers, _), policy = progressions(seed), copy.deepcopy(pupil(seed))
    late, places = list[float](), set[int]()
    rollouts = tabular_rollouts(task, policy, phases[0].rollouts, seed, prompts_per_step=PER_STEP)
    last = [rollouts.draw(0, 0)]

    def draw(step: int) -> Episodes:
        if step and rollouts.position >= steps * PER_STEP:
            return last[0].select(torch.zeros(0, dtype=torch.long))
        last[0] = rollouts.draw(step, step) if step else last[0]
        return last[0]

    def watch(step: int) -> None:
        if rollouts.position > 0.8 * steps * PER_STEP:
            late.append(float(solved(policy, answers).mean()))
        places.add(rollouts.position)

    train(phases, policy, draw, steps=steps, rate=rate, watch=watch)
    at_end, short = solved(policy, answers), torch.tensor([len(a) <= 3 for a in answers])
    return {"success": sum(late) / len(late), "short answers": float(at_end[short].mean()),
            "long answers": float(at_end[~short].mean()), "updates": float(len(places))}  # fmt: skip
