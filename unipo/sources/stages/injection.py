"""Answers that others wrote, or that the policy wrote earlier, in groups that fail.

Stages for `RolloutSpec.augment`; `when` is a `Condition` on the group's own rollouts, as in `unipo.sources.stages.guidance`.

    ranking  which of several teachers' answers are taken first: as given, at random, the best understood
    room     whose place the new rows take: nobody's (the group grows), that of failed rows

    Injected  answers from the data
    Recalled  remembered successes of the prompt
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unipo.episodes import Episodes, segment_reduce
from unipo.objectives import Condition, Outcome
from unipo.objectives.base import Part
from unipo.rewards.answers import MARK
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt
from unipo.sources.stages.augment import Augment, Drawn
from unipo.sources.stages.guidance import ALL_FAILED, plain_tokens
from unipo.sources.text.encode import encode_completion, encode_prompt
from unipo.sources.text.rollouts import categories_of


# ---- whose place they take ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Room:
    """(groups, right [E], wanted [G], drawn) -> (who leaves [E] bool, places [G]). This one: nobody, the group grows."""

    def __call__(self, groups: Episodes, right: Tensor, wanted: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(groups), dtype=torch.bool), wanted


@dataclass(frozen=True)
class FailedRows(Room):
    """Failed rows of the group make room, the first ones or a random choice; there are as many places as they leave."""

    at_random: bool = False

    def __call__(self, groups: Episodes, right: Tensor, wanted: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        leaving, first = torch.zeros(len(groups), dtype=torch.bool), 0
        for g, (n, places) in enumerate(zip(groups.lengths("group", "episode").tolist(), wanted.tolist(), strict=True)):
            failed = first + (~right[first : first + n]).nonzero().squeeze(1)
            if self.at_random and places:
                order = keyed_generator(drawn.seed, "room", drawn.step, int(groups["prompt_id"][first]), g)
                failed = failed[torch.from_numpy(order.permutation(len(failed)))]
            leaving[failed[:places]] = True
            first += n
        return leaving, segment_reduce(leaving.long(), groups.index("group", "episode"), groups.count("group"))


def exchanged(groups: Episodes, leaving: Tensor, extra: Episodes, group: Tensor) -> Episodes:
    """The rows `leaving` [E] go, and each episode of `extra` joins the group that `group` [E'] numbers."""
    by = torch.cat([groups.index("group", "episode")[~leaving], group])
    return Episodes.cat([groups.select(~leaving), extra]).grouped(by)


@dataclass(frozen=True)
class Ranking:
    """(prompts [k], their texts [k], drawn) -> the order [k] in which texts are taken. This one: as they are given."""

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], drawn: Drawn) -> list[list[int]]:
        return [list(range(len(t))) for t in texts]


@dataclass(frozen=True)
class AtRandom(Ranking):
    """In a new random order every step."""

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], drawn: Drawn) -> list[list[int]]:
        keys = [keyed_generator(drawn.seed, "ranking", drawn.step, p.id) for p in prompts]
        return [key.permutation(len(t)).tolist() for key, t in zip(keys, texts, strict=True)]


@dataclass(frozen=True)
class BestUnderstood(Ranking):
    """By how probable the policy finds the right answer behind a teacher's reasoning; of equals, the shorter text.

        score = (1 - form) * mean over the tokens a_t of the answer of pi(a_t | prompt, reasoning, a_<t)
                + form * [reasoning and an answer are there, with a mark between]                  (AMPO, arXiv 2510.02227)

    `column`: the right answer; the reasoning is the text up to its last occurrence (else up to the mark, else all of it).
    """  # fmt: skip

    column: str = "answer"
    form: float = 0.1

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], drawn: Drawn) -> list[list[int]]:
        tokenizer, contexts, answers = drawn.source.tokenizer, [], []
        for p, offered in zip(prompts, texts, strict=True):
            right, asked = str(p.columns[self.column]), encode_prompt(tokenizer, p.text)
            contexts += [[*asked, *plain_tokens(tokenizer, reasoning_of(text, right))] for text in offered]
            answers += [plain_tokens(tokenizer, right)] * len(offered)
        logp = drawn.source.log_probabilities(contexts, answers)
        understood = iter([float(x.exp().mean()) for x in logp])
        keys = [[(-self._score(next(understood), text), len(text)) for text in offered] for offered in texts]
        return [sorted(range(len(k)), key=k.__getitem__) for k in keys]

    def _score(self, understood: float, text: str) -> float:
        return round((1 - self.form) * understood + self.form * well_formed(text), 6)


def well_formed(text: str) -> bool:
    """Whether reasoning and an answer are there, with a mark between."""
    reasoning, mark, answer = text.rpartition(MARK)
    return bool(mark and reasoning.strip() and answer.strip())


def reasoning_of(text: str, answer: str) -> str:
    """What stands in a text before its answer."""
    place = text.rfind(answer)
    return text[:place] if place >= 0 else text[: text.rfind(MARK) + 1] or text


@dataclass(frozen=True)
class Injected(Augment):
    """Up to `count` answers from the data join the groups where `when` holds, as kind "demo", rewarded as rollouts are.

    `column`: "demonstration", or a column with a list of texts. Their reward is max(scale * R, least). Rows count as failed,
    and may make room, where their reward is at most `right`.
    """

    provides: ClassVar[str] = "demo"
    when: Condition = ALL_FAILED
    column: str = "demonstration"
    count: int = 1
    ranking: Ranking = Ranking()
    room: Room = Room()
    scale: float = 1.0
    least: float = -math.inf
    right: float = 0.5

    def texts(self, prompt: Prompt) -> list[str]:
        """What the data offer for a prompt."""
        found = prompt.columns.get(self.column)
        found = prompt.demonstration if found is None and self.column == "demonstration" else found
        return [] if found is None else [found] if isinstance(found, str) else [str(text) for text in found]

    def lacks(self, prompt: Prompt) -> str:
        if not self.texts(prompt):
            several = "a list of right answers" if self.column != "demonstration" else "a right answer"
            return f"a column {self.column!r} with {several}"
        answer = getattr(self.ranking, "column", "")
        return f"a column {answer!r} with its right answer" if answer and prompt.columns.get(answer) is None else ""

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        chosen, every = self.when(groups, {}).nonzero().squeeze(1), drawn.prompt_of(groups)
        offers = [self.texts(every[g]) for g in chosen.tolist()]
        order = self.ranking([every[g] for g in chosen.tolist()], offers, drawn) if len(chosen) else []
        wanted = torch.zeros(groups.count("group"), dtype=torch.long)
        wanted[chosen] = torch.tensor([min(self.count, len(t)) for t in offers], dtype=torch.long)
        leaving, places = self.room(groups, groups["reward"] > self.right, wanted, drawn)
        taken = [(g, offers[i][j]) for i, g in enumerate(chosen.tolist()) for j in order[i][: int(places[g])]]
        if not taken:
            return groups
        extra = self.rows([every[g] for g, _ in taken], [text for _, text in taken], drawn)
        return exchanged(groups, leaving, extra, torch.tensor([g for g, _ in taken]))

    def rows(self, prompts: Sequence[Prompt], texts: Sequence[str], drawn: Drawn) -> Episodes:
        """Answers [n] to prompts [n] as episodes. Where the reward could not be computed it is `least`, or NaN."""
        tokenizer = drawn.source.tokenizer
        tokens = [encode_completion(tokenizer, text) for text in texts]
        scored = drawn.source.scored(prompts, tokens)
        own = (self.scale * scored.reward).clamp(min=self.least)
        unknown = self.least if math.isfinite(self.least) else math.nan
        made = Episodes.build(
            tokens, [encode_prompt(tokenizer, p.text) for p in prompts], kind=["demo"] * len(texts),
            prompt_id=[p.id for p in prompts], policy_version=[-1] * len(texts), truncated=[False] * len(texts),
        )  # fmt: skip
        return made.with_columns("episode", reward=torch.where(scored.kept, own, unknown), **categories_of(prompts))


@dataclass(frozen=True)
class Recalled(Augment):
    """In groups where `when` holds, a success of an earlier step for the same prompt takes a row's place.

    Remembered are the last `capacity` successes of each prompt, an `outcome` above `right`, of the last `prompts` prompts that
    had one; this step's own are remembered after it has drawn. What is recalled keeps its log-probs and its policy version.
    """

    when: Condition = ALL_FAILED
    room: Room = FailedRows()
    right: float = 0.1
    capacity: int = 8
    prompts: int = 4096
    outcome: Part = Outcome()

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        kept, right = drawn.source.kept, self.outcome(groups, {}) > self.right
        made = self.exchanged(groups, right, kept["successes"], drawn) if "successes" in kept else groups
        if bool(right.any()):
            new = groups.select(right)
            kept["successes"] = self.latest(Episodes.cat([kept["successes"], new]) if "successes" in kept else new)
        return made

    def exchanged(self, groups: Episodes, right: Tensor, memory: Episodes, drawn: Drawn) -> Episodes:
        wanted = torch.zeros(groups.count("group"), dtype=torch.long)
        every, recalled = drawn.prompt_of(groups), dict[int, int]()
        for g in self.when(groups, {}).nonzero().squeeze(1).tolist():
            own = (memory["prompt_id"] == every[g].id).nonzero().squeeze(1)
            if len(own):
                key = keyed_generator(drawn.seed, "recall", drawn.step, every[g].id)
                recalled[g], wanted[g] = int(own[int(key.integers(len(own)))]), 1
        leaving, places = self.room(groups, right, wanted, drawn)
        taken = [g for g in recalled if int(places[g])]
        if not taken:
            return groups
        extra = memory.select(torch.tensor([recalled[g] for g in taken]))
        return exchanged(groups, leaving, extra, torch.tensor(taken))

    def latest(self, rows: Episodes) -> Episodes:
        """The last `capacity` rows of each of the last `prompts` prompts, in order."""
        seen, kept = dict[int, int](), []
        for i in reversed(range(len(rows))):
            prompt = int(rows["prompt_id"][i])
            if prompt in seen or len(seen) < self.prompts:
                seen[prompt] = seen.get(prompt, 0) + 1
                if seen[prompt] <= self.capacity:
                    kept.append(i)
        return rows.select(torch.tensor(kept[::-1], dtype=torch.long))
