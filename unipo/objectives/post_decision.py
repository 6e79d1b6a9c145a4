"""Parts of post-decision methods: what a decision is worth before chance has answered.

A step has two halves, s -a-> s^x = f(s, a) -xi-> s', and its reward two parts, r = r^x(s, a) + r(s^x, xi): the columns
`reward_decision` and `reward_outcome`. `old_post_value` is a critic's V_x(s^x), `old_value` V(s).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.objectives.advantages import Advantage
from unipo.objectives.base import Needs, Signals

__all__ = ["AfterDecision", "DecisionReturn", "Excess", "LargerOf", "PostDecisionValue"]


@dataclass(frozen=True)
class Excess(Advantage):
    """A = `of` - a column of values."""

    of: Advantage
    value: str = "old_value"

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.value)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        values = self.of(episodes, signals)
        return values - episodes[self.value].to(values.dtype)


@dataclass(frozen=True)
class LargerOf(Advantage):
    """The largest of several advantages, step by step. Its mean is above each of theirs: it is biased upwards."""

    advantages: tuple[Advantage, ...]

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return torch.stack([a(episodes, signals) for a in self.advantages]).amax(0)


@dataclass(frozen=True)
class PostDecisionValue(Advantage):
    """Q(s, a) = r^x(s, a) + V_x(s^x): nothing in it depends on what chance answered."""

    def own_needs(self) -> Needs:
        return Needs.of(columns="reward_decision old_post_value")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        value = episodes["old_post_value"]
        return episodes["reward_decision"].to(value.dtype) + value


@dataclass(frozen=True)
class AfterDecision(Advantage):
    """What V_x is regressed to: a return G of the whole step without the decision's own reward, G - r^x."""

    of: Advantage

    def own_needs(self) -> Needs:
        return Needs.of(columns="reward_decision")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        values = self.of(episodes, signals)
        return values - episodes["reward_decision"].to(values.dtype)


@dataclass(frozen=True)
class DecisionReturn(Advantage):
    """G^x_n = sum_k gamma^k r^x_{n+k} to the end of the fragment.

    Where it was cut, the critic's V_x of the last step stands for what follows it: the next decision is not known.
    """

    gamma: float = 0.99

    def own_needs(self) -> Needs:
        return Needs.of(columns="reward_decision old_post_value truncated")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        value = episodes["old_post_value"]
        reward = episodes["reward_decision"].to(value.dtype)
        lengths = episodes.lengths()
        held = lengths > 0
        last = value[(lengths.cumsum(0) - 1).clamp(min=0)]
        after = torch.where(held & episodes["truncated"], last, torch.zeros_like(last))
        return F.discounted_return(reward, episodes.index("episode"), len(episodes), self.gamma, after)
