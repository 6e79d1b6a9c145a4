"""What the learner trains: anything that maps episodes to differentiable per-step signals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from unipo.episodes import Episodes


class Player(Protocol):
    """A policy or a critic.

    Required: `emits` names its signals; `signals` returns each named one as [N], or [N, ...] for an ensemble or the
    parameters of a distribution, differentiable in `named_parameters()`, the same whatever other episodes are in the batch
    (no dropout, no batch statistics); `total_lengths` [E] says what an episode costs, in tokens computed (prompt included).
    Not verified: that `signals` is deterministic.
    """

    @property
    def emits(self) -> frozenset[str]: ...

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]: ...

    def total_lengths(self, episodes: Episodes) -> Tensor: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
