"""Groups of rollouts as lists of rated answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from unipo.episodes import Episodes
from unipo.sources.stages.augment import Augment, Drawn


@dataclass(frozen=True)
class Rated(Augment):
    """The groups as lists, of kind "pair": `rating` [E] is the column `by` (reward, win_rate), `chosen` the best of a list.

    They take the place of the groups, or with `keep` join them.
    """

    filtered: ClassVar[bool] = True
    provides: ClassVar[str] = "pair"
    columns: ClassVar[frozenset[str]] = frozenset({"rating"})

    by: str = "reward"
    keep: bool = False

    def beside(self) -> Rated:
        return replace(self, keep=True)

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        made = as_lists(groups, self.by)
        return Episodes.cat([groups, made]) if self.keep else made


def as_lists(groups: Episodes, by: str = "reward") -> Episodes:
    """The same groups of kind "pair": `rating` [E] is their column `by`, `chosen` the best of each."""
    rating = groups[by].double()
    best = groups.expand(groups.reduce(rating, to="group", how="max", level="episode"), "episode", "group")
    return groups.with_columns("episode", kind="pair", rating=rating, chosen=rating == best)
