"""On-policy methods of environments: what they equal."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.control_toys import BOX, CHOICES, control_batch, control_players
from tests.methods.on_policy_toys import (
    OLD,
    WHITE,
    WORTH,
    dlogp,
    enumerated,
    fresh,
    gradient_of,
    of_policy,
    optimiser_of,
    policy_term,
    table,
)
from unipo.learner import Learner
from unipo.learner.policy_step import PolicyOptimiser
from unipo.methods import on_policy_control as page
from unipo.methods.catalog import build
from unipo.objectives import (
    GeneralisedAdvantage,
    PolicyGradient,
    TokenMean,
    TokenRatio,
    hoisted,
    with_settings,
)
from unipo.optimizers import RepeatedSteps, TrustRegion
from unipo.recipe import Recipe
from unipo.sources.controllers import InverseDecay


# ---- what methods equal ------------------------------------------------------------------------------------------------
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
@pytest.mark.parametrize("actions", [BOX, CHOICES])
@pytest.mark.parametrize("max_kl", [0.01, 0.3])
def test_a_trust_region_step_keeps_its_constraint(actions: Any, max_kl: float) -> None:
    """KL(old || new) <= max_kl where the step ends, by our own sum; the surrogate has risen; the critic is left to others."""
    recipe = page.trpo(max_kl=max_kl)
    batch, players = fresh(recipe, actions)
    policy, surrogate = players["policy"], policy_term(recipe)
    before = copy.deepcopy(policy)
    step = optimiser_of(recipe, policy)
    rest, update = step(batch, recipe.objective)
    assert [t.title for _, t in rest.terms()] == ["ValueRegression"]
    with torch.no_grad():
        old, new = before.raw(batch["observation"]), policy.raw(batch["observation"])
    reached = float(policy.distribution.kl(old, new).mean())
    assert 0.1 * max_kl < reached <= max_kl
    assert step.facts["kl"] == pytest.approx(reached, rel=1e-9), "the old policy first"
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
