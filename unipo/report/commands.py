"""The command lines that make a run again, from its configuration."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from unipo.methods.catalog import MethodError, build
from unipo.training import ConfigError, RunConfig
from unipo.training.presets import control_config, preset_of

ALWAYS = ("steps", "total_timesteps", "seed")
"""Settings that the short command names even where they are the defaults."""
APART = frozenset({"method", "task", "method_options", "env_options", "out"})
"""What is not a flag of its own name."""
Options = Mapping[str, Mapping[str, Any]]


def command(config: Mapping[str, Any]) -> str:
    """The short command line: the length of the run, its seed, and what differs from the defaults and the preset.

    All settings where this version does not know the method: then it does not know its defaults either.
    """
    try:
        default, options, flags = _defaults(config)
    except (MethodError, ConfigError, TypeError, ValueError):
        return full_command(config)
    names = [n for n in config if n in ALWAYS or (n not in APART and (n not in default or config[n] != default[n]))]
    return _command(config, names, options, flags)


def full_command(config: Mapping[str, Any]) -> str:
    """The command line with every setting spelled out: it depends neither on defaults nor on presets."""
    flags = ["--no-preset"] if _in_environment(config) else []
    return _command(config, [n for n in config if n not in APART], _given(config), flags)


def _defaults(config: Mapping[str, Any]) -> tuple[dict[str, Any], Options, list[str]]:
    """(settings of the run had none been given, keywords of methods that were, flags). A preset holds if all its keywords do."""
    method, task, given = str(config.get("method")), str(config.get("task")), _given(config)
    recipe = build(method, given, environment=_in_environment(config))
    if not _in_environment(config):
        return yaml.safe_load(RunConfig(method=method, task=task).to_yaml()), given, []
    fields, keywords = preset_of(method, task)
    holds = set(keywords) <= set(given.get(method, {}))
    made = control_config(recipe, fields if holds else {}, method=method, task=task)
    known = keywords if holds else {}
    own = {k: v for k, v in given.get(method, {}).items() if k not in known or v != known[k]}
    return yaml.safe_load(made.to_yaml()), {**given, method: own}, [] if holds else ["--no-preset"]


def _command(config: Mapping[str, Any], names: Iterable[str], options: Options, flags: Iterable[str]) -> str:
    words = ["unipo", "run", str(config.get("method", "METHOD")), str(config.get("task", "TASK"))]
    for name in names:
        words += _flag(name, config.get(name))
    for owner, changed in {**options, "env": config.get("env_options") or {}}.items():
        for name, value in changed.items():
            words += [f"--{owner}.{name.replace('_', '-')}", _literal(value)]
    return shlex.join([*words, *flags])


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [] if value in (None, "") else [flag, str(value)]


def _literal(value: Any) -> str:
    """A keyword as one word that is read back as the same value: words stay bare unless they look like a literal."""
    if not isinstance(value, str):
        return repr(value)
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return repr(value)


def _given(config: Mapping[str, Any]) -> Options:
    return {k: dict(v or {}) for k, v in (config.get("method_options") or {}).items()}


def _in_environment(config: Mapping[str, Any]) -> bool:
    return "total_timesteps" in config
