"""On-policy methods of environments: exact gradients of tiny decision processes, and what the methods equal."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.control_toys import BOX, CHOICES, control_batch, control_players
from unipo.episodes import Column, Episodes, offsets_of
from unipo.learner import Learner, LearnerSettings, coefficients
from unipo.learner.policy_step import PolicyOptimiser, parted
from unipo.methods import on_policy_control as page
from unipo.methods.catalog import build
from unipo.objectives import (
    BatchStd,
    GeneralisedAdvantage,
    Objective,
    PolicyGradient,
    Surrogate,
    TokenMean,
    TokenRatio,
    hoisted,
    with_settings,
)
from unipo.optimizers import RepeatedSteps, TrustRegion
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import Categorical
from unipo.recipe import Recipe
from unipo.sources.controllers import InverseDecay

GAMMA = 0.9
WHITE = GeneralisedAdvantage(0.99, 0.95, BatchStd())


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


def fragments(
    observation: Tensor, action: Tensor, reward: Tensor, final: Tensor, cut: bool, **step: Tensor
) -> Episodes:
    """Episodes of equal length: columns [E, T, ...]."""
    e, t = reward.shape
    one = torch.arange(e + 1)
    columns = {
        "observation": Column(observation.flatten(0, 1), "step"),
        "action": Column(action.flatten(0, 1), "step"),
        "reward": Column(reward.flatten(), "step"),
        "final_observation": Column(final, "episode"),
        "terminated": Column(torch.full((e,), not cut), "episode"),
        "truncated": Column(torch.full((e,), cut), "episode"),
        "kind": Column(torch.zeros(e, dtype=torch.long), "episode", None, ("rollout",)),
        **{name: Column(values.flatten(0, 1), "step") for name, values in step.items()},
    }
    return Episodes({"turn": offsets_of(torch.full((e,), t)), "episode": one, "group": one}, columns)


def policy_term(recipe: Recipe, **changes: Any) -> Objective:
    """The policy gradient of a recipe alone."""
    return next(t for _, t in recipe.objective.terms() if isinstance(t, PolicyGradient | Surrogate)).but(**changes)


def dlogp(objective: Objective, episodes: Episodes, logp: Tensor) -> Tensor:
    return coefficients(objective, episodes, {"logp": logp}).total["logp"]


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


# ---- what methods equal ------------------------------------------------------------------------------------------------
def fresh(recipe: Recipe, actions: Any = BOX, seed: int = 0) -> tuple[Episodes, dict[str, Any]]:
    """A batch that the players have just collected: behavior log-probs and `old` distributions are their own."""
    players: dict[str, Any] = control_players(recipe, actions)
    batch = control_batch(recipe, seed, actions=actions)
    own = {k: v.detach() for k, v in players["policy"].signals(batch, ["logp", "parameters"]).items()}
    return batch.with_columns("step", behavior_logp=own["logp"], old_parameters=own["parameters"]), players


def gradient_of(objective: Objective, batch: Episodes, players: dict[str, Any], token_budget: int = 1 << 20) -> Tensor:
    learner = Learner(players, LearnerSettings(token_budget=token_budget))
    learner.gradient(batch, with_settings(objective, {}))
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learner.parameters()])
    learner.optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("actions", [BOX, CHOICES])
def test_the_first_epoch_of_ppo_is_a2c(actions: Any) -> None:
    """On fresh data the ratio is 1 and nothing is clipped: with the same advantage the gradients are equal."""
    ppo = build("ppo", {}, environment=True)
    batch, players = fresh(ppo, actions)
    a2c = page.a2c(lam=0.95, value=1.0).but(advantage=WHITE)
    expected = gradient_of(a2c.objective, batch, players)
    assert float(expected.norm()) > 0
    torch.testing.assert_close(gradient_of(ppo.objective, batch, players), expected)
    later = batch.with_columns("step", behavior_logp=batch["behavior_logp"] + 0.5)
    assert float((gradient_of(ppo.objective, later, players) - expected).norm()) > 1e-3


def test_the_surrogate_has_the_gradient_of_the_log_form() -> None:
    batch = control_batch(page.trpo())
    logp = control_players(page.trpo())["policy"].signals(batch, ["logp"])["logp"].detach()
    assert float((logp - batch["behavior_logp"]).abs().max()) > 0.05
    surrogate = policy_term(page.trpo())
    log_form = PolicyGradient(advantage=surrogate.advantage, weight=TokenRatio(), aggregate=TokenMean())  # type: ignore[attr-defined]
    torch.testing.assert_close(dlogp(surrogate, batch, logp), dlogp(log_form, batch, logp))
    ratio, advantage = (logp - batch["behavior_logp"]).exp(), surrogate.advantage(batch, {})  # type: ignore[attr-defined]
    torch.testing.assert_close(surrogate(batch, {"logp": logp}), -(ratio * advantage).mean())


@pytest.mark.parametrize(
    "recipe", [page.a2c(), page.reinforce_control(), page.trpo(), page.mdpo(), build("ppo", {}, True)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_looks_along_episodes_is_evaluated_before_they_are_cut(recipe: Recipe, seed: int) -> None:
    batch, players = control_batch(recipe, seed), control_players(recipe)
    objective, columns = hoisted(with_settings(recipe.objective, {}), batch)
    assert "old_value" not in columns.as_steps().without("old_value").columns
    found = gradient_of(objective, columns.as_steps().without("reward", "old_next_value"), players)
    torch.testing.assert_close(found, gradient_of(recipe.objective, batch, players))


# ---- mirror descent ----------------------------------------------------------------------------------------------------
def of_policy(recipe: Recipe, players: dict[str, Any]) -> Objective:
    return parted(with_settings(recipe.objective, {}), players["policy"])[0]


@pytest.mark.parametrize("actions", [BOX, CHOICES])
def test_the_first_step_of_mdpo_is_the_policy_gradient(actions: Any) -> None:
    """Card (i): at theta_k the divergence has no gradient, whatever its coefficient."""
    recipe = page.mdpo(step_size=0.01)
    batch, players = fresh(recipe, actions)
    policy = {"policy": players["policy"]}
    vanilla = PolicyGradient(advantage=WHITE, aggregate=TokenMean())
    expected = gradient_of(vanilla, batch, policy)
    assert float(expected.norm()) > 0
    torch.testing.assert_close(gradient_of(of_policy(recipe, players), batch, policy), expected, rtol=1e-9, atol=1e-12)


def test_mdpo_with_one_step_is_a2c() -> None:
    """Card (i): m = 1 moves the policy as one Adam step of A2C does; m = 2 does not."""
    a2c = page.a2c(lam=0.95, value=0.0).but(advantage=WHITE)
    reached = {}
    for steps in (1, 2):
        batch, players = fresh(page.mdpo())
        policy = players["policy"]
        step = PolicyOptimiser(policy, Learner({"policy": policy}), RepeatedSteps(steps=steps))
        rest, _ = step(batch, with_settings(page.mdpo().objective, {}))
        assert [t.title for _, t in rest.terms()] == ["ValueRegression"]
        reached[steps] = nn.utils.parameters_to_vector(policy.parameters()).detach()
    batch, players = fresh(page.mdpo())
    Learner({"policy": players["policy"]}).update(batch, a2c.objective)
    expected = nn.utils.parameters_to_vector(players["policy"].parameters()).detach()
    torch.testing.assert_close(reached[1], expected, rtol=1e-9, atol=1e-12)
    assert float((reached[2] - expected).abs().max()) > 1e-4


OLD = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
WORTH = torch.tensor([[1.0, -2.0, 0.4], [0.0, 3.0, -1.0]], dtype=torch.float64)


def table(logits: Tensor) -> ControlPolicy:
    """A softmax policy with the logits [S, A] of one-hot states."""
    policy = ControlPolicy(len(logits), Categorical(logits.shape[1]), hidden=()).double()
    with torch.no_grad():
        policy.network.head.weight.copy_(logits.T)
        policy.network.head.bias.zero_()
    return policy


def enumerated() -> Episodes:
    """Two states; in each the actions of OLD as often as it takes them (0, 0, 1, 2), so that batch means are expectations."""
    s, a = torch.tensor([0, 1]).repeat_interleave(4), torch.tensor([0, 0, 1, 2] * 2)
    one_hot, zero = torch.eye(2).double()[s], torch.zeros(8, 1).double()
    return fragments(one_hot[:, None], a[:, None], WORTH[s, a][:, None], one_hot, cut=False, old_value=zero,
                     behavior_logp=OLD.log()[a][:, None],
                     old_parameters=OLD.log().expand(8, -1)[:, None])  # fmt: skip


def mirror_gradient(logits: Tensor, step_size: float) -> Tensor:
    """Of the loss of MDPO in the logits [S, A]."""
    policy = table(logits)
    recipe = page.mdpo(step_size=step_size).but(advantage=GeneralisedAdvantage(0.99, 0.95))
    Learner({"policy": policy}).gradient(enumerated(), of_policy(recipe, {"policy": policy}))
    assert policy.network.head.weight.grad is not None
    return policy.network.head.weight.grad.T


@pytest.mark.parametrize("step_size", [0.3, 1.0, 2.5])
def test_exact_mirror_descent_is_a_softmax_of_advantages(step_size: float) -> None:
    """Card (ii): the surrogate is stationary at pi_k exp(t A) / Z, not at pi_k exp(-t A) / Z; its value is log Z / t."""
    best = OLD.log() + step_size * WORTH
    assert float(mirror_gradient(best, step_size).abs().max()) < 1e-12
    assert float(mirror_gradient(OLD.log() - step_size * WORTH, step_size).abs().max()) > 0.01
    episodes, policy = enumerated(), table(best)
    signals = policy.signals(episodes, ["logp", "reverse_kl:old"])
    ratio = (signals["logp"] - episodes["behavior_logp"]).exp()
    value = (ratio * episodes["reward"] - signals["reverse_kl:old"] / step_size).mean()
    expected = ((OLD * (step_size * WORTH).exp()).sum(1).log() / step_size).mean()
    torch.testing.assert_close(value.detach(), expected)


def test_a_shift_of_the_advantages_changes_no_solution() -> None:
    """Card (vii)."""
    best = OLD.log() + 0.7 * (WORTH + torch.tensor([[3.0], [-1.0]]).double())
    assert float(mirror_gradient(best, 0.7).abs().max()) < 1e-12


def test_the_step_size_of_mdpo_has_its_limits() -> None:
    """Card (v): t -> 0 leaves the divergence alone, whose optimum is pi_k; t -> infinity leaves the surrogate alone."""
    logits = OLD.log() + torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.3, -0.9]]).double()
    surrogate = mirror_gradient(logits, 1e12)
    x = logits.clone().requires_grad_()
    plain = -(x.softmax(1) * WORTH).sum(1).mean()
    torch.testing.assert_close(surrogate, torch.autograd.grad(plain, x)[0])
    x = logits.clone().requires_grad_()
    nearness = (x.softmax(1) * (x.log_softmax(1) - OLD.log())).sum(1).mean()
    torch.testing.assert_close(
        1e-9 * mirror_gradient(logits, 1e-9), torch.autograd.grad(nearness, x)[0], atol=1e-8, rtol=1e-6
    )
    assert float(1e-9 * mirror_gradient(OLD.log().expand(2, 3), 1e-9).abs().max()) < 1e-8


def test_the_divergence_of_mdpo_is_new_to_old() -> None:
    """KL(pi || pi_k) = sum pi log(pi / pi_k): of (1/4, 1/4, 1/2) to (1/2, 1/4, 1/4) it is log(2) / 4; TRPO's is the other."""
    policy = table(torch.tensor([[0.25, 0.25, 0.5]] * 2).double().log())
    found = policy.signals(enumerated(), ["reverse_kl:old", "forward_kl:old"])
    torch.testing.assert_close(found["reverse_kl:old"], torch.full((8,), math.log(2) / 4).double())
    new = torch.tensor([0.2, 0.3, 0.5]).double()
    found = table(new.log().expand(2, 3)).signals(enumerated(), ["reverse_kl:old", "forward_kl:old"])
    torch.testing.assert_close(found["reverse_kl:old"][0], (new * (new / OLD).log()).sum())
    torch.testing.assert_close(found["forward_kl:old"][0], (OLD * (OLD / new).log()).sum())
    assert {"reverse_kl:old"} == {s for s in page.mdpo().needs.signals if "kl" in s}
    assert "old_parameters" in page.mdpo().needs.columns


def test_the_step_size_falls_linearly_to_one_over_the_run() -> None:
    """1 / t_k over a run of 4: t = 1, 3/4, 1/2, 1/4 - never 0, even beyond the end."""
    (controller,) = page.mdpo(step_size=0.5).controllers
    assert isinstance(controller, InverseDecay)
    lasting = controller.lasting(4)
    assert [lasting.setting({}, k) for k in range(6)] == pytest.approx([2.0, 8 / 3, 4.0, 8.0, 8.0, 8.0])


def test_the_variants_of_mdpo() -> None:
    off_policy = page.mdpo(variant="off_policy", step_size=0.5, temperature=0.1)
    assert off_policy == page.mdpo_off_policy(closeness=2.0, temperature=0.1)
    assert page.mdpo() == page.mdpo_on_policy()
    with pytest.raises(ValueError, match=r"no variant 'offline': expected one of on_policy, off_policy"):
        page.mdpo(variant="offline")


# ---- trust regions -----------------------------------------------------------------------------------------------------
def optimiser_of(recipe: Recipe, policy: Any) -> PolicyOptimiser:
    return PolicyOptimiser(policy, Learner({"policy": policy}), recipe.policy_step)


@pytest.mark.parametrize("actions", [BOX, CHOICES])
@pytest.mark.parametrize("max_kl", [0.01, 0.3])
def test_a_trust_region_step_keeps_its_constraint(actions: Any, max_kl: float) -> None:
    """KL(old || new) <= max_kl where the step ends, by our own sum; the surrogate has risen; the critic is left to others."""
    recipe = page.trpo(max_kl=max_kl)
    batch, players = fresh(recipe, actions)
    policy, surrogate = players["policy"], policy_term(recipe)
    before = copy.deepcopy(policy)
    rest, update = optimiser_of(recipe, policy)(batch, recipe.objective)
    assert [t.title for _, t in rest.terms()] == ["ValueRegression"]
    with torch.no_grad():
        old, new = before.raw(batch["observation"]), policy.raw(batch["observation"])
    reached = float(policy.distribution.kl(old, new).mean())
    assert 0.1 * max_kl < reached <= max_kl
    logp = {"logp": policy.signals(batch, ["logp"])["logp"].detach()}
    assert float(surrogate(batch, logp)) < float(surrogate(batch, {"logp": batch["behavior_logp"]}))
    assert update.grad_norm > 0


def test_the_natural_gradient_of_an_enumerated_softmax() -> None:
    """F = diag(pi) - pi pi^T in each state: F^-1 g is the advantage itself, so log-probs move by c A up to normalisation,

    c = sqrt(2 delta / E A^2) - the same for every state, whatever the chances of the actions.
    """
    delta, policy = 0.02, table(OLD.log().expand(2, 3))
    recipe = page.npg(max_kl=delta, damping=0.0, cg_iterations=30).but(advantage=GeneralisedAdvantage(0.99, 0.95))
    optimiser_of(recipe, policy)(enumerated(), recipe.objective)
    advantage = WORTH - (OLD * WORTH).sum(1, keepdim=True)
    c = math.sqrt(2 * delta / float((OLD * advantage.square()).sum(1).mean()))
    expected = (OLD.log() + c * advantage).log_softmax(1)
    torch.testing.assert_close(
        policy.raw(torch.eye(2).double()).log_softmax(1).detach(), expected, rtol=1e-8, atol=1e-10
    )


def test_npg_is_trpo_without_its_line_search() -> None:
    assert page.npg(max_kl=0.03).objective == page.trpo().objective
    assert page.npg(max_kl=0.03).policy_step == TrustRegion(max_kl=0.03, line_search=False)
    assert page.trpo(max_kl=0.03).policy_step == TrustRegion(max_kl=0.03)


# ---- momentum ----------------------------------------------------------------------------------------------------------
def vector(policy: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(policy.parameters()).detach().clone()


def test_transport_samples_ahead_and_deploys_theta() -> None:
    """After two steps the policy acts at theta_2 + (1 - eta_2) / eta_2 (theta_2 - theta_1); evaluated and kept is theta_2."""
    recipe = page.npg_igt_harpg(rate=0.05)
    batch, players = fresh(recipe)
    policy = players["policy"]
    step, theta = optimiser_of(recipe, policy), [vector(policy)]
    for _ in range(2):
        step(batch, recipe.objective)
        with step.deployed():
            theta.append(vector(policy))
    eta = (2 / 4) ** 0.8
    torch.testing.assert_close(vector(policy), theta[2] + (1 - eta) / eta * (theta[2] - theta[1]))
    assert float((theta[2] - theta[1]).norm()) == pytest.approx(2 * 0.05 / 3)


@pytest.mark.parametrize("variant", ["n-pg-igt", "momentum", "n-harpg"])
def test_every_step_has_its_length(variant: str) -> None:
    """|theta_1 - theta_0| = g0 (2 / 2), and downhill."""
    recipe = page.npg_igt_harpg(variant=variant, rate=0.05)
    batch, players = fresh(recipe)
    policy = players["policy"]
    step, theta = optimiser_of(recipe, policy), vector(policy)
    gradient = gradient_of(policy_term(recipe), batch, {"policy": policy})
    step(batch, recipe.objective)
    with step.deployed():
        moved = vector(policy) - theta
    assert float(moved.norm()) == pytest.approx(0.05)
    learner = Learner({"policy": policy})
    order = torch.cat([torch.full((p.numel(),), float(i)) for i, p in enumerate(learner.parameters())])
    names = {id(p): i for i, p in enumerate(learner.parameters())}
    mine = torch.cat([gradient[order == names[id(p)]] for p in policy.parameters()])
    torch.testing.assert_close(moved, -0.05 * mine / mine.norm())


def test_the_hessian_aided_step_is_that_of_its_formula() -> None:
    """v = mean over fragments of grad <g, w> + <grad log p, w> g at theta^, written out fragment by fragment."""
    recipe = page.npg_igt_harpg(variant="n-harpg", rate=0.05)
    batch, players = fresh(recipe)
    other = control_batch(recipe, seed=5)
    policy = players["policy"]
    step = PolicyOptimiser(policy, Learner({"policy": policy}), recipe.policy_step, lambda: other)
    theta0 = vector(policy)
    step(batch, recipe.objective)
    theta1, d0, term = vector(policy), step.state["momentum"].clone(), policy_term(recipe)
    twin, w = copy.deepcopy(policy), theta1 - theta0
    seen: list[Tensor] = []
    step.sample = lambda: (seen.append(vector(policy)), other)[1]  # type: ignore[func-returns-value]
    step(batch, recipe.objective)
    nn.utils.vector_to_parameters(seen[0], twin.parameters())
    v = torch.zeros_like(w)
    for i in range(len(other)):
        one = other.select(torch.tensor([i]))
        logp = twin.signals(one, ["logp"])["logp"]
        g = _flat(term(one, {"logp": logp}), twin, True)
        v += (_flat(g @ w, twin) + (_flat(logp.sum(), twin) @ w) * g.detach()) / len(other)
    nn.utils.vector_to_parameters(theta1, twin.parameters())
    g1 = _flat(term(batch, {"logp": twin.signals(batch, ["logp"])["logp"]}), twin)
    eta = 2 / 3
    torch.testing.assert_close(step.state["momentum"], (1 - eta) * (d0 + v) + eta * g1)
    inside = float((seen[0] - theta0) @ w / (w @ w))
    assert 0 < inside < 1
    torch.testing.assert_close(seen[0], theta0 + inside * w)


def _flat(scalar: Tensor, module: nn.Module, graph: bool = False) -> Tensor:
    found = torch.autograd.grad(scalar, list(module.parameters()), create_graph=graph, retain_graph=True)
    return torch.cat([x.reshape(-1) for x in found])


def test_an_unknown_variant_is_told() -> None:
    with pytest.raises(ValueError, match="no variant 'storm': expected one of n-pg-igt, n-harpg"):
        page.npg_igt_harpg(variant="storm")


# ---- the policy step in a run ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "recipe", [page.trpo(), page.mdpo(), page.npg_igt_harpg(), page.npg_igt_harpg(variant="n-harpg")]
)
def test_a_saved_policy_step_goes_on_as_if_never_stopped(recipe: Recipe) -> None:
    batch, players = fresh(recipe)
    policy = players["policy"]

    def step_of(net: Any) -> PolicyOptimiser:
        return PolicyOptimiser(net, Learner({"policy": net}), recipe.policy_step, lambda: batch)

    objective = with_settings(recipe.objective, {})
    step = step_of(policy)
    step(batch, objective)
    twin, saved = copy.deepcopy(policy), {k: v.clone() for k, v in step.state_dict().items()}
    assert all(isinstance(t, Tensor) for t in saved.values())
    other = step_of(twin)
    other.load_state_dict(saved)
    for each in (step, other):
        each(batch, objective)
    assert torch.equal(vector(policy), vector(twin))


def test_a_term_of_both_is_refused() -> None:
    class Mixed(Objective):
        def own_needs(self) -> Any:
            return page.a2c().needs

    policy = control_players(page.a2c())["policy"]
    with pytest.raises(
        ValueError, match=r"'Mixed' reads \['logp', 'value'\], of which \['value'\] are not the policy's"
    ):
        parted(Mixed(), policy)
    with pytest.raises(TypeError, match="no optimiser of a policy step: expected one of TrustRegion"):
        PolicyOptimiser(policy, Learner({"policy": policy}), object())


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    recipe = page.trpo()
    batch, players = fresh(recipe)
    policy = players["policy"]
    broken = batch.with_columns(
        "step", reward=torch.where(torch.arange(batch.count("step")) == 2, torch.nan, batch["reward"])
    )
    before = vector(policy)
    with pytest.raises(FloatingPointError, match="not finite"):
        optimiser_of(recipe, policy)(broken, recipe.objective)
    assert torch.equal(vector(policy), before)
