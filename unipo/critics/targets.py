"""Slow copies: targets that follow what is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online, every parameter, in place; buffers are copied. `tau` 1 copies all."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)
    for mine, theirs in zip(target.buffers(), online.buffers(), strict=True):
        mine.copy_(theirs)


@dataclass(frozen=True)
class Target:
    """A slow copy, made by copy.deepcopy(online).requires_grad_(False): moved to `online` by `tau` every `every` updates."""

    slow: nn.Module
    online: nn.Module
    tau: float
    every: int = 1

    def due(self, updates: int) -> bool:
        """Whether it moves with update number `updates` (1-based)."""
        return updates % self.every == 0

    def move(self) -> None:
        polyak(self.slow, self.online, self.tau)
