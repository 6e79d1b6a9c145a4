"""Our control results beside Stable-Baselines3: the table and the curves of docs/benchmarks/control.md.

    python benchmarks/control/table.py

reads `peers/*.json` and `ours/*.json` next to this file (peers.py says what the fields mean) and rewrites what stands
between the two markers of the page, and its picture. A row with only one side is shown with the other side empty.

The score of a seed is the mean of its evaluation returns. IQM is the interquartile mean of the seeds' scores, with a
bootstrap interval over seeds (Agarwal et al. 2021, arXiv:2108.13264; a row is one environment, so there is one stratum).
Five seeds are few for a bootstrap. The difference is therefore one of means, with Welch's t interval, which is wider.
Speeds are medians over seeds, of training alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from unipo.report.plots import PALETTE, Line, draw_lines, png
from unipo.statistics import CONFIDENCE, bootstrap_interval

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "benchmarks" / "control.md"
START, END = "<!-- control: start -->", "<!-- control: end -->"
EMPTY_PAGE = f"# Control: our results beside Stable-Baselines3\n\n{START}\n{END}\n"
COLORS = {"unipo": PALETTE[0], "Stable-Baselines3": PALETTE[1]}
ORDER = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "LunarLander-v3", "Swimmer-v5", "Hopper-v5", "HalfCheetah-v5")
RATES = {
    "updates/CPU s": ("updates", "cpu_seconds"), "steps/CPU s": ("steps", "cpu_seconds"),
    "updates/s": ("updates", "seconds"), "steps/s": ("steps", "seconds"),
}  # fmt: skip
"""Speeds, best first; a row shows the first that both sides have. Processor time does not depend on what else was running."""

Interval = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One algorithm of one library on one environment.

    scores: [S] mean evaluation return of each seed.
    steps: [P] environment steps at which the curve was measured; curves: [S, P] mean returns.
    rates: unit -> [S], such as "steps/s"; of the RATES, those that every seed has recorded.
    """

    algorithm: str
    environment: str
    total_steps: int
    settings: Mapping[str, Any]
    scores: np.ndarray
    steps: np.ndarray
    curves: np.ndarray
    rates: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An algorithm on an environment, with what was measured of it."""

    algorithm: str
    environment: str
    ours: Scores | None
    peer: Scores | None

    @property
    def sides(self) -> dict[str, Scores]:
        """The libraries that were measured, ours first."""
        both = {"unipo": self.ours, "Stable-Baselines3": self.peer}
        return {name: scores for name, scores in both.items() if scores is not None}


def read_scores(path: Path) -> Scores:
    """A file of peers/ or ours/. Seeds measured at other steps than the first are interpolated to its steps.

    Raises ValueError, naming the file, for one without seeds or with returns that are not finite.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    seeds = table.get("seeds")
    if not seeds:
        raise ValueError(f"{path}: expected at least one finished seed, found none: run the benchmark again")
    scores = np.array([np.mean(seed["returns"]) for seed in seeds])
    if not np.isfinite(scores).all():
        raise ValueError(f"{path}: expected finite returns, found seed scores {scores.tolist()}")
    curves = [np.array(seed["curve"], dtype=np.float64).T for seed in seeds]
    steps = curves[0][0]
    return Scores(
        algorithm=table["algorithm"],
        environment=table["environment"],
        total_steps=table["total_steps"],
        settings=table["settings"],
        scores=scores,
        steps=steps,
        curves=np.stack([np.interp(steps, at, values) for at, values in curves]),
        rates=_rates([{"steps": table["total_steps"], **seed} for seed in seeds]),
    )


def pair_up(ours: Sequence[Scores], peers: Sequence[Scores]) -> list[Row]:
    """One row per algorithm and environment. Raises ValueError where the two sides had different budgets."""
    left, right = ({(s.algorithm, s.environment): s for s in side} for side in (ours, peers))
    for key in left.keys() & right.keys():
        if left[key].total_steps != right[key].total_steps:
            budgets = f"{left[key].total_steps} and {right[key].total_steps} steps"
            raise ValueError(f"{' on '.join(key)}: expected one budget, found {budgets}: run one of them again")
    keys = sorted(left.keys() | right.keys(), key=lambda key: (key[0], _place(key[1]), key[1]))
    return [Row(algorithm=a, environment=e, ours=left.get((a, e)), peer=right.get((a, e))) for a, e in keys]


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean of what is left when a quarter is cut off at each end (of five values, the middle three)."""
    return np.asarray(stats.trim_mean(values, 0.25, axis=axis))


def welch_interval(a: np.ndarray, b: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """(difference, low, high) of the means of independent samples a [n], b [m] whose variances may differ.

        d = mean a - mean b,   s2 = var a / n + var b / m,   d +- t_nu sqrt(s2)
        nu = s2^2 / ((var a / n)^2 / (n - 1) + (var b / m)^2 / (m - 1))

    Two constant samples have no width; one value on a side gives NaN bounds. Source: Welch (1947), Biometrika 34:28.
    """
    difference = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return difference, math.nan, math.nan
    u, v = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if u + v == 0:
        return difference, difference, difference
    nu = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, nu) * math.sqrt(u + v))
    return difference, difference - half, difference + half


def verdict(interval: Interval) -> str:
    """What a difference ours - theirs says: below or above only where the whole interval is."""
    _, low, high = interval
    if not math.isfinite(low):
        return "one seed"
    return "below" if high < 0 else "above" if low > 0 else "no difference shown"


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The Markdown table."""
    columns = (
        "algorithm", "environment", "steps", "seeds", "unipo, IQM", "Stable-Baselines3, IQM", "difference of means", "verdict",
        "unipo, speed", "SB3, speed", "ratio",
    )  # fmt: skip
    return [_line(columns), _line(["---"] * len(columns)), *(_line(_cells(row)) for row in rows)]


def settings_lines(rows: Sequence[Row]) -> list[str]:
    """For every algorithm, a table of the settings that the peer ran with: a line per setting, a column per environment."""
    lines = []
    for algorithm in sorted({row.algorithm for row in rows if row.peer}):
        peers = [row.peer for row in rows if row.peer and row.algorithm == algorithm]
        lines += ["", f"Settings of `{algorithm}` in Stable-Baselines3:", ""]
        lines += [_line(["", *(peer.environment for peer in peers)]), _line(["---"] * (len(peers) + 1))]
        names = dict.fromkeys(name for peer in peers for name in peer.settings)
        lines += [_line([name, *(_setting(peer.settings.get(name)) for peer in peers)]) for name in names]
    return lines


def panels(rows: Sequence[Row]) -> list[tuple[str, Any]]:
    """One panel of curves per row."""
    return [(f"{row.environment}, {row.algorithm}", partial(_draw, lines=_curves(row))) for row in rows]


def written(page: str, lines: Sequence[str]) -> str:
    """The page with `lines` between its markers. Raises ValueError when it lacks them."""
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise ValueError(f"expected one {START} before one {END}: put both where the table belongs")
    before, after = page.split(START)[0], page.split(END)[1]
    return "\n".join([before + START, "", *lines, "", END]) + after


def main(arguments: Sequence[str]) -> None:
    """Read both sides, write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=HERE / "peers")
    parser.add_argument("--ours", type=Path, default=HERE / "ours")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    ours, peers = ([read_scores(path) for path in sorted(side.glob("*.json"))] for side in (given.ours, given.peers))
    rows = pair_up(ours, peers)
    if not rows:
        parser.error(f"no JSON in {given.ours} or {given.peers}: run peers.py first")
    given.page.parent.mkdir(parents=True, exist_ok=True)
    picture = png(given.page.with_suffix(".png"), panels(rows))
    shown = ["", f"![Mean evaluation return over environment steps, for every row of the table]({picture.name})"]
    lines = [*table_lines(rows), *shown, *settings_lines(rows)]
    page = given.page.read_text(encoding="utf-8") if given.page.exists() else EMPTY_PAGE
    given.page.write_text(written(page, lines), encoding="utf-8")
    print(f"{len(rows)} rows: {given.page}")


def _cells(row: Row) -> list[str]:
    ours, peer = row.ours, row.peer
    sides = [s for s in (ours, peer) if s is not None]
    cells = [row.algorithm, row.environment, f"{sides[0].total_steps:,}", "/".join(str(len(s.scores)) for s in sides)]
    cells += [_scored(ours), _scored(peer)]
    difference = welch_interval(ours.scores, peer.scores) if ours and peer else None
    cells += [_interval(difference), verdict(difference)] if difference else ["", ""]
    unit = next(unit for unit in RATES if all(unit in s.rates for s in sides))
    rates = [float(np.median(s.rates[unit])) if s else math.nan for s in (ours, peer)]
    return cells + [f"{rate:,.0f} {unit}" if math.isfinite(rate) else "" for rate in rates] + [_ratio(*rates)]


def _rates(seeds: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    rates = {}
    for unit, (amount, clock) in RATES.items():
        if all(amount in seed and clock in seed for seed in seeds):
            rates[unit] = np.array([seed[amount] / seed[clock] for seed in seeds])
    return rates


def _draw(ax: Axes, lines: Sequence[Line]) -> None:
    draw_lines(ax, lines)
    ax.set_xlabel("thousand steps", loc="right", fontsize=8, labelpad=0)


def _curves(row: Row) -> list[Line]:
    """The IQM over seeds and its bootstrap interval at every measured step, in thousands."""
    lines = []
    for name, side in row.sides.items():
        middle, low, high = np.array([bootstrap_interval(x.tolist(), iqm, resamples=2000) for x in side.curves.T]).T
        lines.append(Line(steps=side.steps / 1000, values=middle, low=low, high=high, label=name, color=COLORS[name]))
    return lines


def _scored(side: Scores | None) -> str:
    return _interval(bootstrap_interval(side.scores.tolist(), iqm)) if side else ""


def _interval(values: Interval) -> str:
    digits = 0 if abs(values[0]) >= 1000 else 1
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if math.isfinite(ours / theirs) else ""


def _setting(value: Any) -> str:
    return ", ".join(str(x) for x in value) if isinstance(value, list) else "" if value is None else str(value)


def _place(environment: str) -> int:
    return ORDER.index(environment) if environment in ORDER else len(ORDER)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
