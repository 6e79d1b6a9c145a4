"""Bayesian quadrature of the policy gradient: identities, limits, enumeration, and the paper's bandit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unipo.functional import bac, bpg_model_1, bpg_model_2, fisher_estimate, fisher_kernel, temporal_differences

M, N, NOISE = 7, 3, 0.05


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [M, N], returns [M], and some Fisher matrix."""
    draw = torch.Generator().manual_seed(seed)
    scores, returns, root = (torch.randn(*n, generator=draw, dtype=torch.float64) for n in ((M, N), (M,), (N, N)))
    return scores, returns, root @ root.T + torch.eye(N, dtype=torch.float64)


def test_push_through() -> None:
    """Model 2 in parameter space: mean = (U U^T G^-1 + s^2 I)^-1 U R, covariance = s^2 (U U^T G^-1 + s^2)^-1 G."""
    scores, returns, fisher = problem()
    inner = scores.T @ scores @ torch.linalg.inv(fisher) + NOISE * torch.eye(N)
    mean, covariance = bpg_model_2(scores, returns, fisher, NOISE)
    assert torch.allclose(mean, torch.linalg.solve(inner, scores.T @ returns))
    assert torch.allclose(covariance, NOISE * torch.linalg.solve(inner, fisher))


def test_with_the_estimated_fisher_model_2_is_shrunk_monte_carlo() -> None:
    """G = U U^T / M: mean = M / (M + s^2) times the score-function estimate."""
    scores, returns, _ = problem()
    mean, _ = bpg_model_2(scores, returns, fisher_estimate(scores, ridge=0.0), NOISE)
    assert torch.allclose(mean, M / (M + NOISE) * (scores.T @ returns) / M)


def test_the_ridge_is_added() -> None:
    assert fisher_estimate(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), ridge=0.5).tolist() == [[5.5, 1.0], [1.0, 2.5]]


@pytest.mark.parametrize("model", [bpg_model_1, bpg_model_2])
def test_under_much_noise_the_mean_is_the_sum_over_noise(model: object) -> None:
    """s^2 mean -> U R for Model 2, U (R b) for Model 1; the covariance returns to the prior's."""
    scores, returns, fisher = problem()
    mean, covariance = model(scores, returns, fisher, 1e9)  # type: ignore[operator]
    b = 1 + fisher_kernel(scores, fisher).diagonal() if model is bpg_model_1 else torch.ones(M)
    prior = (1 + N) * torch.eye(N, dtype=torch.float64) if model is bpg_model_1 else fisher
    assert torch.allclose(1e9 * mean, scores.T @ (returns * b), rtol=1e-5)
    assert torch.allclose(covariance, prior, atol=1e-5)


def test_model_1_by_hand() -> None:
    """One parameter, one sample u = 2, G = 1: k = 4, K = 25, b = 5, so C = 1 / (25 + s^2)."""
    mean, covariance = bpg_model_1(torch.tensor([[2.0]]), torch.tensor([3.0]), torch.eye(1), 0.5)
    assert float(mean) == pytest.approx(3 * 2 * 5 / 25.5)
    assert float(covariance) == pytest.approx(2 - 25 / 25.5)


def test_the_weights_of_model_1_are_the_mean_of_its_kernel() -> None:
    """b_i = E[(1 + u^T G^-1 u_i)^2] for u ~ (0, G), exact with u on +- sqrt(n) times the columns of G's root."""
    scores, _, fisher = problem()
    root = N**0.5 * torch.linalg.cholesky(fisher).T
    points = torch.cat([root, -root])
    assert torch.allclose(points.T @ points / (2 * N), fisher)
    kernel = (1 + points @ torch.linalg.solve(fisher, scores.T)).square().mean(0)
    assert torch.allclose(kernel, 1 + fisher_kernel(scores, fisher).diagonal())
    prior = (1 + points @ torch.linalg.solve(fisher, points.T)).square().mean()
    assert float(prior) == pytest.approx(1 + N)


def test_the_covariance_of_model_2_ignores_returns_and_the_kernel_ignores_parametrisation() -> None:
    scores, returns, fisher = problem()
    one, two = (bpg_model_2(scores, y, fisher, NOISE)[1] for y in (returns, -5 * returns))
    assert torch.equal(one, two)
    assert torch.linalg.eigvalsh(one).min() > 0
    turn = torch.randn(N, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.allclose(fisher_kernel(scores @ turn.T, turn @ fisher @ turn.T), fisher_kernel(scores, fisher))


# ---- actor-critic ----------------------------------------------------------------------------------------------------
INDEX, TERMINATED = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([True, False])


def differences(index: Tensor, terminated: Tensor, discount: float) -> Tensor:
    return temporal_differences(torch.eye(len(index), dtype=torch.float64), index, terminated, discount)


def test_temporal_differences_by_hand() -> None:
    """A terminated episode of three pairs, then a cut one of two: the last pair of the cut one has no row."""
    expected = [[1, -0.5, 0, 0, 0], [0, 1, -0.5, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, -0.5]]
    assert differences(INDEX, TERMINATED, 0.5).tolist() == expected
    assert temporal_differences(torch.tensor([4.0, 2.0, 1.0, 8.0, 6.0]), INDEX, TERMINATED, 0.5).tolist() == [
        3,
        1.5,
        1,
        5,
    ]


def test_without_discount_or_state_kernel_it_is_model_2() -> None:
    scores, rewards, fisher = problem()
    each = differences(torch.arange(M), torch.ones(M, dtype=torch.bool), 0.0)
    nothing = torch.zeros(M, M, dtype=torch.float64)
    found = bac(scores, rewards, each, fisher, nothing, NOISE * torch.eye(M, dtype=torch.float64))
    for ours, theirs in zip(found, bpg_model_2(scores, rewards, fisher, NOISE), strict=True):
        assert torch.allclose(ours, theirs)


def test_with_correlated_noise_it_is_model_2_on_discounted_returns_to_go() -> None:
    """Terminated episodes, noise s^2 H H^T: alpha = (K + s^2)^-1 H^-1 r, and H^-1 r are the returns to go."""
    scores, rewards, fisher = problem()
    scores, rewards = scores[:5], rewards[:5]
    h = differences(INDEX, torch.tensor([True, True]), 0.9)
    returns = torch.linalg.solve(h, rewards)
    assert float(returns[0]) == pytest.approx(float(rewards[0] + 0.9 * rewards[1] + 0.81 * rewards[2]))
    found = bac(scores, rewards, h, fisher, torch.zeros(5, 5, dtype=torch.float64), NOISE * h @ h.T)
    for ours, theirs in zip(found, bpg_model_2(scores, returns, fisher, NOISE), strict=True):
        assert torch.allclose(ours, theirs)


def test_the_state_kernel_leaves_the_prior_of_the_gradient() -> None:
    """Over all pairs of a softmax policy: E[u(z) k(z, z_i)] = u(z_i) and the prior covariance is G for any k_x."""
    draw = torch.Generator().manual_seed(1)
    policy = torch.randn(3, 2, generator=draw, dtype=torch.float64).softmax(1)
    law = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    scores = torch.zeros(3, 2, 3, dtype=torch.float64)  # one logit per state, of its second action
    for s in range(3):
        scores[s, :, s] = torch.tensor([0.0, 1.0]) - policy[s, 1]
    scores, weight = scores.reshape(6, 3), (law[:, None] * policy).flatten()
    fisher = scores.T @ (weight[:, None] * scores)
    root = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    state_kernel = (root @ root.T).repeat_interleave(2, 0).repeat_interleave(2, 1)
    kernel = state_kernel + fisher_kernel(scores, fisher)
    weighted = weight[:, None] * scores
    assert torch.allclose(weighted.T @ kernel, scores.T)
    assert torch.allclose(weighted.T @ kernel @ weighted, fisher)
    h = differences(torch.arange(6), torch.ones(6, dtype=torch.bool), 0.9)
    mean, covariance = bac(scores, weight, h, fisher, state_kernel, NOISE * torch.eye(6, dtype=torch.float64))
    inverse = torch.linalg.inv(kernel + NOISE * torch.eye(6))
    assert torch.allclose(mean, weighted.T @ kernel @ inverse @ weight)
    assert torch.allclose(covariance, fisher - weighted.T @ kernel @ inverse @ kernel @ weighted)


# ---- the paper's bandit ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("power", [1, 2])
def test_less_error_than_monte_carlo_on_the_gaussian_bandit(power: int) -> None:
    """a ~ N(0, 1), scores (a, a^2 - 1), G = diag(1, 2), reward a or a^2: gradients (1, 0) and (0, 2)."""
    draw, fisher = torch.Generator().manual_seed(0), torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    exact = torch.tensor([1.0, 0.0]) if power == 1 else torch.tensor([0.0, 2.0])
    errors = torch.zeros(3)
    for _ in range(300):
        a = torch.randn(10, generator=draw, dtype=torch.float64)
        scores, reward = torch.stack([a, a.square() - 1], 1), a**power
        found = [model(scores, reward, fisher, 0.01)[0] for model in (bpg_model_1, bpg_model_2)]
        errors += torch.stack([(x - exact).square().sum() for x in (*found, scores.T @ reward / 10)])
    assert errors[0] < errors[2] / 10
    assert errors[1] < errors[2] / 2


def test_bad_input() -> None:
    scores, returns, fisher = problem()
    with pytest.raises(ValueError, match="one row of scores per return"):
        bpg_model_1(scores, returns[:2], fisher, NOISE)
    with pytest.raises(ValueError, match="temporal_differences"):
        bac(scores, returns[:2], torch.eye(M), fisher, torch.zeros(M, M), torch.eye(2))
