"""Demonstration-regularised RL: clone experts, then explore under a KL to the clone (Tiapkin et al., 2310.17303).

    clone     pi_BC,h(a|s) = (N_h(s, a) + 1) / (N_h(s) + A)
    plan      max_pi E sum_h r_h - lam KL(pi_h || pi_BC,h)           `mdp.optimal(KL(pi_BC, lam))`
    price     V^E - V^pi <= lam KL(pi_E || pi_BC) + eps_RL           the KL is over whole trajectories

Planning errors enter the regularised problem squared, divided by lam: with lam in proportion to the number of
demonstrations N, exploration takes episodes in proportion to 1 / (eps^2 N). [H] steps, [S] states, [A] actions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unipo.tabular.mdp import KL, Counts, EpisodicMDP, Free


def behaviour_clone(counts: Counts) -> Tensor:
    """[H, S, A]: (N_h(s, a) + 1) / (N_h(s) + A). The one makes every KL to it finite."""
    n = counts.visits + 1
    return n / n.sum(-1, keepdim=True)


def trajectory_kl(mdp: EpisodicMDP, policy: Tensor, other: Tensor) -> Tensor:
    """Scalar: KL between the episodes of two policies = sum_h E_policy KL(policy_h(.|s) || other_h(.|s))."""
    log_ratio = torch.xlogy(policy, policy) - torch.xlogy(policy, other)
    return (mdp.occupancy(policy).sum(-1) * log_ratio.sum(-1)).sum()


def squared_error_bound(mdp: EpisodicMDP, policy: Tensor, error: Tensor, temperature: float) -> Tensor:
    """Scalar: 1 / (2 lam) sum_h E_policy max_a error_h(s, a)^2.

    It bounds V*_lam - V^pi_lam for pi = pi_BC exp(Q~ / lam) / Z and error = |Q~ - Q*|, Q* that of the regularised optimum:
    the loss is lam sum_h E_pi KL(pi_h || pi*_h), and softmax is 1 / lam-smooth.
    """
    return (mdp.occupancy(policy).sum(-1) * error.square().amax(-1)).sum() / (2 * temperature)


def temperature_for(demonstrations: int, epsilon: float, mdp: EpisodicMDP) -> float:
    """lam = epsilon (N + 1) / (H S (A - 1)), so that E lam KL(pi_E || pi_BC) <= epsilon for any expert.

    Laplace's rule: E KL <= log(1 + (A - 1) / (n + 1)) after n visits of a state, and E 1 / (n + 1) <= 1 / ((N + 1) d)
    for a state visited with probability d; summed over the H S states of an episode, each with weight d.
    """
    return epsilon * (demonstrations + 1) / (mdp.horizon * mdp.states * (mdp.actions - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """`high`, `low`: optimistic and pessimistic action values; `policy`: best for `high`. All [H, S, A]."""

    high: Tensor
    low: Tensor
    policy: Tensor


class Planner(Protocol):
    """What plans in a model whose action values are known up to `width` [H, S, A], and says when that is good enough."""

    def band(self, model: EpisodicMDP, width: Tensor) -> Band:
        """Values and the policy to return."""

    def certificate(self, model: EpisodicMDP, band: Band) -> Tensor:
        """Scalar: the most that the policy of `band` loses; the model stands for the truth in its expectations."""

    def explorers(self, band: Band) -> list[Tensor]:
        """Policies [H, S, A] to act with, an equal share of the episodes each."""


@dataclass(frozen=True, slots=True)
class Demonstrated:
    """UCBVI-Ent+: the policy stays near the clone, and for one step of an episode looks where it is most unsure."""

    clone: Tensor
    temperature: float

    def band(self, model: EpisodicMDP, width: Tensor) -> Band:
        near = KL(self.clone, self.temperature)
        high = _values(model, width, lambda h, q: _best(q, near.at(h)))
        return Band(high=high, low=_values(model, -width, lambda h, q: _best(q, near.at(h))), policy=near.choose(high))

    def certificate(self, model: EpisodicMDP, band: Band) -> Tensor:
        return squared_error_bound(model, band.policy, band.high - band.low, self.temperature)

    def explorers(self, band: Band) -> list[Tensor]:
        unsure = Free().choose(band.high - band.low)
        steps = torch.eye(len(unsure), dtype=torch.bool)
        return [torch.where(here[:, None, None], unsure, band.policy) for here in steps]


@dataclass(frozen=True, slots=True)
class Undemonstrated:
    """UCBVI, no demonstrations and no regulariser: acts greedily for `high`; `low` is what that policy is worth at least."""

    def band(self, model: EpisodicMDP, width: Tensor) -> Band:
        high = _values(model, width, lambda h, q: q.amax(-1))
        policy = Free().choose(high)
        return Band(high=high, low=_values(model, -width, lambda h, q: (policy[h] * q).sum(-1)), policy=policy)

    def certificate(self, model: EpisodicMDP, band: Band) -> Tensor:
        return model.initial @ (band.policy * (band.high - band.low)).sum(-1)[0]

    def explorers(self, band: Band) -> list[Tensor]:
        return [band.policy]


def _values(model: EpisodicMDP, width: Tensor, worth: Callable[[int, Tensor], Tensor]) -> Tensor:
    """[H, S, A]: Q_h = clip(r_h + width_h + P_h V_{h+1}, 0, H - h) and V_h = worth(h, Q_h), from the end."""
    q, v = torch.empty_like(width), torch.zeros_like(model.initial)
    for h in reversed(range(model.horizon)):
        q[h] = (model.backup(h, v) + width[h]).clamp(0, model.horizon - h)
        v = worth(h, q[h])
    return q


def _best(q: Tensor, near: KL) -> Tensor:
    """[S]: max_pi sum_a pi q - lam KL(pi || clone) = lam log sum_a clone exp(q / lam)."""
    return near.temperature * (near.reference.log() + q / near.temperature).logsumexp(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """The `band` when it stopped (its `policy` is the result), after `episodes`; `certificate`: what it may lose."""

    band: Band
    episodes: int
    certificate: float


def explore(
    mdp: EpisodicMDP,
    planner: Planner,
    epsilon: float,
    generator: np.random.Generator,
    *,
    bonus: float = 0.25,
    limit: int = 4_000_000,
) -> Exploration:
    """Act until the certificate says that the policy loses at most `epsilon`, or for about `limit` episodes.

    Rewards in [0, 1], each the same whenever it is seen. width_h = bonus (H - 1 - h) / sqrt(n_h), everything before the
    first visit. Plans anew after a sixteenth more episodes. Departs from the paper: no logarithms in the bonus (below
    what the proof asks for), and its exploration rule is reconstructed from why the rate 1 / (lam epsilon) holds.
    """
    counts, episodes = Counts.none(mdp), 0
    scale = bonus * torch.arange(mdp.horizon - 1, -1, -1, dtype=torch.float64)[:, None, None]
    while True:
        n, model = counts.visits, counts.model(mdp.initial)
        band = planner.band(model, torch.where(n > 0, scale / n.clamp(min=1).sqrt(), float(mdp.horizon)))
        certificate = float(planner.certificate(model, band))
        if certificate <= epsilon or episodes >= limit:
            return Exploration(band=band, episodes=episodes, certificate=certificate)
        explorers = planner.explorers(band)
        each = max(1, episodes // (16 * len(explorers)))
        for policy in explorers:
            counts = counts.add(mdp.sample(policy, each, generator))
        episodes += each * len(explorers)
