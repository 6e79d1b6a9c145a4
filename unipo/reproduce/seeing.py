"""A network that knows prompts by what it sees of them, and the sources of a run over enumerable answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.reproduce.network import NetworkPolicy
from unipo.sources.keyed import shuffled
from unipo.sources.prompts import Prompt, Prompts
from unipo.sources.spec import RolloutSpec
from unipo.sources.text.rollouts import Reward, Rollouts, Scored
from unipo.sources.text.tabular import NumberTokenizer, TabularSampler
from unipo.tasks.tabular import TabularTask

GROUP, PROMPTS_PER_STEP = 8, 16


class SeeingPolicy(NetworkPolicy):
    """logits[prompt, position, previous] = network(what is seen of the prompt, onehots of the other two).

    `seen` [P, F]: prompts are known by their features alone, so that what is learned on some is used on others (`at`).
    """

    def __init__(self, seen: Tensor, length: int, vocabulary: int, seed: int, width: int = 48) -> None:
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(size, generator=generator, dtype=torch.float64))

        self.inward = normal(seen.shape[1] + length + vocabulary + 1, width, scale=0.5)
        self.outward = normal(width, vocabulary, scale=0.5 * width**-0.5)
        self.bias = normal(vocabulary, scale=0.0)
        self._look(seen, length, vocabulary)

    def _look(self, seen: Tensor, length: int, vocabulary: int) -> None:
        places = [torch.arange(n) for n in (len(seen), length, vocabulary + 1)]
        prompt, position, previous = torch.cartesian_prod(*places).unbind(1)
        parts = [seen[prompt].double(), *(nn.functional.one_hot(i).double() for i in (position, previous))]
        self.register_buffer("states", torch.cat(parts, 1))
        self.value = nn.Parameter(
            torch.zeros(len(seen), length, vocabulary + 1, dtype=torch.float64), requires_grad=False
        )

    def at(self, seen: Tensor) -> SeeingPolicy:
        """The same network, looking at other prompts."""
        other = copy.deepcopy(self)
        other._look(seen, self.value.shape[1], self.value.shape[2] - 1)
        return other


def probabilities(policy: SeeingPolicy, task: TabularTask) -> Tensor:
    """[P, S]: of every answer to every prompt."""
    with torch.no_grad():
        return task.log_probability(policy).exp()


@dataclass(frozen=True)
class Listed:
    """Prompts of a list in a new keyed order every epoch, several lists in turn."""

    lists: Sequence[Sequence[Prompt]]
    seed: int

    def __getitem__(self, index: int) -> Prompt:
        own = self.lists[index % len(self.lists)]
        return own[shuffled(index // len(self.lists), len(own), self.seed, "listed", index % len(self.lists))]


Judge = Callable[[str, Mapping[str, Any]], float]
"""(answer written as numbers, columns of its prompt) -> reward."""


def scored_by(judge: Judge) -> Reward:
    """A judge of single answers as what sources call."""

    def score(texts: Sequence[Any], answers: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Scored:
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        found = [judge(answer, row) for answer, row in zip(answers, rows, strict=True)]
        return Scored(torch.tensor(found, dtype=torch.float64), torch.ones(len(found), dtype=torch.bool))

    return score


def rolled(task: TabularTask, policy: SeeingPolicy, prompts: Prompts, judge: Judge, seed: int, n: int) -> Rollouts:
    """Groups of `n` prompts a step."""
    spec = RolloutSpec(group=GROUP)
    return Rollouts(prompts, TabularSampler(task, policy), NumberTokenizer(), scored_by(judge), spec, n, seed)


def shown(prompts: Sequence[Prompt], answers: Sequence[str], **columns: Any) -> Episodes:
    """Demonstrations: an answer of numbers for each prompt."""
    return Episodes.build(
        [[int(word) for word in a.split()] for a in answers], [[int(str(p.text))] for p in prompts], kind=["demo"] * len(prompts),
        prompt_id=[p.id for p in prompts], truncated=[False] * len(prompts), policy_version=[-1] * len(prompts), **columns,
    )  # fmt: skip
