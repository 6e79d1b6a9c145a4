"""Ragged columns: values of one level, their categories and offsets, and reductions over segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
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


# ---- making columns ------------------------------------------------------------------------------------------------
def flattened(rows: Sequence[Sequence[Any] | Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Rows one behind the other."""
    if all(isinstance(r, list | tuple) for r in rows):
        cells = list(chain.from_iterable(rows))
        return torch.as_tensor(cells, dtype=dtype) if cells else torch.zeros(0, dtype=dtype or torch.float32)
    parts = [torch.as_tensor(r, dtype=dtype) for r in rows if len(r)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype or torch.float32)


def column_of(name: str, values: Any, n: int, level: str = "episode", device: torch.device | str = "cpu") -> Column:
    """A column of whatever describes one: a tensor, a name for all, a name or number each, or lists of steps."""
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
        return Column(flattened(values).to(device), "step")
    return Column(torch.as_tensor(values).to(device), level)


def joined_column(name: str, parts: Sequence[Mapping[str, Column]], counts: Sequence[Mapping[str, int]]) -> Column:
    """The column of several parts; where a part has none it is blank. `counts` [parts]: entries of each level."""
    have = [p[name] for p in parts if name in p]
    model = have[0]
    if any(c.level != model.level for c in have):
        raise ValueError(
            f"column {name!r} lives on levels {sorted({c.level for c in have})}: one is needed to concatenate"
        )
    names = tuple(dict.fromkeys(v for c in have for v in c.names))
    if names and len(have) < len(parts) and "" not in names:
        names = (*names, "")
    full = [
        _recode(p[name], names) if name in p else _filled(name, model, size[model.level], names)
        for p, size in zip(parts, counts, strict=True)
    ]
    values = torch.cat([c.values for c in full])
    if model.offsets is None:
        return Column(values, model.level, None, names)
    return Column(values, model.level, offsets_of(torch.cat([c.offsets.diff() for c in full if c.offsets is not None])))


def _recode(column: Column, names: tuple[str, ...]) -> Column:
    if column.names == names:
        return column
    table = torch.tensor([names.index(v) for v in column.names], device=column.values.device)
    return Column(table[column.values], column.level, None, names)


def _filled(name: str, model: Column, n: int, names: tuple[str, ...]) -> Column:
    if model.offsets is not None:
        return Column(model.values[:0], model.level, model.offsets.new_zeros(n + 1))
    blank = model.values.new_empty((n, *model.values.shape[1:]))
    if names:
        return Column(blank.fill_(names.index("")), model.level, None, names)
    if blank.dtype == torch.bool:
        return Column(blank.fill_(name == "mask"), model.level)
    return Column(blank.fill_(_MISSING[blank.is_floating_point()]), model.level)
