"""Endless, randomly addressable prompts: the data position is one integer, so resuming is exact."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from unipo.sources.keyed import shuffled
from unipo.sources.text.encode import Message
from unipo.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt with what its reward needs. `columns` go to the reward functions; `demonstration` is one good answer."""

    id: int
    text: str | Sequence[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)
    demonstration: str | None = None


class Prompts(Protocol):
    """`prompts[i]` for any i >= 0, the same each time."""

    def __getitem__(self, index: int) -> Prompt: ...


@dataclass(frozen=True)
class TaskPrompts:
    """Prompts of an embedded task: `split` is "train" (endless) or "held_out" (disjoint from it).

    Beside what its reward needs, the columns `hint` (a first step), `solution` (the worked answer) and `teachers` (right
    answers in several styles).
    """

    task: Task
    split: str = "train"
    style: str = "direct"

    def __getitem__(self, index: int) -> Prompt:
        problem = self.task.problem(index, self.split)
        worked = self.task.demonstration(problem, "worked")
        shown = {
            "hint": self.task.hint(problem),
            "solution": worked,
            "teachers": [worked, self.task.demonstration(problem)],
        }
        columns = {**shown, **problem.columns, "answer": problem.answer, "level": problem.level}
        answer = self.task.demonstration(problem, self.style)
        return Prompt(id=problem.id, text=problem.prompt, columns=columns, demonstration=answer)


@dataclass(frozen=True)
class RowPrompts:
    """Prompts of a finite list, in a new keyed order every epoch; `shuffle=False` keeps the file's order."""

    rows: Sequence[Prompt]
    seed: int = 0
    shuffle: bool = True

    def __getitem__(self, index: int) -> Prompt:
        n = len(self.rows)
        return self.rows[shuffled(index, n, self.seed, "prompts") if self.shuffle else index % n]

    def __len__(self) -> int:
        return len(self.rows)


def prompt_identity(text: str | Sequence[Message]) -> int:
    """A stable 62-bit id of a prompt's content."""
    raw = text if isinstance(text, str) else repr([(m.get("role"), m.get("content")) for m in text])
    return int.from_bytes(hashlib.sha256(raw.encode()).digest()[:8], "big") >> 2


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Prompts of rising difficulty: a row of `stages`, each with the step at which it starts."""

    stages: Sequence[tuple[int, Prompts]]

    def at(self, step: int) -> Prompts:
        """The last stage that has started."""
        started = [prompts for first, prompts in self.stages if first <= step]
        return started[-1] if started else self.stages[0][1]
