"""Embedded verifiable tasks: endless, deterministic, with disjoint held-out problems."""

from unipo.tasks.base import Problem, Task, TaskError
from unipo.tasks.catalog import TASKS, get_task

__all__ = ["TASKS", "Problem", "Task", "TaskError", "get_task"]
