"""How environments are stepped together: in this process, or in a process each. Both give the same numbers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.wrappers import OrderEnforcing, TimeLimit
from numpy.typing import NDArray

from unipo.sources.acting.environment_errors import EnvironmentFailure, failure
from unipo.sources.acting.spaces import ObservationSpec

Array = NDArray[Any]


class Outcome(NamedTuple):
    """One step of every environment: `observation` [n, d] is the state that the step led to, also at an episode's end."""

    observation: Array
    reward: Array
    terminated: Array
    truncated: Array
    extras: Mapping[str, Array]


class Broken(Exception):
    """Environment `env` can go no further: whoever knows its episode says where."""

    def __init__(self, problem: str, env: int) -> None:
        super().__init__(problem, env)
        self.problem, self.env = problem, env


def stripped(env: gym.Env[Any, Any]) -> tuple[gym.Env[Any, Any], float]:
    """What is below the wrappers of `gymnasium.make` that only count and check at each step, and the steps that they allow."""
    limit = float("inf")
    while type(env) in (TimeLimit, OrderEnforcing):
        if isinstance(env, TimeLimit):
            limit = min(limit, env._max_episode_steps)
        env = env.env  # type: ignore[attr-defined]
    return env, limit


class Flattened(gym.Wrapper[Array, Any, Any, Any]):
    """Environment `index`: vectors out, only the `info_columns` of info, failures that say where.

    Resets go through all its wrappers; steps go to what they wrap, and the time limit is counted here.
    """

    def __init__(self, env: gym.Env[Any, Any], index: int, info_columns: tuple[str, ...]) -> None:
        super().__init__(env)
        self.index, self.info_columns = index, info_columns
        self.size = ObservationSpec.of(env.observation_space).size
        self.episode, self.steps = -1, 0
        self.inner, self.limit = stripped(env)
        self._step = self.inner.step
        self._plain = isinstance(env.observation_space, spaces.Box) and len(env.observation_space.shape) == 1
        self._space = env.observation_space
        self.observation_space = spaces.Box(-np.inf, np.inf, (self.size,), np.float32)

    def _vector(self, observation: Any) -> Array:
        """[size], of any type."""
        flat = observation if self._plain else spaces.flatten(self._space, observation)
        if type(flat) is not np.ndarray:
            flat = np.asarray(flat, dtype=np.float32)
        if flat.shape != (self.size,):
            raise ValueError(f"an observation of shape {flat.shape}, expected ({self.size},)")
        return flat

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        self.episode, self.steps = self.episode + 1, 0
        try:
            return self._vector(self.env.reset(seed=seed)[0]).astype(np.float32), {}
        except Exception as error:
            raise failure(f"raised {type(error).__name__}: {error}", self.index, self.episode, 0) from error

    def step(self, action: Any) -> tuple[Array, Any, bool, bool, dict[str, Any]]:
        try:
            observation, reward, terminated, truncated, info = self._step(action)
            vector, paid = self._vector(observation).astype(np.float32), float(reward)
            kept = {name: info[name] for name in self.info_columns} if self.info_columns else {}
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}"
            raise failure(problem, self.index, self.episode, self.steps, action) from error
        self.steps += 1
        return vector, paid, bool(terminated), bool(truncated or self.steps >= self.limit), kept

    def replay(self, seeds: Sequence[int], episodes: Sequence[int], actions: Sequence[Array]) -> Array:
        """Back to the middle of an episode: reset it as it was and do the same again. [d] the state reached."""
        self.episode = episodes[self.index] - 1
        observation = self.reset(seed=seeds[self.index])[0]
        for action in actions[self.index]:
            observation = self.step(action)[0]
        return observation


@dataclass(frozen=True)
class Maker:
    make: Callable[[], gym.Env[Any, Any]]
    index: int
    info_columns: tuple[str, ...]

    def __call__(self) -> Flattened:
        if parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to answer: it ends the step and saves
        return Flattened(self.make(), self.index, self.info_columns)


def _numbers(values: Any) -> Array:
    array = np.asarray(values)
    return array.astype(np.float32) if array.dtype == np.float64 else array


class Together:
    """All environments in this process."""

    def __init__(self, envs: Sequence[Flattened]) -> None:
        self.envs = list(envs)
        self.size, self.action_space = self.envs[0].size, self.envs[0].action_space

    def step(self, native: Array) -> Outcome:
        n = len(self.envs)
        observation, reward = np.empty((n, self.size), dtype=np.float32), np.empty(n)
        terminated, truncated = np.empty(n, dtype=bool), np.empty(n, dtype=bool)
        kept = []
        for i, env in enumerate(self.envs):
            observation[i], reward[i], terminated[i], truncated[i], extras = env.step(native[i])
            kept.append(extras)
        extras = {name: _numbers([k[name] for k in kept]) for name in kept[0]}
        return Outcome(observation, reward, terminated, truncated, extras)

    def reset(self, which: Array, seeds: Sequence[int]) -> Array:
        observation = np.zeros((len(self.envs), self.size), dtype=np.float32)
        for i in np.flatnonzero(which).tolist():
            observation[i] = self.envs[i].reset(seed=seeds[i])[0]
        return observation

    def replay(self, seeds: Sequence[int], episodes: Sequence[int], actions: Sequence[Array]) -> Array:
        return np.stack([env.replay(seeds, episodes, actions) for env in self.envs])

    def close(self) -> None:
        for env in self.envs:
            env.close()


class Processes:
    """Every environment in a process of its own."""

    def __init__(self, makers: Sequence[Maker]) -> None:
        self.envs = AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
        self.info_columns = makers[0].info_columns
        self.action_space = self.envs.single_action_space
        self.size = ObservationSpec.of(self.envs.single_observation_space).size

    def step(self, native: Array) -> Outcome:
        observation, reward, terminated, truncated, info = self._guarded(self.envs.step, native)
        extras = {name: _numbers(info[name]) for name in self.info_columns}
        return Outcome(observation, reward, terminated, truncated, extras)

    def reset(self, which: Array, seeds: Sequence[int]) -> Array:
        return self._guarded(self.envs.reset, seed=list(seeds), options={"reset_mask": which})[0]

    def replay(self, seeds: Sequence[int], episodes: Sequence[int], actions: Sequence[Array]) -> Array:
        return np.stack(self._guarded(self.envs.call, "replay", seeds, episodes, actions))

    def _guarded(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except EnvironmentFailure as error:
            cause = error.args[0]
            self.close()
            raise (cause if isinstance(cause, EnvironmentFailure) else error) from None
        except (EOFError, ConnectionError):
            sentinels = [process.sentinel for process in self.envs.processes]
            gone = connection.wait(sentinels, timeout=5)
            self._abandon()
            env = next((i for i, s in enumerate(sentinels) if s in gone), 0)
            raise Broken("broke down and its process ended", env) from None

    def _abandon(self) -> None:
        """Gymnasium's own close would wait for the process that is gone."""
        for process in self.envs.processes:
            process.terminate()
        self.envs.closed = True

    def close(self) -> None:
        if not self.envs.closed:
            self.envs.close(terminate=True)
