"""Which steps count at all: masks for the slot `counted`, which looks at advantages that are there already.

Where a choice is among equals it is the first by (prompt_id, place in the batch): the order of groups does not matter.
Shares are of what is there, rounded up, at least one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes, segment_reduce
from unipo.objectives.advantages import Outcome
from unipo.objectives.base import Knob, Needs, Part, Signals, number
from unipo.objectives.masks import AdvantageMask

__all__ = ["BestOfGroup", "LargestScores", "MostVaried"]


@dataclass(frozen=True)
class MostVaried(AdvantageMask):
    """Steps of the episodes whose mean advantages have the largest variance, out of those that `among` has a step of.

    `share`: of all episodes, in each group ("group") or of the whole batch ("batch"), as `within` says (D3S, 2509.22115).
    """

    along_episodes: ClassVar[bool] = True

    share: float | Knob = 1.0
    within: str = "batch"
    among: AdvantageMask = AdvantageMask()

    def own_needs(self) -> Needs:
        return Needs.of(columns="prompt_id")

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        offered = self.among.of(advantage, episodes, signals)
        candidate, value = episodes.reduce(offered, how="any"), episodes.reduce(advantage, how="mean")
        order = episodes["prompt_id"].argsort(stable=True)
        sizes = episodes.lengths("group", "episode") if self.within == "group" else torch.tensor([len(episodes)])
        kept = torch.zeros_like(candidate)
        for members in torch.arange(len(episodes), device=order.device).split(sizes.tolist()):
            pool = members if self.within == "group" else order
            pool = pool[candidate[pool]]
            kept[pool[F.max_variance_subset(value[pool], F.share_of(len(members), number(self.share)))]] = True
        return episodes.expand(kept) & offered


@dataclass(frozen=True)
class LargestScores(AdvantageMask):
    """The share of the steps that `among` keeps with the largest |A| * signal, such as its entropy: the pooled batch's."""

    share: float | Knob = 1.0
    signal: str = "entropy"
    among: AdvantageMask = AdvantageMask()

    def own_needs(self) -> Needs:
        return Needs.of(columns="prompt_id", signals=self.signal)

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        offered = self.among.of(advantage, episodes, signals)
        score = advantage.abs() * signals[self.signal].detach().to(advantage.dtype)
        order = episodes.expand("prompt_id").argsort(stable=True)
        pool = order[offered[order]]
        kept = torch.zeros_like(offered)
        kept[pool[F.largest(score[pool], F.share_of(len(pool), number(self.share)))]] = True
        return kept


@dataclass(frozen=True)
class BestOfGroup(AdvantageMask):
    """Steps of the best answer of each group by `outcome`, the first of equal ones: rejection sampling, best of n."""

    along_episodes: ClassVar[bool] = True

    outcome: Part = Outcome()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        values, index, n = self.outcome(episodes, signals), episodes.index("group", "episode"), episodes.count("group")
        top = values == segment_reduce(values, index, n, "max")[index]
        place = torch.arange(len(episodes), device=values.device)
        first = segment_reduce(torch.where(top, -place, -len(episodes)), index, n, "max")
        return episodes.expand(place == -first[index])
