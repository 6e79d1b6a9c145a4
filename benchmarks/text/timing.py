"""How the text sides are timed, and the line they print. Nothing of unipo is imported here."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any


def cpu_seconds() -> float:
    """User and system seconds of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@dataclass(slots=True)
class Stopwatch:
    """Marks the ends of steps: the first `warm` are not counted."""

    warm: int
    began: float = field(default_factory=time.perf_counter)
    steps: int = -1
    units: float = 0.0
    first: tuple[float, float] = (0.0, 0.0)
    last: tuple[float, float] = (0.0, 0.0)

    def mark(self, units: float = 1.0) -> None:
        """Call once before the first step, then after each; `units` of work were done in it."""
        self.steps += 1
        self.last = (cpu_seconds(), time.perf_counter())
        if self.steps <= self.warm:
            self.first = self.last
        else:
            self.units += units

    @property
    def per_step(self) -> float:
        """Units in a counted step."""
        return self.units / max(1, self.steps - self.warm)

    def say(self, unit: str, **more: Any) -> None:
        """Print the result as the last line."""
        result = {
            "unit": unit, "units": self.units, "cpu_seconds": self.last[0] - self.first[0],
            "wall_seconds": self.last[1] - self.first[1], "warm_seconds": self.first[1] - self.began,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }  # fmt: skip
        print(json.dumps(result | more), flush=True)


def versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}
