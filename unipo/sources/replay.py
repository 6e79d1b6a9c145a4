"""Replay: groups sampled by older policies, with their versions and a staleness limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unipo.episodes import Episodes
from unipo.sources.keyed import keyed_generator


@dataclass
class Replay:
    """Keeps up to `capacity` groups of rollouts, oldest out first, and draws `groups_per_step` of them at random.

    `max_staleness`: groups sampled more than that many policy versions ago are not drawn (-1: no limit). Groups of an
    unknown version (-1) are always allowed: they were given on purpose.
    """

    groups_per_step: int
    seed: int
    capacity: int = 4096
    max_staleness: int = -1
    store: Episodes | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.store.count("group") if self.store is not None else 0

    def add(self, episodes: Episodes) -> None:
        """Remember the rollout groups of a batch."""
        acted = episodes.select(episodes.category("kind", "rollout"))
        if not len(acted):
            return
        joined = acted if self.store is None else Episodes.cat([self.store, acted])
        over = joined.count("group") - self.capacity
        self.store = joined if over <= 0 else joined.select(torch.arange(over, joined.count("group")), "group")

    def draw(self, step: int, version: int) -> Episodes | None:
        """`groups_per_step` different groups, or all that are young enough; None where there is none."""
        if self.store is None:
            return None
        allowed = torch.arange(len(self))
        if self.max_staleness >= 0 and "policy_version" in self.store:
            born = self.store.reduce("policy_version", to="group", how="min")
            allowed = allowed[(born < 0) | (version - born <= self.max_staleness)]
        if not len(allowed):
            return None
        take = min(self.groups_per_step, len(allowed))
        chosen = keyed_generator(self.seed, "replay", step).choice(len(allowed), size=take, replace=False)
        return self.store.select(allowed[torch.from_numpy(chosen)], "group")

    def save(self, folder: Path) -> None:
        if self.store is not None:
            self.store.save(folder / "replay.parquet")

    def load(self, folder: Path) -> None:
        path = folder / "replay.parquet"
        self.store = Episodes.load(path) if path.exists() else None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None
