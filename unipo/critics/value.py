"""V(s): the value of a state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unipo.critics.action_value import refuse_unknown
from unipo.episodes import Episodes
from unipo.policies.control import next_index, next_observation
from unipo.policies.networks import MLP, Normaliser


class ValueCritic(nn.Module):
    """V(s) = MLP(normalised observation).

    Signals, both [N] and differentiable: `value` of each step's state; `next_value` of the state after it, which inside
    a fragment is the next step's value and at its end V(final_observation), whether or not the episode terminated
    there: return calculators multiply by the continuation.
    """

    emits = frozenset({"value", "next_value"})

    def __init__(
        self,
        observation_size: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        normaliser: Normaliser | None = None,
        orthogonal: bool = True,
    ) -> None:
        super().__init__()
        self.normaliser = normaliser
        self.network = MLP(observation_size, hidden, 1, activation, 1.0, orthogonal)

    def value(self, observation: Tensor) -> Tensor:
        """V [N] of `observation` [N, d]."""
        x = observation if self.normaliser is None else self.normaliser(observation)
        return self.network(x).squeeze(-1)

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """`value`, `next_value`; KeyError names any other. Of whole episodes both come of one pass over the N + E states."""
        refuse_unknown(names, self.emits)
        observation = episodes["observation"]
        if episodes.is_flat or "next_value" not in names:
            states = {"value": lambda: observation, "next_value": lambda: next_observation(episodes)}
            return {name: self.value(states[name]()) for name in names}
        values = self.value(torch.cat([observation, episodes["final_observation"]]))
        made = {"value": values[: len(observation)], "next_value": values[next_index(episodes)]}
        return {name: made[name] for name in names}

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E] states of each fragment: what its signals cost."""
        return episodes.lengths()
