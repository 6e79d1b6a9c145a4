"""Which curves are shown, and how they are taken from one run or from several seeds of the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from unipo.report.ledger import AXES, Shares, shares_of
from unipo.report.plots import PALETTE, SMOOTH_FROM, Draw, Line, draw_lines, draw_shares, legend_below, smooth
from unipo.report.runs import RunData
from unipo.statistics import mean_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A column of the metrics as a panel; `note` says in a few words how to read it."""

    title: str
    column: str
    note: str
    percent: bool = False
    log: bool = False


ACCURACY = Curve(
    title="Held-out accuracy", column="accuracy", note="completions with full reward; band: 95 % interval", percent=True
)
REWARD = Curve(title="Reward", column="reward", note="mean over everything sampled in the step")
SPEED = Curve(title="Tokens per second", column="tokens_per_second", note="sampled and trained")
CURVES = (
    Curve(title="Completion length", column="length", note="tokens"),
    Curve(title="Entropy", column="entropy", note="nats per token; near 0: it no longer explores"),
    Curve(title="KL to the sampler", column="kl", note="k3 estimate, at the last update of the step", log=True),
    Curve(
        title="Effective sample size", column="ess", note="of the importance weights; 100 %: on-policy", percent=True
    ),
    Curve(title="Clipped share", column="clipped_share", note="tokens that the clip cut off", percent=True),
    Curve(title="Gradient norm", column="grad_norm", note="before clipping", log=True),
    Curve(title="Truncated share", column="truncated_share", note="completions that ran out of tokens", percent=True),
    Curve(title="Loss", column="loss", note="a surrogate: its value is no measure of progress"),
    Curve(title="Preferred", column="preferred", note="pairs whose chosen side scores higher", percent=True),
    Curve(title="KL to the reference", column="kl_reference", note="nats per token", log=True),
    Curve(title="Value error", column="value_error", note="of the critic", log=True),
    SPEED,
)
ROUNDING = 1e-9
"""Smaller values are 0: on-policy, the KL divergence is rounding errors."""
AXIS_TITLES = {"source": "By source", "sign": "By direction", "staleness": "By staleness", "term": "By term"}


def values_of(run: RunData, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(steps [M], values [M]) of a curve in a run."""
    if curve is SPEED:
        return run.tokens_per_second
    steps, values = run.measured(curve.column)
    return steps, np.where(np.abs(values) < ROUNDING, 0.0, values)


def run_lines(run: RunData, curve: Curve, color: str = PALETTE[0]) -> list[Line]:
    """The curve of one run, with `<column>_low` and `_high` as its band where the run has them; none where not measured."""
    steps, values = values_of(run, curve)
    if not len(steps):
        return []
    low, high = (run.column(f"{curve.column}_{side}") for side in ("low", "high"))
    there = np.isfinite(run.column(curve.column)) if curve is not SPEED else np.zeros(len(run), bool)
    band = bool(there.any()) and bool(np.isfinite(low[there]).all() and np.isfinite(high[there]).all())
    if not band:
        return [Line(steps=steps, values=values, color=color, marked=curve is ACCURACY)]
    return [Line(steps=steps, values=values, low=low[there], high=high[there], color=color, marked=curve is ACCURACY)]


def seeds_line(runs: Sequence[RunData], curve: Curve, label: str, color: str) -> list[Line]:
    """Mean and 95 % t interval over runs that differ in their seed only, at the steps that all of them measured.

    Long noisy curves are smoothed run by run before, so that the band is about the seeds. One run: its own curve.
    """
    found = [values_of(run, curve) for run in runs]
    found = [(s, smooth(v) if len(v) >= SMOOTH_FROM and curve is not ACCURACY else v) for s, v in found if len(s)]
    if not found:
        return []
    if len(found) == 1:
        steps, values = found[0]
        return [Line(steps=steps, values=values, label=label, color=color, marked=curve is ACCURACY)]
    shared = sorted(set.intersection(*(set(s.tolist()) for s, _ in found)))
    table = [[float(v[np.searchsorted(s, step)]) for s, v in found] for step in shared]
    if not table:
        return []
    mean, low, high = np.array([mean_interval(row) for row in table]).T
    if curve.percent:
        low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    steps = np.array(shared)
    return [Line(steps=steps, values=mean, low=low, high=high, label=label, color=color, marked=curve is ACCURACY)]


def lines_panel(curve: Curve, lines: Sequence[Line]) -> Draw:
    """Draws the lines of a curve."""
    return lambda ax: draw_lines(ax, lines, percent=curve.percent, log=curve.log)


def shares_panel(shares: Shares) -> Draw:
    """Draws an axis of the ledger, without a legend: the page has its own."""
    return lambda ax: draw_shares(ax, shares)


def shares_panel_with_legend(shares: Shares) -> Draw:
    """Draws an axis of the ledger with its names under it, for a PNG."""

    def draw(ax: Axes) -> None:
        draw_shares(ax, shares)
        legend_below(ax, shares)

    return draw


def ledger_panels(run: RunData) -> list[tuple[str, Draw]]:
    """Every axis of the ledger that the run has."""
    found = [(axis, shares_of(run, axis)) for axis in AXES]
    return [
        (f"Gradient share {AXIS_TITLES[axis].lower()}", shares_panel_with_legend(s))
        for axis, s in found
        if s is not None
    ]
