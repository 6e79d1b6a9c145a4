"""Calling reward functions so that nothing that fails can pass for a 0."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from unipo.rewards.limits import Hung, limited

RewardFunction = Callable[..., Any]
HUNG_ROWS = 3
"""Rows that may hang before the rest of a failing batch is given up."""


class RewardError(RuntimeError):
    """A reward function raised, hung or returned something that is not a reward; the message says for which row."""


class RewardWarning(UserWarning):
    """Rows lost their reward; the message says how many, and why the first did."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a reward function is called with: n prompts, n completions, columns of n entries."""

    prompts: Sequence[Any]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        for name, values in {"prompts": self.prompts, **self.columns}.items():
            if len(values) != len(self.completions):
                raise ValueError(f"{name!r} has {len(values)} entries for {len(self.completions)} completions")

    def row(self, i: int) -> Batch:
        return Batch([self.prompts[i]], [self.completions[i]], {k: [v[i]] for k, v in self.columns.items()})

    def shown(self, i: int) -> str:
        return f"row {i} (prompt {str(self.prompts[i])[-60:]!r}, completion {self.completions[i][:60]!r})"

    def call(self, function: RewardFunction, seconds: float) -> Any:
        columns = {k: list(v) for k, v in self.columns.items()}
        return limited(lambda: function(list(self.prompts), list(self.completions), **columns), seconds)


@dataclass(frozen=True)
class RewardSet:
    """A weighted sum of reward functions: (name, function, weight) each.

    A function that returns None for a row is not applicable there: the sum is over the others. A row for which none is
    applicable has no reward and is dropped. `on_error`: "raise", or "drop": rows whose reward failed are dropped, with a
    RewardWarning. `timeout`: seconds for one call of one function on a batch.

    When a call fails as a whole, the function is asked row by row to find out which row it was: a function whose result
    depends on the rest of the batch gives other numbers there.
    """

    functions: tuple[tuple[str, RewardFunction, float], ...]
    on_error: str = "raise"
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "drop"):
            raise ValueError(f"on_error is {self.on_error!r}: expected raise or drop")
        if not self.functions or self.timeout <= 0:
            raise ValueError("a reward set needs at least one function, and a timeout above 0 seconds")
        names = [name for name, _, _ in self.functions]
        if len(set(names)) < len(names):
            raise ValueError(f"two reward functions share a name in {', '.join(names)}: rename one")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
                 ) -> tuple[list[float], list[bool], dict[str, list[float]]]:  # fmt: skip
        """(total, kept, parts by function name), each with one entry per row; NaN where there is none.

        Raises RewardError where a reward fails, or where none applies to any row of the batch.
        """
        batch, n = Batch(prompts, completions, columns), len(completions)
        values = {name: self._values(name, function, batch) for name, function, _ in self.functions}
        weights = {name: weight for name, _, weight in self.functions}
        total, kept = [math.nan] * n, [False] * n
        for i in range(n):
            row = {name: v[i] for name, v in values.items() if v[i] is not None}
            kept[i] = bool(row) and not any(isinstance(v, RewardError) for v in row.values())
            total[i] = sum(weights[name] * v for name, v in row.items()) if kept[i] else math.nan
        if n and all(v is None for own in values.values() for v in own):
            raise RewardError(
                f"no reward function applies to any row: {', '.join(values)} returned None for all {n}. Does the dataset have "
                f"the column they look at? It has: {', '.join(columns) or 'none'}"
            )
        parts = {name: [v if isinstance(v, float) else math.nan for v in own] for name, own in values.items()}
        return total, kept, parts

    def _values(self, name: str, function: RewardFunction, batch: Batch) -> list[Any]:
        """A float, None or RewardError per row; the first RewardError is raised unless on_error="drop"."""
        try:
            values = _checked(name, batch.call(function, self.timeout), batch)
        except RewardError as error:
            values = self._row_by_row(name, function, batch, error) if self.on_error == "drop" else [error]
        except Exception as error:
            values = self._row_by_row(name, function, batch, error)
        failed = [v for v in values if isinstance(v, RewardError)]
        if failed and self.on_error == "raise":
            raise failed[0]
        if failed:
            warnings.warn(f"{len(failed)} of {len(values)} rows were dropped: {failed[0]}", RewardWarning, stacklevel=3)
        return values

    def _row_by_row(self, name: str, function: RewardFunction, batch: Batch, whole: Exception) -> list[Any]:
        """What the function says of each row alone, after `whole` came of the batch. Takes about `timeout` again at most."""
        n = len(batch.completions)
        if n == 1:
            return [_explained(name, whole, batch, 0)]
        each, hung = min(self.timeout, max(1.0, self.timeout / n)), 0
        deadline = time.monotonic() + self.timeout + HUNG_ROWS * each
        values: list[Any] = []
        for i in range(n):
            if hung == HUNG_ROWS or time.monotonic() > deadline:
                values += [_explained(name, whole, batch, j) for j in range(i, n)]
                break
            try:
                values += _checked(name, batch.row(i).call(function, each), batch.row(i), i)
            except Exception as error:
                values.append(_explained(name, error, batch, i))
                hung += isinstance(error, Hung)
            if isinstance(values[-1], RewardError) and self.on_error == "raise":
                return values
        if self.on_error == "raise" and not any(isinstance(v, RewardError) for v in values):
            return [RewardError(f"{_happened(name, whole)} on a batch of {n}, though not for any row alone. {REMEDY}.")]
        return values


REMEDY = "Mend the function, let it return None where it does not apply, or pass --on-reward-error drop"


def _happened(name: str, error: Exception) -> str:
    if isinstance(error, Hung):
        return f"reward {name!r} hung ({error}; --reward-timeout sets the limit)"
    return f"reward {name!r} raised {type(error).__name__}: {error}"


def _explained(name: str, error: Exception, batch: Batch, row: int) -> RewardError:
    if isinstance(error, RewardError):
        return error
    made = RewardError(f"{_happened(name, error)} for {batch.shown(row)}. {REMEDY}.")
    made.__cause__ = error
    return made


def _checked(name: str, values: Any, batch: Batch, first: int = 0) -> list[float | RewardError | None]:
    """One entry per row, a RewardError where it is not a reward. `first`: the batch's place in a larger one.

    Raises RewardError when it is not even one entry per row.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    n = len(batch.completions)
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != n:
        found = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
        raise RewardError(
            f"reward {name!r} returned {found} for {n} completions, the first being {batch.shown(0) if n else 'none'}: "
            "expected one number or None per completion, in order"
        )
    return [_number(name, value, batch, i, first) for i, value in enumerate(values)]


def _number(name: str, value: Any, batch: Batch, i: int, first: int) -> float | RewardError | None:
    value = value.item() if hasattr(value, "item") and not isinstance(value, Real) else value
    if value is None or (isinstance(value, Real) and math.isfinite(value)):
        return None if value is None else float(value)
    where = batch.shown(i).replace(f"row {i}", f"row {first + i}", 1)
    return RewardError(
        f"reward {name!r} returned {value!r} for {where}: expected a finite number, or None where it does not apply"
    )
