"""Spaces of environments, as policies see them: observations are vectors, actions are integers from 0 or numbers around 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from unipo.sources.acting.environment_errors import TaskEnvironmentError

Array = NDArray[Any]
_INTEGER: np.dtype[Any] = np.dtype(np.int64)
_FAR = 1e6
"""Limits beyond are none: some boxes name the largest float."""


@dataclass(frozen=True, slots=True)
class ObservationSpec:
    """Observations as vectors of `size` numbers."""

    size: int

    @classmethod
    def of(cls, space: spaces.Space[Any]) -> ObservationSpec:
        """Raises TaskEnvironmentError for a space (or a part of it) that has no vector of fixed size."""
        for part in _leaves(space):
            if not isinstance(part, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
                raise TaskEnvironmentError(
                    f"observation space {space} is not supported because of {part}: expected Box, Discrete, MultiDiscrete, "
                    "MultiBinary, or a Dict or Tuple of these; wrap the environment to return one of them"
                )
        return cls(spaces.flatdim(space))


def _leaves(space: spaces.Space[Any]) -> list[spaces.Space[Any]]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return [leaf for part in parts for leaf in _leaves(part)]
    return [space]


def _nothing() -> Array:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class ActionSpec:
    """What a policy has to give: `kind` is categorical, multi_categorical or box.

    `size`: choices of a categorical action, else the length of the action vector. `sizes`: choices per component.
    `low`, `high` [size]: limits of the box; components with two limits (within +-1e6) are mapped from [-1, 1] by
    centre + half * action, the others are taken as they are. `bounded`: that is every component. `masked`: the last `size`
    numbers of an observation are 1 where that choice may be made, else 0.
    """

    kind: str
    size: int
    sizes: tuple[int, ...] = ()
    low: Array = field(default_factory=_nothing)
    high: Array = field(default_factory=_nothing)
    centre: Array = field(default_factory=_nothing)
    half: Array = field(default_factory=_nothing)
    bounded: bool = True
    start: Array | int = 0
    shape: tuple[int, ...] = ()
    dtype: np.dtype[Any] = _INTEGER
    masked: bool = False
    _choices: Array = field(init=False, repr=False)
    _shifted: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_choices", np.array(self.sizes, dtype=np.uint64))
        object.__setattr__(self, "_shifted", bool(np.any(self.start)))

    @classmethod
    def of(cls, space: spaces.Space[Any]) -> ActionSpec:
        """Raises TaskEnvironmentError for any other space than Box, Discrete, MultiDiscrete and MultiBinary."""
        if isinstance(space, spaces.Discrete):
            return cls("categorical", int(space.n), (int(space.n),), start=int(space.start))
        if isinstance(space, spaces.MultiDiscrete):
            sizes, start = tuple(int(n) for n in space.nvec.flat), space.start.reshape(-1)
            return cls("multi_categorical", len(sizes), sizes, start=start, shape=space.shape, dtype=space.dtype)
        if isinstance(space, spaces.MultiBinary):
            size = int(np.prod(space.shape))
            return cls("multi_categorical", size, (2,) * size, shape=space.shape, dtype=space.dtype)
        if isinstance(space, spaces.Box):
            return cls._of_box(space)
        raise TaskEnvironmentError(
            f"action space {space} is not supported: expected Box, Discrete, MultiDiscrete or MultiBinary; wrap the environment"
        )

    @classmethod
    def _of_box(cls, space: spaces.Box) -> ActionSpec:
        low, high = (x.reshape(-1).astype(np.float32) for x in (space.low, space.high))
        if not (low <= high).all():
            raise TaskEnvironmentError(f"action space {space} has limits {low} and {high}: expected low <= high")
        limited = (low > -_FAR) & (high < _FAR)
        centre, half = np.zeros_like(low), np.ones_like(low)
        centre[limited], half[limited] = (low[limited] + high[limited]) / 2, (high[limited] - low[limited]) / 2
        return cls(
            "box", low.size, (), low, high, centre, half, bool(limited.all()), shape=space.shape, dtype=space.dtype
        )

    def native(self, action: Array) -> Array:
        """[n, ...] actions of a policy to [n, *shape] actions of the environment. Raises ValueError where they are no actions."""
        if self.kind == "box":
            native = np.multiply(action, self.half)
            native += self.centre
            np.minimum(np.maximum(native, self.low, out=native), self.high, out=native)
            if not finite(native):
                raise ValueError(f"the policy gave a NaN action: {action.tolist()}; its parameters have diverged")
            native = native.round() if self.dtype.kind in "iu" else native
        else:
            unsigned = action.astype(np.int64, copy=False).view(np.uint64)  # what is below 0 is then very large
            if np.count_nonzero(unsigned >= self._choices):
                raise ValueError(f"the policy chose {action.tolist()}: expected integers from 0 to below {self.sizes}")
            native = action + self.start if self._shifted else action
        native = native.astype(self.dtype, copy=False)
        return native if native.shape[1:] == self.shape else native.reshape(len(action), *self.shape)

    def normalised(self, native: Array) -> Array:
        """The inverse of `native`: [n, *shape] actions of the environment in the policy's units, [n] or [n, size]."""
        flat = native.reshape(len(native), -1)
        if self.kind == "box":
            half = np.where(self.half > 0, self.half, np.float32(1))
            return ((flat - self.centre) / half).astype(np.float32)
        chosen = flat.astype(np.int64) - self.start
        return chosen[:, 0] if self.kind == "categorical" else chosen


def finite(x: Array) -> bool:
    """No NaN and no infinity: they survive a sum of squares, which is quick; where that overflows, look at each."""
    flat = x.ravel()
    return isfinite(flat.dot(flat)) or bool(np.isfinite(flat).all())
