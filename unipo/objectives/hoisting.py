"""Parts that need whole episodes, evaluated before the batch is cut into steps.

A generalised advantage looks along an episode; minibatches of shuffled steps do not hold one. What an advantage or a
regression target is made of does not change while a batch is trained on, unless it reads a signal: so it is evaluated
once, on the whole batch, stored as a column, and its place in the objective is taken by a part that reads the column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.objectives.advantages import Advantage
from unipo.objectives.base import Needs, Objective, Signals, Sum, _at, _paths, _put, with_settings


@dataclass(frozen=True)
class Stored(Advantage):
    """A column of the data [N], as an advantage or a target."""

    column: str

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.column)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes[self.column]


def hoisted(objective: Objective, episodes: Episodes,
            settings: Mapping[str, float] | None = None) -> tuple[Objective, Episodes]:  # fmt: skip
    """The same objective with every advantage and target that reads no signal evaluated on `episodes`, and these with
    the columns it reads instead. Each is evaluated on the rows of its own term, as it would be otherwise; scales that
    normalise over a batch do so over the whole one. `settings`: of the knobs in what is evaluated; the others stay.

    Raises ValueError for a term that still looks along episodes: minibatches of steps would change what it means.
    """
    columns: dict[str, Tensor] = {}
    terms = []
    for i, (coefficient, term) in enumerate(objective.terms()):
        mine, steps = term.claimed(episodes)
        for path in list(_paths(term)):
            part = _part_at(term, path)
            if not isinstance(part, Advantage) or isinstance(part, Stored) or part.needs.signals:
                continue
            name = f"hoisted/{i}/{'.'.join(map(str, path))}"
            values = with_settings(part, settings or {})(mine, {})
            if steps is not None:
                blank = torch.full((episodes.count("step"),), torch.nan, dtype=values.dtype, device=values.device)
                values = blank.index_put((steps,), values)
            columns[name] = values
            term = _put(term, path, Stored(name))
        along = [part for path in _paths(term) if getattr(part := _at(term, path), "along_episodes", False)]
        if along:
            raise ValueError(
                f"term {term.title!r} looks along episodes ({along[0]!r}) and cannot be trained in minibatches of steps: use "
                "TokenMean and TokenRatio, or one epoch of the whole batch (--epochs 1 --batch-size 0)"
            )
        terms.append((coefficient, term))
    return Sum(weighted=tuple(terms)), episodes.with_columns("step", **columns)


def _part_at(term: Objective, path: tuple[str | int, ...]) -> object:
    """The record at `path`, or None where an outer part of it has been stored already."""
    try:
        return _at(term, path)
    except (AttributeError, IndexError, TypeError):
        return None
