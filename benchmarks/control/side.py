"""How a side of the control rows is timed; nothing of unipo is imported here, so that peers can use it.

A side is a process that trains for a while and prints one JSON object as its last line: what it counted, the wall and
processor seconds of the timed part, and the seconds before it (`warm_seconds`: compilation, first calls, random steps).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

EPISODES, FIRST_SEED = 20, 1_000_000


def parser(description: str | None, rows: tuple[str, ...]) -> argparse.ArgumentParser:
    """What every side is asked: which row, how many threads, how long before and while it is timed."""
    asked = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    asked.add_argument("row", choices=rows)
    asked.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    asked.add_argument("--warm", type=float, default=2.0, help="seconds that are not counted, at the least")
    asked.add_argument("--seconds", type=float, default=5.0, help="seconds that are counted, at the least")
    asked.add_argument("--precision", default="float32", help="float32, autocast (bfloat16) or mkldnn (bfloat16)")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument(
        "--steps", type=int, default=0, help="train for so long, untimed, and give the returns then reached"
    )
    asked.add_argument("--width", type=int, default=256, help="units of both hidden layers (td3bc and iql)")
    return asked


class Meter:
    """Counts units from the first call of `add` after `warm` seconds to the first after `seconds` more."""

    def __init__(self, unit: str, warm: float, seconds: float) -> None:
        self.unit, self.warm, self.seconds = unit, warm, seconds
        self.born, self.units, self.begun, self.marks = time.perf_counter(), 0, 0.0, (0.0, 0.0)
        self.seen = 0

    def add(self, units: int) -> bool:
        """`units` more were done; returns whether to go on."""
        now = time.perf_counter()
        self.seen += 1
        if not self.begun:
            if now - self.born >= self.warm and self.seen > 1:
                self.begun, self.cpu = now, processor_seconds()
            return True
        self.units += units
        self.ended, self.cpu_ended = now, processor_seconds()
        return now - self.begun < self.seconds

    def result(self, notes: str = "", libraries: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
        wall, cpu = self.ended - self.begun, self.cpu_ended - self.cpu
        return {"unit": self.unit, "units": self.units, "wall_seconds": round(wall, 4), "cpu_seconds": round(cpu, 4),
                "rate": round(self.units / wall, 2), "cpu_rate": round(self.units / cpu, 2),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                "warm_seconds": round(self.begun - self.born, 2), "gate": {}, "notes": notes,
                "versions": versions(libraries), **more}  # fmt: skip


def processor_seconds() -> float:
    """User and system seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def versions(libraries: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def episode_returns(environment: str, act: Callable[[Any], Any]) -> list[float]:
    """Undiscounted returns of whole episodes, from starts that no training run uses; `act`: [n, d] -> [n, ...], its mode."""
    import gymnasium
    import numpy as np

    environments = [gymnasium.make(environment) for _ in range(EPISODES)]
    observations = [env.reset(seed=FIRST_SEED + i)[0] for i, env in enumerate(environments)]
    returns, running = [0.0] * EPISODES, list(range(EPISODES))
    while running:
        actions, left = act(np.stack([observations[i] for i in running]).astype(np.float32)), []
        for i, action in zip(running, actions, strict=True):
            observations[i], reward, terminated, truncated, _ = environments[i].step(action)
            returns[i] += float(reward)
            left += [] if terminated or truncated else [i]
        running = left
    return [round(r, 2) for r in returns]


def say_returns(
    environment: str, steps: int, act: Callable[[Any], Any], notes: str, libraries: tuple[str, ...]
) -> None:
    """The last line of a side that trained for `steps`."""
    cpu = processor_seconds()
    say({"unit": "run", "units": 1, "wall_seconds": 0.0, "cpu_seconds": round(cpu, 1), "notes": notes,
         "gate": {"returns": episode_returns(environment, act), "steps": steps}, "versions": versions(libraries)})  # fmt: skip


def prepare(threads: int) -> None:
    """Before torch is imported: threads, also for libraries that read the environment once. MuJoCo writes its log where a
    process stands: elsewhere than here."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.chdir(tempfile.gettempdir())


def say(result: dict[str, Any]) -> None:
    """The last line of a side."""
    print(json.dumps(result), flush=True)
