"""Identity tests of td3-bc and iql, and recorded data as the memory of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.control_toys import all_players, control_batch
from tests.methods.test_actor_critic import flat_gradient, numbers, slope, transitions
from unipo.episodes import Column, Episodes, offsets_of
from unipo.methods.actor_critic import td3
from unipo.methods.catalog import build
from unipo.methods.offline_control import iql, td3_bc
from unipo.objectives import AdvantageWeight, Bonus, Objective, RelativeBonus, Sum
from unipo.recipe import Recipe
from unipo.training.build_control import build_control
from unipo.training.config import ConfigError, ControlConfig


def named(recipe: Recipe, *titles: str) -> Objective:
    """The terms of a recipe that are called so."""
    return Sum(weighted=tuple((c, t) for c, t in recipe.objective.terms() if t.title in titles))


# ---- td3-bc ----------------------------------------------------------------------------------------------------------
def test_the_actor_of_td3_bc_does_not_see_the_scale_of_q() -> None:
    q, batch = numbers(3.0, -1.0, 2.0, 0.5), transitions(4, action=torch.zeros(4, 2).double())
    actor = named(td3_bc(), "actor")
    once, thousand = (slope(actor, batch, pathwise_q=k * q)["pathwise_q"] * k for k in (1.0, 1000.0))
    assert torch.allclose(once, thousand)
    assert once.tolist() == pytest.approx([-2.5 / (4 * 1.625)] * 4)  # lambda = 2.5 / mean |Q|


def test_td3_bc_between_its_limits() -> None:
    """alpha = 0 is behaviour cloning; without cloning it is td3, up to the size of Q."""
    plain, cloned = td3(), td3_bc()
    batch = control_batch(cloned)
    players = all_players(cloned)
    bare = flat_gradient(cloned, players, batch, named(td3_bc(alpha=0.0), "actor", "cloning"))
    observation = batch["observation"]
    policy = players.policy
    policy.zero_grad()
    error = policy.distribution.mode(policy.raw(observation)) - batch["action"]
    error.square().mean().backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert float(bare.norm()) == pytest.approx(float(expected.norm()), rel=1e-9)
    assert torch.equal(flat_gradient(plain, players, batch, named(plain, "critic")),
                       flat_gradient(cloned, players, batch, named(cloned, "critic")))  # fmt: skip
    climbing = flat_gradient(plain, players, batch, named(plain, "actor"))
    relative = flat_gradient(cloned, players, batch, named(cloned, "actor"))
    action = policy.distribution.mode(policy.raw(observation))
    size = float(players.critic.q(observation, action)[:, 0].detach().abs().mean())
    assert torch.allclose(relative, climbing * 2.5 / size, atol=1e-12)
    assert [t.title for _, t in cloned.objective.at(0).terms()] == ["critic"]


def test_a_relative_bonus_of_nothing_is_finite() -> None:
    batch = transitions(2)
    assert bool(slope(RelativeBonus(), batch, pathwise_q=numbers(0, 0))["pathwise_q"].isfinite().all())
    assert not RelativeBonus().linear
    assert Bonus().linear


# ---- iql -------------------------------------------------------------------------------------------------------------
def expectile_of(values: Tensor, tau: float) -> float:
    """Where the recipe's V has no gradient, by bisection over a V that is the same in every row."""
    batch = transitions(len(values), target_q=values[:, None])
    term, low, high = named(iql(expectile=tau), "value"), float(values.min()), float(values.max())
    for _ in range(60):
        middle = (low + high) / 2
        pull = slope(term, batch, value=torch.full_like(values, middle))["value"].sum()
        low, high = (middle, high) if pull < 0 else (low, middle)
    return (low + high) / 2


def test_expectile_of_a_half_is_the_mean_and_of_one_the_maximum() -> None:
    values = numbers(-1.0, 0.0, 0.5, 4.0)
    assert expectile_of(values, 0.5) == pytest.approx(0.875)
    assert expectile_of(values, 0.9999) == pytest.approx(4.0, abs=2e-3)
    tau = 0.8  # tau * E (x - v)+ = (1 - tau) * E (v - x)+
    v = expectile_of(values, tau)
    assert float(tau * (values - v).clamp(min=0).mean()) == pytest.approx(
        float((1 - tau) * (v - values).clamp(min=0).mean())
    )


def test_iql_by_hand() -> None:
    """Two rows: u = min Q - V = -1 and 2; the second ended, so that its Q is regressed to the reward alone."""
    batch = transitions(2, reward=numbers(1, 3), target_q=numbers(2, 1, 5, 4).reshape(2, 2), old_value=numbers(2, 2),
                        old_next_value=numbers(10, 10), terminated=torch.tensor([False, True]))  # fmt: skip
    recipe = iql(expectile=0.7, beta=3.0, cap=100.0)
    found = slope(
        recipe.objective, batch, value=numbers(2, 2), q=numbers(0, 1, 0, 1).reshape(2, 2), logp=numbers(-1, -1)
    )
    assert found["value"].tolist() == pytest.approx([2 * 0.3 * 1 / 2, -2 * 0.7 * 2 / 2])
    assert found["q"].flatten().tolist() == pytest.approx([-10 / 2, -9 / 2, -3 / 2, -2 / 2])
    assert found["logp"].tolist() == pytest.approx([-np.exp(-3) / 2, -100 / 2])
    weight = AdvantageWeight(scale=1e4)(batch, {})
    assert weight.tolist() == [0.0, 100.0]  # no overflow


def test_iql_values_no_action_of_its_own() -> None:
    needs = iql().needs
    assert not any(s.startswith("pathwise") for s in needs.signals)
    assert not any(c.startswith("next_") for c in needs.columns)
    assert {"target_q", "old_value", "old_next_value"} <= needs.columns


# ---- recorded data ---------------------------------------------------------------------------------------------------
def recorded(
    folder: Path, episodes: int = 6, length: int = 20, size: int = 3, actions: int = 1, **columns: Any
) -> Path:
    """A folder of random episodes in the spaces of Pendulum."""
    generator = torch.Generator().manual_seed(0)
    n, one = episodes * length, torch.arange(episodes + 1)
    kinds = {
        "observation": Column(5 + 3 * torch.randn(n, size, generator=generator), "step"),
        "action": Column(2 * torch.rand(n, actions, generator=generator) - 1, "step"),
        "reward": Column(torch.randn(n, generator=generator), "step"),
        "behavior_logp": Column(torch.full((n,), float("nan")), "step"),
        "final_observation": Column(5 + 3 * torch.randn(episodes, size, generator=generator), "episode"),
        "terminated": Column(torch.arange(episodes) % 2 == 0, "episode"),
        "truncated": Column(torch.arange(episodes) % 2 == 1, "episode"),
        "policy_version": Column(torch.full((episodes,), -1), "episode"),
        "kind": Column(torch.zeros(episodes, dtype=torch.long), "episode", None, ("rollout",)),
    }
    made = Episodes({"turn": offsets_of(torch.full((episodes,), length)), "episode": one, "group": one}, kinds)
    folder.mkdir(parents=True)
    made.save(folder / "some.parquet")
    return folder


def config(tmp_path: Path, method: str, **changes: Any) -> ControlConfig:
    settings = {"method": method, "task": "Pendulum-v1", "out": str(tmp_path / "run"), "total_timesteps": 20,
                "rollout": 10, "hidden": (8,), "batch_size": 16, "evaluations": 1, "eval_episodes": 1, "checkpoints": 1,
                "tensorboard": False}  # fmt: skip
    return ControlConfig(**{**settings, **changes})


@pytest.mark.parametrize("method", ["td3-bc", "iql", "sac"])
def test_a_dataset_is_all_that_a_run_learns_from(tmp_path: Path, method: str) -> None:
    data = recorded(tmp_path / "data")
    run = build_control(
        config(tmp_path, method, dataset=str(data), normalize_observations=True), build(method, {}, True)
    )
    assert run.data.collector is None  # type: ignore[attr-defined]
    replay: Any = run.data.replay  # type: ignore[attr-defined]
    assert len(replay) == 120
    drawn = replay.sample(64, 1)
    assert float(drawn["observation"].mean()) == pytest.approx(5, abs=1)
    assert bool((drawn["discount"] == np.float32(0.99)).all())
    mean = run.policy.normaliser.mean
    assert mean.tolist() == pytest.approx([5, 5, 5], abs=1.0)
    slow = run.annotators["target"]
    assert torch.equal(slow.normaliser.mean, mean)  # type: ignore[attr-defined]
    before = [p.clone() for p in run.policy.parameters()]
    run.train()
    assert run.learner.updates == 20
    assert any(not torch.equal(a, b) for a, b in zip(before, run.policy.parameters(), strict=True))
    assert torch.equal(run.policy.normaliser.mean, mean)
    assert "eval_return" in run.records.metrics[-1]
    again = build_control(
        config(tmp_path, method, dataset=str(data), normalize_observations=True), build(method, {}, True)
    )
    again.restore()
    assert again.step == 2
    for a, b in zip(again.policy.parameters(), run.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'iql' learns from recorded data: give it some with --dataset"):
        build_control(config(tmp_path, "iql"), build("iql", {}, True))
    with pytest.raises(ConfigError, match=r"--dataset cannot be used: .*nowhere"):
        build_control(config(tmp_path, "iql", dataset=str(tmp_path / "nowhere")), build("iql", {}, True))
    wide = recorded(tmp_path / "wide", size=4)
    with pytest.raises(ConfigError, match=r"observations of shape \(4,\).*Pendulum-v1 has \(3,\) and \(1,\)"):
        build_control(config(tmp_path, "iql", dataset=str(wide)), build("iql", {}, True))
    with pytest.raises(ConfigError, match=r"'ppo' learns from what it does itself"):
        build_control(config(tmp_path, "ppo", dataset=str(wide)), build("ppo", {}, True))
