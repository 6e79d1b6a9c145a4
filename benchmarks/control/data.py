"""100,000 recorded HalfCheetah-v5 transitions for the offline rows, made once and kept under build/bench.

    python -m benchmarks.control.data

records a run of our PPO as a Minari dataset, and writes the same transitions as `transitions.npz` for the scripts that
do not read Minari.
"""  # fmt: skip

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

PLACE = Path(__file__).resolve().parents[2] / "build" / "bench" / "halfcheetah"
MINARI, ARRAYS = PLACE / "recorded", PLACE / "transitions.npz"
STEPS = 102_400


def make() -> Path:
    """Record the data where they are not there yet; returns the Minari dataset's folder."""
    if ARRAYS.exists():
        return MINARI
    from benchmarks.control.side import prepare

    prepare(1)
    from rich.console import Console

    from benchmarks.control.settings import PPO
    from benchmarks.control.side_ours import ppo_settings
    from unipo.api import configure, start

    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        options, settings = ppo_settings(PPO["ppo-halfcheetah"])
        asked = {"tensorboard": False, "evaluations": 0, "total_timesteps": STEPS, "threads": 1, **settings}
        config, recipe = configure("ppo", "HalfCheetah-v5", {"ppo": options}, preset=False, record=str(MINARI),
                                   out=f"{folder}/run", **asked)  # fmt: skip
        start(config, recipe, Console(quiet=True)).train()
    write_arrays()
    return MINARI


def write_arrays() -> None:
    """The recorded episodes as flat rows: every column [N, ...]."""
    from unipo.sources.acting.recordings import load_recorded
    from unipo.sources.acting.transitions import rows_of

    rows = rows_of(load_recorded(MINARI))
    names = ("observation", "action", "reward", "next_observation", "terminated", "truncated")
    np.savez(ARRAYS, **{name: np.ascontiguousarray(rows[name]) for name in names})


if __name__ == "__main__":
    print(make())
