"""Comparisons and labelled answers of a user as episodes, with what is wrong in them told by row before they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from unipo.episodes import Episodes
from unipo.sources.data.preferences import LabelRow, Logp, PairRow
from unipo.sources.data.problems import Findings, Problem
from unipo.sources.rows import label_episodes, pair_episodes
from unipo.sources.stages.explained import RATIONALE
from unipo.sources.stages.guidance import plain_tokens
from unipo.sources.text.encode import encode_completion

NUMBERS = ("quality", "embedding", "severity")
"""Columns of comparisons that filters (of `severity`: losses on edits) look at, where the data have them: numbers, or lists of
equally many."""


def comparison_episodes(tokenizer: Any, rows: Sequence[PairRow]) -> Episodes:
    """A group of kind "pair" for each row, `given` [E] being its number; a column `rationale` is a context of that name.

    DataError for log-probs of another tokenizer.
    """
    _check_logged(tokenizer, [(row, a, logp) for row in rows for a, logp in zip(row.answers, row.reference_logps)])  # noqa: B905
    made = pair_episodes(tokenizer, [r.prompt for r in rows], [r.all_chosen for r in rows], [r.all_rejected for r in rows],
                         [r.ratings for r in rows], [r.reference_logps for r in rows], **_numbers(rows))  # fmt: skip
    own = made.index("group", "episode")
    reasons = [row.columns.get(RATIONALE) for row in rows]
    if any(isinstance(text, str) for text in reasons):
        tokens = [plain_tokens(tokenizer, text) if isinstance(text, str) else [] for text in reasons]
        made = made.with_context(RATIONALE, [tokens[i] for i in own.tolist()])
    return made.with_columns("episode", given=own)


def labelled_episodes(tokenizer: Any, rows: Sequence[LabelRow]) -> Episodes:
    """An episode of kind "label" for each row, `given` [E] being its number."""
    _check_logged(tokenizer, [(row, row.completion, row.reference_logp) for row in rows])
    made = label_episodes(tokenizer, [r.prompt for r in rows], [r.completion for r in rows], [r.label for r in rows],
                          [r.reference_logp for r in rows])  # fmt: skip
    return made.with_columns("episode", given=torch.arange(len(rows)))


def _check_logged(tokenizer: Any, answers: Sequence[tuple[Any, str, Logp | None]]) -> None:
    """Log-probs of single tokens must be as many as this tokenizer makes, the end-of-sequence token included."""
    findings = Findings()
    for row, answer, logp in answers:
        if isinstance(logp, tuple) and len(logp) != (length := len(encode_completion(tokenizer, answer))):
            found = (
                f"{len(logp)} log-probs of a reference, and this model's tokenizer makes {length} tokens of the answer"
            )
            remedy = "log them with the same tokenizer, the end-of-sequence token included, or give their sum"
            findings.add(row.where.problem(None, found, remedy))
    findings.raise_any()


def _numbers(rows: Sequence[PairRow]) -> dict[str, list[Any]]:
    """Columns of numbers that filters know, where every row has them; DataError where only some do, or they do not agree."""
    found, findings = dict[str, list[Any]](), Findings()
    for name in NUMBERS:
        values = [row.columns.get(name) for row in rows]
        if all(v is None for v in values):
            continue
        shapes = [len(v) if isinstance(v, list) else 0 if type(v) in (int, float) else None for v in values]
        for row, shape in zip(rows, shapes, strict=True):
            if shape is None or shape != shapes[0]:
                what = "missing" if row.columns.get(name) is None else "not what other rows have"
                findings.add(row.where.problem(name, what, "give every row a number, or lists of the same length"))
        found[name] = [[float(x) for x in v] if isinstance(v, list) else float(v) for v in values if v is not None]
    findings.raise_any()
    return found


def check_given(rows: Sequence[Any], episodes: Episodes, context: int | None, rating_range: Sequence[float]) -> None:
    """What would be trained on must be whole, fit the model, and be rated as is possible: DataError with the rows that do not.

    `rows`: of which `episodes` were made (their column `given`); what filters left out is not looked at.
    """
    findings, prompts = Findings(), episodes.context().offsets
    assert prompts is not None
    total = (prompts.diff() + episodes.lengths()).tolist()
    for i, length in zip(episodes["given"].tolist(), total, strict=True):
        if context is not None and length > context:
            found = (
                f"an answer that has {length:,} tokens with its prompt, more than the model's context of {context:,}"
            )
            remedy = "shorten it, remove the row, or leave it out with --keep-pairs 'length(NUMBER)'"
            findings.add(rows[i].where.problem(None, found, remedy))
    for i in episodes["given"].unique().tolist():
        for problem in wrong_with(rows[i], rating_range):
            findings.add(problem)
    findings.raise_any()


def wrong_with(row: Any, rating_range: Sequence[float] = ()) -> list[Problem]:
    """What is wrong with a comparison or label that can be read: an answer that was cut, a rating outside the range."""
    found = []
    cut = row.columns.get("truncated")
    if cut is True or (isinstance(cut, list) and any(cut)):
        remedy = "remove the row: it would teach that an answer ends where a limit cut it"
        found.append(row.where.problem("truncated", "an answer that a limit cut", remedy))
    for rating in getattr(row, "ratings", ()) if rating_range else ():
        if not rating_range[0] <= rating <= rating_range[1]:
            wrong = f"a rating of {rating:g}, outside {rating_range[0]:g} to {rating_range[1]:g}"
            found.append(row.where.problem(None, wrong, "rate the answer again, or remove the row"))
            break
    return found
