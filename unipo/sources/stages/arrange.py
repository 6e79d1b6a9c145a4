"""What a method makes of the rows that are given to it, before the first step: `Recipe.arrange`, in order.

    EveryPair      lists become pairs: each answer with each that is worse
    Rivals         as EveryPair, and each answer is read behind the one that it was compared with
"""  # fmt: skip

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.objectives import Rating


@dataclass(frozen=True)
class Arrange:
    """(rows of one file or task, tokenizer) -> rows; this one changes nothing.

    It meets demonstrations, comparisons and labelled answers alike, each kind apart, and leaves alone what is not for it.
    `columns`: further columns that its rows have. `judges`: what a value at the end of an answer is then about.
    """

    columns: ClassVar[frozenset[str]] = frozenset()
    judges: ClassVar[str] = "answers"

    def __call__(self, rows: Episodes, tokenizer: Any) -> Episodes:
        return rows

    @property
    def title(self) -> str:
        """What it is called where a run says what it did."""
        return type(self).__name__


@dataclass(frozen=True)
class EveryPair(Arrange):
    """Each group of kind "pair" becomes pairs (better, worse): by rating, or chosen and not chosen in lists without ratings.

    Answers of unknown rating make no pair, nor do those of equal rating unless one is chosen; a pair stays a pair.
    """

    def __call__(self, rows: Episodes, tokenizer: Any) -> Episodes:
        if not bool(rows.category("kind", "pair").any()):
            return rows
        first, second = better_worse(rows)
        n = torch.arange(len(first))
        made = rows.select(torch.stack([first, second], 1).flatten()).grouped(n.repeat_interleave(2))
        return made.with_columns("episode", chosen=torch.arange(2 * len(n)) % 2 == 0)


@dataclass(frozen=True)
class Rivals(EveryPair):
    """Pairs in which each answer stands behind the prompt and its finished rival: what is scored has read both."""

    judges: ClassVar[str] = "pairs"

    def __call__(self, rows: Episodes, tokenizer: Any) -> Episodes:
        made = super().__call__(rows, tokenizer)
        return made if made is rows else against(made, tokenizer.eos_token_id)


def better_worse(rows: Episodes) -> Tensor:
    """(better row, worse row) [2, n] of all pairs within groups."""
    unknown = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    rating = Rating()(rows if "rating" in rows else rows.with_columns("episode", rating=unknown), {})
    index, n = rows.index("group", "episode"), rows.count("group")
    rated, told = (torch.stack(F.ordered_pairs(x, index, n)) for x in (rating, rows["chosen"].double()))
    return torch.cat([rated, told[:, rating[told[0]] == rating[told[1]]]], 1)


def against(pairs: Episodes, end: int | None) -> Episodes:
    """Pairs of neighbouring rows, each row behind its prompt and the other's tokens, closed by the token `end`."""
    context, answers = pairs.context("score"), pairs["token"].split(pairs.lengths().tolist())
    assert context.offsets is not None
    prompts = context.values.split(context.offsets.diff().tolist())
    rivals = [answers[i ^ 1] for i in range(len(answers))]
    closing = context.values.new_tensor([] if end is None else [end])
    return pairs.with_context(
        "score",
        [torch.cat([p, r, closing[: int(r[-1:].tolist() != [end])]]) for p, r in zip(prompts, rivals, strict=True)],
    )
