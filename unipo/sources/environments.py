"""Gymnasium environments, stepped together. Resets are keyed, so that a run can be resumed in the middle of an episode.

Every observation becomes a float32 vector [d] (gymnasium.spaces.flatten). Policies act in their own units: integers from 0,
or, where a box is bounded, numbers in [-1, 1]; `ActionSpec.native` turns them into what the environment expects.
Terminated and truncated are kept apart, and what comes after a step is the state that the step led to, never a reset one.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray

from unipo.sources.environment_errors import EnvironmentFailure, TaskEnvironmentError, failure
from unipo.sources.keyed import keyed_generator

Array = NDArray[Any]
_INTEGER: np.dtype[Any] = np.dtype(np.int64)


# ---- spaces --------------------------------------------------------------------------------------------------------
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
    inner: Sequence[spaces.Space[Any]] = ()
    if isinstance(space, spaces.Dict):
        inner = list(space.spaces.values())
    elif isinstance(space, spaces.Tuple):
        inner = space.spaces
    else:
        return [space]
    return [leaf for part in inner for leaf in _leaves(part)]


def _nothing() -> Array:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class ActionSpec:
    """What a policy has to give: `kind` is categorical, multi_categorical or box.

    `size`: choices of a categorical action, else the length of the action vector. `sizes`: choices per component.
    `low`, `high` [size]: limits of the box; components with two finite limits are mapped from [-1, 1] by
    centre + half * action, the others are taken as they are. `bounded`: every component has two finite limits.
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
        limited = np.isfinite(low) & np.isfinite(high)
        centre, half = np.zeros_like(low), np.ones_like(low)
        centre[limited], half[limited] = (low[limited] + high[limited]) / 2, (high[limited] - low[limited]) / 2
        return cls(
            "box", low.size, (), low, high, centre, half, bool(limited.all()), shape=space.shape, dtype=space.dtype
        )

    def native(self, action: Array) -> Array:
        """[n, ...] actions of a policy to [n, *shape] actions of the environment. Raises ValueError where they are no actions."""
        if self.kind == "box":
            native = np.minimum(np.maximum(self.centre + self.half * action, self.low), self.high)
            if not _finite(native):
                raise ValueError(f"the policy gave a NaN action: {action.tolist()}; its parameters have diverged")
            native = native.round() if self.dtype.kind in "iu" else native
        else:
            if np.count_nonzero((action < 0) | (action >= self.sizes)):
                raise ValueError(f"the policy chose {action.tolist()}: expected integers from 0 to below {self.sizes}")
            native = action + self.start
        return native.astype(self.dtype, copy=False).reshape(len(action), *self.shape)


def _finite(x: Array) -> bool:
    """No NaN and no infinity: they survive a sum of squares, which is quick; where that overflows, look at each."""
    flat = x.ravel()
    return isfinite(flat.dot(flat)) or bool(np.isfinite(flat).all())


# ---- one environment -----------------------------------------------------------------------------------------------
def make_environment(name: str, **options: Any) -> gym.Env[Any, Any]:
    """`gymnasium.make` with errors that say what to do. Raises TaskEnvironmentError.

    Gymnasium's own passive checker is off: values and shapes are checked here, at every step.
    """
    try:
        env = gym.make(name, disable_env_checker=True, **options)
    except gym.error.DependencyNotInstalled as error:
        raise TaskEnvironmentError(f"environment {name!r} needs something that is not installed: {error}") from error
    except gym.error.Error as error:
        close = difflib.get_close_matches(name, list(gym.registry), n=3, cutoff=0.5)
        raise TaskEnvironmentError(
            f"no environment {name!r}; nearest: {', '.join(close) or 'none'}. {error}"
        ) from error
    ObservationSpec.of(env.observation_space)
    ActionSpec.of(env.action_space)
    return env


class Flattened(gym.Wrapper[Array, Any, Any, Any]):
    """Environment `index`: vectors out, only the `info_columns` of info, failures that say where."""

    def __init__(self, env: gym.Env[Any, Any], index: int, info_columns: tuple[str, ...]) -> None:
        super().__init__(env)
        self.index, self.info_columns = index, info_columns
        self.size = ObservationSpec.of(env.observation_space).size
        self.episode, self.steps = -1, 0
        self._plain = isinstance(env.observation_space, spaces.Box) and len(env.observation_space.shape) == 1
        self._space = env.observation_space
        self.observation_space = spaces.Box(-np.inf, np.inf, (self.size,), np.float32)

    def _vector(self, observation: Any) -> Array:
        flat = np.asarray(observation if self._plain else spaces.flatten(self._space, observation), dtype=np.float32)
        if flat.shape != (self.size,):
            raise ValueError(f"an observation of shape {flat.shape}, expected ({self.size},)")
        return flat

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """`options["episode"]`: the number of the episode that begins."""
        self.episode, self.steps = (options or {}).get("episode", self.episode + 1), 0
        try:
            return self._vector(self.env.reset(seed=seed)[0]), {}
        except Exception as error:
            raise failure(f"raised {type(error).__name__}: {error}", self.index, self.episode, 0) from error

    def step(self, action: Any) -> tuple[Array, Any, bool, bool, dict[str, Any]]:
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
            vector = self._vector(observation)
            kept = {name: info[name] for name in self.info_columns}
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}"
            raise failure(problem, self.index, self.episode, self.steps, action) from error
        self.steps += 1
        return vector, reward, bool(terminated), bool(truncated), kept

    def replay(self, seeds: Sequence[int], episodes: Sequence[int], actions: Sequence[Sequence[Any]]) -> Array:
        """Back to the middle of an episode: reset it as it was and do the same again. [d] the state reached."""
        observation = self.reset(seed=seeds[self.index], options={"episode": episodes[self.index]})[0]
        for action in actions[self.index]:
            observation = self.step(action)[0]
        return observation


# ---- several -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Outcome:
    """One step of every environment: `observation` [n, d] is the state that the step led to, also at an episode's end."""

    observation: Array
    reward: Array
    terminated: Array
    truncated: Array
    extras: Mapping[str, Array]


class Environments:
    """`num` copies of an environment, stepped together; those whose episode ended are reset at once.

    `make`: called once per copy (asynchronous: in a process of its own). Episode e of copy i begins with a seed that
    depends on (seed, i, e) alone, so that a state is the episodes' numbers and the actions since they began.
    `observation` [n, d] float32 is the current state; `episode_number` [n]; `info_columns`: entries of every step's info.
    Attributes `observation_spec`, `action_spec`. Raises TaskEnvironmentError, and EnvironmentFailure once running.
    """

    def __init__(self, make: Callable[[], gym.Env[Any, Any]], num: int, seed: int, asynchronous: bool = False,
                 info_columns: tuple[str, ...] = ()) -> None:  # fmt: skip
        self.num, self.seed, self.info_columns = num, seed, info_columns
        makers = [_Maker(make, i, info_columns) for i in range(num)]
        self._stepper: _Together | _Processes = _Processes(makers) if asynchronous else _Together(makers)
        space = self._stepper.action_space
        self.observation_spec = ObservationSpec(self._stepper.size)
        self.action_spec = ActionSpec.of(space)
        self.episode_number = np.zeros(num, dtype=np.int64)
        self._actions: list[list[Any]] = [[] for _ in range(num)]
        self.observation = np.zeros((num, self.observation_spec.size), dtype=np.float32)
        self._reset(np.ones(num, dtype=bool))

    def step(self, action: Array) -> Outcome:
        """Do `action` [n, ...] (in the policy's units) everywhere."""
        native = self.action_spec.native(action)
        outcome = self._stepper.step(native)
        for history, done in zip(self._actions, native, strict=True):
            history.append(done)
        self._check(outcome, native)
        self.observation = outcome.observation
        ended = outcome.terminated | outcome.truncated
        if np.count_nonzero(ended):
            self.episode_number = self.episode_number + ended
            self._reset(ended)
        return outcome

    def _reset(self, which: Array) -> None:
        seeds = [self._reset_seed(i) if which[i] else 0 for i in range(self.num)]
        begun = self._stepper.reset(which, seeds, self.episode_number)
        self.observation = np.where(which[:, None], begun, self.observation)
        for i in np.flatnonzero(which).tolist():
            self._actions[i] = []
            if not _finite(begun[i]):
                raise failure("returned a NaN or infinite observation", i, int(self.episode_number[i]), 0)

    def _reset_seed(self, env: int) -> int:
        return int(keyed_generator(self.seed, "environment", env, int(self.episode_number[env])).integers(2**31))

    def _check(self, outcome: Outcome, native: Array) -> None:
        if _finite(outcome.observation) and _finite(outcome.reward):
            return
        bad = (~np.isfinite(outcome.observation)).sum(axis=1) > 0
        env = int(np.flatnonzero(bad | ~np.isfinite(outcome.reward))[0])
        what = "observation" if bad[env] else "reward"
        steps = len(self._actions[env]) - 1
        raise failure(f"returned a NaN or infinite {what}", env, int(self.episode_number[env]), steps, native[env])

    def state_dict(self) -> dict[str, Any]:
        """What it takes to come back here: for JSON."""
        return {
            "episode_number": self.episode_number.tolist(),
            "actions": [[np.asarray(a).tolist() for a in history] for history in self._actions],
            "observation": self.observation.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Reset the episodes that were running and do their actions again. Warns where that led elsewhere."""
        if len(state["actions"]) != self.num:
            raise ValueError(
                f"the saved state has {len(state['actions'])} environments, these are {self.num}: use as many"
            )
        self.episode_number = np.asarray(state["episode_number"], dtype=np.int64)
        dtype = self.action_spec.dtype
        self._actions = [
            list(np.asarray(h, dtype=dtype).reshape(len(h), *self.action_spec.shape)) for h in state["actions"]
        ]
        seeds = [self._reset_seed(i) for i in range(self.num)]
        self.observation = self._stepper.replay(seeds, self.episode_number.tolist(), self._actions)
        if not np.array_equal(self.observation, np.asarray(state["observation"], dtype=np.float32)):
            warnings.warn(
                "an environment does not repeat itself from its seed and actions: the resumed run is not exact"
            )

    def close(self) -> None:
        self._stepper.close()


@dataclass(frozen=True)
class _Maker:
    make: Callable[[], gym.Env[Any, Any]]
    index: int
    info_columns: tuple[str, ...]

    def __call__(self) -> Flattened:
        return Flattened(self.make(), self.index, self.info_columns)


class _Together:
    """All environments in this process."""

    def __init__(self, makers: Sequence[_Maker]) -> None:
        self.envs = [make() for make in makers]
        self.size, self.action_space = self.envs[0].size, self.envs[0].action_space

    def step(self, native: Array) -> Outcome:
        n = len(self.envs)
        observation, reward = np.empty((n, self.size), dtype=np.float32), np.empty(n)
        terminated, truncated = np.empty(n, dtype=bool), np.empty(n, dtype=bool)
        kept = []
        for i, env in enumerate(self.envs):
            observation[i], reward[i], terminated[i], truncated[i], extras = env.step(native[i])
            kept.append(extras)
        extras = {name: np.stack([np.asarray(k[name]) for k in kept]) for name in kept[0]}
        return Outcome(observation, reward, terminated, truncated, extras)

    def reset(self, which: Array, seeds: Sequence[int], episodes: Array) -> Array:
        observation = np.zeros((len(self.envs), self.size), dtype=np.float32)
        for i in np.flatnonzero(which).tolist():
            observation[i] = self.envs[i].reset(seed=seeds[i], options={"episode": int(episodes[i])})[0]
        return observation

    def replay(self, seeds: Sequence[int], episodes: Sequence[int], actions: Sequence[Sequence[Any]]) -> Array:
        return np.stack([env.replay(seeds, episodes, actions) for env in self.envs])

    def close(self) -> None:
        for env in self.envs:
            env.close()


class _Processes:
    """Every environment in a process of its own."""

    def __init__(self, makers: Sequence[_Maker]) -> None:
        self.envs = AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
        self.action_space = self.envs.single_action_space
        self.size = ObservationSpec.of(self.envs.single_observation_space).size

    def step(self, native: Array) -> Outcome:
        observation, reward, terminated, truncated, info = self._guarded(self.envs.step, native)
        extras = {name: np.asarray(value) for name, value in info.items() if not name.startswith("_")}
        return Outcome(observation, reward, terminated, truncated, extras)

    def reset(self, which: Array, seeds: Sequence[int], episodes: Array) -> Array:
        return self._guarded(self.envs.reset, seed=list(seeds), options={"reset_mask": which})[0]

    def replay(self, seeds: Sequence[int], episodes: Sequence[int], actions: Sequence[Sequence[Any]]) -> Array:
        return np.stack(self._guarded(self.envs.call, "replay", seeds, episodes, actions))

    def _guarded(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except EnvironmentFailure as error:
            cause = error.args[0]
            self.close()
            raise (cause if isinstance(cause, EnvironmentFailure) else error) from None

    def close(self) -> None:
        self.envs.close(terminate=True)
