"""Linear off-policy evaluation: exact identities on random processes, and the chain where fitted Q evaluation explodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from unipo.tabular.least_squares import (
    Moments,
    condition,
    distance,
    fqe_factor,
    fqe_step,
    lstd,
    minimax_loss,
    next_features,
    population_moments,
    realizable,
    residual,
    sample_moments,
    target_noise,
    two_state_chain,
)
from unipo.tabular.mdp import FiniteMDP, random_mdp

S, A, D = 6, 3, 4


def instance(seed: int, discount: float = 0.9) -> tuple[FiniteMDP, Tensor, Tensor, Tensor, Tensor]:
    """A realizable process with its policy, an arbitrary law of the data, features and true weights."""
    drawn = np.random.default_rng((seed, 62))
    policy = torch.from_numpy(drawn.dirichlet(np.ones(A), S))
    law = torch.from_numpy(drawn.dirichlet(np.ones(S * A))).reshape(S, A)
    features, weights = torch.from_numpy(drawn.normal(size=(S, A, D))), torch.from_numpy(drawn.normal(size=D))
    return realizable(random_mdp(S, A, seed, discount), policy, features, weights), policy, law, features, weights


def draw(mdp: FiniteMDP, policy: Tensor, law: Tensor, features: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n independent (x, r, x')."""
    drawn = np.random.default_rng(0)
    state, action = np.divmod(drawn.choice(S * A, n, p=law.flatten().numpy()), A)
    cumulative = mdp.transition[state, action].cumsum(1).numpy()
    following = (cumulative < drawn.random((n, 1))).sum(1)
    return features[state, action], mdp.reward[state, action], next_features(features, policy)[following]


def stationary(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    moves = torch.einsum("sa,sat->st", policy, mdp.transition)
    return torch.linalg.matrix_power(moves, 400)[0][:, None] * policy


@pytest.mark.parametrize("seed", range(5))
def test_lstd_is_exact_under_any_law_when_realizable(seed: int) -> None:
    mdp, policy, law, features, weights = instance(seed)
    assert torch.allclose(features @ weights, mdp.evaluate(policy).q)
    assert torch.allclose(lstd(population_moments(mdp, policy, law, features)), weights)


@pytest.mark.parametrize("seed", range(5))
def test_finite_sample_error_identity(seed: int) -> None:
    """S^1/2 (w^ - w*) = (S^-1/2 A^ S^-1/2)^-1 S^-1/2 mean(x delta), for the population's S as for any other."""
    mdp, policy, law, features, weights = instance(seed)
    x, reward, x_next = draw(mdp, policy, law, features, 300)
    moments, gram = sample_moments(x, reward, x_next, mdp.discount), population_moments(mdp, policy, law, features).gram
    values, vectors = torch.linalg.eigh(gram)
    root, whiten = vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T
    delta = reward + mdp.discount * x_next @ weights - x @ weights
    noise = whiten @ (x * delta[:, None]).mean(0)
    error = torch.linalg.solve(whiten @ moments.difference @ whiten, noise)
    assert torch.allclose(root @ (lstd(moments) - weights), error)
    assert float(distance(gram, lstd(moments), weights)) == pytest.approx(float(error.norm()))


def test_temporal_errors_have_mean_zero_and_the_stated_spread() -> None:
    mdp, policy, law, features, weights = instance(1)
    x, reward, x_next = draw(mdp, policy, law, features, 100_000)
    delta = reward + mdp.discount * x_next @ weights - x @ weights
    sigma = target_noise(mdp, policy, law)
    assert abs(float(delta.mean())) < 4 * sigma / 100_000**0.5
    assert float(delta.std()) == pytest.approx(sigma, rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_minimax_loss_is_the_residual_and_lstd_minimises_it(seed: int) -> None:
    mdp, policy, law, features, _ = instance(seed)
    x, reward, x_next = draw(mdp, policy, law, features, 200)
    moments = sample_moments(x, reward, x_next, mdp.discount)
    weights = torch.from_numpy(np.random.default_rng(seed).normal(size=D))
    assert torch.allclose(minimax_loss(x, reward, x_next, weights, mdp.discount), residual(moments, weights))
    assert float(residual(moments, weights)) > 1e-3
    assert float(minimax_loss(x, reward, x_next, lstd(moments), mdp.discount)) == pytest.approx(0, abs=1e-12)


def test_fqe_is_the_regression_on_bootstrapped_targets() -> None:
    mdp, policy, law, features, weights = instance(2)
    x, reward, x_next = draw(mdp, policy, law, features, 200)
    moments, start = sample_moments(x, reward, x_next, mdp.discount), weights + 1
    regression = torch.linalg.lstsq(x, (reward + mdp.discount * x_next @ start)[:, None]).solution[:, 0]
    assert torch.allclose(fqe_step(moments, start), regression)
    assert torch.allclose(fqe_step(moments, lstd(moments)), lstd(moments))


@pytest.mark.parametrize(("share", "factor", "kappa"), [(0.0, 1.8, 1.25), (0.1, 1.523, 1.912), (0.5, 1.08, 12.5)])
def test_fqe_diverges_on_the_two_state_chain_and_lstd_does_not(share: float, factor: float, kappa: float) -> None:
    """By hand: S = 1 - e + 4e, C = 2(1 - e) + 4e, so the factor .9 C/S and kappa S/|S - .9 C|."""
    mdp, features = two_state_chain()
    assert mdp.reward.flatten().tolist() == pytest.approx([-2.4, 0.6])
    law = torch.tensor([[1 - share], [share]], dtype=torch.float64)
    moments = population_moments(mdp, torch.ones(2, 1, dtype=torch.float64), law, features)
    assert fqe_factor(moments) == pytest.approx(factor, abs=1e-3)
    assert condition(moments) == pytest.approx(kappa, abs=1e-3)
    assert lstd(moments).tolist() == pytest.approx([3.0])
    weights = torch.zeros(1, dtype=torch.float64)
    for _ in range(10):
        weights = fqe_step(moments, weights)
    assert float(weights - 3) == pytest.approx(-3 * fqe_factor(moments) ** 10)


@pytest.mark.parametrize("seed", range(5))
def test_fqe_converges_iff_the_factor_is_below_one(seed: int) -> None:
    mdp, policy, law, features, _ = instance(seed)
    moments = population_moments(mdp, policy, law, features)
    assert fqe_factor(moments) < 1
    weights = torch.zeros(D, dtype=torch.float64)
    for _ in range(2000):
        weights = fqe_step(moments, weights)
    assert torch.allclose(weights, lstd(moments))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("discount", [0.5, 0.95])
def test_conditioning_under_the_laws_of_the_policy(seed: int, discount: float) -> None:
    mdp, policy, _, features, _ = instance(seed, discount)
    moments = population_moments(mdp, policy, stationary(mdp, policy), features)
    assert fqe_factor(moments) <= discount + 1e-9
    assert condition(moments) <= 1 / (1 - discount) + 1e-9
    visited = population_moments(mdp, policy, mdp.occupancy(policy), features)
    assert condition(visited) <= 1 / (1 - discount**0.5) + 1e-9


def test_one_hot_lstd_is_the_count_model() -> None:
    mdp, policy, law, _, _ = instance(3)
    law = (law + 0.1) / (law + 0.1).sum()
    one_hot = torch.eye(S * A, dtype=torch.float64).reshape(S, A, S * A)
    x, reward, x_next = draw(mdp, policy, law, one_hot, 2000)
    state_next = (x_next[:, None] - next_features(one_hot, policy)).abs().sum(2).argmin(1)
    visits = x.sum(0)
    counts = torch.zeros(S * A, S, dtype=torch.float64).index_put_((x.argmax(1), state_next), reward.new_ones(()), True)
    model = FiniteMDP(
        transition=(counts / visits[:, None]).reshape(S, A, S),
        reward=(x.T @ reward / visits).reshape(S, A),
        initial=mdp.initial,
        discount=mdp.discount,
    )
    found = lstd(sample_moments(x, reward, x_next, mdp.discount))
    assert torch.allclose(found.reshape(S, A), model.evaluate(policy).q)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="one row per transition"):
        sample_moments(torch.ones(3, 2), torch.ones(2), torch.ones(3, 2), 0.9)
    flat = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="linearly independent"):
        condition(Moments(gram=flat - flat, cross=flat, reward=flat[0], discount=0.9))
