"""How curves are taken from one run, or from several seeds of the same run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from unipo.report.kinds import SPEED, Curve
from unipo.report.ledger import AXES, Shares, shares_of
from unipo.report.plots import (
    MOST_POINTS,
    PALETTE,
    SMOOTH_FROM,
    Draw,
    Line,
    draw_lines,
    draw_shares,
    legend_below,
    smooth,
)
from unipo.report.runs import RunData

ROUNDING = 1e-9
"""Smaller values are 0: on-policy, the KL divergence is rounding errors."""
AXIS_TITLES = {"source": "By source", "sign": "By direction", "staleness": "By staleness", "term": "By term"}


def values_of(run: RunData, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(places on the axis [M], values [M]) of a curve in a run."""
    if curve.column == SPEED:
        return run.speed
    steps, values = run.measured(curve.column)
    return steps, np.where(np.abs(values) < ROUNDING, 0.0, values)


def run_lines(run: RunData, curve: Curve, color: str = PALETTE[0], label: str = "") -> list[Line]:
    """The curve of one run, with `<column>_low` and `_high` as its band where the run has them; none where not measured."""
    steps, values = values_of(run, curve)
    if not len(steps):
        return []
    low, high = (run.column(f"{curve.column}_{side}") for side in ("low", "high"))
    there = np.isfinite(run.column(curve.column))
    band = bool(there.any()) and bool(np.isfinite(low[there]).all() and np.isfinite(high[there]).all())
    between = (low[there], high[there]) if band else (None, None)
    marked = curve is run.kind.measure.curve
    return [Line(steps=steps, values=values, low=between[0], high=between[1], color=color, label=label, marked=marked)]


def seeds_line(runs: Sequence[RunData], curve: Curve, label: str, color: str) -> list[Line]:
    """One curve of runs that differ in their seed only, with its 95 % interval. One run: its own curve.

    The measure is aggregated where all runs have it. Other curves are smoothed run by run before, so that the band is about
    the seeds, and read between their points, because episodes do not end in the same step with every seed.
    """
    measured = [run for run in runs if len(values_of(run, curve)[0])]
    if len(measured) < 2:
        return [line for run in measured for line in run_lines(run, curve, color, label)]
    kind = measured[0].kind
    marked = curve is kind.measure.curve
    steps = _shared(measured, curve) if marked else _common(measured, curve)
    if not len(steps):
        return []
    if marked:
        found = [kind.aggregate.final([run.scores(step) for run in measured]) for step in steps.tolist()]
        mean, low, high = np.array(found).T
    else:
        mean, low, high = kind.aggregate.across(np.stack([_read_at(run, curve, steps) for run in measured], axis=1))
    if curve.percent:
        low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    return [Line(steps=steps, values=mean, low=low, high=high, label=label, color=color, marked=marked)]


def _shared(runs: Sequence[RunData], curve: Curve) -> np.ndarray:
    """The places that all runs measured."""
    return np.array(sorted(set.intersection(*(set(values_of(run, curve)[0].tolist()) for run in runs))))


def _common(runs: Sequence[RunData], curve: Curve) -> np.ndarray:
    """The places of any run within the stretch that all have; at most MOST_POINTS of them."""
    found = [values_of(run, curve)[0] for run in runs]
    places = np.unique(np.concatenate(found))
    places = places[(places >= max(f[0] for f in found)) & (places <= min(f[-1] for f in found))]
    if len(places) <= MOST_POINTS:
        return places
    return places[np.linspace(0, len(places) - 1, MOST_POINTS).astype(int)]


def _read_at(run: RunData, curve: Curve, places: np.ndarray) -> np.ndarray:
    steps, values = values_of(run, curve)
    return np.interp(places, steps, smooth(values) if len(values) >= SMOOTH_FROM else values)


def lines_panel(curve: Curve, lines: Sequence[Line], along: str) -> Draw:
    """Draws the lines of a curve over what `along` names."""
    return lambda ax: draw_lines(ax, lines, percent=curve.percent, log=curve.log, along=along)


def shares_panel(shares: Shares, along: str) -> Draw:
    """Draws an axis of the ledger, without a legend: the page has its own."""
    return lambda ax: draw_shares(ax, shares, along)


def shares_panel_with_legend(shares: Shares, along: str) -> Draw:
    """Draws an axis of the ledger with its names under it, for a PNG."""

    def draw(ax: Axes) -> None:
        draw_shares(ax, shares, along)
        legend_below(ax, shares)

    return draw


def ledger_panels(run: RunData) -> list[tuple[str, Draw]]:
    """Every axis of the ledger that the run has."""
    found = [(axis, shares_of(run, axis)) for axis in AXES]
    along = run.kind.axis_title
    return [
        (f"Gradient share {AXIS_TITLES[axis].lower()}", shares_panel_with_legend(s, along))
        for axis, s in found
        if s is not None
    ]
