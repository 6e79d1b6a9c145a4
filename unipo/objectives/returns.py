"""Parts that look along an episode: generalised advantages and returns, with the bootstrap where an episode was cut.

`terminated` and `truncated` are never confused. Nothing is worth anything after a terminated step; a fragment that was cut,
by a time limit or by the end of the batch, goes on with the value of the state that it was cut at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.objectives.advantages import Advantage, Scale
from unipo.objectives.base import Knob, Needs, Part, Signals, number

__all__ = [
    "DiscountedReturn",
    "DivergenceCost",
    "GeneralisedAdvantage",
    "LessDivergence",
    "LogRatioToGo",
    "Rescaled",
    "ShapedReturn",
    "StepReward",
    "ValueTarget",
    "continues",
    "gae_of",
    "step_rewards",
]


# ---- what a step pays: [N] -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StepReward(Part):
    """r_n [N]: the column `reward`, or another; where it lives on episodes, it is paid at the last step."""

    column: str = field(default="reward", kw_only=True)

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.column)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return step_rewards(episodes, self.column)


@dataclass(frozen=True)
class DivergenceCost(StepReward):
    """r_n = - log( mu / to )(y_n) alone, of the policy that sampled."""

    to: str = "reference"

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"behavior_logp {self.to}_logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return -F.log_ratio(episodes["behavior_logp"], episodes[f"{self.to}_logp"])


@dataclass(frozen=True)
class LessDivergence(StepReward):
    """r_n - coefficient * log( mu / to )(y_n): the divergence inside the reward, of the policy that sampled."""

    coefficient: float | Knob = 0.01
    to: str = "reference"

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.column} behavior_logp {self.to}_logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        log_ratio = F.log_ratio(episodes["behavior_logp"], episodes[f"{self.to}_logp"])
        return step_rewards(episodes, self.column).to(log_ratio.dtype) - number(self.coefficient) * log_ratio


@dataclass(frozen=True)
class Rescaled(StepReward):
    """(r_n - mean) / sqrt(variance + eps) + mean over all steps: whitened, and put back where they were (RLHF)."""

    reward: StepReward = StepReward()
    eps: float = 1e-8

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        reward = self.reward(episodes, signals)
        if len(reward) < 2:
            return reward
        return (reward - reward.mean()) / (reward.var() + self.eps).sqrt() + reward.mean()


# ---- advantages and targets: [N] -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GeneralisedAdvantage(Advantage):
    """GAE from the critic's values before the update (`old_value`); an outcome arrives at the last step.

    Rewards along the way are a `reward` column of level step. Cut episodes bootstrap (`bootstrap_of`). `whiten` centres on
    the mean of all steps and divides by that scale; advantages that are all equal become exactly 0. `reward`: what a step
    pays; `value`: the signal that says what is still to come of it.
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten: Scale | None = None
    reward: StepReward = StepReward()
    value: str = "value"

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"old_{self.value}")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        advantage, _ = gae_of(episodes, self.gamma, self.lam, self.reward(episodes, signals), self.value)
        if self.whiten is None or len(advantage) < 2:
            return advantage
        return F.normalize(advantage, F.batch_mean(advantage), self.whiten.of(advantage, episodes))


@dataclass(frozen=True)
class ValueTarget(Advantage):
    """What a value function is regressed to: the GAE return, A_n + V_old(n)."""

    gamma: float = 1.0
    lam: float = 0.95
    reward: StepReward = StepReward()
    value: str = "value"

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"old_{self.value}")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return gae_of(episodes, self.gamma, self.lam, self.reward(episodes, signals), self.value)[1]


@dataclass(frozen=True)
class DiscountedReturn(Advantage):
    """G_n = sum_k gamma^k r_{n+k} to the end of the fragment; `column` is what is summed.

    A cut fragment goes on with `old_next_value` where the batch has it, else with 0: give Monte-Carlo methods whole
    episodes.
    """

    gamma: float = 1.0
    column: str = "reward"

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.column)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        reward = step_rewards(episodes, self.column)
        after = bootstrap_of(episodes, torch.zeros_like(reward))
        return F.discounted_return(reward, episodes.index("episode"), len(episodes), self.gamma, after)


@dataclass(frozen=True)
class ShapedReturn(Advantage):
    """A_n = R + sum over m >= n of -coefficient * log( mu / to )(y_m): the KL of what is still to come inside the reward."""

    coefficient: float | Knob = 0.01
    to: str = "reference"

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"reward behavior_logp {self.to}_logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        reward = LessDivergence(self.coefficient, self.to)(episodes, signals)
        return F.discounted_return(reward, episodes.index("episode"), len(episodes), 1.0)


@dataclass(frozen=True)
class LogRatioToGo(Advantage):
    """A_n = - coefficient * sum over m >= n of log( pi / to )(y_m): the KL of what is still to come, with the current policy.

    As the advantage of a policy gradient it has the gradient of -coefficient KL(pi || to), like the sum over the whole episode
    and with less variance. A log-ratio of its own step alone has not.
    """

    coefficient: float | Knob = 0.01
    to: str = "reference"

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.to}_logp", signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        log_ratio = F.log_ratio(signals["logp"].detach(), episodes[f"{self.to}_logp"])
        cost = -number(self.coefficient) * log_ratio
        return F.discounted_return(cost, episodes.index("episode"), len(episodes), 1.0)


def step_rewards(episodes: Episodes, name: str = "reward") -> Tensor:
    """[N]: the reward column, placed on the last step of each episode when it lives on episodes."""
    if episodes.column(name).level == "step":
        return episodes[name]
    steps, rows = _last_steps(episodes)
    blank = torch.zeros(episodes.count("step"), dtype=episodes[name].dtype, device=episodes.device)
    return blank.index_put((steps,), episodes[name][rows])


def gae_of(episodes: Episodes, gamma: float, lam: float, reward: Tensor | None = None, signal: str = "value"
           ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantage [N] and return [N] by generalised advantage estimation over `old_<signal>`.

    `reward` [N]: the column of that name, unless given.
    """
    reward = step_rewards(episodes) if reward is None else reward
    value = episodes[f"old_{signal}"].to(reward.dtype)
    after = bootstrap_of(episodes, value)
    return F.gae(reward, value, episodes.index("episode"), len(episodes), gamma, lam, after)


def bootstrap_of(episodes: Episodes, value: Tensor) -> Tensor:
    """[E]: what follows the last step. 0 unless truncated and not terminated as well; else `old_next_value` of it, the value
    of the state where the episode was cut; else `value` [N] of the last step itself (a token policy has no other)."""
    after = torch.zeros(len(episodes), dtype=value.dtype, device=value.device)
    if "truncated" not in episodes:
        return after
    steps, rows = _last_steps(episodes)
    cut = episodes["truncated"][rows]
    if "terminated" in episodes:
        cut = cut & ~episodes["terminated"][rows]
    following = episodes["old_next_value"].to(value.dtype) if "old_next_value" in episodes else value
    return after.index_put((rows[cut],), following[steps[cut]])


def continues(episodes: Episodes) -> Tensor:
    """[N] float: 0 at the last step of a terminated episode, 1 elsewhere: what multiplies the value of the next state."""
    if episodes.is_flat:
        return 1.0 - episodes["terminated"].float()
    steps, rows = _last_steps(episodes)
    blank = torch.ones(episodes.count("step"), device=episodes.device)
    return blank.index_put((steps,), 1.0 - episodes["terminated"][rows].float())


def _last_steps(episodes: Episodes) -> tuple[Tensor, Tensor]:
    """Positions of the last steps, and of the episodes that have one: int64 [k] each."""
    lengths = episodes.lengths()
    rows = (lengths > 0).nonzero().squeeze(1)
    return (lengths.cumsum(0) - 1)[rows], rows
