"""What a task is, and how its endless problems are drawn.

A task is addressed, never iterated: `problem(index, split)` is a pure function, so that the position in the data is one
integer and a resumed run meets the same problems. Train and held-out problems are disjoint by construction: a hash of the
problem's canonical form (37+58 and 58+37 share one) decides which split it belongs to, whoever draws it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random
from typing import Any, Protocol

from unipo.rewards.answers import MARK, final_answer
from unipo.rewards.calling import RewardFunction
from unipo.rewards.names import unknown

SPLITS = ("train", "held_out")
STYLES = ("direct", "worked")
HELD_OUT_SHARE = 10
"""One in so many canonical problems is held out."""
PATIENCE = 2000
"""Draws without a new problem after which a space counts as exhausted."""


class TaskError(ValueError):
    """A task, level, split or style that does not exist; the message names those that do."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: `id` identifies its prompt (62 bits), `answer` is one right answer, `columns` go to the rewards."""

    id: int
    prompt: str
    answer: str
    level: int
    columns: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A family of verifiable problems.

    Required: the same arguments give the same result on every machine; no problem is in both splits; the reward of a
    demonstration is 1, of a rejected completion 0. Not verified: that a completion fits `max_completion_tokens` of a
    tokenizer that spells characters in several tokens.
    """

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def levels(self) -> tuple[int, ...]: ...

    @property
    def stop(self) -> tuple[str, ...]: ...

    @property
    def max_completion_tokens(self) -> int: ...

    @property
    def rewards(self) -> tuple[tuple[str, RewardFunction, float], ...]: ...

    def problem(self, index: int, split: str = "train", levels: Sequence[int] | None = None) -> Problem: ...

    def demonstration(self, problem: Problem, style: str = "direct") -> str: ...

    def hint(self, problem: Problem) -> str: ...

    def pair(self, problem: Problem, index: int = 0) -> tuple[str, str]: ...

    def reward(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A problem before it has a split: `canonical` is equal for problems that give each other away."""

    prompt: str
    answer: str
    canonical: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GeneratedTask:
    """A task made of five functions. `levels` are drawn from in equal shares, out of `all_levels`.

    `draw(random, level)` makes a problem; `steps(problem)` writes out the work; `mistake(problem, random)` proposes an
    answer that is plausible and usually wrong; `verify(answer, columns)` judges; `budget(level)` bounds the tokens of any
    demonstration, one per character and one for the end. `graded`: what runs are rewarded with where that is not the
    verdict alone: named reward functions with weights, whose sum is 1 for a right answer. `reason(prompt, random)`: for
    tasks that are described before they are reasoned about, a frozen reasoner's answer to a prompt of text.
    """

    name: str
    description: str
    all_levels: tuple[int, ...]
    levels: tuple[int, ...]
    draw: Callable[[Random, int], Draft]
    steps: Callable[[Problem], str]
    mistake: Callable[[Problem, Random], str]
    verify: Callable[[str, Mapping[str, Any]], bool]
    budget: Callable[[int], int]
    stop: tuple[str, ...] = ()
    graded: tuple[tuple[str, RewardFunction, float], ...] = ()
    reason: Callable[[str, Random], str] | None = None

    def __post_init__(self) -> None:
        bad = sorted(set(self.levels) - set(self.all_levels))
        if bad or not self.levels:
            raise TaskError(
                f"task {self.name!r} has no level {', '.join(map(str, bad)) or '(none given)'}: it has the levels "
                f"{self.all_levels[0]} to {self.all_levels[-1]}, written {self.name}:{self.all_levels[0]} or "
                f"{self.name}:{self.all_levels[0]}-{self.all_levels[-1]}"
            )

    @property
    def rewards(self) -> tuple[tuple[str, RewardFunction, float], ...]:
        """What a run is rewarded with, by name and weight: `graded`, else the verdict."""
        return self.graded or ((self.name, self.reward, 1.0),)

    @property
    def max_completion_tokens(self) -> int:
        """Tokens of the longest demonstration, one per character and one for the end."""
        return max(self.budget(level) for level in self.levels)

    def problem(self, index: int, split: str = "train", levels: Sequence[int] | None = None) -> Problem:
        """Problem `index` >= 0 of a split: "train" is an endless stream of independent draws, "held_out" a list of distinct
        problems (that starts over when a small level has no more). `levels` overrides the task's own."""
        if split not in SPLITS:
            raise TaskError(unknown("split", split, SPLITS))
        if index < 0:
            raise IndexError(f"problem {index} of {self.name!r}: problems count from 0")
        task = self if levels is None else replace(self, levels=tuple(levels))
        return task._drawn(index, split) if split == "train" else _distinct(task).at(index)

    def _drawn(self, index: int, split: str) -> Problem:
        random = Random(f"{self.name}/{split}/{index}")
        for _ in range(PATIENCE):
            level = random.choice(self.levels)
            draft = self.draw(random, level)
            if split_of(self.name, draft.canonical) == split:
                return Problem(identity(draft.prompt), draft.prompt, draft.answer, level, draft.columns)
        raise TaskError(f"task {self.name!r} has no {split} problems at the levels {self.levels}: name other levels")

    def demonstration(self, problem: Problem, style: str = "direct") -> str:
        """An expert's completion: "direct" is the answer alone, "worked" the written steps, the mark, the answer."""
        if style not in STYLES:
            raise TaskError(unknown("style of demonstration", style, STYLES))
        return self._written(problem, problem.answer, style)

    def hint(self, problem: Problem) -> str:
        """The first step of the written work."""
        return re.split("[ ,]", self.steps(problem), maxsplit=1)[0]

    def wrong(self, problem: Problem, index: int = 0, style: str = "direct") -> str:
        """A plausible completion with reward 0, the same for the same (problem, index)."""
        random = Random(f"{self.name}/wrong/{problem.id}/{index}")
        proposals = (self.mistake(problem, random) for _ in range(PATIENCE))
        columns = {**problem.columns, "answer": problem.answer}
        return self._written(problem, next(p for p in proposals if not self.verify(p, columns)), style)

    def pair(self, problem: Problem, index: int = 0) -> tuple[str, str]:
        """(chosen, rejected): the direct demonstration and a plausible mistake, another for each `index`."""
        return self.demonstration(problem), self.wrong(problem, index)

    def reward(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        """1.0 where the completion's answer is right, else 0.0. Needs the columns of `Problem.columns` and `answer`."""
        if "answer" not in columns:
            raise ValueError(f"the reward of task {self.name!r} needs the column 'answer'; it got {sorted(columns)}")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [float(self.verify(final_answer(c), row)) for c, row in zip(completions, rows, strict=True)]

    def _written(self, problem: Problem, answer: str, style: str) -> str:
        return answer if style == "direct" else f"{self.steps(problem)}{MARK}{answer}"


@dataclass
class _Distinct:
    """The held-out problems of a task in the order in which they are first drawn."""

    task: GeneratedTask
    found: dict[int, Problem] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    draws: int = 0
    idle: int = 0

    def at(self, index: int) -> Problem:
        while len(self.order) <= index and self.idle < PATIENCE:
            problem = self.task._drawn(self.draws, "held_out")
            self.draws, self.idle = self.draws + 1, self.idle + 1
            if problem.id not in self.found:
                self.found[problem.id], self.idle = problem, 0
                self.order.append(problem.id)
        return self.found[self.order[index % len(self.order)]]


@lru_cache(maxsize=64)
def _distinct(task: GeneratedTask) -> _Distinct:
    return _Distinct(task)


def identity(text: str) -> int:
    """A stable 62-bit id of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def split_of(name: str, canonical: str) -> str:
    """The one split that a canonical problem of task `name` belongs to."""
    return "held_out" if identity(f"{name}/{canonical}") % HELD_OUT_SHARE == 0 else "train"


def same_text(answer: str, columns: Mapping[str, Any]) -> bool:
    """Whether `answer` is the one right answer, letter by letter."""
    return answer == columns["answer"]
