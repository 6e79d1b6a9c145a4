"""Terms of actors that a critic is differentiated through, beside `Bonus(signal="pathwise_q")`: relative values, cloning,
mixtures of experts. The critic is frozen where these signals are made (`unipo.critics.Pathwise`). Legend: N steps, K experts,
A action dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.objectives.aggregates import Aggregate, TokenMean
from unipo.objectives.base import Knob, Needs, Objective, Part, Rows, Signals, number, rollouts
from unipo.objectives.terms import Bonus

__all__ = ["AllComponents", "BestComponent", "Cloning", "Components", "RelativeBonus", "Router"]


@dataclass(frozen=True, kw_only=True, repr=False)
class RelativeBonus(Bonus):
    """- aggregate(signal) / sg(mean |signal|): the same gradient whatever the scale of the signal (TD3+BC)."""

    signal: str = "pathwise_q"

    @property
    def linear(self) -> bool:
        return False

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        signal = signals[self.signal]
        size = signal.detach().abs().mean().clamp(min=torch.finfo(signal.dtype).tiny)
        return self.aggregate.of(-signal / size, episodes), {}


@dataclass(frozen=True, kw_only=True, repr=False)
class Cloning(Objective):
    """aggregate( mean over A of (a_pi - a)^2 ): the policy's own action, pulled to the one that was recorded."""

    signal: str = "pathwise_action"
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(signals=self.signal, columns="action kind")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        error = (signals[self.signal] - episodes["action"]).square().mean(-1)
        return self.aggregate.of(error, episodes), {}


# ---- mixtures of experts: which component of a state is meant, [N, K] -------------------------------------------------
@dataclass(frozen=True)
class AllComponents(Part):
    """1 / K each."""

    def of(self, q: Tensor) -> Tensor:
        return torch.full_like(q, 1.0 / q.shape[-1])


@dataclass(frozen=True)
class BestComponent(AllComponents):
    """1 for the component whose sample is worth most, 0 for the others."""

    def of(self, q: Tensor) -> Tensor:
        return torch.zeros_like(q).scatter_(-1, q.argmax(-1, keepdim=True), 1.0)


@dataclass(frozen=True, kw_only=True, repr=False)
class Components(Objective):
    """aggregate( sum_i share_i (temperature * log p_i(a_i) - Q(a_i)) ), a_i a sample of component i (PMOE, arXiv 2104.09122).

    p_i is the component's own density; share is detached. Signals `pathwise_q`, `pathwise_logp` [N, K].
    """

    temperature: float | Knob = 0.0
    share: AllComponents = AllComponents()
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(signals="pathwise_q pathwise_logp", columns="kind")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        q = signals["pathwise_q"]
        share = self.share.of(q.detach())
        loss = share * (number(self.temperature) * signals["pathwise_logp"] - q)
        return self.aggregate.of(loss.sum(-1), episodes), {}


@dataclass(frozen=True, kw_only=True, repr=False)
class Router(Objective):
    """aggregate( mean_i (w_i - share_i)^2 ): the weights w learn how often each component is the best (PMOE's L_freq)."""

    share: AllComponents = BestComponent()
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(signals="router pathwise_q", columns="kind")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        share = self.share.of(signals["pathwise_q"].detach())
        return self.aggregate.of((signals["router"] - share).square().mean(-1), episodes), {}
