"""The embedded tasks by name."""

from __future__ import annotations

import re
from dataclasses import replace

from unipo.rewards.names import unknown
from unipo.tasks.arithmetic import ARITHMETIC
from unipo.tasks.base import GeneratedTask, TaskError
from unipo.tasks.countdown import COUNTDOWN
from unipo.tasks.modular_chain import MODULAR_CHAIN
from unipo.tasks.text import REVERSE, SORT

TASKS: dict[str, GeneratedTask] = {t.name: t for t in (ARITHMETIC, COUNTDOWN, MODULAR_CHAIN, REVERSE, SORT)}


def get_task(name: str) -> GeneratedTask:
    """The task called `name`, with the levels where some follow: `arithmetic:2`, `arithmetic:1-3` or `arithmetic:1,3`.

    Raises TaskError naming the nearest tasks, or the levels that the task has.
    """
    plain, colon, suffix = name.partition(":")
    if plain not in TASKS:
        raise TaskError(unknown("task", plain, TASKS))
    return replace(TASKS[plain], levels=_levels(plain, suffix)) if colon else TASKS[plain]


def _levels(task: str, suffix: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in suffix.split(","):
        bounds = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part)
        if bounds is None:
            raise TaskError(f"{suffix!r} in '{task}:{suffix}' is not a level: write {task}:2, {task}:1-3 or {task}:1,3")
        found += range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1)
    return tuple(dict.fromkeys(found))
