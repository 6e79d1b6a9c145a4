"""Every off-policy method through `build_control`, for a few steps; and the hooks that they have there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from unipo.critics import DiscreteQ, Pathwise, QEnsemble
from unipo.methods.actor_critic import mdpo_off_policy
from unipo.methods.catalog import build
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import Deterministic, GaussianMixture
from unipo.recipe import Recipe
from unipo.training.build_control import build_control
from unipo.training.config import ConfigError, ControlConfig
from unipo.training.loop import Run

QUIET = Console(file=io.StringIO())


def built(folder: Path, recipe: Recipe, task: str = "Pendulum-v1", **changes: Any) -> Run:
    assert recipe.control is not None
    settings = {**recipe.control.settings, "method": "x", "task": task, "out": str(folder / "run"), "total_timesteps": 60,
                "rollout": 20, "hidden": (8,), "batch_size": 8, "learning_starts": 20, "train_every": 1, "evaluations": 1,
                "eval_episodes": 1, "checkpoints": 1, "tensorboard": False, **changes}  # fmt: skip
    return build_control(ControlConfig(**settings), recipe, QUIET)


@pytest.mark.parametrize(("slug", "settings", "task"), [
    ("dqn", {}, "CartPole-v1"), ("dqn", {"double": True, "dueling": True}, "CartPole-v1"), ("ddpg", {}, "Pendulum-v1"),
    ("td3", {}, "Pendulum-v1"), ("sac", {}, "Pendulum-v1"), ("sac", {}, "CartPole-v1"), ("pmoe", {}, "Pendulum-v1"),
    ("pmoe", {"update": "max"}, "Pendulum-v1"), ("tqc", {}, "Pendulum-v1"), ("dsac-t", {}, "Pendulum-v1"),
])  # fmt: skip
def test_methods_run_and_resume(tmp_path: Path, slug: str, settings: dict[str, Any], task: str) -> None:
    """40 updates move what acts; a run restored from its checkpoint has the same weights and knobs."""
    recipe = build(slug, {slug: settings}, True)
    run = built(tmp_path, recipe, task)
    acting: Any = run.policy.critic if slug == "dqn" else run.policy
    before = [p.clone() for p in acting.parameters()]
    run.train()
    assert run.learner.updates == 40
    assert any(not torch.equal(a, b) for a, b in zip(before, acting.parameters(), strict=True))
    again = built(tmp_path, recipe, task)
    again.restore(check=False)
    assert again.settings() == run.settings()
    for name, module in run.modules.items():
        for a, b in zip(module.parameters(), again.modules[name].parameters(), strict=True):
            assert torch.equal(a, b), name


def test_the_snapshot_follows_every_so_many_updates(tmp_path: Path) -> None:
    run = built(tmp_path, mdpo_off_policy(refresh=16), batch_size=4)
    snapshot, moved = run.modules["snapshot"], []
    for step in range(2):
        for drawn in run.data.batches(step, 0):
            before = [p.clone() for p in snapshot.parameters()]
            list(run._updates(run._annotated(drawn)))
            moved.append(any(not torch.equal(a, b) for a, b in zip(before, snapshot.parameters(), strict=True)))
    assert len(moved) == 20
    assert [i + 1 for i, m in enumerate(moved) if m] == [16]
    run.data.close()


def test_dueling_has_a_value_beside_its_advantages(tmp_path: Path) -> None:
    run = built(tmp_path, build("dqn", {"dqn": {"dueling": True}}, True), "CartPole-v1")
    critic = run.modules["critic"]
    assert isinstance(critic, DiscreteQ)
    assert critic.dueling
    assert critic.network.weights[-1].shape[-1] == 3
    run.data.close()


def test_spaces_that_a_method_cannot_act_in(tmp_path: Path) -> None:
    for slug in ("td3", "ddpg", "pmoe", "dsac-t", "tqc"):
        with pytest.raises(ConfigError, match="discrete"):
            built(tmp_path, build(slug, {}, True), "CartPole-v1")
    with pytest.raises(
        ConfigError, match=r"maximum over discrete actions; the environment has a Box|among discrete actions"
    ):
        built(tmp_path, build("dqn", {}, True), "Pendulum-v1")


@pytest.mark.parametrize("distribution", [Deterministic(1), GaussianMixture(1, 2)], ids=str)
def test_a_snapshot_needs_a_density(distribution: Any) -> None:
    policy = ControlPolicy(2, distribution, (4,))
    with pytest.raises(ValueError, match="no log-density to compare"):
        Pathwise(policy, QEnsemble(2, 1, hidden=(4,)), reference=policy)
