"""Words of a command line, and where it speaks."""

from __future__ import annotations

import ast
import difflib
from typing import Any

import tyro
from rich.console import Console

console = Console()
errors = Console(stderr=True)


class UsageError(ValueError):
    """A command line that cannot be meant; the message says what can."""


def near(name: str, known: Any) -> str:
    """ "; did you mean ...?" where one of `known` is like it, else ""."""
    found = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f"; did you mean {found[0]!r}?" if found else ""


def parsed(command: str, arguments: list[str]) -> tuple[Any, Any]:
    """METHOD TASK [--flags] as a configuration and its recipe."""
    from unipo.api import configure
    from unipo.methods.catalog import parse

    words, options, flags = divided(arguments)
    if "-h" in flags or "--help" in flags:
        words = [*words, "grpo", "arithmetic"][:2] if len(words) < 2 else words
    if len(words) != 2:
        raise UsageError(
            f"unipo {command} takes METHOD and TASK first, then flags; found {' '.join(words) or 'nothing'}"
        )
    parse(words[0])
    environment = options.pop("env", {})
    variant, flags = taken_word(flags, "--variant")
    if variant:
        options.setdefault(words[0], {})["variant"] = variant
    preset = "--no-preset" not in flags
    more = {"env_options": environment} if environment else {}
    default, recipe = configure(words[0], words[1], options, preset, **more)
    flags = [f for f in flags if f != "--no-preset"]
    return tyro.cli(type(default), prog=f"unipo {command} METHOD TASK", args=flags, default=default), recipe


def divided(arguments: list[str]) -> tuple[list[str], dict[str, dict[str, Any]], list[str]]:
    """(positional words before the first flag, {method: {keyword: value}} from --METHOD.KEYWORD VALUE, other flags)."""
    first = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    words, rest = arguments[:first], arguments[first:]
    options: dict[str, dict[str, Any]] = {}
    flags: list[str] = []
    while rest:
        flag = rest.pop(0)
        slug, dot, keyword = flag.removeprefix("--").partition("=")[0].partition(".")
        if not (flag.startswith("--") and dot):
            flags.append(flag)
            continue
        value = flag.partition("=")[2] if "=" in flag else (rest.pop(0) if rest else "")
        options.setdefault(slug, {})[keyword.replace("-", "_")] = _literal(value)
    return words, options, flags


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def taken_word(flags: list[str], name: str) -> tuple[str, list[str]]:
    """The word after `name`, or "", and the other flags."""
    if name not in flags[:-1]:
        return "", flags
    at = flags.index(name)
    return flags[at + 1], flags[:at] + flags[at + 2 :]


def taken(flags: list[str], name: str, default: int) -> tuple[int, list[str]]:
    """The whole number after `name`, or `default`, and the other flags."""
    if name not in flags:
        return default, flags
    at = flags.index(name)
    try:
        return int(flags[at + 1]), flags[:at] + flags[at + 2 :]
    except (IndexError, ValueError):
        raise UsageError(f"{name} takes a whole number") from None
