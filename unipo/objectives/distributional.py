"""Critics of the distribution of returns: Gaussian (DSAC-T) and by quantiles.

Targets are detached. Legend: N steps, n critics, K quantiles of each, M quantiles of the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from unipo.episodes import Episodes
from unipo.objectives.advantages import Advantage
from unipo.objectives.aggregates import Aggregate, TokenMean
from unipo.objectives.base import Knob, Needs, Objective, Rows, Signals, number, rollouts
from unipo.objectives.regression import Bellman, Huber, Squared, importance
from unipo.objectives.returns import continues

__all__ = ["GaussianReturn", "QuantileRegression"]


@dataclass(frozen=True, kw_only=True, repr=False)
class GaussianReturn(Objective):
    """The critic of DSAC-T (arXiv 2310.05858): Z_i = N(q_i, s_i^2), returns drawn from the target's Z, in units of its spread.

        y_z = y + discount * (0 where terminated) * z * next_q_std        z = column `target_noise`, within +-`bound`
        x_i = clip(y_z - q_i, +-bound m_i)^2                              m_i = running mean of the batch means of s_i
        L   = aggregate( sum_i w_i ( penalty(q_i - y) + s_i sg((s_i^2 - x_i) / (s_i + eps)) ) )
        w_i = m_i^2 / (s_i^2 + eps), within `scale`                       x, w, m detached

    `target`: y [N]. `weight` names a column [N], as in `Regression`. `spreads`: m_i after the batch before (a knob of
    `MovingMean`; 0: there was none), moved here by `rate` to the mean of s_i in this batch. Departs from the released code,
    whose Huber function halves x: there s^2 -> E x / 2.
    """  # fmt: skip

    target: Advantage = Bellman()
    spreads: tuple[float | Knob, ...] = (0.0, 0.0)
    rate: float = 0.005
    bound: float = 3.0
    scale: tuple[float, float] = (0.1, 10.0)
    eps: float = 0.1
    penalty: Squared = Huber(50.0)
    weight: str = ""
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        columns = f"kind discount terminated next_q_std target_noise {self.weight}"
        return Needs.of(signals="q q_std", columns=columns)

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        q, std = signals["q"], signals["q_std"]
        with torch.no_grad():
            y = self.target(episodes, signals).to(q.dtype)[:, None]
            spread, variance = self.spread_of(std), std.square()
            x = (y + self.drawn(episodes)[:, None] - q).clamp(-self.bound * spread, self.bound * spread).square()
            weight = (spread.square() / (variance + self.eps)).clamp(*self.scale)
            pull = (variance - x) / (std + self.eps)
        loss = importance((weight * (self.penalty.of(q - y) + std * pull)).sum(-1), episodes, self.weight)
        return self.aggregate.of(loss, episodes), {"value_error": (q - y).square().mean(-1)}

    def spread_of(self, std: Tensor) -> Tensor:
        """m [n], with this batch in it; of the first batch its own mean."""
        now = std.mean(0)
        before = torch.stack([torch.as_tensor(number(s), dtype=now.dtype, device=now.device) for s in self.spreads])
        return torch.where(before > 0, torch.lerp(before, now, self.rate), now)

    def drawn(self, episodes: Episodes) -> Tensor:
        """[N]: what a draw from the next state's distribution adds to the target."""
        z = episodes["target_noise"].clamp(-self.bound, self.bound)
        return episodes.expand("discount") * continues(episodes) * z * episodes["next_q_std"]


@dataclass(frozen=True, kw_only=True, repr=False)
class QuantileRegression(Objective):
    """Quantile Huber regression of `quantiles` [N, n, K] at levels (k + 1/2) / K to a target of M quantiles [N, M].

        L = aggregate( sum over n of mean over K, M of |level_k - 1{y_m < theta_k}| huber_delta(y_m - theta_k) / delta )

    QR-DQN (arXiv 1710.10044, eq. 10), TQC (arXiv 2005.04269).
    """

    target: Advantage = Bellman(value="next_quantiles")
    delta: float = 1.0
    weight: str = ""
    aggregate: Aggregate = TokenMean()
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(signals="quantiles", columns=f"kind {self.weight}")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        theta = signals["quantiles"]
        with torch.no_grad():
            y = self.target(episodes, signals).to(theta.dtype)
        K, M = theta.shape[-1], y.shape[-1]
        level = (torch.arange(K, dtype=theta.dtype, device=theta.device) + 0.5) / K
        theta_NnKM, y_NnKM = theta[..., None].expand(*theta.shape, M), y[:, None, None, :].expand(*theta.shape, M)
        tilt = (level[:, None] - (y_NnKM < theta_NnKM).to(theta)).abs()
        loss = tilt * huber_loss(theta_NnKM, y_NnKM, reduction="none", delta=self.delta) / self.delta
        error = (theta.mean(-1) - y.mean(-1, keepdim=True)).detach().square().mean(-1)
        loss = importance(loss.mean((-2, -1)).sum(-1), episodes, self.weight)
        return self.aggregate.of(loss, episodes), {"value_error": error}
