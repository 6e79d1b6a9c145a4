"""Gymnasium environments, stepped together. Resets are keyed, so that a run can be resumed in the middle of an episode.

Every observation becomes a float32 vector [d] (gymnasium.spaces.flatten). Policies act in their own units: integers from 0,
or, where a box is bounded, numbers in [-1, 1]; `ActionSpec.native` turns them into what the environment expects.
Terminated and truncated are kept apart, and what comes after a step is the state that the step led to, never a reset one.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from unipo.episodes import Episodes
from unipo.sources.acting.environment_errors import EnvironmentFailure, TaskEnvironmentError, failure
from unipo.sources.acting.histories import Histories
from unipo.sources.acting.spaces import ActionSpec, ObservationSpec, finite
from unipo.sources.acting.stepping import Broken, Maker, Outcome, Processes, Together
from unipo.sources.acting.vectorised import together
from unipo.sources.keyed import keyed_generator

__all__ = [
    "ActionSpec", "EnvironmentFailure", "Environments", "ObservationSpec", "Outcome", "TaskEnvironmentError", "make_environment",
]  # fmt: skip

Array = NDArray[Any]


def make_environment(name: str, **options: Any) -> gym.Env[Any, Any]:
    """`gymnasium.make` with errors that say what to do. Raises TaskEnvironmentError.

    MODULE:NAME-v1 imports the module first, also from the working directory, as the place where the name is registered.
    Gymnasium's own passive checker is off: values and shapes are checked here, at every step.
    """
    if name.startswith("unipo/"):
        _register_ours()
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if name in gym.registry and "mujoco" in str(gym.registry[name].entry_point):
            _mujoco_warns_once()
        env = gym.make(name, disable_env_checker=True, **options)
    except ModuleNotFoundError as error:
        raise TaskEnvironmentError(
            f"environment {name!r} needs {error.name!r}, which is not installed: {error}"
        ) from error
    except TypeError as error:
        raise TaskEnvironmentError(f"environment {name!r} does not accept {options}: {error}") from error
    except gym.error.DependencyNotInstalled as error:
        raise TaskEnvironmentError(f"environment {name!r} needs something that is not installed: {error}") from error
    except gym.error.Error as error:
        _register_ours()
        close = difflib.get_close_matches(name, list(gym.registry), n=3, cutoff=0.5)
        extra = '; Atari needs pip install "gymnasium[atari]"' if name.startswith("ALE/") else ""
        raise TaskEnvironmentError(
            f"no environment {name!r}; nearest: {', '.join(close) or 'none'}{extra}. {error}"
        ) from error
    ObservationSpec.of(env.observation_space)
    ActionSpec.of(env.action_space)
    return env


def _mujoco_warns_once() -> None:
    """MuJoCo's warnings as Python's, and not a line each time and a file in the working directory; those about how a model
    file is written are for its authors."""
    mujoco = import_module("mujoco")

    def warn(message: str) -> None:
        if "is deprecated" not in message:
            warnings.warn(f"MuJoCo: {message}", stacklevel=2)

    mujoco.set_mju_user_warning(warn)


def _register_ours() -> None:
    """On demand: what the environments stand on (scipy) is slow to import."""
    import_module("unipo.tasks.environments").register()


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
        makers = [Maker(make, i, info_columns) for i in range(num)]
        self._stepper: Together | Processes = Processes(makers) if asynchronous else together(makers)
        space = self._stepper.action_space
        self.observation_spec = ObservationSpec(self._stepper.size)
        self.action_spec = ActionSpec.of(space)
        self.episode_number = np.zeros(num, dtype=np.int64)
        self._actions = Histories(num, self.action_spec.shape, self.action_spec.dtype)
        self.observation = np.zeros((num, self.observation_spec.size), dtype=np.float32)
        self._reset(np.ones(num, dtype=bool))

    def step(self, action: Array) -> Outcome:
        """Do `action` [n, ...] (in the policy's units) everywhere. After a failure, `state_dict` is that of the step before."""
        native = self.action_spec.native(action)
        try:
            outcome = self._stepper.step(native)
        except Broken as broken:
            raise self._failure(broken.problem, broken.env, native) from broken.__cause__
        if not (finite(outcome.observation) and finite(outcome.reward)):
            raise self._unusual(outcome, native)
        self._actions.append(native)
        self.observation = outcome.observation
        ended = outcome.terminated | outcome.truncated
        if np.count_nonzero(ended):
            self.episode_number = self.episode_number + ended
            self._reset(ended)
        return outcome

    def _reset(self, which: Array) -> None:
        seeds = [self._reset_seed(i) if which[i] else 0 for i in range(self.num)]
        begun = self._stepper.reset(which, seeds)
        self.observation = np.where(which[:, None], begun, self.observation)
        self._actions.begin(which)
        if not finite(self.observation):
            env = int(np.flatnonzero(np.logical_or.reduce(~np.isfinite(begun), axis=1))[0])
            raise failure("returned a NaN or infinite observation", env, int(self.episode_number[env]), 0)

    def _reset_seed(self, env: int) -> int:
        return int(keyed_generator(self.seed, "environment", env, int(self.episode_number[env])).integers(2**31))

    def _unusual(self, outcome: Outcome, native: Array) -> EnvironmentFailure:
        bad: Array = np.logical_or.reduce(~np.isfinite(outcome.observation), axis=1)
        env = int(np.flatnonzero(bad | ~np.isfinite(outcome.reward))[0])
        return self._failure(f"returned a NaN or infinite {'observation' if bad[env] else 'reward'}", env, native)

    def _failure(self, problem: str, env: int, native: Array) -> EnvironmentFailure:
        return failure(problem, env, int(self.episode_number[env]), self._actions.length(env), native[env])

    def state_dict(self) -> dict[str, Any]:
        """What it takes to come back here: for JSON."""
        return self.standing()()

    def standing(self) -> Callable[[], dict[str, Any]]:
        """`state_dict` of now, to be written out later if at all: lists of all actions cost more than a step."""
        numbers, observation = self.episode_number, self.observation
        actions = [self._actions.of(i) for i in range(self.num)]
        return lambda: {
            "episode_number": numbers.tolist(),
            "actions": [history.tolist() for history in actions],
            "observation": observation.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Reset the episodes that were running and do their actions again. Warns where that led elsewhere."""
        if len(state["actions"]) != self.num:
            raise ValueError(
                f"the saved state has {len(state['actions'])} environments, these are {self.num}: use as many"
            )
        self.episode_number = np.asarray(state["episode_number"], dtype=np.int64)
        self._actions.load(state["actions"])
        seeds = [self._reset_seed(i) for i in range(self.num)]
        done = [self._actions.of(i) for i in range(self.num)]
        self.observation = self._stepper.replay(seeds, self.episode_number.tolist(), done)
        if not np.array_equal(self.observation, np.asarray(state["observation"], dtype=np.float32)):
            warnings.warn(
                "an environment does not repeat itself from its seed and actions: the resumed run is not exact"
            )

    def arranged(self, fragments: Episodes, gamma: float) -> Episodes:
        """What is trained on of collected fragments: all, as they are."""
        return fragments

    def close(self) -> None:
        self._stepper.close()
