"""Critics: regressions of a signal to a target, the penalty and the target chosen independently.

    L = aggregate( sum_j penalty( signal_j - target ) )          target detached; j over an ensemble, where there is one
"""  # fmt: skip

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.objectives.advantages import Advantage
from unipo.objectives.aggregates import Aggregate, TokenMean
from unipo.objectives.base import Knob, Needs, Objective, Part, Rows, Signals, number, rollouts
from unipo.objectives.returns import ValueTarget, continues, step_rewards
from unipo.objectives.weights import Weight

__all__ = [
    "ActionAdvantage", "AdvantageWeight", "Bellman", "Expectile", "Huber", "Regression", "SmallestOf", "Squared",
    "ValueRegression",
]  # fmt: skip


# ---- penalties: [N, ...] -> [N, ...] ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Squared(Part):
    """e^2 / 2."""

    def of(self, error: Tensor) -> Tensor:
        return error.square() / 2


@dataclass(frozen=True)
class Huber(Squared):
    """e^2 / 2 up to |e| = delta, linear beyond."""

    delta: float = 1.0

    def of(self, error: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.delta)


@dataclass(frozen=True)
class Expectile(Squared):
    """|tau - 1{signal > target}| e^2 (IQL, arXiv 2110.06169, eq. 5): tau -> 1 is the maximum over what was seen."""

    tau: float = 0.7

    def of(self, error: Tensor) -> Tensor:
        return torch.where(error > 0, 1.0 - self.tau, self.tau) * error.square()


# ---- targets: [N] ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bellman(Advantage):
    """y = r + discount * (0 where terminated) * (next_q - temperature * next_logp).

    `next_q`, `next_logp`: what the recipe's backup says of the next state; `discount` [E] is gamma, or gamma^n where the
    replay has summed n rewards. `value` reads another column instead, such as IQL's `old_next_value`, or the quantiles
    [N, M] of a distribution: then so is the target.
    """

    temperature: float | Knob | None = None
    value: str = "next_q"

    def own_needs(self) -> Needs:
        soft = "" if self.temperature is None else " next_logp"
        return Needs.of(columns=f"reward discount terminated {self.value}{soft}")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        following = episodes[self.value]
        if self.temperature is not None:
            following = following - alike(number(self.temperature) * episodes["next_logp"], following)
        going = episodes.expand("discount") * continues(episodes)
        return alike(step_rewards(episodes), following) + alike(going, following) * following


def alike(x: Tensor, other: Tensor) -> Tensor:
    """`x` [N] with as many dimensions as `other` [N, ...]."""
    return x if other.ndim == 1 else x.reshape(-1, *[1] * (other.ndim - 1))


@dataclass(frozen=True)
class SmallestOf(Advantage):
    """The smallest of an ensemble column [N, n], such as `target_q`."""

    column: str = "target_q"

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.column)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes[self.column].amin(-1)


@dataclass(frozen=True)
class ActionAdvantage(Advantage):
    """A = min_j q_j(s, a) - v(s), of the columns `q` [N, n] and `value` [N]: how much better than the state an action is."""

    q: str = "target_q"
    value: str = "old_value"

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.q} {self.value}")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes[self.q].amin(-1) - episodes[self.value]


@dataclass(frozen=True)
class AdvantageWeight(Weight):
    """min( exp(scale * advantage), cap ): the weight of advantage-weighted regression, with an advantage of its own."""

    advantage: Advantage = ActionAdvantage()
    scale: float = 3.0
    cap: float = 100.0

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return (self.scale * self.advantage(episodes, signals)).exp().clamp(max=self.cap)


def importance(loss: Tensor, episodes: Episodes, weight: str) -> Tensor:
    """`loss` [N] times the column called `weight`, of steps or of episodes; as it is where none is named."""
    if not weight:
        return loss
    return loss * (episodes.expand(weight) if episodes.column(weight).level == "episode" else episodes[weight])


# ---- terms -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, repr=False)
class Regression(Objective):
    """aggregate( weight * sum over an ensemble of penalty(signal - target) ); `weight` names a column [N] (importance
    weights of a prioritised replay)."""

    signal: str = "q"
    target: Advantage = Bellman()
    penalty: Squared = Squared()
    weight: str = ""
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(signals=self.signal, columns=f"kind {self.weight}")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        signal = signals[self.signal]
        with torch.no_grad():
            target = self.target(episodes, signals).to(signal.dtype)
        error = signal - alike(target, signal)
        each = tuple(range(1, error.ndim))
        penalty = self.penalty.of(error).sum(each) if each else self.penalty.of(error)
        penalty = importance(penalty, episodes, self.weight)
        squared = error.detach().square()
        return self.aggregate.of(penalty, episodes), {"value_error": squared.mean(each) if each else squared}


@dataclass(frozen=True, kw_only=True, repr=False)
class ValueRegression(Objective):
    """Half the squared error of the critic's `value` to the GAE return, clipped around the old value when asked; times a
    `weight` that does not look at advantages."""

    target: Advantage = ValueTarget()
    weight: Weight | None = None
    clip: float | None = None
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(signals="value", columns="old_value kind" if self.clip is not None else "kind")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        value = signals["value"]
        with torch.no_grad():
            target = self.target(episodes, signals).to(value.dtype)
        error = (value - target).square()
        if self.clip is not None:
            old = episodes["old_value"].to(value.dtype)
            error = torch.maximum(error, (old + (value - old).clamp(-self.clip, self.clip) - target).square())
        with torch.no_grad():
            times = 0.5 if self.weight is None else self.weight(episodes, signals).to(value.dtype) / 2
        return self.aggregate.of(times * error, episodes), {"value_error": error}
