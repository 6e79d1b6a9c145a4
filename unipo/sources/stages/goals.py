"""How good the answer shall be, said in the prompt: comparisons teach both of their answers, each as what its rating asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from unipo.episodes import Episodes
from unipo.sources.directions import Asking
from unipo.sources.prompts import Prompt
from unipo.sources.stages.arrange import EveryPair
from unipo.sources.stages.explained import texts_of
from unipo.sources.text.encode import Message, encode_prompt


@dataclass(frozen=True)
class RatingGoal:
    """What stands in front of a plain prompt, or is the first system message of a chat: `text` with the rating in it.

    Ratings are rounded to multiples of `step` (0: they are not), so that a goal is met often enough to be learned.
    """

    text: str = "Overall score: {rating:g}\n"
    step: float = 1.0

    def __post_init__(self) -> None:
        if "{rating" not in self.text:
            raise ValueError(f"the goal is {self.text!r}: expected a text with {{rating}} in it, or {{rating:g}}")

    def rounded(self, rating: float) -> float:
        return round(rating / self.step) * self.step if self.step else rating

    def behind(self, prompt: str | Sequence[Message], rating: float) -> str | Sequence[Message]:
        """The prompt behind the goal."""
        said = self.text.format(rating=self.rounded(rating))
        return said + prompt if isinstance(prompt, str) else [{"role": "system", "content": said.strip()}, *prompt]


@dataclass(frozen=True)
class GoalAsked(Asking):
    """Every prompt asks for answers that are rated `rating`: the best there is."""

    rating: float
    goal: RatingGoal = RatingGoal()

    def __call__(self, prompt: Prompt, seed: int, step: int) -> Prompt:
        return self.held_out(prompt)

    def held_out(self, prompt: Prompt) -> Prompt:
        return replace(prompt, text=self.goal.behind(prompt.text, self.rating))


@dataclass(frozen=True)
class GoalPairs(EveryPair):
    """Of each pair (y, y') with ratings (r, r'): y chosen behind the goal r, and y' chosen behind the goal r'.

    Lists are pairs of all their answers first. Pairs whose rounded ratings are equal are dropped: both copies would have one
    prompt, and cancel. Logged log-probs of a reference are of other prompts, and dropped. ValueError for pairs without ratings,
    and for prompts that are chats (their tokens hold no place for a goal).
    """

    columns: ClassVar[frozenset[str]] = frozenset()

    goal: RatingGoal = RatingGoal()

    def __call__(self, rows: Episodes, tokenizer: Any) -> Episodes:
        if not bool(rows.category("kind", "pair").any()):
            return rows
        pairs = super().__call__(rows, tokenizer)
        rating = pairs["rating"].double() if "rating" in pairs else torch.full((len(pairs),), torch.nan)
        unknown = int(rating.isnan().reshape(-1, 2).any(1).sum())
        if unknown or not len(pairs):
            raise ValueError(
                f"answers are learned as what their ratings ask for, and {unknown:,} of {len(pairs) // 2:,} pairs have no "
                "ratings: give columns chosen_rating and rejected_rating, or completions with ratings"
            )
        rounded = torch.tensor([self.goal.rounded(r) for r in rating.tolist()])
        apart = (rounded[::2] != rounded[1::2]).nonzero().squeeze(1)
        return self._both_ways(pairs.select(apart, "group"), tokenizer)

    def _both_ways(self, pairs: Episodes, tokenizer: Any) -> Episodes:
        """Each pair and its exchange, the chosen answer first, behind the goal that this one meets."""
        n = torch.arange(0, len(pairs), 2)
        rows = torch.stack([n, n + 1, n + 1, n], 1).flatten()
        made = pairs.without("reference_logp").select(rows).grouped(torch.arange(len(rows) // 2).repeat_interleave(2))
        wanted = made["rating"][torch.arange(0, len(rows), 2)].repeat_interleave(2)
        first = torch.arange(len(rows)) % 2 == 0
        texts = [plain(tokens, tokenizer) for tokens in texts_of(made, "prompt")]
        contexts = [
            encode_prompt(tokenizer, self.goal.behind(t, r)) for t, r in zip(texts, wanted.tolist(), strict=True)
        ]
        return made.with_columns("episode", chosen=first).with_context("score", contexts)


def plain(tokens: Sequence[int], tokenizer: Any) -> str:
    """The text of a prompt. ValueError for one that a chat template made, where the goal would have no place."""
    text, whole = (str(tokenizer.decode(list(tokens), skip_special_tokens=skip)) for skip in (True, False))
    opening = getattr(tokenizer, "bos_token", None) or ""
    if whole.removeprefix(opening).strip() != text.strip():
        raise ValueError(
            f"goals stand in front of plain prompts, and this one is a chat: {whole[:60]!r}. Give prompts as text, without --chat"
        )
    return text
