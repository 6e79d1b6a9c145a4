"""Calling reward functions so that nothing that fails can pass for a 0."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RewardFunction = Callable[..., Any]


class RewardError(RuntimeError):
    """A reward function raised, hung or returned something that is not a reward; the message says for which row."""


@dataclass(frozen=True)
class RewardSet:
    """A weighted sum of reward functions.

    A function that returns None for a row is not applicable there; a row for which none is applicable has no reward and
    is dropped. `on_error`: "raise", or "drop" (rows whose reward failed are dropped; the caller counts them).
    """

    functions: tuple[tuple[str, RewardFunction, float], ...]
    on_error: str = "raise"
    timeout: float = 60.0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
                 ) -> tuple[list[float], list[bool], dict[str, list[float]]]:  # fmt: skip
        """(total, kept, parts by function name), each with one entry per row; NaN where there is none."""
        n = len(completions)
        total, applicable, failed = [0.0] * n, [False] * n, [False] * n
        parts: dict[str, list[float]] = {}
        for name, function, weight in self.functions:
            values = self._values(name, function, prompts, completions, columns)
            parts[name] = [math.nan if v is None or isinstance(v, Exception) else float(v) for v in values]
            for i, value in enumerate(values):
                if isinstance(value, Exception):
                    failed[i] = True
                elif value is not None:
                    total[i] += weight * float(value)
                    applicable[i] = True
        kept = [a and not f for a, f in zip(applicable, failed, strict=True)]
        if self.on_error == "raise" and n and not any(applicable):
            raise RewardError(
                f"no reward function applies to any row: {', '.join(parts)} returned None for all {n}. Does the dataset have "
                f"the column they look at? It has: {', '.join(columns) or 'none'}"
            )
        return [t if k else math.nan for t, k in zip(total, kept, strict=True)], kept, parts

    def _values(self, name: str, function: RewardFunction, prompts: Sequence[Any], completions: Sequence[str],
                columns: Mapping[str, Sequence[Any]]) -> list[Any]:  # fmt: skip
        """One value, None or Exception per row. With on_error="drop" a failing batch is tried again row by row."""
        try:
            values = _called(function, prompts, completions, columns, self.timeout)
            return self._checked(name, values, prompts, completions)
        except Exception as error:
            if self.on_error == "raise":
                raise _explained(name, error, function, prompts, completions, columns, self.timeout) from error
        return [self._one(name, function, [p], [c], {k: [v[i]] for k, v in columns.items()})
                for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]  # fmt: skip

    def _one(self, name: str, function: RewardFunction, prompts: list[Any], completions: list[str],
             columns: Mapping[str, list[Any]]) -> Any:  # fmt: skip
        try:
            return self._checked(
                name, _called(function, prompts, completions, columns, self.timeout), prompts, completions
            )[0]
        except Exception as error:
            return error

    def _checked(self, name: str, values: Any, prompts: Sequence[Any], completions: Sequence[str]) -> list[Any]:
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(completions):
            found = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
            raise RewardError(f"reward {name!r} returned {found} for {len(completions)} completions: expected one number or "
                              "None per completion, in order")  # fmt: skip
        for row, value in enumerate(values):
            bad = isinstance(value, str) or (value is not None and not math.isfinite(float(value)))
            if bad:
                raise RewardError(f"reward {name!r} returned {value!r} for {_shown(row, prompts, completions)}: expected a "
                                  "finite number, or None where it does not apply")  # fmt: skip
        return list(values)


def _called(function: RewardFunction, prompts: Sequence[Any], completions: Sequence[str],
            columns: Mapping[str, Sequence[Any]], timeout: float) -> Any:  # fmt: skip
    """The function's result; TimeoutError after `timeout` seconds (its thread is abandoned, it cannot be killed)."""
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            result = function(list(prompts), list(completions), **{k: list(v) for k, v in columns.items()})
            box["value"] = asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError(f"no answer after {timeout:g} s")
    if "error" in box:
        raise box["error"]
    return box["value"]


async def _awaited(result: Any) -> Any:
    return await result


def _explained(name: str, error: Exception, function: RewardFunction, prompts: Sequence[Any], completions: Sequence[str],
               columns: Mapping[str, Sequence[Any]], timeout: float) -> RewardError:  # fmt: skip
    """Which row it was: found by asking for each row alone."""
    if isinstance(error, RewardError):
        return error
    remedy = "Mend the function, return None where it does not apply, or pass --on-reward-error drop"
    if isinstance(error, TimeoutError):
        return RewardError(
            f"reward {name!r} hung: {error} on a batch of {len(completions)}. {remedy}, or --reward-timeout."
        )
    for row in range(len(completions)):
        try:
            alone = {k: [v[row]] for k, v in columns.items()}
            _called(function, [prompts[row]], [completions[row]], alone, timeout)
        except Exception as own:
            where = _shown(row, prompts, completions)
            return RewardError(f"reward {name!r} raised {type(own).__name__}: {own} for {where}. {remedy}.")
    return RewardError(
        f"reward {name!r} raised {type(error).__name__}: {error}, though not for any row alone. {remedy}."
    )


def _shown(row: int, prompts: Sequence[Any], completions: Sequence[str]) -> str:
    return f"row {row} (prompt {str(prompts[row])[-60:]!r}, completion {completions[row][:60]!r})"
