"""V_x(s^x): the value of what a decision has led to, before chance has answered (arXiv 2504.05150)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from unipo.critics.action_value import refuse_unknown
from unipo.critics.value import ValueCritic
from unipo.episodes import Episodes


class PostDecisionCritic(nn.Module):
    """`critic` at the column `post_observation` [N, d], the state after the decision in the coordinates of a state.

    Signal: `post_value` [N].
    """

    emits = frozenset({"post_value"})

    def __init__(self, critic: ValueCritic) -> None:
        super().__init__()
        self.critic = critic

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """`post_value`; KeyError names any other."""
        refuse_unknown(names, self.emits)
        return {"post_value": self.critic.value(episodes["post_observation"])}

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E] states of each fragment: what its signals cost."""
        return episodes.lengths()
