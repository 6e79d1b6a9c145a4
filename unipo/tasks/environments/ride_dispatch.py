"""`RideDispatch`: homogeneous vehicles on a grid that share one policy; all choose an order at once, each has its own reward.

The order dispatch of one-step policy optimisation (arXiv 2507.15351, row 31), small. One decision time t:

    every idle vehicle sees its K nearest open orders and chooses one, or 0 to wait; busy vehicles drive on
    an order goes to the nearest vehicle that chose it (equal distances: a fair draw); the others wait
    r_i = fare - fuel * pick-up distance for a matched vehicle, 0 for the rest
    a matched vehicle is busy for pick-up + trip times, and then idle where the trip ends
    orders that waited `patience` times leave; Poisson(rate) new ones come

Sizes: A vehicles, K candidates, S the side of the grid. Distances in cells (Manhattan), one cell per time, fares in money.
Fare = (1 + trip length) * u with u ~ Uniform(1 - spread, 1 + spread); trips start mostly in the centre and end anywhere else.

It is a Gymnasium vector environment whose sub-environments are the vehicles: observation [A, D], action, reward, terminated [A].
A group of the paper is one (simulator, time): the rows with `info["acted"]` of one step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Real = NDArray[np.float64]
Whole = NDArray[np.int64]
Yes = NDArray[np.bool_]
OWN, EACH = 4, 6
"""Numbers in an observation about the vehicle, and about each candidate."""


class Orders(NamedTuple):
    """Open orders, the oldest first. O of them."""

    origin: Whole
    """[O, 2] row, column."""
    destination: Whole
    """[O, 2], never the origin."""
    fare: Real
    """[O] money."""
    age: Whole
    """[O] times waited."""

    def take(self, index: NDArray[Any]) -> Orders:
        return Orders(*(column[index] for column in self))

    def then(self, later: Orders) -> Orders:
        return Orders(*(np.concatenate(columns) for columns in zip(self, later, strict=True)))


class RideDispatch(VectorEnv[Any, Any, Any]):
    """The simulator. `num_envs` vehicles; `reset(seed=...)` and the actions determine everything.

    Observation of a vehicle, `Box(-1, 1, [4 + 6 K])`: row, column (where it is, or will be when idle again) in 0..1, times until
    idle / (4 S), time / horizon; then per candidate, the nearest first: 1, row and column offset / S, pick-up distance / (2 S),
    trip length / (2 S), fare / highest fare; zeros where there is none. Action, `Discrete(K + 1)`: 0 waits, k takes the k-th
    candidate; a candidate that is not there and the choice of a busy vehicle count as 0.

    All vehicles terminate together after `horizon` times (the end of the shift, visible in the observation, ends what can be
    earned); the step after that ignores its actions and resets (Gymnasium's next-step mode).

    `info` of reset and step: `action_mask` [A, K + 1] bool, of the observation beside it. `info` of step, of the decision just
    taken: `acted` [A] bool, idle vehicles, whose choice counted (train on these rows only; all False in the resetting step);
    `served` [A] bool; `duration` [A], times until the vehicle's next decision (1 for one that waits; 0 where not acted); `time`.

    Counts of the running episode: `arrived` = `served` + `expired` + open orders, at any time.

    Args:
        num_envs: vehicles. side: S. candidates: K. horizon: decision times. rate: mean new orders per time.
        patience: times an order waits. fuel: money per cell of pick-up. spread: how much fares of equal trips differ.

    Raises:
        ValueError: for sizes below 1 (side: 2), a negative rate or fuel, a spread outside 0..1, a wrong action.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}

    def __init__(
        self,
        num_envs: int = 20,
        *,
        side: int = 5,
        candidates: int = 5,
        horizon: int = 30,
        rate: float = 8.0,
        patience: int = 3,
        fuel: float = 0.5,
        spread: float = 0.9,
    ) -> None:
        sizes = {
            "num_envs": num_envs,
            "candidates": candidates,
            "horizon": horizon,
            "patience": patience,
            "side": side - 1,
        }
        if small := [name for name, size in sizes.items() if size < 1]:
            raise ValueError(f"expected 1 or more (side: 2 or more), found less for {', '.join(small)}")
        if not rate >= 0 or not fuel >= 0:
            raise ValueError(f"expected rate >= 0 and fuel >= 0, found {rate} and {fuel}")
        if not 0 <= spread <= 1:
            raise ValueError(f"spread: expected a number in 0..1, found {spread}")
        self.num_envs, self.side, self.candidates, self.horizon = num_envs, side, candidates, horizon
        self.rate, self.patience, self.fuel, self.spread = rate, patience, fuel, spread
        self.single_observation_space = gym.spaces.Box(-1.0, 1.0, (OWN + EACH * candidates,), np.float32)
        self.single_action_space = gym.spaces.Discrete(candidates + 1)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.highest_fare = (1 + spread) * (1 + 2 * (side - 1))
        self.cells: Whole = np.indices((side, side)).reshape(2, -1).T
        centre = np.exp(-np.abs(self.cells - (side - 1) / 2).sum(1) / side)
        self.popularity: Real = centre / centre.sum()
        """[S * S] where orders start."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time, self.arrived, self.served, self.expired = 0, 0, 0, 0
        self.place: Whole = self.np_random.integers(0, self.side, (self.num_envs, 2))
        self.busy: Whole = np.zeros(self.num_envs, dtype=np.int64)
        self.orders = self._arrivals()
        return self._observed(), {"action_mask": self.action_mask()}

    def step(self, actions: Any) -> tuple[Any, Real, Yes, Yes, dict[str, Any]]:
        nobody = np.zeros(self.num_envs, dtype=np.bool_)
        if self.time >= self.horizon:
            observation, info = self.reset()
            none = {"acted": nobody, "served": nobody.copy(), "duration": self.busy.copy(), "time": 0}
            return observation, np.zeros(self.num_envs), nobody.copy(), nobody.copy(), info | none
        acted = self.busy == 0
        order = self.match(self._chosen(actions))
        served, taken = order >= 0, order[order >= 0]
        pickup = np.abs(self.place[served] - self.orders.origin[taken]).sum(1)
        trip = np.abs(self.orders.destination[taken] - self.orders.origin[taken]).sum(1)
        reward = np.zeros(self.num_envs)
        reward[served] = self.orders.fare[taken] - self.fuel * pickup
        self.place[served] = self.orders.destination[taken]
        self.busy[served] = pickup + trip
        duration = np.where(acted, np.maximum(self.busy, 1), 0)
        info = {"acted": acted, "served": served, "duration": duration, "time": self.time}
        self._pass_time(taken)
        done = np.full(self.num_envs, self.time >= self.horizon)
        return self._observed(), reward, done, nobody, info | {"action_mask": self.action_mask()}

    def action_mask(self) -> Yes:
        """[A, K + 1] the choices that count: 0 always, candidates that are there for idle vehicles."""
        there = np.zeros((self.num_envs, self.candidates), dtype=np.bool_)
        there[:, : len(self.orders.age)] = (self.busy == 0)[:, None]
        return np.concatenate([np.ones((self.num_envs, 1), dtype=np.bool_), there], axis=1)

    def match(self, wanted: Whole) -> Whole:
        """[A] the order each vehicle gets, -1 for none, of the orders that it wants [A]: the nearest vehicle wins."""
        asking = np.flatnonzero(wanted >= 0)
        asking = asking[np.lexsort((self.np_random.random(len(asking)), self._pickup()[asking, wanted[asking]]))]
        order, first = np.unique(wanted[asking], return_index=True)
        got = np.full(self.num_envs, -1)
        got[asking[first]] = order
        return got

    def assign(self, score: Real) -> Whole:
        """Actions [A] of largest total score [A, K + 1] that want no order twice: the paper's matching on probabilities.

        Only choices that count are used. A probability stored from before this matching is not that of the action it returns.
        """
        nearest = self._nearest()
        counts = self.action_mask()[:, 1 : 1 + nearest.shape[1]]
        vehicle, candidate = np.nonzero(counts)
        cost = np.full((self.num_envs, len(self.orders.age) + self.num_envs), np.inf)
        cost[vehicle, nearest[vehicle, candidate]] = -score[vehicle, candidate + 1]
        np.fill_diagonal(cost[:, len(self.orders.age) :], -score[:, 0])
        order = linear_sum_assignment(cost)[1]
        chosen = np.concatenate(
            [np.zeros((self.num_envs, 1), dtype=np.bool_), counts & (nearest == order[:, None])], axis=1
        )
        return chosen.argmax(1)

    def _chosen(self, actions: Any) -> Whole:
        """[A] the open order that each vehicle wants, -1 for none."""
        choice = np.asarray(actions, dtype=np.int64)
        if choice.shape != (self.num_envs,) or choice.min() < 0 or choice.max() > self.candidates:
            raise ValueError(f"expected {self.num_envs} whole numbers in 0..{self.candidates}, found {actions}")
        vehicle = np.arange(self.num_envs)
        counts = (choice > 0) & self.action_mask()[vehicle, choice]
        wanted = np.full(self.num_envs, -1)
        wanted[counts] = self._nearest()[vehicle[counts], choice[counts] - 1]
        return wanted

    def _pickup(self) -> Whole:
        """[A, O] distances from vehicles to orders."""
        return np.abs(self.place[:, None] - self.orders.origin[None]).sum(-1)

    def _nearest(self) -> Whole:
        """[A, min(K, O)] the candidates of each vehicle, the nearest first, the older first among equals."""
        return np.argsort(self._pickup(), axis=1, kind="stable")[:, : self.candidates]

    def _pass_time(self, taken: Whole) -> None:
        """One time later: matched orders are gone, old ones leave, vehicles come nearer to being idle, new orders come."""
        self.time, self.busy, self.served = self.time + 1, np.maximum(self.busy - 1, 0), self.served + len(taken)
        left = self.orders.take(np.setdiff1d(np.arange(len(self.orders.age)), taken))
        left = left._replace(age=left.age + 1)
        waiting = left.age < self.patience
        self.expired += int((~waiting).sum())
        self.orders = left.take(waiting).then(self._arrivals())

    def _arrivals(self) -> Orders:
        """New orders, counted."""
        n = int(self.np_random.poisson(self.rate))
        start = self.np_random.choice(len(self.cells), n, p=self.popularity)
        end = (start + self.np_random.integers(1, len(self.cells), n)) % len(self.cells)
        trip = np.abs(self.cells[end] - self.cells[start]).sum(1)
        fare = (1 + trip) * self.np_random.uniform(1 - self.spread, 1 + self.spread, n)
        self.arrived += n
        return Orders(self.cells[start], self.cells[end], fare, np.zeros(n, dtype=np.int64))

    def _observed(self) -> NDArray[np.float32]:
        """[A, 4 + 6 K]"""
        clock = np.full((self.num_envs, 1), self.time / self.horizon)
        own = np.concatenate([self.place / (self.side - 1), self.busy[:, None] / (4 * self.side), clock], axis=1)
        nearest = self._nearest()
        seen = self.orders.take(nearest)
        trip = np.abs(seen.destination - seen.origin).sum(-1)
        offset = seen.origin - self.place[:, None]
        pickup = np.abs(offset).sum(-1)
        each = np.zeros((self.num_envs, self.candidates, EACH))
        each[:, : nearest.shape[1]] = np.stack(
            [
                np.ones(nearest.shape),
                *np.moveaxis(offset / self.side, -1, 0),
                pickup / (2 * self.side),
                trip / (2 * self.side),
                seen.fare / self.highest_fare,
            ],
            axis=-1,
        )
        return np.concatenate([own, each.reshape(self.num_envs, -1)], axis=1).astype(np.float32)
