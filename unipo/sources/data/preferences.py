"""Rows of preferences: pairs, ranked or rated lists, answers rated one by one, and answers that were judged alone.

Whatever form a comparison is written in, it is read as a `PairRow`: the answers to one prompt, best first.

    chosen, rejected                    two answers, or lists of equivalent ones, or two conversations
    completions, ratings | ranking      a list; the best by rating are the chosen ones
    completion, rating, group           a list over several rows (`lists_of`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unipo.sources.data.cells import (
    ROUNDING,
    Fault,
    Prompt,
    asking,
    completion_cell,
    describe,
    messages_cell,
    prefixed,
    prompt_cell,
    rest_of,
    text_cell,
)
from unipo.sources.data.problems import Findings, Where

CONVERSATIONS = ("chosen", "rejected")  # without a prompt column only where both are whole message lists
RATED = (("chosen_rating", "rejected_rating"), ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
"""Names of the ratings of the two sides, the first that a row has."""
LOGGED = (("ref_chosen_logps", "ref_rejected_logps"), ("reference_chosen_logps", "reference_rejected_logps"))
LOGGED_ALONE = ("ref_logps", "reference_logps")
GROUP_COLUMNS = ("group", "group_id", "prompt_id")
Logp = float | tuple[float, ...]
"""Log-probability of an answer: its sum, or that of each of its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """Answers to one prompt, `chosen` preferred to `rejected`; no answer is on both sides.

    Most often one of either side; `also_chosen` and `also_rejected` hold the others of a row that lists several. `ratings`
    and `reference_logps` are of `answers`, in their order; empty where the data have none.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    columns: Mapping[str, Any]
    where: Where
    also_chosen: tuple[str, ...] = ()
    also_rejected: tuple[str, ...] = ()
    ratings: tuple[float, ...] = ()
    reference_logps: tuple[Logp, ...] = ()

    @property
    def all_chosen(self) -> tuple[str, ...]:
        return (self.chosen, *self.also_chosen)

    @property
    def all_rejected(self) -> tuple[str, ...]:
        return (self.rejected, *self.also_rejected)

    @property
    def answers(self) -> tuple[str, ...]:
        """The chosen ones, then the others."""
        return (*self.all_chosen, *self.all_rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedRow:
    """One answer of a list that is written over several rows. `group`: which list, None where the prompt says it."""

    prompt: Prompt
    completion: str
    rating: float
    group: str | int | None
    reference_logp: Logp | None
    columns: Mapping[str, Any]
    where: Where


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRow:
    """A completion that was judged on its own: `label` True is good."""

    prompt: Prompt
    completion: str
    label: bool
    columns: Mapping[str, Any]
    where: Where
    reference_logp: Logp | None = None


# ---- numbers beside answers ------------------------------------------------------------------------------------------
def _rating(column: str, value: Any, fault: Fault) -> float | None:
    if type(value) in (int, float) and math.isfinite(value):
        return float(value)
    found = str(value) if isinstance(value, float) else describe(value)
    fault(column, f"{found} where a finite rating was expected", "rate the answer again, or remove the row")
    return None


def _logp(column: str, value: Any, fault: Fault) -> Logp | None:
    listed = isinstance(value, list)
    numbers = value if listed else [value]
    good = all(type(v) in (int, float) and math.isfinite(v) and v <= ROUNDING for v in numbers)
    if good and numbers:
        return tuple(float(v) for v in numbers) if listed else float(value)
    fault(column, f"{describe(value)} where a log-probability was expected",
          "write the sum over the answer's tokens (natural logarithm, at most 0), or a list with one per token")  # fmt: skip
    return None


def _beside(row: Mapping[str, Any], names: Sequence[tuple[str, str]], counts: tuple[int, int], read: Any,
            fault: Fault) -> tuple[Any, ...] | None:  # fmt: skip
    """What `read` makes of the cells beside both sides, chosen first; () where there are none, None after a fault."""
    pair = next((p for p in names if row.get(p[0]) is not None or row.get(p[1]) is not None), None)
    if pair is None:
        return ()
    found: list[Any] = []
    for name, count in zip(pair, counts, strict=True):
        value = row.get(name)
        values = [value] if count == 1 else value
        if value is None:
            fault(name, f"missing, where the other of {pair[0]!r} and {pair[1]!r} is given", "give both, or neither")
        elif not isinstance(values, list) or len(values) != count:
            what = f"{len(values)} values" if isinstance(values, list) else describe(values)
            fault(name, f"{what} for {count} answers", "give one per answer, as a list")
        else:
            found += [read(name, v, fault) for v in values]
    return tuple(found) if len(found) == sum(counts) and None not in found else None


def _alone(row: Mapping[str, Any], fault: Fault) -> tuple[Logp | None, bool]:
    """(the logged log-prob of a row's only answer, if any; whether it can be read)."""
    name = next((n for n in LOGGED_ALONE if row.get(n) is not None), None)
    value = None if name is None else _logp(name, row[name], fault)
    return value, name is None or value is not None


# ---- pairs -----------------------------------------------------------------------------------------------------------
def read_pair(row: Mapping[str, Any], where: Where, fault: Fault) -> PairRow | None:
    """`chosen` and `rejected` as completions of `prompt`, or as whole conversations that differ in the last message; where
    either is a list of texts, a group of equivalent answers. Without them, `completions` with `ratings` or `ranking`."""
    if row.get("completions") is not None and row.get("chosen") is None:
        return _read_list(row, where, fault)
    if any(_texts(row.get(side)) for side in CONVERSATIONS):
        prompt, chosen, rejected = _equivalent(row, fault)
    elif isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        prompt, *single = _split_pair(row, fault)
        chosen, rejected = ([] if answer is None else [answer] for answer in single)
    else:
        prompt = prompt_cell(row, fault)
        single = [completion_cell(side, row.get(side), fault) for side in CONVERSATIONS]
        chosen, rejected = ([] if answer is None else [answer] for answer in single)
    if prompt is None or not chosen or not rejected:
        return None
    if set(chosen) & set(rejected):
        one = len(chosen) == len(rejected) == 1
        found = "the same as 'chosen'" if one else "an answer that is also in 'chosen'"
        remedy = "remove the row" if one else "remove it from one side"
        fault("rejected", found, f"{remedy}: it states no preference")
        return None
    counts = len(chosen), len(rejected)
    ratings, logps = _beside(row, RATED, counts, _rating, fault), _beside(row, LOGGED, counts, _logp, fault)
    if ratings is None or logps is None:
        return None
    used = ("prompt", "messages", "completions", *CONVERSATIONS, *_names(RATED), *_names(LOGGED))
    return PairRow(prompt=prompt, chosen=chosen[0], rejected=rejected[0], columns=rest_of(row, *used), where=where,
                   also_chosen=tuple(chosen[1:]), also_rejected=tuple(rejected[1:]), ratings=ratings,
                   reference_logps=logps)  # fmt: skip


def _names(pairs: Iterable[tuple[str, str]]) -> Iterable[str]:
    return (name for pair in pairs for name in pair)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], str)


def _equivalent(row: Mapping[str, Any], fault: Fault) -> tuple[Prompt | None, list[str], list[str]]:
    """The prompt and either side's answers, () for a side that has a fault."""
    sides = [_answers(side, row[side] if isinstance(row[side], list) else [row[side]], fault) for side in CONVERSATIONS]
    return prompt_cell(row, fault), sides[0], sides[1]


def _answers(column: str, values: Sequence[Any], fault: Fault) -> list[str]:
    """Texts (or assistant messages) of a list, () after a fault."""
    if not values:
        fault(column, "an empty list", "list at least one answer, or remove the row")
    read = completion_cell if any(isinstance(v, list) for v in values) else text_cell
    found = [read(column, v, prefixed(fault, f"answer {i} of the list is ")) for i, v in enumerate(values, 1)]
    return [] if None in found else [answer for answer in found if answer is not None]


def _split_pair(row: Mapping[str, Any], fault: Fault) -> tuple[Prompt | None, str | None, str | None]:
    """Shared messages are the prompt, the last message of either side its completion."""
    chosen, rejected = (messages_cell(side, row[side], fault) for side in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return None, None, None
    shared = chosen[:-1]
    if shared != rejected[:-1]:
        differ = next((i for i, (a, b) in enumerate(zip(shared, rejected[:-1], strict=False)) if a != b),
                      min(len(chosen), len(rejected)) - 1)  # fmt: skip
        found = f"the conversation leaves that of 'chosen' at message {differ + 1}, before the last"
        fault("rejected", found, "the two sides may differ in their last message only: cut or split the row")
        return None, None, None
    given = row.get("prompt")
    if isinstance(given, str) and shared and all(given.strip() not in (m["content"] or "") for m in shared):
        fault("prompt", "not part of the messages that 'chosen' starts with", "drop the column, or correct it")
        return None, None, None
    prompt = asking("chosen", shared, fault) if shared else prompt_cell(row, fault)
    return prompt, completion_cell("chosen", chosen[-1:], fault), completion_cell("rejected", rejected[-1:], fault)


# ---- lists -----------------------------------------------------------------------------------------------------------
def _read_list(row: Mapping[str, Any], where: Where, fault: Fault) -> PairRow | None:
    values = row["completions"]
    if not isinstance(values, list):
        fault(
            "completions", f"{describe(values)} where a list of answers was expected", "write them as a list of texts"
        )
        return None
    prompt, answers = prompt_cell(row, fault), _answers("completions", values, fault)
    ratings = _list_ratings(row, len(values), fault)
    logps = _list_logps(row, len(values), fault)
    if prompt is None or not answers or ratings is None or logps is None:
        return None
    used = ("prompt", "messages", "completions", "ratings", "ranking", *CONVERSATIONS, *LOGGED_ALONE)
    return ranked(prompt, answers, ratings, logps, rest_of(row, *used), where, "completions", fault)


def _list_ratings(row: Mapping[str, Any], n: int, fault: Fault) -> list[float] | None:
    name = next((c for c in ("ratings", "ranking") if row.get(c) is not None), "ratings")
    values = row.get(name)
    if not isinstance(values, list) or len(values) != n:
        what = f"{len(values)} of them" if isinstance(values, list) else describe(values)
        fault(name, f"{what} for {n} answers", "give one number per answer, as a list")
        return None
    if name == "ratings":
        found = [_rating(name, v, prefixed(fault, f"answer {i} is rated ")) for i, v in enumerate(values, 1)]
        return None if None in found else [r for r in found if r is not None]
    bad = next((v for v in values if type(v) not in (int, float) or v % 1 or not 1 <= v <= n), None)
    if bad is not None:
        fault(
            name, f"{describe(bad)} where a place from 1 (best) to {n} was expected", "write the place of each answer"
        )
        return None
    return [float(n - place) for place in values]


def _list_logps(row: Mapping[str, Any], n: int, fault: Fault) -> tuple[Logp, ...] | None:
    name = next((c for c in LOGGED_ALONE if row.get(c) is not None), None)
    if name is None:
        return ()
    values = row[name]
    if not isinstance(values, list) or len(values) != n:
        what = f"{len(values)} of them" if isinstance(values, list) else describe(values)
        fault(name, f"{what} for {n} answers", "give one number per answer, as a list")
        return None
    found = [_logp(name, v, fault) for v in values]
    return None if None in found else tuple(v for v in found if v is not None)


def ranked(prompt: Prompt, answers: Sequence[str], ratings: Sequence[float], logps: Sequence[Logp],
           columns: Mapping[str, Any], where: Where, column: str, fault: Fault) -> PairRow | None:  # fmt: skip
    """A list, best first; the best (all of equal rating) are the chosen ones. Faults are told of `column`."""
    if len(answers) < 2:
        fault(column, "a list of one answer", "a comparison needs two or more: add answers, or remove the row")
        return None
    rated: dict[str, tuple[int, float]] = {}
    for i, (answer, rating) in enumerate(zip(answers, ratings, strict=True), 1):
        first, before = rated.setdefault(answer, (i, rating))
        if before != rating:
            fault(column, f"answer {i} is answer {first} again, and rated {rating:g} instead of {before:g}",
                  "keep one rating of an answer")  # fmt: skip
            return None
    best = max(ratings)
    if min(ratings) == best:
        fault(column, f"all {len(answers)} answers are rated {best:g}", "remove the row: it states no preference")
        return None
    order = sorted(range(len(answers)), key=lambda i: -ratings[i])
    placed, top = [answers[i] for i in order], sum(r == best for r in ratings)
    return PairRow(prompt=prompt, chosen=placed[0], also_chosen=tuple(placed[1:top]), rejected=placed[top],
                   also_rejected=tuple(placed[top + 1 :]), columns=columns, where=where,
                   ratings=tuple(ratings[i] for i in order),
                   reference_logps=tuple(logps[i] for i in order) if logps else ())  # fmt: skip


def read_rated(row: Mapping[str, Any], where: Where, fault: Fault) -> RatedRow | None:
    """`prompt`, `completion` and `rating`, with the `group` that answers to compare share (else those to one prompt do)."""
    prompt, completion = prompt_cell(row, fault), completion_cell("completion", row.get("completion"), fault)
    rating, (logp, known) = _rating("rating", row.get("rating"), fault), _alone(row, fault)
    column = next((name for name in GROUP_COLUMNS if row.get(name) is not None), None)
    if prompt is None or completion is None or rating is None or not known:
        return None
    used = ("prompt", "messages", "completion", "rating", *GROUP_COLUMNS, *LOGGED_ALONE)
    return RatedRow(prompt=prompt, completion=completion, rating=rating, group=None if column is None else row[column],
                    reference_logp=logp, columns=rest_of(row, *used), where=where)  # fmt: skip


def lists_of(rows: Iterable[RatedRow], findings: Findings) -> list[PairRow]:
    """The lists that rated answers make, in the order of their first rows; what is wrong with one is told of that row."""
    groups: dict[str, list[RatedRow]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.prompt if row.group is None else ["group", row.group]), []).append(row)
    found = []
    for members in groups.values():
        first = members[0]
        stray = next((m for m in members if m.prompt != first.prompt), None)
        if stray is not None:
            remedy = "answers are compared to one prompt only: give them groups of their own"
            findings.add(
                stray.where.problem("prompt", f"another prompt than that of its group ({first.where})", remedy)
            )
            continue

        logps = [m.reference_logp for m in members]
        known = [logp for logp in logps if logp is not None]
        made = ranked(first.prompt, [m.completion for m in members], [m.rating for m in members],
                      known if len(known) == len(members) else [], first.columns, first.where, "rating",
                      prefixed(_told(first.where, findings), "the group that starts here: "))  # fmt: skip
        found += [made] if made is not None else []
    return found


def _told(where: Where, findings: Findings) -> Fault:
    return lambda column, found, remedy: findings.add(where.problem(column, found, remedy))


# ---- labels ----------------------------------------------------------------------------------------------------------
def read_label(row: Mapping[str, Any], where: Where, fault: Fault) -> LabelRow | None:
    prompt, completion = prompt_cell(row, fault), completion_cell("completion", row["completion"], fault)
    label, (logp, known) = row["label"], _alone(row, fault)
    if not isinstance(label, bool):
        fault("label", f"{describe(label)} where true or false was expected", "write true (good) or false (bad)")
        return None
    if prompt is None or completion is None or not known:
        return None
    columns = rest_of(row, "prompt", "messages", "completion", "label", *LOGGED_ALONE)
    return LabelRow(
        prompt=prompt, completion=completion, label=label, columns=columns, where=where, reference_logp=logp
    )
