"""Run a claim: tune every arm alike, run the reported seeds, decide, write the verdict down."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table

from unipo.reproduce.claim import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Claim, combined
from unipo.statistics import mean_interval

VERDICTS = Path(__file__).parent / "verdicts"
TUNING_SEEDS = (1000, 1001)
KEYS = (
    "slug",
    "claim",
    "verdict",
    "summary",
    "command",
    "commit",
    "seeds",
    "seconds",
    "numbers",
    "expectations",
    "note",
)

Values = Mapping[str, Mapping[str, Sequence[float]]]
COLORS = {REPRODUCED: "green", NOT_REPRODUCED: "red", INCONCLUSIVE: "yellow"}


def run_claim(claim: Claim, seeds: int, console: Console, steps: int | None = None) -> dict[str, Any]:
    """The verdict as a dictionary with the keys `KEYS`. `steps` shortens every trial, at the first rate (for tests)."""
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: an interval needs at least 2, a claim at least 1")
    if steps is not None:
        claim = replace(claim, steps=steps, grid=claim.grid[:1])
    threads, started = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        rates: dict[str, float] = {}
        values: dict[str, dict[str, list[float]]] = {}
        for arm in claim.arms:
            with console.status(f"{claim.slug}: {arm}"):
                rates[arm] = tuned(claim, arm, claim.steps)
                runs = [trial(claim, arm, rates[arm], seed, claim.steps) for seed in range(seeds)]
            values[arm] = {metric: [run[metric] for run in runs] for metric in runs[0]}
    finally:
        torch.set_num_threads(threads)
    return _verdict(claim, seeds, values, rates, time.perf_counter() - started)


def trial(claim: Claim, arm: str, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    return claim.trial(claim.arms[arm], rate, seed, steps)


def tuned(claim: Claim, arm: str, steps: int) -> float:
    """The learning rate of the grid with the best mean of the tuning metric over the tuning seeds."""
    if len(claim.grid) == 1:
        return claim.grid[0]
    sign = -1.0 if claim.minimise else 1.0

    def score(rate: float) -> float:
        return sign * sum(trial(claim, arm, rate, seed, steps)[claim.tune] for seed in TUNING_SEEDS)

    return max(claim.grid, key=score)


def _verdict(claim: Claim, seeds: int, values: Values, rates: Mapping[str, float], seconds: float) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for expected in claim.expectations:
        mean, low, high = expected.difference(values)
        parts.append({"expected": str(expected), "difference": _digits(mean), "interval": [_digits(low), _digits(high)],
                      "verdict": expected.verdict(low, high)})  # fmt: skip
    numbers = {
        arm: {"learning_rate": rates[arm], **{metric: _spread(found) for metric, found in metrics.items()}}
        for arm, metrics in values.items()
    }
    tuning = (
        f"Learning rates of all arms, baselines too, were chosen from {list(claim.grid)} by {claim.tune} on seeds "
        f"{', '.join(map(str, TUNING_SEEDS))}, which are not reported."
        if len(claim.grid) > 1
        else "Nothing is tuned."
    )
    return {
        "slug": claim.slug,
        "claim": claim.statement,
        "verdict": combined([p["verdict"] for p in parts]),
        "summary": _summary(claim, values, seeds),
        "command": f"unipo reproduce {claim.slug} --seeds {seeds}",
        "commit": commit(),
        "seeds": list(range(seeds)),
        "seconds": round(seconds, 1),
        "numbers": numbers,
        "expectations": parts,
        "note": f"{claim.note} {tuning}",
    }


def _summary(claim: Claim, values: Values, seeds: int) -> str:
    """One sentence: the metrics that decide, arm by arm."""
    said = []
    for metric in dict.fromkeys(e.metric for e in claim.expectations):
        found = ", ".join(f"{arm} {_shown(*mean_interval(values[arm][metric]))}" for arm in values)
        said.append(f"{metric}: {found}")
    return "; ".join(said) + f" (mean and 95 % interval over {seeds} seeds)."


def _spread(found: Sequence[float]) -> dict[str, Any]:
    mean, low, high = mean_interval(found)
    return {"seeds": [_digits(x) for x in found], "mean": _digits(mean), "interval": [_digits(low), _digits(high)]}


def _digits(x: float) -> float | None:
    """Five significant digits; None for what JSON cannot hold."""
    return float(f"{x:.5g}") if math.isfinite(x) else None


def _shown(mean: float, low: float, high: float) -> str:
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]" if math.isfinite(low) else f"{mean:.3g}"


def commit() -> str:
    """The commit of this source tree, marked when the code differs from it; "" outside a repository."""

    def git(*words: str) -> str:
        made = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return made.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")
    except OSError:
        return ""
    return head + ("+changes" if head and changed else "")


def write(verdict: Mapping[str, Any], folder: Path = VERDICTS) -> Path:
    """Write `<slug>.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{verdict['slug']}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(verdict, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def shown(verdict: Mapping[str, Any]) -> RenderableType:
    """A table of all metrics with intervals, what was expected, and the verdict."""
    arms = verdict["numbers"]
    metrics = [m for m in next(iter(arms.values())) if m != "learning_rate"]
    table = Table("arm", "rate", *metrics, title=f"{verdict['slug']}: {verdict['claim']}", title_justify="left")
    for arm, found in arms.items():
        table.add_row(arm, f"{found['learning_rate']:g}", *(_cell(found[m]) for m in metrics))
    checks = Table("expected", "measured", "interval", "verdict")
    for part in verdict["expectations"]:
        color = COLORS[part["verdict"]]
        checks.add_row(part["expected"], *_cell_pair(part), f"[{color}]{part['verdict']}[/]")
    color = COLORS[verdict["verdict"]]
    return Group(table, checks, f"verdict [bold {color}]{verdict['verdict']}[/]  ({verdict['seconds']} s)")


def _cell(spread: Mapping[str, Any]) -> str:
    return " ".join(_cell_pair({"difference": spread["mean"], "interval": spread["interval"]}))


def _cell_pair(part: Mapping[str, Any]) -> tuple[str, str]:
    low, high = part["interval"]
    interval = "" if low is None else f"\\[{low:.3g}, {high:.3g}]"
    return f"{part['difference']:.3g}" if part["difference"] is not None else "", interval
