"""A paper's claim as data: arms, one trial, and the rule, fixed beforehand, that turns numbers into a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unipo.recipe import Recipe
from unipo.statistics import mean_interval, paired_difference_interval

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"

Phases = tuple[Recipe, ...]
"""What an arm trains with: recipes one after the other, an equal share of the steps each."""

Trial = Callable[[Any, float, int, int], Mapping[str, float]]
"""(arm, learning rate, seed, steps) -> metrics of one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """The claim says: least < metric(arm) - metric(than) < most. Without `than`: the metric itself.

    Bounds are chosen before the experiment: 0 for "better than", +- a tolerance for "as good as".
    """

    arm: str
    metric: str
    than: str = ""
    least: float = -math.inf
    most: float = math.inf

    def difference(self, values: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[float, float, float]:
        """(mean, low, high) over seeds, paired by seed, of `values[arm][metric]` lists. One seed: NaN bounds."""
        own = values[self.arm][self.metric]
        if not self.than:
            return mean_interval(own)
        return paired_difference_interval(own, values[self.than][self.metric])

    def verdict(self, low: float, high: float) -> str:
        """Reproduced: the whole interval agrees. Not reproduced: none of it does. Else, and for NaN: inconclusive."""
        if low > self.least and high < self.most:
            return REPRODUCED
        return NOT_REPRODUCED if high <= self.least or low >= self.most else INCONCLUSIVE

    def __str__(self) -> str:
        subject = f"{self.metric}: {self.arm}" + (f" - {self.than}" if self.than else "")
        low = "" if self.least == -math.inf else f"{self.least:g} < "
        return low + subject + ("" if self.most == math.inf else f" < {self.most:g}")


def combined(verdicts: Sequence[str]) -> str:
    """Of a claim with several parts: not reproduced if one part is not, reproduced if all are, else inconclusive."""
    if NOT_REPRODUCED in verdicts:
        return NOT_REPRODUCED
    return REPRODUCED if verdicts and set(verdicts) == {REPRODUCED} else INCONCLUSIVE


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One experiment. `arms`: the method and its baselines; each is tuned over `grid`, on seeds that are not reported.

    An arm is `Phases`, or whatever else `trial` takes as its first argument (the settings of a tabular algorithm, say).

    `tune`: the metric by which a learning rate is chosen; `minimise` says that less of it is better. `note`: the
    setting, the baselines, and what the experiment leaves out.
    """

    slug: str
    statement: str
    arms: Mapping[str, Any]
    trial: Trial
    steps: int
    tune: str
    expectations: tuple[Expectation, ...]
    note: str
    grid: tuple[float, ...] = (0.02, 0.06, 0.2, 0.6)
    minimise: bool = False
