"""Policy steps in a run: momentum at other parameters than are kept, checkpoints, errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests.control_toys import control_batch, control_players
from tests.methods.on_policy_toys import (
    fresh,
    gradient_of,
    optimiser_of,
    policy_term,
    vector,
)
from unipo.learner import Learner
from unipo.learner.policy_step import PolicyOptimiser, parted
from unipo.methods import on_policy_control as page
from unipo.objectives import (
    Objective,
    with_settings,
)
from unipo.recipe import Recipe
from unipo.training.build_control import build_control
from unipo.training.config import ControlConfig


# ---- momentum ----------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize(
    "recipe", [page.trpo(), page.mdpo(), page.npg_igt_harpg(), page.npg_igt_harpg(variant="n-harpg")]
)
def test_a_run_resumes_exactly(recipe: Recipe, tmp_path: Path) -> None:
    """Two steps, a checkpoint and two more of a fresh process, against four at a stretch."""
    config = ControlConfig(task="CartPole-v1", out=str(tmp_path), num_envs=2, rollout=16, total_timesteps=128, batch_size=8,
                           hidden=(8,), evaluations=0, tensorboard=False)  # fmt: skip
    runs = [build_control(config, recipe, Console(quiet=True)) for _ in range(2)]
    for step in range(4):
        runs[0].advance()
        if step == 1:
            runs[0].save()
    runs[1].restore()
    assert runs[1].step == 2
    for _ in range(2):
        runs[1].advance()
    first, second = (vector(run.policy) for run in runs)
    assert torch.equal(first, second)
    for run in runs:
        run.data.close()


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
