"""How much a step counts: ratios to the policy that acted, truncated, tapered, or of another kind. [N], detached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.objectives.base import Knob, Needs, Part, Rows, Signals, number

__all__ = [
    "Emitted",
    "ExponentialAdvantage",
    "FromColumn",
    "GeometricRatio",
    "One",
    "Probability",
    "RatioTo",
    "SampledProbability",
    "SequenceRatio",
    "ShapedProbability",
    "Tapered",
    "TokenRatio",
    "Truncated",
    "Uncertainty",
    "Weight",
    "WeightByRows",
]


@dataclass(frozen=True)
class Weight(Part):
    """Any weight slot: `of(advantage, episodes, signals) -> [N]`; most weights do not look at the advantage."""

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return self(episodes, signals)


@dataclass(frozen=True)
class One(Weight):
    """The neutral weight."""

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return torch.ones(episodes.count("step"), device=episodes.device)


@dataclass(frozen=True)
class FromColumn(Weight):
    """The numbers in a column [N]: what a companion thinks of each step, say."""

    column: str = "token_weight"

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.column)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes[self.column]


@dataclass(frozen=True)
class RatioTo(Weight):
    """A ratio of the current policy to the denominator in column `<to>_logp`."""

    to: str = "behavior"

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.to}_logp", signals="logp")

    def log_ratio(self, episodes: Episodes, signals: Signals) -> Tensor:
        return F.log_ratio(signals["logp"].detach(), episodes[f"{self.to}_logp"])


@dataclass(frozen=True)
class TokenRatio(RatioTo):
    """r_n = exp(lp_n - blp_n)."""

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return F.token_ratio(self.log_ratio(episodes, signals))


@dataclass(frozen=True)
class SequenceRatio(RatioTo):
    """s_i = exp(sum_n (lp_n - blp_n)) of the step's episode (or `level` = "turn")."""

    along_episodes: ClassVar[bool] = True

    level: str = "episode"

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        index, n = episodes.index(self.level), episodes.count(self.level)
        return F.sequence_ratio(self.log_ratio(episodes, signals), index, n)[index]


@dataclass(frozen=True)
class GeometricRatio(RatioTo):
    """gm_i = exp(mean_n (lp_n - blp_n)) of the step's episode (or `level` = "turn")."""

    along_episodes: ClassVar[bool] = True

    level: str = "episode"

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        index, n = episodes.index(self.level), episodes.count(self.level)
        return F.geometric_ratio(self.log_ratio(episodes, signals), index, n)[index]


@dataclass(frozen=True)
class Truncated(Weight):
    """A weight clamped into [low, high]."""

    weight: Weight
    low: float = 0.0
    high: float | Knob = 1.0

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return self.weight(episodes, signals).clamp(self.low, number(self.high))


@dataclass(frozen=True)
class Tapered(Weight):
    """The ratio clamped to `positive` where A >= 0 and to `negative` where A < 0 (TOPR, arXiv 2503.14286)."""

    ratio: Weight = SequenceRatio()
    positive: tuple[float, float] = (1.0, 1.0)
    negative: tuple[float, float] = (0.0, 1.0)

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return F.taper(self.ratio(episodes, signals), advantage, self.positive, self.negative)


@dataclass(frozen=True)
class ExponentialAdvantage(Weight):
    """exp(A / temperature) (RED-Weight, arXiv 2509.24203)."""

    temperature: float = 1.0

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return F.token_ratio(advantage / self.temperature)


@dataclass(frozen=True)
class Probability(Weight):
    """p = exp(lp): with it a likelihood has the gradient of -p itself (denominator 1)."""

    def own_needs(self) -> Needs:
        return Needs.of(signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return signals["logp"].detach().exp()


@dataclass(frozen=True)
class SampledProbability(Weight):
    """exp(blp): the probability that the step had when it was sampled."""

    def own_needs(self) -> Needs:
        return Needs.of(columns="behavior_logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes["behavior_logp"].exp()


@dataclass(frozen=True)
class Emitted(Weight):
    """A signal of the policy as it is, such as the share of a token among draws."""

    signal: str

    def own_needs(self) -> Needs:
        drawn = "draw" if self.signal.startswith("drawn") else ""
        return Needs.of(signals=self.signal, columns=drawn)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return signals[self.signal].detach()


@dataclass(frozen=True)
class Uncertainty(Weight):
    """phi(p) = p (1 - p): largest where the policy is undecided about the token (CHORD-phi, arXiv 2508.11408)."""

    def own_needs(self) -> Needs:
        return Needs.of(signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        p = signals["logp"].detach().exp()
        return p * (1 - p)


@dataclass(frozen=True)
class ShapedProbability(Weight):
    """gamma p / (p + gamma)^2: a likelihood with it has the gradient of -p / (p + gamma) (LUFFY's shaping of teachers' rows).

    The denominator is 1: it asks for no behaviour policy. What is improbable gets a larger share of the gradient of -p.
    """

    gamma: float = 0.1

    def own_needs(self) -> Needs:
        return Needs.of(signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return F.shaped_slope(signals["logp"].detach(), self.gamma)


@dataclass(frozen=True)
class WeightByRows(Weight):
    """One weight for the steps of `rows`, another for all others: a term may span rows of different policies."""

    rows: Rows
    weight: Weight
    others: Weight = One()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        theirs = self.others.of(advantage, episodes, signals).to(advantage.dtype)
        own = self.weight.of(advantage, episodes, signals).to(advantage.dtype)
        return torch.where(episodes.expand(self.rows(episodes)), own, theirs)
