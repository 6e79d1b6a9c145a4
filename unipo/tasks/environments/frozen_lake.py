"""`unipo/PostDecisionFrozenLake-v0`: walk to the intended cell, then let the ice carry you.

The lake of post-decision PPO (arXiv 2504.05150, row 172). Gymnasium's own slippery lake draws one of three directions, so no
cell says where the walker stands after the decision and before the slip. Here a step has two halves:

    s^x = f(s, a)        the neighbouring cell in the chosen direction (the same cell at the border). Deterministic
    s'  = s^x            if s^x is a hole or the goal, and with probability 1 - slip
    s'  = f(s^x, b)      otherwise, with b ~ drift[s^x], the current of that cell: fixed by `current`

so s^x is all that the drift depends on. Rewards: 1 in the half that reaches the goal, 0 elsewhere; `proximity` > 0 adds
the paper's proximity / (1 + distance to the goal) in every other half, less proximity / (rows + columns) in a hole.
Departs from the paper's code: a walker who steps into a hole is out at once, and cannot drift out of it.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.toy_text.frozen_lake import MAPS
from numpy.typing import NDArray

from unipo.tasks.environments.post_decision import PostDecisionProcess

STEPS = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])
"""(row, column) of the actions left, down, right, up: Gymnasium's order."""


class PostDecisionFrozenLake(gym.Env[NDArray[np.float32], np.int64]):
    """The lake: C = rows * columns cells, numbered along rows.

    Observation, `Box(0, 1, [C])`: one-hot of the cell. Action, `Discrete(4)`: left, down, right, up. An episode starts on S,
    is terminated on H or G, truncated after `horizon` steps. `info` of every step: `post_observation` [C], the one-hot of
    s^x; `reward_decision`, `reward_outcome`, whose sum is the reward; `cell`.

    Args:
        map_name: one of Gymnasium's maps, "4x4" or "8x8".
        slip: probability that the ice carries the walker one more cell.
        current: seed of the drift, one Dirichlet(1, 1, 1, 1) draw per cell. It is part of the model: a reset leaves it.
        proximity: weight of the paper's dense reward; above 0 it pays for standing near the goal, so 0 is the default.

    Raises:
        ValueError: for an unknown map, a slip outside 0..1, a negative proximity, a horizon below 1.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        *,
        map_name: str = "4x4",
        slip: float = 0.5,
        current: int = 42,
        proximity: float = 0.0,
        horizon: int = 100,
    ) -> None:
        if map_name not in MAPS:
            raise ValueError(f"map_name: expected one of {', '.join(sorted(MAPS))}, found {map_name!r}")
        if not 0 <= slip <= 1:
            raise ValueError(f"slip: expected a probability, found {slip}")
        if proximity < 0 or horizon < 1:
            raise ValueError(f"expected proximity >= 0 and horizon >= 1, found {proximity} and {horizon}")
        self.letters = np.array([list(row) for row in MAPS[map_name]])
        self.slip, self.proximity, self.horizon = slip, proximity, horizon
        self.drift = np.random.default_rng(current).dirichlet(np.ones(4), self.letters.size)
        """[C, 4] probability of each direction when the ice carries the walker."""
        self.goal = int(np.flatnonzero(self.letters == "G")[0])
        self.observation_space = gym.spaces.Box(0.0, 1.0, (self.letters.size,), np.float32)
        self.action_space = gym.spaces.Discrete(4)

    def half_transition(self, cell: int, action: int) -> tuple[int, float]:
        """f(s, a) and the reward of that half. Pure; the drift uses it too, so a step is two of these at most."""
        rows, columns = self.letters.shape
        row, column = np.clip(np.array(divmod(cell, columns)) + STEPS[action], 0, (rows - 1, columns - 1)).tolist()
        reached = row * columns + column
        return reached, self._reward(reached)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell = int(np.flatnonzero(self.letters == "S")[0])
        self.time = 0
        return self.encode(self.cell), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise ValueError(f"expected an action in 0..3 (left, down, right, up), found {action}")
        post, decision = self.half_transition(self.cell, int(action))
        outcome = 0.0
        self.cell = post
        if not self.ended(post) and self.np_random.random() < self.slip:
            self.cell, outcome = self.half_transition(post, int(self.np_random.choice(4, p=self.drift[post])))
        self.time += 1
        info = {
            "post_observation": self.encode(post),
            "reward_decision": decision,
            "reward_outcome": outcome,
            "cell": self.cell,
        }
        return self.encode(self.cell), decision + outcome, self.ended(self.cell), self.time >= self.horizon, info

    def ended(self, cell: int) -> bool:
        """Whether the walk ends on this cell: a hole or the goal."""
        return bool(self.letters.flat[cell] in ("H", "G"))

    def encode(self, cell: int) -> NDArray[np.float32]:
        """[C] one-hot of a cell."""
        return np.eye(self.letters.size, dtype=np.float32)[cell]

    def process(self) -> PostDecisionProcess:
        """The lake in tables: states and post-decision states are cells."""
        cells = self.letters.size
        reached = [[(s, 0.0) if self.ended(s) else self.half_transition(s, a) for a in range(4)] for s in range(cells)]
        post = torch.tensor([[cell for cell, _ in row] for row in reached])
        reward = torch.tensor([[paid for _, paid in row] for row in reached], dtype=torch.float64)
        drift, every = torch.from_numpy(self.drift) * self.slip, torch.eye(cells, dtype=torch.float64)
        ends = torch.tensor([self.ended(s) for s in range(cells)])
        slipped = (drift[..., None] * every[post]).sum(1) + (1 - self.slip) * every
        return PostDecisionProcess(
            post=post,
            reward_decision=reward,
            outcome=torch.where(ends[:, None], every, slipped),
            reward_outcome=torch.where(ends, 0.0, (drift * reward).sum(1)),
            initial=every[int(np.flatnonzero(self.letters == "S")[0])],
        )

    def _reward(self, cell: int) -> float:
        rows, columns = self.letters.shape
        if cell == self.goal:
            return 1.0
        (row, column), (goal_row, goal_column) = divmod(cell, columns), divmod(self.goal, columns)
        near = 1.0 / (1.0 + abs(goal_row - row) + abs(goal_column - column))
        return self.proximity * (near - (self.letters.flat[cell] == "H") / (rows + columns))
