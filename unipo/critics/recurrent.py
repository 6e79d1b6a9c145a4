"""V of what has been seen so far: a value critic with a memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unipo.critics.action_value import refuse_unknown
from unipo.episodes import Episodes
from unipo.policies.networks import MLP, Normaliser
from unipo.policies.recurrent import Memory


class RecurrentValue(nn.Module):
    """V(s_1 ... s_t) = head(h_t), h_t its own `Memory`; signals are those of `ValueCritic`.

    A fragment starts from the episode column `value_memory` [E, H], or from zeros where there is none; as for
    `RecurrentPolicy`, it has to be stored where fragments continue an episode.
    """

    emits = frozenset({"value", "next_value"})
    column = "value_memory"

    def __init__(
        self,
        observation_size: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        normaliser: Normaliser | None = None,
    ) -> None:
        super().__init__()
        self.memory = Memory(observation_size, hidden, activation, normaliser)
        self.head = MLP(self.memory.width, (), 1, activation, 1.0)

    def start(self, n: int) -> Tensor:
        """The memory [n, H] of `n` episodes that begin."""
        return torch.zeros(n, self.memory.width)

    @torch.no_grad()
    def remember(self, observation: Tensor, memory: Tensor) -> Tensor:
        """The memory [n, H] after `observation` [n, d], from that before it."""
        return self.memory.after(observation, memory)

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """`value`, `next_value`; KeyError names any other. Both come of one pass over each fragment and its final state."""
        refuse_unknown(names, self.emits)
        lengths, observation = episodes.lengths(), episodes["observation"]
        start = episodes[self.column] if self.column in episodes else self.start(len(lengths)).to(observation)
        if "next_value" not in names:
            return {"value": self.head(self.memory.over(observation, lengths, start)).squeeze(-1)}
        owner = torch.repeat_interleave(lengths)
        position = torch.arange(len(observation), device=episodes.device) + owner  # final states are in between
        final = (lengths + 1).cumsum(0) - 1
        states = observation.new_empty(len(observation) + len(lengths), observation.shape[1])
        states[position], states[final] = observation, episodes["final_observation"]
        values = self.head(self.memory.over(states, lengths + 1, start)).squeeze(-1)
        made = {"value": values[position], "next_value": values[position + 1]}
        return {name: made[name] for name in names}

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E] states of each fragment: what its signals cost."""
        return episodes.lengths()
