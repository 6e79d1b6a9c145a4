"""The small problems of the claims of sac, pmoe and dsac-t: what they pay, what is measured, and what differs between arms."""

from __future__ import annotations

import pytest
import torch

from unipo.methods.actor_critic import sac
from unipo.objectives import GaussianReturn
from unipo.reproduce import actor_critic as page


def test_a_scale_multiplies_rewards_and_nothing_else() -> None:
    once, ten = (page.drawn(torch.Generator().manual_seed(3), scale, 50) for scale in (1.0, 10.0))
    assert torch.allclose(ten["reward"], 10 * once["reward"])
    for name in ("observation", "action", "final_observation", "noise", "next_noise", "target_noise"):
        assert torch.equal(once[name], ten[name])
    state, reward = page.moved(torch.tensor([[0.5], [0.9]]), torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
    assert state.tolist() == [[0.0], [1.0]]
    assert reward.tolist() == pytest.approx([-0.05, -1.05])


def test_what_is_judged_is_in_units_of_the_scale() -> None:
    """One policy that does nothing, a critic that says 0: the same return and error at every scale."""
    recipe = sac(gamma=page.GAMMA, temperature=0.0, automatic=False)
    players, knobs = page.learned(recipe, 0, 1.0, page.OF_SAC, 1)
    assert knobs == {}
    with torch.no_grad():
        for p in players.critic.parameters():
            p.zero_()
        for p in players.policy.network.head.parameters():
            p.zero_()
        players.policy.network.head.bias[1] = -20.0
    once, ten = (page.judged(players, 0, scale, 0.0, rollouts=4000) for scale in (1.0, 10.0))
    assert once == pytest.approx(ten, rel=1e-4)
    grid = torch.linspace(-0.9, 0.9, page.STATES)
    push = -0.8 * grid
    after = grid + 0.5 * push
    expected = -(after.square() / (1 - page.GAMMA) + 0.05 * push.square()).mean()
    assert once["return"] == pytest.approx(float(expected), abs=0.02)
    assert once["error"] == pytest.approx(-float(expected), abs=0.05)


def test_two_equal_peaks_and_independent_bandits() -> None:
    q = page.TwoPeaks().q(torch.zeros(3, 1), torch.tensor([[0.7], [-0.7], [0.0]])).squeeze(1)
    assert q[:2].tolist() == pytest.approx([1, 1])
    assert float(q[2]) < 0.01
    policy = page.bandit_policy(page.Experts(3), 0)
    means = policy.raw(torch.eye(page.BANDITS))[:, 3:6]
    assert float(means.detach().std()) == pytest.approx(1.0, abs=0.2)
    assert [p.requires_grad for p in policy.network.head.parameters()] == [True, False]


def test_the_likelihood_arm_differs_in_the_critic_only() -> None:
    other = page.likelihood(page.DSAC)
    assert [c.knob for c in other.controllers] == ["temperature"]
    assert other.objective.terms()[1:] == page.DSAC.objective.terms()[1:]
    critic = other.objective.terms()[0][1]
    assert isinstance(critic, GaussianReturn)
    assert critic.spread_of(torch.full((4, 2), 7.0)).tolist() == [1.0, 1.0]
