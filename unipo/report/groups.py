"""Runs that differ in their seed only form a group; groups are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unipo.report.aggregate import UNKNOWN, Triple
from unipo.report.kinds import Kind
from unipo.report.runs import RunData, RunFolderError

NOT_THE_METHOD = frozenset(
    {"seed", "out", "device", "threads", "tensorboard", "wandb", "checkpoint_every", "keep_checkpoints", "save_episodes",
     "eval_every", "gold", "token_budget", "asynchronous", "evaluations", "checkpoints", "video", "record"}
)  # fmt: skip
"""Settings that do not change what a run learns, or are what seeds are for."""


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one configuration; `label` names what tells it from the other groups."""

    label: str
    runs: tuple[RunData, ...]

    @property
    def kind(self) -> Kind:
        return self.runs[0].kind

    @property
    def measured(self) -> tuple[RunData, ...]:
        """The runs that measured anything."""
        return tuple(r for r in self.runs if math.isfinite(_last(r)))

    @property
    def by_seed(self) -> dict[str, float]:
        """What was measured last, by seed, where anything was."""
        return {r.setting("seed", str(i)): _last(r) for i, r in enumerate(self.runs) if math.isfinite(_last(r))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A row of the comparison: `value` and its interval over the seeds; NaN where nothing was measured."""

    label: str
    seeds: int
    before: float
    value: float
    low: float
    high: float
    interval: str
    versus: Triple
    seconds: float
    work: float


def group(runs: Sequence[RunData]) -> list[Group]:
    """Group by configuration, in the order in which the configurations appear.

    Raises RunFolderError for runs that are measured by different things.
    """
    titles = list(dict.fromkeys(r.kind.measure.curve.title for r in runs))
    if len(titles) > 1:
        raise RunFolderError(
            f"expected runs of one kind, found some measured by {' and some by '.join(t.lower() for t in titles)}: "
            "report them apart"
        )
    keys = [json.dumps(_identity(r.config), sort_keys=True, default=str) for r in runs]
    together = {key: tuple(r for r, k in zip(runs, keys, strict=True) if k == key) for key in dict.fromkeys(keys)}
    labels = _labels([runs_of[0].config for runs_of in together.values()])
    return [Group(label, members) for label, members in zip(labels, together.values(), strict=True)]


def standings(groups: Sequence[Group]) -> list[Standing]:
    """One row per group, best first; `versus` is about the first group as given."""
    rows = [_standing(g, groups[0]) for g in groups]
    return sorted(rows, key=lambda s: -s.value if math.isfinite(s.value) else math.inf)


def _standing(g: Group, baseline: Group) -> Standing:
    (value, low, high), interval = _final(g)
    if g.kind.measure.curve.percent:
        low, high = (max(low, 0.0) if low == low else low), (min(high, 1.0) if high == high else high)
    return Standing(
        label=g.label, seeds=_seeds(g), before=_before(g), value=value, low=low, high=high,
        interval=interval, versus=UNKNOWN if g is baseline else g.kind.aggregate.versus(g.by_seed, baseline.by_seed),
        seconds=_mean([r.last("seconds") for r in g.runs]), work=_mean([r.worked for r in g.runs]),
    )  # fmt: skip


def _before(g: Group) -> float:
    """What the seeds start from, aggregated as what they end with."""
    column = g.kind.measure.curve.column
    scores = [r.scores(r.measured(column)[0][0]) for r in g.measured]
    return g.kind.aggregate.final(scores)[0] if scores else math.nan


def _final(g: Group) -> tuple[Triple, str]:
    """What the seeds end with, and what the interval is over; a single number has the interval that its run recorded."""
    runs, measure, aggregate = g.measured, g.kind.measure, g.kind.aggregate
    if not runs:
        return UNKNOWN, ""
    scores = [r.scores(r.measured(measure.curve.column)[0][-1]) for r in runs]
    episodes = {len(s) for s in scores}
    if len(scores) > 1 or episodes != {1}:
        return aggregate.final(scores), aggregate.over(len(scores), episodes.pop() if len(episodes) == 1 else 1)
    low, high = (runs[0].last(f"{measure.curve.column}_{side}") for side in ("low", "high"))
    return (_last(runs[0]), low, high), f"{measure.over}, 1 seed" if math.isfinite(low) else ""


def _last(run: RunData) -> float:
    return run.last(run.kind.measure.curve.column)


def _seeds(g: Group) -> int:
    return len({r.setting("seed", str(i)) for i, r in enumerate(g.runs)})


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in NOT_THE_METHOD}


def _labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The method, the task where it differs, and the settings that differ between groups of the same method."""
    flat = [_flat(c) for c in configs]
    return [
        ", ".join(
            [str(c.get("method", "?")), *(f"{n.replace('_', ' ')} {c[n]}" for n in _differing(c, flat) if n in c)]
        )
        for c in flat
    ]


def _differing(config: Mapping[str, Any], all_of_them: Sequence[Mapping[str, Any]]) -> list[str]:
    """Different methods start from different settings: only those of the same method tell its groups apart."""
    kin = [c for c in all_of_them if c.get("method") == config.get("method")]
    names = dict.fromkeys(n for c in kin for n in c)
    among = {n: all_of_them if n == "task" else kin for n in names if n != "method"}
    return [n for n, those in among.items() if len({json.dumps(c.get(n), default=str) for c in those}) > 1]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    options = config.get("method_options") or {}
    dotted = {f"{m}.{k}": v for m, changed in options.items() for k, v in changed.items()}
    dotted |= {f"env.{k}": v for k, v in (config.get("env_options") or {}).items()}
    return {k: v for k, v in _identity(config).items() if k not in ("method_options", "env_options")} | dotted
