"""A verdict as a picture: for every metric that decides, each arm's mean, interval and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHOD, OTHER = "#1f6fb4", "#8a8f98"
PANELS = 4
"""Metrics that a picture shows at most."""


def picture(verdict: Mapping[str, Any], path: Path) -> Path:
    """Draw a verdict (the keys of `run.KEYS`) into a PNG file: a panel per deciding metric, the arms below each other."""
    from matplotlib.figure import Figure

    arms, metrics = verdict["numbers"], deciding(verdict)
    figure = Figure(figsize=(3.0 + 2.7 * len(metrics), 0.9 + 0.32 * len(arms)), dpi=80, layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for row, found in enumerate(arms.values()):
            _spread(axes, row, found[metric], METHOD if row == 0 else OTHER)
        axes.set_title(metric, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(arms)), list(arms))
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    figure.suptitle(f"{verdict['slug']}: {verdict['verdict']} ({len(verdict['seeds'])} seeds)", fontsize=9)
    figure.savefig(path)
    return path


def deciding(verdict: Mapping[str, Any]) -> list[str]:
    """Metrics that the parts of the claim name, in their order; those of the method itself."""
    known = [m for m in next(iter(verdict["numbers"].values())) if m != "learning_rate"]
    asked = " ".join(part["expected"] for part in verdict["expectations"])
    named = [m for m in known if f"{m}: " in asked] or known
    return named[:PANELS]


def _spread(axes: Axes, row: int, found: Mapping[str, Any], color: str) -> None:
    """Seeds as faint dots, the mean as a large one, its 95 % interval as a line."""
    seeds, (low, high) = [x for x in found["seeds"] if x is not None], found["interval"]
    axes.plot(seeds, [row] * len(seeds), "o", color=color, alpha=0.25, markersize=3, linewidth=0)
    if low is not None and high is not None:
        axes.plot([low, high], [row, row], color=color, linewidth=2)
    if found["mean"] is not None:
        axes.plot([found["mean"]], [row], "o", color=color, markersize=6)
