"""A post-decision process in tables: what an environment with two half-steps is, exactly, when it is small enough to enumerate.

    Q(s, a) = r^x(s, a) + V_x(f(s, a))        V_x(s^x) = r(s^x) + discount sum_s' P(s' | s^x) V(s')

`LotSizing.process()` and `PostDecisionFrozenLake.process()` make one. S states, A actions; post-decision states are numbered
like states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.tabular.mdp import FiniteMDP

LARGEST = 5000
"""States at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostDecisionProcess:
    """Everything that an episode's distribution depends on. A state that ends the episode leads to itself and pays nothing.

    >>> coin = PostDecisionProcess(
    ...     post=torch.tensor([[0, 1], [1, 1]]),                       # the second action ends it, and pays 1
    ...     reward_decision=torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
    ...     outcome=torch.eye(2), reward_outcome=torch.tensor([0.5, 0.0]), initial=torch.tensor([1.0, 0.0]),
    ... )
    >>> coin.mdp(discount=0.5).optimal().v
    tensor([1., 0.], dtype=torch.float64)
    """

    post: Tensor
    """[S, A] long: f(s, a)."""
    reward_decision: Tensor
    """[S, A] r^x(s, a)."""
    outcome: Tensor
    """[S, S] P(s' | s^x)."""
    reward_outcome: Tensor
    """[S] the mean of r(s^x, xi)."""
    initial: Tensor
    """[S] where episodes begin."""

    def mdp(self, discount: float) -> FiniteMDP:
        """The same process with whole steps: r(s, a) = r^x + r(f(s, a)), P(s' | s, a) = P(s' | f(s, a))."""
        return FiniteMDP(
            transition=self.outcome[self.post],
            reward=self.reward_decision + self.reward_outcome[self.post],
            initial=self.initial,
            discount=discount,
        )

    def post_value(self, v: Tensor, discount: float) -> Tensor:
        """[S] V_x of a value V [S] of states."""
        return self.reward_outcome.to(v) + discount * self.outcome.to(v) @ v

    def best_return(self, horizon: int) -> Tensor:
        """Scalar: the largest expected sum of rewards of `horizon` steps."""
        v = torch.zeros_like(self.reward_outcome)
        for _ in range(horizon):
            v = (self.reward_decision + self.post_value(v, 1.0)[self.post]).amax(1)
        return self.initial @ v

    def expected_return(self, policy: Tensor, horizon: int) -> Tensor:
        """Scalar: the expected sum of rewards of `horizon` steps under `policy` [S, A], probabilities."""
        v = torch.zeros_like(self.reward_outcome)
        for _ in range(horizon):
            v = (policy.to(v) * (self.reward_decision + self.post_value(v, 1.0)[self.post])).sum(1)
        return self.initial @ v
