"""The command line that makes a run again, spelled from its configuration alone."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

APART = frozenset({"method", "task", "method_options", "env_options", "out"})
"""What is not a flag of its own name."""
Options = Mapping[str, Mapping[str, Any]]


def full_command(config: Mapping[str, Any]) -> str:
    """The command line with every setting spelled out: it depends neither on defaults nor on presets."""
    flags = ["--no-preset"] if in_environment(config) else []
    return spelled(config, [n for n in config if n not in APART], given_options(config), flags)


def spelled(config: Mapping[str, Any], names: Iterable[str], options: Options, flags: Iterable[str]) -> str:
    """The command line with the settings `names` and the keywords `options` of methods, then `flags`."""
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


def given_options(config: Mapping[str, Any]) -> Options:
    """Keywords by method, as they were given."""
    return {k: dict(v or {}) for k, v in (config.get("method_options") or {}).items()}


def in_environment(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a run in an environment."""
    return "total_timesteps" in config
