"""Rows that are added to groups of fresh rollouts, or put in the place of others: hints, demonstrations, branches, replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.prompts import Prompt
from unipo.sources.text.encode import encode_completion, encode_prompt


class Completes(Protocol):
    """What samples more where that is asked for: `Rollouts`. `kept`: rows remembered over steps by name, checkpointed.
    `policy`: whose samples these are."""

    kept: dict[str, Episodes]
    policy: Any

    def complete(self, prompts: Sequence[Prompt], contexts: Sequence[Sequence[int]], step: int, version: int, *,
                 use: str = "", written: Sequence[Sequence[int]] | None = None, by: tuple[str, float] | None = None,
                 **columns: object) -> Episodes: ...  # fmt: skip

    def scored(self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> Any: ...

    def log_probabilities(self, contexts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[Tensor]: ...

    @property
    def sampler(self) -> Any: ...

    @property
    def tokenizer(self) -> object: ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """Where groups of fresh rollouts come from: their prompts by id, who sampled them, and when."""

    prompts: Mapping[int, Prompt]
    source: Completes
    seed: int
    step: int
    version: int

    def prompt_of(self, groups: Episodes) -> list[Prompt]:
        """[G]: the prompt of each group."""
        first = groups["prompt_id"][torch.cumsum(groups.lengths("group", "episode"), 0) - 1]
        return [self.prompts[i] for i in first.tolist()]


@dataclass(frozen=True)
class Augment:
    """(groups, drawn) -> groups with other rows; this one changes nothing.

    `filtered`: it sees the groups that the recipe's filter kept (False: all of them, and the filter judges what it made).
    `provides`: the kind of rows that it adds. `columns`: further columns that its rows have. `single`: it makes them of single
    rollouts, so that groups of one are enough.
    """

    filtered: ClassVar[bool] = False
    single: ClassVar[bool] = False
    provides: ClassVar[str] = "rollout"
    columns: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        return groups

    @property
    def players(self) -> frozenset[str]:
        """Other policies that it samples, by name: the reference, or snapshots of the recipe."""
        return frozenset()

    def beside(self) -> Augment:
        """The stage where others want the rollouts as they were drawn: one that replaces them keeps them too."""
        return self

    @property
    def rewards(self) -> frozenset[str]:
        """Single rewards, of several, that it reads, by name (their columns are reward.NAME)."""
        return frozenset()

    def lacks(self, prompt: Prompt) -> str:
        """What a prompt must have for this stage and has not; "" where nothing."""
        return ""


def joined(groups: Episodes, extra: Episodes, group: Sequence[int]) -> Episodes:
    """Each episode of `extra` joins the group of `groups` that `group` [E'] numbers, behind its rows."""
    by = torch.cat([groups.index("group", "episode"), torch.tensor(group, dtype=torch.long)])
    return Episodes.cat([groups, extra]).grouped(by)


def demonstration_of(tokenizer: object, prompt: Prompt) -> Episodes:
    """The prompt's demonstration as an episode of kind "demo". Raises ValueError for a prompt without one."""
    if prompt.demonstration is None:
        raise ValueError(
            f"this method puts a demonstration into each group, but prompt {prompt.id} has none: give a dataset "
            "with a 'completion' (or 'demonstration') column beside 'prompt' and 'answer', or another method"
        )
    return Episodes.build(
        [encode_completion(tokenizer, prompt.demonstration)], [encode_prompt(tokenizer, prompt.text)], kind=["demo"],
        prompt_id=[prompt.id], policy_version=[-1], truncated=[False],
    )  # fmt: skip


@dataclass(frozen=True)
class Demonstrated(Augment):
    """Each prompt's demonstration joins its group, as kind "demo", without a reward."""

    filtered: ClassVar[bool] = True
    provides: ClassVar[str] = "demo"

    def lacks(self, prompt: Prompt) -> str:
        return (
            "" if prompt.demonstration is not None else "a column 'demonstration' (or 'completion') with a right answer"
        )

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        shown = [demonstration_of(drawn.source.tokenizer, prompt) for prompt in drawn.prompt_of(groups)]
        return joined(groups, Episodes.cat(shown), range(len(shown)))
