"""Parts of policy-gradient objectives: rewards, advantages, weights, masks and aggregations.

Every part is a frozen record called with `(episodes, signals)`; the maths is in `unipo.functional`, a part only says which
columns it is applied to. Shapes: [N] steps, [E] episodes of the rows that a term claims. The slots of `PolicyGradient`
detach advantage, weight and mask, so parts need no stop-gradient of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.objectives.base import NOTHING, Knob, Needs, Part, Signals, number

__all__ = [
    "Advantage",
    "AdvantageMask",
    "AffineOutcome",
    "Aggregate",
    "BatchMean",
    "BatchStd",
    "BetaScale",
    "Budget",
    "Center",
    "ClipMask",
    "Constant",
    "DualClipMask",
    "EpisodeMean",
    "EpisodeSum",
    "ExponentialAdvantage",
    "GeometricRatio",
    "GroupMean",
    "GroupStd",
    "LeaveOneOut",
    "Normalised",
    "One",
    "Outcome",
    "Plain",
    "Probability",
    "Product",
    "RatioTo",
    "RingMask",
    "Scale",
    "SequenceRatio",
    "ShapedOutcome",
    "SuccessGate",
    "Tapered",
    "TokenMean",
    "TokenRatio",
    "Total",
    "Truncated",
    "TwoSideMask",
    "Uncertainty",
    "Weight",
    "Whitened",
    "success_rate",
]


# ---- what an episode is worth: [E] ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome(Part):
    """R [E]: the column `reward` summed over the episode's steps (or as it is where it lives on episodes)."""

    column: str = "reward"

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.column)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        level = episodes.column(self.column).level
        return episodes[self.column] if level == "episode" else episodes.reduce(self.column, to="episode")


@dataclass(frozen=True)
class ShapedOutcome(Part):
    """R - coefficient * sum_t log(pi / other): the KL to `other` inside the reward, with the current policy, detached."""

    coefficient: float | Knob
    other: str = "reference"
    outcome: Part = Outcome()

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.other}_logp", signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        log_ratio = signals["logp"].detach() - episodes[f"{self.other}_logp"]
        return self.outcome(episodes, signals) - number(self.coefficient) * episodes.reduce(log_ratio)


@dataclass(frozen=True)
class AffineOutcome(Part):
    """scale * R + shift, such as 2 R - 1 for a verifier's 0 and 1."""

    scale: float = 2.0
    shift: float = -1.0
    outcome: Part = Outcome()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return self.scale * self.outcome(episodes, signals) + self.shift


# ---- centres and scales: [E] values -> [E] --------------------------------------------------------------------------
@dataclass(frozen=True)
class Center(Part):
    """What is subtracted: `of(values [E], episodes) -> [E]`. This one subtracts nothing."""

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        return torch.zeros_like(values)


@dataclass(frozen=True)
class GroupMean(Center):
    """Mean over the group, plus a `shift` (AsymRE's baseline is shifted down)."""

    shift: float | Knob = 0.0

    def own_needs(self) -> Needs:
        return Needs(group_size=2)

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        mean = F.group_mean(values, episodes.index("group", "episode"), episodes.count("group"))
        return mean + number(self.shift)


@dataclass(frozen=True)
class LeaveOneOut(Center):
    """Mean over the other members of the group."""

    def own_needs(self) -> Needs:
        return Needs(group_size=2)

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        return F.leave_one_out_mean(values, episodes.index("group", "episode"), episodes.count("group"))


@dataclass(frozen=True)
class BatchMean(Center):
    """Mean over all rows of the term."""

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        return F.batch_mean(values)


@dataclass(frozen=True)
class Constant(Center):
    """A number: a known baseline, or a knob that a controller sets to a running mean."""

    value: float | Knob

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        return torch.full_like(values, number(self.value))


@dataclass(frozen=True)
class Scale(Part):
    """What is divided by: `of(values [E], episodes) -> [E]`. This one divides by 1."""

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        return torch.ones_like(values)


@dataclass(frozen=True)
class GroupStd(Scale):
    """Standard deviation over the group plus `eps`, with Bessel's correction unless `ddof` is 0."""

    eps: float = 1e-6
    ddof: int = 1

    def own_needs(self) -> Needs:
        return Needs(group_size=2)

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        index, n = episodes.index("group", "episode"), episodes.count("group")
        return _with_eps(F.group_std(values, index, n, unbiased=self.ddof == 1), self.eps)


@dataclass(frozen=True)
class BatchStd(Scale):
    """Standard deviation over all rows of the term plus `eps`."""

    eps: float = 1e-6

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        return _with_eps(F.batch_std(values), self.eps)


def _with_eps(std: Tensor, eps: float) -> Tensor:
    """std + eps, but exactly 0 where nothing varies: `normalize` then gives 0 there, whatever the centre."""
    return torch.where(std > 0, std + eps, std)


@dataclass(frozen=True)
class BetaScale(Scale):
    """BNPO (arXiv 2506.02864): the Beta density at the group's success rate, its parameters fitted over the batch.

    `parameters` fixes (alpha, beta) instead of fitting them.
    """

    parameters: tuple[float, float] | None = None

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        rate = episodes.reduce(values, to="group", how="mean", level="episode").clamp(0.0, 1.0)
        alpha, beta = self.parameters or F.beta_parameters(rate)
        return episodes.expand(F.beta_scale(rate, alpha, beta), to="episode", level="group")


# ---- advantages: [N] -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Advantage(Part):
    """Any advantage slot: one number per step. This one is 1 everywhere: likelihood, not policy gradient."""

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return torch.ones(episodes.count("step"), device=episodes.device)


@dataclass(frozen=True)
class Plain(Advantage):
    """A_n = the value of the step's episode."""

    outcome: Part = Outcome()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes.expand(self.outcome(episodes, signals))


@dataclass(frozen=True)
class Normalised(Advantage):
    """A_n = (R - center) / scale of the step's episode; centre and scale are chosen independently.

    A group of one and a group of equal rewards have advantage exactly 0, whatever rounding does to their mean and
    standard deviation (only where the centre is their own group's mean).
    """

    center: Center = GroupMean()
    scale: Scale = Scale()
    outcome: Part = Outcome()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        values = self.outcome(episodes, signals)
        centre, scale = self.center.of(values, episodes), self.scale.of(values, episodes)
        return episodes.expand(F.normalize(values, centre, scale))


@dataclass(frozen=True)
class Whitened(Advantage):
    """Another advantage less its mean over all steps, divided by `scale`; 0 where all are equal."""

    advantage: Advantage
    scale: Scale = BatchStd()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        values = self.advantage(episodes, signals)
        if len(values) < 2:
            return values
        return F.normalize(values, F.batch_mean(values), self.scale.of(values, episodes))


# ---- weights: [N] ----------------------------------------------------------------------------------------------------
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
class Uncertainty(Weight):
    """phi(p) = p (1 - p): largest where the policy is undecided about the token (CHORD-phi, arXiv 2508.11408)."""

    def own_needs(self) -> Needs:
        return Needs.of(signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        p = signals["logp"].detach().exp()
        return p * (1 - p)


# ---- masks: bool [N], True where the step may move the policy ---------------------------------------------------------
@dataclass(frozen=True)
class AdvantageMask(Part):
    """A mask that looks at the sign of the advantage: `of(advantage, episodes, signals) -> bool [N]`."""

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return torch.ones_like(advantage, dtype=torch.bool)


@dataclass(frozen=True)
class ClipMask(AdvantageMask):
    """PPO's clip as a mask: 0 where A > 0 and r > 1 + high, or A < 0 and r < 1 - low."""

    low: float | Knob = 0.2
    high: float | Knob = 0.2
    ratio: Part = TokenRatio()

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return F.clip_mask(self.ratio(episodes, signals), advantage, number(self.low), number(self.high))


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
class SuccessGate(AdvantageMask):
    """Kept: steps of groups whose mean reward is above `threshold`."""

    threshold: float = 0.0

    def own_needs(self) -> Needs:
        return Needs.of(columns="reward")

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes.expand(success_rate(episodes) > self.threshold, level="group")


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


# ---- aggregation: per-step losses [N] -> scalar ----------------------------------------------------------------------
@dataclass(frozen=True)
class Aggregate(Part):
    """`of(x [N], episodes)`: numerator / denominator, divided once, over every row and step that the term claims."""

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        raise TypeError(f"{type(self).__name__} is abstract: define of(x, episodes)")

    @cached_property
    def needs(self) -> Needs:
        return NOTHING


@dataclass(frozen=True)
class TokenMean(Aggregate):
    """TOK: sum over steps / number of steps."""

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        return _divided(F.token_mean(x))


@dataclass(frozen=True)
class EpisodeMean(Aggregate):
    """SEQ: mean over episodes of the mean over their steps; an episode without counted steps adds 0 but counts."""

    along_episodes: ClassVar[bool] = True

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        return _divided(F.episode_mean(x, episodes.index("episode"), len(episodes)))


@dataclass(frozen=True)
class EpisodeSum(Aggregate):
    """SUM: mean over episodes of the sum over their steps."""

    along_episodes: ClassVar[bool] = True

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        return _divided(F.episode_sum(x, len(episodes)))


@dataclass(frozen=True)
class Budget(Aggregate):
    """CONST: sum over steps / `tokens` per episode, mean over episodes (Dr. GRPO)."""

    along_episodes: ClassVar[bool] = True

    tokens: float

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        return _divided(F.constant(x, len(episodes), self.tokens))


@dataclass(frozen=True)
class Total(Aggregate):
    """Sum over all steps / `divisor`, whatever the number of rows."""

    divisor: float = 1.0

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        return x.sum() / self.divisor


def _divided(pair: tuple[Tensor, Tensor | float]) -> Tensor:
    numerator, denominator = pair
    return numerator / denominator
