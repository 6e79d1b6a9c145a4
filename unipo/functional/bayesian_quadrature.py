"""The policy gradient as an integral that a Gaussian process estimates: a posterior mean and covariance, not an average.

Rows u_i = grad log Pr(sample i) are `scores` U [M, n] (M trajectories or state-action pairs, n parameters), G = E[u u^T]
is the `fisher` matrix [n, n], and the Fisher kernel is k(i, j) = u_i^T G^-1 u_j. What is given a prior differs:

    Model 1   the integrand R u          kernel (1 + k)^2     exact where the return is in the span of 1 and k
    Model 2   the return R               kernel k             linear in the scores; its covariance ignores the returns
    BAC       the action value Q         kernel k_x + k       returns replaced by temporal differences

All shrink towards 0: compare mean squared errors, not biases. The posterior is only as calibrated as its prior: Model 2
is far too sure where the return is not linear in the scores. Returns should be O(1): Model 1 has no scale of its own.
Nothing is detached. O(M^3). Source: Ghavamzadeh, Engel & Valko (2016), "Bayesian policy gradient and actor-critic
algorithms", JMLR 17.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bac", "bpg_model_1", "bpg_model_2", "fisher_estimate", "fisher_kernel", "temporal_differences"]


def fisher_estimate(scores: Tensor, ridge: float = 1e-3) -> Tensor:
    """G = mean of u u^T + ridge I: [M, n] -> [n, n], for policies whose Fisher matrix has no closed form."""
    return scores.T @ scores / len(scores) + ridge * _identity(scores.T)


def fisher_kernel(scores: Tensor, fisher: Tensor) -> Tensor:
    """k(i, j) = u_i^T G^-1 u_j: [M, n], [n, n] -> [M, M]. Does not depend on how the policy is parametrised."""
    return scores @ torch.linalg.solve(fisher, scores.T)


def bpg_model_1(scores: Tensor, returns: Tensor, fisher: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Posterior mean [n] and covariance [n, n] of the gradient, from a prior on the integrand R u.

        K_ij = (1 + k_ij)^2,  C = (K + noise I)^-1,  b_i = 1 + k_ii,  b_0 = 1 + n
        mean = sum_i R_i u_i (C b)_i,  covariance = (b_0 - b^T C b) I

    `returns` R [M], centred or scaled as for any estimator; `noise`: variance of one observation, .01 to .1.
    """  # fmt: skip
    _check(scores, returns, fisher)
    kernel = fisher_kernel(scores, fisher)
    b = 1 + kernel.diagonal()
    weight = torch.linalg.solve((1 + kernel).square() + noise * _identity(kernel), b)
    return scores.T @ (returns * weight), (1 + len(fisher) - b @ weight) * _identity(fisher)


def bpg_model_2(scores: Tensor, returns: Tensor, fisher: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Posterior mean [n] and covariance [n, n] of the gradient, from a prior on the return.

        K_ij = k_ij,  C = (K + noise I)^-1,  mean = U^T C R,  covariance = G - U^T C U

    The covariance depends on where the samples are, not on their returns [M].
    """  # fmt: skip
    _check(scores, returns, fisher)
    kernel = fisher_kernel(scores, fisher)
    solved = torch.linalg.solve(kernel + noise * _identity(kernel), torch.column_stack([returns, scores]))
    return scores.T @ solved[:, 0], fisher - scores.T @ solved[:, 1:]


def temporal_differences(values: Tensor, index: Tensor, terminated: Tensor, discount: float) -> Tensor:
    """Rewards that action values imply, H q: each q_t - discount q_t+1 within its episode, [N, ...] -> [T, ...].

    `index` [N]: episode of each pair, in order. The last pair of an episode with `terminated` [E] bool gives q_T alone;
    that of a cut one only bootstraps the pair before it and gives no row. Of `torch.eye(N)` it is the matrix H.
    """
    follows = torch.cat([index[1:] == index[:-1], index.new_zeros(min(1, len(index)), dtype=torch.bool)])
    ahead = torch.cat([values[1:], values[:1]]) * follows.reshape(-1, *[1] * (values.ndim - 1))
    return (values - discount * ahead)[follows | terminated[index]]


def bac(
    scores: Tensor, rewards: Tensor, differences: Tensor, fisher: Tensor, state_kernel: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Bayesian actor-critic: posterior mean [n] and covariance [n, n] of E[u(z) Q(z)] from transitions.

        K = k_x + k,  S = H K H^T + noise,  mean = U^T H^T S^-1 r,  covariance = G - U^T H^T S^-1 H U

    `scores` U [N, n], `rewards` r [T], `differences` H [T, N], `state_kernel` k_x [N, N] between the states of the pairs
    (zeros for none), `noise` [T, T]: s^2 I, or s^2 H H^T for returns whose noise is independent. The state kernel has
    no part in the prior covariance, because scores have mean 0 in every state. E is over the discounted occupancy, of
    mass one: the gradient of the discounted return is 1 / (1 - discount) times this.
    """  # fmt: skip
    kernel = state_kernel + fisher_kernel(scores, fisher)
    if differences.shape != (len(rewards), len(scores)) or noise.shape != (len(rewards), len(rewards)):
        raise ValueError(
            f"expected differences [T, N] and noise [T, T] for T={len(rewards)} rewards and N={len(scores)} scores, found "
            f"{tuple(differences.shape)}, {tuple(noise.shape)}: take `temporal_differences` of torch.eye(N)"
        )
    seen = differences @ scores
    solved = torch.linalg.solve(differences @ kernel @ differences.T + noise, torch.column_stack([rewards, seen]))
    return seen.T @ solved[:, 0], fisher - seen.T @ solved[:, 1:]


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _check(scores: Tensor, returns: Tensor, fisher: Tensor) -> None:
    """Raise ValueError unless scores are [M, n], returns [M] and the Fisher matrix [n, n]."""
    if scores.ndim != 2 or returns.shape != scores.shape[:1] or fisher.shape != 2 * scores.shape[1:]:
        raise ValueError(
            f"expected scores [M, n], returns [M], fisher [n, n], found {tuple(scores.shape)}, {tuple(returns.shape)}, "
            f"{tuple(fisher.shape)}: one row of scores per return"
        )
