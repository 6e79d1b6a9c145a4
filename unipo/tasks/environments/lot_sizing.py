"""`unipo/LotSizing-v0`: which item does each machine produce today, when demand is drawn only after the decision?

The stochastic discrete lot-sizing problem of post-decision PPO (arXiv 2504.05150, row 172). One period:

    s = (inventory, setup)                          what is in stock, and what each machine is set up for (0: idle)
    s^x = f(s, a)                                   decision: change over, produce. Deterministic: `Plant.half_transition`
    r^x = - setup costs
    d ~ Poisson(demand)                             outcome: demand arrives
    s' = max(s^x - d, 0),  r = r^x - holding cost of s' - cost of sales lost to an empty shelf

Sizes: I items, M machines. Amounts are whole units, costs are money per period, rewards are minus costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import poisson

from unipo.tasks.environments.post_decision import LARGEST, PostDecisionProcess

Whole = NDArray[np.int64]
Real = NDArray[np.float64]


class PlantState(NamedTuple):
    """A state of the plant, before or after the decision."""

    inventory: Whole
    """[I] units in stock, 0..capacity."""
    setup: Whole
    """[M] the item each machine is set up for, 1..I; 0: idle, which loses the set-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """The model without its randomness: every function here is pure."""

    capacity: Whole
    """[I] units that fit on each shelf."""
    production: Whole
    """[M, I] units per period."""
    setup_loss: Whole
    """[M, I] units lost in the period of a change to that item."""
    setup_cost: Real
    """[M, I] money per change to that item."""
    holding_cost: Real
    """[I] money per unit left at the end of a period."""
    lost_sales_cost: Real
    """[I] money per unit asked for and not there."""

    def half_transition(self, state: PlantState, action: ArrayLike) -> tuple[PlantState, float]:
        """s^x = f(s, a) and r^x(s, a), of the decision `action` [M]: the item to produce, 0 for none.

        A machine that changes pays once and loses part of the period; what does not fit on the shelf is thrown away. The
        paper's code throws it away after demand instead; here s^x is always a state.
        """
        chosen = np.asarray(action, dtype=np.int64)
        machine = np.flatnonzero(chosen)
        item = chosen[machine] - 1
        changed = state.setup[machine] != chosen[machine]
        produced = np.zeros_like(state.inventory)
        np.add.at(produced, item, self.production[machine, item] - changed * self.setup_loss[machine, item])
        cost = float((changed * self.setup_cost[machine, item]).sum())
        return PlantState(np.minimum(state.inventory + produced, self.capacity), chosen.copy()), -cost

    def settle(self, post: PlantState, demand: ArrayLike) -> tuple[PlantState, float]:
        """s' and the outcome's reward, once the demand [I] of a post-decision state is known."""
        after = post.inventory - np.asarray(demand, dtype=np.int64)
        left, lost = np.maximum(after, 0), np.maximum(-after, 0)
        return PlantState(left, post.setup), -float(self.holding_cost @ left + self.lost_sales_cost @ lost)


class LotSizing(gym.Env[NDArray[np.float32], NDArray[np.int64]]):
    """The plant as a Gymnasium environment.

    Observation, `Box(0, 1, [I + M (I + 1)])`: each item's stock as a share of its shelf, then one one-hot per machine of
    what it is set up for (idle first). Action, `MultiDiscrete([I + 1] * M)`: the item each machine produces, 0 for none.
    Every start is random: stock uniform in 0..capacity, set-up uniform over items. `horizon` periods, then truncated: the
    plant goes on, so a value is to be bootstrapped there.

    `info` of every step: `post_observation`, s^x in the coordinates of the observation; `reward_decision` r^x and
    `reward_outcome`, whose sum is the reward (both in money); `demand` [I].

    Args:
        items, machines: I and M.
        horizon: periods of an episode.
        demand: mean demand per period, one number or [I].
        capacity, holding_cost, lost_sales_cost: one number or [I].
        production, setup_loss, setup_cost: one number, [I] or [M, I].

    Raises:
        ValueError: for sizes below 1, negative amounts, or a set-up that loses more than a period produces.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        *,
        items: int = 2,
        machines: int = 1,
        horizon: int = 100,
        demand: ArrayLike = 1.0,
        capacity: ArrayLike = 10,
        production: ArrayLike = 4,
        setup_loss: ArrayLike = 1,
        setup_cost: ArrayLike = 1.0,
        holding_cost: ArrayLike = 0.1,
        lost_sales_cost: ArrayLike = 2.0,
    ) -> None:
        for name, size in (("items", items), ("machines", machines), ("horizon", horizon)):
            if size < 1:
                raise ValueError(f"{name}: expected 1 or more, found {size}")
        each, pairs = (items,), (machines, items)
        self.items, self.machines, self.horizon = items, machines, horizon
        self.demand: Real = _filled("demand", demand, each)
        self.plant = Plant(
            capacity=_whole("capacity", capacity, each),
            production=_whole("production", production, pairs),
            setup_loss=_whole("setup_loss", setup_loss, pairs),
            setup_cost=_filled("setup_cost", setup_cost, pairs),
            holding_cost=_filled("holding_cost", holding_cost, each),
            lost_sales_cost=_filled("lost_sales_cost", lost_sales_cost, each),
        )
        if (self.plant.capacity < 1).any():
            raise ValueError(f"capacity: expected 1 or more units of each item, found {self.plant.capacity.tolist()}")
        if (self.plant.setup_loss > self.plant.production).any():
            raise ValueError(
                "setup_loss: expected at most what a period produces, found more; lower it or raise production"
            )
        size = items + machines * (items + 1)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (size,), np.float32)
        self.action_space = gym.spaces.MultiDiscrete([items + 1] * machines)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        inventory = self.np_random.integers(0, self.plant.capacity + 1)
        self.state = PlantState(inventory, self.np_random.integers(1, self.items + 1, self.machines))
        self.period = 0
        return self.encode(self.state), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(np.asarray(action, dtype=np.int64)):
            raise ValueError(f"expected {self.machines} whole numbers in 0..{self.items}, found {action}")
        post, decision = self.plant.half_transition(self.state, action)
        demand = self.np_random.poisson(self.demand)
        self.state, outcome = self.plant.settle(post, demand)
        self.period += 1
        info = {
            "post_observation": self.encode(post),
            "reward_decision": decision,
            "reward_outcome": outcome,
            "demand": demand,
        }
        return self.encode(self.state), decision + outcome, False, self.period >= self.horizon, info

    def number(self, state: PlantState) -> int:
        """The row of a state in the tables of `process`."""
        return int(np.ravel_multi_index((*state.inventory, *state.setup), self._sizes))

    def process(self) -> PostDecisionProcess:
        """The plant in tables, exact. Actions in the order of itertools.product; raises ValueError when it is too large."""
        if (states := int(np.prod(self._sizes))) > LARGEST:
            raise ValueError(
                f"{states:,} states cannot be enumerated: at most {LARGEST:,}, so take fewer items or a lower capacity"
            )
        every = [
            PlantState(row[: self.items], row[self.items :])
            for row in np.indices(self._sizes).reshape(len(self._sizes), -1).T
        ]
        choices = list(np.ndindex(*[self.items + 1] * self.machines))
        halves = [[self.plant.half_transition(state, choice) for choice in choices] for state in every]
        outcome, reward = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for i in range(self.items):
            sold, paid = self._shelf(i)
            outcome, reward = torch.kron(outcome, sold), (reward[:, None] + paid).flatten()
        setups = (self.items + 1) ** self.machines
        starts = torch.tensor([float((state.setup > 0).all()) for state in every], dtype=torch.float64)
        return PostDecisionProcess(
            post=torch.tensor([[self.number(post) for post, _ in row] for row in halves]),
            reward_decision=torch.tensor([[paid for _, paid in row] for row in halves], dtype=torch.float64),
            outcome=torch.kron(outcome, torch.eye(setups, dtype=torch.float64)),
            reward_outcome=reward.repeat_interleave(setups),
            initial=starts / starts.sum(),
        )

    def _shelf(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of item i: P(stock after | stock before) [c + 1, c + 1] and the mean reward [c + 1] of each stock before demand."""
        stock = np.arange(self.plant.capacity[i] + 1)
        left = poisson.pmf(stock[:, None] - stock, self.demand[i])
        left[:, 0] = poisson.sf(stock - 1, self.demand[i])
        lost = self.demand[i] - (stock - left @ stock)
        reward = -(self.plant.holding_cost[i] * (left @ stock) + self.plant.lost_sales_cost[i] * lost)
        return torch.from_numpy(left), torch.from_numpy(reward)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (*(self.plant.capacity + 1).tolist(), *[self.items + 1] * self.machines)

    def encode(self, state: PlantState) -> NDArray[np.float32]:
        """A state, before or after the decision, as the observation [I + M (I + 1)]."""
        setup = np.eye(self.items + 1)[state.setup]
        return np.concatenate([state.inventory / self.plant.capacity, setup.ravel()]).astype(np.float32)


def _filled(name: str, given: ArrayLike, shape: tuple[int, ...]) -> Real:
    try:
        found = np.broadcast_to(np.asarray(given, dtype=np.float64), shape)
    except ValueError as error:
        wanted = f"one number or numbers of shape {list(shape)}"
        raise ValueError(f"{name}: expected {wanted}, found shape {list(np.shape(given))}") from error
    if not (np.isfinite(found) & (found >= 0)).all():
        raise ValueError(f"{name}: expected finite numbers of 0 or more, found {found.tolist()}")
    return found


def _whole(name: str, given: ArrayLike, shape: tuple[int, ...]) -> Whole:
    found = _filled(name, given, shape)
    if (found % 1 != 0).any():
        raise ValueError(f"{name}: expected whole units, found {found.tolist()}")
    return found.astype(np.int64)
