"""How much a rollout counts among the others of its prompt: conditions on groups, and weights by place in a group.

A condition is a part that says of each group whether it holds, bool [G]; it looks at outcomes and lengths alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes, segment_reduce
from unipo.objectives.advantages import Outcome
from unipo.objectives.base import Needs, Part, Signals
from unipo.objectives.weights import Weight

__all__ = [
    "AllOf",
    "AnyOf",
    "Condition",
    "EvenAndLow",
    "GroupWeight",
    "LongerIsBetter",
    "RankWeight",
    "SolvedAtMost",
    "WeightProduct",
]


@dataclass(frozen=True)
class Condition(Part):
    """What may be true of a group: bool [G]. This one always is."""

    along_episodes: ClassVar[bool] = True

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return torch.ones(episodes.count("group"), dtype=torch.bool, device=episodes.device)


@dataclass(frozen=True)
class LongerIsBetter(Condition):
    """The longest right answer is longer than wrong ones are in the mean (ADORA's length advantage, arXiv 2602.10019).

    Right: reward > `right`. A wrong answer counts unless it was cut or has `longest` steps or more. `unsolved`: what is
    said of a group without a right answer; `unfailed`: of one with right answers and no wrong one that counts.
    """

    right: float = 0.5
    longest: float = math.inf
    unsolved: bool = False
    unfailed: bool = False
    outcome: Part = Outcome()

    def own_needs(self) -> Needs:
        return Needs.of(columns="truncated")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        index, n, length = episodes.index("group", "episode"), episodes.count("group"), episodes.lengths().double()
        right = self.outcome(episodes, signals) > self.right
        wrong = ~right & ~episodes["truncated"] & (length < self.longest)
        longest = segment_reduce(torch.where(right, length, -1.0), index, n, "max")
        mean = segment_reduce(torch.where(wrong, length, 0.0), index, n) / segment_reduce(wrong.double(), index, n)
        solved, failed = segment_reduce(right, index, n, "any"), segment_reduce(wrong, index, n, "any")
        holds = torch.where(failed, longest > mean, self.unfailed)
        return torch.where(solved, holds, self.unsolved)


@dataclass(frozen=True)
class SolvedAtMost(Condition):
    """At most a share `most` of the group's answers is right, reward > `right` (ADORA's difficulty advantage)."""

    most: float = 0.5
    right: float = 0.5
    outcome: Part = Outcome()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        right = (self.outcome(episodes, signals) > self.right).double()
        return episodes.reduce(right, to="group", how="mean", level="episode") <= self.most


@dataclass(frozen=True)
class EvenAndLow(Condition):
    """The group's rewards have a mean below `mean` and a standard deviation below `std`: all failed, more or less."""

    mean: float = 0.2
    std: float = 0.05
    outcome: Part = Outcome()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        values, index, n = self.outcome(episodes, signals), episodes.index("group", "episode"), episodes.count("group")
        low = segment_reduce(values, index, n, "mean") < self.mean
        return low & (segment_reduce(F.group_std(values, index, n), index, n, "max") < self.std)


@dataclass(frozen=True)
class AllOf(Condition):
    """Every one of `conditions` holds."""

    conditions: tuple[Condition, ...] = ()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        holds = Condition()(episodes, signals)
        for condition in self.conditions:
            holds = holds & condition(episodes, signals)
        return holds


@dataclass(frozen=True)
class AnyOf(Condition):
    """One of `conditions` holds."""

    conditions: tuple[Condition, ...] = ()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        holds = ~Condition()(episodes, signals)
        for condition in self.conditions:
            holds = holds | condition(episodes, signals)
        return holds


# ---- weights: [N] ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GroupWeight(Weight):
    """`holds` for every step of a group where the condition does, else `fails`."""

    condition: Condition = Condition()
    holds: float = 1.0
    fails: float = 1.0

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        holds = self.condition(episodes, signals).double()
        return episodes.expand(holds * self.holds + (1 - holds) * self.fails, level="group")


@dataclass(frozen=True)
class RankWeight(Weight):
    """n * share of an episode by its place in the group of n, best outcome first: 1 in the mean if the shares sum to 1.

    `best`: the share of the first, `worst` of the last, `others` evenly over all but the first (PF-PPO, arXiv 2409.06957).
    Of equal outcomes the earlier one is the better.
    """

    along_episodes: ClassVar[bool] = True

    best: float = 0.5
    others: float = 0.5
    worst: float = 0.0
    outcome: Part = Outcome()

    def own_needs(self) -> Needs:
        return Needs(group_size=2)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        index, n = episodes.index("group", "episode"), episodes.count("group")
        shares = F.rank_shares(self.outcome(episodes, signals), index, n, self.best, self.others, self.worst)
        return episodes.expand(episodes.lengths("group", "episode")[index] * shares)


@dataclass(frozen=True)
class WeightProduct(Weight):
    """The product of weights: how far from on-policy times how much it is worth, say."""

    weights: tuple[Weight, ...] = ()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        total = torch.ones_like(advantage)
        for weight in self.weights:
            total = total * weight.of(advantage, episodes, signals).to(total)
        return total
