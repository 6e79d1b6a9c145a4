"""The same doors as the command line, from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from unipo.methods.catalog import build
from unipo.recipe import Recipe
from unipo.training import ConfigError, Run, RunConfig, build_run
from unipo.training.records import write_atomic


def train(method: str | Recipe = "grpo", task: str = "arithmetic", console: Console | None = None,
          options: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any) -> Run:  # fmt: skip
    """Train and return the finished run (its `policy`, `folder`, `records.metrics`).

    `method`: a name, a weighted sum ("grpo+0.2*sft"), or a `Recipe` of your own; `options`: keyword arguments by method;
    `settings`: fields of `RunConfig`, such as `policy` weights by `model=`, steps, seed, out, demos, pairs, replay.
    """
    named = method if isinstance(method, str) else "recipe"
    config = RunConfig(method=named, task=task, method_options=options or {}, **settings)
    recipe = build(method, config.method_options) if isinstance(method, str) else method
    return finish(start(config, recipe, console))


def start(config: RunConfig, recipe: Recipe, console: Console | None = None) -> Run:
    """A new run whose folder exists and can be resumed. Raises ConfigError when the folder holds another run."""
    folder = config.folder
    if (folder / "config.yaml").exists():
        raise ConfigError(
            f"{folder} already holds a run: go on with `unipo resume {folder}`, choose another --out, or delete it"
        )
    run = build_run(config, recipe, console)
    write_atomic(folder / "config.yaml", config.to_yaml())
    return run


def resume(
    folder: str | Path, console: Console | None = None, changed_code: bool = False, recipe: Recipe | None = None
) -> Run:
    """Go on with a run from its newest whole checkpoint, exactly; a finished run is returned as it is.

    `changed_code`: go on although code or configuration differ from those that made the checkpoint.
    """
    config = read_config(folder)
    run = build_run(config, recipe or build(config.method, config.method_options), console)
    run.restore(check=not changed_code)
    return finish(run)


def read_config(folder: str | Path) -> RunConfig:
    """The configuration of a run folder, its `out` set to where the folder is now."""
    path = Path(folder) / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{folder} is not a run: it has no config.yaml")
    return dataclasses.replace(RunConfig.from_yaml(path.read_text()), out=str(folder))


def finish(run: Run) -> Run:
    """Make the remaining steps and save the trained policy in `final/`."""
    run.train()
    run.policy.save(run.folder / "final")
    return run


def compare(methods: Sequence[str], task: str, seeds: int = 3, out: str = "runs/compare", console: Console | None = None,
            **settings: Any) -> list[Path]:  # fmt: skip
    """Run each method with seeds 0 .. seeds-1 at equal settings; finished runs in `out` are kept. Returns the folders."""
    folders = []
    for method in methods:
        for seed in range(seeds):
            config = RunConfig(
                method=method, task=task, seed=seed, out=f"{out}/{method.replace('*', 'x')}-s{seed}", **settings
            )
            folders.append(config.folder)
            if (config.folder / "final").exists():
                continue
            if (config.folder / "config.yaml").exists():
                resume(config.folder, console)
            else:
                finish(start(config, build(method, {}), console))
    return folders
