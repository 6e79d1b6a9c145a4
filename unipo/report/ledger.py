"""The ledger of a run as shares over steps, one row per name, and what it says in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from unipo.report.runs import RunData
from unipo.report.text import percent

AXES = {
    "source": "where the rows came from",
    "sign": "pulled towards the row, or pushed away from it",
    "staleness": "policy versions since the rows were sampled",
    "term": "term of the objective",
}
READABLE = {
    "fresh": "fresh rollouts", "replay": "replayed rollouts", "demos": "demonstrations",
    "pairs": "preference pairs", "labels": "labelled answers",
    "raised": "pulled towards", "lowered": "pushed away",
    "0": "this version", "1-2": "1-2 versions old", "PolicyGradient": "policy gradient", "ValueRegression": "value (critic)",
}  # fmt: skip
REST = {
    "sign": "without direction (entropy, value)",
    "staleness": "of no policy version (demonstrations, pairs, labels)",
}
"""What the gradient is that an axis does not name."""
EARLY_LATE = 5
"""The first and the last fifth of the updates are what "early" and "late" mean."""


@dataclass(frozen=True, slots=True)
class Shares:
    """One axis of the ledger: `steps` [T] where on the axis of the run, and per name its share of the gradient [T] in 0..1."""

    axis: str
    steps: np.ndarray
    names: tuple[str, ...]
    shares: np.ndarray

    def mean(self, name: str) -> float:
        """Mean share over the run."""
        return float(self.shares[self.names.index(name)].mean())

    def early_late(self, name: str) -> tuple[float, float]:
        """Mean share over the first and over the last fifth of the updates."""
        row = self.shares[self.names.index(name)]
        n = max(1, len(row) // EARLY_LATE)
        return float(row[:n].mean()), float(row[-n:].mean())


def shares_of(run: RunData, axis: str) -> Shares | None:
    """The gradient shares along `axis`, or None where the run has none. A name that is absent from a step had share 0."""
    names = _names(run, axis)
    table = np.array([run.column(f"ledger/{axis}/{n}/gradient_share") for n in names]).reshape(len(names), len(run))
    there = np.isfinite(table).any(0)
    if not there.any():
        return None
    steps, shares = run.axis[there], np.clip(np.nan_to_num(table[:, there]), 0, 1)
    total = shares.sum(0)
    rest = np.where(total > 0, np.clip(1 - total, 0, 1), 0.0)  # an update without any gradient has no rest either
    if rest.max() > 0.005:
        names, shares = [*names, REST.get(axis, "other")], np.vstack([shares, rest])
    return Shares(axis, steps, tuple(names), shares)


def quantities(run: RunData, axis: str) -> list[dict[str, float | str]]:
    """A row per name of `axis`: mean rows and tokens of an update, gradient share, ESS, clipped share, KL; NaN if unknown."""
    wanted = ("rows", "tokens", "gradient_share", "ess", "clipped_share", "kl")
    rows: list[dict[str, float | str]] = []
    for name in _names(run, axis):
        row: dict[str, float | str] = {"name": name}
        for quantity in wanted:
            values = run.measured(f"ledger/{axis}/{name}/{quantity}")[1]
            row[quantity] = float(values.mean()) if len(values) else float("nan")
        rows.append(row)
    tokens = sum(float(r["tokens"]) for r in rows if np.isfinite(float(r["tokens"])))
    for row in rows:
        row["token_share"] = float(row["tokens"]) / tokens if tokens > 0 else float("nan")
    return rows


def in_words(run: RunData) -> list[str]:
    """Two or three sentences: who moved the policy, which way, and how far the data was from its own."""
    source, sign = shares_of(run, "source"), shares_of(run, "sign")
    said = (
        []
        if source is None or not source.shares.sum()
        else [_who(source, quantities(run, "source"), run.kind.words.unit)]
    )
    if sign is not None and {"raised", "lowered"} <= set(sign.names) and sign.shares.sum():
        raised, lowered = sign.mean("raised"), sign.mean("lowered")
        said.append(
            f"{percent(raised, 0)} of the push pulled the policy towards what is in the batch, "
            f"{percent(lowered, 0)} pushed it away."
        )
    return said + _how_far(run)


def readable(name: str) -> str:
    """The words for a name of the ledger."""
    return READABLE.get(name, name)


def _names(run: RunData, axis: str) -> list[str]:
    """In the order in which the run wrote them; a name may hold slashes."""
    start, end = f"ledger/{axis}/", "/gradient_share"
    names = [c[len(start) : -len(end)] for c in run.metrics if c.startswith(start) and c.endswith(end)]
    return sorted(names, key=_age) if axis == "staleness" else names


def _age(name: str) -> int:
    digits = re.match(r"\d+", name)
    return int(digits.group()) if digits else -1


def _who(source: Shares, rows: list[dict[str, float | str]], unit: str) -> str:
    ranked = sorted(source.names, key=source.mean, reverse=True)
    if len(ranked) == 1:
        return f"All of the gradient came from {readable(ranked[0])}: there was no other source."
    tokens: Mapping[str, float] = {str(r["name"]): float(r["token_share"]) for r in rows}
    top = ranked[0]
    said = f"{readable(top).capitalize()} moved the policy most: {percent(source.mean(top), 0)} of the gradient"
    said += f" from {percent(tokens[top], 0)} of the {unit}s" if np.isfinite(tokens.get(top, np.nan)) else ""
    rest = [f"{readable(n)} {percent(source.mean(n), 0)}" for n in ranked[1:]]
    mover = max(ranked, key=lambda n: abs(float(np.subtract(*source.early_late(n)))))
    early, late = source.early_late(mover)
    moved = f"; the share of {readable(mover)} went from {percent(early, 0)} early to {percent(late, 0)} late"
    return f"{said}, then {', '.join(rest)}{moved if abs(late - early) >= 0.05 else ''}."


def _how_far(run: RunData) -> list[str]:
    ess, clipped = run.measured("ess")[1], run.measured("clipped_share")[1]
    if not len(ess):
        return []
    value = float(ess.mean())
    meaning = "practically on-policy" if value > 0.95 else "off-policy, and still informative" if value > 0.5 else (
        "so far off-policy that a few rows decide: lower the staleness or cap the weights"
    )  # fmt: skip
    cut = (
        f", and {percent(float(clipped.mean()))} of the {run.kind.words.unit}s were cut off by the clip"
        if len(clipped)
        else ""
    )
    return [
        f"The importance weights kept {percent(value, 0)} of the effective sample size{cut}: the data was {meaning}."
    ]
