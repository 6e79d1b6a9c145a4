"""What tests of on-policy methods share: fragments by hand, an enumerated softmax, gradients of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.control_toys import BOX, control_batch, control_players
from unipo.episodes import Column, Episodes, offsets_of
from unipo.learner import Learner, LearnerSettings, coefficients
from unipo.learner.policy_step import PolicyOptimiser, parted
from unipo.objectives import (
    BatchStd,
    GeneralisedAdvantage,
    Objective,
    PolicyGradient,
    Surrogate,
    with_settings,
)
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import Categorical
from unipo.recipe import Recipe

WHITE = GeneralisedAdvantage(0.99, 0.95, BatchStd())


def fragments(
    observation: Tensor, action: Tensor, reward: Tensor, final: Tensor, cut: bool, **step: Tensor
) -> Episodes:
    """Episodes of equal length: columns [E, T, ...]."""
    e, t = reward.shape
    one = torch.arange(e + 1)
    columns = {
        "observation": Column(observation.flatten(0, 1), "step"),
        "action": Column(action.flatten(0, 1), "step"),
        "reward": Column(reward.flatten(), "step"),
        "final_observation": Column(final, "episode"),
        "terminated": Column(torch.full((e,), not cut), "episode"),
        "truncated": Column(torch.full((e,), cut), "episode"),
        "kind": Column(torch.zeros(e, dtype=torch.long), "episode", None, ("rollout",)),
        **{name: Column(values.flatten(0, 1), "step") for name, values in step.items()},
    }
    return Episodes({"turn": offsets_of(torch.full((e,), t)), "episode": one, "group": one}, columns)


def policy_term(recipe: Recipe, **changes: Any) -> Objective:
    """The policy gradient of a recipe alone."""
    return next(t for _, t in recipe.objective.terms() if isinstance(t, PolicyGradient | Surrogate)).but(**changes)


def dlogp(objective: Objective, episodes: Episodes, logp: Tensor) -> Tensor:
    return coefficients(objective, episodes, {"logp": logp}).total["logp"]


def fresh(recipe: Recipe, actions: Any = BOX, seed: int = 0) -> tuple[Episodes, dict[str, Any]]:
    """A batch that the players have just collected: behavior log-probs and `old` distributions are their own."""
    players: dict[str, Any] = control_players(recipe, actions)
    batch = control_batch(recipe, seed, actions=actions)
    own = {k: v.detach() for k, v in players["policy"].signals(batch, ["logp", "parameters"]).items()}
    return batch.with_columns("step", behavior_logp=own["logp"], old_parameters=own["parameters"]), players


def gradient_of(objective: Objective, batch: Episodes, players: dict[str, Any], token_budget: int = 1 << 20) -> Tensor:
    learner = Learner(players, LearnerSettings(token_budget=token_budget))
    learner.gradient(batch, with_settings(objective, {}))
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learner.parameters()])
    learner.optimizer.zero_grad(set_to_none=True)
    return found


def of_policy(recipe: Recipe, players: dict[str, Any]) -> Objective:
    return parted(with_settings(recipe.objective, {}), players["policy"])[0]


OLD = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
WORTH = torch.tensor([[1.0, -2.0, 0.4], [0.0, 3.0, -1.0]], dtype=torch.float64)


def table(logits: Tensor) -> ControlPolicy:
    """A softmax policy with the logits [S, A] of one-hot states."""
    policy = ControlPolicy(len(logits), Categorical(logits.shape[1]), hidden=()).double()
    with torch.no_grad():
        policy.network.head.weight.copy_(logits.T)
        policy.network.head.bias.zero_()
    return policy


def enumerated() -> Episodes:
    """Two states; in each the actions of OLD as often as it takes them (0, 0, 1, 2), so that batch means are expectations."""
    s, a = torch.tensor([0, 1]).repeat_interleave(4), torch.tensor([0, 0, 1, 2] * 2)
    one_hot, zero = torch.eye(2).double()[s], torch.zeros(8, 1).double()
    return fragments(one_hot[:, None], a[:, None], WORTH[s, a][:, None], one_hot, cut=False, old_value=zero,
                     behavior_logp=OLD.log()[a][:, None],
                     old_parameters=OLD.log().expand(8, -1)[:, None])  # fmt: skip


def optimiser_of(recipe: Recipe, policy: Any) -> PolicyOptimiser:
    return PolicyOptimiser(policy, Learner({"policy": policy}), recipe.policy_step)


def vector(policy: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
