"""Transition replay: single environment steps in a ring of packed rows, drawn with keyed generators."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.acting.sum_tree import SumTree
from unipo.sources.keyed import keyed_generator

Array = NDArray[Any]
_EPISODE = ("terminated", "truncated", "policy_version")
_ROW_ONLY = ("env", "episode_number")
TOGETHER = 8
"""Batches that are gathered at once where several are asked for: a gather of one is mostly the time between its operations."""


@dataclass(frozen=True, slots=True)
class Prioritised:
    """Row i is drawn with P(i) = p_i^alpha / sum p^alpha, p_i = |error_i| + eps (Schaul et al. 2016, proportional, stratified).

    The correction (N P(i))^-beta, divided by the largest of the batch, is column `replay_weight`; beta rises to 1 in
    `beta_steps` steps (0: it stays). A new row has the largest priority seen so far.
    """

    alpha: float = 0.6
    beta: float = 0.4
    beta_steps: int = 0
    eps: float = 1e-6

    def correction(self, step: int) -> float:
        """beta at `step`."""
        return self.beta + (1 - self.beta) * min(step / self.beta_steps, 1.0) if self.beta_steps else self.beta


class TransitionReplay:
    """Keeps the last `capacity` transitions and draws from them with replacement: a function of (content, seed, step, index).

    A transition is one packed row, so that a batch is one gather. The rows' columns are those of the first rows added.

    Args:
        gamma, n_step: a drawn row stands for up to n_step steps: their discounted rewards, and where they led to. They end
            with the episode, or with the newest row; `discount` = gamma^(number of steps) multiplies what is bootstrapped.
        noise: names and shapes of standard normals for every row of a batch, such as {"noise": (6,), "next_noise": (6,)}.
        prioritised: draw in proportion to what `update_priorities` was told, instead of uniformly.
        folder: keep the rows in the memory-mapped file `folder/transitions.npy`, with `slack` more rows than `capacity`:
            a checkpoint then needs no copy of them, and is whole until `slack` further rows have been added.
    """

    def __init__(self, capacity: int, seed: int, gamma: float = 0.99, n_step: int = 1,
                 noise: Mapping[str, tuple[int, ...]] | None = None, prioritised: Prioritised | None = None,
                 folder: Path | None = None, slack: int = 100_000) -> None:  # fmt: skip
        if capacity < 1 or n_step < 1:
            raise ValueError(f"capacity is {capacity} and n_step {n_step}: expected at least 1")
        self.capacity, self.seed, self.gamma, self.n_step = capacity, seed, gamma, n_step
        self.noise, self.prioritised, self.folder = dict(noise or {}), prioritised, folder
        self.size = capacity if folder is None else capacity + slack
        self.written = 0
        self._rows: Array | None = None
        self._names: list[str] = []
        self._newest: dict[int, int] = {}
        self._normals = torch.Generator()
        self._tree = SumTree(self.size) if prioritised else None
        self._largest = 1.0

    def __len__(self) -> int:
        return min(self.written, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return 0 if self._rows is None else self._rows.nbytes

    # ---- adding ----------------------------------------------------------------------------------------------------
    def add(self, fragments: Episodes) -> None:
        """Add the steps of fragments, as `Collector.collect` gave them."""
        rows = rows_of(fragments)
        for start in range(0, len(rows["reward"]), self.capacity):
            self.add_rows({name: v[start : start + self.capacity] for name, v in rows.items()})

    def add_rows(self, rows: Mapping[str, Array]) -> None:
        """Add what `Collector.step` gave: at most `capacity` rows [n, ...]; the oldest make room. ValueError: other columns."""
        if self._rows is None:
            self._rows = self._opened(_row_type(rows))
        numbers = np.arange(self.written, self.written + len(rows["reward"]))
        slots = numbers % self.size
        try:
            for name in self._names:
                self._rows[name][slots] = rows[name]
        except (KeyError, ValueError) as error:
            raise ValueError(f"these rows do not fit the replay's {self._rows.dtype}: {error}") from error
        self._rows["ahead"][slots] = 0
        self._link(rows)
        self.written += len(numbers)
        if self._tree is not None:
            self._tree[(numbers - self.capacity) % self.size] = 0.0
            self._tree[slots] = self._largest
        if self.folder is not None:
            self._count[0] = self.written

    def _link(self, rows: Mapping[str, Array]) -> None:
        """Tell every row how far ahead the next step of its episode is."""
        assert self._rows is not None
        ended = (rows["terminated"] | rows["truncated"]).tolist()
        for number, (env, over) in enumerate(zip(rows["env"].tolist(), ended, strict=True), self.written):
            before = self._newest.pop(env, None)
            if before is not None and number - before < self.capacity:
                self._rows["ahead"][before % self.size] = number - before
            if not over:
                self._newest[env] = number

    def update_priorities(self, numbers: Tensor, errors: Tensor) -> None:
        """New priorities |errors| [n] of the rows `numbers` [n], column `replay_index` of a batch. Rows that left are skipped."""
        assert self._tree is not None, "this replay is not prioritised"
        alpha, eps = self._rule.alpha, self._rule.eps
        priorities = (errors.detach().abs().double().numpy() + eps) ** alpha
        here = numbers.numpy() >= self.written - self.capacity
        self._tree[numbers.numpy()[here] % self.size] = priorities[here]
        self._largest = max(self._largest, float(priorities.max(initial=0.0)))

    # ---- drawing ---------------------------------------------------------------------------------------------------
    def sample(self, batch_size: int, step: int, index: int = 0) -> Episodes:
        """`batch_size` transitions as episodes of one step; `index` tells several batches of one step apart.

        Step columns: observation, action, reward (n-step sum), behavior_logp, the info columns and the noise. Episode
        columns: terminated, truncated, final_observation, discount, policy_version, kind, and where prioritised
        replay_weight and replay_index. Raises ValueError when empty.
        """
        return next(self._batches(batch_size, 1, step, index))

    def samples(self, batch_size: int, step: int, count: int) -> Iterator[Episodes]:
        """`count` batches of one step, between which nothing is added: a function of (content, seed, step, count)."""
        together = TOGETHER if self.prioritised is None else 1
        for index in range(0, count, together):
            yield from self._batches(batch_size, min(together, count - index), step, index)

    def _batches(self, batch_size: int, count: int, step: int, index: int) -> Iterator[Episodes]:
        """From one gather; batches are views of it."""
        columns, episode = self._gathered(batch_size * count, step, index)
        for parts in zip(*(values.split(batch_size) for values in (*columns.values(), *episode.values())), strict=True):
            of = iter(parts)
            yield Episodes.flat({n: next(of) for n in columns}, {n: next(of) for n in episode}, kind="rollout")

    def _gathered(self, n: int, step: int, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Columns [n, ...] of steps and of episodes."""
        if self._rows is None:
            raise ValueError("the replay is empty: add transitions before sampling")
        generator = keyed_generator(self.seed, "transitions", step, index)
        numbers, extra = self._drawn(generator, n, step)
        rows = self._rows.take(numbers % self.size)
        columns = {name: torch.from_numpy(np.ascontiguousarray(rows[name])) for name in self._names}
        final, discount = columns.pop("next_observation"), torch.full((n,), self.gamma)
        episode = {name: columns.pop(name) for name in _EPISODE}
        if self.n_step > 1:
            last, reward, reached = self._followed(numbers, rows)
            columns["reward"], discount = torch.from_numpy(reward), torch.from_numpy(reached)
            final, episode["terminated"], episode["truncated"] = (
                torch.from_numpy(np.ascontiguousarray(last[name]))
                for name in ("next_observation", "terminated", "truncated")
            )
        if self.noise:
            source = self._normals.manual_seed(int(generator.integers(2**63)))
            columns |= {name: torch.randn((n, *shape), generator=source) for name, shape in self.noise.items()}
        return columns, {**episode, "final_observation": final, "discount": discount, **extra}

    def _drawn(self, generator: np.random.Generator, n: int, step: int) -> tuple[Array, dict[str, Tensor]]:
        oldest = self.written - len(self)
        if self._tree is None:
            return oldest + generator.integers(0, len(self), n), {}
        total = self._tree.total
        slots = self._tree.find((np.arange(n) + generator.random(n)) * (total / n))
        numbers = oldest + (slots - oldest) % self.size
        weight = (len(self) * self._tree[slots] / total) ** -self._rule.correction(step)
        largest_is_1 = torch.from_numpy((weight / weight.max()).astype(np.float32))
        return numbers, {"replay_weight": largest_is_1, "replay_index": torch.from_numpy(numbers)}

    def _followed(self, numbers: Array, rows: Array) -> tuple[Array, Array, Array]:
        """Where up to n_step steps from `numbers` [n] lead: the last rows, sum_k gamma^k r_k, gamma^(number of steps)."""
        assert self._rows is not None
        reward, discount = rows["reward"].copy(), np.full(len(rows), self.gamma, dtype=np.float32)
        for _ in range(self.n_step - 1):
            after = numbers + rows["ahead"]
            on = (rows["ahead"] > 0) & (after < self.written)
            numbers = np.where(on, after, numbers)
            rows = self._rows.take(numbers % self.size)
            reward += np.where(on, discount * rows["reward"], np.float32(0))
            discount = np.where(on, discount * np.float32(self.gamma), discount)
        return rows, reward, discount

    # ---- disk ------------------------------------------------------------------------------------------------------
    def _opened(self, row_type: np.dtype[Any] | None = None) -> Array:
        """The ring: in memory, or a file; `row_type` None reads the file that is there."""
        rows = np.zeros(self.size, row_type) if self.folder is None else self._mapped(self.folder, row_type)
        self._names = [name for name in rows.dtype.names or () if name != "ahead"]
        return rows

    def _mapped(self, folder: Path, row_type: np.dtype[Any] | None) -> Array:
        folder.mkdir(parents=True, exist_ok=True)
        rows, count = folder / "transitions.npy", folder / "written.npy"
        if row_type is None:
            self._file, self._count = open_memmap(rows, "r+"), open_memmap(count, "r+")
        else:
            self._file, self._count = (
                open_memmap(rows, "w+", row_type, (self.size,)),
                open_memmap(count, "w+", np.int64, (1,)),
            )
        return np.asarray(self._file)

    @property
    def _rule(self) -> Prioritised:
        assert self.prioritised is not None
        return self.prioritised

    def _window(self) -> Array:
        return np.arange(self.written - len(self), self.written) % self.size

    def remembered(self, name: str) -> Tensor:
        """[n, ...]: a copy of one column of everything that is remembered, the oldest first."""
        if self._rows is None:
            raise ValueError("the replay is empty: add transitions first")
        return torch.from_numpy(self._rows[name][self._window()].copy())

    def save(self, folder: Path) -> None:
        """Write to the checkpoint `folder` what `load` needs: everything, or where a file holds the rows, the rest."""
        if self._rows is None:
            return
        state = {"written": self.written, "newest": list(self._newest.items()), "largest": self._largest}
        (folder / "replay.json").write_text(json.dumps(state))
        if self._tree is not None:
            np.save(folder / "priorities.npy", self._tree[self._window()])
        if self.folder is None:
            np.save(folder / "transitions.npy", self._rows[self._window()])
        else:
            self._file.flush()

    def load(self, folder: Path) -> None:
        """Continue exactly where `save` was called. ValueError where the file's rows have been overwritten since."""
        if not (folder / "replay.json").exists():
            return
        state = json.loads((folder / "replay.json").read_text())
        self.written, self._newest, self._largest = (
            state["written"],
            dict(map(tuple, state["newest"])),
            state["largest"],
        )
        if self.folder is None:
            kept = np.load(folder / "transitions.npy")
            self._rows = self._opened(kept.dtype)
            self._rows[self._window()] = kept
        else:
            self._rows = self._opened()
            self._whole()
        if self._tree is not None:
            self._tree = SumTree(self.size)
            self._tree[self._window()] = np.load(folder / "priorities.npy")

    def _whole(self) -> None:
        assert self._rows is not None
        if len(self._rows) != self.size:
            raise ValueError(
                f"{self.folder} holds {len(self._rows)} rows, expected {self.size}: keep capacity and slack"
            )
        over = int(self._count[0]) - self.written - (self.size - self.capacity)
        if over > 0 and int(self._count[0]) > self.size:
            raise ValueError(
                f"{over} transitions that the checkpoint needs were overwritten in {self.folder}: "
                "checkpoint more often, or give the replay more slack"
            )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


def rows_of(fragments: Episodes) -> dict[str, Array]:
    """Rows [N, ...] of fragments: what `Collector.step` gives, in the order of the fragments' steps.

    Column `env` may be missing where no fragment goes on in a later one (no `unfinished`).
    """
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
    for name in ("env", "policy_version"):
        rows[name] = fragments[name][index] if name in fragments else torch.full((steps,), -1)
    return {name: v.numpy() for name, v in rows.items()}


def _row_type(rows: Mapping[str, Array]) -> np.dtype[Any]:
    """Widest numbers first, so that nothing is lost to alignment."""
    fields = [(name, v.dtype, v.shape[1:]) for name, v in rows.items() if name not in _ROW_ONLY]
    fields.append(("ahead", np.dtype(np.int32), ()))
    return np.dtype(sorted(fields, key=lambda field: -field[1].itemsize), align=True)
