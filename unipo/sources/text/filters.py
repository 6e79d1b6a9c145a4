"""Filters drop groups with a recorded reason; relabellers change rewards and masks. Frozen records of their settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.episodes import Episodes, segment_reduce


@dataclass(frozen=True)
class GroupFilter:
    """Which groups of fresh rollouts are kept: bool [G]; `reason` says what the others were dropped for.

    This one keeps all.
    """

    reason: str = "none"

    def __call__(self, episodes: Episodes) -> Tensor:
        return torch.ones(episodes.count("group"), dtype=torch.bool)


@dataclass(frozen=True)
class MixedOutcomes(GroupFilter):
    """Dynamic sampling (DAPO, arXiv 2503.14476): a group whose rewards are all equal carries no signal."""

    reason: str = "equal outcomes"

    def __call__(self, episodes: Episodes) -> Tensor:
        high, low = (episodes.reduce("reward", to="group", how=how) for how in ("max", "min"))
        return high > low


@dataclass(frozen=True)
class SuccessBetween(GroupFilter):
    """Groups whose mean reward lies strictly between `low` and `high`."""

    reason: str = "success rate out of range"
    low: float = 0.0
    high: float = 1.0

    def __call__(self, episodes: Episodes) -> Tensor:
        rate = episodes.reduce("reward", to="group", how="mean")
        return (rate > self.low) & (rate < self.high)


@dataclass(frozen=True)
class RewardGap(GroupFilter):
    """Groups whose best and worst rewards are at least `least` apart."""

    reason: str = "rewards too close"
    least: float = 0.1

    def __call__(self, episodes: Episodes) -> Tensor:
        high, low = (episodes.reduce("reward", to="group", how=how) for how in ("max", "min"))
        return high - low >= self.least


@dataclass(frozen=True)
class Relabel:
    """(episodes, longest completion allowed) -> episodes with other rewards or masks. This one changes nothing."""

    def __call__(self, episodes: Episodes, max_tokens: int) -> Episodes:
        return episodes


@dataclass(frozen=True)
class SoftOverlong(Relabel):
    """DAPO's soft overlong punishment (arXiv 2503.14476), added to the reward.

    0 up to max_tokens - cache; then linearly down to -1 at max_tokens; -1 for truncated completions. `cache` is a share
    of `max_tokens` (the paper: 4,096 of 20,480).
    """

    cache: float = 0.2

    def __call__(self, episodes: Episodes, max_tokens: int) -> Episodes:
        cache = max(self.cache * max_tokens, 1.0)
        penalty = ((max_tokens - cache - episodes.lengths()) / cache).clamp(-1.0, 0.0)
        penalty = torch.where(episodes["truncated"], -torch.ones_like(penalty), penalty)
        return episodes.with_columns("episode", reward=episodes["reward"] + penalty.to(episodes["reward"].dtype))


@dataclass(frozen=True)
class LengthPenalty(Relabel):
    """R <- R * (1 - strength * T / max_tokens): a right answer is worth less the longer it is, a wrong one 0 as before."""

    strength: float = 0.5

    def __call__(self, episodes: Episodes, max_tokens: int) -> Episodes:
        short = 1.0 - self.strength * episodes.lengths() / max_tokens
        return episodes.with_columns("episode", reward=episodes["reward"] * short.to(episodes["reward"].dtype))


@dataclass(frozen=True)
class MaskTruncated(Relabel):
    """Overlong filtering: the steps of truncated completions are in nobody's loss."""

    def __call__(self, episodes: Episodes, max_tokens: int) -> Episodes:
        mask = ~episodes.expand("truncated")
        return episodes.with_columns("step", mask=mask & episodes["mask"] if "mask" in episodes else mask)


@dataclass(frozen=True)
class DistinctAdvantages(Relabel):
    """The reward becomes R - the mean over the group; of equal answers in a group one stays, with the mean of theirs.

    The mean counts every row, duplicates too, so that afterwards a group's advantages need not sum to 0.
    """

    def __call__(self, episodes: Episodes, max_tokens: int) -> Episodes:
        index, reward = episodes.index("group", "episode"), episodes["reward"]
        centred = reward - episodes.reduce(reward, to="group", how="mean", level="episode")[index]
        parts = episodes["token"].split(episodes.lengths().tolist())
        seen: dict[tuple[int, ...], int] = {}
        answers = [(g, *tokens.tolist()) for g, tokens in zip(index.tolist(), parts, strict=True)]
        place = torch.tensor([seen.setdefault(answer, i) for i, answer in enumerate(answers)], dtype=torch.long)
        first, owner = place.unique(return_inverse=True)
        mean = segment_reduce(centred, owner, len(first), "mean")
        return episodes.with_columns("episode", reward=mean[owner]).select(first)


@dataclass(frozen=True)
class RepeatedByDifficulty(Relabel):
    """Hard groups count more often: copies by mean reward, `bands` of (below, copies); what is above the last is left out.

    Default: OREAL's (arXiv 2502.06781). Copies are groups of their own, so that no statistic of a group sees them.
    """

    bands: tuple[tuple[float, int], ...] = ((0.2, 6), (0.6, 4), (0.8, 2))

    def __call__(self, episodes: Episodes, max_tokens: int) -> Episodes:
        rate = episodes.reduce("reward", to="group", how="mean").tolist()
        copies = [next((n for below, n in self.bands if r < below), 0) for r in rate]
        members = torch.arange(len(episodes)).split(episodes.lengths("group", "episode").tolist())
        taken = [rows for rows, n in zip(members, copies, strict=True) for _ in range(n)]
        if not taken:
            return episodes.select(torch.zeros(0, dtype=torch.long))
        group = torch.arange(len(taken)).repeat_interleave(torch.tensor([len(rows) for rows in taken]))
        return episodes.select(torch.cat(taken)).grouped(group)


@dataclass(frozen=True)
class OneOfEach(Relabel):
    """The steps of all but one right and one wrong answer of each group are in nobody's loss; statistics still see them all.

    It is the first of each: answers to a prompt are drawn independently, so that the first is as random as any. Right: a
    reward above `threshold`.
    """

    threshold: float = 0.5

    def __call__(self, episodes: Episodes, max_tokens: int) -> Episodes:
        group, right = episodes.index("group", "episode"), episodes["reward"] > self.threshold
        kind = 2 * group + right
        first = torch.full((2 * episodes.count("group"),), len(episodes), device=kind.device)
        first = first.scatter_reduce(0, kind, torch.arange(len(episodes), device=kind.device), "amin")
        mask = episodes.expand(first[kind] == torch.arange(len(episodes), device=kind.device))
        return episodes.with_columns("step", mask=mask & episodes["mask"] if "mask" in episodes else mask)
