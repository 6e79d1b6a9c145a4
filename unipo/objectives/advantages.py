"""What a step is worth: outcomes of episodes, centres, scales, and the advantages that they make.

Every part is a frozen record called with `(episodes, signals)`; the maths is in `unipo.functional`, a part only says which
columns it is applied to. Shapes: [N] steps, [E] episodes of the rows that a term claims. The slots of `PolicyGradient`
detach advantage, weight and mask, so parts need no stop-gradient of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes, segment_reduce
from unipo.objectives.base import Knob, Needs, Part, Rows, Signals, demonstrations, number

__all__ = [
    "Advantage",
    "AffineOutcome",
    "Anchored",
    "BatchMax",
    "BatchMean",
    "BatchStd",
    "BetaScale",
    "Bounded",
    "Center",
    "Constant",
    "GroupMean",
    "GroupStd",
    "LeaveOneOut",
    "MeanSoFar",
    "NormWeighted",
    "Normalised",
    "Outcome",
    "Past",
    "Plain",
    "Plus",
    "Scale",
    "ShapedOutcome",
    "SmoothStd",
    "SoftenedOutcome",
    "Standardised",
    "StdSoFar",
    "Times",
    "Whitened",
]


# ---- what an episode is worth: [E] ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome(Part):
    """R [E]: the column `reward` summed over the episode's steps (or as it is where it lives on episodes).

    `group_size`: it means something in groups of at least so many (a win rate among the group).
    """

    column: str = "reward"
    group_size: int = field(default=1, repr=False)

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.column, group_size=self.group_size)

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


@dataclass(frozen=True)
class SoftenedOutcome(Part):
    """R counts little beyond a `threshold` and much below it (`functional.softened`)."""

    threshold: float = 0.8
    slope: float = 0.01
    steepness: float = 1.0
    outcome: Part = Outcome()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return F.softened(self.outcome(episodes, signals), self.threshold, self.slope, self.steepness)


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
class NormWeighted(Center):
    """Mean over the other members of the group, weighted by their squared score norms before the update.

        n_j = sum over the steps of || grad_logits log pi(y) ||^2 = 1 - 2 pi(y) + sum_a pi(a)^2

    The mean with weights n_j = || grad log pi(y_j) ||^2 is the scalar baseline of least variance (Greensmith et al. 2004);
    this norm, of the gradient with respect to the logits, is that of a table and a proxy for any other policy.
    """  # fmt: skip

    def own_needs(self) -> Needs:
        return Needs.of(columns="old_logp old_collision", group_size=2)

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        norm = episodes.reduce(F.score_square(episodes["old_logp"], episodes["old_collision"]))
        return F.weighted_leave_one_out_mean(values, norm, episodes.index("group", "episode"), episodes.count("group"))


@dataclass(frozen=True)
class BatchMean(Center):
    """Mean over all rows of the term."""

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        return F.batch_mean(values)


@dataclass(frozen=True)
class BatchMax(Center):
    """The largest over all rows of the term: what an exponential of rewards may be relieved of, alike for every prompt."""

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        return values.amax().expand_as(values) if len(values) else values


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
class SmoothStd(Scale):
    """sqrt(variance over the group + eps^2), population variance: a scale that is smooth where nothing varies yet."""

    eps: float = 1.0

    def own_needs(self) -> Needs:
        return Needs(group_size=2)

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        index, n = episodes.index("group", "episode"), episodes.count("group")
        return (F.group_variance(values, index, n, unbiased=False) + self.eps**2).sqrt()


@dataclass(frozen=True)
class BatchStd(Scale):
    """Standard deviation over all rows of the term plus `eps`."""

    eps: float = 1e-6

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        return _with_eps(F.batch_std(values), self.eps)


@dataclass(frozen=True)
class Past(Part):
    """How many outcomes earlier steps have seen, their mean and standard deviation: knobs that `SoFar` controllers turn."""

    count: float | Knob = Knob("past_count", 0.0)
    mean: float | Knob = Knob("past_mean", 0.0)
    std: float | Knob = Knob("past_std", 0.0)

    def joined(self, values: Tensor) -> F.Moments:
        """(count, mean, population variance) of theirs and `values` [E] together."""
        return F.merged_moments((number(self.count), number(self.mean), number(self.std) ** 2), F.moments_of(values))


@dataclass(frozen=True)
class MeanSoFar(Center):
    """Mean over everything seen so far, this batch included."""

    past: Past = Past()

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        return torch.full_like(values, self.past.joined(values)[1])


@dataclass(frozen=True)
class StdSoFar(Scale):
    """Standard deviation over everything seen so far, this batch included, with Bessel's correction, plus `eps`."""

    past: Past = Past()
    eps: float = 1e-6

    def of(self, values: Tensor, episodes: Episodes) -> Tensor:
        count, _, variance = self.past.joined(values)
        return _with_eps(torch.full_like(values, (variance * count / max(count - 1, 1)) ** 0.5), self.eps)


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


@dataclass(frozen=True)
class Standardised(Part):
    """(R - center) / scale of each episode [E]; exactly 0 in a group of one and in a group of equal rewards."""

    center: Center = GroupMean()
    scale: Scale = Scale()
    outcome: Part = Outcome()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        values = self.outcome(episodes, signals)
        return F.normalize(values, self.center.of(values, episodes), self.scale.of(values, episodes))


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
        return episodes.expand(Standardised(self.center, self.scale, self.outcome)(episodes, signals))


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


@dataclass(frozen=True)
class Bounded(Advantage):
    """Another advantage held in [-limit, limit]."""

    advantage: Advantage
    limit: float = 2.0

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return self.advantage(episodes, signals).clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class Times(Advantage):
    """Another advantage times a number, or a knob such as the multiplier of a constraint."""

    coefficient: float | Knob
    advantage: Advantage

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return number(self.coefficient) * self.advantage(episodes, signals)


@dataclass(frozen=True)
class Plus(Advantage):
    """The sum of advantages: an outcome, say, and the shaped rewards along the way."""

    advantages: tuple[Advantage, ...] = ()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        total = torch.zeros(episodes.count("step"), device=episodes.device)
        for advantage in self.advantages:
            found = advantage(episodes, signals)
            total = total.to(torch.promote_types(total.dtype, found.dtype)) + found
        return total


@dataclass(frozen=True)
class Anchored(Advantage):
    """Another advantage among all rows but `rows`, whose own is `factor` times the largest of their group.

    Their rewards do not enter the statistics of the others; in a group without others they have advantage 0.
    """

    advantage: Advantage
    rows: Rows = demonstrations
    factor: float = 1.2

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        shown = episodes.expand(self.rows(episodes))
        rest = {name: signal[~shown] for name, signal in signals.items()}
        values = self.advantage(episodes.select(~self.rows(episodes)), rest)
        group = episodes.index("group")
        best = segment_reduce(values, group[~shown], episodes.count("group"), "max")
        found = self.factor * torch.where(best.isfinite(), best, 0.0)[group]
        return found.masked_scatter(~shown, values)
