"""The actions of the episodes that are running: what a state of environments is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Histories:
    """One array [time, n, *shape] that all environments write to; each knows when its episode began.

    Memory is that of the longest running episode, times n, at most doubled.
    """

    def __init__(self, num: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._rows = np.empty((64, num, *shape), dtype)
        self._time = 0
        self._begun = np.zeros(num, dtype=np.int64)

    def append(self, action: Array) -> None:
        """Everybody did `action` [n, *shape]."""
        if self._time == len(self._rows):
            self._make_room()
        self._rows[self._time] = action
        self._time += 1

    def begin(self, which: Array) -> None:
        """New episodes in the environments `which` [n] bool."""
        self._begun[which] = self._time

    def length(self, env: int) -> int:
        """Steps of the running episode."""
        return self._time - int(self._begun[env])

    def of(self, env: int) -> Array:
        """[steps, *shape]: the actions of the running episode; what is appended later does not change them."""
        return self._rows[self._begun[env] : self._time, env]

    def load(self, actions: Sequence[Sequence[Any]]) -> None:
        """What `of` gave, for every environment."""
        shape, dtype = self._rows.shape[2:], self._rows.dtype
        lengths = np.array([len(each) for each in actions], dtype=np.int64)
        self._time = int(lengths.max())
        self._begun = self._time - lengths
        self._rows = np.empty((max(64, 2 * self._time), len(actions), *shape), dtype)
        for env, each in enumerate(actions):
            self._rows[self._begun[env] : self._time, env] = np.asarray(each, dtype=dtype).reshape(len(each), *shape)

    def _make_room(self) -> None:
        """Forget what no running episode needs; twice the room where that is more than half. Given-out actions stay."""
        oldest = int(self._begun.min())
        kept, room = self._rows[oldest:], len(self._rows)
        self._rows = np.empty((2 * room if 2 * len(kept) > room else room, *kept.shape[1:]), kept.dtype)
        self._rows[: len(kept)] = kept
        self._time -= oldest
        self._begun -= oldest
