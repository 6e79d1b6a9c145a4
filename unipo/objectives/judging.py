"""What a value head says of whole answers: the score of a reward model, and a term that pins its free constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.objectives.base import Needs, Objective, Part, Rows, Signals, pairs
from unipo.objectives.regression import Squared

__all__ = ["FinalValue", "MeanScore"]


@dataclass(frozen=True)
class FinalValue(Part):
    """s(y) = V at the last step of the answer [E], differentiable; 0 for an answer without steps.

    V at a step stands on everything before it: of an answer that ends with an end-of-sequence token, on all of it.
    """

    along_episodes: ClassVar[bool] = True

    def own_needs(self) -> Needs:
        return Needs.of(signals="value")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        last = episodes.position() == episodes.expand(episodes.lengths()) - 1
        return episodes.reduce(torch.where(last, signals["value"], 0.0))


@dataclass(frozen=True, kw_only=True, repr=False)
class MeanScore(Objective):
    """L = mean over groups of penalty( mean score of the group ): what differences leave free is drawn to 0.

    Comparisons say nothing of a number that is added to all answers to a prompt. Rewards of different prompts can be compared
    only where it is pinned, and group baselines do not ask for it.
    """

    score: Part = FinalValue()
    penalty: Squared = Squared()
    rows: Rows = pairs

    def own_needs(self) -> Needs:
        return Needs.of(columns="kind")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        mean = episodes.reduce(self.score(episodes, signals), to="group", how="mean", level="episode")
        return self.penalty.of(mean).mean(), {}
