"""Runs in environments for claims: the library's own loop in a folder of its own that is not kept."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from unipo.recipe import Recipe
from unipo.training.build_control import build_control
from unipo.training.presets import control_config

Row = Mapping[str, float]


def trained(recipe: Recipe, task: str, seed: int, timesteps: int, **settings: Any) -> list[Row]:
    """The metrics of every step of a run; `settings` are fields of `ControlConfig`. Evaluated once, at its end."""
    plain = {"tensorboard": False, "evaluations": 1, "checkpoints": 1, "eval_episodes": 20, "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        config = control_config(recipe, {}, method="claim", task=task, seed=seed, out=folder, total_timesteps=timesteps,
                                **{**plain, **settings})  # fmt: skip
        run = build_control(config, recipe, Console(quiet=True))
        run.train()
        run.data.close()
        return list(run.records.metrics)


def area(rows: Sequence[Row]) -> float:
    """Mean over the run's steps of the mean return of the episodes that ended in them: how well it did while it learned."""
    known = [row["reward"] for row in rows if math.isfinite(row["reward"])]
    return sum(known) / len(known) if known else math.nan


def final(rows: Sequence[Row]) -> float:
    """Mean return of the last evaluation, with the policy's mode."""
    return float(rows[-1]["eval_return"])
