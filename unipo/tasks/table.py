"""The embedded tasks by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from unipo.rewards.names import unknown
from unipo.tasks.arithmetic import ARITHMETIC
from unipo.tasks.base import GeneratedTask, TaskError
from unipo.tasks.corpus import DERIVATIONS
from unipo.tasks.countdown import COUNTDOWN
from unipo.tasks.describe import DESCRIBE
from unipo.tasks.modular_chain import MODULAR_CHAIN
from unipo.tasks.rating import RATING
from unipo.tasks.text import REVERSE, SORT

TASKS: dict[str, GeneratedTask] = {t.name: t for t in (ARITHMETIC, COUNTDOWN, MODULAR_CHAIN, REVERSE, SORT, RATING, DERIVATIONS,
                                                            DESCRIBE)}  # fmt: skip
ENVIRONMENT = re.compile(r"^(?:(?P<module>[\w.]+):)?(?:(?P<namespace>[\w-]+)/)?[\w.-]+-v\d+$")


def is_environment(name: str) -> bool:
    """Whether a TASK argument means a Gymnasium environment: NAME-v1, NAMESPACE/NAME-v1 where the namespace is known, or
    MODULE:NAME-v1 where importing the module registers it.

    A path that exists, and a hub name that happens to end like one, are datasets.
    """
    found = ENVIRONMENT.match(name)
    if found is None or Path(name).exists():
        return False
    if found["module"] or found["namespace"] in (None, "unipo", "ALE"):
        return True
    import gymnasium  # half a second that text runs need not wait for

    return found["namespace"] in {spec.namespace for spec in gymnasium.registry.values()}


def get_task(name: str) -> GeneratedTask:
    """The task called `name`, with the levels where some follow: `arithmetic:2`, `arithmetic:1-3` or `arithmetic:1,3`.

    Raises TaskError naming the nearest tasks, or the levels that the task has.
    """
    plain, colon, suffix = name.partition(":")
    if plain not in TASKS:
        raise TaskError(unknown("task", plain, TASKS) + "; an environment has its version in its name: CartPole-v1")
    return replace(TASKS[plain], levels=_levels(plain, suffix)) if colon else TASKS[plain]


def _levels(task: str, suffix: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in suffix.split(","):
        bounds = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part)
        if bounds is None:
            raise TaskError(f"{suffix!r} in '{task}:{suffix}' is not a level: write {task}:2, {task}:1-3 or {task}:1,3")
        found += range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1)
    return tuple(dict.fromkeys(found))
