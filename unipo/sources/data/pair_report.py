"""What comparisons say of themselves: lengths of either side, and signs of wrong labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unipo.sources.data.datasets import PairRow
from unipo.sources.data.problems import Where
from unipo.sources.prompts import prompt_identity
from unipo.statistics import mean_interval, wilson_interval

Edges = dict[tuple[str, str], list[Where]]
"""(preferred, other) -> where it is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """`count` of `of`, with its 95 % Wilson interval; `first`: where it was seen first, "" where nowhere."""

    count: int
    of: int
    first: str = ""

    def __str__(self) -> str:
        if not self.of:
            return "0 of 0"
        low, high = wilson_interval(self.count, self.of)
        where = f"; first: {self.first}" if self.first else ""
        return (
            f"{self.count:,} of {self.of:,}, {self.count / self.of:.1%} (95 % interval {low:.1%} to {high:.1%}){where}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    """Signs in n comparisons.

    `lists`: of more than two answers. `longer`: the chosen side has more characters (means over a side; equal ones left out);
    `difference`: mean of chosen less rejected characters, with its 95 % interval. `repeats`: said again, word for word.
    `contradictions`: two answers to a prompt that are preferred to each other, of all that are compared. `cycles`: prompts with
    a ring of three or more preferences, contradictions aside. `against`: the rating of a chosen answer is below that of another,
    of the comparisons that are rated. `logged`: with log-probs of a reference.
    """

    count: int
    lists: int
    longer: Share
    difference: tuple[float, float, float]
    repeats: Share
    contradictions: Share
    cycles: Share
    against: Share
    logged: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks for wrong labels or a bias."""
        low, high = wilson_interval(self.longer.count, self.longer.of)
        found = []
        if self.longer.of and (low > 0.5 or high < 0.5):
            which = "longer" if low > 0.5 else "shorter"
            found.append(f"the chosen answer is {which} than chance would have it: a policy may learn the length alone")
        if self.contradictions.count or self.cycles.count:
            found.append("some preferences contradict each other: labels are noisy, or the raters disagree")
        if self.against.count:
            found.append("some choices disagree with their ratings: --keep-pairs 'margin(0)' leaves them out")
        return tuple(found)

    def __str__(self) -> str:
        return "\n".join(_render(self))


def _render(report: PairReport) -> Iterator[str]:
    lists = f", {report.lists:,} of them lists of more than two answers" if report.lists else ""
    logged = f", {report.logged:,} with log-probs of a reference" if report.logged else ""
    yield f"{report.count:,} comparisons{lists}{logged}"
    mean, low, high = report.difference
    yield f"  chosen is longer: {report.longer}; by {mean:.3g} characters (95 % interval {low:.3g} to {high:.3g})"
    yield f"  said before: {report.repeats}"
    yield f"  said both ways: {report.contradictions}"
    yield f"  prompts with a ring of preferences: {report.cycles}"
    if report.against.of:
        yield f"  rated against the choice: {report.against}"
    yield from (f"  warning: {warning}" for warning in report.warnings)


def pair_report(rows: Sequence[PairRow]) -> PairReport | None:
    """The signs in comparisons; None where there are none."""
    if not rows:
        return None
    chosen, rejected = ([_mean_length(side) for side in sides]
                        for sides in ((r.all_chosen for r in rows), (r.all_rejected for r in rows)))  # fmt: skip
    apart = [a - b for a, b in zip(chosen, rejected, strict=True)]
    prompts = defaultdict[int, Edges](lambda: defaultdict(list))
    for row in rows:
        for pair in _edges(row):
            prompts[prompt_identity(row.prompt)][pair].append(row.where)
    both = [_both_ways(edges) for edges in prompts.values()]
    rings = [where for edges in prompts.values() if (where := _ring(edges)) is not None]
    rated = [r for r in rows if r.ratings]
    against = [r for r in rated if min(r.ratings[: len(r.all_chosen)]) < max(r.ratings[len(r.all_chosen) :])]
    again = _repeats(rows)
    return PairReport(
        count=len(rows), lists=sum(len(r.answers) > 2 for r in rows),
        longer=Share(count=sum(a > 0 for a in apart), of=sum(a != 0 for a in apart)),
        difference=mean_interval(apart),
        repeats=_share([str(w) for w in again], len(rows)),
        contradictions=_share([s for said, _ in both for s in said], sum(n for _, n in both)),
        cycles=_share([str(w) for w in rings], len(prompts)),
        against=_share([str(r.where) for r in against], len(rated)),
        logged=sum(bool(r.reference_logps) for r in rows),
    )  # fmt: skip


def _share(found: Sequence[str], of: int) -> Share:
    return Share(count=len(found), of=of, first=found[0] if found else "")


def _mean_length(answers: Sequence[str]) -> float:
    return sum(map(len, answers)) / len(answers)


def _edges(row: PairRow) -> Iterator[tuple[str, str]]:
    """What a comparison says: (preferred, other). Of a list whose best are the chosen ones, also how it rates the others."""
    answers, split = row.answers, len(row.all_chosen)
    listed = bool(row.ratings) and min(row.ratings[:split]) == max(row.ratings) > max(row.ratings[split:])
    for i, better in enumerate(answers):
        for j, other in enumerate(answers):
            if row.ratings[i] > row.ratings[j] if listed else i < split <= j:
                yield better, other


def _both_ways(edges: Edges) -> tuple[list[str], int]:
    """(where each contradiction is said, number of compared pairs of answers)."""
    said = [f"{there[0]} and {edges[b, a][0]}" for (a, b), there in list(edges.items()) if a < b and (b, a) in edges]
    return said, len({frozenset(pair) for pair in edges})


def _ring(edges: Edges) -> Where | None:
    """Where a preference that is part of a ring, or leads from one to another, is said; contradictions are not looked at.

    Answers that nobody is preferred to, or that are preferred to nobody, are taken away until none is left.
    """
    left = {pair: where[0] for pair, where in edges.items() if pair[::-1] not in edges}
    while left:
        winners, losers = {a for a, _ in left}, {b for _, b in left}
        inner = {pair: where for pair, where in left.items() if pair[0] in losers and pair[1] in winners}
        if len(inner) == len(left):
            return next(iter(left.values()))
        left = inner
    return None


def _repeats(rows: Sequence[PairRow]) -> list[Where]:
    seen, found = set[tuple[object, ...]](), []
    for row in rows:
        key = (prompt_identity(row.prompt), frozenset(row.all_chosen), frozenset(row.all_rejected))
        if key in seen:
            found.append(row.where)
        seen.add(key)
    return found
