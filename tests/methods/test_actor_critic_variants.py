"""Identity tests of pmoe, tqc and dsac-t: mixtures of experts and critics of distributions, on top of sac."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.control_toys import all_players, control_batch
from tests.methods.test_actor_critic import flat_gradient, numbers, slope, transitions
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings
from unipo.methods.actor_critic import dsac_t, pmoe, sac, tqc
from unipo.objectives import (
    AllComponents,
    BestComponent,
    Components,
    GaussianReturn,
    QuantileRegression,
    Regression,
    Router,
    Squared,
    with_settings,
)
from unipo.sources.controllers import MovingMean
from unipo.training.build_control import trained_players


# ---- pmoe ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("update", ["all", "max"])
def test_pmoe_with_one_expert_is_sac(update: str) -> None:
    """The same gradient in every parameter that both have; none in the router's."""
    recipe, single = pmoe(experts=1, update=update), sac()
    mixed, plain = all_players(recipe), all_players(single)
    batch = control_batch(recipe)
    with torch.no_grad():
        for ours, theirs in zip(plain.critic.parameters(), mixed.critic.parameters(), strict=True):
            ours.copy_(theirs)
        plain.policy.network.trunk.load_state_dict(mixed.policy.network.trunk.state_dict())
        plain.policy.network.head.weight.copy_(mixed.policy.network.head.weight[1:])
        plain.policy.network.head.bias.copy_(mixed.policy.network.head.bias[1:])
    narrow = batch.with_columns("step", noise=batch["noise"][:, :-1])
    flat_gradient(recipe, mixed, batch)
    flat_gradient(single, plain, narrow)
    for ours, theirs in zip(mixed.critic.parameters(), plain.critic.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    head = mixed.policy.network.head
    assert torch.allclose(head.weight.grad[1:], plain.policy.network.head.weight.grad, atol=1e-12)
    assert torch.allclose(head.bias.grad[1:], plain.policy.network.head.bias.grad, atol=1e-12)
    assert float(head.bias.grad[1:].norm()) > 0
    assert float(head.weight.grad[0].norm()) == float(head.bias.grad[0]) == 0.0
    assert float(Router()(batch, {"router": torch.ones(6, 1), "pathwise_q": torch.zeros(6, 1)})) == 0.0


def test_the_router_learns_how_often_each_expert_is_best() -> None:
    """Free weights, the same in every row: no gradient where w_i is the share of rows in which i is the best."""
    q = numbers(3, 1, 0, 3, 2, 0, 0, 1, 5, 4, 0, 0).reshape(4, 3)  # best: 0, 0, 2, 0
    share = numbers(0.75, 0.0, 0.25)
    found = slope(Router(), transitions(4), router=share.expand(4, 3).clone(), pathwise_q=q)
    assert found["router"].sum(0).tolist() == pytest.approx([0, 0, 0])
    assert float(found["pathwise_q"].norm()) == 0.0
    off = slope(Router(), transitions(4), router=numbers(0.5, 0.3, 0.2).expand(4, 3).clone(), pathwise_q=q)
    assert off["router"].sum(0).tolist() == pytest.approx([2 / 3 * (0.5 - 0.75), 2 / 3 * 0.3, 2 / 3 * (0.2 - 0.25)])


def test_alike_experts_share_the_router() -> None:
    """Samples of alike experts are exchangeable: over all orders of any values each is the best equally often."""
    q = torch.tensor(list(itertools.permutations([0.3, -1.0, 2.0, 0.7])), dtype=torch.float64)
    assert BestComponent().of(q).mean(0).tolist() == pytest.approx([0.25] * 4)
    found = slope(Router(), transitions(len(q)), router=torch.full_like(q, 0.25), pathwise_q=q)
    assert float(found["router"].sum(0).norm()) == pytest.approx(0.0, abs=1e-12)


def test_max_moves_the_best_expert_only() -> None:
    q, logp = numbers(1, 3, 2, 5, 0, 1).reshape(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    best = slope(Components(temperature=0.4, share=BestComponent()), transitions(2), pathwise_q=q, pathwise_logp=logp)
    assert best["pathwise_q"].tolist() == [[0, -0.5, 0], [-0.5, 0, 0]]
    assert best["pathwise_logp"].tolist() == [[0, 0.2, 0], [0.2, 0, 0]]
    every = slope(Components(temperature=0.4, share=AllComponents()), transitions(2), pathwise_q=q, pathwise_logp=logp)
    assert torch.allclose(every["pathwise_q"], torch.full_like(q, -1 / 6))
    assert torch.allclose(every["pathwise_logp"], torch.full_like(q, 0.4 / 6))
    with pytest.raises(ValueError, match=r"update is 'best': expected one of all, max"):
        pmoe(update="best")


def test_the_router_is_moved_by_its_own_loss_only() -> None:
    """Without L_freq the router's row of the head has no gradient; with it, it has."""
    recipe = pmoe(experts=3)
    batch = control_batch(recipe)
    for terms, expected in ((recipe.objective.terms()[:2], False), (recipe.objective.terms(), True)):
        players = all_players(recipe)
        flat_gradient(recipe, players, batch, (recipe.objective * 1.0).but(weighted=tuple(terms)))
        assert bool(players.policy.network.head.bias.grad[:3].abs().max() > 0) == expected


# ---- tqc -------------------------------------------------------------------------------------------------------------
def quantile_batch(target: Tensor, n: int = 1) -> Episodes:
    return transitions(n, reward=torch.zeros(n), next_quantiles=target.expand(n, -1) / 0.9, next_logp=torch.zeros(n))


def test_quantiles_of_known_returns() -> None:
    """Returns 0 to 7, equally likely: no gradient where a quarter, and three quarters, of them lie below."""
    batch, term = quantile_batch(torch.arange(8).double()), QuantileRegression(delta=1e-6)
    there = slope(term, batch, quantiles=numbers(1.5, 5.5).reshape(1, 1, 2))
    assert float(there["quantiles"].abs().max()) < 1e-9
    low = slope(term, batch, quantiles=numbers(0.5, 6.5).reshape(1, 1, 2))["quantiles"]
    assert low.flatten().tolist() == pytest.approx([-0.125 / 2, 0.125 / 2], rel=1e-6)


def test_quantile_regression_by_hand() -> None:
    """One quantile, level 1/2: half the Huber function of the error; two critics add up."""
    batch = quantile_batch(numbers(2.0))
    loss = QuantileRegression()(batch, {"quantiles": numbers(2.5, -1.0).reshape(1, 2, 1)})
    assert float(loss) == pytest.approx(0.5 * 0.5**2 / 2 + 0.5 * (3 - 0.5))


def test_critics_of_distributions_take_the_weights_of_a_prioritised_replay() -> None:
    """Weight 2 doubles a row's gradient, weight 0 takes it out."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    batch = gaussian_batch(3).with_columns("episode", replay_weight=numbers(1, 2, 0))
    batch = batch.with_columns("step", next_quantiles=q[:, 0])
    for term, signals in (
        (GaussianReturn(), {"q": q[..., 0], "q_std": q[..., 1].abs()}),
        (QuantileRegression(), {"quantiles": q}),
    ):
        plain = slope(term, batch, **signals)
        weighted = slope(term.but(weight="replay_weight"), batch, **signals)
        for name in signals:
            assert torch.allclose(weighted[name][0], plain[name][0])
            assert torch.allclose(weighted[name][1], 2 * plain[name][1])
            assert float(weighted[name][2].abs().max()) == 0.0 < float(plain[name][2].abs().max())


def test_the_actor_of_tqc_climbs_the_mean_of_its_quantiles() -> None:
    recipe = tqc()
    players, batch = all_players(recipe), control_batch(recipe)
    assert recipe.control is not None
    joined: Any = trained_players(recipe, recipe.control, players)["pathwise"]
    found = joined.signals(batch, ["pathwise_q", "pathwise_action"])
    every = players.critic.quantiles(batch["observation"], found["pathwise_action"])
    assert torch.allclose(found["pathwise_q"], every.mean((1, 2)))


# ---- dsac-t ----------------------------------------------------------------------------------------------------------
def gaussian_batch(n: int = 64, k: float = 1.0, noisy: bool = True) -> Episodes:
    """Backed-up Gaussians of next states, everything in units of 1 / k."""
    generator = torch.Generator().manual_seed(1)
    reward, q, z = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(3))
    return transitions(n, reward=k * reward, next_q=k * q, next_q_std=k * torch.full((n,), 0.7).double(),
                       next_logp=torch.zeros(n), target_noise=z if noisy else 0 * z)  # fmt: skip


def test_dsac_t_with_a_frozen_spread_is_the_critic_of_sac() -> None:
    """w = 1 and no gradient to sigma: that of twin Q on the same targets, errors being far below Huber's 50."""
    batch, generator = gaussian_batch(), torch.Generator().manual_seed(2)
    q = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    std = torch.full((64, 2), 0.8, dtype=torch.float64)
    distributional = slope(GaussianReturn(scale=(1.0, 1.0)), batch, q=q, q_std=std)
    assert torch.allclose(distributional["q"], slope(Regression(), batch, q=q)["q"], atol=1e-15)
    assert float(distributional["q_std"].norm()) > 0


def test_the_fixed_point_of_dsac_t() -> None:
    """One state: Q at the mean of y_q and sigma^2 at the mean of (y_z - Q)^2 have no gradient; half of it has."""
    batch = gaussian_batch(4096)
    term = GaussianReturn(bound=50.0)
    y = (batch["reward"] + 0.9 * batch["next_q"])[:, None]
    z = y + 0.9 * (batch["target_noise"] * batch["next_q_std"])[:, None]
    q = y.mean()
    std = (z - q).square().mean().sqrt()

    def pull(s: Tensor) -> Tensor:
        ones = torch.ones(4096, 2, dtype=torch.float64)
        return torch.stack([g.sum() for g in slope(term, batch, q=q * ones, q_std=s * ones).values()])

    assert pull(std).tolist() == pytest.approx([0, 0], abs=1e-10)
    assert float(pull(std / 2**0.5)[1]) < -0.1  # the released code's fixed point: here sigma still grows
    assert float(pull(1.2 * std)[1]) > 0.1


def test_draws_are_clipped_in_units_of_the_running_spread() -> None:
    """The first batch's spread is its own mean; x is at most (bound m)^2, so a far draw pulls no harder."""
    batch = transitions(1, reward=numbers(0), next_q=numbers(0), next_q_std=numbers(100.0), target_noise=numbers(9.0))
    found = slope(GaussianReturn(), batch, q=numbers(0.0, 0.0)[None], q_std=numbers(1.0, 2.0)[None])
    assert found["q_std"].flatten().tolist() == pytest.approx([(1 / 1.1) * (1 - 9) / 1.1, (4 / 4.1) * (4 - 36) / 2.1])
    drawn = GaussianReturn().drawn(batch)
    assert drawn.tolist() == pytest.approx([0.9 * 3 * 100])


def test_dsac_t_gradients_scale_with_returns() -> None:
    """Without eps, limits of w, and Huber's knee: k times the returns, k times both gradients (a likelihood has 1 / k)."""
    term = GaussianReturn(eps=0.0, scale=(0.0, 1e99), penalty=Squared())
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    std = q.abs() + 0.1
    once = slope(term.but(spreads=(0.5, 0.9)), gaussian_batch(), q=q, q_std=std)
    ten = slope(term.but(spreads=(5.0, 9.0)), gaussian_batch(k=10.0), q=10 * q, q_std=10 * std)
    for name in ("q", "q_std"):
        assert torch.allclose(ten[name], 10 * once[name], rtol=1e-9)


def test_dsac_t_is_the_gaussian_likelihood_in_its_limit() -> None:
    """w = 1 / sigma^2, no eps, no clip, y_z = y_q: the gradient of (q - y)^2 / (2 sigma^2) + log sigma."""
    term = GaussianReturn(eps=0.0, scale=(0.0, 1e99), bound=1e9, penalty=Squared(), rate=0.0, spreads=(1.0, 1.0))
    batch, generator = gaussian_batch(noisy=False), torch.Generator().manual_seed(4)
    q = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    std = q.abs() + 0.3
    found = slope(term, batch, q=q, q_std=std)
    leaves = [q.clone().requires_grad_(), std.clone().requires_grad_()]
    y = (batch["reward"] + 0.9 * batch["next_q"])[:, None]
    likelihood = ((leaves[0] - y).square() / (2 * leaves[1].square()) + leaves[1].log()).sum(1).mean()
    for name, expected in zip(("q", "q_std"), torch.autograd.grad(likelihood, leaves), strict=True):
        assert torch.allclose(found[name], expected, rtol=1e-9)


def test_the_running_spread_is_one_for_the_term_and_its_controllers() -> None:
    """What the term makes of the knob and its batch is what the controller holds after the update; critics are apart."""
    recipe = dsac_t(spread_rate=0.1)
    running = [c for c in recipe.controllers if isinstance(c, MovingMean)]
    states = {c.knob: c.start() for c in running}
    players, batch = all_players(recipe), control_batch(recipe)
    assert recipe.control is not None
    learner = Learner(trained_players(recipe, recipe.control, players), LearnerSettings(learning_rate=0.01))
    seen = []
    for _ in range(3):
        settings = {c.knob: c.setting(states[c.knob], 0) for c in running}
        objective = with_settings(recipe.objective, settings)
        term = next(t for _, t in objective.terms() if isinstance(t, GaussianReturn))
        update = learner.update(batch, objective)
        for c in running:
            states[c.knob] = c.observe(states[c.knob], update.means())
        held = [c.setting(states[c.knob], 0) for c in running]
        assert term.spread_of(update.signals["q_std"]).tolist() == pytest.approx(held)
        seen.append((held, update.signals["q_std"].mean(0).tolist()))
    assert seen[0][0] == pytest.approx(seen[0][1])
    assert seen[1][0] == pytest.approx([0.9 * a + 0.1 * b for a, b in zip(seen[0][0], seen[1][1], strict=True)])
    assert held[0] != held[1]


def test_actor_temperature_and_targets_of_dsac_t_are_delayed() -> None:
    recipe = dsac_t()
    assert recipe.control is not None
    assert recipe.control.target_every == 2
    assert recipe.control.target_policy
    assert [t.title for _, t in recipe.objective.at(0).terms()] == ["critic"]
    assert [t.title for _, t in recipe.objective.at(1).terms()] == ["critic", "actor", "entropy"]
    assert recipe.control == replace(recipe.control, log_std=(-20.0, 0.5))
    dual = recipe.controllers[-1].sized(2, False)
    assert dual.observe(dual.start(), {"q_std/0": 1.0}) == dual.start()  # without the actor's signals it rests
