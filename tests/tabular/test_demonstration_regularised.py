"""Demonstration-regularised RL: the clone, the exact loss of a regularised policy, and the bounds that make it fast."""

import itertools
import math

import numpy as np
import pytest
import torch

from unipo.tabular import (
    KL,
    Counts,
    Demonstrated,
    Free,
    Undemonstrated,
    behaviour_clone,
    explore,
    random_episodic_mdp,
    squared_error_bound,
    temperature_for,
    trajectory_kl,
)

H, S, A = 3, 3, 2


def random_policy(seed):
    return torch.from_numpy(np.random.default_rng((seed, 5)).dirichlet(np.ones(A), (H, S)))


def made(seed):
    return random_episodic_mdp(S, A, H, seed), KL(random_policy(seed), 0.1 + 0.3 * (seed % 4))


def test_the_clone_by_hand():
    """Three visits, all of action 0, of two: (3 + 1) / (3 + 2); no visit: uniform."""
    mdp = random_episodic_mdp(S, A, H, 0)
    counts = Counts.none(mdp)
    counts.moves[0, 1, 0, 2] = 3
    clone = behaviour_clone(counts)
    assert clone[0, 1].tolist() == pytest.approx([0.8, 0.2])
    assert clone[1, 1].tolist() == pytest.approx([0.5, 0.5])


def test_kl_of_episodes_is_the_sum_over_steps():
    """The chain rule: enumerated episodes (states and actions) under both policies."""
    mdp = random_episodic_mdp(2, 2, 2, 0)
    p, q = (torch.from_numpy(np.random.default_rng(s).dirichlet(np.ones(2), (2, 2))) for s in (0, 1))
    total = 0.0
    for s0, a0, s1, a1 in itertools.product(range(2), repeat=4):
        world = float(mdp.initial[s0] * mdp.transition[0, s0, a0, s1])
        mine, other = float(p[0, s0, a0] * p[1, s1, a1]), float(q[0, s0, a0] * q[1, s1, a1])
        total += world * mine * math.log(mine / other)
    assert float(trajectory_kl(mdp, p, q)) == pytest.approx(total, rel=1e-12)
    assert float(trajectory_kl(mdp, p, p)) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("seed", range(20))
def test_the_regularised_loss_is_a_kl(seed):
    """V*_lam - V^pi_lam = lam sum_h E_pi KL(pi_h || pi*_h), for any policy."""
    mdp, kl = made(seed)
    policy, best = random_policy(seed + 100), mdp.optimal(kl)
    loss = mdp.initial @ best.v[0] - mdp.expected_return(policy, kl)
    torch.testing.assert_close(loss, kl.temperature * trajectory_kl(mdp, policy, best.policy), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_errors_enter_squared(seed):
    """pi = softmax policy of any Q~: the loss is at most 1 / (2 lam) sum_h E_pi max_a (Q~_h - Q*_h)^2; a tenth, a hundredth."""
    mdp, kl = made(seed)
    best, bounds, losses = mdp.optimal(kl), [], []
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(H, S, A)))
    for size in (1.0, 0.1):
        policy = kl.choose(best.q + size * noise)
        losses.append(float(mdp.initial @ best.v[0] - mdp.expected_return(policy, kl)))
        bounds.append(float(squared_error_bound(mdp, policy, size * noise, kl.temperature)))
    assert -1e-12 <= losses[0] <= bounds[0]
    assert -1e-12 <= losses[1] <= bounds[1]
    assert losses[1] < 0.1 * bounds[0]


def test_squared_error_bound_by_hand():
    """One state: errors (1, -3) and (0, 2) at two steps, lam 1/4: 2 (9 + 4)."""
    mdp = random_episodic_mdp(1, 2, 2, 0)
    error = torch.tensor([[[1.0, -3.0]], [[0.0, 2.0]]]).double()
    assert float(squared_error_bound(mdp, torch.full_like(error, 0.5), error, 0.25)) == pytest.approx(26.0)


@pytest.mark.parametrize("seed", range(40))
def test_the_price_of_demonstrations(seed):
    """V^E - V^pi <= lam KL(pi_E || pi_BC) + eps_RL for any expert and any policy."""
    mdp, kl = made(seed)
    expert, policy = random_policy(seed + 200), random_policy(seed + 300)
    eps_rl = mdp.initial @ mdp.optimal(kl).v[0] - mdp.expected_return(policy, kl)
    gap = mdp.expected_return(expert) - mdp.expected_return(policy)
    assert float(gap) <= float(kl.temperature * trajectory_kl(mdp, expert, kl.reference) + eps_rl) + 1e-12


def test_limits_of_the_temperature():
    """lam -> inf: the clone. lam -> 0: greedy."""
    mdp, clone = random_episodic_mdp(S, A, H, 0), random_policy(1)
    torch.testing.assert_close(mdp.optimal(KL(clone, 1e9)).policy, clone)
    torch.testing.assert_close(mdp.optimal(KL(clone, 1e-5)).policy, mdp.optimal(Free()).policy)


def test_a_uniform_clone_is_the_entropy_bonus_less_a_constant():
    """Same policy; V_h = soft value - lam log A for each of the H - h steps to come."""
    mdp, lam = random_episodic_mdp(S, A, H, 2), 0.3
    ones = torch.ones(H, S, A).double()
    entropy, uniform = mdp.optimal(KL(ones, lam)), mdp.optimal(KL(ones / A, lam))
    torch.testing.assert_close(entropy.policy, uniform.policy)
    left = torch.arange(H, 0, -1).double()[:, None]
    torch.testing.assert_close(uniform.v, entropy.v - lam * math.log(A) * left)


def test_one_step_is_the_tilted_clone():
    mdp, clone = random_episodic_mdp(S, A, 1, 3), random_policy(0)[:1]
    tilted = clone * (mdp.reward / 0.2).exp()
    torch.testing.assert_close(mdp.optimal(KL(clone, 0.2)).policy, tilted / tilted.sum(-1, keepdim=True))


@pytest.mark.parametrize("p", [(1.0, 0.0, 0.0), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("n", [0, 1, 5, 20])
def test_the_clone_is_within_the_bound_behind_the_temperature(p, n):
    """All counts of n draws: E KL(p || clone) <= log(1 + (A - 1) / (n + 1)), with equality for a sure expert."""
    expected = 0.0
    for counts in itertools.product(range(n + 1), repeat=3):
        if sum(counts) != n:
            continue
        ways = math.factorial(n) / math.prod(map(math.factorial, counts))
        chance = ways * math.prod(q**c for q, c in zip(p, counts, strict=True))
        clone = [(c + 1) / (n + 3) for c in counts]
        expected += chance * sum(q * math.log(q / c) for q, c in zip(p, clone, strict=True) if q > 0)
    bound = math.log(1 + 2 / (n + 1))
    assert expected <= bound + 1e-12
    assert p[0] < 1 or expected == pytest.approx(bound)


def test_the_temperature_keeps_the_price_below_epsilon():
    """lam KL(pi_E || clone), averaged over data sets, is below epsilon, and lam grows with the number shown."""
    mdp = random_episodic_mdp(S, A, H, 0)
    expert = mdp.optimal(KL(torch.ones(H, S, A).double(), 0.1)).policy
    assert temperature_for(9, 0.5, mdp) == pytest.approx(0.5 * 10 / 9)
    for n in (1, 10, 100):
        prices = []
        for seed in range(50):
            shown = Counts.none(mdp).add(mdp.sample(expert, n, np.random.default_rng(seed)))
            prices.append(temperature_for(n, 0.5, mdp) * float(trajectory_kl(mdp, expert, behaviour_clone(shown))))
        assert 0 < sum(prices) / 50 < 0.5


def test_the_band_holds_the_truth():
    """Exact model and any width >= 0: low <= Q* <= high of the regularised optimum; no width: both are Q*."""
    mdp, kl = made(1)
    planner = Demonstrated(kl.reference, kl.temperature)
    exact, wide = (planner.band(mdp, torch.full((H, S, A), w).double()) for w in (0.0, 0.2))
    best = mdp.optimal(kl)
    torch.testing.assert_close(exact.high, best.q)
    torch.testing.assert_close(exact.low, best.q)
    torch.testing.assert_close(exact.policy, best.policy)
    assert bool((wide.low <= best.q).all() and (best.q <= wide.high).all())
    free = Undemonstrated().band(mdp, torch.full((H, S, A), 0.2).double())
    assert bool((mdp.optimal().q <= free.high).all())
    assert bool((free.low <= mdp.evaluate(free.policy).q).all())


def test_explorers_look_where_they_are_unsure():
    """The explorer of step h' is the policy at other steps, and argmax_a (high - low) at h'."""
    mdp, kl = made(2)
    width = torch.zeros(H, S, A).double()
    width[..., 1] = 0.1
    planner = Demonstrated(kl.reference, kl.temperature)
    band = planner.band(mdp, width)
    explorers = planner.explorers(band)
    assert len(explorers) == H
    for h, policy in enumerate(explorers):
        others = [k for k in range(H) if k != h]
        assert torch.equal(policy[others], band.policy[others])
        assert torch.equal(policy[h], Free().choose((band.high - band.low)[h]))


@pytest.mark.parametrize("demonstrations", [0, 200])
def test_exploration_stops_at_a_good_policy(demonstrations):
    """With few and with many demonstrations: the regularised loss is below what was asked for."""
    mdp = random_episodic_mdp(S, A, H, 4)
    shown = Counts.none(mdp).add(mdp.sample(mdp.optimal().policy, demonstrations, np.random.default_rng(0)))
    kl = KL(behaviour_clone(shown), temperature_for(demonstrations or 50, 0.2, mdp))
    found = explore(mdp, Demonstrated(kl.reference, kl.temperature), 0.2, np.random.default_rng(1))
    loss = float(mdp.initial @ mdp.optimal(kl).v[0] - mdp.expected_return(found.band.policy, kl))
    assert found.certificate <= 0.2
    assert 0 <= loss <= found.certificate
    assert found.episodes > 0


def test_exploration_without_demonstrations_stops_at_a_good_policy():
    mdp = random_episodic_mdp(S, A, H, 4)
    found = explore(mdp, Undemonstrated(), 0.2, np.random.default_rng(1))
    loss = float(mdp.initial @ mdp.optimal().v[0] - mdp.expected_return(found.band.policy))
    assert 0 <= loss <= found.certificate <= 0.2
    short = explore(mdp, Undemonstrated(), 0.2, np.random.default_rng(1), limit=3)
    assert short.episodes == 3
    assert short.certificate > 0.2
