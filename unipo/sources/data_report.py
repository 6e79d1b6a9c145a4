"""What a data set holds, what it can be used for, and what is wrong with it: `unipo data check FILE`.

`check` never raises for what it finds in the data: a report with problems is its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unipo.sources.data_problems import DataError, Findings, Problem
from unipo.sources.data_rows import KINDS, PromptRow, RolloutRow
from unipo.sources.datasets import PROMPTS, Dataset, Prompt, read_rows, repeats

Tokenizer = Any  # a transformers tokenizer: __call__ on a list of texts, apply_chat_template
BATCH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSummary:
    """`family`: text, number, boolean, list, object, ...; `missing`: share of rows without a value, 0 to 1."""

    name: str
    family: str
    missing: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """`rows`: how many rows can be used so; `missing`: what the columns lack for it, "" when nothing."""

    kind: str
    rows: int
    missing: str

    @property
    def possible(self) -> bool:
        return not self.missing and self.rows > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Count, mean, population standard deviation, and quantiles of some numbers."""

    count: int
    mean: float
    std: float
    min: float
    median: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        x = np.asarray(values, np.float64)
        low, median, p95, high = np.quantile(x, [0, 0.5, 0.95, 1])
        return cls(count=len(x), mean=float(x.mean()), std=float(x.std()), min=float(low), median=float(median),
                   p95=float(p95), max=float(high))  # fmt: skip

    def __str__(self) -> str:
        return (f"mean {self.mean:.4g}, std {self.std:.4g}, min {self.min:.4g}, median {self.median:.4g}, "
                f"95 % {self.p95:.4g}, max {self.max:.4g} (n = {self.count:,})")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """`lengths`: spread by "prompt", "completion", "chosen", "rejected", in `unit`s (characters or tokens).

    `rewards`: spread by source. `groups`: spread of the number of rollouts per group (None without rollouts).
    `repeated_prompts`: rows whose prompt an earlier row has. `problems`: the first found, `more` others.
    """

    name: str
    files: tuple[str, ...]
    rows: int
    columns: tuple[ColumnSummary, ...]
    uses: tuple[Use, ...]
    lengths: dict[str, Spread]
    tokens: dict[str, Spread]
    rewards: dict[str, Spread]
    groups: Spread | None
    repeated_prompts: int
    problems: tuple[Problem, ...]
    more: int
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether a run may start on this data."""
        return not self.problems and any(use.possible for use in self.uses)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(use.kind for use in self.uses if use.possible)

    def __str__(self) -> str:
        return "\n".join(_render(self))


def _render(report: DataReport) -> Iterator[str]:
    files = f" in {len(report.files)} files" if len(report.files) > 1 else ""
    yield f"{report.name}: {report.rows:,} rows{files}"
    width = max((len(c.name) for c in report.columns), default=0)
    for column in report.columns:
        yield f"  {column.name:<{width}}  {column.family}" + (f", {column.missing:.1%} missing" if column.missing else "")
    for use in report.uses:
        yield f"  use as {use.kind:<14} {f'yes, {use.rows:,} rows' if use.possible else f'no: {use.missing or "no usable rows"}'}"
    for unit, spreads in (("characters", report.lengths), ("tokens", report.tokens)):
        yield from (f"  {name}, {unit}: {spread}" for name, spread in spreads.items())
    yield from (f"  reward{f' of {source}' if source else ''}: {spread}" for source, spread in report.rewards.items())
    if report.groups is not None:
        yield f"  {report.groups.count:,} groups; rollouts per group: {report.groups}"
    yield from (f"  warning: {warning}" for warning in report.warnings)
    yield f"{len(report.problems) + report.more:,} problems" if report.problems else "no problems"
    yield from (f"  {problem}" for problem in report.problems)
    if report.more:
        yield f"  ... and {report.more:,} more"


def check(path: str | Path, tokenizer: Tokenizer | None = None, max_prompt_tokens: int | None = None,
          split: str = "train") -> DataReport:  # fmt: skip
    """Read all of a data set, try every use that its columns allow, and report.

    With `tokenizer`, lengths are also in tokens, and prompts longer than `max_prompt_tokens` are problems.
    """
    findings = Findings()
    data = read_rows(path, split, findings)
    columns = tuple(
        ColumnSummary(name=n, family=f, missing=data.table[n].null_count / len(data)) for n, f in data.families.items()
    )
    survey = _Survey(data, findings, tokenizer)
    uses = tuple(survey.use(kind) for kind in KINDS)
    if len(data) and not any(use.possible for use in uses) and not findings.total:
        lacking = "; ".join(f"{use.kind}: {use.missing}" for use in uses)
        findings.add(Problem(data.name, f"no use is possible ({lacking})", "rename or add columns"))
    if tokenizer is not None and max_prompt_tokens is not None and not data.missing("prompts"):
        for problem in long_prompts(data, tokenizer, max_prompt_tokens):
            findings.add(problem)
    repeated = 0 if survey.rewards else _repeated_prompts(data)
    warnings = survey.warnings + ((f"{repeated:,} of {len(data):,} rows repeat the prompt of an earlier row",) if repeated else ())
    return DataReport(name=data.name, files=tuple(f for f, _ in data.files), rows=len(data), columns=columns, uses=uses,
                      lengths=_spreads(survey.characters), tokens=_spreads(survey.tokens), rewards=_spreads(survey.rewards),
                      groups=Spread.of(list(survey.groups.values())) if survey.groups else None,
                      repeated_prompts=repeated, problems=tuple(findings.problems), more=findings.more,
                      warnings=warnings)  # fmt: skip
