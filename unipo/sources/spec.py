"""What a method asks of its rollouts, as data."""

from __future__ import annotations

from dataclasses import dataclass

from unipo.sources.filters import GroupFilter, Relabel


@dataclass(frozen=True, kw_only=True)
class RolloutSpec:
    """What a method asks of its rollouts.

    `group`: rollouts per prompt. `keep`: groups that are used, judged by the task's own rewards; where it drops some, up to
    `refill` further rounds of prompts are sampled until the batch is full. `relabel`: applied in order to what is kept.
    `demonstration`: the prompt's demonstration joins its group, as kind "demo".
    """

    group: int = 8
    keep: GroupFilter = GroupFilter()
    refill: int = 0
    relabel: tuple[Relabel, ...] = ()
    demonstration: bool = False
