"""Why one answer is better than another, as something to be said: a third row beside the two of a pair."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.data.problems import DataError, Problem
from unipo.sources.keyed import keyed_generator
from unipo.sources.stages.arrange import Arrange
from unipo.sources.stages.guidance import plain_tokens
from unipo.sources.text.encode import encode_completion

RATIONALE = "rationale"
"""The column of the data (in `Episodes` the context of that name), and the kind of the rows that it becomes."""


@dataclass(frozen=True)
class Explained(Arrange):
    """The rationale of each pair as an answer to its prompt with both answers behind it, kind "rationale", in the pair's group.

    `form`: what stands behind the prompt; which answer comes first is drawn for each row, so that the place says nothing. In
    rationales {chosen} and {rejected} stand for the `names` of the places. DataError for pairs without any rationale.
    """

    columns: ClassVar[frozenset[str]] = frozenset()

    form: str = "\nA: {first}\nB: {second}\nWhich is better, and why? "
    names: tuple[str, str] = ("A", "B")

    def __post_init__(self) -> None:
        if re.findall(r"\{(\w*)\}", self.form) != ["first", "second"]:
            raise ValueError(f"form is {self.form!r}: expected a text with {{first}} and then {{second}} in it")

    def __call__(self, rows: Episodes, tokenizer: Any) -> Episodes:
        compared = rows.category("kind", "pair")
        if not bool(compared.any()):
            return rows
        why = texts_of(rows, f"{RATIONALE}_prompt")
        prompts, answers = texts_of(rows, "prompt"), rows["token"].split(rows.lengths().tolist())
        between = [plain_tokens(tokenizer, text) if text else [] for text in re.split(r"\{\w+\}", self.form)]
        contexts, tokens, group, of = list[list[int]](), list[list[int]](), list[int](), list[int]()
        for g, members in enumerate(torch.arange(len(rows)).split(rows.lengths("group", "episode").tolist())):
            sides = [[i for i in members.tolist() if bool(rows["chosen"][i]) == side] for side in (True, False)]
            if not (sides[0] and sides[1]) or not len(why[sides[0][0]]):
                continue
            won, lost = sides[0][0], sides[1][0]
            swapped = bool(keyed_generator("order", int(rows["prompt_id"][won]), g).integers(2))
            shown = [unended(answers[i], tokenizer) for i in ((lost, won) if swapped else (won, lost))]
            contexts.append([*prompts[won], *between[0], *shown[0], *between[1], *shown[1], *between[2]])
            tokens.append(self.said(why[won], swapped, tokenizer))
            group, of = [*group, g], [*of, won]
        if not of:
            remedy = "say in a column 'rationale' why the chosen answer is better, or take a method that does not ask"
            raise DataError([Problem("the pairs", "no rationale", remedy, column=RATIONALE)])
        n, prompt = len(of), rows["prompt_id"][torch.tensor(of)].tolist()
        made = Episodes.build(tokens, contexts, prompt_id=prompt, kind=[RATIONALE] * n, chosen=[True] * n,
                              policy_version=[-1] * n, truncated=[False] * n)  # fmt: skip
        rest = rows.without(f"{RATIONALE}_prompt")
        by = torch.cat([rows.index("group", "episode"), torch.tensor(group)])
        return Episodes.cat([rest, made]).grouped(by)

    def said(self, rationale: Sequence[int], swapped: bool, tokenizer: Any) -> list[int]:
        """The rationale with the names of the places where it speaks of the answers."""
        text = tokenizer.decode(list(rationale), skip_special_tokens=True)
        for name, place in (("chosen", self.names[swapped]), ("rejected", self.names[not swapped])):
            text = text.replace("{" + name + "}", place)
        return encode_completion(tokenizer, text)


def texts_of(rows: Episodes, column: str) -> list[list[int]]:
    """[E]: the tokens of a context of each row; none where there is no such column."""
    if column not in rows:
        return [[] for _ in range(len(rows))]
    found = rows.column(column)
    assert found.offsets is not None
    parts: Sequence[Tensor] = found.values.split(found.offsets.diff().tolist())
    return [part.tolist() for part in parts]


def unended(answer: Tensor, tokenizer: Any) -> list[int]:
    """The tokens of an answer without the one that ends it."""
    tokens: list[int] = answer.tolist()
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens
