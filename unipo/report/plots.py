"""Drawing: one function per kind of panel, on any matplotlib axes; pictures as inline SVG (for both themes) or PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from unipo.report.ledger import REST, Shares, readable

INK, LINE = "#1f2430", "#d9dde5"
"""Text and grid of the pictures; in an SVG they become the colours of the page, light or dark."""
PALETTE = (
    "#3b82f6", "#f59e0b", "#10b981", "#8b5cf6", "#ef4444", "#06b6d4", "#ec4899", "#84cc16", "#a16207", "#64748b",
)  # fmt: skip
NAMED = {
    "fresh": "#3b82f6", "replay": "#8b5cf6", "demos": "#f59e0b", "pairs": "#10b981", "labels": "#06b6d4", "raised": "#10b981",
    "lowered": "#ef4444", "other": "#94a3b8", **dict.fromkeys(REST.values(), "#94a3b8"),
}  # fmt: skip
AGES = ("#93c5fd", "#60a5fa", "#3b82f6", "#1d4ed8", "#1e3a8a")
MOST_POINTS = 600
"""More points than this are averaged in bins: a page stays small whatever the length of the run."""
MOST_AREAS = 120
"""The same for stacked areas, in which spikes hide each other."""
SMOOTH_FROM = 25
"""Noisy curves with at least so many points are drawn faint, with a running mean over a twelfth of them."""

WIDE = 5000
"""From here on places on the horizontal axis are written as 10k, 1M."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve: steps [M], values [M], and its interval [M] where there is one."""

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    label: str = ""
    color: str = PALETTE[0]
    marked: bool = False


Draw = Callable[[Axes], None]


def draw_lines(ax: Axes, lines: Sequence[Line], percent: bool = False, log: bool = False, along: str = "step") -> None:
    """Curves over what `along` names. `log` only takes effect where every value is positive and they span two decades."""
    for line in lines:
        _draw_line(ax, line)
    values = np.concatenate([line.values for line in lines]) if lines else np.array([])
    if len(values) and np.ptp(values) <= 1e-6 * np.abs(values).max():  # flat: no axis made of rounding errors
        room = 0.1 * abs(values[0]) or 1.0
        inside = percent and 0 <= values[0] <= 1
        ax.set_ylim(*((-0.03, 1.03) if inside else (values[0] - room, values[0] + room)))
    if log and len(values) and values.min() > 0 and values.max() / values.min() > 100:
        ax.set_yscale("log")
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1 if 0 < np.ptp(values) <= 0.05 else 0))
    if len({line.label for line in lines}) > 1:
        ax.legend(loc="best")
    _steps_axis(ax, along)


def draw_shares(ax: Axes, shares: Shares, along: str = "step") -> None:
    """Stacked areas of gradient share; one step alone is a bar."""
    colors = colors_of(shares)
    steps, table = thin(shares.steps, shares.shares, MOST_AREAS)
    if len(steps) == 1:
        left = np.concatenate([[0.0], np.cumsum(table[:, 0])[:-1]])
        ax.bar([steps[0]] * len(table), table[:, 0], bottom=left, color=colors, width=0.6, label=shares.names)
        ax.set_xlim(steps[0] - 2, steps[0] + 2)
    else:
        ax.stackplot(steps, table, colors=colors, labels=shares.names, linewidth=0, alpha=0.92)
        ax.set_xlim(steps[0], steps[-1])
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(False)
    _steps_axis(ax, along)


def legend_below(ax: Axes, shares: Shares, columns: int = 3) -> None:
    """The names of an axis of the ledger under its panel, for the PNG (the page writes its own)."""
    handles = [
        mpl.patches.Patch(color=c, label=readable(n)) for n, c in zip(shares.names, colors_of(shares), strict=True)
    ]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)


def colors_of(shares: Shares) -> list[str]:
    """A colour per name: known names have their own, others one that no known name has, ages go from light to dark."""
    if shares.axis == "staleness":
        return [NAMED[n] if n in NAMED else AGES[min(i, len(AGES) - 1)] for i, n in enumerate(shares.names)]
    free = iter([c for c in PALETTE if c not in NAMED.values()] * 8)
    return [NAMED[n] if n in NAMED else next(free) for n in shares.names]


def svg(draw: Draw, name: str, width: float = 4.4, height: float = 2.5) -> str:
    """One panel as inline SVG text: transparent, its text and grid in the colours of the page. `name` is its own on a page."""
    with _style():
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    picture = text.getvalue()
    picture = picture[picture.index("<svg") :]
    return picture.replace(INK, "currentColor").replace(LINE, "var(--line)")


def png(path: Path, panels: Sequence[tuple[str, Draw]], columns: int = 3, size: tuple[float, float] = (4.2, 2.7),
        legend: Sequence[tuple[str, str]] = ()) -> Path:  # fmt: skip
    """Titled panels as a grid in one PNG on white. `legend`: (label, colour) of what all of them share, above them."""
    rows = -(-len(panels) // columns)
    with _style():
        spaced = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(size[0] * columns, size[1] * max(rows, 1)), layout=spaced)
        for i, (title, draw) in enumerate(panels):
            ax = figure.add_subplot(max(rows, 1), columns, i + 1)
            draw(ax)
            ax.set_title(title, loc="left", fontweight="bold", fontsize=10.5)
        if legend:
            handles = [mpl.lines.Line2D([], [], color=color, label=label, linewidth=4) for label, color in legend]
            wide = max(len(label) for label, _ in legend) > 40
            figure.legend(handles=handles, loc="outside upper left", ncols=1 if wide else 4, fontsize=9)
        figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    return path


def thin(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """(steps [M], values [..., M]) with M <= most: means over consecutive bins of nearly equal size."""
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(steps), most + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, len(steps)))
    return np.add.reduceat(steps, edges) / sizes, np.add.reduceat(values, edges, axis=-1) / sizes


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twelfth of the points; at the ends the window shrinks, so no value is invented."""
    half = max(1, len(values) // 24)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _draw_line(ax: Axes, line: Line) -> None:
    steps, values = thin(line.steps, line.values)
    noisy = len(steps) >= SMOOTH_FROM and not line.marked and line.low is None
    if noisy:
        ax.plot(steps, values, color=line.color, alpha=0.25, linewidth=0.8)
    marker = "o" if line.marked or len(steps) == 1 else ""
    ax.plot(steps, smooth(values) if noisy else values, color=line.color, label=line.label or None, marker=marker)
    if line.low is not None and line.high is not None:
        low, high = thin(line.steps, line.low)[1], thin(line.steps, line.high)[1]
        ax.fill_between(steps, low, high, color=line.color, alpha=0.18, linewidth=0)
        if len(steps) == 1:
            ax.vlines(steps, low, high, color=line.color, alpha=0.5, linewidth=3)


def _steps_axis(ax: Axes, along: str) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if ax.get_xlim()[1] >= WIDE:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.margins(x=0.02)
    ax.set_xlabel(along, loc="right", fontsize=8, labelpad=1.5)


@contextmanager
def _style() -> Iterator[None]:
    settings: Any = {
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "text.color": INK,
        "axes.labelcolor": INK, "axes.edgecolor": LINE, "axes.titlecolor": INK, "xtick.color": LINE, "ytick.color": LINE,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.7,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "ytick.left": False, "xtick.major.size": 3, "lines.linewidth": 1.9, "lines.markersize": 4.5, "legend.frameon": False,
        "legend.fontsize": 8, "axes.formatter.limits": (-3, 5), "axes.formatter.useoffset": False,
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield
