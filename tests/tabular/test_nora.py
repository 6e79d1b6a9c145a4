"""NORA: its critic is least squares at the border of a confidence set, its actor exponentiated, its switches rare."""

import math

import numpy as np
import pytest
import torch

from unipo.tabular import (
    Counts,
    Optimism,
    Switching,
    bellman_loss,
    deep_sea,
    excess_loss,
    optimistic_actor_critic,
    optimistic_critic,
    random_episodic_mdp,
)

WIDE = (-math.inf, math.inf)


def seen(mdp, episodes, seed=0):
    """Data of the uniform policy, and their counts."""
    data = mdp.sample(torch.full_like(mdp.reward, 1 / mdp.actions), episodes, np.random.default_rng(seed))
    return data, Counts.none(mdp).add(data)


def test_excess_loss_is_what_least_squares_leaves():
    """min_g by a regression on one-hot pairs, for any f: loss(f) - loss(argmin) = sum n (f - mean target)^2."""
    mdp = random_episodic_mdp(3, 2, 4, 0)
    data, counts = seen(mdp, 40)
    f = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 3, 2)))
    least = []
    for h in range(4):
        features = torch.nn.functional.one_hot(data.state[:, h] * 2 + data.action[:, h], 6).double()
        after = f[h + 1].max(1).values[data.next_state[:, h]] if h < 3 else 0.0
        target = data.reward[:, h] + after
        g = torch.linalg.lstsq(features, target[:, None], driver="gelsd").solution
        least.append((features @ g - target[:, None]).square().sum())
    torch.testing.assert_close(excess_loss(f, counts), bellman_loss(f, f, data) - torch.stack(least))


def test_the_bonus_spends_its_square_on_every_pair():
    """Unclipped, f = mean target + c / sqrt(n): excess loss c^2 x visited pairs, so f lies on the border of F."""
    mdp = random_episodic_mdp(3, 2, 4, 0)
    _, counts = seen(mdp, 25)
    f = optimistic_critic(counts, Optimism(bonus=0.7, unvisited=0.0, limits=WIDE))
    pairs = (counts.visits > 0).sum((1, 2)).double()
    torch.testing.assert_close(excess_loss(f, counts), 0.49 * pairs)


def test_no_bonus_is_the_optimum_of_the_counts():
    mdp = random_episodic_mdp(3, 2, 4, 0)
    _, counts = seen(mdp, 500)
    assert bool((counts.visits > 0).all())
    f = optimistic_critic(counts, Optimism(bonus=0.0, limits=WIDE))
    torch.testing.assert_close(f, counts.model(mdp.initial).optimal().q)
    assert float(excess_loss(f, counts).max()) < 1e-20


def test_the_critic_is_optimistic():
    """It is never below the critic without bonus, is `unvisited` where nothing was tried, and stays in its limits."""
    mdp = deep_sea(4, 0)
    _, counts = seen(mdp, 3)
    f, plain = optimistic_critic(counts), optimistic_critic(counts, Optimism(bonus=0.0, unvisited=0.0))
    assert bool((f >= plain).all())
    assert bool((f[counts.visits == 0] == 1.0).all())
    assert float(f.max()) <= 1.0


def test_one_visit_by_hand():
    """H = 1: f = r + c / sqrt(n) = 0.25 + 0.5 / 2 after four visits, 1 where none."""
    mdp = random_episodic_mdp(1, 2, 1, 0)
    counts = Counts(moves=torch.tensor([[[[4.0], [0.0]]]]).double(), reward=torch.tensor([[[1.0, 0.0]]]).double())
    assert mdp.horizon == 1
    assert optimistic_critic(counts).flatten().tolist() == pytest.approx([0.5, 1.0])


def test_between_switches_the_actor_is_the_exponentiated_critic():
    """A trigger that never fires again: after k episodes pi = exp(eta k f) / Z, f of the empty data and the offline ones."""
    mdp = random_episodic_mdp(3, 2, 4, 0)
    data, counts = seen(mdp, 500)
    run = optimistic_actor_critic(
        mdp, 7, np.random.default_rng(0), rate=0.3, switching=Switching(growth=1e9), offline=data
    )
    assert run.switches == (0,)
    f = optimistic_critic(counts)
    torch.testing.assert_close(run.critic, f)
    torch.testing.assert_close(run.policy, (0.3 * 7 * f).softmax(-1))


@pytest.mark.parametrize("rate", [1e6])
def test_a_large_rate_is_optimistic_value_iteration(rate):
    """The policy is greedy for f wherever f has one best action."""
    run = optimistic_actor_critic(deep_sea(4, 1), 60, np.random.default_rng(0), rate=rate)
    top = run.critic.topk(2).values
    clear = top[..., 0] - top[..., 1] > 1e-4
    assert bool(clear.any())
    assert torch.equal(run.policy.argmax(-1)[clear], run.critic.argmax(-1)[clear])
    torch.testing.assert_close(run.policy.amax(-1)[clear], torch.ones_like(run.policy.amax(-1)[clear]))


def test_a_switch_resets_the_actor():
    """Planning before every episode: pi = exp(eta f) / Z of the last critic; kept logits remember the critics before."""
    mdp = deep_sea(4, 1)
    reset = optimistic_actor_critic(mdp, 30, np.random.default_rng(0), switching=Switching(growth=1.0))
    assert len(reset.switches) == 30
    torch.testing.assert_close(reset.policy, (5.0 * reset.critic).softmax(-1))
    kept = optimistic_actor_critic(mdp, 30, np.random.default_rng(0), switching=Switching(growth=1.0, keep=1.0))
    assert float((kept.policy - (5.0 * kept.critic).softmax(-1)).abs().max()) > 0.1


@pytest.mark.parametrize("mdp", [deep_sea(4, 0), random_episodic_mdp(3, 2, 3, 0)])
def test_switches_are_logarithmic(mdp):
    """At most S A H (log2 T + 1), and the first before the first episode."""
    run = optimistic_actor_critic(mdp, 300, np.random.default_rng(0), rate=1.0)
    assert run.switches[0] == 0
    assert 1 < len(run.switches) <= mdp.reward.numel() * (math.log2(300) + 1)
    assert list(run.switches) == sorted(set(run.switches))


def test_the_trigger_by_hand():
    due = Switching().due
    n = torch.tensor([[0.0, 1.0, 4.0]])
    assert not due(n, n)
    assert due(torch.tensor([[1.0, 1.0, 4.0]]), n)
    assert due(torch.tensor([[0.0, 2.0, 4.0]]), n)
    assert not due(torch.tensor([[0.0, 1.0, 7.0]]), n)
    assert due(torch.tensor([[0.0, 1.0, 8.0]]), n)
    assert Switching(growth=1.0).due(torch.tensor([[0.0, 1.0, 5.0]]), n)


def test_it_finds_the_deep_end_and_a_demonstration_finds_it_at_once():
    mdp, none = deep_sea(5, 0), Optimism(bonus=0.0, unvisited=0.0)
    run = optimistic_actor_critic(mdp, 400, np.random.default_rng(0))
    assert float((run.returns[-100:] > 0.5).double().mean()) > 0.9
    shown = mdp.sample(mdp.optimal().policy, 1, np.random.default_rng(1))
    hybrid = optimistic_actor_critic(mdp, 100, np.random.default_rng(0), optimism=none, offline=shown)
    assert float((hybrid.returns > 0.5).double().mean()) > 0.9


def test_no_episodes_are_refused():
    with pytest.raises(ValueError, match="at least 1 episode"):
        optimistic_actor_critic(deep_sea(3, 0), 0, np.random.default_rng(0))
