"""A clip whose bounds are found by search, so that what it lets through balances what is raised and what is lowered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.objectives.base import Part, Signals
from unipo.objectives.masks import AdvantageMask
from unipo.objectives.weights import One, TokenRatio, Weight

__all__ = ["ActiveBalance", "BalancedClipMask", "ValueBalance"]

Pair = tuple[float, float]


@dataclass(frozen=True)
class ActiveBalance(Part):
    """(S+, S-): the l1 norms of what each sign of the advantage may still move."""

    def of(self, ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float,
           weight: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        return F.active_balance(ratio, advantage, low, high, dual, weight)


@dataclass(frozen=True)
class ValueBalance(ActiveBalance):
    """(S+, S-): the parts of the clipped objective's value; clipped steps count at their bound."""

    def of(self, ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float,
           weight: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        return F.value_balance(ratio, advantage, low, high, dual, weight)


@dataclass(frozen=True)
class BalancedClipMask(AdvantageMask):
    """PPO's clip to [low, high], raised from `start` by `step` up to `limit` until S+ >= target * S- (BAPO, 2510.18927).

    The search is over every row of the term, never over a micro-batch. `order` (0, 1): low is raised first. `dual`: steps
    with A < 0 and r above it are masked too. `token_weight`: how much a step counts in S+ and S-.
    """

    start: Pair = (0.6, 1.2)
    limit: Pair = (0.8, 2.0)
    step: Pair = (0.05, 0.05)
    target: float = 1.0
    order: tuple[int, int] = (0, 1)
    dual: float = 3.0
    balance: ActiveBalance = ActiveBalance()
    token_weight: Weight = One()
    ratio: Part = TokenRatio()

    def __post_init__(self) -> None:
        one = torch.ones(())
        F.balanced_bounds(lambda low, high: (one, one), self.start, self.limit, self.step)  # bad bounds are told here

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        ratio = self.ratio(episodes, signals)
        low, high = self.bounds(advantage, episodes, signals)
        clip = F.clip_mask(ratio, advantage, 1 - low, high - 1)
        return clip & F.dual_clip_mask(ratio, advantage, self.dual)

    def bounds(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Pair:
        """The (low, high) that the search ends with."""

        def sums(low: float, high: float) -> tuple[Tensor, Tensor]:
            return self._sums(low, high, advantage, episodes, signals)

        return F.balanced_bounds(sums, self.start, self.limit, self.step, self.target, self.order)

    def facts(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Mapping[str, Tensor]:
        """`clip_low`, `clip_high`, and the `positive_share` S+ / (S+ + S-) that they give, the same at every step."""
        low, high = self.bounds(advantage, episodes, signals)
        up, down = (float(s) for s in self._sums(low, high, advantage, episodes, signals))
        share = up / (up + down) if up + down else torch.nan
        found = {"clip_low": low, "clip_high": high, "positive_share": share}
        return {name: torch.full_like(advantage, x) for name, x in found.items()}

    def _sums(self, low: float, high: float, advantage: Tensor, episodes: Episodes,
              signals: Signals) -> tuple[Tensor, Tensor]:  # fmt: skip
        ratio, weight = self.ratio(episodes, signals), self.token_weight.of(advantage, episodes, signals)
        return self.balance.of(ratio, advantage, low, high, self.dual, weight)
