"""Several rewards: what is true is measured beside what is trained on, exactly, on answers that can be enumerated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from operator import getitem

import torch
from torch import Tensor

from unipo.methods.constrained import constrained_rlhf
from unipo.methods.policy_gradients import grpo
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation
from unipo.reproduce.training import FreshAndReplayed, copy_of, train
from unipo.sources.keyed import keyed_generator
from unipo.sources.tabular import Answered, tabular_rollouts
from unipo.tasks.tabular import TabularTask

PROMPTS, WORDS, LENGTH = 4, 6, 4
BEYOND, PENALTY = 0.5, 16.0
"""Each proxy is true up to BEYOND; PENALTY times the square of what is above it is lost."""


@dataclass(frozen=True)
class Proxies:
    """Answers of four words with two correlated proxy rewards in [0, 1], and their worth r1 + r2 - c sum_i (r_i - t)_+^2.

    A reward is the mean of its words' values v1 ~ U(0, 1), v2 = 0.6 v1 + 0.4 u, by prompt and place. The reference prefers
    words with low values: proportional to exp(-2 (v1 + v2)).
    """

    seed: int

    @cached_property
    def values(self) -> Tensor:
        """[2, P, L, V]"""
        drawn = torch.from_numpy(keyed_generator(self.seed, "proxies").random((2, PROMPTS, LENGTH, WORDS)))
        return torch.stack([drawn[0], 0.6 * drawn[0] + 0.4 * drawn[1]])

    @cached_property
    def rewards(self) -> Tensor:
        """[2, P, S] of all sequences."""
        words = torch.tensor(self.task.sequences)
        return torch.stack([self.values[:, :, i, words[:, i]] for i in range(LENGTH)]).mean(0)

    @cached_property
    def gold(self) -> Tensor:
        """[P, S]"""
        return self.rewards.sum(0) - PENALTY * (self.rewards - BEYOND).clamp(min=0).square().sum(0)

    @property
    def reference(self) -> TabularPolicy:
        logits = -2.0 * self.values.sum(0)
        return TabularPolicy(logits[:, :, None, :].repeat(1, 1, WORDS + 1, 1))

    @cached_property
    def task(self) -> TabularTask:
        tables = self.values.sum(0).tolist()
        return TabularTask(PROMPTS, WORDS, LENGTH, lambda q, words: sum(map(getitem, tables[q], words)) / LENGTH)

    def parts(self) -> dict[str, Answered]:
        """The rewards of a run beside their sum: `first`, `second` and `gold`."""
        place = {words: i for i, words in enumerate(self.task.sequences)}
        tables = {"first": self.rewards[0], "second": self.rewards[1], "gold": self.gold}
        return {name: partial(_looked_up, table.tolist(), place) for name, table in tables.items()}

    @torch.no_grad()
    def means(self, policy: TabularPolicy) -> Means:
        """Expected first, second and gold reward, mean over prompts."""
        probability = self.task.log_probability(policy).exp()
        first, second, gold = ((probability * r).sum(1).mean() for r in (*self.rewards, self.gold))
        return float(first), float(second), float(gold)


Means = tuple[float, float, float]


def _looked_up(
    rows: list[list[float]], place: Mapping[tuple[int, ...], int], prompt: int, words: tuple[int, ...]
) -> float:
    return rows[prompt][place[words]]


def learned(recipe: Recipe, problem: Proxies, rate: float, seed: int, steps: int) -> list[Means]:
    """Means of the policy before training and after each step."""
    policy = copy_of(problem.reference)
    source = tabular_rollouts(problem.task, policy, recipe.rollouts, seed, parts=problem.parts())
    seen = [problem.means(policy)]
    train((recipe,), policy, FreshAndReplayed(source, seed), steps=steps, rate=rate, reference=problem.reference,
          watch=lambda step: seen.append(problem.means(policy)))  # fmt: skip
    return seen


# ---- constrained RLHF --------------------------------------------------------------------------------------------------
GROUP, RATE = 16, 0.15
PPO = grpo(group=GROUP, kl=0.01)


@lru_cache(maxsize=32)
def probed(seed: int, steps: int) -> tuple[Means, ...]:
    """An unconstrained run with other draws, whose best gold reward tells the proxy points."""
    return tuple(learned(PPO, Proxies(seed), RATE, seed + 500, steps))


def constrained_trial(arm: str, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    problem, before = Proxies(seed), probed(seed, steps)
    start, best, end = before[0], max(before, key=lambda means: means[2]), before[-1]
    points = {"first": best[0], "second": best[1]}
    kinds = {
        "xi-ppo": lambda: constrained_rlhf(thresholds=points, group=GROUP),
        "mu-ppo": lambda: constrained_rlhf(thresholds=points, group=GROUP, variant="inequality"),
        "xi-ppo, integral alone": lambda: constrained_rlhf(thresholds=points, group=GROUP, proportional=0.0),
        "ppo-sat": lambda: constrained_rlhf(thresholds=points, group=GROUP, variant="saturated"),
        "nm-ppo": lambda: constrained_rlhf(thresholds={"first": start[0], "second": start[1]}, group=GROUP, search="gold",
                                           highest={"first": end[0], "second": end[1]}),
        "ppo": lambda: PPO,
    }  # fmt: skip
    seen = torch.tensor(learned(kinds[arm](), problem, rate, seed, steps), dtype=torch.float64)
    scale = max(best[2] - start[2], 1e-9)
    last = seen[-max(1, steps // 10) :].mean(0).tolist()
    return {
        "gold": (last[2] - start[2]) / scale,
        "lost from its best": (float(seen[:, 2].max()) - last[2]) / scale,
        "off the points": (abs(last[0] - best[0]) + abs(last[1] - best[1])) / 2,
    }


CONSTRAINED = Claim(
    slug="constrained-rlhf",
    statement="A fixed sum of reward models is followed beyond where it is true: the gold reward rises and then falls. "
    "Multipliers that hold each reward at its proxy point keep the gold reward near its peak; a search of thresholds finds "
    "it in one run.",
    arms={name: name for name in ("xi-ppo", "mu-ppo", "nm-ppo", "ppo", "ppo-sat", "xi-ppo, integral alone")},
    trial=constrained_trial,
    steps=150,
    tune="gold",
    grid=(RATE,),
    expectations=(
        Expectation(arm="ppo", metric="lost from its best", least=0.5),
        Expectation(arm="xi-ppo", metric="gold", than="ppo", least=0.0),
        Expectation(arm="mu-ppo", metric="gold", than="ppo", least=0.0),
        Expectation(arm="nm-ppo", metric="gold", than="ppo", least=0.0),
        Expectation(arm="xi-ppo", metric="gold", least=0.5),
        Expectation(arm="xi-ppo", metric="off the points", most=0.05),
    ),
    note="Four prompts, answers of four of six words; two correlated proxies are means of the words' values, the gold reward is "
    "their sum less 16 times the squares of what is above 0.5, exact expectations. 150 steps of 64 answers for every arm, Adam "
    "at 0.15; means over the last 15 steps. gold: 0 at the reference, 1 at the peak of an unconstrained run with other draws, "
    "whose rewards there are the proxy points; that run is not counted, and NM-PPO does without the points (it knows where "
    "the rewards start and end, and reads the gold reward of its own samples). PPO: sum of both, KL 0.01 in the loss. "
    "Multipliers have a proportional part (5): streams that are standardised before they are mixed leave no force back to the "
    "reference, so that a multiplier which only integrates, as the paper's, swings about its threshold (shown, as PPO-SAT is).",
)

CLAIMS = (CONSTRAINED,)
