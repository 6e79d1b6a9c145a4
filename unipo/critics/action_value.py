"""Q(s, a): ensembles of action values, their target copies and the slow update of targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.policies.networks import Normaliser, StackedMLP


class QEnsemble(nn.Module):
    """Q_j(s, a), j < n = `critics`, of continuous actions. Signal `q` [N, n] at the data's actions."""

    emits = frozenset({"q"})

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        critics: int = 2,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        layer_norm: bool = False,
        normaliser: Normaliser | None = None,
    ) -> None:
        super().__init__()
        self.normaliser = normaliser
        self.network = StackedMLP(critics, observation_size + action_size, hidden, 1, activation, layer_norm)

    def q(self, observation: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """Q [N, n] at `observation` [N, d], `action` [N, A]; `frozen`: the gradient flows to the action only."""
        x = observation if self.normaliser is None else self.normaliser(observation)
        return self.network(torch.cat([x, action], -1), frozen).squeeze(-1)

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """`q` [N, n]; KeyError names any other."""
        refuse_unknown(names, self.emits)
        return {"q": self.q(episodes["observation"], episodes["action"])}

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E] steps of each fragment: what its signals cost."""
        return episodes.lengths()


def refuse_unknown(names: Sequence[str], emits: frozenset[str]) -> None:
    """KeyError where `names` holds what is not emitted."""
    unknown = set(names) - emits
    if unknown:
        raise KeyError(f"no signal {sorted(unknown)}: this player emits {', '.join(sorted(emits))}")


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online, every parameter, in place; buffers are copied. `tau` 1 copies all."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)
    for mine, theirs in zip(target.buffers(), online.buffers(), strict=True):
        mine.copy_(theirs)
