"""Models that are trained beside the policy and tell it something: a reward of every token, a density, a verifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.sources.keyed import keyed_generator

BUDGET = 16384
"""Tokens computed at once where hidden states of the policy are read."""


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


def features_of(policy: Any, batch: Episodes, layers: Sequence[float]) -> Tensor:
    """Hidden states [N, K, d] of the policy at shares of its depth, micro-batch by micro-batch."""
    parts = batch.split(BUDGET, policy.total_lengths(batch))
    found = [policy.features(batch.select(rows) if len(parts) > 1 else batch, layers) for rows in parts]
    return torch.cat(found) if found else torch.zeros(0, len(layers), policy.width)


def torch_generator(*key: int | str) -> torch.Generator:
    """A generator of torch that depends on `key` alone."""
    return torch.Generator().manual_seed(int(keyed_generator(*key).integers(2**62)))


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """While it lasts, torch's own draws (the first weights of modules) depend on `key` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(keyed_generator(*key).integers(2**62)))
        yield
