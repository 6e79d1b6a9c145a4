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
from unipo.sources.environments import Environments
from unipo.sources.keyed import keyed_generator
from unipo.sources.reward_scaling import RewardScaler

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
        n = self.environments.num
        rows = {**self._step(act), "env": np.arange(n), "policy_version": np.full(n, version)}
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
        n, first = self.environments.num, self._step(act)
        buffers = {k: np.empty((n, steps_per_env, *v.shape[1:]), v.dtype) for k, v in first.items()}
        for t in range(steps_per_env):
            for name, value in (first if t == 0 else self._step(act)).items():
                buffers[name][:, t] = value
        if self.reward_scaler is not None:
            buffers["raw_reward"] = buffers["reward"]
            ended = buffers["terminated"] | buffers["truncated"]
            buffers["reward"] = self.reward_scaler.merge_and_scale(buffers["reward"], ended)
        fragments = _fragments(buffers, version)
        if self.recorder is not None:
            self.recorder.add(fragments)
        return fragments

    def _step(self, act: Act) -> dict[str, Array]:
        envs = self.environments
        before, numbers = envs.observation, envs.episode_number
        chosen, logp = act(torch.from_numpy(before), torch.from_numpy(self._draw()))
        action = chosen.numpy()
        outcome = envs.step(action)
        self.steps += 1
        self._count(outcome.reward, outcome.terminated | outcome.truncated)
        return {
            "observation": before, "action": action, "reward": outcome.reward.astype(np.float32),
            "behavior_logp": logp.numpy(), **outcome.extras,
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

    def _draw(self) -> Array:
        block, position = divmod(self.steps, _BLOCK)
        if self._noise[0] != block:
            shape = (_BLOCK, self.environments.num, self.noise_size)
            normals = keyed_generator(self.seed, "noise", block).standard_normal(shape, dtype=np.float32)
            self._noise = (block, normals)
        drawn: Array = self._noise[1][position]
        return drawn

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
        return {
            "environments": self.environments.state_dict(),
            "steps": self.steps,
            "returns": self._returns.tolist(),
            "lengths": self._lengths.tolist(),
            "finished": [list(f) for f in self._finished],
            "reward_scaler": None if self.reward_scaler is None else self.reward_scaler.state_dict(),
            "recorder": None if self.recorder is None else self.recorder.state_dict(),
        }

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


def _fragments(buffers: Mapping[str, Array], version: int) -> Episodes:
    """Buffers [n, T, ...] cut where an episode ended and at the end of the batch."""
    terminated, truncated = buffers["terminated"].reshape(-1), buffers["truncated"].reshape(-1)
    last = np.zeros_like(buffers["terminated"])
    last[:, -1] = True
    ends = np.flatnonzero(terminated | truncated | last.reshape(-1))
    flat = {name: torch.from_numpy(b.reshape(-1, *b.shape[2:])) for name, b in buffers.items()}
    index, one = torch.from_numpy(ends), torch.arange(len(ends) + 1)
    episode = {name: flat[name][index] for name in ("episode_number", "terminated")}
    episode["env"] = index // buffers["reward"].shape[1]
    episode["policy_version"] = torch.full_like(index, version)
    episode["truncated"] = ~episode["terminated"]
    episode["unfinished"] = ~(flat["terminated"] | flat["truncated"])[index]
    episode["final_observation"] = flat["next_observation"][index]
    columns = {name: Column(v, "step") for name, v in flat.items() if name not in _PER_FRAGMENT}
    columns |= {name: Column(v, "episode") for name, v in episode.items()}
    columns["kind"] = Column(torch.zeros(len(ends), dtype=torch.long), "episode", None, ("rollout",))
    turn = torch.from_numpy(np.concatenate([[0], ends + 1]))
    return Episodes({"turn": turn, "episode": one, "group": one}, columns)
