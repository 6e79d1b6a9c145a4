"""What is wrong with a user's data: located, explained, with a remedy, collected before anything trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SHOWN = 20
FAMILY = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, what was found, what to do. `row` counts from 1, in `unit`s (line or row)."""

    file: str
    found: str
    remedy: str
    row: int | None = None
    column: str | None = None
    unit: str = "row"

    def __str__(self) -> str:
        place = self.file if self.row is None else f"{self.file} {self.unit} {self.row}"
        place = place if self.column is None else f"{place}, column {self.column!r}"
        return f"{place}: {self.found} -> {self.remedy}"


class DataError(ValueError):
    """The data cannot be used. `problems`: the first of them; `more`: how many others were found."""

    def __init__(self, problems: Sequence[Problem], more: int = 0) -> None:
        self.problems = tuple(problems)
        self.more = more
        lines = [str(p) for p in problems] + ([f"... and {more:,} more"] if more else [])
        super().__init__("\n".join(lines))


@dataclass(frozen=True, slots=True)
class Where:
    """Where a row came from: `number` counts from 1, in lines (JSONL, CSV) or rows (JSON, Parquet, Hugging Face)."""

    file: str
    number: int
    unit: str = "row"

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}"

    def problem(self, column: str | None, found: str, remedy: str) -> Problem:
        return Problem(self.file, found, remedy, self.number, column, self.unit)


@dataclass(slots=True)
class _Tally:
    count: int = 0
    first: list[Where] = field(default_factory=list)


class Findings:
    """Collects problems: the first `SHOWN` are kept, all are counted; of one cell, the first only."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.total = 0
        self._seen: set[int] = set()
        self._types: dict[str, dict[str, _Tally]] = {}

    @property
    def more(self) -> int:
        return self.total - len(self.problems)

    def add(self, problem: Problem) -> None:
        key = hash((problem.file, problem.row, problem.column, problem.found if problem.row is None else ""))
        if key in self._seen:
            return
        self._seen.add(key)
        self.total += 1
        if len(self.problems) < SHOWN:
            self.problems.append(problem)

    def saw(self, column: str, family: str, rows: Iterator[Where], count: int) -> None:
        """Note that `count` rows of `column`, `rows` among them, hold values of a family (text, number, ...)."""
        tally = self._types.setdefault(column, {}).setdefault(family, _Tally())
        tally.count += count
        while len(tally.first) < SHOWN and (where := next(rows, None)) is not None:
            tally.first.append(where)

    def add_mixed_types(self) -> None:
        """A problem for every row whose value is of another family than most of its column."""
        for column, tallies in self._types.items():
            usual = max(tallies, key=lambda family: tallies[family].count)
            for family, tally in tallies.items():
                if family == usual:
                    continue
                for where in tally.first:
                    found = f"{a_(family)}, but {a_(usual)} in {tallies[usual].count:,} other rows"
                    self.add(where.problem(column, found, f"make every value of the column {a_(usual)}"))
                self.total += tally.count - len(tally.first)

    def raise_any(self) -> None:
        if self.total:
            raise DataError(self.problems, self.more)


def a_(family: str) -> str:
    return family if family in ("text", "bytes") else f"an {family}" if family == "object" else f"a {family}"
