"""Rewards in units of the spread of discounted returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class RewardScaler:
    """r / sqrt(var(R) + eps), clipped to +-clip; R_t = gamma R_{t-1} + r_t, running in every environment from its reset.

    As in Stable-Baselines3's VecNormalize, but one variance serves a whole batch: that batch's returns are merged first
    (Chan et al. 1979), then all its rewards are divided by the same number.
    """

    num: int
    gamma: float = 0.99
    clip: float = 10.0
    eps: float = 1e-8
    mean: float = 0.0
    var: float = 1.0
    count: float = 1e-4

    def __post_init__(self) -> None:
        self.returns = np.zeros(self.num)

    def merge_and_scale(self, reward: Array, ended: Array) -> Array:
        """Scaled rewards [n, T] float32 from `reward` [n, T]; `ended` [n, T]: the episode ended with that step."""
        running = np.empty(reward.shape)
        for t in range(reward.shape[1]):
            self.returns = self.returns * self.gamma + reward[:, t]
            running[:, t] = self.returns
            self.returns = np.where(ended[:, t], 0.0, self.returns)
        self._merge(float(running.mean()), float(running.var()), running.size)
        scaled: Array = np.clip(reward / np.sqrt(self.var + self.eps), -self.clip, self.clip).astype(np.float32)
        return scaled

    def _merge(self, mean: float, var: float, count: int) -> None:
        total, difference = self.count + count, mean - self.mean
        between = difference**2 * self.count * count / total
        self.var = (self.var * self.count + var * count + between) / total
        self.mean, self.count = self.mean + difference * count / total, total

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "var": self.var, "count": self.count, "returns": self.returns.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.var, self.count = state["mean"], state["var"], state["count"]
        self.returns = np.asarray(state["returns"])
