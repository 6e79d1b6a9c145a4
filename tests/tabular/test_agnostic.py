"""Agnostic policy search: estimates against enumeration, capacities by hand, searches against dynamic programming."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from unipo.tabular.agnostic import (
    coverability,
    cpi,
    cpi_gains,
    generative,
    hoeffding,
    importance_values,
    psdp,
    reachable,
    spanning_capacity,
    tables,
    trajectory_trees,
)
from unipo.tabular.mdp import EpisodicMDP, Trajectories, random_episodic_mdp


def fixed_start(states: int, actions: int, horizon: int, seed: int) -> EpisodicMDP:
    found = random_episodic_mdp(states, actions, horizon, seed)
    start = torch.nn.functional.one_hot(torch.tensor(0), states)
    return EpisodicMDP(transition=found.transition, reward=found.reward, initial=start)


def deterministic(next_state: Tensor) -> EpisodicMDP:
    states = next_state.shape[1]
    return EpisodicMDP(
        transition=torch.nn.functional.one_hot(next_state, states),
        reward=torch.zeros(next_state.shape),
        initial=torch.nn.functional.one_hot(torch.tensor(0), states),
    )


def every_policy(states: int, actions: int, horizon: int) -> Tensor:
    return torch.tensor(list(product(range(actions), repeat=horizon * states))).reshape(-1, horizon, states)


def some_policies(n: int, states: int, actions: int, horizon: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(actions, size=(n, horizon, states)))


def every_process(states: int, actions: int, horizon: int) -> list[Tensor]:
    """All deterministic transitions of the steps that matter (the last leads out)."""
    last = torch.zeros(1, states, actions, dtype=torch.int64)
    ways = product(range(states), repeat=(horizon - 1) * states * actions)
    return [torch.cat([torch.tensor(w, dtype=torch.int64).reshape(-1, states, actions), last]) for w in ways]


def true_values(mdp: EpisodicMDP, policies: Tensor) -> Tensor:
    return torch.stack([mdp.expected_return(policy) for policy in tables(policies, mdp.actions)])


# ---- capacity --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_spanning_capacity_is_the_worst_deterministic_process(seed: int) -> None:
    policies = some_policies(4, 2, 2, 3, seed)
    counts = [reachable(way, policies, 2).sum((1, 2)) for way in every_process(2, 2, 3)]
    assert spanning_capacity(policies) == int(torch.stack(counts).max())


def test_known_capacities() -> None:
    """One policy: 1. All open-loop policies: A^H, once there are states enough to keep branches apart. All policies: S A."""
    assert spanning_capacity(some_policies(1, 3, 2, 3, 0)) == 1
    open_loop = torch.tensor(list(product(range(2), repeat=3)))[:, :, None].expand(-1, -1, 4)
    assert spanning_capacity(open_loop) == 8
    assert spanning_capacity(open_loop[:, :, :2]) == 4
    assert spanning_capacity(every_policy(2, 2, 2)) == 4


@pytest.mark.parametrize("seed", range(4))
def test_coverability(seed: int) -> None:
    """Deterministic: the number of reachable pairs. Stochastic: not more than the capacity, not less than 1."""
    policies = some_policies(5, 3, 2, 3, seed)
    way = torch.from_numpy(np.random.default_rng(seed).integers(3, size=(3, 3, 2)))
    assert coverability(deterministic(way), policies).tolist() == reachable(way, policies, 2).sum((1, 2)).tolist()
    covered = coverability(fixed_start(3, 2, 3, seed), policies)
    assert float(covered.min()) >= 1
    assert float(covered.max()) <= spanning_capacity(policies)


# ---- evaluation ------------------------------------------------------------------------------------------------------
def test_a_tree_is_unbiased_for_every_member_at_once() -> None:
    """Sum over all trees of their probability times their returns = the values, by enumeration; calls by hand."""
    mdp, policies = fixed_start(2, 2, 3, 0), some_policies(6, 2, 2, 3, 1)
    mean = torch.zeros(6, dtype=torch.float64)
    for way in every_process(2, 2, 3):
        chance = mdp.transition[:-1].gather(3, way[:-1, :, :, None]).prod()
        found = trajectory_trees(mdp, policies, lambda h, tree, s, a, way=way: way[h, s, a], 1)
        assert found.calls == int(reachable(way, policies, 2).sum())
        mean += chance * found.values
    assert torch.allclose(mean, true_values(mdp, policies))


def test_sampled_trees_share_their_randomness_and_agree_with_the_values() -> None:
    """Twins of one policy have one return in every tree; means over trees lie within Hoeffding's bound."""
    mdp, policies = fixed_start(4, 2, 3, 2), some_policies(5, 4, 2, 3, 3)
    twice = torch.cat([policies, policies])
    found = trajectory_trees(mdp, twice, generative(mdp, np.random.default_rng(0)), 4000)
    assert torch.equal(found.returns[:, :5], found.returns[:, 5:])
    assert found.calls <= 4000 * 3 * spanning_capacity(policies)
    error = (found.values[:5] - true_values(mdp, policies)).abs().max()
    assert float(error) < mdp.horizon * hoeffding(5, 4000, 0.01)
    assert float(error) > 0


def test_trees_of_two_policies_that_part_at_once_are_independent() -> None:
    """Different first actions share no sample, so the two returns are uncorrelated; one tree asks 2 calls per step."""
    mdp = fixed_start(2, 2, 2, 5)
    policies = torch.tensor([[[0, 0], [0, 0]], [[1, 1], [1, 1]]])
    found = trajectory_trees(mdp, policies, generative(mdp, np.random.default_rng(1)), 20_000)
    assert found.calls == 2 * 2 * 20_000
    assert abs(float(torch.corrcoef(found.returns.T)[0, 1])) < 0.03


def test_importance_sampling_is_unbiased() -> None:
    """All episodes weighted by their probability under uniform actions: E V^ = V for every member."""
    mdp, policies = fixed_start(2, 2, 2, 4), every_policy(2, 2, 2)
    mean = torch.zeros(len(policies), dtype=torch.float64)
    for a0, s1, a1 in product(range(2), repeat=3):
        chance = 0.25 * mdp.transition[0, 0, a0, s1]
        reward = torch.stack([mdp.reward[0, 0, a0], mdp.reward[1, s1, a1]])[None]
        seen = Trajectories(
            state=torch.tensor([[0, s1]]), action=torch.tensor([[a0, a1]]), reward=reward, next_state=torch.zeros(1, 2)
        )
        mean += chance * importance_values(seen, policies, 2)
    assert torch.allclose(mean, true_values(mdp, policies))


def test_one_step_importance_sampling_is_inverse_propensity_scoring() -> None:
    seen = Trajectories(
        state=torch.zeros(3, 1, dtype=torch.int64), action=torch.tensor([[0], [2], [2]]),
        reward=torch.tensor([[1.0], [2.0], [4.0]]), next_state=torch.zeros(3, 1),
    )  # fmt: skip
    assert importance_values(seen, torch.tensor([[[0]], [[1]], [[2]]]), 3).tolist() == pytest.approx([1, 0, 6])


def test_hoeffding_number() -> None:
    """64 members, delta 0.05, 100 trees: sqrt(log(2560) / 200)."""
    assert hoeffding(64, 100, 0.05) == pytest.approx(0.19808, abs=1e-4)


# ---- search ----------------------------------------------------------------------------------------------------------
def test_psdp_over_all_policies_is_dynamic_programming() -> None:
    mdp = fixed_start(2, 2, 3, 6)
    law = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(2), 3))
    found = psdp(mdp, every_policy(2, 2, 3), law)
    assert torch.equal(tables(found, 2), mdp.optimal().policy)


def test_psdp_in_a_small_class_takes_the_best_last_step() -> None:
    """Of two constant policies the last step is the one of larger mean reward under the law."""
    mdp, policies = fixed_start(3, 2, 2, 7), torch.tensor([0, 1])[:, None, None].expand(-1, 2, 3)
    law = torch.tensor([[1.0, 0, 0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    assert psdp(mdp, policies, law)[1].tolist() == [int((law[1] @ mdp.reward[1]).argmax())] * 3


def test_cpi_gain_is_the_derivative_of_the_return() -> None:
    mdp, policies = fixed_start(3, 2, 3, 8), some_policies(4, 3, 2, 3, 0)
    policy = torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(2), (3, 3)))
    for gain, towards in zip(cpi_gains(mdp, policies, policy), tables(policies, 2), strict=True):
        rate = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(mdp.expected_return((1 - rate) * policy + rate * towards), rate)
        assert float(gain) == pytest.approx(float(slope))


def test_cpi_climbs_and_whole_steps_over_all_policies_reach_the_optimum() -> None:
    mdp, policies = fixed_start(2, 2, 3, 9), every_policy(2, 2, 3)
    start = torch.full((3, 2, 2), 0.5, dtype=torch.float64)
    best = float(mdp.expected_return(mdp.optimal().policy))
    returns = [float(mdp.expected_return(cpi(mdp, policies, start, 0.1, n))) for n in range(6)]
    assert returns == sorted(returns)
    assert returns[0] < returns[5] < best
    assert float(mdp.expected_return(cpi(mdp, policies, start, 1.0, 10))) == pytest.approx(best)
