"""The one data type: ragged steps nested in turns, episodes and groups. No padding anywhere.

A *step* is one action: a token, an environment transition, a denoising step. Steps nest in levels::

    step < turn < episode < group          (a group shares a prompt, a start state or a tree prefix)

`Episodes` holds flat columns, each declared with the level it lives on, and the offsets of every level. Two verbs carry
the algebra between levels: `reduce` (up) and `expand` (down). A group-relative advantage is then: reduce rewards to
episodes, centre within groups, expand to steps.

Worked example: two prompts, three answers, six tokens::

    token     7 8 | 9 | 7 7 2          step column,    [N=6]
    prompt    [1 5]  [1 5]  [3]        ragged column,  one row of context tokens per turn (a turn per episode here)
    reward    1      0      1          episode column, [E=3]
    group     `----------´  `--´       offsets,        [G=2]

    episodes.expand("reward", to="step")            -> 1 1 0 1 1 1
    episodes.reduce("reward", to="group", how="mean") -> 0.5 1.0

Steps are actions only. What the actor saw before them (prompt, tool output, observation tokens) is a ragged *context*
column at level "turn": `prompt` by default; `sample_prompt` and `teacher_prompt` where the sampler or a teacher saw
something else than what the trained policy is conditioned on (`Episodes.context`).

Standard columns (open: add any)::

    token          step     int64    the action of a token policy
    behavior_logp  step     float    log-prob under the distribution that was sampled; NaN where unknown
    mask           step     bool     False: the step is in nobody's loss and nobody's count (absent: all count)
    reward         episode  float    (or step: rewards along the way)
    kind           episode  category rollout | demo | pair | label: what the row may be used for
    source         episode  category free names: fresh, replay, demos, ... : where the row came from
    policy_version episode  int64    optimiser step of the policy that acted; -1 unknown
    chosen         episode  bool     pairs and labels: preferred, judged good
    truncated      episode  bool     cut by a length limit: not finished
    prompt_id      episode  int64    identity of the prompt across batches
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from unipo.arrow import read_table, table_of
from unipo.ragged import LEVELS, Column, column_of, flattened, joined_column, offsets_of, ranges, segment_reduce

__all__ = ["LEVELS", "Column", "Episodes", "offsets_of", "ranges", "segment_reduce"]


class Episodes:
    """Ragged steps with named columns; immutable: every verb returns a new `Episodes` that shares what it can.

    `offsets`: for each of "turn", "episode", "group" the offsets [n + 1] into the level below.
    `columns`: name -> `Column`.
    """

    __slots__ = ("_columns", "_offsets")

    def __init__(self, offsets: Mapping[str, Tensor], columns: Mapping[str, Column]) -> None:
        self._offsets = dict(offsets)
        self._columns = dict(columns)
        for lower, upper in pairwise(LEVELS[1:]):
            if int(self._offsets[upper][-1]) != len(self._offsets[lower]) - 1:
                raise ValueError(f"offsets of {upper!r} cover {int(self._offsets[upper][-1])} entries, "
                                 f"but there are {len(self._offsets[lower]) - 1} at level {lower!r}")  # fmt: skip
        for name, column in self._columns.items():
            if len(column) != self.count(column.level):
                raise ValueError(
                    f"column {name!r} has {len(column)} entries, level {column.level!r} has {self.count(column.level)}"
                )

    @classmethod
    def build(
        cls,
        tokens: Sequence[Sequence[int] | Tensor],
        prompts: Sequence[Sequence[int] | Tensor] | None = None,
        group: Sequence[int] | None = None,
        **columns: Any,
    ) -> Episodes:
        """Single-turn episodes from lists: `tokens[i]` are the actions of episode i, `prompts[i]` its context.

        `group` [E]: equal neighbours share a group (default: each episode its own). Further columns: a flat sequence
        of E entries is an episode column (strings: a category), a sequence of E sequences is a step column.
        """
        lengths = torch.tensor([len(t) for t in tokens], dtype=torch.long)
        n = len(lengths)
        ids = torch.arange(n) if group is None else torch.as_tensor(group, dtype=torch.long)
        if len(ids) != n:
            raise ValueError(f"group has {len(ids)} entries for {n} episodes")
        counts = torch.unique_consecutive(ids, return_counts=True)[1] if n else torch.zeros(0, dtype=torch.long)
        one = torch.ones(n, dtype=torch.long)
        offsets = {"turn": offsets_of(lengths), "episode": offsets_of(one), "group": offsets_of(counts)}
        made = {"token": Column(flattened(tokens, torch.long), "step")}
        if prompts is not None:
            sizes = torch.tensor([len(p) for p in prompts], dtype=torch.long)
            made["prompt"] = Column(flattened(prompts, torch.long), "turn", offsets_of(sizes))
        for name, values in columns.items():
            made[name] = column_of(name, values, n)
        return cls(offsets, made)

    @classmethod
    def flat(
        cls, step: Mapping[str, Tensor], episode: Mapping[str, Tensor] | None = None, **categories: str
    ) -> Episodes:
        """Episodes of one step each, every one its own group, such as replayed transitions. Cheap: nothing is checked.

        `step`, `episode`: columns [n, ...] by level, at least one of step; `categories`: one value for all, such as
        kind="rollout".
        """
        n = len(next(iter(step.values())))
        made = object.__new__(cls)
        made._offsets = dict.fromkeys(LEVELS[1:], _counting(n + 1))
        made._columns = {name: Column(values, "step") for name, values in step.items()}
        for name, values in (episode or {}).items():
            made._columns[name] = Column(values, "episode")
        for name, value in categories.items():
            made._columns[name] = Column(_zeros(n), "episode", None, (value,))
        return made

    def as_steps(self) -> Episodes:
        """Every step an episode of its own, to be shuffled into minibatches that need no neighbours.

        Step columns stay. Of episodes, only categories and integers (whose they are: kind, source, policy_version) are
        carried to their steps: what is true of a whole episode need not be true of its steps.
        """
        kept = {n: c for n, c in self._columns.items() if c.level == "step" and c.offsets is None}
        for name, c in self._columns.items():
            if c.level == "episode" and c.offsets is None and c.values.dtype == torch.int64:
                kept[name] = Column(self.expand(c.values), "episode", None, c.names)
        made = object.__new__(Episodes)
        made._offsets = dict.fromkeys(LEVELS[1:], _counting(self.count("step") + 1).to(self.device))
        made._columns = kept
        return made

    @property
    def is_flat(self) -> bool:
        """Made by `flat` or `as_steps`: steps, episodes and groups are the same entries, and every verb is cheap."""
        return self._offsets["turn"] is self._offsets["group"]

    # ---- sizes -----------------------------------------------------------------------------------------------------
    def count(self, level: str) -> int:
        """How many entries a level has."""
        if level == "step":
            return int(self._offsets["turn"][-1])
        if level not in self._offsets:
            raise KeyError(f"unknown level {level!r}: expected one of {', '.join(LEVELS)}")
        return len(self._offsets[level]) - 1

    def __len__(self) -> int:
        return self.count("episode")

    def lengths(self, level: str = "episode", of: str = "step") -> Tensor:
        """[n(level)] int64: how many entries of the lower level `of` each entry of `level` holds."""
        if self.is_flat:
            return torch.ones(len(self), dtype=torch.long, device=self.device)
        bounds = self._offsets[level]
        for lower in reversed(LEVELS[LEVELS.index(of) + 1 : LEVELS.index(level)]):
            bounds = self._offsets[lower][bounds]
        return bounds[1:] - bounds[:-1]

    def index(self, to: str, level: str = "step") -> Tensor:
        """[n(level)] int64: the entry of level `to` that each entry of `level` belongs to."""
        if level == to or self.is_flat:
            return torch.arange(self.count(level), device=self.device)
        return torch.repeat_interleave(self.lengths(to, of=level))

    def position(self) -> Tensor:
        """[N] int64: 0, 1, 2, ... within each episode."""
        lengths = self.lengths()
        return ranges(torch.zeros_like(lengths), lengths)

    @property
    def device(self) -> torch.device:
        return self._offsets["turn"].device

    # ---- columns ---------------------------------------------------------------------------------------------------
    def __contains__(self, name: object) -> bool:
        return name in self._columns

    @property
    def columns(self) -> Mapping[str, Column]:
        """All columns by name (a copy: `Episodes` is immutable)."""
        return dict(self._columns)

    def column(self, name: str) -> Column:
        """The column called `name`; KeyError names the columns that exist."""
        if name not in self._columns:
            raise KeyError(f"these episodes have no column {name!r}; they have: {', '.join(sorted(self._columns))}")
        return self._columns[name]

    def __getitem__(self, name: str) -> Tensor:
        """The values of a column, at its own level."""
        return self.column(name).values

    def context(self, name: str = "score") -> Column:
        """The ragged context tokens per turn that `name` (score | sample | teacher) is conditioned on."""
        special = f"{name}_prompt"
        return self.column(special if special in self._columns else "prompt")

    def category(self, name: str, value: str) -> Tensor:
        """bool: where the categorical column `name` equals `value` (all False when the value never occurs)."""
        column = self.column(name)
        if value not in column.names:
            return torch.zeros(len(column), dtype=torch.bool, device=self.device)
        return column.values == column.names.index(value)

    def with_columns(self, level: str, /, **values: Any) -> Episodes:
        """Add or replace columns at `level`: tensors [n(level), ...], or strings (one for all, or one per entry)."""
        n = self.count(level)
        made = {name: column_of(name, v, n, level, self.device) for name, v in values.items()}
        return Episodes(self._offsets, {**self._columns, **made})

    def with_values(self, values: Mapping[str, Tensor]) -> Episodes:
        """The same columns with other numbers: `values` [as before] by name. Cheap: nothing is checked."""
        made = object.__new__(Episodes)
        made._offsets = self._offsets
        made._columns = {
            n: Column(values.get(n, c.values), c.level, c.offsets, c.names) for n, c in self._columns.items()
        }
        return made

    def with_context(self, name: str, contexts: Sequence[Sequence[int] | Tensor]) -> Episodes:
        """Add a ragged context column `<name>_prompt` (or `prompt` for "score"): one token sequence per turn."""
        sizes = torch.tensor([len(c) for c in contexts], dtype=torch.long)
        column = Column(flattened(contexts, torch.long), "turn", offsets_of(sizes)).to(self.device)
        return Episodes(self._offsets, {**self._columns, "prompt" if name == "score" else f"{name}_prompt": column})

    def without(self, *names: str) -> Episodes:
        return Episodes(self._offsets, {k: v for k, v in self._columns.items() if k not in names})

    # ---- the two verbs ---------------------------------------------------------------------------------------------
    def reduce(self, x: str | Tensor, to: str = "episode", how: str = "sum", level: str = "step") -> Tensor:
        """Carry `x` up to level `to`: [n(to), ...]. A name brings its own level; a tensor [n(level), ...] needs it."""
        x, level = self._named(x, level)
        if self.is_flat and how in ("sum", "mean", "max", "min"):
            return x if how != "mean" or x.is_floating_point() else x / 1
        return segment_reduce(x, self.index(to, level), self.count(to), how)

    def expand(self, x: str | Tensor, to: str = "step", level: str = "episode") -> Tensor:
        """Carry `x` down to level `to`: each entry repeats its parent's value."""
        x, level = self._named(x, level)
        return x if self.is_flat else x[self.index(level, to)]

    def _named(self, x: str | Tensor, level: str) -> tuple[Tensor, str]:
        if isinstance(x, str):
            column = self.column(x)
            return column.values, column.level
        if len(x) != self.count(level):
            raise ValueError(f"got {len(x)} values for the {self.count(level)} entries of level {level!r}")
        return x, level

    # ---- rows ------------------------------------------------------------------------------------------------------
    def select(self, keep: Tensor, level: str = "episode") -> Episodes:
        """Keep the entries of `level` where `keep` is True, or at the integer positions `keep` (in that order).

        Groups and turns left empty disappear with their columns; episodes left without steps stay (a mean over episodes
        counts them). Selecting out of order at "episode" level breaks groups apart where neighbours no longer touch.
        """
        keep = keep.nonzero().squeeze(1) if keep.dtype == torch.bool else keep
        if self.is_flat and level in ("episode", "group"):
            made = object.__new__(Episodes)
            made._offsets = dict.fromkeys(LEVELS[1:], _counting(len(keep) + 1).to(self.device))
            made._columns = {name: c.take(keep) for name, c in self._columns.items()}
            return made
        if level == "group":
            starts, sizes = self._offsets["group"][:-1], self.lengths("group", "episode")
            return self.select(ranges(starts[keep], sizes[keep]))
        if level == "step":
            return self._select_steps(keep)
        if level != "episode":
            raise ValueError(f"cannot select at level {level!r}: use step, episode or group")
        turn_counts, step_counts = self.lengths("episode", "turn"), self.lengths("turn", "step")
        turns = ranges(self._offsets["episode"][:-1][keep], turn_counts[keep])
        steps = ranges(self._offsets["turn"][:-1][turns], step_counts[turns])
        owner = self.index("group", "episode")[keep]
        groups, sizes = torch.unique_consecutive(owner, return_counts=True)
        taken = {"step": steps, "turn": turns, "episode": keep, "group": groups}
        counts = {"turn": step_counts[turns], "episode": turn_counts[keep], "group": sizes}
        columns = {name: c.take(taken[c.level]) for name, c in self._columns.items()}
        return Episodes({k: offsets_of(v) for k, v in counts.items()}, columns)

    def minibatches(self, order: Tensor, parts: int) -> Iterator[Episodes]:
        """The groups in an `order` [G] (int64), in `parts` of nearly equal size; of single steps they are views of one copy."""
        if not self.is_flat:
            for chunk in order.tensor_split(parts):
                yield self.select(chunk, "group")
            return
        shuffled = self.select(order, "group")
        bounds = accumulate((len(chunk) for chunk in order.tensor_split(parts)), initial=0)
        for start, stop in pairwise(bounds):
            made = object.__new__(Episodes)
            made._offsets = dict.fromkeys(LEVELS[1:], _counting(stop - start + 1).to(self.device))
            made._columns = {
                n: Column(c.values[start:stop], c.level, None, c.names) for n, c in shuffled._columns.items()
            }
            yield made

    def _select_steps(self, keep: Tensor) -> Episodes:
        counts = torch.bincount(self.index("turn")[keep], minlength=self.count("turn"))
        columns = {name: c.take(keep) if c.level == "step" else c for name, c in self._columns.items()}
        return Episodes({**self._offsets, "turn": offsets_of(counts)}, columns)

    def as_one_group(self) -> Episodes:
        """The same episodes, all in one group; group columns are dropped unless there was one group already."""
        columns = (
            {k: c for k, c in self._columns.items() if c.level != "group"} if self.count("group") > 1 else self._columns
        )
        bounds = torch.tensor([0, len(self)], device=self.device)
        return Episodes({**self._offsets, "group": bounds}, columns)

    def grouped(self, by: Tensor) -> Episodes:
        """The same episodes with those of one number in `by` [E] in a group, by rising number; group columns are dropped."""
        made = self.select(torch.argsort(by, stable=True))
        sizes = torch.unique(by, return_counts=True)[1]
        columns = {k: c for k, c in made._columns.items() if c.level != "group"}
        return Episodes({**made._offsets, "group": offsets_of(sizes)}, columns)

    def split(self, budget: int, cost: Tensor) -> list[Tensor]:
        """Episode indices of micro-batches, in order, such that the sum of `cost` [E] stays within `budget`.

        Groups stay whole where they fit (what they share is computed once, and pairs can be compared); signals are per step,
        so a larger group may be cut. Every episode is in exactly one micro-batch; one that alone exceeds the budget has a
        micro-batch of its own.
        """
        if not len(cost):
            return []
        if int(cost.sum()) <= budget:
            return [torch.arange(len(cost), device=self.device)]
        sizes, batches, room = cost.tolist(), list[list[int]](), 0
        for members in torch.arange(len(cost)).split(self.lengths("group", "episode").tolist()):
            rows = members.tolist()
            for part in [rows] if sum(sizes[i] for i in rows) <= budget else [[i] for i in rows]:
                size = sum(sizes[i] for i in part)
                if batches and size <= room:
                    batches[-1] += part
                    room -= size
                else:
                    batches.append(list(part))
                    room = budget - size
        return [torch.tensor(b, device=self.device) for b in batches]

    def step_index(self, episodes: Tensor) -> Tensor:
        """Positions in the flat step columns of the steps of `episodes` [k] (integer), in that order."""
        counts = self.lengths()
        return ranges(offsets_of(counts)[:-1][episodes], counts[episodes])

    def to(self, device: torch.device | str) -> Episodes:
        moved = {id(v): v.to(device) for v in self._offsets.values()}
        return Episodes({k: moved[id(v)] for k, v in self._offsets.items()},
                        {k: v.to(device) for k, v in self._columns.items()})  # fmt: skip

    @staticmethod
    def cat(parts: Sequence[Episodes]) -> Episodes:
        """One batch of several; a column must live on one level everywhere.

        A column that some parts lack is filled with NaN (float), -1 (integer), False (bool; True for `mask`) or nothing
        (ragged): select the rows that have it before using it.
        """
        parts = [p for p in parts if p.count("group")] or list(parts[:1])
        if not parts:
            raise ValueError("cannot concatenate an empty list of Episodes")
        offsets = {k: offsets_of(torch.cat([p._offsets[k].diff() for p in parts])) for k in LEVELS[1:]}
        names = dict.fromkeys(name for p in parts for name in p._columns)
        columns = [p._columns for p in parts]
        counts = [{level: p.count(level) for level in LEVELS} for p in parts]
        return Episodes(offsets, {name: joined_column(name, columns, counts) for name in names})

    # ---- disk ------------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write one Parquet file (a row per episode), atomically: readers see the whole file or none."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        pq.write_table(self.to_arrow(), temporary, compression="zstd")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> Episodes:
        """Read what `save` wrote. Raises ValueError for a Parquet file that is not one of ours."""
        return cls.from_arrow(pq.read_table(path))

    def to_arrow(self) -> pa.Table:
        """A row per episode: step, turn and ragged columns become lists, group columns repeat."""
        host = self.to("cpu")
        return table_of(host._offsets, host._columns)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Episodes:
        """The inverse of `to_arrow`."""
        return cls(*read_table(table))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{self.count(level)} {level}s" for level in reversed(LEVELS))
        return f"Episodes({sizes}; columns: {', '.join(self._columns)})"


@lru_cache(maxsize=64)
def _counting(n: int) -> Tensor:
    return torch.arange(n)


@lru_cache(maxsize=64)
def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)
