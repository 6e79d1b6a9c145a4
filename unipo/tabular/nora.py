"""NORA: an actor-critic that explores like optimistic value iteration and re-plans rarely (Tan, Fan, Wei, 2505.03710).

    critic  f = optimistic estimate of Q*                  from all episodes so far, whoever acted: off-policy
    actor   pi <- pi exp(eta f) / Z                        every episode, f unchanged
    switch  f recomputed and pi <- uniform                 when the data have outgrown f: O(log T) times

The critic chases Q* and not Q^pi, so that old data stay right while the actor moves. With `offline` data to begin with it
is the hybrid algorithm; with enough of them optimism can be left out. [H] steps, [S] states, [A] actions, [T] episodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unipo.tabular.mdp import Counts, EpisodicMDP, Trajectories


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimism:
    """What is not known well is worth more: `bonus / sqrt(n)` after n visits, `unvisited` before the first.

    Values are clipped to `limits`, what an episode can return.
    """

    bonus: float = 0.5
    unvisited: float = 1.0
    limits: tuple[float, float] = (-1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Switching:
    """When to plan again, and what the actor keeps then.

    `growth`: a count has grown by this factor since the last switch, 0 to 1 included; 1 switches whenever there are data.
    `keep`: the share of the actor's logits that survives: 0 resets it to uniform, 1 does not reset.
    """

    growth: float = 2.0
    keep: float = 0.0

    def due(self, visits: Tensor, planned: Tensor) -> bool:
        return bool(((visits > planned) & (visits >= self.growth * planned)).any())


@dataclass(frozen=True, slots=True, kw_only=True)
class NoraRun:
    """`returns` [T] of the episodes; `switches`: the episodes before which it planned; the last `policy`, `critic` [H, S, A]."""

    returns: Tensor
    switches: tuple[int, ...]
    policy: Tensor
    critic: Tensor


def optimistic_critic(counts: Counts, optimism: Optimism = Optimism()) -> Tensor:
    """[H, S, A]: f_h = clip(r^ + bonus / sqrt(n) + P^ max_a f_{h+1}), from the end.

    Before clipping its excess loss is exactly bonus^2 for every visited pair: it is at the border of the confidence set
    F = {f: excess loss <= beta}, where the paper's argmax over F of max_a f_1(s_1, a) lies.
    """
    n, model = counts.visits, counts.model(torch.full_like(counts.moves[0, 0, 0], 1 / counts.moves.shape[-1]))
    f, v = torch.empty_like(n), torch.zeros_like(model.initial)
    for h in reversed(range(len(n))):
        seen = (model.backup(h, v) + optimism.bonus / n[h].sqrt()).clamp(*optimism.limits)
        f[h] = torch.where(n[h] > 0, seen, optimism.unvisited)
        v = f[h].amax(-1)
    return f


def bellman_loss(f: Tensor, following: Tensor, data: Trajectories) -> Tensor:
    """[H]: L_h(f_h, g_{h+1}) = sum over the data of (f_h(s, a) - r - max_a' g_{h+1}(s', a'))^2; f, g = `following` [H, S, A]."""
    h = torch.arange(len(f))
    target = data.reward + _best_next(following)[h, data.next_state]
    return (f[h, data.state, data.action] - target).square().sum(0)


def excess_loss(f: Tensor, counts: Counts) -> Tensor:
    """[H]: L_h(f_h, f_{h+1}) - min_g L_h(g, f_{h+1}) = sum_{s,a} n_h(s, a) (f_h(s, a) - mean target)^2."""
    model = counts.model(torch.full_like(f[0, :, 0], 1 / f.shape[1]))
    target = model.reward + torch.einsum("hsat,ht->hsa", model.transition, _best_next(f))
    return (counts.visits * (f - target).square()).sum((1, 2))


def _best_next(f: Tensor) -> Tensor:
    """[H, S]: max_a f_{h+1}, nothing after the end."""
    return torch.cat([f.amax(-1)[1:], torch.zeros_like(f[:1, :, 0])])


def optimistic_actor_critic(
    mdp: EpisodicMDP,
    episodes: int,
    generator: np.random.Generator,
    *,
    rate: float = 5.0,
    optimism: Optimism = Optimism(),
    switching: Switching = Switching(),
    offline: Trajectories | None = None,
) -> NoraRun:
    """`episodes` of optimistic actor-critic with rare switches.

    `rate` eta: between switches pi_k is proportional to exp(eta k f); large is greedy, optimistic value iteration. The
    proof's eta of order sqrt(log A / (H^2 T)) is far too small in practice. `offline`: episodes to begin with (NOAH).
    Departs from the paper: counts and a bonus in place of the confidence set, counts that double in place of its
    excess loss as the trigger. Raises ValueError for no episodes.
    """
    if episodes < 1:
        raise ValueError(f"expected at least 1 episode, found {episodes}")
    counts = Counts.none(mdp) if offline is None else Counts.none(mdp).add(offline)
    total, planned = torch.zeros_like(mdp.reward), torch.full_like(mdp.reward, -1.0)
    returns, switches = torch.zeros(episodes, dtype=torch.float64), []
    for t in range(episodes):
        visits = counts.visits
        if switching.due(visits, planned):
            critic, total, planned = optimistic_critic(counts, optimism), switching.keep * total, visits
            switches.append(t)
        total = total + critic
        policy = (rate * total).softmax(-1)
        data = mdp.sample(policy, 1, generator)
        counts, returns[t] = counts.add(data), data.reward.sum()
    return NoraRun(returns=returns, switches=tuple(switches), policy=policy, critic=critic)
