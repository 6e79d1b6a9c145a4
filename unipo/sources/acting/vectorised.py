"""Copies of well-known environments computed together: the operations of Gymnasium in its order, and so its numbers.

An environment is known by its very class, unchanged and under the wrappers of `gymnasium.make` alone. Whatever is known is
compared with Gymnasium's own step before it is used; where a number differs, environments are stepped one by one.
Legend: n copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipo.sources.acting.computations import COMPUTATIONS, Computation
from unipo.sources.acting.stepping import Flattened, Maker, Outcome, Together

Array = NDArray[Any]
PROBE = 256
"""Steps, of all copies together, in which a computation has to agree with Gymnasium before it is trusted."""


class Vectorised(Together):
    """Steps by a `Computation`; resets and replays by the environments themselves, whose states it then adopts."""

    def __init__(self, envs: Sequence[Flattened], computed: Computation) -> None:
        super().__init__(envs)
        self.computed = computed
        self._limit = envs[0].limit
        self._steps = np.zeros(len(envs), dtype=np.int64)

    def step(self, native: Array) -> Outcome:
        observation, reward, terminated = self.computed.step(native)
        self._steps += 1
        return Outcome(observation, reward, terminated, self._steps >= self._limit, {})

    def reset(self, which: Array, seeds: Sequence[int]) -> Array:
        begun = super().reset(which, seeds)
        for i in np.flatnonzero(which).tolist():
            self._adopt(i)
        return begun

    def replay(self, seeds: Sequence[int], episodes: Sequence[int], actions: Sequence[Array]) -> Array:
        reached = super().replay(seeds, episodes, actions)
        for i in range(len(self.envs)):
            self._adopt(i)
        return reached

    def _adopt(self, i: int) -> None:
        self.computed.adopt(i)
        self._steps[i] = self.envs[i].steps


def together(makers: Sequence[Maker]) -> Together:
    """The fastest way to step these environments in this process that gives their own numbers."""
    envs = [make() for make in makers]
    kinds = {type(env.inner) for env in envs}
    kind = min(kinds, key=str)
    make = COMPUTATIONS.get(f"{kind.__module__}:{kind.__qualname__}")
    known = make is not None and len(kinds) == 1 and not envs[0].info_columns and all(map(plain, envs))
    computed = make([env.inner for env in envs]) if make is not None and known else None
    if computed is None:
        return Together(envs)
    if agree(envs, computed):
        return Vectorised(envs, computed)
    warnings.warn(
        f"{kind.__name__}: computed together it is not what Gymnasium computes; stepped one by one", stacklevel=2
    )
    return Together([make() for make in makers])


def plain(env: Flattened) -> bool:
    """Nobody watches it, changed its class, or put something of their own into it."""
    inner = env.inner
    changed = {name for name, value in vars(inner).items() if callable(value) and hasattr(type(inner), name)}
    return inner.render_mode is None and not changed


def agree(envs: Sequence[Flattened], computed: Computation) -> bool:
    """Whether both ways to step them, from the same states with the same actions, give the same numbers, bit for bit, and
    end in the same states."""
    space, n = envs[0].inner.action_space, len(envs)
    space.seed(0)
    actions = [np.stack([space.sample() for _ in range(n)]) for _ in range(max(4, PROBE // n))]
    found, reached = trace(Vectorised(envs, computed), actions), computed.state.copy()
    wanted = trace(Together(envs), actions)
    for i, env in enumerate(envs):
        computed.adopt(i)
        env.episode = -1
    pairs = [pair for w, f in zip(wanted, found, strict=True) for pair in zip(w[:4], f[:4], strict=True)]
    return all(np.array_equal(a, b) for a, b in [(computed.state, reached), *pairs])


def trace(stepper: Together, actions: Sequence[Array]) -> list[Outcome]:
    """What happens from seeded resets on."""
    n, outcomes = len(stepper.envs), []
    stepper.reset(np.ones(n, dtype=bool), range(n))
    for action in actions:
        outcomes.append(stepper.step(action))
        stepper.reset(outcomes[-1].terminated | outcomes[-1].truncated, range(n))
    return outcomes
