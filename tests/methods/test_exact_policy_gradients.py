"""Expected updates of on-policy methods, enumerated over tiny decision processes: the exact policy gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.methods.on_policy_toys import (
    dlogp,
    fragments,
    policy_term,
)
from unipo.episodes import Column, Episodes
from unipo.methods import on_policy_control as page
from unipo.objectives import (
    Objective,
)

GAMMA = 0.9


# ---- a decision process of two states and two actions ------------------------------------------------------------------
STATES = 2
MOVES = torch.tensor([[[0.7, 0.3], [0.1, 0.9]], [[0.4, 0.6], [0.8, 0.2]]], dtype=torch.float64)
PAYS = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
START = torch.tensor([0.6, 0.4], dtype=torch.float64)
LOGITS = torch.tensor([[0.2, -0.4], [1.0, 0.3]], dtype=torch.float64)
HORIZON = 3


def trajectories() -> tuple[Tensor, Tensor, Tensor]:
    """Every trajectory of three steps: states [E, 4] with the last one, actions [E, 3], and its chance apart from the policy."""
    found = [
        (s, a)
        for s in itertools.product(range(2), repeat=HORIZON + 1)
        for a in itertools.product(range(2), repeat=HORIZON)
    ]
    state, action = torch.tensor([s for s, _ in found]), torch.tensor([a for _, a in found])
    chance = START[state[:, 0]] * MOVES[state[:, :-1], action, state[:, 1:]].prod(1)
    return state, action, chance


def expected_gradient(objective: Objective, old_value: Tensor, logits: Tensor) -> Tensor:
    """E over trajectories of the loss's gradient in the logits [S, A]: that of one episode, weighted by its chance."""
    state, action, chance = trajectories()
    x = logits.clone().requires_grad_()
    logp = x.log_softmax(1)[state[:, :-1], action]
    weight = chance * logp.detach().sum(1).exp()
    one_hot = torch.eye(STATES, dtype=torch.float64)[state]
    episodes = fragments(one_hot[:, :-1], action, PAYS[state[:, :-1], action], one_hot[:, -1], cut=False,
                         old_value=old_value[torch.arange(HORIZON), state[:, :-1]])  # fmt: skip
    coefficient = dlogp(objective, episodes, logp.detach().flatten()).reshape(-1, HORIZON) * len(state)
    return torch.autograd.grad((weight[:, None] * coefficient * logp).sum(), x)[0]


def backward_values(logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Q [T, S, A] and V [T, S] of the remaining steps, by dynamic programming."""
    pi, v = logits.softmax(1), torch.zeros(STATES, dtype=torch.float64)
    found_q: list[Tensor] = []
    found_v: list[Tensor] = []
    for _ in range(HORIZON):
        q = PAYS + gamma * MOVES @ v
        v = (pi * q).sum(1)
        found_q.insert(0, q)
        found_v.insert(0, v)
    return torch.stack(found_q), torch.stack(found_v)


def exact_gradient(gamma: float) -> Tensor:
    """- sum_n sum_s d_n(s) sum_a grad pi(a|s) Q_n(s, a): with gamma = 1 the gradient of the expected return."""
    x = LOGITS.clone().requires_grad_()
    pi, d = x.softmax(1), START
    q, _ = backward_values(LOGITS, gamma)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(HORIZON):
        total = total - (d[:, None] * pi * q[n]).sum()
        d = torch.einsum("s,sa,sat->t", d, pi.detach(), MOVES)
    return torch.autograd.grad(total, x)[0]


def test_the_exact_gradient_is_that_of_the_expected_return() -> None:
    """The reference itself, by differentiating the return through dynamic programming."""
    x = LOGITS.clone().requires_grad_()
    expected = torch.autograd.grad(-(START * backward_values(x, 1.0)[1][0]).sum(), x)[0]
    torch.testing.assert_close(exact_gradient(1.0), expected)


@pytest.mark.parametrize("gamma", [1.0, GAMMA])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_expected_update_is_the_exact_policy_gradient(gamma: float, lam: float) -> None:
    """With the exact critic for every lambda; each step counts 1 / T in a mean over steps."""
    objective = policy_term(page.a2c(gamma=gamma, lam=lam))
    _, value = backward_values(LOGITS, gamma)
    torch.testing.assert_close(expected_gradient(objective, value, LOGITS) * HORIZON, exact_gradient(gamma))


@pytest.mark.parametrize("gamma", [1.0, GAMMA])
def test_monte_carlo_returns_need_no_exact_baseline(gamma: float) -> None:
    """Lambda 1: unbiased whatever the critic says; lambda 0.5 is not."""
    wrong = torch.randn(HORIZON, STATES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    objective = policy_term(page.npg_igt_harpg(gamma=gamma))
    torch.testing.assert_close(expected_gradient(objective, wrong, LOGITS), exact_gradient(gamma))
    biased = expected_gradient(policy_term(page.npg_igt_harpg(gamma=gamma), lam=0.5), wrong, LOGITS)
    assert float((biased - exact_gradient(gamma)).abs().max()) > 0.05


def test_reinforce_without_a_baseline_whitens_returns() -> None:
    """Episodes of lengths 2 and 1: returns 1 + 0.9 * 2, 2 and 5."""
    reward = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    columns = {
        "reward": Column(reward, "step"),
        "kind": Column(torch.zeros(2, dtype=torch.long), "episode", None, ("rollout",)),
    }
    one = torch.arange(3)
    episodes = Episodes({"turn": torch.tensor([0, 2, 3]), "episode": one, "group": one}, columns)
    returns = torch.tensor([2.8, 2.0, 5.0], dtype=torch.float64)
    white = (returns - returns.mean()) / (returns.std() + 1e-6)
    recipe = page.reinforce_control(gamma=GAMMA, value=0.0)
    assert recipe.needs.columns == {"reward", "kind"}
    torch.testing.assert_close(dlogp(recipe.objective, episodes, -torch.ones(3).double()), -white / 3)


def test_only_a_cut_episode_goes_on() -> None:
    """One-step fragments of an endless process: cut, their advantage is Q - V; terminated, r - V. Never the other way."""
    pi = LOGITS.softmax(1)
    along = torch.einsum("sa,sat->st", pi, MOVES)
    v = torch.linalg.solve(torch.eye(2).double() - GAMMA * along, (pi * PAYS).sum(1))
    q = PAYS + GAMMA * MOVES @ v
    rows = torch.tensor(list(itertools.product(range(2), range(2), range(2))))
    s, a, after = rows.T
    chance = pi[s, a] * MOVES[s, a, after]
    one_hot = torch.eye(2).double()
    for cut, worth in ((True, q), (False, PAYS)):
        episodes = fragments(one_hot[s][:, None], a[:, None], PAYS[s, a][:, None], one_hot[after], cut=cut,
                             old_value=v[s][:, None], old_next_value=v[after][:, None])  # fmt: skip
        x = LOGITS.clone().requires_grad_()
        logp = x.log_softmax(1)[s, a]
        for lam in (0.0, 1.0):
            found = -dlogp(policy_term(page.a2c(gamma=GAMMA, lam=lam)), episodes, logp.detach()) * len(rows)
            gradient = torch.autograd.grad((chance * found * logp).sum(), x, retain_graph=True)[0]
            exact = torch.autograd.grad((x.softmax(1) * (worth - v[:, None])).sum(), x)[0]
            torch.testing.assert_close(gradient, exact)
