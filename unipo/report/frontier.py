"""Reward over the distance from the start: what a policy was trained on against what is true, and runs against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from unipo.report.groups import Group
from unipo.report.plots import PALETTE, Draw, thin
from unipo.report.runs import RunData
from unipo.report.text import number

DISTANCE, GOLD, PROXY = "kl_answer", "gold", "reward"
POINTS = 12
"""A path is drawn by so many points: between neighbouring steps both numbers are noise, and it would be a scribble."""
ALIKE = 4.0
"""Two rewards share an axis where neither's range is more than so many times the other's."""
FELL = 0.1
"""Share of what was gained that must be lost again for the gold reward to count as fallen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """A column over the KL from the start, in the order of the steps: `distance`, `values` and `steps`, [M] each."""

    distance: np.ndarray
    values: np.ndarray
    steps: np.ndarray

    @property
    def top(self) -> int:
        """Where it is highest."""
        return int(self.values.argmax())


def path_of(run: RunData, column: str) -> Path | None:
    """The steps that know both, as means over at most POINTS stretches of them; None below two."""
    distance, values = run.column(DISTANCE), run.column(column)
    known = np.isfinite(distance) & np.isfinite(values)
    if known.sum() < 2:
        return None
    steps, (distance, values) = thin(run.metrics["step"][known], np.stack([distance[known], values[known]]), POINTS)
    return Path(distance=np.maximum(distance, 0.0), values=values, steps=steps)


def has_gold(run: RunData) -> bool:
    return path_of(run, GOLD) is not None and path_of(run, PROXY) is not None


def optimisation_note(run: RunData) -> str:
    """Where the gold reward was highest, and what became of it."""
    gold = path_of(run, GOLD)
    if gold is None:
        return ""
    top, end, start = gold.values[gold.top], gold.values[-1], gold.values[0]
    place = f"{number(float(top))} at {gold.distance[gold.top]:.2g} nats, step {gold.steps[gold.top]:.0f}"
    fell = top - end > FELL * max(top - start, 1e-12) and gold.top < len(gold.values) - 1
    return (
        f"gold is best, {place}, and then falls to {number(float(end))}"
        if fell
        else f"gold does not fall; best {place}"
    )


def draw_optimisation(run: RunData) -> Draw:
    """What the run was trained on and the gold reward, over the KL; on two axes where they are of different sizes."""

    def draw(ax: Axes) -> None:
        proxy, gold = path_of(run, PROXY), path_of(run, GOLD)
        if proxy is None or gold is None:
            return
        ranges = [max(float(np.ptp(p.values)), 1e-12) for p in (proxy, gold)]
        together = max(ranges) <= ALIKE * min(ranges) and _near(proxy.values, gold.values)
        right = ax if together else ax.twinx()
        first = ax.plot(proxy.distance, proxy.values, "o-", color=PALETTE[0], label="trained on", markersize=3)
        second = right.plot(gold.distance, gold.values, "o-", color=PALETTE[1], label="gold", markersize=3)
        right.plot(gold.distance[gold.top], gold.values[gold.top], "o", color=PALETTE[1], markersize=7)
        if right is not ax:
            right.grid(False)
            right.spines[["top", "right", "left", "bottom"]].set_visible(False)
            right.tick_params(axis="y", length=0, labelcolor=PALETTE[1])
            ax.tick_params(axis="y", labelcolor=PALETTE[0])
        above: dict[str, Any] = {
            "loc": "lower right",
            "bbox_to_anchor": (1.0, 1.0),
            "borderaxespad": 0.1,
            "ncols": 2,
            "handlelength": 1.3,
        }
        ax.legend(handles=[*first, *second], **above)  # inside it would hide what is drawn on the other axis
        _distance_axis(ax)

    return draw


def frontier_column(groups: Sequence[Group]) -> str:
    """What the frontier is of: gold, or else the reward; "" where fewer than two configurations know their distance."""
    for column in (GOLD, PROXY):
        if sum(any(path_of(run, column) is not None for run in g.runs) for g in groups) > 1:
            return column
    return ""


def draw_frontier(groups: Sequence[Group], column: str) -> Draw:
    """Every run as a path of `column` over the KL, in its configuration's colour; a dot is where it ended."""

    def draw(ax: Axes) -> None:
        for i, g in enumerate(groups):
            color, paths = PALETTE[i % len(PALETTE)], [p for run in g.runs if (p := path_of(run, column)) is not None]
            for path in paths:
                faint = 0.9 if len(paths) == 1 else 0.5
                ax.plot(path.distance, path.values, "o-", color=color, alpha=faint, linewidth=1.5, markersize=2.5)
                ax.plot(path.distance[-1], path.values[-1], "o", color=color, markersize=7)
        _distance_axis(ax)

    return draw


def _near(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a common axis would leave each at least a quarter of it."""
    whole = max(a.max(), b.max()) - min(a.min(), b.min())
    return bool(min(np.ptp(a), np.ptp(b)) >= whole / ALIKE)


def _distance_axis(ax: Axes) -> None:
    """The KL on a scale of square roots, on which Gao et al. (arXiv 2210.10760) found their laws."""
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
    ax.set_xlim(left=0.0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.set_xlabel("KL to the start, nats per answer", loc="right", fontsize=8, labelpad=1.5)
