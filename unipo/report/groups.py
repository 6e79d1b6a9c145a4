"""Runs that differ in their seed only form a group; groups are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unipo.report.runs import RunData
from unipo.statistics import mean_interval, paired_difference_interval

NOT_THE_METHOD = frozenset(
    {"seed", "out", "device", "threads", "tensorboard", "wandb", "checkpoint_every", "keep_checkpoints", "save_episodes",
     "eval_every", "token_budget"}
)  # fmt: skip
"""Settings that do not change what a run learns, or are what seeds are for."""


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one configuration; `label` names what tells it from the other groups."""

    label: str
    runs: tuple[RunData, ...]

    @property
    def by_seed(self) -> dict[str, float]:
        """Final held-out accuracy by seed, where measured."""
        return {r.setting("seed", str(i)): r.last("accuracy") for i, r in enumerate(self.runs) if _measured(r)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A row of the comparison: accuracies are means over seeds; NaN where nothing was measured."""

    label: str
    seeds: int
    before: float
    accuracy: float
    low: float
    high: float
    interval: str
    difference: tuple[float, float, float]
    seconds: float
    tokens: float


def group(runs: Sequence[RunData]) -> list[Group]:
    """Group by configuration, in the order in which the configurations appear."""
    keys = [json.dumps(_identity(r.config), sort_keys=True, default=str) for r in runs]
    together = {key: tuple(r for r, k in zip(runs, keys, strict=True) if k == key) for key in dict.fromkeys(keys)}
    labels = _labels([runs_of[0].config for runs_of in together.values()])
    return [Group(label, members) for label, members in zip(labels, together.values(), strict=True)]


def standings(groups: Sequence[Group]) -> list[Standing]:
    """One row per group, best first. Differences are to the first group as given, paired by seed, t interval."""
    rows = [_standing(g, groups[0]) for g in groups]
    return sorted(rows, key=lambda s: -s.accuracy if math.isfinite(s.accuracy) else math.inf)


def _standing(g: Group, baseline: Group) -> Standing:
    final = list(g.by_seed.values())
    nan = math.nan
    mean, low, high = mean_interval(final) if final else (nan, nan, nan)
    interval = f"t, {len(final)} seeds" if len(final) > 1 else ""
    if len(final) == 1:
        run = next(r for r in g.runs if _measured(r))
        low, high = run.last("accuracy_low"), run.last("accuracy_high")
        interval = "held-out prompts, 1 seed" if math.isfinite(low) else ""
    return Standing(
        label=g.label, seeds=_seeds(g), before=_mean([r.first("accuracy") for r in g.runs]), accuracy=mean,
        low=max(low, 0.0) if low == low else nan, high=min(high, 1.0) if high == high else nan, interval=interval,
        difference=_difference(g, baseline), seconds=_mean([r.last("seconds") for r in g.runs]),
        tokens=_mean([_tokens(r) for r in g.runs]),
    )  # fmt: skip


def _seeds(g: Group) -> int:
    return len({r.setting("seed", str(i)) for i, r in enumerate(g.runs)})


def _difference(g: Group, baseline: Group) -> tuple[float, float, float]:
    ours, theirs = g.by_seed, baseline.by_seed
    shared = [s for s in ours if s in theirs]
    if g is baseline or not shared:
        return math.nan, math.nan, math.nan
    return paired_difference_interval([ours[s] for s in shared], [theirs[s] for s in shared])


def _tokens(run: RunData) -> float:
    parts = [t for t in (run.last("tokens_sampled"), run.last("tokens_trained")) if math.isfinite(t)]
    return sum(parts) if parts else math.nan


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def _measured(run: RunData) -> bool:
    return math.isfinite(run.last("accuracy"))


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in NOT_THE_METHOD}


def _labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The method, and whatever settings differ between the groups."""
    flat = [_flat(c) for c in configs]
    names = dict.fromkeys(n for c in flat for n in c)
    differ = [n for n in names if n != "method" and len({json.dumps(c.get(n), default=str) for c in flat}) > 1]
    return [
        ", ".join([str(c.get("method", "?")), *(f"{n.replace('_', ' ')} {c[n]}" for n in differ if n in c)])
        for c in flat
    ]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    options = config.get("method_options") or {}
    dotted = {f"{m}.{k}": v for m, changed in options.items() for k, v in changed.items()}
    return {k: v for k, v in _identity(config).items() if k != "method_options"} | dotted
