"""Simulators of many homogeneous vehicles, collected like environments: every vehicle is one copy.

A vehicle's observation has the choices that count appended to it, 1 or 0 each (`ActionSpec.masked`). What is trained on are
decisions: one-step episodes of the vehicles that were free to choose, in groups of one simulator and time (row 31).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Column, Episodes, offsets_of
from unipo.sources.acting.environment_errors import TaskEnvironmentError
from unipo.sources.acting.spaces import ActionSpec, ObservationSpec
from unipo.sources.acting.stepping import Outcome
from unipo.sources.keyed import keyed_generator

__all__ = ["SIMULATORS", "Simulators", "decisions", "shifts"]

Array = NDArray[Any]
SIMULATORS = ("unipo/RideDispatch-v0",)
"""Ids of environments with many vehicles."""


class Simulators:
    """`number` simulators of `vehicles` each; stands where `Environments` does, and resumes as exactly.

    All vehicles of a simulator begin and end their shift together. `extras` of a step: `acted`, `served` bool, `duration`
    (times until the next decision), `time`. Raises TaskEnvironmentError for options that the simulator does not accept.
    """

    def __init__(self, name: str, number: int, seed: int, vehicles: int = 20, **options: Any) -> None:
        import_module("unipo.tasks.environments").register()
        try:
            self.simulators = [gym.make_vec(name, num_envs=vehicles, **options) for _ in range(number)]
        except (TypeError, ValueError) as error:
            raise TaskEnvironmentError(f"{name} cannot be made with {options}: {error}") from error
        self.vehicles, self.num, self.seed = vehicles, number * vehicles, seed
        first: Any = self.simulators[0]
        choices = int(first.single_action_space.n)
        self.observation_spec = ObservationSpec(first.single_observation_space.shape[0] + choices)
        self.action_spec = ActionSpec("categorical", choices, (choices,), masked=True)
        self.episode_number = np.zeros(self.num, dtype=np.int64)
        self.observation = np.zeros((self.num, self.observation_spec.size), dtype=np.float32)
        self._shift = np.zeros(number, dtype=np.int64)
        self._actions: list[list[Array]] = [[] for _ in range(number)]
        for i in range(number):
            self._begin(i)

    def step(self, action: Array) -> Outcome:
        """Do `action` [n] everywhere. Shifts that ended begin anew at once."""
        found = [self._one(i, chosen) for i, chosen in enumerate(np.split(np.asarray(action), len(self.simulators)))]
        observation, reward, terminated, extras = zip(*found, strict=True)
        outcome = Outcome(np.concatenate(observation), np.concatenate(reward), np.concatenate(terminated),
                          np.zeros(self.num, dtype=bool),
                          {name: np.concatenate([e[name] for e in extras]) for name in extras[0]})  # fmt: skip
        self.observation = outcome.observation
        for i in np.flatnonzero([t.any() for t in terminated]).tolist():
            self._shift[i] += 1
            self._begin(i)
        self.episode_number = np.repeat(self._shift, self.vehicles)
        return outcome

    def _one(self, i: int, action: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
        simulator: Any = self.simulators[i]
        observation, reward, terminated, _, info = simulator.step(action)
        self._actions[i].append(action)
        extras = {name: np.asarray(info[name]) for name in ("acted", "served", "duration")}
        extras["time"] = np.full(self.vehicles, info["time"])
        return _with_choices(observation, info), reward, terminated, extras

    def _begin(self, i: int) -> None:
        simulator: Any = self.simulators[i]
        seed = int(keyed_generator(self.seed, "simulator", i, int(self._shift[i])).integers(2**31))
        observation, info = simulator.reset(seed=seed)
        self._actions[i] = []
        self._place(i, _with_choices(observation, info))

    def _place(self, i: int, observation: Array) -> None:
        self.observation = self.observation.copy()
        self.observation[i * self.vehicles : (i + 1) * self.vehicles] = observation

    def arranged(self, fragments: Episodes, gamma: float) -> Episodes:
        """The decisions of collected fragments."""
        return decisions(fragments, gamma, self.vehicles)

    def state_dict(self) -> dict[str, Any]:
        """Shifts and the actions since they began: for JSON."""
        return {"shift": self._shift.tolist(), "actions": [[a.tolist() for a in history] for history in self._actions]}

    def standing(self) -> Callable[[], dict[str, Any]]:
        """`state_dict` of now, for later."""
        state = self.state_dict()
        return lambda: state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the running shifts again and do the same actions."""
        if len(state["shift"]) != len(self.simulators):
            raise ValueError(
                f"the saved state has {len(state['shift'])} simulators, these are {len(self.simulators)}: use as many"
            )
        self._shift = np.asarray(state["shift"], dtype=np.int64)
        self.episode_number = np.repeat(self._shift, self.vehicles)
        for i, history in enumerate(state["actions"]):
            self._begin(i)
            for action in history:
                self._place(i, self._one(i, np.asarray(action, dtype=np.int64))[0])

    def close(self) -> None:
        for simulator in self.simulators:
            simulator.close()


def _with_choices(observation: Array, info: Mapping[str, Any]) -> Array:
    return np.concatenate([observation, info["action_mask"]], axis=1).astype(np.float32)


def decisions(fragments: Episodes, gamma: float, vehicles: int) -> Episodes:
    """One-step episodes of the steps that `acted`, in groups of one simulator and time.

    A step column `reward_to_go` is added: G = r + gamma^duration * G of the vehicle's next decision, which is the discounted
    return of its fragment, since a busy vehicle is paid nothing. What was cut counts as 0 from there on, so whole shifts
    should be collected. `final_observation` is the vehicle's state one time later; where the shift went on, the episode is
    `truncated`.
    """
    reward, index = fragments["reward"], fragments.index("episode")
    togo = F.discounted_return(reward, index, len(fragments), gamma)
    env, number = fragments.expand("env"), fragments.expand("episode_number")
    time = fragments["time"]
    key = torch.stack([env // vehicles, number, time.to(env), env], 1)
    order = torch.from_numpy(np.lexsort(key.numpy().T[::-1]))
    order = order[fragments["acted"][order]]
    last = fragments.lengths().cumsum(0) - 1
    final = fragments["observation"].roll(-1, 0).index_copy(0, last, fragments["final_observation"])
    ends = torch.zeros(len(reward), dtype=torch.bool).index_copy(0, last, fragments["terminated"])
    step = {n: c.values for n, c in fragments.columns.items() if c.level == "step"} | {"reward_to_go": togo}
    episode = {"env": env, "episode_number": number, "policy_version": fragments.expand("policy_version"),
               "final_observation": final, "terminated": ends, "truncated": ~ends}  # fmt: skip
    columns = {name: Column(v[order], "step") for name, v in step.items()}
    columns |= {name: Column(v[order], "episode") for name, v in episode.items()}
    columns["kind"] = Column(torch.zeros(len(order), dtype=torch.long), "episode", None, ("rollout",))
    groups = torch.unique_consecutive(key[order][:, :3], dim=0, return_counts=True)[1]
    one = torch.arange(len(order) + 1)
    return Episodes({"turn": one, "episode": one, "group": offsets_of(groups)}, columns)


def shifts(act: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], simulators: Simulators) -> list[tuple[float, int]]:
    """(return, times) of every vehicle over one whole shift, acting without noise."""
    total, length = np.zeros(simulators.num), 0
    while True:
        action = act(torch.from_numpy(simulators.observation), torch.zeros(simulators.num, 1))[0]
        outcome = simulators.step(action.numpy())
        total, length = total + outcome.reward, length + 1
        if outcome.terminated.any():
            return [(float(r), length) for r in total]
