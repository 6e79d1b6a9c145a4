"""Rollouts that are helped: behind a hint, or behind the beginning of a solution.

Stages for `RolloutSpec.augment`, each of a few exchangeable records:

    when     `unipo.objectives.Condition` on the group's own rollouts: always, solved at most so often, even and low
    guide    what is shown and where: a `Hint` beside the prompt, or a `Prefix` that the answer begins with
    share    how much of it each group is shown: the same for all, or the shortest beginning that once led to a success

    Hinted          rollouts behind a guided context, scored on the plain prompt: in the group, or beside it
    GuidedPrompts   guided prompts as prompts of their own
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.episodes import Episodes, segment_reduce
from unipo.objectives import Condition, SolvedAtMost
from unipo.sources.prompts import Prompt
from unipo.sources.stages.augment import Augment, Drawn, joined
from unipo.sources.text.encode import encode_prompt

ALL_FAILED = SolvedAtMost(0.0)


# ---- what is shown -----------------------------------------------------------------------------------------------------
def trace_of(prompt: Prompt, column: str) -> str | None:
    """The text in a column of the prompt; where there is no "solution" or "demonstration", its demonstration."""
    text = prompt.columns.get(column)
    text = prompt.demonstration if text is None and column in ("solution", "demonstration") else text
    return None if text is None else str(text)


def plain_tokens(tokenizer: object, text: str) -> list[int]:
    """Token ids of a part of a text: nothing is added at either end."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[operator]


@dataclass(frozen=True)
class Guide:
    """`shown(prompt, share, tokenizer, longest)` -> (context, what of the answer it ends with), both tokens. This one: nothing.

    `column`: of the data, which holds the text of which the first `share` of the tokens, rounded up, is shown. `longest`: most
    tokens of an answer.
    """

    column: str = ""

    def lacks(self, prompt: Prompt) -> str:
        """What a prompt must have for it and has not; "" where nothing."""
        given = not self.column or trace_of(prompt, self.column) is not None
        return "" if given else f"a column {self.column!r} with what is shown of the way to its answer"

    def shown(self, prompt: Prompt, share: float, tokenizer: object, longest: int) -> tuple[list[int], list[int]]:
        return encode_prompt(tokenizer, prompt.text), []

    def beginning(self, prompt: Prompt, share: float, tokenizer: object) -> list[int]:
        """The first `share` of the column's tokens. Raises ValueError for a prompt without it."""
        text = trace_of(prompt, self.column)
        if text is None:
            raise ValueError(
                f"prompt {prompt.id} lacks {self.lacks(prompt)}: add it to the data, or take another method"
            )
        tokens = plain_tokens(tokenizer, text)
        return tokens[: math.ceil(share * len(tokens) - 1e-9)]


@dataclass(frozen=True)
class Hint(Guide):
    """The hint stands in the prompt, as `form` says; of a conversation, in its last message."""

    column: str = "hint"
    form: str = "{hint}\n{prompt}"

    def shown(self, prompt: Prompt, share: float, tokenizer: object, longest: int) -> tuple[list[int], list[int]]:
        hint = str(tokenizer.decode(self.beginning(prompt, share, tokenizer)))  # type: ignore[attr-defined]
        if isinstance(prompt.text, str):
            return encode_prompt(tokenizer, self._filled(hint, prompt.text)), []
        *before, last = prompt.text
        return encode_prompt(tokenizer, [*before, {**last, "content": self._filled(hint, last["content"])}]), []

    def _filled(self, hint: str, text: str) -> str:
        return re.sub(r"\{(hint|prompt)\}", lambda found: hint if found[1] == "hint" else text, self.form)


@dataclass(frozen=True)
class Prefix(Guide):
    """The answer begins with it: it is context (no loss, no weight), the reward sees it. One token is left to be sampled."""

    column: str = "solution"

    def shown(self, prompt: Prompt, share: float, tokenizer: object, longest: int) -> tuple[list[int], list[int]]:
        written = self.beginning(prompt, share, tokenizer)[: longest - 1]
        return [*encode_prompt(tokenizer, prompt.text), *written], written


def guided(guide: Guide, prompts: Sequence[Prompt], shares: Sequence[float], counts: Sequence[int], drawn: Drawn, use: str
           ) -> tuple[Episodes, Tensor, list[list[int]]]:  # fmt: skip
    """Rollouts behind guided contexts: `counts` [k] for each of `prompts` [k]. With them, of each: which prompt of the k it
    answers, and the plain prompt with what is written of the answer."""
    longest = drawn.source.sampler.settings.max_tokens
    seen = [guide.shown(p, s, drawn.source.tokenizer, longest) for p, s in zip(prompts, shares, strict=True)]
    owner = [i for i, n in enumerate(counts) for _ in range(n)]
    made = drawn.source.complete(
        [prompts[i] for i in owner], [seen[i][0] for i in owner], drawn.step, drawn.version, use=use,
        written=[seen[i][1] for i in owner], owner=torch.tensor(owner, dtype=torch.long),
    )  # fmt: skip
    kept = made["owner"]
    plain = [[*encode_prompt(drawn.source.tokenizer, p.text), *w] for p, (_, w) in zip(prompts, seen, strict=True)]
    return made.without("owner"), kept, [plain[i] for i in kept.tolist()]


# ---- how much of it ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Share:
    """How much of a trace the groups `chosen` [k] are shown: [k] in [0, 1]. This one: `value` everywhere."""

    value: float = 1.0

    def __call__(self, groups: Episodes, chosen: Tensor, guide: Guide, drawn: Drawn) -> list[float]:
        return [self.value] * len(chosen)


@dataclass(frozen=True)
class ShortestUseful(Share):
    """The shortest beginning behind which one of `samples` answers is right; `value` where none is (POPE, arXiv 2601.18779).

    Tried are `grid` beginnings, evenly up to `value` (those of equal length once), when a prompt is first met; it is
    remembered from then on. Right: a reward above `right`.
    """

    value: float = 0.25
    grid: int = 8
    samples: int = 16
    right: float = 0.5

    def __call__(self, groups: Episodes, chosen: Tensor, guide: Guide, drawn: Drawn) -> list[float]:
        every, kept = drawn.prompt_of(groups), drawn.source.kept
        prompts = [every[i] for i in chosen.tolist()]
        old = kept.get("shares")
        known = {} if old is None else dict(zip(old["prompt_id"].tolist(), old["share"].tolist(), strict=True))
        found = self.searched([p for p in {p.id: p for p in prompts}.values() if p.id not in known], guide, drawn)
        if found:
            new = Episodes.build([[0]] * len(found), prompt_id=list(found))
            new = new.with_columns("episode", share=torch.tensor(list(found.values()), dtype=torch.float64))
            kept["shares"] = new if old is None else Episodes.cat([old, new])
        return [{**known, **found}[p.id] for p in prompts]

    def searched(self, prompts: Sequence[Prompt], guide: Guide, drawn: Drawn) -> dict[int, float]:
        """The share of each prompt, by its id."""
        found, before = {p.id: self.value for p in prompts}, dict[int, list[int]]()
        for k in range(1, self.grid + 1):
            share, tried = self.value * k / self.grid, []
            for p in prompts:
                context = guide.shown(p, share, drawn.source.tokenizer, 1 << 30)[0]
                if context != before.get(p.id):
                    tried.append(p)
                before[p.id] = context
            if tried:
                sizes = [self.samples] * len(tried)
                made, owner, _ = guided(guide, tried, [share] * len(tried), sizes, drawn, f"search {k}")
                solved = segment_reduce(made["reward"] > self.right, owner, len(tried), "any").tolist()
                done = {p.id for p, right in zip(tried, solved, strict=True) if right}
                found |= dict.fromkeys(done, share)
                prompts = [p for p in prompts if p.id not in done]
        return found


# ---- guided rollouts ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Guiding(Augment):
    """As many rollouts again behind a guided context, for the groups where `when` holds."""

    when: Condition = ALL_FAILED
    guide: Guide = Hint()
    share: Share = Share()

    def lacks(self, prompt: Prompt) -> str:
        return self.guide.lacks(prompt)

    def more(self, groups: Episodes, drawn: Drawn) -> tuple[Episodes, Tensor, list[list[int]]]:
        """(rollouts, the group [n] of each, the plain context of each)."""
        chosen, every = self.when(groups, {}).nonzero().squeeze(1), drawn.prompt_of(groups)
        if not len(chosen):
            return groups.select(chosen), chosen, []
        sizes = groups.lengths("group", "episode")[chosen].tolist()
        shares = self.share(groups, chosen, self.guide, drawn)
        prompts = [every[i] for i in chosen.tolist()]
        made, owner, plain = guided(self.guide, prompts, shares, sizes, drawn, type(self).__name__)
        return made, chosen[owner], plain


@dataclass(frozen=True)
class Hinted(Guiding):
    """The guided rollouts are scored on the plain prompt; their log-probs at sampling are those with the guide.

    `pooled`: they join the group of the plain ones (else they are a group of their own).
    """

    pooled: bool = True

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        groups = groups.with_context("sample", contexts_of(groups))
        made, group, plain = self.more(groups, drawn)
        if not len(made):
            return groups
        made = made.with_context("sample", contexts_of(made)).with_context("score", plain)
        return joined(groups, made, group.tolist()) if self.pooled else Episodes.cat([groups, made])


@dataclass(frozen=True)
class GuidedPrompts(Guiding):
    """Guided prompts are prompts of their own, with groups of their own, trained in the context that was sampled from.

    `instead`: they take the place of the plain ones (else they stand beside them).
    """

    instead: bool = False

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        made, group, _ = self.more(groups, drawn)
        if not len(made):
            return groups
        left = torch.ones(groups.count("group"), dtype=torch.bool)
        left[group] = not self.instead
        return Episodes.cat([groups.select(left, "group"), made])


def contexts_of(episodes: Episodes) -> list[Tensor]:
    """[E] what each episode is conditioned on."""
    column = episodes.context("score")
    assert column.offsets is not None
    return list(column.values.split(column.offsets.diff().tolist()))
