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
    kind           episode  category rollout | demo | pair: what the row may be used for
    source         episode  category free names: fresh, replay, demos, ... : where the row came from
    policy_version episode  int64    optimiser step of the policy that acted; -1 unknown
    chosen         episode  bool     pairs only: the preferred side
    truncated      episode  bool     cut by a length limit: not finished
    prompt_id      episode  int64    identity of the prompt across batches
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

LEVELS = ("step", "turn", "episode", "group")
_MISSING: dict[bool, float | int] = {True: float("nan"), False: -1}


def segment_reduce(x: Tensor, index: Tensor, n: int, how: str = "sum") -> Tensor:
    """Reduce rows of `x` [m, ...] that share a segment id `index` [m] (int64) to one row each: [n, ...].

    `how`: sum, mean, max, min, any, all. An empty segment gives 0 for sum and mean, -inf / +inf for max / min (the
    extreme value for integers), False for any, True for all. Differentiable for sum, mean, max and min.
    """
    shape = (n, *x.shape[1:])
    if how == "sum":
        return x.new_zeros(shape).index_add(0, index, x)
    if how == "mean":
        count = torch.bincount(index, minlength=n).clamp(min=1)
        return segment_reduce(x, index, n) / count.to(x.dtype).reshape(n, *[1] * (x.ndim - 1))
    if how in ("max", "min"):
        info: Any = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
        worst = -float("inf") if x.is_floating_point() else info.min
        best = float("inf") if x.is_floating_point() else info.max
        start = x.new_full(shape, worst if how == "max" else best)
        where = index.reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)
        return start.scatter_reduce(0, where, x, "amax" if how == "max" else "amin")
    if how == "any":
        return segment_reduce(x.long(), index, n) > 0
    if how == "all":
        return segment_reduce((~x.bool()).long(), index, n) == 0
    raise ValueError(f"unknown reduction {how!r}: expected sum, mean, max, min, any or all")


def offsets_of(counts: Tensor) -> Tensor:
    """Offsets [n + 1] from counts [n]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """The concatenation of arange(starts[i], starts[i] + counts[i])."""
    owner = torch.repeat_interleave(counts)
    within = torch.arange(int(counts.sum()), device=counts.device) - offsets_of(counts)[:-1][owner]
    return starts[owner] + within


@dataclass(frozen=True, slots=True)
class Column:
    """One named column: `values` [n, ...] for the n entries of `level`.

    With `offsets` [n + 1] the column is ragged: entry i owns values[offsets[i]:offsets[i+1]].
    With `names` the values are int64 codes of categories.
    """

    values: Tensor
    level: str
    offsets: Tensor | None = None
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def take(self, index: Tensor) -> Column:
        """The entries at `index` [k], in that order."""
        if self.offsets is None:
            return Column(self.values[index], self.level, None, self.names)
        counts = self.offsets[1:] - self.offsets[:-1]
        flat = ranges(self.offsets[:-1][index], counts[index])
        return Column(self.values[flat], self.level, offsets_of(counts[index]), self.names)

    def to(self, device: torch.device | str) -> Column:
        offsets = None if self.offsets is None else self.offsets.to(device)
        return Column(self.values.to(device), self.level, offsets, self.names)


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
        made = {"token": Column(_flat(tokens, torch.long), "step")}
        if prompts is not None:
            sizes = torch.tensor([len(p) for p in prompts], dtype=torch.long)
            made["prompt"] = Column(_flat(prompts, torch.long), "turn", offsets_of(sizes))
        for name, values in columns.items():
            made[name] = _column(name, values, n)
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
        made = {name: _column(name, v, n, level, self.device) for name, v in values.items()}
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
        column = Column(_flat(contexts, torch.long), "turn", offsets_of(sizes)).to(self.device)
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
        return Episodes(offsets, {name: _cat_column(name, parts) for name in names})

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
        arrays: dict[str, pa.Array] = {
            "group": pa.array(host.index("group", "episode").numpy()),
            "turn_lengths": _list(host._offsets["episode"], pa.array(host.lengths("turn").numpy())),
        }
        schema: dict[str, Any] = {}
        for name, c in host._columns.items():
            dtype = str(c.values.dtype).removeprefix("torch.")
            schema[name] = {"level": c.level, "dtype": dtype, "shape": list(c.values.shape[1:]),
                            "names": list(c.names), "ragged": c.offsets is not None}  # fmt: skip
            arrays[f"column.{name}"] = host._arrow_column(c)
        table = pa.table(arrays)
        return table.replace_schema_metadata({"unipo.episodes": json.dumps(schema)})

    def _arrow_column(self, c: Column) -> pa.Array:
        flat = c.values.float() if c.values.dtype == torch.bfloat16 else c.values
        values = pa.array(flat.reshape(-1).numpy())
        for size in reversed(c.values.shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, size)
        if c.offsets is not None:
            values = _list(c.offsets, values)
        if c.level == "group":
            return values.take(pa.array(self.index("group", "episode").numpy()))
        for level in LEVELS[LEVELS.index(c.level) + 1 : LEVELS.index("episode") + 1]:
            values = _list(self._offsets[level], values)
        return values

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Episodes:
        """The inverse of `to_arrow`."""
        described = (table.schema.metadata or {}).get(b"unipo.episodes")
        if described is None:
            raise ValueError(
                "this table was not written by Episodes.to_arrow; load user data with unipo.sources.datasets"
            )
        table = table.combine_chunks()
        turns, owner = _array(table, "turn_lengths"), torch.from_numpy(_array(table, "group").to_numpy().copy())
        groups = torch.unique_consecutive(owner, return_counts=True)[1]
        step_counts = torch.from_numpy(turns.flatten().to_numpy().copy()).long()
        turn_counts = torch.from_numpy(turns.value_lengths().to_numpy().copy()).long()
        offsets = {"turn": offsets_of(step_counts), "episode": offsets_of(turn_counts), "group": offsets_of(groups)}
        first = pa.array(offsets_of(groups)[:-1].numpy())
        columns = {}
        for name, info in json.loads(described).items():
            array = _array(table, f"column.{name}")
            array = array.take(first) if info["level"] == "group" else array
            columns[name] = _read_column(array, info)
        return cls(offsets, columns)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{self.count(level)} {level}s" for level in reversed(LEVELS))
        return f"Episodes({sizes}; columns: {', '.join(self._columns)})"


@lru_cache(maxsize=64)
def _counting(n: int) -> Tensor:
    return torch.arange(n)


@lru_cache(maxsize=64)
def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


# ---- making columns ------------------------------------------------------------------------------------------------
def _flat(rows: Sequence[Sequence[Any] | Tensor], dtype: torch.dtype | None = None) -> Tensor:
    if all(isinstance(r, list | tuple) for r in rows):
        cells = list(chain.from_iterable(rows))
        return torch.as_tensor(cells, dtype=dtype) if cells else torch.zeros(0, dtype=dtype or torch.float32)
    parts = [torch.as_tensor(r, dtype=dtype) for r in rows if len(r)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype or torch.float32)


def _column(name: str, values: Any, n: int, level: str = "episode", device: torch.device | str = "cpu") -> Column:
    if isinstance(values, Column):
        return values
    if isinstance(values, Tensor):
        return Column(values.to(device), level)
    if isinstance(values, str):
        return Column(torch.zeros(n, dtype=torch.long, device=device), level, None, (values,))
    values = list(values)
    if values and isinstance(values[0], str):
        names = tuple(dict.fromkeys(values))
        return Column(torch.tensor([names.index(v) for v in values], device=device), level, None, names)
    if values and level == "episode" and isinstance(values[0], Sequence | Tensor | np.ndarray):
        return Column(_flat(values).to(device), "step")
    return Column(torch.as_tensor(values).to(device), level)


def _cat_column(name: str, parts: Sequence[Episodes]) -> Column:
    have = [p._columns[name] for p in parts if name in p._columns]
    model = have[0]
    if any(c.level != model.level for c in have):
        raise ValueError(
            f"column {name!r} lives on levels {sorted({c.level for c in have})}: one is needed to concatenate"
        )
    names = tuple(dict.fromkeys(v for c in have for v in c.names))
    if names and len(have) < len(parts) and "" not in names:
        names = (*names, "")
    full = [_recode(p._columns[name], names) if name in p._columns else _filled(name, model, p, names) for p in parts]
    values = torch.cat([c.values for c in full])
    if model.offsets is None:
        return Column(values, model.level, None, names)
    return Column(values, model.level, offsets_of(torch.cat([c.offsets.diff() for c in full if c.offsets is not None])))


def _recode(column: Column, names: tuple[str, ...]) -> Column:
    if column.names == names:
        return column
    table = torch.tensor([names.index(v) for v in column.names], device=column.values.device)
    return Column(table[column.values], column.level, None, names)


def _filled(name: str, model: Column, part: Episodes, names: tuple[str, ...]) -> Column:
    n = part.count(model.level)
    if model.offsets is not None:
        return Column(model.values[:0], model.level, model.offsets.new_zeros(n + 1))
    blank = model.values.new_empty((n, *model.values.shape[1:]))
    if names:
        return Column(blank.fill_(names.index("")), model.level, None, names)
    if blank.dtype == torch.bool:
        return Column(blank.fill_(name == "mask"), model.level)
    return Column(blank.fill_(_MISSING[blank.is_floating_point()]), model.level)


# ---- Arrow ---------------------------------------------------------------------------------------------------------
def _list(offsets: Tensor, values: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(offsets.numpy(), pa.int64()), values)


def _array(table: pa.Table, name: str) -> Any:
    chunked = table.column(name)
    return (
        chunked.chunk(0)
        if chunked.num_chunks == 1
        else pa.concat_arrays(chunked.chunks or [pa.array([], chunked.type)])
    )


def _read_column(array: Any, info: Mapping[str, Any]) -> Column:
    level = info["level"]
    for _ in range(max(0, LEVELS.index("episode") - LEVELS.index(level))):
        array = array.flatten()
    offsets = None
    if info["ragged"]:
        offsets = offsets_of(torch.from_numpy(array.value_lengths().to_numpy(zero_copy_only=False).copy()).long())
        array = array.flatten()
    for _ in info["shape"]:
        array = array.flatten()
    flat = torch.from_numpy(array.to_numpy(zero_copy_only=False).copy()).to(getattr(torch, info["dtype"]))
    return Column(flat.reshape(-1, *info["shape"]) if info["shape"] else flat, level, offsets, tuple(info["names"]))
