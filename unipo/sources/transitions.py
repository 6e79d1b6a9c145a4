"""Transition replay: single environment steps in a ring of packed rows, drawn with keyed generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.keyed import keyed_generator

Array = NDArray[Any]
_EPISODE = ("terminated", "truncated", "policy_version")
_ROW_ONLY = ("env", "episode_number")


class TransitionReplay:
    """Keeps the last `capacity` transitions and draws from them uniformly, with replacement.

    A transition is one packed row, so that a batch is one gather. The rows' columns are those of the first rows added.
    `noise`: names and shapes of the standard normals that a batch carries, such as {"noise": (6,), "next_noise": (6,)}.
    `n_step`, `gamma`: a drawn row stands for up to n_step steps: their discounted rewards and where they led to. They end
    with the episode, or with the newest row; `discount` says gamma^(steps), to multiply what is bootstrapped.
    """

    def __init__(self, capacity: int, seed: int, gamma: float = 0.99, n_step: int = 1,
                 noise: Mapping[str, tuple[int, ...]] | None = None) -> None:  # fmt: skip
        self.capacity, self.seed, self.gamma, self.n_step = capacity, seed, gamma, n_step
        self.noise = dict(noise or {})
        self.written = 0
        self._rows: Array | None = None
        self._newest: dict[int, int] = {}

    def __len__(self) -> int:
        return min(self.written, self.capacity)

    # ---- adding ----------------------------------------------------------------------------------------------------
    def add_rows(self, rows: Mapping[str, Array]) -> None:
        """Add what `Collector.step` gave: rows [n, ...], in the order given; the oldest make room."""
        count = len(rows["reward"])
        if self._rows is None:
            self._rows = np.zeros(self.capacity, dtype=_row_type(rows))
        slots = np.arange(self.written, self.written + count) % self.capacity
        for name in self._rows.dtype.names or ():
            if name != "ahead":
                self._rows[name][slots] = rows[name]
        self._rows["ahead"][slots] = 0
        self._link(rows)
        self.written += count

    def _link(self, rows: Mapping[str, Array]) -> None:
        """Tell every row how far ahead the next step of its episode is."""
        assert self._rows is not None
        ended = rows["terminated"] | rows["truncated"]
        for i, env in enumerate(rows["env"].tolist()):
            number, before = self.written + i, self._newest.pop(env, None)
            if before is not None and number - before < self.capacity:
                self._rows["ahead"][before % self.capacity] = number - before
            if not ended[i]:
                self._newest[env] = number

    def add(self, fragments: Episodes) -> None:
        """Add the steps of fragments, as `Collector.collect` gave them."""
        self.add_rows(rows_of(fragments))

    # ---- drawing ---------------------------------------------------------------------------------------------------
    def sample(self, batch_size: int, step: int, index: int = 0) -> Episodes:
        """`batch_size` transitions, a function of (content, seed, step, index) alone, as episodes of one step.

        Step columns: observation, action, reward (n-step sum), behavior_logp, the info columns and the noise. Episode
        columns: terminated, truncated, final_observation, discount, policy_version, kind.
        """
        if self._rows is None:
            raise ValueError("the replay is empty: add transitions before sampling")
        generator = keyed_generator(self.seed, "transitions", step, index)
        numbers = self.written - len(self) + generator.integers(0, len(self), batch_size)
        rows = self._rows.take(numbers % self.capacity)
        columns = {name: torch.from_numpy(np.ascontiguousarray(rows[name])) for name in rows.dtype.names or ()}
        columns.pop("ahead")
        final = columns.pop("next_observation")
        episode = {name: columns.pop(name) for name in _EPISODE}
        episode["policy_version"] = episode["policy_version"].long()
        episode |= {"final_observation": final, "discount": torch.full((batch_size,), self.gamma)}
        for name, shape in self.noise.items():
            drawn = generator.standard_normal((batch_size, *shape), dtype=np.float32)
            columns[name] = torch.from_numpy(drawn)
        return Episodes.flat(columns, episode, kind="rollout")


def rows_of(fragments: Episodes) -> dict[str, Array]:
    """Rows [N, ...] of fragments: what `Collector.step` gives, in the order of the fragments' steps."""
    index, steps = fragments.index("episode"), fragments.count("step")
    last = torch.zeros(steps, dtype=torch.bool)
    ends = fragments.lengths().cumsum(0) - 1
    last[ends] = True
    after = fragments["observation"].roll(-1, 0)
    after[ends] = fragments["final_observation"]
    over = ~fragments["terminated"]
    if "unfinished" in fragments:
        over = over & ~fragments["unfinished"]
    rows: dict[str, Tensor] = {n: c.values for n, c in fragments.columns.items() if c.level == "step"}
    rows |= {
        "next_observation": after,
        "terminated": last & fragments["terminated"][index],
        "truncated": last & over[index],
    }
    rows |= {name: fragments[name][index] for name in ("env", "episode_number", "policy_version")}
    return {name: v.numpy() for name, v in rows.items()}


def _row_type(rows: Mapping[str, Array]) -> np.dtype[Any]:
    kept = {name: v for name, v in rows.items() if name not in _ROW_ONLY}
    fields = [(name, np.int32 if name == "policy_version" else v.dtype, v.shape[1:]) for name, v in kept.items()]
    fields.sort(key=lambda f: -np.dtype(f[1]).itemsize)
    return np.dtype([*fields, ("ahead", np.int32)], align=True)
