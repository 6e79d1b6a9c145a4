"""What the age of rollouts costs: methods trained on the shipped model with `--ahead` 0, 4 and 16, three seeds each.

python -m benchmarks.text.ahead          (about ten minutes of one core; writes results/ahead.json)
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

import unipo

RESULTS = Path(__file__).parents[1] / "results" / "ahead.json"
METHODS, STEPS_AHEAD, SEEDS = ("rloo", "grpo", "cispo", "llamarl-aipo"), (0, 4, 16), 3


def measured(method: str, ahead: int, seed: int) -> dict[str, object]:
    """Accuracy at the end, and means over the run of what the ledger says."""
    with tempfile.TemporaryDirectory() as folder:
        run = unipo.train(
            method, "arithmetic", Console(quiet=True), steps=60, prompts=16, rollouts=8, seed=seed, ahead=ahead,
            out=f"{folder}/run", threads=1, eval_every=0, tensorboard=False, save_episodes=False,
        )  # fmt: skip
    rows = run.records.metrics
    return {"method": method, "ahead": ahead, "seed": seed, "accuracy": rows[-1]["accuracy"], "ess": mean(rows, "ess"),
            "clipped": mean(rows, "clipped_share"), "kl": mean(rows, "kl")}  # fmt: skip


def mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows if math.isfinite(row.get(name, math.nan)))


def main() -> None:
    found = [measured(m, ahead, seed) for m in METHODS for ahead in STEPS_AHEAD for seed in range(SEEDS)]
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
