"""Accuracy over processor seconds of the stored runs: results/time_to_90.json -> docs/benchmarks/time_to_90.png, and a table.

python -m benchmarks.text.time_to_90_plot
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.text.time_to_90 import BAR, ROOT

RESULTS = ROOT / "benchmarks" / "results" / "time_to_90.json"
PICTURE = ROOT / "docs" / "benchmarks" / "time_to_90.png"
COLORS = {"trl": "tab:red", "ours": "tab:blue", "mixed": "tab:green"}
LABELS = {"trl": "TRL", "ours": "UniPO, rollouts only", "mixed": "UniPO, with demonstrations too"}


def chosen() -> dict[str, list[dict[str, Any]]]:
    """Side -> its runs with fresh seeds."""
    runs = json.loads(RESULTS.read_text())["runs"]
    return {side: [run for run in runs if run["side"] == side and run["phase"] == "fresh seeds"] for side in COLORS}


def setting(run: dict[str, Any]) -> str:
    return f"{run['method']}, learning rate {run['lr']:g}, {run['prompts']} prompts"


def table(sides: dict[str, list[dict[str, Any]]]) -> None:
    """Seconds of every seed, medians, and the ratio to TRL's."""
    theirs = [run["seconds"] for run in sides["trl"]]
    for side, runs in sides.items():
        seconds = [run["seconds"] for run in runs]
        shown = ", ".join(("" if run["reached"] else ">") + f"{run['seconds']:.1f}" for run in runs)
        ratio = statistics.median(theirs) / statistics.median(seconds)
        low, high = min(theirs) / max(seconds), max(theirs) / min(seconds)
        print(f"{LABELS[side]}: {setting(runs[0])}: {shown} s; ratio {ratio:.1f} ({low:.1f} to {high:.1f})")


def main() -> None:
    import matplotlib.pyplot as plt

    sides = chosen()
    table(sides)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    for side, runs in sides.items():
        for i, run in enumerate(runs):
            seconds, accuracy = zip(*run["curve"], strict=True)
            label = f"{LABELS[side]}: {setting(run)}" if i == 0 else None
            axes.plot(seconds, accuracy, color=COLORS[side], alpha=0.8, linewidth=1.2, label=label)
    axes.axhline(BAR, color="gray", linestyle=":")
    axes.set(xlabel="processor seconds (one thread; evaluation not counted)", ylabel="held-out accuracy", ylim=(0.3, 1.0),
             title="arithmetic, from the shipped tiny model: three fresh seeds of each side")  # fmt: skip
    axes.set_xlim(left=0)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
