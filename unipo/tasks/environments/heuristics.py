"""What a sensible person would do in each environment: baselines to beat, from the observation alone.

Every one is made for an environment and maps an observation to an action. None of them learns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipo.tasks.environments.indicators import NAMES
from unipo.tasks.environments.lot_sizing import LotSizing
from unipo.tasks.environments.portfolio import Portfolio
from unipo.tasks.environments.ride_dispatch import EACH, OWN, RideDispatch

Heuristic = Callable[[NDArray[np.float32]], Any]


def equal_weight(env: Portfolio) -> Heuristic:
    """Buy all assets alike until the cash is gone, and keep them."""
    action = np.full(env.orders.size(len(env.market.esg)), -1.0, dtype=np.float32)
    action[: len(env.market.esg)] = 1.0
    return lambda observation: action


def trend_following(env: Portfolio, fallen: float = 0.015) -> Heuristic:
    """Equal weights, but everything is sold while closes are on average `fallen` (a share) below their mean of 30 days."""
    assets, bought = len(env.market.esg), equal_weight(env)
    first = 1 + 2 * assets + NAMES.index("close_30_sma") * assets
    sold = np.full(env.orders.size(assets), -1.0, dtype=np.float32)
    sold[assets:] = 1.0

    def act(observation: NDArray[np.float32]) -> Any:
        return sold if observation[first : first + assets].mean() > 10 * fallen else bought(observation)

    return act


def base_stock(env: LotSizing, low: int = 2, full: int = 6) -> Heuristic:
    """One machine: go on with an item up to `full` units; change to the scarcest when it is below `low`; else stand idle."""
    if env.machines != 1:
        raise ValueError(f"base_stock is for 1 machine, found {env.machines}")

    def act(observation: NDArray[np.float32]) -> Any:
        stock = np.rint(observation[: env.items] * env.plant.capacity)
        now, scarcest = int(observation[env.items :].argmax()), int(stock.argmin())
        if stock[scarcest] < low and not (now and stock[now - 1] < low):
            return np.array([scarcest + 1])
        return np.array([now if now and stock[now - 1] < full else 0])

    return act


def best_net_fare(env: RideDispatch, time_value: float = 0.6) -> Heuristic:
    """Every vehicle for itself: the largest fare - fuel * pick-up - time_value * (pick-up + trip), if it is above 0."""

    def act(observation: NDArray[np.float32]) -> Any:
        there, _, _, pickup, trip, fare = np.moveaxis(observation[:, OWN:].reshape(len(observation), -1, EACH), -1, 0)
        time = 2 * env.side * (pickup + trip)
        net = fare * env.highest_fare - env.fuel * 2 * env.side * pickup - time_value * time
        net = np.concatenate([np.zeros((len(net), 1)), np.where(there > 0, net, -np.inf)], axis=1)
        return net.argmax(1)

    return act
