"""What recorded control data hold, what is wrong with them, how good they are and how much they saw: `unipo data check`.

TQ and SACo are those of Schweighofer et al. (2021), arXiv 2111.04714, as `unipo.functional.coverage` has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipo.episodes import Episodes
from unipo.functional.coverage import digitise, distinct_rows, row_entropy, trajectory_quality
from unipo.sources.acting.recordings import described, load_recorded
from unipo.sources.acting.spaces import ActionSpec
from unipo.sources.data.problems import Findings, Problem

Array = NDArray[Any]
FINITE = {
    "observation": "leave these episodes out, or record them again",
    "action": "leave these episodes out, or record them again",
    "reward": "leave these episodes out, or mend the reward and record again",
    "final_observation": "an episode ends with the state after its last step: record that one too",
}
OUTSIDE = 1e-3
"""Actions that lie further out than this, in units of half the range, are told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quartiles:
    """Of some numbers; all NaN of none."""

    mean: float
    min: float
    q1: float
    median: float
    q3: float
    max: float

    @classmethod
    def of(cls, values: Tensor) -> Quartiles:
        x = values.double().numpy()
        if not len(x):
            return cls(**dict.fromkeys(("mean", "min", "q1", "median", "q3", "max"), float("nan")))
        low, q1, median, q3, high = (float(v) for v in np.quantile(x, [0, 0.25, 0.5, 0.75, 1]))
        return cls(mean=float(x.mean()), min=low, q1=q1, median=median, q3=q3, max=high)

    def __str__(self) -> str:
        return (f"mean {self.mean:,.4g}; min {self.min:,.4g}, quartiles {self.q1:,.4g} {self.median:,.4g} {self.q3:,.4g}, "
                f"max {self.max:,.4g}")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of the world the data saw: state-action pairs after each real number was put into one of `bins` bins.

    `quality`: TQ between the `worst` and `best` return. `coverage`: SACo, distinct pairs by those of the reference, NaN
    without one. `evenness`: exp(entropy of the pairs) by their number, 1 where all are equally frequent.
    """

    bins: int
    distinct: int
    evenness: float
    worst: float
    best: float
    quality: float
    coverage: float
    reference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlReport:
    """`environment`: its id, "" where the data do not say. `known_logp`: share of steps whose log-prob was recorded."""

    name: str
    environment: str
    observations: str
    actions: str
    kind: str
    episodes: int
    steps: int
    returns: Quartiles
    lengths: Quartiles
    terminated: int
    versions: int
    known_logp: float
    coverage: Coverage | None
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...]
    more: int

    @property
    def ok(self) -> bool:
        """Whether a run may start on this data."""
        return not self.problems and self.steps > 0

    def __str__(self) -> str:
        return "\n".join(_render(self))


def _render(r: ControlReport) -> Iterator[str]:
    yield f"{r.name}: {r.episodes:,} episodes, {r.steps:,} steps" + (f" of {r.environment}" if r.environment else "")
    yield f"  observations  {r.observations}"
    yield f"  actions       {r.actions}"
    yield f"  return        {r.returns}"
    yield f"  length        {r.lengths}"
    cut = f"{r.episodes - r.terminated:,} truncated (bootstrapped from their last state)"
    yield f"  ends          {r.terminated:,} terminated, {cut}"
    acted = f"a policy in {r.versions:,} version(s)" if r.known_logp else "unknown policies"
    yield f"  acted by      {acted}; log-probs known of {r.known_logp:.0%} of the steps"
    if r.coverage is not None:
        yield from _covered(r.coverage, r.steps)
    yield from (f"  warning: {w}" for w in r.warnings)
    yield f"{len(r.problems) + r.more:,} problems" if r.problems else "no problems"
    yield from (f"  {p}" for p in r.problems)
    if r.more:
        yield f"  ... and {r.more:,} more"


def _covered(c: Coverage, steps: int) -> Iterator[str]:
    share, of = c.distinct / max(steps, 1), c.reference or "these data themselves"
    yield (f"  seen          {c.distinct:,} distinct state-action pairs ({share:.1%} of the steps; {c.bins} bins a number); "
           f"evenness {c.evenness:.2f}")  # fmt: skip
    yield f"  TQ            {c.quality:.3f}  (worst return {c.worst:,.4g} and best {c.best:,.4g} of {of})"
    yield (
        f"  SACo          {c.coverage:.3f}  (distinct pairs by those of {of})"
        if c.reference
        else ("  SACo          1 by definition; give --reference DATASET, such as the replay of an online run")
    )


# ---- checking --------------------------------------------------------------------------------------------------------
def is_control_data(name: str | Path) -> bool:
    """Whether `name` is recorded control data: a Minari folder, parquet episodes with observations, or a Minari id (-v1)."""
    path = Path(name)
    if (path / "metadata.json").exists() or (path / "data" / "metadata.json").exists():
        return True
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    if files and files[0].exists():
        return "column.observation" in pq.read_schema(files[0]).names
    return not path.exists() and re.search(r"[\w-]-v\d+$", str(name)) is not None


def check_control(name: str | Path, reference: str | Path | None = None, bins: int = 100) -> ControlReport:
    """Read all of a dataset and report; what is wrong with its episodes is in the report.

    Raises ValueError for what is no control data at all, for an unusable `reference`, and for `bins` below 2.
    """
    if bins < 2:
        raise ValueError(f"--bins is {bins}: expected at least 2")
    findings = Findings()
    malformed: list[Problem] = []
    data = load_recorded(name, malformed.append)
    for problem in malformed:
        findings.add(problem)
    about = described(name)
    for problem in _problems(str(name), data, about.actions):
        findings.add(problem)
    good = finite_episodes(data)
    returns, known = _returns(good), data["behavior_logp"].isfinite() if "behavior_logp" in data else torch.zeros(1)
    against = None if reference is None else load_recorded(reference)
    return ControlReport(
        name=str(name), environment=about.environment, observations=about.observations or _shape(data["observation"]),
        actions=about.action_space or _shape(data["action"]), kind=_kind(data, about.actions),
        episodes=len(data), steps=data.count("step"), returns=Quartiles.of(returns), lengths=Quartiles.of(data.lengths()),
        terminated=int(data["terminated"].sum()), known_logp=float(known.float().mean()),
        versions=len(data["policy_version"].unique()) if "policy_version" in data else 1,
        coverage=_coverage(good, against, bins, "" if reference is None else str(reference)) if len(good) else None,
        warnings=tuple(_warnings(data, returns)), problems=tuple(findings.problems), more=findings.more,
    )  # fmt: skip


def finite_episodes(data: Episodes) -> Episodes:
    """Those without NaN or infinite observations, actions and rewards."""
    steps = torch.stack([_finite(data[c]) for c in ("observation", "action", "reward")]).all(0)
    whole = torch.ones(len(data), dtype=torch.bool)
    whole[data.index("episode")[~steps]] = False
    return data.select((whole & _finite(data["final_observation"])).nonzero().squeeze(1), "episode")


def _finite(x: Tensor) -> Tensor:
    """[n] from [n, ...]."""
    return x.isfinite().reshape(len(x), -1).all(1)


def _returns(data: Episodes) -> Tensor:
    return data.reduce("raw_reward" if "raw_reward" in data else "reward")


def _problems(name: str, data: Episodes, actions: ActionSpec | None) -> Iterator[Problem]:
    """One for every column of every episode that has something wrong."""
    index, begin = data.index("episode"), data.lengths().cumsum(0) - data.lengths()
    for column, remedy in FINITE.items():
        bad = (~_finite(data[column])).nonzero().squeeze(1)
        whose = bad if column == "final_observation" else index[bad]
        for episode in whose.unique().tolist():
            steps = [] if column == "final_observation" else (bad[whose == episode] - begin[episode]).tolist()
            where = f" at step {steps[0]}" if steps else ""
            found = f"{len(steps) or 1} NaN or infinite value(s){where}"
            yield Problem(name, found, remedy, _number(data, episode), column, "episode")
    if actions is not None:
        yield from _outside(name, data, actions)


def _outside(name: str, data: Episodes, actions: ActionSpec) -> Iterator[Problem]:
    """Actions that the space does not have. What our own policies did beyond the limits was clipped: it is no problem."""
    x, index = data["action"], data.index("episode")
    if actions.kind == "box":
        limited = torch.from_numpy((actions.half > 0) & np.isfinite(actions.low) & np.isfinite(actions.high))
        unknown = ~data["behavior_logp"].isfinite() if "behavior_logp" in data else torch.ones(len(x), dtype=torch.bool)
        wrong = ((x.abs() > 1 + OUTSIDE) & limited & actions.bounded).any(1) & unknown
    else:
        wrong = ((x < 0) | (x >= torch.tensor(actions.sizes).squeeze())).reshape(len(x), -1).any(1)
    for episode in index[wrong].unique().tolist():
        count = int(wrong[index == episode].sum())
        remedy = "give the dataset the space that its actions are of, or clip them"
        yield Problem(
            name, f"{count} action(s) outside the action space", remedy, _number(data, episode), "action", "episode"
        )


def _number(data: Episodes, episode: int) -> int:
    """What a Minari dataset calls the episode; of our own files, its place in the order they are read in."""
    named = "episode_number" in data and "env" not in data
    return int(data["episode_number"][episode]) if named else episode


def _warnings(data: Episodes, returns: Tensor) -> Iterator[str]:
    rewards = data["reward"]
    if len(rewards) and bool((rewards == rewards[0]).all()) and len(returns.unique()) == 1:
        yield f"every reward is {float(rewards[0]):g} and every return the same: there is nothing to prefer"
    short = int((data.lengths() == 1).sum())
    if short > len(data) / 2:
        yield f"{short:,} of {len(data):,} episodes have one step only"


def _shape(column: Tensor) -> str:
    what = "numbers" if column.is_floating_point() else "integers"
    return f"{what} of shape {tuple(column.shape[1:])}, from {column.min():.4g} to {column.max():.4g}"


def _kind(data: Episodes, actions: ActionSpec | None) -> str:
    if actions is not None:
        return actions.kind
    return (
        "box"
        if data["action"].is_floating_point()
        else "categorical"
        if data["action"].ndim == 1
        else "multi_categorical"
    )


# ---- coverage --------------------------------------------------------------------------------------------------------
def _coverage(data: Episodes, reference: Episodes | None, bins: int, name: str) -> Coverage | None:
    """Bins lie between the smallest and the largest number of data and reference together."""
    other = data if reference is None else finite_episodes(reference)
    theirs, mine = (tuple(_shape(e[c]).partition(", from")[0] for c in _PAIR) for e in (other, data))
    if theirs != mine:
        raise ValueError(f"the reference {name} has {theirs[0]} as observations and {theirs[1]} as actions, the data have "
                         f"{mine[0]} and {mine[1]}: give data of the same environment")  # fmt: skip
    worst, best = (float(v) for v in (_returns(other).min(), _returns(other).max()))
    both = [torch.cat([data[c], other[c]]).reshape(data.count("step") + other.count("step"), -1) for c in _PAIR]
    binned = [_binned(x, bins) for x in both]
    own, others = ([b[part] for b in binned] for part in (slice(data.count("step")), slice(data.count("step"), None)))
    distinct = distinct_rows(*own)
    return Coverage(
        bins=bins, distinct=distinct, evenness=float(np.exp(row_entropy(*own))) / distinct, worst=worst, best=best,
        quality=trajectory_quality(_returns(data), worst, best) if best > worst else float("nan"),
        coverage=distinct / distinct_rows(*others) if name else float("nan"), reference=name,
    )  # fmt: skip


_PAIR = ("observation", "action")


def _binned(x: Tensor, bins: int) -> Array:
    """Integers as they are; real numbers in bins, without the columns that never change."""
    if not x.is_floating_point():
        return x.numpy()
    low, high = x.amin(0), x.amax(0)
    moving = high > low
    return digitise(x[:, moving], low[moving], high[moving], bins)
