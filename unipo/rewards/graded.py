"""Rewards between right and wrong: numbers within a tolerance, answers of several words, answers of the right form.

Each is a frozen record of its settings and a reward function; it reads what follows the last `#` of a completion, and gives
None (not applicable) for rows without the column it looks at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unipo.rewards.answers import final_answer

Judge = Callable[[str, Any], float]


def _judged(completions: Sequence[str], wanted: Sequence[Any] | None, judge: Judge) -> list[float | None]:
    """`judge` of every final answer beside what was wanted; None where nothing was."""
    rows = wanted if wanted is not None else [None] * len(completions)
    return [None if w is None else judge(final_answer(c), w) for c, w in zip(completions, rows, strict=True)]


def number_in(text: str) -> float:
    """The finite number that a text is, else NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


@dataclass(frozen=True, slots=True)
class Within:
    """1 where |prediction - answer| < width, else 0, also for what is no number (Q-Insight, arXiv 2503.22679: 0.35 on a scale
    from 1 to 5)."""

    width: float = 0.35

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any] | None = None,
                 **columns: Any) -> list[float | None]:  # fmt: skip
        return _judged(completions, answer, lambda said, true: self.value(number_in(said) - float(true)))

    def value(self, error: float) -> float:
        """The reward of an error; NaN is no prediction."""
        return float(abs(error) < self.width)


@dataclass(frozen=True, slots=True)
class Near:
    """exp(-(error / width)^2 / 2), a tolerance without an edge: being nearer is always better. 0 for what is no number."""

    width: float = 0.35

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any] | None = None,
                 **columns: Any) -> list[float | None]:  # fmt: skip
        return _judged(completions, answer, lambda said, true: self.value(number_in(said) - float(true)))

    def value(self, error: float) -> float:
        """The reward of an error; NaN is no prediction."""
        return 0.0 if math.isnan(error) else math.exp(-0.5 * (error / self.width) ** 2)


@dataclass(frozen=True, slots=True)
class Overlap:
    """Intersection over union of two intervals, "start end" (TempSamp-R1, arXiv 2509.18056): 1 where they are the same.

        (min of ends - max of starts) / (max of ends - min of starts)         negative, down to -1, where they are apart

    `least`: rewards below it are raised to it (0; -1 keeps the measure as it is printed). What is no interval, the end after
    the start, has the reward `least`.
    """

    least: float = 0.0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any] | None = None,
                 **columns: Any) -> list[float | None]:  # fmt: skip
        return _judged(completions, answer, lambda said, true: self.value(_numbers(said), _numbers(str(true))))

    def value(self, said: Sequence[float], true: Sequence[float]) -> float:
        if len(said) != 2 or not said[0] < said[1]:
            return self.least
        shared, spanned = min(said[1], true[1]) - max(said[0], true[0]), max(said[1], true[1]) - min(said[0], true[0])
        return max(shared / spanned, self.least)


def _numbers(text: str) -> list[float]:
    """The numbers of a text of words; empty where a word is none."""
    found = [number_in(word) for word in text.replace(",", " ").split()]
    return [] if any(map(math.isnan, found)) else found


@dataclass(frozen=True, slots=True)
class WordByWord:
    """`first` where the first word of the answer is right, 1 where all are: a class, then its level (Q-Insight: 0.25)."""

    first: float = 0.25

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any] | None = None,
                 **columns: Any) -> list[float | None]:  # fmt: skip
        return _judged(completions, answer, lambda said, true: self.value(said.split(), str(true).split()))

    def value(self, said: Sequence[str], true: Sequence[str]) -> float:
        return 1.0 if said == true else self.first * float(said[:1] == true[:1])


@dataclass(frozen=True, slots=True)
class Formatted:
    """1 where the final answer is of the form that the row's column `form` states, a regular expression for all of it."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], form: Sequence[Any] | None = None,
                 **columns: Any) -> list[float | None]:  # fmt: skip
        return _judged(completions, form, lambda said, wanted: float(re.fullmatch(str(wanted), said) is not None))


@dataclass(frozen=True, slots=True)
class Prefix:
    """1 where the prediction is the beginning of the row's column `reference`: a text and what follows it (RLPT, arXiv
    2509.19249, with a string in the place of its generative judge).

    Blanks count as one space. `minimum`: characters that a prediction must have, since the shortest beginning is the safest
    guess; `share`: of the column `answer`, the first segment, that it must cover (1: all of it).
    """

    minimum: int = 1
    share: float = 0.0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], reference: Sequence[Any] | None = None,
                 answer: Sequence[Any] | None = None, **columns: Any) -> list[float | None]:  # fmt: skip
        first = answer if answer is not None else [""] * len(completions)
        rows = (
            None
            if reference is None
            else [None if r is None else (r, a) for r, a in zip(reference, first, strict=True)]
        )
        return _judged(completions, rows, lambda said, wanted: self.value(said, *wanted))

    def value(self, said: str, reference: str, first: str | None = "") -> float:
        prediction, truth = _spaced(said), _spaced(reference)
        least = max(self.minimum, math.ceil(self.share * len(_spaced(first or ""))))
        return float(len(prediction) >= least and truth.startswith(prediction))


def _spaced(text: str) -> str:
    return " ".join(str(text).split())


@dataclass(frozen=True, slots=True)
class ForTask:
    """Another reward function for the rows whose column `task` is `task`; for all others it does not apply (None)."""

    task: str
    function: Callable[..., Any]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], task: Sequence[Any] | None = None,
                 **columns: Sequence[Any]) -> list[float | None]:  # fmt: skip
        tasks = task if task is not None else [None] * len(completions)
        own = [i for i, name in enumerate(tasks) if name == self.task]
        made: list[float | None] = [None] * len(completions)
        if own:
            mine = {name: [values[i] for i in own] for name, values in columns.items()}
            found = self.function([prompts[i] for i in own], [completions[i] for i in own], **mine)
            for i, value in zip(own, found, strict=True):
                made[i] = value
        return made
