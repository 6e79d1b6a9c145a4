"""Which steps may move the policy: bool [N], a function of the advantage's sign and of ratios."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.objectives.base import Knob, Needs, Part, Rows, Signals, number
from unipo.objectives.weights import RatioTo, TokenRatio

__all__ = [
    "AdvantageMask",
    "ClipMask",
    "DualClipMask",
    "MaskByRows",
    "MeanRatioMask",
    "Product",
    "ProximalClipMask",
    "RingMask",
    "Signed",
    "Spread",
    "SuccessGate",
    "TwoSideMask",
    "Where",
    "success_rate",
]


@dataclass(frozen=True)
class AdvantageMask(Part):
    """A mask that looks at the sign of the advantage: `of(advantage, episodes, signals) -> bool [N]`."""

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return torch.ones_like(advantage, dtype=torch.bool)

    def facts(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Mapping[str, Tensor]:
        """What it found out on the way and a reader of metrics should know, per step [N]."""
        return {}


@dataclass(frozen=True)
class ClipMask(AdvantageMask):
    """PPO's clip as a mask: 0 where A > 0 and r > 1 + high, or A < 0 and r < 1 - low."""

    low: float | Knob = 0.2
    high: float | Knob = 0.2
    ratio: Part = TokenRatio()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return F.clip_mask(self.ratio(episodes, signals), advantage, number(self.low), number(self.high))


@dataclass(frozen=True)
class ProximalClipMask(AdvantageMask):
    """PPO's clip around what the ratio was when the update began, c = pi_old / behaviour (generalised proximal policy gradient).

    0 where A > 0 and r > c + high, or A < 0 and r < c - low. A fresh row has c = 1; of a stale one, nothing is masked at first.
    """

    low: float | Knob = 0.2
    high: float | Knob = 0.2
    ratio: RatioTo = TokenRatio()

    def own_needs(self) -> Needs:
        return Needs.of(columns="old_logp")

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        start = self.ratio(episodes, {"logp": episodes["old_logp"]})
        return F.clip_mask(self.ratio(episodes, signals) - start + 1, advantage, number(self.low), number(self.high))


@dataclass(frozen=True)
class DualClipMask(AdvantageMask):
    """Additionally 0 where A < 0 and r > limit."""

    limit: float | Knob = 3.0
    ratio: Part = TokenRatio()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return F.dual_clip_mask(self.ratio(episodes, signals), advantage, number(self.limit))


@dataclass(frozen=True)
class TwoSideMask(AdvantageMask):
    """0 where the ratio is outside [1 - low, 1 + high], whatever the advantage."""

    low: float | Knob = 0.2
    high: float | Knob = 0.2
    ratio: Part = TokenRatio()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return F.two_side_mask(self.ratio(episodes, signals), number(self.low), number(self.high))


@dataclass(frozen=True)
class RingMask(AdvantageMask):
    """Kept: the ratio in [1 - low, 1 + high], or so far out on the side of its advantage that it may come back."""

    low: float = 0.2
    high: float = 0.2
    outer_low: float = 0.6
    outer_high: float = 2.0
    ratio: Part = TokenRatio()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        ratio = self.ratio(episodes, signals)
        return F.ring_mask(ratio, advantage, self.low, self.high, self.outer_low, self.outer_high)


@dataclass(frozen=True)
class MeanRatioMask(AdvantageMask):
    """Every step while the mean of the ratio over them is at most `most`, else none: the batch is skipped."""

    most: float = 10.0
    ratio: Part = TokenRatio()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        ratio = self.ratio(episodes, signals)
        return (ratio.mean() <= self.most).expand(len(ratio))


@dataclass(frozen=True)
class Where(AdvantageMask):
    """Kept: steps whose column `column` (bool [N]) is True."""

    column: str

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.column)

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes[self.column]


@dataclass(frozen=True)
class SuccessGate(AdvantageMask):
    """Kept: steps of groups whose mean reward is above `threshold`."""

    threshold: float = 0.0

    def own_needs(self) -> Needs:
        return Needs.of(columns="reward")

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes.expand(success_rate(episodes) > self.threshold, level="group")


@dataclass(frozen=True)
class Signed(AdvantageMask):
    """Kept: steps whose advantage has this `sign`, 1 or -1. In the slot `counted`, either sign has its own denominator."""

    sign: int = 1

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return self.sign * advantage > 0


@dataclass(frozen=True)
class Spread(AdvantageMask):
    """Kept: steps of groups whose advantages differ by more than `least`."""

    least: float = 0.0

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        high, low = (episodes.reduce(advantage, to="group", how=how) for how in ("max", "min"))
        return episodes.expand(high - low > self.least, level="group")


def success_rate(episodes: Episodes) -> Tensor:
    """[G]: the mean reward of each group's rollouts; 0 for a group without any."""
    acted = episodes.category("kind", "rollout")
    reward = torch.where(acted, episodes["reward"], 0.0)
    total = episodes.reduce(reward, to="group", level="episode")
    return total / episodes.reduce(acted.to(total), to="group", level="episode").clamp(min=1)


@dataclass(frozen=True)
class Product(AdvantageMask):
    """Masks that must all hold."""

    masks: tuple[AdvantageMask, ...] = ()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        kept = torch.ones_like(advantage, dtype=torch.bool)
        for mask in self.masks:
            kept = kept & mask.of(advantage, episodes, signals)
        return kept

    def facts(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Mapping[str, Tensor]:
        return {k: v for mask in self.masks for k, v in mask.facts(advantage, episodes, signals).items()}


@dataclass(frozen=True)
class MaskByRows(AdvantageMask):
    """One mask for the steps of `rows`, another for all others: teachers' rows have no ratio to clip, say."""

    rows: Rows
    mask: AdvantageMask = AdvantageMask()
    others: AdvantageMask = AdvantageMask()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        own, theirs = (mask.of(advantage, episodes, signals) for mask in (self.mask, self.others))
        return torch.where(episodes.expand(self.rows(episodes)), own, theirs)
