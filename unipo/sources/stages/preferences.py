"""Answers compared with answers: who judges, who the opponents are, win rates, and pairs made of groups.

Stages for `RolloutSpec.augment`, each of a few exchangeable records:

    judge       P(y > y'): of rewards (`ScoreJudge`), a function (`FunctionJudge`), a model (`ModelJudge`), a draw (`Verdicts`)
    opponents   whom an answer meets: the others of its group, recent answers, samples of another player or of a mixture
    choose      which answers of a group make pairs: all, best and worst, those far apart

    Compared    column `win_rate` [E]: mean over opponents of P(y > y')
    Paired      groups of two with `chosen` and `confidence` = P(chosen > other), in place of the groups
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from unipo.episodes import Episodes, segment_reduce
from unipo.rewards import ModelRater, RewardError, judges_of, resolve_reward
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt
from unipo.sources.stages.augment import Augment, Drawn, joined
from unipo.sources.text.encode import encode_prompt

Rater = Callable[..., Any]
"""f(prompts, answers, others, **columns) -> probabilities [n] that `answers` are preferred to `others`."""


@dataclass(frozen=True, slots=True)
class Answers:
    """n answers: their prompts, tokens, and what is known of them, `score[name]` [n]."""

    prompts: Sequence[Prompt]
    tokens: Sequence[Sequence[int]]
    score: Mapping[str, Tensor]

    @classmethod
    def of(cls, episodes: Episodes, drawn: Drawn) -> Answers:
        """The answers of episodes, each to the prompt of its group."""
        prompts = drawn.prompt_of(episodes)
        known = {n: episodes[n].double() for n in ("reward", "win_rate") if n in episodes}
        tokens = [part.tolist() for part in episodes["token"].split(episodes.lengths().tolist())]
        return cls([prompts[g] for g in episodes.index("group", "episode").tolist()], tokens, known)

    def take(self, rows: Tensor) -> Answers:
        """Those at the places `rows`, in that order, with repetitions."""
        at = rows.tolist()
        score = {name: value[rows] for name, value in self.score.items()}
        return Answers([self.prompts[i] for i in at], [self.tokens[i] for i in at], score)

    def texts(self, drawn: Drawn) -> list[str]:
        return [drawn.source.tokenizer.decode(list(t), skip_special_tokens=True) for t in self.tokens]  # type: ignore[attr-defined]


# ---- judges: (answers [n], others [n], drawn) -> P(answer > other) [n] -----------------------------------------------
@dataclass(frozen=True)
class Judge:
    """Says of answers to the same prompts with what probability each is preferred to the other: [n] float64 in [0, 1]."""

    def __call__(self, answers: Answers, others: Answers, drawn: Drawn) -> Tensor:
        return torch.full((len(answers.tokens),), 0.5, dtype=torch.float64)


@dataclass(frozen=True)
class ScoreJudge(Judge):
    """sigmoid( (s - s') / temperature ) of what is known of both: `column` reward (Bradley-Terry) or win_rate.

    `temperature` 0: the higher score wins, equal ones draw.
    """

    temperature: float = 1.0
    column: str = "reward"

    def __call__(self, answers: Answers, others: Answers, drawn: Drawn) -> Tensor:
        apart = answers.score[self.column] - others.score[self.column]
        return torch.sigmoid(apart / self.temperature) if self.temperature else (apart.sign() + 1.0) / 2.0


@dataclass(frozen=True)
class FunctionJudge(Judge):
    """(f(y, y') + 1 - f(y', y)) / 2 of a function f(prompts, answers, others, **columns) -> probabilities.

    `function`: one, or its name as for rewards, file.py:function or package.module:function. RewardError where it does not
    return a probability for every pair, with the first that it did not.
    """

    function: str | Rater

    def __call__(self, answers: Answers, others: Answers, drawn: Drawn) -> Tensor:
        rate = _imported(self.function) if isinstance(self.function, str) else self.function
        first, second, n = answers.texts(drawn), others.texts(drawn), len(answers.tokens)
        prompts = [*answers.prompts, *answers.prompts]
        names = dict.fromkeys(name for p in prompts for name in p.columns)
        columns = {name: [p.columns.get(name) for p in prompts] for name in names}
        found = rate([p.text for p in prompts], first + second, second + first, **columns)
        values = torch.as_tensor(found, dtype=torch.float64).flatten()
        if len(values) != 2 * n:
            raise RewardError(
                f"the judge returned {len(values)} values for {2 * n} pairs: expected one probability per pair"
            )
        bad = (~((values >= 0) & (values <= 1))).nonzero()
        if len(bad):
            i = int(bad[0])
            raise RewardError(
                f"the judge returned {float(values[i])} for pair {i} ({(first + second)[i][:60]!r} against "
                f"{(second + first)[i][:60]!r}): expected the probability, from 0 to 1, that the first is preferred"
            )
        return (values[:n] + 1.0 - values[n:]) / 2.0


@dataclass(frozen=True)
class ModelJudge(Judge):
    """P(y > y' | x) of the preference model in `folder`, or of a reward model's scores: sigmoid(s - s').

    Raises RewardError where it is neither.
    """

    folder: str

    def __post_init__(self) -> None:
        judges_of(self.folder)

    def __call__(self, answers: Answers, others: Answers, drawn: Drawn) -> Tensor:
        prompts = [p.text for p in answers.prompts]
        return ModelRater(self.folder)(prompts, answers.texts(drawn), others.texts(drawn))


@lru_cache(maxsize=16)
def _imported(name: str) -> Rater:
    return resolve_reward(name)[1]


@dataclass(frozen=True)
class Verdicts(Judge):
    """One draw of another judge: 1 with its probability, else 0. A function of (seed, step) and of the order of the pairs."""

    judge: Judge

    def __call__(self, answers: Answers, others: Answers, drawn: Drawn) -> Tensor:
        chance = self.judge(answers, others, drawn)
        generator = keyed_generator(drawn.seed, "verdicts", drawn.step)
        return (torch.from_numpy(generator.random(len(chance))) < chance).double()


# ---- opponents ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Met:
    """Opponents [m]: `answers`, the `group` [m] whose answers they meet, and which `row` [m] of the groups each is itself (-1:
    none); `itself`: how much an answer counts among its own opponents, where it wins half."""

    answers: Answers
    group: Tensor
    row: Tensor
    itself: float = 0.0


@dataclass(frozen=True)
class Opponents:
    """Whom the answers of each group meet: the other answers of the group (self-play).

    `itself` 1: an answer also meets itself, and wins half: the estimate of P(y > pi) of SPPO and DNO.
    `players`: other policies that are sampled.
    """

    itself: float = 0.0

    @property
    def players(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, groups: Episodes, answers: Answers, drawn: Drawn) -> Met:
        return Met(answers, groups.index("group", "episode"), torch.arange(len(groups)), self.itself)


@dataclass(frozen=True)
class Sampled(Opponents):
    """`samples` answers per prompt of policy^(1 - share) player^share, token by token: softmax((1 - share) l + share l').

    `share` 1: of the player alone, a snapshot of the recipe or its reference; 0: of the policy itself, drawn apart.
    """

    player: str = "reference"
    share: float = 0.25
    samples: int = 4

    @property
    def players(self) -> frozenset[str]:
        return frozenset({self.player} if self.share else ())

    def __call__(self, groups: Episodes, answers: Answers, drawn: Drawn) -> Met:
        made = self.drawn(groups, drawn, "opponents")
        return Met(Answers.of(made, drawn), made["whom"], torch.full((len(made),), -1))

    def drawn(self, groups: Episodes, drawn: Drawn, use: str) -> Episodes:
        """The samples, as rows of the group numbered `whom` [E]."""
        prompts = [p for p in drawn.prompt_of(groups) for _ in range(self.samples)]
        contexts = [encode_prompt(drawn.source.tokenizer, p.text) for p in prompts]
        number = torch.arange(groups.count("group")).repeat_interleave(self.samples)
        return drawn.source.complete(prompts, contexts, drawn.step, drawn.version, use=use,
                                     by=(self.player, self.share) if self.share else None, whom=number)  # fmt: skip


@dataclass(frozen=True)
class Recent(Opponents):
    """The last `most` answers to the same prompt, the group's own not among them until it has been judged (SPO's queue).

    A prompt that is met for the first time has the other answers of its group as opponents.
    """

    most: int = 32

    def __call__(self, groups: Episodes, answers: Answers, drawn: Drawn) -> Met:
        kept = drawn.source.kept
        queue, own = kept.get("opponents"), groups.index("group", "episode")
        ids, row = groups["prompt_id"], torch.arange(len(groups))
        first = ids[torch.cumsum(groups.lengths("group", "episode"), 0) - 1]
        new = groups.without(*(n for n in groups.columns if n not in ("token", "prompt", "prompt_id", "reward")))
        joined = new if queue is None else Episodes.cat([queue, new])
        order = torch.arange(len(joined))
        later = torch.stack([(joined["prompt_id"][i + 1 :] == joined["prompt_id"][i]).sum() for i in order.tolist()])
        kept["opponents"] = joined.select(later < self.most)
        if queue is None:
            return Met(answers, own, row, self.itself)
        known = torch.isin(first, queue["prompt_id"])
        fresh = (~known[own]).nonzero().squeeze(1)
        old = torch.isin(queue["prompt_id"], first).nonzero().squeeze(1)
        whose, at = (first[:, None] == queue["prompt_id"][old][None, :]).nonzero().T
        before, mine = Answers.of(queue.select(old), drawn).take(at), answers.take(fresh)
        both = Answers([*before.prompts, *mine.prompts], [*before.tokens, *mine.tokens],
                       {"reward": torch.cat([before.score["reward"], mine.score["reward"]])})  # fmt: skip
        return Met(both, torch.cat([whose, own[fresh]]), torch.cat([torch.full_like(at, -1), row[fresh]]), self.itself)


@dataclass(frozen=True)
class Compared(Augment):
    """Column `win_rate` [E]: the mean over its opponents of P(y > y'), 1/2 for an answer that meets nobody."""

    filtered: ClassVar[bool] = True
    columns: ClassVar[frozenset[str]] = frozenset({"win_rate"})

    judge: Judge = ScoreJudge()
    opponents: Opponents = Opponents()

    @property
    def players(self) -> frozenset[str]:
        return self.opponents.players

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        answers = Answers.of(groups, drawn)
        met = self.opponents(groups, answers, drawn)
        own = groups.index("group", "episode")
        meets = (own[:, None] == met.group[None, :]) & (torch.arange(len(groups))[:, None] != met.row[None, :])
        row, other = meets.nonzero().T
        won = self.judge(answers.take(row), met.answers.take(other), drawn)
        count = segment_reduce(torch.ones_like(won), row, len(groups)) + met.itself
        total = segment_reduce(won, row, len(groups)) + met.itself / 2.0
        rate = torch.where(count > 0, total / count.clamp(min=1e-12), 0.5)
        return groups.with_columns("episode", win_rate=rate)


@dataclass(frozen=True)
class SampledBeside(Augment):
    """Samples of another player join each group as rows of kind "demo": answers to look at, not to be rewarded for."""

    filtered: ClassVar[bool] = True
    provides: ClassVar[str] = "demo"

    sampled: Sampled = Sampled(player="reference", share=1.0, samples=1)

    @property
    def players(self) -> frozenset[str]:
        return self.sampled.players

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        made = self.sampled.drawn(groups, drawn, "beside")
        return joined(groups, made.with_columns("episode", kind="demo").without("whom"), made["whom"].tolist())


# ---- pairs -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """Which answers of a group are compared: (row, other row) [2, n] of pairs. This one: every two of them."""

    def __call__(self, groups: Episodes) -> Tensor:
        own = groups.index("group", "episode")
        return ((own[:, None] == own[None, :]).triu(1)).nonzero().T


@dataclass(frozen=True)
class Disjoint(Choice):
    """The first with the second, the third with the fourth: independent pairs of independent answers."""

    def __call__(self, groups: Episodes) -> Tensor:
        size = groups.lengths("group", "episode")
        start = torch.cumsum(size, 0) - size
        pairs = [
            (s + i, s + i + 1) for s, n in zip(start.tolist(), size.tolist(), strict=True) for i in range(0, n - 1, 2)
        ]
        return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T


@dataclass(frozen=True)
class Extremes(Choice):
    """The best with the worst by `column`, the first of equal ones; none where all are equal."""

    column: str = "win_rate"

    def __call__(self, groups: Episodes) -> Tensor:
        score, pairs, start = groups[self.column], [], 0
        for n in groups.lengths("group", "episode").tolist():
            own = score[start : start + n]
            if bool(own.max() > own.min()):
                pairs.append(
                    (start + int((own == own.max()).nonzero()[0]), start + int((own == own.min()).nonzero()[0]))
                )
            start += n
        return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T


@dataclass(frozen=True)
class FarApart(Choice):
    """Pairs whose better answer has at least `least` by `column` and is at least `gap` above the other (DNO's filter)."""

    column: str = "reward"
    least: float = -math.inf
    gap: float = 0.5

    def __call__(self, groups: Episodes) -> Tensor:
        own, score = groups.index("group", "episode"), groups[self.column]
        apart = (own[:, None] == own[None, :]) & (score[:, None] - score[None, :] >= self.gap)
        return (apart & (score >= self.least)[:, None]).nonzero().T


@dataclass(frozen=True)
class Paired(Augment):
    """Groups of two, of kind "pair": `chosen` is the likelier winner, `confidence` [E] = P(chosen > other) by `judge`.

    A row may be in several pairs. They take the place of the groups, or with `keep` join them. If no group has a pair, the
    first one stays, as a pair without a chosen one, which adds nothing to a loss.
    """

    filtered: ClassVar[bool] = True
    provides: ClassVar[str] = "pair"
    columns: ClassVar[frozenset[str]] = frozenset({"confidence"})

    judge: Judge = ScoreJudge()
    choose: Choice = Choice()
    keep: bool = False

    def beside(self) -> Paired:
        return replace(self, keep=True)

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        first, second = self.choose(groups)
        if not len(first):
            blank = torch.zeros(len(groups), dtype=torch.bool)
            alone = groups.with_columns("episode", chosen=blank, confidence=torch.full((len(groups),), 0.5).double())
            return (
                groups if self.keep else alone.with_columns("episode", kind="pair").select(torch.tensor([0]), "group")
            )
        answers = Answers.of(groups, drawn)
        chance = self.judge(answers.take(first), answers.take(second), drawn)
        better, worse = torch.where(chance >= 0.5, first, second), torch.where(chance >= 0.5, second, first)
        rows = torch.stack([better, worse], 1).flatten()
        made = groups.select(rows).grouped(torch.arange(len(first)).repeat_interleave(2))
        sure = torch.maximum(chance, 1.0 - chance).repeat_interleave(2)
        first_of_two = torch.arange(len(rows)) % 2 == 0
        made = made.with_columns("episode", kind="pair", chosen=first_of_two, confidence=sure)
        return Episodes.cat([groups, made]) if self.keep else made


def judge_of(name: str | Judge, temperature: float) -> Judge:
    """A judge as a setting: "reward" (a logistic preference for the higher reward), "model(FOLDER)", or file.py:function.

    ValueError for anything else, RewardError where the folder holds no judge.
    """
    if isinstance(name, Judge):
        return name
    if name == "reward":
        return ScoreJudge(temperature)
    if name.startswith("model(") and name.endswith(")"):
        return ModelJudge(name[len("model(") : -1].strip())
    if ":" not in name:
        raise ValueError(
            f"judge is {name!r}: expected reward, model(FOLDER) of a reward or preference model, or file.py:function that rates "
            "pairs of answers"
        )
    return FunctionJudge(name)
