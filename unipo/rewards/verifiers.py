"""Rewards that come with the library, and their lookup by name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from unipo.rewards.calling import RewardError, RewardFunction
from unipo.rewards.graded import Formatted, ForTask, Near, Overlap, Prefix, Within, WordByWord
from unipo.rewards.mathematics import math
from unipo.rewards.models import MADE, made
from unipo.rewards.names import unknown


def exact_match(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any] | None = None, **columns: Any
                ) -> list[float | None]:  # fmt: skip
    """1.0 where the completion equals `answer`, blanks around it aside; None where there is no answer."""
    answers = answer if answer is not None else [None] * len(completions)
    return [
        None if a is None else float(c.strip() == str(a).strip()) for c, a in zip(completions, answers, strict=True)
    ]


def length(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """Characters of the completion: `length*-0.001` takes a thousandth off for each."""
    return [float(len(c)) for c in completions]


REWARDS: dict[str, RewardFunction] = {
    "exact_match": exact_match, "form": Formatted(), "length": length, "math": math, "near": Near(),
    "overlap": Overlap(), "prefix": Prefix(), "within": Within(), "word_by_word": WordByWord(),
}  # fmt: skip
WRITTEN = re.compile(r"(?P<name>[^()*@]+)(?:\((?P<settings>[^()]*)\))?(?:@(?P<task>[\w.-]+))?(?:\*(?P<weight>.*))?")


def split_rewards(text: str) -> list[str]:
    """Several rewards that are written with commas between them; those inside brackets divide settings."""
    return [part for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def resolve_reward(text: str) -> tuple[str, RewardFunction, float]:
    """(name, function, weight) of NAME[(SETTING=NUMBER, ...)][@TASK][*WEIGHT], NAME being a known one,
    package.module:function or file.py:function; or of a model, model(FOLDER), whose name is then its run's. With @TASK it is
    for the rows of that `task` alone.

    Raises RewardError with the nearest name, or what could not be imported or loaded.
    """
    found = WRITTEN.fullmatch(text.strip())
    if found is None:
        raise RewardError(f"cannot read the reward {text!r}: write NAME, NAME*0.5, NAME(width=0.5) or NAME@TASK")
    try:
        factor = float(found["weight"]) if found["weight"] else 1.0
    except ValueError:
        raise RewardError(f"the weight in {text!r} is not a number: write NAME*0.5") from None
    name = found["name"].strip()
    if ":" not in name and name not in {**REWARDS, **MADE}:
        known = [*REWARDS, *MADE]
        raise RewardError(f"{unknown('reward', name, known)}; or give file.py:function or package.module:function")
    if name in MADE:
        name, function = made(name, found["settings"] or "")
    else:
        function = _imported(name) if ":" in name else REWARDS[name]
        function = _with_settings(name, function, found["settings"]) if found["settings"] else function
    name = name.rpartition(":")[2]
    return (
        (f"{name}@{found['task']}", ForTask(found["task"], function), factor)
        if found["task"]
        else (name, function, factor)
    )


def _with_settings(name: str, function: RewardFunction, text: str) -> RewardFunction:
    """The same reward with other numbers, where it is a record that has such fields."""
    known = {f.name for f in fields(function)} if is_dataclass(function) else set()
    pairs = [part.partition("=") for part in text.split(",")]
    bad = next((key.strip() for key, _, _ in pairs if key.strip() not in known), None)
    if bad is not None:
        has = ", ".join(sorted(known)) or "none: it is a plain function"
        raise RewardError(f"reward {name!r} has no setting {bad!r}; its settings: {has}")
    try:
        settings = {key.strip(): ast.literal_eval(value.strip()) for key, _, value in pairs}
        if not all(type(value) in (int, float) for value in settings.values()):
            raise ValueError
    except (ValueError, SyntaxError):
        raise RewardError(f"the settings in {name}({text}) are not all numbers: write {name}(NAME=NUMBER)") from None
    return replace(function, **settings)  # type: ignore[type-var]


def _imported(text: str) -> RewardFunction:
    place, _, attribute = text.rpartition(":")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        hint = "" if place.endswith(".py") else " (for a file write file.py:function)"
        raise RewardError(f"could not load the reward {text!r}: {type(error).__name__}: {error}{hint}") from error
    functions = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
    if not hasattr(module, attribute):
        raise RewardError(unknown(f"function in {place}", attribute, functions))
    function: RewardFunction = getattr(module, attribute)
    if not callable(function):
        raise RewardError(f"{text!r} is {type(function).__name__}, not a function of (prompts, completions, **columns)")
    return function


def _module_of_file(path: Path) -> ModuleType:
    """The file as a module; its folder joins the end of the import path, so that it finds its neighbours."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"unipo_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
