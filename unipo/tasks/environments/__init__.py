"""Our environments, as Gymnasium ids: `register()`, then `gymnasium.make("unipo/Portfolio-v0", kappa=1.0)`.

unipo/Portfolio-v0               stocks, orders in shares; unipo/PortfolioWeights-v0: orders from a target portfolio
unipo/LotSizing-v0               production before demand: post-decision states in `info`
unipo/PostDecisionFrozenLake-v0  a walk on ice, in two halves
unipo/CartPoleHidden-v0          CartPole that shows positions and no velocities: something to remember
unipo/RideDispatch-v0            vehicles that choose orders, by `gymnasium.make_vec`: one sub-environment per vehicle

`heuristics` has a sensible policy for each, to beat; `process()` of the small ones has their exact tables.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from unipo.tasks.environments.cart_pole_hidden import CartPoleHidden
from unipo.tasks.environments.frozen_lake import PostDecisionFrozenLake
from unipo.tasks.environments.lot_sizing import LotSizing, Plant, PlantState
from unipo.tasks.environments.market import Market
from unipo.tasks.environments.portfolio import Performance, Portfolio, Shares, Weights, performance
from unipo.tasks.environments.post_decision import PostDecisionProcess
from unipo.tasks.environments.ride_dispatch import RideDispatch

HERE = "unipo.tasks.environments"
SINGLE: dict[str, tuple[str, dict[str, Any]]] = {
    "unipo/Portfolio-v0": (f"{HERE}.portfolio:Portfolio", {}),
    "unipo/PortfolioWeights-v0": (f"{HERE}.portfolio:Portfolio", {"orders": Weights()}),
    "unipo/LotSizing-v0": (f"{HERE}.lot_sizing:LotSizing", {}),
    "unipo/PostDecisionFrozenLake-v0": (f"{HERE}.frozen_lake:PostDecisionFrozenLake", {}),
    "unipo/CartPoleHidden-v0": (f"{HERE}.cart_pole_hidden:CartPoleHidden", {}),
}
VECTOR = {"unipo/RideDispatch-v0": f"{HERE}.ride_dispatch:RideDispatch"}
IDS = (*SINGLE, *VECTOR)
"""Every id that `register` adds."""


def register() -> None:
    """Adds the ids to Gymnasium's registry; those that are there already stay as they are."""
    for name, (entry_point, settings) in SINGLE.items():
        if name not in gym.registry:
            gym.register(name, entry_point=entry_point, kwargs=settings)
    for name, entry_point in VECTOR.items():
        if name not in gym.registry:
            gym.register(name, vector_entry_point=entry_point)


__all__ = [
    "IDS",
    "CartPoleHidden",
    "LotSizing",
    "Market",
    "Performance",
    "Plant",
    "PlantState",
    "Portfolio",
    "PostDecisionFrozenLake",
    "PostDecisionProcess",
    "RideDispatch",
    "Shares",
    "Weights",
    "performance",
    "register",
]
