"""The shortest command line that makes a run again: it knows defaults and presets. Written to `command.txt` of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from unipo.methods.catalog import MethodError, build
from unipo.report.commands import APART, Options, full_command, given_options, in_environment, spelled
from unipo.training import ConfigError, RunConfig
from unipo.training.presets import control_config, preset_of

ALWAYS = ("steps", "total_timesteps", "seed")
"""Settings that the short command names even where they are the defaults."""


def command(config: Mapping[str, Any]) -> str:
    """The short command line: the length of the run, its seed, and what differs from the defaults and the preset.

    All settings where this version does not know the method: then it does not know its defaults either.
    """
    try:
        default, options, flags = _defaults(config)
    except (MethodError, ConfigError, TypeError, ValueError):
        return full_command(config)
    names = [n for n in config if n in ALWAYS or (n not in APART and (n not in default or config[n] != default[n]))]
    return spelled(config, names, options, flags)


def _defaults(config: Mapping[str, Any]) -> tuple[dict[str, Any], Options, list[str]]:
    """(settings of the run had none been given, keywords of methods that were, flags). A preset holds if all its keywords do."""
    method, task, given = str(config.get("method")), str(config.get("task")), given_options(config)
    recipe = build(method, given, environment=in_environment(config))
    if not in_environment(config):
        return yaml.safe_load(RunConfig(method=method, task=task).to_yaml()), given, []
    fields, keywords = preset_of(method, task)
    holds = set(keywords) <= set(given.get(method, {}))
    made = control_config(recipe, fields if holds else {}, method=method, task=task)
    known = keywords if holds else {}
    own = {k: v for k, v in given.get(method, {}).items() if k not in known or v != known[k]}
    return yaml.safe_load(made.to_yaml()), {**given, method: own}, [] if holds else ["--no-preset"]
