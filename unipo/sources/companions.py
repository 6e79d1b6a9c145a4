"""Models that are trained beside the policy and tell it something: a reward of every token, a density, a verifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from unipo.episodes import Episodes


class Companion:
    """A second model with an optimiser of its own.

    Every step `annotate` adds columns to the batch before the policy learns from it, and `learn` trains the model on the
    batch after. Both must be functions of (state, batch, step) alone, so that a resumed run goes on as if it had not stopped.
    """

    def __init__(self, name: str, module: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> None:
        self.name, self.module = name, module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)

    def annotate(self, batch: Episodes, step: int) -> Episodes:
        """The batch with further columns, without gradient; here as it is."""
        return batch

    def learn(self, batch: Episodes, step: int) -> Mapping[str, float]:
        """Train on the batch that the policy has learned from; returns what to write into the metrics."""
        return {}

    def save(self, folder: Path) -> None:
        """Weights and moments, into the folder of a checkpoint."""
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / f"companion_{self.name}.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / f"companion_{self.name}.pt", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True, kw_only=True)
class CompanionSpec:
    """What a recipe asks for: the settings of a companion, which `build` makes for a policy.

    `columns`: what it adds to batches.
    """

    columns: ClassVar[frozenset[str]] = frozenset()

    def build(self, policy: Any, seed: int) -> Companion:
        raise TypeError(f"{type(self).__name__} is abstract: define build(policy, seed)")
