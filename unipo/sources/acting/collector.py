"""The collector: a policy acts in environments, and what happened becomes `Episodes`.

A *fragment* is the part of one episode that fell into one batch: an episode of `Episodes`, with a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipo.episodes import Column, Episodes
from unipo.policies.acting import Acting
from unipo.sources.acting.environments import Environments
from unipo.sources.acting.reward_scaling import RewardScaler
from unipo.sources.keyed import keyed_generator

Array = NDArray[Any]
Act = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(observation [n, d] float32, noise [n, k] standard normals) -> (action [n, ...], its log-prob [n])."""

_BLOCK = 256
_PER_FRAGMENT = ("next_observation", "terminated", "truncated", "episode_number")


class Recorder(Protocol):
    """Writes down what a collector sees, such as `MinariRecorder`; its state is part of the collector's."""

    def add(self, fragments: Episodes) -> None: ...

    def add_rows(self, rows: Mapping[str, Array]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Collector:
    """Lets a policy act and remembers where everything stands; a function of (state, policy) alone.

    `noise_size`: standard normals per action, keyed by (seed, number of the step). With a `reward_scaler` the column
    `reward` is scaled and `raw_reward` is what the environment paid; returns are always of raw rewards. A `recorder` is
    given everything that is collected.
    """

    environments: Environments
    seed: int
    noise_size: int = 0
    reward_scaler: RewardScaler | None = None
    recorder: Recorder | None = None
    steps: int = 0
    _noise: tuple[int, Array] = field(default=(-1, np.zeros(0)), repr=False)
    _finished: list[tuple[float, int]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._returns, self._lengths = np.zeros(self.environments.num), np.zeros(self.environments.num, dtype=np.int64)

    @property
    def env_steps(self) -> int:
        """Steps of all environments together."""
        return self.steps * self.environments.num

    # ---- acting ----------------------------------------------------------------------------------------------------
    def step(self, act: Act, version: int) -> dict[str, Array]:
        """One step of every environment: rows [n, ...] for `TransitionReplay.add_rows`."""
        n, before = self.environments.num, self.environments.observation
        chosen, logp = act(torch.from_numpy(before), torch.from_numpy(self._noise_of(1)[0]))
        rows = self._step(before, chosen.numpy())
        rows |= {
            "reward": rows["reward"].astype(np.float32), "behavior_logp": logp.numpy(),
            "env": np.arange(n), "policy_version": np.full(n, version),
        }  # fmt: skip
        if self.reward_scaler is not None:
            ended = (rows["terminated"] | rows["truncated"])[:, None]
            scaled = self.reward_scaler.merge_and_scale(rows["reward"][:, None], ended)[:, 0]
            rows = {**rows, "raw_reward": rows["reward"], "reward": scaled}
        if self.recorder is not None:
            self.recorder.add_rows(rows)
        return rows

    def collect(self, steps_per_env: int, act: Act, version: int) -> Episodes:
        """`steps_per_env` steps of every environment as fragments, environment by environment, in the order of time.

        Step columns: observation [N, d], action, reward, behavior_logp, and the info columns. Episode columns: terminated;
        truncated (everything else that ended it: bootstrap), of which `unfinished` goes on in the next batch;
        final_observation [E, d], the state after the last step; env, episode_number, policy_version, kind.
        """
        rollout = self._rolled(steps_per_env, act)
        if self.reward_scaler is not None:
            rollout["raw_reward"] = rollout["reward"]
            ended = rollout["terminated"] | rollout["truncated"]
            rollout["reward"] = self.reward_scaler.merge_and_scale(rollout["reward"].T, ended.T).T
        fragments = _fragments(rollout, version)
        if self.recorder is not None:
            self.recorder.add(fragments)
        return fragments

    def _rolled(self, steps: int, act: Act) -> dict[str, Array]:
        """Columns [T, n, ...] by time, so that a step writes one contiguous row of each."""
        envs, noise = self.environments, self._noise_of(steps)
        chooser: Acting | Apart = act if isinstance(act, Acting) else Apart(act)
        given = chooser.begin(envs.observation, noise)
        if given is None:
            chooser, given = Apart(act), noise
        columns: dict[str, Array] = {}
        for t in range(steps):
            row = self._step(envs.observation, chooser.choose(envs.observation, given[t]))
            if not columns:
                columns = {name: np.empty((steps, *value.shape), value.dtype) for name, value in row.items()}
            for name, value in row.items():
                columns[name][t] = value
        columns["reward"] = columns["reward"].astype(np.float32)
        columns["behavior_logp"] = chooser.logp(noise, columns["action"]).numpy()
        return columns

    def _step(self, before: Array, action: Array) -> dict[str, Array]:
        """One step of every environment, from their states `before`: rows [n, ...]."""
        numbers = self.environments.episode_number
        outcome = self.environments.step(action)
        self.steps += 1
        self._count(outcome.reward, outcome.terminated | outcome.truncated)
        return {
            "observation": before, "action": action, "reward": outcome.reward, **outcome.extras,
            "next_observation": outcome.observation, "terminated": outcome.terminated, "truncated": outcome.truncated,
            "episode_number": numbers,
        }  # fmt: skip

    def random_act(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform actions, keyed like the noise; pass it where a policy's `act` is expected."""
        spec, n = self.environments.action_spec, self.environments.num
        generator = keyed_generator(self.seed, "random action", self.steps)
        if spec.kind == "box":
            action = torch.from_numpy(generator.uniform(-1, 1, (n, spec.size)).astype(np.float32))
            return action, torch.full((n,), -spec.size * float(np.log(2.0)))
        drawn = generator.integers(0, spec.sizes, (n, len(spec.sizes)))
        logp = torch.full((n,), -float(np.log(spec.sizes).sum()))
        return torch.from_numpy(drawn[:, 0] if spec.kind == "categorical" else drawn), logp

    def _noise_of(self, steps: int) -> Array:
        """[steps, n, noise_size]: of this step and those after it."""
        parts, first, end = [], self.steps, self.steps + steps
        while first < end:
            block, position = divmod(first, _BLOCK)
            if self._noise[0] != block:
                shape = (_BLOCK, self.environments.num, self.noise_size)
                normals = keyed_generator(self.seed, "noise", block).standard_normal(shape, dtype=np.float32)
                self._noise = (block, normals)
            parts.append(self._noise[1][position : position + end - first])
            first += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def finished(self) -> list[tuple[float, int]]:
        """(return, length) of the episodes that ended since `take_finished`, which are left there."""
        return list(self._finished)

    # ---- returns ---------------------------------------------------------------------------------------------------
    def _count(self, reward: Array, ended: Array) -> None:
        self._returns += reward
        self._lengths += 1
        if np.count_nonzero(ended):
            self._finished += zip(self._returns[ended].tolist(), self._lengths[ended].tolist(), strict=True)
            self._returns[ended] = 0
            self._lengths[ended] = 0

    def take_finished(self) -> list[tuple[float, int]]:
        """(return, length) of the episodes that ended since the last call, in the order of time; raw rewards."""
        finished, self._finished = self._finished, []
        return finished

    # ---- resuming --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return self.standing()()

    def standing(self) -> Callable[[], dict[str, Any]]:
        """`state_dict` of now, to be written out later if at all."""
        environments = self.environments.standing()
        state = {
            "steps": self.steps,
            "returns": self._returns.tolist(),
            "lengths": self._lengths.tolist(),
            "finished": [list(f) for f in self._finished],
            "reward_scaler": None if self.reward_scaler is None else self.reward_scaler.state_dict(),
            "recorder": None if self.recorder is None else self.recorder.state_dict(),
        }
        return lambda: {"environments": environments(), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.environments.load_state_dict(state["environments"])
        self.steps, self._noise = state["steps"], (-1, np.zeros(0))
        self._returns, self._lengths = np.asarray(state["returns"]), np.asarray(state["lengths"], dtype=np.int64)
        self._finished = [(float(a), int(b)) for a, b in state["finished"]]
        if self.reward_scaler is not None:
            self.reward_scaler.load_state_dict(state["reward_scaler"])
        if self.recorder is not None:
            self.recorder.load_state_dict(state.get("recorder") or {})


class Apart:
    """An `Act` that is asked at every step, and gives the log-prob at once."""

    def __init__(self, act: Act) -> None:
        self.act = act
        self._logps: list[Tensor] = []

    def begin(self, observation: Array, noise: Array) -> Array:
        return noise

    def choose(self, observation: Array, noise: Array) -> Array:
        action, logp = self.act(torch.from_numpy(observation), torch.from_numpy(noise))
        self._logps.append(logp)
        chosen: Array = action.numpy()
        return chosen

    def logp(self, noise: Array, action: Array) -> Tensor:
        return torch.stack(self._logps)


def _fragments(rollout: Mapping[str, Array], version: int) -> Episodes:
    """Columns [T, n, ...] cut where an episode ended and at the end of the batch."""
    steps = len(rollout["reward"])
    over = rollout["terminated"] | rollout["truncated"]
    over[-1] = True
    ends = np.flatnonzero(over.T)
    env, time = np.divmod(ends, steps)
    flat = {name: _by_env(b) for name, b in rollout.items() if name not in _PER_FRAGMENT}
    last = {name: torch.from_numpy(rollout[name][time, env]) for name in _PER_FRAGMENT}
    index, one = torch.from_numpy(env), torch.arange(len(ends) + 1)
    episode = {name: last[name] for name in ("episode_number", "terminated")}
    episode["env"] = index
    episode["policy_version"] = torch.full_like(index, version)
    episode["truncated"] = ~episode["terminated"]
    episode["unfinished"] = ~(last["terminated"] | last["truncated"])
    episode["final_observation"] = last["next_observation"]
    columns = {name: Column(v, "step") for name, v in flat.items()}
    columns |= {name: Column(v, "episode") for name, v in episode.items()}
    columns["kind"] = Column(torch.zeros(len(ends), dtype=torch.long), "episode", None, ("rollout",))
    turn = torch.from_numpy(np.concatenate([[0], ends + 1]))
    return Episodes({"turn": turn, "episode": one, "group": one}, columns)


def _by_env(rows: Array) -> Tensor:
    """[n * T, ...] of [T, n, ...]."""
    return torch.from_numpy(np.ascontiguousarray(rows.swapaxes(0, 1))).flatten(0, 1)
