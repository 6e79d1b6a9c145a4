"""Fewer actions by grouping: what is lost by treating a group as one action, and what it saves (Li, Ju, Shroff, 2306.12981).

    P(.|s, a) = (1 - bP) P1(.|s, h(a)) + bP P2(.|s, a)              rewards alike, with br
    lifted    one action per group h; inside it a given law draws a
    loss      V* - V^pi = approximation, less with finer groups + estimation, more with finer groups

[S] states, [A] actions, [G] groups. A grouping is the group of every action, [A] int64, all of 0 .. G-1 taken; a law is
[S, A] and sums to one inside each group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unipo.tabular.mdp import FiniteMDP


@dataclass(frozen=True, slots=True)
class Grouping:
    """`group` [A] int64 of every action, and the `law` [S, A] that plays inside a group.

    >>> Grouping.uniform(torch.tensor([0, 0, 1]), states=1).law
    tensor([[0.5000, 0.5000, 1.0000]], dtype=torch.float64)
    """

    group: Tensor
    law: Tensor

    def __post_init__(self) -> None:
        sizes = torch.bincount(self.group)
        mass = self.law @ self.members
        if not bool((sizes > 0).all()) or not torch.allclose(mass, torch.ones_like(mass)):
            raise ValueError(
                f"expected groups 0 .. G-1 that all have actions, and a law that sums to 1 inside each; found sizes "
                f"{sizes.tolist()} and sums between {float(mass.min()):.3g} and {float(mass.max()):.3g}"
            )

    @classmethod
    def uniform(cls, group: Tensor, states: int) -> Grouping:
        """The law that plays all actions of a group alike."""
        return cls(group, (1 / torch.bincount(group).double())[group].expand(states, -1))

    @classmethod
    def even(cls, actions: int, groups: int, states: int) -> Grouping:
        """`groups` runs of neighbouring actions of as equal a size as there is; nested where the numbers divide."""
        return cls.uniform(torch.arange(actions) * groups // actions, states)

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1

    @property
    def members(self) -> Tensor:
        """[A, G] one-hot."""
        return torch.nn.functional.one_hot(self.group).double()

    def lift(self, x: Tensor) -> Tensor:
        """[S, A, ...] -> [S, G, ...]: the mean over a group under its law."""
        return torch.einsum("ag,sa,sa...->sg...", self.members, self.law, x)

    def unlift(self, policy: Tensor) -> Tensor:
        """[S, G] -> [S, A]: choose a group, then an action by the law."""
        return policy[:, self.group] * self.law


def lifted(mdp: FiniteMDP, grouping: Grouping) -> FiniteMDP:
    """The decision process whose actions are the groups."""
    return FiniteMDP(
        transition=grouping.lift(mdp.transition),
        reward=grouping.lift(mdp.reward),
        initial=mdp.initial,
        discount=mdp.discount,
    )


Pay = Callable[[np.ndarray, Tensor, np.random.Generator], Tensor]
"""(draws [S, A], mean rewards [S, A], generator) -> [S, A] sum of the rewards drawn."""


def bernoulli(draws: np.ndarray, mean: Tensor, generator: np.random.Generator) -> Tensor:
    """Every draw pays 1 with probability `mean`, else 0. Raises ValueError for a mean outside [0, 1]."""
    if not bool(((mean >= 0) & (mean <= 1)).all()):
        low, high = float(mean.min()), float(mean.max())
        raise ValueError(f"expected rewards in [0, 1], found {low:.3g} to {high:.3g}: rescale them, or pay them `sure`")
    return torch.from_numpy(generator.binomial(draws, mean.numpy())).double()


def sure(draws: np.ndarray, mean: Tensor, generator: np.random.Generator) -> Tensor:
    """Every draw pays the mean: one is enough to know it."""
    return torch.from_numpy(draws) * mean


def sampled_lifted(
    mdp: FiniteMDP, grouping: Grouping, samples: int, generator: np.random.Generator, pay: Pay = bernoulli
) -> FiniteMDP:
    """The lifted process as `samples // (S * G)` draws per state and group show it, at least one.

    A draw: an action by the law, its reward as `pay` says, its next state.
    """
    each = max(1, samples // (mdp.states * grouping.groups))
    chances = grouping.members.T * grouping.law[:, None]
    tried = generator.multinomial(each, chances.numpy()).sum(1)
    reached = torch.from_numpy(generator.multinomial(tried, mdp.transition.numpy())).double()
    members = grouping.members / each
    return FiniteMDP(
        transition=torch.einsum("sat,ag->sgt", reached, members),
        reward=pay(tried, mdp.reward, generator) @ members,
        initial=mdp.initial,
        discount=mdp.discount,
    )


def grouped_policy(
    mdp: FiniteMDP, grouping: Grouping, samples: int, generator: np.random.Generator, pay: Pay = bernoulli
) -> Tensor:
    """[S, A]: the best choice of groups in the sampled lifted process, played by the law that was sampled."""
    return grouping.unlift(sampled_lifted(mdp, grouping, samples, generator, pay).optimal().policy)


def performance_loss(mdp: FiniteMDP, policy: Tensor) -> float:
    """max_s V*(s) - V^policy(s)."""
    return float((mdp.optimal().v - mdp.evaluate(policy).v).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """How unlike the actions of a group are at most: `reward` |r(s,a) - r(s,b)|, `transition` total variation (L1 / 2)."""

    reward: float
    transition: float

    def approximation(self, discount: float) -> float:
        """Bounds the loss with the exact lifted process: (br + discount bP / (1 - discount)) / (1 - discount).

        For rewards in [0, 1], so that values span at most 1 / (1 - discount). Attained at bP = 0 by a law that always
        plays the worse of two.
        """
        return (self.reward + discount * self.transition / (1 - discount)) / (1 - discount)


def estimation_error(groups: int, states: int, samples: int, discount: float, deviations: float = 1.0) -> float:
    """What sampling adds: 2 deviations (1 + discount V) sqrt(S G / 4 N) / (1 - discount), V = 1 / (1 - discount).

    A reward or value that spans a range has a standard deviation of at most half of it; `deviations` of them are
    allowed for at each of the N / (S G) draws, twice as the chosen group may be over- and the best one underestimated.
    """
    span = 1 + discount / (1 - discount)
    return 2 * deviations * span * (states * groups / (4 * samples)) ** 0.5 / (1 - discount)


def choose_groups(
    levels: Sequence[tuple[int, Similarity]], states: int, samples: int, discount: float, deviations: float = 1.0
) -> int:
    """The number of groups with the least approximation + estimation.

    `levels`: (groups, similarity inside them) of a nested family. The cost is the number of levels, not of actions. A
    reconstruction: the paper's own objective and search were not at hand.
    """

    def total(level: tuple[int, Similarity]) -> float:
        groups, similarity = level
        return similarity.approximation(discount) + estimation_error(groups, states, samples, discount, deviations)

    return min(levels, key=total)[0]


def clustered_mdp(
    states: int, actions: int, clusters: int, difference: float, seed: int, discount: float = 0.9
) -> FiniteMDP:
    """Actions in `clusters` runs of neighbours that share a share 1 - `difference` of transition and reward (bP = br).

    All parts are drawn as in `random_mdp`.
    """
    drawn = np.random.default_rng((seed, states, actions, clusters))
    cluster = np.arange(actions) * clusters // actions
    transition = drawn.dirichlet(np.ones(states), (states, clusters))[:, cluster]
    reward = drawn.random((states, clusters))[:, cluster]
    own = drawn.dirichlet(np.ones(states), (states, actions)), drawn.random((states, actions))
    return FiniteMDP(
        transition=torch.from_numpy((1 - difference) * transition + difference * own[0]),
        reward=torch.from_numpy((1 - difference) * reward + difference * own[1]),
        initial=torch.full((states,), 1 / states, dtype=torch.float64),
        discount=discount,
    )
