"""The same doors as the command line, from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from unipo.commands import command
from unipo.methods.catalog import MethodError, build, usable
from unipo.recipe import Recipe
from unipo.sources.directions import Asking, Directed
from unipo.tasks import is_environment
from unipo.training import BaseConfig, ConfigError, ControlConfig, Run, RunConfig, build_run
from unipo.training import read_config as parse_config
from unipo.training.config import UnusableData
from unipo.training.presets import control_config, preset_of
from unipo.training.records import write_atomic
from unipo.training.revisit import film_run


def train(method: str | Recipe = "grpo", task: str = "arithmetic", console: Console | None = None,
          options: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any) -> Run:  # fmt: skip
    """Train and return the finished run (its `policy`, `folder`, `records.metrics`).

    `method`: a name, a weighted sum ("grpo+0.2*sft"), or a `Recipe` of your own; `task`: an embedded task or dataset, or the
    id of an environment ("CartPole-v1"); `options`: keyword arguments by method; `settings`: fields of `RunConfig` (such as
    model, steps, demos, pairs, replay), or of `ControlConfig` for environments (total_timesteps, num_envs, ...).
    """
    return finish(start(*configure(method, task, options or {}, **settings), console))


NAMED = 12
"""Methods that an error names at most."""


def configure(method: str | Recipe, task: str, options: Mapping[str, Mapping[str, Any]], preset: bool = True,
              **settings: Any) -> tuple[BaseConfig, Recipe]:  # fmt: skip
    """The whole configuration and the recipe of a run on text or in an environment.

    In environments a `preset` of the pair (`unipo/training/presets.yaml`) applies under what is given here.
    """
    named = method if isinstance(method, str) else "recipe"
    if not is_environment(task):
        recipe = build(method, options) if isinstance(method, str) else method
        return RunConfig(method=named, task=task, method_options=options, **settings), recipe
    known, keywords = preset_of(named, task) if preset and isinstance(method, str) else ({}, {})
    merged = {named: {**keywords, **options.get(named, {})}} if keywords else {}
    options = {**options, **merged}
    recipe = build(method, options, environment=True) if isinstance(method, str) else method
    return control_config(recipe, known, method=named, task=task, method_options=options, **settings), recipe


def asking(config: BaseConfig, angle: float | None = None) -> Asking:
    """What the run's method makes of held-out prompts; `angle`: the direction, in degrees, of one that is told directions.

    Raises ConfigError for an angle where none are told.
    """
    try:
        ask = recipe_of(config).rollouts.ask
    except MethodError:  # a recipe that was written in Python
        ask = Asking()
    if angle is None:
        return ask
    if not isinstance(ask, Directed):
        raise ConfigError(f"--angle is for policies that are told a direction (dpa), and {config.method!r} tells none")
    return dataclasses.replace(ask, shown=angle)


def recipe_of(config: BaseConfig) -> Recipe:
    """The recipe that a configuration names."""
    return build(config.method, config.method_options, environment=isinstance(config, ControlConfig))


def start(config: BaseConfig, recipe: Recipe, console: Console | None = None) -> Run:
    """A new run whose folder exists and can be resumed. Raises ConfigError when the folder holds another run."""
    folder = config.folder
    if (folder / "config.yaml").exists():
        raise ConfigError(
            f"{folder} already holds a run: go on with `unipo resume {folder}`, choose another --out, or delete it"
        )
    try:
        run = build_run(config, recipe, console)
    except UnusableData as error:
        others = [slug for slug in usable(error.given) if slug != config.method]
        more = f" and {len(others) - NAMED} more (`unipo methods`)" if len(others) > NAMED else ""
        named = ", ".join(others[:NAMED]) or "none"
        raise ConfigError(f"{error}. These methods can use what there is: {named}{more}") from error
    write_atomic(folder / "config.yaml", config.to_yaml())
    write_atomic(folder / "command.txt", command(yaml.safe_load(config.to_yaml())) + "\n")
    return run


def resume(
    folder: str | Path, console: Console | None = None, changed_code: bool = False, recipe: Recipe | None = None
) -> Run:
    """Go on with a run from its newest whole checkpoint, exactly; a finished run is returned as it is.

    `changed_code`: go on although code or configuration differ from those that made the checkpoint.
    """
    config = read_config(folder)
    run = build_run(config, recipe or recipe_of(config), console)
    run.restore(check=not changed_code)
    return finish(run)


def read_config(folder: str | Path) -> BaseConfig:
    """The configuration of a run folder, its `out` set to where the folder is now."""
    path = Path(folder) / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{folder} is not a run: it has no config.yaml")
    return dataclasses.replace(parse_config(path.read_text()), out=str(folder))


def finish(run: Run) -> Run:
    """Make the remaining steps, save the trained policy in `final/`, and film it into `video/` where that is asked for."""
    run.train()
    with run.deployed():
        run.policy.save(run.folder / "final")
        if isinstance(run.config, ControlConfig) and run.config.video:
            film_run(run.config, run.policy, run.folder / "video")
    return run


def compare(methods: Sequence[str], task: str, seeds: int = 3, out: str = "runs/compare", console: Console | None = None,
            preset: bool = True, **settings: Any) -> list[Path]:  # fmt: skip
    """Run each method with seeds 0 .. seeds-1; finished runs in `out` are kept. Returns the folders.

    `settings` are those of all; what they leave open is each method's own, and in environments its `preset` where one is
    known: methods with a preset then meet methods without.
    """
    folders = []
    for method in methods:
        for seed in range(seeds):
            place = f"{out}/{method.replace('*', 'x')}-s{seed}"
            config, recipe = configure(method, task, {}, preset, seed=seed, out=place, **settings)
            folders.append(config.folder)
            _same_settings(config)
            if (config.folder / "final").exists():
                continue
            if (config.folder / "config.yaml").exists():
                resume(config.folder, console)
            else:
                finish(start(config, recipe, console))
    return folders


def _same_settings(config: BaseConfig) -> None:
    """Raises ConfigError where the folder of `config` holds a run with other settings: it must not stand for this one."""
    path = config.folder / "config.yaml"
    if not path.exists():
        return
    there, asked = yaml.safe_load(path.read_text()), yaml.safe_load(config.to_yaml())
    other = [name for name in asked if there.get(name) != asked[name]]
    if other:
        told = ", ".join(f"{name} {there.get(name)} instead of {asked[name]}" for name in other[:3])
        raise ConfigError(
            f"{config.folder} holds a run with other settings ({told}): choose another --out, or delete it"
        )
