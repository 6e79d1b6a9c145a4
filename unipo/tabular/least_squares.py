"""Off-policy evaluation with a linear critic Q = x^T w: what realizability buys, and what it leaves open.

The data are (x, r, x'): features of a pair drawn from a law mu, its reward, and the features of the next state averaged
over the policy. All that the estimators see of them are three moments,

    S = E[x x^T]      C = E[x x'^T]      b = E[x r]      and      A = S - discount C.

If Q^pi = x^T w* (realizable), A w* = b whatever mu is. Least-squares temporal differences solve this; fitted Q evaluation
iterates w <- S^-1 (b + discount C w), which needs the class to be closed under the Bellman operator as well, or luck:
it converges iff the spectral radius of discount S^-1 C is below 1. Tensors are float64; [N] samples, [d] features,
[S] states, [A] actions. Source: Zanette (2022), arXiv 2211.05311; the finite-sample identities are derived here, and
`condition` stands for the paper's third factor without being it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.tabular.mdp import FiniteMDP


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """`gram` S [d, d], `cross` C [d, d], `reward` b [d] and the discount. S must be positive definite to whiten.

    >>> one = torch.ones(1, 1)
    >>> lstd(Moments(gram=one, cross=one, reward=torch.ones(1), discount=0.5))  # a loop that pays 1
    tensor([2.])
    """

    gram: Tensor
    cross: Tensor
    reward: Tensor
    discount: float

    @property
    def difference(self) -> Tensor:
        """A = E[x (x - discount x')^T]."""
        return self.gram - self.discount * self.cross


def next_features(features: Tensor, policy: Tensor) -> Tensor:
    """x' of a next state: sum_a pi(a|s') x(s', a): [S, A, d], [S, A] -> [S, d]."""
    return torch.einsum("sa,sad->sd", policy, features)


def population_moments(mdp: FiniteMDP, policy: Tensor, law: Tensor, features: Tensor) -> Moments:
    """What infinite data from `law` [S, A] (sums to one) would give; `policy` [S, A] is evaluated."""
    following = mdp.transition @ next_features(features, policy)
    return Moments(
        gram=torch.einsum("sa,sai,saj->ij", law, features, features),
        cross=torch.einsum("sa,sai,saj->ij", law, features, following),
        reward=torch.einsum("sa,sai,sa->i", law, features, mdp.reward),
        discount=mdp.discount,
    )


def sample_moments(x: Tensor, reward: Tensor, x_next: Tensor, discount: float) -> Moments:
    """Means over samples: `x`, `x_next` [N, d], `reward` [N]. A zero row of `x_next` ends an episode."""
    if x.shape != x_next.shape or x.shape[:1] != reward.shape:
        raise ValueError(
            f"expected x [N, d], reward [N], x_next [N, d], found {tuple(x.shape)}, {tuple(reward.shape)}, "
            f"{tuple(x_next.shape)}: one row per transition"
        )
    n = len(x)
    return Moments(gram=x.T @ x / n, cross=x.T @ x_next / n, reward=x.T @ reward / n, discount=discount)


def lstd(moments: Moments) -> Tensor:
    """The weights [d] of least-squares temporal differences, w = A^-1 b: the fixed point of fitted Q evaluation."""
    found: Tensor = torch.linalg.solve(moments.difference, moments.reward)
    return found


def fqe_step(moments: Moments, weights: Tensor) -> Tensor:
    """One iteration of fitted Q evaluation: the regression of r + discount x'^T w on x, S^-1 (b + discount C w)."""
    target = moments.reward + moments.discount * moments.cross @ weights
    found: Tensor = torch.linalg.solve(moments.gram, target)
    return found


def fqe_factor(moments: Moments) -> float:
    """Spectral radius of discount S^-1 C: fitted Q evaluation converges from everywhere iff it is below 1."""
    growth = torch.linalg.eigvals(moments.discount * torch.linalg.solve(moments.gram, moments.cross))
    return float(growth.abs().max())


def condition(moments: Moments) -> float:
    """kappa = 1 / sigma_min(S^-1/2 A S^-1/2): how much of the noise of the data reaches the estimate.

    At most 1 / (1 - discount) where mu is stationary for the policy, 1 / (1 - sqrt(discount)) where it is its discounted
    occupancy; unbounded elsewhere. Infinite where A is singular.
    """
    half = _power(moments.gram, -0.5)
    return float(1 / torch.linalg.svdvals(half @ moments.difference @ half).min())


def residual(moments: Moments, weights: Tensor) -> Tensor:
    """|S^-1/2 (A w - b)|^2, a scalar: the squared projected Bellman error, 0 at `lstd`."""
    return (_power(moments.gram, -0.5) @ (moments.difference @ weights - moments.reward)).square().sum()


def minimax_loss(x: Tensor, reward: Tensor, x_next: Tensor, weights: Tensor, discount: float) -> Tensor:
    """mean (Q - y)^2 - min_g mean (g - y)^2 with y = r + discount Q', g in the same class: `residual` on these samples."""
    target = reward + discount * x_next @ weights
    best = torch.linalg.lstsq(x, target[:, None]).solution[:, 0]
    return (x @ weights - target).square().mean() - (x @ best - target).square().mean()


def distance(gram: Tensor, weights: Tensor, other: Tensor) -> Tensor:
    """|S^1/2 (w - w')|: the root mean square of the difference of two critics under mu."""
    return ((weights - other) @ gram @ (weights - other)).clamp(min=0).sqrt()


def target_noise(mdp: FiniteMDP, policy: Tensor, law: Tensor) -> float:
    """sigma: standard deviation under mu of delta = r + discount V(s') - Q(s, a), which has mean 0 at every pair.

    With it the error of `lstd` on n samples is about kappa sigma sqrt(d / n).
    """
    v = mdp.evaluate(policy).v
    variance = mdp.transition @ v.square() - (mdp.transition @ v).square()
    return mdp.discount * float((law * variance).sum().clamp(min=0).sqrt())


def realizable(mdp: FiniteMDP, policy: Tensor, features: Tensor, weights: Tensor) -> FiniteMDP:
    """The process with rewards such that Q^pi = x^T w: r = x^T w - discount P V."""
    q = features @ weights
    reward = q - mdp.discount * mdp.transition @ (policy * q).sum(1)
    return FiniteMDP(transition=mdp.transition, reward=reward, initial=mdp.initial, discount=mdp.discount)


def two_state_chain(discount: float = 0.9) -> tuple[FiniteMDP, Tensor]:
    """Features 1 and 2, both states lead to the second, Q = 3 x: a realizable class with no Bellman completeness.

    Returns the process and its features [2, 1, 1]. Data mostly of the first state make fitted Q evaluation diverge.
    Source: after Tsitsiklis & Van Roy (1997).
    """
    features = torch.tensor([[[1.0]], [[2.0]]], dtype=torch.float64)
    transition = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])
    chain = FiniteMDP(
        transition=transition, reward=torch.zeros(2, 1), initial=torch.tensor([1.0, 0.0]), discount=discount
    )
    alone = torch.ones(2, 1, dtype=torch.float64)
    return realizable(chain, alone, features, torch.tensor([3.0], dtype=torch.float64)), features


def _power(gram: Tensor, exponent: float) -> Tensor:
    """S^p of a symmetric positive definite S; raise ValueError where it is not."""
    values, vectors = torch.linalg.eigh(gram)
    if not bool(values.min() > 0):
        raise ValueError(
            f"expected features that are linearly independent under the data, found a smallest eigenvalue of "
            f"{float(values.min()):.2g}: drop redundant features or add data"
        )
    return vectors * values.pow(exponent) @ vectors.T
