"""The door to both kinds of runs."""

from __future__ import annotations

from rich.console import Console

from unipo.recipe import Recipe
from unipo.training.config import BaseConfig, ControlConfig, RunConfig
from unipo.training.loop import Run


def build_run(config: BaseConfig, recipe: Recipe, console: Console | None = None) -> Run:
    """A run at step 0, on text or in an environment. Raises ConfigError and the errors of what it is made of."""
    if isinstance(config, ControlConfig):
        from unipo.training.build_control import build_control  # Gymnasium and MuJoCo load only where they are used

        return build_control(config, recipe, console)
    from unipo.training.build_text import build_text

    assert isinstance(config, RunConfig)
    return build_text(config, recipe, console)
