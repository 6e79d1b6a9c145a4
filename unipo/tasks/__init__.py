"""Embedded tasks: short verifiable problems with endless train streams and disjoint held-out problems."""

from pathlib import Path

from unipo.tasks.base import STYLES, GeneratedTask, Problem, Task, TaskError
from unipo.tasks.table import TASKS, get_task, is_environment

TINY_MODEL = Path(__file__).parent / "tiny"
"""The shipped model (`from_pretrained` layout): 0.85M parameters, warm-started on every embedded task."""

__all__ = [
    "STYLES",
    "TASKS",
    "TINY_MODEL",
    "GeneratedTask",
    "Problem",
    "Task",
    "TaskError",
    "get_task",
    "is_environment",
]
