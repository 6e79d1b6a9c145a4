"""What a verifiable task is: a stream of problems addressed by one integer, and a verifier."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

HELD_OUT_SHARE = 0.1
"""Share of all problems that are kept for evaluation, by a hash of their text."""
TRIES = 10_000


class TaskError(ValueError):
    """A task, level or split that does not exist; the message names those that do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A prompt with its answer. `id`: a stable 62-bit identity; `columns`: what else the verifier needs."""

    id: int
    prompt: str
    answer: str
    level: int
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Problems of chosen `levels`. A subclass draws one problem (`draw`) and says what answers look like.

    Whether a problem is held out is decided by a hash of its prompt, so the splits are disjoint by construction.
    """

    levels: tuple[int, ...]

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""
    all_levels: ClassVar[tuple[int, ...]] = (1,)
    default_levels: ClassVar[tuple[int, ...]] = (1,)
    max_completion_tokens: ClassVar[int] = 16
    styles: ClassVar[tuple[str, ...]] = ("direct",)

    def draw(self, rng: np.random.Generator, level: int) -> tuple[str, str, dict[str, Any]]:
        """(prompt, answer, columns) of one problem."""
        raise TypeError(f"{type(self).__name__} is abstract: define draw(rng, level)")

    def demonstration(self, problem: Problem, style: str = "direct") -> str:
        """An expert's completion."""
        self._check_style(style)
        return problem.answer

    def score(self, completion: str, problem: Mapping[str, Any]) -> float:
        """1.0 for a right completion, else 0.0. `problem` holds at least `answer`."""
        return float(completion.strip() == problem["answer"])

    def problem(self, index: int, split: str = "train") -> Problem:
        """Problem `index` (>= 0) of a split ("train" | "held_out"): the same each time, in an endless stream."""
        if split not in ("train", "held_out"):
            raise TaskError(f"there is no split {split!r}: expected train or held_out")
        rng = np.random.default_rng([_number(self.name), index, int(split == "held_out")])
        for _ in range(TRIES):
            level = int(self.levels[rng.integers(len(self.levels))])
            prompt, answer, columns = self.draw(rng, level)
            identity = _number(f"{self.name}/{prompt}")
            if ((identity >> 8) % 1000 < 1000 * HELD_OUT_SHARE) == (split == "held_out"):
                return Problem(id=identity >> 2, prompt=prompt, answer=answer, level=level, columns=columns)
        raise TaskError(f"task {self.name!r} with levels {self.levels} has no {split} problem")

    def reward(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """The verifier as a reward function."""
        rows = [{k: v[i] for k, v in columns.items()} for i in range(len(completions))]
        return [self.score(c, row) for c, row in zip(completions, rows, strict=True)]

    def pair(self, problem: Problem, index: int) -> tuple[str, str]:
        """(chosen, rejected): a right answer, and a wrong one that depends on `index`."""
        rng = np.random.default_rng([problem.id & 0xFFFFFFFF, index])
        for _ in range(TRIES):
            wrong = self.corrupted(problem, rng)
            if not self.score(wrong, {**problem.columns, "answer": problem.answer}):
                return problem.answer, wrong
        raise TaskError(f"task {self.name!r} found no wrong answer to {problem.prompt!r}")

    def corrupted(self, problem: Problem, rng: np.random.Generator) -> str:
        """A plausible, usually wrong answer: one character replaced by another of the same kind."""
        answer = problem.answer
        at = int(rng.integers(len(answer)))
        pool = "0123456789" if answer[at].isdigit() else "abcdefghijklmnopqrstuvwxyz"
        return answer[:at] + pool[int(rng.integers(len(pool)))] + answer[at + 1 :]

    def _check_style(self, style: str) -> None:
        if style not in self.styles:
            raise TaskError(f"task {self.name!r} has no expert style {style!r}; it has: {', '.join(self.styles)}")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
