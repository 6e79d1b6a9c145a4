"""CartPole without velocities: a partially observed task that a policy without memory cannot solve."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

SHOWN = (0, 2)
"""The cart's position and the pole's angle, among CartPole's four numbers."""


class CartPoleHidden(gym.ObservationWrapper[NDArray[Any], Any, NDArray[Any]]):
    """`CartPole-v1` (500 steps at most, 1 per step) that shows the cart's position and the pole's angle only."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(gym.make("CartPole-v1", render_mode=render_mode, disable_env_checker=True))
        space: Any = self.env.observation_space
        index = list(SHOWN)
        self.observation_space = gym.spaces.Box(space.low[index], space.high[index], dtype=np.float32)

    def observation(self, observation: NDArray[Any]) -> NDArray[Any]:
        return observation[list(SHOWN)]
