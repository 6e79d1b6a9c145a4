"""The embedded tasks and their lookup by name."""

from __future__ import annotations

import difflib

from unipo.tasks.base import Task, TaskError
from unipo.tasks.language import Arithmetic, Countdown, ModularChain, Reverse, Sort

TASKS: dict[str, type[Task]] = {t.name: t for t in (Arithmetic, Countdown, ModularChain, Reverse, Sort)}


def get_task(name: str) -> Task:
    """`arithmetic`, `arithmetic:2`, `arithmetic:1-3` or `arithmetic:1,3`: a task with its levels.

    Raises TaskError naming the nearest task, or the levels that exist.
    """
    base, _, wanted = name.partition(":")
    if base not in TASKS:
        near = difflib.get_close_matches(base, TASKS, 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise TaskError(f"there is no task {base!r}{hint} Embedded tasks: {', '.join(TASKS)}")
    kind = TASKS[base]
    levels = _levels(wanted) if wanted else kind.default_levels
    missing = [level for level in levels if level not in kind.all_levels]
    if missing or not levels:
        raise TaskError(
            f"task {base!r} has no level {missing or wanted!r}; it has {', '.join(map(str, kind.all_levels))}"
        )
    return kind(levels)


def _levels(text: str) -> tuple[int, ...]:
    found: list[int] = []
    try:
        for part in text.split(","):
            low, _, high = part.partition("-")
            found += range(int(low), int(high or low) + 1)
    except ValueError:
        raise TaskError(f"levels are written 2, 1-3 or 1,3; found {text!r}") from None
    return tuple(dict.fromkeys(found))
