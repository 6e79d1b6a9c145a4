"""How per-step losses [N] become a scalar: a numerator and a denominator over every row that a term claims."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.objectives.base import NOTHING, Needs, Part

__all__ = [
    "Aggregate",
    "Budget",
    "EpisodeMean",
    "EpisodeSum",
    "GroupSum",
    "TokenMean",
    "Total",
]


@dataclass(frozen=True)
class Aggregate(Part):
    """`of(x [N], episodes)`: numerator / denominator, divided once, over every row and step that the term claims."""

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        raise TypeError(f"{type(self).__name__} is abstract: define of(x, episodes)")

    @cached_property
    def needs(self) -> Needs:
        return NOTHING


@dataclass(frozen=True)
class TokenMean(Aggregate):
    """TOK: sum over steps / number of steps."""

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        return _divided(F.token_mean(x))


@dataclass(frozen=True)
class EpisodeMean(Aggregate):
    """SEQ: mean over episodes of the mean over their steps; an episode without counted steps adds 0 but counts."""

    along_episodes: ClassVar[bool] = True

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        return _divided(F.episode_mean(x, episodes.index("episode"), len(episodes)))


@dataclass(frozen=True)
class EpisodeSum(Aggregate):
    """SUM: mean over episodes of the sum over their steps."""

    along_episodes: ClassVar[bool] = True

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        return _divided(F.episode_sum(x, len(episodes)))


@dataclass(frozen=True)
class GroupSum(Aggregate):
    """Mean over groups of the sum over their episodes of the mean over steps: what shares that add up to 1 are for."""

    along_episodes: ClassVar[bool] = True

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        numerator, _ = F.episode_mean(x, episodes.index("episode"), len(episodes))
        return numerator / max(episodes.count("group"), 1)


@dataclass(frozen=True)
class Budget(Aggregate):
    """CONST: sum over steps / `tokens` per episode, mean over episodes (Dr. GRPO)."""

    along_episodes: ClassVar[bool] = True

    tokens: float

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        return _divided(F.constant(x, len(episodes), self.tokens))


@dataclass(frozen=True)
class Total(Aggregate):
    """Sum over all steps / `divisor`, whatever the number of rows."""

    divisor: float = 1.0

    def of(self, x: Tensor, episodes: Episodes) -> Tensor:
        return x.sum() / self.divisor


def _divided(pair: tuple[Tensor, Tensor | float]) -> Tensor:
    numerator, denominator = pair
    return numerator / denominator
