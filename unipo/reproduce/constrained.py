"""Several rewards: what is true is measured beside what is trained on, exactly, on answers that can be enumerated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import cos, exp, radians, sin
from operator import getitem

import torch
from torch import Tensor

from unipo.methods.constrained import constrained_rlhf, dpa
from unipo.methods.policy_gradients import grpo
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.training import FreshAndReplayed, copy_of, train
from unipo.sources.directions import Directed, weights_at
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt
from unipo.sources.text.tabular import Answered, tabular_rollouts
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

# ---- directions --------------------------------------------------------------------------------------------------------
ANGLES = (-45.0, -35.0, -25.0, -15.0, -5.0)
"""Directions, in degrees, that a front is made of."""
ROWS, LONGEST, CHOICES, STOP = 4, 5, 4, 3
"""Prompts; words of the longest answer; words, of which the last ends it."""
REWARDS = {"help": 1.0, "length": 1.0}


@dataclass(frozen=True)
class Helpful:
    """Answers that are the more helpful the longer they are, by less and less: help = 1 - exp(-sum of its words' worth).

    A word is worth 0 to 1.5, by prompt and place; the one that stops nothing. length: the share of the longest answer.
    """

    seed: int

    @cached_property
    def worth(self) -> list[list[list[float]]]:
        """[P, L, V]"""
        drawn = 1.5 * keyed_generator(self.seed, "worth").random((ROWS, LONGEST, CHOICES))
        drawn[:, :, STOP] = 0.0
        return drawn.tolist()

    def help(self, prompt: int, words: tuple[int, ...]) -> float:
        return 1.0 - exp(-sum(self.worth[prompt][i][w] for i, w in enumerate(words)))

    def length(self, prompt: int, words: tuple[int, ...]) -> float:
        return sum(w != STOP for w in words) / LONGEST

    @cached_property
    def task(self) -> TabularTask:
        return TabularTask(ROWS, CHOICES, LONGEST, self.help, end=STOP)

    @cached_property
    def rewards(self) -> Tensor:
        """[2, P, S] of all sequences."""
        each = [[[r(q, w) for w in self.task.sequences] for q in range(ROWS)] for r in (self.help, self.length)]
        return torch.tensor(each, dtype=torch.float64)

    def means(self, logits: Tensor) -> tuple[float, float]:
        """Expected help and length of a table of logits [P, L, V + 1, V], mean over prompts."""
        with torch.no_grad():
            probability = self.task.log_probability(TabularPolicy(logits)).exp()
        help_, length = ((probability * r).sum(1).mean() for r in self.rewards)
        return float(help_), float(length)

    def best(self, angle: float) -> tuple[float, float]:
        """Help and length of the best answers in a direction, mean over prompts."""
        a = radians(angle)
        at = (cos(a) * self.rewards[0] + sin(a) * self.rewards[1]).argmax(1, keepdim=True)
        found = self.rewards.gather(2, at.expand(2, -1, -1)).mean((1, 2))
        return float(found[0]), float(found[1])


class Conditioned(NetworkPolicy):
    """A `NetworkPolicy` whose prompt is (prompt, direction): row prompt * directions + direction, shown as a onehot of the prompt
    and the direction's weights, so that what is learned for one direction moves those beside it."""

    def __init__(self, task: TabularTask, seed: int, directions: int = len(ANGLES)) -> None:
        super().__init__(replace(task, prompts=task.prompts * directions), seed, width=48)
        row = torch.arange(task.prompts * directions)
        angle = torch.tensor([radians(a) for a in ANGLES], dtype=torch.float64)[row % directions]
        where = torch.nn.functional.one_hot(row // directions, task.prompts).double()
        shown = torch.cat([where, 3.0 * torch.stack([angle.cos() - 0.9, angle.sin() + 0.4], 1)], 1)
        places = self.get_buffer("states")[:, len(row) :]
        prompts = shown.repeat_interleave(len(places) // len(row), 0)
        self.register_buffer("states", torch.cat([prompts, places], 1))
        self.inward = torch.nn.Parameter(self.inward.detach()[len(row) - prompts.shape[1] :])


@dataclass(frozen=True)
class Numbered(Directed):
    """Directions of prompts that are numbers: prompt * directions + direction."""

    def written(self, prompt: Prompt, weights: tuple[int, int]) -> str:
        number = [weights_at(a) for a in ANGLES].index(weights)
        return str(prompt.id * len(ANGLES) + number)


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area of what is no better than one of the points (help, length), between help 0 and length 1."""
    total, help_ = 0.0, 0.0
    for gained, length in sorted(points, key=lambda point: (point[1], -point[0])):
        total += max(gained - help_, 0.0) * (1.0 - length)
        help_ = max(help_, gained)
    return total


def directed(angles: Sequence[float], learner: str, group: int) -> Recipe:
    """The method with directions from `angles` alone, of prompts that are numbers."""
    recipe = dpa(rewards=REWARDS, learner=learner, group=group, beta=0.3)
    return recipe.but(ask=Numbered(("help", "length"), angles=tuple(angles)))


def front(recipe: Recipe, problem: Helpful, rate: float, seed: int, steps: int) -> list[tuple[float, float]]:
    """Train, and the means in each of the directions."""
    policy = Conditioned(problem.task, seed)
    source = tabular_rollouts(problem.task, policy, recipe.rollouts, seed,
                              parts={"help": problem.help, "length": problem.length})  # fmt: skip
    train((recipe,), policy, FreshAndReplayed(source, seed), steps=steps, rate=rate)
    return [problem.means(policy.logits[i :: len(ANGLES)]) for i in range(len(ANGLES))]


def directed_trial(arm: str, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    problem, group = Helpful(seed), 16
    if arm == "fixed weights":
        runs = (front(directed([a], "sft", group), problem, rate, seed, max(1, steps // len(ANGLES))) for a in ANGLES)
        found = [means[i] for i, means in enumerate(runs)]
    elif arm == "no direction":
        means = front(directed([ANGLES[2]], "sft", group), problem, rate, seed, steps)
        found = [means[2]] * len(ANGLES)
    else:
        found = front(directed(ANGLES, arm.split()[-1], group), problem, rate, seed, steps)
    best = hypervolume([problem.best(a) for a in ANGLES])
    worth = [cos(radians(a)) * h + sin(radians(a)) * n for a, (h, n) in zip(ANGLES, found, strict=True)]
    return {
        "hypervolume": hypervolume(found) / best,
        "v . r": sum(worth) / len(worth),
        "help rises": _rising([h for h, _ in found]),
        "length rises": _rising([n for _, n in found]),
    }


def _rising(values: Sequence[float]) -> float:
    """The rank correlation with the place; 0 where all are equal."""
    if max(values) == min(values):
        return 0.0
    ranks = torch.tensor(values).argsort().argsort().double()
    place = torch.arange(len(values)).double()
    return 1.0 - 6.0 * float((ranks - place).square().sum()) / (len(values) * (len(values) ** 2 - 1))


DPA = Claim(
    slug="dpa",
    statement="One policy that reads its direction traces the front of two conflicting rewards: each reward rises with its "
    "weight, and at equal samples it follows the directions better than a policy for each of them.",
    arms={
        "dpa": "dpa sft",
        "dpa, by pairs": "dpa dpo",
        "fixed weights": "fixed weights",
        "no direction": "no direction",
    },
    trial=directed_trial,
    steps=40,
    tune="v . r",
    grid=(0.01, 0.03),
    expectations=(
        Expectation(arm="dpa", metric="v . r", than="fixed weights", least=0.0),
        Expectation(arm="dpa", metric="hypervolume", than="fixed weights", least=-0.05),
        Expectation(arm="dpa", metric="hypervolume", than="no direction", least=0.0),
        Expectation(arm="dpa", metric="help rises", least=0.8),
        Expectation(arm="dpa", metric="length rises", least=0.8),
    ),
    note="Four prompts, answers of up to five words; help = 1 - exp(-worth of the words), length is what it costs; five "
    "directions from -45 to -5 degrees, shown to a network of 48 units as their two weights. 40 steps of 4 x 16 answers in "
    "all: fixed weights are five such policies, each with its direction alone and a fifth of the steps (best of 16, as the "
    "method); no direction is one policy with the middle one. Exact expectations. hypervolume: of the five policies, over that "
    "of the best answers in each direction; it also counts points that happen to lie apart, which v . r, the mean over the "
    "directions of what each asks for, does not. help rises, length rises: rank correlation with the angle (0: all alike).",
)

CLAIMS = (CONSTRAINED, DPA)
