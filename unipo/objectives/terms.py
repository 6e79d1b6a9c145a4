"""The terms that methods are made of: policy gradients, likelihoods and penalties (on scores of answers: `scores`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.objectives.advantages import Advantage
from unipo.objectives.aggregates import Aggregate, EpisodeMean, TokenMean
from unipo.objectives.base import (
    Knob,
    Needs,
    Objective,
    Rows,
    Signals,
    demonstrations,
    number,
    rollouts,
)
from unipo.objectives.masks import AdvantageMask
from unipo.objectives.weights import One, Weight


@dataclass(frozen=True, kw_only=True, repr=False)
class PolicyGradient(Objective):
    """The canonical log form of a policy gradient, which has the gradient of the ratio form:

        L = - aggregate( mask * weight * advantage * logp )        first three detached

    Unified Policy Gradient Estimator (arXiv 2509.04419): the choice of reference denominator is the weight, the
    stabilisation mask is the mask. A masked step keeps its place in the aggregation's count (PPO's clip does). Steps that
    the mask `counted` leaves out lose it: they are chosen by their advantage, and what is then aggregated never had them
    (episodes stay, as everywhere: one without steps adds 0).
    """  # fmt: skip

    advantage: Advantage
    weight: Weight = One()
    mask: AdvantageMask = AdvantageMask()
    counted: AdvantageMask | None = None
    aggregate: Aggregate = EpisodeMean()
    signal: str = "logp"
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(signals=self.signal, columns="kind")

    @property
    def linear(self) -> bool:
        parts = self.advantage.needs | self.weight.needs | self.mask.needs
        return not (parts | self.counted.needs if self.counted else parts).signals

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        logp = signals[self.signal]
        with torch.no_grad():
            advantage = self.advantage(episodes, signals).to(logp.dtype)
            weight = self.weight.of(advantage, episodes, signals).to(logp.dtype)
            mask = self.mask.of(advantage, episodes, signals)
            coefficient = torch.where(mask, weight * advantage, 0.0)
            facts = {"advantage": advantage, "weight": weight, "clipped": (~mask).to(logp.dtype),
                     **self.mask.facts(advantage, episodes, signals)}  # fmt: skip
        if self.counted is None:
            return self.aggregate.of(-coefficient * logp, episodes), facts
        with torch.no_grad():
            counted = self.counted.of(advantage, episodes, signals)
            facts = {name: torch.where(counted, fact, torch.nan) for name, fact in facts.items()}
        return self.aggregate.of((-coefficient * logp)[counted], episodes.select(counted, "step")), facts


@dataclass(frozen=True, kw_only=True, repr=False)
class Surrogate(Objective):
    """The ratio form of a policy gradient, whose value is what a line search compares:

        L = - aggregate( r * advantage ),   r = pi / <to>          advantage detached

    It has the gradient of `PolicyGradient(weight=TokenRatio(to))`.
    """  # fmt: skip

    advantage: Advantage
    to: str = "behavior"
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(signals="logp", columns=f"kind {self.to}_logp")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        logp = signals["logp"]
        with torch.no_grad():
            advantage = self.advantage(episodes, signals).to(logp.dtype)
        ratio = F.token_ratio(F.log_ratio(logp, episodes[f"{self.to}_logp"].to(logp.dtype)))
        return self.aggregate.of(-ratio * advantage, episodes), {"advantage": advantage, "weight": ratio}


@dataclass(frozen=True, kw_only=True, repr=False)
class Likelihood(PolicyGradient):
    """-weight * logp on demonstrations: a policy gradient whose advantage is 1 and whose denominator is the policy."""

    advantage: Advantage = Advantage()
    aggregate: Aggregate = TokenMean()
    rows: Rows = demonstrations


@dataclass(frozen=True, kw_only=True, repr=False)
class KLPenalty(Objective):
    """A Monte-Carlo estimator of the divergence between policy and `to`, differentiated directly.

    With samples of the policy: k2 has the gradient of KL(pi || to), k3 that of KL(to || pi), and k3 times the ratio
    (`weight=TokenRatio()`) that of KL(pi || to) again (Schulman, "Approximating KL divergence").
    """

    estimator: str = "k3"
    to: str = "reference"
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.to}_logp kind", signals="logp")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = F.log_ratio(signals["logp"], episodes[f"{self.to}_logp"])
        kl = ESTIMATORS[self.estimator](log_ratio)
        return self.aggregate.of(kl, episodes), {f"kl_{self.to}": kl}


ESTIMATORS = {"k1": F.k1, "k2": F.k2, "k3": F.k3}


@dataclass(frozen=True, kw_only=True, repr=False)
class TrustRegion(Objective):
    """strength / 2 * max( KL(to || pi) - limit, 0 )^2: nothing inside the region, then a pull back in the place of a clip.

    KL is the aggregate of an estimator on samples of `to`: k1 is mean( log to - log pi ). By default `to` is the policy before
    the update, so that the first update of a batch is free.
    """

    strength: float | Knob = 1e3
    limit: float | Knob = 1e-4
    estimator: str = "k1"
    to: str = "old"
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.to}_logp kind", signals="logp")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        kl = ESTIMATORS[self.estimator](-F.log_ratio(signals["logp"], episodes[f"{self.to}_logp"]))
        beyond = (self.aggregate.of(kl, episodes) - number(self.limit)).clamp(min=0.0)
        return number(self.strength) / 2 * beyond.square(), {f"kl_{self.to}": kl}


@dataclass(frozen=True, kw_only=True, repr=False)
class Bonus(Objective):
    """- aggregate(signal): what is rewarded directly, such as the entropy of the policy at each step.

    A divergence such as "reverse_kl:old" is measured to the distributions in the column `old_parameters`.
    """

    signal: str = "entropy"
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        anchor = self.signal.partition(":")[2]
        return Needs.of(signals=self.signal, columns=f"kind {anchor}_parameters" if anchor else "kind")

    @property
    def linear(self) -> bool:
        return True

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        signal, anchor = signals[self.signal], self.signal.partition(":")[2]
        return self.aggregate.of(-signal, episodes), {f"kl_{anchor}": signal} if anchor else {}


__all__ = [
    "Bonus",
    "KLPenalty",
    "Likelihood",
    "PolicyGradient",
    "Surrogate",
    "TrustRegion",
]
