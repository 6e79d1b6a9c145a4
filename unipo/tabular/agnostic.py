"""Policy search in a finite class that need not hold the optimum: what must be sampled is what the class can reach.

A class Pi is an int64 table [P, H, S]: policy p takes action `policies[p, h, s]` in state s at step h. Its spanning
capacity C(Pi) is the most (state, action) pairs of one step that its members reach together in any deterministic
process from one fixed start; at most min(P, S A, A^(h+1)) at step h = 0, 1, .... Every algorithm here looks at returns
only: no value function is assumed to be representable. Returns are undiscounted, over the H steps of an `EpisodicMDP`.
Source: Li (2025), "Agnostic Reinforcement Learning", arXiv 2506.01884, and the works it collects (trajectory trees:
Kearns, Mansour & Ng, 1999; PSDP: Bagnell et al., 2003; CPI: Kakade & Langford, 2002).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from unipo.tabular.mdp import EpisodicMDP, Trajectories

Draw = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(step, tree [n], state [n], action [n]) -> next state [n], asked once for each (tree, step, state, action)."""


def tables(policies: Tensor, actions: int) -> Tensor:
    """The class as probabilities: [P, H, S] -> [P, H, S, A] float64."""
    return torch.nn.functional.one_hot(policies, actions).to(torch.float64)


# ---- how large a class is --------------------------------------------------------------------------------------------
def reachable(next_state: Tensor, policies: Tensor, actions: int, start: int = 0) -> Tensor:
    """[H, S, A] bool: pairs that some member reaches where `next_state` [H, S, A] int64 is deterministic."""
    _, horizon, states = policies.shape
    met = torch.zeros(horizon, states, actions, dtype=torch.bool)
    state = torch.full((len(policies),), start)
    for step in range(horizon):
        action = policies[:, step].gather(1, state[:, None])[:, 0]
        met[step, state, action] = True
        state = next_state[step, state, action]
    return met


def spanning_capacity(policies: Tensor, start: int = 0) -> int:
    """C(Pi), exactly, by trying every deterministic process that tells members apart differently.

    Where a step is reached by groups of members that acted differently before, a process sends each group to a state;
    all ways are tried. Takes up to S^(S A) steps of work: for toys.
    """
    _, horizon, states = policies.shape
    table = policies.tolist()

    @cache
    def widest(step: int, groups: frozenset[frozenset[int]], places: range) -> int:
        most = 0
        for chosen in product(places, repeat=len(groups)):
            pairs = defaultdict(set)
            for state, group in zip(chosen, groups, strict=True):
                for p in group:
                    pairs[state, table[p][step][state]].add(p)
            after = frozenset(map(frozenset, pairs.values()))
            deeper = widest(step + 1, after, range(states)) if step + 1 < horizon else 0
            most = max(most, len(pairs), deeper)
        return most

    return widest(0, frozenset([frozenset(range(len(table)))]), range(start, start + 1))


def coverability(mdp: EpisodicMDP, policies: Tensor) -> Tensor:
    """[H]: sum over (s, a) of the largest probability that a member has of being there; at most C(Pi) from a fixed start.

    In a deterministic process it counts the `reachable` pairs.
    """
    visits = torch.stack([mdp.occupancy(policy) for policy in tables(policies, mdp.actions)])
    return visits.amax(0).sum((1, 2))


# ---- evaluating all members at once ----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class TreeReturns:
    """`returns` [trees, P]: of every member in every tree; `calls`: samples that were asked for, in all trees."""

    returns: Tensor
    calls: int

    @property
    def values(self) -> Tensor:
        """V^ [P], unbiased for every member at once."""
        return self.returns.mean(0)


def generative(mdp: EpisodicMDP, generator: np.random.Generator) -> Draw:
    """Samples of the next state, from any pair: access to a simulator that can be set to any state."""

    def draw(step: int, tree: Tensor, state: Tensor, action: Tensor) -> Tensor:
        edges = mdp.transition[step][state, action].cumsum(1)
        u = torch.from_numpy(generator.random(len(state)))[:, None] * edges[:, -1:]
        return torch.searchsorted(edges, u, right=True)[:, 0].clamp(max=mdp.states - 1)

    return draw


def trajectory_trees(mdp: EpisodicMDP, policies: Tensor, draw: Draw, trees: int, start: int = 0) -> TreeReturns:
    """Return of every member in `trees` random deterministic processes, drawn only where members go.

    A tree samples one next state for each (step, state, action) that some member reaches, and all members that get there
    share it: at most H C(Pi) calls per tree, however many states there are. With returns in [0, 1] and
    n >= log(2 P / delta) / (2 e^2) trees every value is within e, so the best of the estimates is 2 e - optimal.
    """
    states, actions = mdp.states, mdp.actions
    tree = torch.arange(trees)[:, None].expand(-1, len(policies))
    state, returns, calls = torch.full_like(tree, start), torch.zeros(tree.shape, dtype=torch.float64), 0
    for step in range(mdp.horizon):
        action = policies[:, step].T[state, torch.arange(len(policies))]
        returns = returns + mdp.reward[step][state, action]
        pairs, member = torch.unique((tree * states + state) * actions + action, return_inverse=True)
        place = pairs // actions
        state = draw(step, place // states, place % states, pairs % actions)[member]
        calls += len(pairs)
    return TreeReturns(returns=returns, calls=calls)


def importance_values(seen: Trajectories, policies: Tensor, actions: int) -> Tensor:
    """V^ [P] from uniformly acting episodes: mean of A^H 1{all H actions agree with the member} return.

    Needs no simulator and is unbiased, with a variance that grows as A^H: one step is inverse propensity scoring.
    """
    steps = torch.arange(seen.state.shape[1])
    agrees = (policies[:, steps, seen.state] == seen.action).all(2)
    weight = actions ** len(steps) * agrees.to(torch.float64)
    return (weight * seen.reward.sum(1)).mean(1)


def hoeffding(members: int, trees: int, delta: float) -> float:
    """e with |V^ - V| <= e for all members of returns in [0, 1] at once, with probability 1 - delta."""
    return math.sqrt(math.log(2 * members / delta) / (2 * trees))


# ---- searching with resets -------------------------------------------------------------------------------------------
def agreement(law: Tensor, q: Tensor, policies: Tensor) -> Tensor:
    """[P]: E over s ~ `law` [S] and a uniform of A 1{a = pi(s)} Q(s, a), which is sum_s law(s) Q(s, pi(s)).

    `policies` [P, S] of one step.
    """
    return tables(policies, q.shape[1]).mul(law[:, None] * q).sum((1, 2))


def psdp(mdp: EpisodicMDP, policies: Tensor, law: Tensor) -> Tensor:
    """Policy search by dynamic programming, at expectation: [H, S] int64, each step chosen from the class.

    From the last step back, pi_h = argmax over `policies` [P, H, S] of `agreement` under `law` [H, S], where Q is the
    value of an action followed by the steps already chosen. A state with law 0 gets an arbitrary action.
    """
    chosen, v = [], torch.zeros(mdp.states, dtype=torch.float64)
    for step in reversed(range(mdp.horizon)):
        q = mdp.backup(step, v)
        best = policies[agreement(law[step], q, policies[:, step]).argmax(), step]
        chosen.append(best)
        v = q.gather(1, best[:, None])[:, 0]
    return torch.stack(chosen[::-1])


def cpi_gains(mdp: EpisodicMDP, policies: Tensor, policy: Tensor) -> Tensor:
    """[P]: d/d alpha of the return of (1 - alpha) pi + alpha pi' at 0, the advantage of each member under pi's states.

    `policy` [H, S, A] probabilities.
    """
    values, visits = mdp.evaluate(policy), mdp.occupancy(policy).sum(2)
    better = torch.einsum("phsa,hsa->phs", tables(policies, mdp.actions), values.q) - values.v
    return (visits * better).sum((1, 2))


def cpi(mdp: EpisodicMDP, policies: Tensor, policy: Tensor, rate: float, iterations: int) -> Tensor:
    """Conservative policy iteration, at expectation: pi <- (1 - alpha) pi + alpha pi', pi' the member of largest gain.

    Stops where no member gains. `policy` [H, S, A] to start from, `rate` alpha in (0, 1].
    """
    for _ in range(iterations):
        gains = cpi_gains(mdp, policies, policy)
        if float(gains.max()) <= 0:
            break
        policy = (1 - rate) * policy + rate * tables(policies[gains.argmax()], mdp.actions)
    return policy
