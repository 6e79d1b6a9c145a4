"""CartPole without velocities: a partially observed task that a policy without memory cannot solve."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv
from numpy.typing import NDArray

SHOWN = [0, 2]
"""The cart's position and the pole's angle, among CartPole's four numbers."""
LIMIT = 500
"""Steps of an episode, as in CartPole-v1."""


class CartPoleHidden(CartPoleEnv):
    """CartPole-v1, 1 per step, that shows the cart's position and the pole's angle only."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        whole: Any = self.observation_space
        self.observation_space = gym.spaces.Box(whole.low[SHOWN], whole.high[SHOWN], dtype=np.float32)
        self.left = LIMIT

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        self.left = LIMIT
        observation, info = super().reset(seed=seed, options=options)
        return observation[SHOWN], info

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """Truncated after `LIMIT` steps."""
        self.left -= 1
        observation, reward, terminated, _, info = super().step(action)
        return observation[SHOWN], float(reward), terminated, self.left <= 0, info
