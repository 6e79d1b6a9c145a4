"""Identity tests of dqn, ddpg, td3, sac and off-policy mdpo: what they equal, by hand, by enumeration and in limits."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.control_toys import all_players, control_batch
from unipo.critics import DiscreteQ, GreedyBackup, Pathwise, polyak
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, annotate, coefficients
from unipo.methods.actor_critic import ddpg, dqn, dual, mdpo_off_policy, sac, td3
from unipo.objectives import Bellman, Objective, with_settings
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import Categorical, Deterministic, Gaussian, SquashedGaussian
from unipo.recipe import Recipe
from unipo.training.build_control import Players, annotators, trained_players


def flat_gradient(recipe: Recipe, players: Players, batch: Episodes, objective: Objective | None = None) -> Tensor:
    """dL/dtheta over all trained parameters, by the learner."""
    assert recipe.control is not None
    learner = Learner(trained_players(recipe, recipe.control, players), LearnerSettings())
    learner.optimizer.zero_grad()
    learner.gradient(batch, with_settings(objective or recipe.objective, {}))
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
                      for p in learner.parameters()])  # fmt: skip


def transitions(n: int, **columns: Tensor) -> Episodes:
    """n steps with `columns`; those that belong to episodes are told by their names."""
    of_episode = ("terminated", "truncated", "discount", "final_observation")
    step = {"observation": torch.zeros(n, 1, dtype=torch.float64)}
    step |= {k: v for k, v in columns.items() if k not in of_episode}
    episode = {"terminated": torch.zeros(n, dtype=torch.bool), "discount": torch.full((n,), 0.9, dtype=torch.float64)}
    return Episodes.flat(step, {**episode, **{k: v for k, v in columns.items() if k in of_episode}}, kind="rollout")


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(objective: Objective, batch: Episodes, **signals: Tensor) -> dict[str, Tensor]:
    """dL/dsignal with the knobs at their defaults."""
    return dict(coefficients(with_settings(objective, {}), batch, signals).total)


# ---- what the next state is worth ------------------------------------------------------------------------------------
def test_termination_ends_the_target_and_truncation_does_not() -> None:
    """Step 1 terminated, step 2 was cut by a time limit, step 3 stands for three steps."""
    batch = transitions(3, reward=numbers(1, 1, 1), next_q=numbers(10, 10, 10), next_logp=numbers(-2, -2, -2),
                        terminated=torch.tensor([True, False, False]), truncated=torch.tensor([False, True, False]),
                        discount=numbers(0.9, 0.9, 0.9**3))  # fmt: skip
    assert Bellman()(batch, {}).tolist() == pytest.approx([1, 10, 1 + 7.29])
    assert Bellman(temperature=0.5)(batch, {}).tolist() == pytest.approx([1, 1 + 0.9 * 11, 1 + 0.729 * 11])


# ---- dqn -------------------------------------------------------------------------------------------------------------
def test_double_dqn_lets_the_network_choose() -> None:
    plain, double = dqn(), dqn(double=True)
    players = all_players(double)
    assert plain.control is not None
    assert double.control is not None
    batch, found = control_batch(double, fragments=40).without("next_q"), {}
    for recipe in (plain, double):
        found[recipe.control.backup] = annotate(batch, recipe.needs, annotators(recipe.control, players), 99)["next_q"]  # type: ignore[union-attr]
    slow, online = (c.values(batch["final_observation"])[:, 0] for c in (players.slow_critic, players.critic))
    assert torch.equal(found["greedy"], slow.max(1).values)
    assert torch.equal(found["double"], slow.gather(1, online.argmax(1, keepdim=True)).squeeze(1))
    assert bool((found["double"] <= found["greedy"]).all())
    assert bool((found["double"] < found["greedy"]).any())


def chain() -> tuple[Episodes, Tensor]:
    """Every transition of a chain of four states and two actions (back, on), one-hot; the best Q by value iteration."""
    s, a = (x.flatten() for x in torch.meshgrid(torch.arange(4), torch.arange(2), indexing="ij"))
    following, over = torch.where(a == 1, s + 1, (s - 1).clamp(min=0)), (s == 3) & (a == 1)
    reward = torch.where(over, 1.0, 0.1 * (s == 0) * (a == 0)).double()
    states = torch.eye(4, dtype=torch.float64)
    batch = transitions(8, observation=states[s], action=a, reward=reward, terminated=over,
                        final_observation=states[following.clamp(max=3)])  # fmt: skip
    q = torch.zeros(4, 2, dtype=torch.float64)
    for _ in range(500):
        q = (reward + 0.9 * (~over) * q[following.clamp(max=3)].max(1).values).reshape(4, 2)
    return batch, q


def test_fitted_q_reaches_the_fixed_point_of_the_bellman_equation() -> None:
    """A table trained by the recipe: the exact Q, by updates of the learner and copies of the target."""
    torch.manual_seed(0)
    batch, best = chain()
    recipe, critic = dqn(gamma=0.9), DiscreteQ(4, 2, hidden=()).double()
    slow = copy.deepcopy(critic).requires_grad_(False)
    settings = LearnerSettings(value_learning_rate=0.03, clip_norm=1e9, schedule="linear", total_updates=1500)
    learner = Learner({"critic": critic}, settings)
    for update in range(1, 1501):
        learner.update(annotate(batch, recipe.needs, {"next": GreedyBackup(slow)}, 99), recipe.objective)
        if update % 10 == 0:
            polyak(slow, critic, 1.0)
    assert torch.allclose(critic.values(torch.eye(4, dtype=torch.float64))[:, 0], best, atol=2e-3)


def test_dqn_is_linear_in_large_errors() -> None:
    batch = transitions(3, action=torch.zeros(3), reward=numbers(0, 0, 0), next_q=numbers(0, 0, 0))
    found = slope(dqn().objective, batch, q=numbers(0.5, -7, 100)[:, None])
    assert (3 * found["q"]).flatten().tolist() == pytest.approx([0.5, -1, 1])


# ---- deterministic actors --------------------------------------------------------------------------------------------
def test_the_actor_of_ddpg_has_the_deterministic_policy_gradient() -> None:
    """-mean of dQ/da(s, pi(s)) * dpi/dtheta(s), the two factors apart."""
    recipe = ddpg()
    players, batch = all_players(recipe), control_batch(recipe)
    actor = next(t for _, t in recipe.objective.terms() if t.title == "actor")
    got = flat_gradient(recipe, players, batch, actor)
    observation = batch["observation"]
    action = players.policy.distribution.mode(players.policy.raw(observation))
    leaf = action.detach().requires_grad_()
    (by_action,) = torch.autograd.grad(players.critic.q(observation, leaf).sum(), leaf)
    expected = torch.autograd.grad(-(by_action * action).sum() / len(action), list(players.policy.parameters()))
    parts = torch.cat([g.flatten() for g in expected])
    assert float(got.norm()) == pytest.approx(float(parts.norm()), rel=1e-9)
    learner = Learner(trained_players(recipe, recipe.control, players), LearnerSettings())  # type: ignore[arg-type]
    ours = dict(zip(map(id, learner.parameters()), got.split([p.numel() for p in learner.parameters()]), strict=True))
    for p, g in zip(players.policy.parameters(), expected, strict=True):
        assert torch.allclose(ours[id(p)], g.flatten(), atol=1e-12)


def test_td3_delays_its_actor_and_its_targets() -> None:
    recipe = td3()
    assert [t.title for _, t in recipe.objective.at(0).terms()] == ["critic"]
    assert [t.title for _, t in recipe.objective.at(1).terms()] == ["critic", "actor"]
    assert recipe.control is not None
    assert recipe.control.target_every == 2
    players, batch = all_players(recipe), control_batch(recipe)
    learner = Learner(trained_players(recipe, recipe.control, players), LearnerSettings())
    moved = []
    for _ in range(4):
        before = [p.detach().clone() for m in (players.policy, players.critic) for p in m.parameters()]
        learner.update(batch, recipe.objective)
        after = [p for m in (players.policy, players.critic) for p in m.parameters()]
        policy = len(list(players.policy.parameters()))
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        moved.append((any(changed[:policy]), any(changed[policy:])))
    assert moved == [(False, True), (True, True), (False, True), (True, True)]


def test_td3_without_its_three_changes_is_ddpg() -> None:
    plain, changed = ddpg(), td3(smoothing=0.0, delay=1)
    assert changed.control is not None
    changed = changed.but(control=replace(changed.control, critics=1))
    gradients = [flat_gradient(r, all_players(r), control_batch(r)) for r in (plain, changed)]
    assert torch.equal(*gradients)
    noisy = td3(delay=1)
    assert noisy.control is not None
    noisy = noisy.but(control=replace(noisy.control, critics=1))
    assert not torch.equal(gradients[0], flat_gradient(noisy, all_players(noisy), control_batch(noisy)))


# ---- sac -------------------------------------------------------------------------------------------------------------
def actor_terms(recipe: Recipe) -> Objective:
    """The recipe without its critic's terms."""
    terms = [(c, t) for c, t in recipe.objective.terms() if t.title not in ("critic", "value")]
    return (terms[0][1] * 1.0).but(weighted=tuple(terms))


class Known:
    """A critic of one state with known values of its choices, or a known function of the action."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def values(self, observation: Tensor, frozen: bool = False) -> Tensor:
        return self.of.expand(len(observation), 1, -1)

    def q(self, observation: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        return self.of(action).sum(-1, keepdim=True)


def constant_policy(distribution: Any, raw: Tensor) -> ControlPolicy:
    """The same raw parameters in every state: a trained bias under weights of 0."""
    policy = ControlPolicy(1, distribution, (), log_std="network", orthogonal=False).double()
    with torch.no_grad():
        policy.network.head.weight.zero_()
        policy.network.head.bias.copy_(raw)
    return policy


def bias_slope(recipe: Recipe, policy: ControlPolicy, critic: Any, batch: Episodes,
               reference: ControlPolicy | None = None) -> Tensor:  # fmt: skip
    """Gradient of the actor's loss in the raw parameters."""
    players = {"policy": policy, "pathwise": Pathwise(policy, critic, "min", reference)}
    policy.zero_grad()
    Learner(players, LearnerSettings()).gradient(batch, with_settings(actor_terms(recipe), {}))
    assert policy.network.head.bias.grad is not None
    return policy.network.head.bias.grad.clone()


Q = numbers(1.0, 0.2, -0.5)


def test_the_categorical_optimum_is_the_softmax() -> None:
    """L = alpha KL(pi || softmax(Q / alpha)) - alpha logsumexp(Q / alpha): no gradient at the softmax, and this value."""
    recipe, alpha, batch = sac(temperature=0.3, automatic=False), 0.3, transitions(2)
    best = constant_policy(Categorical(3), Q / alpha)
    assert float(bias_slope(recipe, best, Known(Q), batch).norm()) < 1e-12
    other = constant_policy(Categorical(3), numbers(0.1, 0.5, 0))
    joined = Pathwise(other, Known(Q))
    signals = {k: v.detach() for k, v in joined.signals(batch, ["pathwise_q", "pathwise_logp"]).items()}
    pi, soft = numbers(0.1, 0.5, 0).softmax(0), (Q / alpha).softmax(0)
    expected = alpha * (pi * (pi / soft).log()).sum() - alpha * torch.logsumexp(Q / alpha, 0)
    assert float(actor_terms(recipe)(batch, signals)) == pytest.approx(float(expected))
    pull = bias_slope(recipe, other, Known(Q), batch)
    assert float(pull[0]) < 0 < float(pull[2])  # descent raises what is best


def test_the_gaussian_optimum_of_a_quadratic() -> None:
    """Q = -k a^2 / 2: mean 0 and variance alpha / k; noise of -1 and 1 has the moments that a quadratic sees."""
    recipe, alpha, k = sac(temperature=0.5, automatic=False), 0.5, 8.0
    batch = transitions(2, noise=numbers(-1, 1)[:, None])
    critic = Known(lambda a: -k * a.square() / 2)

    def pull(mean: float, std: float) -> list[float]:
        return bias_slope(recipe, constant_policy(Gaussian(1), numbers(mean, math.log(std))), critic, batch).tolist()

    assert pull(0.0, math.sqrt(alpha / k)) == pytest.approx([0, 0], abs=1e-12)
    assert pull(0.3, 0.5) == pytest.approx([k * 0.3, k * 0.25 - alpha])


def test_without_temperature_and_spread_the_actor_is_that_of_ddpg() -> None:
    torch.manual_seed(0)
    soft, hard = sac(temperature=0.0, automatic=False), ddpg()
    players, batch = all_players(hard), control_batch(hard)
    policy = ControlPolicy(3, SquashedGaussian(2), (5,), log_std_init=-18.0, orthogonal=False).double()
    policy.network.load_state_dict(players.policy.network.state_dict())
    found = []
    for recipe, actor in ((soft, policy), (hard, players.policy)):
        actor.zero_grad()
        Learner({"policy": actor, "pathwise": Pathwise(actor, players.critic, "first")}, LearnerSettings()).gradient(
            batch, with_settings(actor_terms(recipe), {}))  # fmt: skip
        found.append(torch.cat([p.grad.flatten() for p in actor.network.parameters()]))
    assert float(found[1].norm()) > 1e-3
    assert torch.allclose(*found, atol=1e-6)
    assert isinstance(players.policy.distribution, Deterministic)


def test_the_temperature_rests_at_the_entropy_target() -> None:
    """Of 3 dimensions the target entropy is -3: the mean log-density rests at 3, above it the temperature rises."""
    (controller,) = sac(temperature=0.7).controllers
    controller = controller.sized(3, False)
    state = controller.start()
    assert controller.setting(state, 0) == pytest.approx(0.7)
    rest, above, below = (controller.observe(state, {"pathwise_logp": x}) for x in (3.0, 3.5, 2.5))
    assert controller.setting(rest, 0) == pytest.approx(0.7)
    assert controller.setting(above, 0) > 0.7 > controller.setting(below, 0)
    assert math.log(controller.setting(above, 0) / 0.7) == pytest.approx(
        3e-4, rel=1e-4
    )  # Adam's first step is its rate
    assert controller.observe(state, {}) == state
    assert dual(1.0, 3e-4, -1.0).sized(4, True).limit == pytest.approx(-0.98 * math.log(4))  # type: ignore[attr-defined]


def test_pathwise_and_score_function_gradients_agree() -> None:
    """E of (alpha log pi - Q) d log pi, by midpoints of equal probability; Q = sin(3 a), one Gaussian."""
    from scipy.stats import norm

    alpha, n, raw = 0.2, 20_001, numbers(0.3, -0.5)
    noise = torch.from_numpy(norm.ppf((np.arange(n) + 0.5) / n))
    policy = constant_policy(Gaussian(1), raw)
    batch = transitions(n, noise=noise[:, None])
    path = bias_slope(sac(temperature=alpha, automatic=False), policy, Known(lambda a: (3 * a).sin()), batch)
    leaf = raw.clone().requires_grad_()
    action = (raw[0] + raw[1].exp() * noise)[:, None]
    logp = Gaussian(1).logp(leaf.expand(n, 2), action)
    cost = alpha * logp.detach() - (3 * action[:, 0]).sin()
    (score,) = torch.autograd.grad((cost * logp).mean(), leaf)
    assert torch.allclose(path, score, atol=2e-3)
    assert float(score.norm()) > 0.1


# ---- mdpo, off-policy ------------------------------------------------------------------------------------------------
def test_mdpo_with_one_coefficient_is_sac() -> None:
    """c = lam: the same recipe; c near lam: the same gradient, log pi_k falls out."""
    fixed = sac(temperature=0.2, automatic=False)
    assert mdpo_off_policy(temperature=0.2, closeness=0.2) == fixed
    near = mdpo_off_policy(temperature=0.2, closeness=0.2 + 1e-9)
    assert "pathwise_reference_logp" in near.needs.signals
    batch = control_batch(fixed)
    a, b = (flat_gradient(r, all_players(r), batch) for r in (fixed, near))
    assert torch.allclose(a, b, atol=1e-7)
    far = mdpo_off_policy(temperature=0.2, closeness=1.0)
    assert not torch.allclose(a, flat_gradient(far, all_players(far), batch), atol=1e-3)


def test_mdpo_with_a_uniform_snapshot_is_sac_at_its_closeness() -> None:
    batch, policy = transitions(2), constant_policy(Categorical(3), numbers(0.4, -0.2, 0.1))
    uniform = constant_policy(Categorical(3), numbers(0, 0, 0))
    mirror = bias_slope(mdpo_off_policy(temperature=0.2, closeness=0.7), policy, Known(Q), batch, uniform)
    soft = bias_slope(sac(temperature=0.7, automatic=False), policy, Known(Q), batch)
    assert torch.allclose(mirror, soft, atol=1e-12)


def test_the_exact_step_of_mdpo() -> None:
    """pi proportional to pi_k^(1 - lam / c) exp(Q / c); c -> infinity stays at pi_k."""
    lam, c, old = 0.2, 0.7, numbers(0.4, -0.2, 0.1)
    recipe, snapshot = mdpo_off_policy(temperature=lam, closeness=c), constant_policy(Categorical(3), old)
    best = constant_policy(Categorical(3), (1 - lam / c) * old.log_softmax(0) + Q / c)
    assert float(bias_slope(recipe, best, Known(Q), transitions(2), snapshot).norm()) < 1e-12
    there = bias_slope(recipe, constant_policy(Categorical(3), old), Known(Q), transitions(2), snapshot)
    assert float(there.norm()) > 1e-2
    still = mdpo_off_policy(temperature=lam, closeness=1e9)
    pull = bias_slope(still, constant_policy(Categorical(3), old), Known(Q), transitions(2), snapshot)
    assert float(pull.norm()) < 1.0  # the closeness has no gradient at pi_k, whatever its weight


def test_the_snapshot_is_not_trained_and_is_refreshed() -> None:
    recipe = mdpo_off_policy(refresh=7)
    players, batch = all_players(recipe), control_batch(recipe)
    assert recipe.control is not None
    learner = Learner(trained_players(recipe, recipe.control, players), LearnerSettings())
    before = [p.clone() for p in players.snapshot.parameters()]
    learner.update(batch, with_settings(recipe.objective, {}))
    assert all(torch.equal(a, b) for a, b in zip(before, players.snapshot.parameters(), strict=True))
    trained = {id(p) for p in learner.parameters()}
    assert not trained & {id(p) for p in players.snapshot.parameters()}
    assert recipe.control.snapshot_every == 7


def test_the_density_of_a_sample_under_another_policy() -> None:
    """Where the tanh can be inverted it is the log-density of the action; beyond, it stays finite and exact."""
    squashed, generator = SquashedGaussian(2), torch.Generator().manual_seed(0)
    raw, other = (0.5 * torch.randn(9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    noise = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    action = squashed.sample(raw, noise)
    assert torch.allclose(squashed.logp_of_sample(raw, noise, other), squashed.logp(other, action), atol=1e-9)
    assert torch.allclose(squashed.logp_of_sample(raw, noise, raw), squashed.sample_with_logp(raw, noise)[1])
    far = raw + torch.tensor([40.0, 40.0, 0, 0])
    ratio = squashed.logp_of_sample(far, noise, other) - squashed.logp_of_sample(far, noise, far)
    u = Gaussian(2).sample(far, noise)
    assert torch.allclose(ratio, Gaussian(2).logp(other, u) - Gaussian(2).logp(far, u))
