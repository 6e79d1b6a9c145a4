"""Decision processes small enough to enumerate: exact values, optima, occupancies, and samples to compare them with.

Two kinds, with the same verbs: `FiniteMDP` runs for ever under a discount, `EpisodicMDP` for a fixed number of steps,
each with its own transition. Tensors are float64; [S] states, [A] actions, [H] steps of an episode, [E] episodes.
A policy is a table of probabilities, [S, A] or [H, S, A]; exact results are differentiable in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Regulariser(Protocol):
    """What a policy pays for its shape in a state: values are V = sum_a pi Q - cost(pi)."""

    def choose(self, q: Tensor) -> Tensor:
        """The policy [..., S, A] that maximises sum_a pi Q - cost(pi) for action values q [..., S, A]."""

    def cost(self, policy: Tensor) -> Tensor:
        """What each state pays, [..., S]."""

    def at(self, step: int) -> Regulariser:
        """The regulariser of one step of an episode."""


@dataclass(frozen=True, slots=True)
class Free:
    """No cost: the greedy policy, the first of equals."""

    def choose(self, q: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(q.argmax(-1), q.shape[-1]).to(q.dtype)

    def cost(self, policy: Tensor) -> Tensor:
        return torch.zeros_like(policy[..., 0])

    def at(self, step: int) -> Free:
        return self


@dataclass(frozen=True, slots=True)
class KL:
    """temperature * KL(pi(.|s) || reference(.|s)): the maximiser is reference * exp(Q / temperature) / Z.

    `reference`: [S, A], or [H, S, A] in an `EpisodicMDP`, positive. It need not sum to one: a reference of ones makes the
    cost the negative entropy, temperature * sum_a pi log pi.
    """

    reference: Tensor
    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not bool((self.reference > 0).all()):
            raise ValueError(
                f"expected temperature > 0 and a positive reference, found {self.temperature} and a smallest entry of "
                f"{float(self.reference.min())}: take Free() for no regulariser, add-one smoothing for counts"
            )

    def choose(self, q: Tensor) -> Tensor:
        return (self.reference.log() + q / self.temperature).softmax(-1)

    def cost(self, policy: Tensor) -> Tensor:
        return self.temperature * (torch.xlogy(policy, policy) - policy * self.reference.log()).sum(-1)

    def at(self, step: int) -> KL:
        return KL(self.reference[step], self.temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A policy with what it is worth. All three of an `EpisodicMDP` have a leading [H].

    `q`: [S, A] value of an action, then the policy. `v`: [S] value of a state, the regulariser's cost taken off.
    `policy`: [S, A].
    """

    q: Tensor
    v: Tensor
    policy: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Sampled episodes, all [E, H]: `state`, `action`, `next_state` int64, `reward` float64."""

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FiniteMDP:
    """Runs for ever. `transition` [S, A, S], `reward` [S, A] (its mean), `initial` [S], `discount` in [0, 1).

    >>> loop = FiniteMDP(transition=torch.ones(1, 1, 1), reward=torch.ones(1, 1), initial=torch.ones(1), discount=0.5)
    >>> loop.optimal().v
    tensor([2.], dtype=torch.float64)
    """

    transition: Tensor
    reward: Tensor
    initial: Tensor
    discount: float

    def __post_init__(self) -> None:
        _prepare(self, self.reward.shape[-2:])
        if not 0 <= self.discount < 1:
            raise ValueError(f"expected a discount in [0, 1), found {self.discount}: without one take an EpisodicMDP")

    @property
    def states(self) -> int:
        return self.reward.shape[0]

    @property
    def actions(self) -> int:
        return self.reward.shape[1]

    def backup(self, v: Tensor) -> Tensor:
        """[S] -> [S, A]: Q = r + discount * P v."""
        return self.reward + self.discount * self.transition @ v

    def evaluate(self, policy: Tensor, regulariser: Regulariser = Free()) -> Values:
        """V = (I - discount P_pi)^-1 (r_pi - cost(pi)), solved exactly."""
        moves = torch.einsum("sa,sat->st", policy, self.transition)
        paid = (policy * self.reward).sum(1) - regulariser.cost(policy)
        v: Tensor = torch.linalg.solve(_identity(self.states) - self.discount * moves, paid)
        return Values(q=self.backup(v), v=v, policy=policy)

    def optimal(self, regulariser: Regulariser = Free(), tolerance: float = 1e-12) -> Values:
        """Policy iteration, which is Newton's method on V = max_pi sum_a pi Q - cost(pi).

        Stops when no state improves by more than `tolerance` of the largest value.
        """
        found = self.evaluate(torch.full_like(self.reward, 1 / self.actions), regulariser)
        while True:
            better = self.evaluate(regulariser.choose(found.q), regulariser)
            if bool((better.v - found.v).max() <= tolerance * (1 + found.v.abs().max())):
                return better
            found = better

    def occupancy(self, policy: Tensor) -> Tensor:
        """[S, A], sums to one: (1 - discount) sum_t discount^t P(s_t = s, a_t = a)."""
        moves = torch.einsum("sa,sat->st", policy, self.transition)
        visits = torch.linalg.solve((_identity(self.states) - self.discount * moves).T, self.initial)
        return (1 - self.discount) * visits[:, None] * policy

    def expected_return(self, policy: Tensor, regulariser: Regulariser = Free()) -> Tensor:
        """Scalar: the value of `policy` from the initial distribution."""
        return self.initial @ self.evaluate(policy, regulariser).v

    def first(self, horizon: int) -> EpisodicMDP:
        """Its first `horizon` steps, undiscounted: what `sample` shows."""
        every = (horizon, -1, -1)
        return EpisodicMDP(
            transition=self.transition.expand(*every, -1), reward=self.reward.expand(every), initial=self.initial
        )

    def sample(self, policy: Tensor, episodes: int, horizon: int, generator: np.random.Generator) -> Trajectories:
        """The first `horizon` steps of `episodes` runs; rewards are not discounted."""
        return self.first(horizon).sample(policy.expand(horizon, -1, -1), episodes, generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodicMDP:
    """Runs for H steps, undiscounted. `transition` [H, S, A, S], `reward` [H, S, A] (its mean), `initial` [S].

    The last transition leads out of the episode; nothing is worth anything there.
    """

    transition: Tensor
    reward: Tensor
    initial: Tensor

    def __post_init__(self) -> None:
        _prepare(self, self.reward.shape)

    @property
    def horizon(self) -> int:
        return self.reward.shape[0]

    @property
    def states(self) -> int:
        return self.reward.shape[1]

    @property
    def actions(self) -> int:
        return self.reward.shape[2]

    def backup(self, step: int, v: Tensor) -> Tensor:
        """[S] -> [S, A]: Q_h = r_h + P_h v, v the value of the states of step h + 1."""
        return self.reward[step] + self.transition[step] @ v

    def evaluate(self, policy: Tensor, regulariser: Regulariser = Free()) -> Values:
        """Backward from the end: V_h = sum_a pi_h Q_h - cost(pi_h)."""
        q, v = [], [torch.zeros_like(self.initial)]
        for step in reversed(range(self.horizon)):
            q.append(self.backup(step, v[-1]))
            v.append((policy[step] * q[-1]).sum(1) - regulariser.at(step).cost(policy[step]))
        return Values(q=torch.stack(q[::-1]), v=torch.stack(v[:0:-1]), policy=policy)

    def optimal(self, regulariser: Regulariser = Free()) -> Values:
        """Backward from the end: pi_h maximises sum_a pi_h Q_h - cost(pi_h)."""
        policy, v = [], torch.zeros_like(self.initial)
        for step in reversed(range(self.horizon)):
            q, here = self.backup(step, v), regulariser.at(step)
            policy.append(here.choose(q))
            v = (policy[-1] * q).sum(1) - here.cost(policy[-1])
        return self.evaluate(torch.stack(policy[::-1]), regulariser)

    def occupancy(self, policy: Tensor) -> Tensor:
        """[H, S, A], each step sums to one: P(s_h = s, a_h = a)."""
        visits, state = [], self.initial
        for step in range(self.horizon):
            visits.append(state[:, None] * policy[step])
            state = torch.einsum("sa,sat->t", visits[-1], self.transition[step])
        return torch.stack(visits)

    def expected_return(self, policy: Tensor, regulariser: Regulariser = Free()) -> Tensor:
        """Scalar: the value of `policy` from the initial distribution."""
        return self.initial @ self.evaluate(policy, regulariser).v[0]

    def sample(self, policy: Tensor, episodes: int, generator: np.random.Generator) -> Trajectories:
        """`episodes` runs of `policy`; the reward of a step is its mean."""
        acts, moves = policy.cumsum(-1), self.transition.cumsum(-1)
        state = _draw(self.initial.cumsum(0).expand(episodes, -1), generator)
        steps: list[tuple[Tensor, ...]] = []
        for step in range(self.horizon):
            action = _draw(acts[step][state], generator)
            following = _draw(moves[step][state, action], generator)
            steps.append((state, action, self.reward[step][state, action], following))
            state = following
        names = ("state", "action", "reward", "next_state")
        return Trajectories(**{n: torch.stack(c, 1) for n, c in zip(names, zip(*steps, strict=True), strict=True)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was seen of an `EpisodicMDP`: `moves` [H, S, A, S] how often, `reward` [H, S, A] the sum of what was paid."""

    moves: Tensor
    reward: Tensor

    @classmethod
    def none(cls, mdp: EpisodicMDP) -> Counts:
        """Nothing seen yet."""
        return cls(moves=torch.zeros_like(mdp.transition), reward=torch.zeros_like(mdp.reward))

    @property
    def visits(self) -> Tensor:
        """[H, S, A]"""
        return self.moves.sum(-1)

    def add(self, data: Trajectories) -> Counts:
        """These and the steps of `data`."""
        where = (torch.arange(data.state.shape[1]).expand_as(data.state), data.state, data.action)
        seen = torch.ones_like(data.reward)
        return Counts(
            moves=self.moves.index_put((*where, data.next_state), seen, accumulate=True),
            reward=self.reward.index_put(where, data.reward, accumulate=True),
        )

    def model(self, initial: Tensor) -> EpisodicMDP:
        """Observed frequencies and mean rewards. An action never tried pays 0 and leads anywhere alike."""
        n = self.visits
        transition = torch.where(n[..., None] > 0, self.moves / n.clamp(min=1)[..., None], 1 / self.moves.shape[-1])
        return EpisodicMDP(transition=transition, reward=self.reward / n.clamp(min=1), initial=initial)


def _draw(edges: Tensor, generator: np.random.Generator) -> Tensor:
    """One index per row of cumulative probabilities [E, n], by inverting them."""
    u, edges = torch.from_numpy(generator.random(len(edges))), edges.contiguous()
    return torch.searchsorted(edges, u[:, None] * edges[:, -1:], right=True)[:, 0].clamp(max=edges.shape[1] - 1)


def _identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def _prepare(mdp: FiniteMDP | EpisodicMDP, shape: torch.Size) -> None:
    """Tensors to float64; raise ValueError where shapes disagree or probabilities do not sum to one."""
    for name in ("transition", "reward", "initial"):
        object.__setattr__(mdp, name, getattr(mdp, name).to(torch.float64))
    states = shape[-2]
    if mdp.reward.shape != shape or mdp.transition.shape != (*shape, states) or mdp.initial.shape != (states,):
        raise ValueError(
            f"expected transition [..., S, A, S], reward [..., S, A] and initial [S], found {tuple(mdp.transition.shape)}, "
            f"{tuple(mdp.reward.shape)}, {tuple(mdp.initial.shape)}"
        )
    for name, p in (("transition", mdp.transition), ("initial", mdp.initial)):
        if not bool((p >= 0).all()) or not torch.allclose(p.sum(-1), torch.ones((), dtype=p.dtype)):
            raise ValueError(f"expected the probabilities of {name} to be >= 0 and sum to 1 over its last dimension")


def random_mdp(states: int, actions: int, seed: int, discount: float = 0.9) -> FiniteMDP:
    """Next states uniform on the simplex, rewards uniform in [0, 1], the first state uniform."""
    drawn = np.random.default_rng((seed, states, actions))
    return FiniteMDP(
        transition=torch.from_numpy(drawn.dirichlet(np.ones(states), (states, actions))),
        reward=torch.from_numpy(drawn.random((states, actions))),
        initial=torch.full((states,), 1 / states, dtype=torch.float64),
        discount=discount,
    )


def random_episodic_mdp(states: int, actions: int, horizon: int, seed: int) -> EpisodicMDP:
    """As `random_mdp`, with another transition and reward at every step."""
    drawn = np.random.default_rng((seed, states, actions, horizon))
    return EpisodicMDP(
        transition=torch.from_numpy(drawn.dirichlet(np.ones(states), (horizon, states, actions))),
        reward=torch.from_numpy(drawn.random((horizon, states, actions))),
        initial=torch.full((states,), 1 / states, dtype=torch.float64),
    )


def deep_sea(size: int, seed: int, cost: float = 0.01) -> EpisodicMDP:
    """A diver starts at the left and sinks one row per step; only going right at all `size` steps pays.

    State: the column. Right costs `cost / size`, and pays 1 from the last column of the last row, so the best return is
    1 - cost; left is free. Which of the two actions is right is a coin per cell. A uniform policy succeeds with
    probability 2^-size. Source: Osband et al. (2019), bsuite, arXiv 1908.03568.
    """
    right = torch.from_numpy(np.random.default_rng((seed, size)).integers(2, size=(size, size)))
    column, step = torch.arange(size), torch.arange(size)[:, None]
    transition = torch.zeros(size, size, 2, size, dtype=torch.float64)
    transition[step, column, 1 - right, (column - 1).clamp(min=0)] = 1
    transition[step, column, right, (column + 1).clamp(max=size - 1)] = 1
    reward = torch.zeros(size, size, 2, dtype=torch.float64)
    reward[step, column, right] = -cost / size
    reward[-1, -1, right[-1, -1]] += 1
    initial = torch.zeros(size, dtype=torch.float64)
    initial[0] = 1
    return EpisodicMDP(transition=transition, reward=reward, initial=initial)
