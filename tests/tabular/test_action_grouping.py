"""Action grouping: exact at both ends and for twins, its bound holds and is attained, samples agree with the lifted process."""

import numpy as np
import pytest
import torch

from unipo.tabular import (
    FiniteMDP,
    Grouping,
    Similarity,
    bernoulli,
    choose_groups,
    clustered_mdp,
    estimation_error,
    grouped_policy,
    lifted,
    performance_loss,
    random_mdp,
    sampled_lifted,
    sure,
)


def random_law(group, states, seed):
    """A law that plays the actions of a group with random odds."""
    odds = torch.from_numpy(np.random.default_rng((seed, 3)).random((states, len(group))))
    mass = odds @ torch.nn.functional.one_hot(group).double()
    return Grouping(group, odds / mass[:, group])


def best_of_groups(mdp, grouping):
    return grouping.unlift(lifted(mdp, grouping).optimal().policy)


def test_singletons_are_the_process_itself():
    mdp = random_mdp(4, 5, 0)
    own = Grouping.even(5, 5, 4)
    torch.testing.assert_close(lifted(mdp, own).transition, mdp.transition)
    torch.testing.assert_close(lifted(mdp, own).reward, mdp.reward)
    assert performance_loss(mdp, best_of_groups(mdp, own)) == pytest.approx(0.0, abs=1e-12)


def test_one_group_is_worth_its_law():
    mdp = random_mdp(4, 5, 0)
    grouping = random_law(torch.zeros(5, dtype=torch.int64), 4, 1)
    torch.testing.assert_close(lifted(mdp, grouping).optimal().v, mdp.evaluate(grouping.law).v)


def test_a_policy_of_groups_is_worth_the_same_below():
    """Any [S, G] policy, any law: its value in the lifted process is that of the unlifted policy in the true one."""
    mdp, grouping = random_mdp(4, 6, 0), random_law(torch.tensor([0, 1, 1, 2, 0, 2]), 4, 2)
    policy = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(3), 4))
    torch.testing.assert_close(lifted(mdp, grouping).evaluate(policy).v, mdp.evaluate(grouping.unlift(policy)).v)
    torch.testing.assert_close(grouping.unlift(policy).sum(1), torch.ones(4).double())


def test_lift_by_hand():
    """Law (1/4, 3/4) inside a group of rewards 1 and 5: 4."""
    grouping = Grouping(torch.tensor([1, 0, 1]), torch.tensor([[0.25, 1.0, 0.75]]).double())
    assert grouping.lift(torch.tensor([[1.0, 2.0, 5.0]]).double()).tolist() == [[2.0, 4.0]]
    assert grouping.unlift(torch.tensor([[0.4, 0.6]]).double())[0].tolist() == pytest.approx([0.15, 0.4, 0.45])


@pytest.mark.parametrize("seed", range(5))
def test_twins_are_lossless(seed):
    """No difference inside the groups: whatever the law, nothing is lost; with fewer groups than clusters, something is."""
    mdp = clustered_mdp(4, 12, 3, 0.0, seed)
    assert performance_loss(mdp, best_of_groups(mdp, random_law(torch.arange(12) // 4, 4, seed))) < 1e-10
    assert performance_loss(mdp, best_of_groups(mdp, Grouping.even(12, 1, 4))) > 0.1


@pytest.mark.parametrize("difference", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("seed", range(10))
def test_the_approximation_bound_holds(difference, seed):
    """Exact lifted process, any law, clusters as groups: the loss is at most the bound, and similarity is what it says."""
    mdp, group = clustered_mdp(4, 12, 3, difference, seed), torch.arange(12) // 4
    for g in range(3):
        inside = group == g
        p, r = mdp.transition[:, inside], mdp.reward[:, inside]
        assert float((p[:, None] - p[:, :, None]).abs().sum(-1).max()) / 2 <= difference
        assert float((r[:, None] - r[:, :, None]).abs().max()) <= difference
    loss = performance_loss(mdp, best_of_groups(mdp, random_law(group, 4, seed)))
    assert 0 <= loss <= Similarity(reward=difference, transition=difference).approximation(0.9)


def test_the_approximation_bound_is_attained():
    """Two actions that pay 1 and 1 - b, grouped, and a law that plays the worse: it loses b / (1 - discount)."""
    mdp = FiniteMDP(transition=torch.ones(1, 2, 1), reward=torch.tensor([[1.0, 0.7]]).double(), initial=torch.ones(1),
                    discount=0.9)  # fmt: skip
    worse = Grouping(torch.tensor([0, 0]), torch.tensor([[0.0, 1.0]]).double())
    bound = Similarity(reward=0.3, transition=0.0).approximation(0.9)
    assert bound == pytest.approx(3.0)
    assert performance_loss(mdp, best_of_groups(mdp, worse)) == pytest.approx(bound)
    assert Similarity(reward=0.0, transition=0.3).approximation(0.9) == pytest.approx(27.0)


def test_samples_agree_with_the_lifted_process():
    """Means over many draws by the law; each row of n draws is a multiple of 1 / n."""
    mdp, grouping = random_mdp(3, 6, 0), random_law(torch.tensor([0, 1, 1, 2, 0, 2]), 3, 2)
    found = sampled_lifted(mdp, grouping, 3 * 3 * 20_000, np.random.default_rng(0))
    exact = lifted(mdp, grouping)
    assert float((found.transition - exact.transition).abs().max()) < 4 * 0.5 / 20_000**0.5
    assert float((found.reward - exact.reward).abs().max()) < 4 * 0.5 / 20_000**0.5
    few = sampled_lifted(mdp, grouping, 3 * 3 * 5, np.random.default_rng(1)).transition * 5
    torch.testing.assert_close(few, few.round())
    one = sampled_lifted(mdp, grouping, 0, np.random.default_rng(1)).transition
    torch.testing.assert_close(one.amax(-1), torch.ones(3, 3).double())


def test_reward_and_next_state_are_of_the_same_draw():
    """Action 0 pays 1 and goes to state 0, action 1 pays 0 and goes to state 1: reward is the share that went to 0."""
    move = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]] * 2)
    mdp = FiniteMDP(
        transition=move, reward=torch.tensor([[1.0, 0.0]] * 2), initial=torch.tensor([1.0, 0.0]), discount=0.5
    )
    found = sampled_lifted(mdp, Grouping.even(2, 1, 2), 2 * 7, np.random.default_rng(0))
    torch.testing.assert_close(found.reward, found.transition[..., 0])
    assert 0 < float(found.reward[0, 0]) < 1


def test_rewards_are_drawn_or_sure():
    """Means 0, 1/4 and 1, 10 000 draws: a sum of ones within four standard deviations, or exactly the mean."""
    mean, draws = torch.tensor([[0.0, 0.25, 1.0]]).double(), np.full((1, 3), 10_000)
    paid = bernoulli(draws, mean, np.random.default_rng(0))
    assert paid[0, [0, 2]].tolist() == [0.0, 10_000.0]
    assert abs(float(paid[0, 1]) - 2500) < 4 * (10_000 * 0.25 * 0.75) ** 0.5
    assert sure(draws, mean, np.random.default_rng(0)).tolist() == [[0.0, 2500.0, 10_000.0]]
    with pytest.raises(ValueError, match="found 0 to 2"):
        bernoulli(draws, 2 * mean, np.random.default_rng(0))


def test_more_samples_lose_less_and_in_the_end_only_the_approximation():
    mdp = clustered_mdp(4, 12, 3, 0.2, 0)
    grouping = Grouping.even(12, 3, 4)
    exact = performance_loss(mdp, best_of_groups(mdp, grouping))
    many = performance_loss(mdp, grouped_policy(mdp, grouping, 10**6, np.random.default_rng(0)))
    few = [performance_loss(mdp, grouped_policy(mdp, grouping, 24, np.random.default_rng(s))) for s in range(20)]
    assert many == pytest.approx(exact, abs=1e-3)
    assert sum(few) / 20 > many


def test_estimation_by_hand():
    """S G / 4 N = 10 x 5 / 4 / 1250 = 1/100, span 10, discount 0.9: 2 x 10 x 0.1 / 0.1."""
    assert estimation_error(5, 10, 1250, 0.9) == pytest.approx(20.0)


def test_more_samples_choose_finer_groups():
    """Levels of 1, 3, 12 groups, unlike by 1, 0.01 and 0 inside: coarse to fine with N, and at the end no grouping."""
    levels = [(1, Similarity(reward=1.0, transition=1.0)), (3, Similarity(reward=0.01, transition=0.01)),
              (12, Similarity(reward=0.0, transition=0.0))]  # fmt: skip
    chosen = [choose_groups(levels, 4, n, 0.9) for n in (1, 10**4, 10**7)]
    assert chosen == [1, 3, 12]
    assert choose_groups(levels[::-1], 4, 10**4, 0.9) == 3


def test_bad_groupings_are_refused():
    with pytest.raises(ValueError, match=r"sizes \[2, 0, 1\]"):
        Grouping(torch.tensor([0, 0, 2]), torch.ones(1, 3).double())
    with pytest.raises(ValueError, match="sums between 1 and 2"):
        Grouping(torch.tensor([0, 0, 1]), torch.ones(1, 3).double())
