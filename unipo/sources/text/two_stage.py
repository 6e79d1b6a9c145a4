"""Describe, then reason: a behaviour policy of two models, as demonstrations that are collected before the first step.

1. The policy describes what it sees, without the question: K descriptions of each prompt.
2. A frozen reasoner answers the question from a description alone: N traces each, scored as answers to the whole prompt.
3. A description is worth the mean reward of its traces. Of a prompt's right traces that stand on a description worth more than
   a threshold, the shortest are kept, as answers to what the policy sees; the description is neither context nor target.

    R(c_k) = 1/N sum_n R(y_kn)        kept: R(y) = 1 and R(c of y) > threshold, the shortest `keep` of the prompt

Prompts say how in two columns: `describe_prompt`, and `reason_prompt`, in which `{description}` stands for the description.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.keyed import name_key
from unipo.sources.prompts import Prompt
from unipo.sources.text.encode import encode_completion, encode_prompt
from unipo.sources.text.rollouts import Reward
from unipo.sources.text.sampler import Completion
from unipo.tasks.describe import DESCRIPTION

COLUMNS = ("describe_prompt", "reason_prompt")
RIGHT = 1.0 - 1e-6


@dataclass(frozen=True, kw_only=True)
class DescribeThenReason:
    """What a method asks of its two-stage round: `prompts` of it, `descriptions` of each, `traces` of each description; the
    value that a description must pass, and how many traces of a prompt are kept."""

    prompts: int = 256
    descriptions: int = 8
    traces: int = 8
    threshold: float = 0.75
    keep: int = 1

    def __post_init__(self) -> None:
        if min(self.prompts, self.descriptions, self.traces, self.keep) < 1:
            raise ValueError(f"{self}: expected at least one prompt, description, trace, and kept trace")


Reasoner = Callable[[Sequence[str], Tensor], list[str]]
"""(prompts of text [n], keys [n, k]: what the draw of each depends on) -> answers of text."""


class SamplesText(Protocol):
    """A sampler of tokens: `Sampler`."""

    def sample(self, prompts: Sequence[Sequence[int]], keys: Tensor) -> list[Completion]: ...


@dataclass(frozen=True)
class SampledText:
    """A model as a reasoner: its own tokenizer reads the prompts and writes the answers."""

    sampler: SamplesText
    tokenizer: Any

    def __call__(self, prompts: Sequence[str], keys: Tensor) -> list[str]:
        made = self.sampler.sample([encode_prompt(self.tokenizer, p) for p in prompts], keys)
        return [self.tokenizer.decode(list(c.tokens), skip_special_tokens=True) for c in made]


@dataclass(frozen=True)
class EmbeddedReasoner:
    """The reasoner of an embedded task: a function of a prompt and a generator."""

    reason: Any

    def __call__(self, prompts: Sequence[str], keys: Tensor) -> list[str]:
        return [self.reason(p, Random("/".join(map(str, key)))) for p, key in zip(prompts, keys.tolist(), strict=True)]


def keys_of(prompts: Sequence[Prompt], each: int, seed: int, use: str) -> Tensor:
    """[n * each, 4] keys: seed, use, prompt, and the how manieth of it."""
    rows = [[seed, name_key(use), p.id, i] for p in prompts for i in range(each)]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 4)


def describe_then_reason(prompts: Sequence[Prompt], spec: DescribeThenReason, describe: Reasoner, reason: Reasoner,
                         reward: Reward, tokenizer: Any, seed: int) -> Episodes:  # fmt: skip
    """One round: every trace [P * K * N] as an episode of kind "demo" behind its prompt, the traces of a prompt a group.

    `description` [E] numbers the description that a trace stands on, `reward` its own; `selected` says which to learn from.
    """
    k, n = spec.descriptions, spec.traces
    asked = [str(p.columns["describe_prompt"]) for p in prompts for _ in range(k)]
    described = describe(asked, keys_of(prompts, k, seed, "describe"))
    templates = [str(p.columns["reason_prompt"]) for p in prompts for _ in range(k)]
    questions = [t.replace(DESCRIPTION, d.strip()) for t, d in zip(templates, described, strict=True)]
    answers = reason([q for q in questions for _ in range(n)], keys_of(prompts, k * n, seed, "reason"))
    owners = [p for p in prompts for _ in range(k * n)]
    names = dict.fromkeys(name for p in prompts for name in p.columns)
    scored = reward([p.text for p in owners], answers, {name: [p.columns.get(name) for p in owners] for name in names})
    made = Episodes.build(
        [encode_completion(tokenizer, a) for a in answers], [encode_prompt(tokenizer, p.text) for p in owners],
        [i for i in range(len(prompts)) for _ in range(k * n)], kind=["demo"] * len(owners),
        prompt_id=[p.id for p in owners], policy_version=[-1] * len(owners), truncated=[False] * len(owners),
        description=[i for i in range(len(questions)) for _ in range(n)],
    )  # fmt: skip
    return made.with_columns("episode", reward=torch.where(scored.kept, scored.reward, 0.0))


def description_values(traces: Episodes) -> Tensor:
    """[E]: the mean reward of the traces that stand on the same description."""
    _, index = torch.unique(traces["description"], return_inverse=True)
    total = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add(0, index, traces["reward"].double())
    return (total / torch.bincount(index))[index]


def selected(traces: Episodes, threshold: float, keep: int) -> Tensor:
    """[E] bool: of each group, the `keep` shortest traces that are right and stand on a description worth more than
    `threshold`; of equally long ones the first. Both conditions come before the length."""
    right = (traces["reward"] >= RIGHT) & (description_values(traces) > threshold + 1e-9)
    length = torch.where(right, traces.lengths(), torch.iinfo(torch.long).max)
    order = torch.argsort(length, stable=True)
    group = traces.index("group", "episode")
    order = order[torch.argsort(group[order], stable=True)]
    starts = traces.lengths("group", "episode").cumsum(0) - traces.lengths("group", "episode")
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts[group[order]]
    return right & (rank < keep)


def chosen(traces: Episodes, spec: DescribeThenReason) -> Episodes:
    """The selected traces as demonstrations, those of a prompt a group: without rewards, which belong to other contexts."""
    return traces.select(selected(traces, spec.threshold, spec.keep)).without("reward", "description")
