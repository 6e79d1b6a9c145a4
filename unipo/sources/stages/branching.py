"""Completions behind prefixes of answers: where answers are cut, and what a prefix or a next step is worth.

A prefix is worth the mean reward of completions behind it (Monte-Carlo). Nothing but tokens is needed for it: there is no
critic, and no state of the sampler is kept. All that is sampled is counted in `tokens_sampled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes, segment_reduce
from unipo.sources.companions.step_critic import FittedCritic, Prefix
from unipo.sources.stages.augment import Augment, Drawn

ADVANTAGE = "segment_advantage"


# ---- where answers are cut ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cut:
    """(episodes, tokenizer) -> [B]: flat positions of the steps that begin a segment, rising. This one: where answers begin."""

    def __call__(self, episodes: Episodes, tokenizer: Any) -> Tensor:
        return (episodes.position() == 0).nonzero().squeeze(1)


@dataclass(frozen=True)
class Every(Cut):
    """A segment is `tokens` long; the last one of an answer may be shorter."""

    tokens: int = 1

    def __call__(self, episodes: Episodes, tokenizer: Any) -> Tensor:
        return (episodes.position() % self.tokens == 0).nonzero().squeeze(1)


@dataclass(frozen=True)
class Unlikely(Cut):
    """Cuts stand before the 0th, m-th, 2m-th, ... token that had a probability below `below` when it was sampled; m is the
    `interval`. `below` 1 or more: before any m-th token."""

    below: float = 0.9
    interval: int = 5

    def __call__(self, episodes: Episodes, tokenizer: Any) -> Tensor:
        return F.every_kth(~likely(episodes, self.below), episodes.index("episode"), self.interval)


@dataclass(frozen=True)
class After(Cut):
    """A segment ends with a token whose text has `text` in it: lines, say."""

    text: str = "\n"

    def __call__(self, episodes: Episodes, tokenizer: Any) -> Tensor:
        known, index = torch.unique(episodes["token"], return_inverse=True)
        ends = torch.tensor([self.text in tokenizer.decode([t]) for t in known.tolist()], dtype=torch.bool)[index]
        begins = episodes.position() == 0
        begins[1:] |= ends[:-1]
        return begins.nonzero().squeeze(1)


def likely(episodes: Episodes, threshold: float) -> Tensor:
    """[N] bool: had a probability of `threshold` or more when it was sampled; no step does if that is 1 or more."""
    sure = episodes["behavior_logp"].double().exp() >= threshold
    return sure if threshold < 1 else torch.zeros_like(sure)


@dataclass(frozen=True)
class MaskLikely(Augment):
    """Steps that had a probability of `threshold` or more when they were sampled are in nobody's loss: nothing was decided
    there."""

    filtered: ClassVar[bool] = True

    threshold: float = 0.9

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        mask = ~likely(groups, self.threshold)
        return groups.with_columns("step", mask=mask & groups["mask"] if "mask" in groups else mask)


# ---- what prefixes are worth -------------------------------------------------------------------------------------------
def prefix_values(groups: Episodes, start: Tensor, drawn: Drawn, completions: int, use: str = "values") -> Tensor:
    """[B] float64: mean reward of `completions` new answers behind the prefix before each step of `start` [B].

    Equal prefixes of a prompt are completed once. NaN where no completion could be rewarded.
    """
    prefixes, place = prefixes_before(groups, start)
    if not prefixes:
        return torch.zeros(0, dtype=torch.float64)
    return values_of(prefixes, drawn, completions, use)[place]


def values_of(prefixes: Sequence[Prefix], drawn: Drawn, completions: int, use: str) -> Tensor:
    """[B] float64: mean reward of `completions` answers behind each prefix; NaN where none could be rewarded."""
    made = continued(prefixes, drawn, completions, use)
    total = segment_reduce(made["reward"].double(), made["branch"], len(prefixes))
    return total / torch.bincount(made["branch"], minlength=len(prefixes))


def prefixes_before(groups: Episodes, start: Tensor) -> tuple[list[Prefix], Tensor]:
    """The different prefixes before the steps `start` [B], and the place [B] of each one's among them."""
    rows, cuts = groups.index("episode")[start].tolist(), groups.position()[start].tolist()
    tokens = [tuple(t.tolist()) for t in groups["token"].split(groups.lengths().tolist())]
    contexts, prompt_id = contexts_of(groups), groups["prompt_id"].tolist()
    asked: dict[Prefix, int] = {}
    place = [
        asked.setdefault((prompt_id[row], contexts[row], tokens[row][:cut]), len(asked))
        for row, cut in zip(rows, cuts, strict=True)
    ]
    return list(asked), torch.tensor(place, dtype=torch.long)


def continued(prefixes: Sequence[Prefix], drawn: Drawn, each: int, use: str) -> Episodes:
    """`each` completions behind every prefix [B], with the place of the prefix in the column `branch`."""
    rows = [(i, prefix) for i, prefix in enumerate(prefixes) for _ in range(each)]
    return drawn.source.complete(
        [drawn.prompts[prompt] for _, (prompt, _, _) in rows],
        [[*context, *written] for _, (_, context, written) in rows],
        drawn.step, drawn.version, use=use, written=[written for _, (_, _, written) in rows],
        branch=torch.tensor([i for i, _ in rows], dtype=torch.long),
    )  # fmt: skip


def contexts_of(episodes: Episodes) -> list[tuple[int, ...]]:
    """[E]: what each answer stands behind."""
    column = episodes.context("score")
    assert column.offsets is not None
    return [tuple(c.tolist()) for c in column.values.split(column.offsets.diff().tolist())]


@dataclass(frozen=True)
class SegmentValues(Augment):
    """Answers are cut, and every step gets what its segment added: V(next boundary) - V(own boundary), V(end) = R.

    V is the mean of `completions` answers behind the prefix. A boundary without a value is none.
    """

    filtered: ClassVar[bool] = True
    columns: ClassVar[frozenset[str]] = frozenset({ADVANTAGE})

    cut: Cut = Unlikely()
    completions: int = 9

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        start = self.cut(groups, drawn.source.tokenizer)
        value = prefix_values(groups, start, drawn, self.completions)
        known = ~value.isnan()
        reward = groups["reward"].double()
        found = F.segment_advantages(value[known], start[known], reward, groups.index("episode"))
        return groups.with_columns("step", **{ADVANTAGE: found})


@dataclass(frozen=True)
class StepCandidates(Augment):
    """Each group becomes its states, every one a group of candidate next steps with their values (arXiv 2412.18279, A to C).

    States are the prefixes, at the boundaries of `cut`, of up to `solutions` answers of the group, half of them right as
    far as there are both kinds. The candidates of a state are the first steps of `completions` new answers behind it, equal
    ones too. A candidate's reward is its value: the mean reward of `values` new answers behind it (0: of those of the state's
    completions that begin with it), and its own reward where it ends the answer. With a `critic` it is the critic's, fitted to
    the states' own completions, and `values` is not looked at.
    """

    cut: Cut = After("\n")
    solutions: int = 6
    completions: int = 16
    values: int = 16
    critic: FittedCritic | None = None

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        tokenizer = drawn.source.tokenizer
        chosen = groups.select(balanced(groups, self.solutions))
        states, _ = prefixes_before(chosen, self.cut(chosen, tokenizer))
        made = continued(states, drawn, self.completions, "candidates")
        end = _first_ends(made, self.cut(made, tokenizer))
        steps = made.select(made.position() < made.expand(end), "step")
        last = end == made.lengths()
        value = self._values(steps, states, last, drawn)
        cut_off = steps["truncated"] & last
        known = ~value.isnan()
        steps = steps.with_columns("episode", reward=value, truncated=cut_off).select(known)
        return steps.grouped(steps["branch"]).without("branch")

    def _values(self, steps: Episodes, states: Sequence[Prefix], last: Tensor, drawn: Drawn) -> Tensor:
        """[E]: q of each candidate."""
        owner, reward = steps["branch"].tolist(), steps["reward"].double()
        tokens = [tuple(t.tolist()) for t in steps["token"].split(steps.lengths().tolist())]
        asked: dict[Prefix, int] = {}
        place = torch.tensor([
            asked.setdefault((states[b][0], states[b][1], (*states[b][2], *t)), len(asked))
            for b, t in zip(owner, tokens, strict=True)
        ], dtype=torch.long)  # fmt: skip
        mean = segment_reduce(reward, place, len(asked), "mean")
        if not self.values and self.critic is None:
            return mean[place]
        open_ = torch.ones(len(asked), dtype=torch.bool).index_put((place[last],), torch.tensor(False))
        inner = open_.nonzero().squeeze(1)
        names = [list(asked)[i] for i in inner.tolist()]
        if self.critic is not None:
            rate = segment_reduce(reward, steps["branch"], len(states), "mean")
            found = self.critic(states, rate, names, drawn.source.policy)
            mean[inner] = torch.where(found.isnan(), mean[inner], found)
        elif len(inner):
            mean[inner] = values_of(names, drawn, self.values, "candidate values")
        return mean[place]


def _first_ends(made: Episodes, start: Tensor) -> Tensor:
    """[E]: how many steps the first segment of each episode has."""
    position, owner = made.position()[start], made.index("episode")[start]
    inside = position > 0
    return made.lengths().scatter_reduce(0, owner[inside], position[inside], "amin")


def balanced(groups: Episodes, n: int, right: float = 0.5) -> Tensor:
    """Rows [k] of up to `n` answers of each group, the first ones: half of them right (reward > `right`) as far as there are
    enough of both kinds."""
    good, chosen = (groups["reward"] > right).tolist(), list[int]()
    for rows in torch.arange(len(groups)).split(groups.lengths("group", "episode").tolist()):
        kinds = [[i for i in rows.tolist() if good[i] == kind] for kind in (True, False)]
        fewer, more = sorted(kinds, key=len)
        half = fewer[: n // 2]
        chosen += sorted([*half, *more[: n - len(half)]])
    return torch.tensor(chosen, dtype=torch.long)
