"""Values of the next state that action-value critics regress on: `next` players of the annotator. Nothing is differentiated.

Each emits `q` [N], the backed-up action value of the state after the step, and, where its policy has one, `logp` [N] of the
action taken there. Termination is not here: targets multiply by the continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from unipo.critics.action_value import refuse_unknown
from unipo.critics.pathwise import ActionCritic
from unipo.episodes import Episodes
from unipo.policies.control import ControlPolicy, next_observation


class Backup:
    """What backups share: no parameters, a cost of one state per step."""

    emits: frozenset[str] = frozenset({"q", "logp"})

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """The signals `names`, detached; KeyError names any other, and the column that is missing."""
        refuse_unknown(names, self.emits)
        with torch.no_grad():
            made = self.backup(episodes, next_observation(episodes))
        return {name: made[name] for name in names}

    def backup(self, episodes: Episodes, observation: Tensor) -> dict[str, Tensor]:
        """All signals, at the next `observation` [N, d]."""
        raise NotImplementedError

    def total_lengths(self, episodes: Episodes) -> Tensor:
        return episodes.lengths()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())


class SoftBackup(Backup):
    """q = min_j Q_j(s', a'), logp = log pi(a'|s'), a' ~ pi(s') from column `next_noise` (SAC, arXiv:1812.05905)."""

    def __init__(self, policy: ControlPolicy, target_critic: ActionCritic) -> None:
        self.policy, self.critic = policy, target_critic

    def backup(self, episodes: Episodes, observation: Tensor) -> dict[str, Tensor]:
        action, logp = self.policy.distribution.sample_with_logp(self.policy.raw(observation), episodes["next_noise"])
        return {"q": self.critic.q(observation, action).amin(1), "logp": logp}
