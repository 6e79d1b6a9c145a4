"""What a data set holds, what it can be used for, and what is wrong with it: `unipo data check FILE`.

`check` never raises for what it finds in the data: a report with problems is its answer.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unipo.sources.data.cells import Prompt
from unipo.sources.data.comparisons import wrong_with
from unipo.sources.data.datasets import Dataset, PairRow, RatedRow, read_rows, repeats
from unipo.sources.data.pair_report import PairReport, pair_report
from unipo.sources.data.preferences import lists_of
from unipo.sources.data.problems import Findings, Problem
from unipo.sources.data.records import KINDS, PROMPTS, PromptRow, RolloutRow
from unipo.sources.text.encode import encode_completion, encode_prompt

Tokenizer = Any  # of transformers


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
    """`characters`, `tokens`: lengths by "prompt", "completion", "chosen", "rejected" (tokens: with a tokenizer only).

    `rewards`: spread by source ("" where rows name none). `groups`: spread of the number of rollouts per group, None
    without rollouts. `repeated_prompts`: rows whose prompt an earlier row has (0 where answers are rated or judged: there it is
    meant).
    `pairs`: what comparisons say of themselves, None without any. `problems`: the first found, `more` others.
    """

    name: str
    files: tuple[str, ...]
    rows: int
    columns: tuple[ColumnSummary, ...]
    uses: tuple[Use, ...]
    characters: dict[str, Spread]
    tokens: dict[str, Spread]
    rewards: dict[str, Spread]
    groups: Spread | None
    repeated_prompts: int
    pairs: PairReport | None
    problems: tuple[Problem, ...]
    more: int

    @property
    def ok(self) -> bool:
        """Whether a run may start on this data."""
        return not self.problems and any(use.possible for use in self.uses)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a run may start with, but the user should know."""
        if not self.repeated_prompts:
            return ()
        return (f"{self.repeated_prompts:,} of {self.rows:,} rows repeat the prompt of an earlier row",)

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
        yield f"  {column.name:<{width}}  {column.family}" + (
            f", {column.missing:.1%} missing" if column.missing else ""
        )
    for use in report.uses:
        answer = f"yes, {use.rows:,} rows" if use.possible else f"no: {use.missing or 'no usable rows'}"
        yield f"  use as {use.kind:<14} {answer}"
    for unit, spreads in (("characters", report.characters), ("tokens", report.tokens)):
        yield from (f"  {name}, {unit}: {spread}" for name, spread in spreads.items())
    yield from (f"  reward{f' of {source}' if source else ''}: {spread}" for source, spread in report.rewards.items())
    if report.groups is not None:
        yield f"  {report.groups.count:,} groups; rollouts per group: {report.groups}"
    yield from (f"  warning: {warning}" for warning in report.warnings)
    if report.pairs is not None:
        yield str(report.pairs)
    yield f"{len(report.problems) + report.more:,} problems" if report.problems else "no problems"
    yield from (f"  {problem}" for problem in report.problems)
    if report.more:
        yield f"  ... and {report.more:,} more"


# ---- lengths -------------------------------------------------------------------------------------------------------
def count_characters(prompt: Prompt) -> int:
    """Characters of a text, or of the contents of chat messages."""
    return len(prompt) if isinstance(prompt, str) else sum(len(m["content"] or "") for m in prompt)


def long_prompts(data: Dataset, tokenizer: Tokenizer, max_prompt_tokens: int) -> Iterator[Problem]:
    """A problem for each row whose prompt has more than `max_prompt_tokens` tokens, counted as a run encodes them.

    Rows that cannot be read as prompts are passed over. Raises ValueError when messages come without a chat template.
    """
    for row in data.records(PROMPTS, Findings()):
        length = len(encode_prompt(tokenizer, row.prompt))
        if length > max_prompt_tokens:
            yield _too_long(row, length, max_prompt_tokens, data)


def _too_long(row: PromptRow, length: int, limit: int, data: Dataset) -> Problem:
    column = "prompt" if "prompt" in data.columns else "messages"
    found = f"{length:,} tokens, more than the limit of {limit:,}"
    return row.where.problem(column, found, "shorten it, remove the row, or raise the limit")


# ---- survey --------------------------------------------------------------------------------------------------------
class _Survey:
    """Walks every possible use once: usable rows, lengths, rewards and groups; what is wrong goes to `findings`."""

    def __init__(self, data: Dataset, findings: Findings, tokenizer: Tokenizer | None, limit: int | None) -> None:
        self.data, self.findings, self.tokenizer, self.limit = data, findings, tokenizer, limit
        self.characters: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        self.tokens: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        self.rewards: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        self.groups: Counter[str | int] = Counter()
        self.pairs: list[PairRow] = []
        self.rated: list[RatedRow] = []

    def use(self, kind: str) -> Use:
        missing = self.data.missing(kind) if len(self.data) else "no rows"
        if missing:
            return Use(kind=kind, rows=0, missing=missing)
        rows, texts = 0, [name for name in _TEXTS[kind] if name not in self.characters]
        for record in self.data.records(KINDS[kind], self.findings):
            rows += 1
            for name in texts:
                self._measure(name, record)
            if isinstance(record, RolloutRow):
                self._score(record)
            elif isinstance(record, PairRow):
                self.pairs.append(record)
            elif isinstance(record, RatedRow):
                self.rated.append(record)
        return Use(kind=kind, rows=rows, missing="")

    def _measure(self, name: str, record: Any) -> None:
        text = getattr(record, name)
        self.characters[name].append(count_characters(text))
        if self.tokenizer is None:
            return
        try:
            length = len(
                encode_prompt(self.tokenizer, text) if name == "prompt" else encode_completion(self.tokenizer, text)
            )
        except ValueError as error:  # messages, and no chat template: said once
            self.findings.add(Problem("tokenizer", str(error), "choose another model, or add a template"))
            self.tokenizer = None
            return
        self.tokens[name].append(length)
        if isinstance(record, PromptRow) and self.limit is not None and length > self.limit:
            self.findings.add(_too_long(record, length, self.limit, self.data))

    def _score(self, row: RolloutRow) -> None:
        self.rewards[row.source].append(row.reward)
        self.groups[json.dumps(row.prompt) if row.group is None else row.group] += 1


_TEXTS = {"prompts": ("prompt",), "demonstrations": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected"),
          "ratings": ("prompt", "completion"), "labels": ("prompt", "completion"), "rollouts": ("prompt", "completion"),
          "documents": ("text",)}  # fmt: skip


def check(path: str | Path, tokenizer: Tokenizer | None = None, max_prompt_tokens: int | None = None,
          split: str = "train", rating_range: Sequence[float] = ()) -> DataReport:  # fmt: skip
    """Read all of a data set, try every use that its columns allow, and report.

    With `tokenizer` (transformers), lengths are also in tokens, and prompts longer than `max_prompt_tokens` are problems; so are
    ratings outside `rating_range` (least, highest).
    """
    findings = Findings()
    data = read_rows(path, split, findings)
    survey = _Survey(data, findings, tokenizer, max_prompt_tokens)
    uses = tuple(survey.use(kind) for kind in KINDS)
    pairs = survey.pairs or lists_of(survey.rated, findings)
    for row in pairs:
        for problem in wrong_with(row, rating_range):
            findings.add(problem)
    if len(data) and all(use.missing for use in uses):
        findings.add(data.lacks(f"cannot be used for anything: {uses[0].missing}, and none of its alternatives"))
    several = {"rollouts", "ratings", "labels"} & set(data.kinds)
    repeated = 0 if several else _repeated_prompts(data)
    columns = [ColumnSummary(name=name, family=family, missing=data.table[name].null_count / len(data))
               for name, family in data.families.items()]  # fmt: skip
    return DataReport(name=data.name, files=tuple(file for file, _ in data.files), rows=len(data),
                      columns=tuple(columns), uses=uses, characters=_spreads(survey.characters),
                      tokens=_spreads(survey.tokens), rewards=_spreads(survey.rewards),
                      groups=Spread.of(list(survey.groups.values())) if survey.groups else None,
                      repeated_prompts=repeated, pairs=pair_report(pairs), problems=tuple(findings.problems),
                      more=findings.more)  # fmt: skip


def _spreads(values: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    return {name: Spread.of(x) for name, x in values.items() if len(x)}


def _repeated_prompts(data: Dataset) -> int:
    """How many rows have exactly the prompt of an earlier row."""
    column = next((c for c in ("prompt", "messages") if c in data.columns), None)
    return 0 if column is None else len(repeats(data.table[column])[0])
