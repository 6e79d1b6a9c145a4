"""The arms of a run on text: levels of its embedded task, or categories of its dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from unipo.sources.prompts import Prompts, RowPrompts, TaskPrompts
from unipo.sources.text.arms import ArmChoice, Arms, by_columns
from unipo.tasks import GeneratedTask
from unipo.training.config import ConfigError, RunConfig


def with_arms(task: GeneratedTask, config: RunConfig, choice: ArmChoice | None) -> GeneratedTask:
    """The task of the run; where prompts are drawn from arms and no levels were named, all its levels."""
    return task if choice is None or ":" in config.task else replace(task, levels=task.all_levels)


def arms_of(first: Prompts, config: RunConfig, choice: ArmChoice) -> Arms:
    """Prompts in arms. Raises ConfigError where there are fewer than two, or something else decides what is drawn."""
    for flag, given in (("curriculum", config.curriculum), ("ahead", config.ahead)):
        if given:
            raise ConfigError(
                f"--{flag} {given} is given, but {config.method!r} draws prompts by what the last step has taught: "
                f"leave out --{flag}"
            )
    made: Mapping[str, Prompts]
    if isinstance(first, TaskPrompts) and isinstance(first.task, GeneratedTask):
        made = {f"level {n}": TaskPrompts(replace(first.task, levels=(n,))) for n in first.task.levels}
    elif isinstance(first, RowPrompts):
        try:
            made = {name: RowPrompts(rows, config.seed) for name, rows in by_columns(first.rows, choice.by).items()}
        except ValueError as error:
            raise ConfigError(str(error)) from error
    else:
        raise ConfigError(f"the prompts of {config.task} have no categories to draw from")
    if len(made) < 2:
        raise ConfigError(
            f"{config.method!r} chooses among categories of prompts, and {config.task} has one, {next(iter(made), 'none')!r}: "
            "name several levels (arithmetic:1-4), or the columns of a dataset that tell categories apart"
        )
    return Arms(made, choice, config.seed)
