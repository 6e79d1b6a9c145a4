"""Rewards that come with the library, and their lookup by name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unipo.rewards.calling import RewardError, RewardFunction


def exact_match(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any] | None = None, **columns: Any
                ) -> list[float | None]:  # fmt: skip
    """1.0 where the completion equals `answer`, blanks around it aside; None where there is no answer."""
    answers = answer if answer is not None else [None] * len(completions)
    return [
        None if a is None else float(c.strip() == str(a).strip()) for c, a in zip(completions, answers, strict=True)
    ]


def math(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any] | None = None, **columns: Any
         ) -> list[float | None]:  # fmt: skip
    r"""1.0 where the completion's last answer is mathematically equal to `answer` (math-verify: LaTeX, \boxed, numbers)."""
    from math_verify import parse, verify

    def one(completion: str, gold: Any) -> float | None:
        if gold is None:
            return None
        # math-verify limits time by signals, which only the main thread may use: rewards run beside it, so none here.
        # The caller's own timeout applies.
        expected = parse(f"${gold}$", parsing_timeout=None) or parse(str(gold), parsing_timeout=None)
        found = parse(completion, parsing_timeout=None)
        return float(verify(expected, found, timeout_seconds=None))

    answers = answer if answer is not None else [None] * len(completions)
    return [one(c, a) for c, a in zip(completions, answers, strict=True)]


REWARDS: dict[str, RewardFunction] = {"exact_match": exact_match, "math": math}


def resolve_reward(text: str) -> tuple[str, RewardFunction, float]:
    """(name, function, weight) of NAME[*WEIGHT], NAME being a known one, package.module:function or file.py:function.

    Raises RewardError with the nearest name, or what could not be imported.
    """
    name, _, weight = text.strip().partition("*")
    try:
        factor = float(weight) if weight else 1.0
    except ValueError:
        raise RewardError(f"the weight in {text!r} is not a number: write NAME*0.5") from None
    if ":" in name:
        return name.rpartition(":")[2], _imported(name), factor
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, 1, 0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RewardError(f"there is no reward {name!r}: {hint}Known: {', '.join(REWARDS)}; or give file.py:function")
    return name, REWARDS[name], factor


def _imported(text: str) -> RewardFunction:
    place, _, attribute = text.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None or not Path(place).exists():
                raise ImportError(f"there is no file {place}")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, attribute)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"could not load the reward {text!r}: {error}") from error
    if not callable(function):
        raise RewardError(f"{text!r} is {type(function).__name__}, not a function of (prompts, completions, **columns)")
    return function
