"""A search of several knobs at once inside one run: each proposal is trained with for a while, and then scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from unipo.functional.simplex import Point, nelder_mead
from unipo.sources.controllers import Controller, State
from unipo.sources.keyed import keyed_generator


@dataclass(frozen=True, kw_only=True)
class SimplexSearch(Controller):
    """Coordinate `axis` of a Nelder-Mead search for targets of `metrics` with the largest `score` (arXiv 2310.04373, NM-PPO).

    A proposal is in force for `patience` steps, or until the means of the metrics over the last `every` steps all are within a
    share `within` of it; then it is worth the mean of `score` over those steps. The policy is trained on all the while: a
    proposal is scored where those before it have led. `low`, `high`: corners between which the first n + 1 proposals are drawn
    (by `seed`). Values of points within `near` are taken over; the search ends after `most` proposals, or when their spread is
    below `spread`, and stays at the best. `patience` 0: a tenth of the run. Every axis has a controller of its own: they are
    told the same, and so agree.
    """

    axis: int = 0
    metrics: tuple[str, ...] = ("reward",)
    score: str = "gold"
    low: Point = (0.0,)
    high: Point = (1.0,)
    patience: int = 0
    every: int = 5
    within: float = 0.05
    near: float = 5e-3
    spread: float = 0.01
    most: int = 10
    seed: int = 0

    def lasting(self, steps: int) -> Controller:
        return self if self.patience else replace(self, patience=max(1, steps // 10))

    def start(self) -> State:
        return {"proposals": 0.0, "steps": 0.0} | self._blank()

    def setting(self, state: State, step: int) -> float:
        return self.point(state)[self.axis]

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        now = [metrics.get(name, math.nan) for name in (self.score, *self.metrics)]
        if not all(map(math.isfinite, now)) or self._over(state):
            return state
        state = state | {"steps": state["steps"] + 1, "seen": state["seen"] + 1}
        state |= {f"sum{i}": state[f"sum{i}"] + x for i, x in enumerate(now)}
        if state["seen"] < self.every and state["steps"] < self.patience:
            return state
        score, *reached = (state[f"sum{i}"] / state["seen"] for i in range(len(now)))
        point = self.point(state)
        there = all(abs(x - t) <= self.within * abs(t) for x, t in zip(reached, point, strict=True))
        if not there and state["steps"] < self.patience:
            return state | self._blank()
        n = int(state["proposals"])
        told = {f"point{n}.{i}": x for i, x in enumerate(point)} | {f"score{n}": score}
        return state | told | {"proposals": n + 1.0, "steps": 0.0} | self._blank()

    def point(self, state: State) -> Point:
        """The proposal in force."""
        told = self._told(state)
        best = max(told, key=lambda found: found[1])[0] if told else ()
        if self._over(state):
            return best
        search = nelder_mead(self._first(), near=self.near, spread=self.spread)
        try:
            asked = next(search)
            for _, score in told:
                asked = search.send(score)
        except StopIteration:
            return best
        return asked

    def _told(self, state: State) -> Sequence[tuple[Point, float]]:
        size = len(self.metrics)
        return [
            (tuple(state[f"point{n}.{i}"] for i in range(size)), state[f"score{n}"])
            for n in range(int(state["proposals"]))
        ]

    def _over(self, state: State) -> bool:
        return state["proposals"] >= self.most

    def _first(self) -> list[Point]:
        """n + 1 points, uniform between the corners."""
        size = len(self.metrics)
        shares = keyed_generator(self.seed, "simplex").random((size + 1, size)).tolist()
        return [tuple(a + u * (b - a) for u, a, b in zip(row, self.low, self.high, strict=True)) for row in shares]

    def _blank(self) -> State:
        return {"seen": 0.0} | {f"sum{i}": 0.0 for i in range(1 + len(self.metrics))}
