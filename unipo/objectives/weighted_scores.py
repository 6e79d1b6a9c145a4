"""Scores of answers and of segments whose steps count differently: by who corrected them, or by how far away they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.objectives.base import Knob, Needs, Part, Signals, number
from unipo.objectives.weights import One, Weight

__all__ = ["Discounted", "LessOfOthers", "WeightedScore"]


@dataclass(frozen=True)
class Discounted(Weight):
    """gamma^t of step t = 0, 1, ... of its episode."""

    gamma: float = 1.0

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return torch.as_tensor(self.gamma, dtype=torch.float64, device=episodes.device) ** episodes.position()


@dataclass(frozen=True)
class WeightedScore(Part):
    """h = beta * sum_t w_t log( pi(a_t) / to(a_t) ) per episode [E], differentiable in the policy; the weights are not.

    `to` "": no reference, log pi itself.
    """

    beta: float | Knob = 1.0
    weight: Weight = One()
    to: str = ""

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.to}_logp" if self.to else "", signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        logp = signals["logp"]
        with torch.no_grad():
            weight = self.weight(episodes, signals).to(logp.dtype)
        ratio = logp - episodes[f"{self.to}_logp"] if self.to else logp
        return number(self.beta) * episodes.reduce(weight * ratio)


@dataclass(frozen=True)
class LessOfOthers(Part):
    """Another score, times `factor` for all but the chosen: in a pair, score(chosen) - factor * score(other).

    A factor below 1 favours policies that find all of the data likely (CPL's conservative regulariser, arXiv 2310.13639).
    """

    score: Part
    factor: float | Knob = 0.5

    def own_needs(self) -> Needs:
        return Needs.of(columns="chosen")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        score = self.score(episodes, signals)
        return torch.where(episodes["chosen"], 1.0, number(self.factor)).to(score.dtype) * score
