"""Values of the next state that action-value critics regress on: `next` players of the annotator. Nothing is differentiated.

Each emits `q` [N], the backed-up action value of the state after the step, and, where its policy has one, `logp` [N] of the
action taken there. Termination is not here: targets multiply by the continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from unipo.critics.action_value import DiscreteQ, GaussianQ, QuantileQ, refuse_unknown
from unipo.critics.pathwise import ActionCritic
from unipo.episodes import Episodes
from unipo.policies.control import ControlPolicy, next_observation
from unipo.policies.distributions import Categorical, GaussianMixture


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


class ComponentBackup(Backup):
    """`SoftBackup` of a mixture whose `logp` is that of the component drawn, not of the mixture (PMOE)."""

    def __init__(self, policy: ControlPolicy, target_critic: ActionCritic) -> None:
        if not isinstance(policy.distribution, GaussianMixture):
            raise ValueError(f"expected a GaussianMixture policy, found {policy.distribution}: use SoftBackup")
        self.policy, self.critic, self.mixture = policy, target_critic, policy.distribution

    def backup(self, episodes: Episodes, observation: Tensor) -> dict[str, Tensor]:
        action, logp = self.mixture.component_sample(self.policy.raw(observation), episodes["next_noise"])
        return {"q": self.critic.q(observation, action).amin(1), "logp": logp}


class DeterministicBackup(Backup):
    """q = min_j Q_j(s', mode of pi(s')); one critic: DDPG (arXiv:1509.02971)."""

    emits = frozenset({"q"})

    def __init__(self, target_policy: ControlPolicy, target_critic: ActionCritic) -> None:
        self.policy, self.critic = target_policy, target_critic

    def backup(self, episodes: Episodes, observation: Tensor) -> dict[str, Tensor]:
        action = self.policy.distribution.mode(self.policy.raw(observation))
        return {"q": self.critic.q(observation, action).amin(1)}


class SmoothedBackup(Backup):
    """q = min_j Q_j(s', clip(mode + clip(noise x `next_noise`, +-clip), +-1)) (TD3, arXiv:1802.09477, section 5.3)."""

    emits = frozenset({"q"})

    def __init__(
        self, target_policy: ControlPolicy, target_critic: ActionCritic, noise: float = 0.2, clip: float = 0.5
    ) -> None:
        self.policy, self.critic, self.noise, self.clip = target_policy, target_critic, noise, clip

    def backup(self, episodes: Episodes, observation: Tensor) -> dict[str, Tensor]:
        mode = self.policy.distribution.mode(self.policy.raw(observation))
        shift = (self.noise * episodes["next_noise"]).clamp(-self.clip, self.clip)
        return {"q": self.critic.q(observation, (mode + shift).clamp(-1, 1)).amin(1)}


class GreedyBackup(Backup):
    """q = max_a min_j Q_j(s', a) (DQN); with `online`, the action is the online critic's (double DQN, arXiv:1509.06461)."""

    emits = frozenset({"q"})

    def __init__(self, target: DiscreteQ, online: DiscreteQ | None = None) -> None:
        self.target, self.chooser = target, target if online is None else online

    def backup(self, episodes: Episodes, observation: Tensor) -> dict[str, Tensor]:
        values = self.target.values(observation).amin(1)
        choice = values if self.chooser is self.target else self.chooser.values(observation).amin(1)
        return {"q": values.gather(1, choice.argmax(1, keepdim=True)).squeeze(1)}


class ExpectedBackup(Backup):
    """q = sum_a pi(a|s') min_j Q_j(s', a), logp = sum_a pi log pi: exact, for categorical policies (expected SARSA, SAC)."""

    def __init__(self, policy: ControlPolicy, target_critic: DiscreteQ) -> None:
        if not isinstance(policy.distribution, Categorical):
            raise ValueError(f"expected a Categorical policy, found {policy.distribution}: use SoftBackup")
        self.policy, self.critic = policy, target_critic

    def backup(self, episodes: Episodes, observation: Tensor) -> dict[str, Tensor]:
        logp_NA = self.policy.raw(observation).log_softmax(-1)
        values = self.critic.values(observation).amin(1)
        return {"q": (logp_NA.exp() * values).sum(-1), "logp": (logp_NA.exp() * logp_NA).sum(-1)}


class GaussianBackup(Backup):
    """q, q_std of the critic with the smaller mean at a' ~ pi_target(s'), and log pi_target(a'|s') (DSAC-T)."""

    emits = frozenset({"q", "q_std", "logp"})

    def __init__(self, target_policy: ControlPolicy, target_critic: GaussianQ) -> None:
        self.policy, self.critic = target_policy, target_critic

    def backup(self, episodes: Episodes, observation: Tensor) -> dict[str, Tensor]:
        action, logp = self.policy.distribution.sample_with_logp(self.policy.raw(observation), episodes["next_noise"])
        q, q_std = self.critic.moments(observation, action)
        lowest, which = q.min(1, keepdim=True)
        return {"q": lowest.squeeze(1), "q_std": q_std.gather(1, which).squeeze(1), "logp": logp}


class QuantileBackup(Backup):
    """The n (K - drop) smallest of all members' quantiles at a' ~ pi(s'), sorted (TQC, arXiv:2005.04269); `q`: their mean."""

    emits = frozenset({"quantiles", "q", "logp"})

    def __init__(self, policy: ControlPolicy, target_critic: QuantileQ, drop: int = 2) -> None:
        if not 0 <= drop < len(target_critic.levels):
            raise ValueError(
                f"drop is {drop}: expected 0 to {len(target_critic.levels) - 1}, of each member's quantiles"
            )
        self.policy, self.critic, self.drop = policy, target_critic, drop

    def backup(self, episodes: Episodes, observation: Tensor) -> dict[str, Tensor]:
        action, logp = self.policy.distribution.sample_with_logp(self.policy.raw(observation), episodes["next_noise"])
        all_NnK = self.critic.quantiles(observation, action)
        kept = all_NnK.flatten(1).sort(1).values[:, : all_NnK.shape[1] * (all_NnK.shape[2] - self.drop)]
        return {"quantiles": kept, "q": kept.mean(1), "logp": logp}
