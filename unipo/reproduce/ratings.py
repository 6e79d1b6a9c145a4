"""Damaged signals that are scored and classified by one small network: Q-Insight."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.methods.catalog import build
from unipo.recipe import Recipe
from unipo.reproduce.seeing import PROMPTS_PER_STEP, Listed, SeeingPolicy, probabilities, rolled, shown
from unipo.reproduce.training import train
from unipo.rewards.graded import Within, WordByWord
from unipo.sources.prompts import Prompt
from unipo.sources.rows import Rows
from unipo.sources.text.rollouts import Rollouts
from unipo.tasks.rating import DROP, SEVERITIES, WIDTH, damaged
from unipo.tasks.tabular import TabularTask

SFT = build("sft", {})
KINDS = tuple(DROP)
SIGNALS, LABELLED, MEASURED, WARM = 160, 24, 300, 60
CLEAN, OTHER = ((2, 3), (7, 8)), ((4, 4), (9, 9))
"""Low and high values of clean signals: of the training data, and of others."""
QUARTERS = 4


@dataclass(frozen=True)
class Rated:
    """Damaged signals [n, 8] with their kind, severity and score."""

    signal: Tensor
    kind: Tensor
    severity: Tensor

    @property
    def score(self) -> Tensor:
        return 5 - torch.tensor([DROP[k] for k in KINDS], dtype=torch.float64)[self.kind] * (self.severity + 1)

    def seen(self) -> Tensor:
        """[2 n, F]: what the policy sees of the prompts, those about the score first: values and steps in order of size."""
        steps = self.signal.diff(dim=1).abs()
        view = torch.cat([self.signal.sort(1).values - 5, steps.sort(1).values, steps[:, 1:] + steps[:, :-1]], 1) / 3
        task = torch.eye(2, dtype=torch.float64).repeat_interleave(len(view), 0)
        return torch.cat([view.repeat(2, 1), task], 1)


def rated(seed: int, name: str, n: int, clean: tuple[tuple[int, int], tuple[int, int]]) -> Rated:
    generator = random.Random(f"{seed}/{name}")
    rows = []
    for _ in range(n):
        low, high, edge = generator.randint(*clean[0]), generator.randint(*clean[1]), generator.randint(2, WIDTH - 2)
        kind, severity = generator.randrange(len(KINDS)), generator.choice(SEVERITIES)
        signal = damaged(generator, [low] * edge + [high] * (WIDTH - edge), KINDS[kind], severity)
        rows.append((signal, kind, severity - 1))
    signals, kinds, severities = zip(*rows, strict=True)
    return Rated(torch.tensor(signals, dtype=torch.float64), torch.tensor(kinds), torch.tensor(severities))


def written_score(score: float) -> str:
    """The inverse of `said_score`, to the nearest quarter."""
    whole, quarters = divmod(round(QUARTERS * (score - 1)), QUARTERS)
    return f"{whole} {quarters}"


def said_score(tokens: Sequence[int]) -> float:
    """Of two tokens: the whole number from 1, and quarters."""
    return 1 + tokens[0] + tokens[1] / QUARTERS


def judged_rating(answer: str, columns: Mapping[str, Any]) -> float:
    tokens = [int(word) for word in answer.split()]
    if columns["task"] == "score":
        return Within().value(said_score(tokens) - columns["answer"])
    return WordByWord().value(answer.split(), columns["answer"].split())


@dataclass(frozen=True)
class Rating:
    """What an arm trains with, and on which tasks."""

    recipe: Recipe
    tasks: tuple[str, ...]


RATED = TabularTask(1, 4, 2, lambda prompt, tokens: 0.0)
"""Answers of two tokens out of four: a kind and a severity, or a score."""


def questions(data: Rated) -> dict[str, list[Prompt]]:
    """Prompts about every signal by task; `written`: the right answer in tokens."""
    damages = [f"{k} {s}" for k, s in zip(data.kind.tolist(), data.severity.tolist(), strict=True)]
    answers: dict[str, list[Any]] = {"score": data.score.tolist(), "damage": damages}
    written = {"score": [written_score(s) for s in data.score.tolist()], "damage": damages}
    first = {"score": 0, "damage": len(damages)}
    return {
        task: [Prompt(id=first[task] + i, text=str(first[task] + i), demonstration=written[task][i],
                      columns={"task": task, "answer": answers[task][i]}) for i in range(len(damages))]
        for task in answers
    }  # fmt: skip


def labels(prompts: Sequence[Prompt]) -> Episodes:
    return shown(prompts, [str(p.demonstration) for p in prompts])


def rating_trial(arm: Rating, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """All arms start with a few labels of both tasks."""
    data = rated(seed, "train", min(SIGNALS, 4 * steps), CLEAN)
    asked, policy = questions(data), SeeingPolicy(data.seen(), 2, 4, seed)
    few = Rows(labels([p for prompts in asked.values() for p in prompts[:LABELLED]]), 2 * LABELLED, seed)
    train((SFT,), policy, lambda step: few.draw(step, step), steps=min(WARM, 4 * steps), rate=0.01)
    own = [asked[task] for task in arm.tasks]
    source: Rollouts | Rows
    if "rollout" in arm.recipe.kinds:
        source = rolled(RATED, policy, Listed(own, seed), judged_rating, seed, PROMPTS_PER_STEP * len(own))
    else:
        source = Rows(labels([p for prompts in own for p in prompts]), PROMPTS_PER_STEP * len(own), seed)
    reference = copy.deepcopy(policy)
    train((arm.recipe,), policy, lambda step: source.draw(step, step), steps=steps, rate=rate, reference=reference)
    found: dict[str, float] = {}
    for name, clean in (("", CLEAN), (", other signals", OTHER)):
        quality = rating_quality(policy, rated(seed, f"test{name}", min(MEASURED, 4 * steps), clean))
        found |= {metric + name: value for metric, value in quality.items()}
    metric = {"score": "PLCC", "damage": "damage"}
    return {**found, "own": sum(found[metric[task]] for task in arm.tasks) / len(arm.tasks)}


def rating_quality(policy: SeeingPolicy, data: Rated) -> dict[str, float]:
    """Exact: correlation of the mean score with the true one, and probability of the right kind and severity."""
    p = probabilities(policy.at(data.seen()), RATED)
    n, sequences = len(data.kind), RATED.sequences
    mean = p[:n] @ torch.tensor([said_score(s) for s in sequences], dtype=torch.float64)
    right = torch.tensor([sequences.index((int(k), int(s))) for k, s in zip(data.kind, data.severity, strict=True)])
    damage = p[n:].gather(1, right[:, None]).mean()
    return {"PLCC": float(torch.corrcoef(torch.stack([mean, data.score]))[0, 1].nan_to_num()), "damage": float(damage)}
